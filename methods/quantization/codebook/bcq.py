"""Binary-coding quantization: a group of weights as a sum of sign vectors, each with one scale.

    w ≈ Σ_k α_k b_k + z        b_k ∈ {-1, 1}^g;  z = 0 without an offset

Greedy start: b_k is the sign of what the first k - 1 terms leave, α_k the mean of its magnitudes; one term alone is the optimum, and with
groups of a whole row the binary weights of XNOR-Net. Then two steps alternate, neither of which raises the squared error: α (and z) by
least squares for given signs, and for given α the nearest of the 2^bits sums for each weight (Xu et al., arXiv 1802.00150). α and z are
rounded to the model's dtype before the last choice of signs. LUT-GEMM computes with weights of this form by tables of partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape
from slimbench.methods.core.settings import Grouped, check_codes
from slimbench.methods.quantization.grids.codebook_layers import FORMAT, compress_layers

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.codebook import CodebookWeight

_RIDGE = 1e-6


@dataclass(frozen=True)
class BCQ(Grouped, Method):
    """Sign vectors with scales, weight only, no data.

    Attributes:
        bits: Sign vectors, each one bit a weight.
        group_size: Inputs that share their scales; None: a row.
        offset: Fit z too.
        rounds: Of the alternating steps; 0 leaves the greedy start.
    """

    name = "bcq"
    accepts = DENSE
    citation = Citation(
        "Binary-coding quantization (LUT-GEMM)",
        year=2022,
        arxiv="2206.09557",
        covers=("quantization/bcq-xnor-net",),
    )
    produces = FORMAT
    weight_grid = "codebook"

    bits: Literal[1, 2, 3, 4] = 3
    offset: bool = False
    rounds: int = 15

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds must not be negative, not {self.rounds}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        check_codes(shape, 1)  # signs are stored plane by plane

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        signs = torch.tensor([-1.0, 1.0], dtype=getattr(torch, dense.dtype)).view(1, 1, 2, 1)
        details = {"offset": self.offset}
        return compress_layers(dense, out, lambda _, w: self.encode(w, signs), self.bits, self.group_size, details=details)

    def encode(self, weight: Tensor, signs: Tensor) -> CodebookWeight:
        """Signs and scales of a weight [out, in]; `signs` is the table of -1 and 1."""
        from slimbench.methods.formats.codebook import CodebookWeight

        rows = weight.shape[0]
        groups = weight.float().reshape(-1, self.group_size or weight.shape[1])
        alphas, shift = _greedy(groups, self.bits, self.offset)
        for _ in range(self.rounds):
            alphas, shift = _least_squares(groups, _nearest_signs(groups, alphas, shift), self.offset)
        alphas, shift = alphas.to(weight.dtype), shift.to(weight.dtype)
        bits = _nearest_signs(groups, alphas.float(), shift.float()) > 0
        return CodebookWeight.of(
            bits.permute(2, 0, 1).reshape(self.bits, rows, -1).byte(),
            signs,
            1,
            weight.dtype,
            scales=alphas.T.reshape(self.bits, rows, -1).contiguous(),
            offsets=shift.view(rows, -1) if self.offset else None,
        )


def _greedy(groups: Tensor, bits: int, offset: bool) -> tuple[Tensor, Tensor]:
    """α [n, bits] and z [n, 1] of groups [n, g], one term after the other."""
    import torch

    shift = groups.mean(1, keepdim=True) if offset else groups.new_zeros(len(groups), 1)
    left, alphas = groups - shift, []
    for _ in range(bits):
        alphas.append(left.abs().mean(1))
        left = left - alphas[-1].unsqueeze(1) * torch.where(left >= 0, 1.0, -1.0)
    return torch.stack(alphas, dim=1), shift


def _nearest_signs(groups: Tensor, alphas: Tensor, shift: Tensor) -> Tensor:
    """The signs b [n, g, bits] whose sum lies nearest to each weight."""
    import torch

    bits = alphas.shape[1]
    patterns = torch.tensor([[1.0 if code >> k & 1 else -1.0 for k in range(bits)] for code in range(2**bits)], device=groups.device)
    sums, order = (alphas @ patterns.T + shift).sort(dim=1)
    place = torch.searchsorted((sums[:, 1:] + sums[:, :-1]) / 2, groups)
    return patterns[order.gather(1, place)]


def _least_squares(groups: Tensor, signs: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """α [n, bits] and z [n, 1] that minimise the squared error for given signs [n, g, bits].

    Solved from the normal equations; a ridge of 1e-6 picks one solution where sign vectors coincide.
    """
    import torch

    columns = torch.nn.functional.pad(signs, (0, 1), value=1.0) if offset else signs
    gram = columns.mT @ columns
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE * groups.shape[1])
    solved = torch.linalg.solve(gram, columns.mT @ groups.unsqueeze(-1)).squeeze(-1)
    bits = signs.shape[2]
    return solved[:, :bits].contiguous(), solved[:, bits:] if offset else groups.new_zeros(len(groups), 1)
