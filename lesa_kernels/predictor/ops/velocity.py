"""A whole predicted step: Newton's forecast and the output head."""

import torch

from lesa_kernels.checks import check_tensor
from lesa_kernels.dispatch import needs_gradient
from lesa_kernels.predictor.arguments import (
    NewtonExperts,
    RingState,
    Shape,
    check_all,
    check_tensors,
    contiguous,
)
from lesa_kernels.predictor.ops.newton import newton_backend, run_newton_predict
from lesa_kernels.predictor.reference import newton_velocity_ref
from lesa_kernels.register import refuse_gradient, register
from lesa_kernels.stream.arguments import NO_SUMS, OutputHead, StoredFeatures, Weights
from lesa_kernels.stream.fused import stream_velocity_is_fused, triton_velocity
from lesa_kernels.stream.op import output_head
from lesa_kernels.stream.reference import forecast_dtype


def newton_velocity(
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
    head: OutputHead,
    stage_bounds: tuple[float, ...],
    history_length: tuple[int, ...],
    grid_size: int,
    spline_order: int,
    backend: str = "auto",
) -> torch.Tensor:
    """A whole predicted step: Newton's forecast, and the output head applied to it.

    On Triton this is two kernels if `stream_velocity_is_fused`: one makes the weights of the anchors, and one reads
    each anchor once and writes only the velocities. Between them run a few small operations of plain torch on the
    head's weights and modulation: see `head_sums`. A sampler makes both before a run, with `FusedKANPredictor.plan` and
    `head_sums`, and then a step is one kernel. Other backends, other heads and calls that need a gradient use two
    operations: the forecast, then the head.

    Args:
        head: the head's weights and this step's modulation.
        storage ... spline_order: as in `newton_predict`.
        backend: as in `newton_predict`.

    Returns:
        `[B, T, O]` in the dtype of `storage` (bfloat16 for float8). It is computed in float32, but Triton rounds the
        operands of matrix products to the dtype of `storage` (bfloat16 for float8).

    Raises:
        ValueError, TypeError: a tensor has the wrong shape, dtype or device; the message names it.
        RuntimeError: the backend can't run here.

    Equivalent to::

        velocity = output_head(newton_predict(...), head)

    Source: this project; it rearranges LayerNorm and projection around a low-rank sum.
    """
    ring = RingState(storage, scales, sigmas, cursor, count, sigma)
    experts = NewtonExperts(in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias)
    shape = Shape(tuple(stage_bounds), tuple(history_length), grid_size, spline_order)
    return run_newton_velocity(ring, experts, head, shape, backend)


def run_newton_velocity(
    ring: RingState, experts: NewtonExperts, head: OutputHead, shape: Shape, backend: str
) -> torch.Tensor:
    """`newton_velocity` with its arguments in named tuples."""
    check_tensors(ring)
    check_tensors(experts)
    check_tensor("head.weight", head.weight, ("O", "D"))
    chosen = newton_backend(ring, experts, shape, backend, "newton_velocity")
    if chosen == "torch":
        check_all(ring, experts, shape)
        head.check(ring.storage)
        return newton_velocity_ref(ring, experts, head, shape)
    parts = (head.weight, head.bias, head.scale, head.shift)
    if chosen == "triton" and not needs_gradient(ring.storage, *experts, *parts):
        return _operator(ring, experts, head, shape)
    return output_head(run_newton_predict(ring, experts, shape, chosen), head)


def newton_velocity_is_fused(ring: RingState, experts: NewtonExperts, head: OutputHead) -> bool:
    """Whether `newton_velocity` on Triton does not write the forecast to memory; see `stream_velocity_is_fused`."""
    _, batch, _, width = ring.storage.shape
    history = experts.out_bias.shape[1] + 1
    weights = Weights(torch.empty((batch, history, width), device="meta"), ring.count, None, None, None)
    features = StoredFeatures(ring.storage, ring.scales, ring.cursor, ring.count)
    return stream_velocity_is_fused(features, weights, head, experts.low_rank)


def _newton_velocity(ring: RingState, experts: NewtonExperts, head: OutputHead, shape: Shape) -> torch.Tensor:
    # The checks are here too, since the operator can be called without `newton_velocity`.
    check_all(ring, experts, shape)
    ring.check_channels()
    head.check(ring.storage)
    from lesa_kernels.predictor.kernels.coefficients import newton_ring_coefficients

    if not ring.storage.shape[1]:
        return _fake_velocity(ring, experts, head, shape)  # no samples: nothing to compute
    ring = contiguous(ring)
    weights = newton_ring_coefficients(ring, contiguous(experts), shape)
    features = StoredFeatures(ring.storage, ring.scales, ring.cursor, ring.count)
    return triton_velocity(features, weights, experts.low_rank, head, NO_SUMS)


def _fake_velocity(ring: RingState, experts: NewtonExperts, head: OutputHead, shape: Shape) -> torch.Tensor:
    _, batch, tokens, _ = ring.storage.shape
    return ring.storage.new_empty((batch, tokens, len(head.weight)), dtype=forecast_dtype(ring.storage.dtype))


_operator = register("newton_velocity", _newton_velocity, _fake_velocity)
refuse_gradient("newton_velocity", "has no gradients: `newton_velocity()` uses other operators for them")
