"""Decides for each call of the transformer whether to compute or to forecast it, and does the forecast."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any, cast

import torch

from lesa.cache import reasons
from lesa.cache.conditioning import Conditioner
from lesa.cache.controlnet import DeferredControl, computed
from lesa.cache.device_values import DeviceValues, sum_of
from lesa.cache.error_control import ControlledSteps, ErrorControl, forecast_error
from lesa.cache.hook import StepHook
from lesa.cache.planning import Plan, Planner, can_plan, falling, making_room, times_at
from lesa.cache.run import Call, Run, StepObserver
from lesa.cache.sites import Site, adapters_on, switch_step
from lesa.cache.stats import CacheStats, StreamStats
from lesa.cache.streams import ForecastState, Stream
from lesa.models import SECOND, Adapter
from lesa.schedule import FEW_STEPS, Schedule, Spread, as_schedule, schedule_of
from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig, TieredRing


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

    Attributes:
        predictor: that of the current site.
    """

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
    ):
        self.predictors = predictors
        super().__init__(pipe, adapters)
        self.schedule, self.as_trained = schedule, as_trained
        self.max_device_bytes, self.strict, self.observer = max_device_bytes, strict, observer
        self.owned = owned
        adapter = self.adapter
        controlnet = getattr(pipe, "controlnet", None)
        lists = adapter.control_outputs
        self._control = None if controlnet is None or lists is None else DeferredControl.of(controlnet, lists)
        self._is_predicting = False  # whether the schedule of the latest run leaves out steps
        self.stats = CacheStats()

    def install(self) -> None:
        super().install()
        if self._control is not None:
            self._control.join(self.is_awaited)

    def uninstall(self) -> None:
        super().uninstall()
        if self._control is not None:
            self._control.leave(self.is_awaited)
            self._control = None

    def go_to(self, site: Site) -> None:
        super().go_to(site)
        self.predictor = self.predictors[site.name]
        self._keeps_forecasts = self.predictor.config.history == "steps"

    def needed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return computed(kwargs)

    def new_state(self, run: Run, values: DeviceValues) -> ForecastState:
        return ForecastState(run, values)

    # Which steps are computed

    def on_run(self, state: ForecastState) -> None:
        self.stats.begin_run()
        for note in (note for site in self.sites for note in site.adapter.notes):
            self.stats.note(note)
        self._note_adapters()
        sigmas = state.run.executed_sigmas
        state.parts = [falling(sigmas, step) for step in range(len(sigmas))]
        if isinstance(self.schedule, ErrorControl):
            config = self.predictor.config  # `check_controllable` has seen that it has a schedule and its errors
            trained, errors = cast(Schedule, schedule_of(config)), config.schedule_errors or ()
            state.controlled = ControlledSteps(self.schedule, trained, errors, sigmas)
            state.computed = state.controlled.chosen
        else:
            begins = frozenset(part.start for part in state.parts)
            if len(self.sites) > 1 and (switch := switch_step(self.pipe, state.run)) is not None:
                state.switch, begins = switch, begins | {switch}
            if isinstance(self.schedule, Spread):
                chosen = self._spread(self.schedule, sigmas, begins)
            else:
                chosen = self._scheduled(self.schedule, sigmas)
            state.computed = begins | chosen
            self._add(state, begins - chosen)
        state.was_predicting, self._is_predicting = self._is_predicting, len(state.computed) < len(sigmas)
        predicted = (step for step in range(len(sigmas)) if step not in state.computed)
        lengths = {len(state.parts[step]) for step in predicted if step > state.parts[step].start}
        for predictor, length in itertools.product(self.predictors.values(), lengths):
            predictor.forecaster.check_run(predictor.config, length)
        if self.observer is not None:
            self.observer.on_run(state.run, state.computed)

    def _spread(self, spread: Spread, sigmas: list[float], begins: frozenset[int]) -> frozenset[int]:
        """The computed steps of a run with these noise levels, beside `begins`. Notes which they are."""
        total, count = len(sigmas), spread.count_of(len(sigmas))
        trained = schedule_of(self.predictor.config)
        if trained is not None and spread.steps is None:
            self.stats.note(f"every quality is the {len(trained)} computed steps that the predictor was trained for")
            return self._scheduled(trained, sigmas)
        if count == total:
            if spread.steps is None:
                self._note_few(total)
            else:
                self.stats.note(f"computed everything: the run has {total} steps")
            return frozenset(range(total))
        chosen = frozenset() if trained is None else trained.computed_in(sigmas)
        if len(chosen) != count:
            chosen = making_room(spread.computed_in(sigmas), begins)
        computed = chosen | begins
        steps, name = ",".join(map(str, sorted(computed))), self.predictor.config.mixer
        self.stats.note(f"the forecaster is {name!r}, and {len(computed)} of {total} steps are computed: {steps}")
        self._note_other_training(computed, sigmas)
        return chosen

    def _scheduled(self, schedule: Schedule | int, sigmas: list[float]) -> frozenset[int]:
        """The computed steps of a run with these noise levels. Notes what the user may not expect."""
        config, total = self.predictor.config, len(sigmas)
        if self.as_trained and total < FEW_STEPS and total != config.num_inference_steps:
            self._note_few(total)
            return frozenset(range(total))
        schedule = as_schedule(schedule, total)
        if schedule.sigmas is None and schedule.num_inference_steps not in (None, total):
            meant = schedule.num_inference_steps
            self.stats.note(
                f"the schedule is for {meant} steps and has no noise levels: its step numbers are used unchanged"
            )
        beyond = [step for step in schedule.steps if step >= total]
        if schedule.sigmas is None and beyond:
            steps = ",".join(map(str, beyond))
            self.stats.note(f"the run has {total} steps, which leaves out the schedule's {steps}")
        chosen = schedule.computed_in(sigmas)
        self._note_other_training(chosen, sigmas)
        return chosen

    def _add(self, state: ForecastState, steps: Set[int]) -> None:
        """Notes why these steps are computed, which the schedule leaves out."""
        added = dict.fromkeys(steps, reasons.RISEN[0])
        if (switch := state.switch) is not None and switch in steps:
            added[switch] = reasons.FIRST_OF_SECOND
            self.stats.note(f"step {switch} is computed because it is the first one of {SECOND}")
        state.added = added
        if risen := steps - {switch}:
            rises = ",".join(map(str, sorted(risen)))
            self.stats.note(f"the noise level rises in the run, so the first step after each rise is computed: {rises}")

    def _note_few(self, total: int) -> None:
        self.stats.note(f"computed everything: {total} steps are too few to predict any")

    def _note_other_training(self, chosen: frozenset[int], sigmas: list[float]) -> None:
        """Notes if a predictor's steps, computed steps or noise levels are others than those of the run."""
        for config in {id(predictor): predictor.config for predictor in self.predictors.values()}.values():
            self._note_trained(config, chosen, sigmas)

    def _note_trained(self, config: PredictorConfig, chosen: frozenset[int], sigmas: list[float]) -> None:
        total = len(sigmas)
        near = 1e-5 if config.forecaster.is_fitted else 1e-3  # a fit is for its own noise levels only
        if config.num_inference_steps not in (None, total):
            trained = config.num_inference_steps
            self.stats.note(f"the predictor was trained at {trained} steps, this run has {total}")
        elif config.schedule is not None and chosen != frozenset(config.schedule):
            steps = ",".join(map(str, config.schedule))
            self.stats.note(f"the predictor was trained with the computed steps {steps}")
        elif any(abs(sigmas[s] - level) > near for s, level in zip(sorted(chosen), config.schedule_sigmas or ())):
            self.stats.note("the predictor's schedule was made for other noise levels than those of this run")

    def _note_adapters(self) -> None:
        if names := adapters_on(self.pipe, self.sites):
            note = (
                f"the adapters {', '.join(names)} are on: unless the predictor was trained with them, its forecasts "
                "are less close"
            )
            self.stats.note(note)
            self.warn(note)

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
        ring = cast(FeatureRing, state.streams[call.stream].ring)
        return self.adapter.shape(arguments) in ((ring.batch, ring.tokens), self.adapter.shape(call.arguments))

    def wants_prediction(self, state: ForecastState, call: Call) -> bool:
        stream, begins = state.streams.get(call.stream), False
        if stream is None:
            stats = self.stats.streams.setdefault(call.stream, StreamStats())
            begins = call.step > 0 and not stats.computed and not stats.predicted
            if state.switch is not None and call.step >= state.switch:
                state.forget_others(self.site.prefix)
            stream = state.streams[call.stream] = Stream(call.stream, stats, Conditioner(self.adapter))
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
        if stream.ring is None:
            return "no history", "Compute an earlier step of this stream: choose another schedule."
        if stream.has_risen:
            return reasons.RISEN
        if stream.shape != self.adapter.shape(call.arguments):
            return "the shape changed", "Keep batch and size the same in a run."
        if stream.is_other_text:
            return "the text changed", "Keep the texts the same in a run, and the order of their calls."
        if stream.is_unclear:
            return reasons.UNCLEAR
        device = self.predictor.device
        if device != stream.ring.device and device is not None:
            return (
                f"the predictor is on {device}, and the features on {stream.ring.device}",
                f"Move it with `predictor.to('{stream.ring.device}')`.",
            )
        return None, ""

    # What is forecast

    def predict(self, state: ForecastState, call: Call, arguments: dict[str, Any]) -> Any:
        stream = state.streams[call.stream]
        ring, conditioner = cast(FeatureRing, stream.ring), stream.conditioner
        timestep = self.adapter.timestep_argument
        is_passed = arguments[timestep] is call.arguments[timestep]
        plan = state.plan(stream, call.step)
        if plan is not None and self._reads_head(stream):
            summed = plan if stream.reads_sums else None
            head, sums = conditioner.head(state.run, arguments, ring.dtype, is_passed, summed)
            if self._is_fused(stream, plan, head):
                stream.stats.fused.append(call.step)
            weights = plan.weights[call.step]
            velocity = self.predictor.velocity_with(ring, weights, head, plan.low_rank, sums)
            return self.adapter.output(arguments, velocity)
        features = self._features(ring, call, plan)
        if self._keeps_forecasts:
            stream.push(features, call.sigma)  # before the head, which may overwrite them
        if self.adapter.runs_around:
            return self.adapter.run_around(call.stream, cast(Callable, call.forward), arguments, features)
        conditioning = conditioner.conditioning(state.run, arguments, ring.dtype, is_passed)
        return self.adapter.output(arguments, self.adapter.run_head(features, conditioning, arguments))

    def _is_fused(self, stream: Stream, plan: Plan, head: OutputHead) -> bool:
        """Whether forecast and output head are one kernel.

        A predictor may need its residual to answer, so it is asked once for each plan and kind of head.
        """
        parts = (head.weight, head.bias, head.scale, head.shift)
        kind = [None if part is None else (part.shape, part.dtype) for part in parts]
        known = stream.known_fused
        if known is None or known[0] is not plan or known[1] != kind:
            known = plan, kind, self.predictor.fuses_velocity(cast(FeatureRing, stream.ring), head)
            stream.known_fused = known
        return known[2]

    def _reads_head(self, stream: Stream) -> bool:
        """Whether the output head is computed from its weights, and not by its modules."""
        if self._keeps_forecasts or torch.is_grad_enabled() or not stream.fuses or self.adapter.runs_around:
            return False
        why = self.adapter.why_head_not_plain(self.placement.capture_id, cast(FeatureRing, stream.ring).device)
        if why is not None:
            self.stats.note(f"the output head ran in the model's own modules: {why}")
        return why is None

    def _features(self, ring: FeatureRing | TieredRing, call: Call, plan: Plan | None) -> torch.Tensor:
        """The forecast of the features."""
        if plan is None:  # with the predictor's hooks
            return self.predictor(ring, call.sigma, **self._more(call))
        return self.predictor.forecast_with(ring, plan.weights[call.step], plan.low_rank)

    def _more(self, call: Call) -> dict[str, Any]:
        """What some forecasters read in addition."""
        times = None if self.state is None else times_at(self.state.run.executed_sigmas, call.step)
        return self.predictor.extra(times, call.stream)

    def on_predicted(self, state: ForecastState, call: Call, output: Any) -> None:
        """Asks for the sum of the output, which says whether it is finite. A CPU answers at once, a GPU later."""
        stats = state.streams[call.stream].stats
        receive = functools.partial(self._on_sum, state, stats, call.step)
        state.values.ask(sum_of(output[0]), receive)

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

    def keep(self, state: ForecastState, call: Call, features: torch.Tensor, conditioning: Any) -> None:
        if self.observer is not None:
            self.observer.keep(call, features, conditioning)
        stream = state.streams[call.stream]
        if len(stream.stats.computed) > 1 and stream.fits(features):
            self._measure(state, stream, call, features, conditioning)
        self._push(stream, features, call.sigma)
        stream.shape, stream.step = self.adapter.shape(call.arguments), call.step
        stream.has_risen = stream.is_other_text = stream.is_unclear = False

    def _measure(
        self, state: ForecastState, stream: Stream, call: Call, features: torch.Tensor, conditioning: Any
    ) -> None:
        """Under `lesa.ErrorControl`, asks for the error of the forecast for a step that was computed."""
        if state.controlled is None:
            return
        why = self.adapter.why_head_not_plain(self.placement.capture_id, features.device)
        if why is not None:
            self.stats.note(f"errors are not measured, so the trained gaps are used: {why}")
            return
        forecast = self._features(cast(FeatureRing, stream.ring), call, state.plan(stream, call.step))
        error = forecast_error(forecast, features, self.adapter.output_head(conditioning))
        state.values.ask(error, functools.partial(state.controlled.receive, stream.stats.errors, call.step))

    def _push(self, stream: Stream, features: torch.Tensor, sigma: float) -> None:
        ring = stream.ring
        if ring is None or not stream.fits(features):
            stream.ring = ring = None  # nothing else holds it: it is freed before another one takes memory
            stream.planner = None
            if any(self.predictor is owned for owned in self.owned):
                self.predictor.to(features.device)
            batch, tokens, width = features.shape
            sizes = (batch, tokens, features.dtype, features.device, self.max_device_bytes, width)
            ring = self.predictor.make_ring(*sizes)
            stream.ring, stream.fuses = ring, self.predictor.fuses_velocity(ring)
            stream.reads_sums = stream.fuses and self.predictor.reads_sums(ring)
            stream.planner = Planner(self.predictor, ring, stream.name) if can_plan(self.predictor) else None
            stream.stats.ring_device_bytes, stream.stats.ring_host_bytes = ring.device_nbytes, ring.host_nbytes
        stream.push(features, sigma)

    def finish(self, state: ForecastState, call: Call) -> None:
        stats = state.streams[call.stream].stats
        stats.computed.append(call.step)
        stats.end(call.step, self.adapter.sample(call.arguments).device)
        if call.heads > 1:
            state.streams[call.stream].ring = None
            self._fall_back(*reasons.REPEATED)
        elif not call.heads:
            self._fall_back(*self.adapter.why_unseen(call.stream, call.arguments) or reasons.UNSEEN)
