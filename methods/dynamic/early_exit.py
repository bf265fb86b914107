"""Early exit: a token that an exit is sure of runs no further blocks (`methods.formats.depth.exit`).

The model stays as it is. Behind each exit a linear map T h = h + W h + b is trained, so that norm and head predict from T h what they
predict in the end; it begins as the identity. All blocks are frozen: exits meet in the clipped gradient of their mean
loss alone. Without a step (`steps` is 0) nothing is trained, and exits predict from the states as they are: the control of all others.

    distillation   KL of the model's distribution from the exit's, as the program of FastBERT (arXiv 2004.02178) teaches its branches
    nll            cross entropy with the text, as DeeBERT (arXiv 2004.12993), §3.1, trains its off-ramps

The papers of `deebert`, `fastbert` and `pabee` train classifiers of one sentence; here every token of a text is one. PABEE weights the
losses of its exits by their place, and CALM by theirs, with cross entropy; here all weigh the same, and `calm` and `pabee` are taught by
the model unless `loss` says otherwise. The first token of a text leaves at no exit (`sinks`): all later ones attend to it. How many
tokens leave comes out of threshold and text: records hold the blocks that ran. Claimed are the most and the fewest that a token runs on
any text (`EarlyExit.runs`), and not their mean, of which calibration text, from which the exits learned, would say too little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth.exit import NEVER, Criterion, EarlyExit
from slimbench.methods.formats.policy import Acts
from slimbench.methods.work import Work

if TYPE_CHECKING:
    from torch import Tensor, nn


_CALM = Citation("CALM", year=2022, arxiv="2207.07061")
_CITATIONS = {
    ("entropy", "nll"): Citation("DeeBERT", year=2020, arxiv="2004.12993"),
    ("entropy", None): Citation("FastBERT", year=2020, arxiv="2004.02178"),
    ("patience", None): Citation("PABEE", year=2020, arxiv="2006.04152"),
}
"""By criterion, and loss where it tells two papers apart."""


@dataclass(frozen=True)
class EarlyExits(TrainingSettings, Acts, Method):
    """What all share.

    Attributes:
        criterion: By what an exit is sure.
        threshold: From which value on.
        exits: Blocks that have run at each; null: those after a fifth, a third, a half, two thirds and five sixths of all.
        steps: Updates of the maps; 0: none, and there are no maps.
        positions: Of a sequence, at which the exits learn in an update, drawn anew in each; null: all of them. Most of an update is the
            head at every exit: of few positions of many sequences more is learned than of all positions of few.
        sinks: First tokens of a text that run all blocks.
    """

    name = "early-exit"
    version = 2
    slot = "depth"
    citation = _CALM
    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT
    fitted_at: ClassVar[Mapping[str, Any]] = {"criterion": "margin", "threshold": NEVER, "sinks": 0}

    criterion: Criterion = "margin"
    threshold: float = 0.9
    exits: tuple[int, ...] | None = None
    learning_rate: float = 1e-3
    positions: int | None = None
    sinks: int = 1

    def __post_init__(self) -> None:
        if self.positions is not None and self.positions < 1:
            raise ValueError(f"positions must be at least 1, or null for all of a sequence, not {self.positions}")
        if self.steps:
            super().__post_init__()
        else:
            object.__setattr__(self, "needs", Needs())
        object.__setattr__(self, "citation", _CITATIONS.get((self.criterion, self.loss), _CITATIONS.get((self.criterion, None), _CALM)))
        self.policy()

    def places(self, shape: ModelShape) -> tuple[int, ...]:
        """Blocks that have run at each exit."""
        if self.exits is not None:
            return tuple(self.exits)
        shares = (1 / 5, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
        return tuple(sorted({max(1, min(shape.num_layers - 1, round(share * shape.num_layers))) for share in shares}))

    def policy(self, shape: ModelShape | None = None) -> EarlyExit:
        """Without a shape the exits that settings name, or one."""
        known = (1,) if self.exits is None else tuple(self.exits)
        return EarlyExit(self.criterion, self.threshold, self.places(shape) if shape else known, sinks=self.sinks)

    def check(self, shape: ModelShape) -> None:
        self.policy(shape).check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train

        policy = self.policy(dense.shape)
        if not self.steps:
            policies.save(policy, dense, out)
            return Claim(self.produces, work=self._work(dense.shape), details={"exits": list(policy.exits), "exit_parameters": 0})
        model: Any = trained.load(dense)
        parameters = start(policy.exits, model)
        done = train(self, parameters, self._loss(model, policy.exits, parameters, dense), cut(calibration.ids, self.length), dense)
        stored = {name: value.detach().to(getattr(torch, dense.dtype)) for name, value in parameters.items()}
        policies.save(replace(policy, translators=stored), dense, out)
        whole = counts(model)["parameters"] + sum(value.numel() for value in stored.values())
        facts = {"exits": list(policy.exits), "exit_parameters": sum(value.numel() for value in stored.values())}
        work = self._work(dense.shape)
        teacher = "the model itself" if self.loss == "distillation" else None
        return done.added_to(Claim(self.produces, parameters=whole, work=work, teacher=teacher, details=facts))

    def write_settings(self, fitted: DenseModel, out: Path) -> Claim:
        policies.replaced(self.policy(fitted.shape), fitted, out)
        return Claim(self.produces, work=self._work(fitted.shape))

    def _work(self, shape: ModelShape) -> Work:
        least, most = self.policy(shape).runs(shape.num_layers)
        return Work(blocks=most, fewest_blocks=least)

    def _loss(self, model: Any, exits: tuple[int, ...], parameters: Mapping[str, nn.Parameter], dense: DenseModel) -> Any:
        """Mean loss of the exits; terms by exit."""
        import torch
        from torch.nn import functional

        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import cross_entropy, divergence
        from slimbench.methods.formats.architecture.structure import blocks_of

        blocks, head = list(blocks_of(model).values()), model.get_output_embeddings()

        def states_of(ids: Tensor, at: Tensor) -> tuple[dict[int, Tensor], Tensor]:
            held: dict[int, Tensor] = {}
            handles = [
                blocks[place - 1].register_forward_hook(lambda _, __, made, place=place: held.__setitem__(place, made[:, at]))
                for place in exits
            ]
            try:
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False, logits_to_keep=at).logits
            finally:
                for handle in handles:
                    handle.remove()
            return held, logits

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
                at = self._asked(ids)
                held, wanted = states_of(ids, at)
                found = []
                for place, state in held.items():
                    moved = state + functional.linear(state, parameters[f"{place}.weight"], parameters[f"{place}.bias"])
                    logits = head(model.base_model.norm(moved))
                    one = cross_entropy(logits, ids[:, at + 1]) if self.loss == "nll" else divergence(logits, wanted)
                    found.append(term(f"exit {place}", one / len(exits)))
            return torch.stack(found).sum()

        return loss

    def _asked(self, ids: Tensor) -> Tensor:
        """The positions of an update in ascending order, int64; the last one has no token behind it that a text could teach."""
        import torch

        many = ids.shape[1] - (self.loss == "nll")
        drawn = torch.arange(many) if self.positions is None else torch.randperm(many)[: self.positions].sort().values
        return drawn.to(ids.device)


def start(exits: tuple[int, ...], model: Any) -> dict[str, nn.Parameter]:
    """W and b of each exit, zero: the states as they are."""
    import torch
    from torch.nn import Parameter

    width = model.get_input_embeddings().embedding_dim
    made: dict[str, nn.Parameter] = {}
    for place in exits:
        made[f"{place}.weight"] = Parameter(torch.zeros(width, width, device=model.device))
        made[f"{place}.bias"] = Parameter(torch.zeros(width, device=model.device))
    return made
