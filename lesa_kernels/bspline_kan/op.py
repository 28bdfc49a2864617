"""The B-spline KAN layer as a torch operator, and its public function: checks, then the backend that runs it."""

import contextlib
from collections.abc import Callable

import torch

from lesa_kernels.bspline_kan.packing import pack_weight
from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES, bspline_kan_ref, check_grid
from lesa_kernels.checks import Said, argument_error, check_int, check_tensor
from lesa_kernels.dispatch import resolve_backend
from lesa_kernels.register import OPERATOR_TAGS

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_ORDERS = (1, 5)  # least and largest degree

_LIBRARY = torch.library.Library("lesa_kernels", "FRAGMENT")
_LIBRARY.define(
    "bspline_kan(Tensor x, Tensor weight, int grid_size, int spline_order, float lo, float hi) -> Tensor",
    tags=OPERATOR_TAGS,
)
_LIBRARY.define(
    "bspline_kan_bwd(Tensor grad, Tensor x, Tensor weight, int grid_size, int spline_order, float lo, float hi, "
    "bool needs_x, bool needs_weight) -> (Tensor, Tensor)",
    tags=OPERATOR_TAGS,
)


def _check(x, weight, grid_size, spline_order, lo, hi):
    # These checks are needed because the operators can be called without `bspline_kan`.
    check_grid(grid_size, spline_order, (lo, hi))
    check_int("spline_order", spline_order, *TRITON_ORDERS)
    in_features = check_tensor("x", x, ("rows", "in"), TRITON_DTYPES).shape[1]
    shape = (1 + grid_size + spline_order, in_features, "out")
    check_tensor("weight", weight, shape, TRITON_DTYPES, x.device)
    if not weight.is_contiguous():
        raise argument_error(
            "weight", "be contiguous", Said(f"strides {list(weight.stride())}"), "Pass `weight.contiguous()`."
        )


def _rows(tensor):
    # The kernels take any stride between rows for which the offsets within a block fit into 32 bits.
    near = tensor.stride(0) < 2**24
    return tensor if near and (tensor.shape[1] == 1 or tensor.stride(1) == 1) else tensor.contiguous()


def _on(device):
    # Triton launches on the current GPU.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _bspline_kan_triton(x, weight, grid_size, spline_order, lo, hi):
    from lesa_kernels.bspline_kan.kernels import bspline_kan_fwd

    _check(x, weight, grid_size, spline_order, lo, hi)
    with _on(x.device):
        return bspline_kan_fwd(_rows(x), weight, grid_size, spline_order, lo, hi)


def _bspline_kan_bwd_triton(grad, x, weight, grid_size, spline_order, lo, hi, needs_x, needs_weight):
    from lesa_kernels.bspline_kan.kernels import bspline_kan_bwd_weight, bspline_kan_bwd_x

    _check(x, weight, grid_size, spline_order, lo, hi)
    check_tensor("grad", grad, (x.shape[0], weight.shape[2]), TRITON_DTYPES, x.device)
    arguments = _rows(grad), _rows(x), weight, grid_size, spline_order, lo, hi
    with _on(x.device):
        grad_x = bspline_kan_bwd_x(*arguments) if needs_x else x.new_empty(0)
        grad_weight = bspline_kan_bwd_weight(*arguments) if needs_weight else weight.new_empty(0)
    return grad_x, grad_weight


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("bspline_kan", _bspline_kan_triton, _device)
    _LIBRARY.impl("bspline_kan_bwd", _bspline_kan_bwd_triton, _device)


@torch.library.register_fake("lesa_kernels::bspline_kan", lib=_LIBRARY)
def _(x, weight, grid_size, spline_order, lo, hi):
    return x.new_empty(x.shape[0], weight.shape[2], dtype=weight.dtype)


@torch.library.register_fake("lesa_kernels::bspline_kan_bwd", lib=_LIBRARY)
def _(grad, x, weight, grid_size, spline_order, lo, hi, needs_x, needs_weight):
    grad_x = x.new_empty(x.shape if needs_x else 0)
    return grad_x, weight.new_empty(weight.shape if needs_weight else 0)


def _save(ctx, inputs, output):
    x, weight, *ctx.spline = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.lesa_kernels.bspline_kan_bwd(grad, x, weight, *ctx.spline, needs_x, needs_weight)
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None, None, None


def _second_backward(ctx, *grads):
    raise RuntimeError('bspline_kan on Triton has no second derivatives. Choose backend="torch" for them.')


torch.library.register_autograd("lesa_kernels::bspline_kan", _backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("lesa_kernels::bspline_kan_bwd", _second_backward, lib=_LIBRARY)


def _check_triton(x: torch.Tensor, spline_order: int) -> None:
    remedy = 'Pass backend="auto" or backend="torch".'
    if x.dtype not in TRITON_DTYPES:
        raise argument_error("x", "be float32, bfloat16 or float16 on Triton", x, remedy, TypeError)
    least, largest = TRITON_ORDERS
    if not least <= spline_order <= largest:
        raise argument_error("spline_order", f"be from {least} to {largest} on Triton", spline_order, remedy)


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
    bases of `bspline_basis`. It is the layer that efficient-kan calls `KANLinear`.

    Args:
        x: [..., in], float32, float64, bfloat16 or float16.
        base_weight: [out, in].
        spline_weight: [out, in, G + p].
        spline_scaler: [out, in]; ones if None.
        grid_size: G, the number of intervals in `grid_range`, at least 1.
        spline_order: p, the degree of the splines, at least 0.
        grid_range: (lo, hi), the ends of the grid, in the units of `x`.
        backend: "auto" (Triton for CUDA tensors, plain torch for CPU tensors), "triton" or "torch". Triton computes the
            bases in registers and does not write them to memory. It has no float64, only the degrees 1 to 5, and only
            first derivatives. With "auto", other dtypes and degrees run in plain torch.

    Returns:
        [..., out] in the dtype of `x`, which must also be that of the weights. Under autocast the products run in the
        dtype of autocast, and the result has that dtype. Bases are computed in float32 or wider, and Triton sums in
        float32. A NaN in a row makes that row NaN. +-Inf has no spline part, only the SiLU part, which torch gives as
        Inf at Inf and NaN at -Inf. Gradients are deterministic.

    Raises:
        TypeError, ValueError: a tensor has another shape, dtype or device, the grid is not valid, or `backend` is
            "triton" and Triton does not have this dtype or degree.
        RuntimeError: this operation does not have the backend here, or a second derivative of Triton is asked for.

    Equivalent to::

        bases = bspline_basis(x, grid_size, spline_order, grid_range)  # [..., in, G + p]
        F.silu(x) @ base_weight.T + torch.einsum("...ig,oig,oi->...o", bases, spline_weight, spline_scaler)
    """
    return run_bspline_kan(
        x, base_weight, spline_weight, spline_scaler, grid_size, spline_order, grid_range, backend, pack_weight
    )


def run_bspline_kan(
    x: torch.Tensor,
    base_weight: torch.Tensor,
    spline_weight: torch.Tensor,
    spline_scaler: torch.Tensor | None,
    grid_size: int,
    spline_order: int,
    grid_range: tuple[float, float],
    backend: str,
    pack: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """`bspline_kan` with a function that packs the weights as `pack_weight` does, or has done so."""
    lo, hi = check_grid(grid_size, spline_order, grid_range)
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    # Under autocast the dtypes may differ: it converts the operands of a product.
    autocast = torch.is_autocast_enabled(x.device.type)
    dtypes = FLOAT_DTYPES if autocast else (x.dtype,)
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
    if backend == "triton":
        _check_triton(x, spline_order)
    least, largest = TRITON_ORDERS
    on_triton = x.dtype in TRITON_DTYPES and least <= spline_order <= largest
    implemented = ("triton", "torch") if on_triton else ("torch",)
    if resolve_backend(backend, x, implemented, "bspline_kan") == "torch":
        return bspline_kan_ref(x, base_weight, spline_weight, spline_scaler, grid_size, spline_order, grid_range)

    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    weight = pack(base_weight, spline_weight, spline_scaler, dtype)
    flat = x.reshape(x.shape[:-1].numel(), in_features)
    y = torch.ops.lesa_kernels.bspline_kan(flat, weight, grid_size, spline_order, lo, hi)
    return y.reshape(*x.shape[:-1], out_features)
