"""Gradients of the predictors' operators, and results without values."""

from collections.abc import Sequence

import torch

from lesa_kernels.predictor.arguments import Experts, RingState, Shape
from lesa_kernels.register import LIBRARY
from lesa_kernels.stream.reference import forecast_dtype


def register_gradient(name: str, experts: type[Experts]) -> None:
    """Gives the operator `name` the gradient that the operator `<name>_bwd` computes.

    `<name>_bwd` takes the gradient of the result, the ring, the experts, the shape, and whether the gradient of
    `storage` is wanted. It returns the gradients of `storage` and of each of the experts, as `as_declared` makes them.

    Args:
        name: of the operator. Its arguments begin with the ring, the experts and the shape.
        experts: their class.
    """
    first = len(RingState._fields)  # place of the first expert
    places = (0, *range(first, first + len(experts._fields)))
    count = places[-1] + 1 + len(Shape._fields)
    backward = getattr(torch.ops.lesa_kernels, f"{name}_bwd").default

    def setup_context(ctx, inputs, output):
        ctx.inputs = [None if isinstance(value, torch.Tensor) else value for value in inputs[:count]]
        ctx.tensors = [place for place, value in enumerate(inputs[:count]) if isinstance(value, torch.Tensor)]
        ctx.extra = len(inputs) - count
        ctx.save_for_backward(*(inputs[place] for place in ctx.tensors))

    def run(ctx, grad):
        inputs = list(ctx.inputs)
        for place, tensor in zip(ctx.tensors, ctx.saved_tensors):
            inputs[place] = tensor
        gradients = backward(grad, *inputs, ctx.needs_input_grad[0])
        result = [None] * (count + ctx.extra)
        for place, gradient in zip(places, gradients):
            if ctx.needs_input_grad[place]:
                result[place] = gradient
        return tuple(result)

    torch.library.register_autograd(f"lesa_kernels::{name}", run, setup_context=setup_context, lib=LIBRARY)


def as_declared(
    gradients: Sequence[torch.Tensor | None], storage: torch.Tensor, experts: Experts, needs_storage: bool
) -> list[torch.Tensor]:
    """The gradients as the schema of an operator wants them: one tensor for `storage` and for each of the experts.

    A tensor has the dtype of its input. It is empty if no gradient is wanted, or if the input is None. If the result
    does not depend on an input, such as a residual without taps, its gradient is zero.
    """
    declared = []
    for gradient, value in zip(gradients, (storage if needs_storage else None, *experts)):
        if value is None:
            declared.append(storage.new_empty(0, dtype=torch.float32))
        elif gradient is None:
            declared.append(torch.zeros_like(value, memory_format=torch.contiguous_format))
        else:
            declared.append(gradient.to(value.dtype).contiguous())
    return declared


def fake_forecast(ring: RingState, *_) -> torch.Tensor:
    """A forecast without values."""
    return ring.storage.new_empty(ring.storage.shape[1:], dtype=forecast_dtype(ring.storage.dtype))


def fake_gradients(
    grad: torch.Tensor, ring: RingState, experts: Experts, shape: Shape, needs_storage: bool
) -> list[torch.Tensor]:
    """What `as_declared` returns, without values."""
    return [
        ring.storage.new_empty(0, dtype=torch.float32) if value is None else value.new_empty(value.shape)
        for value in (ring.storage if needs_storage else None, *experts)
    ]
