"""Sheared LLaMA: gates are driven to the sizes of a smaller ordinary model, on text whose mix follows what was lost.

There are gates on blocks, on heads and channels of each block, and on hidden features (`nested`), and a Lagrangian for each of the four

    Σ_kinds  κ · mean over blocks of   λ₁ (ŝ − t) + λ₂ (ŝ − t)²

with a κ for each kind (`core.learning.gates`), the share ŝ of the units of a block (of all blocks, of all features) that is expected to
go and the share t that is missing in the target. In the end exactly the target is left, the units of the highest P(z ≠ 0) in each block,
an ordinary checkpoint.

Batches are drawn from the domains D of the text with weights w that every few steps become (dynamic batch loading)

    w_d ∝ w_d · exp(max(ℓ_d − ℓ_d^ref, 0))

with the loss ℓ_d of the masked model on windows of d that are held out, and the reference ℓ_d^ref, that of the dense model, one of the two
that the paper names. The maximum is the paper's; the authors' program has none. Here the domains are parts of the calibration text, one
after the other. The paper trains the pruned model on for 50 billion tokens; here that is another step of a pipeline.

The target is the one that `minitron` finds for a share of the parameters; the paper names that of an existing model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, ModelShape, Unsupported
from slimbench.methods.core.learning.hooks import Group, Hooks
from slimbench.methods.core.settings import Smaller
from slimbench.methods.pruning.gates.learned import Gated

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sheared(Smaller, Gated):
    """Targeted structured pruning with dynamic batch loading.

    Attributes:
        ratio: Share of the parameters of the whole model that goes at least; what is shared counts once.
        depth: Share of these that goes with whole blocks, rounded up to whole ones.
        multiple: Hidden size and channels of the target are multiples of it.
        domains: Parts of the calibration text, at least 2.
        mix_every: Steps between two changes of the mix.
    """

    name = "sheared-llama"
    version = 3
    citation = Citation("Sheared LLaMA", year=2023, arxiv="2310.06694", covers=("pruning/sheared-llama",))

    loss: Literal["distillation", "nll"] = "nll"
    depth: float = 0.25
    multiple: int = 32
    domains: int = 2
    mix_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be a share from 0 to 1, not {self.depth}")
        for name, least in (("multiple", 1), ("domains", 2), ("mix_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.depth and shape.num_layers < 2:
            raise Unsupported(f"no block can be removed from {shape.num_layers}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts
        from slimbench.methods.core.architecture.uniform import sizes_of
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.gates.shapes import ShapedGates
        from slimbench.methods.pruning.structured.minitron import Minitron

        model = learned.load(dense)
        full, target = sizes_of(model), Minitron(ratio=self.ratio, depth=self.depth, multiple=self.multiple).sizes(model)
        before, gates = model.num_parameters(), ShapedGates(model, full, target, self.pace())
        self.control(gates, gates.chosen, dense)
        windows = cut(calibration.ids, self.length)
        mixture = Mixture(self, model, gates, windows, dense)
        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            texts = mixture.drawn(len(ids)).to(ids.device)
            with gates.drawn():
                return plain(texts) + gates.penalty()

        done = train(self, learned.learning(model, gates), loss, torch.cat(mixture.texts), dense, Both(gates, mixture))
        gone = gates.shape(model)
        learned.save(model, dense, out)
        details: dict[str, Any] = {"parameters_before": before, "sizes_before": asdict(full), "sizes_left": asdict(target)}
        details |= {**learned.told(gates, gone), "mix": {"reference": mixture.reference, "path": mixture.path}}
        claim = Claim(HUGGINGFACE, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)
        return done.added_to(replace(claim, teacher=learned.teacher(self)))


def update_proportion(weights: Sequence[float], losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The next weights of domains, from their losses and those of the reference; they add up to 1."""
    grown = [w * math.exp(max(now - then, 0.0)) for w, now, then in zip(weights, losses, reference, strict=True)]
    return [value / sum(grown) for value in grown]


class Mixture(Hooks):
    """Texts in domains, and how often each is drawn.

    Attributes:
        texts: Windows to train on, [n, length] for each domain; of each four windows one is held out.
        held: Those that are held out.
        weights: w, at first the share of each domain in all windows.
        reference: Losses of the dense model, in nats a token.
        path: Step, weights and losses at each change.
    """

    def __init__(self, settings: Sheared, model: Any, gates: Any, windows: Tensor, dense: DenseModel) -> None:
        if len(windows) < 2 * settings.domains:
            raise Unsupported(f"{len(windows)} windows are too few for {settings.domains} domains with a held-out window each")
        parts = windows.tensor_split(settings.domains)
        self.settings, self.model, self.gates, self.dense = settings, model, gates, dense
        self.held = [part[:: min(4, len(part))] for part in parts]
        self.texts = [part[[row for row in range(len(part)) if row % min(4, len(part))]] for part in parts]
        self.weights = [len(part) / len(windows) for part in parts]
        self.reference = self.losses()
        self.path: list[list[float]] = []

    def losses(self) -> list[float]:
        """Mean loss of the model, as it is called now, on each domain, in nats a token."""
        import torch

        from slimbench.methods.core.losses import next_token
        from slimbench.methods.core.walk import batches

        found = []
        with torch.no_grad(), torch.autocast(self.dense.device, torch.bfloat16, enabled=self.dense.dtype == "bfloat16"):
            for held in self.held:
                parts = [(len(ids), next_token(self.model(ids, use_cache=False).logits, ids)) for ids in batches(held, self.dense.device)]
                found.append(float(sum(count * loss for count, loss in parts)) / len(held))
        return found

    def drawn(self, count: int) -> Tensor:
        """Windows [count, length], drawn from torch's own random numbers: those of `train`, which a checkpoint holds."""
        import torch

        domains = torch.multinomial(torch.tensor(self.weights, dtype=torch.float64), count, replacement=True).tolist()
        return torch.stack([self.texts[domain][int(torch.randint(len(self.texts[domain]), ()))] for domain in domains])

    def after_step(self, step: int, optimizer: Any) -> None:
        if (step + 1) % self.settings.mix_every == 0:
            with self.gates.settled():
                losses = self.losses()
            self.weights = update_proportion(self.weights, losses, self.reference)
            self.path.append([step + 1, *self.weights, *losses])

    def state(self) -> dict[str, Tensor]:
        import torch

        return {"weights": torch.tensor(self.weights, dtype=torch.float64), "mix": torch.tensor(self.path, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.weights, self.path = state["weights"].tolist(), state["mix"].tolist()


class Both(Hooks):
    """One after the other."""

    def __init__(self, *hooks: Hooks) -> None:
        self.hooks = hooks

    def groups(self) -> Sequence[Group]:
        return [group for hooks in self.hooks for group in hooks.groups()]

    def after_backward(self, step: int) -> None:
        for hooks in self.hooks:
            hooks.after_backward(step)

    def after_step(self, step: int, optimizer: Any) -> None:
        for hooks in self.hooks:
            hooks.after_step(step, optimizer)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for hooks in self.hooks for name, tensor in hooks.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for hooks in self.hooks:
            hooks.load(state)
