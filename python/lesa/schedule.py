"""Which denoising steps are computed."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lesa_kernels.checks import argument_error, check_float, check_int

FEW_STEPS = 10
"""A run of fewer steps than this is computed whole, where the schedule was left to a predictor of other runs."""

MOST_STRETCH = 2.0
"""By which factor error control makes a gap longer or shorter than the trained one at most."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a run that are computed; all others are predicted.

    Args:
        steps: rising indices of the computed steps; step 0 is among them.
        num_inference_steps: number of steps of the run that the indices are meant for. None: a run of any length, whose
            steps the indices are as they stand.
        sigmas: noise levels of the computed steps. With them a run of another length, or with another spacing of noise
            levels, computes the steps nearest in sigma.

    Raises:
        TypeError, ValueError: indices that are not rising from 0, or do not fit `num_inference_steps` or `sigmas`.
    """

    steps: tuple[int, ...]
    num_inference_steps: int | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self):
        steps = tuple(check_int("steps", s, minimum=0) for s in self.steps)
        object.__setattr__(self, "steps", steps)
        if not steps or steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:])):
            raise argument_error(
                "steps",
                "be rising step indices that start with 0",
                self.steps,
                "Sort them, remove repeats, and compute the first step: nothing can be predicted before it.",
            )
        if self.num_inference_steps is not None:
            check_int("num_inference_steps", self.num_inference_steps)
            if steps[-1] >= self.num_inference_steps:
                raise argument_error(
                    "steps", f"be below {self.num_inference_steps}, the number of steps", steps, "Drop the larger ones."
                )
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", tuple(check_float("sigmas", s) for s in self.sigmas))
            if len(self.sigmas) != len(steps):
                raise argument_error(
                    "sigmas", f"have one noise level for each of the {len(steps)} steps", self.sigmas, "Pass as many."
                )

    @classmethod
    def interval(cls, interval: int, num_inference_steps: int) -> "Schedule":
        """Steps 0, 1 and 2, then every `interval`-th: 0, 1, 2, 2 + N, 2 + 2N, ..."""
        interval = check_int("interval", interval)
        total = check_int("num_inference_steps", num_inference_steps)
        steps = sorted({*range(min(3, total)), *range(2, total, interval)})
        return cls(tuple(steps), total)

    @classmethod
    def spread(cls, num_computed: int, num_inference_steps: int = 50) -> "Schedule":
        """Evenly spread steps with a short first gap, which gives the predictor two anchors early.

        The steps are 0 and 4 % of the run, then equal gaps up to one gap before the end.
        """
        total = check_int("num_inference_steps", num_inference_steps)
        count = check_int("num_computed", num_computed, maximum=total)
        if count < 3:
            return cls(tuple(range(count)), total)
        start = min(max(1, round(0.04 * total)), total - count + 1)
        gap = (total - start) / (count - 1)
        return cls((0, *(start + round(i * gap) for i in range(count - 1))), total)

    def computed_in(self, run_sigmas: Sequence[float]) -> frozenset[int]:
        """The steps to compute of a run whose steps have the noise levels `run_sigmas`, falling.

        Where `sigmas` are known, these are the steps nearest in sigma; they are `steps` themselves if the run has the
        noise levels that the schedule was made with.
        """
        if self.sigmas is None:
            return frozenset(s for s in self.steps if s < len(run_sigmas))
        rising = [-s for s in run_sigmas]
        chosen = {0}
        for sigma in self.sigmas:
            right = bisect.bisect_left(rising, -sigma)
            near = [i for i in (right - 1, right) if 0 <= i < len(rising)]
            chosen.add(min(near, key=lambda i: abs(run_sigmas[i] - sigma)))
        return frozenset(chosen)

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))


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


ScheduleLike = Schedule | int | Iterable[int]


def as_schedule(schedule: ScheduleLike, num_inference_steps: int | None = None) -> Schedule:
    """A `Schedule` from what users pass.

    Args:
        schedule: a `Schedule`, a list of computed steps, or an interval N for steps 0, 1, 2 and then every N.
        num_inference_steps: number of steps of the run; needed for an interval.

    Raises:
        TypeError, ValueError: anything else; the message says what it must be.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Iterable) and not isinstance(schedule, (str, bytes)):
        return Schedule(tuple(schedule))
    check_int("schedule", schedule)
    return Schedule.interval(schedule, num_inference_steps)
