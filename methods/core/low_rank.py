"""The closest matrix of a low rank, as a product of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor


def closest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors √σ vᵀ [rank, in] and u √σ [out, rank] of the largest singular values of a matrix [out, in], in its dtype.

    No product of that rank is closer to the matrix in the Frobenius norm (Eckart and Young). A rank above the smaller side is that
    side. The factors come from the eigenvectors of the smaller Gram matrix, in float64: many times faster than a whole decomposition.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.double().t() if tall else matrix.double()
    vectors = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -rank:].flip(-1)
    others = vectors.t() @ wide
    roots = others.norm(dim=1, keepdim=True).sqrt()
    left, right = vectors * roots.t(), others / roots.clamp_min(torch.finfo(torch.float64).tiny)
    first, second = (left.t(), right.t()) if tall else (right, left)
    return first.to(matrix.dtype).contiguous(), second.to(matrix.dtype).contiguous()
