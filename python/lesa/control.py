"""A ControlNet that waits until its residuals are needed: in a predicted step they are not."""

from collections.abc import Callable, Sequence

import torch


class Residuals(Sequence):
    """What a ControlNet would return, computed when somebody looks at it; a list of tensors."""

    def __init__(self, compute: Callable):
        self._compute = compute

    def value(self):
        """The list itself, or None where the ControlNet gives none."""
        return self._compute()

    def __getitem__(self, index):
        return self.value()[index]

    def __len__(self):
        return len(self.value())


class _Once:
    """Calls a function when it is first asked for the result."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self):
        if self._function is not None:
            self._result, self._function = self._function(), None
        return self._result


class DeferredControl:
    """Defers the calls of a ControlNet to the transformer that gets its residuals.

    Args:
        controlnet: of the pipeline.
        outputs: how many lists of residuals it returns; 0 for one that is not in a tuple.
    """

    def __init__(self, controlnet: torch.nn.Module, outputs: int):
        self.controlnet, self.outputs = controlnet, outputs

    def install(self) -> None:
        """Puts it before all that a call of the ControlNet runs, unless one is there."""
        attributes = vars(self.controlnet)
        self._run = attributes.get("_compiled_call_impl")
        if not isinstance(getattr(self._run, "__self__", None), DeferredControl):
            attributes["_compiled_call_impl"] = self._gate

    def uninstall(self) -> None:
        """Restores the ControlNet."""
        attributes = vars(self.controlnet)
        if attributes.get("_compiled_call_impl") == self._gate:
            attributes["_compiled_call_impl"] = self._run
            if self._run is None:
                del attributes["_compiled_call_impl"]

    def _gate(self, *args, **kwargs):
        run = self._run or self.controlnet._call_impl
        if kwargs.get("return_dict", True):
            return run(*args, **kwargs)  # an output object, which has more to it than residuals
        result = _Once(lambda: run(*args, **kwargs))
        if not self.outputs:
            return Residuals(result)
        return tuple(Residuals(lambda index=index: result()[index]) for index in range(self.outputs))


def computed(kwargs: dict) -> dict:
    """Arguments of a transformer, with the residuals in them computed."""
    return {name: value.value() if isinstance(value, Residuals) else value for name, value in kwargs.items()}
