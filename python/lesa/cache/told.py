"""The noise levels that the model is told in computed steps in place of those of its latents."""

from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch

from lesa.cache import reasons
from lesa.cache.run import Call, Run
from lesa.models import Adapter
from lesa_kernels import PredictorConfig
from lesa_kernels.checks import Said, argument_error

if TYPE_CHECKING:
    from lesa.cache.streams import ForecastState

_NEAR = 1e-3
"""How much the noise levels of a run may differ from those of the schedule for which the told levels were learned."""


class Told:
    """The timesteps that a run passes to a transformer in its computed steps.

    Args:
        run: the run, whose noise levels fall.
        steps: the computed steps, rising.
        levels: `[n]` float64 on the CPU, for each of these steps the noise level that is told. It may have gradients.
    """

    def __init__(self, run: Run, steps: tuple[int, ...], levels: torch.Tensor):
        self._run, self._places = run, {step: place for place, step in enumerate(steps)}
        self._timesteps = timesteps_at(run, levels)
        self._made: dict[tuple, list[torch.Tensor]] = {}

    @torch.compiler.disable
    def given(
        self, adapter: Adapter, call: Call, args: tuple, kwargs: dict[str, Any], note: Callable[[str], None]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call that is computed, with the told timestep in place of the one that was passed.

        Args:
            adapter: of the transformer.
            call: the call.
            args, kwargs: its arguments, as the pipeline has passed them.
            note: called if the transformer does not get one timestep for each sample. Then they are as they were.
        """
        passed: Any = call.arguments.get(adapter.timestep_argument)
        if call.step not in self._places:
            return args, kwargs
        if not isinstance(passed, torch.Tensor) or passed.ndim > 1:
            note(reasons.UNTOLD_TOKENS)
            return args, kwargs
        timestep = self._timesteps_like(passed)[self._places[call.step]]
        return adapter.own_forward.with_argument(adapter.timestep_argument, timestep, args, kwargs)

    def _timesteps_like(self, passed: torch.Tensor) -> list[torch.Tensor]:
        """For each computed step a tensor of the shape, strides, dtype and device of a timestep that was passed.

        Where the scheduler has whole numbers, such as Wan's, the told ones are rounded too, but not in a training.
        All are made with the first one, so later steps move nothing to the device. They share no memory, so that
        graphs that were compiled without them fit.
        """
        like = (passed.shape, passed.stride(), passed.dtype, passed.device)
        if like not in self._made:
            kept, timesteps = self._run.identity.dtype, self._timesteps
            if timesteps.requires_grad and not passed.is_floating_point():  # rounded ones would have no gradient
                kept = given = torch.float32
            else:
                given = passed.dtype
            timesteps = (timesteps if kept.is_floating_point else timesteps.round()).to(kept)
            timesteps = self._run.passes(timesteps.to(passed.device, given, non_blocking=True))
            is_expanded = passed.stride() in ((), (0,))
            rows = [
                each.clone().expand(passed.shape) if is_expanded else each.repeat(len(passed)) for each in timesteps
            ]
            self._made[like] = rows
        return self._made[like]


def told_in(
    state: "ForecastState",
    configs: Mapping[str, PredictorConfig],
    levels_of: Callable[[PredictorConfig], torch.Tensor | None],
    note: Callable[[str], None],
) -> dict[str, Told]:
    """What the transformers are told in a run, by their names. Notes if told levels are not used.

    Args:
        state: of the run, whose computed steps are chosen. Those of `lesa.ErrorControl` may become others in the run.
        configs: of the predictors, by the names of the transformers.
        levels_of: the told levels of a predictor, or None.
        note: called with what the user may not expect.
    """
    told = {}
    for name, config in configs.items():
        levels = levels_of(config)
        if levels is not None and state.controlled is None and _is_as_trained(config, state.run, state.computed):
            told[name] = Told(state.run, config.schedule or (), levels)
        elif levels is not None:
            note(reasons.UNTOLD)
    return told


def levels_in(config: PredictorConfig) -> torch.Tensor | None:
    """The told levels of a configuration, `[n]` float64 on the CPU, or None."""
    return None if config.told_levels is None else torch.tensor(config.told_levels, dtype=torch.float64, device="cpu")


def timesteps_at(run: Run, levels: torch.Tensor) -> torch.Tensor:
    """The scheduler's timesteps at noise levels, by straight lines between the steps of a run whose levels fall.

    The first and the last line go on outside of the run. The level of a step gives its own timestep, up to the last bit
    of float32.

    Args:
        run: the run.
        levels: `[n]` float64 on the CPU.

    Returns:
        `[n]` float64.
    """
    total = len(run.timesteps)
    sigmas = torch.tensor(run.sigmas[:total], dtype=torch.float64, device="cpu")
    timesteps = torch.tensor(run.timesteps, dtype=torch.float64, device="cpu")
    right = torch.searchsorted(-sigmas, -levels.detach()).clamp(1, total - 1)
    slopes = (timesteps[right] - timesteps[right - 1]) / (sigmas[right] - sigmas[right - 1])
    return timesteps[right] + (levels - sigmas[right]) * slopes


def check_can_be_told(pipe: Any, adapter: Adapter, learns_levels: bool = False) -> None:
    """Raises `ValueError` unless the transformer gets one timestep for each sample, so that another can replace it.

    Args:
        pipe, adapter: of the transformer.
        learns_levels: whether it was `learn_levels` that asked for told levels, and not a configuration.
    """
    why = adapter.untold
    if not why and getattr(getattr(pipe, "config", None), "expand_timesteps", False):
        why = "it gets a timestep for each token"
    if not why:
        return
    if learns_levels:
        got = Said(f"True for a {type(adapter.transformer).__name__}: {why}")
        remedy = "Leave it out."
        raise argument_error("learn_levels", "be False for this transformer", got, remedy)
    got = Said(f"levels for a {type(adapter.transformer).__name__}: {why}")
    remedy = "Take `told_levels` out of the configuration, with `dataclasses.replace`."
    raise argument_error("predictor.config.told_levels", "be None for this transformer", got, remedy)


def _is_as_trained(config: PredictorConfig, run: Run, computed: Set[int]) -> bool:
    """Whether a run has the steps and the noise levels of a predictor's schedule, and its levels fall."""
    sigmas, trained = run.executed_sigmas, config.schedule or ()
    if config.num_inference_steps not in (None, len(sigmas)) or computed != {*trained} or len(sigmas) < 2:
        return False
    total = len(run.timesteps)
    if any(a <= b for a, b in zip(run.sigmas[: total - 1], run.sigmas[1:total])):
        return False
    return all(abs(sigmas[step] - level) <= _NEAR for step, level in zip(trained, config.schedule_sigmas or ()))
