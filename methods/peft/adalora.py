"""AdaLoRA: adapters in the form of a singular value decomposition, whose ranks follow what each layer needs (arXiv 2303.10512).

    W' = W + α/r₀ · P Λ Q        P [out, r₀] and Q [r₀, in] random, Λ = diag(λ) zero at the start; W is frozen
    I  = |w ∂L/∂w|               of each entry, and Ī = β Ī + (1−β) I,  Ū = β Ū + (1−β) |I − Ī|,  s = Ī Ū, with β = 0.85
    S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)
    b(t) = r₀ in the first t₀ of T steps, r in the last t₁, and r + (r₀ − r) (1 − (t − t₀) / (T − t₁ − t₀))³ between

After a step all λ become zero but those of the b(t) · layers highest S among all layers; from T − t₁ on these are always the same. Beside
the loss stands γ times the mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖, as in the authors' program and in the library; the paper
has their squares. Importance is of the updated parameters and the gradient, clipped, that updated them, as the library documents its loop.
The artefact is W', merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.settings import Adapters
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.training import Trained


@dataclass(frozen=True)
class AdaLoRA(Adapters, TrainingSettings, Method):
    """Adapters on all linear layers of the blocks, merged; a pruned weight is refused, since its zeros would be filled.

    Attributes:
        rank: Mean over the layers that is left in the end.
        initial_rank: Of every layer at the start.
        alpha: The adapters are scaled by alpha / initial_rank.
        start: Share of the steps in which all layers keep the initial rank.
        end: Share of the steps that train the ranks that are left.
        interval: Steps from one choice of ranks to the next.
        orthogonality: Weight γ of the term that keeps P and Q orthogonal.
    """

    name = "adalora"
    accepts = DENSE
    citation = Citation("AdaLoRA", year=2023, arxiv="2303.10512", covers=("peft/adalora",))
    reference = "peft:AdaLoraConfig"
    needs = Needs(calibration=True, training=True, extra="peft", modules=("peft",))

    rank: int = 8
    initial_rank: int = 12
    start: float = 0.1
    end: float = 0.3
    interval: int = 1
    orthogonality: float = 0.5
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_rank <= self.rank:
            raise ValueError(f"initial_rank must be above the rank {self.rank} that is left, not {self.initial_rank}")
        if not (self.start >= 0 and self.end >= 0 and self.start + self.end < 1):
            raise ValueError(f"start and end must not be negative and leave steps between them, not {self.start} and {self.end}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, not {self.interval}")
        if not self.orthogonality >= 0:
            raise ValueError(f"orthogonality must not be negative, not {self.orthogonality}")
        if self.steps - int(self.end * self.steps) < 2:
            raise ValueError(f"steps must be 2 or more before the ranks are final, not {self.steps} with end {self.end}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained
        from slimbench.methods.peft import finetune

        model = trained.load(dense)
        layers = block_linears(model)
        finetune.check_zeros(layers)
        ranks, done = self.train(model, list(layers), calibration.ids, dense)
        trained.save(model, dense, out)
        facts = {"rank": self.rank, "total_rank": sum(ranks.values()), "ranks": ranks}
        return done.added_to(Claim(HUGGINGFACE, teacher=trained.teacher(self), details=facts))

    def train(self, model: PreTrainedModel, names: list[str], ids: Tensor, dense: DenseModel) -> tuple[dict[str, int], Trained]:
        """Train adapters on a frozen model and merge them, α/r₀ · P Λ Q [out, in] of each layer: the rank by layer, and the training."""
        import torch
        from peft import AdaLoraConfig, get_peft_model

        from slimbench.methods.core.training import cut, objective, train

        config = AdaLoraConfig(
            init_r=self.initial_rank,
            target_r=self.rank,
            tinit=int(self.start * self.steps),
            tfinal=int(self.end * self.steps),
            deltaT=self.interval,
            total_step=self.steps,
            orth_reg_weight=self.orthogonality,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=names,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + dense.seed)
            adapted: Any = get_peft_model(model, config)
        wrapped = {name: adapted.base_model.model.get_submodule(name) for name in names}
        parameters = {
            f"{name}.{part}": getattr(layer, part)["default"] for name, layer in wrapped.items() for part in ("lora_A", "lora_B", "lora_E")
        }
        loss, allocation = objective(self, adapted, dense), Allocation(adapted.base_model)

        def regularized(ids: Tensor) -> Tensor:
            return loss(ids) + self.orthogonality * skewness(parameters)

        done = train(self, parameters, regularized, cut(ids, self.length), dense, allocation)
        with torch.no_grad():
            for layer in wrapped.values():
                layer.base_layer.weight += layer.get_delta_weight("default")
        ranks = {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in wrapped.items()}
        adapted.unload()
        return ranks, done


def skewness(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """The mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖, a scalar."""
    import torch

    products = [value @ value.T for name, value in parameters.items() if name.endswith("lora_A")]
    products += [value.T @ value for name, value in parameters.items() if name.endswith("lora_B")]
    return torch.stack([torch.linalg.norm(each - torch.eye(len(each), device=each.device)) for each in products]).mean()


@dataclass
class Allocation(Hooks):
    """The library's allocator of ranks, which is told of each step; without it all layers would keep the initial rank.

    Attributes:
        tuner: The model of the library that holds the adapters, the allocator and the settings.
    """

    tuner: Any

    def after_step(self, step: int, optimizer: Any) -> None:
        self.tuner.update_and_allocate(step + 1)

    def state(self) -> dict[str, Tensor]:
        """Ī and Ū of each parameter, and which singular values are left."""
        import torch

        allocator, pattern = self.tuner.rankallocator, self.tuner.peft_config["default"].rank_pattern or {}
        found = {f"importance/{name}": value for name, value in allocator.exp_avg_ipt.items()}
        found |= {f"uncertainty/{name}": value for name, value in allocator.exp_avg_unc.items()}
        return found | {f"left/{name}": torch.tensor(left) for name, left in pattern.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        held: dict[str, dict[str, Any]] = {"importance": {}, "uncertainty": {}, "left": {}}
        places = {name: value.device for name, value in self.tuner.model.named_parameters()}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            held[kind][name] = value.tolist() if kind == "left" else value.to(places[name])
        allocator = self.tuner.rankallocator
        allocator.exp_avg_ipt, allocator.exp_avg_unc = held["importance"], held["uncertainty"]
        allocator.ipt = dict(held["importance"])
        self.tuner.peft_config["default"].rank_pattern = held["left"] or None
