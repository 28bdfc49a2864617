"""The weights of newton's forecasts: one launch for all samples of all steps.

A program owns a block of channels of one sample of one step. It computes the hidden units of the KAN, which are few,
and then the weights of its channels. What all channels share is written by the program of the first block.
"""

import torch
import triton
import triton.language as tl

from lesa_kernels.launch import LAUNCH_OPTIONS, launch_config
from lesa_kernels.predictor.arguments import NewtonExperts, RingState, Shape
from lesa_kernels.predictor.kernels.shared import (
    anchor_weights,
    history_of,
    newton_weight,
    of_stage,
    sigma_argument,
    sigma_of,
    stage_of,
    stage_values,
)
from lesa_kernels.stream.arguments import Weights
from lesa_kernels.stream.kernels.shared import next_power_of_2


@triton.jit(do_not_specialize=["capacity", "batch"])
def _newton_coefficients_fwd_kernel(
    anchors,
    read,
    constant,
    taps,
    stages,
    sigmas,
    cursor,
    count,
    sigma,
    in_weight,
    in_bias,
    spline,
    out_weight,
    out_bias,
    up_bias,
    capacity,
    batch,
    bounds,
    lengths,
    FROM_RING: tl.constexpr,
    IS_NUMBER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < D

    target = sigma_of(sigma, row, IS_NUMBER)
    stage = stage_of(target, bounds)
    length = of_stage(stage, lengths)
    if FROM_RING:
        slots, levels, n = history_of(sigmas, cursor, count, row, batch, capacity, length, K)
    else:
        n = tl.minimum(tl.load(count + row), length).to(tl.int32)
        levels = ()
        for k in tl.static_range(K):
            levels = levels + (tl.load(sigmas + row * K + k),)
    weights = anchor_weights(
        in_weight, in_bias, spline, out_weight, out_bias, stage, target, levels, n, channels,
        D, M, K, GRID, DEGREE, BLOCK_M,
    )  # fmt: skip
    first = tl.cast(row, tl.int64) * K * D
    for k in tl.static_range(K):
        tl.store(anchors + first + k * D + channels, weights[k], inside)
    if HAS_BIAS:
        bias = tl.load(up_bias + stage * D + channels, inside, 0.0).to(tl.float32)
        tl.store(constant + tl.cast(row, tl.int64) * D + channels, bias, inside)
    if block == 0:
        tl.store(read + row, n)
        if HAS_RESIDUAL:
            tl.store(stages + row, stage)
            for j in tl.static_range(1, K):
                for k in tl.static_range(K):
                    weight = newton_weight(target, levels, n, j, k) if k <= j else 0.0
                    tl.store(taps + row * ((K - 1) * K) + (j - 1) * K + k, weight)


def newton_coefficients_fwd(
    sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, experts: NewtonExperts, shape: Shape
) -> Weights:
    """Launches `newton_coefficients` once; contiguous arguments as there, checked there."""
    return _launch(sigmas, count, count, sigma, experts, shape, ring_capacity=0)


def newton_ring_coefficients(ring: RingState, experts: NewtonExperts, shape: Shape) -> Weights:
    """The weights of the forecast of one step, from the noise levels of a ring, in one launch.

    Args:
        ring, experts, shape: as in `newton_predict`, checked there, and contiguous.
    """
    capacity = len(ring.sigmas)
    return _launch(ring.sigmas, ring.cursor, ring.count, sigma_argument(ring), experts, shape, ring_capacity=capacity)


def _launch(
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    sigma: torch.Tensor | float,
    experts: NewtonExperts,
    shape: Shape,
    ring_capacity: int,
) -> Weights:
    """Launches the kernel. `sigmas` is `[C, B]`, or `[P, B, K]` if `ring_capacity` is zero: then it reads no cursor."""
    steps, device = count.shape, count.device
    history, width, hidden = shape.longest, experts.out_bias.shape[2], experts.in_weight.shape[1]
    has_residual, has_bias = experts.rank > 0, experts.up_bias is not None

    def empty(*sizes, dtype=torch.float32):
        return torch.empty((*steps, *sizes), dtype=dtype, device=device)

    weights = Weights(
        empty(history, width),
        empty(dtype=torch.int32),
        empty(width) if has_bias else None,
        empty(history - 1, history) if has_residual else None,
        empty(dtype=torch.int32) if has_residual else None,
    )
    config = launch_config("newton_coefficients", torch.float32, device)
    block_d = min(config["BLOCK_D"], next_power_of_2(width))
    grid = (count.numel() * triton.cdiv(width, block_d),)
    if not grid[0]:
        return weights
    _newton_coefficients_fwd_kernel[grid](
        *(weights.anchors if value is None else value for value in weights),
        sigmas,
        cursor,
        count,
        sigma,
        experts.in_weight,
        experts.in_bias,
        experts.spline,
        experts.out_weight,
        experts.out_bias,
        experts.out_bias if experts.up_bias is None else experts.up_bias,
        ring_capacity,
        count.numel(),
        *stage_values(shape),
        FROM_RING=ring_capacity > 0,
        IS_NUMBER=not isinstance(sigma, torch.Tensor),
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        GRID=shape.grid_size,
        DEGREE=shape.spline_order,
        D=width,
        M=hidden,
        K=history,
        BLOCK_D=block_d,
        BLOCK_M=min(config["BLOCK_M"], next_power_of_2(hidden)),
        num_warps=config["num_warps"],
        **LAUNCH_OPTIONS,
    )
    return weights
