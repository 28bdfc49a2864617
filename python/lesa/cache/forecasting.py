"""Decides for each call of the transformer whether to compute or to forecast it, and does the forecast."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch

from lesa.cache import reasons
from lesa.cache.choosing import Chooser, note_of_switch
from lesa.cache.controlnet import DeferredControl, computed
from lesa.cache.device_values import DeviceValues, sum_of
from lesa.cache.error_control import ControlledSteps, ErrorControl, forecast_error
from lesa.cache.hook import StepHook
from lesa.cache.made_for import MadeFor
from lesa.cache.planning import Plan, Planner, can_plan, falling, times_at
from lesa.cache.run import Call, Run, StepObserver
from lesa.cache.sites import Site, switch_step
from lesa.cache.stats import CacheStats, StreamStats
from lesa.cache.streams import ForecastState, Stream, Track
from lesa.cache.told import levels_in, told_in
from lesa.models import Adapter
from lesa.schedule import Schedule, Spread, schedule_of
from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig
from lesa_kernels.feature_ring import shared_budget
from lesa_kernels.forecasters import UNTRAINED


class ForecastingHook(StepHook[ForecastState]):
    """Computes or predicts each call.

    Args:
        pipe, adapters: as in `StepHook`.
        predictors: what makes the forecasts, by the names of the transformers.
        schedule: which steps are computed: a `Schedule`, an interval, a `Spread`, or an `ErrorControl`.
        as_trained: whether nothing but the predictor or a quality chose the steps.
        max_device_bytes, strict: as in `lesa.enable_cache`.
        observer: sees what is computed.
        owned: the predictors that nobody else has, so that they follow the features to their device.
        notes: what the stats of each run say.

    Attributes:
        predictor: that of the current site.
        levels_of: gives the noise levels that the model is told by a predictor with some configuration, or None.
    """

    levels_of: Callable[[PredictorConfig], torch.Tensor | None] = staticmethod(levels_in)

    def __init__(
        self,
        pipe: Any,
        adapters: Mapping[str, Adapter],
        predictors: Mapping[str, FusedKANPredictor],
        schedule: Schedule | int | Spread | ErrorControl,
        as_trained: bool,
        max_device_bytes: int | None,
        strict: bool,
        observer: StepObserver | None,
        owned: Collection[FusedKANPredictor] = (),
        notes: Collection[str] = (),
    ):
        self.predictors = predictors
        super().__init__(pipe, adapters)
        self.schedule, self.as_trained = schedule, as_trained
        self.max_device_bytes, self.strict, self.observer = max_device_bytes, strict, observer
        self.owned, self.notes = owned, notes
        self._configs = [*{id(each): each.config for each in predictors.values()}.values()]
        adapter = self.adapter
        controlnet = getattr(pipe, "controlnet", None)
        lists, converts = adapter.control_outputs, adapter.control_is_converted
        self._control: DeferredControl | None = None
        if controlnet is not None and lists is not None:
            self._control = DeferredControl.of(controlnet, lists, converts)
        self._is_predicting = False  # whether the schedule of the latest run leaves out steps
        self._made_for = MadeFor(pipe, self.sites, predictors)
        self.stats = CacheStats()

    def install(self) -> None:
        super().install()
        if self._control is not None:
            self._control.join(self.is_awaited)

    def compare(self) -> None:
        """Compares the pipeline with the one that the predictors were made for, and says what differs."""
        self._remark(*self._made_for.compare())

    def _remark(self, *remarks: str) -> None:
        """Notes remarks, and warns of them."""
        for remark in remarks:
            self.stats.note(remark)
            self.warn(remark)

    def uninstall(self) -> None:
        super().uninstall()
        if self._control is not None:
            self._control.leave(self.is_awaited)
            self._control = None

    def go_to(self, site: Site) -> None:
        super().go_to(site)
        self.predictor = self.predictors[site.name]

    def needed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return computed(kwargs)

    def given(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self._located is not None and (told := self._located[0].told.get(self.site.name)) is not None:
            args, kwargs = told.given(self.adapter, self._located[1], args, kwargs, self.stats.note)
        return super().given(args, kwargs)

    def new_state(self, run: Run, values: DeviceValues) -> ForecastState:
        return ForecastState(run, values)

    # Which steps are computed

    def on_run(self, state: ForecastState) -> None:
        self.stats.begin_run()
        for note in (*self.notes, *(note for site in self.sites for note in site.adapter.notes)):
            self.stats.note(note)
        self._remark(*self._made_for.remarks())
        sigmas = state.run.executed_sigmas
        state.parts = [falling(sigmas, step) for step in range(len(sigmas))]
        state.switch = switch_step(self.pipe, state.run) if len(self.sites) > 1 else None
        if isinstance(self.schedule, ErrorControl):
            config = self.predictor.config  # `check_controllable` has seen that it has a schedule and its errors
            trained, errors = cast(Schedule, schedule_of(config)), config.schedule_errors or ()
            state.controlled = ControlledSteps(self.schedule, trained, errors, sigmas, state.switch)
            state.computed = state.controlled.chosen
            if state.switch is not None:
                state.added = {state.switch: reasons.FIRST_OF_SECOND}
                self.stats.note(note_of_switch(state.switch))
        else:
            rises = frozenset(part.start for part in state.parts)
            chooser = Chooser(self.schedule, self.as_trained, self._configs, self.stats.note, self._remark)
            state.computed, state.added = chooser.choose(sigmas, rises, state.switch)
        state.was_predicting, self._is_predicting = self._is_predicting, len(state.computed) < len(sigmas)
        predicted = (step for step in range(len(sigmas)) if step not in state.computed)
        lengths = {len(state.parts[step]) for step in predicted if step > state.parts[step].start}
        for predictor, length in itertools.product(self.predictors.values(), lengths):
            predictor.forecaster.check_run(predictor.config, length)
        configs = {name: each.config for name, each in self.predictors.items()}
        state.told = told_in(state, configs, self.levels_of, self.stats.note)
        if self.observer is not None:
            self.observer.on_run(state.run, state.computed)

    def on_unlocated(self) -> None:
        self.stats.unlocated += 1
        if self.state is not None:
            self.state.streams = {}  # another run has the transformer: what was computed before it is no history
        self._fall_back(*reasons.UNLOCATED)

    def on_bypassed(self, reason: str, remedy: str) -> None:
        if self.state is None and reason not in self.stats.notes:  # what the stats tell of is over
            self.stats.begin_run()
        self.stats.note(reason)
        self._fall_back(reason, remedy)

    def on_restart(self, state: ForecastState) -> None:
        if state.was_predicting or self._is_predicting:
            super().on_restart(state)

    def on_no_call(self) -> None:
        self.stats.begin_run()

    def on_not_forecast(self, state: ForecastState, call: Call, reason: str, remedy: str) -> None:
        state.streams[call.stream].stats.reasons[call.step] = reason
        self._fall_back(reason, remedy)

    def can_predict(self, state: ForecastState, call: Call, arguments: dict[str, Any]) -> bool:
        for track in state.streams[call.stream].tracks:
            branch, ring = track.branch, cast(FeatureRing, track.ring)
            shape = branch.shape(arguments)
            if shape != (ring.batch, ring.tokens) and shape != branch.shape(call.arguments):
                return False
        return True

    def wants_prediction(self, state: ForecastState, call: Call) -> bool:
        stream, begins = state.streams.get(call.stream), False
        if stream is None:
            stats = self.stats.streams.setdefault(call.stream, StreamStats())
            begins = call.step > 0 and not stats.computed and not stats.predicted
            if state.switch is not None and call.step >= state.switch:
                state.forget_others(self.site.prefix)
            tracks = tuple(Track(branch, self._predictor_of(branch)) for branch in self.adapter.branches)
            stream = state.streams[call.stream] = Stream(call.stream, stats, tracks)
        stream.stats.begin(call.step, self.adapter.sample(call.arguments).device)
        stream.has_risen = stream.step < state.parts[call.step].start
        if state.needs_values:
            state.choose_next_step()
        if call.step in state.computed:
            stream.stats.reasons[call.step] = state.added.get(call.step, "scheduled")
            return False
        if not state.forecasts_are_finite:  # the user was told when it was found
            stream.stats.reasons[call.step] = "an earlier forecast was not finite"
            return False
        if begins:  # such as guidance that is on in a part of the run
            stream.stats.reasons[call.step] = reasons.BEGINS
            return False
        reason, remedy = self._why_not(stream, call)
        if reason is not None:
            stream.stats.reasons[call.step] = reason
            self._fall_back(reason, remedy)
        return reason is None

    def _why_not(self, stream: Stream, call: Call) -> tuple[str | None, str]:
        """Why a step that the schedule leaves out cannot be predicted, or None; and what helps."""
        if (why := self.adapter.why_unseen(call.stream, call.arguments, not stream.stats.computed)) is not None:
            return why
        if any([track.ring is None for track in stream.tracks]):
            return "no history", "Compute an earlier step of this stream: choose another schedule."
        if stream.has_risen:
            return reasons.RISEN
        if any([track.shape != track.branch.shape(call.arguments) for track in stream.tracks]):
            return "the shape changed", "Keep batch and size the same in a run."
        if stream.is_other_text:
            return "the text changed", "Keep the texts the same in a run, and the order of their calls."
        if stream.unclear is not None:
            return stream.unclear
        for track in stream.tracks:
            device, ring = track.predictor.device, cast(FeatureRing, track.ring)
            if device != ring.device and device is not None:
                return (
                    f"the predictor is on {device}, and the features on {ring.device}",
                    f"Move it with `predictor.to('{ring.device}')`.",
                )
        return None, ""

    def _predictor_of(self, branch: Adapter) -> FusedKANPredictor:
        """What forecasts the features of an output head: the predictor, unless it is for the width of another head."""
        if branch is self.adapter or self.predictor.config.feature_dim in (None, branch.feature_dim):
            return self.predictor
        self.stats.note(
            f"the predictor is for {self.predictor.config.feature_dim} channels: the features of the other "
            f"output head, of {branch.feature_dim} channels, are forecast by {UNTRAINED!r}"
        )
        return FusedKANPredictor(PredictorConfig(mixer=UNTRAINED))

    # What is forecast

    def predict(self, state: ForecastState, call: Call, arguments: dict[str, Any]) -> Any:
        stream = state.streams[call.stream]
        if self.adapter.runs_around:
            features = self._forecast_of(state, call, stream.tracks[0])
            return self.adapter.run_around(call.stream, cast(Callable, call.forward), arguments, features)
        made = [self._velocity(state, call, arguments, track) for track in stream.tracks]
        if all([is_fused for _, is_fused in made]):
            stream.stats.fused.append(call.step)
        return self.adapter.output(arguments, *[velocity for velocity, _ in made])

    def _velocity(
        self, state: ForecastState, call: Call, arguments: dict[str, Any], track: Track
    ) -> tuple[torch.Tensor, bool]:
        """The projected tokens of one output head, and whether forecast and head were one kernel."""
        branch, ring = track.branch, cast(FeatureRing, track.ring)
        timestep = branch.timestep_argument
        is_passed = arguments[timestep] is call.arguments[timestep]
        plan = state.plan(track, call.step)
        if plan is not None and self._reads_head(track):
            summed = plan if track.reads_sums else None
            head, sums = track.conditioner.head(state.run, arguments, ring.dtype, is_passed, summed)
            velocity = track.predictor.velocity_with(ring, plan.weights[call.step], head, plan.low_rank, sums)
            return velocity, _is_fused(track, plan, head)
        features = self._forecast_of(state, call, track)
        conditioning = track.conditioner.conditioning(state.run, arguments, ring.dtype, is_passed)
        return branch.run_head(features, conditioning, arguments), False

    def _forecast_of(self, state: ForecastState, call: Call, track: Track) -> torch.Tensor:
        """The forecast of the features of a track, which it keeps if its forecaster reads its forecasts."""
        features = self._features(track, call, state.plan(track, call.step))
        if track.keeps_forecasts:
            track.push(features, call.sigma)  # before the head, which may overwrite them
        return features

    def _reads_head(self, track: Track) -> bool:
        """Whether the output head is computed from its weights, and not by its modules."""
        if track.keeps_forecasts or torch.is_grad_enabled() or not track.fuses:
            return False
        why = self._why_not_plain(track.branch, cast(FeatureRing, track.ring).device)
        if why is not None:
            self.stats.note(f"the output head ran in the model's own modules: {why}")
        return why is None

    def _why_not_plain(self, branch: Adapter, device: torch.device) -> str | None:
        own_hook = self.placement.captures[self.adapter.branches.index(branch)].id
        return branch.why_head_not_plain(own_hook, device)

    def _features(self, track: Track, call: Call, plan: Plan | None) -> torch.Tensor:
        """The forecast of the features."""
        ring = cast(FeatureRing, track.ring)
        if plan is None:  # with the predictor's hooks
            return track.predictor(ring, call.sigma, **self._more(track, call))
        return track.predictor.forecast_with(ring, plan.weights[call.step], plan.low_rank)

    def _more(self, track: Track, call: Call) -> dict[str, Any]:
        """What some forecasters read in addition."""
        times = None if self.state is None else times_at(self.state.run.executed_sigmas, call.step)
        return track.predictor.extra(times, call.stream)

    def on_predicted(self, state: ForecastState, call: Call, output: Any) -> None:
        """Asks for the sum of the output, which says whether it is finite. A CPU answers at once, a GPU later."""
        stats = state.streams[call.stream].stats
        receive = functools.partial(self._on_sum, state, stats, call.step)
        state.values.ask(sum_of(output), receive)

    def _on_sum(self, state: ForecastState, stats: StreamStats, step: int, value: float) -> None:
        if math.isfinite(value):
            return
        state.forecasts_are_finite, reason = False, "the forecast was not finite"
        if step not in stats.predicted:  # otherwise the value came late: that step is over
            stats.reasons[step] = reason
        remedy = "The rest of the run is computed too. Check the predictor with `lesa.evaluate`, or use bfloat16."
        self._fall_back(reason, remedy)

    def accepts(self, state: ForecastState, call: Call, output: Any) -> bool:
        stats = state.streams[call.stream].stats
        if state.is_foreign or not state.forecasts_are_finite:
            if call.step in stats.fused:
                stats.fused.remove(call.step)
            return False
        stats.predicted.append(call.step)
        stats.end(call.step, self.adapter.sample(call.arguments).device)
        return True

    def _fall_back(self, reason: str, remedy: str) -> None:
        """Warns that a step is computed that was to be predicted. With `strict`, raises `RuntimeError` instead."""
        if self.strict:
            raise RuntimeError(f"lesa: a step can't be predicted: {reason}. {remedy} Without `strict`, it is computed.")
        self.warn(f"{reason}: computing. {remedy}")

    # What is pushed

    def reads_conditioning(self, state: ForecastState) -> bool:
        return self.observer is not None or state.controlled is not None

    def keep(self, state: ForecastState, call: Call, head: int, features: torch.Tensor, conditioning: Any) -> None:
        stream = state.streams[call.stream]
        track = stream.tracks[head]
        if track.fits(features) and track.place != self.adapter.place:
            stream.has_moved, stream.stats.reasons[call.step] = True, reasons.MOVED
        fits = track.fits(features) and not stream.is_broken
        if head == 0:
            if self.observer is not None:
                self.observer.keep(call, self.adapter.all_features(call.arguments, features), conditioning)
            if fits and len(stream.stats.computed) > 1:
                self._measure(state, stream, call, features, conditioning)
        if not fits:
            self._renew(stream, track, call, features)
        track.push(features, call.sigma)
        track.shape, track.place = track.branch.shape(call.arguments), self.adapter.place
        if len(call.heads) == len(stream.tracks):
            stream.step = call.step
            stream.take_up()

    def _measure(
        self, state: ForecastState, stream: Stream, call: Call, features: torch.Tensor, conditioning: Any
    ) -> None:
        """Under `lesa.ErrorControl`, asks for the error of the forecast for a step that was computed."""
        if state.controlled is None:
            return
        track = stream.tracks[0]
        why = self._why_not_plain(track.branch, features.device)
        if why is not None:
            self.stats.note(f"errors are not measured, so the trained gaps are used: {why}")
            return
        forecast = self._features(track, call, state.plan(track, call.step))
        error = forecast_error(forecast, features, self.adapter.output_head(conditioning))
        state.values.ask(error, functools.partial(state.controlled.receive, stream.stats.errors, call.step))

    def _renew(self, stream: Stream, track: Track, call: Call, features: torch.Tensor) -> None:
        """Gives a track an empty ring for such features."""
        track.ring = track.planner = None  # nothing else holds the ring: it is freed before another one takes memory
        predictor = track.predictor
        if any(predictor is owned for owned in self.owned):
            predictor.to(features.device)
        batch, tokens, width = features.shape
        budget = self._budget(stream, track, call, features)
        ring = predictor.make_ring(batch, tokens, features.dtype, features.device, budget, width)
        track.ring, track.fuses = ring, predictor.fuses_velocity(ring)
        track.reads_sums = track.fuses and predictor.reads_sums(ring)
        track.planner = Planner(predictor, ring, stream.name) if can_plan(predictor) else None
        rings = [track.ring for track in stream.tracks if track.ring is not None]
        stream.stats.ring_device_bytes = sum(ring.device_nbytes for ring in rings)
        stream.stats.ring_host_bytes = sum(ring.host_nbytes for ring in rings)

    def _budget(self, stream: Stream, track: Track, call: Call, features: torch.Tensor) -> int | None:
        """How much of `max_device_bytes` the ring of a track gets: the tracks of a stream share it."""
        if self.max_device_bytes is None or len(stream.tracks) == 1:
            return self.max_device_bytes
        sizes = [
            (each.predictor.config.max_history, *each.branch.shape(call.arguments), each.branch.feature_dim)
            for each in stream.tracks
        ]
        shares = shared_budget(self.max_device_bytes, [(*each, features.dtype) for each in sizes])
        return next(share for each, share in zip(stream.tracks, shares) if each is track)

    def finish(self, state: ForecastState, call: Call) -> None:
        stats = state.streams[call.stream].stats
        stats.computed.append(call.step)
        stats.end(call.step, self.adapter.sample(call.arguments).device)
        if max(call.heads.values(), default=0) > 1:
            for track in state.streams[call.stream].tracks:
                track.ring = None
            self._fall_back(*reasons.REPEATED)
        elif len(call.heads) < len(self.adapter.branches):
            self._fall_back(*self.adapter.why_unseen(call.stream, call.arguments) or reasons.UNSEEN)


def _is_fused(track: Track, plan: Plan, head: OutputHead) -> bool:
    """Whether forecast and output head are one kernel."""
    # A predictor may need its residual to answer, so it is asked once for each plan and kind of head.
    parts = (head.weight, head.bias, head.scale, head.shift)
    kind = [None if part is None else (part.shape, part.dtype) for part in parts]
    known = track.known_fused
    if known is None or known[0] is not plan or known[1] != kind:
        known = plan, kind, track.predictor.fuses_velocity(cast(FeatureRing, track.ring), head)
        track.known_fused = known
    return known[2]
