"""All of a fit, from the first sample to the finished files."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from functools import partial
from typing import Any

from lesa.artifacts import output_folder, whole_file, write_text
from lesa.fitting import amounts as defaults
from lesa.fitting.amounts import Amounts, EndToEndAmounts
from lesa.fitting.bar import Bar
from lesa.fitting.card import base_model_of, write_card
from lesa.fitting.comparing import LatentRuns
from lesa.fitting.cost import FitCost, fit_cost, measured
from lesa.fitting.end_to_end import EndToEndBudget, ThroughRuns
from lesa.fitting.folder import FitFolder, settings_of
from lesa.fitting.one_budget import Fitted, OneBudget, on_device
from lesa.fitting.planning import Work
from lesa.fitting.probing import probed
from lesa.fitting.samples import TEST, VALIDATION, Samples, shares_of
from lesa.fitting.testing import Test, decodes
from lesa.models import adapters_for
from lesa.processes import Processes
from lesa.training.run_references import References
from lesa.training.settings import usable_device
from lesa.training.trajectories import Trajectories
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import argument_error

EVALUATION, PICTURE = "evaluation.json", "comparison.png"

_SECONDS = "first_sample_seconds"
_shows_figures = ContextVar("shows_figures", default=True)


@contextlib.contextmanager
def without_figures() -> Iterator[None]:
    """A context in which fits do not say how good the predictors are, because the caller does."""
    token = _shows_figures.set(False)
    try:
        yield
    finally:
        _shows_figures.reset(token)


class Fit:
    """One call of `fit`, with checked arguments.

    Args:
        pipe, inputs, num_inference_steps, batch_size, seed: see `fit`.
        given: how many inputs the user gave; None for the built-in prompts.
        folder: for the predictors, one for each budget.
        processes: those that share the samples.
        loss: of the training through whole runs; None without it.
    """

    def __init__(
        self,
        pipe: Any,
        inputs: list[dict],
        num_inference_steps: int,
        batch_size: int,
        seed: int,
        given: int | None,
        folder: FitFolder,
        processes: Processes,
        loss: str | None,
    ):
        self.pipe, self.inputs, self.num_inference_steps = pipe, inputs, num_inference_steps
        self.batch_size, self.seed, self.given, self.folder = batch_size, seed, given, folder
        self.processes, self.loss = processes, loss
        self.budgets, self.amounts = [*folder.places], defaults.AMOUNTS
        self.end_to_end = None if loss is None else defaults.END_TO_END
        self.shares = shares_of(inputs, self.amounts)
        self.executed_steps = num_inference_steps

    def run(self, progress: bool) -> dict[int, FusedKANPredictor]:
        """The predictors by budget, which are in the folder too."""
        with contextlib.ExitStack() as stack:
            self.processes.in_all(lambda: output_folder(self.folder.path))
            stack.enter_context(self.processes.owned(self.folder.path, "fitting"))
            settings = self._settings()
            self.processes.begin("lesa.fit", settings)
            self.processes.by_first(lambda: self.folder.check(settings))
            if not self.processes.by_first(lambda: self.folder.is_finished):
                bar = stack.enter_context(contextlib.closing(Bar(progress and self.processes.is_first)))
                self._make(settings, bar)
            self.processes.by_first(self.folder.finish)
            return {budget: FusedKANPredictor.from_pretrained(place) for budget, place in self.folder.places.items()}

    def _settings(self) -> dict[str, Any]:
        """All that must be the same for the fit to continue."""
        return settings_of(
            self.pipe,
            self.inputs,
            budget=self.budgets if self.folder.is_divided else self.budgets[0],
            seed=self.seed,
            batch_size=self.batch_size,
            num_inference_steps=self.num_inference_steps,
            amounts=asdict(self.amounts),
            end_to_end=self.end_to_end is not None,
            loss=self.loss,
            amounts_end_to_end=self.end_to_end and asdict(self.end_to_end),
        )

    def _make(self, settings: dict[str, Any], bar: Bar) -> None:
        """Makes all files of the predictors."""
        first = probed(self.pipe, self.inputs, self.num_inference_steps)
        self.executed_steps = first.steps
        for budget in self.budgets:
            if budget >= first.steps:
                must = f"be below the {first.steps} steps that a run of these inputs executes"
                raise argument_error("budget", must, budget, "Compute fewer steps.")
        size = {"flops": first.flops, "on_cpu": self.pipe.transformer.device.type == "cpu"}
        found = {"amounts": asdict(defaults.AMOUNTS.for_model(**size))}
        if self.end_to_end is not None:
            found["end_to_end"] = asdict(self.end_to_end.for_model(**size))
        facts = self.processes.by_first(lambda: self.folder.begin(settings, found))
        amounts = self.amounts = Amounts(**facts["amounts"])  # so that the fit can go on where others would be chosen
        if self.end_to_end is not None:
            self.end_to_end = EndToEndAmounts(**facts["end_to_end"])
        samples = Samples(
            self.pipe,
            self.shares.training,
            self.folder.work,
            self.num_inference_steps,
            min(amounts.tokens, first.tokens),
            self.batch_size,
            self.seed,
            amounts,
        )
        with bar.counting(adapter.transformer for adapter in adapters_for(self.pipe).values()):
            bar.plan(first.steps)
            with bar.part("record the first sample", first.steps):
                start = time.perf_counter()
                sample = samples.part(0)
                seconds = time.perf_counter() - start
            shared = (self.batch_size, self.processes.width)
            work = Work(amounts, first.steps, _calls(sample), *shared, self.end_to_end, first.sigmas)
            is_continued = not sample.recorded.new
            if not is_continued:
                facts[_SECONDS] = seconds
            self.processes.by_first(lambda: self.folder.keep(facts))
            if bar.is_shown and _SECONDS in facts:  # an earlier call may have ended before it kept them
                bar.say(self._cost(sample, facts[_SECONDS], work).text(is_continued, self.loss == "pixels"))
            bar.plan(work.all_steps(self.budgets))
            fitted = self._fitted(samples, work, bar)
            with bar.part("test", work.test_steps(len(fitted))):
                self._test(samples, fitted, bar)

    def _fitted(self, samples: Samples, work: Work, bar: Bar) -> dict[int, Fitted]:
        """The predictors, which are not tested yet."""
        validation = self._runs(self.shares.validation, VALIDATION, "validation")
        with bar.part("validate", work.validation_steps):
            validation.make_references()
        given = self._through_runs(samples, work, bar)
        fitted = {}
        for budget in self.budgets:
            folder = self.folder.work / f"budget-{budget}"
            arguments = (budget, samples, validation, folder, self.amounts, work, bar, self.processes)
            one = OneBudget(*arguments) if given is None else EndToEndBudget(*arguments, through_runs=given)
            fitted[budget] = one.fit()
        return fitted

    def _through_runs(self, samples: Samples, work: Work, bar: Bar) -> ThroughRuns | None:
        """What trainings through whole runs need, if there are any: the runs with all steps are made here."""
        if self.end_to_end is None or self.loss is None:
            return None
        inputs = samples.inputs_of(0, work.learning_samples)
        trials = self._runs(inputs[: work.trial_samples], 0, "trials")
        folder, options = self.folder.work / "references", (self.num_inference_steps, self.batch_size)
        # The trials are the first of these samples. Their runs with all steps are made twice, because the references
        # have the latents after the last step, and some pipelines return others.
        references = References(self.pipe, inputs, self.seed, *options, folder, self.loss != "latents")
        with bar.part("run all steps", work.recording_steps(work.learning_samples)):
            references.make(self.processes)
        with bar.part("run all steps", work.recording_steps(work.trial_samples)):
            trials.make_references()
        return ThroughRuns(self.end_to_end, self.loss, inputs, tuple(work.levels), trials, folder)

    def _cost(self, sample: Trajectories, seconds: float, work: Work) -> FitCost:
        """What comes after the first sample will cost."""
        device = usable_device(self.pipe._execution_device)
        first = measured(sample, seconds, self.amounts, self.budgets[0], device)
        return fit_cost(first, work, self.budgets)

    def _runs(self, inputs: Sequence[dict], first: int, name: str) -> LatentRuns:
        """Runs on samples, the first of which has this number, and a folder of this name for them."""
        options = (self.num_inference_steps, self.batch_size)
        return LatentRuns(self.pipe, [*inputs], self.seed + first, *options, self.folder.work / name, self.processes)

    def _test(self, samples: Samples, fitted: dict[int, Fitted], bar: Bar) -> None:
        """Tests the predictors, and writes what belongs into their folders."""
        more = {"base_model": base_model_of(self.pipe), "inputs": self.given}
        device = usable_device(self.pipe._execution_device)
        runs = self._runs(self.shares.test, TEST, "test")
        predictors = {budget: on_device(each.predictor, device) for budget, each in fitted.items()}
        work = self.folder.work / "evaluation"
        test = Test(runs, predictors, work, self.executed_steps, self.shares.test_is_new)
        for budget, evaluation in test.run().items():
            if _shows_figures.get():
                bar.say(_said(evaluation))
            made = {**fitted[budget].made, **more}
            write = partial(self._write, fitted[budget].predictor, {**evaluation, "made": made}, budget, test)
            self.processes.by_first(write)

    def _write(self, predictor: FusedKANPredictor, evaluation: dict[str, Any], budget: int, test: Test) -> None:
        """Writes the files of a predictor."""
        place = self.folder.places[budget]
        place.mkdir(exist_ok=True)
        predictor.save_pretrained(place)
        contents = json.dumps(evaluation, indent=2, allow_nan=False)
        write_text(place / EVALUATION, contents + "\n")
        if decodes(self.pipe):
            with whole_file(place / PICTURE) as temporary:
                test.draw(budget, temporary)
        write_card(place, evaluation, evaluation["made"])


def _calls(trajectories: Trajectories) -> int:
    """How often a step calls its transformer: for each stream of calls once."""
    every = sum(len(trajectories.sigmas_of(number)) for number in trajectories.by_sample[0])
    return round(every / trajectories.num_inference_steps)


def _said(evaluation: dict[str, Any]) -> str:
    """How good a predictor is, in one line."""
    figure = "psnr" if evaluation["compared"] == "pictures" else "latent_psnr"
    parts = []
    for run in evaluation["runs"][1:]:
        ssim = "" if run["ssim"] is None else f", SSIM {run['ssim']:.4f}"
        value = run[figure]
        parts.append(f"{run['name']} {'-' if value is None else f'{value:.2f}'} dB{ssim}")
    return f"PSNR of {evaluation['compared']} against all steps: {'; '.join(parts)}"
