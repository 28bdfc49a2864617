"""`find_stages`: divides the steps into noise stages, by the validation error."""

from dataclasses import replace

import torch
from tqdm import tqdm

from lesa.schedule import ScheduleLike
from lesa.training.batches import Split, check_whole, split
from lesa.training.searching import Search
from lesa.training.settings import (
    TrainingSettings,
    check_one_transformer,
    check_seed,
    complete_config,
    usable_device,
    with_stages,
)
from lesa.training.training_run import MOST_TOKENS, Training
from lesa.training.trajectories import Trajectories, check_plain
from lesa_kernels import PredictorConfig
from lesa_kernels.checks import argument_error, check_int
from lesa_kernels.forecasters import FORECASTERS
from lesa_kernels.torch_modes import default_modes

LEAST_GAIN = 0.02
"""By which part a split must lower the validation loss, with each of two seeds."""

MOST_STAGES = 4
"""The largest number of stages, by default."""

BRIEF = TrainingSettings(epochs=10, tokens_per_batch=32, learning_rate=1e-2, validation_fraction=0.25)
"""The settings of a brief training."""

MOST_TRAINING, MOST_VALIDATION = 64, 32
"""How many trajectories a brief training uses, at most."""


@default_modes()
def find_stages(
    trajectories: Trajectories,
    schedule: ScheduleLike | None = None,
    config: PredictorConfig | None = None,
    *,
    most: int = MOST_STAGES,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> tuple[float, ...]:
    """Chooses number and bounds of a predictor's noise stages.

    It begins with one stage, and splits one stage into two in each round. A bound is always at the noise level of a
    computed step, so it never divides a gap. A predictor is trained briefly for every possible split, on some of the
    trajectories. The split with the smallest loss on other trajectories is chosen. It must lower the loss by 2 % with
    `seed`, and also with the next seed, which has other trajectories for validation. Otherwise the search ends. The
    second seed is needed because the smallest of several losses is small partly by chance.

    Args:
        trajectories: what `lesa.record` made.
        schedule: the computed steps; see `train`.
        config: configuration of the predictor; its `stage_bounds` are not used. Default: that of `train`.
        most: the largest number of stages.
        seed: seed of all random choices.
        device: where to train.
        progress: whether to show a progress bar.

    Returns:
        The falling `stage_bounds` for a `PredictorConfig`; none for one stage.

    Raises:
        TypeError, ValueError: `config` or `schedule` does not fit the trajectories, a file of the recording is damaged
            or has NaN or Inf, the noise level rises in a recorded run, the stages of such a predictor can't be found,
            as those of the dense variant, or its history has other lengths in other stages, or an argument is out of
            range. The message names it.
    """
    check_plain(trajectories)
    check_one_transformer(trajectories, "a search for stages")
    most, seed = check_int("most", most), check_seed(seed)
    complete = complete_config(trajectories, config, schedule)
    check_divisible(trajectories, complete)
    usable_device(device)
    check_whole(trajectories)
    return found_stages(trajectories, complete, most, seed, device, progress, Search())


def check_divisible(trajectories: Trajectories, config: PredictorConfig) -> None:
    """Raises `ValueError` unless the noise stages of such a predictor can be found on the trajectories."""
    if len(set(trajectories.samples)) < 2:
        remedy = "Record more: at least one is for validation."
        raise argument_error("trajectories", "be of two samples or more", trajectories, remedy)
    if not config.forecaster.can_find_stages:
        those = " or ".join(repr(name) for name, forecaster in FORECASTERS.items() if forecaster.can_find_stages)
        remedy = "Change the mixer, or set the stage bounds by hand."
        raise argument_error("config.mixer", f"be {those} for stages to be found", config.mixer, remedy)
    if len(set(config.lengths)) > 1:
        remedy = "Pass one int, or set the stage bounds by hand."
        raise argument_error("config.history_length", "be equal in all stages", config.history_length, remedy)


def found_stages(
    trajectories: Trajectories,
    config: PredictorConfig,
    most: int,
    seed: int,
    device: str | torch.device,
    progress: bool,
    search: Search,
) -> tuple[float, ...]:
    """`find_stages` for checked arguments and a complete configuration; it continues what `search` has."""
    losses: dict[tuple[tuple[float, ...], int], float] = {}
    bar = tqdm(desc="stages", unit="training", disable=not progress)

    def loss(bounds: tuple[float, ...], seed: int) -> float:
        if (bounds, seed) not in losses:
            name = f"stages {', '.join(map(str, bounds))} with seed {seed}"
            losses[bounds, seed] = search.part(name, _loss_of, trajectories, with_stages(config, bounds), device, seed)
            bar.update()
        return losses[bounds, seed]

    bounds: tuple[float, ...] = ()
    candidates = _candidates(config, trajectories[0].sigmas.tolist())
    with bar:
        while len(bounds) + 1 < most:
            splits = [tuple(sorted({*bounds, c}, reverse=True)) for c in candidates if c not in bounds]
            best = min(splits, key=lambda split: loss(split, seed), default=None)
            if best is None or any(loss(best, s) > (1 - LEAST_GAIN) * loss(bounds, s) for s in (seed, seed + 1)):
                break
            bounds = best
    return bounds


def _candidates(config: PredictorConfig, sigmas: list[float]) -> list[float]:
    """Noise levels of the computed steps that have predicted ones before and after them."""
    computed = config.schedule or ()
    predicted = {*range(len(sigmas))} - set(computed)
    return [sigmas[step] for step in computed if min(predicted) < step < max(predicted)]


def _loss_of(trajectories: Trajectories, config: PredictorConfig, device: torch.device | str, seed: int) -> float:
    """The validation loss, over many tokens, of a predictor that was trained briefly."""
    settings = replace(BRIEF, seed=seed)
    training, validation = split(trajectories, settings.validation_fraction, seed)
    numbers = Split(training[:MOST_TRAINING], [])
    run = Training(trajectories, config, settings, numbers=numbers, device=device)
    run.fit()
    with torch.no_grad():
        return run.mean_loss(validation[:MOST_VALIDATION], MOST_TOKENS, guided=False).item()
