"""The B-spline KAN layer as a function: checks, then the backend that runs it."""

import torch

from lesa_kernels._checks import argument_error, check_tensor
from lesa_kernels._dispatch import resolve_backend
from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES, bspline_kan_ref, check_grid

IMPLEMENTED = ("torch",)


def bspline_kan(
    x: torch.Tensor,
    base_weight: torch.Tensor,
    spline_weight: torch.Tensor,
    spline_scaler: torch.Tensor | None = None,
    grid_size: int = 5,
    spline_order: int = 3,
    grid_range: tuple[float, float] = (-1, 1),
    backend: str = "auto",
) -> torch.Tensor:
    """A layer of univariate B-spline functions plus a SiLU branch (Kolmogorov-Arnold network).

    y_o = sum_i base_weight[o, i] silu(x_i) + sum_{i, g} spline_scaler[o, i] spline_weight[o, i, g] B_g(x_i), with the
    bases of `bspline_basis`; the layer that efficient-kan calls `KANLinear`.

    Args:
        x: [..., in], float32, float64, bfloat16 or float16.
        base_weight: [out, in].
        spline_weight: [out, in, G + p].
        spline_scaler: [out, in]; ones if None.
        grid_size: G, the number of intervals in `grid_range`, at least 1.
        spline_order: p, the degree of the splines, at least 0.
        grid_range: (lo, hi), the ends of the grid, in the units of `x`.
        backend: "auto" or "torch".

    Returns:
        [..., out] in the dtype of `x`, which the weights must share; under autocast the products run in its dtype and
        the result has it. Bases are computed in float32 at least. A NaN in a row makes that row NaN. +-Inf has no
        spline part; what remains is SiLU's own, which torch gives as Inf at Inf and NaN at -Inf.

    Raises:
        TypeError, ValueError: a tensor of another shape, dtype or device, or a grid that is not one.
        RuntimeError: a backend that this operation does not have.

    Equivalent to::

        bases = bspline_basis(x, grid_size, spline_order, grid_range)  # [..., in, G + p]
        F.silu(x) @ base_weight.T + torch.einsum("...ig,oig,oi->...o", bases, spline_weight, spline_scaler)
    """
    check_grid(grid_size, spline_order, grid_range)
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    # Autocast brings the operands of a product to one dtype, so they may differ.
    dtypes = FLOAT_DTYPES if torch.is_autocast_enabled(x.device.type) else (x.dtype,)
    check_tensor("base_weight", base_weight, ("out", "in"), dtypes, x.device)
    out_features, in_features = base_weight.shape
    count = grid_size + spline_order
    check_tensor("spline_weight", spline_weight, (out_features, in_features, count), dtypes, x.device)
    if spline_scaler is not None:
        check_tensor("spline_scaler", spline_scaler, (out_features, in_features), dtypes, x.device)
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise argument_error(
            "x", f"have a last dimension of {in_features}", x, "Match it to the second dimension of `base_weight`."
        )
    resolve_backend(backend, x, IMPLEMENTED, "bspline_kan")
    return bspline_kan_ref(x, base_weight, spline_weight, spline_scaler, grid_size, spline_order, grid_range)
