"""`train`: fits a predictor to recorded trajectories."""

import os

import torch

from lesa.schedule import Schedule, ScheduleLike
from lesa.training import stages
from lesa.training.schedule_search import find_schedule
from lesa.training.settings import TrainingSettings, complete_config, with_stages
from lesa.training.training_run import Training, unfinished_config
from lesa.training.trajectories import Trajectories, as_trajectories, check_plain
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import argument_error, check_int, usage_error


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
    """Trains a predictor on recorded trajectories, in two phases: guided, then in closed loop.

    In the guided phase, the history has the recorded features. In closed loop, it has the features that it has at
    inference.

    Args:
        trajectories: what `lesa.record` made, or its folder.
        config: configuration of the predictor. Default: newton, four anchors, rank 32, three stages, for the
            trajectories' model.
        schedule: the computed steps to train for: a `lesa.Schedule`, a list of steps or an interval. Default: that of
            `config`, else 9 spread steps.
        budget: instead of `schedule`, how many steps to compute; `find_schedule` chooses which.
        find_stages: whether to find the noise stages first, as `lesa.find_stages` does, and to use them instead of
            those of `config`.
        out_dir: folder for the predictor, `losses.json` and the picture `losses.png`. A training that was interrupted
            continues from the checkpoint there. None: nothing is written.
        guided_epochs: passes over the trajectories in the guided phase. Default: a third of `epochs` for dense, a sixth
            for newton, whose history has true features in closed loop too.
        controlled: whether to train for `lesa.ErrorControl`: all epochs are guided, on schedules with gaps half to
            twice as long. The forecasts are less close on the schedule itself, and closer on others.
        epochs: passes over the trajectories in closed loop. With `controlled`, they are guided too.
        batch_size: trajectories per step of the optimiser.
        tokens_per_batch: how many random tokens of each trajectory to use per step; None for all. A part is enough,
            because predictor and head process each token separately.
        learning_rate: learning rate of AdamW at the start; it falls to zero along a cosine. Default: 3e-3 for newton,
            1e-4 for dense as in the LESA paper.
        head_aware: whether the loss compares what the output head computes from the features. If false, it compares the
            features only, as in the LESA paper. Default: True for newton, False for dense.
        validation_fraction: share of the samples that is kept for validation. If there are two samples or more, at
            least one is kept.
        seed: seed of the initialisation, the order, the tokens, the validation samples and the guided schedules.
        device: where to train.
        progress: whether to show a progress bar.

    Returns:
        The predictor of the last epoch, on the CPU. Its config says what it was trained on.

    Raises:
        TypeError, ValueError: an argument is out of range; `config` does not fit the trajectories, `controlled` or
            `find_stages`; the schedule does not fit the steps; or `out_dir` contains something other than an unfinished
            training with these arguments. The message names the field.

    Source: LESA, arXiv 2602.20497, for the two phases. The loss and the training of the newton mixer were developed in
    this project.
    """
    trajectories = as_trajectories(trajectories)
    check_plain(trajectories)
    if budget is not None and config is not None and config.history != "anchors":
        remedy = "Use a newton predictor, or pass a `schedule`."
        raise usage_error("`budget` needs a predictor whose history holds computed features only.", remedy)
    if budget is not None and schedule is not None:
        raise usage_error("`schedule` and `budget` cannot both be given.", "Pass one of the two.")
    config = PredictorConfig(trajectories.feature_dim) if config is None else config
    newton = config.mixer == "newton"
    if controlled and config.history != "anchors":
        remedy = "Train a newton predictor."
        must = "be left out for a predictor that uses its own forecasts as history"
        raise argument_error("controlled", must, controlled, remedy)
    epochs = check_int("epochs", epochs)
    if guided_epochs is None:
        guided_epochs = epochs // 6 if newton else epochs // 3
    if learning_rate is None:
        learning_rate = 3e-3 if newton else 1e-4
    settings = TrainingSettings(
        guided_epochs=check_int("guided_epochs", guided_epochs, minimum=0) + (epochs if controlled else 0),
        epochs=0 if controlled else epochs,
        batch_size=batch_size,
        tokens_per_batch=tokens_per_batch,
        learning_rate=learning_rate,
        head_aware=newton if head_aware is None else head_aware,
        validation_fraction=validation_fraction,
        seed=seed,
        controlled=controlled,
    )
    unfinished = unfinished_config(out_dir)
    if budget is not None:
        if unfinished is not None and len(unfinished["schedule"]) == budget:
            schedule = Schedule(tuple(unfinished["schedule"]), trajectories.num_inference_steps)
        else:
            schedule = find_schedule(trajectories, budget, config, seed=seed, device=device, progress=progress)
    config = complete_config(trajectories, config, schedule)
    if find_stages:
        if unfinished is not None:
            bounds = tuple(unfinished["stage_bounds"])
        else:
            bounds = stages.find_stages(trajectories, None, config, seed=seed, device=device, progress=progress)
        config = with_stages(config, bounds)
    bar = "train" if progress else None
    run = Training(trajectories, config, settings, out_dir=out_dir, device=device, bar=bar)
    run.fit()
    return run.finish()
