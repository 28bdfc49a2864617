"""A forecast with residual, or a whole predicted step with the output head, in one launch.

A program owns a range of the tokens of one sample, its group, and a share of the channels. It reads every feature there
once. For each tile of tokens it loops over the channels and keeps these sums in registers, of `x = base - c`, where c
is a number of each token that is near the mean of its channels:

    sum x,   sum x^2,   P = W diag(1 + scale) x,   X = V^T x,   q = U taps

The programs of a group have different channels. Each leaves its sums in scratch memory and counts its arrival, once.
The last one adds up the parts of all, in a fixed order, and finishes the group. Nobody waits. With `mean = sum x / D`,
`W' = W diag(1 + scale)` and the forecast `h = base + V q`:

    D var = sum x^2 - D mean^2 + 2 (X - mean V^T 1) . q + q^T (V^T V - V^T 1 1^T V / D) q
    v     = rstd * (P - mean W' 1 + (V^T W'^T - V^T 1 (W' 1)^T / D)^T q) + W shift + b

A layer norm does not change if a number is added to all channels, so c does not appear. Since x is small where the
features are large compared with their spread, no digits cancel. Other norms, and no norm, have c = 0:

    D mean square = sum x^2 + 2 X . q + q^T V^T V q
    v             = rstd * (P + (V^T W'^T)^T q) + W shift + b

A modulation of each token is a tile beside those of the features. Then W' is not the same for all tokens, and the
products are `P = W (x (1 + scale))`, and `W (1 + scale)` and `W shift` in the place of `W' 1` and `W shift`; without a
norm, `P = W (x (1 + scale) + shift)` is all. Such a head has no residual here: its `W' V` would be a matrix for each
token.

Without a head the programs write the base, and the last one adds `V q` to it.
"""

import torch
import triton
import triton.language as tl

from lesa_kernels.bspline_kan.kernels import rounded
from lesa_kernels.launch import LAUNCH_OPTIONS, arrival_counters
from lesa_kernels.stream import geometry
from lesa_kernels.stream.arguments import HeadSums, LowRank, OutputHead, StoredFeatures, Weights
from lesa_kernels.stream.geometry import SumsLaunch
from lesa_kernels.stream.kernels.finish import finish_forecast, finish_velocity
from lesa_kernels.stream.kernels.forecast import (
    anchor_weight,
    anchors_of,
    constant_kind,
    constant_of,
    stream_forecast_sum,
    tokens_of,
)
from lesa_kernels.stream.kernels.shared import (
    device_of,
    load_rows,
    operand_dtype,
    problem_of,
    rounded_dot,
    stored_bits,
    widen,
)


@triton.jit
def shift_of(
    features, slot, row, start, end, likeness, added, D: tl.constexpr, BLOCK_T: tl.constexpr, FLOAT8: tl.constexpr
):
    """A number of each token that is near the mean of its base: `[BLOCK_T]`. Any number is right; this one is precise.

    It is the median of three channels of the newest feature, so it stays there if one channel is far from the others.
    `likeness` and `added` make a base of it, as if all features were like that one.
    """
    storage, scales, batch, tokens, stride_c, stride_b, stride_t = features
    first = tl.cast(slot, tl.int64) * stride_c + tl.cast(row, tl.int64) * stride_b + tl.cast(start, tl.int64) * stride_t
    inner = tl.arange(0, BLOCK_T)
    exist = start + inner < end
    at = storage + first + inner * stride_t
    scale = tl.full([BLOCK_T], 1.0, tl.float32)
    if FLOAT8 != 0:
        token = (tl.cast(slot, tl.int64) * batch + row) * tokens + start
        scale = tl.load(scales + token + inner, exist, 0.0)
    middle: tl.constexpr = D // 2
    a = widen(tl.load(at, exist, 0.0)[:, None], scale, FLOAT8)
    b = widen(tl.load(at + middle, exist, 0.0)[:, None], scale, FLOAT8)
    c = widen(tl.load(at + (D - 1), exist, 0.0)[:, None], scale, FLOAT8)
    median = tl.reshape(tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c)), [BLOCK_T])
    return likeness * median + added


@triton.jit
def likeness_of(
    row, n, anchors, constant, stride_anchors, stride_constant,
    D: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """The sum of the weights of all features, and the constant, of the channel in the middle."""
    middle: tl.constexpr = D // 2
    total = 0.0
    for k in tl.static_range(K):
        if WIDE:
            weight = tl.load(anchors + tl.cast(row, tl.int64) * stride_anchors + (k * D + middle))
        else:
            weight = tl.load(anchors + row * stride_anchors + k)
        total += tl.where(k < n, weight, 0.0)
    added = 0.0
    if CONSTANT == 2:
        added = tl.load(constant + tl.cast(row, tl.int64) * stride_constant + middle)
    elif CONSTANT == 1:
        added = tl.load(constant + row * stride_constant)
    return total, added


@triton.jit
def modulation_of(modulation, stride_b, stride_t, row, start, end, channels, inside, BLOCK_T: tl.constexpr):
    """A tile of the scales or shifts of each token: `[BLOCK_T, channels]`, zero from token `end` on."""
    inner = tl.arange(0, BLOCK_T)
    first = tl.cast(row, tl.int64) * stride_b + tl.cast(start, tl.int64) * stride_t
    tile = modulation + first + inner[:, None] * stride_t + channels[None, :]
    return tl.load(tile, (start + inner < end)[:, None] & inside[None, :], 0.0)


@triton.jit
def products(map, features, accumulator, OPERAND: tl.constexpr):
    """`accumulator + map @ features^T`, rounded to OPERAND: `[rows of the map, tokens]`.

    Features are the second operand, which tensor cores of sm_90 and newer read from shared memory. As the first one,
    they would be computed a second time, in the layout in which the tensor cores take registers.
    """
    return rounded_dot(map, tl.trans(rounded(features, OPERAND)), accumulator, OPERAND)


@triton.jit
def tap_weights(taps, row, n, stride_b, j: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr):
    """The size of tap j, and the weights of its j + 2 anchors over this size, zero for anchors that are not read.

    The size is one, except in float16, where a tap that is far from its anchors might be out of range: there it says
    how many times larger than the anchors the tap can be.
    """
    weights = ()
    size = 0.0
    for k in tl.static_range(j + 2):
        weight = tl.where(k < n, tl.load(taps + row * stride_b + (j * K + k)), 0.0)
        weights = weights + (weight,)
        size += tl.abs(weight)
    if tl.float16 != OPERAND:
        return 1.0, weights
    size = tl.where(size > 0, size, 1.0)
    scaled = ()
    for k in tl.static_range(j + 2):
        scaled = scaled + (weights[k] / size,)
    return size, scaled


@triton.jit(
    do_not_specialize=[
        "capacity", "batch", "tokens", "groups", "rounds", "together", "eps",
        "stride_count", "stride_taps", "stride_stage", "stride_ones", "stride_head_constant", "stride_through",
    ]
)  # fmt: skip
def _stream_sums_fwd_kernel(
    output,
    read_output,
    parts,
    arrivals,
    storage,
    scales,
    cursor,
    ring_count,
    anchors,
    count,
    constant,
    taps,
    stages,
    down,
    up,
    square,
    total,
    ones,
    head_constant,
    through,
    weight,
    capacity,
    batch,
    tokens,
    groups,
    rounds,
    together,
    eps,
    stride_c,
    stride_b,
    stride_t,
    stride_anchors,
    stride_count,
    stride_constant,
    stride_taps,
    stride_stage,
    stride_ones,
    stride_head_constant,
    stride_through,
    stride_weight,
    token_scale,
    token_shift,
    stride_scale_b,
    stride_scale_t,
    stride_shift_b,
    stride_shift_t,
    D: tl.constexpr,
    K: tl.constexpr,
    WIDE: tl.constexpr,
    CONSTANT: tl.constexpr,
    OUTS: tl.constexpr,
    NORM: tl.constexpr,
    RANK: tl.constexpr,
    KEEPS_READ: tl.constexpr,
    FLOAT8: tl.constexpr,
    OPERAND: tl.constexpr,
    SHRINK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BY_RANK: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    split = program % SPLITS  # neighbours read other channels of the same tokens
    group = (program // SPLITS) % groups
    row = program // (SPLITS * groups)
    inner = tl.arange(0, BLOCK_T)
    outs = tl.arange(0, BLOCK_O)
    ranks = tl.arange(0, BLOCK_R)
    first_block = split * blocks // SPLITS
    last_block = (split + 1) * blocks // SPLITS

    slots, n, poison = anchors_of(cursor, ring_count, count, row, capacity, stride_count, K)
    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)
    likeness, added = 0.0, 0.0
    if NORM == "layer":
        likeness, added = likeness_of(row, n, anchors, constant, stride_anchors, stride_constant, D, K, WIDE, CONSTANT)
    stage = 0
    if RANK > 0:
        stage = tl.load(stages + row * stride_stage)
        weights = ()
        tap_sizes = ()
        for j in tl.static_range(K - 1):
            tap_size, of_tap = tap_weights(taps, row, n, stride_taps, j, K, OPERAND)
            weights = weights + (of_tap,)
            tap_sizes = tap_sizes + (tap_size,)
    first, end = tokens_of(group, groups, tokens)
    meeting = tl.cast(row, tl.int64) * groups + group
    tiles = rounds * together
    stride_split = together * PART
    group_parts = parts + meeting * SPLITS * stride_split

    for round in tl.range(0, rounds, disable_licm=True):
        for i in tl.range(0, together, disable_licm=True):
            tile = round * together + i
            start = first + tile * (end - first) // tiles
            stop = first + (tile + 1) * (end - first) // tiles
            shift = tl.zeros([BLOCK_T], tl.float32)
            plain_sum = tl.zeros([BLOCK_T, BLOCK_D // 8], tl.float32)
            square_sum = tl.zeros([BLOCK_T, BLOCK_D // 8], tl.float32)
            projected = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
            if token_scale is not None:
                projected_ones = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
                projected_shift = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
            read = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
            for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
                channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
                inside = channels < D
                if NORM == "layer":  # noqa: SIM102
                    if block == first_block:  # not before the loop, whose first copies would wait for it
                        limit = tl.where(n > 0, stop, 0)
                        shift = shift_of(features, slots[0], row, start, limit, likeness, added, D, BLOCK_T, FLOAT8)
                stored = ()
                for k in tl.static_range(K):
                    limit = tl.where(k < n, stop, 0)
                    stored_k = load_rows(features, slots[k], row, start, limit, channels, inside, BLOCK_T, FLOAT8)
                    stored = stored + (stored_k,)
                features_k = ()
                for k in tl.static_range(K):
                    features_k = features_k + (widen(stored[k][0], stored[k][1], FLOAT8),)
                x = constant_of(constant, poison, row, channels, inside, stride_constant, CONSTANT) - shift[:, None]
                for k in tl.static_range(K):
                    x += anchor_weight(anchors, row, k, n, channels, inside, stride_anchors, D, K, WIDE) * features_k[k]
                if OUTS > 0:
                    if D % BLOCK_D != 0:
                        x = tl.where(inside[None, :], x, 0.0)
                    if NORM != "none":
                        octets = tl.reshape(x, [BLOCK_T, BLOCK_D // 8, 8])  # of a thread: the loop needs no shuffles
                        if NORM == "layer":
                            plain_sum += tl.sum(octets, axis=2)
                        square_sum += tl.sum(octets * octets, axis=2)
                    exist = inside[None, :] & (outs < OUTS + RANK)[:, None]
                    of_row = weight + tl.cast(row, tl.int64) * stride_weight
                    map = tl.load(of_row + outs[:, None] * D + channels[None, :], exist, 0.0)
                    if token_scale is not None:
                        scaled = 1.0 + modulation_of(
                            token_scale, stride_scale_b, stride_scale_t, row, start, stop, channels, inside, BLOCK_T
                        ).to(tl.float32)
                        x *= scaled
                        if NORM == "layer":
                            projected_ones = products(map, scaled, projected_ones, OPERAND)
                        if token_shift is not None:
                            moved = modulation_of(
                                token_shift, stride_shift_b, stride_shift_t, row, start, stop, channels, inside, BLOCK_T
                            ).to(tl.float32)
                            if NORM == "none":
                                x += moved
                            else:
                                projected_shift = products(map, moved, projected_shift, OPERAND)
                    if SHRINK != 1:
                        x *= SHRINK
                    projected = products(map, x, projected, OPERAND)
                else:
                    token = tl.cast(row, tl.int64) * tokens + start
                    written = output + token * D + inner[:, None] * D + channels[None, :]
                    mask = (start + inner < stop)[:, None] & inside[None, :]
                    tl.store(written, rounded(x, output.dtype.element_ty), mask)
                if RANK > 0:
                    exist = inside[None, :] & (ranks < RANK)[:, None]
                    for j in tl.static_range(K - 1):
                        rows = (stage * RANK + ranks) * (K - 1) + j
                        map = tl.load(down + rows[:, None] * D + channels[None, :], exist, 0.0)
                        tap = weights[j][0] * features_k[0]  # type: ignore[misc]
                        for k in tl.static_range(1, j + 2):
                            tap += weights[j][k] * features_k[k]
                        if tl.float16 == OPERAND:
                            zero = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
                            read += tap_sizes[j] * products(map, tap, zero, OPERAND)
                        else:
                            read = products(map, tap, read, OPERAND)

            own_part = group_parts + split * stride_split + i * PART
            if OUTS > 0:
                if NORM == "layer":
                    tl.store(own_part + inner, tl.sum(plain_sum, axis=1))
                if NORM != "none":
                    tl.store(own_part + BLOCK_T + inner, tl.sum(square_sum, axis=1))
                kept = (outs < OUTS + RANK)[:, None] & (inner < BLOCK_T)[None, :]
                of_outs = own_part + 2 * BLOCK_T + outs[:, None] * BLOCK_T + inner[None, :]
                tl.store(of_outs, projected, kept)
                if token_scale is not None and NORM == "layer":
                    tl.store(of_outs + BLOCK_O * BLOCK_T, projected_ones, kept)
                if token_shift is not None and NORM != "none":
                    moved_by: tl.constexpr = BLOCK_O * BLOCK_T * (2 if NORM == "layer" else 1)
                    tl.store(of_outs + moved_by, projected_shift, kept)
            if RANK > 0:
                of_rank = own_part + BY_RANK + ranks[:, None] * BLOCK_T + inner[None, :]
                tl.store(of_rank, read)

        tl.debug_barrier()  # all threads must have written before one of them counts the arrival
        if tl.atomic_add(arrivals + meeting, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrivals + meeting, 0)
            for i in tl.range(0, together, disable_licm=True):
                tile = round * together + i
                start = first + tile * (end - first) // tiles
                stop = first + (tile + 1) * (end - first) // tiles
                if OUTS > 0:
                    finish_velocity(
                        output, group_parts + i * PART, stride_split, row, stage, start, stop, tokens, eps,
                        square, total, ones, head_constant, through, stride_ones, stride_head_constant, stride_through,
                        D, OUTS, NORM, token_scale is not None, token_shift is not None,
                        RANK, SHRINK, SPLITS, BY_RANK, BLOCK_T, BLOCK_O, BLOCK_R, CHUNK,
                    )  # fmt: skip
                else:
                    finish_forecast(
                        output, read_output, group_parts + i * PART, stride_split,
                        row, stage, start, stop, tokens, up,
                        D, RANK, KEEPS_READ, OPERAND, SPLITS, BY_RANK, BLOCK_T, BLOCK_E, BLOCK_R,
                    )  # fmt: skip
        tl.debug_barrier()  # a program of its own group writes its next sums where it has just read these


def sums_launch(features: StoredFeatures, weights: Weights, head: OutputHead | None, rank: int) -> SumsLaunch | str:
    """How the kernel is launched with or without a head; or why it does not fit."""
    return geometry.sums_launch(device_of(features.device), problem_of(features, weights, head, rank))


def _launch(
    output: torch.Tensor,
    features: StoredFeatures,
    weights: Weights,
    low_rank: LowRank,
    head: OutputHead | None,
    sums: HeadSums,
    read: torch.Tensor | None,
) -> torch.Tensor:
    """Launches the kernel with or without a head; see `stream_forecast_fwd` and `stream_velocity_fwd`."""
    storage, rank = features.storage, low_rank.rank
    capacity, batch, tokens, width = storage.shape
    outs = 0 if head is None else head.weight.shape[0]
    launch = sums_launch(features, weights, head, rank)
    if isinstance(launch, str):
        raise RuntimeError(f"the kernel does not fit: {launch}")
    tiling, device = launch.tiling, device_of(storage.device)
    parts = torch.empty(launch.scratch, dtype=torch.float32, device=storage.device)
    stored, float8 = stored_bits(storage)
    modulations = (head.scale, head.shift) if head is not None and head.per_token else (None, None)
    operand = operand_dtype(storage.dtype, head)

    def given(tensor):
        return output if tensor is None else tensor

    def step(tensor):
        return 0 if tensor is None else tensor.stride(0)

    _stream_sums_fwd_kernel[(launch.programs,)](
        output,
        given(read),
        parts,
        arrival_counters(storage.device, batch * launch.groups),
        stored,
        given(features.scales),
        features.cursor,
        features.count,
        weights.anchors,
        weights.count,
        given(weights.constant),
        given(weights.taps),
        given(weights.stage),
        *(given(part if rank else None) for part in low_rank),
        given(sums.ones),
        sums.constant if sums.ones is None and head is not None else given(sums.constant),
        given(sums.through),
        given(sums.weight),
        capacity,
        batch,
        tokens,
        launch.groups,
        launch.rounds,
        launch.together,
        0.0 if head is None else head.eps,
        *storage.stride()[:3],
        step(weights.anchors),
        step(weights.count),
        step(weights.constant),
        step(weights.taps),
        step(weights.stage),
        *(step(part) for part in sums),
        # What is None is no argument of the compiled kernel.
        *modulations,
        *(None if part is None else part.stride(dim) for part in modulations for dim in (0, 1)),
        D=width,
        K=weights.anchors.shape[1],
        WIDE=weights.anchors.ndim == 3,
        CONSTANT=constant_kind(weights),
        OUTS=outs,
        NORM="none" if head is None or head.norm is None else head.norm,
        RANK=rank,
        KEEPS_READ=read is not None,
        FLOAT8=float8,
        OPERAND=operand,
        # The difference of two features may be out of the range of float16.
        SHRINK=0.25 if operand == tl.float16 else 1.0,
        SPLITS=launch.splits,
        BLOCK_T=tiling.block_t,
        BLOCK_D=tiling.block_d,
        # Float16 is multiplied as float32 at the end, and float32 is split into two.
        BLOCK_E=tiling.finished_channels(device, 2 if operand == tl.bfloat16 else 8),
        BLOCK_O=max(tiling.block_o, 16),
        BLOCK_R=max(tiling.block_r, 16),
        BY_RANK=tiling.by_rank,
        PART=tiling.part,
        CHUNK=tiling.chunk,
        NUM_STAGES=tiling.stages,
        num_warps=tiling.warps,
        num_stages=1,
        **LAUNCH_OPTIONS,
    )
    return output


def stream_forecast_fwd(
    features: StoredFeatures,
    weights: Weights,
    low_rank: LowRank,
    out_dtype: torch.dtype,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launches a forecast once; arguments as in `stream_forecast`, checked there.

    If `read` is given, `[B, T, R]` float32, `sum_j U_sj t_j` is written to it for a backward.
    """
    if not low_rank.rank:
        return stream_forecast_sum(features, weights, out_dtype)
    output = torch.empty(features.storage.shape[1:], dtype=out_dtype, device=features.device)
    if output.numel() == 0:
        return output
    return _launch(output, features, weights, low_rank, None, HeadSums(), read)


def stream_velocity_fwd(
    features: StoredFeatures,
    weights: Weights,
    low_rank: LowRank,
    head: OutputHead,
    sums: HeadSums,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Launches a whole predicted step once; arguments as in `stream_velocity`, checked there.

    With a residual, `low_rank` has all its parts. `sums` has all its parts too. The scratch memory comes from torch's
    allocator and is returned at the end of the call.
    """
    _, batch, tokens, _ = features.storage.shape
    output = torch.empty((batch, tokens, head.weight.shape[0]), dtype=out_dtype, device=features.device)
    if output.numel() == 0:
        return output
    return _launch(output, features, weights, low_rank, head, sums, None)
