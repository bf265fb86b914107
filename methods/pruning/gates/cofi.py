"""CoFi: gates on attentions and MLPs, on heads, channels and hidden features learn together while the dense model is distilled.

A head stays if its gate, that of its attention and that of the feature are open, so that coarse and fine units are pruned in one go. The
expected size (`nested`) is held to the budget by a Lagrangian (`core.learning.gates`, with β = 2/3, γ = -0.1, ζ = 1.1), and the loss is

    λ T² KL(p_t ‖ p_s) + (1 − λ) Σ_{i in four layers} min_j ‖W h_s^j − h_t^i‖²      means over tokens and features

with the distributions at the temperature T = 2, the hidden states h behind the blocks of the student and of the teacher, each divided by
its root mean square, and a matrix W that learns from the identity. The paper's model, BERT, normalizes the outputs of its layers; those of
a decoder are normalized where they are read, and a few features that are a hundred times the others would be all that is compared.
j runs over the blocks whose MLP is open in the draw. In the end the units go that are likely to be shut,
exactly as many parameters as the budget asks for, and what the others are multiplied by is folded into the weights.

In the paper the pruned model is trained on; here that is another step of a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Unsupported
from slimbench.methods.pruning.gates.learned import Cut

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.training import Loss, Trained
    from slimbench.methods.pruning.gates.nested import NestedGates

TEMPERATURE = 2.0  # T


@dataclass(frozen=True)
class NestedPruning(Cut):
    """Gates within gates; blocks keep different numbers of units, and the whole model fewer features.

    Attributes:
        ratio: Share of the parameters of all heads and channels that goes, to less than one of them more; features count by what they
            take from these.
    """

    def prepare(self, gates: NestedGates, dense: DenseModel) -> None:
        """Refuse before the work what cannot go; the control shuts heads and channels, no parts and no features."""
        gates.units(self.wanted(gates))
        self.control(gates, lambda: gates.units(self.wanted(gates)), dense)

    def finished(self, model: Any, gates: NestedGates, done: Trained, before: int, dense: DenseModel, out: Path) -> Claim:
        """Cut a trained model and write it."""
        from slimbench.methods.pruning.gates import learned

        final = gates.finish(model, self.wanted(gates))
        gone = 1 - gates.nest.held(final) / gates.whole
        learned.save(model, dense, out)
        details = {"parameters_before": before, **gates.nest.told(final), **learned.told(gates, gone)}
        return done.added_to(learned.claim(model, self, details))

    def wanted(self, gates: NestedGates) -> int:
        """Parameters of units that go."""
        return round(self.ratio * gates.whole)


@dataclass(frozen=True)
class CoFi(NestedPruning):
    """Pruning of CoFi; all weights learn.

    Attributes:
        loss: Of the predictions: `distillation` as above, `nll` that of the text in its place.
        prediction: λ; what is left is the weight of the hidden states.
    """

    name = "cofi"
    version = 2
    citation = Citation("CoFi", year=2022, arxiv="2204.00408", covers=("pruning/cofi",))

    prediction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prediction <= 1:
            raise ValueError(f"prediction must be a share from 0 to 1, not {self.prediction}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.learning.teachers import teacher_of
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.gates.nested import NestedGates, check_parts

        model = learned.load(dense)
        check_parts(model)
        before, gates = model.num_parameters(), NestedGates(model, self.ratio, self.pace())
        self.prepare(gates, dense)
        teacher = teacher_of(dense)
        widths: list[Any] = [each.get_input_embeddings().embedding_dim for each in (model, teacher)]
        if widths[0] != widths[1]:
            raise Unsupported(f"hidden states of {widths[0]} features cannot be compared with those of the first model, {widths[1]}")
        matrix = torch.nn.Parameter(torch.eye(widths[0], device=model.device))
        loss, parameters = self.objective(model, teacher, gates, matrix, dense), learned.learning(model, gates) | {"layer_match": matrix}
        done = train(self, parameters, loss, cut(calibration.ids, self.length), dense, gates)
        return self.finished(model, gates, done, before, dense, out)

    def objective(self, model: Any, teacher: Any, gates: NestedGates, matrix: Tensor, dense: DenseModel) -> Loss:
        """The loss of a model whose gates are drawn anew each time."""
        import torch

        from slimbench.methods.core.losses import next_token, soft_cross_entropy

        def loss(ids: Tensor) -> Tensor:
            draws = gates.draws()
            with gates.applied(draws), torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
                made = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
            if self.loss == "nll":
                predictions = next_token(made.logits, ids)
            else:
                logits = (made.logits.float() / TEMPERATURE, wanted.logits.float() / TEMPERATURE)
                predictions = TEMPERATURE**2 * soft_cross_entropy(*logits)
            student, original = ([normalized(state) for state in of.hidden_states[1:]] for of in (made, wanted))
            layers = matched(student, original, matrix, opened(draws))
            return self.prediction * predictions + (1 - self.prediction) * layers + gates.penalty()

        return loss


def opened(draws: Mapping[str, Tensor]) -> list[int]:
    """Indices of the blocks whose MLP is open; all where none is."""
    found = [int(index) for index in draws["mlp"].detach().nonzero()]
    return found or list(range(len(draws["mlp"])))


def normalized(states: Tensor) -> Tensor:
    """Hidden states [..., hidden] divided by their root mean square, in float32."""
    values = states.float()
    return values * (values.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def matched(states: Sequence[Tensor], teacher: Sequence[Tensor], matrix: Tensor, among: Sequence[int]) -> Tensor:
    """Σ over four layers of the teacher of the mean squared error of the student's nearest layer, a scalar.

    Args:
        states: Hidden states [sequences, length, hidden] behind each block.
        teacher: Those of the teacher.
        matrix: W [hidden, hidden].
        among: Blocks of the student that are compared.
    """
    import torch

    places = sorted({max(0, round(len(teacher) * quarter / 4) - 1) for quarter in (1, 2, 3, 4)})
    turned = [torch.nn.functional.linear(states[index].float(), matrix) for index in among]
    return torch.stack([torch.stack([(each - teacher[place].float()).square().mean() for each in turned]).min() for place in places]).sum()
