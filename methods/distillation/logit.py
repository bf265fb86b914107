"""Distillation of predictions: a smaller model learns the distribution that the first model of the pipeline gives each token.

The student is what the steps before left, such as half of the blocks; all its parameters learn. With the distributions p of the teacher
and q of the student at the temperature τ, and the text's own next token y (Hinton et al., arXiv 1503.02531)

    L = (1 − α) · (−log q(y)) + α τ² D(p^τ, q^τ)         means over the positions that predict a token of the text

where D is KL(p ‖ q), or another divergence (`core.losses`). α = 0 is the control, hard labels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.training import Loss


@dataclass(frozen=True)
class LogitDistillation(TrainingSettings, Method):
    """Distillation of the student that the pipeline has made by now.

    Attributes:
        teacher_share: α, the weight of the teacher; 0: hard labels alone, without a teacher.
        teacher_temperature: τ.
        divergence: D.
        mixture: β of `jsd`, α of the skew divergences; of the others it is not used.
    """

    name = "kd"
    accepts = DENSE
    citation = Citation("Knowledge distillation", year=2015, arxiv="1503.02531", covers=("distillation/hinton-kd-logit",))
    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    steps: int = 200
    loss: Literal["distillation"] = "distillation"
    teacher_share: float = 0.5
    teacher_temperature: float = 2.0
    divergence: Literal["forward", "reverse", "jsd", "skew", "skew-reverse"] = "forward"
    mixture: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be a share from 0 to 1, not {self.teacher_share}")
        if not self.teacher_temperature > 0:
            raise ValueError(f"teacher_temperature must be positive, not {self.teacher_temperature}")
        if not 0 < self.mixture < 1:
            raise ValueError(f"mixture must be between 0 and 1, both excluded, not {self.mixture}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train

        student = trained.load(dense).requires_grad_(True)
        loss = self.objective(student, dense)
        done = train(self, dict(student.named_parameters()), loss, cut(calibration.ids, self.length), dense)
        trained.save(student, dense, out)
        return done.added_to(Claim(HUGGINGFACE, teacher=trained.teacher(self) if self.teacher_share else None))

    def objective(self, student: Any, dense: DenseModel) -> Loss:
        """L of token ids [sequences, length], a scalar."""
        import torch

        from slimbench.methods.core.losses import divergence, next_token

        teacher = dense.load_original().requires_grad_(False) if self.teacher_share else None
        bfloat16, alpha, tau = dense.dtype == "bfloat16", self.teacher_share, self.teacher_temperature

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast(dense.device, torch.bfloat16, enabled=bfloat16):
                logits = student(input_ids=ids, use_cache=False).logits
            hard = next_token(logits, ids) if alpha < 1 else logits.new_zeros(())
            if teacher is None:
                return hard
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False).logits
            soft = divergence(logits[:, :-1], wanted[:, :-1], self.divergence, self.mixture, tau)
            return (1 - alpha) * hard + alpha * tau**2 * soft

        return loss
