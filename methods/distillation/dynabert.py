"""DynaBERT: narrower and shallower parts of one model learn together; the artefact is one of them (Hou et al., arXiv 2004.04037).

First the units of each block are put in the order of their importance, so that the narrower parts have the best. A part of the width m has
the first m of the groups of heads and of the channels of each block; a part of the depth m has the blocks ⌊i / m⌋, i < m · blocks. All
parts learn in each step, first those of all blocks under the pipeline's first model, then all of them under the widths as they are then:

    width      Σ_m         SCE(p, q_m)      + λ Σ_l MSE(h_l, h_l^m)
    depth      Σ_{m, d}    SCE(q'_m, q_m,d) +   Σ_l MSE(h'_g(l)^m, h_l^m,d)

with predictions q and p, SCE(p, q) = −Σ p log q, hidden states h before the first block and behind each, and primes for the frozen copy of
the student that the second part begins with. g(l) = ⌊l / d⌋, and that of the last block is the last. Importance is |∂L/∂ξ| of what a unit
is multiplied by, added up over batches of text, with L the loss of the next token.

The paper has encoders and tasks with augmented data, and as importance of a neuron |Σ w ∂L/∂w| of its rows and of its columns; |∂L/∂ξ| is
that of the columns. Heads that share a key and a value head move together. Under a deeper teacher the l-th state of n blocks belongs to its
⌊l N / n⌋-th of N. The authors' last part, which tunes the asked sizes on the task alone, is left to another step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from slimbench.methods.base import HUGGINGFACE, Citation, Claim, DenseModel, ModelShape, Unsupported
from slimbench.methods.distillation.student import Distillation, Lesson

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.architecture.uniform import Sizes
    from slimbench.methods.core.architecture.units import Structures
    from slimbench.methods.core.training import Loss

WIDTHS = (1.0, 0.75, 0.5, 0.25)
DEPTHS = (1.0, 0.75, 0.5)
_WINDOWS = 64
"""Windows of text that importance is measured on."""


class Output(NamedTuple):
    """What a part makes of a text.

    Attributes:
        logits: [sequences, length − 1, vocabulary], of all positions but the last.
        states: Hidden states [sequences, length, features] before the first block and behind each.
    """

    logits: Tensor
    states: Sequence[Tensor]


@dataclass(frozen=True)
class DynaBERT(Distillation):
    """Parts of widths and depths learn together; one of them stays.

    Attributes:
        width: Share of the groups of heads and of the channels of each block that stays, one of those that learn: 1, 0.75, 0.5, 0.25.
        depth: Share of the blocks, one of those that learn: 1, 0.75, 0.5.
        depth_share: Share of the steps in which depths learn too.
        state_weight: λ.
    """

    name = "dynabert"
    accepts = (HUGGINGFACE,)
    citation = Citation("DynaBERT", year=2020, arxiv="2004.04037")

    steps: int = 40
    width: float = 0.75
    depth: float = 0.75
    depth_share: float = 0.5
    state_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("width", WIDTHS), ("depth", DEPTHS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(f'{share:g}' for share in known)}, not {getattr(self, name)}")
        if self.width == self.depth == 1:
            raise ValueError("width and depth are both 1: nothing would become smaller")
        if not 0 < round(self.depth_share * self.steps) < self.steps:
            raise ValueError(f"depth_share must leave both parts a step of {self.steps}, not {self.depth_share}")
        if self.state_weight < 0:
            raise ValueError(f"state_weight must not be negative, not {self.state_weight}")

    @property
    def after(self) -> str | None:
        return None

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if shape.num_layers < 2:
            raise Unsupported(f"a model of {shape.num_layers} block has no shallower part")

    def prepare(self, student: Any, windows: Any, dense: DenseModel) -> None:
        """Put units in the order of their importance; refuses before the work what could not be cut out in the end."""
        from slimbench.methods.core.architecture.uniform import check, sizes_of
        from slimbench.methods.core.architecture.units import kinds_of

        check(student, replace(self.sizes(sizes_of(student)), blocks=depth_of(student)))
        check_alike(student)
        kinds = kinds_of(student)
        for name, order in self.order(student, kinds, windows, dense).items():
            kinds[name].cut(student, order)

    def order(self, student: Any, kinds: Mapping[str, Structures], windows: Tensor, dense: DenseModel) -> dict[str, Tensor]:
        """Indices [count] of units, the most important first; once chosen they stay, so that a run which was ended goes on from them."""
        from slimbench.methods.core.statistics import mask_gradients
        from slimbench.util import checkpoints

        before = checkpoints.load(dense.checkpoints, "order", repr(self)) if dense.checkpoints else None
        if before:
            return before[0]
        scores = mask_gradients(student, kinds, windows[:_WINDOWS])
        found = {name: values.argsort(descending=True, stable=True) for name, values in scores.items()}
        if dense.checkpoints:
            checkpoints.save(dense.checkpoints, "order", repr(self), found, {})
        return found

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        from slimbench.methods.distillation.student import width_of

        ours, theirs = width_of(student), width_of(teacher)
        if ours != theirs:
            raise Unsupported(f"hidden states of {ours} features cannot be compared with the teacher's {theirs}")
        matched = [*(index * depth_of(teacher) // depth_of(student) for index in range(depth_of(student))), depth_of(teacher)]
        begun: list[Any] = []

        def widths_alone(ids: Tensor) -> Tensor:
            whole = untaught(teacher, ids, WIDTHS[:1], dense)[0]
            wanted = Output(whole.logits, [whole.states[place] for place in matched])
            return self.loss_of(student, [wanted] * len(WIDTHS), DEPTHS[:1], self.state_weight, dense)(ids)

        def begin() -> None:
            begun.append(copy.deepcopy(student).requires_grad_(False))

        def depths(ids: Tensor) -> Tensor:
            return self.loss_of(student, untaught(begun[0], ids, WIDTHS, dense), DEPTHS, 1.0, dense)(ids)

        return Lesson(widths_alone, 1 - self.depth_share), Lesson(depths, self.depth_share, begin=begin)

    def loss_of(self, student: Any, wanted: Sequence[Output], shares: Sequence[float], weight: float, dense: DenseModel) -> Loss:
        """What all widths at some depths lose, each held against an output of the teacher."""
        from torch.utils.checkpoint import checkpoint

        from slimbench.methods.core.architecture.units import kinds_of
        from slimbench.methods.core.learning.terms import term

        kinds, blocks = kinds_of(student), depth_of(student)

        def part(ids: Tensor, width: float, share: float, of: Output) -> tuple[Tensor, Tensor]:
            return apart(output(student, kinds, ids, width, kept(blocks, share), dense), of, share)

        def loss(ids: Tensor) -> Tensor:
            found = [
                checkpoint(part, ids, width, share, of, use_reentrant=False)  # or the graphs of all parts would be held at once
                for share in shares
                for width, of in zip(WIDTHS, wanted, strict=True)
            ]
            predictions, states = (sum(losses) for losses in zip(*found, strict=True))
            return term("predictions", predictions) + term("states", weight * states)

        return loss

    def sizes(self, full: Sizes) -> Sizes:
        """What is left of a model."""
        blocks = len(kept(full.blocks, self.depth))
        return replace(full, blocks=blocks, groups=first(full.groups, self.width), channels=first(full.channels, self.width))

    def cut_out(self, student: Any) -> None:
        """Leave the asked part alone."""
        from slimbench.methods.core.architecture.surgery import remove_blocks
        from slimbench.methods.core.architecture.uniform import Kept, narrow, sizes_of

        full = sizes_of(student)
        remove_blocks(student, set(range(full.blocks)) - set(kept(full.blocks, self.depth)))
        narrow(student, Kept.first(self.sizes(full)))

    def left(self, student: Any) -> Claim:
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts
        from slimbench.methods.core.architecture.uniform import sizes_of

        details = {"sizes_left": asdict(sizes_of(student))}
        return Claim(HUGGINGFACE, **counts(student), cache_bytes_per_token=cache_bytes_per_token(student), details=details)


def depth_of(model: Any) -> int:
    """How many blocks there are."""
    return int(model.config.num_hidden_layers)


def first(units: int, width: float) -> int:
    """How many units a part of a width has, at least one."""
    return max(1, round(width * units))


def kept(blocks: int, depth: float) -> list[int]:
    """Indices of the blocks of a part of a depth, at least one."""
    return [int(index / depth) for index in range(max(1, round(depth * blocks)))]


def check_alike(model: Any) -> None:
    """Raise `Unsupported` if attentions are of several kinds by their places: where blocks are left out, the others move."""
    if len(set(getattr(model.config, "layer_types", None) or ())) > 1:
        raise Unsupported(f"{type(model).__name__} has attentions of several kinds, which go by the number of a block")


@contextmanager
def part_of(model: Any, kinds: Mapping[str, Structures], width: float, blocks: Sequence[int]) -> Iterator[None]:
    """For a while, a model with the first units of its blocks and with some blocks alone."""
    import torch

    from slimbench.methods.core.learning.gates import multiplied
    from slimbench.methods.formats.architecture.structure import blocks_of

    place = next(iter(blocks_of(model))).rpartition(".")[0]
    whole, open_ = model.get_submodule(place), {}
    for name, kind in kinds.items() if width < 1 else ():
        open_[name] = (torch.arange(kind.count, device=kind.reads.weight.device) < first(kind.count, width)).float()
    with ExitStack() as stack:
        stack.enter_context(multiplied({name: kinds[name] for name in open_}, open_))
        if len(blocks) < len(whole):
            model.set_submodule(place, torch.nn.ModuleList([whole[index] for index in blocks]))
            stack.callback(model.set_submodule, place, whole)
        yield


def output(model: Any, kinds: Mapping[str, Structures], ids: Tensor, width: float, blocks: Sequence[int], dense: DenseModel) -> Output:
    """What a part of a model makes of a text.

    Hidden states are seen here and not by transformers, which looks at the blocks that a model has when it is first asked for them.
    """
    import torch

    from slimbench.methods.formats.architecture.structure import blocks_of

    states: list[Tensor] = []

    def entering(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def leaving(_: Any, __: Any, made: Any) -> None:
        states.append(made[0] if isinstance(made, tuple) else made)

    whole = list(blocks_of(model).values())
    *others, last = (whole[index] for index in blocks)
    with part_of(model, kinds, width, blocks), ExitStack() as stack:
        for seen in [
            (others[0] if others else last).register_forward_pre_hook(entering, with_kwargs=True),
            *(block.register_forward_hook(leaving) for block in others),
            model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0])),
        ]:
            stack.callback(seen.remove)
        with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
            logits = model(input_ids=ids, use_cache=False).logits
    return Output(logits[:, :-1], states)


def untaught(model: Any, ids: Tensor, widths: Sequence[float], dense: DenseModel) -> list[Output]:
    """What all blocks of a model make of a text at some widths, without gradients."""
    import torch

    from slimbench.methods.core.architecture.units import kinds_of

    with torch.no_grad():
        kinds, blocks = kinds_of(model), range(depth_of(model))
        return [output(model, kinds, ids, width, blocks, dense) for width in widths]


def apart(made: Output, wanted: Output, depth: float) -> tuple[Tensor, Tensor]:
    """SCE of the predictions, and the sum of the mean squared errors of hidden states, l of a part and g(l) of the teacher."""
    from torch.nn.functional import mse_loss

    from slimbench.methods.core.losses import soft_cross_entropy

    places = [*(int(index / depth) for index in range(len(made.states) - 1)), len(wanted.states) - 1]
    pairs = ((state.float(), wanted.states[place].float()) for state, place in zip(made.states, places, strict=True))
    return soft_cross_entropy(made.logits, wanted.logits), sum(mse_loss(ours, theirs) for ours, theirs in pairs)  # type: ignore[return-value]
