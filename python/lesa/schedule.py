"""Which denoising steps are computed."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lesa_kernels.checks import argument_error, check_choice, check_float, check_int

if TYPE_CHECKING:
    from lesa_kernels import PredictorConfig

FEW_STEPS = 10
"""A run with fewer steps is computed completely with a predictor that was trained for another number of steps."""

FEW_UNTRAINED, LEAST_COMPUTED = 8, 6
"""Without training, a run with fewer steps is computed completely, and of a longer one at least so many steps are.

With 3 of 12 steps, runs with `universal` are worse than plain runs of 3 steps; with 6 of 12 or 8 they are better. Runs
with `linear` are better with 6 of 12, and about equal with 6 of 8.
"""

QUALITIES = {"high": 16, "balanced": 12, "fast": 9}
"""By name, how many of 50 steps are computed."""
DEFAULT_QUALITY = "balanced"


@dataclass(frozen=True)
class Schedule:
    """The steps of a run that are computed; all others are predicted.

    Args:
        steps: rising indices of the computed steps; step 0 is among them.
        num_inference_steps: number of steps of the run that the indices are for. None: the indices are used in a run of
            any length.
        sigmas: noise levels of the computed steps. If they are given, a run of another length, or with another spacing
            of noise levels, computes the steps that are nearest in sigma.

    Raises:
        TypeError, ValueError: the indices do not rise from 0, or do not fit `num_inference_steps` or `sigmas`.
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
                "Sort them, remove repeats, and add step 0: nothing can be predicted before it.",
            )
        if self.num_inference_steps is not None:
            check_int("num_inference_steps", self.num_inference_steps)
            if steps[-1] >= self.num_inference_steps:
                raise argument_error(
                    "steps",
                    f"be below {self.num_inference_steps}, the number of steps",
                    steps,
                    "Remove the larger ones.",
                )
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", tuple(check_float("sigmas", s) for s in self.sigmas))
            if len(self.sigmas) != len(steps):
                raise argument_error(
                    "sigmas",
                    f"have one noise level for each of the {len(steps)} steps",
                    self.sigmas,
                    "Pass the same number of both.",
                )

    @classmethod
    def interval(cls, interval: int, num_inference_steps: int, first: int = 3) -> "Schedule":
        """The first steps, then every N-th of those after step 2: 2 + N, 2 + 2N, ...

        Args:
            interval: N.
            num_inference_steps: number of steps of the run.
            first: how many steps are computed at the start, at least 3: 0, 1 and 2 by default. With 4 of them, it is
                the schedule that the released code of LESA calls N; for N = 7 it is 0, 1, 2, 3, 9, 16, 23, 30, 37, 44.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        interval = check_int("interval", interval)
        total = check_int("num_inference_steps", num_inference_steps)
        steps = sorted({*range(min(check_int("first", first, minimum=3), total)), *range(2, total, interval)})
        return cls(tuple(steps), total)

    @classmethod
    def windows(cls, window: float, flex: float, num_inference_steps: int, first: int = 5) -> "Schedule":
        """The first steps, then gaps that grow: the schedule of Spectrum.

        Each computed step lies `floor(window)` steps after the one before it. After each of these gaps, the window
        grows by `flex`. With the window 2 and a flex of 3, of 50 steps it is 0, 1, 2, 3, 4, 6, 11, 19, 30, 44.

        Args:
            window: the first window in steps, at least 1.
            flex: by how many steps the window grows, at least 0. It need not be a whole number.
            num_inference_steps: number of steps of the run.
            first: how many steps are computed at the start, at least 1; 5 in the released code.

        Raises:
            TypeError, ValueError: an argument is not as above.

        Source: Spectrum, arXiv 2603.01623.
        """
        total = check_int("num_inference_steps", num_inference_steps)
        window, flex = check_float("window", window, minimum=1.0), check_float("flex", flex, minimum=0.0)
        steps = [*range(min(check_int("first", first), total))]
        while (step := steps[-1] + math.floor(window)) < total:
            steps.append(step)
            window += flex
        return cls(tuple(steps), total)

    @classmethod
    def spread(
        cls, num_computed: int, num_inference_steps: int = 50, sigmas: Sequence[float] | None = None
    ) -> "Schedule":
        """The default schedule: gaps that rise from a short first one and become shorter again at the end of the run.

        Of n computed steps, gap j (0, ..., n - 1; the last one ends with the run) has the relative length
        `x^0.7 (1 - x)^0.5` with `x = (j + 1/2) / n`. Lengths are measured in the mean of two parts of the run: that of
        its steps, and that of its noise levels. The first gap is at most 6 % of the run, because only one feature is
        known in it. A computed step is the one that is nearest. Of less than three computed steps, all are at the
        start.

        Args:
            num_computed: how many steps are computed.
            num_inference_steps: number of steps S of the run.
            sigmas: the falling noise levels of the S steps of the run. None: they fall evenly from 1 to 1/S.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        total = check_int("num_inference_steps", num_inference_steps)
        count = check_int("num_computed", num_computed, maximum=total)
        levels = [1 - i / total for i in range(total)] if sigmas is None else list(sigmas)
        if len(levels) != total or levels[0] <= 0:
            raise argument_error(
                "sigmas",
                f"have the {total} noise levels of the run, the first one above 0",
                levels,
                "Leave out the final 0.",
            )
        if count < 3:
            return cls(tuple(range(count)), total)
        lengths = [((j + 0.5) / count) ** 0.7 * (1 - (j + 0.5) / count) ** 0.5 for j in range(count)]
        return cls(steps_between(lengths, parts_of_run(levels), most_first=0.06), total)

    def computed_in(self, run_sigmas: Sequence[float]) -> frozenset[int]:
        """The steps to compute in a run with the falling noise levels `run_sigmas`.

        If `sigmas` is given, these are the steps that are nearest in sigma. They equal `steps` if the run has the noise
        levels that the schedule was made with.
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


def falling_levels(run_sigmas: Sequence[float]) -> Sequence[float]:
    """The noise levels of a run, if they fall from one above 0.

    Some schedulers have noise levels that rise, or begin at 0. They count as levels that fall evenly.
    """
    falls = run_sigmas[0] > 0 and all(a >= b for a, b in zip(run_sigmas, run_sigmas[1:]))
    total = len(run_sigmas)
    return run_sigmas if falls else [1 - i / total for i in range(total)]


def parts_of_run(levels: Sequence[float]) -> list[float]:
    """Which part of a run lies before each of its steps: the mean of that of its steps and that of its noise levels.

    Args:
        levels: the noise levels of the steps, falling from one above 0.
    """
    total = len(levels)
    return [(i / total + 1 - level / levels[0]) / 2 for i, level in enumerate(levels)]


def steps_between(lengths: Sequence[float], parts: Sequence[float], most_first: float = 1.0) -> tuple[int, ...]:
    """The computed steps of a run between which there are gaps of these relative lengths, as nearly as possible.

    Args:
        lengths: of the gaps, in any unit. The first gap begins with step 0, and the last one ends with the run.
        parts: for each step of the run, which part of the run lies before it; rising from 0.
        most_first: the largest part of the run that the first gap has.
    """
    count, total = len(lengths), len(parts)
    steps = [0]
    for j in range(1, count):
        part = min(sum(lengths[:j]) / sum(lengths), most_first if j == 1 else 1.0)
        nearest = min(range(total), key=lambda i: abs(parts[i] - part))
        steps.append(min(max(nearest, steps[-1] + 1), total - count + j))
    return tuple(steps)


@dataclass(frozen=True)
class Spread:
    """How many steps of each run are computed. `Schedule.spread` chooses them, by the noise levels of the run.

    Args:
        steps: how many; a shorter run is computed in full. None: as many as `quality` says.
        quality: "high", "balanced" or "fast": 16, 12 or 9 of 50 steps. Of another number of steps it is the same part,
            rounded up, and at least six; up to 18 steps, all three are the same. A run of fewer than 8 steps is
            computed in full.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    steps: int | None = None
    quality: str = DEFAULT_QUALITY

    def __post_init__(self):
        if self.steps is not None:
            object.__setattr__(self, "steps", check_int("steps", self.steps))
        check_choice("quality", self.quality, QUALITIES)

    def count_of(self, total: int) -> int:
        """How many steps of a run of `total` steps are computed."""
        if self.steps is not None:
            return min(self.steps, total)
        return total if total < FEW_UNTRAINED else max(LEAST_COMPUTED, -(-QUALITIES[self.quality] * total // 50))

    def computed_in(self, run_sigmas: Sequence[float]) -> frozenset[int]:
        """The steps to compute in a run with the noise levels `run_sigmas`; see `falling_levels`."""
        total = len(run_sigmas)
        return frozenset(Schedule.spread(self.count_of(total), total, falling_levels(run_sigmas)).steps)


ScheduleLike = Schedule | int | Iterable[int]


def as_schedule(schedule: ScheduleLike, num_inference_steps: int | None = None) -> Schedule:
    """A `Schedule` from any form that users may pass.

    Args:
        schedule: a `Schedule`, a list of computed steps, or an interval N for steps 0, 1, 2 and then every N.
        num_inference_steps: number of steps of the run; needed for an interval.

    Raises:
        TypeError, ValueError: it is something else. The message says what it must be.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Iterable) and not isinstance(schedule, (str, bytes)):
        return Schedule(tuple(schedule))
    interval = check_int("schedule", schedule)
    return Schedule.interval(interval, check_int("num_inference_steps", num_inference_steps))


def schedule_of(config: "PredictorConfig") -> Schedule | None:
    """The schedule that a predictor was trained for, with its noise levels; None if there was none."""
    if config.schedule is None:
        return None
    return Schedule(config.schedule, config.num_inference_steps, config.schedule_sigmas)
