"""The hook on a transformer: which run, which step and which stream a call belongs to, and its features."""

import functools
import itertools
import math
import threading
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference, StateManager

from lesa.cache.device_values import Mailbox
from lesa.cache.run import Call, Run, version_of
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.dispatch import users_level

HOOK_NAME = "lesa"


COMPILE_FIRST = (
    "lesa decides outside of the compiled graph: compile with `pipe.transformer.compile(...)`, or call "
    "`torch.compile(pipe.transformer, fullgraph=True)` before `lesa.enable_cache`"
)


UNLOCATED = (
    "the timestep is not one of the scheduler's, or not the one that it is at",
    "A cached transformer serves the scheduler of the pipeline that the cache was enabled for.",
)
"""Why a call can't be placed in a run, and what to know of it."""


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
    check_no_other_cache(transformer)


def check_no_other_cache(transformer) -> None:
    if getattr(transformer, "is_cache_enabled", False):
        raise argument_error(
            "pipe",
            "have no other cache on",
            Said(f"one with a {type(transformer._cache_config).__name__}"),
            "Call `pipe.transformer.disable_cache()` first.",
            RuntimeError,
        )


@dataclass
class _Source:
    """What the latest call of a stream came with."""

    context: str
    text: torch.Tensor | None
    version: int | None
    kept: bool  # whether the call before had the same text


class _ContextTracker(StateManager):
    """Keeps the name of the current `cache_context`; diffusers hands it to every attribute of this type."""

    def __init__(self):
        super().__init__(None)
        self.name: str | None = None

    def set_context(self, context) -> None:
        self.name = getattr(context, "name", context)  # diffusers before 0.41 passes the bare name

    def reset(self) -> None:
        self.name = None


class _InnerGate:
    """Stands in the place of `forward`, a bound method of the transformer; without a hook it lets all calls through."""

    __slots__ = ("hook", "forward", "__dict__")  # wrappers copy the `__dict__` of what they wrap, and keep it

    def __init__(self, hook: "StepHook", forward: Callable):
        functools.update_wrapper(self, forward)  # for `inspect.signature`
        self.hook, self.forward = hook, forward

    def __call__(self, *args, **kwargs):
        hook = self.hook
        if hook is None or hook.inside == "compute":
            return self.forward(*args, **kwargs)
        if hook.inside == "predict":
            return hook.predict_inside(args, kwargs)
        return hook.enter(self.forward, args, kwargs)  # a call that came past the outer gate


class StepHook(ModelHook):
    """Base of the hooks on a transformer, which has two gates there.

    The outer one stands before everything that a call of the transformer runs, compiled or not. It finds run, step and
    stream, and decides whether the transformer is computed. The inner one stands in the place of the class's `forward`,
    below all that wraps it, such as offloading, context parallelism and hooks. In a step that is not computed it does
    the subclass's `predict` instead. So whatever wraps `forward` sees every step, in whichever order it was put on.

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
        self._sources: dict[str, _Source] = {}  # by stream
        self._called: set[str] = set()  # the streams that were called in this step
        self._entered = threading.Lock()  # held while a call is under way
        self._call: Call | None = None
        self.inside: str | None = None  # what the inner gate does now: "compute" or "predict"
        self._captured: tuple | None = None  # the inputs of the output head, from a compiled graph
        self._kept = False
        self._mailbox = Mailbox()
        self._warned: set[str] = set()

    # Putting it on and taking it off

    def install(self) -> None:
        """Puts the hook on the transformer.

        Raises:
            RuntimeError: it or another cache is on already.
        """
        transformer = self.adapter.transformer
        check_uncached(transformer)
        self._had_registry = hasattr(transformer, "_diffusers_hook")
        _join(HookRegistry.check_if_exists_or_initialize(transformer), self)
        self._forward = types.MethodType(type(transformer).forward, transformer)
        self._gate = _InnerGate(self, self._forward)
        if not _replace_forward(transformer, self._forward, self._gate):  # a wrapper that does not show what it wraps
            self._forward = transformer.forward
            transformer.forward = self._gate = _InnerGate(self, self._forward)
        # A module that `torch.compile` returned is called in the place of the transformer.
        self._called_module = self.pipe.transformer
        attributes = vars(self._called_module)
        self._compiled = attributes.get("_compiled_call_impl")
        attributes["_compiled_call_impl"] = self._outer_gate
        attributes["compile"] = self._compile
        self._capture = self.adapter.head_entry.register_forward_pre_hook(self._on_head_entry, prepend=True)

    def uninstall(self) -> None:
        """Restores the transformer. Does nothing if the hook is off already.

        A wrapper that was put around `forward` meanwhile, such as accelerate's for offloading, stays and works on.
        """
        transformer = self.adapter.transformer
        if installed_hook(transformer) is not self:
            return
        self._gate.hook = None  # it stays open: a wrapper may hold it unseen
        self._capture.remove()
        attributes = vars(self._called_module)
        del attributes["compile"], attributes["_compiled_call_impl"]
        if self._compiled is not None:
            attributes["_compiled_call_impl"] = self._compiled
        _replace_forward(transformer, self._gate, self._forward)
        registry = transformer._diffusers_hook
        _leave(registry)
        if not registry.hooks and not self._had_registry:
            del transformer._diffusers_hook
        self.forget()

    def _compile(self, *args, **kwargs) -> None:
        """In the place of the module's own `compile`: what is compiled is behind the outer gate."""
        self._compiled = torch.compile(self._called_module._call_impl, *args, **kwargs)

    def __deepcopy__(self, memo):
        raise argument_error(
            "transformer",
            "have no cache on to be copied",
            Said("one with lesa on"),
            "Call `lesa.disable_cache(pipe)` first.",
            RuntimeError,
        )

    def reset_state(self, module):
        """Called by diffusers when a run has ended: frees what was kept for it."""
        try:
            self._read_mail()  # what the last steps sent, which no further call will ask for
        finally:
            self.forget()
            self.context.reset()
        return module

    def forget(self) -> None:
        """Drops the current run and all that belongs to it."""
        self.run = None
        self._sources, self._called = {}, set()
        self._mailbox.clear()

    # What a subclass does

    def on_run(self, run: Run) -> None:
        """Called at the first step of a run."""

    def on_unlocated(self) -> None:
        """Called when a call's timestep is none of the scheduler's, or turns out late to have been none."""
        self.warn("{}: computing. {}".format(*UNLOCATED))

    def on_other_text(self, stream: str) -> None:
        """Called when a stream that kept its text gets another one."""

    def wants_prediction(self, call: Call) -> bool:
        """Whether this call is not to be computed."""
        return False

    def predict(self, call: Call, arguments: dict):
        """The transformer's output, forecast.

        Args:
            call: as it came to the outer gate.
            arguments: the transformer's, by name, as they came to the inner gate.
        """
        raise NotImplementedError

    def accepts(self, call: Call, output) -> bool:
        """Whether what `predict` gave is good, and the run still the same; else the call is computed."""
        return True

    def needed(self, kwargs: dict) -> dict:
        """The transformer's keyword arguments for a call that is computed."""
        return kwargs

    def keep(self, call: Call, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        """Gets the inputs of the output head, `[B, T, D]` and `[B, D]`, of a call that is computed."""
        raise NotImplementedError

    def finish(self, call: Call, kept: bool) -> None:
        """Called after a call that was computed.

        Args:
            call: that call.
            kept: whether `keep` was called. It is not where the head runs in a graph that was compiled before.
        """

    # The gates. Nothing of the two is compiled, but what they run may be.

    def _outer_gate(self, *args, **kwargs):
        return self.enter(self._compiled or self._called_module._call_impl, args, kwargs)

    @torch.compiler.disable(recursive=False, reason=COMPILE_FIRST)
    def enter(self, run, args, kwargs):
        """Computes a call by `run(*args, **kwargs)`, or predicts it."""
        if not self._entered.acquire(blocking=False):
            raise argument_error(
                "pipe",
                "enter a transformer with lesa on from one thread at a time",
                Said("a call during another one"),
                "Let the calls wait for each other, or give each thread a transformer of its own.",
                RuntimeError,
            )
        try:
            call, predicted = self._begin(args, kwargs)
            if predicted:
                output = self._predicted(call, args, kwargs)
                if output is not None:
                    return output
                if self.run is None:  # meanwhile it was found to be another scheduler's
                    call = self._call = None
            kwargs = self.needed(kwargs)
            self.inside = "compute"
            output = run(*args, **kwargs)
            if call is not None:
                self._computed(call)
            return output
        finally:
            self._call = self.inside = self._captured = None
            self._kept = False
            self._entered.release()

    @torch.compiler.disable
    def _begin(self, args, kwargs) -> tuple[Call | None, bool]:
        """What is called, or None if that is not known, and whether to predict it."""
        check_no_other_cache(self.adapter.transformer)
        arguments = self.adapter.bind(args, kwargs)
        if self.run is not None and not self.run.covers(self.pipe.scheduler):
            self.forget()  # what is on the way is about a run that is over
        self._read_mail()
        step = self._enter_step(arguments["timestep"])
        if step is None:
            return None, False
        sigma = self.run.sigmas[self.run.index]
        call, run = Call(step, self._stream_of(arguments), sigma, arguments), self.run
        predicted = self.wants_prediction(call)
        if self.run is not run:  # it was found to be another scheduler's
            return None, False
        self._call = call
        return call, predicted

    @torch.compiler.disable
    def _predicted(self, call: Call, args, kwargs):
        self.inside = "predict"
        output = self.adapter.transformer._call_impl(*args, **kwargs)
        return output if self.accepts(call, output) else None

    def predict_inside(self, args, kwargs):
        """`predict`, for the inner gate."""
        return self.predict(self._call, self.adapter.bind(args, kwargs))

    @torch.compiler.disable
    def _computed(self, call: Call) -> None:
        if self._captured is not None:
            self._keep(*self._captured)
        self.finish(call, self._kept)

    def _on_head_entry(self, module, args) -> None:
        """Keeps the inputs of the head at once, for what comes after may overwrite them; a graph copies them out."""
        if self.inside == "compute":
            if torch.compiler.is_compiling():
                self._captured = tuple(arg.detach().clone() for arg in args[:2])
            else:
                self._keep(*args[:2])

    @torch.compiler.disable
    def _keep(self, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        if self._call is not None:
            self._kept = True
            self.keep(self._call, features, conditioning)

    # Finding out what a call is

    def post(self, value: torch.Tensor, receive: Callable[[float], None]) -> None:
        """Sends for a number on the device; `receive` gets it once it is on the host: now, or at a later call."""
        self._mailbox.post(receive, value)
        self._read_mail()

    def _read_mail(self, wait: bool = False) -> None:
        """Hands out what is on the host, or with `wait` all that is on the way.

        Processes that share a transformer always wait: they must decide alike.
        """
        shared = getattr(self.adapter.transformer, "_parallel_config", None) is not None
        for receive, value in self._mailbox.collect(wait=wait or shared):
            receive(value)

    def warn(self, message: str) -> None:
        """Warns, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"lesa: {message}", RuntimeWarning, stacklevel=users_level())

    def is_awaited(self) -> bool:
        """Whether the pipeline is in the middle of a run, so that the next call of its transformer comes here."""
        run = self.run
        return run is not None and run.covers(self.pipe.scheduler) and run.position in range(len(run.timesteps))

    def _enter_step(self, timestep: torch.Tensor) -> int | None:
        """Finds the run and the step that this call belongs to; returns the executed step, or None if it is unknown."""
        scheduler = self.pipe.scheduler
        index = None
        if isinstance(getattr(scheduler, "timesteps", None), torch.Tensor):
            if self.run is None:
                self.run = Run(scheduler, self.adapter.timestep_scale)
            value = self._value_of(timestep)
            index = self.run.position if value is None else self.run.locate(value, timestep.dtype)
        if index is None:
            self.on_unlocated()
            return None
        if index < self.run.index:  # the same timesteps from the start again
            self.forget()
            self.run = Run(scheduler, self.adapter.timestep_scale)
        run = self.run
        if index != run.index:
            self._called = set()
        run.index = index
        self._check_timestep(run, index, timestep, value)
        if self.run is not run:  # it was another scheduler's
            return None
        if run.begin is None:
            run.begin = index
            self.on_run(run)
        return index - run.begin

    def _value_of(self, timestep: torch.Tensor) -> float | None:
        """The timestep's value, or None where reading it would wait for a GPU and the scheduler has a position."""
        run = self.run
        if timestep.device.type == "cpu" or run.position is None or not 0 <= run.position < len(run.timesteps):
            return timestep.reshape(-1)[0].item()
        return None

    def _check_timestep(self, run: Run, index: int, timestep: torch.Tensor, value: float | None) -> None:
        """Compares what was passed with the scheduler's timestep: now, or when it is on the host."""
        dtype = timestep.dtype

        def receive(value: float) -> None:
            if run is not self.run:
                return
            if not run.is_near(index, value, dtype):
                self.forget()
                self.on_unlocated()
            elif not math.isclose(value, run.passed(dtype)[index], rel_tol=2e-7):  # a GPU divides float32 otherwise
                run.exact = False

        def receive_spread(value: float) -> None:
            run.exact = value == 0

        if run.begin is None:
            self.post(timestep.amax() - timestep.amin(), receive_spread)
        if value is None:
            self.post(timestep.reshape(-1)[:1], receive)
        else:
            receive(value)

    def _stream_of(self, arguments: dict) -> str:
        """The stream of this call.

        It is named by its `cache_context`. Where several streams have one context, or none, a call belongs to the
        stream that had the same text before; else it is told by its order among the calls of the step. That says
        little where that stream has kept one text: then it may be another one, and its history is not this call's.
        """
        context, source = self.context.name or "main", arguments.get("encoder_hidden_states")
        same = (name for name, had in self._sources.items() if had.context == context and had.text is source)
        names = (context + (f"-{order}" if order > 1 else "") for order in itertools.count(1))
        own = (name for name in names if name not in self._sources or self._sources[name].context == context)
        name = next(n for n in itertools.chain(same, own) if n not in self._called)
        had, version = self._sources.get(name), version_of(source)
        kept = had is not None and had.text is source
        if had is not None and (had.version != version if kept else had.kept):
            self.on_other_text(name)
        self._called.add(name)
        self._sources[name] = _Source(context, source, version, kept)
        return name


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


def _replace_forward(transformer, old: Callable, new: Callable) -> bool:
    """Puts `new` wherever the module, accelerate or diffusers hold `old` as its forward; says whether there was one."""
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
