"""Runs of a pipeline in which a predictor forecasts steps, and through which gradients pass.

The pipelines of diffusers switch gradients off around their `__call__`. Here the function inside runs. The cache is the
usual one, so it computes and forecasts the same steps. It keeps the features as tensors with gradients, and not in a
ring. Each call of the transformer is checkpointed, computed or predicted: the backward pass runs it again. So a run
keeps the latents of each step, and one feature map for each computed step and stream, and nothing of the inside of the
model. While the model is run again, its blocks are checkpointed too.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModularPipeline
from torch.utils.checkpoint import checkpoint

from lesa.cache.forecasting import ForecastingHook
from lesa.cache.placement import check_uncached
from lesa.cache.planning import falling, pushed, times_at
from lesa.cache.run import Call
from lesa.cache.sites import Site
from lesa.cache.streams import ForecastState
from lesa.inputs import collate
from lesa.models import Adapter, adapters_for
from lesa.pipelines import quiet_progress, run_pipeline
from lesa.schedule import Schedule
from lesa.spread import is_spread
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.stream import StoredFeatures, Weights, stream_forecast

_MOVING_HOOKS = ("group_offloading", "layerwise_casting", "lazy_prefetch", "layer_execution_tracker")
"""The names of the hooks of diffusers that move or cast weights begin with these."""

_checkpointed: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class GradientRun:
    """What one run gave, with gradients.

    Args:
        latents: by step, the latents after it: after the last step, and after each one that comes before a computed
            one. The samples are in the order of the inputs.
        computed: the steps that were computed, rising from 0.
        last: the last step.
        made: what the pipeline returned: the latents, or images `[B, C, H, W]` or videos `[B, F, C, H, W]` in [0, 1].
    """

    latents: dict[int, torch.Tensor]
    computed: list[int]
    last: int
    made: Any


class DifferentiableRuns:
    """Runs of a pipeline in which a predictor forecasts steps, and through which gradients pass.

    Args:
        pipe: the pipeline.
        predictor: what is trained. It is on the device of the features, in float32.
    """

    def __init__(self, pipe: Any, predictor: FusedKANPredictor):
        self.pipe = pipe
        self._hook = _GradientHook(pipe, adapters_for(pipe), predictor)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """A context for runs and their backward passes.

        In it, the weights of the pipeline's models are frozen, and they are in eval mode. At the end, also after an
        error, everything is as before.

        Raises:
            RuntimeError: a cache is on.
        """
        with frozen(_models_of(self.pipe)), _with_gradients(self.pipe):
            self._hook.compare()
            self._hook.install()
            try:
                yield
            finally:
                self._hook.uninstall()

    def run(
        self,
        inputs: Sequence[dict],
        seeds: Sequence[int],
        num_inference_steps: int,
        schedule: Schedule,
        output_type: str = "latent",
    ) -> GradientRun:
        """Runs the pipeline, in the context `on`.

        Args:
            inputs: of samples that can share a call.
            seeds: of their noise.
            num_inference_steps: passed to the pipeline.
            schedule: the computed steps.
            output_type: passed to the pipeline: "latent", or "pt" for images.

        Raises:
            TypeError, ValueError, RuntimeError: a step can't be forecast, the scheduler makes another number of steps
                than it has noise levels, or no gradient passes through the pipeline.
        """
        hook, generators = self._hook, [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        latents: dict[int, torch.Tensor] = {}
        counts: list[int] = []  # the samples of each step

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            counts.append(len(tensors["latents"]))
            if step + 1 in hook.chosen or step + 1 == hook.total:
                latents[step] = tensors["latents"].clone()  # some pipelines write into them
            return {}

        hook.schedule = schedule
        with torch.inference_mode(False), torch.enable_grad(), quiet_progress(self.pipe):
            arguments = {name: _usable(value) for name, value in collate([*inputs]).items()}
            made = run_pipeline(self.pipe, arguments, generators, num_inference_steps, keep, output_type)
        if counts != [len(seeds)] * hook.total:
            got = Said(f"{len(counts)} steps of a scheduler with {hook.total} noise levels, for {len(seeds)} samples")
            must = "make one step for each of its scheduler's noise levels, for all samples"
            raise argument_error("pipe", must, got, "Use a scheduler with one call per step, or `lesa.refine`.")
        if not latents[hook.total - 1].requires_grad:
            raise _refusal("keep gradients from step to step", f"a {type(self.pipe).__name__}, which stops them")
        return GradientRun(latents, hook.chosen, hook.total - 1, made)


def check_differentiable(pipe: Any, predictor: FusedKANPredictor) -> None:
    """Raises an error unless gradients can pass through runs of the pipeline with the predictor.

    Raises:
        TypeError, ValueError: they cannot. The message names why.
        RuntimeError: a cache is on.
    """
    name = type(pipe).__name__
    if isinstance(pipe, ModularPipeline):
        raise _refusal("be no modular pipeline", f"a {name}", TypeError)
    adapters = adapters_for(pipe)
    check_uncached(pipe)
    if predictor.config.history == "steps":
        got = Said(f"{predictor.config.history!r}, that of the forecaster {predictor.config.mixer!r}")
        remedy = "Use a predictor whose history has computed steps only, such as 'newton', or use `lesa.refine`."
        raise argument_error("predictor.config.history", "be 'anchors'", got, remedy)
    if not predictor.forecaster.plans:
        must, remedy = "be a forecaster whose weights depend on noise levels only", "Use 'newton', or `lesa.refine`."
        raise argument_error("predictor.config.mixer", must, predictor.config.mixer, remedy)
    if not hasattr(type(pipe).__call__, "__wrapped__"):
        raise _refusal("have a `__call__` with the decorator `torch.no_grad`", f"a {name}, which has none", TypeError)
    if len(adapters) > 1:
        raise _refusal("have one transformer", f"a {name} with {' and '.join(adapters)}")
    (adapter,) = adapters.values()
    if len(adapter.branches) > 1:
        raise _refusal("have one output head", f"a {name}, whose transformer has {len(adapter.branches)}")
    if getattr(pipe, "controlnet", None) is not None:
        raise _refusal("have no ControlNet", f"a {name} with one")
    _check_weights(pipe, adapter.transformer)


def _check_weights(pipe: Any, transformer: torch.nn.Module) -> None:
    """Raises `ValueError` if a backward pass would not find the weights, or could not use them."""
    name = type(transformer).__name__
    if transformer is not pipe.transformer or vars(transformer).get("_compiled_call_impl") is not None:
        must, remedy = "have a transformer that is not compiled as a whole", "Compile it after the training."
        raise argument_error("pipe", must, Said(f"a compiled {name}"), remedy)
    if is_spread(transformer):
        raise _refusal("have a transformer that one process has as a whole", f"a {name} that several share")
    if any(map(_moves_weights, transformer.modules())) or any(part.is_meta for part in _tensors_of(transformer)):
        must = "have its weights in one place and one dtype"
        raise _refusal(must, f"a {name} that is offloaded or cast layer by layer")
    for part in _models_of(pipe):
        if any(tensor.is_inference() for tensor in _tensors_of(part)):
            got = Said(f"a {type(part).__name__} whose weights were made in `torch.inference_mode`")
            raise argument_error("pipe", "have weights that can take part in gradients", got, "Load it outside of it.")


def _refusal(must: str, got: str, kind: type[Exception] = ValueError) -> Exception:
    return argument_error("pipe", f"{must}, so that gradients pass through it", Said(got), "Use `lesa.refine`.", kind)


def _moves_weights(module: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers change where the weights of a module are, or their dtype."""
    hook: Any = vars(module).get("_hf_hook")
    if any(getattr(each, "offload", True) for each in getattr(hook, "hooks", () if hook is None else (hook,))):
        return True
    registry = vars(module).get("_diffusers_hook")
    return any(name.startswith(_MOVING_HOOKS) for name in getattr(registry, "hooks", ()))


def _models_of(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _usable(value: Any) -> Any:
    """An argument that gradients may be saved for: a copy of a tensor that was made in an inference mode."""
    if isinstance(value, list):
        return [_usable(each) for each in value]
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _kept(value: Any) -> Any:
    """An input of a call as its checkpoint keeps it: a copy of the sample, because some pipelines write into theirs."""
    return value.clone() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _checkpointed_module(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of a block, checkpointed. That of diffusers takes no keyword arguments, which a few models pass."""
    return _checkpointed(module.__call__, *args, **kwargs)


@contextlib.contextmanager
def _with_gradients(pipe: Any) -> Iterator[None]:
    """A context in which the pipeline has a class whose `__call__` does not switch gradients off."""
    cls = type(pipe)
    members = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members["__call__"] = inspect.unwrap(cls.__call__)
    pipe.__class__ = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(members))
    try:
        yield
    finally:
        pipe.__class__ = cls


@contextlib.contextmanager
def frozen(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """A context in which models are frozen and in eval mode. Those of diffusers checkpoint their blocks."""
    trained = [weight for model in models for weight in model.parameters() if weight.requires_grad]
    training = [module for model in models for module in model.modules() if module.training]
    blocks = [module for model in models for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: vars(block)[name] for name in names if name in vars(block)} for block in blocks]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        for module in training:
            module.training = False
        checkpointing: list[Any] = [each for each in models if getattr(each, "_supports_gradient_checkpointing", False)]
        for model in checkpointing:
            model.enable_gradient_checkpointing(_checkpointed_module)
        yield
    finally:
        for block, values in zip(blocks, before):
            for name in names:
                vars(block).pop(name, None)
            vars(block).update(values)
        for module in training:
            module.training = True
        for weight in trained:
            weight.requires_grad_(True)


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
            weights = _checkpointed(predictor.plan, [*planned.values()], targets, 1, **more)
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


class _GradientHook(ForecastingHook):
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
        return _checkpointed(_output, track.branch, self.trained, weights, arguments, *history.features)


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
        output, seen = _checkpointed(computed, *map(_kept, (*args, *kwargs.values())))
        if is_wanted and not all(features.requires_grad for _, features, _ in seen):
            got = f"a {type(self.adapter.transformer).__name__}, which stops them, as some quantised layers do"
            raise _refusal("have a transformer with gradients", got)
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
