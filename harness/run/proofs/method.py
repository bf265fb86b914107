"""Proof of a method in seconds: its artefact of a tiny model, loaded by an engine, holds what it claims."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimbench.harness.config import engines
from slimbench.harness.config.registry import entry
from slimbench.harness.run.proofs import taught
from slimbench.util import files

TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def tiny_model(folder: Path, dtype: str = "bfloat16", **more: int) -> Path:
    """Write a two-layer Llama with random weights, on which a method can be tried in seconds; `more` are other fields of its shape."""
    from slimbench.harness.config.schema import ModelConfig
    from slimbench.harness.stages.models import generate

    generate(ModelConfig(name="tiny", source="random", dtype=dtype, shape=TINY | more), folder)  # type: ignore[arg-type]
    return folder


def sparse_model(dense: Path, folder: Path) -> Path:
    """Write a model with the smaller half of each matrix in its blocks zero, for methods that begin with zeros."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
            continue
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.dim() == 2:
                tensor[tensor.abs() < tensor.abs().float().median()] = 0
        save_file(tensors, folder / file.name, {"format": "pt"})
    return folder


def check(name: str) -> dict[str, Any]:
    """Compress the tiny model, load the artefact from disk and hold the claim against the evidence.

    Returns:
        Facts for a report: seconds, claim, evidence flags, bytes, kernel, and whether the logits are finite.

    Raises:
        methods.base.Unsupported: The method does not run on this machine.
    """
    import time

    import torch

    from slimbench.harness.config.targets import locate
    from slimbench.harness.measure import claims
    from slimbench.harness.stages.models import matrix_parameters, shape_of
    from slimbench.harness.store import artefact
    from slimbench.methods.base import Calibration, DenseModel, Unsupported

    method = entry(name).method
    if method.needs.environment:
        raise Unsupported(f"it runs in the environment {method.needs.environment}: slimbench engines check tries the formats of an engine")
    engine = engines.able(method.produces)
    with files.scratch("check") as scratch:
        source = tiny_model(Path(scratch) / "dense")
        source = sparse_model(source, Path(scratch) / "sparse") if method.needs.zeros else source
        shape = shape_of(source)
        method.check(shape)
        ids = torch.randint(0, shape.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
        out = Path(scratch) / "artefact"
        out.mkdir()
        began = time.perf_counter()
        dense = DenseModel(source, source, "bfloat16", "cpu", shape, original=tiny_model(Path(scratch) / "first", num_hidden_layers=4))
        if method.needs.text:
            folder = Path(scratch) / "tokenizer"
            taught.write_tokenizer(folder, shape.vocab_size)
            text = taught.write(method.recipe, Path(scratch) / "taught")
            dense = replace(dense, tokenizer_path=folder, taught=text, teacher=taught.Willing())
        claim = method.compress(dense, Calibration(ids, "check") if method.needs.calibration else Calibration.none(), out)
        seconds = time.perf_counter() - began
        stored = artefact.files(out)
        artefact.write_manifest(out, artefact.Manifest(key="check", model="tiny", pipeline=[], claim=claim))
        model = locate(engine.target)(loaders=engine.loaders).load(out, "cpu")
        found = claims.check(model, claim, artefact.disk_bytes(out), [method.needs], matrix_parameters(source))
        logits = model.logits(ids[:2])
        return {
            "seconds": seconds,
            "claim": claim.to_dict(),
            "disk_bytes": sum(f.bytes for f in stored),
            "weight_bytes": found.weight_bytes,
            "effective_bits": found.effective_bits,
            "sparsity": found.sparsity,
            "kernel": found.kernel,
            "flags": found.flags,
            "finite": bool(torch.isfinite(logits).all()),
        }
