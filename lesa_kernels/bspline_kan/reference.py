"""B-splines on a uniform grid in plain torch: the definition of correct.

The grid divides [lo, hi] into G intervals of width h, and has p more intervals on each side. Its knots are
t_i = lo + (i - p) h for i = 0 … G + 2p. There are G + p bases B_i of degree p; B_i is zero outside [t_i, t_{i+p+1}).

With v = (x - lo) / h, x is in the interval floor(v), at the fractional position f = v - floor(v). The only bases that
are not zero at x are the p + 1 bases from index floor(v) on. Their values depend on f alone, in the same way in every
interval.
"""

import math

import torch
import torch.nn.functional as F

from lesa_kernels.checks import argument_error, check_float, check_int, check_tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_grid(grid_size: int, spline_order: int, grid_range: tuple[float, float]) -> tuple[float, float]:
    """Returns `grid_range` as two floats (lo, hi); raises `TypeError` or `ValueError` if they are no valid grid."""
    check_int("grid_size", grid_size)
    check_int("spline_order", spline_order, minimum=0)
    if not isinstance(grid_range, (tuple, list)) or len(grid_range) != 2:
        raise argument_error(
            "grid_range", "be a pair (lo, hi)", grid_range, "Pass two numbers, such as (-1, 1).", TypeError
        )
    lo, hi = (check_float("grid_range", end) for end in grid_range)
    if not lo < hi:
        raise argument_error("grid_range", "have lo < hi", grid_range, "Pass the lower end first.")
    return lo, hi


class _UniformWeights(torch.autograd.Function):
    """The p + 1 non-zero bases as functions of the fractional position.

    Their derivatives are differences of bases of degree p - 1. The backward calls `_uniform_weights` with one degree
    less, so derivatives of every order are in closed form, and only the position is saved.
    """

    @staticmethod
    def forward(fraction: torch.Tensor, degree: int) -> torch.Tensor:
        # Cox-de Boor on a uniform grid, times degree!: basis k of degree d takes (f + d - k) times basis k - 1 and
        # (k + 1 - f) times basis k of degree d - 1. All factors are >= 0, so no digits cancel.
        rising = [fraction + c if c else fraction for c in range(degree)]
        falling = [c + 1 - fraction for c in range(degree)]
        weights = [falling[0], rising[0]]
        for d in range(2, degree + 1):
            inner = (torch.addcmul(rising[d - k] * weights[k - 1], falling[k], weights[k]) for k in range(1, d))
            weights = [falling[0] * weights[0], *inner, rising[0] * weights[-1]]
        stacked = torch.stack(weights, dim=-1)
        return stacked / math.factorial(degree) if degree > 1 else stacked

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
        fraction, ctx.degree = inputs
        ctx.save_for_backward(fraction)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (fraction,) = ctx.saved_tensors
        return (_uniform_weights(fraction, ctx.degree - 1) * grad.diff(dim=-1)).sum(dim=-1), None


def _uniform_weights(fraction: torch.Tensor, degree: int) -> torch.Tensor:
    # fraction [...] in [0, 1) or NaN -> [..., degree + 1]
    if degree == 0:
        return fraction.detach().clamp(1, 1).unsqueeze(-1)  # NaN stays NaN
    return _UniformWeights.apply(fraction, degree)


def _locate(u: torch.Tensor, grid_size: int, spline_order: int, lo: float, hi: float):
    # One interval beyond the last knot there is no basis. So all points further out, Inf too, are moved there. Their
    # gradient is zero.
    position = ((u - lo) * (grid_size / (hi - lo))).clamp(-spline_order - 1, grid_size + spline_order)
    interval = position.detach().floor()
    return interval.nan_to_num(nan=0.0).long(), position - interval


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def local_basis(
    u: torch.Tensor, grid_size: int = 5, spline_order: int = 3, grid_range: tuple[float, float] = (-1, 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The p + 1 bases that are not zero at each point, and the index of the first.

    Args:
        u: points [...], float32, float64, bfloat16 or float16.
        grid_size: G, the number of intervals in `grid_range`, at least 1.
        spline_order: p, the degree, at least 0 (degree 0 has no gradient).
        grid_range: (lo, hi), the ends of the grid, in the units of `u`.

    Returns:
        first_index: int64 [...], from -p - 1 to G + p.
        weights: [..., p + 1], float64 for float64 points, else float32; differentiable in `u` to any order.

        Weight k belongs to basis `first_index + k`. Outside the grid some or all of these indices are outside
        0 … G + p - 1. Such a basis does not exist, and its coefficient counts as zero. NaN gives NaN weights at index
        0.

    Raises:
        TypeError, ValueError: `u` is not a float tensor, or the grid is not valid.

    Equivalent to: the columns `first_index … first_index + p` of `bspline_basis(u, …)`.
    """
    check_tensor("u", u, dtypes=FLOAT_DTYPES)
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    first_index, fraction = _locate(u.to(_compute_dtype(u.dtype)), grid_size, spline_order, lo, hi)
    return first_index, _uniform_weights(fraction, spline_order)


def bspline_basis(
    x: torch.Tensor, grid_size: int = 5, spline_order: int = 3, grid_range: tuple[float, float] = (-1, 1)
) -> torch.Tensor:
    """All G + p B-spline bases of degree p on a uniform grid, at every point.

    Args:
        x: points [...], float32, float64, bfloat16 or float16 (the last two are computed in float32).
        grid_size: G, the number of intervals in `grid_range`, at least 1.
        spline_order: p, the degree, at least 0 (degree 0 has no gradient).
        grid_range: (lo, hi), the ends of the grid, in the units of `x`.

    Returns:
        [..., G + p] in the dtype of `x`; differentiable in `x` to any order. Where a derivative jumps at a knot, it is
        the right-sided one. The bases sum to one on [lo, hi), decrease over the p extra intervals on each side, and are
        zero beyond them and for +-Inf. NaN gives NaN in every basis.

    Raises:
        TypeError, ValueError: `x` is not a float tensor, or the grid is not valid.

    Equivalent to the Cox-de Boor recursion, up to rounding::

        t = lo + (hi - lo) / G * torch.arange(-p, G + p + 1)
        x = x.unsqueeze(-1)
        B = ((t[:-1] <= x) & (x < t[1:])).to(x.dtype)
        for d in range(1, p + 1):
            B = ((x - t[: -d - 1]) / (t[d:-1] - t[: -d - 1]) * B[..., :-1]
                 + (t[d + 1 :] - x) / (t[d + 1 :] - t[1:-d]) * B[..., 1:])
    """
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    margin = spline_order + 1
    first_index, fraction = _locate(x.to(_compute_dtype(x.dtype)), grid_size, spline_order, lo, hi)
    columns = first_index.unsqueeze(-1) + torch.arange(margin, 2 * margin, device=x.device)
    weights = _uniform_weights(fraction, spline_order)
    # NaN stays NaN. A mask would lose it: torch.compile gets masks that are broadcast wrong for AVX2.
    background = x.detach().to(fraction.dtype).clamp(0, 0).unsqueeze(-1)
    padded = background.expand(*x.shape, grid_size + spline_order + 2 * margin)
    return padded.scatter(-1, columns, weights)[..., margin:-margin].to(x.dtype)


def bspline_evaluate(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    grid_size: int = 5,
    spline_order: int = 3,
    grid_range: tuple[float, float] = (-1, 1),
) -> torch.Tensor:
    """Spline functions at given points: phi(x) = sum_g c_g B_g(x). Reads only p + 1 coefficients for each point.

    No tensor of all bases is built, neither forward nor backward. If several functions share points (a dimension of 1
    in `x`), the bases are computed once.

    Args:
        x: points [...], float32, float64, bfloat16 or float16 (the last two are computed in float32).
        coefficients: [..., G + p], a float dtype as above; the leading dimensions broadcast against those of `x`, such
            as x [N, M] with coefficients [M, G + p], or x [N, 1] for M functions at the same point.
        grid_size: G, the number of intervals in `grid_range`, at least 1.
        spline_order: p, the degree, at least 0 (degree 0 has no gradient in `x`).
        grid_range: (lo, hi), the ends of the grid, in the units of `x`.

    Returns:
        The broadcast shape, in the promoted dtype of both; differentiable in both to any order. Zero beyond the p extra
        intervals on each side and for +-Inf; NaN for NaN.

    Raises:
        TypeError, ValueError: an argument is not a float tensor, shapes or devices do not fit, or the grid is not
            valid.

    Equivalent to: `(bspline_basis(x, …) * coefficients).sum(-1)`.
    """
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    check_tensor("coefficients", coefficients, dtypes=FLOAT_DTYPES, device=x.device)
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    count = grid_size + spline_order
    if coefficients.ndim == 0 or coefficients.shape[-1] != count:
        raise argument_error(
            "coefficients",
            f"have a last dimension of grid_size + spline_order = {count}",
            coefficients,
            "Pass the grid for which they were made.",
        )
    dtype = torch.promote_types(x.dtype, coefficients.dtype)
    compute_dtype = _compute_dtype(dtype)
    first_index, fraction = _locate(x.to(compute_dtype), grid_size, spline_order, lo, hi)
    weights = _uniform_weights(fraction, spline_order)

    # Zero coefficients on both sides stand for the bases that do not exist. One flat index is used, not a gather along
    # the last dimension, because its gradient is added directly to the coefficients.
    margin = spline_order + 1
    padded = F.pad(coefficients.to(compute_dtype), (margin, margin))
    stride = padded.shape[-1]
    rows = torch.arange(margin, margin + padded.numel(), stride, device=x.device).view(coefficients.shape[:-1])
    try:
        start = first_index + rows
    except RuntimeError as error:
        raise argument_error(
            "coefficients",
            f"have leading dimensions that broadcast against those of `x`, {list(x.shape)}",
            coefficients,
            "Insert dimensions of 1 where a function is shared.",
        ) from error
    index = start.unsqueeze(-1) + torch.arange(margin, device=x.device)
    taken = padded.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)
    return (weights * taken).sum(dim=-1).to(dtype)


def bspline_kan_ref(
    x: torch.Tensor,
    base_weight: torch.Tensor,
    spline_weight: torch.Tensor,
    spline_scaler: torch.Tensor | None = None,
    grid_size: int = 5,
    spline_order: int = 3,
    grid_range: tuple[float, float] = (-1, 1),
) -> torch.Tensor:
    """Plain torch form of `bspline_kan`; see there for the arguments. Builds all bases, [..., in, G + p]."""
    bases = bspline_basis(x, grid_size, spline_order, grid_range)
    if spline_scaler is not None:
        spline_weight = spline_weight * spline_scaler.unsqueeze(-1)
    return F.linear(F.silu(x), base_weight) + F.linear(bases.flatten(-2), spline_weight.flatten(-2))
