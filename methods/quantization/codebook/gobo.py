"""GOBO: the Gaussian bulk of a layer's weights on a few centroids, its outliers as they are.

A Gaussian with mean and standard deviation of the layer is laid through its weights; those whose log-density falls below a threshold
(-4) are outliers. The others start in 2^bits bins of equal population. Then, as in k-means, weights go to the nearest centroid and
centroids to the mean of theirs, but the iteration ends as soon as the sum of absolute distances (the L1 norm) no longer falls.
Outliers keep the dtype of the model, which the paper's 32 bits are for BERT.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.settings import Coded
from slimbench.methods.quantization.grids.codebook_layers import FORMAT, compress_layers

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.codebook import CodebookWeight

_STEPS = 200


@dataclass(frozen=True)
class GOBO(Coded, Method):
    """Centroids by layer and outliers by their density, weight only, no data.

    Attributes:
        bits: Bits of an index.
        log_density: Natural logarithm of the Gaussian density below which a weight is an outlier.
    """

    name = "gobo"
    accepts = DENSE
    citation = Citation("GOBO", year=2020, arxiv="2005.03842", covers=("quantization/gobo",))
    produces = FORMAT
    weight_grid = "codebook"

    bits: Literal[2, 3, 4] = 3
    log_density: float = -4.0

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        details: dict[str, float] = {"outliers": 0}
        sizes = []

        def encode(_: str, weight: Tensor) -> CodebookWeight:
            encoded = self.encode(weight)
            sizes.append(weight.numel())
            details["outliers"] += len(encoded.outliers.columns) if encoded.outliers else 0
            return encoded

        claim = compress_layers(dense, out, encode, self.bits, details=details)
        claim.details["outliers"] = details["outliers"] / sum(sizes)
        return claim

    def encode(self, weight: Tensor) -> CodebookWeight:
        """Centroids, indices and outliers of a weight [out, in]."""
        import torch

        from slimbench.methods.formats.codebook import CodebookWeight
        from slimbench.methods.kernels.grid import Outliers
        from slimbench.methods.quantization.grids import k_means as _kmeans

        numbers = weight.float()
        bell = torch.distributions.Normal(numbers.mean(), numbers.std().clamp(min=torch.finfo(torch.float32).tiny))
        apart = bell.log_prob(numbers) < self.log_density
        rows = _kmeans.SortedRows.of(numbers[~apart].unsqueeze(0))
        centroids = rows.quantiles(2**self.bits)
        error = float(rows.absolute_error(centroids))
        for _ in range(_STEPS):
            moved = rows.step(centroids)
            less = float(rows.absolute_error(moved))
            if less >= error:
                break
            centroids, error = moved, less
        levels = centroids.to(weight.dtype)
        codes = _kmeans.nearest(numbers.reshape(1, -1), levels).view(weight.shape)
        outliers = Outliers.of(weight, apart) if bool(apart.any()) else None
        return CodebookWeight.of(codes[None], levels[None, :, :, None], self.bits, weight.dtype, outliers=outliers)
