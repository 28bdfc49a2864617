"""Triton functions of splines on a uniform grid, which the kernels of the layer and of the predictors share."""

import math

import triton
import triton.language as tl

from lesa_kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_INVERSE_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(degree) for degree in range(6)))


@triton.jit
def spline_position(x, LO: tl.constexpr, HI: tl.constexpr, GRID: tl.constexpr, DEGREE: tl.constexpr):
    """The index of the first basis that is not zero at `x`, from -DEGREE - 1 to GRID + DEGREE, and the position of `x`
    in its interval. NaN gives a NaN position at some index in that range."""
    position = (x - LO) * (GRID / (HI - LO))
    position = tl.minimum(
        tl.maximum(position, -DEGREE - 1.0, tl.PropagateNan.ALL), GRID + DEGREE + 0.0, tl.PropagateNan.ALL
    )
    interval = tl.floor(position)
    first = tl.where(interval == interval, interval, 0.0).to(tl.int32)
    return first, position - interval


@triton.jit
def spline_weights(fraction, DEGREE: tl.constexpr):
    """The values of the DEGREE + 1 bases at a position in an interval, by the Cox-de Boor recursion, as a tuple."""
    if DEGREE == 0:
        return (fraction * 0.0 + 1.0,)  # NaN stays
    else:
        scale: tl.constexpr = _INVERSE_FACTORIALS[DEGREE]
        weights = ((1.0 - fraction) * scale, fraction * scale)
        for d in tl.static_range(2, DEGREE + 1):
            lower = weights
            weights = ((1.0 - fraction) * lower[0],)
            for k in tl.static_range(1, d):
                weights = weights + ((fraction + (d - k)) * lower[k - 1] + (k + 1 - fraction) * lower[k],)
            weights = weights + (fraction * lower[d - 1],)
        return weights


@triton.jit
def spline_slopes(fraction, LO: tl.constexpr, HI: tl.constexpr, GRID: tl.constexpr, DEGREE: tl.constexpr):
    """The derivatives of the DEGREE + 1 bases by x, as a tuple."""
    lower = spline_weights(fraction, DEGREE - 1)
    slopes = (lower[0] * (-GRID / (HI - LO)),)
    for k in tl.static_range(1, DEGREE):
        slopes = slopes + ((lower[k - 1] - lower[k]) * (GRID / (HI - LO)),)
    return slopes + (lower[DEGREE - 1] * (GRID / (HI - LO)),)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """A float32 value in `dtype`, rounded to nearest even. The interpreter by itself would truncate to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def operands(fraction, x, DEGREE: tl.constexpr, dtype: tl.constexpr):
    """The DEGREE + 1 bases and silu(x), as the matrix product takes them."""
    weights = ()
    exact = spline_weights(fraction, DEGREE)
    for k in tl.static_range(DEGREE + 1):
        weights = weights + (rounded(exact[k], dtype),)
    return weights, rounded(x * tl.sigmoid(x), dtype)


@triton.jit
def silu_slope(x):
    gate = tl.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def select(m, base, first, values, background, DEGREE: tl.constexpr):
    """The factor of matrix m of the packed weight. For m = 0 it is the value of the base branch. Otherwise it is the
    value of basis m - 1: one of the DEGREE + 1 `values` if that basis is among them, else the background."""
    value = background
    for k in tl.static_range(DEGREE + 1):
        value = tl.where(first == m - (k + 1), values[k], value)
    return tl.where(m == 0, base, value)


@triton.jit
def interpretable_dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b`. The interpreter would multiply the bits of bfloat16 as integers, so there it gets float32."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _pair(low, high, dtype: tl.constexpr):
    """Two float32 values, rounded to a dtype of 16 bits, in one uint32."""
    if _INTERPRETED:
        low = rounded(low, dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (rounded(high, dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    # The compiler by itself would round one value at a time, which takes much longer.
    name: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return tl.inline_asm_elementwise(
        "cvt.rn." + name + ".f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def factors(x, LO: tl.constexpr, HI: tl.constexpr, GRID: tl.constexpr, DEGREE: tl.constexpr, dtype: tl.constexpr):
    """What `factors_of` needs of the inputs: silu(x), the matrix where the bases begin, and the bases.

    Basis g belongs to matrix g + 1 of the packed weight. Matrices are multiplied by in groups of four, which begin at
    multiples of four. So the bases are kept as they lie in such groups. In 16 bits they are shifted in words of 64
    bits, as many as there may be groups. In float32 each is in the slot of its matrix, and there is one more tuple of
    four slots for degrees above 3.
    """
    first, fraction = spline_position(x, LO, HI, GRID, DEGREE)
    silu = x * tl.sigmoid(x)
    matrix = first + 1
    padded = spline_weights(fraction, DEGREE) + (tl.zeros(x.shape, tl.float32),) * (3 - DEGREE % 4)
    bases = ()
    if dtype == tl.float32:
        for k in tl.static_range(0, DEGREE + 1, 4):
            odd, two = (matrix & 1) != 0, (matrix & 2) != 0
            turned = ()
            for u in tl.static_range(4):
                turned = turned + (tl.where(odd, padded[k + (u + 3) % 4], padded[k + u]),)
            for u in tl.static_range(4):
                bases = bases + (tl.where(two, turned[(u + 2) % 4], turned[u]),)
    else:
        silu = _pair(silu, silu, dtype)
        turn = ((matrix & 3) * 16).to(tl.uint64)
        carried = tl.zeros(x.shape, tl.uint64)
        for k in tl.static_range(0, DEGREE + 1, 4):
            word = _pair(padded[k], padded[k + 1], dtype).to(tl.uint64)
            if k + 2 <= DEGREE:
                word |= _pair(padded[k + 2], padded[k + 3], dtype).to(tl.uint64) << 32
            bases = bases + (carried | (word << turn),)
            carried = (word >> 16) >> (48 - turn)  # a shift by all 64 bits is not defined
        bases = bases + (carried,)
    return silu, matrix, bases


@triton.jit
def spread_nan(x, bases, dtype: tl.constexpr):
    """A background for `factors_of`, and the bases, with which a NaN reaches all matrices. `bases` as in `factors`."""
    if dtype == tl.float32:
        return tl.where(x == x, 0.0, float("nan")), bases
    else:
        background = tl.where(x == x, 0, -1).to(tl.int64).to(tl.uint64)  # four NaNs
        spread = ()
        for k in tl.static_range(len(bases)):
            spread = spread + (bases[k] | background,)
        return background, spread


@triton.jit
def _slot(u: tl.constexpr, group, matrix, bases, background, DEGREE: tl.constexpr):
    """The factor of matrix 4 `group` + `u` in float32, if that is not 0."""
    value = background
    for k in tl.static_range(DEGREE // 4 + 1):
        value = tl.where((matrix + (3 - u)) >> 2 == group - k, bases[4 * k + u], value)
    return value


@triton.jit
def factors_of(
    group, silu, matrix, bases, background, has_base, SLOTS: tl.constexpr, DEGREE: tl.constexpr, dtype: tl.constexpr
):
    """The factors of the matrices from 4 `group` on, `[..., SLOTS]`.

    `has_base`: whether these are the first matrices of all. Matrix 0 is that of the base branch, which replaces a basis
    that would be there, since that does not exist. `background`: the other factors, zeros or what `spread_nan` returns.
    """
    if dtype == tl.float32:
        even = tl.where(has_base, silu, _slot(0, group, matrix, bases, background, DEGREE))
        odd = _slot(1, group, matrix, bases, background, DEGREE)
        if SLOTS == 4:
            even = tl.join(even, _slot(2, group, matrix, bases, background, DEGREE))
            odd = tl.join(odd, _slot(3, group, matrix, bases, background, DEGREE))
        return tl.join(even, odd)
    else:
        word = background
        for k in tl.static_range(DEGREE // 4 + 2):
            word = tl.where(matrix >> 2 == group - k, bases[k], word)
        low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
        replaced = tl.where(has_base, 0xFFFF, 0).to(tl.uint32)
        low = (low & ~replaced) | (silu & replaced)
        even, odd = low.to(tl.uint16), (low >> 16).to(tl.uint16)
        if SLOTS == 4:
            even, odd = tl.join(even, high.to(tl.uint16)), tl.join(odd, (high >> 16).to(tl.uint16))
        return tl.join(even, odd).to(dtype, bitcast=True)
