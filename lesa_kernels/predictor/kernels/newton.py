"""Newton's forecast, and its gradient.

Without a residual the forecast is one launch. A program owns a block of channels of one sample, and a share of the
tokens. It loads the K tiles of its first tokens. While they are on their way, it computes the weights of the anchors.
Then it goes through its share: it loads the next tiles, and writes the forecast of the present ones.

With a residual there are two launches, because the residual needs all channels of a token: one makes the weights, one
adds up the features.
"""

from typing import cast

import torch
import triton
import triton.language as tl

from lesa_kernels.launch import LAUNCH_OPTIONS, launch_config, multiprocessors
from lesa_kernels.predictor.arguments import NewtonExperts, Residual, RingState, Shape
from lesa_kernels.predictor.gradients import HiddenUnits, History, coefficients_backward, read_history
from lesa_kernels.predictor.kernels.coefficients import newton_ring_coefficients
from lesa_kernels.predictor.kernels.shared import anchor_weights, newton_weight, sample_of, sigma_argument, stage_values
from lesa_kernels.predictor.reference import newton_weights
from lesa_kernels.stream.arguments import LowRank, StoredFeatures
from lesa_kernels.stream.fused import triton_forecast
from lesa_kernels.stream.kernels.shared import (
    load_history,
    load_rows,
    next_power_of_2,
    operand_dtype,
    rounded_dot,
    stored_bits,
    widen_history,
)
from lesa_kernels.stream.kernels.sums import stream_forecast_fwd
from lesa_kernels.stream.reference import forecast_dtype


@triton.jit
def tap_of(anchors, levels, n, sigma, j: tl.constexpr, K: tl.constexpr):
    """Newton's tap j, 1 ... K - 1, from the tiles of the anchors."""
    tap = newton_weight(sigma, levels, n, j, 0) * anchors[0]
    for k in tl.static_range(1, K):
        if k <= j:
            tap += newton_weight(sigma, levels, n, j, k) * anchors[k]
    return tap


@triton.jit
def tap_scale(levels, n, sigma, j: tl.constexpr):
    """How many times larger than the anchors tap j can be; one if the tap is zero or does not exist.

    Taps far from their anchors are large. Divided by this they are as small as the anchors, so that a product of
    matrices in a narrow dtype can take them.
    """
    scale = 0.0
    for k in tl.static_range(j + 1):
        scale += tl.abs(newton_weight(sigma, levels, n, j, k))
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def load_tiles(
    features,
    slots,
    row,
    start,
    end,
    channels,
    inside,
    n,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """As `load_history`, up to token `end`."""
    tiles = ()
    for k in tl.static_range(K):
        there = tl.where(k < n, end, 0)
        tiles = tiles + (load_rows(features, slots[k], row, start, there, channels, inside, BLOCK_T, FLOAT8),)
    return tiles


@triton.jit
def zeros(channels, COUNT: tl.constexpr):
    """COUNT tensors `[channels]` of zeros."""
    tensors = ()
    for _ in tl.static_range(COUNT):
        tensors = tensors + (tl.zeros(channels.shape, tl.float32),)
    return tensors


@triton.jit
def weights_and_constant(
    in_weight,
    in_bias,
    spline,
    out_weight,
    out_bias,
    up_bias,
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
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The K weights of the anchors, and what is added to the sum: NaN if there is no anchor."""
    constant = tl.where(n > 0, tl.zeros(channels.shape, tl.float32), float("nan"))
    if HAS_BIAS:
        constant += tl.load(up_bias + stage * D + channels, channels < D, 0.0).to(tl.float32)
    weights = anchor_weights(
        in_weight, in_bias, spline, out_weight, out_bias, stage, sigma, levels, n, channels,
        D, M, K, GRID, DEGREE, BLOCK_M,
    )  # fmt: skip
    return weights + (constant,)


@triton.jit(do_not_specialize=["capacity", "batch", "tokens", "splits"])
def _newton_predict_fwd_kernel(
    output,
    storage,
    scales,
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
    tokens,
    stride_c,
    stride_b,
    stride_t,
    splits,
    bounds,
    lengths,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    IS_NUMBER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    block = program % blocks  # neighbours read neighbouring channels of the same tokens
    split = (program // blocks) % splits
    row = program // (blocks * splits)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < D
    inner = tl.arange(0, BLOCK_T)
    first = tokens * split // splits  # the shares are equal within one token
    last = tokens * (split + 1) // splits

    target, stage, slots, levels, n = sample_of(
        row, sigma, sigmas, cursor, count, batch, capacity, bounds, lengths, K, IS_NUMBER
    )
    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)
    weights = zeros(channels, K + 1)
    for start in tl.range(first, last, BLOCK_T, num_stages=NUM_STAGES):
        stored = load_tiles(features, slots, row, start, last, channels, inside, n, K, BLOCK_T, FLOAT8)
        if start == first:
            # Here and not before the loop: the first features are then on their way.
            weights = weights_and_constant(
                in_weight, in_bias, spline, out_weight, out_bias, up_bias, stage, target, levels, n, channels,
                D, M, K, GRID, DEGREE, HAS_BIAS, BLOCK_M,
            )  # fmt: skip
        anchors = widen_history(stored, K, FLOAT8)
        forecast = weights[0][None, :] * anchors[0] + weights[K][None, :]
        for k in tl.static_range(1, K):
            forecast += weights[k][None, :] * anchors[k]
        token = tl.cast(row, tl.int64) * tokens + start
        written = output + token * D + inner[:, None] * D + channels[None, :]
        mask = (start + inner < last)[:, None] & inside[None, :]
        tl.store(written, forecast.to(output.dtype.element_ty), mask)


def newton_predict_fwd(
    ring: RingState,
    experts: NewtonExperts,
    shape: Shape,
    out_dtype: torch.dtype,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Newton's forecast in one launch, with a residual in two; arguments as in `newton_predict`, checked there.

    If `read` is given, `[B, T, R]` float32, `down @ taps` is written to it for the backward.
    """
    storage, hidden = ring.storage, experts.in_weight.shape[1]
    capacity, batch, tokens, width = storage.shape
    output = torch.empty((batch, tokens, width), dtype=out_dtype, device=storage.device)
    if output.numel() == 0:
        return output
    if experts.rank:
        weights = newton_ring_coefficients(ring, experts, shape)
        features = StoredFeatures(storage, ring.scales, ring.cursor, ring.count)
        if read is None:
            return triton_forecast(features, weights, experts.low_rank)
        dtype, (down, up, _) = forecast_dtype(storage.dtype), cast(Residual, experts.residual)
        return stream_forecast_fwd(features, weights, LowRank(down.to(dtype), up.to(dtype)), out_dtype, read)
    config = launch_config("newton_predict", storage.dtype, storage.device)
    # A longer history has more tiles under way at once, so they are smaller.
    config["BLOCK_T"] = max(4 * config["BLOCK_T"] // next_power_of_2(shape.longest, 4), 1)
    grid, splits = newton_grid(storage, config)
    stored, float8 = stored_bits(storage)
    units = (experts.in_weight, experts.in_bias, experts.spline, experts.out_weight, experts.out_bias)
    _newton_predict_fwd_kernel[grid](
        output,
        stored,
        output if ring.scales is None else ring.scales,
        ring.sigmas,
        ring.cursor,
        ring.count,
        sigma_argument(ring),
        *units,
        output if experts.up_bias is None else experts.up_bias,
        capacity,
        batch,
        tokens,
        *storage.stride()[:3],
        splits,
        *stage_values(shape),
        GRID=shape.grid_size,
        DEGREE=shape.spline_order,
        D=width,
        M=hidden,
        K=shape.longest,
        IS_NUMBER=ring.has_one_sigma,
        HAS_BIAS=experts.up_bias is not None,
        FLOAT8=float8,
        BLOCK_D=config["BLOCK_D"],
        BLOCK_T=config["BLOCK_T"],
        BLOCK_M=min(config["BLOCK_M"], next_power_of_2(hidden)),
        NUM_STAGES=config["NUM_STAGES"],
        num_warps=config["num_warps"],
        **LAUNCH_OPTIONS,
    )
    return output


def newton_grid(storage: torch.Tensor, config: dict[str, int]) -> tuple[tuple[int], int]:
    """The grid of a kernel whose programs own blocks of channels, and the number of shares of the tokens.

    Args:
        storage: `[C, B, T, D]`, the stored features.
        config: the kernel's launch configuration.
    """
    _, batch, tokens, width = storage.shape
    blocks = max(batch * triton.cdiv(width, config["BLOCK_D"]), 1)
    # Rounded down: a multiprocessor holds PROGRAMS programs at once, and one more would wait for a second round. Some
    # multiprocessors stay idle if the number of blocks does not divide the number of places.
    wanted = config["PROGRAMS"] * multiprocessors(storage.device) // blocks
    splits = min(max(wanted, 1), max(triton.cdiv(tokens, config["BLOCK_T"]), 1))
    return (blocks * splits,), splits


@triton.jit(do_not_specialize=["capacity", "batch", "tokens", "splits"])
def _newton_predict_bwd_kernel(
    grad_coefficients,
    grad_bias,
    grad_up,
    grad_down,
    grad,
    read,
    grad_read,
    storage,
    scales,
    sigmas,
    cursor,
    count,
    sigma,
    capacity,
    batch,
    tokens,
    stride_c,
    stride_b,
    stride_t,
    splits,
    bounds,
    lengths,
    D: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLOAT8: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    block = program % blocks
    split = (program // blocks) % splits
    row = program // (blocks * splits)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < D
    inner = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)

    target, stage, slots, levels, n = sample_of(row, sigma, sigmas, cursor, count, batch, capacity, bounds, lengths, K)
    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)

    bias_total = tl.zeros([BLOCK_D], tl.float32)
    up_total = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    coefficient_totals = ()
    down_totals = ()
    for _ in tl.static_range(K - 1):
        coefficient_totals = coefficient_totals + (tl.zeros([BLOCK_D], tl.float32),)
        down_totals = down_totals + (tl.zeros([BLOCK_D, BLOCK_R], tl.float32),)

    tiles = tl.cdiv(tokens, BLOCK_T)
    share = tl.cdiv(tiles, splits)
    limit = tl.where(n > 0, tokens, 0)  # a row without anchors is NaN, independently of the parameters
    for tile in tl.range(split * share, tl.minimum((split + 1) * share, tiles)):
        start = tile * BLOCK_T
        token = tl.cast(row, tl.int64) * tokens + start
        kept = start + inner < limit
        written = grad + token * D + inner[:, None] * D + channels[None, :]
        up_stream = tl.load(written, kept[:, None] & inside[None, :], 0.0).to(tl.float32)
        stored = load_history(features, slots, row, start, channels, inside, n, K, BLOCK_T, FLOAT8)
        anchors = widen_history(stored, K, FLOAT8)
        if HAS_BIAS:
            bias_total += tl.sum(up_stream, axis=0)
        if RANK > 0:
            beside = token * RANK + inner[:, None] * RANK + ranks[None, :]
            exist = kept[:, None] & (ranks < RANK)[None, :]
            read_tile = tl.load(read + beside, exist, 0.0)
            grad_read_tile = tl.load(grad_read + beside, exist, 0.0)
            up_total = rounded_dot(tl.trans(up_stream), read_tile, up_total, OPERAND)
        new_coefficients = ()
        new_downs = ()
        for j in tl.static_range(1, K):
            tap = tap_of(anchors, levels, n, target, j, K)
            new_coefficients = new_coefficients + (coefficient_totals[j - 1] + tl.sum(up_stream * tap, axis=0),)
            if RANK > 0:
                scale = tap_scale(levels, n, target, j)
                zero = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
                part = rounded_dot(tl.trans(tap * (1 / scale)), grad_read_tile, zero, OPERAND)
                new_downs = new_downs + (down_totals[j - 1] + scale * part,)
            else:
                new_downs = new_downs + (down_totals[j - 1],)
        coefficient_totals = new_coefficients
        down_totals = new_downs

    sample = tl.cast(split, tl.int64) * batch + row
    for j in tl.static_range(K - 1):
        tl.store(grad_coefficients + (sample * (K - 1) + j) * D + channels, coefficient_totals[j], inside)
    if HAS_BIAS:
        tl.store(grad_bias + sample * D + channels, bias_total, inside)
    if RANK > 0:
        exist = inside[:, None] & (ranks < RANK)[None, :]
        tl.store(grad_up + (sample * D + channels[:, None]) * RANK + ranks[None, :], up_total, exist)
        for j in tl.static_range(K - 1):
            rows = (sample * RANK + ranks[None, :]) * (K - 1) + j
            tl.store(grad_down + rows * D + channels[:, None], down_totals[j], exist)


def newton_predict_bwd(
    grad: torch.Tensor,
    ring: RingState,
    experts: NewtonExperts,
    shape: Shape,
    needs_storage: bool,
) -> list[torch.Tensor | None]:
    """The gradients of `newton_predict`, from the gradient `[B, T, D]` of its result.

    Returns:
        The gradients of `storage` (None unless `needs_storage`), `in_weight`, `in_bias`, `spline`, `out_weight`,
        `out_bias`, `down`, `up` and `up_bias` (None if these are None), in float32. Sums run in a fixed order.
    """
    storage, rank, taps = ring.storage, experts.rank, shape.longest - 1
    capacity, batch, tokens, width = storage.shape
    each = ring.with_sigma_of_each()
    history = read_history(each, shape)
    hidden = HiddenUnits(history, experts, shape)
    grad = grad.contiguous()

    def empty(*sizes):
        return torch.empty(sizes, dtype=torch.float32, device=grad.device)

    read = grad_read = None
    if (residual := experts.residual) is not None and rank:
        read = empty(batch, tokens, rank)
        newton_predict_fwd(ring, experts, shape, out_dtype=grad.dtype, read=read)
        wide = grad.float() if grad.dtype == torch.float16 else grad  # float16 has too small a range
        grad_read = torch.bmm(wide, residual.up[history.stage].to(wide.dtype)).float()
    config = launch_config("newton_predict_bwd", storage.dtype, storage.device)
    grid, splits = newton_grid(storage, config)
    of_coefficients = empty(splits, batch, taps, width)
    of_bias = None if experts.up_bias is None else empty(splits, batch, width)
    of_up = empty(splits, batch, width, rank) if rank else None
    of_down = empty(splits, batch, rank, taps, width) if rank else None
    totals = (of_coefficients, of_bias, of_up, of_down)
    if grad.numel() == 0:
        for total in totals:
            if total is not None:
                total.zero_()
    else:
        stored, float8 = stored_bits(storage)
        _newton_predict_bwd_kernel[grid](
            *(grad if total is None else total for total in totals),
            grad,
            grad if read is None else read,
            grad if grad_read is None else grad_read,
            stored,
            grad if ring.scales is None else ring.scales,
            ring.sigmas,
            ring.cursor,
            ring.count,
            each.sigma,
            capacity,
            batch,
            tokens,
            *storage.stride()[:3],
            splits,
            *stage_values(shape),
            D=width,
            K=shape.longest,
            RANK=rank,
            HAS_BIAS=experts.up_bias is not None,
            FLOAT8=float8,
            # Sums over tokens, and the factors of large taps, may exceed the range of float16.
            OPERAND=tl.bfloat16 if storage.dtype == torch.float16 else operand_dtype(storage.dtype),
            BLOCK_D=config["BLOCK_D"],
            BLOCK_T=config["BLOCK_T"],
            BLOCK_R=next_power_of_2(rank, 16),
            num_warps=config["num_warps"],
            **LAUNCH_OPTIONS,
        )

    def merged(parameter, total):
        """The sum over the splits, and over the samples of each stage."""
        return None if parameter is None or total is None else torch.einsum("sb,b...->s...", rows, total.sum(0))

    coefficients = of_coefficients.sum(0)
    flat = experts.out_weight.flatten(1, 2)  # [S, taps * D, M]
    grad_hidden, grad_out_weight, grad_out_bias = coefficients_backward(history, hidden, flat, coefficients.flatten(1))
    rows = history.one_hot(shape.stages)
    grad_storage = None
    if needs_storage:
        grad_storage = _storage_gradient(grad, grad_read, storage, history, hidden, experts)
    return [
        grad_storage,
        *hidden.backward(grad_hidden),
        grad_out_weight.view(experts.out_weight.shape),
        grad_out_bias.view(experts.out_bias.shape),
        merged(experts.down, of_down),
        merged(experts.up, of_up),
        merged(experts.up_bias, of_bias),
    ]


def _storage_gradient(
    grad: torch.Tensor,
    grad_read: torch.Tensor | None,
    storage: torch.Tensor,
    history: History,
    hidden: HiddenUnits,
    experts: NewtonExperts,
) -> torch.Tensor:
    """The gradient of `storage`: each anchor's share of the gradient of the forecast, and zeros elsewhere."""
    weights = newton_weights(history.levels, history.count, history.target)  # [B, K - 1, K]
    coefficients = torch.einsum("bjdm,bm->bjd", experts.out_weight[history.stage].float(), hidden.values)
    coefficients = coefficients + experts.out_bias[history.stage].float()
    shares = torch.einsum("bjk,bjd->kbd", weights, coefficients)
    shares[0] += 1
    exist = history.count > 0
    gradient = torch.zeros(storage.shape, dtype=torch.float32, device=grad.device)
    samples = torch.arange(len(exist), device=grad.device)
    for k, (slot, share) in enumerate(zip(history.slots, shares)):
        part = share[:, None] * grad
        if grad_read is not None and experts.down is not None:
            maps = torch.einsum("brjd,bj->brd", experts.down[history.stage].float(), weights[:, :, k])
            part = part + grad_read @ maps
        # A slot that is repeated for a missing anchor gets zeros, since its weights are zero.
        gradient[slot, samples] += part.masked_fill(~exist[:, None, None] | (history.count <= k)[:, None, None], 0.0)
    return gradient
