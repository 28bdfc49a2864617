"""One run of a pipeline: its noise levels, the calls of the transformer, and all that is kept from call to call."""

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lesa.cache import reasons
from lesa.cache.device_values import DeviceValues

_ABSENT = object()

_MOST_OF_NOISE = 1.001
"""Schedulers of flow matching have no larger sigma than 1, up to rounding."""


class Run:
    """The noise levels of one call of a pipeline, and the step that it is at.

    Args:
        scheduler: the pipeline's scheduler, whose timesteps are set for this run.
        passes: what the pipeline passes to the transformer for some of the scheduler's timesteps.

    Attributes:
        timesteps: the scheduler's timesteps.
        sigmas: the float32 noise level of each of the scheduler's steps.
        begin: index of the first step that was executed; None before that step.
        index: index of the current step.
        exact: whether all samples are known to get the timesteps that `passed` gives, up to the last bit of float32.
    """

    def __init__(self, scheduler: Any, passes: Callable[[torch.Tensor], torch.Tensor]):
        self.scheduler, self.passes = scheduler, passes
        self.identity: torch.Tensor = scheduler.timesteps  # a new tensor every run; held, so its address stays taken
        self.timesteps: list[float] = scheduler.timesteps.tolist()
        self.sigmas = sigmas_of(scheduler, self.timesteps)
        self.begin: int | None = None
        self.index = -1
        self.exact = False
        self._passed: dict[torch.dtype, list[float]] = {}
        self.learn_passed()

    def learn_passed(self) -> None:
        """Asks what the pipeline passes: at the beginning, and again if it turns out to be in another form."""
        self._passed.clear()
        given = self._given = self.passed(self.identity.dtype)
        self._largest = max(map(abs, given), default=0.0)
        # If they rise where the timesteps fall, they are differences of rounded numbers, which are less exact.
        self._is_reversed = len(given) > 1 and (given[-1] > given[0]) != (self.timesteps[-1] > self.timesteps[0])

    def covers(self, scheduler: Any) -> bool:
        """Whether the scheduler is still in this run. A new run sets new timesteps, and no step has begun yet.

        A copy of the scheduler or of its timesteps, such as in another dtype, goes on with the run.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        if self.scheduler is scheduler and self.identity is timesteps:
            return True
        index = getattr(scheduler, "step_index", None)
        if index is None or index < self.index or not isinstance(timesteps, torch.Tensor):
            return False
        values = timesteps.tolist()
        if values != self.timesteps or sigmas_of(scheduler, values) != self.sigmas:
            return False
        self.scheduler, self.identity = scheduler, timesteps
        return True

    def is_at_a_step_of(self, scheduler: Any) -> bool:
        """Whether the scheduler is in this run, and says that it is at one of its steps."""
        return self.covers(scheduler) and self.position in range(len(self.timesteps))

    @property
    def step(self) -> int:
        """Index of the current step among the executed steps."""
        return self.index - (self.begin or 0)

    @property
    def executed_sigmas(self) -> list[float]:
        """Noise levels of the steps that this run executes."""
        return self.sigmas[self.begin : len(self.timesteps)]

    @property
    def position(self) -> int | None:
        """The index at which the scheduler says that it is, or None if the scheduler does not say it.

        Before the first `scheduler.step`, most schedulers know at most where the run begins.
        """
        scheduler = self.scheduler
        index: Any = getattr(scheduler, "step_index", _ABSENT)
        if index is _ABSENT:
            index = getattr(scheduler, "counter", None)  # PNDM
        return getattr(scheduler, "begin_index", None) if index is None and self.begin is None else index

    def passed(self, dtype: torch.dtype) -> list[float]:
        """The timesteps as a pipeline passes them to the transformer in `dtype`."""
        if dtype not in self._passed:
            timesteps = torch.tensor(self.timesteps, dtype=self.identity.dtype, device="cpu").to(dtype)
            self._passed[dtype] = self.passes(timesteps).tolist()
        return self._passed[dtype]

    def is_near(self, index: int, value: float, dtype: torch.dtype) -> bool:
        """Whether the passed `value` is the timestep of a step, within the precision of `dtype`."""
        precision = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        size = self._largest if self._is_reversed else abs(value)
        tolerance = max(precision, 1e-6) * size + 1e-6 * self._largest
        return 0 <= index < len(self._given) and abs(self._given[index] - value) <= tolerance

    def value_of(self, timestep: torch.Tensor, waits: bool) -> float | None:
        """The number in a timestep, or None where that would wait for a GPU and the scheduler has a position.

        Args:
            timestep: as it was passed to the transformer.
            waits: whether to wait for a GPU in any case.
        """
        position = self.position
        has_position = position is not None and 0 <= position < len(self.timesteps)
        if not waits and has_position and timestep.device.type != "cpu":
            return None
        return (timestep if timestep.numel() == 1 else timestep.flatten()[0]).item()

    def locate(self, value: float, dtype: torch.dtype) -> int | None:
        """The index of the scheduler's timestep that the transformer was given, or None.

        The value has the precision of the latents, in which neighbours can become equal. The scheduler's own position
        then decides. A loop that does not use `scheduler.step` has no position; there it is the nearest timestep that
        does not go back.

        None means that another scheduler drives this call: the position is not near the value, or a step would be left
        out without a position, or the timesteps of this scheduler were never set.
        """
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            return None
        position = self.position
        if position is not None:
            return position if self.is_near(position, value, dtype) else None
        end = len(self.timesteps) if self.begin is None else self.index + 2
        near = [index for index in range(end) if self.is_near(index, value, dtype)]
        return min(near, key=lambda i: (i < self.index, abs(self._given[i] - value)), default=None)


def sigmas_of(scheduler: Any, timesteps: list[float]) -> list[float]:
    """The scheduler's noise levels; for a scheduler without any, the parts of its training steps.

    With `invert_sigmas`, the scheduler's own numbers are what is done, not the noise that is left. Numbers above 1
    are noise over signal; their levels are noise over both.
    """
    sigmas, config = getattr(scheduler, "sigmas", None), getattr(scheduler, "config", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) >= len(timesteps):
        levels = (1 - sigmas if getattr(config, "invert_sigmas", False) else sigmas).tolist()
        return [s / (1 + s) for s in levels] if max(levels, default=0.0) > _MOST_OF_NOISE else levels
    if getattr(config, "prediction_type", None) == "trigflow":  # the timesteps are angles between sample and noise
        return [math.sin(t) / (math.sin(t) + math.cos(t)) for t in timesteps]
    train_steps = getattr(config, "num_train_timesteps", 1000)
    return [t / train_steps for t in timesteps]


@dataclass
class Call:
    """One call of the transformer.

    Args:
        step: index among the executed steps of the run.
        stream: name of the stream of calls, such as "cond".
        sigma: the noise level of the step.
        arguments: the transformer's arguments by name, as the caller passed them.
        transformer: which component of the pipeline it is, such as "transformer_2".
        predicted: whether the call is to be predicted.
        forward: in place of what a forecast runs; it runs the transformer's own forward with its arguments.
        heads: by number of the output head, how often its inputs were seen in this call while it was computed.
        forecasts: how often the forward was exchanged for a forecast in this call.
        unfit: why no forecast fits into the forward, and what helps.
    """

    step: int
    stream: str
    sigma: float
    arguments: dict[str, Any]
    transformer: str
    predicted: bool = False
    forward: Callable[[], Any] | None = None
    heads: Counter[int] = field(default_factory=Counter)
    forecasts: int = 0
    unfit: tuple[str, str] | None = None


class StepObserver(Protocol):
    """Something that wants to see what the transformer computes, such as a recording; see `lesa.cache.observed`."""

    def on_run(self, run: Run, computed: Set[int]) -> None:
        """Called at the first step of each run.

        Args:
            run: the run, at its first step.
            computed: the executed steps that are to be computed. Under `lesa.ErrorControl`, only the first of them.
        """

    def keep(self, call: Call, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        """Called once in each computed call.

        Args:
            call: the call.
            features: what enters the output head, `[B, T, D]`. The model may overwrite it afterwards.
            conditioning: of the output head, as `Adapter.condition` gives it.
        """


_THE_ONE = frozenset({0})
"""The place of a text that is known."""


@dataclass
class _Source:
    """What the latest call of a stream came with, and when."""

    context: str
    text: tuple
    version: tuple[int | None, ...]
    kept: frozenset[int] | None  # the places in the text that the call before had the same; None if there was none
    index: int  # of the call's step
    longest_pause: int  # the most steps from one call of the stream to its next one; at least 1

    def same(self, text: tuple) -> frozenset[int]:
        """The places in a text that this call had the same."""
        if len(text) != len(self.text):
            return frozenset()
        return frozenset(place for place, had in enumerate(self.text) if _is_same(had, text[place]))

    def is_twin(self, other: "_Source") -> bool:
        """Whether another call had the same text. Of texts that are not known, `RunState.stream_of` tells it."""
        return len(self.text) == len(other.text) == 1 and self.text[0] is other.text[0] is not None

    def likeness(self, text: tuple) -> int:
        """How many places are the same; 0 if one differs that was the same in the calls before."""
        same = self.same(text)
        return len(same) if (self.kept or same) <= same else 0


@dataclass
class RunState:
    """All that a hook keeps from call to call in one run. It is dropped as a whole when the run ends or fails.

    Args:
        run: the run.
        values: the values that were asked of the device in this run.

    Attributes:
        is_foreign: whether a value from the device says that another scheduler drives the transformer.
        falls: how many runs of a single step came before this one, each with an earlier step than the last.
    """

    run: Run
    values: DeviceValues
    is_foreign: bool = False
    falls: int = 0
    _sources: dict[str, _Source] = field(default_factory=dict)  # by stream
    _called: set[str] = field(default_factory=set)  # the streams that were called in the current step

    def enter(self, index: int) -> None:
        """Goes to the step with this index."""
        if index != self.run.index:
            if self.run.begin is not None and self.run.index == self.run.begin + 1:
                self._check_first_step()
            self._called = set()
            self.run.index = index

    def _check_first_step(self) -> None:
        """Called after the second step. A text that came twice in the first step, and once in this, is unclear.

        One of the two calls then was not of the loop: for example, it warmed the model up.
        """
        for name in self._called:
            source = self._sources[name]
            for other in self._sources.values():
                is_same = other.context == source.context and other.is_twin(source)
                if is_same and other is not source and other.index == self.run.begin:
                    self.on_unclear(name, reasons.UNCLEAR)

    def check_timestep(self, timestep: torch.Tensor, value: float | None) -> None:
        """Compares the timestep that was passed with the scheduler's: now, or once it is on the host.

        Args:
            timestep: as it was passed, `[B]`.
            value: the number in it, or None if that is not known yet.
        """
        run, index, dtype = self.run, self.run.index, timestep.dtype

        def receive(value: float) -> None:
            if not run.is_near(index, value, dtype):
                self.is_foreign = True
                self.values.clear()
            elif not math.isclose(value, run.passed(dtype)[index], rel_tol=2e-7):  # GPUs round a float32 division else
                run.exact = False

        def receive_spread(spread: float) -> None:
            run.exact = spread == 0

        if run.begin is None:
            self.values.ask(timestep.amax() - timestep.amin(), receive_spread)
        if value is None:
            self.values.ask(timestep.reshape(-1)[:1], receive)
        else:
            receive(value)

    @property
    def needs_values(self) -> bool:
        """Whether the current step can be decided only with all values that were asked of the device."""
        return False

    def on_other_text(self, stream: str) -> None:
        """Called when the text of a stream that has kept one differs, so that its history may not be the call's."""

    def on_unclear(self, stream: str, reason: tuple[str, str]) -> None:
        """Called when a stream may have a step of another one in its history, with why that is so, and what helps."""

    def stream_of(self, context: str, text: torch.Tensor | tuple | None) -> str:
        """The name of the stream that a call in the current step belongs to.

        A stream is named by its `cache_context`. If several streams have one context, or none, a call belongs to the
        stream that had the same text before. If there is no such stream, the order of the calls in the step decides.
        That is not certain for a stream that has kept one text: the call may be of another stream.

        Args:
            context: name of the call's context.
            text: the call's embedded text. If it is not known which input that is, a tuple of all inputs. Then the call
                belongs to the stream with which it shares the most of them, and is unclear if there are several.
        """
        texts = text if isinstance(text, tuple) else (text,)
        had = self._sources.get(context)
        if had is not None and len(texts) == len(had.text) == 1 and had.text[0] is text and context not in self._called:
            return self._call_again(context, had, text)  # the usual case
        likeness = {name: had.likeness(texts) for name, had in self._sources.items() if had.context == context}
        same = (name for name in sorted(likeness, key=lambda name: -likeness[name]) if likeness[name])
        names = (context + (f"-{order}" if order > 1 else "") for order in itertools.count(1))
        own = (name for name in names if name not in self._sources or self._sources[name].context == context)
        candidates: Iterator[str] = itertools.chain(same, own)
        name = next(n for n in candidates if n not in self._called)
        others = [alike for other, alike in likeness.items() if other != name]
        if isinstance(text, tuple) and name in likeness and max(others, default=-1) >= likeness[name]:
            self.on_unclear(name, reasons.ALIKE)
        return self._call(name, context, texts)

    def _call_again(self, name: str, source: _Source, text: Any) -> str:
        """What `_call` does for a stream that comes with the same text as before."""
        version = (version_of(text),)
        if source.version != version:
            self.on_other_text(name)
        self._called.add(name)
        index = self.run.index
        source.longest_pause = max(source.longest_pause, index - source.index)
        source.version, source.kept, source.index = version, _THE_ONE, index
        return name

    def _call(self, name: str, context: str, text: tuple) -> str:
        """Notes that a stream is called, and with what. Returns its name."""
        had, index, pause, kept = self._sources.get(name), self.run.index, 1, None
        version = tuple(map(version_of, text))
        if had is not None:
            pause, kept = max(had.longest_pause, index - had.index), had.same(text)
            is_changed = any(had.version[place] != version[place] for place in kept)
            if is_changed or not (had.kept or kept) <= kept:
                self.on_other_text(name)
        self._called.add(name)
        held = text if len(text) == 1 else tuple(map(_reference, text))  # not all inputs are kept in memory
        self._sources[name] = _Source(context, held, version, kept, index, pause)
        return name

    def end_call(self) -> None:
        """Called when a call is done. After the last call of the run, it frees what only later calls would need.

        That is when each stream has been called in the last step. A stream that has paused for longer than ever before
        in the run, such as guidance that ended early, is not waited for. If it is called after all, it is computed.
        """
        last = len(self.run.timesteps) - 1
        if self.run.index == last and not any(0 < last - s.index <= s.longest_pause for s in self._sources.values()):
            self.release()

    def release(self) -> None:
        """Frees what only later calls of the run would need."""
        self._sources = {}


def _reference(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, torch.Tensor) else value


def _is_same(had: Any, value: Any) -> bool:
    """Whether a value is the one that a call had. Numbers may change in a run, so they tell nothing."""
    if isinstance(value, torch.Tensor):
        return had is value or (isinstance(had, weakref.ref) and had() is value)
    return (value is None or isinstance(value, (bool, str))) and type(had) is type(value) and had == value


def version_of(value: Any) -> int | None:
    """How often a tensor was changed in place, or None if that is not known."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None
