"""Registers operators with torch: the only place where named tuples are flattened.

Torch passes flat arguments; a kernel takes named tuples. The schema of the operator, and which arguments go into which
tuple, follow from the annotations of the kernel.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("lesa_kernels", "FRAGMENT")

# An operator can be compiled. Its kernels rely on strides, such as those of adjacent channels, so a compiler may not
# change them.
OPERATOR_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

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
    str | None: "str?",
}


@dataclasses.dataclass(frozen=True)
class _Group:
    """A parameter of a kernel, and the place of its parts among the flat arguments.

    Args:
        kind: the named tuple or dataclass to build from the parts; None for a single value.
        names: of the parts; where an earlier parameter has a part of the same name, it begins with this one's.
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
        taken = {part for group in groups for part in group.names}
        names = tuple(f"{name}_{part}" if part in taken else part for part in parts)
        groups.append(_Group(built, names, tuple(parts.values()), start, start + len(parts)))
    return groups


def _schema(name: str, kernel: Callable, groups: list[_Group]) -> str:
    parts = [f"{_SCHEMA_TYPES[kind]} {part}" for group in groups for part, kind in zip(group.names, group.types)]
    return f"{name}({', '.join(parts)}) -> {_SCHEMA_TYPES[typing.get_type_hints(kernel)['return']]}"


def register(name: str, kernel: Callable, fake: Callable, devices: tuple[str, ...] = ("CPU", "CUDA")) -> Callable:
    """Registers an operator of torch that runs `kernel`.

    Args:
        name: of the operator.
        kernel: takes named tuples, dataclasses and single values; all parameters and the result are annotated.
        fake: takes the same, and returns empty tensors like the result.
        devices: on which it runs. For tensors on others, the operator raises torch's own error.

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

    LIBRARY.define(_schema(name, kernel, groups), tags=OPERATOR_TAGS)
    for device in devices:
        LIBRARY.impl(name, {"CPU": on_cpu, "CUDA": on_gpu}[device], device)
    torch.library.register_fake(f"lesa_kernels::{name}", lambda *flat: fake(*grouped(flat)), lib=LIBRARY)
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
        elif dataclasses.is_dataclass(argument):
            flat += (getattr(argument, field.name) for field in dataclasses.fields(argument))
        else:
            flat.append(argument)
    return flat


def refuse_gradient(name: str, why: str, where: str = "on Triton") -> None:
    """Makes the gradient of the operator `name` a `RuntimeError`, which begins "<name> <where> <why>."."""

    def run(ctx, *grads):
        raise RuntimeError(f'{name} {where} {why}. Choose backend="torch" for them.')

    torch.library.register_autograd(f"lesa_kernels::{name}", run, lib=LIBRARY)
