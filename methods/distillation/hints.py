"""Hidden layers as hints: FitNets guides one layer of the student by one of the teacher, FSP the flow between pairs of layers.

FitNets (Romero et al., arXiv 1412.6550) first trains the student up to a guided layer g on a hint of the teacher, its layer l, through a
regressor R that is learned beside it, and then all of it on predictions as `kd` does, with a share of the teacher that stays the same:

    first      ½ ‖h_T^l − R h_S^g‖²       summed over features, a mean over positions
    then       the loss of kd

FSP (Yim et al., CVPR 2017) first makes the flow of solution procedure of the student that of the teacher, for n pairs of layers, each of
the end of a part of the network and the end of the next, and then trains on the text:

    G_{a,b} = 1/T Σ_t h_a(t) h_b(t)ᵀ      first   1/n Σ_pairs ‖G^T − G^S‖²     then   −log q(y)

with T positions of a sequence, and a mean over sequences. Layers are the hidden states behind blocks, those of the last one behind the last
norm, as transformers gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel, Unsupported
from slimbench.methods.distillation.logit import LogitDistillation
from slimbench.methods.distillation.student import Layered, Lesson, logits, width_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FitNets(LogitDistillation):
    """A hint from the middle of the teacher, and distillation of the predictions after it.

    Attributes:
        hint_share: Of the steps, for the hint.
    """

    name = "fitnets"
    citation = Citation("FitNets", year=2014, arxiv="1412.6550", covers=("distillation/fitnets-feature",))

    hint_share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "hint_share")

    @property
    def has_teacher(self) -> bool:
        return True

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        blocks, width = blocks_and_width(student)
        depth, whole = blocks_and_width(teacher)
        guided, hint = max(1, blocks // 2), max(1, depth // 2)
        regressor = torch.nn.Parameter(torch.eye(width, whole, device=student.device))

        def loss(ids: Tensor) -> Tensor:
            made, wanted = hidden_states(student, teacher, ids, dense)
            return 0.5 * (wanted[hint].float() - made[guided].float() @ regressor).square().sum(-1).mean()

        lower = up_to(student, guided)
        (predictions,) = super().lessons(student, teacher, dense)
        first = Lesson(loss, self.hint_share, lower, {"regressor": regressor})
        return first, replace(predictions, share=1 - self.hint_share)


@dataclass(frozen=True)
class FSP(Layered):
    """The flow between the layers of `pairs` pairs, n, and the text after it.

    Attributes:
        flow_share: Of the steps, for the flow.
    """

    name = "fsp"
    citation = Citation("A gift from knowledge distillation (FSP)", year=2017, covers=("distillation/fsp-relation",))

    flow_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "flow_share")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        from slimbench.methods.core.losses import next_token

        (blocks, width), (depth, whole) = blocks_and_width(student), blocks_and_width(teacher)
        if width != whole:
            raise Unsupported(f"flows between {width} features cannot be compared with the teacher's {whole}")

        def loss(ids: Tensor) -> Tensor:
            made, wanted = hidden_states(student, teacher, ids, dense)
            parts = zip(self.flows(made, blocks), self.flows(wanted, depth), strict=True)
            return torch.stack([(ours - theirs).square().sum((1, 2)).mean() for ours, theirs in parts]).mean()

        def text(ids: Tensor) -> Tensor:
            return next_token(logits(student, ids, dense), ids)

        return Lesson(loss, self.flow_share), Lesson(text, 1 - self.flow_share)

    def flows(self, states: Sequence[Tensor], blocks: int) -> list[Tensor]:
        """G of each pair, [sequences, features, features], of hidden states before and behind all blocks."""
        ends = [round(part * blocks / self.pairs) for part in range(self.pairs + 1)]
        layers = [states[end].float() for end in ends]
        return [first.transpose(1, 2) @ second / first.shape[1] for first, second in pairwise(layers)]


def check_share(settings: Any, name: str) -> None:
    """Raise `ValueError` unless a share of the steps leaves both parts one."""
    if not 0 < round(getattr(settings, name) * settings.steps) < settings.steps:
        raise ValueError(f"{name} must leave both parts a step of {settings.steps}, not {getattr(settings, name)}")


def blocks_and_width(model: Any) -> tuple[int, int]:
    """How many blocks there are, and features of a hidden state."""
    return model.config.num_hidden_layers, width_of(model)


def up_to(model: Any, block: int) -> set[str]:
    """Names of the parameters that the hidden states behind a block, counted from 1, depend on; a head that is tied has them from there."""
    from torch import nn

    from slimbench.methods.formats.architecture.structure import blocks_of

    inside = [blocks_of(model)[name] for name in list(blocks_of(model))[:block]]
    inside += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    reached = {id(value) for module in inside for value in module.parameters()}
    return {name for name, value in model.named_parameters() if id(value) in reached}


def hidden_states(student: Any, teacher: Any, ids: Tensor, dense: DenseModel) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Those of both before the first block and behind each."""
    import torch

    settings: dict[str, Any] = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1, "output_hidden_states": True}
    with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
        made = student(**settings).hidden_states
    with torch.no_grad():
        return made, teacher(**settings).hidden_states
