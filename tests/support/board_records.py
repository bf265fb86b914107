"""Synthetic, valid records for tests of the board: every number is drawn from the seed of its cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimbench.harness.schema.compress import ArtefactFile, CompressResult
from slimbench.harness.schema.evidence import Evidence, LayerEvidence
from slimbench.harness.schema.generation import AskedPrompts, GenerationResult
from slimbench.harness.schema.hardware import identify
from slimbench.harness.schema.identity import CellIdentity, Keys, Stage, Status
from slimbench.harness.schema.quality import (
    DivergenceResult,
    DocumentResult,
    PerplexityResult,
    QualityResult,
    ZeroshotItems,
    ZeroshotResult,
)
from slimbench.harness.schema.record import Failure, Record
from slimbench.harness.schema.speed import EnergyResult, LargestBatch, MemoryResult, Probe, Roofline, Samples, SpeedPointResult, SpeedResult
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.site import last, parts
from slimbench.methods.base import Claim
from slimbench.util.hashing import short_hash

DENSE_BYTES = 269_060_552
WINDOWS = 48
TASKS = ("bb_general_knowledge", "bb_step_inference", "bb_social_iqa")
HARDWARE: dict[str, Any] = {"cpu": "Example CPU 9000", "cpu_flags": ["avx2", "fma"], "cores": 2, "memory_bytes": 8 * 2**30, "gpus": []}
PROVENANCE = {
    "slimbench": "0.1.0",
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "transformers": "5.17.0"},
    "os": "Linux",
    "hardware": HARDWARE,
    "threads": 2,
}


@dataclass(frozen=True)
class Spec:
    """One cell: what its records shall say. `loss` is the perplexity over that of the dense model."""

    pipeline: str = "dense"
    family: str = "reference"
    model: str = "tiny-135m"
    engine: str = "transformers"
    device: str = "cpu"
    suite: str = "wiki"
    speed: str = "short"
    cpu: str = HARDWARE["cpu"]
    seqlen: int = 512
    corpora: tuple[str, ...] = ("wikipedia",)
    loss: float = 1.0
    accuracy: float = 0.53
    decode_ms: float = 46.0
    bits: float | None = None
    size: float = 1.0
    sparsity: float | None = 0.0
    flags: tuple[str, ...] = ()
    simulated: bool = False
    source_precision: str | None = None
    seed: int = 0
    ends: dict[Stage, tuple[Status, Failure]] = field(default_factory=dict)

    @property
    def keys(self) -> Keys:
        compress = short_hash(ascii(self.model), ascii(self.pipeline), self.seed)
        return Keys(
            compress=compress,
            quality=short_hash(compress, ascii(self.engine), self.device, ascii(self.suite), self.seqlen, ascii(self.corpora)),
            speed=short_hash(compress, ascii(self.engine), self.device, ascii(self.speed)),
        )

    def reference(self) -> Spec:
        return Spec(**{name: getattr(self, name) for name in ("model", "engine", "device", "suite", "speed", "seqlen", "corpora", "seed")})


def failure(message: str, kind: str = "RuntimeError") -> Failure:
    return Failure(type=kind, message=message, traceback="Traceback (most recent call last): …")


def records(spec: Spec) -> list[Record]:
    """The records of a cell, in the order in which its stages run; a failed `compress` ends the cell."""
    made = []
    for stage in Stage:
        made.append(_record(spec, stage))
        if stage is Stage.COMPRESS and made[-1].status is not Status.OK:
            break
    return made


def write(made: Sequence[Record], tokens: Sequence[list[int]], texts: Sequence[str] = (), prompts: Sequence[str] = ()) -> None:
    """Let a cell have continued prompts of two kinds in turn.

    Args:
        made: Its records, which are changed.
        tokens: Of each continuation, equally many.
        texts: The same as texts; by default the numbers.
        prompts: Texts that were continued.
    """
    asked = list(prompts) or [f"Prompt {number}" for number in range(len(tokens))]
    kinds = [("question", "code")[number % 2] for number in range(len(asked))]
    quality = next(record.quality for record in made if record.quality)
    quality.generation = GenerationResult(
        protocol="greedy-1",
        asked=AskedPrompts(sha256=short_hash(*map(ascii, asked)), kinds=kinds, texts=asked),
        length=len(tokens[0]),
        batch=8,
        tokens=[list(ids) for ids in tokens],
        texts=list(texts) or [" ".join(map(str, ids)) for ids in tokens],
    )


def compress_record() -> Record:
    """The record of one `compress` stage that ended well."""
    return _record(Spec("gptq", "quantization", bits=4.25, size=0.426), Stage.COMPRESS)


def board() -> list[Record]:
    """A realistic board of one model: a reference, good and bad methods, and every kind of bad end."""
    return [record for spec in specs() for record in records(spec)]


def specs() -> list[Spec]:
    fallback = "fell back to dequantize + dense matmul: 269 MB of dense weights written for each token"
    return [
        Spec(),
        Spec("rtn", "quantization", loss=1.39, accuracy=0.50, decode_ms=51, bits=4.25, size=0.421, flags=(fallback,)),
        Spec("gptq", "quantization", loss=1.31, accuracy=0.512, decode_ms=39, bits=4.25, size=0.426),
        Spec("awq", "quantization", loss=1.21, accuracy=0.521, decode_ms=50, bits=4.5, size=0.424, flags=(fallback,)),
        Spec("nf4", "quantization", loss=1.29, accuracy=0.515, decode_ms=160, bits=4.13, size=0.421),
        Spec("int8", "quantization", loss=1.007, accuracy=0.528, decode_ms=44, bits=8.03, size=0.609),
        Spec("packed4(group_size=64)", "quantization", loss=1.38, accuracy=0.498, decode_ms=24, bits=4.5, size=0.43),
        Spec("shortgpt(blocks=3)", "pruning", loss=1.48, accuracy=0.49, decode_ms=42, size=0.92),
        Spec("sparsegpt", "pruning", loss=2.49, accuracy=0.45, decode_ms=46.5, sparsity=0.5),
        Spec(
            "sparsegpt(pattern=2:4)+gptq",
            "pruning+quantization",
            loss=3.98,
            accuracy=0.43,
            decode_ms=39.5,
            bits=4.25,
            size=0.426,
            sparsity=0.5,
            flags=("claims pattern 2:4, 16 % of the groups break it", "2:4 mask without a 2:4 kernel"),
        ),
        Spec("student(layers=15)", "distillation", loss=4.4, accuracy=0.41, decode_ms=25, size=0.57),
        Spec("fake-int6", "quantization", loss=1.02, accuracy=0.526, bits=16.0, simulated=True, flags=("claims 6 bits, stores 16",)),
        Spec(
            "hqq(bits=2)",
            "quantization",
            loss=23_000.0,
            accuracy=0.34,
            decode_ms=200,
            bits=2.5,
            size=0.335,
            ends={Stage.QUALITY: (Status.DIVERGED, failure("perplexity 477,000 is above the vocabulary size 49,152", "Diverged"))},
        ),
        Spec("quip", "quantization", ends={Stage.COMPRESS: (Status.FAILED, failure("hadamard size 576 is no power of two\nsecond line"))}),
        Spec("flap(sparsity=0.3)", "pruning", ends={Stage.COMPRESS: (Status.OOM, failure("out of memory", "MemoryError"))}),
        Spec(
            "gptq(group_size=128)",
            "quantization",
            ends={
                Stage.COMPRESS: (
                    Status.UNSUPPORTED,
                    failure("group_size 128 does not divide the input features 576; nearest that does: 64"),
                )
            },
        ),
        Spec(
            "wanda",
            "pruning",
            loss=6.6,
            accuracy=0.4,
            sparsity=0.5,
            ends={Stage.SPEED: (Status.TIMEOUT, failure("no result within 7200 s", "Timeout"))},
        ),
    ]


def _record(spec: Spec, stage: Stage) -> Record:
    status, reason = spec.ends.get(stage, (Status.OK, None))
    kept = status in (Status.OK, Status.DIVERGED)
    rng = np.random.default_rng(int(short_hash(spec.keys.of(stage), stage), 16))
    return Record(
        stage=stage,
        status=status,
        key=spec.keys.of(stage),
        hardware=identify(HARDWARE | {"cpu": spec.cpu}, spec.device, threads=2),
        cell=_cell(spec),
        phase="" if status is Status.OK else stage.value,
        started=f"2026-01-0{list(Stage).index(stage) + 1}T12:00:00+00:00",
        wall_seconds=12.5,
        peak_memory_bytes=1_234_567_890,
        compress=_compress(spec) if kept and stage is Stage.COMPRESS else None,
        quality=_quality(spec, rng) if kept and stage is Stage.QUALITY else None,
        speed=_speed(spec, rng) if kept and stage is Stage.SPEED else None,
        failure=reason,
        config={
            "model": {"name": spec.model, "source": "asset:tiny"},
            "suite": {"name": spec.suite, "seqlen": spec.seqlen, "corpus": list(spec.corpora), "batch_tokens": 1024},
            "speed": {"name": spec.speed, "grid": [{"batch": 1, "prompt": 128, "new_tokens": 32}]},
            "device": {"name": spec.device, "index": 0, "threads": 2},
        },
        command=f"slimbench run model={spec.model} method={spec.pipeline}",
        provenance=PROVENANCE | {"hardware": HARDWARE | {"cpu": spec.cpu}},
    )


def _cell(spec: Spec) -> CellIdentity:
    return CellIdentity(
        model=spec.model,
        source_precision=spec.source_precision,
        dtype="bfloat16",
        parameters=134_515_008,
        pipeline=spec.pipeline,
        steps=[{"name": spec.pipeline}],
        family=spec.family,
        engine=spec.engine,
        device=spec.device,
        suite=spec.suite,
        speed=spec.speed,
        seed=spec.seed,
        keys=spec.keys,
        reference=spec.reference().keys,
    )


def _compress(spec: Spec) -> CompressResult:
    size = round(DENSE_BYTES * spec.size)
    return CompressResult(
        claim=Claim("huggingface", bits=spec.bits, simulated=spec.simulated),
        files=[ArtefactFile(name="model.safetensors", bytes=size)],
        disk_bytes=size,
        dense_bytes=DENSE_BYTES,
        seconds=4.0 + 70 * (spec.bits is not None),
        step_seconds={spec.pipeline: 4.0},
    )


def _quality(spec: Spec, rng: np.random.Generator) -> QualityResult:
    return QualityResult(
        perplexity=[_perplexity(spec, corpus, rng) for corpus in spec.corpora],
        documents=[_documents(spec, spec.corpora[0])],
        zeroshot=[_task(task, spec.accuracy + offset, rng) for task, offset in zip(TASKS, (0.1, -0.05, -0.02), strict=True)],
        evidence=_evidence(spec, spec.flags),
        load_seconds=1.0,
        forward_tokens=WINDOWS * spec.seqlen,
    )


def _perplexity(spec: Spec, corpus: str, rng: np.random.Generator) -> PerplexityResult:
    difficulty = np.random.default_rng(len(corpus)).normal(math.log(20.76), 0.35, WINDOWS)
    nll = (difficulty + math.log(spec.loss) + rng.normal(0, 0.02 + 0.05 * math.log(spec.loss), WINDOWS)).tolist()
    return PerplexityResult(
        corpus=corpus,
        protocol="window",
        corpus_sha256=short_hash(ascii(corpus)),
        seqlen=spec.seqlen,
        window_nll=nll,
        labels_per_window=spec.seqlen - 1,
        perplexity=math.exp(sum(nll) / len(nll)),
        divergence=None if spec.family == "reference" else _divergence(spec),
    )


def _divergence(spec: Spec) -> DivergenceResult:
    rng = np.random.default_rng(int(short_hash(ascii(spec.pipeline), "divergence"), 16))
    kl = (math.log(spec.loss) + 0.001) * rng.gamma(20, 0.05, WINDOWS)
    return DivergenceResult(
        top_k=512,
        kl=kl.tolist(),
        kl_mean=float(kl.mean()),
        kl_p99=float(9 * kl.mean()),
        top1_agreement=np.exp(-kl).tolist(),
        delta_p=(0.1 * np.sqrt(kl)).tolist(),
    )


def _documents(spec: Spec, corpus: str) -> DocumentResult:
    rng = np.random.default_rng(len(corpus))
    words = rng.integers(40, 900, 20)
    nll = words * (3.9 + 1.4 * math.log(spec.loss) + rng.normal(0, 0.3, 20))
    return DocumentResult(
        corpus=corpus,
        protocol="document-1",
        corpus_sha256=short_hash(ascii(corpus)),
        nll=nll.tolist(),
        tokens=(words * 4 // 3).tolist(),
        words=words.tolist(),
        bytes=(words * 6).tolist(),
        word_perplexity=float(np.exp(nll.sum() / words.sum())),
        byte_perplexity=float(np.exp(nll.sum() / words.sum() / 6)),
        bits_per_byte=float(nll.sum() / words.sum() / 6 / math.log(2)),
    )


def _task(task: str, accuracy: float, rng: np.random.Generator) -> ZeroshotResult:
    difficulty = np.random.default_rng(len(task)).random(200)
    correct = (difficulty + rng.normal(0, 0.05, 200) < accuracy).astype(float).tolist()
    return ZeroshotResult(
        task=task,
        version="1.0",
        metric="acc",
        accuracy=sum(correct) / len(correct),
        stderr=float(np.std(correct, ddof=1)) / math.sqrt(len(correct)),
        chance=0.25,
        num_fewshot=0,
        items=ZeroshotItems(ids=[*range(200)], hashes=[short_hash(task, i) for i in range(200)], correct=correct),
    )


def _evidence(spec: Spec, flags: tuple[str, ...]) -> Evidence:
    return Evidence(
        weight_bytes=round(DENSE_BYTES * spec.size) + 1024,
        parameters=134_515_008,
        effective_bits=spec.bits or 16.0,
        sparsity=spec.sparsity,
        layers=[
            LayerEvidence(
                layer="Linear", role="mlp", count=90, parameters=1000, bytes=2000, dtypes={"bfloat16": 2000}, bits_per_weight=16.0
            )
        ],
        kernel="aten::mm",
        flags=list(flags),
    )


def _speed(spec: Spec, rng: np.random.Generator) -> SpeedResult:
    def around(milliseconds: float) -> list[float]:
        samples: list[Any] = (milliseconds * rng.lognormal(0, 0.04, 21)).tolist()
        return samples

    return SpeedResult(
        points=[
            SpeedPointResult(
                batch=1,
                prompt=128,
                new_tokens=32,
                candidate=Samples(prefill_ms=around(4 * spec.decode_ms), decode_ms=around(spec.decode_ms)),
                reference=Samples(prefill_ms=around(184.0), decode_ms=around(46.0)),
                first_call_ms=900.0,
                probes=[
                    Probe(copy_gbs=gbs, read_gbs=gbs + 1.5, matmul_gflops=gflops, seconds=t)
                    for gbs, gflops, t in ((10.6, 96.0, 0.0), (11.0, 99.0, 9.0))
                ],
                half_widths={"decode": 0.021, "prefill": 0.027, "reference_decode": 0.019, "speedup": 0.024},
                stopped="target",
                processes=[7, 7, 7],
                kv_cache_bytes=3_317_760,
                roofline=Roofline(
                    weight_bytes=round(DENSE_BYTES * spec.size),
                    cache_bytes=3_317_760,
                    bandwidth="read",
                    bound_ms=24.8,
                    fraction=24.8 / spec.decode_ms,
                ),
                energy=EnergyResult(reason="RAPL not readable: Permission denied"),
                load={"other_cores": 0.02, "steal": 0.0, "load_average": 2.1},
            )
        ],
        memory=MemoryResult(
            weight_bytes=round(DENSE_BYTES * spec.size),
            kv_cache_bytes=3_686_400,
            activation_bytes=41_000_000,
            process_bytes=900_000_000,
            process_peak_bytes=1_000_000_000,
        ),
        evidence=_evidence(spec, spec.flags),
        copy_bandwidth_gbs=11.0,
        read_bandwidth_gbs=12.5,
        largest_batch=LargestBatch(batch=64, limited_by="cap", bytes_per_sequence=6_100_000),
        flags=["load average 3.1 on 2 cores while measuring"] if spec.pipeline == "nf4" else [],
    )


def site_files(board: Board, beside: Mapping[str, bytes], gallery: Gallery) -> dict[str, bytes]:
    """Every file of the site, beside tables and plots that are there already."""
    return {path: content for part in parts(board, gallery) for path, content in part()} | dict(last(board, beside, gallery))


def equal_grid(
    methods: Mapping[str, float], grids: Mapping[str, float], draw: Callable[[int], float] = lambda seed: 1.0, both: bool = False
) -> list[Record]:
    """Dense, and methods of 4 bits on grids, whose losses multiply; rounding to nearest has one draw, the others three.

    Args:
        draw: What a draw of the calibration text does to the perplexity.
        both: Rounding to nearest has three draws, too.
    """
    made = records(Spec())
    for (method, loss), (grid, factor) in itertools.product(methods.items(), grids.items()):
        usual = "rtn-4bit" if method == "rtn" and grid.endswith("min-max") else method if "searched" in grid and method != "rtn" else None
        for seed in range(3 if method != "rtn" or both else 1):
            name = usual or f"{method}-{grid.replace(', ', '-')}"
            spec = Spec(name, "quantization", loss=loss * factor * draw(seed), bits=4.25, size=0.426, seed=seed)
            for record in records(spec):
                record.cell.steps = [{"name": name, "method": method, "settings": {"group_size": 64}, "grid": _full(grid)}]
                record.cell.calibration = None if method == "rtn" and not both else f"text-{seed}"
                record.config |= {"calibration": {"source": "text", "samples": 32, "length": 256, "seed": seed}}
                record.cell.reference = made[0].cell.keys
                made.append(record)
    return made


def _full(grid: str) -> str:
    return grid if "," in grid else f"{grid}, min-max"
