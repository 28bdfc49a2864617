"""Chooses the computed steps by runs of the pipeline with a predictor that was trained on many schedules."""

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lesa.artifacts import output_folder, read_json, remove_partial, write_text
from lesa.fitting.comparing import LatentRuns
from lesa.fitting.schedule_family import Steps, family, moved
from lesa.models import adapter_for, features_device
from lesa.processes import Processes
from lesa.schedule import Schedule
from lesa.training.end_to_end import trained_end_to_end
from lesa.training.end_to_end_run import Loss
from lesa.training.end_to_end_settings import EndToEndSettings
from lesa.training.gradient_checks import TrainingFailedError
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import usage_error

POOL = 4
"""So many of the best schedules so far are moved on."""

MOST_MOVES = 3
"""How many times a step of a schedule is moved for one step of the optimiser, at most."""

PREDICTOR, TRIALS = "predictor", "trials.json"

_DRAWS = 200
"""So many schedules in a row that were tried before end the search: there are hardly others."""


@dataclass(frozen=True)
class SearchInRuns:
    """Trains one predictor on many schedules, and compares schedules by its runs.

    Args:
        pipe: the pipeline.
        inputs: of the samples to train on: dicts of pipeline arguments. Sample i starts from noise of seed `seed + i`.
        num_inference_steps: passed to the pipeline.
        levels: the noise levels of the steps that a run executes.
        count: how many of them are computed.
        candidates: schedules that are tried beside those of the family.
        trial_runs: with which schedules are compared.
        samples_per_call: samples per call of the pipeline.
        seed: of sample 0, and of all choices.
        folder: for what is made on the way. A search that was interrupted continues there.
        processes: those that share the runs.
    """

    pipe: Any
    inputs: list[dict]
    num_inference_steps: int
    levels: tuple[float, ...]
    count: int
    candidates: Sequence[Steps]
    trial_runs: LatentRuns
    samples_per_call: int
    seed: int
    folder: Path
    processes: Processes

    @cached_property
    def schedules(self) -> list[Steps]:
        """Those that are tried first: the family and the candidates, each of them once."""
        return [*dict.fromkeys([*family(self.count, self.levels), *self.candidates])]

    def learned(
        self,
        predictor: FusedKANPredictor,
        updates: int,
        batch_size: int,
        references: Path,
        loss: Loss,
        bar: str | None = None,
    ) -> FusedKANPredictor:
        """A predictor that is trained through whole runs, on another schedule in each step of the optimiser.

        Args:
            predictor: where the training begins.
            updates: steps of the optimiser.
            batch_size: samples for each of them.
            references, loss, bar: see `trained_end_to_end`.
        """
        settings = EndToEndSettings(
            self.num_inference_steps, updates, batch_size, self.samples_per_call, seed=self.seed
        )
        total = len(self.levels)
        return trained_end_to_end(
            predictor,
            self.pipe,
            self.inputs,
            settings,
            self.processes.in_all(lambda: output_folder(self.folder / PREDICTOR)),
            self.processes,
            references=references,
            loss=loss,
            schedule_for=lambda update: schedule_at(
                drawn_schedule(self.schedules, total, self.seed, update), self.levels
            ),
            bar=bar,
        )

    def best(self, learned: FusedKANPredictor, moves: int, bar: tqdm | None = None) -> Schedule:
        """The schedule with which the runs of a predictor are best, of all that are tried.

        Args:
            learned: what `learned` has made.
            moves: how many schedules are tried beside those that are tried first.
            bar: moves after each trial.

        Raises:
            RuntimeError: with no schedule it has a PSNR.
        """
        self.trial_runs.make_references()
        placed = copy.deepcopy(learned).to(features_device(self.pipe, adapter_for(self.pipe)))
        trials = _Trials(self.folder / TRIALS, self.processes)

        def psnr(steps: Steps) -> float:
            placed.config = config_for(placed, schedule_at(steps, self.levels))
            found = trials.figure(steps, lambda: self.trial_runs.errors(placed).psnr)
            if bar is not None:
                bar.update()
            return found

        steps, figure = best_schedule(self.schedules, len(self.levels), psnr, moves, self.seed)
        if figure == -math.inf:
            raise usage_error(
                "No schedule was found: in all runs with the predictor there is NaN, or steps are computed that were "
                "to be predicted.",
                "Check that the pipeline without a cache gives finite latents, and read the warnings above.",
                TrainingFailedError,
            )
        return schedule_at(steps, self.levels)

    def tried(self) -> dict[str, float]:
        """The mean PSNR of the latents with each schedule that was tried, in dB. Each name is a schedule: "0,2,5"."""
        return self.processes.by_first(_Trials(self.folder / TRIALS, self.processes).read)


def schedule_at(steps: Sequence[int], levels: Sequence[float]) -> Schedule:
    """The schedule of these computed steps, with their noise levels, in a run whose steps have `levels`."""
    return Schedule(tuple(steps), len(levels), tuple(levels[step] for step in steps))


def config_for(predictor: FusedKANPredictor, schedule: Schedule) -> PredictorConfig:
    """The predictor's configuration with another schedule."""
    return replace(
        predictor.config,
        num_inference_steps=schedule.num_inference_steps,
        schedule=schedule.steps,
        schedule_sigmas=schedule.sigmas,
        schedule_errors=None,
        told_levels=None,
        more_step_counts=None,
    )


class _Trials:
    """How good the schedules are that were tried, in a file.

    Args:
        file: its path.
        processes: those that share the runs. The first one writes.
    """

    def __init__(self, file: Path, processes: Processes):
        self.file, self.processes = file, processes

    def figure(self, steps: Steps, measure: Callable[[], Sequence[float]]) -> float:
        """The mean of what `measure` gives, unless it is known already. All processes must call this."""
        name = ",".join(map(str, steps))
        found = self.processes.by_first(lambda: self.read().get(name))
        if found is None:
            values = measure()
            found = sum(values) / len(values)
            self.processes.by_first(lambda: write_text(self.file, json.dumps({**self.read(), name: found}) + "\n"))
        return found

    def read(self) -> dict[str, float]:
        """What is known, by the steps of the schedule."""
        remove_partial(self.file)
        return read_json(self.file) or {}  # a damaged one is made again


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
) -> tuple[Steps, float]:
    """The best of all schedules that are tried, and its quality: first those given, and then others near the best ones.

    Each of the latter is one of the four best schedules so far, with one or two moves of a step.

    Args:
        schedules: those to begin with, each of them once.
        total: steps of a run.
        quality: of a schedule; NaN counts as minus infinity.
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
    best = max(tried, key=tried.__getitem__)
    return best, tried[best]
