"""Functions for the kernels of all predictors: stages, histories, hidden units of the KAN, weights of the anchors."""

import numpy as np
import torch
import triton
import triton.language as tl

from lesa_kernels import launch
from lesa_kernels.bspline_kan.kernels import interpretable_dot, rounded, spline_position, spline_weights
from lesa_kernels.predictor.arguments import Shape
from lesa_kernels.predictor.reference import OFFSET_SCALE

_OFFSET_SCALE = tl.constexpr(OFFSET_SCALE)

# A kernel's constant FLOAT8 says how it reads stored features: they are not float8, Triton converts them, or the kernel
# decodes their bits, on GPUs for which Triton has no such type.
NO_FLOAT8, FLOAT8, FLOAT8_BITS = 0, 1, 2


@triton.jit
def stage_of(sigma, BOUNDS: tl.constexpr):
    """How many of the falling BOUNDS are at or above `sigma`."""
    stage = 0
    for i in tl.static_range(len(BOUNDS)):
        stage += (sigma <= BOUNDS[i]).to(tl.int32)
    return stage


@triton.jit
def of_stage(stage, VALUES: tl.constexpr):
    """VALUES[stage], for a stage that only the device knows."""
    value = VALUES[0]
    for i in tl.static_range(1, len(VALUES)):
        value = tl.where(stage == i, VALUES[i], value)
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
        slot = (head - 1 - tl.minimum(k, tl.maximum(there - 1, 0)) + capacity) % capacity
        slots = slots + (slot,)
        levels = levels + (tl.load(sigmas + slot * batch + row),)
    return slots, levels, tl.minimum(there, length)


@triton.jit
def sample_of(
    row,
    sigma,
    sigmas,
    cursor,
    count,
    batch,
    capacity,
    BOUNDS: tl.constexpr,
    LENGTHS: tl.constexpr,
    K: tl.constexpr,
):
    """A row's target noise level and stage, and its `history_of`: five values."""
    target = tl.load(sigma + row).to(tl.float32)
    stage = stage_of(target, BOUNDS)
    slots, levels, n = history_of(sigmas, cursor, count, row, batch, capacity, of_stage(stage, LENGTHS), K)
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
    """The weights of the K anchors in newton's forecast: K tensors `[channels]`, NaN without anchors.

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
            weight += tl.where(n > 0, 1.0, float("nan"))
        for j in tl.static_range(1, K):
            if k <= j:
                weight += coefficients[j - 1] * newton_weight(sigma, levels, n, j, k)
        weights = weights + (weight,)
    return weights


@triton.jit
def load_stored(
    features,
    slot,
    row,
    start,
    channels,
    inside,
    there,
    BLOCK_T: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """A tile of one feature in its stored dtype, `[BLOCK_T, channels]`, from token `start` on, and the tokens' scales.

    It is zero, and memory is not read, beyond the last token, for channels that are not `inside`, and everywhere if the
    anchor is not `there`. The offset of the tile's first token has 64 bits, so features may have more than 2^31
    elements.

    `features` are the storage, its scales, the samples B, the tokens T, and the strides of slots, samples and tokens.
    """
    storage, scales, batch, tokens, stride_c, stride_b, stride_t = features
    inner = tl.arange(0, BLOCK_T)
    limit = tl.where(there, tokens, 0)  # a scalar in a mask would break the interpreter
    base = storage + tl.cast(slot, tl.int64) * stride_c + tl.cast(row, tl.int64) * stride_b
    tile = base + tl.cast(start, tl.int64) * stride_t + inner[:, None] * stride_t + channels[None, :]
    stored = tl.load(tile, (start + inner < limit)[:, None] & inside[None, :], 0.0)
    scale = tl.full([BLOCK_T], 1.0, tl.float32)
    if FLOAT8 != 0:
        first = (tl.cast(slot, tl.int64) * batch + row) * tokens + start
        scale = tl.load(scales + first + inner, start + inner < limit, 0.0)
    return stored, scale


@triton.jit
def widen(stored, scale, FLOAT8: tl.constexpr):
    """The float32 values of a tile from `load_stored`."""
    if FLOAT8 == 0:
        return stored.to(tl.float32)
    else:
        if FLOAT8 == 2:
            # e4m3 without its sign, seven bits to the left, is the float16 of a 2^8-th of its value.
            bits = stored.to(tl.int16)
            half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
            value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
        else:
            value = stored.to(tl.float32)
        return value * scale[:, None]


@triton.jit
def load_anchor(
    features,
    slot,
    row,
    start,
    channels,
    inside,
    there,
    BLOCK_T: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """A tile of one stored feature, `[BLOCK_T, channels]` float32; see `load_stored`."""
    stored, scale = load_stored(features, slot, row, start, channels, inside, there, BLOCK_T, FLOAT8)
    return widen(stored, scale, FLOAT8)


@triton.jit
def load_history(
    features,
    slots,
    row,
    start,
    channels,
    inside,
    n,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """The same tile of each of the K anchors, as `load_stored` returns it: K pairs. Only `n` anchors exist."""
    tiles = ()
    for k in tl.static_range(K):
        tile = load_stored(features, slots[k], row, start, channels, inside, k < n, BLOCK_T, FLOAT8)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def widen_history(tiles, K: tl.constexpr, FLOAT8: tl.constexpr):
    """The float32 values of what `load_history` has loaded: K tiles."""
    anchors = ()
    for k in tl.static_range(K):
        anchors = anchors + (widen(tiles[k][0], tiles[k][1], FLOAT8),)
    return anchors


@triton.jit
def rounded_dot(a, b, accumulator, OPERAND: tl.constexpr):
    """`accumulator + a @ b` with both operands rounded to OPERAND, accumulated in float32.

    Float32 operands are multiplied on tensor cores in three passes, which loses only their last bits.
    """
    if a.dtype != OPERAND:
        a = rounded(a.to(tl.float32), OPERAND)
    if b.dtype != OPERAND:
        b = rounded(b.to(tl.float32), OPERAND)
    return interpretable_dot(a, b, accumulator, "tf32x3")


_OPERANDS = {torch.float16: tl.float16, torch.float32: tl.float32}


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which matrix products of features in `dtype` run; bfloat16 for float8."""
    return _OPERANDS.get(dtype, tl.bfloat16)


def stored_bits(storage: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The storage in a dtype that a kernel can read, and the kernel's constant FLOAT8."""
    if storage.dtype != torch.float8_e4m3fn:
        return storage, NO_FLOAT8
    if launch.has_float8():
        return storage, FLOAT8
    return storage.view(torch.uint8), FLOAT8_BITS


def stage_constants(shape: Shape) -> dict[str, tuple]:
    """The kernels' constants BOUNDS and LENGTHS. Bounds are rounded to float32, in which noise levels are compared."""
    return {"BOUNDS": tuple(float(np.float32(b)) for b in shape.stage_bounds), "LENGTHS": shape.history_length}


def next_power_of_2(n: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least `n` and `minimum`: block sizes of `tl.arange` and `tl.dot`."""
    return max(triton.next_power_of_2(n), minimum)
