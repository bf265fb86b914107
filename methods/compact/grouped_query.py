"""Fewer heads of keys and values: each new one is the mean of those that it stands for, and all learn on (GQA, arXiv 2305.13245).

    W̄_K = mean of W_K over the heads of a group,  W̄_V likewise        §2.1; one group is multi-query attention (Shazeer, arXiv 1911.02150)

Then all weights learn, by distillation or on the text itself (§2.1: up-training). What is written is an ordinary checkpoint with a smaller
`num_key_value_heads`, which every engine loads; its cache is smaller by the same factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor

_PROJECTIONS = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")


@dataclass(frozen=True)
class GroupedQuery(TrainingSettings, Method):
    """Means of heads, and training.

    Attributes:
        groups: Heads of keys and values that are left; they must divide those that there are.
    """

    name = "grouped-query"
    citation = Citation("GQA", year=2023, arxiv="2305.13245", covers=("compact/mqa", "compact/gqa-uptraining"))
    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    groups: int = 1
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}")

    def check(self, shape: ModelShape) -> None:
        if self.groups >= shape.num_kv_heads or shape.num_kv_heads % self.groups:
            raise Unsupported(f"{shape.num_kv_heads} heads of keys and values do not become {self.groups} groups of equal size")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts
        from slimbench.methods.core.learning import trained

        model: Any = grouped(trained.load(dense), self.groups)
        done = trained.fit(self, model, dict(model.named_parameters()), calibration.ids, dense)
        trained.save(model, dense, out)
        claim = Claim(self.produces, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), teacher=trained.teacher(self))
        return done.added_to(claim)


def grouped(model: Any, groups: int) -> Any:
    """A model with fewer heads of keys and values, in the dtype of the first.

    Raises:
        Unsupported: It cannot have fewer, or more in it depends on their number than the two projections.
    """
    from transformers import AutoModelForCausalLM

    before = getattr(model.config, "num_key_value_heads", None)
    if before is None:
        raise Unsupported(f"{type(model).__name__} has as many heads of keys and values as of queries, and no other number")
    config = type(model.config).from_dict(model.config.to_dict() | {"num_key_value_heads": groups})
    made: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    tensors = {name: mean(tensor, before, groups) if name.endswith(_PROJECTIONS) else tensor for name, tensor in model.state_dict().items()}
    if unlike := _unlike(tensors, made.state_dict()):
        raise Unsupported(f"{type(model).__name__} has more than projections that depend on the number of key and value heads: {unlike}")
    made.load_state_dict(tensors)
    return made.to(model.device).eval().requires_grad_(False)


def mean(tensor: Tensor, heads: int, groups: int) -> Tensor:
    """The mean over the heads of each group, of weights [heads · D, inputs] or biases [heads · D]; a group has consecutive heads."""
    split = tensor.unflatten(0, (groups, heads // groups, -1))
    return split.mean(1).flatten(0, 1)


def _unlike(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """A tensor that does not fit."""
    return next((name for name in wanted if name not in made or made[name].shape != wanted[name].shape), None)
