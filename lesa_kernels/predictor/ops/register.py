"""Registers the operators with torch: the only place where named tuples are flattened.

Torch passes flat arguments; a kernel takes named tuples. The schema of the operator, and which arguments go into which
tuple, follow from the annotations of the kernel.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lesa_kernels.predictor.arguments import Experts, RingState, Shape
from lesa_kernels.predictor.reference import OutputHead, forecast_dtype

_LIBRARY = torch.library.Library("lesa_kernels", "FRAGMENT")

_SCHEMA_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    list[torch.Tensor]: "Tensor[]",
    tuple[float, ...]: "float[]",
    tuple[int, ...]: "int[]",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
}


@dataclasses.dataclass(frozen=True)
class _Group:
    """A parameter of a kernel, and the place of its parts among the flat arguments.

    Args:
        kind: the named tuple or dataclass to build from the parts; None for a single value.
        names: of the parts.
        types: of the parts.
        start, stop: places of the first part and of the one after the last.
    """

    kind: type | None
    names: tuple[str, ...]
    types: tuple[Any, ...]
    start: int
    stop: int


def _groups(kernel: Callable) -> list[_Group]:
    """The parameters of a kernel, by its annotations."""
    groups: list[_Group] = []
    for name, kind in typing.get_type_hints(kernel).items():
        if name == "return":
            continue
        built = None if kind in _SCHEMA_TYPES else kind
        parts = {name: kind} if built is None else typing.get_type_hints(kind)
        start = groups[-1].stop if groups else 0
        groups.append(_Group(built, tuple(parts), tuple(parts.values()), start, start + len(parts)))
    return groups


def _schema(name: str, kernel: Callable, groups: list[_Group]) -> str:
    parts = [f"{_SCHEMA_TYPES[kind]} {part}" for group in groups for part, kind in zip(group.names, group.types)]
    return f"{name}({', '.join(parts)}) -> {_SCHEMA_TYPES[typing.get_type_hints(kernel)['return']]}"


def register(name: str, kernel: Callable, fake: Callable) -> Callable:
    """Registers an operator of torch that runs `kernel`, on the CPU and on CUDA.

    Args:
        name: of the operator.
        kernel: takes named tuples, dataclasses and single values; all parameters and the result are annotated.
        fake: takes the same, and returns empty tensors like the result.

    Returns:
        A function that takes what `kernel` takes, and calls the operator.
    """
    groups = _groups(kernel)
    types = [kind for group in groups for kind in group.types]
    # Torch passes lists. Kernels get tuples, which can be keys of a cache.
    lists = [place for place, kind in enumerate(types) if typing.get_origin(kind) is tuple]
    spans = [(group.kind, group.start, group.stop) for group in groups]

    def grouped(flat: Sequence) -> list:
        values = list(flat)
        for place in lists:
            values[place] = tuple(values[place])
        return [values[start] if kind is None else kind(*values[start:stop]) for kind, start, stop in spans]

    def on_cpu(*flat):
        with _without_autocast("cpu"):
            return kernel(*grouped(flat))

    def on_gpu(*flat):
        # Triton launches on the current GPU.
        with torch.cuda.device(flat[0].device), _without_autocast("cuda"):
            return kernel(*grouped(flat))

    _LIBRARY.define(_schema(name, kernel, groups))
    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"lesa_kernels::{name}", lambda *flat: fake(*grouped(flat)), lib=_LIBRARY)
    operator = getattr(torch.ops.lesa_kernels, name).default

    def call(*arguments):
        return operator(*_flattened(arguments))

    return call


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switches autocast off if it is on: the operations themselves say which dtypes they compute in."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # takes a tenth of the time


def _flattened(arguments: Sequence) -> list:
    flat: list = []
    for argument in arguments:
        if isinstance(argument, tuple):
            flat += argument
        elif isinstance(argument, OutputHead):
            flat += (argument.weight, argument.bias, argument.scale, argument.shift, argument.eps)
        else:
            flat.append(argument)
    return flat


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

    torch.library.register_autograd(f"lesa_kernels::{name}", run, setup_context=setup_context, lib=_LIBRARY)


def refuse_gradient(name: str, why: str) -> None:
    """Makes the gradient of the operator `name` a `RuntimeError`, which begins "<name> on Triton <why>."."""

    def run(ctx, *grads):
        raise RuntimeError(f'{name} on Triton {why}. Choose backend="torch" for them.')

    torch.library.register_autograd(f"lesa_kernels::{name}", run, lib=_LIBRARY)


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
