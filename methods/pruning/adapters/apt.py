"""APT: structures go and adapters grow in one run, by what activations and gradients say of both.

Beside frozen weights there are adapters with masks (Zhao et al., arXiv 2401.12200)

    H = m_o ∘ (W + s B A) (x ∘ m_i)

on queries, values and the up projection, where m_i are masks of hidden features. The salience of a structure, a group of heads or a channel
j, is of the inputs H_j of the layer that reads it, with sums over the tokens of a step, and of the adapters that make it

    S̃_j = Σ |H_j| · Σ |∂L/∂H_j| + s Σ_q |B_jq ∂L/∂B_jq|
    Ŝ_j = S̃_j + √max(0, Kurt(O_j))              O_j = W_ij · mean H_j over the outputs i: structures with outliers stay
    S̄_t = β S̄_(t−1) + (1 − β) Ŝ_t

A hidden feature j is a structure of the whole stream. No adapter makes it, and Ŝ_j is the sum over all layers that write it of

    Σ |Y_j| · Σ |∂L/∂Y_j| + √max(0, Kurt(W_ji · mean H_i))           over the inputs i, where a layer makes Y of H

Structures of the lowest S̄ per parameter go until as many parameters have gone as a cubic schedule says. What is left is, but for biases,

    d_m Σ_blocks (2 n_q d_h + 2 n_kv d_h + 3 n_f)                    features, query heads, key and value heads, channels; 2 n_f ungated

so that a head holds the less the fewer features there are: its parameters are those that it held with what was left by the last choice.
They are chosen anew in each step. Masks of those that go fall by a step α, others rise by it. Four times the half of the adapters with
the largest Σ |B ∘ ∂L/∂B| gets ranks ⌊r Δ′ / Δ⌋, where Δ grows evenly; new columns of B are zero, new rows of A are drawn as the first
ones. The loss is that of the text, and more and more that of the model before pruning began, which shares the frozen weights:

    L = μ (L_pred + 0.9 Σ_i mse(T h_φ(i), t_i)) + (1 − μ) L_text,   μ from 0 to 1 while structures go, then 0

t_i is what one block of each quarter gives there, drawn in each step, φ(i) the block here that comes closest to it, and T learns from the
identity as an adapter does.

Features are scored by what is written as in the authors' program for decoders, which counts norms and biases of the stream as well;
embeddings and the head count in neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.pruning.adapters.merging import AdapterPruning, finished

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.training import Loss
    from slimbench.methods.pruning.adapters.salience import Salience

_SLICES = 4
_LAYERS = 0.9  # weight of hidden states beside predictions


@dataclass(frozen=True)
class APT(AdapterPruning):
    """Pruning and tuning of APT.

    Attributes:
        ratio: Share of the parameters of all heads and channels that goes, to less than one structure more; features count by what they
            take from these.
        end: Share of the steps after which all is chosen that goes; the steps that are left recover.
        alpha: s is alpha / rank.
        growing: How many times as large the largest rank may be as the first.
        memory: β.
        fade: α, by how much a mask moves in a step; 0.01 in the paper, of thousands of steps.
        hidden: Whether hidden features go too; some decoders have something on their stream from which none can.
    """

    name = "apt"
    version = 2
    citation = Citation("APT", year=2024, arxiv="2401.12200", covers=("pruning/apt",))

    end: float = 0.7
    growing: float = 2.0
    memory: float = 0.85
    fade: float = 0.1
    hidden: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.growing >= 1:
            raise ValueError(f"growing must be at least 1, not {self.growing}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be at least 0 and below 1, not {self.memory}")
        if not 0 < self.fade <= 1:
            raise ValueError(f"fade must be above 0 and at most 1, not {self.fade}")
        if (left := self.steps - self.growth.end + 1) * self.fade < 1:
            raise ValueError(f"fade must be at least 1 / {left}, not {self.fade}: a mask has {left} of {self.steps} steps to close")
        if self.loss != "nll":
            raise ValueError("apt learns from the text and from itself: its loss is nll")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.units import kinds_of, price
        from slimbench.methods.core.learning import adapters, trained
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.pruning.adapters.salience import Salience
        from slimbench.methods.pruning.gates.nested import Nest

        model: Any = trained.load(dense)
        kinds = kinds_of(model)
        layers: dict[str, nn.Linear] = {}
        for block in anatomy(model):
            layers |= block.named(block.attention.q, block.attention.v, block.mlp.up)
        beside = Beside(layers, int(self.rank * self.growing), self.alpha / self.rank, self.seed + dense.seed)
        wanted, nest = round(self.ratio * sum(price(kind) * kind.count for kind in kinds.values())), Nest(model) if self.hidden else None
        hooks = Salience(beside, kinds, wanted, self.growth, self.memory, self.fade, self.rank, nest)
        hooks.chosen(wanted)  # refuses before the work what cannot go
        generator = torch.Generator().manual_seed(self.seed + dense.seed + 1)
        width = model.get_input_embeddings().embedding_dim
        transform = adapters.learned(
            {"transform": adapters.adapter(torch.nn.Linear(width, width, device=model.device), self.rank, generator)}
        )
        parameters = beside.parameters | adapters.named(transform)
        loss = objective(model, beside, hooks, transform["transform"], dense)
        done = train(self, parameters, loss, cut(calibration.ids, self.length), dense, hooks)
        hooks.finish()
        beside.merge()
        trainable = sum(rank * sum(layers[name].weight.shape) for name, rank in hooks.ranks.items())
        done = replace(done, parameters=trainable)
        return finished(model, self, hooks.gone, done, dense, out, ranks=[min(hooks.ranks.values()), max(hooks.ranks.values())])


def objective(model: Any, beside: Beside, hooks: Salience, transform: tuple[Tensor, Tensor], dense: DenseModel) -> Loss:
    """The loss of a model with masks and adapters.

    Args:
        transform: The factors of T − 1.
    """
    import torch

    from slimbench.methods.core.losses import next_token, soft_cross_entropy

    def loss(ids: Tensor) -> Tensor:
        share = shared(hooks.step, hooks.growth.begin, hooks.growth.end)
        with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
            with beside.added(), hooks.masked():
                made = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            text = next_token(made.logits, ids)
            if not share:
                return text
            with torch.no_grad(), replaced(beside, hooks.teacher), beside.added():
                wanted = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        states = [state.float() for state in made.hidden_states[1:]]
        layers = matched(states, [state.float() for state in wanted.hidden_states[1:]], transform)
        return share * (soft_cross_entropy(made.logits, wanted.logits) + _LAYERS * layers) + (1 - share) * text

    return loss


def shared(step: int, begin: int, end: int) -> float:
    """μ in a step."""
    return (step - begin) / (end - begin) if begin <= step < end else 0.0


def matched(states: list[Tensor], teacher: list[Tensor], transform: tuple[Tensor, Tensor]) -> Tensor:
    """Σ_i mse(T h_φ(i), t_i) over a block i of each quarter, drawn from torch's own random numbers: those of `train`."""
    import torch

    first, second = transform
    moved = [state + state @ first.T @ second.T for state in states]
    total = states[0].new_zeros(())
    for part in torch.arange(len(teacher)).tensor_split(min(_SLICES, len(teacher))):
        goal = teacher[int(part[int(torch.randint(len(part), ()))])]
        total = total + torch.stack([(state - goal).square().mean() for state in moved]).min()
    return total


@contextmanager
def replaced(beside: Beside, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give adapters other factors for a while, which do not learn."""
    held = beside.pairs
    beside.pairs = pairs  # type: ignore[assignment]
    try:
        yield
    finally:
        beside.pairs = held
