"""`train_end_to_end`: trains a predictor with the gradient through whole accelerated runs.

`train` and `refine` compare the forecasts of single gaps. Here the pipeline runs with the predictor, and the latents of
this run are compared with those of the run of all steps: before each computed step, and at the end. The gradient goes
back through all steps of the run, also through the computed ones, so that the predictor learns what each of its errors
leads to.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesa.artifacts import digest, predictor_identity
from lesa.inputs import check_inputs
from lesa.processes import Processes, processes_for
from lesa.schedule import Schedule
from lesa.training.batches import check_is_predictor
from lesa.training.end_to_end_run import EndToEndRun, Loss, check_trainable, name_of
from lesa.training.end_to_end_settings import UPDATES, EndToEndSettings
from lesa.training.training_run import check_folder, is_finished
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import argument_error

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CALLS_PER_COMPUTED_STEP = 4
"""The cost of a computed step is at most this, in forward passes of the transformer.

It runs once for the forward pass. For the backward pass it runs again, and each of its blocks once more. The gradient
of its inputs takes about as long. Its weights have no gradients. A step before the first forecast has no backward pass,
because it does not depend on the predictor.
"""


def train_end_to_end(
    predictor: FusedKANPredictor,
    pipe: "DiffusionPipeline",
    inputs: list[str] | list[dict],
    *,
    out_dir: str | os.PathLike | None = None,
    num_inference_steps: int | Sequence[int] | None = None,
    updates: int = UPDATES,
    batch_size: int = 8,
    samples_per_call: int | None = None,
    learning_rate: float = 1e-3,
    loss: Loss = "latents",
    seed: int = 0,
    learn_levels: bool = False,
    progress: bool = True,
) -> FusedKANPredictor:
    """Trains a predictor further, with the gradient through whole accelerated runs.

    First the pipeline runs on the inputs with all steps. Then, in each update, it runs on some of the inputs with the
    predictor. The latents before each computed step and at the end are compared with those of the runs of all steps,
    and the gradient goes back through the whole run. An update costs at most about four times the computed steps, for
    each sample. Memory is needed for the latents of each computed step, and for a sample and up to two feature maps of
    each of its streams of calls.

    The model's weights are frozen, and they are as before at the end. See `docs/limits.md` for the pipelines that
    gradients cannot pass through.

    Where several processes were started together, as by `torchrun`, all must call this with the same arguments. They
    share the runs of all steps. The first one trains, and all return the predictor.

    Args:
        predictor: has a schedule, and was trained for this model, for example by `train`. It is not changed.
        pipe: a diffusers pipeline of a supported family, not modular.
        inputs: prompts, or dicts of pipeline arguments whose tensors have a leading dimension of 1. They may be those
            of the recording, or others.
        out_dir: folder for the predictor, `losses.json` and `losses.png`, and for the runs of all steps while it
            trains. A training that was interrupted continues there. None: nothing is kept.
        num_inference_steps: passed to the pipeline. Default: those of the predictor; with
            `learn_levels` only that of its schedule. Several numbers: each update takes
            one of them, all equally often, in an order that follows from the seed. One that is given twice is taken
            twice as often. In runs of another number of steps than the predictor's, which must be among them, the steps
            that are nearest in noise level to its schedule are computed. Runs of all steps are made for each number.
        updates: steps of the optimiser.
        batch_size: samples per update. With fewer inputs, all of them.
        samples_per_call: how many of them share a call of the pipeline. Fewer need less memory. Default: all.
        learning_rate: of AdamW. It rises over 20 updates, and falls to zero along a cosine.
        loss: what compares the ends of the runs. "latents": the latents. "pixels": the decoded images. Or a function
            or module `loss(images, reference_images)` of images `[B, 3, H, W]` in [0, 1], which gives a distance of 0
            or more: a scalar or `[B]`. An example is LPIPS: `lpips.LPIPS()` with its option `normalize=True`. Frames of
            videos are passed as images. The logarithm of the distance is minimised, and for "latents" and "pixels" that
            of the root mean square error.
        seed: seed of the first sample, as in `record`, and of the order.
        learn_levels: whether to train, in addition, one number for each computed step: the noise level that the model
            is told there in place of that of its latents, `config.told_levels`. A predictor that has nothing to train
            itself, such as `mixer="linear"`, must have a schedule with its noise levels.
        progress: whether to show progress bars.

    Returns:
        The predictor after the last update, on the CPU, in float32. Its config has no `schedule_errors`, because they
        were measured for other weights. So it can't be used with `lesa.ErrorControl`. Of several numbers of steps, its
        config has those beside `num_inference_steps` as `more_step_counts`.

    Raises:
        TypeError, ValueError: an argument is out of range, the predictor has no schedule, has nothing to train or is
            for another model, gradients can't pass through the pipeline, it has no VAE for the images, or `out_dir`
            contains something other than an unfinished training with these arguments. The message names it.
        RuntimeError: the loss became NaN or Inf, a cache is on, or another process works in `out_dir`.

    Source: developed in this project. To train through all steps of a sampler is DRaFT, arXiv 2309.17400, there for the
    model itself and a reward.
    """
    check_is_predictor(predictor)
    inputs = check_inputs(inputs)
    if num_inference_steps is None:
        num_inference_steps = predictor.config.step_counts[: 1 if learn_levels else None]
        if not num_inference_steps:
            raise argument_error("num_inference_steps", "be given for a predictor without it", None, "Pass it.")
    if predictor.config.schedule is None:
        remedy = "Give the predictor a configuration with `schedule` and `schedule_sigmas`, or train it first."
        raise argument_error("predictor.config.schedule", "be the steps to compute", None, remedy)
    samples_per_call = batch_size if samples_per_call is None else samples_per_call
    settings = EndToEndSettings(
        num_inference_steps, updates, batch_size, samples_per_call, learning_rate, seed, learn_levels
    )
    check_trainable(predictor, pipe, loss, learn_levels)
    processes = processes_for(pipe)
    same = {"predictor": predictor_identity(predictor), "inputs": digest(inputs), "out_dir": out_dir is None}
    processes.begin("lesa.train_end_to_end", {**same, **asdict(settings), "loss": name_of(loss)})
    with processes.working_folder(out_dir, "training") as folder:
        processes.by_first(lambda: check_folder(folder))
        bar = "train end to end" if progress else None
        return trained_end_to_end(predictor, pipe, inputs, settings, folder, processes, loss=loss, bar=bar)


def trained_end_to_end(
    predictor: FusedKANPredictor,
    pipe: Any,
    inputs: list[dict],
    settings: EndToEndSettings,
    folder: Path,
    processes: Processes,
    *,
    references: Path | None = None,
    loss: Loss = "latents",
    schedule_for: Callable[[int], Schedule] | None = None,
    bar: str | None = None,
) -> FusedKANPredictor:
    """Trains a predictor through whole runs. A training that is finished is read from its folder.

    Args:
        predictor: where it begins. It is not changed.
        pipe, loss: see `train_end_to_end`.
        inputs: dicts of pipeline arguments, from `check_inputs`.
        settings: how to train.
        folder: of the training, which exists. A training that was interrupted continues there.
        processes: those that call this. They share the runs of all steps, and the first one trains.
        references: folder of the runs of all steps, which other trainings on the same inputs may share. None: one
            inside `folder`, which is removed at the end.
        schedule_for: gives the schedule of an update, which are counted from 0. It must give the same ones when the
            training continues. None: that of the predictor.
        bar: what the progress bars are called, or None for no bar.
    """
    training = EndToEndRun(predictor, pipe, inputs, settings, folder, references, loss, schedule_for)
    if processes.by_first(lambda: is_finished(folder)):
        return FusedKANPredictor.from_pretrained(folder)
    if processes.by_first(training.resume) < settings.updates:
        for first_call in (True, False):  # an error of any number of steps comes before the many calls
            for count, plain in training.all_references.items():
                what = f"all {count} steps" if len(training.all_references) > 1 else "all steps"
                plain.make(processes, bar and f"{bar}, {what}", first_call)
            processes.by_first(training.check_steps)
    return processes.by_first(lambda: training.fit(bar if processes.is_first else None))
