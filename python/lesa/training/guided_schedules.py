"""Random schedules around a given one, for the guided phase of a training on computed steps only."""

import math
from collections.abc import Sequence, Set

import torch

from lesa.cache.error_control import ControlledSteps, ErrorControl
from lesa.schedule import Schedule

STRETCHES, STRETCH_SPREAD = (0.5, 1.4), 0.3
"""For error control: the range of a schedule's gaps relative to the given ones, and how much gaps of it differ."""


def moved_steps(computed: Sequence[int], total: int, generator: torch.Generator, reach: int) -> Set[int]:
    """The computed steps, each but the first moved by at most `reach`.

    Args:
        computed: the steps of the schedule, rising.
        total: number of steps of the run.
        generator: of the moves.
        reach: by how many steps at most.
    """
    moves = torch.randint(-reach, reach + 1, (len(computed),), generator=generator).tolist()
    return {0} | {min(max(step + move, 1), total - 1) for step, move in zip(computed[1:], moves)}


def stretched_steps(schedule: Schedule, sigmas: Sequence[float], generator: torch.Generator) -> Set[int]:
    """Computed steps such as error control chooses: their gaps are random around a length that is random too.

    Args:
        schedule: the schedule whose gaps are stretched, with its noise levels.
        sigmas: noise levels of the run, falling.
        generator: of the lengths.
    """
    steps = ControlledSteps(ErrorControl(longest=len(sigmas)), schedule, (), sigmas)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float32).item()

    middle = uniform(*map(math.log, STRETCHES))
    while max(steps.chosen) < len(sigmas):
        steps.add(math.exp(middle + uniform(-STRETCH_SPREAD, STRETCH_SPREAD)))
    chosen = steps.chosen - {len(sigmas)}
    return chosen if len(chosen) < len(sigmas) else chosen - {len(sigmas) - 1}  # something is left to predict
