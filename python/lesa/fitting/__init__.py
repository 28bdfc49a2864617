"""`fit`: from a pipeline to predictors that are trained, refined and tested, in one call."""

import contextlib
import numbers
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesa.cache.placement import check_uncached
from lesa.evaluation.evaluator import check_own_steps
from lesa.fitting.amounts import AMOUNTS
from lesa.fitting.folder import FitFolder
from lesa.fitting.inputs import chosen_inputs
from lesa.fitting.samples import TEST
from lesa.fitting.whole import Fit
from lesa.pipelines import check_decodes
from lesa.processes import processes_for
from lesa.training.gradient_checks import check_differentiable
from lesa.training.recording import Recording
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import Said, argument_error, check_choice, check_int, usage_error

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


LOSSES = ("latents", "pixels")
"""Of a training through whole runs."""


def fit(
    pipe: "DiffusionPipeline",
    inputs: list[str] | list[dict] | None = None,
    *,
    budget: int | list[int],
    out_dir: str | os.PathLike | None = None,
    num_inference_steps: int = 50,
    batch_size: int = 1,
    end_to_end: bool = False,
    loss: str = "latents",
    seed: int = 0,
    progress: bool = True,
) -> FusedKANPredictor | dict[int, FusedKANPredictor]:
    """Makes a predictor for a pipeline: records, chooses the computed steps, trains, refines, and tests it.

    A few samples are recorded first. `lesa.find_schedule` chooses the steps, and `lesa.train` trains on these samples.
    Then there are rounds of refining, as in `lesa.refine`. Each round has twice as many samples as the one before, up
    to a limit. After the training and after each round, the pipeline runs with the predictor on validation samples, on
    which nothing is trained. The PSNR of their latents against those of all steps decides: the first round that gains
    less than 0.1 dB is the last one, and the best round gives the predictor. So more samples are recorded only while
    more samples and more rounds gain something.

    Sample i has the seed `seed + i`. The numbers of validation samples begin at 500,000. Those of the samples for the
    test begin at 1,000,000, and no choice depends on them. The last 8 inputs are for the test, the 8 before them for
    validation, and the others to train on; they repeat where there are fewer of them than samples. Where less than 8
    would be left to train on, the test or both share inputs with the training, and differ in the seeds alone. The model
    card says so.

    Of a pipeline with two transformers, there is no search: the computed steps are spread, and the first step of each
    transformer is one of them.

    With `end_to_end`, there is more work after the rounds. A copy of the predictor is trained through whole runs on
    many schedules, and its runs choose the computed steps, as in `lesa.find_schedule_in_runs`. If they are others than
    before, a predictor is trained for them on the recorded features, and refined in one round. Of all predictors for
    these steps, the best one is trained through whole runs, as by `lesa.train_end_to_end`. The validation samples
    choose among these predictors and the one of the rounds. So on them, the result is at least as good as without
    `end_to_end`. If a part of this work fails, such as a training whose loss is not finite, a warning says why, and
    the best of the other predictors is returned.

    Args:
        pipe: a diffusers pipeline of a supported family.
        inputs: prompts, or dicts of pipeline arguments whose tensors have a leading dimension of 1. None: a list of
            built-in prompts.
        budget: how many steps are computed in a run: at least 2, and fewer than the run has. A list of numbers: one
            predictor for each of them, from one recording.
        out_dir: gets the predictor, `README.md`, `evaluation.json` with the figures of the test, and `comparison.png`,
            which shows its pictures. Of several budgets, each has a folder in it, such as `budget-9`. The unfinished
            work is in `work`. After an interruption, the same call continues, and leaves the files that it would have
            left without the interruption. None: a temporary folder is used, and nothing is kept; `push_to_hub` of the
            predictor then makes a minimal model card, without figures.
        num_inference_steps: passed to the pipeline.
        batch_size: samples per call of the pipeline.
        end_to_end: whether to go on with training through whole runs. Gradients must be able to pass through the
            pipeline, which has one transformer.
        loss: of the training through whole runs: "latents", or "pixels" for a pipeline that decodes its latents. See
            `lesa.train_end_to_end`.
        seed: of sample 0, of the training and of the search. It can be up to 2**64 - 1,000,008.
        progress: whether to show a progress bar, what the work will cost, and how good the predictors are.

    Returns:
        The predictor, on the CPU. For a list of budgets, a dict of predictors by budget.

    Raises:
        TypeError, ValueError: an argument is out of range, the family of the pipeline is not supported, gradients can't
            pass through it with `end_to_end`, or `out_dir` holds something else than unfinished work of this call. The
            message names what differs.
        RuntimeError: a cache is on, or another process works in `out_dir`. See also `lesa.record`, `lesa.train` and
            `lesa.evaluate`.
    """
    budgets, is_list = _check_budgets(budget, num_inference_steps), not isinstance(budget, numbers.Integral)
    chosen = chosen_inputs(pipe, inputs)
    given = None if inputs is None else len(inputs)
    check_own_steps(chosen, num_inference_steps)
    check_uncached(pipe)
    _check_end_to_end(pipe, end_to_end, loss)
    seed = check_int("seed", seed, minimum=0, maximum=2**64 - TEST - AMOUNTS.test_samples)
    batch_size = check_int("batch_size", batch_size)
    Recording(pipe, chosen, num_inference_steps, None, seed, batch_size)  # refuses what cannot be recorded
    processes = processes_for(pipe)
    if out_dir is None and processes.count > 1:
        raise usage_error("`out_dir` is required where several processes share the work.", "Pass a folder for all.")
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out_dir is None else out_dir)
        folder = FitFolder(path, budgets, is_list)
        of_runs = loss if end_to_end else None
        fit = Fit(pipe, chosen, num_inference_steps, batch_size, seed, given, folder, processes, of_runs)
        found = fit.run(progress)
    return found if is_list else found[budgets[0]]


def _check_end_to_end(pipe: Any, end_to_end: Any, loss: Any) -> None:
    """Raises `TypeError` or `ValueError` if a training through whole runs is asked for that is not possible."""
    check_choice("loss", loss, LOSSES)
    if not isinstance(end_to_end, bool):
        raise argument_error("end_to_end", "be True or False", end_to_end, "Pass one of them.", TypeError)
    if not end_to_end:
        if loss != LOSSES[0]:
            raise usage_error("`loss` is that of a training through whole runs.", "Set `end_to_end`, or leave it out.")
        return
    check_differentiable(pipe, FusedKANPredictor(PredictorConfig(1, rank=0, hidden=1)))
    if loss != LOSSES[0]:
        check_decodes(pipe)


def _check_budgets(budget: Any, num_inference_steps: int) -> list[int]:
    """The budgets; raises `TypeError` or `ValueError` unless a predictor can be made for each of them."""
    total = check_int("num_inference_steps", num_inference_steps, minimum=3)
    given = [*budget] if isinstance(budget, Sequence) and not isinstance(budget, str) else [budget]
    if not given:
        raise argument_error("budget", "be a number of steps, or a list of them", budget, "Pass at least one number.")
    budgets = [check_int("budget", each, minimum=2, maximum=total - 1) for each in given]
    twice = [each for each in budgets if budgets.count(each) > 1]
    if twice:
        raise argument_error("budget", "have different numbers", Said(f"{twice[0]} twice"), "Remove one of them.")
    return budgets
