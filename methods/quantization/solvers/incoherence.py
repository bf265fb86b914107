"""Incoherence processing (QuIP, arXiv 2307.13304): weights that a random rotation of the inputs has made alike, on a Gaussian's grid.

A layer W x is computed as W' x' with

    x' = B S x / d,   W' = W d S B        d: scale of each input,  S: random signs,  B: orthonormal Hadamard transform in blocks

so that the Hessian of the new inputs is B S H S B / (d dᵀ). Scales with d⁴ = diag(H) / diag(Wᵀ W) make tr(H') ‖W'‖² least. After the
rotation no weight stands out, each row looks like a sample of a normal distribution, and the grid need not be fitted: its points
±Δσ/2, ±3Δσ/2, … have the step Δ that rounds a normal variable with the least squared error, and σ is the row's root mean square.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from slimbench.methods.core.second_order import GridRounder, Moments, Solver, run
from slimbench.methods.formats.runtime import InputPlan
from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.kernels.numbers import hadamard, largest_power_of_two

_GOLDEN = (math.sqrt(5) - 1) / 2


def plan_for(weight: Tensor, moments: Moments, rescale: bool, generator: torch.Generator) -> InputPlan:
    """The transform of a layer's inputs: scales of the weight's dtype, signs, Hadamard blocks as wide as the inputs allow.

    Args:
        generator: On the CPU.
    """
    inputs = weight.shape[1]
    signs = torch.randint(0, 2, (inputs,), generator=generator, dtype=torch.int8) * 2 - 1
    scale = None
    if rescale:
        seen, used = moments.hessian.diagonal(), weight.float().square().sum(0)
        fourth = torch.where((seen > 0) & (used > 0), seen / used.clamp_min(1e-30), 1.0)
        root = fourth.sqrt().sqrt()
        scale = (root / root.log().mean().exp()).to(weight.dtype)
    return InputPlan(scale=scale, signs=signs.to(weight.device), hadamard=largest_power_of_two(inputs))


def rotate_weight(weight: Tensor, plan: InputPlan) -> Tensor:
    """W' = W d S B in float32, [out, in]."""
    assert plan.signs is not None and plan.hadamard
    scaled = weight.float() * plan.signs.float()
    return hadamard(scaled if plan.scale is None else scaled * plan.scale.float(), plan.hadamard)


def rotate_back(weight: Tensor, plan: InputPlan) -> Tensor:
    """W from W', float32 [out, in]."""
    assert plan.signs is not None and plan.hadamard
    turned = hadamard(weight.float(), plan.hadamard) * plan.signs.float()
    return turned if plan.scale is None else turned / plan.scale.float()


def rotate_hessian(hessian: Tensor, plan: InputPlan) -> Tensor:
    """The Hessian of the transformed inputs, [in, in]."""
    assert plan.signs is not None and plan.hadamard
    factor = plan.signs.float() if plan.scale is None else plan.signs.float() / plan.scale.float()
    half = hadamard(hessian * factor * factor.unsqueeze(1), plan.hadamard)
    return hadamard(half.t().contiguous(), plan.hadamard)


@cache
def gaussian_step(bits: int) -> float:
    """The step of the uniform grid with 2^bits points around zero that rounds a standard normal variable with the least squared error."""
    low, high = 0.0, 2.0
    while high - low > 1e-9:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if gaussian_error(left, bits) < gaussian_error(right, bits):
            high = right
        else:
            low = left
    return (low + high) / 2


def gaussian_error(step: float, bits: int) -> float:
    """Mean squared error of rounding a standard normal variable to ±step/2, ±3 step/2, …, 2^bits points."""

    def density(z: float) -> float:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    error = 1.0
    half = 2 ** (bits - 1)
    for index in range(half):
        point, begin, end = (index + 0.5) * step, index * step, (index + 1) * step if index + 1 < half else math.inf
        inside = (math.erf(end / math.sqrt(2)) - math.erf(begin / math.sqrt(2))) / 2
        error += 2 * (point * point * inside - 2 * point * (density(begin) - density(end)))
    return error


class GaussianRounder(GridRounder):
    """A grid for weights that are normal around zero: its step comes from their root mean square."""

    def __init__(self, weight: Tensor, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__(weight, torch.arange(weight.shape[1]), grid, dtype, symmetric=False, static=True)

    def fit(self, group: int, weights: Tensor) -> None:
        step = (gaussian_step(self.grid.bits) * weights.square().mean(1).sqrt()).to(self.dtype)
        self.scales[group] = torch.where(step == 0, torch.ones_like(step), step)
        assert self.offsets is not None
        self.offsets[group] = self.scales[group] / 2


def quantize(weight: Tensor, moments: Moments, plan: InputPlan, grid: Grid, dampening: float) -> QuantizedWeight:
    """Quantize W' of a weight [out, in] of the model's dtype, column by column."""
    turned = rotate_weight(weight, plan)
    rounder = GaussianRounder(turned, grid, weight.dtype)
    solver = Solver(act_order=False, dampening=dampening)
    order = torch.arange(turned.shape[1], device=turned.device)
    run(turned, Moments(rotate_hessian(moments.hessian, plan), tokens=moments.tokens), solver, order, rounder)
    return rounder.result()
