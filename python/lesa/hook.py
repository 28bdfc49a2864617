"""The hook on a transformer: which run, which step and which stream a call belongs to, and its features."""

import threading
import warnings
from collections.abc import Callable

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager

from lesa_kernels._checks import Said, argument_error

HOOK_NAME = "lesa"


def installed_hook(transformer) -> "StepHook | None":
    """The hook that is on `transformer`, or None."""
    registry = getattr(transformer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(HOOK_NAME)


def check_uncached(transformer) -> None:
    """Raises `RuntimeError` if lesa or a cache of diffusers is on for `transformer`."""
    if installed_hook(transformer) is not None:
        raise argument_error(
            "pipe",
            "have no cache on",
            Said("one with lesa on already for this transformer"),
            "Call `lesa.disable_cache(pipe)`, or let the recording end, first.",
            RuntimeError,
        )
    _check_no_other_cache(transformer)


def _check_no_other_cache(transformer) -> None:
    if getattr(transformer, "is_cache_enabled", False):
        raise argument_error(
            "pipe",
            "have no other cache on",
            Said(f"one with a {type(transformer._cache_config).__name__}"),
            "Call `pipe.transformer.disable_cache()` first.",
            RuntimeError,
        )


class Run:
    """One call of a pipeline: its noise levels, and how far it is.

    Args:
        scheduler: the pipeline's, its timesteps set for this run.
        timestep_scale: by which its timesteps are divided before the transformer gets them.

    Attributes:
        sigmas: float32 noise level of each of the scheduler's steps.
        begin: index of the first step that was executed, or None before it.
        index: index of the current step.
    """

    def __init__(self, scheduler, timestep_scale: float):
        self.scheduler, self.timestep_scale = scheduler, timestep_scale
        self.identity = scheduler.timesteps  # a new tensor every run; kept, so that its address can't be reused
        self.timesteps = scheduler.timesteps.tolist()
        sigmas = getattr(scheduler, "sigmas", None)
        known = sigmas is not None and len(sigmas) >= len(self.timesteps)
        train_steps = scheduler.config.get("num_train_timesteps", 1000)
        self.sigmas = sigmas.tolist() if known else [t / train_steps for t in self.timesteps]
        self.begin: int | None = None
        self.index = -1

    def covers(self, scheduler) -> bool:
        """Whether the scheduler is still in this run: a new run sets new timesteps."""
        return self.scheduler is scheduler and self.identity is scheduler.timesteps

    @property
    def executed_sigmas(self) -> list[float]:
        """Noise levels of the steps that this run executes."""
        return self.sigmas[self.begin : len(self.timesteps)]

    def locate(self, timestep: torch.Tensor) -> int | None:
        """The index of the scheduler's timestep that the transformer was given, or None.

        The value has the latents' precision, where neighbours can merge. Of the candidates the scheduler's own position
        decides. Without a position, as in a loop that does not use `scheduler.step`, it is the nearest that does not go
        back. Another scheduler drives this call, and the answer is None, where the position is no candidate, where a
        step would be left out without a position, and where this scheduler's timesteps were never set.
        """
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            return None
        value = float(timestep.reshape(-1)[0]) * self.timestep_scale
        tolerance = max(torch.finfo(timestep.dtype).eps, 1e-6) * abs(value) + 1e-3
        near = [i for i, t in enumerate(self.timesteps) if abs(t - value) <= tolerance]
        position = getattr(self.scheduler, "step_index", None)
        if position is None:
            position = getattr(self.scheduler, "begin_index", None)
        if position is not None:
            return position if position in near else None
        if self.begin is not None:
            near = [i for i in near if i <= self.index + 1]
        return min(near, key=lambda i: (i < self.index, abs(self.timesteps[i] - value)), default=None)


class _ContextTracker(StateManager):
    """Keeps the name of the current `cache_context`; diffusers hands it to every attribute of this type."""

    def __init__(self):
        super().__init__(None)
        self.name: str | None = None

    def set_context(self, context) -> None:
        self.name = getattr(context, "name", context)  # diffusers before 0.41 passes the bare name

    def reset(self) -> None:
        self.name = None


class StepHook(ModelHook):
    """Base of the hooks on a transformer. Finds run, step and stream of each call and hands it to `on_call`.

    Args:
        pipe: the pipeline whose scheduler tells the steps.
        adapter: of the pipeline's transformer.
    """

    _is_stateful = True

    def __init__(self, pipe, adapter):
        super().__init__()
        self.pipe, self.adapter = pipe, adapter
        self.context = _ContextTracker()
        self.run: Run | None = None
        self._calls_at_step: dict[str | None, int] = {}
        self._on_features: Callable | None = None  # set while a computed step runs
        self._entered = threading.Lock()  # held while a call is under way
        self._warned: set[str] = set()

    def install(self) -> None:
        """Puts the hook on the transformer.

        Raises:
            RuntimeError: it or another cache is on already.
        """
        transformer = self.adapter.transformer
        check_uncached(transformer)
        self._had_registry = hasattr(transformer, "_diffusers_hook")
        self._had_forward = "forward" in transformer.__dict__
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        registry.register_hook(self, HOOK_NAME)
        self._forward, self._link = transformer.forward, self.fn_ref.forward
        self._capture = self.adapter.head_entry.register_forward_pre_hook(self._on_head_entry)

    def uninstall(self) -> None:
        """Restores the transformer. Does nothing if the hook is off already.

        A wrapper that was put around `forward` since, such as accelerate's for offloading, stays and works on: the link
        that it holds lets calls through.
        """
        transformer = self.adapter.transformer
        if installed_hook(transformer) is not self:
            return
        self._capture.remove()
        registry = transformer._diffusers_hook
        names = [*registry.hooks]
        later = names[names.index(HOOK_NAME) + 1 :]
        caller = registry.hooks[later[0]].fn_ref if later else transformer
        if self.fn_ref.forward is not self._link:  # a hook below was removed: diffusers put what it had below here
            self.fn_ref.original_forward = self.fn_ref.forward
        link = caller.forward
        registry.remove_hook(HOOK_NAME, recurse=False)  # it also gives the caller a new link, whatever the old one was
        if link is not self._forward:
            caller.forward, through = link, ModelHook()
            self.fn_ref.pre_forward, self.fn_ref.post_forward = through.pre_forward, through.post_forward
            self.fn_ref.forward = self.fn_ref.original_forward
        elif not registry.hooks:
            if not self._had_forward:
                del transformer.forward
            if not self._had_registry:
                del transformer._diffusers_hook
        self.forget()

    def reset_state(self, module):
        """Called by diffusers when a run has ended: frees what was kept for it."""
        self.forget()
        self.context.reset()
        return module

    def forget(self) -> None:
        """Drops the current run and all that belongs to it."""
        self.run = None
        self._calls_at_step = {}

    def on_run(self, run: Run) -> None:
        """Called at the first step of a run."""

    def on_unlocated(self) -> None:
        """Called when a call's timestep is none of the scheduler's; the call is computed."""

    def on_call(self, step: int, stream: str, sigma: float, call: dict, compute: Callable):
        """Handles one call of the transformer.

        Args:
            step: index among the executed steps of the run.
            stream: name of the stream of calls, such as "cond".
            sigma: the step's noise level.
            call: the transformer's arguments by name.
            compute: `compute(on_features)` runs the transformer and returns its output; on the way
                `on_features(features [B, T, D], conditioning)` gets the inputs of the output head.

        Returns:
            The transformer's output.
        """
        raise NotImplementedError

    def new_forward(self, module, *args, **kwargs):
        if not self._entered.acquire(blocking=False):
            raise argument_error(
                "pipe",
                "enter a transformer with lesa on from one thread at a time",
                Said("a call during another one"),
                "Let the calls wait for each other, or give each thread a transformer of its own.",
                RuntimeError,
            )
        try:
            _check_no_other_cache(module)
            return self._call(args, kwargs)
        finally:
            self._entered.release()

    def _call(self, args, kwargs):
        call = self.adapter.bind(args, kwargs)
        step = self._enter_step(call["timestep"])
        if step is None:
            self.warn(
                "the timestep is not one of the scheduler's, or not the one that it is at: computing. A cached "
                "transformer serves the scheduler of the pipeline that the cache was enabled for"
            )
            self.on_unlocated()
            return self.fn_ref.original_forward(*args, **kwargs)

        def compute(on_features):
            self._on_features = on_features
            try:
                return self.fn_ref.original_forward(*args, **kwargs)
            finally:
                self._on_features = None

        return self.on_call(step, self._stream_name(), self.run.sigmas[self.run.index], call, compute)

    def warn(self, message: str) -> None:
        """Warns, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"lesa: {message}", RuntimeWarning, stacklevel=5)

    def _on_head_entry(self, module, args) -> None:
        if self._on_features is not None:
            self._on_features(*args[:2])
        elif not self._entered.locked():  # a wrapper or hook below was removed, and took this one along
            self.warn(
                "the transformer ran past lesa's hook, which another hook took along when it was removed: nothing is "
                "predicted. Call `lesa.disable_cache(pipe)` and enable the cache again; with offloading, enable the "
                "cache first"
            )

    def _enter_step(self, timestep) -> int | None:
        """Finds the run and the step that this call belongs to; returns the executed step, or None if it is unknown."""
        scheduler = self.pipe.scheduler
        if self.run is None or not self.run.covers(scheduler):
            self.forget()
            self.run = Run(scheduler, self.adapter.timestep_scale)
        index = self.run.locate(timestep)
        if index is None:
            return None
        if index < self.run.index:  # the same timesteps from the start again
            self.forget()
            self.run = Run(scheduler, self.adapter.timestep_scale)
        run = self.run
        if index != run.index:
            self._calls_at_step = {}
        run.index = index
        if run.begin is None:
            run.begin = index
            self.on_run(run)
        return index - run.begin

    def _stream_name(self) -> str:
        """The stream of this call: its `cache_context`, and its order among the calls of a step in one context."""
        context = self.context.name
        order = self._calls_at_step.get(context, 0)
        self._calls_at_step[context] = order + 1
        return (context or "main") + (f"-{order + 1}" if order else "")
