"""The cache with gradients: features are tensors with gradients, and calls of the transformer are checkpointed."""

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lesa.cache.forecasting import ForecastingHook
from lesa.cache.planning import falling, pushed, times_at
from lesa.cache.run import Call
from lesa.cache.sites import Site
from lesa.cache.streams import ForecastState
from lesa.models import Adapter
from lesa.schedule import Schedule
from lesa.training.gradient_checks import refusal
from lesa_kernels import FusedKANPredictor
from lesa_kernels.stream import StoredFeatures, Weights, stream_forecast

checkpointed: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)


def _kept(value: Any) -> Any:
    """An input of a call as its checkpoint keeps it: a copy of the sample, because some pipelines write into theirs."""
    return value.clone() if isinstance(value, torch.Tensor) and value.requires_grad else value


def checkpointed_module(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of a block, checkpointed. That of diffusers takes no keyword arguments, which a few models pass."""
    return checkpointed(module.__call__, *args, **kwargs)


@dataclass
class _History:
    """What stands in place of a ring: the newest features of a stream of calls, with gradients.

    For the arguments, see `FeatureRing`.

    Attributes:
        features: `[B, T, D]` each, newest first.
        levels: their noise levels.
        planned: by step, the noise levels that it was planned for, and the weights of its forecast for one sample.
    """

    capacity: int
    batch: int
    tokens: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    features: tuple[torch.Tensor, ...] = ()
    levels: tuple[float, ...] = ()
    planned: dict[int, tuple[tuple[float, ...], Weights]] = field(default_factory=dict)
    host_nbytes = 0

    @property
    def device_nbytes(self) -> int:
        return sum(each.nbytes for each in self.features)

    def push(self, features: torch.Tensor, sigma: float) -> None:
        """Pushes features, by the rules of `FeatureRing.push`."""
        before, self.levels = self.levels, pushed(self.levels, sigma, self.capacity)
        kept = () if len(self.levels) == 1 else self.features[1:] if self.levels == before else self.features
        self.features = (features, *kept)[: self.capacity]

    def plan(
        self, predictor: FusedKANPredictor, step: int, sigmas: Sequence[float], computed: Set[int], stream: str
    ) -> Weights:
        """The weights of the forecast of a step. Those of all later steps are made with the first ones.

        For the arguments, see `lesa.cache.planning.Planner`.
        """
        if step not in self.planned or self.planned[step][0] != self.levels:
            levels, planned = self.levels, {}
            for later in range(step, falling(sigmas, step).stop):
                if later in computed:
                    levels = pushed(levels, sigmas[later], self.capacity)
                else:
                    planned[later] = levels
            more = predictor.extra(times_at(sigmas, step), stream)
            targets = [sigmas[later] for later in planned]
            weights = checkpointed(predictor.plan, [*planned.values()], targets, 1, **more)
            self.planned = dict(zip(planned, zip(planned.values(), weights)))
        return self.planned[step][1]


class _Follower(torch.nn.Module):
    """What the cache gets in place of the predictor. It gives histories with gradients in place of rings.

    Args:
        predictor: what is trained.
    """

    def __init__(self, predictor: FusedKANPredictor):
        super().__init__()
        self.predictor = predictor
        self.config, self.forecaster = predictor.config, predictor.forecaster
        self.device, self.provenance, self.extra = predictor.device, predictor.provenance, predictor.extra

    def make_ring(
        self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device, max_device_bytes: None, width: int
    ) -> _History:
        """A history for features `[batch, tokens, width]`."""
        return _History(self.config.max_history, batch, tokens, width, dtype, device)

    def fuses_velocity(self, ring: _History) -> bool:
        """Whether forecast and output head are one kernel, which has no gradients."""
        return False


class GradientHook(ForecastingHook):
    """Computes or forecasts each call as the cache does, with gradients. Where the cache would not, it is an error.

    Args:
        pipe, adapters: as in `ForecastingHook`.
        predictor: what is trained.

    Attributes:
        schedule: of the next run.
        total: how many steps the latest run has.
        chosen: the computed steps of the latest run, rising.
    """

    def __init__(self, pipe: Any, adapters: Mapping[str, Adapter], predictor: FusedKANPredictor):
        self.trained, self.total = predictor, 0
        self.chosen: list[int] = []
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor | None]] | None = None
        follower: Any = _Follower(predictor)
        super().__init__(pipe, adapters, dict.fromkeys(adapters, follower), Schedule((0,)), False, None, True, None)

    def make_site(self, name: str, adapter: Adapter) -> Site:
        return _CheckpointedSite(self, name, adapter)

    def on_run(self, state: ForecastState) -> None:
        super().on_run(state)
        self.total, self.chosen = len(state.run.executed_sigmas), sorted(state.computed)

    def on_head_entry(self, site: Site, head: int, features: torch.Tensor, conditioning: torch.Tensor | None) -> None:
        if self.seen is None:
            super().on_head_entry(site, head, features, conditioning)
        else:  # a copy, because later operations may overwrite it
            self.seen.append((head, features.clone(), conditioning))

    def predict(self, state: ForecastState, call: Call, arguments: dict[str, Any]) -> Any:
        (track,) = state.streams[call.stream].tracks
        history: Any = track.ring
        sigmas = state.run.executed_sigmas
        weights = history.plan(self.trained, call.step, sigmas, state.computed, call.stream)
        return checkpointed(_output, track.branch, self.trained, weights, arguments, *history.features)


class _CheckpointedSite(Site):
    """A transformer whose computed calls keep their inputs only. The backward pass computes them again."""

    def compute(self, stream: str | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        hook, call, names = self.hook, self.placement.call, tuple(kwargs)

        def computed(*values: Any) -> tuple[Any, list]:
            seen: list[tuple] = []
            hook.seen = seen
            try:
                return call(*values[: len(args)], **dict(zip(names, values[len(args) :]))), seen
            finally:
                hook.seen = None

        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        is_wanted = any(value.requires_grad for value in tensors)
        output, seen = checkpointed(computed, *map(_kept, (*args, *kwargs.values())))
        if is_wanted and not all(features.requires_grad for _, features, _ in seen):
            got = f"a {type(self.adapter.transformer).__name__}, which stops them, as some quantised layers do"
            raise refusal("have a transformer with gradients", got)
        for each in seen:
            hook.on_head_entry(self, *each)
        return output


def _output(
    branch: Adapter, predictor: FusedKANPredictor, weights: Weights, arguments: dict[str, Any], *features: torch.Tensor
) -> Any:
    """The transformer's output of a predicted call.

    Args:
        branch: the adapter.
        predictor: has the residual.
        weights: of the forecast, for one sample.
        arguments: those of the forward by name.
        features: `[B, T, D]` each, newest first.
    """
    batch, length = len(features[0]), predictor.config.max_history
    oldest_first = [*[features[-1]] * (length - len(features)), *features[::-1]]  # as in a full ring
    there: list[Any] = [None if part is None else part.expand(batch, *part.shape[1:]) for part in weights]
    count = torch.full((batch,), len(features), dtype=torch.int32, device=features[0].device)
    stored = StoredFeatures(torch.stack(oldest_first), None, torch.zeros_like(count), count)
    forecast = stream_forecast(stored, Weights(*there), predictor.low_rank(features[0].dtype))
    velocity = branch.run_head(forecast, branch.conditioning(arguments, forecast.dtype), arguments)
    return branch.output(arguments, velocity)
