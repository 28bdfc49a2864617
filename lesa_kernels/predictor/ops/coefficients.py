"""The weights of newton's forecasts: the public function, and the choice of the backend."""

import torch

from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import check_tensor
from lesa_kernels.dispatch import needs_gradient, resolve_backend
from lesa_kernels.predictor.arguments import (
    NewtonExperts,
    Shape,
    check_tensors,
    contiguous,
    has_kernels_for,
)
from lesa_kernels.predictor.reference import newton_coefficients_ref
from lesa_kernels.register import refuse_gradient, register
from lesa_kernels.stream.arguments import Weights


def newton_coefficients(
    sigmas: torch.Tensor,
    count: torch.Tensor,
    sigma: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    spline: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    stage_bounds: tuple[float, ...],
    history_length: tuple[int, ...],
    grid_size: int,
    spline_order: int,
    backend: str = "auto",
) -> Weights:
    """The weights of newton's forecasts of P steps at once; they depend on noise levels and parameters only.

    On Triton this is one launch, which has no gradients. Calls that need one run in plain torch.

    `stream_forecast` with the weights of a step gives what `newton_predict` gives.

    Args:
        sigmas: `[P, B, K]` float32, for each step the noise levels of the newest features, newest first. Beyond
            `count` they are not used.
        count: `[P, B]` int32, how many of them there are.
        sigma: `[P, B]` float32, the noise levels to forecast.
        in_weight ... spline_order: as in `newton_predict`.
        backend: "auto", "triton", "extension" (on a CPU, without gradients) or "torch".

    Returns:
        `Weights` with a leading dimension P: `anchors` `[P, B, K, D]`, `count` `[P, B]`, which is at most the history
        length of the stage, and with a residual also `constant` `[P, B, D]`, `taps` `[P, B, K - 1, K]` and `stage`
        `[P, B]`.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than above; the message names it.
        RuntimeError: the backend can't run here.

    Source: as `newton_predict`.
    """
    experts = NewtonExperts(in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias)
    shape = Shape(tuple(stage_bounds), tuple(history_length), grid_size, spline_order)
    return run_newton_coefficients(sigmas, count, sigma, experts, shape, backend)


def run_newton_coefficients(
    sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, experts: NewtonExperts, shape: Shape, backend: str
) -> Weights:
    """`newton_coefficients` with its arguments in named tuples."""
    check_tensors(experts)
    names: tuple[str, ...] = ("torch",)
    if has_kernels_for(experts, shape) and not needs_gradient(sigmas, sigma, *experts):
        names = ("triton", "extension", *names) if experts.out_bias.device.type == "cpu" else ("triton", *names)
    chosen = resolve_backend(backend, experts.out_bias, names, "newton_coefficients")
    if chosen != "torch":
        operator = _operator if chosen == "triton" else _on_cpu
        return _weights(operator(sigmas, count, sigma, experts, shape), experts)
    _check(sigmas, count, sigma, experts, shape)
    return newton_coefficients_ref(sigmas, count, sigma, experts, shape)


def _check(
    sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, experts: NewtonExperts, shape: Shape
) -> None:
    shape.check(shape.longest)
    out_bias = check_tensor("out_bias", experts.out_bias, ("S", "K - 1", "D"), FLOAT_DTYPES)
    device = out_bias.device
    check_tensor("sigmas", sigmas, ("P", "B", shape.longest), (torch.float32,), device)
    check_tensor("count", count, tuple(sigmas.shape[:2]), (torch.int32,), device)
    check_tensor("sigma", sigma, tuple(sigmas.shape[:2]), (torch.float32,), device)
    experts.check_sizes(out_bias.shape[2], device, shape)


# An operator can't return None, so it returns the tensors of `Weights` that there are.


def _weights(tensors: list[torch.Tensor], experts: NewtonExperts) -> Weights:
    anchors, count, *rest = tensors
    constant = None if experts.up_bias is None else rest.pop(0)
    taps, stage = rest if rest else (None, None)
    return Weights(anchors, count, constant, taps, stage)


def _newton_coefficients(
    sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, experts: NewtonExperts, shape: Shape
) -> list[torch.Tensor]:
    # The checks are here too, since the operator can be called without `newton_coefficients`.
    _check(sigmas, count, sigma, experts, shape)
    from lesa_kernels.predictor.kernels.coefficients import newton_coefficients_fwd

    weights = newton_coefficients_fwd(
        sigmas.contiguous(), count.contiguous(), sigma.contiguous(), contiguous(experts), shape
    )
    return [value for value in weights if value is not None]


def _newton_coefficients_cpu(
    sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, experts: NewtonExperts, shape: Shape
) -> list[torch.Tensor]:
    _check(sigmas, count, sigma, experts, shape)
    from lesa_kernels.predictor.extension import newton_coefficients_extension

    return [value for value in newton_coefficients_extension(sigmas, count, sigma, experts, shape) if value is not None]


def _fake_coefficients(
    sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, experts: NewtonExperts, shape: Shape
) -> list[torch.Tensor]:
    history, width = shape.longest, experts.out_bias.shape[2]
    made = [sigma.new_empty((*sigma.shape, history, width)), torch.empty_like(count)]
    if experts.up_bias is not None:
        made.append(sigma.new_empty((*sigma.shape, width)))
    if experts.rank:
        made += [sigma.new_empty((*sigma.shape, history - 1, history)), torch.empty_like(count)]
    return made


_operator = register("newton_coefficients", _newton_coefficients, _fake_coefficients)
refuse_gradient("newton_coefficients", "has no gradients: `newton_coefficients()` uses plain torch for them")
_on_cpu = register("newton_coefficients_cpu", _newton_coefficients_cpu, _fake_coefficients, devices=("CPU",))
refuse_gradient(
    "newton_coefficients_cpu", "has no gradients: `newton_coefficients()` uses plain torch for them", "on the CPU"
)
