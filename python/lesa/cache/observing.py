"""The hook for those that watch a run in which every step is computed."""

from collections.abc import Mapping
from typing import Any

import torch

from lesa.cache import reasons
from lesa.cache.device_values import DeviceValues
from lesa.cache.hook import StepHook
from lesa.cache.run import Call, Run, RunState, StepObserver
from lesa.models import Adapter


class ComputingHook(StepHook[RunState]):
    """Computes each call, and shows it to an observer.

    Args:
        pipe, adapters: as in `StepHook`.
        observer: sees what is computed.
    """

    def __init__(self, pipe: Any, adapters: Mapping[str, Adapter], observer: StepObserver):
        super().__init__(pipe, adapters)
        self.observer = observer

    def new_state(self, run: Run, values: DeviceValues) -> RunState:
        return RunState(run, values)

    def on_run(self, state: RunState) -> None:
        self.observer.on_run(state.run, frozenset(range(len(state.run.executed_sigmas))))

    def keep(self, state: RunState, call: Call, head: int, features: torch.Tensor, conditioning: Any) -> None:
        if head == 0:
            self.observer.keep(call, self.adapter.all_features(call.arguments, features), conditioning)

    def finish(self, state: RunState, call: Call) -> None:
        if max(call.heads.values(), default=0) > 1:
            self.bypass(*reasons.REPEATED)
