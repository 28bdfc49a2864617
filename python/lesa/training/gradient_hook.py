"""The cache with gradients: features are tensors with gradients, and calls of the transformer are checkpointed."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from lesa.cache.forecasting import ForecastingHook
from lesa.cache.planning import falling, pushed, times_at
from lesa.cache.run import Call
from lesa.cache.sites import Site
from lesa.cache.stats import StreamStats
from lesa.cache.streams import ForecastState
from lesa.models import Adapter
from lesa.schedule import Schedule
from lesa.training.gradient_checks import TrainingFailedError, refusal
from lesa.training.learned_levels import LearnedLevels
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import argument_error, usage_error
from lesa_kernels.stream import StoredFeatures, Weights, stream_forecast

checkpointed: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """An input of a call as its checkpoint keeps it: a copy of the sample, because some pipelines write into theirs."""
    return tensor.clone() if tensor.requires_grad else tensor


def _shaped(tensor: torch.Tensor) -> torch.Tensor:
    """In place of a sample, whose shape alone is read: a tensor of this shape that takes no memory."""
    return tensor.new_zeros(()).expand(tensor.shape) if tensor.requires_grad else tensor


def _have_gradients(values: Any) -> bool:
    """Whether one of the tensors in nested lists, tuples and dicts has gradients."""
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(values))


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
        levels: what the model is told, if that is trained too.

    Attributes:
        schedule: of the next run.
        total: how many steps the latest run has.
        chosen: the computed steps of the latest run, rising.
        seen: the inputs of the output heads in a call that is computed now, or None.
        are_layers_checked: whether the layers of the transformer are known to give gradients of their inputs.
    """

    def __init__(
        self,
        pipe: Any,
        adapters: Mapping[str, Adapter],
        predictor: FusedKANPredictor,
        levels: LearnedLevels | None = None,
    ):
        self.trained, self.total = predictor, 0
        self.chosen: list[int] = []
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor | None]] | None = None
        follower: Any = _Follower(predictor)
        self._first: int | None = None  # the step of the first forecast in the run
        self.are_layers_checked = False
        predictors = dict.fromkeys(adapters, follower)
        if levels is not None:
            self.levels_of = lambda _: levels()
        self._levels = levels
        super().__init__(
            pipe,
            adapters,
            predictors,
            Schedule((0,)),
            as_trained=False,
            max_device_bytes=None,
            strict=True,
            observer=None,
        )

    def make_site(self, name: str, adapter: Adapter) -> Site:
        return _CheckpointedSite(self, name, adapter)

    def on_run(self, state: ForecastState) -> None:
        super().on_run(state)
        self.total, self.chosen, self._first = len(state.run.executed_sigmas), sorted(state.computed), None
        if self._levels is not None and not state.told:
            must = "have the steps and noise levels of the pipeline's runs, so that levels can be learned for them"
            got = self.trained.config.schedule_sigmas
            raise argument_error("predictor.config.schedule_sigmas", must, got, "Pass `learn_levels=False`.")

    def wants_prediction(self, state: ForecastState, call: Call) -> bool:
        is_after_forecast = self._first is not None and call.step > self._first
        if is_after_forecast and not self.adapter.sample(call.arguments).requires_grad:
            got = f"a {type(self.pipe).__name__}, which has stopped them before step {call.step}"
            raise refusal("keep gradients from step to step", got)
        return super().wants_prediction(state, call)

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
        self._first = call.step if self._first is None else self._first
        branch = track.branch
        read = {
            name: value if name in branch.conditioned_on else tree_map_only(torch.Tensor, _shaped, value)
            for name, value in arguments.items()
        }
        return checkpointed(_output, branch, self.trained, weights, read, *history.features)

    def _on_sum(self, state: ForecastState, stats: StreamStats, step: int, value: float) -> None:
        if not math.isfinite(value):
            remedy = (
                "Lower `learning_rate`. If this comes in the first update, check the predictor with `lesa.evaluate`, "
                "or use bfloat16 or float32."
            )
            raise usage_error(f"The forecast of step {step} was not finite.", remedy, TrainingFailedError)

    def _fall_back(self, reason: str, remedy: str) -> None:
        sentence = f"A step can't be forecast in a training through whole runs: {reason}."
        raise usage_error(sentence, remedy, RuntimeError)


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

        values = (*args, *kwargs.values())
        is_wanted = _have_gradients(values)
        is_to_check = is_wanted and not hook.are_layers_checked
        with _checked_layers(self.adapter.transformer) if is_to_check else contextlib.nullcontext():
            output, seen = checkpointed(computed, *tree_map_only(torch.Tensor, _kept, values))
        if is_wanted and not all(features.requires_grad for _, features, _ in seen):
            raise _stopped_in(self.adapter.transformer)
        hook.are_layers_checked |= is_to_check
        for each in seen:
            hook.on_head_entry(self, *each)
        return output


@contextlib.contextmanager
def _checked_layers(transformer: torch.nn.Module) -> Iterator[None]:
    """A context in which each layer that has weights, and no layers inside, must give gradients of its inputs.

    Raises:
        ValueError: one does not.
    """

    def check(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if made and _have_gradients((args, kwargs)) and not _have_gradients(made):
            raise _stopped_in(layer)

    layers = [module for module in transformer.modules() if not module._modules and module._parameters]
    handles = [layer.register_forward_hook(check, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stopped_in(module: torch.nn.Module) -> Exception:
    got = f"one with a {type(module).__name__}, which stops them, as some quantised layers do"
    return refusal("have a transformer with gradients", got)


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
