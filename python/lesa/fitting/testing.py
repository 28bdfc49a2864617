"""The test of finished predictors, on samples that served nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lesa.contenders import FewerSteps
from lesa.evaluation.evaluator import evaluate
from lesa.evaluation.picture import draw_comparison
from lesa.evaluation.result import EvaluatedRun, Evaluation, finite
from lesa.fitting.comparing import LatentRuns, Made
from lesa.fitting.probing import steps_to_ask_for
from lesa.inputs import steps_of
from lesa.pipelines import check_decodes
from lesa.schedule import Spread
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import UNTRAINED

FORMAT_VERSION = 1
"""Of `evaluation.json`."""

_FIGURES = ("whole_steps", "step_equivalents", "psnr", "ssim", "latent_psnr", "latent_error")


class Test:
    """Compares predictors with all steps, with a forecaster that needs no training, and with fewer steps.

    Figures are of pictures where the pipeline can make them, and else of latents. Times are left out: they differ from
    run to run, and the files of a fit do not.

    Args:
        runs: runs on the samples of the test.
        predictors: by budget, on the pipeline's device.
        folder: for unfinished work.
        executed: how many steps a run of all steps executes. With `strength`, they can be fewer than it is asked for.
        inputs_are_new: whether the inputs of the samples served nothing else.
    """

    def __init__(
        self,
        runs: LatentRuns,
        predictors: Mapping[int, FusedKANPredictor],
        folder: Path,
        executed: int,
        inputs_are_new: bool,
    ):
        self.runs, self.predictors, self.folder = runs, predictors, folder
        self.executed, self.inputs_are_new = executed, inputs_are_new
        self._pictured: Evaluation | None = None
        self._fewer: dict[int, FewerSteps] = {}

    def run(self) -> dict[int, dict[str, Any]]:
        """By budget, what `evaluation.json` holds."""
        if any(steps_of(item, budget) != budget for item in self.runs.inputs for budget in self.predictors):
            not_available = {FewerSteps.name: "the inputs set the steps themselves"}
        else:
            not_available = {}
            self._fewer = {budget: FewerSteps(self._asked(budget)) for budget in self.predictors}
        found = self._with_pictures() if decodes(self.runs.pipe) else self._of_latents()
        head = {
            "format_version": FORMAT_VERSION,
            "compared": "latents" if self._pictured is None else "pictures",
            "samples": len(self.runs.inputs),
            "inputs_are_new": self.inputs_are_new,
            "seed": self.runs.seed,
            "num_inference_steps": self.runs.steps,
            "not_available": not_available,
        }
        return {
            budget: {**head, "budget": budget, "schedule": self._schedule_of(budget), "runs": finite(found[budget])}
            for budget in self.predictors
        }

    def draw(self, budget: int, file: Path) -> None:
        """Draws the pictures of a budget's runs side by side, if there are pictures."""
        if self._pictured is not None:
            draw_comparison(self._of_budget(self._pictured, budget), self._pictured.images, file, timed=False)

    def _asked(self, budget: int) -> int:
        """The number of steps that a run without a cache is asked for, so that it executes `budget` of them."""
        return steps_to_ask_for(self.runs.pipe, self.runs.inputs, budget, self.runs.steps, self.executed)

    def _schedule_of(self, budget: int) -> list[int]:
        return [*(self.predictors[budget].config.schedule or ())]

    def _untrained(self) -> FusedKANPredictor:
        device: torch.device = next(next(iter(self.predictors.values())).parameters()).device
        return FusedKANPredictor(PredictorConfig(mixer=UNTRAINED)).to(device)

    def _with_pictures(self) -> dict[int, list[dict[str, Any]]]:
        contestants: dict[str, Any] = {_label(budget): each for budget, each in self.predictors.items()}
        untrained = self._untrained()
        contestants |= {_label(budget, UNTRAINED): (untrained, Spread(budget)) for budget in self.predictors}
        runs = self.runs
        self._pictured = evaluation = evaluate(
            runs.pipe,
            runs.inputs,
            contestants,
            [f"{FewerSteps.name}-{steps}" for steps in dict.fromkeys(each.steps for each in self._fewer.values())],
            runs.steps,
            runs.seed,
            runs.batch_size,
            self.folder,
            progress=False,
        )
        return {budget: [_as_dict(run) for run in self._of_budget(evaluation, budget)] for budget in self.predictors}

    def _of_budget(self, evaluation: Evaluation, budget: int) -> list[EvaluatedRun]:
        """The reference, the predictor, the forecaster without training, and fewer steps."""
        reference, *others = evaluation.runs
        fewer = str(self._fewer.get(budget))
        wanted = {_label(budget): 0, _label(budget, UNTRAINED): 1}
        found = {wanted[run.predictor]: run for run in others if run.predictor in wanted}
        for run in others:
            if run.predictor is None and run.name == fewer:
                found[2] = run
        return [reference, *(found[number] for number in sorted(found))]

    def _of_latents(self) -> dict[int, list[dict[str, Any]]]:
        runs = self.runs
        runs.make_references()
        found, total, untrained = {}, runs.steps, self._untrained()
        for budget, predictor in self.predictors.items():
            mixer = predictor.config.mixer
            found[budget] = [
                _measured("reference", "reference", total, runs.references),
                _measured(f"{mixer}-{budget}", mixer, total, runs.errors(predictor)),
                _measured(f"{UNTRAINED}-{budget}", UNTRAINED, total, runs.errors(untrained, Spread(budget))),
            ]
            if (fewer := self._fewer.get(budget)) is not None:
                made = runs.errors(steps=fewer.steps)
                found[budget].append(_measured(str(fewer), fewer.name, fewer.steps, made))
        return found


def decodes(pipe: Any) -> bool:
    """Whether a pipeline can make pictures from its latents."""
    try:
        check_decodes(pipe)
    except TypeError:
        return False
    return True


def _label(budget: int, mixer: str = "fitted") -> str:
    return f"{mixer}-{budget}"


def _as_dict(run: EvaluatedRun) -> dict[str, Any]:
    figures = {name: getattr(run, name) for name in _FIGURES}
    steps = {"steps": [*run.steps], "num_inference_steps": run.num_inference_steps}
    return {"name": run.name, "contender": run.contender, **steps, **figures, "per_sample": dict(run.per_sample)}


def _measured(name: str, contender: str, asked: int, made: Made) -> dict[str, Any]:
    """A run of which there are latents only.

    Args:
        name, contender: see `EvaluatedRun`.
        asked: the number of steps that the pipeline was asked for.
        made: what was measured.
    """
    errors: dict[str, Sequence[float]] = {"latent_psnr": made.psnr, "latent_error": made.latent_error}
    per_sample = {name: [*values] for name, values in errors.items() if values}
    means = {name: sum(values) / len(values) for name, values in per_sample.items()}
    counts = {"whole_steps": made.whole_steps, "step_equivalents": made.step_equivalents}
    figures = {**dict.fromkeys(_FIGURES), **counts, **means}
    steps = {"steps": [*made.steps], "num_inference_steps": asked}
    return {"name": name, "contender": contender, **steps, **figures, "per_sample": per_sample}
