"""Triton kernels of the B-spline KAN layer."""

import torch
import triton
import triton.language as tl

from lesa_kernels.bspline_kan.splines import (
    factors,
    factors_of,
    interpretable_dot,
    operands,
    rounded,
    select,
    silu_slope,
    spline_position,
    spline_slopes,
    spline_weights,
    spread_nan,
)
from lesa_kernels.launch import LAUNCH_OPTIONS, architecture, launch_config, multiprocessors

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _add_group(
    acc,
    group,
    weight_ptr,
    i,
    o,
    in_features,
    out_features,
    silu,
    matrix,
    bases,
    zeros,
    SLOTS: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
):
    """`acc` and the product of a block of inputs, from input `i` on, with the matrices from 4 `group` on."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    a = factors_of(group, silu, matrix, bases, zeros, group == 0, SLOTS, DEGREE, dtype)
    a = a.reshape(zeros.shape[0], zeros.shape[1] * SLOTS)
    row = tl.arange(0, zeros.shape[1] * SLOTS)  # all matrices for the first input, then for the next
    first = weight_ptr + tl.cast(i, tl.int64) * out_features
    m, i = 4 * group + row % SLOTS, i + row // SLOTS
    mask = ((m <= GRID + DEGREE) & (i < in_features))[:, None] & (o < out_features)[None, :]
    offset = m * (tl.cast(in_features, tl.int64) * out_features) + row // SLOTS * out_features
    w = tl.load(first + offset[:, None] + o[None, :], mask=mask, other=0.0)
    return interpretable_dot(a, w, acc, "tf32x3")


@triton.jit
def _bspline_kan_fwd_kernel(
    x_ptr,  # [rows, in]
    weight_ptr,  # [1 + GRID + DEGREE, in, out]
    y_ptr,  # [rows, out]
    rows,
    in_features,
    out_features,
    stride_x,
    groups,  # of matrices in a part; not a constant, since the compiler would unroll the loop
    LO: tl.constexpr,
    HI: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLLED: tl.constexpr,
    LAST_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    blocks_o = tl.cdiv(out_features, BLOCK_O)
    pid = tl.program_id(0)
    start_n = tl.cast(pid // blocks_o, tl.int64) * BLOCK_N
    n, left = tl.arange(0, BLOCK_N), tl.minimum(rows - start_n, BLOCK_N).to(tl.int32)
    o = (pid % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)

    # Zeros are enough where a NaN need not reach all matrices: it reaches its row through its own.
    zeros = tl.zeros([BLOCK_N, BLOCK_I], tl.float32 if dtype == tl.float32 else tl.uint64)
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for step in tl.range(0, tl.cdiv(in_features, BLOCK_I) * PARTS):
        start, part = step // PARTS * BLOCK_I, step % PARTS
        i = start + tl.arange(0, BLOCK_I)
        # Masked inputs are finite, so their product with the masked weights, zeros, is zero.
        inside = (n[:, None] < left) & (i[None, :] < in_features)
        x = tl.load(x_ptr + start_n * stride_x + n[:, None] * stride_x + i[None, :], mask=inside, other=0.0)
        silu, matrix, bases = factors(x.to(tl.float32), LO, HI, GRID, DEGREE, dtype)
        block = (weight_ptr, start, o, in_features, out_features, silu, matrix, bases, zeros)
        if UNROLLED > 0:
            # The groups of a part are in one step, so that the loads of the next step start before this one is done.
            for g in tl.static_range(UNROLLED - 1):
                acc = _add_group(acc, part * UNROLLED + g, *block, 4, GRID, DEGREE)
            acc = _add_group(acc, part * UNROLLED + UNROLLED - 1, *block, LAST_SLOTS, GRID, DEGREE)
        else:
            for group in tl.range(0, groups):
                acc = _add_group(acc, group, *block, 4, GRID, DEGREE)

    inside = (n[:, None] < left) & (o[None, :] < out_features)
    tl.store(
        y_ptr + start_n * out_features + n[:, None] * out_features + o[None, :],
        rounded(acc, weight_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _bspline_kan_fwd_gather_kernel(
    x_ptr,  # [rows, in]
    weight_ptr,  # [1 + GRID + DEGREE, in, out]
    y_ptr,  # [rows, out]
    rows,
    in_features,
    out_features,
    stride_x,
    LO: tl.constexpr,
    HI: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    blocks_o = tl.cdiv(out_features, BLOCK_O)
    pid = tl.program_id(0)
    start_n = tl.cast(pid // blocks_o, tl.int64) * BLOCK_N
    n, left = tl.arange(0, BLOCK_N), tl.minimum(rows - start_n, BLOCK_N).to(tl.int32)
    o = (pid % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    matrix = tl.cast(in_features, tl.int64) * out_features
    inside = (n[:, None] < left) & (o[None, :] < out_features)

    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for i in range(0, in_features):
        x = tl.load(x_ptr + start_n * stride_x + n * stride_x + i, mask=n < left, other=0.0).to(tl.float32)
        first, fraction = spline_position(x, LO, HI, GRID, DEGREE)
        row = weight_ptr + tl.cast(i, tl.int64) * out_features + o  # [BLOCK_O]
        base = tl.load(row, mask=o < out_features, other=0.0).to(tl.float32)
        acc += (x * tl.sigmoid(x))[:, None] * base[None, :]
        weights = spline_weights(fraction, DEGREE)
        for k in tl.static_range(DEGREE + 1):
            g = first + k
            exists = (g >= 0) & (g < GRID + DEGREE)
            taken = row[None, :] + (g[:, None] + 1) * matrix
            c = tl.load(taken, mask=exists[:, None] & (o[None, :] < out_features), other=0.0).to(tl.float32)
            acc += weights[k][:, None] * c

    tl.store(
        y_ptr + start_n * out_features + n[:, None] * out_features + o[None, :],
        rounded(acc, weight_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _bspline_kan_bwd_x_kernel(
    grad_ptr,  # [rows, out]
    x_ptr,  # [rows, in]
    weight_ptr,  # [1 + GRID + DEGREE, in, out]
    grad_x_ptr,  # [rows, in]
    rows,
    in_features,
    out_features,
    stride_grad,
    stride_x,
    matrices,
    LO: tl.constexpr,
    HI: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    blocks_i = tl.cdiv(in_features, BLOCK_I)
    pid = tl.program_id(0)
    start_n = tl.cast(pid // blocks_i, tl.int64) * BLOCK_N
    n, left = tl.arange(0, BLOCK_N), tl.minimum(rows - start_n, BLOCK_N).to(tl.int32)
    start = (pid % blocks_i) * BLOCK_I
    i = start + tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    matrix = tl.cast(in_features, tl.int64) * out_features

    inside = (n[:, None] < left) & (i[None, :] < in_features)
    x = tl.load(x_ptr + start_n * stride_x + n[:, None] * stride_x + i[None, :], mask=inside, other=0.0).to(tl.float32)
    first, fraction = spline_position(x, LO, HI, GRID, DEGREE)
    slopes = spline_slopes(fraction, LO, HI, GRID, DEGREE)
    slope_of_base = silu_slope(x)
    background = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)

    grad_rows = grad_ptr + start_n * stride_grad + n[:, None] * stride_grad  # [BLOCK_N, 1]
    tile = weight_ptr + tl.cast(start, tl.int64) * out_features + tl.arange(0, BLOCK_I)[:, None] * out_features
    if ONE_BLOCK:  # a whole row of `grad` fits into a block, and is loaded once
        there = (n[:, None] < left) & (o[None, :] < out_features)
        grad = tl.load(grad_rows + o[None, :], mask=there, other=0.0).to(dtype)
    grad_x = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
    for m in tl.range(0, matrices):
        product = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
        if ONE_BLOCK:
            within = (i[:, None] < in_features) & (o[None, :] < out_features)
            w = tl.load(tile + m * matrix + o[None, :], mask=within, other=0.0)
            product = interpretable_dot(grad, tl.trans(w), product, "ieee")
        else:
            for start_o in tl.range(0, out_features, BLOCK_O):
                columns = start_o + o[None, :]
                there = (n[:, None] < left) & (columns < out_features)
                grad = tl.load(grad_rows + columns, mask=there, other=0.0).to(dtype)
                within = (i[:, None] < in_features) & (columns < out_features)
                w = tl.load(tile + m * matrix + columns, mask=within, other=0.0)
                product = interpretable_dot(grad, tl.trans(w), product, "ieee")
        grad_x += select(m, slope_of_base, first, slopes, background, DEGREE) * product

    tl.store(
        grad_x_ptr + start_n * in_features + n[:, None] * in_features + i[None, :],
        rounded(grad_x, x_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _bspline_kan_bwd_x_gather_kernel(
    grad_ptr,  # [rows, out]
    x_ptr,  # [rows, in]
    weight_ptr,  # [1 + GRID + DEGREE, in, out]
    grad_x_ptr,  # [rows, in]
    rows,
    in_features,
    out_features,
    stride_grad,
    stride_x,
    LO: tl.constexpr,
    HI: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    pid = tl.program_id(0)
    start_n = tl.cast(pid // in_features, tl.int64) * BLOCK_N
    n, left = tl.arange(0, BLOCK_N), tl.minimum(rows - start_n, BLOCK_N).to(tl.int32)
    i = pid % in_features
    matrix = tl.cast(in_features, tl.int64) * out_features

    x = tl.load(x_ptr + start_n * stride_x + n * stride_x + i, mask=n < left, other=0.0).to(tl.float32)
    first, fraction = spline_position(x, LO, HI, GRID, DEGREE)
    slopes, slope_of_base = spline_slopes(fraction, LO, HI, GRID, DEGREE), silu_slope(x)
    row = weight_ptr + tl.cast(i, tl.int64) * out_features
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for start_o in range(0, out_features, BLOCK_O):
        o = start_o + tl.arange(0, BLOCK_O)
        mask = (n[:, None] < left) & (o[None, :] < out_features)
        grad = tl.load(
            grad_ptr + start_n * stride_grad + n[:, None] * stride_grad + o[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        base = tl.load(row + o, mask=o < out_features, other=0.0).to(tl.float32)
        slope = slope_of_base[:, None] * base[None, :]  # of each output by this input
        for k in tl.static_range(DEGREE + 1):
            g = first + k
            exists = (g >= 0) & (g < GRID + DEGREE)
            taken = row + (g[:, None] + 1) * matrix + o[None, :]
            c = tl.load(taken, mask=exists[:, None] & (o[None, :] < out_features), other=0.0).to(tl.float32)
            slope += slopes[k][:, None] * c
        acc += slope * grad

    grad_x = rounded(tl.sum(acc, axis=1), x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + start_n * in_features + n * in_features + i, grad_x, mask=n < left)


@triton.jit
def _bspline_kan_bwd_weight_kernel(
    grad_ptr,  # [rows, out]
    x_ptr,  # [rows, in]
    grad_weight_ptr,  # [splits, 1 + GRID + DEGREE, in, out]
    rows,
    in_features,
    out_features,
    stride_grad,
    stride_x,
    rows_per_split,
    LO: tl.constexpr,
    HI: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    MATRICES: tl.constexpr = GRID + DEGREE + 1
    blocks_i, blocks_o = tl.cdiv(in_features, BLOCK_I), tl.cdiv(out_features, BLOCK_O)
    blocks_m: tl.constexpr = (MATRICES + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    o = (pid % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // blocks_o
    start_m = (pid % blocks_m) * BLOCK_M
    pid = pid // blocks_m
    start_i = (pid % blocks_i) * BLOCK_I
    split = tl.cast(pid // blocks_i, tl.int64)

    i = start_i + tl.arange(0, BLOCK_I)
    m = start_m + tl.arange(0, BLOCK_M)[:, None, None]
    start_n = split * rows_per_split
    count = tl.minimum(rows - start_n, rows_per_split).to(tl.int32)
    x_block, grad_block = x_ptr + start_n * stride_x, grad_ptr + start_n * stride_grad

    # Some GPUs can't read a transposed operand of 32 bits.
    ONE_GROUP: tl.constexpr = BLOCK_M == 4 and DTYPE.primitive_bitwidth == 16
    acc = tl.zeros([BLOCK_M * BLOCK_I, BLOCK_O], tl.float32)
    for start in tl.range(0, count, BLOCK_N):
        n = tl.arange(0, BLOCK_N)
        left = count - start
        mask = (n[:, None] < left) & (o[None, :] < out_features)
        grad = tl.load(grad_block + n[:, None] * stride_grad + o[None, :], mask=mask, other=0.0).to(DTYPE)
        if ONE_GROUP:
            inside = (n[:, None] < left) & (i[None, :] < in_features)
            x = tl.load(x_block + n[:, None] * stride_x + i[None, :], mask=inside, other=0.0).to(tl.float32)
            silu, matrix, bases = factors(x, LO, HI, GRID, DEGREE, DTYPE)
            background, bases = spread_nan(x, bases, DTYPE)
            a = factors_of(start_m // 4, silu, matrix, bases, background, start_m == 0, 4, DEGREE, DTYPE)
            acc = interpretable_dot(tl.trans(a.reshape(BLOCK_N, BLOCK_I * 4)), grad, acc, "ieee")
        else:
            inside = (n[None, :] < left) & (i[:, None] < in_features)
            x = tl.load(x_block + n[None, :] * stride_x + i[:, None], mask=inside, other=0.0).to(tl.float32)
            x = x[None, :, :]
            first, fraction = spline_position(x, LO, HI, GRID, DEGREE)
            weights, silu = operands(fraction, x, DEGREE, DTYPE)
            background = (fraction * 0.0).to(DTYPE)  # NaN goes to all bases
            a = select(m, silu, first, weights, background, DEGREE)  # [BLOCK_M, BLOCK_I, BLOCK_N]
            acc = interpretable_dot(tl.reshape(a, [BLOCK_M * BLOCK_I, BLOCK_N]), grad, acc, "ieee")
        x_block += BLOCK_N * tl.cast(stride_x, tl.int64)
        grad_block += BLOCK_N * tl.cast(stride_grad, tl.int64)

    j = tl.arange(0, BLOCK_M * BLOCK_I)
    if ONE_GROUP:
        rows_m, rows_i = start_m + j % 4, start_i + j // 4
    else:
        rows_m, rows_i = start_m + j // BLOCK_I, start_i + j % BLOCK_I
    row = ((split * MATRICES + rows_m) * in_features + rows_i) * out_features  # int64 [BLOCK_M * BLOCK_I]
    mask = (rows_m < MATRICES) & (rows_i < in_features)
    acc = rounded(acc, grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + row[:, None] + o[None, :], acc, mask=mask[:, None] & (o[None, :] < out_features))


@triton.jit
def _bspline_kan_sum_kernel(parts_ptr, total_ptr, count, splits, BLOCK: tl.constexpr):
    j = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * count + j, mask=j < count, other=0.0)
    tl.store(total_ptr + j, rounded(total, total_ptr.dtype.element_ty), mask=j < count)


def uses_gather(in_features: int, out_features: int, grid_size: int, spline_order: int, dtype: torch.dtype) -> bool:
    """Whether the layer reads the p + 1 coefficients that each input needs, rather than multiplying by all G + p bases.

    For each row, the matrix form does in * out * (1 + G + p) multiply-adds, both sizes rounded up to 16. The gather
    form does in * out * (p + 2), and each of them needs a load of its own. From the rates of an H100, a multiply-add of
    the gather form (limited by loads from L1: 32 to 64 per cycle and multiprocessor) is assumed to cost as much as 16
    on the tensor cores at half their peak (bfloat16, float16), or as 2.5 on the float32 cores. So the gather form is
    for layers of a few features, and for grids of more than about 70 intervals (float32: 8) with cubic splines. This is
    a count of operations; it has not been measured on a GPU.

    Args:
        in_features, out_features: the sizes of the layer.
        grid_size: G, the number of intervals.
        spline_order: p, the degree.
        dtype: of the weights, in which the products run.
    """
    cost = 2.5 if dtype == torch.float32 else 16
    matrix = 16 * triton.cdiv(in_features, 16) * 16 * triton.cdiv(out_features, 16) * (1 + grid_size + spline_order)
    return cost * in_features * out_features * (spline_order + 2) < matrix


def _fit(block: int, size: int, least: int = 16) -> int:
    # A block is not larger than the data. 16 is the least that a matrix product takes.
    return max(least, min(block, triton.next_power_of_2(size)))


def _spline(grid_size: int, spline_order: int, lo: float, hi: float) -> dict:
    return {"LO": lo, "HI": hi, "GRID": grid_size, "DEGREE": spline_order}


def _parts(matrices: int, unrolled: bool) -> dict[str, int]:
    """How the forward divides the matrices: in groups of four, which are unrolled or not.

    Parts of at most four groups are unrolled, and inputs are located on the grid once for each part. If there is only
    one part, its last group may have two matrices.
    """
    groups = triton.cdiv(matrices, 4)
    if not unrolled:
        return {"groups": groups, "PARTS": 1, "UNROLLED": 0, "LAST_SLOTS": 4}
    parts = triton.cdiv(groups, 4)
    groups = triton.cdiv(groups, parts)
    two = parts == 1 and matrices % 4 in (1, 2)
    return {"groups": groups, "PARTS": parts, "UNROLLED": groups, "LAST_SLOTS": 2 if two else 4}


def bspline_kan_fwd(
    x: torch.Tensor, weight: torch.Tensor, grid_size: int, spline_order: int, lo: float, hi: float
) -> torch.Tensor:
    """x [N, in] with unit last stride, weight [1 + G + p, in, out] contiguous -> [N, out] in the weight's dtype."""
    (rows, in_features), (matrices, _, out_features) = x.shape, weight.shape
    y = x.new_empty(rows, out_features, dtype=weight.dtype)
    if y.numel() == 0:
        return y
    tensors = x, weight, y, rows, in_features, out_features, x.stride(0)
    spline = _spline(grid_size, spline_order, lo, hi)
    gather = uses_gather(in_features, out_features, grid_size, spline_order, weight.dtype)
    # Hopper starts a product and goes on, so there the factors of one group are made during the product of another.
    unrolled = 90 <= architecture() < 100
    form = "_gather" if gather else "_unrolled" if unrolled else ""
    config = launch_config(f"bspline_kan_fwd{form}", weight.dtype, x.device)
    config = config | {"BLOCK_N": _fit(config["BLOCK_N"], rows), "BLOCK_O": _fit(config["BLOCK_O"], out_features)}
    grid = (triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(out_features, config["BLOCK_O"]),)
    if gather:
        _bspline_kan_fwd_gather_kernel[grid](*tensors, **spline, **config, **LAUNCH_OPTIONS)
    else:
        config = config | {"BLOCK_I": _fit(config["BLOCK_I"], in_features, least=4)}
        _bspline_kan_fwd_kernel[grid](*tensors, **_parts(matrices, unrolled), **spline, **config, **LAUNCH_OPTIONS)
    return y


def bspline_kan_bwd_x(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    grid_size: int,
    spline_order: int,
    lo: float,
    hi: float,
) -> torch.Tensor:
    """grad [N, out] and x [N, in] with unit last strides, weight as for `bspline_kan_fwd` -> [N, in] in x's dtype."""
    (rows, in_features), (matrices, _, out_features) = x.shape, weight.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if grad_x.numel() == 0:
        return grad_x
    tensors = grad, x, weight, grad_x, rows, in_features, out_features, grad.stride(0), x.stride(0)
    spline = _spline(grid_size, spline_order, lo, hi)
    if uses_gather(in_features, out_features, grid_size, spline_order, weight.dtype):
        config = launch_config("bspline_kan_bwd_x_gather", weight.dtype, x.device)
        config = config | {"BLOCK_N": _fit(config["BLOCK_N"], rows), "BLOCK_O": _fit(config["BLOCK_O"], out_features)}
        grid = (triton.cdiv(rows, config["BLOCK_N"]) * in_features,)
        _bspline_kan_bwd_x_gather_kernel[grid](*tensors, **spline, **config, **LAUNCH_OPTIONS)
        return grad_x
    config = launch_config("bspline_kan_bwd_x", weight.dtype, x.device)
    one_block = out_features <= config["BLOCK_O"]
    if not one_block:
        config = launch_config("bspline_kan_bwd_x_wide", weight.dtype, x.device)
    config = config | {
        "BLOCK_N": _fit(config["BLOCK_N"], rows),
        "BLOCK_I": _fit(config["BLOCK_I"], in_features, least=4),
    }
    config = config | {"BLOCK_O": _fit(config["BLOCK_O"], out_features), "ONE_BLOCK": one_block}
    grid = (triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(in_features, config["BLOCK_I"]),)
    _bspline_kan_bwd_x_kernel[grid](*tensors, matrices, **spline, **config, **LAUNCH_OPTIONS)
    return grad_x


def bspline_kan_bwd_weight(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    grid_size: int,
    spline_order: int,
    lo: float,
    hi: float,
) -> torch.Tensor:
    """grad [N, out] and x [N, in] with unit last strides -> the gradient of `weight`, in its shape and dtype.

    Both forms of the layer use it. It is a product of the bases with `grad`. Each row of the result is a pair of an
    input feature and a basis; the shape of the layer decides how many features and bases are in a block. The N rows are
    split among as many programs as fill the GPU. Their float32 sums are added in a fixed order, so equal inputs give
    equal bits.
    """
    (rows, in_features), (matrices, _, out_features) = x.shape, weight.shape
    grad_weight = torch.empty_like(weight)
    if grad_weight.numel() == 0 or rows == 0:
        return grad_weight.zero_()
    config = launch_config("bspline_kan_bwd_weight", weight.dtype, x.device)
    pairs = config["BLOCK_I"] * config["BLOCK_M"]
    block_i = _fit(config["BLOCK_I"], in_features, least=1)
    block_m = _fit(pairs // block_i, matrices, least=triton.cdiv(16, block_i))
    block_n, block_o = _fit(config["BLOCK_N"], rows), _fit(config["BLOCK_O"], out_features)
    config = config | {"BLOCK_N": block_n, "BLOCK_I": block_i, "BLOCK_M": block_m, "BLOCK_O": block_o}

    tiles = triton.cdiv(in_features, block_i) * triton.cdiv(matrices, block_m) * triton.cdiv(out_features, block_o)
    splits = min(triton.cdiv(rows, block_n), max(1, 2 * multiprocessors(x.device) // tiles))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), block_n) * block_n
    splits = triton.cdiv(rows, rows_per_split)
    parts = grad_weight if splits == 1 else x.new_empty(splits, *weight.shape, dtype=torch.float32)
    _bspline_kan_bwd_weight_kernel[(tiles * splits,)](
        grad,
        x,
        parts,
        rows,
        in_features,
        out_features,
        grad.stride(0),
        x.stride(0),
        rows_per_split,
        **_spline(grid_size, spline_order, lo, hi),
        DTYPE=_TRITON_DTYPES[weight.dtype],
        **config,
        **LAUNCH_OPTIONS,
    )
    if splits > 1:
        count, block = weight.numel(), 1024
        _bspline_kan_sum_kernel[(triton.cdiv(count, block),)](parts, grad_weight, count, splits, BLOCK=block)
    return grad_weight
