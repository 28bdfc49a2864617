"""`find_schedule_in_runs`: chooses the computed steps by runs of the pipeline with a trained predictor."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lesa.artifacts import read_json, remove_partial, write_text
from lesa.fitting.comparing import LatentRuns
from lesa.fitting.schedule_family import Steps, moved
from lesa.processes import Processes
from lesa.schedule import Schedule
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import usage_error

POOL = 4
"""So many of the best schedules so far are moved on."""

MOST_MOVES = 3
"""How many times a step of a schedule is moved for one step of the optimiser, at most."""

_DRAWS = 200
"""So many schedules in a row that were tried before end the search: there are hardly others."""


def drawn_schedule(schedules: Sequence[Steps], total: int, seed: int, number: int) -> Steps:
    """The schedule for one step of the optimiser: one of those given, with 0 to 3 moves of a step.

    Args:
        schedules: those to choose from.
        total: steps of a run.
        seed: of the choices.
        number: of the step of the optimiser. The schedule depends on it and on the seed alone.
    """
    rng = random.Random(f"{seed} {number}")
    steps = rng.choice(schedules)
    return moved(steps, total, rng.randint(0, MOST_MOVES), rng) or steps


def best_schedule(
    schedules: Sequence[Steps], total: int, quality: Callable[[Steps], float], moves: int, seed: int
) -> Steps:
    """The best of all schedules that were tried: first those given, and then others near the best ones.

    Each of the latter is one of the four best schedules so far, with one or two moves of a step.

    Args:
        schedules: those to begin with, each of them once.
        total: steps of a run.
        quality: of a schedule; NaN is worse than all numbers.
        moves: how many others are tried.
        seed: of the choices.
    """
    tried: dict[Steps, float] = {}

    def try_(steps: Steps) -> None:
        found = quality(steps)
        tried[steps] = -math.inf if math.isnan(found) else found

    for steps in schedules:
        try_(steps)
    rng = random.Random(str(seed))
    for _ in range(moves):
        pool = sorted(tried, key=tried.__getitem__, reverse=True)[:POOL]  # of equal ones, the first stays first
        others = (moved(rng.choice(pool), total, rng.choice((1, 1, 2)), rng) for _ in range(_DRAWS))
        other = next((steps for steps in others if steps is not None and steps not in tried), None)
        if other is None:
            break
        try_(other)
    return max(tried, key=tried.__getitem__)


class Trials:
    """How good a predictor is with other schedules. What was found is kept in a file.

    Args:
        predictor: on the pipeline's device.
        runs: with which schedules are compared.
        levels: the noise levels of the steps of a run.
        file: of the figures.
        processes: those that share the samples.
        on_trial: called after each trial.
    """

    def __init__(
        self,
        predictor: FusedKANPredictor,
        runs: LatentRuns,
        levels: Sequence[float],
        file: Path,
        processes: Processes,
        on_trial: Callable[[], object],
    ):
        self.predictor, self.runs, self.levels, self.file = predictor, runs, levels, file
        self.processes, self.on_trial = processes, on_trial

    def psnr(self, steps: Steps) -> float:
        """The mean PSNR of the latents against those of all steps, in dB.

        It is NaN if a step was computed that was to be predicted.
        """
        name = ",".join(map(str, steps))
        found = self.processes.by_first(lambda: self._read().get(name))
        if found is None:
            self.predictor.config = replace(
                self.predictor.config,
                schedule=steps,
                num_inference_steps=len(self.levels),
                schedule_sigmas=tuple(self.levels[step] for step in steps),
                schedule_errors=None,
            )
            psnr = self.runs.errors(self.predictor).psnr
            found = sum(psnr) / len(psnr)
            self.processes.by_first(lambda: self._keep(name, found))
        self.on_trial()
        return found

    def _keep(self, name: str, psnr: float) -> None:
        write_text(self.file, json.dumps({**self._read(), name: psnr}) + "\n")

    def _read(self) -> dict[str, float]:
        remove_partial(self.file)
        return read_json(self.file) or {}  # a damaged one is made again
