"""The hook on a transformer: the only file that meets the wrappers of diffusers, accelerate and torch.compile on it."""

import functools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference, StateManager

from lesa.cache.device_values import DeviceValues
from lesa.cache.run import Call, Run, RunState
from lesa.models import Adapter
from lesa_kernels.checks import Said, argument_error, usage_error
from lesa_kernels.dispatch import users_level

HOOK_NAME = "lesa"

COMPILE_FIRST = (
    "lesa decides outside of the compiled graph: compile with `pipe.transformer.compile(...)`, or call "
    "`torch.compile(pipe.transformer, fullgraph=True)` before `lesa.enable_cache`"
)

UNLOCATED = (
    "the timestep is not one of the scheduler's, or not its current one",
    "A cached transformer works only with the scheduler of the pipeline for which the cache was enabled.",
)
"""Why a call cannot be placed in a run, and what the user should know."""

State = TypeVar("State", bound=RunState)


def installed_hook(transformer: torch.nn.Module) -> "StepHook | None":
    """The hook that is on `transformer`, or None."""
    registry = getattr(transformer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(HOOK_NAME)


def check_uncached(transformer: torch.nn.Module) -> None:
    """Raises `RuntimeError` if lesa or a cache of diffusers is on for `transformer`."""
    if installed_hook(transformer) is not None:
        raise argument_error(
            "pipe",
            "have no cache on",
            Said("one with lesa on already for this transformer"),
            "Call `lesa.disable_cache(pipe)` first, or wait until the recording has ended.",
            RuntimeError,
        )
    check_no_other_cache(transformer)


def check_no_other_cache(transformer: torch.nn.Module) -> None:
    """Raises `RuntimeError` if a cache of diffusers is on for `transformer`."""
    if getattr(transformer, "is_cache_enabled", False):
        raise argument_error(
            "pipe",
            "have no other cache on",
            Said(f"one with a {type(transformer._cache_config).__name__}"),
            "Call `pipe.transformer.disable_cache()` first.",
            RuntimeError,
        )


class _ContextTracker(StateManager):
    """Keeps the name of the current `cache_context`. Diffusers tells it to every attribute of this type."""

    def __init__(self) -> None:
        super().__init__(None)  # the class of the states, of which there are none here
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        self.name = getattr(context, "name", context)  # diffusers before 0.41 passes the bare name

    def reset(self) -> None:
        self.name = None


class _InnerGate:
    """Replaces `forward`, a bound method of the transformer. Without a hook it lets all calls through."""

    __slots__ = ("hook", "forward", "__dict__")  # wrappers copy the `__dict__` of what they wrap, and keep it

    def __init__(self, hook: "StepHook", forward: Callable):
        functools.update_wrapper(self, forward)  # for `inspect.signature`
        self.hook: StepHook | None = hook
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.hook
        if hook is None or hook.inside == "compute":
            return self.forward(*args, **kwargs)
        if hook.inside == "predict":
            return hook.predict_inside(args, kwargs)
        return hook.enter(self.forward, args, kwargs)  # a call that did not pass the outer gate


class StepHook(ModelHook, Generic[State]):
    """Base of the hooks on a transformer, which have two gates there.

    The outer gate comes before everything that a call of the transformer runs, compiled or not. It finds the run, the
    step and the stream, and decides whether the transformer is computed. The inner gate replaces the class's `forward`,
    inside everything that wraps it, such as offloading, context parallelism and hooks. In a step that is not computed
    it calls the subclass's `predict` instead. So the wrappers see every step, whether they or the cache came first.

    What belongs to one run is in `state`. When the run fails, or another run replaces it, the state is dropped. Values
    that have not come from the device yet belong to the state, so the values of a run that is over are never read.

    Args:
        pipe: the pipeline whose scheduler gives the steps.
        adapter: the adapter of the pipeline's transformer.

    Attributes:
        state: the state of the current run, or None between runs.
        inside: what the inner gate does in the current call: "compute" or "predict"; None between calls.
    """

    _is_stateful = True

    def __init__(self, pipe: Any, adapter: Adapter):
        super().__init__()
        self.pipe, self.adapter = pipe, adapter
        self.context = _ContextTracker()
        self.state: State | None = None
        self._entered = threading.Lock()  # held during a call
        self._located: tuple[State, Call] | None = None  # the current call, if its place in a run is known
        self.inside: str | None = None
        self._captured: tuple | None = None  # the inputs of the output head in the current call, from a compiled graph
        self._warned: set[str] = set()

    # Install and uninstall

    def install(self) -> None:
        """Puts the hook on the transformer.

        Raises:
            RuntimeError: it or another cache is on already.
        """
        transformer = self.adapter.transformer
        check_uncached(transformer)
        self._had_registry = hasattr(transformer, "_diffusers_hook")
        _join(HookRegistry.check_if_exists_or_initialize(transformer), self)
        self._forward: Callable = types.MethodType(type(transformer).forward, transformer)
        self._gate = _InnerGate(self, self._forward)
        if not _replace_forward(transformer, self._forward, self._gate):  # a wrapper that does not show what it wraps
            self._forward = transformer.forward
            transformer.forward = self._gate = _InnerGate(self, self._forward)
        # A module that `torch.compile` returned is called instead of the transformer.
        self._called_module = self.pipe.transformer
        attributes = vars(self._called_module)
        self._compiled = attributes.get("_compiled_call_impl")
        attributes["_compiled_call_impl"] = self._outer_gate
        attributes["compile"] = self._compile
        self._capture = self.adapter.head_entry.register_forward_pre_hook(self._on_head_entry, prepend=True)

    def uninstall(self) -> None:
        """Restores the transformer. Does nothing if the hook is off already.

        A wrapper that was put around `forward` in the meantime, for example by offloading, stays and works.
        """
        transformer = self.adapter.transformer
        if installed_hook(transformer) is not self:
            return
        self._gate.hook = None  # the gate stays open: a wrapper may hold it where lesa does not see it
        self._capture.remove()
        attributes = vars(self._called_module)
        del attributes["compile"], attributes["_compiled_call_impl"]
        if self._compiled is not None:
            attributes["_compiled_call_impl"] = self._compiled
        _replace_forward(transformer, self._gate, self._forward)
        registry = vars(transformer)["_diffusers_hook"]
        _leave(registry)
        if not registry.hooks and not self._had_registry:
            del transformer._diffusers_hook
        self.state = None

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the module's own `compile`: what is compiled is behind the outer gate."""
        self._compiled = torch.compile(self._called_module._call_impl, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "StepHook":
        sentence = "`transformer` cannot be copied while a cache of lesa is on."
        raise usage_error(sentence, "Call `lesa.disable_cache(pipe)` first.", RuntimeError)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers when a run has ended: drops what was kept for it."""
        try:
            self._read()  # what the last steps asked for, which no later call will read
        finally:
            self.state = None
            self.context.reset()
        return module

    # What a subclass does

    def new_state(self, run: Run, values: DeviceValues) -> State:
        """The state of a run that begins; arguments as in `RunState`."""
        raise NotImplementedError

    def on_run(self, state: State) -> None:
        """Called at the first step of a run."""
        raise NotImplementedError

    def on_unlocated(self) -> None:
        """Called when a call's timestep is not one of the scheduler's, or when that turns out later."""
        self.warn("{}: computing. {}".format(*UNLOCATED))

    def wants_prediction(self, state: State, call: Call) -> bool:
        """Whether this call is not to be computed."""
        return False

    def predict(self, state: State, call: Call, arguments: dict[str, Any]) -> Any:
        """The transformer's output, forecast.

        Args:
            state: of the current run.
            call: as it came to the outer gate.
            arguments: the transformer's arguments by name, as they came to the inner gate.
        """
        raise NotImplementedError

    def on_predicted(self, state: State, call: Call, output: Any) -> None:
        """Called with what `predict` gave, to ask the device whether it is good."""

    def accepts(self, state: State, call: Call, output: Any) -> bool:
        """Whether what `predict` gave is good, as far as is known; if not, the call is computed."""
        return True

    def needed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The transformer's keyword arguments for a call that is computed."""
        return kwargs

    def keep(self, state: State, call: Call, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        """Gets the inputs of the output head, `[B, T, D]` and `[B, D]`, of a call that is computed."""
        raise NotImplementedError

    def finish(self, state: State, call: Call) -> None:
        """Called after a call that was computed. `call.kept` is False if the head ran where lesa does not see it."""

    # The gates. They are not compiled; what they run may be.

    def _outer_gate(self, *args: Any, **kwargs: Any) -> Any:
        return self.enter(self._compiled or self._called_module._call_impl, args, kwargs)

    @torch.compiler.disable(recursive=False, reason=COMPILE_FIRST)
    def enter(self, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Computes a call by `run(*args, **kwargs)`, or predicts it."""
        if not self._entered.acquire(blocking=False):
            raise usage_error(
                "`pipe` called its transformer from two threads at the same time, while a cache of lesa was on.",
                "Let one call wait for the other, or give each thread a transformer of its own.",
                RuntimeError,
            )
        try:
            located = self._located = self._begin(args, kwargs)
            if located is not None and located[1].predicted:
                output = self._predicted(*located, args, kwargs)
                if output is not None:
                    return output
            kwargs = self.needed(kwargs)
            self.inside = "compute"
            output = run(*args, **kwargs)
            self._computed()
            return output
        except BaseException:
            self.state = None  # the run has failed
            raise
        finally:
            self._located = self.inside = self._captured = None
            self._entered.release()

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict[str, Any]) -> tuple[State, Call] | None:
        """Finds the place of a call in a run, and decides whether to predict it; None if the place is not known."""
        check_no_other_cache(self.adapter.transformer)
        arguments = self.adapter.bind(args, kwargs)
        if self.state is not None and not self.state.run.covers(self.pipe.scheduler):
            self.state = None
        state = self._locate(arguments["timestep"])
        if state is not None and not self._read(wait=state.needs_values):
            state = self._locate(arguments["timestep"])
        if state is None:
            self.on_unlocated()
            return None
        run = state.run
        if run.begin is None:
            run.begin = run.index
            self.on_run(state)
        stream = state.stream_of(self.context.name or "main", arguments.get("encoder_hidden_states"))
        call = Call(run.step, stream, run.sigmas[run.index], arguments)
        call.predicted = self.wants_prediction(state, call)
        return state, call

    @torch.compiler.disable
    def _predicted(self, state: State, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a call that is to be predicted, or None if it must be computed after all."""
        self.inside = "predict"
        output = self.adapter.transformer._call_impl(*args, **kwargs)
        self.on_predicted(state, call, output)
        self._read()
        if not self.accepts(state, call, output):
            return None
        state.end_call()
        return output

    def predict_inside(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`predict`, for the inner gate."""
        state, call = self._located  # type: ignore[misc]  # the outer gate has set it
        return self.predict(state, call, self.adapter.bind(args, kwargs))

    @torch.compiler.disable
    def _computed(self) -> None:
        if self._captured is not None:
            self._keep(*self._captured)
        if self._located is not None:
            state, call = self._located
            self.finish(state, call)
            state.end_call()

    def _on_head_entry(self, module: torch.nn.Module, args: tuple) -> None:
        """Keeps the inputs of the head at once, because later steps may overwrite them; a graph copies them out."""
        if self.inside == "compute":
            if torch.compiler.is_compiling():
                self._captured = tuple(arg.detach().clone() for arg in args[:2])
            else:
                self._keep(*args[:2])

    @torch.compiler.disable
    def _keep(self, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        if self._located is not None:
            state, call = self._located
            call.kept = True
            self.keep(state, call, features, conditioning)

    # Finding out which step a call is

    def _read(self, wait: bool = False) -> bool:
        """Reads the values that have come from the device; with `wait`, all that the run has asked for.

        This is the only place that does. It returns False, and the state is dropped, if a value says that another
        scheduler drives the transformer.
        """
        if self.state is None:
            return False
        self.state.values.read(wait)
        if self.state.is_foreign:
            self.state = self._located = None
            self.on_unlocated()
        return self.state is not None

    def warn(self, message: str) -> None:
        """Warns, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"lesa: {message}", RuntimeWarning, stacklevel=users_level())

    def is_awaited(self) -> bool:
        """Whether the pipeline is in the middle of a run, so that the next call of its transformer comes here."""
        return self.state is not None and self.state.run.is_at_a_step_of(self.pipe.scheduler)

    def _locate(self, timestep: torch.Tensor) -> State | None:
        """The state of the run that a call with this timestep belongs to, at its step; None if that is not known."""
        scheduler = self.pipe.scheduler
        if not isinstance(getattr(scheduler, "timesteps", None), torch.Tensor):
            return None
        state = self.state = self.state or self._begin_state()
        value = state.run.value_of(timestep, state.values.waits)
        index = state.run.position if value is None else state.run.locate(value, timestep.dtype)
        if index is None:
            return None
        if index < state.run.index:  # the same timesteps from the start again
            state = self.state = self._begin_state()
        state.enter(index)
        state.check_timestep(timestep, value)
        return state

    def _begin_state(self) -> State:
        is_shared = getattr(self.adapter.transformer, "_parallel_config", None) is not None  # by several processes
        return self.new_state(Run(self.pipe.scheduler, self.adapter.timestep_scale), DeviceValues(waits=is_shared))


def _join(registry: HookRegistry, hook: StepHook) -> None:
    """Lets the hook hear of contexts and resets, without wrapping `forward`.

    It comes first in the order, where the removal of another hook never looks for the wrapper of a neighbour.
    """
    registry.hooks[HOOK_NAME] = hook
    registry._hook_order.insert(0, HOOK_NAME)
    registry._fn_refs.insert(0, HookFunctionReference())


def _leave(registry: HookRegistry) -> None:
    index = registry._hook_order.index(HOOK_NAME)
    del registry.hooks[HOOK_NAME], registry._hook_order[index], registry._fn_refs[index]


def _replace_forward(transformer: torch.nn.Module, old: Callable, new: Callable) -> bool:
    """Puts `new` wherever the module, accelerate or diffusers hold `old` as its forward; says whether any did."""
    registry = getattr(transformer, "_diffusers_hook", None)
    holders = [(transformer, "_old_forward")]
    holders += [(ref, name) for ref in getattr(registry, "_fn_refs", ()) for name in ("forward", "original_forward")]
    found = [(holder, name) for holder, name in holders if vars(holder).get(name) == old]
    for holder, name in found:
        setattr(holder, name, new)
    if transformer.forward == old:
        found.append((transformer, "forward"))
        transformer.forward = new
        if new == types.MethodType(type(transformer).forward, transformer):
            del transformer.forward  # the class's own
    return bool(found)
