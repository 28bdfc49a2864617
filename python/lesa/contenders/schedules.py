"""The schedules that are tried for a forecaster that needs no training."""

import math
from collections.abc import Iterable

from lesa.schedule import Schedule, Spread

INTERVALS = (3, 4)
"""How many steps are computed at the start, before every N-th step."""

WINDOWS = ((2, 5), (4, 3))
"""The first window and the number of steps at the start, for schedules with growing windows."""

FLEX = 0.25
"""The window grows by multiples of this, up to the length of the run: then the second window is the last one."""

SCHEDULES = (
    "by noise level; 3 or 4 steps and then every N-th, with the smallest N; 5 steps and then windows from 2 steps, or "
    "3 and then from 4, with the slowest growth; N and growth are those with the most computed steps within the budget"
)
"""`schedules_within` in words."""


def schedules_within(budget: int, total: int) -> list[Schedule | Spread]:
    """The schedules to try for a budget, those of `SCHEDULES`. No two are equal.

    Args:
        budget: how many steps may be computed.
        total: steps that a run executes.
    """
    found = [_most((Schedule.interval(n, total, first) for n in range(1, total + 1)), budget) for first in INTERVALS]
    for window, first in WINDOWS:
        flexes = [FLEX * multiple for multiple in range(math.ceil(total / FLEX) + 1)]
        found.append(_most((Schedule.windows(window, flex, total, first) for flex in flexes), budget))
    return [Spread(budget), *dict.fromkeys(schedule for schedule in found if schedule is not None)]


def _most(schedules: Iterable[Schedule], budget: int) -> Schedule | None:
    """The first of those that have the most steps within the budget; None if there is none."""
    return max((schedule for schedule in schedules if len(schedule) <= budget), key=len, default=None)
