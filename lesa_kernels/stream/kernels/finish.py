"""What the last program of a group does in `sums`: it adds up the parts of all, and finishes their tokens."""

import triton
import triton.language as tl

from lesa_kernels.bspline_kan.kernels import rounded
from lesa_kernels.stream.kernels.shared import rounded_dot


@triton.jit
def part_sum(parts, offsets, stride_split, SPLITS: tl.constexpr, AS_ONE: tl.constexpr):
    """The sum of the parts that all splits left at `offsets`, in a fixed order.

    Loads bypass the first-level cache, which does not see the writes of other multiprocessors.
    """
    if len(offsets.shape) == 1 or not AS_ONE:
        total = tl.load(parts + offsets, cache_modifier=".cg")
        for i in tl.static_range(1, SPLITS):
            total += tl.load(parts + i * stride_split + offsets, cache_modifier=".cg")
        return total
    else:
        # As one tile, so that no load waits until the one before is in another layout. It takes more registers.
        splits = tl.arange(0, SPLITS) * stride_split
        return tl.sum(tl.load(parts + splits[:, None, None] + offsets[None], cache_modifier=".cg"), axis=0)


@triton.jit
def finish_velocity(
    output, parts, stride_split, row, stage, start, end, tokens, eps,
    square, total, ones, constant, through, stride_ones, stride_constant, stride_through,
    D: tl.constexpr, OUTS: tl.constexpr, NORM: tl.constexpr, TOKEN_SCALE: tl.constexpr, TOKEN_SHIFT: tl.constexpr,
    RANK: tl.constexpr, SHRINK: tl.constexpr, SPLITS: tl.constexpr, BY_RANK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the velocities of a tile from the sums that all splits left in `parts`.

    With a modulation of each token, `ones` and a part of the constant are sums too, and there is no residual.
    """
    inner = tl.arange(0, BLOCK_T)
    if NORM == "layer":
        mean = part_sum(parts, inner, stride_split, SPLITS, RANK > 0) / D
        squares = part_sum(parts, BLOCK_T + inner, stride_split, SPLITS, RANK > 0) - D * mean * mean
    elif NORM == "rms":
        squares = part_sum(parts, BLOCK_T + inner, stride_split, SPLITS, RANK > 0)
    if RANK > 0:
        rank_chunk: tl.constexpr = min(BLOCK_R, CHUNK)
        total += stage * RANK
        square += stage * (RANK * RANK)
        whole_read = tl.zeros([BLOCK_T, rank_chunk], tl.float32)
        if rank_chunk == BLOCK_R:
            whole_at = BY_RANK + tl.arange(0, BLOCK_R)[None, :] * BLOCK_T + inner[:, None]
            whole_read = part_sum(parts, whole_at, stride_split, SPLITS, RANK > 0)
    if RANK > 0 and NORM != "none":
        for first_rank in tl.range(0, BLOCK_R, rank_chunk):
            ranks = first_rank + tl.arange(0, rank_chunk)
            sums = tl.load(total + ranks, ranks < RANK, 0.0)
            rank_at = BY_RANK + ranks[None, :] * BLOCK_T + inner[:, None]
            read = whole_read
            if rank_chunk < BLOCK_R:
                read = part_sum(parts, rank_at, stride_split, SPLITS, RANK > 0)
            # Ranks that do not exist get any sums that there are, times zero.
            raised_at = (2 + OUTS + tl.minimum(ranks, RANK - 1))[None, :] * BLOCK_T + inner[:, None]
            raised = part_sum(parts, raised_at, stride_split, SPLITS, RANK > 0) * (1 / SHRINK)
            if NORM == "layer":
                raised -= mean[:, None] * sums[None, :]
            turned = 2 * raised
            for first_other in tl.range(0, BLOCK_R, rank_chunk):
                others = first_other + tl.arange(0, rank_chunk)
                other_read = whole_read
                if rank_chunk < BLOCK_R:
                    other_at = BY_RANK + others[None, :] * BLOCK_T + inner[:, None]
                    other_read = part_sum(parts, other_at, stride_split, SPLITS, RANK > 0)
                exist = (others < RANK)[:, None] & (ranks < RANK)[None, :]
                map = tl.load(square + others[:, None] * RANK + ranks[None, :], exist, 0.0)
                if NORM == "layer":
                    map -= tl.load(total + others, others < RANK, 0.0)[:, None] * (sums / D)[None, :]
                turned = tl.dot(other_read, map, turned, input_precision="tf32x3")
            squares += tl.sum(turned * read, axis=1)
    if NORM != "none":
        deviation = tl.sqrt(tl.maximum(squares, 0.0, tl.PropagateNan.ALL) / D + eps)

    out_chunk: tl.constexpr = min(BLOCK_O, CHUNK)
    for first_out in tl.range(0, BLOCK_O, out_chunk):
        outs = first_out + tl.arange(0, out_chunk)
        exist = outs < OUTS
        at = 2 * BLOCK_T + outs[None, :] * BLOCK_T + inner[:, None]
        if NORM == "layer" and TOKEN_SCALE:
            one = part_sum(parts, BLOCK_O * BLOCK_T + at, stride_split, SPLITS, False)
            product = part_sum(parts, at, stride_split, SPLITS, False) - mean[:, None] * one
        elif NORM == "layer":
            one = tl.load(ones + row * stride_ones + outs, exist, 0.0)
            product = part_sum(parts, at, stride_split, SPLITS, RANK > 0) * (1 / SHRINK) - mean[:, None] * one[None, :]
        else:
            product = part_sum(parts, at, stride_split, SPLITS, RANK > 0) * (1 / SHRINK)
        if RANK > 0:
            for first_rank in tl.range(0, BLOCK_R, rank_chunk):
                ranks = first_rank + tl.arange(0, rank_chunk)
                rank_at = BY_RANK + ranks[None, :] * BLOCK_T + inner[:, None]
                read = whole_read
                if rank_chunk < BLOCK_R:
                    read = part_sum(parts, rank_at, stride_split, SPLITS, RANK > 0)
                there = (ranks < RANK)[:, None] & exist[None, :]
                of_row = through + tl.cast(row, tl.int64) * stride_through
                map = tl.load(of_row + ranks[:, None] * OUTS + outs[None, :], there, 0.0)
                if NORM == "layer":
                    map -= tl.load(total + ranks, ranks < RANK, 0.0)[:, None] * (one / D)[None, :]
                product = tl.dot(read, map, product, input_precision="tf32x3")
        result = product
        if NORM != "none":
            result = product / deviation[:, None]
        if constant is not None:
            result += tl.load(constant + row * stride_constant + outs, exist, 0.0).to(tl.float32)[None, :]
        if TOKEN_SHIFT and NORM != "none":
            moved: tl.constexpr = BLOCK_O * BLOCK_T * (2 if NORM == "layer" else 1)
            result += part_sum(parts, moved + at, stride_split, SPLITS, False)
        token = tl.cast(row, tl.int64) * tokens + start
        written = output + token * OUTS + inner[:, None] * OUTS + outs[None, :]
        tl.store(written, rounded(result, output.dtype.element_ty), (start + inner < end)[:, None] & exist[None, :])


@triton.jit
def finish_forecast(
    output, read_output, parts, stride_split, row, stage, start, end, tokens, up,
    D: tl.constexpr, RANK: tl.constexpr, KEEPS_READ: tl.constexpr, OPERAND: tl.constexpr, SPLITS: tl.constexpr,
    BY_RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the residual of a tile to the base that the programs wrote.

    With taps far from their anchors, `read` may exceed the range of float16 even if the residual does not.
    """
    if tl.float16 == OPERAND:
        operand: tl.constexpr = tl.float32
    else:
        operand: tl.constexpr = OPERAND
    inner = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    there = start + inner < end
    token = tl.cast(row, tl.int64) * tokens + start
    at = BY_RANK + ranks[None, :] * BLOCK_T + inner[:, None]
    read = part_sum(parts, at, stride_split, SPLITS, True)
    if KEEPS_READ:
        kept = read_output + token * RANK + inner[:, None] * RANK + ranks[None, :]
        tl.store(kept, read, there[:, None] & (ranks < RANK)[None, :])
    for first in tl.range(0, D, BLOCK_E, num_stages=4):
        channels = first + tl.arange(0, BLOCK_E)
        exist = (channels < D)[None, :] & (ranks < RANK)[:, None]
        map = tl.load(up + (stage * D + channels)[None, :] * RANK + ranks[:, None], exist, 0.0)
        finished = output + token * D + inner[:, None] * D + channels[None, :]
        mask = there[:, None] & (channels < D)[None, :]
        base = tl.load(finished, mask, 0.0, cache_modifier=".cg").to(tl.float32)
        forecast = rounded_dot(read, map, base, operand)
        tl.store(finished, rounded(forecast, output.dtype.element_ty), mask)
