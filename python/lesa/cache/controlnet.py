"""A ControlNet that is called only when its residuals are needed. A predicted step does not need them."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch


class Residual:
    """One of a ControlNet's residuals. The pipeline of Sana converts each of them on the way to the transformer."""

    def __init__(self, compute: Callable[[], torch.Tensor]):
        self._compute = compute

    def value(self) -> torch.Tensor:
        """The residual itself."""
        return self._compute()

    def to(self, *args: Any, **kwargs: Any) -> "Residual":
        """Like `Tensor.to`, when the residual is computed."""
        return Residual(lambda: self.value().to(*args, **kwargs))


class Residuals(Sequence):
    """A list of a ControlNet's residuals that is computed when it is first used.

    Args:
        compute: makes the list.
        count: its length.
        defers_each: whether going through it gives residuals that are not computed yet, and not tensors.
    """

    def __init__(self, compute: Callable[[], list], count: int, defers_each: bool):
        self._compute, self._count, self._defers_each = compute, count, defers_each

    def value(self) -> list:
        """The list itself."""
        return self._compute()

    def __getitem__(self, index: Any) -> Any:
        return self.value()[index]

    def __iter__(self) -> Iterator[Any]:
        if not self._defers_each:
            return iter(self.value())
        return (Residual(functools.partial(self.__getitem__, index)) for index in range(self._count))

    def __len__(self) -> int:
        return self._count


class ResidualsByBlock(Mapping):
    """A dict of a ControlNet's residuals, by the number of a block, that is computed when it is first used."""

    def __init__(self, compute: Callable[[], dict]):
        self._compute = compute

    def value(self) -> dict:
        """The dict itself."""
        return self._compute()

    def __getitem__(self, block: int) -> Any:
        return self.value()[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self.value())

    def __len__(self) -> int:
        return len(self.value())


_DEFERRED = (Residual, Residuals, ResidualsByBlock)


class DeferredControl:
    """Defers the calls of a ControlNet to the transformer that gets its residuals.

    The first call of a run is not deferred: that step is computed, and the call shows which of the lists are None.

    Args:
        controlnet: the pipeline's ControlNet.
        outputs: how many lists of residuals it returns in a tuple; 0 for a single list or dict without a tuple.
        converts: whether the pipeline goes through the lists and converts each residual.
    """

    def __init__(self, controlnet: torch.nn.Module, outputs: int, converts: bool = False):
        self.controlnet, self.outputs, self.converts = controlnet, outputs, converts
        self._awaited: list[Callable[[], bool]] = []
        self._run: Callable | None = None  # what the gate replaces
        self._counts: tuple[int | None, ...] | None = None  # of residuals in each list
        self._gives_dict = False
        self._has_choice = "return_dict" in inspect.signature(controlnet.forward).parameters

    @classmethod
    def of(cls, controlnet: torch.nn.Module, outputs: int, converts: bool = False) -> "DeferredControl":
        """The instance that is on `controlnet` already, or a new one."""
        there = getattr(vars(controlnet).get("_compiled_call_impl"), "__self__", None)
        return there if isinstance(there, cls) else cls(controlnet, outputs, converts)

    def join(self, awaited: Callable[[], bool]) -> None:
        """Defers the calls that come while `awaited()` says that a cached transformer is in the middle of a run."""
        if not self._awaited:
            attributes = vars(self.controlnet)
            self._run = attributes.get("_compiled_call_impl")
            attributes.update(_compiled_call_impl=self._gate, compile=self._compile)
        self._awaited.append(awaited)

    def leave(self, awaited: Callable[[], bool]) -> None:
        """Undoes `join`, if it was called. When the last one is undone, the ControlNet is as before."""
        if awaited not in self._awaited:
            return
        self._awaited.remove(awaited)
        if not self._awaited:
            attributes = vars(self.controlnet)
            del attributes["_compiled_call_impl"], attributes["compile"]
            if self._run is not None:
                attributes["_compiled_call_impl"] = self._run

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the module's own `compile`: what is compiled is behind the gate."""
        self._run = torch.compile(self.controlnet._call_impl, *args, **kwargs)

    def _gate(self, *args: Any, **kwargs: Any) -> Any:
        run = self._run or self.controlnet._call_impl
        if self._has_choice and kwargs.get("return_dict", True):
            return run(*args, **kwargs)  # an output object, which holds more than residuals
        if self._counts is None or not any(awaited() for awaited in self._awaited):
            result = run(*args, **kwargs)
            parts = result if self.outputs else (result,)
            self._counts = tuple(None if part is None else len(part) for part in parts)
            self._gives_dict = isinstance(result, dict)
            return result
        once, counts = functools.cache(lambda: run(*args, **kwargs)), self._counts
        if self._gives_dict:
            return ResidualsByBlock(once)
        if not self.outputs:
            return None if counts[0] is None else Residuals(once, counts[0], self.converts)

        def part(number: int) -> list:
            return once()[number]

        return tuple(
            None if count is None else Residuals(functools.partial(part, number), count, self.converts)
            for number, count in enumerate(counts[: self.outputs])
        )


def computed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a transformer, with the residuals in them computed."""
    return {name: _computed(value) for name, value in kwargs.items()}


def _computed(value: Any) -> Any:
    if isinstance(value, (tuple, list)) and any(isinstance(part, _DEFERRED) for part in value):
        parts = [_computed(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value.value() if isinstance(value, _DEFERRED) else value
