"""What a compression method is: its facts, its settings and one function that writes an artefact.

A method is a frozen dataclass in one file below `methods/`, named by `_target_` in one YAML below `conf/method/`.
This module imports no heavy library, so that listing methods takes milliseconds: a method imports torch and its library in `compress`.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimbench.methods.work import Work, joined

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimbench.util.writing.teaching import Teacher

Device = Literal["cpu", "cuda"]
HUGGINGFACE = "huggingface"
EDITED = "edited"
POLICY = "policy"
DENSE = (HUGGINGFACE, EDITED)
"""Formats whose weights are as a model was trained with them: `DenseModel.load` gives an ordinary module."""
ANY_BASE = (*DENSE, "packed", "codebook", "runtime", "adapters", "bitmap", "bitsandbytes")
"""Every format whose loader gives a module of transformers, so that a policy can sit on it."""


def _silent(done: float, total: float) -> None:
    """Progress that nobody watches."""


class Unsupported(Exception):
    """The combination cannot run here, and that is a finding, not a failure: the cell is recorded as `unsupported`."""


@dataclass(frozen=True)
class Citation:
    """Where a method comes from.

    Attributes:
        title: The name by which the field knows the method.
        year: Year of first publication.
        arxiv: arXiv id, or None where there is no preprint.
        covers: Ids of the surveyed systems that this method stands for.
    """

    title: str
    year: int
    arxiv: str | None = None
    covers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without.

    Attributes:
        calibration: It reads calibration tokens.
        training: It updates weights by gradient descent.
        text: It trains on what a teacher wrote by the recipe that its setting `recipe` names.
        teacher: It asks a teacher other than the dense model itself, which every method has as `DenseModel.load_original`.
        device: The only device it runs on, or None for any.
        extra: The optional dependency group of slimbench that installs its reference library.
        modules: Import names that must be present.
        environment: Name in `slimbench env list` of the environment that compression runs in; None for the harness's own.
        hours: Hours that it takes on one accelerator for a model of a billion parameters, where that is more than one.
        weights: It reads the weights of the model; false for what passes its files on as they are.
        zeros: It has nothing to do where no earlier step, nor the source, has made zeros.
    """

    calibration: bool = False
    training: bool = False
    text: bool = False
    teacher: bool = False
    device: Device | None = None
    extra: str | None = None
    modules: tuple[str, ...] = ()
    environment: str | None = None
    hours: float | None = None
    weights: bool = True
    zeros: bool = False

    def missing_modules(self) -> list[str]:
        """Import names that this Python cannot find; nothing is imported."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that a method checks before heavy work. All counts, no units.

    Attributes:
        num_heads: 0 of a model without attention, as `num_kv_heads`.
        widths: Numbers of inputs of the linear layers of the blocks, where edits left others than hidden and intermediate size.
        latent: Numbers of a token that a layer keeps for all heads, of a model with latent attention; 0 of others.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied_embeddings: bool
    head_size: int | None = None
    widths: tuple[int, ...] = ()
    latent: int = 0

    @property
    def head_dim(self) -> int:
        """Width of a key or value of one head; 0 of a model without attention."""
        return self.head_size or (self.hidden_size // self.num_heads if self.num_heads else 0)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Read the shape from the contents of a transformers `config.json`."""

        def first(*names: str) -> Any:
            return next((config[n] for n in names if config.get(n) is not None), None)

        hidden, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head")
        return cls(
            architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
            hidden_size=hidden,
            intermediate_size=first("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden,
            num_layers=first("num_hidden_layers", "n_layer"),
            num_heads=heads or 0,
            num_kv_heads=first("num_key_value_heads") or heads or 0,
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", True)),
            head_size=config.get("head_dim"),
            latent=config["kv_lora_rank"] + (first("qk_rope_head_dim") or 0) if first("kv_lora_rank") else 0,
        )

    def check_group(self, group_size: int) -> None:
        """Raise `Unsupported` unless groups of `group_size` tile the inputs of every linear layer."""
        for width in (widths := self.widths or (self.hidden_size, self.intermediate_size)):
            if width % group_size:
                fits = [g for g in (32, 64, 128, 256) if not any(inputs % g for inputs in widths)]
                nearest = min(fits, key=lambda g: abs(g - group_size), default=None)
                hint = f"; nearest that does: {nearest}" if nearest else ""
                raise Unsupported(f"group_size {group_size} does not divide the input features {width}{hint}")


@dataclass(frozen=True)
class DenseModel:
    """The input of a method: a model in a local folder of safetensors, whose weights are not quantized.

    Attributes:
        path: Folder with `config.json` and safetensors weights; for a later step of a pipeline, the previous artefact.
        tokenizer_path: Folder with the tokenizer of the source model.
        dtype: Name of the torch dtype in which the weights are stored and computed with.
        device: Where compression runs.
        progress: Told how much of the work is done, `(done, total)`; shown with an estimate of what is left.
        checkpoints: Folder that outlives an interrupted run, in which a training method keeps what it resumes from; None: keep nothing.
        seed: That of the cell; whatever a method draws depends on it and on the method's own seed, if it has one.
        original: Folder of the model that the pipeline began with; None: `path` is it.
        taught: Folder of the examples that a teacher wrote (`util.writing.teaching`), None without any.
        teacher: Whom a method that `needs.teacher` asks while it trains.
        draft: Folder and identity of the model that the guesses of a policy shall come from (`methods.formats.policy.ActsByModel`), if any.
        format: Of `path`: one of the formats that the method accepts.
    """

    path: Path
    tokenizer_path: Path
    dtype: str
    device: Device
    shape: ModelShape
    progress: Callable[[float, float], None] = _silent
    checkpoints: Path | None = None
    seed: int = 0
    original: Path | None = None
    taught: Path | None = None
    teacher: Teacher | None = None
    draft: tuple[Path, str] | None = None
    format: str = HUGGINGFACE

    def load(self, **kwargs: Any) -> PreTrainedModel:
        """Load the weights, in evaluation mode, on the device.

        Args:
            kwargs: For `from_pretrained`; of an edited model `dtype` alone.
        """
        import torch
        from transformers import AutoModelForCausalLM

        kwargs.setdefault("dtype", getattr(torch, self.dtype))
        if self.format == EDITED:
            edited = "slimbench.methods.formats.edited"  # stands above the contract, so by its name
            return importlib.import_module(edited).load(self.path, self.device, **kwargs)
        model: Any = AutoModelForCausalLM.from_pretrained(self.path, use_safetensors=True, **kwargs)
        return model.to(self.device).eval() if "device_map" not in kwargs else model.eval()

    def load_original(self, **kwargs: Any) -> PreTrainedModel:
        """The model that the pipeline began with, as `load`: the teacher of every distillation after a step that changed it."""
        return self.load(**kwargs) if self.original is None else replace(self, path=self.original, format=HUGGINGFACE).load(**kwargs)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_path)


@dataclass(frozen=True)
class Calibration:
    """Tokens on which a method measures activations: never the test text.

    Attributes:
        ids: Token ids, int64, shape [samples, length].
        fingerprint: Identifies source, number, length, seed and order of the samples.
    """

    ids: torch.Tensor
    fingerprint: str

    @classmethod
    def none(cls) -> Calibration:
        """No tokens: what a method gets that needs none."""
        import torch

        return cls(torch.empty((0, 0), dtype=torch.int64), "none")


def _format(earlier: str, later: str) -> str:
    """An ordinary checkpoint holds the edits of the steps before it, and leaves policies that it lies below."""
    return earlier if later == HUGGINGFACE and earlier in (EDITED, POLICY) else later


def _latest(earlier: Any, later: Any) -> Any:
    return earlier if later is None else later


def _said(rule: Callable[[Any, Any], Any], default: Any = None) -> Any:
    """A field of a claim and what becomes of it when another step follows."""
    return field(default=default, metadata={"then": rule})


@dataclass(frozen=True)
class Claim:
    """What a method says that it wrote; the harness holds it against the evidence of the loaded artefact.

    Each field has its rule by which claims of steps become one: the last, the latest that says something, of work figure by figure, or the
    sum. Bits, group size and simulation are one grid and go together.

    Attributes:
        format: Artefact format; the engine's table says who loads it.
        bits: Bits of a compressed weight, before scales; None if weights keep their dtype.
        group_size: Weights that share one scale, where layers differ the mean rounded down; None for one scale a row.
        sparsity: Fraction of zeros among the weights of the pruned layers, 0..1; None if nothing was pruned.
        pattern: `n:m` where the zeros follow a semi-structured pattern.
        activation_bits: Bits of the activations entering compressed layers; None if they keep their dtype.
        simulated: Weights or inputs are rounded, but products run in the source dtype, so no speed may be claimed.
        parameters: Of the whole model, biases included, what is shared counted once; None if the architecture is as it was.
        layers: Decoder blocks; None if the architecture is as it was.
        work: Mean work of a token; None if all of the model runs for each.
        cache_bytes_per_token: Bytes that a further token of one sequence takes in the key-value cache; None if they are as they were.
        training_tokens: Tokens of all gradient steps; 0 without training.
        trained_parameters: Parameters that were updated by gradient descent.
        teacher: Whose outputs were learned, None without one.
        details: What has no field of its own.
    """

    format: str = field(metadata={"then": _format})
    bits: int | float | None = _said(_latest)
    group_size: int | None = _said(_latest)
    sparsity: float | None = _said(_latest)
    pattern: str | None = _said(_latest)
    activation_bits: int | None = _said(_latest)
    simulated: bool = _said(_latest, False)
    training_tokens: int = _said(operator.add, 0)
    trained_parameters: int = _said(operator.add, 0)
    details: dict[str, Any] = field(default_factory=dict, metadata={"then": operator.or_})
    parameters: int | None = _said(_latest)
    layers: int | None = _said(_latest)
    work: Work | None = field(default=None, metadata={"then": joined})
    cache_bytes_per_token: float | None = _said(_latest)
    teacher: str | None = _said(_latest)

    def then(self, later: Claim) -> Claim:
        """The claim of a pipeline whose next step claims `later`."""
        joined = {f.name: f.metadata["then"](getattr(self, f.name), getattr(later, f.name)) for f in fields(self)}
        kept: dict[str, Any] = {"group_size": self.group_size, "simulated": self.simulated or later.simulated}
        return Claim(**joined | (kept if later.bits is None else {"group_size": later.group_size}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Settings:
    """Base of all that hold settings, so that each of several bases is asked what it makes of them."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for settings out of range; a class that has its own calls that of its bases."""


class Method(Settings, ABC):
    """Base of every compression method. Subclasses are frozen dataclasses whose fields are the settings.

    Class attributes:
        name: What identifies it, wherever its file lies; stated by each class itself, in lower case with hyphens.
        version: Raised when the same settings give another artefact than before: old records then belong to another row.
        family: Branch of the survey (`quantization`, `pruning`, …); that of the folder for what lies below `methods/`.
        citation: Paper behind the method.
        reference: `library:symbol` that does the work, or `paper` where it is written here from the paper.
        needs: What must be there to run it.
        accepts: Formats that it can follow: `DENSE` if it asks `DenseModel.load` for the weights, `ANY_BASE` if it only adds a policy.
        produces: Format of the artefact. A method that writes ordinary checkpoints writes `edited` after a step that did.
        draws: Something in it is random, so that its artefact depends on the seed of the cell.
        weight_grid: What weights are rounded to, in the words of `methods.core.grids`; None where they keep their dtype.
        causal: The logits of a token depend on no later token and on no other sequence of the batch.
        least_steps: Updates (`steps`, `iterations`) of a fair run: the paper's where it counts them, else 1,000; None: nothing is said.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    family: ClassVar[str]
    citation: ClassVar[Citation]
    reference: ClassVar[str] = "paper"
    needs: ClassVar[Needs] = Needs()
    accepts: ClassVar[tuple[str, ...]] = (HUGGINGFACE,)
    produces: ClassVar[str] = HUGGINGFACE
    draws: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    least_steps: ClassVar[int | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package, _, rest = cls.__module__.partition(".methods.")
        if package == "slimbench" and "." in rest:
            cls.family = rest.partition(".")[0]

    @property
    def weight_grid(self) -> str | None:
        return None

    @property
    def after(self) -> str | None:
        """Where it cannot be the first step, because it teaches what others made: a step that may stand before it, by its name."""
        return None

    @classmethod
    def produces_after(cls, base: str) -> str:
        """Format of the artefact where the step before wrote `base`."""
        return _format(base, cls.produces)

    def check(self, shape: ModelShape) -> None:
        """Raise `Unsupported`, in one line, if the settings do not fit the model. Called before any heavy work."""

    @abstractmethod
    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Write the compressed model into the empty folder `out` and say what was written.

        Args:
            dense: The model to compress.
            calibration: Calibration tokens; there are some if `needs.calibration`, which the harness sees to, and none otherwise.
            out: Folder that receives `config.json` and safetensors; no tokenizer, no pickle.

        Raises:
            Unsupported: The settings, model or machine do not allow it.
        """


def format_of(pipeline: Iterable[Method | type[Method]]) -> str:
    """Format of the artefact that a pipeline writes."""
    return reduce(lambda base, method: method.produces_after(base), pipeline, HUGGINGFACE)
