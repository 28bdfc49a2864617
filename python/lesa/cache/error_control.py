"""Chooses the computed steps during a run by the errors of the forecasts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lesa.models import Adapter
from lesa.schedule import Schedule
from lesa.spread import is_spread
from lesa_kernels import OutputHead, PredictorConfig
from lesa_kernels.checks import check_float, check_int, usage_error
from lesa_kernels.stream import output_head

MOST_STRETCH = 2.0
"""The most by which error control makes a gap longer or shorter than the trained one, as a factor."""


@dataclass(frozen=True)
class ErrorControl:
    """Chooses the computed steps during a run: more for a sample that is hard to forecast, fewer for an easy one.

    At a computed step, the forecast for that step can be compared with the computed result. The error of the forecast,
    divided by the error that is typical for this step after a gap of this length, is the hardness of the sample. The
    next gap is the gap of the trained schedule times `(tolerance / hardness) ** (1 / growth)`, as in adaptive solvers
    of differential equations. It is at least half as long as the trained gap, and at most twice as long. The predictor
    should be trained on gaps of such lengths: `lesa.train(..., controlled=True)`.

    Args:
        tolerance: the error to aim at, as a part of the typical error. 1 computes about as many steps as the trained
            schedule; a smaller value computes more steps. The samples of a batch share their steps; the worst sample
            decides.
        longest: the most steps that a gap may have, the computed step included.
        growth: the error is assumed to grow with this power of the length of the gap.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    tolerance: float = 1.0
    longest: int = 12
    growth: float = 2.5

    def __post_init__(self):
        check_float("tolerance", self.tolerance, minimum=1e-9)
        check_int("longest", self.longest)
        check_float("growth", self.growth, minimum=0.1)

    def next_stretch(self, stretch: float, error: float, typical: float) -> float:
        """The length of the next gap, in gaps of the trained schedule.

        Args:
            stretch: the length of the gap before, in the same unit.
            error: the error of the forecast for the step between the two gaps.
            typical: the typical error there, with the trained schedule.
        """
        hardness = max(error, 1e-12) / (max(typical, 1e-12) * stretch**self.growth)
        return min(max((self.tolerance / hardness) ** (1 / self.growth), 1 / MOST_STRETCH), MOST_STRETCH)


class ControlledSteps:
    """The computed steps of one run under `ErrorControl`, chosen during the run.

    Args:
        control: says how to choose.
        trained: the predictor's schedule, with its noise levels.
        errors: the typical error of the forecast for each step of `trained`. The first is not used.
        run_sigmas: the noise levels of the run, in falling order.
        switch: the step at which the pipeline goes over to its second transformer, which is computed; None if it does
            not.

    Attributes:
        chosen: the computed steps so far; the first three of the trained schedule at the start.
        measured: the errors of the forecasts for the latest computed step, one for each stream of calls.
    """

    def __init__(
        self,
        control: ErrorControl,
        trained: Schedule,
        errors: Sequence[float],
        run_sigmas: Sequence[float],
        switch: int | None = None,
    ):
        self.control, self.errors, self._switch = control, errors, switch
        sigmas: tuple[float, ...] = trained.sigmas  # type: ignore[assignment]  # known of a trained schedule
        self._trained = [-s for s in sigmas]  # rising, as `numpy.interp` needs them
        self._levels = [*run_sigmas, 0.0]
        first = slice(3)
        self.chosen = Schedule(trained.steps[first], sigmas=sigmas[first]).computed_in(run_sigmas)
        if switch is not None and switch < max(self.chosen):
            self.chosen |= {switch}
        self.measured: list[float] = []

    def receive(self, errors: dict[int, float], step: int, error: float) -> None:
        """Gets the error of the forecast for a step of a stream, and stores it in the errors of the stream."""
        errors[step] = error
        self.measured.append(error if math.isfinite(error) else math.inf)

    def choose_by_measured(self) -> None:
        """Chooses the step after the last one by the largest error that was measured there."""
        errors, self.measured = self.measured, []
        self.choose_next(max(errors, default=None))  # there are none where a history has just begun

    def choose_next(self, error: float | None) -> None:
        """Chooses the step after the last one by the error there; None if it is not known."""
        *earlier, last = sorted(self.chosen)
        if error is None or not earlier:
            self.add(1.0)
            return
        typical = float(np.interp(-self._levels[last], self._trained[1:], self.errors[1:]))
        self.add(self.control.next_stretch(self._place(last) - self._place(earlier[-1]), error, typical))

    def add(self, stretch: float) -> None:
        """Adds the step that comes `stretch` gaps of the trained schedule after the last one.

        If that is after the end of the run, the number of its steps is added. The first step of the second transformer
        is not passed over.
        """
        last = max(self.chosen)
        places = range(len(self._trained) + 1)
        wanted = -float(np.interp(self._place(last) + stretch, places, [*self._trained, 0.0]))
        end = len(self._levels) - 1 if self._switch is None or self._switch <= last else self._switch
        near = range(last + 1, min(last + self.control.longest, end) + 1)
        self.chosen |= {min(near, key=lambda step: abs(self._levels[step] - wanted))}

    def _place(self, step: int) -> float:
        """How many gaps of the trained schedule are before a step of the run."""
        return float(np.interp(-self._levels[step], [*self._trained, 0.0], range(len(self._trained) + 1)))


def forecast_error(forecast: torch.Tensor, features: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """The error of the forecast for a step that was computed.

    Args:
        forecast: the features that were forecast, `[B, T, D]`.
        features: those that were computed.
        head: the output head of that step.

    Returns:
        The relative L2 error of the velocity, of the worst sample: a scalar on the features' device.
    """
    truth = output_head(features, head).float()
    error = (output_head(forecast, head).float() - truth).flatten(1)
    return (error.norm(dim=1) / truth.flatten(1).norm(dim=1).clamp(min=1e-12)).amax()


def check_controllable(adapter: Adapter, config: PredictorConfig) -> None:
    """Raises `ValueError` if a predictor with this configuration cannot be used with `ErrorControl`."""
    if config.history != "anchors":
        raise usage_error(
            "`ErrorControl` needs a predictor that does not use its own forecasts as history.",
            "Use a predictor with `history='anchors'`, or pass a list of steps.",
        )
    if config.forecaster.is_fitted:
        raise usage_error(
            f"`ErrorControl` needs a predictor for any computed steps, and {config.mixer} is fitted for some.",
            "Use another predictor, or pass a list of steps.",
        )
    if len(config.schedule_errors or ()) < 2:
        raise usage_error(
            "`ErrorControl` needs a predictor whose config has typical errors, as `schedule_errors`.",
            "Train it with `lesa.train(..., controlled=True)` on two computed steps or more, or pass a list of steps.",
        )
    if is_spread(adapter.transformer):
        raise usage_error(
            "`ErrorControl` cannot be used where several processes share a transformer.",
            "Pass a list of steps: by the errors, the processes could choose different ones.",
        )
