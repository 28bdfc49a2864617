"""`find_stages`: into which noise stages to divide the steps, found on the validation error."""

from dataclasses import replace

import torch
from tqdm import tqdm

from lesa.schedule import Schedule, ScheduleLike
from lesa.training.training_run import MOST_TOKENS, Training, complete_config
from lesa.training.trajectories import Trajectories, check_plain
from lesa_kernels import PredictorConfig
from lesa_kernels.checks import argument_error, check_int

LEAST_GAIN = 0.02
"""By which part a split must lower the validation loss, with each of two seeds."""


EPOCHS, LEARNING_RATE = 10, 1e-2
"""Of a brief training."""


TRAINING, VALIDATION = 64, 32
"""How many trajectories a brief training looks at, at most."""


def find_stages(
    trajectories: Trajectories,
    schedule: ScheduleLike | None = None,
    config: PredictorConfig | None = None,
    *,
    most: int = 4,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> tuple[float, ...]:
    """Chooses number and bounds of a predictor's noise stages: splits one stage again and again while that pays.

    Bounds may be at the noise levels of computed steps, so that no gap between two of them is cut. In each round every
    split into one more stage is trained briefly, on some of the trajectories, and that of the smallest loss on others
    is taken. The last round is the one whose split does not lower the loss by 2 % both with `seed` and with the next
    one, which has other trajectories for validation: what is less is noise, of which the smallest loss of several
    always has some.

    Args:
        trajectories: what `lesa.record` made.
        schedule: the computed steps, as of `train`.
        config: of the predictor; a newton one, whose `stage_bounds` count for nothing. Default: as of `train`.
        most: how many stages there may be.
        seed: of all that is random.
        device: where to train.
        progress: whether to show a progress bar.

    Returns:
        The falling `stage_bounds` for a `PredictorConfig`; none for one stage.

    Raises:
        ValueError: `config` or `schedule` does not fit the trajectories, the predictor is not a newton one or has other
            history lengths in other stages, or an argument is out of range; named.
    """
    check_plain(trajectories)
    most, seed = check_int("most", most), check_int("seed", seed, minimum=0)
    if len(set(trajectories.samples)) < 2:
        remedy = "Record more: one of them at least is for validation."
        raise argument_error("trajectories", "be of two samples or more", trajectories, remedy)
    config = complete_config(trajectories, config, schedule)
    if config.mixer != "newton":
        remedy = "Use a newton predictor, or set the stage bounds by hand."
        raise argument_error("config.mixer", "be 'newton' for stages to be found", config.mixer, remedy)
    if len(set(config.history_length)) > 1:
        remedy = "Pass one int, or set the stage bounds by hand."
        raise argument_error("config.history_length", "be equal in all stages", config.history_length, remedy)
    losses: dict[tuple[tuple[float, ...], int], float] = {}
    bar = tqdm(desc="stages", unit="training", disable=not progress)

    def loss(bounds, seed):
        if (bounds, seed) not in losses:
            staged = replace(config, stage_bounds=bounds, history_length=config.history_length[0])
            losses[bounds, seed] = _loss_of(trajectories, staged, device, seed)
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
    schedule = Schedule(config.schedule, config.num_inference_steps, config.schedule_sigmas)
    predicted = {*range(len(sigmas))} - set(schedule.steps)
    return [sigmas[step] for step in schedule.steps if min(predicted) < step < max(predicted)]


def _loss_of(trajectories, config, device, seed) -> float:
    """The validation loss, over many tokens, of a predictor that was trained briefly."""
    probe = _Probe(trajectories, config, None, device, seed)
    probe.fit(
        guided_epochs=0,
        epochs=EPOCHS,
        batch_size=8,
        tokens=32,
        learning_rate=LEARNING_RATE,
        head_aware=True,
        validation_fraction=0.25,
        progress=False,
    )
    return probe.validation_loss()


class _Probe(Training):
    """A brief training on some of the trajectories, which validates at its end only."""

    def _split(self, validation_fraction):
        training, validation = super()._split(validation_fraction)
        self.validation = validation[:VALIDATION]
        return training[:TRAINING], []

    @torch.no_grad()
    def validation_loss(self) -> float:
        return self._batch_loss(self.validation, tokens=MOST_TOKENS, guided=False).item()
