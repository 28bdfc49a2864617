"""The hook on a transformer: finds the step of each call, and lets it be computed or predicted."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook

from lesa.cache import reasons
from lesa.cache.context import ContextTracker
from lesa.cache.device_values import DeviceValues
from lesa.cache.events import State, StepEvents
from lesa.cache.placement import Watch, check_no_layer_cache, check_no_other_cache, check_uncached, refusal_to_copy
from lesa.cache.run import Call, Run
from lesa.cache.sites import Site
from lesa.models import Adapter
from lesa.spread import is_spread
from lesa_kernels.checks import usage_error


class StepHook(StepEvents[State], ModelHook):
    """Base of the hooks on the transformer of a pipeline, or on both experts of Wan 2.2.

    A gate comes before everything that a call of the transformer runs, compiled or not. It finds the run, the step and
    the stream, and decides whether the transformer is computed. In a step that is not computed, the forward of the
    transformer's class is exchanged for the subclass's `predict`, inside everything that wraps it, such as offloading,
    autocast, context parallelism and hooks. So the wrappers see every step, whether they or the cache came first.

    What belongs to one run is in `state`. When the run fails, or another run replaces it, the state is dropped. Values
    that have not come from the device yet belong to the state, so the values of a run that is over are never read.

    Two experts share the state, in which steps are counted over the whole run. Their streams of calls are separate.

    Args:
        pipe: the pipeline whose scheduler gives the steps.
        adapters: of the pipeline's transformers, by the names of the components.

    Attributes:
        sites: the transformers that it is on.
        site, adapter, placement: that of the current or latest call, its adapter, and what is on it.
        state: the state of the current run, or None between runs.
        inside: what happens in the current call: "compute" or "predict"; None between calls.
    """

    _is_stateful = True

    def __init__(self, pipe: Any, adapters: Mapping[str, Adapter]):
        super().__init__()
        self.pipe = pipe
        self.context = ContextTracker()
        self.state: State | None = None
        self.sites = tuple(self.make_site(name, adapter) for name, adapter in adapters.items())
        self.go_to(self.sites[0])
        self._watch = Watch(self)
        self._entered = threading.Lock()  # held during a call
        self._located: tuple[State, Call] | None = None  # the current call, if its place in a run is known
        self.inside: str | None = None
        self._captured: tuple = ()  # the inputs of the output heads in the current call, from a compiled graph
        self._calls = 0
        self._bypassed = False  # in the run of the pipeline
        self._last_index: int | None = None  # of the latest call in it whose place was known
        self._begun: int | None = None  # how many runs have begun while the pipeline runs; None if it does not run

    def make_site(self, name: str, adapter: Adapter) -> Site:
        """The site of the transformer that is the pipeline's component of this name."""
        return Site(self, name, adapter)

    # On and off

    def install(self) -> None:
        """Puts the hook on. If that fails, nothing of it stays on.

        Raises:
            RuntimeError: it or another cache is on already.
        """
        check_uncached(self.pipe)
        try:
            for site in self.sites:
                site.placement.put()
            self._watch.put()
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Restores transformers and pipeline. Does nothing if the hook is off already."""
        for site in self.sites:
            site.placement.remove()
        self._watch.remove()
        self.state = None

    def go_to(self, site: Site) -> None:
        """Makes another site the current one."""
        self.site, self.adapter, self.placement = site, site.adapter, site.placement

    def __deepcopy__(self, memo: dict) -> "StepHook":
        raise refusal_to_copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refusal_to_copy()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers when a run has ended: drops what was kept for it."""
        try:
            self._read()  # what the last steps asked for, which no later call will read
        finally:
            self.state = None
            self.context.reset()
        return module

    # A run of the pipeline. A loop of the user's own has none.

    @contextlib.contextmanager
    def pipeline_run(self) -> Iterator[None]:
        """Entered while the pipeline runs. When it has ended, nothing is kept for it."""
        outer = self._begun, self._bypassed, self._last_index  # of a run in whose callback this one runs
        calls, self._begun, self._bypassed, self._last_index = self._calls, 0, False, None
        try:
            self._check_driven(False)
            yield
            if self.placement.is_on and not self._bypassed:
                self._check_driven(self._calls == calls)
            if self.placement.is_on and not self._bypassed:
                self._check_steps(self._calls == calls)
        except BaseException:
            self.state = None  # the run has failed
            raise
        finally:
            self._begun, self._bypassed, self._last_index = outer
        self.reset_state(self.adapter.transformer)

    def _check_steps(self, is_unused: bool) -> None:
        """Tells `on_bypassed` if the scheduler has gone on after the last call, or tells `on_no_call`."""
        stepped, last = getattr(self.pipe.scheduler, "step_index", None), self._last_index
        if stepped is not None and (is_unused or (last is not None and stepped > last + 1)):
            self.bypass(*reasons.SKIPPED)
        elif is_unused:
            self.on_no_call()

    def _check_driven(self, is_unused: bool) -> None:
        """Tells `on_bypassed` if the pipeline has another transformer than one with the hook; see `Site.is_swapped`."""
        if any(site.is_swapped(is_unused) for site in self.sites):
            self.bypass(*reasons.SWAPPED)

    def bypass(self, reason: str, remedy: str) -> None:
        """Tells `on_bypassed`, and remembers it for the end of the run."""
        self._bypassed = True
        self.on_bypassed(reason, remedy)

    # The calls of a transformer, which come through the gate of its site

    @torch.compiler.disable(recursive=False, reason=reasons.COMPILE_FIRST)
    def enter(self, site: Site, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Computes a call, or predicts it."""
        if not self._entered.acquire(blocking=False):
            raise usage_error(
                "`pipe` called its transformer from two threads at the same time, while a cache of lesa was on.",
                "Let one call wait for the other, or give each thread a transformer of its own.",
                RuntimeError,
            )
        try:
            if site is not self.site:
                self.go_to(site)
            output = self._begin(args, kwargs)
            if output is not None:
                return output
            self.inside = "compute"
            output = site.compute(self._located and self._located[1].stream, *self.given(args, kwargs))
            self._computed()
            return output
        except BaseException:
            self.state = None  # the run has failed
            raise
        finally:
            self._located, self.inside, self._captured = None, None, ()
            self._entered.release()

    def given(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the transformer gets in a call that is computed."""
        return args, self.needed(kwargs)

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a call that is predicted, or None if it must be computed."""
        located = self._located = self._find(args, kwargs)
        return None if located is None or not located[1].predicted else self._predicted(*located, args, kwargs)

    def _find(self, args: tuple, kwargs: dict[str, Any]) -> tuple[State, Call] | None:
        """Finds the place of a call in a run, and decides whether to predict it; None if the place is not known."""
        self._calls += 1
        self.placement.look_at_forward()
        check_no_other_cache(self.site.name, self.adapter.transformer)
        arguments = self.adapter.bind(args, kwargs)
        timestep = self.adapter.timestep(arguments)
        if self.state is not None and not self.state.run.covers(self.pipe.scheduler):
            self.state = None
        if self.state is not None and self.adapter.has_other_form:
            self.state.run.learn_passed()
        state = self._locate(timestep)
        if state is not None and not self._read(wait=state.needs_values):
            state = self._locate(timestep)
        if state is None:
            self._last_index = None
            self.on_unlocated()
            return None
        run = state.run
        if run.begin is None:
            for site in self.sites:
                check_no_layer_cache(site.adapter.transformer)
            run.begin = run.index
            self.on_run(state)
            self._count_run(state)
        stream = state.stream_of(self.site.prefix + (self.context.name or "main"), self.adapter.text(arguments))
        call = Call(run.step, stream, run.sigmas[run.index], arguments, self.site.name)
        call.predicted = self.wants_prediction(state, call)
        return state, call

    def _count_run(self, state: State) -> None:
        """Tells `on_restart` if a run begins where the pipeline is in the middle of another one."""
        if self._begun is not None:  # otherwise it is a loop of the user's own
            self._begun += 1
            if self._begun > 1 and state.run.index > 0 and getattr(self.pipe.scheduler, "step_index", None) is not None:
                self.on_restart(state)

    def _predicted(self, state: State, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a call that is to be predicted, or None if it must be computed after all."""
        self.inside, is_replaced = "predict", self.placement.is_forward_replaced()
        with self.adapter.own_forward.exchanged(self._forecast) as is_found:
            if is_replaced or not is_found:
                self.on_not_forecast(state, call, *reasons.REPLACED)
                return None
            output = self.adapter.transformer._call_impl(*args, **kwargs)
        if call.forecasts != 1:
            self.on_not_forecast(state, call, *(reasons.REPEATED if call.forecasts else call.unfit or reasons.REPLACED))
            if call.forecasts:
                return None
            self._computed()  # whatever stands in place of the forward has computed the call
            return output
        self.on_predicted(state, call, output)
        self._read()
        if not self.accepts(state, call, output):
            return None
        state.end_call()
        return output

    def _forecast(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What runs in place of the transformer's own forward in a call that is to be predicted."""
        if self._located is None:
            return forward(*args, **self.needed(kwargs))
        state, call = self._located
        arguments = self.adapter.bind(args, kwargs)
        call.unfit = reasons.CHANGED
        if self.can_predict(state, call, arguments):
            call.forecasts += 1
            if self.adapter.runs_around:
                call.forward = functools.partial(forward, *args, **kwargs)
            output = self.predict(state, call, arguments)
            if output is not None:
                return output
            call.forecasts, call.unfit = 0, reasons.ELSEWHERE
        return self.adapter.compute(call.stream, forward, args, self.needed(kwargs))

    @torch.compiler.disable
    def _computed(self) -> None:
        for captured in self._captured:
            self._keep(*captured)
        if self._located is not None:
            state, call = self._located
            self.finish(state, call)
            state.end_call()

    def on_head_entry(self, site: Site, head: int, features: torch.Tensor, conditioning: torch.Tensor | None) -> None:
        """Keeps the inputs of a head at once, because later steps may overwrite them; a graph copies them out."""
        if self.inside == "compute":
            if torch.compiler.is_compiling():
                conditioning = None if conditioning is None else conditioning.detach().clone()
                self._captured = (*self._captured, (head, features.detach().clone(), conditioning))
            else:
                self._keep(head, features, conditioning)
        else:
            self._on_other_head_entry(site, head, features, conditioning)

    @torch.compiler.disable
    def _on_other_head_entry(
        self, site: Site, head: int, features: torch.Tensor, conditioning: torch.Tensor | None
    ) -> None:
        """The head ran in a call that is not computed: to make the output of a forecast, or because it was computed."""
        if self.inside is None:
            if site.adapter.own_forward.is_running():  # otherwise the user calls the head alone
                self.bypass(*reasons.DIRECT)
        elif self._located is not None and not self._located[1].forecasts:
            self._keep(head, features, conditioning)

    @torch.compiler.disable
    def _keep(self, head: int, entered: torch.Tensor, conditioning: torch.Tensor | None) -> None:
        if self._located is not None:
            state, call = self._located
            call.heads[head] += 1
            if call.heads[head] == 1:
                branch = self.adapter.branches[head]
                features = branch.features(call.arguments, entered)
                if conditioning is None and self.reads_conditioning(state):
                    conditioning = branch.conditioning(call.arguments, features.dtype, features.device)
                self.keep(state, call, head, features, conditioning)

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

    def is_awaited(self) -> bool:
        """Whether the pipeline is in the middle of a run, so that the next call of its transformer comes here."""
        return self.state is not None and self.state.run.is_at_a_step_of(self.pipe.scheduler)

    def _locate(self, timestep: Any) -> State | None:
        """The state of the run that a call with this timestep belongs to, at its step; None if that is not known."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or not isinstance(timestep, torch.Tensor):
            return None
        state = self.state = self.state or self._begin_state()
        value = state.run.value_of(timestep, state.values.waits)
        index = state.run.position if value is None else state.run.locate(value, timestep.dtype)
        if index is None:
            return None
        if index < state.run.index:  # the same timesteps from the start again
            falls = state.falls + 1 if state.run.begin in (None, state.run.index) else 0
            state = self.state = self._begin_state()
            state.falls = falls
            if falls > 1:  # one step each, and each before the last one
                state.run.index = index
                return None
        elif self._begun and self._last_index is not None and index > self._last_index + 1:
            self.bypass(*reasons.SKIPPED)
        self._last_index = index
        state.enter(index)
        state.check_timestep(timestep, value)
        return state

    def _begin_state(self) -> State:
        scheduler, waits = self.pipe.scheduler, is_spread(self.adapter.transformer)
        run = Run(scheduler, lambda timesteps: self.adapter.pass_timesteps(timesteps, scheduler))
        return self.new_state(run, DeviceValues(waits))
