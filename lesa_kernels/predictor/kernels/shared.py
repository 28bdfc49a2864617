"""Functions for the kernels of all predictors: stages, histories, hidden units of the KAN, weights of the anchors."""

import functools
import math

import torch
import triton
import triton.language as tl

from lesa_kernels.bspline_kan.kernels import spline_position, spline_weights
from lesa_kernels.predictor.arguments import RingState, Shape
from lesa_kernels.predictor.reference import OFFSET_SCALE
from lesa_kernels.stream.kernels.shared import next_power_of_2

_OFFSET_SCALE = tl.constexpr(OFFSET_SCALE)


@triton.jit
def stage_of(sigma, bounds):
    """How many of the falling `bounds` are at or above `sigma`."""
    stage = 0
    for i in tl.static_range(len(bounds)):
        stage += (sigma <= bounds[i]).to(tl.int32)
    return stage


@triton.jit
def of_stage(stage, values):
    """values[stage], for a stage that only the device knows."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(stage == i, values[i], value)
    return value


@triton.jit
def history_of(sigmas, cursor, count, row, batch, capacity, length, K: tl.constexpr):
    """The slots and noise levels of a row's K newest anchors, and how many of them to read: `length` at most.

    Beyond the last anchor that exists, its slot and level are repeated.
    """
    head = tl.load(cursor + row)
    there = tl.load(count + row)
    slots = ()
    levels = ()
    for k in tl.static_range(K):
        slot = head - 1 - tl.minimum(k, tl.maximum(there - 1, 0))
        slot = tl.where(slot < 0, slot + capacity, slot)  # a remainder takes ten times as many instructions
        slots = slots + (slot,)
        levels = levels + (tl.load(sigmas + slot * batch + row),)
    return slots, levels, tl.minimum(there, length).to(tl.int32)


@triton.jit
def sigma_of(sigma, row, IS_NUMBER: tl.constexpr):
    """The target noise level of a row: the number itself, or an entry of a tensor."""
    if IS_NUMBER:
        return tl.full((), sigma, tl.float32)
    else:
        return tl.load(sigma + row).to(tl.float32)


@triton.jit
def sample_of(
    row,
    sigma,
    sigmas,
    cursor,
    count,
    batch,
    capacity,
    bounds,
    lengths,
    K: tl.constexpr,
    IS_NUMBER: tl.constexpr = False,
):
    """A row's target noise level and stage, and its `history_of`: five values."""
    target = sigma_of(sigma, row, IS_NUMBER)
    stage = stage_of(target, bounds)
    slots, levels, n = history_of(sigmas, cursor, count, row, batch, capacity, of_stage(stage, lengths), K)
    return target, stage, slots, levels, n


@triton.jit
def hidden_units(
    in_weight,
    in_bias,
    spline,
    stage,
    sigma,
    levels,
    n,
    START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    READS_SIGMA: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
):
    """Values of the spline units START ... START + BLOCK_M of a stage's KAN, zero from M on: `[BLOCK_M]`."""
    inputs: tl.constexpr = K + READS_SIGMA
    units = START + tl.arange(0, BLOCK_M)
    exist = units < M
    unit = stage * M + units
    weighted = tl.load(in_bias + unit, exist, 0.0).to(tl.float32)
    for k in tl.static_range(K):
        offset = tl.where(k < n, (sigma - levels[k]) * _OFFSET_SCALE, 0.0)
        weighted += tl.load(in_weight + unit * inputs + k, exist, 0.0).to(tl.float32) * offset
    if READS_SIGMA:
        weighted += tl.load(in_weight + unit * inputs + K, exist, 0.0).to(tl.float32) * (2 * sigma - 1)
    u = 1 - 2 / (tl.exp(2 * weighted) + 1)  # tanh
    value = u / (1 + tl.exp(-u))
    first, fraction = spline_position(u, -1.0, 1.0, GRID, DEGREE)
    weights = spline_weights(fraction, DEGREE)
    for k in tl.static_range(DEGREE + 1):
        column = first + k
        has = exist & (column >= 0) & (column < GRID + DEGREE)
        coefficient = tl.load(spline + unit * (GRID + DEGREE) + column, has, 0.0).to(tl.float32)
        value += weights[k] * coefficient
    return tl.where(exist, value, 0.0)


@triton.jit
def newton_weight(sigma, levels, n, j: tl.constexpr, k: tl.constexpr):
    """The weight of anchor k in tap j, as in `newton_weights`; zero if the tap needs a missing anchor."""
    numerator = 1.0
    for q in tl.static_range(j):
        numerator *= sigma - levels[q]
    denominator = 1.0
    for q in tl.static_range(j + 1):
        if q != k:
            denominator *= levels[k] - levels[q]
    return tl.where(j < n, numerator / tl.where(j < n, denominator, 1.0), 0.0)


@triton.jit
def anchor_weights(
    in_weight,
    in_bias,
    spline,
    out_weight,
    out_bias,
    stage,
    sigma,
    levels,
    n,
    channels,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The weights of the K anchors in newton's forecast: K tensors `[channels]`.

    `A_k = [k = 0] + sum_j c_j * w_jk`, so a forecast needs only K multiplications for each feature.
    """
    inside = channels < D
    coefficients = ()
    for j in tl.static_range(K - 1):
        bias = tl.load(out_bias + (stage * (K - 1) + j) * D + channels, inside, 0.0)
        coefficients = coefficients + (bias.to(tl.float32),)
    for start in tl.static_range(0, M, BLOCK_M):
        hidden = hidden_units(
            in_weight, in_bias, spline, stage, sigma, levels, n, start, BLOCK_M, M, K, True, GRID, DEGREE
        )
        units = start + tl.arange(0, BLOCK_M)
        exist = inside[:, None] & (units < M)[None, :]
        updated = ()
        for j in tl.static_range(K - 1):
            rows = (stage * (K - 1) + j) * D + channels
            weight = tl.load(out_weight + rows[:, None] * M + units[None, :], exist, 0.0).to(tl.float32)
            updated = updated + (coefficients[j] + tl.sum(weight * hidden[None, :], axis=1),)
        coefficients = updated
    weights = ()
    for k in tl.static_range(K):
        weight = tl.zeros(channels.shape, tl.float32)
        if k == 0:
            weight += 1.0
        for j in tl.static_range(1, K):
            if k <= j:
                weight += coefficients[j - 1] * newton_weight(sigma, levels, n, j, k)
        weights = weights + (weight,)
    return weights


def sigma_argument(ring: RingState) -> torch.Tensor | float:
    """`sigma` as a kernel takes it: a tensor, or the number itself where the host knows it."""
    return ring.sigma.item() if ring.has_one_sigma else ring.sigma


@functools.lru_cache(maxsize=64)
def stage_values(shape: Shape) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The stage bounds and history lengths as a kernel takes them: as numbers that are known when it runs.

    So one compiled kernel serves all predictors of a size. Triton compiles again for a tuple of another length, so both
    are filled up: the bounds with minus infinity, which no noise level is below, and the lengths with zeros. All are
    floats, because Triton also compiles again for some integers, such as 1 and 16.
    """
    places = next_power_of_2(shape.stages, 4)
    bounds = [*map(float, shape.stage_bounds), *[-math.inf] * (places - shape.stages)]
    lengths = [*map(float, shape.history_length), *[0.0] * (places - shape.stages)]
    return tuple(bounds), tuple(lengths)
