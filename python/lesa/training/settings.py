"""With which settings a predictor is trained, and the complete configuration that it gets."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lesa.cache.planning import making_room
from lesa.schedule import Schedule, ScheduleLike, Spread, as_schedule
from lesa.training.trajectories import Trajectories
from lesa_kernels import PredictorConfig
from lesa_kernels.checks import Said, argument_error, check_float, check_int

DEFAULT_COMPUTED_STEPS = 9

UPDATES, REFINING_UPDATES = 600, 200
"""How many steps the optimiser takes in closed loop, and in each round of refining, if the epochs are not given.

These and the next ones follow from measurements; see docs/research.md.
"""

ROUNDS = 3
"""How many rounds of refining there are."""

TOKENS_PER_BATCH = 16
"""How many random tokens of each trajectory a step of the optimiser takes."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a predictor is fitted.

    Args:
        guided_epochs: passes over the trajectories in the first stage, whose histories are true.
        epochs: passes in the second stage, whose histories are as at inference.
        batch_size: trajectories per step of the optimiser.
        tokens_per_batch: random tokens taken of each trajectory per step; None for all.
        learning_rate: of AdamW at the start. It falls to zero along a cosine.
        head_aware: whether the loss looks at what the output head makes of the features, or at the features alone.
        validation_fraction: share of the samples that is kept for validation.
        seed: of initialisation, order, tokens, validation samples and guided schedules.
        reach: by how many steps the guided phase moves the computed steps at most.
        controlled: whether the guided phase has schedules such as error control chooses, instead of moved ones.

    Raises:
        TypeError, ValueError: a setting is out of range; the message names it.
    """

    guided_epochs: int = 0
    epochs: int = 60
    batch_size: int = 8
    tokens_per_batch: int | None = TOKENS_PER_BATCH
    learning_rate: float = 3e-3
    head_aware: bool = True
    validation_fraction: float = 0.1
    seed: int = 0
    reach: int = 1
    controlled: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "guided_epochs": check_int("guided_epochs", self.guided_epochs, minimum=0),
            "epochs": check_int("epochs", self.epochs, minimum=0),
            "batch_size": check_int("batch_size", self.batch_size),
            "learning_rate": check_float("learning_rate", self.learning_rate, minimum=1e-8),
            "head_aware": bool(self.head_aware),
            "validation_fraction": check_float("validation_fraction", self.validation_fraction, 0.0, 0.9),
            "seed": check_seed(self.seed),
            "reach": check_int("reach", self.reach, minimum=0),
            "controlled": bool(self.controlled),
        }
        if self.tokens_per_batch is not None:
            checked["tokens_per_batch"] = check_int("tokens_per_batch", self.tokens_per_batch)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as a checkpoint holds them. The first two determine others."""
        return {"controlled": self.controlled, "epochs": self.epochs, **asdict(self)}


def check_seed(seed: Any) -> int:
    """The seed; raises `TypeError` or `ValueError` unless generators of torch take it, and the next one too."""
    return check_int("seed", seed, minimum=0, maximum=2**64 - 2)


def check_config(config: Any) -> PredictorConfig:
    """The configuration; raises `TypeError` if it is something else."""
    if not isinstance(config, PredictorConfig):
        remedy = "Build a PredictorConfig, or leave it out."
        raise argument_error("config", "be a PredictorConfig", config, remedy, TypeError)
    return config


def check_trainable(config: PredictorConfig) -> None:
    """Raises `ValueError` if such a predictor has nothing to train."""
    if not config.forecaster.is_trained:
        must, remedy = (
            "be one that has something to train",
            "Use `FusedKANPredictor(config)` as it is, with a schedule.",
        )
        raise argument_error("config.mixer", must, config.mixer, remedy)


def config_settings(config: PredictorConfig) -> dict[str, Any]:
    """The configuration by name, as a checkpoint holds it. The first two determine others."""
    return {"mixer": config.mixer, "stage_bounds": config.stage_bounds, **config.to_dict()}


def usable_device(device: str | torch.device) -> torch.device:
    """The device; raises `ValueError` if torch cannot compute on it."""
    try:
        found = torch.device(device)
        if found.type != "meta":
            return torch.empty(0, device=found).device
        reason = "it holds no values"
    except (AssertionError, RuntimeError, TypeError) as error:  # the first line is torch's own explanation
        reason = str(error).splitlines()[0].rstrip(".")
    got = Said(f"{str(device)!r}: {reason}")
    raise argument_error("device", "be one on which torch can compute", got, "Pass 'cpu', or 'cuda' with a GPU.")


def complete_config(
    trajectories: Trajectories, config: PredictorConfig | None, schedule: ScheduleLike | None
) -> PredictorConfig:
    """The predictor's configuration, with what the trajectories and the schedule determine.

    Args:
        trajectories: to train on.
        config: of the predictor. None: the default of `lesa.train`.
        schedule: the computed steps. None: those of `config`, else spread ones.

    Raises:
        ValueError: `config` or `schedule` does not fit the trajectories; the message names the field.
    """
    total, width, family = trajectories.num_inference_steps, trajectories.feature_dim, trajectories.family
    config = PredictorConfig(width) if config is None else check_config(config)
    for field, wanted in (("feature_dim", width), ("family", family), ("num_inference_steps", total)):
        given = getattr(config, field)
        if given not in (None, wanted):
            remedy = "Change the configuration, or record other trajectories."
            raise argument_error(f"config.{field}", f"be that of the trajectories, {wanted!r}", given, remedy)
    if schedule is None:
        schedule = config.schedule or spread_over(trajectories, min(DEFAULT_COMPUTED_STEPS, total))
    schedule = as_schedule(schedule, total)
    if trajectories.switch is not None:  # the second transformer begins with a computed step
        steps = tuple(sorted({*schedule.steps, trajectories.switch}))
        schedule, config = Schedule(steps, schedule.num_inference_steps), _divided(trajectories, config)
    if schedule.steps[-1] >= total or schedule.num_inference_steps not in (None, total):
        raise argument_error(
            "schedule",
            f"be made for the {total} steps of the trajectories",
            schedule,
            "Choose steps below that, or record with as many steps as the schedule has.",
        )
    if len(schedule) == total:
        raise argument_error("schedule", "leave steps to predict", schedule, "Compute fewer steps.")
    sigmas = trajectories.run_sigmas
    return replace(
        config,
        family=family,
        num_inference_steps=total,
        schedule=schedule.steps,
        schedule_sigmas=tuple(sigmas[s] for s in schedule.steps),
        schedule_errors=None,
        told_levels=None,
        more_step_counts=None,
    )


def spread_over(trajectories: Trajectories, count: int) -> Schedule:
    """The default schedule of `count` computed steps, by the noise levels of the recording."""
    computed, switch = Spread(count).computed_in(trajectories.run_sigmas), trajectories.switch
    if switch is not None:
        begins = frozenset({0, switch})
        computed = making_room(computed, begins) | begins
    return Schedule(tuple(sorted(computed)), trajectories.num_inference_steps)


def _divided(trajectories: Trajectories, config: PredictorConfig) -> PredictorConfig:
    """The configuration with a bound between the noise stages where a second transformer begins.

    It has one already, or stages of different history lengths, or a forecaster without stages: then it stays as it is.
    """
    sigmas, switch = trajectories.run_sigmas, trajectories.switch or 0
    before, begin = sigmas[switch - 1], sigmas[switch]
    is_divided = any(begin <= bound < before for bound in config.stage_bounds)
    if is_divided or not config.stage_bounds or len({*config.lengths}) > 1:
        return config
    return with_stages(config, tuple(sorted({*config.stage_bounds, (before + begin) / 2}, reverse=True)))


def check_one_transformer(trajectories: Trajectories, what: str) -> None:
    """Raises `ValueError` if the recording is of a pipeline with two transformers, for which `what` is not possible."""
    if trajectories.switch is not None:
        must = f"be of a pipeline with one transformer for {what}"
        got = Said(f"those of {' and '.join(trajectories.projections)}")
        raise argument_error("trajectories", must, got, "Leave it out, or pass a list of steps as `schedule`.")


def with_stages(config: PredictorConfig, bounds: tuple[float, ...]) -> PredictorConfig:
    """The configuration with other noise stages, which all have the history length of its first stage."""
    return replace(config, stage_bounds=bounds, history_length=config.lengths[0])
