"""A predicted step in one launch: Newton's forecast, the output head's AdaLN and its projection.

The forecast is not written to memory. A program owns a block of channels of one sample, as in `newton`. For each tile
of tokens it writes to scratch memory what the result needs from its channels: their projection, their mean and their
sum of squares. The last program that arrives at a tile merges these over the blocks, in a fixed order, as

    v = rstd * (W' (h - mean)) + W shift + b,    W' = W diag(1 + scale),    h = base + V q,    q = U taps

All sums are about the mean of the block (Chan's merge of variances). So no digits cancel if the features are large
compared with their spread. With `x = base - mean_block` and `delta = mean_block - mean(base)`

    W' (base - mean)  = sum_blocks W' x + delta W' 1
    V^T (base - mean) = sum_blocks V^T x + delta V^T 1
    D var             = sum_blocks (|x|^2 + n delta^2) + 2 (V^T (base - mean)) . q + q^T (V^T V - D m_V m_V^T) q

where `m_V = V^T 1 / D`. The bias of V is part of base.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lesa_kernels.launch import LAUNCH_OPTIONS, arrival_counters, launch_config
from lesa_kernels.predictor.arguments import NewtonExperts, RingState, Shape
from lesa_kernels.predictor.kernels.newton import load_maps, newton_grid, read_residual
from lesa_kernels.predictor.kernels.shared import (
    anchor_weights,
    sample_of,
    stage_constants,
)
from lesa_kernels.stream.arguments import OutputHead
from lesa_kernels.stream.kernels.shared import (
    load_history,
    next_power_of_2,
    operand_dtype,
    rounded_dot,
    stored_bits,
    widen_history,
)


@triton.jit(do_not_specialize=["capacity", "batch", "tokens", "splits", "eps"])
def _newton_velocity_fwd_kernel(
    velocity,
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
    head_weight,
    head_bias,
    head_scale,
    head_shift,
    parts,
    sums,
    arrivals,
    capacity,
    batch,
    tokens,
    stride_c,
    stride_b,
    stride_t,
    stride_scale,
    stride_shift,
    splits,
    eps,
    BOUNDS: tl.constexpr,
    LENGTHS: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    OUTS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HEAD_BIAS: tl.constexpr,
    FLOAT8: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PART: tl.constexpr,
    SUM: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    block = program % blocks
    split = (program // blocks) % splits
    row = program // (blocks * splits)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < D
    outs = tl.arange(0, BLOCK_O)
    ranks = tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_T)

    target, stage, slots, levels, n = sample_of(row, sigma, sigmas, cursor, count, batch, capacity, BOUNDS, LENGTHS, K)
    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)
    # The part of the head that is the same for all tokens: W' of this block, and the sums that finishing a tile needs.
    exist = inside[:, None] & (outs < OUTS)[None, :]
    plain = tl.load(head_weight + outs[None, :] * D + channels[:, None], exist, 0.0).to(tl.float32)
    scale = tl.load(head_scale + tl.cast(row, tl.int64) * stride_scale + channels, inside, 0.0).to(tl.float32)
    shift = tl.load(head_shift + tl.cast(row, tl.int64) * stride_shift + channels, inside, 0.0).to(tl.float32)
    projection = (plain * (1 + scale)[:, None]).to(OPERAND)
    own_sums = sums + ((tl.cast(row, tl.int64) * splits + split) * (blocks + 1) + block) * SUM
    tl.store(own_sums + outs, tl.sum(projection.to(tl.float32), axis=0))
    tl.store(own_sums + BLOCK_O + outs, tl.sum(plain * shift[:, None], axis=0))
    if RANK > 0:
        maps = load_maps(down, stage, channels, ranks, D, K, RANK)
        exist = inside[:, None] & (ranks < RANK)[None, :]
        raising = tl.load(up + (stage * D + channels)[:, None] * RANK + ranks[None, :], exist, 0.0).to(OPERAND)
        of_rank = own_sums + 2 * BLOCK_O
        tl.store(of_rank + ranks, tl.sum(raising.to(tl.float32), axis=0))
        square = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
        square = rounded_dot(tl.trans(raising), raising, square, OPERAND)
        tl.store(of_rank + BLOCK_R + ranks[:, None] * BLOCK_R + ranks[None, :], square)
        through = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
        through = rounded_dot(tl.trans(raising), projection, through, OPERAND)
        tl.store(of_rank + BLOCK_R + BLOCK_R * BLOCK_R + ranks[:, None] * BLOCK_O + outs[None, :], through)

    weights = anchor_weights(
        in_weight, in_bias, spline, out_weight, out_bias, stage, target, levels, n, channels,
        D, M, K, GRID, DEGREE, BLOCK_M,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(up_bias + stage * D + channels, inside, 0.0).to(tl.float32)

    width = tl.minimum(D - block * BLOCK_D, BLOCK_D).to(tl.float32)
    tiles = tl.cdiv(tokens, BLOCK_T)
    share = tl.cdiv(tiles, splits)
    last = tl.minimum((split + 1) * share, tiles)
    stored = load_history(features, slots, row, split * share * BLOCK_T, channels, inside, n, K, BLOCK_T, FLOAT8)
    for tile in tl.range(split * share, last):
        start = tile * BLOCK_T
        anchors = widen_history(stored, K, FLOAT8)
        # Tiles are loaded one ahead, so that the next one is loading while the programs wait for each other.
        stored = load_history(
            features, slots, row, start + BLOCK_T, channels, inside, tl.where(tile + 1 < last, n, 0), K, BLOCK_T, FLOAT8
        )
        base = weights[0][None, :] * anchors[0]
        for k in tl.static_range(1, K):
            base += weights[k][None, :] * anchors[k]
        if HAS_BIAS:
            base += bias[None, :]
        mean = tl.sum(base, axis=1) / width
        centred = tl.where(inside[None, :], base - mean[:, None], 0.0)

        first_part = parts + (tl.cast(row, tl.int64) * tiles + tile) * (blocks * PART)
        own_part = first_part + block * PART
        by_out = inner[:, None] * BLOCK_O + outs[None, :]
        by_rank = BLOCK_T * (2 + BLOCK_O) + inner[:, None] * BLOCK_R + ranks[None, :]
        tl.store(own_part + inner, mean)
        tl.store(own_part + BLOCK_T + inner, tl.sum(centred * centred, axis=1))
        projected = rounded_dot(centred, projection, tl.zeros([BLOCK_T, BLOCK_O], tl.float32), OPERAND)
        tl.store(own_part + 2 * BLOCK_T + by_out, projected)
        if RANK > 0:
            zero = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            tl.store(own_part + by_rank, rounded_dot(centred, raising, zero, OPERAND))
            part = read_residual(anchors, maps, levels, n, target, zero, K, OPERAND)
            tl.store(own_part + BLOCK_T * BLOCK_R + by_rank, part)

        tl.debug_barrier()  # all threads must have written before one of them counts the arrival
        counter = arrivals + row * tiles + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == blocks - 1:
            tl.store(counter, 0)
            first_sums = sums + (tl.cast(row, tl.int64) * splits + split) * ((blocks + 1) * SUM)
            if tile == split * share:
                # A program that finishes a later tile of this share does so after the one that finishes this tile.
                _finish_sums(first_sums, D, RANK, BLOCK_D, BLOCK_O, BLOCK_R, SUM)
                tl.debug_barrier()
            _finish_tile(
                velocity, head_bias, first_part, first_sums, row, start, tokens, eps,
                D, OUTS, RANK, HAS_HEAD_BIAS, BLOCK_D, BLOCK_T, BLOCK_O, BLOCK_R, PART, SUM,
            )  # fmt: skip


@triton.jit
def _finish_sums(
    first_sums,
    D: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM: tl.constexpr,
):
    """Merges the sums of the blocks, which are the same for all tokens, and writes the total after them.

    The total has V^T V and V^T W'^T about the mean of V's channels.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    outs = tl.arange(0, BLOCK_O)
    ranks = tl.arange(0, BLOCK_R)
    of_square = 2 * BLOCK_O + BLOCK_R + ranks[:, None] * BLOCK_R + ranks[None, :]
    of_through = 2 * BLOCK_O + BLOCK_R + BLOCK_R * BLOCK_R + ranks[:, None] * BLOCK_O + outs[None, :]
    total = first_sums + blocks * SUM

    constant = tl.zeros([BLOCK_O], tl.float32)
    ones = tl.zeros([BLOCK_O], tl.float32)
    raise_ones = tl.zeros([BLOCK_R], tl.float32)
    for b in range(blocks):
        constant += tl.load(first_sums + b * SUM + BLOCK_O + outs, cache_modifier=".cg")
        if RANK > 0:
            ones += tl.load(first_sums + b * SUM + outs, cache_modifier=".cg")
            raise_ones += tl.load(first_sums + b * SUM + 2 * BLOCK_O + ranks, cache_modifier=".cg")
    tl.store(total + BLOCK_O + outs, constant)
    if RANK > 0:
        raise_mean = raise_ones / D
        square = -D * raise_mean[:, None] * raise_mean[None, :]
        through = -raise_mean[:, None] * ones[None, :]
        for b in range(blocks):
            square += tl.load(first_sums + b * SUM + of_square, cache_modifier=".cg")
            through += tl.load(first_sums + b * SUM + of_through, cache_modifier=".cg")
        tl.store(total + of_square, square)
        tl.store(total + of_through, through)


@triton.jit
def _finish_tile(
    velocity,
    head_bias,
    first_part,
    first_sums,
    row,
    start,
    tokens,
    eps,
    D: tl.constexpr,
    OUTS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_HEAD_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PART: tl.constexpr,
    SUM: tl.constexpr,
):
    """Merges what the blocks of channels wrote for a tile of tokens, and writes the tile's velocities.

    Loads bypass the first-level cache, which does not see the writes of other multiprocessors.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    outs = tl.arange(0, BLOCK_O)
    ranks = tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_T)
    by_out = inner[:, None] * BLOCK_O + outs[None, :]
    by_rank = BLOCK_T * (2 + BLOCK_O) + inner[:, None] * BLOCK_R + ranks[None, :]

    mean = tl.zeros([BLOCK_T], tl.float32)
    for b in range(blocks):
        width = tl.minimum(D - b * BLOCK_D, BLOCK_D).to(tl.float32)
        mean += width * tl.load(first_part + b * PART + inner, cache_modifier=".cg")
    mean = mean / D

    squares = tl.zeros([BLOCK_T], tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    read = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    raised = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for b in range(blocks):
        part = first_part + b * PART
        own_sums = first_sums + b * SUM
        width = tl.minimum(D - b * BLOCK_D, BLOCK_D).to(tl.float32)
        delta = tl.load(part + inner, cache_modifier=".cg") - mean
        squares += tl.load(part + BLOCK_T + inner, cache_modifier=".cg") + width * delta * delta
        ones = tl.load(own_sums + outs, cache_modifier=".cg")
        product += tl.load(part + 2 * BLOCK_T + by_out, cache_modifier=".cg") + delta[:, None] * ones[None, :]
        if RANK > 0:
            raise_ones = tl.load(own_sums + 2 * BLOCK_O + ranks, cache_modifier=".cg")
            raised += tl.load(part + by_rank, cache_modifier=".cg") + delta[:, None] * raise_ones[None, :]
            read += tl.load(part + BLOCK_T * BLOCK_R + by_rank, cache_modifier=".cg")
    total = first_sums + blocks * SUM
    if RANK > 0:
        of_rank = total + 2 * BLOCK_O + BLOCK_R
        square = tl.load(of_rank + ranks[:, None] * BLOCK_R + ranks[None, :], cache_modifier=".cg")
        turned = tl.dot(read, square, 2 * raised, input_precision="tf32x3")
        squares = tl.maximum(squares + tl.sum(turned * read, axis=1), 0.0, tl.PropagateNan.ALL)
        of_through = of_rank + BLOCK_R * BLOCK_R + ranks[:, None] * BLOCK_O + outs[None, :]
        product = tl.dot(read, tl.load(of_through, cache_modifier=".cg"), product, input_precision="tf32x3")
    constant = tl.load(total + BLOCK_O + outs, cache_modifier=".cg")
    result = product / tl.sqrt(squares / D + eps)[:, None] + constant[None, :]
    if HAS_HEAD_BIAS:
        result += tl.load(head_bias + outs, outs < OUTS, 0.0).to(tl.float32)[None, :]
    token = tl.cast(row, tl.int64) * tokens + start
    exist = (start + inner < tokens)[:, None] & (outs < OUTS)[None, :]
    written = velocity + token * OUTS + inner[:, None] * OUTS + outs[None, :]
    tl.store(written, result.to(velocity.dtype.element_ty), exist)


@dataclass(frozen=True)
class VelocityLaunch:
    """How a predicted step is launched.

    Args:
        config: block sizes and warps.
        grid, splits: what `newton_grid` returns.
        outs: O, the outputs of the head.
        rank: R of the residual, or 0.
        tiles: number of tiles of tokens, of all samples.
        part: number of floats that a program writes for a tile.
        once: number of floats that a program writes once, for all its tiles.
        scratch: number of floats of all tiles, `B T ceil(D / BLOCK_D) (O + 2 R + 2)`, where O and R are rounded up to
            powers of two of at least 16 and R is zero without a residual; and number of floats that are written once,
            with their totals.
    """

    config: dict[str, int]
    grid: tuple[int]
    splits: int
    outs: int
    rank: int
    tiles: int
    part: int
    once: int
    scratch: tuple[int, int]

    @classmethod
    def of(cls, storage: torch.Tensor, weight: torch.Tensor, down: torch.Tensor | None) -> "VelocityLaunch":
        """From the storage `[C, B, T, D]`, the head's weight `[O, D]` and the residual's `[S, R, K - 1, D]`."""
        _, batch, tokens, width = storage.shape
        outs, rank = weight.shape[0], 0 if down is None or down.shape[2] == 0 else down.shape[1]
        operation = "newton_velocity_residual" if rank else "newton_velocity"
        config = launch_config(operation, storage.dtype, storage.device)
        grid, splits = newton_grid(storage, config)
        block_o, block_r = next_power_of_2(outs, 16), next_power_of_2(rank, 16) if rank else 0
        tiles, blocks = batch * triton.cdiv(tokens, config["BLOCK_T"]), triton.cdiv(width, config["BLOCK_D"])
        part = config["BLOCK_T"] * (2 + block_o + 2 * block_r)
        once = 2 * block_o + block_r * (1 + block_r + block_o)
        scratch = tiles * blocks * part, batch * splits * (blocks + 1) * once
        return cls(config, grid, splits, outs, rank, tiles, part, once, scratch)


def newton_velocity_fwd(
    ring: RingState,
    experts: NewtonExperts,
    head: OutputHead,
    shape: Shape,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Launches a whole predicted step once; arguments as in `newton_velocity`, checked there.

    The scratch memory comes from torch's allocator and is returned at the end of the call.
    """
    storage, hidden = ring.storage, experts.in_weight.shape[1]
    capacity, batch, tokens, width = storage.shape
    outs = head.weight.shape[0]
    velocity = torch.empty((batch, tokens, outs), dtype=out_dtype, device=storage.device)
    if velocity.numel() == 0:
        return velocity
    launch = VelocityLaunch.of(storage, head.weight, experts.down)
    config, parts = launch.config, launch.scratch[0]
    scratch = torch.empty(sum(launch.scratch), dtype=torch.float32, device=storage.device)
    stored, float8 = stored_bits(storage)
    _newton_velocity_fwd_kernel[launch.grid](
        velocity,
        stored,
        velocity if ring.scales is None else ring.scales,
        ring.sigmas,
        ring.cursor,
        ring.count,
        ring.sigma,
        *(velocity if parameter is None else parameter for parameter in experts),
        head.weight,
        velocity if head.bias is None else head.bias,
        head.scale,
        head.shift,
        scratch,
        scratch[parts:],
        arrival_counters(storage.device, launch.tiles),
        capacity,
        batch,
        tokens,
        *storage.stride()[:3],
        head.scale.stride(0),
        head.shift.stride(0),
        launch.splits,
        head.eps,
        **stage_constants(shape),
        GRID=shape.grid_size,
        DEGREE=shape.spline_order,
        D=width,
        M=hidden,
        K=shape.longest,
        OUTS=outs,
        RANK=launch.rank,
        HAS_BIAS=experts.up_bias is not None,
        HAS_HEAD_BIAS=head.bias is not None,
        FLOAT8=float8,
        OPERAND=operand_dtype(storage.dtype),
        BLOCK_D=config["BLOCK_D"],
        BLOCK_T=config["BLOCK_T"],
        BLOCK_M=min(config["BLOCK_M"], next_power_of_2(hidden)),
        BLOCK_O=next_power_of_2(outs, 16),
        BLOCK_R=next_power_of_2(launch.rank, 16),
        PART=launch.part,
        SUM=launch.once,
        num_warps=config["num_warps"],
        **LAUNCH_OPTIONS,
    )
    return velocity
