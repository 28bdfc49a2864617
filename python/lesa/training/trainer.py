"""Fits a predictor to recorded trajectories."""

import os
from dataclasses import replace

import torch

from lesa.schedule import Schedule, ScheduleLike
from lesa.training.schedule_search import find_schedule
from lesa.training.training_run import Training, complete_config, unfinished_config
from lesa.training.trajectories import Trajectories, check_plain
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import argument_error, check_float, check_int


def train(
    trajectories: Trajectories | str | os.PathLike,
    config: PredictorConfig | None = None,
    schedule: ScheduleLike | None = None,
    *,
    budget: int | None = None,
    find_stages: bool = False,
    out_dir: str | os.PathLike | None = None,
    guided_epochs: int | None = None,
    controlled: bool = False,
    epochs: int = 60,
    batch_size: int = 8,
    tokens_per_batch: int | None = 32,
    learning_rate: float | None = None,
    head_aware: bool | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FusedKANPredictor:
    """Trains a predictor on recorded trajectories.

    Args:
        trajectories: what `lesa.record` made, or its folder.
        config: of the predictor. Default: newton, four anchors, rank 32, three stages, for the trajectories' model.
        schedule: the computed steps to train for: a `lesa.Schedule`, a list of steps or an interval. Default: that of
            `config`, else 9 spread steps.
        budget: in the place of `schedule`, how many steps to compute; `find_schedule` chooses which.
        out_dir: folder for the predictor, `losses.json` and the picture `losses.png`. A training that was stopped is
            resumed from the checkpoint there. None: nothing is written.
        guided_epochs: passes over the trajectories in the first stage. Default: a third of `epochs` for dense, a sixth
            for newton, whose second stage has a true history too.
        find_stages: whether to find the noise stages first, in the place of the config's, as `lesa.find_stages` does.
        controlled: whether to train for `lesa.ErrorControl`: all epochs are of the first stage, on schedules with gaps
            half to twice as long. The forecasts are less close on the schedule itself, and closer on others.
        epochs: passes in the second stage.
        batch_size: trajectories per step of the optimiser.
        tokens_per_batch: random tokens taken of each trajectory per step, since predictor and head are token-wise; None
            for all.
        learning_rate: of AdamW, falling to zero along a cosine. Default: 3e-3 for newton; 1e-4 for dense, the paper's.
        head_aware: whether the loss looks at what the output head makes of the features, or at the features alone, as
            the paper's does. Default: True for newton, False for dense.
        validation_fraction: share of the trajectories that is kept for validation, at least one of two or more.
        seed: of initialisation, order, tokens and guided schedules.
        device: where to train.
        progress: whether to show a progress bar.

    Returns:
        The predictor of the last epoch, on the CPU, its config saying what it was trained on.

    Raises:
        ValueError: `config` does not fit the trajectories, `controlled` or `find_stages`, the schedule does not fit
            their steps, or `out_dir` holds something else than an unfinished training with these arguments; the message
            names the field.

    Source: LESA, arXiv 2602.20497, for the two stages; the loss and the newton mixer's training are this project's.
    """
    if not isinstance(trajectories, Trajectories):
        trajectories = Trajectories(trajectories)
    check_plain(trajectories)
    epochs = check_int("epochs", epochs)
    if budget is not None:
        schedule = _schedule_of(trajectories, config, schedule, budget, out_dir, device, seed, progress)
    config = complete_config(trajectories, config, schedule)
    if find_stages:
        config = _with_stages(trajectories, config, out_dir, device, seed, progress)
    run = Training(trajectories, config, out_dir, device, seed, controlled=bool(controlled))
    newton = run.config.mixer == "newton"
    if controlled and run.config.history != "anchors":
        remedy = "Train a newton predictor."
        raise argument_error("controlled", "be left out for one that feeds on its own forecasts", controlled, remedy)
    if guided_epochs is None:
        guided_epochs = epochs // 6 if newton else epochs // 3
    if learning_rate is None:
        learning_rate = 3e-3 if newton else 1e-4
    if controlled:
        guided_epochs, epochs = guided_epochs + epochs, 0
    run.fit(
        guided_epochs=check_int("guided_epochs", guided_epochs, minimum=0),
        epochs=epochs,
        batch_size=check_int("batch_size", batch_size),
        tokens=None if tokens_per_batch is None else check_int("tokens_per_batch", tokens_per_batch),
        learning_rate=check_float("learning_rate", learning_rate, minimum=1e-8),
        head_aware=newton if head_aware is None else bool(head_aware),
        validation_fraction=check_float("validation_fraction", validation_fraction, 0.0, 0.9),
        progress=progress,
        finds_typical_errors=True,
    )
    return run.predictor.cpu().eval()


def _schedule_of(trajectories, config, schedule, budget, out_dir, device, seed, progress) -> Schedule:
    """The schedule that a training with a budget goes on with, or a new one."""
    if schedule is not None:
        raise argument_error("schedule", "be left out where `budget` is given", schedule, "Pass one of the two.")
    known = unfinished_config(out_dir)
    if known is not None and len(known["schedule"]) == budget:
        return Schedule(tuple(known["schedule"]), trajectories.num_inference_steps)
    return find_schedule(trajectories, budget, config, seed=seed, device=device, progress=progress)


def _with_stages(trajectories, config, out_dir, device, seed, progress) -> PredictorConfig:
    """The config with the noise stages of the training that goes on, or with new ones."""
    from lesa.training.stages import find_stages

    known = unfinished_config(out_dir)
    if known is not None:
        bounds = tuple(known["stage_bounds"])
    else:
        bounds = find_stages(trajectories, None, config, seed=seed, device=device, progress=progress)
    return replace(config, stage_bounds=bounds, history_length=config.history_length[0])
