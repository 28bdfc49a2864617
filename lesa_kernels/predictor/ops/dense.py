"""The dense variant's forecast: the public function and the operators."""

import torch

from lesa_kernels.dispatch import resolve_backend
from lesa_kernels.predictor.arguments import (
    DenseExperts,
    RingState,
    Shape,
    check_all,
    check_tensors,
    contiguous,
    has_kernels,
)
from lesa_kernels.predictor.gradients import HiddenUnits, coefficients_backward, read_history
from lesa_kernels.predictor.ops.gradient import as_declared, fake_forecast, fake_gradients, register_gradient
from lesa_kernels.predictor.reference import dense_predict_ref
from lesa_kernels.register import refuse_gradient, register
from lesa_kernels.stream.reference import forecast_dtype


def dense_predict(
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
    mix_weight: torch.Tensor,
    mix_bias: torch.Tensor,
    stage_bounds: tuple[float, ...],
    history_length: tuple[int, ...],
    grid_size: int,
    spline_order: int,
    backend: str = "auto",
) -> torch.Tensor:
    """Forecasts features by the dense variant: a linear map over the history, scaled by a KAN of the time offsets.

    With the history `g_0, ..., g_{K-1}`, newest first:

        u     = tanh(in_weight @ z + in_bias)                                     [M]
        alpha = out_weight . (spline(u) + silu(u)) + out_bias                     scalar
        h_hat = g_0 + alpha * (sum_k mix_weight_k @ g_k + mix_bias)

    where `z` holds `5 * (sigma - s_k)`, 0 for a missing entry. A missing entry repeats the oldest feature. A row
    without any history is NaN. The tanh, the SiLU and the factor 5 are choices of this project, as in `newton_predict`.

    Args:
        storage, scales, sigmas, cursor, count: the buffers of a `FeatureRing`: `[C, B, T, D]`, `[C, B, T]` for float8
            and None otherwise, `[C, B]`, `[B]`, `[B]`.
        sigma: `[B]`, the noise level to forecast. It decides the stage of each sample.
        in_weight, in_bias: `[S, M, K]`, `[S, M]`, the linear map to the spline units of the S experts.
        spline: `[S, M, grid_size + spline_order]`, the coefficients of the spline units.
        out_weight, out_bias: `[S, M]`, `[S]`.
        mix_weight: `[sum(history_length), D, D]`, the maps of all stages one after the other, newest entry first.
        mix_bias: `[S, D]`.
        stage_bounds: S - 1 falling noise levels.
        history_length: how many entries are read in each stage, S ints; K is the largest.
        grid_size, spline_order: of the splines on [-1, 1].
        backend: "auto", "triton" or "torch".

    Returns:
        `[B, T, D]` in the dtype of `storage`, bfloat16 for float8. It is computed in float32, but Triton rounds the
        operands of matrix products to the dtype of `storage` (bfloat16 for float8).

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than above; the message names it.
        RuntimeError: the backend can't run here.

    Equivalent to, for a sample b that has a history::

        stage = int((sigma[b] <= torch.tensor(stage_bounds)).sum())
        K, n = history_length[stage], int(count[b])
        slots = (cursor[b] - 1 - torch.arange(K).clamp(max=n - 1)) % len(storage)
        z = torch.zeros(in_weight.shape[2])
        z[: min(K, n)] = 5 * (sigma[b] - sigmas[slots, b])[:n]
        u = torch.tanh(in_weight[stage] @ z + in_bias[stage])
        alpha = out_weight[stage] @ (bspline_evaluate(u, spline[stage], grid_size, spline_order) + F.silu(u))
        alpha = alpha + out_bias[stage]
        g, first = storage[slots, b], sum(history_length[:stage])
        mixed = torch.einsum("kod,ktd->to", mix_weight[first : first + K], g)
        h_hat = g[0] + alpha * (mixed + mix_bias[stage])

    Source: a variant, by this project, of LESA (arXiv 2602.20497), whose released predictor has one weight for each
    entry of the history instead of a matrix.
    """
    ring = RingState(storage, scales, sigmas, cursor, count, sigma)
    experts = DenseExperts(in_weight, in_bias, spline, out_weight, out_bias, mix_weight, mix_bias)
    shape = Shape(tuple(stage_bounds), tuple(history_length), grid_size, spline_order)
    return run_dense_predict(ring, experts, shape, backend)


def run_dense_predict(ring: RingState, experts: DenseExperts, shape: Shape, backend: str) -> torch.Tensor:
    """`dense_predict` with its arguments in named tuples."""
    check_tensors(ring)
    check_tensors(experts)
    backends = ("triton", "torch") if has_kernels(ring, experts, shape) else ("torch",)
    if resolve_backend(backend, ring.storage, backends, "dense_predict") == "triton":
        return _operator(ring, experts, shape)
    check_all(ring, experts, shape)
    return dense_predict_ref(ring, experts, shape)


def _dense_predict(ring: RingState, experts: DenseExperts, shape: Shape) -> torch.Tensor:
    # The checks are here too, since the operator can be called without `dense_predict`.
    check_all(ring, experts, shape)
    ring.check_channels()
    from lesa_kernels.predictor.kernels.dense import dense_predict_fwd

    return dense_predict_fwd(contiguous(ring), contiguous(experts), shape, forecast_dtype(ring.storage.dtype))


def _dense_predict_bwd(
    grad: torch.Tensor, ring: RingState, experts: DenseExperts, shape: Shape, needs_storage: bool
) -> list[torch.Tensor]:
    from lesa_kernels.predictor.kernels.dense import dense_predict_bwd

    ring, experts = contiguous(ring), contiguous(experts)
    of_mix, of_mix_bias, of_alpha, of_storage = dense_predict_bwd(grad, ring, experts, shape, needs_storage)
    history = read_history(ring, shape)
    hidden = HiddenUnits(history, experts, shape)
    alpha_weight = experts.out_weight[:, None]  # the only coefficient
    of_hidden, of_out, of_bias = coefficients_backward(history, hidden, alpha_weight, of_alpha[:, None])
    gradients = (of_storage, *hidden.backward(of_hidden), of_out[:, 0], of_bias[:, 0], of_mix, of_mix_bias)
    return as_declared(gradients, ring.storage, experts, needs_storage)


_operator = register("dense_predict", _dense_predict, fake_forecast)
register("dense_predict_bwd", _dense_predict_bwd, fake_gradients)
register_gradient("dense_predict", DenseExperts)
refuse_gradient("dense_predict_bwd", "has no second derivatives")
