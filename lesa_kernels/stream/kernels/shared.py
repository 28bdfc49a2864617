"""Functions for the kernels that read stored features: loads, conversions and products of tiles."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from lesa_kernels import launch
from lesa_kernels.bspline_kan.kernels import interpretable_dot, rounded
from lesa_kernels.stream.arguments import OutputHead, StoredFeatures, Weights
from lesa_kernels.stream.geometry import Device, Problem

# A kernel's constant FLOAT8 says how it reads stored features: they are not float8, Triton converts them, or the kernel
# decodes their bits, on GPUs for which Triton has no such type.
NO_FLOAT8, FLOAT8, FLOAT8_BITS = 0, 1, 2


@triton.jit
def load_rows(
    features,
    slot,
    row,
    start,
    end,
    channels,
    inside,
    BLOCK_T: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """A tile of one feature in its stored dtype, `[BLOCK_T, channels]`, from token `start` on, and the tokens' scales.

    It is zero, and memory is not read, from token `end` on and for channels that are not `inside`. The offset of the
    tile's first token has 64 bits, so features may have more than 2^31 elements.

    `features` are the storage, its scales, the samples B, the tokens T, and the strides of slots, samples and tokens.
    """
    storage, scales, batch, tokens, stride_c, stride_b, stride_t = features
    inner = tl.arange(0, BLOCK_T)
    base = storage + tl.cast(slot, tl.int64) * stride_c + tl.cast(row, tl.int64) * stride_b
    tile = base + tl.cast(start, tl.int64) * stride_t + inner[:, None] * stride_t + channels[None, :]
    stored = tl.load(tile, (start + inner < end)[:, None] & inside[None, :], 0.0)
    scale = tl.full([BLOCK_T], 1.0, tl.float32)
    if FLOAT8 != 0:
        first = (tl.cast(slot, tl.int64) * batch + row) * tokens + start
        scale = tl.load(scales + first + inner, start + inner < end, 0.0)
    return stored, scale


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
    """A tile of one feature up to its last token, as `load_rows` returns it; zero if the anchor is not `there`."""
    end = tl.where(there, features[3], 0)  # a scalar in a mask would break the interpreter
    return load_rows(features, slot, row, start, end, channels, inside, BLOCK_T, FLOAT8)


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


def operand_dtype(dtype: torch.dtype, head: OutputHead | None = None) -> tl.dtype:
    """The dtype in which matrix products of features in `dtype` run; bfloat16 for float8.

    Features that are multiplied by a scale of each token may be out of the range of float16.
    """
    if dtype == torch.float16 and head is not None and head.per_token:
        return tl.float32
    return _OPERANDS.get(dtype, tl.bfloat16)


def device_of(device: torch.device) -> Device:
    """What a launch must know of the current GPU; in the interpreter, a small one."""
    return Device(launch.architecture(), launch.multiprocessors(device))


def problem_of(features: StoredFeatures, weights: Weights, head: OutputHead | None = None, rank: int = 0) -> Problem:
    """What is to be computed, for `geometry`."""
    storage, outputs = features.storage, 0 if head is None else head.weight.shape[0]
    _, batch, tokens, width = storage.shape
    problem = Problem(batch, tokens, width, weights.anchors.shape[1], storage.dtype.itemsize, outputs, rank)
    if head is None or not head.per_token:
        return problem
    modulations = [part.dtype.itemsize for part in (head.scale, head.shift) if part is not None]
    products = 1 + (head.norm == "layer") + (head.norm is not None and head.shift is not None)
    operand_bytes = operand_dtype(storage.dtype, head).primitive_bitwidth // 8
    return replace(problem, modulations=tuple(modulations), products=products, least_operand_bytes=operand_bytes)


def stored_bits(storage: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The storage in a dtype that a kernel can read, and the kernel's constant FLOAT8."""
    if storage.dtype != torch.float8_e4m3fn:
        return storage, NO_FLOAT8
    if launch.has_float8():
        return storage, FLOAT8
    return storage.view(torch.uint8), FLOAT8_BITS


def next_power_of_2(n: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least `n` and `minimum`: block sizes of `tl.arange` and `tl.dot`."""
    return max(triton.next_power_of_2(n), minimum)
