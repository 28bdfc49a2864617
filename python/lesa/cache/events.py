"""What a hook on a transformer is told of, and asked."""

import warnings
from typing import Any, Generic, TypeVar

import torch

from lesa.cache import reasons
from lesa.cache.device_values import DeviceValues
from lesa.cache.run import Call, Run, RunState
from lesa_kernels.checks import usage_error
from lesa_kernels.dispatch import users_level

State = TypeVar("State", bound=RunState)


class StepEvents(Generic[State]):
    """What `StepHook` calls, and subclasses of it define."""

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    def warn(self, message: str) -> None:
        """Warns, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"lesa: {message}", RuntimeWarning, stacklevel=users_level())

    def new_state(self, run: Run, values: DeviceValues) -> State:
        """The state of a run that begins; arguments as in `RunState`."""
        raise NotImplementedError

    def on_run(self, state: State) -> None:
        """Called at the first step of a run."""
        raise NotImplementedError

    def on_unlocated(self) -> None:
        """Called when a call's timestep is not one of the scheduler's, or when that turns out later."""
        self.warn("{}: computing. {}".format(*reasons.UNLOCATED))

    def wants_prediction(self, state: State, call: Call) -> bool:
        """Whether this call is not to be computed."""
        return False

    def predict(self, state: State, call: Call, arguments: dict[str, Any]) -> Any:
        """The transformer's output, forecast; None if the adapter finds that it must be computed.

        Args:
            state: of the current run.
            call: with the arguments that were passed to the transformer.
            arguments: those of the forward by name, which wrappers may have changed.
        """
        raise NotImplementedError

    def can_predict(self, state: State, call: Call, arguments: dict[str, Any]) -> bool:
        """Whether `predict` can be called with these arguments, which wrappers may have changed."""
        return True

    def on_not_forecast(self, state: State, call: Call, reason: str, remedy: str) -> None:
        """Called when a call that was to be predicted is computed, because its forward could not be exchanged."""
        self.warn(f"{reason}: computing. {remedy}")

    def on_bypassed(self, reason: str, remedy: str) -> None:
        """Called when the pipeline computes, and the hook does not see it."""
        raise usage_error(f"lesa cannot see what is computed: {reason}.", remedy, RuntimeError)

    def bypass(self, reason: str, remedy: str) -> None:
        """Tells `on_bypassed`, and remembers it for the end of the run."""
        raise NotImplementedError

    def on_restart(self, state: State) -> None:
        """Called when a run begins in the middle of another one."""
        self.bypass(*reasons.RESTARTED)

    def on_no_call(self) -> None:
        """Called when the pipeline has run and has not called the transformer."""

    def on_predicted(self, state: State, call: Call, output: Any) -> None:
        """Called with what `predict` gave, to ask the device whether it is good."""

    def accepts(self, state: State, call: Call, output: Any) -> bool:
        """Whether what `predict` gave is good, as far as is known; if not, the call is computed."""
        return True

    def needed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The transformer's keyword arguments for a call that is computed."""
        return kwargs

    def reads_conditioning(self, state: State) -> bool:
        """Whether `keep` reads the conditioning."""
        return True

    def keep(
        self, state: State, call: Call, head: int, features: torch.Tensor, conditioning: torch.Tensor | None
    ) -> None:
        """Gets the features `[B, T, D]` and the conditioning of an output head in a call that is computed.

        `head` is the number of its branch. The conditioning may be None if `reads_conditioning` says so.
        """
        raise NotImplementedError

    def finish(self, state: State, call: Call) -> None:
        """Called after a call that was computed. `call.heads` says how often lesa has seen the head run in it."""
