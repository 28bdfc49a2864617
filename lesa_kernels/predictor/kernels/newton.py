"""Newton's forecast in one launch.

A program owns a block of channels of one sample. It computes their anchor weights once, then loops over its share of
the tokens: it loads K feature tiles and writes one forecast tile. The low-rank residual needs all channels of a token.
So each program writes the unfinished forecast, and its part of `down @ taps` to scratch memory. The last program that
arrives at a tile of tokens adds these parts in a fixed order and finishes the tile.
"""

import torch
import triton
import triton.language as tl

from lesa_kernels.launch import LAUNCH_OPTIONS, arrival_counters, launch_config, multiprocessors
from lesa_kernels.predictor.arguments import NewtonExperts, RingState, Shape
from lesa_kernels.predictor.gradients import HiddenUnits, History, coefficients_backward, read_history
from lesa_kernels.predictor.kernels.shared import (
    anchor_weights,
    newton_weight,
    sample_of,
    stage_constants,
)
from lesa_kernels.predictor.reference import newton_weights
from lesa_kernels.stream.kernels.shared import (
    load_history,
    next_power_of_2,
    operand_dtype,
    rounded_dot,
    stored_bits,
    widen_history,
)


@triton.jit
def tap_of(anchors, levels, n, sigma, j: tl.constexpr, K: tl.constexpr):
    """Newton's tap j, 1 ... K - 1, from the tiles of the anchors."""
    tap = newton_weight(sigma, levels, n, j, 0) * anchors[0]
    for k in tl.static_range(1, K):
        if k <= j:
            tap += newton_weight(sigma, levels, n, j, k) * anchors[k]
    return tap


@triton.jit
def load_maps(down, stage, channels, ranks, D: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr):
    """The residual's maps of a block of channels: K - 1 tensors `[channels, ranks]`."""
    exist = (channels < D)[:, None] & (ranks < RANK)[None, :]
    maps = ()
    for j in tl.static_range(K - 1):
        rows = (stage * RANK + ranks) * (K - 1) + j
        maps = maps + (tl.load(down + rows[None, :] * D + channels[:, None], exist, 0.0),)
    return maps


@triton.jit
def tap_scale(levels, n, sigma, j: tl.constexpr):
    """How many times larger than the anchors tap j can be; one if the tap is zero or does not exist."""
    scale = 0.0
    for k in tl.static_range(j + 1):
        scale += tl.abs(newton_weight(sigma, levels, n, j, k))
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def read_residual(anchors, maps, levels, n, sigma, zero, K: tl.constexpr, OPERAND: tl.constexpr):
    """This block's part of `down @ taps`: `[BLOCK_T, BLOCK_R]`, the shape of `zero`.

    Taps far from their anchors are large. They are divided by a scale before the product, so that they are as small as
    the anchors and fit into float16 if the features do.
    """
    part = zero
    for j in tl.static_range(1, K):
        scale = tap_scale(levels, n, sigma, j)
        tap = tap_of(anchors, levels, n, sigma, j, K) * (1 / scale)
        part += scale * rounded_dot(tap, maps[j - 1], zero, OPERAND)
    return part


@triton.jit
def residual_of(read, up, stage, channels, D: tl.constexpr, RANK: tl.constexpr, OPERAND: tl.constexpr):
    """`up @ read` for a block of channels: `[BLOCK_T, channels]`.

    With taps far from their anchors, `read` may exceed the range of float16 even if the residual does not.
    """
    if tl.float16 == OPERAND:
        operand: tl.constexpr = tl.float32
    else:
        operand: tl.constexpr = OPERAND
    ranks = tl.arange(0, read.shape[1])
    exist = (channels < D)[None, :] & (ranks < RANK)[:, None]
    map = tl.load(up + (stage * D + channels)[None, :] * RANK + ranks[:, None], exist, 0.0)
    return rounded_dot(read, map, tl.zeros([read.shape[0], channels.shape[0]], tl.float32), operand)


@triton.jit(do_not_specialize=["capacity", "batch", "tokens", "splits"])
def _newton_predict_fwd_kernel(
    output,
    read_output,
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
    down,
    up,
    up_bias,
    parts,
    arrivals,
    capacity,
    batch,
    tokens,
    stride_c,
    stride_b,
    stride_t,
    splits,
    BOUNDS: tl.constexpr,
    LENGTHS: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEPS_READ: tl.constexpr,
    FLOAT8: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
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

    target, stage, slots, levels, n = sample_of(row, sigma, sigmas, cursor, count, batch, capacity, BOUNDS, LENGTHS, K)
    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)
    weights = anchor_weights(
        in_weight, in_bias, spline, out_weight, out_bias, stage, target, levels, n, channels,
        D, M, K, GRID, DEGREE, BLOCK_M,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(up_bias + stage * D + channels, inside, 0.0).to(tl.float32)
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        maps = load_maps(down, stage, channels, ranks, D, K, RANK)

    tiles = tl.cdiv(tokens, BLOCK_T)
    share = tl.cdiv(tiles, splits)
    last = tl.minimum((split + 1) * share, tiles)
    if RANK > 0:
        # Tiles are loaded one ahead, so that the next one is loading while the programs wait for each other. Without a
        # residual they do not wait, and the compiler's own pipeline of NUM_STAGES stages is used.
        stored = load_history(features, slots, row, split * share * BLOCK_T, channels, inside, n, K, BLOCK_T, FLOAT8)
    for tile in tl.range(split * share, last, num_stages=NUM_STAGES):
        start = tile * BLOCK_T
        mask = (start + inner < tokens)[:, None] & inside[None, :]
        if RANK == 0:
            stored = load_history(features, slots, row, start, channels, inside, n, K, BLOCK_T, FLOAT8)
            anchors = widen_history(stored, K, FLOAT8)
        else:
            anchors = widen_history(stored, K, FLOAT8)
            stored = load_history(
                features,
                slots,
                row,
                start + BLOCK_T,
                channels,
                inside,
                tl.where(tile + 1 < last, n, 0),
                K,
                BLOCK_T,
                FLOAT8,
            )
        forecast = weights[0][None, :] * anchors[0]
        for k in tl.static_range(1, K):
            forecast += weights[k][None, :] * anchors[k]
        if HAS_BIAS:
            forecast += bias[None, :]

        token = tl.cast(row, tl.int64) * tokens + start
        written = output + token * D + inner[:, None] * D + channels[None, :]
        if RANK == 0:
            tl.store(written, forecast.to(output.dtype.element_ty), mask)
        else:
            zero = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            part = read_residual(anchors, maps, levels, n, target, zero, K, OPERAND)
            counter = arrivals + row * tiles + tile
            inner_read = inner[:, None] * BLOCK_R + ranks[None, :]
            first_part = parts + (tl.cast(row, tl.int64) * tiles + tile) * (blocks * BLOCK_T * BLOCK_R)
            kept = (start + inner < tokens)[:, None] & (ranks < RANK)[None, :]
            kept_at = read_output + token * RANK + inner[:, None] * RANK + ranks[None, :]
            tl.store(written, forecast.to(output.dtype.element_ty), mask)
            tl.store(first_part + block * (BLOCK_T * BLOCK_R) + inner_read, part)
            tl.debug_barrier()  # all threads must have written before one of them counts the arrival
            if tl.atomic_add(counter, 1, sem="acq_rel") == blocks - 1:
                read = zero
                for b in range(blocks):
                    # Not from the first-level cache, which does not see the writes of other multiprocessors.
                    read += tl.load(first_part + b * (BLOCK_T * BLOCK_R) + inner_read, cache_modifier=".cg")
                tl.store(counter, 0)
                if KEEPS_READ:
                    tl.store(kept_at, read, kept)
                for b in range(blocks):
                    others = b * BLOCK_D + tl.arange(0, BLOCK_D)
                    exist = (start + inner < tokens)[:, None] & (others < D)[None, :]
                    finished = output + token * D + inner[:, None] * D + others[None, :]
                    base = tl.load(finished, exist, 0.0, cache_modifier=".cg").to(tl.float32)
                    base += residual_of(read, up, stage, others, D, RANK, OPERAND)
                    tl.store(finished, base.to(output.dtype.element_ty), exist)


def newton_predict_fwd(
    ring: RingState,
    experts: NewtonExperts,
    shape: Shape,
    out_dtype: torch.dtype,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launches Newton's forecast once; arguments as in `newton_predict`, checked there.

    If `read` is given, `[B, T, R]` float32, `down @ taps` is written to it for the backward.
    """
    storage, rank, hidden = ring.storage, experts.rank, experts.in_weight.shape[1]
    capacity, batch, tokens, width = storage.shape
    output = torch.empty((batch, tokens, width), dtype=out_dtype, device=storage.device)
    if output.numel() == 0:
        return output
    config = launch_config("newton_predict_residual" if rank else "newton_predict", storage.dtype, storage.device)
    grid, splits = newton_grid(storage, config)
    block_t, blocks = config["BLOCK_T"], triton.cdiv(width, config["BLOCK_D"])
    block_r = next_power_of_2(rank, 16)
    parts = arrivals = output  # not used
    if rank:
        tiles = batch * triton.cdiv(tokens, block_t)
        parts = torch.empty(tiles * blocks * block_t * block_r, dtype=torch.float32, device=storage.device)
        arrivals = arrival_counters(storage.device, tiles)
    stored, float8 = stored_bits(storage)
    _newton_predict_fwd_kernel[grid](
        output,
        output if read is None else read,
        stored,
        output if ring.scales is None else ring.scales,
        ring.sigmas,
        ring.cursor,
        ring.count,
        ring.sigma,
        *(output if parameter is None else parameter for parameter in experts),
        parts,
        arrivals,
        capacity,
        batch,
        tokens,
        *storage.stride()[:3],
        splits,
        **stage_constants(shape),
        GRID=shape.grid_size,
        DEGREE=shape.spline_order,
        D=width,
        M=hidden,
        K=shape.longest,
        RANK=rank,
        HAS_BIAS=experts.up_bias is not None,
        KEEPS_READ=read is not None,
        FLOAT8=float8,
        OPERAND=operand_dtype(storage.dtype),
        BLOCK_D=config["BLOCK_D"],
        BLOCK_T=block_t,
        BLOCK_M=min(config["BLOCK_M"], next_power_of_2(hidden)),
        BLOCK_R=block_r,
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
    BOUNDS: tl.constexpr,
    LENGTHS: tl.constexpr,
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

    target, stage, slots, levels, n = sample_of(row, sigma, sigmas, cursor, count, batch, capacity, BOUNDS, LENGTHS, K)
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
                scale = tap_scale(levels, n, target, j)  # as in `read_residual`
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
    history = read_history(ring, shape)
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
            ring.sigma,
            capacity,
            batch,
            tokens,
            *storage.stride()[:3],
            splits,
            **stage_constants(shape),
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
