"""`train`: fits a predictor to recorded trajectories."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lesa.artifacts import CONTINUE, output_folder, owned
from lesa.processes import processes_for
from lesa.provenance import of_manifest
from lesa.schedule import ScheduleLike
from lesa.training.batches import check_whole, passes
from lesa.training.schedule_search import check_budget, found_schedule
from lesa.training.searching import Search, has_search
from lesa.training.settings import (
    TOKENS_PER_BATCH,
    UPDATES,
    TrainingSettings,
    check_config,
    check_one_transformer,
    check_trainable,
    complete_config,
    config_settings,
    spread_over,
    usable_device,
    with_stages,
)
from lesa.training.stages import MOST_STAGES, check_divisible, found_stages
from lesa.training.training_run import Training, check_folder, unfinished_config
from lesa.training.trajectories import Trajectories, as_trajectories, check_plain
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import argument_error, check_int, usage_error
from lesa_kernels.torch_modes import default_modes


@default_modes()
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
    epochs: int | None = None,
    batch_size: int = 8,
    tokens_per_batch: int | None = TOKENS_PER_BATCH,
    learning_rate: float | None = None,
    head_aware: bool | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FusedKANPredictor:
    """Trains a predictor on recorded trajectories, in two phases: guided, then in closed loop.

    In the guided phase, the history has the recorded features. In closed loop, it has the features that it has at
    inference. For a lesa predictor there is only the guided phase: the second stage of LESA runs the model, which
    `lesa.refine` does. An l2p predictor is fitted in closed form, without epochs or a learning rate;
    `batch_size` limits the memory in which its losses are measured.

    Where several processes were started together, as by `torchrun`, all must call this. The first one trains, and all
    return the predictor.

    Args:
        trajectories: what `lesa.record` made, or its folder.
        config: configuration of the predictor. Default: the newton predictor with four anchors, rank 32 and three
            stages, for the trajectories' model.
        schedule: the computed steps to train for: a `lesa.Schedule`, a list of steps or an interval. Default: that of
            `config`, else 9 spread steps.
        budget: instead of `schedule`, how many steps to compute; `find_schedule` chooses which.
        find_stages: whether to find the noise stages first, as `lesa.find_stages` does, and to use them instead of
            those of `config`.
        out_dir: folder for the predictor, `losses.json` and the picture `losses.png`, which shows the losses of the
            epochs; a fit in closed form has none. After an interruption, the same call continues there, also with a
            search that `budget` or `find_stages` asks for. None: nothing is written.
        guided_epochs: passes over the trajectories in the guided phase. Default: a part of `epochs` that depends on the
            mixer: a sixth for newton, whose history has true features in closed loop too, a third for dense.
        controlled: whether to train for `lesa.ErrorControl`: all epochs are guided, on schedules with gaps half to
            twice as long. The forecasts are less close on the schedule itself, and closer on others.
        epochs: passes over the trajectories in closed loop. They are guided too with `controlled`, and for a lesa
            predictor. Default: as many as give about 600 steps of the optimiser. These count, and not the passes: with
            fewer samples there are more passes.
        batch_size: trajectories per step of the optimiser.
        tokens_per_batch: how many random tokens of each trajectory to use per step; None for all. A part is enough,
            because predictor and head process each token separately.
        learning_rate: learning rate of AdamW at the start; it falls to zero along a cosine. Default: that of the
            mixer: 3e-3 for newton, 1e-4 for lesa, as in its released code, and for dense.
        head_aware: whether the loss compares what the output head computes from the features. If false, it compares the
            features only, as in the LESA paper. Default: that of the mixer: True for newton, False for dense.
        validation_fraction: share of the samples that is kept for validation. If there are two samples or more, at
            least one is kept.
        seed: seed of the initialisation, the order, the tokens, the validation samples and the guided schedules.
        device: where to train.
        progress: whether to show a progress bar.

    Returns:
        The predictor of the last epoch, on the CPU. Its config says what it was trained on.

    Raises:
        TypeError, ValueError: an argument is out of range; `config` does not fit the trajectories, `controlled` or
            `find_stages`, or has a mixer with nothing to train; the schedule does not fit the steps; a file of the
            recording is damaged or has NaN or Inf; the noise level rises in a recorded run; or `out_dir` is no folder,
            or contains something other than an unfinished training with these arguments. The message names the field.
        OSError: nothing can be written to `out_dir`.
        RuntimeError: the loss became NaN or Inf, and a lower learning rate helps; or another process works in
            `out_dir`. The message names the process.

    Source: LESA, arXiv 2602.20497, for the two phases. The loss and the training of the newton mixer were developed in
    this project.
    """
    trajectories = as_trajectories(trajectories)
    check_plain(trajectories)
    config = PredictorConfig(trajectories.feature_dim) if config is None else check_config(config)
    check_trainable(config)
    forecaster = config.forecaster
    _check_choices(config, schedule, budget, controlled)
    settings = TrainingSettings(
        epochs=0,
        batch_size=batch_size,
        tokens_per_batch=tokens_per_batch,
        learning_rate=forecaster.learning_rate if learning_rate is None else learning_rate,
        head_aware=forecaster.head_aware if head_aware is None else head_aware,
        validation_fraction=validation_fraction,
        seed=seed,
        controlled=controlled,
    )
    number = passes(trajectories, UPDATES, settings) if epochs is None else check_int("epochs", epochs)
    settings = _with_epochs(settings, config, guided_epochs, number)
    for is_asked, what in (
        (budget is not None, "`budget`"),
        (find_stages, "`find_stages`"),
        (controlled, "`controlled`"),
        (forecaster.is_fitted or forecaster.reads_times, f"the mixer {config.mixer!r}"),
    ):
        if is_asked:
            check_one_transformer(trajectories, what)
    if budget is not None:  # where a search begins
        budget = check_budget(trajectories, budget)
        schedule = spread_over(trajectories, budget)
    config = complete_config(trajectories, config, schedule)
    if find_stages:
        check_divisible(trajectories, config)
    device = usable_device(device)
    processes = processes_for()
    same = {"trajectories": trajectories.manifest, "out_dir": out_dir is None, "find_stages": find_stages}
    same |= {"config": config_settings(config), **settings.to_dict(), "budget": budget}
    processes.begin("lesa.train", same)
    progress = progress and processes.is_first
    fit = partial(_fitted, trajectories, config, settings, budget, find_stages, out_dir, device, progress)
    return processes.by_first(fit)


def _fitted(
    trajectories: Trajectories,
    config: PredictorConfig,
    settings: TrainingSettings,
    budget: int | None,
    find_stages: bool,
    out_dir: str | os.PathLike | None,
    device: torch.device,
    progress: bool,
) -> FusedKANPredictor:
    """What `train` returns, when its arguments are checked."""
    with _own_folder(out_dir) as folder:
        check_whole(trajectories)
        config = _searched(trajectories, config, settings, budget, find_stages, folder, device, progress)
        bar = "train" if progress else None
        run = Training(trajectories, config, settings, out_dir=folder, device=device, bar=bar)
        run.predictor.provenance = of_manifest(trajectories.manifest)
        run.fit()
        return run.finish()


def _with_epochs(
    settings: TrainingSettings, config: PredictorConfig, guided_epochs: int | None, epochs: int
) -> TrainingSettings:
    """The settings with the epochs of both phases."""
    part = config.forecaster.guided_part
    if guided_epochs is None:
        guided_epochs = 0 if part is None else epochs // part
    guided_epochs = check_int("guided_epochs", guided_epochs, minimum=0)
    if settings.controlled or part is None:
        return replace(settings, guided_epochs=guided_epochs + epochs)
    return replace(settings, guided_epochs=guided_epochs, epochs=epochs)


@contextlib.contextmanager
def _own_folder(out_dir: str | os.PathLike | None) -> Iterator[Path | None]:
    """The folder of a training, in which no other call works meanwhile; None if there is none."""
    if out_dir is None:
        yield None
        return
    folder = output_folder(out_dir)
    with owned(folder, "training"):  # before the check, which removes what an interruption left
        yield check_folder(folder)


def _check_choices(
    config: PredictorConfig, schedule: ScheduleLike | None, budget: int | None, controlled: bool
) -> None:
    """Raises `ValueError` if arguments of `train` contradict each other."""
    if budget is not None and schedule is not None:
        raise usage_error("`schedule` and `budget` cannot both be given.", "Pass one of the two.")
    if controlled and config.forecaster.is_fitted:
        must = f"be left out for {config.mixer}, which is fitted for one schedule"
        raise argument_error("controlled", must, controlled, "Use another mixer.")
    if controlled and config.history != "anchors":
        remedy = "Use a predictor with `history='anchors'`."
        must = "be left out for a predictor that uses its own forecasts as history"
        raise argument_error("controlled", must, controlled, remedy)


def _searched(
    trajectories: Trajectories,
    config: PredictorConfig,
    settings: TrainingSettings,
    budget: int | None,
    find_stages: bool,
    folder: Path | None,
    device: torch.device,
    progress: bool,
) -> PredictorConfig:
    """The configuration with what is searched for. An unfinished training has found it already."""
    unfinished = None if folder is None else unfinished_config(folder)
    if unfinished is not None:
        steps = tuple(unfinished["schedule"])
        if budget not in (None, len(steps)):
            must = f"be {len(steps)}, as in the unfinished training in {folder}"
            raise argument_error("budget", must, budget, CONTINUE)
        if budget is not None:
            config = complete_config(trajectories, config, steps)
        return with_stages(config, tuple(unfinished["stage_bounds"])) if find_stages else config
    if budget is None and not find_stages and not (folder is not None and has_search(folder)):
        return config
    chosen = {"trajectories": trajectories.manifest, "budget": budget, "find_stages": find_stages}
    search = Search(folder, {**chosen, "config": config_settings(config), **settings.to_dict()})
    if budget is not None:
        found = found_schedule(trajectories, budget, config, settings.seed, device, progress, search)
        config = complete_config(trajectories, config, found)
    if find_stages:
        bounds = found_stages(trajectories, config, MOST_STAGES, settings.seed, device, progress, search)
        config = with_stages(config, bounds)
    return config


@default_modes()
def with_typical_errors(
    predictor: FusedKANPredictor, trajectories: Trajectories, device: torch.device | str = "cpu"
) -> FusedKANPredictor:
    """The predictor with the typical errors of its weights in its configuration, which `lesa.ErrorControl` needs.

    They are measured on the trajectories that `train` would validate with.

    Args:
        predictor: trained for these trajectories and a schedule. It is not changed.
        trajectories: what `lesa.record` made of plain runs.
        device: where to measure.
    """
    run = Training(trajectories, predictor.config, TrainingSettings(), device=device)
    run.predictor.load_state_dict(predictor.state_dict())
    run.predictor.provenance = predictor.provenance
    return run.finish()
