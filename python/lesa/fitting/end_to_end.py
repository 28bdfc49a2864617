"""A predictor for one budget that is also trained through whole runs, on computed steps that were chosen by runs."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lesa.artifacts import output_folder
from lesa.fitting.amounts import EndToEndAmounts
from lesa.fitting.comparing import LatentRuns
from lesa.fitting.one_budget import Fitted, OneBudget
from lesa.fitting.schedule_in_runs import SearchInRuns, config_for
from lesa.schedule import Schedule
from lesa.training.end_to_end import trained_end_to_end
from lesa.training.end_to_end_settings import EndToEndSettings
from lesa.training.gradient_checks import NoGradientError, TrainingFailedError
from lesa.training.trainer import with_typical_errors
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import FORECASTERS

_FITTED = next(name for name, forecaster in FORECASTERS.items() if forecaster.is_fitted)
"""The mixer that is fitted in closed form, for which a search on recordings takes little time."""


@dataclass(frozen=True)
class ThroughRuns:
    """What trainings through whole runs need, for all budgets.

    Args:
        amounts: how much work there is.
        loss: what compares the ends of the runs; see `lesa.train_end_to_end`.
        inputs: of the samples to train on. Sample i has the seed of the recorded one.
        levels: the noise levels of the steps that a run executes.
        trials: the runs with which schedules are compared.
        references: folder of the runs with all steps, which were made before.
    """

    amounts: EndToEndAmounts
    loss: str
    inputs: list[dict]
    levels: tuple[float, ...]
    trials: LatentRuns
    references: Path


@dataclass(frozen=True)
class _Stage:
    """A predictor on the way.

    Args:
        name: of it.
        predictor: on the CPU.
        psnr: the mean of the validation, in dB.
        facts: what led to it, as the model card says it.
    """

    name: str
    predictor: FusedKANPredictor
    psnr: float
    facts: dict[str, Any]


class EndToEndBudget(OneBudget):
    """Makes the predictor for one budget as `OneBudget` does, and goes on from it.

    First the computed steps are chosen by runs: see `SearchInRuns`. If they are others, a predictor is trained on the
    recorded features for them, and refined in one round. Of all predictors for these steps, the one that is best on the
    validation samples is trained through whole runs. What fails of this is left out, with a warning.

    Args:
        arguments: those of `OneBudget`.
        through_runs: what the trainings through whole runs need.
    """

    def __init__(self, *arguments: Any, through_runs: ThroughRuns):
        super().__init__(*arguments)
        self.through_runs, self.again = through_runs, self.folder / "again"

    def fit(self) -> Fitted:
        """The predictor that is best on the validation samples, of those of the rounds and of all later ones.

        Raises:
            RuntimeError: see `OneBudget.fit`.
        """
        plain, rounds, figures = self._best_round()
        made = self._made(rounds, figures)
        first = _Stage("rounds", plain, figures[rounds], {name: made[name] for name in ("samples", "rounds")})
        starts = self._attempted(
            "the choice of computed steps by runs", self._starts_steps, lambda: self._starts(first)
        )
        start = _best(starts or [first])
        ends = self._attempted("the training on the chosen steps", self._end_steps, lambda: [self._end(start)])
        stages = [first, *(each for each in starts if each.name != first.name), *ends]
        best = _best(stages)
        facts = {
            "end_to_end": True,
            "loss": self.through_runs.loss,
            "validation_by_stage": {each.name: each.psnr if math.isfinite(each.psnr) else None for each in stages},
            "stage": best.name,
        }
        predictor = best.predictor
        if predictor.config.schedule_errors is None:
            trajectories, device = self._joined(self.amounts.samples), self.device
            predictor = self.processes.by_first(lambda: with_typical_errors(best.predictor, trajectories, device))
        return Fitted(predictor, {**made, **facts, **best.facts})

    @property
    def _starts_steps(self) -> int:
        """Of the bar, for `_starts`."""
        learning = self.work.learning_steps(self.through_runs.amounts.schedule_updates)
        tried = self.work.fitted_steps(self.budget) + self.work.trial_steps(self.budget)
        return learning + tried + self.work.again_steps + 3 * self.work.validation_steps

    @property
    def _end_steps(self) -> int:
        """Of the bar, for `_end`."""
        return self.work.learning_steps(self.through_runs.amounts.updates) + self.work.validation_steps

    def _attempted(self, what: str, steps: int, make: Callable[[], list[_Stage]]) -> list[_Stage]:
        """What `make` gives; nothing, and a warning, if it fails: the predictor of the rounds is there in any case.

        Args:
            what: in words, what it does.
            steps: of the bar.
            make: makes predictors.
        """
        end = self.bar.done + steps
        try:
            return make()
        except (TrainingFailedError, NoGradientError) as error:  # which all processes have
            if self.processes.is_first:
                reason, _, _ = str(error).partition(". ")  # the rest is advice for other functions
                text = f"lesa: for `budget` {self.budget}, `lesa.fit` goes on without {what}, which says: {reason}."
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            self.bar.skip(end - self.bar.done)
            return []

    def _starts(self, first: _Stage) -> list[_Stage]:
        """The predictors for the computed steps that runs choose, and what led to them."""
        plain, amounts = first.predictor, self.through_runs.amounts
        search = self._search(plain)
        learned, schedule = self._learned(search, plain)
        facts: dict[str, Any] = {
            "schedules_tried": len(search.tried()),
            "updates_on_schedules": amounts.schedule_updates,
        }
        facts |= {"samples_end_to_end": len(self.through_runs.inputs), "samples_per_update": amounts.batch_size}
        starts = [self._stage("schedules", learned, {**first.facts, **facts, "began_from": first.name})]
        if schedule.steps == plain.config.schedule:
            self.bar.skip(self.work.again_steps + 2 * self.work.validation_steps)
            return [*starts, replace(first, facts={**first.facts, **facts})]
        steps = self.work.again_steps + 2 * self.work.validation_steps
        return starts + self._attempted("another training", steps, lambda: self._again(schedule, facts))

    def _end(self, start: _Stage) -> _Stage:
        """The predictor after the training through whole runs on the chosen steps."""
        amounts = self.through_runs.amounts
        facts: dict[str, Any] = {"updates_end_to_end": amounts.updates, "samples_per_update": amounts.batch_size}
        facts |= {"samples_end_to_end": len(self.through_runs.inputs), "began_from": start.name}
        predictor = self._through_whole_runs(start)
        psnr = self._quality(f"end to end from {start.name}", predictor)
        return _Stage("end to end", predictor, psnr, {**start.facts, **facts})

    def _search(self, plain: FusedKANPredictor) -> SearchInRuns:
        """The search for the computed steps. Those that are found on recorded runs are tried too."""
        trajectories = self._joined(self.amounts.samples)
        fitted = PredictorConfig(trajectories.feature_dim, mixer=_FITTED)
        with self.bar.part(f"{self.budget} steps, search for {_FITTED}", self.work.fitted_steps(self.budget)):
            candidates = [plain.config.schedule, self._schedule(trajectories, self.folder / _FITTED, fitted).steps]
        given = self.through_runs
        return SearchInRuns(
            self.pipe,
            given.inputs,
            self.samples.num_inference_steps,
            given.levels,
            self.budget,
            [steps for steps in candidates if steps is not None],
            given.trials,
            self.samples.batch_size,
            self.seed,
            self.folder / "schedules",
            self.processes,
        )

    def _learned(self, search: SearchInRuns, plain: FusedKANPredictor) -> tuple[FusedKANPredictor, Schedule]:
        """The predictor that was trained on many schedules, for the best one of them; and this one."""
        given = self.through_runs
        amounts = given.amounts
        steps = self.work.learning_steps(amounts.schedule_updates)
        with self.bar.part(f"{self.budget} steps, train on many schedules", steps):
            options = (amounts.schedule_updates, amounts.batch_size, given.references, given.loss)
            learned = search.learned(plain, *options)
        with self.bar.part(f"{self.budget} steps, compare schedules", self.work.trial_steps(self.budget)):
            schedule = search.best(learned, amounts.moves)
        learned.config = config_for(learned, schedule)
        return learned, schedule

    def _again(self, schedule: Schedule, facts: dict[str, Any]) -> list[_Stage]:
        """Predictors that are trained on recorded features for other steps than before, and then refined.

        Args:
            schedule: these steps.
            facts: what led to them.
        """
        trajectories = self._joined(self.amounts.samples)
        with self.bar.part(f"{self.budget} steps, train again", self.work.again_steps):
            trained = self._trained_on(trajectories, schedule, self.again / "trained")
            refined = self._refined_on(trajectories, self.again, 1, [trained])
        facts = {**facts, "samples": self.amounts.samples}
        return [
            self._stage("trained again", trained, {**facts, "rounds": 0}),
            self._stage("refined again", refined, {**facts, "rounds": 1}),
        ]

    def _through_whole_runs(self, start: _Stage) -> FusedKANPredictor:
        """The predictor after the training through whole runs, in a folder for this start of it."""
        given, samples = self.through_runs, self.samples
        amounts = given.amounts
        with self.bar.part(f"{self.budget} steps, train end to end", self.work.learning_steps(amounts.updates)):
            return trained_end_to_end(
                start.predictor,
                self.pipe,
                given.inputs,
                EndToEndSettings(
                    samples.num_inference_steps, amounts.updates, amounts.batch_size, samples.batch_size, seed=self.seed
                ),
                self.processes.in_all(lambda: output_folder(self.folder / f"end-to-end-from-{start.name}")),
                self.processes,
                references=given.references,
                loss=given.loss,
            )

    def _stage(self, name: str, predictor: FusedKANPredictor, facts: dict[str, Any]) -> _Stage:
        return _Stage(name, predictor, self._quality(name, predictor), facts)


def _best(stages: Sequence[_Stage]) -> _Stage:
    """The one with the largest PSNR; of equal ones, the first. NaN is smaller than all numbers."""
    return max(stages, key=lambda each: -math.inf if math.isnan(each.psnr) else each.psnr)
