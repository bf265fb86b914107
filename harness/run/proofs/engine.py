"""`python -P -m slimbench.harness.run.proofs.engine ENGINE`: one engine on a tiny model, every format; one JSON line each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slimbench.harness.config.engines import get
from slimbench.harness.config.registry import Entry, entries
from slimbench.harness.config.schema import EngineConfig
from slimbench.harness.config.targets import locate
from slimbench.harness.measure.loaded import Generates, Loaded, Scores
from slimbench.harness.run.proofs.engines import Checked, to_line
from slimbench.harness.run.proofs.method import sparse_model, tiny_model
from slimbench.harness.stages import models
from slimbench.harness.store import artefact
from slimbench.methods.base import Calibration, DenseModel, Unsupported
from slimbench.methods.formats import policy
from slimbench.util import files

_TOLERANCE = 0.05  # of the largest logit: bfloat16 in another order
_WINDOW, _CHUNK, _STEPS = 24, 7, 6


def prove(engine: EngineConfig, format_: str, scratch: Path) -> Checked:
    """Make tiny artefacts of a format until one runs; hold whole windows, the cache and greedy decoding of it against each other."""
    reason = f"no method that writes format {format_} can run here"
    try:
        for folder in _artefacts(format_, scratch):
            try:
                model = locate(engine.target)(**engine.arguments).load(folder, "cpu")
                verdict = _judge(model)
            except Unsupported as refusal:
                reason = str(refusal)
                continue
            return Checked(format_, model.evidence().kernel, verdict)
    except Unsupported as refusal:
        reason = str(refusal)
    except Exception as error:
        return Checked(format_, None, f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Checked(format_, None, f"unsupported: {reason}")


def _artefacts(format_: str, scratch: Path) -> Iterator[Path]:
    """Artefacts of a tiny model, by each method that writes the format and has all that it needs; of those with data only the first.

    Inputs in eight bits come before inputs in four, whose rounding makes more of a last bit than `_TOLERANCE` allows.
    """
    able = [e for e in entries() if e.method.produces == format_ and not e.missing and e.method.needs.device != "cuda"]
    able.sort(key=_first_to_try)
    source = tiny_model(scratch / "dense")
    dense = DenseModel(source, source, "bfloat16", "cpu", models.shape_of(source))
    ids = torch.randint(0, dense.shape.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    for index, chosen in enumerate(able):
        if index and chosen.method.needs.calibration:
            return
        out = scratch / f"artefact-{index}"
        out.mkdir()
        start = dense
        if chosen.method.needs.zeros:
            start = replace(dense, path=sparse_model(source, scratch / f"sparse-{index}"))
        claim = chosen.method.compress(start, Calibration(ids, "check") if chosen.method.needs.calibration else Calibration.none(), out)
        artefact.write_manifest(out, artefact.Manifest(key="check", model="tiny", pipeline=[], claim=claim))
        yield out


def _first_to_try(entry: Entry) -> tuple[Any, ...]:
    settings = entry.settings
    return entry.name != "dense", entry.method.needs.calibration, "bits" not in settings, -settings.get("activation_bits", 0), entry.name


def _judge(loaded: Loaded) -> str:
    model, writer = Scores.of(loaded), Generates.of(loaded)
    ids = torch.randint(0, model.vocab_size, (model.batch(2), _WINDOW), generator=torch.Generator().manual_seed(1))
    whole = model.logits(ids).float().cpu()
    if not torch.isfinite(whole).all():
        return "FAILED: logits are not finite"
    bound = _TOLERANCE * float(whole.abs().max())
    apart = _apart_through_the_cache(model, ids, whole)
    if apart is not None and apart > bound:
        return f"FAILED: through the cache, logits differ by {apart:.3g}"
    step = writer.prefill(ids, room=_STEPS)
    tokens = [step.token.cpu()]
    while len(tokens) < _STEPS:
        step = writer.decode_step(step)
        tokens.append(step.token.cpu())
    chosen = torch.cat(tokens, dim=1)
    if writer.generate(ids, _STEPS) != chosen.tolist():
        return "FAILED: decoding chooses other tokens the second time"
    scores = model.logits(torch.cat([ids, chosen], dim=1), start=_WINDOW - 1)[:, :-1].float().cpu()
    if (scores.amax(-1) - scores.gather(2, chosen.unsqueeze(-1))[..., 0] > bound).any():
        return "FAILED: decoding does not choose the likeliest token"
    return "passed" if apart is not None else "passed, but tokens cannot go through its cache in pieces"


def _apart_through_the_cache(model: Scores, ids: torch.Tensor, whole: torch.Tensor) -> float | None:
    """Largest difference to whole windows where tokens go through the cache in pieces; None where an engine does not allow that."""
    state, pieces = None, []
    try:
        for piece in ids.split(_CHUNK, dim=1):
            logits, state = model.extend(piece, state)
            pieces.append(logits.float().cpu())
    except Unsupported:
        return None
    return float((torch.cat(pieces, dim=1) - whole).abs().max())


def main() -> None:
    engine = get(sys.argv[1])
    for format_ in [*engine.loaders, *([policy.FORMAT] if engine.drafts else [])]:
        with files.scratch("check") as scratch:
            print(to_line(prove(engine, format_, Path(scratch))), flush=True)


if __name__ == "__main__":
    main()
