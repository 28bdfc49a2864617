"""The weighted sum of stored features in one launch, without a residual.

A program owns a block of channels of one sample and a range of its tokens, and loops over tiles of these tokens. The
ranges are of equal size, so all programs move the same number of bytes.
"""

import torch
import triton
import triton.language as tl

from lesa_kernels.bspline_kan.kernels import rounded
from lesa_kernels.launch import LAUNCH_OPTIONS
from lesa_kernels.stream.arguments import StoredFeatures, Weights
from lesa_kernels.stream.geometry import forecast_launch
from lesa_kernels.stream.kernels.shared import device_of, load_rows, problem_of, stored_bits, widen

NO_CONSTANT, SCALAR_CONSTANT, CHANNEL_CONSTANT = 0, 1, 2


@triton.jit
def anchors_of(cursor, ring_count, count, row, capacity, stride_count, K: tl.constexpr):
    """The slots of a row's K newest anchors, how many of them are read, and zero, or NaN if the row has no forecast."""
    head = tl.load(cursor + row)
    there = tl.load(ring_count + row)
    wanted = tl.load(count + row * stride_count)
    n = tl.where(wanted > there, 0, wanted)
    slots = ()
    for k in tl.static_range(K):
        slot = head - 1 - tl.minimum(k, tl.maximum(n - 1, 0))
        slots = slots + (tl.where(slot < 0, slot + capacity, slot),)
    return slots, n, tl.where(n > 0, 0.0, float("nan"))


@triton.jit
def anchor_weight(
    anchors, row, k: tl.constexpr, n, channels, inside, stride_b, D: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr
):
    """The weight of anchor k: `[1, channels]`, or a number. For an anchor that is not read, it is that of the newest.

    Such an anchor is loaded as zeros, so its weight only has to be finite.
    """
    read = tl.where(k < n, k, 0)
    if WIDE:
        return tl.load(anchors + tl.cast(row, tl.int64) * stride_b + read * D + channels, inside, 0.0)[None, :]
    else:
        return tl.load(anchors + row * stride_b + read)


@triton.jit
def constant_of(constant, poison, row, channels, inside, stride_b, CONSTANT: tl.constexpr):
    """What a sum begins with: `poison`, which is zero or NaN, plus the constant: `[1, channels]` or a number."""
    if CONSTANT == 2:
        found = tl.load(constant + tl.cast(row, tl.int64) * stride_b + channels, inside, 0.0)
        return (found + poison)[None, :]
    elif CONSTANT == 1:
        return tl.load(constant + row * stride_b) + poison
    else:
        return poison


@triton.jit
def tokens_of(group, groups, tokens):
    """The first token of a group, and the one after its last. The groups of a sample are equal within one token."""
    first = (tl.cast(group, tl.int64) * tokens // groups).to(tl.int32)
    return first, ((tl.cast(group, tl.int64) + 1) * tokens // groups).to(tl.int32)


@triton.jit(do_not_specialize=["capacity", "batch", "tokens", "groups", "stride_count"])
def _stream_forecast_fwd_kernel(
    output,
    storage,
    scales,
    cursor,
    ring_count,
    anchors,
    count,
    constant,
    capacity,
    batch,
    tokens,
    groups,
    stride_c,
    stride_b,
    stride_t,
    stride_anchors,
    stride_count,
    stride_constant,
    D: tl.constexpr,
    K: tl.constexpr,
    WIDE: tl.constexpr,
    CONSTANT: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    block = program % blocks  # neighbours read neighbouring channels of the same tokens
    group = (program // blocks) % groups
    row = program // (blocks * groups)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < D
    inner = tl.arange(0, BLOCK_T)

    slots, n, poison = anchors_of(cursor, ring_count, count, row, capacity, stride_count, K)
    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)
    begin = constant_of(constant, poison, row, channels, inside, stride_constant, CONSTANT)
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (anchor_weight(anchors, row, k, n, channels, inside, stride_anchors, D, K, WIDE),)

    first, end = tokens_of(group, groups, tokens)
    for start in tl.range(first, end, BLOCK_T, num_stages=NUM_STAGES):
        stored = ()
        for k in tl.static_range(K):
            limit = tl.where(k < n, end, 0)
            tile = load_rows(features, slots[k], row, start, limit, channels, inside, BLOCK_T, FLOAT8)
            stored = stored + (tile,)
        forecast = begin + weights[0] * widen(stored[0][0], stored[0][1], FLOAT8)
        for k in tl.static_range(1, K):
            forecast += weights[k] * widen(stored[k][0], stored[k][1], FLOAT8)
        token = tl.cast(row, tl.int64) * tokens + start
        written = output + token * D + inner[:, None] * D + channels[None, :]
        tl.store(written, rounded(forecast, output.dtype.element_ty), (start + inner < end)[:, None] & inside[None, :])


def constant_kind(weights: Weights) -> int:
    """The kernels' constant CONSTANT."""
    if weights.constant is None:
        return NO_CONSTANT
    return SCALAR_CONSTANT if weights.constant.ndim == 1 else CHANNEL_CONSTANT


def stream_forecast_sum(features: StoredFeatures, weights: Weights, out_dtype: torch.dtype) -> torch.Tensor:
    """Launches the weighted sum once; arguments as in `stream_forecast`, checked there."""
    storage = features.storage
    capacity, batch, tokens, width = storage.shape
    output = torch.empty((batch, tokens, width), dtype=out_dtype, device=storage.device)
    if output.numel() == 0:
        return output
    history = weights.anchors.shape[1]
    launch = forecast_launch(device_of(storage.device), problem_of(features, weights))
    stored, float8 = stored_bits(storage)
    _stream_forecast_fwd_kernel[(launch.programs,)](
        output,
        stored,
        output if features.scales is None else features.scales,
        features.cursor,
        features.count,
        weights.anchors,
        weights.count,
        output if weights.constant is None else weights.constant,
        capacity,
        batch,
        tokens,
        launch.groups,
        *storage.stride()[:3],
        weights.anchors.stride(0),
        weights.count.stride(0),
        0 if weights.constant is None else weights.constant.stride(0),
        D=width,
        K=history,
        WIDE=weights.anchors.ndim == 3,
        CONSTANT=constant_kind(weights),
        FLOAT8=float8,
        BLOCK_D=launch.block_d,
        BLOCK_T=launch.block_t,
        NUM_STAGES=launch.stages,
        num_warps=launch.warps,
        **LAUNCH_OPTIONS,
    )
    return output
