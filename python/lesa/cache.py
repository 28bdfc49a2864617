"""`enable_cache`: predicts most denoising steps of a diffusers pipeline."""

import functools
import math
import numbers
from dataclasses import dataclass

import torch

from lesa.conditioning import Conditioner
from lesa.control import DeferredControl, computed
from lesa.hook import UNLOCATED, Call, Run, StepHook, installed_hook
from lesa.models import adapter_for
from lesa.schedule import FEW_STEPS, ControlledSteps, ErrorControl, Schedule, ScheduleLike, as_schedule
from lesa.stats import CacheStats, StreamStats
from lesa_kernels import FeatureRing, FusedKANPredictor, TieredRing
from lesa_kernels.checks import Said, argument_error, check_int
from lesa_kernels.predictor import output_head


class CacheHandle:
    """A cache that is on. Leaving it as a context manager, or `disable()`, turns it off.

    Args:
        stats: what happened in the latest run.
    """

    def __init__(self, hook: "_CacheHook"):
        self._hook = hook
        self.stats = hook.stats

    def disable(self) -> None:
        """Restores the transformer. Does nothing if the cache is off already."""
        self._hook.uninstall()

    def __enter__(self) -> "CacheHandle":
        return self

    def __exit__(self, *exception) -> None:
        self.disable()


def enable_cache(
    pipe,
    predictor: FusedKANPredictor,
    schedule: ScheduleLike | ErrorControl | None = None,
    max_device_bytes: int | None = None,
    strict: bool = False,
) -> CacheHandle:
    """Lets `predictor` forecast the steps of `pipe` that `schedule` does not compute.

    Args:
        pipe: a diffusers pipeline of a supported family.
        predictor: trained for the pipeline's transformer, on the transformer's device.
        schedule: which steps are computed: a `lesa.Schedule`, a list of step indices counted over the steps that a call
            executes, an interval N for steps 0, 1, 2 and then every N, or a `lesa.ErrorControl`, which chooses them
            during the run, by the errors of the forecasts so far. None: as the predictor was trained; then runs
            of fewer than 10 steps are computed whole, unless it was trained at that number.
        max_device_bytes: the most that the stored features of one stream of calls may take on the device; beyond it the
            oldest ones wait in host memory, which costs time. Guidance by two calls per step has two streams.
        strict: raise `RuntimeError` where a step that the schedule leaves out can't be predicted. Otherwise it is
            computed, with a warning, and `stats` says why. A run of few steps that is computed whole is no error.

    Returns:
        A handle with `stats` and `disable()`, usable as a context manager.

    Raises:
        TypeError: `pipe` is of no supported family, or `predictor` is no predictor.
        ValueError: the predictor was made for another family or width, is on another device, has weights that are not
            finite, has no schedule while none was given, or can't be used with an `ErrorControl`. The first computed
            step raises it, if `max_device_bytes` is less than the least that its features need.
        RuntimeError: a cache is on already. A run raises it too, if another cache was enabled meanwhile or a second
            thread enters the transformer.
    """
    adapter = adapter_for(pipe)
    if not isinstance(predictor, FusedKANPredictor):
        raise argument_error(
            "predictor",
            "be a FusedKANPredictor",
            predictor,
            "Load one with `FusedKANPredictor.from_pretrained`, or train one with `lesa.train`.",
            TypeError,
        )
    config = predictor.config
    if config.family not in (None, adapter.family):
        raise argument_error(
            "predictor.config.family",
            f"be {adapter.family!r}",
            config.family,
            "Use a predictor of this model's family.",
        )
    if config.feature_dim != adapter.feature_dim:
        raise argument_error(
            "predictor.config.feature_dim",
            f"be the transformer's width, {adapter.feature_dim}",
            config.feature_dim,
            "Use a predictor that was trained for this model.",
        )
    device, head_device = (next(m.parameters()).device for m in (predictor, adapter.head_entry))
    if device != head_device == pipe._execution_device:  # an offloaded model does not run where it is
        raise argument_error(
            "predictor",
            f"be on the transformer's device, {head_device}",
            Said(f"one on {device}"),
            f"Move it with `predictor.to('{head_device}')`.",
        )
    bad = [name for name, weight in predictor.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise argument_error(
            "predictor", "have finite weights", Said(f"NaN or Inf in {', '.join(bad)}"), "Load or train it again."
        )
    as_trained = schedule is None
    if as_trained and config.schedule is None:
        raise argument_error(
            "schedule",
            "be given, for this predictor was trained on none",
            schedule,
            "Pass an interval such as 7, or a list of the steps to compute.",
        )
    if as_trained:
        schedule = Schedule(config.schedule, config.num_inference_steps, config.schedule_sigmas)
    elif isinstance(schedule, ErrorControl):
        _check_controllable(adapter, config)
    elif isinstance(schedule, numbers.Integral):
        as_schedule(schedule, 1)  # a wrong interval is an error here, not at the first step
    else:
        schedule = as_schedule(schedule)
    if max_device_bytes is not None:
        check_int("max_device_bytes", max_device_bytes)
    hook = _CacheHook(pipe, adapter, predictor.eval(), schedule, as_trained, max_device_bytes, strict)
    hook.install()
    return CacheHandle(hook)


def _check_controllable(adapter, config) -> None:
    if config.history != "anchors":
        raise argument_error(
            "schedule",
            "be known before the run with a predictor that feeds on its own forecasts",
            Said("an ErrorControl"),
            "Use a newton predictor, or a list of steps.",
        )
    if len(config.schedule_errors or ()) < 2:
        raise argument_error(
            "predictor.config.schedule_errors",
            "say which errors are typical, for an ErrorControl to compare with",
            config.schedule_errors,
            "Train it with `lesa.train(..., controlled=True)` on two computed steps or more, or pass a list of steps.",
        )
    if getattr(adapter.transformer, "_parallel_config", None) is not None:
        raise argument_error(
            "schedule",
            "be known before the run where processes share a transformer",
            Said("an ErrorControl"),
            "Pass a list of steps: each process sees errors of its own part only.",
        )


def disable_cache(pipe) -> None:
    """Turns the cache of `pipe` off and restores its transformer. Does nothing if it is off already."""
    hook = installed_hook(adapter_for(pipe).transformer)
    if hook is not None:
        hook.uninstall()


@dataclass
class _Stream:
    """What a run keeps of one stream of calls."""

    stats: StreamStats
    conditioner: Conditioner
    ring: FeatureRing | TieredRing | None = None
    shape: tuple[int, int] | None = None  # batch and tokens of the call whose features are the newest in the ring
    fuses: bool = False  # whether the predictor has one kernel for forecast and output head
    is_other_text: bool = False  # since that call


class _CacheHook(StepHook):
    """Computes or predicts each call."""

    def __init__(self, pipe, adapter, predictor, schedule, as_trained, max_device_bytes, strict):
        super().__init__(pipe, adapter)
        self.predictor, self.schedule, self.as_trained = predictor, schedule, as_trained
        self.max_device_bytes, self.strict = max_device_bytes, strict
        controlnet = getattr(pipe, "controlnet", None)
        self._control = None if controlnet is None else DeferredControl.of(controlnet, adapter.control_outputs)
        self._keeps_forecasts = predictor.config.history == "steps"
        self.stats = CacheStats()
        self.streams: dict[str, _Stream] = {}
        self.computed: frozenset[int] = frozenset()
        self.forecasts_are_finite = True
        self.controlled: ControlledSteps | None = None  # of a run under `ErrorControl`
        self.errors: list[float] = []  # of the forecasts for the latest computed step, one per stream
        self.recorder = None  # a `lesa.recording.Recorder` that wants to know what is computed

    def install(self) -> None:
        super().install()
        if self._control is not None:
            self._control.join(self.is_awaited)

    def uninstall(self) -> None:
        super().uninstall()
        if self._control is not None:
            self._control.leave(self.is_awaited)
            self._control = None

    def needed(self, kwargs):
        return computed(kwargs)

    def forget(self) -> None:
        super().forget()
        self.streams = {}
        self.forecasts_are_finite = True

    def on_run(self, run: Run) -> None:
        """Chooses the computed steps of the run."""
        self.stats.begin_run()
        if self.recorder is not None:
            self.recorder.on_run(run)
        self._note_adapters()
        config, sigmas = self.predictor.config, run.executed_sigmas
        total = len(sigmas)
        if isinstance(self.schedule, ErrorControl):
            trained = Schedule(config.schedule, sigmas=config.schedule_sigmas)
            self.controlled = ControlledSteps(self.schedule, trained, config.schedule_errors, sigmas)
            self.computed, self.errors = self.controlled.chosen, []
            return
        if self.as_trained and total < FEW_STEPS and total != config.num_inference_steps:
            self.stats.note(f"computed everything: {total} steps are too few to predict any")
            self.computed = frozenset(range(total))
            return
        schedule = as_schedule(self.schedule, total)
        if schedule.sigmas is None and schedule.num_inference_steps not in (None, total):
            meant = schedule.num_inference_steps
            self.stats.note(f"the schedule is for {meant} steps and has no noise levels: its indices stand")
        beyond = [step for step in schedule.steps if step >= total]
        if schedule.sigmas is None and beyond:
            steps = ",".join(map(str, beyond))
            self.stats.note(f"the run has {total} steps, which leaves out the schedule's {steps}")
        self.computed = schedule.computed_in(sigmas)
        if config.num_inference_steps not in (None, total):
            trained = config.num_inference_steps
            self.stats.note(f"the predictor was trained at {trained} steps, this run has {total}")
        elif config.schedule is not None and self.computed != frozenset(config.schedule):
            steps = ",".join(map(str, config.schedule))
            self.stats.note(f"the predictor was trained with the computed steps {steps}")

    def _note_adapters(self) -> None:
        names = dict.fromkeys(getattr(self.pipe, "fused_loras", ()))  # what is fused stays when it is unloaded
        transformer = self.adapter.transformer
        for module in transformer.modules() if getattr(transformer, "_hf_peft_config_loaded", False) else ():
            if getattr(module, "disable_adapters", None) is False:  # a layer with adapters, and they are on
                names |= dict.fromkeys(module.active_adapters)
        if names:
            note = (
                f"the adapters {', '.join(names)} are on: unless the predictor was trained with them, its forecasts "
                "are less close"
            )
            self.stats.note(note)
            self.warn(note)

    def on_unlocated(self) -> None:
        self.stats.unlocated += 1
        self.streams = {}  # another run has the transformer; what was computed before it is no history any more
        self._fall_back(*UNLOCATED)

    def on_other_text(self, stream: str) -> None:
        if stream in self.streams:
            self.streams[stream].is_other_text = True

    def wants_prediction(self, call) -> bool:
        stream = self.streams.get(call.stream)
        if stream is None:
            stats = self.stats.streams.setdefault(call.stream, StreamStats())
            stream = self.streams[call.stream] = _Stream(stats, Conditioner(self.adapter))
        stream.stats.begin(call.step, call.arguments["hidden_states"].device)
        if isinstance(self.schedule, ErrorControl) and call.step > max(self.computed):
            run = self.run
            self._choose_next_step()
            if self.run is not run:  # what came by mail says that it was another scheduler's
                return False
        if call.step in self.computed:
            stream.stats.reasons[call.step] = "scheduled"
            return False
        if not self.forecasts_are_finite:  # which was said when it was found
            stream.stats.reasons[call.step] = "an earlier forecast was not finite"
            return False
        reason, remedy = self._why_not(stream, call)
        if reason is not None:
            stream.stats.reasons[call.step] = reason
            self._fall_back(reason, remedy)
        return reason is None

    def _choose_next_step(self) -> None:
        """Adds the computed step after the last one, by the errors that were found there."""
        self._read_mail(wait=True)
        self.controlled.choose_next(max(self.errors, default=None))  # there are none where a history began anew
        self.computed, self.errors = self.controlled.chosen, []

    def _measure(self, stream: _Stream, call: Call, features, conditioning) -> None:
        """Sends for the error of the forecast for a step that was computed."""
        why = self.adapter.why_head_not_plain(self._capture.id, stream.ring.device)
        if why is not None:
            self.stats.note(f"errors are not measured, so that the trained gaps stand: {why}")
            return
        ring, head = stream.ring, self.adapter.output_head(conditioning)
        truth = output_head(features, head).float()
        error = (output_head(self.predictor(ring, call.sigma), head).float() - truth).flatten(1)
        worst = (error.norm(dim=1) / truth.flatten(1).norm(dim=1).clamp(min=1e-12)).amax()

        def receive(value: float) -> None:
            stream.stats.errors[call.step] = value
            self.errors.append(value if math.isfinite(value) else math.inf)

        self.post(worst, receive)

    def _why_not(self, stream: _Stream, call: Call) -> tuple[str | None, str]:
        """Why a step that the schedule leaves out can't be predicted, or None; and what helps."""
        if stream.ring is None:
            return "no history", "Compute an earlier step of this stream: choose another schedule."
        if stream.shape != self.adapter.shape(call.arguments):
            return "the shape changed", "Keep batch and size the same in a run."
        if stream.is_other_text:
            return "the text changed", "Keep the texts the same in a run, and the order of their calls."
        device = next(self.predictor.parameters()).device
        if device != stream.ring.device:
            return (
                f"the predictor is on {device}, and the features on {stream.ring.device}",
                f"Move it with `predictor.to('{stream.ring.device}')`.",
            )
        return None, ""

    def predict(self, call, arguments):
        stream, predictor = self.streams[call.stream], self.predictor
        ring, conditioner = stream.ring, stream.conditioner
        needs_forecast = self._keeps_forecasts or torch.is_grad_enabled()
        if stream.fuses and not needs_forecast:
            why = self.adapter.why_head_not_plain(self._capture.id, ring.device)
            if why is None:
                head = conditioner.head(self.run, arguments, ring.dtype)
                if predictor.fuses_velocity(ring, head):
                    stream.stats.fused.append(call.step)
                return self.adapter.output(arguments, predictor.predict_velocity(ring, call.sigma, head))
            self.stats.note(f"the output head ran in the model's own modules: {why}")
        features = predictor(ring, call.sigma)
        if self._keeps_forecasts:
            ring.push(features, call.sigma)  # before the head, which may overwrite them
        conditioning = conditioner.conditioning(self.run, arguments, ring.dtype)
        return self.adapter.output(arguments, self.adapter.head(features, conditioning, arguments))

    def accepts(self, call, output) -> bool:
        """Sends for the sum of the output, which says whether it is finite. A CPU answers at once, a GPU later."""
        stats, run = self.streams[call.stream].stats, self.run
        self.post(output[0].sum(dtype=torch.float32), functools.partial(self._on_sum, call, run))
        if self.run is not run or not self.forecasts_are_finite:
            if call.step in stats.fused:
                stats.fused.remove(call.step)
            return False
        stats.predicted.append(call.step)
        stats.end(call.step, output[0].device)
        return True

    def _on_sum(self, call: Call, run: Run, value: float) -> None:
        if math.isfinite(value) or run is not self.run:
            return
        self.forecasts_are_finite = False
        stats, reason = self.stats.streams[call.stream], "the forecast was not finite"
        if call.step not in stats.predicted:  # else it is late: that step is over
            stats.reasons[call.step] = reason
        remedy = "So is the rest of the run. Check the predictor with `lesa.evaluate`, or use bfloat16."
        self._fall_back(reason, remedy)

    def _fall_back(self, reason: str, remedy: str) -> None:
        """Warns that something is computed that was not to be, or raises."""
        if self.strict:
            raise RuntimeError(f"lesa: a step can't be predicted: {reason}. {remedy} Without `strict`, it is computed.")
        self.warn(f"{reason}: computing. {remedy}")

    def keep(self, call, features, conditioning) -> None:
        if self.recorder is not None:
            self.recorder.keep(call, features, conditioning)
        stream = self.streams[call.stream]
        if isinstance(self.schedule, ErrorControl) and len(stream.stats.computed) > 1 and self._fits(stream, features):
            self._measure(stream, call, features, conditioning)
        self._push(stream, features, call.sigma)
        stream.shape, stream.is_other_text = self.adapter.shape(call.arguments), False

    def finish(self, call, kept) -> None:
        stats = self.streams[call.stream].stats
        stats.computed.append(call.step)
        stats.end(call.step, call.arguments["hidden_states"].device)
        if not kept:
            self._fall_back(
                "the output head did not run where lesa sees it",
                "Compile with `pipe.transformer.compile(...)`, and don't replace the transformer's forward.",
            )

    def _fits(self, stream: _Stream, features) -> bool:
        """Whether the stream has a history that these features belong to."""
        ring = stream.ring
        if ring is None or stream.is_other_text or (ring.batch, ring.tokens, ring.dim) != features.shape:
            return False
        return (ring.dtype, ring.device) == (features.dtype, features.device)

    def _push(self, stream: _Stream, features, sigma) -> None:
        ring = stream.ring
        if not self._fits(stream, features):
            stream.ring = ring = None  # the last name of it: it is freed before another one takes memory
            batch, tokens, _ = features.shape
            ring = self.predictor.make_ring(batch, tokens, features.dtype, features.device, self.max_device_bytes)
            stream.ring, stream.fuses = ring, self.predictor.fuses_velocity(ring)
            stream.stats.ring_device_bytes, stream.stats.ring_host_bytes = ring.device_nbytes, ring.host_nbytes
        ring.push(features, sigma)
