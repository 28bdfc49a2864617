"""`enable_cache`: predicts most denoising steps of a diffusers pipeline."""

import numbers
from dataclasses import dataclass, field

import torch

from lesa.hook import Run, StepHook, installed_hook
from lesa.models import adapter_for
from lesa.schedule import FEW_STEPS, Schedule, ScheduleLike, as_schedule
from lesa_kernels import FeatureRing, FusedKANPredictor, TieredRing
from lesa_kernels._checks import Said, argument_error, check_int


@dataclass
class StreamStats:
    """What happened in one stream of calls, such as the conditional one.

    Args:
        computed: the executed steps that ran the transformer, in order.
        predicted: the executed steps that were forecast, in order.
        fused: those of the predicted steps whose forecast and output head were one kernel.
        reasons: why each computed step was computed.
        ring_device_bytes, ring_host_bytes: what the ring of features takes on its device, and in host memory beside it;
            0 before the first computed step. The rings are freed when the run ends.
    """

    computed: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    fused: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    ring_device_bytes: int = 0
    ring_host_bytes: int = 0


@dataclass
class CacheStats:
    """What happened in the latest run of the pipeline.

    Args:
        runs: how many runs began since the cache was enabled.
        unlocated: how many calls since then were computed because their timestep was none of the scheduler's.
        streams: statistics by stream.
        notes: what is worth knowing of the run, such as a schedule other than the trained one.
    """

    runs: int = 0
    unlocated: int = 0
    streams: dict[str, StreamStats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def computed_steps(self) -> int:
        """Number of steps at which any stream ran the transformer."""
        return len({step for stream in self.streams.values() for step in stream.computed})

    @property
    def predicted_steps(self) -> int:
        """Number of steps at which every stream was forecast."""
        predicted = {step for stream in self.streams.values() for step in stream.predicted}
        return len(predicted.difference(*(stream.computed for stream in self.streams.values())))

    @property
    def ring_device_bytes(self) -> int:
        """Bytes that the rings of all streams take on the device."""
        return sum(stream.ring_device_bytes for stream in self.streams.values())

    @property
    def ring_host_bytes(self) -> int:
        """Bytes that the rings of all streams take in host memory beside it."""
        return sum(stream.ring_host_bytes for stream in self.streams.values())

    def summary(self) -> str:
        """A few lines for people."""
        lines = []
        for name, stream in self.streams.items():
            steps = ",".join(map(str, stream.computed))
            lines.append(f"{name}: computed {len(stream.computed)} ({steps}), predicted {len(stream.predicted)} steps")
            if stream.fused:
                lines[-1] += f", {len(stream.fused)} of them in one kernel with the output head"
            if stream.ring_device_bytes:
                lines[-1] += f"; its features take {_mebibytes(stream.ring_device_bytes)}"
            if stream.ring_host_bytes:
                lines[-1] += f", and {_mebibytes(stream.ring_host_bytes)} of host memory"
            unplanned = {s: r for s, r in stream.reasons.items() if r != "scheduled"}
            lines += [f"  step {step}: {reason}" for step, reason in unplanned.items()]
        if self.unlocated:
            lines.append(f"computed {self.unlocated} calls whose timestep was not one of the scheduler's")
        return "\n".join(lines + self.notes) or "no step ran yet"


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


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
    schedule: ScheduleLike | None = None,
    max_device_bytes: int | None = None,
) -> CacheHandle:
    """Lets `predictor` forecast the steps of `pipe` that `schedule` does not compute.

    Args:
        pipe: a diffusers pipeline of a supported family.
        predictor: trained for the pipeline's transformer, on the transformer's device.
        schedule: which steps are computed: a `lesa.Schedule`, a list of step indices counted over the steps that a call
            executes, or an interval N for steps 0, 1, 2 and then every N. None: as the predictor was trained; then runs
            of fewer than 10 steps are computed whole, unless it was trained at that number.
        max_device_bytes: the most that the stored features of one stream of calls may take on the device; beyond it the
            oldest ones wait in host memory, which costs time. Guidance by two calls per step has two streams.

    Returns:
        A handle with `stats` and `disable()`, usable as a context manager.

    Raises:
        TypeError: `pipe` is of no supported family, or `predictor` is no predictor.
        ValueError: the predictor was made for another family or width, is on another device, has weights that are not
            finite, or has no schedule while none was given. The first computed step raises it, if `max_device_bytes`
            is less than the least that its features need.
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
    elif isinstance(schedule, numbers.Integral):
        as_schedule(schedule, 1)  # a wrong interval is an error here, not at the first step
    else:
        schedule = as_schedule(schedule)
    if max_device_bytes is not None:
        check_int("max_device_bytes", max_device_bytes)
    hook = _CacheHook(pipe, adapter, predictor.eval(), schedule, as_trained, max_device_bytes)
    hook.install()
    return CacheHandle(hook)


def disable_cache(pipe) -> None:
    """Turns the cache of `pipe` off and restores its transformer. Does nothing if it is off already."""
    hook = installed_hook(adapter_for(pipe).transformer)
    if hook is not None:
        hook.uninstall()


class _CacheHook(StepHook):
    """Computes or predicts each call."""

    def __init__(self, pipe, adapter, predictor, schedule, as_trained, max_device_bytes):
        super().__init__(pipe, adapter)
        self.predictor, self.schedule, self.as_trained = predictor, schedule, as_trained
        self.max_device_bytes = max_device_bytes
        self.stats = CacheStats()
        self.rings: dict[str, FeatureRing | TieredRing] = {}
        self.computed: frozenset[int] = frozenset()
        self.forecasts_are_finite = True

    def forget(self) -> None:
        super().forget()
        self.rings = {}
        self.forecasts_are_finite = True

    def on_run(self, run: Run) -> None:
        """Chooses the computed steps of the run."""
        self.stats.runs += 1
        self.stats.streams = {}
        self.stats.notes = []
        config, sigmas = self.predictor.config, run.executed_sigmas
        total = len(sigmas)
        if self.as_trained and total < FEW_STEPS and total != config.num_inference_steps:
            self.stats.notes.append(f"computed everything: {total} steps are too few to predict any")
            self.computed = frozenset(range(total))
            return
        schedule = as_schedule(self.schedule, total)
        if schedule.sigmas is None and schedule.num_inference_steps not in (None, total):
            meant = schedule.num_inference_steps
            self.stats.notes.append(f"the schedule is for {meant} steps and has no noise levels: its indices stand")
        beyond = [step for step in schedule.steps if step >= total]
        if schedule.sigmas is None and beyond:
            steps = ",".join(map(str, beyond))
            self.stats.notes.append(f"the run has {total} steps, which leaves out the schedule's {steps}")
        self.computed = schedule.computed_in(sigmas)
        if config.num_inference_steps not in (None, total):
            trained = config.num_inference_steps
            self.stats.notes.append(f"the predictor was trained at {trained} steps, this run has {total}")
        elif config.schedule is not None and self.computed != frozenset(config.schedule):
            steps = ",".join(map(str, config.schedule))
            self.stats.notes.append(f"the predictor was trained with the computed steps {steps}")

    def on_unlocated(self) -> None:
        self.stats.unlocated += 1
        self.rings = {}  # another run has the transformer; what was computed before it is no history any more

    def on_call(self, step, stream, sigma, call, compute):
        stats = self.stats.streams.setdefault(stream, StreamStats())
        ring = self.rings.get(stream)
        reason = self._reason_to_compute(step, ring, call)
        if reason is None:
            output, features = self._predict(step, ring, sigma, call, stats)
            if torch.isfinite(output[0]).all():
                if self.predictor.config.history == "steps":
                    ring.push(features, sigma)
                stats.predicted.append(step)
                return output
            if step in stats.fused:
                stats.fused.remove(step)
            self.forecasts_are_finite = False
            reason = "the forecast was not finite"
            self.warn(f"{reason}: computing this step and the rest of the run")
        stats.computed.append(step)
        stats.reasons[step] = reason
        del ring  # a new one may take its place
        return compute(lambda features, conditioning: self._push(stream, features, sigma))

    def _predict(self, step, ring, sigma, call, stats):
        """The transformer's output at a skipped step, and the forecast, or None if it was never in memory."""
        keeps_none = self.predictor.config.history == "anchors" and not torch.is_grad_enabled()
        conditioning = self.adapter.conditioning(call, ring.dtype)
        if keeps_none and self.predictor.fuses_velocity(ring):
            reason = self.adapter.why_head_not_plain(self._capture.id, ring.device)
            if reason is None:
                head = self.adapter.output_head(conditioning)
                if self.predictor.fuses_velocity(ring, head):
                    stats.fused.append(step)
                return self.adapter.output(call, self.predictor.predict_velocity(ring, sigma, head)), None
            note = f"the output head ran in the model's own modules: {reason}"
            if note not in self.stats.notes:
                self.stats.notes.append(note)
        features = self.predictor(ring, sigma)
        return self.adapter.output(call, self.adapter.head(features, conditioning, call)), features

    def _reason_to_compute(self, step, ring, call) -> str | None:
        if step in self.computed:
            return "scheduled"
        if not self.forecasts_are_finite:
            return "an earlier forecast was not finite"
        if ring is None:
            return "no history"
        if (ring.batch, ring.tokens) != self.adapter.shape(call):
            return "the shape changed"
        return None

    def _push(self, stream, features, sigma) -> None:
        ring = self.rings.get(stream)
        fits = ring is not None and (ring.batch, ring.tokens, ring.dim) == features.shape
        if not fits or (ring.dtype, ring.device) != (features.dtype, features.device):
            self.rings.pop(stream, None)
            ring = None  # the last name of it: it is freed before another one takes memory
            batch, tokens, _ = features.shape
            ring = self.predictor.make_ring(batch, tokens, features.dtype, features.device, self.max_device_bytes)
            self.rings[stream] = ring
            stats = self.stats.streams[stream]
            stats.ring_device_bytes, stats.ring_host_bytes = ring.device_nbytes, ring.host_nbytes
        ring.push(features, sigma)
