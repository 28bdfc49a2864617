"""The test of finished predictors, on samples that served nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lesa.contenders import FewerSteps
from lesa.evaluation.evaluator import evaluate
from lesa.evaluation.picture import draw_comparison
from lesa.evaluation.result import EvaluatedRun, Evaluation, finite
from lesa.fitting.comparing import LatentRuns
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
    """

    def __init__(self, runs: LatentRuns, predictors: Mapping[int, FusedKANPredictor], folder: Path):
        self.runs, self.predictors, self.folder = runs, predictors, folder
        self._pictured: Evaluation | None = None

    def run(self) -> dict[int, dict[str, Any]]:
        """By budget, what `evaluation.json` holds."""
        found = self._with_pictures() if decodes(self.runs.pipe) else self._of_latents()
        head = {
            "format_version": FORMAT_VERSION,
            "compared": "latents" if self._pictured is None else "pictures",
            "samples": len(self.runs.inputs),
            "seed": self.runs.seed,
            "num_inference_steps": self.runs.steps,
        }
        return {
            budget: {**head, "budget": budget, "schedule": self._schedule_of(budget), "runs": finite(found[budget])}
            for budget in self.predictors
        }

    def draw(self, budget: int, file: Path) -> None:
        """Draws the pictures of a budget's runs side by side, if there are pictures."""
        if self._pictured is not None:
            draw_comparison(self._of_budget(self._pictured, budget), self._pictured.images, file, timed=False)

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
            [f"{FewerSteps.name}-{budget}" for budget in self.predictors],
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
        fewer = str(FewerSteps(budget))
        wanted = {_label(budget): 0, _label(budget, UNTRAINED): 1}
        found = {wanted[run.predictor]: run for run in others if run.predictor in wanted}
        for run in others:
            if run.predictor is None and run.name == fewer:
                found[2] = run
        return [reference, *(found[number] for number in sorted(found))]

    def _of_latents(self) -> dict[int, list[dict[str, Any]]]:
        runs = self.runs
        runs.make_references()
        found = {}
        total, untrained = runs.steps, self._untrained()
        for budget, predictor in self.predictors.items():
            mixer, plain = predictor.config.mixer, str(FewerSteps(budget))
            made = [
                _of_errors("reference", "reference", total, total, None),
                _of_errors(f"{mixer}-{budget}", mixer, budget, total, runs.errors(predictor)),
                _of_errors(f"{UNTRAINED}-{budget}", UNTRAINED, budget, total, runs.errors(untrained, Spread(budget))),
            ]
            if all(steps_of(item, budget) == budget for item in runs.inputs):
                made.append(_of_errors(plain, FewerSteps.name, budget, budget, runs.errors(steps=budget)))
            found[budget] = made
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


def _of_errors(
    name: str, contender: str, computed: int, total: int, errors: dict[str, list[float]] | None
) -> dict[str, Any]:
    """A run of which there are latents only. `errors` is None for the reference."""
    per_sample = {} if errors is None else {"latent_psnr": errors["psnr"], "latent_error": errors["latent_error"]}
    figures = {name: sum(values) / len(values) for name, values in per_sample.items()}
    return {
        "name": name,
        "contender": contender,
        "num_inference_steps": total,
        "whole_steps": float(computed),
        **dict.fromkeys(("psnr", "ssim", "latent_psnr", "latent_error")),
        **figures,
        "per_sample": per_sample,
    }
