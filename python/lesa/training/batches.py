"""Batches of recorded tokens, and forecasts of them. Training and the search for schedules use them."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lesa.cache.planning import can_plan
from lesa.schedule import Schedule
from lesa.training.settings import TrainingSettings
from lesa.training.trajectories import Trajectories, Trajectory
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.stream import StoredFeatures, stream_forecast

CHECKPOINT_UPDATES = 20
"""After so many steps of the optimiser, or more, there is a checkpoint, where the user did not choose the epochs."""


class Split(NamedTuple):
    """The numbers of the trajectories to train on, and of those to validate with."""

    training: list[int]
    validation: list[int]


def split(trajectories: Trajectories, validation_fraction: float, seed: int) -> Split:
    """Splits trajectories at random. The trajectories of one sample stay together.

    Args:
        trajectories: to split.
        validation_fraction: share of the samples for validation. Unless it is 0, at least one sample of two or more.
        seed: of the choice.
    """
    by_sample = trajectories.by_sample
    order = torch.randperm(len(by_sample), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(len(order) - 1, max(1, round(validation_fraction * len(order)))) if validation_fraction else 0
    samples = [by_sample[i] for i in order]
    return Split(sum(samples[held_out:], []), sum(samples[:held_out], []))


def passes(trajectories: Trajectories, updates: int, settings: TrainingSettings) -> int:
    """In how many passes over the trajectories the optimiser takes about so many steps; at least one.

    Args:
        trajectories: to train on, and to validate with.
        updates: steps of the optimiser.
        settings: of the training. Its epochs do not matter.
    """
    return max(1, round(updates / _updates_of_a_pass(trajectories, settings)))


def epochs_per_checkpoint(trajectories: Trajectories, settings: TrainingSettings) -> int:
    """After how many epochs a training writes a checkpoint: where they are short, not after each of them."""
    return math.ceil(CHECKPOINT_UPDATES / _updates_of_a_pass(trajectories, settings))


def _updates_of_a_pass(trajectories: Trajectories, settings: TrainingSettings) -> int:
    count = len(split(trajectories, settings.validation_fraction, settings.seed).training)
    return math.ceil(count / settings.batch_size)


def part_of(schedule: Schedule, sigmas: Sequence[float]) -> Schedule:
    """Those steps of a schedule with noise levels that are in a part of its run. The part has these noise levels."""
    within = tuple(sigma for sigma in schedule.sigmas or () if sigmas[-1] <= sigma <= sigmas[0])
    return Schedule(tuple(range(len(within))), sigmas=within)


def check_whole(trajectories: Trajectories) -> None:
    """Raises `ValueError` unless all files of the recording can be trained on. Reads each of them once.

    A file may be damaged, or have NaN or Inf, or the noise level may rise in its run, where a new history begins.
    """
    for name, trajectory in zip(trajectories.names, trajectories):  # what is read is checked
        levels = trajectory.sigmas.tolist()
        for step, (before, level) in enumerate(zip(levels, levels[1:]), 1):
            if level > before:
                got = Said(f"{name}, in which it rises from {before:.6g} to {level:.6g} at step {step}")
                remedy = "Record again, with a scheduler and noise levels that fall."
                raise argument_error("trajectories", "have noise levels that never rise in a run", got, remedy)


def check_is_predictor(predictor: FusedKANPredictor) -> None:
    """Raises `TypeError` unless it is a predictor."""
    if not isinstance(predictor, FusedKANPredictor):
        remedy = "Load one with `FusedKANPredictor.from_pretrained`, or train one with `lesa.train`."
        raise argument_error("predictor", "be a FusedKANPredictor", predictor, remedy, TypeError)


class Head:
    """The output projection that was recorded with the trajectories, in float32.

    Args:
        trajectories: the recording.
        device: where to put it.
        transformer: whose head it is. None: of the first transformer.
    """

    def __init__(self, trajectories: Trajectories, device: torch.device | str, transformer: str | None = None):
        # Copies: what was read in an inference mode can have no part in gradients.
        weight, bias = trajectories.projections[transformer or next(iter(trajectories.projections))]
        self.eps, self.norm = trajectories.head_eps, trajectories.head_norm
        self.weight = weight.to(device, torch.float32, copy=True)
        self.bias = None if bias is None else bias.to(device, torch.float32, copy=True)

    def normed(self, features: torch.Tensor) -> torch.Tensor:
        """The features as the head's norm gives them, before the modulation."""
        if self.norm is None:
            return features
        norm = F.layer_norm if self.norm == "layer" else F.rms_norm
        return norm(features, features.shape[-1:], eps=self.eps)


class RollOut(NamedTuple):
    """What the model computed along a roll-out of a predictor.

    Args:
        features: `[C, T, D]` of the computed steps.
        drift: `[C, T, O]`, how far off the latents were before each of these steps, in the direction of the velocity.
    """

    features: torch.Tensor
    drift: torch.Tensor


class Batch:
    """The tokens of some trajectories side by side.

    Args:
        trajectories: trajectories of equal noise levels.
        head: the output projection of their model.
        generator: of the choice of tokens.
        tokens: how many tokens to take of each trajectory, at random; None for all.
        device: where to put the tensors.
        roll_outs: of each trajectory, its roll-outs. The same tokens are taken of them.
        stream: the name of the stream of calls that all trajectories are of, for a forecaster that reads it.
        end: the noise level after the last step.

    Attributes:
        features: `[S, N, D]`, N tokens of all trajectories.
        roll_outs: the roll-outs with `[C, N, ...]`, tokens side by side.
        velocities: `[S, N, O]`, the head's output for the features.
        sigmas: `[S]`.
        widths: `[S]`, by how much sigma falls in each step.
        times: `[S + 1]`, `sigmas` and 0.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        head: Head,
        generator: torch.Generator | None,
        tokens: int | None,
        device: torch.device | str,
        roll_outs: Sequence[Sequence[RollOut]] = (),
        stream: str | None = None,
        end: float = 0.0,
    ):
        def chosen(trajectory: Trajectory) -> slice | torch.Tensor:
            total = trajectory.features.shape[1]
            if tokens is None or tokens >= total:
                return slice(None)
            return torch.randperm(total, generator=generator)[:tokens]

        indices = [chosen(t) for t in trajectories]

        def taken(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [value[:, index].to(device, torch.float32) for value, index in zip(values, indices)]

        parts = taken([t.features for t in trajectories])

        def modulation(name: str) -> torch.Tensor:
            rows = [getattr(t, name)[:, None].float() for t in trajectories]
            return torch.cat([row.expand(-1, part.shape[1], -1) for row, part in zip(rows, parts)], 1).to(device)

        self.head, self.stream = head, stream
        self.sigmas = trajectories[0].sigmas.to(device)
        self.times = torch.cat([self.sigmas, self.sigmas.new_zeros(1)])
        self.widths = -torch.diff(self.sigmas, append=self.sigmas.new_full((1,), end))
        self.features = torch.cat(parts, 1)
        self.roll_outs = [
            RollOut(torch.cat(taken([r.features for r in alike]), 1), torch.cat(taken([r.drift for r in alike]), 1))
            for alike in zip(*roll_outs)
        ]
        self.scale, self.shift = modulation("scale"), modulation("shift")
        self.velocities = self.velocity(self.features, slice(None))

    def velocity(self, features: torch.Tensor, steps: slice | list[int] | torch.Tensor) -> torch.Tensor:
        """The head's output `[P, N, O]` for features `[P, N, D]` of these steps."""
        modulated = self.head.normed(features) * (1 + self.scale[steps]) + self.shift[steps]
        return F.linear(modulated, self.head.weight, self.head.bias)


class Plan:
    """For one schedule: which steps are predicted, and from which history.

    Args:
        computed: the steps of the schedule.
        total: number of steps of the run.
        length: of the history that the predictor reads, K.
        every_step: whether the history has all earlier steps. Otherwise it has the computed ones.
        device: of the tensors.
        steps: the steps to predict. None: all steps that are not computed.

    Attributes:
        steps: the predicted steps, P of them.
        history: `[P, K]` steps that the ring holds, newest first. Where there are fewer, the oldest is repeated.
        count: `[P]`, how many steps the ring holds.
        gaps: `[P]`, number of the gap between computed steps that each predicted step is in.
    """

    def __init__(
        self,
        computed: Collection[int],
        total: int,
        length: int,
        every_step: bool = False,
        device: torch.device | str = "cpu",
        steps: list[int] | None = None,
    ):
        computed = set(computed)
        self.steps = [i for i in range(1, total) if i not in computed] if steps is None else steps
        history = [[j for j in range(i - 1, -1, -1) if every_step or j in computed][:length] for i in self.steps]
        padded = [h + [h[-1]] * (length - len(h)) for h in history]
        self.count = torch.tensor([len(h) for h in history], dtype=torch.int32, device=device)
        self.history = torch.tensor(padded, device=device)
        self.gaps = torch.tensor([sum(c < i for c in computed) - 1 for i in self.steps], device=device)


def predict(
    predictor: FusedKANPredictor,
    batch: Batch,
    plan: Plan,
    features: torch.Tensor,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forecasts `[P, N, D]` of the steps of the plan, each from a given history: a ring with one row per step.

    Args:
        predictor, batch, plan: what forecasts what.
        features: `[S, N, D]` of all steps, or of those in `steps` only.
        steps: a tensor of rising steps.
    """
    history = plan.history.T.flip(0).contiguous()  # oldest first, as in a full ring that begins at slot 0
    sigmas = batch.sigmas
    rows = history if steps is None else torch.searchsorted(steps, history)
    cursor = torch.zeros_like(plan.count)
    state = (features[rows], None, sigmas[history], cursor, plan.count, sigmas[plan.steps])
    return predictor.forecast(*state, **predictor.extra(batch.times, batch.stream))


def roll_out(
    predictor: FusedKANPredictor,
    batch: Batch,
    plan: Plan,
    features: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
    detach: bool = False,
) -> torch.Tensor:
    """Forecasts `[P, N, D]` one after the other, each from a history that holds the earlier forecasts.

    Args:
        predictor, batch, plan: what forecasts what.
        features: `[S, N, D]` of all steps, or of those in `steps` only. Default: those of the batch.
        steps: a tensor of rising steps, among them all that are computed.
        detach: whether a forecast has no gradient with respect to the forecasts before it.
    """
    features, sigmas = batch.features if features is None else features, batch.sigmas
    length, total = predictor.config.max_history, len(sigmas)
    rows = {step: row for row, step in enumerate(range(total) if steps is None else steps.tolist())}
    seen, forecasts = [features[:1]], []
    cursor, predicted = torch.zeros(1, dtype=torch.int32, device=features.device), set(plan.steps)
    forecast_of = _step_by_step(predictor, batch, plan)
    for step in range(1, total):
        if step not in predicted:
            seen.append(features[rows[step]][None])
            continue
        newest = torch.stack([seen[max(step - k, 0)] for k in range(length, 0, -1)])
        count = torch.full_like(cursor, min(step, length))
        forecast = forecast_of(step, StoredFeatures(newest, None, cursor, count))
        seen.append(forecast.detach() if detach else forecast)
        forecasts.append(forecast)
    return torch.cat(forecasts)


def _step_by_step(
    predictor: FusedKANPredictor, batch: Batch, plan: Plan
) -> Callable[[int, StoredFeatures], torch.Tensor]:
    """What forecasts a step of the plan from the newest features, oldest first. The history has all earlier steps."""
    length, sigmas = predictor.config.max_history, batch.sigmas
    if can_plan(predictor):  # the weights of all steps are made at once
        levels = sigmas.tolist()
        before = [levels[max(step - length, 0) : step][::-1] for step in plan.steps]
        targets, more = [levels[step] for step in plan.steps], predictor.extra(batch.times.tolist(), batch.stream)
        weights = dict(zip(plan.steps, predictor.plan(before, targets, 1, **more)))
        low_rank = predictor.low_rank(batch.features.dtype)
        return lambda step, features: stream_forecast(features, weights[step], low_rank, predictor.backend)

    def forecast(step: int, features: StoredFeatures) -> torch.Tensor:
        at = torch.arange(step - length, step).clamp(min=0)
        state = (features.storage, None, sigmas[at][:, None], features.cursor, features.count, sigmas[step : step + 1])
        return predictor.forecast(*state, **predictor.extra(batch.times, batch.stream))

    return forecast
