"""A predictor for one budget: search of the schedule, training, and rounds of refining while they gain."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lesa.artifacts import read_json, remove_partial, write_text
from lesa.fitting.amounts import Amounts
from lesa.fitting.bar import Bar, CountedSearch
from lesa.fitting.comparing import LatentRuns
from lesa.fitting.planning import Work
from lesa.fitting.samples import Samples
from lesa.processes import Processes
from lesa.schedule import Schedule
from lesa.training.batches import passes
from lesa.training.joined import JoinedRollOuts, JoinedTrajectories
from lesa.training.refinement import MOST_LEARNING_RATE, RollOuts, refined
from lesa.training.schedule_search import found_schedule
from lesa.training.settings import TrainingSettings, spread_over, usable_device
from lesa.training.trainer import train
from lesa.training.training_run import is_finished
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import usage_error
from lesa_kernels.torch_modes import default_modes

FIGURES, SCHEDULE = "validation.json", "schedule.json"


@dataclass(frozen=True)
class Fitted:
    """A predictor, and how it was made.

    Args:
        predictor: on the CPU.
        made: facts, in types that JSON has.
    """

    predictor: FusedKANPredictor
    made: dict[str, Any]


class OneBudget:
    """Makes the predictor for one budget.

    Args:
        budget: how many steps it computes.
        samples: to train on.
        validation: the runs with which the predictors of the rounds are compared.
        folder: for all that is made on the way.
        amounts: how much work there is at most.
        work: how many steps of the bar each part has.
        bar: shows the progress.
        processes: those that share the samples.
    """

    def __init__(
        self,
        budget: int,
        samples: Samples,
        validation: LatentRuns,
        folder: Path,
        amounts: Amounts,
        work: Work,
        bar: Bar,
        processes: Processes,
    ):
        self.budget, self.samples, self.validation, self.folder = budget, samples, validation, folder
        self.amounts, self.work, self.bar, self.processes = amounts, work, bar, processes
        self.pipe, self.seed = samples.pipe, samples.seed
        self.device = usable_device(self.pipe._execution_device)

    def fit(self) -> Fitted:
        """The predictor of the round that is best on the validation samples.

        The first round has the samples of the first training, and each later one has twice as many as the one before,
        up to the most. A round that gains less than `amounts.gain` is the last one. So neither samples nor rounds are
        added where they gain nothing.

        Raises:
            RuntimeError: the predictor of the first training has no PSNR, so there is nothing to choose.
        """
        predictor, number, figures = self._best_round()
        return Fitted(predictor, self._made(number, figures))

    def _best_round(self) -> tuple[FusedKANPredictor, int, list[float]]:
        """The predictor of the best round, the number of this round, and the mean PSNR of all; see `fit`."""
        self.processes.by_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        predictor = self._trained()
        best, best_number = predictor, 0
        figures, before = [self._quality("0", predictor)], [predictor]
        if math.isnan(figures[0]):
            raise usage_error(
                f"`fit` has no predictor for `budget` {self.budget}: on the validation samples it makes NaN, or steps "
                "are computed that were to be predicted.",
                "Check that the pipeline without a cache gives finite latents, for example in bfloat16, and read the "
                "warnings above. Then fit with a larger `budget` or another `seed`, into another folder.",
                RuntimeError,
            )
        for number in range(1, self.amounts.rounds + 1):
            predictor = self._refined(number, before)
            figures.append(self._quality(str(number), predictor))
            gain = figures[number] - figures[best_number]
            if gain > 0:
                best, best_number = predictor, number
            if not gain >= self.amounts.gain:
                break
            before.append(predictor)
        self.bar.skip(sum(self.work.round_steps(left) for left in range(len(figures), self.amounts.rounds + 1)))
        return best, best_number, figures

    def _made(self, best: int, figures: list[float]) -> dict[str, Any]:
        return {
            "samples": self.amounts.samples_of(max(best, 1)),
            "rounds": best,
            "updates": self.amounts.updates,
            "updates_per_round": self.amounts.round_updates,
            "tokens_per_sample": self.samples.tokens,
            "num_inference_steps": self.samples.num_inference_steps,
            "batch_size": self.samples.batch_size,
            "seed": self.seed,
            "validation_samples": self.amounts.validation_samples,
            "validation_psnr": [figure if math.isfinite(figure) else None for figure in figures],
        }

    def _trained(self) -> FusedKANPredictor:
        """The predictor of the first training."""
        trajectories = self._joined(self.amounts.samples)
        with self.bar.part(f"{self.budget} steps, search", self.work.search_steps(self.budget)):
            schedule = self._schedule(trajectories, self.folder)
        with self.bar.part(f"{self.budget} steps, train", self.work.training_steps):
            return self._trained_on(trajectories, schedule, self.folder / "trained")

    def _trained_on(self, trajectories: JoinedTrajectories, schedule: Schedule, out_dir: Path) -> FusedKANPredictor:
        """A predictor that is trained on recorded features for a schedule."""
        if self.processes.by_first(lambda: is_finished(out_dir)):
            return FusedKANPredictor.from_pretrained(out_dir)
        return train(
            trajectories,
            schedule=schedule,
            out_dir=out_dir,
            epochs=self._passes(trajectories, self.amounts.updates),
            batch_size=self.amounts.batch_size,
            tokens_per_batch=self.amounts.tokens_per_batch,
            validation_fraction=0.0,
            seed=self.seed,
            device=self.device,
            progress=False,
        )

    def _passes(self, trajectories: JoinedTrajectories, updates: int) -> int:
        """In how many passes over all trajectories the optimiser takes about so many steps."""
        settings = TrainingSettings(batch_size=self.amounts.batch_size, validation_fraction=0.0)
        return passes(trajectories, updates, settings)

    def _schedule(
        self, trajectories: JoinedTrajectories, folder: Path, config: PredictorConfig | None = None
    ) -> Schedule:
        """The computed steps that a search on recorded runs finds, or has found.

        Of a pipeline with two transformers, for which there is no search, they are spread.

        Args:
            trajectories: the recorded runs.
            folder: of this search.
            config: of the predictor; None for the default.
        """
        if trajectories.switch is not None:
            return spread_over(trajectories, self.budget)
        return Schedule(tuple(self.processes.by_first(lambda: self._found(trajectories, folder, config))))

    def _found(self, trajectories: JoinedTrajectories, folder: Path, config: PredictorConfig | None) -> list[int]:
        """The steps that the search finds, which are kept in a file. Only the first process calls this."""
        file = folder / SCHEDULE
        steps: list[int] | None = read_json(file)
        if steps is None:
            folder.mkdir(parents=True, exist_ok=True)
            search = CountedSearch(folder, {"trajectories": trajectories.manifest, "budget": self.budget})
            search.on_part = self.bar.step
            with default_modes():
                found = found_schedule(trajectories, self.budget, config, self.seed, self.device, False, search)
            steps = [*found.steps]
            write_text(file, json.dumps(steps) + "\n")
        return steps

    def _refined(self, number: int, before: list[FusedKANPredictor]) -> FusedKANPredictor:
        """The predictor of a round, which is made from those of all rounds before it."""
        trajectories = self._joined(self.amounts.samples_of(number))
        with self.bar.part(f"{self.budget} steps, round {number}", self.work.refining_steps(number)):
            return self._refined_on(trajectories, self.folder, number, before)

    def _refined_on(
        self, trajectories: JoinedTrajectories, folder: Path, number: int, before: list[FusedKANPredictor]
    ) -> FusedKANPredictor:
        """What a round of refining makes, with its roll-outs in a folder."""
        latest = before[-1]
        forecaster = latest.config.forecaster
        roll_outs = [
            self._rolled_out(trajectories, folder / f"roll-outs-{place}", predictor)
            for place, predictor in enumerate(before)
        ]
        settings = TrainingSettings(
            epochs=self._passes(trajectories, self.amounts.round_updates),
            batch_size=self.amounts.batch_size,
            tokens_per_batch=self.amounts.tokens_per_batch,
            learning_rate=min(MOST_LEARNING_RATE, forecaster.learning_rate),
            head_aware=forecaster.head_aware,
            validation_fraction=0.0,
            seed=self.seed,
        )
        out_dir = folder / f"round-{number}"
        return self.processes.by_first(
            lambda: refined(latest, trajectories, roll_outs, settings, out_dir=out_dir, device=self.device)
        )

    def _rolled_out(
        self, trajectories: JoinedTrajectories, folder: Path, predictor: FusedKANPredictor
    ) -> JoinedRollOuts:
        """Roll-outs of a predictor on all parts of the recording. Those of an earlier round are there already."""
        parts, size = [], self.samples.batch_size
        for number, part in enumerate(trajectories.parts):
            inputs = self.samples.inputs_of(*self.samples.bounds(number))
            parts.append(RollOuts(part, predictor, self.pipe, inputs, folder / f"part-{number}", size))
        return JoinedRollOuts(parts)

    def _joined(self, count: int) -> JoinedTrajectories:
        missing = self.samples.missing(count)
        with self.bar.part("record", self.work.recording_steps(missing)):
            return self.samples.joined(count)

    def _quality(self, name: str, predictor: FusedKANPredictor) -> float:
        """The mean PSNR of the latents on the validation samples, in dB. NaN counts as no gain.

        It is NaN too if a step was computed that was to be predicted.

        Args:
            name: of the predictor. That of a round is its number.
            predictor: whose runs are compared.
        """
        figures: dict[str, float] = self.processes.by_first(self._read_figures)
        with self.bar.part(f"{self.budget} steps, validate", self.work.validation_steps):
            if name not in figures:
                psnr = self.validation.errors(on_device(predictor, self.device)).psnr
                figures[name] = sum(psnr) / len(psnr)
                text = json.dumps(figures) + "\n"
                self.processes.by_first(lambda: write_text(self.folder / FIGURES, text))
        return figures[name]

    def _read_figures(self) -> dict[str, float]:
        file = self.folder / FIGURES
        remove_partial(file)
        return read_json(file) or {}  # a damaged one is made again


def on_device(predictor: FusedKANPredictor, device: torch.device) -> FusedKANPredictor:
    """A copy of the predictor on a device."""

    return copy.deepcopy(predictor).to(device)
