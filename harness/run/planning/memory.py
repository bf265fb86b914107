"""What memory a stage takes at its peak, from sizes alone: no library is imported and nothing is loaded.

On a CPU this was held against measured peaks (`tests/unit/run/test_memory.py` says how far off it is). It is trusted where an engine says
where its weights are (`memory` in its YAML) and no method trains or calls a program of its own. Elsewhere, and on a card, where nothing was
measured yet, only what must be there at once for certain refuses a stage: weights, and keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slimbench.harness.config.schema import RunConfig, SpeedConfig, SuiteConfig
from slimbench.harness.config.sections.suite import BATCH_TOKENS, STRETCH, Pass
from slimbench.harness.measure.hardware import available_memory, hardware
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import models
from slimbench.methods.base import DENSE, HUGGINGFACE, Method, ModelShape, format_of

MARGIN = 0.15
"""How much more than was measured a trusted estimate says at most; of those of six cells it is also how much less."""

_SHARE = 0.95  # of the memory of a machine: what a stage may take without a limit of its own
_PROCESS = 510_000_000  # an interpreter with torch and transformers
_COMPILER = 150_000_000  # torch.compile beside them, and the graphs that it keeps
_CALIBRATED_TOKENS = 4096  # of one batch that goes through a block
_COPY_BYTES, _COPY_CACHES = 128 << 20, 4  # a buffer of the bandwidth probe, at least so many bytes and last-level caches
_UNKNOWN_CACHE = 32 << 20
_INDEX_BYTES = 6  # of a distribution: a log-probability and its token
_GROUP_BYTES = 4  # scale and offset of a group
_REARRANGED = ("packed", "codebook")  # on a CPU kernels hold the weights in an order of their own, beside the mapped file
_ACTING = "policy"  # how much of a text is kept is for what acts to say


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a stage by what they are for, on the device that it runs on.

    Attributes:
        weights: Of the model that is compressed or measured.
        certain: Those of them that are there whatever the library does.
        reference: Weights of the dense model beside it.
        cache: Keys and values at the largest point of the grid, or of the longest stream that keeps them all.
        work: What is computed meanwhile: logits, activations, hidden states of the calibration text, buffers of the probes.
        process: The process before it loads anything; on a card nothing.
        mapped: Pages of files, which count as long as memory is there and are given back where it is short.
        host: Weights in host memory while a card computes with one layer after the other.
        trusted: No estimate of this kind was more than `MARGIN` above what was measured.
    """

    weights: int
    certain: int
    reference: int = 0
    cache: int = 0
    work: int = 0
    process: int = 0
    mapped: int = 0
    host: int = 0
    trusted: bool = False

    @property
    def bytes(self) -> int:
        return self.weights + self.reference + self.cache + self.work + self.process + self.mapped

    @property
    def least(self) -> int:
        """The lower end: with less the stage does not run."""
        return int((self.bytes - self.mapped) / (1 + MARGIN)) if self.trusted else self.certain + self.reference + self.cache

    def __str__(self) -> str:
        parts = {"weights": self.weights, "reference": self.reference, "KV cache": self.cache, "work": self.work}
        parts |= {"libraries": self.process, "mapped files": self.mapped}
        return ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size >= 5e7)


@dataclass(frozen=True)
class _Model:
    """Sizes of the dense model: its parameters, bytes of each, and its shape where that is known before it is fetched."""

    parameters: int
    width: int
    shape: ModelShape | None

    @property
    def bytes(self) -> int:
        return self.parameters * self.width

    @property
    def table(self) -> int:
        """Numbers in the embedding, and in the head where it has its own."""
        return self.shape.vocab_size * self.shape.hidden_size * (1 if self.shape.tied_embeddings else 2) if self.shape else 0

    @property
    def layer(self) -> int:
        """Bytes of the largest layer that is brought in by itself."""
        return max(self.shape.vocab_size, self.shape.intermediate_size) * self.shape.hidden_size * self.width if self.shape else 0

    @property
    def token(self) -> int:
        """Bytes of keys and values of a token, or of the vector that stands for them."""
        if self.shape is None:
            return 0
        return self.shape.num_layers * (self.shape.latent or 2 * self.shape.num_kv_heads * self.shape.head_dim) * self.width


@dataclass(frozen=True)
class _Left:
    """Weights that a pipeline leaves: their bytes, those that are there for certain, and whether the settings tell the size at all."""

    format: str
    bytes: int
    certain: int
    is_known: bool


def estimate(
    config: RunConfig, methods: Sequence[Method], stage: Stage, shape: ModelShape | None, processor_cache: int = _UNKNOWN_CACHE
) -> Estimate | None:
    """The memory of a stage of a cell; None where the number of parameters is not known.

    Args:
        config: With its devices resolved.
        shape: Of the model; None where it is not known yet: then weights are all that is counted.
        processor_cache: Bytes of the last-level cache, which the probes of `speed` copy past.
    """
    dense = models.weight_bytes(config.model)
    if dense is None or not config.model.parameters:
        return None
    model = _Model(config.model.parameters, dense // config.model.parameters, shape)
    need = _compression(config, methods, model) if stage is Stage.COMPRESS else _measurement(config, methods, stage, model, processor_cache)
    on_card = _device(config, stage) == "cuda"
    process = _PROCESS + (_COMPILER if config.engine.compiles and stage is not Stage.COMPRESS else 0)
    return replace(need, process=0 if on_card else process, trusted=need.trusted and shape is not None and not on_card)


def room(config: RunConfig, stage: Stage) -> int:
    """Bytes that a stage may take on its device: its cards', or what the limits leave of the machine's memory."""
    if _device(config, stage) != "cuda":
        return host_room(config)
    index, cards = config.device.index, 1 if stage is Stage.COMPRESS else config.device.cards
    return sum(card.memory_bytes for card in hardware().gpus[index : index + cards])


def host_room(config: RunConfig) -> int:
    """Bytes of this machine's memory that a stage may take."""
    return int(config.limits.memory_gb * 1e9) if config.limits.memory_gb else int(_SHARE * available_memory())


def shortage(config: RunConfig, methods: Sequence[Method], stage: Stage) -> str | None:
    """Why a stage does not fit on this machine, and what would help, in one line; None where it fits or too little is known."""
    shape, there = models.known_shape(config.model), room(config, stage)
    need = estimate(config, methods, stage, shape, max(hardware().caches.values(), default=_UNKNOWN_CACHE))
    if need is None:
        return None
    alone = estimate(config.as_reference(), (), stage, shape)
    if alone and alone.least > there:
        need = replace(need, reference=0)  # the reference is refused, and others are measured without it
    name = config.model.name
    if need.least > there:
        size = f"about {_gb(need.bytes)}" if need.trusted else f"at least {_gb(need.least)}"
        return f"{stage} of {name} needs {size} ({need}), there are {_gb(there)}{_help(config, methods, need, stage)}"
    if need.host > (host := host_room(config)):
        return f"{stage} of {name} keeps {_gb(need.host)} of weights in host memory, there are {_gb(host)}"
    return None


def _help(config: RunConfig, methods: Sequence[Method], need: Estimate, stage: Stage) -> str:
    """What would make a stage fit."""
    if stage is Stage.COMPRESS:
        return "; device.compress=cpu would take host memory" if config.device.compress == "cuda" else ""
    ways = ["a smaller grid" if stage is Stage.SPEED else "shorter windows"] if need.cache + need.work > need.bytes / 4 else []
    if config.device.name == "cuda" and format_of(methods) in config.engine.spreads:
        cards = cards_for(need.least, min(card.memory_bytes for card in hardware().gpus))
        ways += [f"device.cards={cards}"] if cards > config.device.cards else []
    ways += [] if config.engine.memory == "layer" else ["engine=offload"]
    return f"; what would help: {' or '.join(ways)}" if ways else ""


def cards_for(size: int | None, card_bytes: int) -> int:
    """Cards of so many bytes that hold what a task takes (`TaskNeeds.memory_bytes`): a power of two, as heads are shared out among them.

    Args:
        size: None where it is not known: one card.
    """
    cards = 1
    while size and size > _SHARE * card_bytes * cards:
        cards *= 2
    return cards


def _compression(config: RunConfig, methods: Sequence[Method], model: _Model) -> Estimate:
    """The whole model, what is made of it, the hidden states of the calibration text before and after a block, and a batch within it.

    Methods that are written here leave dense weights where they were; libraries make tensors of their own. Of several steps the first may
    be there already, and leave fewer weights to the next: that is not foreseen, and not trusted.
    """
    if not any(method.needs.weights for method in methods):
        return Estimate(generated := model.bytes if config.model.is_random else 0, generated)
    needs, left = [method.needs for method in methods], _compressed(methods, model)
    work = 0 if left.format in DENSE and all(method.reference == "paper" for method in methods) else left.bytes
    if model.shape and any(need.calibration for need in needs):
        tokens = config.calibration.samples * config.calibration.length
        work += 2 * tokens * model.shape.hidden_size * model.width
        work += 4 * min(tokens, _CALIBRATED_TOKENS) * (3 * model.shape.hidden_size + model.shape.intermediate_size)
    foreign = any(need.training or need.environment or need.extra == "engines" for need in needs)
    is_one_step = sum(need.weights for need in needs) == 1
    return Estimate(model.bytes, model.bytes, work=work, trusted=left.is_known and is_one_step and not foreign)


def _measurement(config: RunConfig, methods: Sequence[Method], stage: Stage, model: _Model, cache: int) -> Estimate:
    on_card = _device(config, stage) == "cuda"
    left, is_layered = _compressed(methods, model), config.engine.memory == "layer"
    need = Estimate(left.bytes, left.certain, trusted=left.is_known and config.engine.memory is not None)
    if stage is Stage.SPEED:
        largest = max(point.batch * (point.prompt + point.new_tokens) for point in config.speed.grid)
        reference = 0 if config.is_reference else model.bytes
        need = replace(need, reference=reference, cache=largest * model.token, work=_timing(config.speed, model, cache))
    else:
        cache = 0 if format_of(methods) == _ACTING else _streamed(config.suite) * model.token
        need = replace(need, cache=cache, work=_scoring(config.suite, model), mapped=0 if on_card else _distributions(config.suite))
    if is_layered:
        host = need.weights + need.reference if on_card else 0
        need = replace(need, reference=0, host=host, trusted=need.trusted and left.format in DENSE)
        return replace(need, weights=model.layer, certain=0) if left.format in DENSE else need  # else it is loaded whole and then moved
    return replace(need, mapped=need.mapped + left.bytes) if left.format in _REARRANGED and not on_card else need


def _compressed(methods: Sequence[Method], model: _Model) -> _Left:
    changing = [method for method in methods if method.needs.weights]
    if not changing:
        return _Left(HUGGINGFACE, model.bytes, model.bytes, True)
    bits = [method.bits for method in changing if isinstance(getattr(method, "bits", None), int | float)]  # type: ignore[attr-defined]
    if (format_ := format_of(changing)) in DENSE or not bits:
        return _Left(format_, model.bytes, 0, format_ == HUGGINGFACE)
    numbers, group = model.parameters - model.table, getattr(changing[-1], "group_size", None)
    codes = int(numbers * bits[-1] / 8)
    scales = numbers // group * _GROUP_BYTES if group else 0
    return _Left(format_, codes + scales + model.table * model.width, codes, True)


def _scoring(suite: SuiteConfig, model: _Model) -> int:
    """Logits that are scored at once, in the model's dtype and once in float32."""
    tokens = max([*map(_scored_at_once, suite.passes()), suite.batch_tokens if suite.tasks else 0])
    return tokens * model.shape.vocab_size * (model.width + 4) if model.shape else 0


def _scored_at_once(wanted: Pass) -> int:
    """Tokens; `harness.measure.perplexity` goes through a text so."""
    if wanted.protocol == "document":
        return 0
    if wanted.is_stream:
        return STRETCH
    scored = wanted.seqlen // 2 if wanted.protocol == "suffix" else wanted.seqlen
    return max(scored, BATCH_TOKENS // wanted.seqlen * scored)


def _streamed(suite: SuiteConfig) -> int:
    """Tokens of the longest text that goes through one cache."""
    return max((wanted.seqlen for wanted in suite.passes() if wanted.protocol == "stream"), default=0)


def _distributions(suite: SuiteConfig) -> int:
    """The file of the reference's distributions on the text where there are most."""
    positions = [(p.limit or 0) * p.seqlen for p in suite.passes() if p.protocol != "document"]
    return max(positions, default=0) * suite.top_k * _INDEX_BYTES if suite.divergence else 0


def _timing(speed: SpeedConfig, model: _Model, cache: int) -> int:
    """Activations of the largest prompt, and what the probes of the machine copy and overwrite."""
    buffers = 2 * max(_COPY_BYTES, _COPY_CACHES * cache) + (2 * cache if speed.flush_cache else 0)
    if model.shape is None:
        return buffers
    prompt = max(point.batch * point.prompt for point in speed.grid)
    return buffers + prompt * (4 * model.shape.hidden_size + 3 * model.shape.intermediate_size) * model.width


def _device(config: RunConfig, stage: Stage) -> str:
    return config.device.compress if stage is Stage.COMPRESS else config.device.name


def _gb(size: float) -> str:
    return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"
