"""Newton's forecast: the public function, the operators, and the choice between them."""

import torch

from lesa_kernels.checks import argument_error
from lesa_kernels.dispatch import needs_gradient, resolve_backend
from lesa_kernels.predictor.arguments import (
    NewtonExperts,
    RingState,
    Shape,
    check_all,
    check_tensors,
    contiguous,
    has_kernels,
)
from lesa_kernels.predictor.ops.gradient import as_declared, fake_forecast, fake_gradients, register_gradient
from lesa_kernels.predictor.reference import newton_predict_ref
from lesa_kernels.register import refuse_gradient, register
from lesa_kernels.stream.arguments import StoredFeatures, Weights
from lesa_kernels.stream.fused import why_no_residual
from lesa_kernels.stream.reference import forecast_dtype


def newton_predict(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
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
) -> torch.Tensor:
    """Forecasts features by KAN-modulated Newton extrapolation from the newest anchors of a ring.

    On Triton this is one kernel without a residual. With a residual it is two: one makes the weights of the anchors,
    and one adds up the features. Before them, a residual whose parameters have another dtype than the features is cast.

    With the anchors `(s_0, g_0), (s_1, g_1), ...`, newest first, and the Newton taps
    `t_j = D_j * prod_{q<j} (sigma - s_q)` over their divided differences `D_j`:

        u     = tanh(in_weight @ z + in_bias)                                     [M]
        c     = out_weight @ (spline(u) + silu(u)) + out_bias                     [K - 1, D]
        h_hat = g_0 + sum_j c_j * t_j  (+ up @ (down @ [t_1; ...]) + up_bias)

    where `z` holds `5 * (sigma - s_k)` for each anchor, 0 for a missing anchor, and `2 * sigma - 1`. Taps that need a
    missing anchor are zero. A row without any anchor is NaN. The tanh, the SiLU and the factor 5 are choices of this
    project. The tanh keeps the inputs of the splines on their grid. With the factor 5, usual gaps use most of the grid.

    Args:
        storage, scales, sigmas, cursor, count: the buffers of a `FeatureRing`: `[C, B, T, D]`, `[C, B, T]` for float8
            and None otherwise, `[C, B]`, `[B]`, `[B]`.
        sigma: `[B]`, the noise level to forecast. It decides the stage of each sample. One number for all samples may
            be a tensor without dimensions on the CPU: kernels then take the number itself.
        in_weight, in_bias: `[S, M, K + 1]`, `[S, M]`, the linear map to the spline units of the S experts.
        spline: `[S, M, grid_size + spline_order]`, the coefficients of the spline units.
        out_weight, out_bias: `[S, K - 1, D, M]`, `[S, K - 1, D]`.
        down, up, up_bias: `[S, R, K - 1, D]`, `[S, D, R]`, `[S, D]`, the low-rank residual, or None.
        stage_bounds: S - 1 falling noise levels.
        history_length: how many anchors are read in each stage, S ints; K is the largest.
        grid_size, spline_order: of the splines on [-1, 1].
        backend: "auto", "triton", "extension" (on a CPU, without gradients) or "torch".

    Returns:
        `[B, T, D]` in the dtype of `storage`, bfloat16 for float8. It is computed in float32. With a residual, Triton
        rounds the operands of matrix products to the dtype of `storage`, and it rounds the forecast once before it adds
        the residual. There are two exceptions where it rounds to bfloat16: for a float8 ring, and in the backward pass
        for a float16 ring, because the range of float16 is too small.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than above; the message names it.
        RuntimeError: the backend can't run here; or it is "triton", and the residual needs more shared memory or
            registers than the GPU has.

    Equivalent to, for a sample b that has an anchor::

        stage = int((sigma[b] <= torch.tensor(stage_bounds)).sum())
        n = min(history_length[stage], int(count[b]))  # anchors that are read
        slots = (cursor[b] - 1 - torch.arange(n)) % len(storage)
        s, g = sigmas[slots, b], storage[slots, b]  # [n], [n, T, D]
        z = torch.zeros(in_weight.shape[2])
        z[:n], z[-1] = 5 * (sigma[b] - s), 2 * sigma[b] - 1
        u = torch.tanh(in_weight[stage] @ z + in_bias[stage])
        c = out_weight[stage] @ (bspline_evaluate(u, spline[stage], grid_size, spline_order) + F.silu(u))
        c = c + out_bias[stage]
        h_hat = g[0] if up is None else g[0] + up_bias[stage]
        for j in range(1, n):
            g = (g[:-1] - g[1:]) / (s[:-j] - s[j:])[:, None, None]  # divided differences of order j
            tap = g[0] * (sigma[b] - s[:j]).prod()
            h_hat = h_hat + c[j - 1] * tap
            if up is not None:
                h_hat = h_hat + tap @ down[stage, :, j - 1].T @ up[stage].T

    Source: Newton's divided differences, with coefficients learned as in LESA (arXiv 2602.20497).
    """
    ring = RingState(storage, scales, sigmas, cursor, count, sigma)
    experts = NewtonExperts(in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias)
    shape = Shape(tuple(stage_bounds), tuple(history_length), grid_size, spline_order)
    return run_newton_predict(ring, experts, shape, backend)


def run_newton_predict(ring: RingState, experts: NewtonExperts, shape: Shape, backend: str) -> torch.Tensor:
    """`newton_predict` with its arguments in named tuples."""
    check_tensors(ring)
    check_tensors(experts)
    chosen = newton_backend(ring, experts, shape, backend, "newton_predict")
    if chosen == "triton":
        return _on_triton(ring, experts, shape)
    if chosen == "extension":
        return _on_cpu(ring, experts, shape)
    check_all(ring, experts, shape)
    return newton_predict_ref(ring, experts, shape)


def newton_backend(ring: RingState, experts: NewtonExperts, shape: Shape, backend: str, operation: str) -> str:
    """The backend on which `newton_predict` or `newton_velocity` runs with these arguments; see `resolve_backend`."""
    names: tuple[str, ...] = ("torch",)
    if has_kernels(ring, experts, shape):
        if ring.device.type == "cpu" and ring.scales is None and not needs_gradient(ring.storage, *experts):
            names = ("extension", *names)
        names = ("triton", *names)
    chosen = resolve_backend(backend, ring.storage, names, operation)
    # The reason depends on sizes, so a compiler would compile again for each of them.
    asks = backend == "triton" and not torch.compiler.is_compiling()
    if asks and (reason := _why_no_residual(ring, experts)) is not None:
        remedy = 'Pass backend="auto" or "torch".'
        raise argument_error("backend", f'not be "triton" here: {reason}', backend, remedy, RuntimeError)
    return chosen


def _why_no_residual(ring: RingState, experts: NewtonExperts) -> str | None:
    """Why Triton's kernels can't add the residual on this GPU, or None if they can."""
    if not experts.rank:
        return None
    history = experts.out_bias.shape[1] + 1
    anchors = torch.empty((ring.storage.shape[1], history, ring.storage.shape[3]), device="meta")
    features = StoredFeatures(ring.storage, ring.scales, ring.cursor, ring.count)
    return why_no_residual(features, Weights(anchors, ring.count, None, None, None), experts.low_rank)


# The operators check their arguments, since they can be called without `newton_predict`.


def _newton_predict(ring: RingState, experts: NewtonExperts, shape: Shape) -> torch.Tensor:
    check_all(ring, experts, shape)
    ring.check_channels()
    from lesa_kernels.predictor.kernels.newton import newton_predict_fwd

    return newton_predict_fwd(contiguous(ring), contiguous(experts), shape, forecast_dtype(ring.storage.dtype))


def _newton_predict_extension(ring: RingState, experts: NewtonExperts, shape: Shape) -> torch.Tensor:
    check_all(ring, experts, shape)
    ring.check_channels()
    from lesa_kernels.predictor.extension import newton_predict_extension

    return newton_predict_extension(ring.with_sigma_of_each(), experts, shape)


def _newton_predict_bwd(
    grad: torch.Tensor, ring: RingState, experts: NewtonExperts, shape: Shape, needs_storage: bool
) -> list[torch.Tensor]:
    from lesa_kernels.predictor.kernels.newton import newton_predict_bwd

    gradients = newton_predict_bwd(grad, contiguous(ring), contiguous(experts), shape, needs_storage)
    return as_declared(gradients, ring.storage, experts, needs_storage)


_on_triton = register("newton_predict", _newton_predict, fake_forecast)
_on_cpu = register("newton_predict_cpu", _newton_predict_extension, fake_forecast, devices=("CPU",))
register("newton_predict_bwd", _newton_predict_bwd, fake_gradients)
register_gradient("newton_predict", NewtonExperts)
refuse_gradient("newton_predict_bwd", "has no second derivatives")
refuse_gradient("newton_predict_cpu", "has no gradients", "in the compiled extension")
