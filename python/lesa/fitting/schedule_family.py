"""A family of simple schedules, and schedules near given ones."""

import random
from collections.abc import Sequence

from lesa.schedule import Schedule, falling_levels, parts_of_run, steps_between

RISE, FALL = (0.3, 0.5, 0.7, 0.9, 1.2), (0.0, 0.2, 0.4, 0.6)
"""The powers p and q of the family."""

REACH = 2
"""By how many steps one computed step is moved, at most."""

Steps = tuple[int, ...]


def family(count: int, levels: Sequence[float]) -> list[Steps]:
    """Simple schedules, each of them once: the default schedule, then those of two powers.

    Of n computed steps, gap j (0, ..., n - 1; the last one ends with the run) has the relative length `x^p (1 - x)^q`
    with `x = (j + 1/2) / n`. The gaps become longer during the run, and with q above 0 shorter again at its end. For
    each p in 0.3, 0.5, 0.7, 0.9, 1.2 and each q in 0, 0.2, 0.4, 0.6 there are two schedules. One has lengths in noise
    levels. The other has lengths in the mean of two parts of the run, that of its steps and that of its noise levels,
    as `Schedule.spread` has. If the noise levels fall evenly, both are the same.

    Args:
        count: how many steps are computed, at least 2 and fewer than the run has.
        levels: the noise levels of the steps of the run.
    """
    levels, total = falling_levels(levels), len(levels)
    measures = [1 - level / levels[0] for level in levels], parts_of_run(levels)
    found = {Schedule.spread(count, total, levels).steps: None}
    middles = [(j + 0.5) / count for j in range(count)]
    for p in RISE:
        for q in FALL:
            lengths = [x**p * (1 - x) ** q for x in middles]
            found |= {steps_between(lengths, parts): None for parts in measures}
    return [*found]


def moved(steps: Steps, total: int, moves: int, rng: random.Random) -> Steps | None:
    """The schedule with steps moved by 1 or 2, chosen at random; None if two would meet or one would leave the run.

    Args:
        steps: the computed steps.
        total: of the run.
        moves: how many times a step is moved. Step 0 stays.
        rng: makes the choices.
    """
    others = [*steps]
    for _ in range(moves):
        others[rng.randrange(1, len(others))] += rng.choice([by for by in range(-REACH, REACH + 1) if by])
    others.sort()
    is_valid = others[1] > 0 and others[-1] < total and len({*others}) == len(others)
    return tuple(others) if is_valid else None
