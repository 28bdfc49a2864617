"""Chooses the computed steps during a run by the errors of the forecasts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lesa.schedule import Schedule
from lesa_kernels.checks import Said, argument_error, check_float, check_int

MOST_STRETCH = 2.0
"""By which factor error control makes a gap longer or shorter than the trained one at most."""


@dataclass(frozen=True)
class ErrorControl:
    """Chooses the computed steps during a run: more for a sample that is hard to forecast, fewer for an easy one.

    At a computed step the forecast for it can be compared with the truth. How far that is off, over what is typical
    there by the predictor's training, says how hard the sample is. The gap that follows is that of the trained
    schedule, made longer or shorter as adaptive solvers of differential equations do: by
    `(tolerance / hardness) ** (1 / growth)`, at most twice as long and at least half. The predictor should know gaps of
    such lengths: `lesa.train(..., controlled=True)`.

    Args:
        tolerance: which part of the typical error is aimed at. 1 computes about as many steps as the trained schedule;
            less computes more. The samples of a batch share their steps; the worst of them decides.
        longest: how many steps a gap may have at most, the computed one included.
        growth: with which power of a gap's length the error is taken to grow.

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
        """How long the gap that follows is, in gaps of the trained schedule.

        Args:
            stretch: the same of the gap before.
            error: of the forecast for the step between the two.
            typical: what it is there by the trained schedule.
        """
        hardness = max(error, 1e-12) / (max(typical, 1e-12) * stretch**self.growth)
        return min(max((self.tolerance / hardness) ** (1 / self.growth), 1 / MOST_STRETCH), MOST_STRETCH)


class ControlledSteps:
    """The computed steps of one run under `ErrorControl`, chosen as it goes on.

    Args:
        control: how.
        trained: the predictor's schedule, with its noise levels.
        errors: the typical error of the forecast for each of its steps; what the first has is not looked at.
        run_sigmas: the noise levels of the run, falling.

    Attributes:
        chosen: the computed steps so far; the first three of the trained schedule at the start.
    """

    def __init__(self, control: ErrorControl, trained: Schedule, errors: Sequence[float], run_sigmas: Sequence[float]):
        self.control, self.errors = control, errors
        self._trained = [-s for s in trained.sigmas]  # rising, as `numpy.interp` needs them
        self._levels = [*run_sigmas, 0.0]
        first = slice(3)
        self.chosen = Schedule(trained.steps[first], sigmas=trained.sigmas[first]).computed_in(run_sigmas)

    def choose_next(self, error: float | None) -> None:
        """Chooses the step after the last one, by the error there; None where it is not known."""
        *earlier, last = sorted(self.chosen)
        if error is None or not earlier:
            self.add(1.0)
            return
        typical = float(np.interp(-self._levels[last], self._trained[1:], self.errors[1:]))
        self.add(self.control.next_stretch(self._place(last) - self._place(earlier[-1]), error, typical))

    def add(self, stretch: float) -> None:
        """Adds the step so many gaps of the trained schedule after the last one; after the run's end, its length."""
        last = max(self.chosen)
        places = range(len(self._trained) + 1)
        wanted = -float(np.interp(self._place(last) + stretch, places, [*self._trained, 0.0]))
        near = range(last + 1, min(last + self.control.longest, len(self._levels) - 1) + 1)
        self.chosen |= {min(near, key=lambda step: abs(self._levels[step] - wanted))}

    def _place(self, step: int) -> float:
        """How many gaps of the trained schedule are before a step of the run."""
        return float(np.interp(-self._levels[step], [*self._trained, 0.0], range(len(self._trained) + 1)))


def check_controllable(adapter, config) -> None:
    if config.history != "anchors":
        raise argument_error(
            "schedule",
            "be known before the run with a predictor that feeds on its own forecasts",
            Said("an ErrorControl"),
            "Use a newton predictor, or a list of steps.",
        )
    if len(config.schedule_errors or ()) < 2:
        raise argument_error(
            "predictor.config.schedule_errors",
            "say which errors are typical, for an ErrorControl to compare with",
            config.schedule_errors,
            "Train it with `lesa.train(..., controlled=True)` on two computed steps or more, or pass a list of steps.",
        )
    if getattr(adapter.transformer, "_parallel_config", None) is not None:
        raise argument_error(
            "schedule",
            "be known before the run where processes share a transformer",
            Said("an ErrorControl"),
            "Pass a list of steps: each process sees errors of its own part only.",
        )
