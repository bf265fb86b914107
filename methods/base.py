"""What a compression method is: its facts, its settings and one function that writes an artefact.

A method is a frozen dataclass in one file below `methods/`, named by `_target_` in one YAML below `conf/method/`.
This module imports no heavy library: listing and validating methods must take milliseconds, so a method imports
torch and its reference library inside `compress`.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Device = Literal["cpu", "cuda"]
HUGGINGFACE = "huggingface"


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
        device: The only device it runs on, or None for any.
        extra: The optional dependency group of slimbench that installs its reference library.
        modules: Import names that must be present.
        environment: Name in `slimbench env list` of the environment that compression runs in; None for the harness's own.
    """

    calibration: bool = False
    training: bool = False
    device: Device | None = None
    extra: str | None = None
    modules: tuple[str, ...] = ()
    environment: str | None = None

    def missing_modules(self) -> list[str]:
        """Import names that this Python cannot find; nothing is imported."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that a method checks before heavy work. All counts, no units."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied_embeddings: bool
    head_size: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of a key or value of one head."""
        return self.head_size or self.hidden_size // self.num_heads

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
            num_heads=heads,
            num_kv_heads=first("num_key_value_heads") or heads,
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", True)),
            head_size=config.get("head_dim"),
        )

    def check_group(self, group_size: int) -> None:
        """Raise `Unsupported` unless groups of `group_size` tile the inputs of every linear layer."""
        for width in (self.hidden_size, self.intermediate_size):
            if width % group_size:
                fits = [g for g in (32, 64, 128, 256) if not self.hidden_size % g and not self.intermediate_size % g]
                nearest = min(fits, key=lambda g: abs(g - group_size), default=None)
                hint = f"; nearest that does: {nearest}" if nearest else ""
                raise Unsupported(f"group_size {group_size} does not divide the input features {width}{hint}")


@dataclass(frozen=True)
class DenseModel:
    """The input of a method: an uncompressed model in a local folder of safetensors.

    Attributes:
        path: Folder with `config.json` and safetensors weights; for a later step of a pipeline, the previous artefact.
        tokenizer_path: Folder with the tokenizer of the source model.
        dtype: Name of the torch dtype in which the weights are stored and computed with.
        device: Where compression runs.
        progress: Told how much of the work is done, `(done, total)`; shown with an estimate of what is left.
        checkpoints: Folder that outlives an interrupted run, in which a training method keeps what it resumes from; None: keep nothing.
        seed: That of the cell; whatever a method draws depends on it and on the method's own seed, if it has one.
    """

    path: Path
    tokenizer_path: Path
    dtype: str
    device: Device
    shape: ModelShape
    progress: Callable[[float, float], None] = _silent
    checkpoints: Path | None = None
    seed: int = 0

    def load(self, **kwargs: Any) -> PreTrainedModel:
        """Load the weights, in evaluation mode, on the device. `kwargs` go to `from_pretrained`."""
        import torch
        from transformers import AutoModelForCausalLM

        kwargs.setdefault("dtype", getattr(torch, self.dtype))
        model: Any = AutoModelForCausalLM.from_pretrained(self.path, use_safetensors=True, **kwargs)
        return model.to(self.device).eval() if "device_map" not in kwargs else model.eval()

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

    def as_dataset(self) -> Any:
        """The samples as a `datasets.Dataset` with columns `input_ids` and `attention_mask`."""
        from datasets import Dataset

        rows = self.ids.tolist()
        return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})


@dataclass(frozen=True)
class Claim:
    """What a method says that it wrote; the harness holds it against the evidence of the loaded artefact.

    Attributes:
        format: Artefact format; the engine's table says who loads it.
        bits: Bits of a compressed weight, before scales; None if weights keep their dtype.
        group_size: Weights that share one scale; None for one scale a row.
        sparsity: Fraction of zeros among the weights of the pruned layers, 0..1; None if nothing was pruned.
        pattern: `n:m` where the zeros follow a semi-structured pattern.
        activation_bits: Bits of the activations entering compressed layers; None if they keep their dtype.
        simulated: The numbers are rounded but stored in the source dtype, so no speed may be claimed.
        training_tokens: Tokens of all gradient steps; 0 without training.
        trained_parameters: Parameters that were updated by gradient descent.
    """

    format: str
    bits: float | None = None
    group_size: int | None = None
    sparsity: float | None = None
    pattern: str | None = None
    activation_bits: int | None = None
    simulated: bool = False
    training_tokens: int = 0
    trained_parameters: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def then(self, later: Claim) -> Claim:
        """The claim of a pipeline whose next step claims `later`.

        The later step wins where it claims something, its grid (bits, group size, simulated or not) as a whole; what it is
        silent on still holds. Training adds up.
        """
        grid = self if later.bits is None else later
        return Claim(
            format=later.format,
            bits=grid.bits,
            group_size=grid.group_size,
            sparsity=self.sparsity if later.sparsity is None else later.sparsity,
            pattern=self.pattern if later.pattern is None else later.pattern,
            activation_bits=self.activation_bits if later.activation_bits is None else later.activation_bits,
            simulated=grid.simulated or later.simulated,
            training_tokens=self.training_tokens + later.training_tokens,
            trained_parameters=self.trained_parameters + later.trained_parameters,
            details=self.details | later.details,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Method(ABC):
    """Base of every compression method. Subclasses are frozen dataclasses whose fields are the settings.

    Class attributes:
        name: What identifies it, wherever its file lies; stated by each class itself, in lower case with hyphens.
        version: Raised when the same settings give another artefact than before: old records then belong to another row.
        family: Branch of the survey (`quantization`, `pruning`, …).
        citation: Paper behind the method.
        reference: `library:symbol` that does the work, or `paper` where it is written here from the paper.
        needs: What must be there to run it.
        produces: Format of the artefact; only `huggingface` can be followed by another step.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    family: ClassVar[str]
    citation: ClassVar[Citation]
    reference: ClassVar[str]
    needs: ClassVar[Needs] = Needs()
    produces: ClassVar[str] = HUGGINGFACE

    def check(self, shape: ModelShape) -> None:  # noqa: B027 - optional hook
        """Raise `Unsupported`, in one line, if the settings do not fit the model. Called before any heavy work."""

    @abstractmethod
    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        """Write the compressed model into the empty folder `out` and say what was written.

        Args:
            dense: The model to compress.
            calibration: Calibration tokens, or None unless `needs.calibration`.
            out: Folder that receives `config.json` and safetensors; no tokenizer, no pickle.

        Raises:
            Unsupported: The settings, model or machine do not allow it.
        """
