"""`estimate`: what predicting most steps costs and saves. A model's configuration is enough; nothing runs."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lesa.models import ADAPTERS
from lesa.models.adapter import Adapter
from lesa.models.configurations import PRESETS, find_configuration, read_json
from lesa.models.costs import Costs
from lesa.schedule import FEW_STEPS, Schedule, ScheduleLike, as_schedule
from lesa_kernels import FusedKANPredictor, PredictorConfig, work
from lesa_kernels.checks import Said, argument_error, check_choice, check_float, check_int, usage_error
from lesa_kernels.feature_ring import ring_nbytes

__all__ = ["PRESETS", "Estimate", "estimate", "transformer_flops"]

EFFICIENCY = 0.5
"""The part of a datasheet's FLOP rate that computed steps are assumed to reach."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found. Bytes and seconds are of one call of the pipeline, that is, of `batch` samples.

    Args:
        model, device, dtype: what it is for.
        batch: samples per call.
        image_tokens, text_tokens: per sample.
        streams: calls of the transformer per step.
        num_inference_steps: steps of a call.
        computed: the steps that are computed.
        step_flops: of a computed step, of all streams.
        full_flops, flops: of a call with all steps computed, and with those of `computed`.
        computed_seconds, predicted_seconds: of one step.
        full_seconds, seconds: of a call's steps, with all of them computed and with those of `computed`. They do not
            include text encoders, decoding and the host's part of a step.
        speedup: of the seconds.
        step_speedup: `num_inference_steps` over the number of computed steps.
        ring_bytes, predictor_bytes: memory on the device in addition to the model.
        images_per_day: samples that are made each day, or None.
        full_gpu_hours, gpu_hours: of a day, with all steps computed and with those of `computed`; None without images.
        price: of a GPU-hour, or None.
        saved: money that a day saves, or None.
        assumptions: what the figures are based on, in words.
    """

    model: str
    device: str
    dtype: str
    batch: int
    image_tokens: int
    text_tokens: int
    streams: int
    num_inference_steps: int
    computed: tuple[int, ...]
    step_flops: int
    full_flops: int
    flops: int
    computed_seconds: float
    predicted_seconds: float
    full_seconds: float
    seconds: float
    speedup: float
    step_speedup: float
    ring_bytes: int
    predictor_bytes: int
    images_per_day: float | None
    full_gpu_hours: float | None
    gpu_hours: float | None
    price: float | None
    saved: float | None
    assumptions: tuple[str, ...]

    @property
    def computed_steps(self) -> int:
        """Number of computed steps."""
        return len(self.computed)

    @property
    def predicted_steps(self) -> int:
        """Number of predicted steps."""
        return self.num_inference_steps - self.computed_steps

    @property
    def speedup_ratio(self) -> float:
        """Time speed-up over step speed-up. It is 1 if predicted steps take no time."""
        return self.speedup / self.step_speedup

    @property
    def extra_bytes(self) -> int:
        """Bytes of ring and predictor."""
        return self.ring_bytes + self.predictor_bytes

    def to_dict(self) -> dict:
        """A dict for JSON."""
        derived = ("computed_steps", "predicted_steps", "speedup_ratio", "extra_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def table(self) -> str:
        """The figures with all steps computed and with few, as aligned text, and what they are based on."""
        rows = [
            ("", "all steps", "with lesa"),
            ("steps computed", f"{self.num_inference_steps}", f"{self.computed_steps}"),
            ("steps predicted", "0", f"{self.predicted_steps}"),
            ("PFLOP", f"{self.full_flops / 1e15:.3g}", f"{self.flops / 1e15:.3g}"),
            ("seconds", f"{self.full_seconds:.3g}", f"{self.seconds:.3g}"),
            ("extra memory, MB", "0", f"{self.extra_bytes / 1e6:.0f}"),
        ]
        hours, full_hours = self.gpu_hours, self.full_gpu_hours
        if hours is not None and full_hours is not None:
            rows.append(("GPU-hours a day", f"{full_hours:.4g}", f"{hours:.4g}"))
            if self.price is not None:
                rows.append(("cost of a day", f"{full_hours * self.price:.2f}", f"{hours * self.price:.2f}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        head = f"{self.model} on {self.device}: {self.image_tokens} image tokens, batch {self.batch}, {self.dtype}"
        lines = [head, *(f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in rows)]
        step = f"A computed step: {self.step_flops / 1e12:.3g} TFLOP, {_time(self.computed_seconds)}"
        lines.append(f"{step}; a predicted one: {_time(self.predicted_seconds)}.")
        lines.append(
            f"Speed-up {self.speedup:.2f}x, which is {self.speedup_ratio:.3f} of the steps' {self.step_speedup:.2f}x; "
            f"ring {self.ring_bytes / 1e6:.1f} MB, predictor {self.predictor_bytes / 1e6:.1f} MB."
        )
        if hours is not None and full_hours is not None:
            saved = f"{full_hours - hours:.4g} GPU-hours"
            money = "" if self.saved is None else f", {self.saved:.2f} in money"
            lines.append(f"Saved a day, at {self.images_per_day:g} images: {saved}{money}.")
        return "\n".join([*lines, *self.assumptions])


def estimate(
    model: str | os.PathLike,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    num_inference_steps: int = 50,
    schedule: ScheduleLike | None = None,
    predictor: PredictorConfig | str | os.PathLike | None = None,
    device: str = "H100",
    bandwidth: float | None = None,
    flops_rate: float | None = None,
    efficiency: float = EFFICIENCY,
    step_seconds: float | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    text_tokens: int | None = None,
    streams: int | None = None,
    images_per_day: float | None = None,
    price: float | None = None,
) -> Estimate:
    """Computes what a run costs with all steps computed, and with most of them predicted.

    The time of a computed step is its FLOPs divided by the reached rate, which is `efficiency` times the rate of the
    device, plus the time of a push into the ring. The time of a predicted step is the larger one of two times: the
    bytes that it must move divided by the bandwidth, and its FLOPs divided by the reached rate.

    Args:
        model: a name in `PRESETS`, the folder of a pipeline or of its transformer, or a hub id that is in the local
            cache.
        height, width, frames: size of a sample, in pixels and frames. Default: the size of the preset, else 1024 x 1024
            and one frame.
        num_inference_steps: steps of a run.
        schedule: the computed steps, as in `enable_cache`; all must be below `num_inference_steps`. None: those that
            the predictor was trained for, or nine that `Schedule.spread` chooses.
        predictor: its configuration, or the folder of one. None: what `lesa.train` makes by default.
        device: a name in `lesa_kernels.work.DATASHEETS`.
        bandwidth: bytes per second, instead of the datasheet's.
        flops_rate: FLOPs per second of dense products, instead of the datasheet's.
        efficiency: part of the rate that computed steps reach, in (0, 1].
        step_seconds: measured time of a computed step, for all streams. It replaces the time that follows from the
            FLOPs.
        batch: samples per call.
        dtype: dtype of the features: "bfloat16", "float16" or "float32".
        text_tokens: text tokens per sample. Default: as many as the family's pipelines pass.
        streams: calls of the transformer per step. Default: those of the family's usual guidance, such as 2 for
            Qwen-Image.
        images_per_day: samples per day, to compute the GPU-hours.
        price: price of a GPU-hour, to compute the money.

    Raises:
        TypeError, ValueError: an argument is not as described, or the predictor is of another width or family.
        FileNotFoundError: there is no such model.
    """
    family, costs, tokens = _sample(model, height, width, frames)
    text = check_int("text_tokens", costs.text_tokens if text_tokens is None else text_tokens, minimum=0)
    streams = check_int("streams", costs.streams if streams is None else streams)
    batch, total = check_int("batch", batch), check_int("num_inference_steps", num_inference_steps)
    name, bandwidth, rate = _rates(device, bandwidth, flops_rate, efficiency)
    predictor_config = _predictor(predictor, costs.dim, family)
    computed = _computed(schedule, predictor_config, total)
    step_flops = streams * batch * costs.flops(tokens, text)
    sizes = (batch, tokens, costs.dim, getattr(torch, check_choice("dtype", dtype, DTYPES)))
    push = work.ring_push(*sizes)["bytes"] / bandwidth * streams
    plain = step_flops / rate if step_seconds is None else _positive("step_seconds", step_seconds)
    moved, predicted_flops = (streams * amount for amount in predicted_work(predictor_config, sizes, costs.head_width))
    predicted_seconds = max(moved / bandwidth, predicted_flops / rate)
    seconds = len(computed) * (plain + push) + (total - len(computed)) * predicted_seconds
    with torch.device("meta"):
        predictor_bytes = sum(value.nbytes for value in FusedKANPredictor(predictor_config).state_dict().values())
    full_hours, hours, saved = _day(images_per_day, batch, total * plain, seconds, price)
    measured = "as given" if step_seconds is not None else f"at {rate / 1e12:.4g} TFLOP/s"
    return Estimate(
        model=str(model),
        device=name,
        dtype=dtype,
        batch=batch,
        image_tokens=tokens,
        text_tokens=text,
        streams=streams,
        num_inference_steps=total,
        computed=computed,
        step_flops=step_flops,
        full_flops=total * step_flops,
        flops=len(computed) * step_flops + (total - len(computed)) * round(predicted_flops),
        computed_seconds=plain,
        predicted_seconds=predicted_seconds,
        full_seconds=total * plain,
        seconds=seconds,
        speedup=total * plain / seconds,
        step_speedup=total / len(computed),
        ring_bytes=streams * ring_nbytes(predictor_config.max_history, *sizes),
        predictor_bytes=predictor_bytes,
        images_per_day=images_per_day,
        full_gpu_hours=full_hours,
        gpu_hours=hours,
        price=price,
        saved=saved,
        assumptions=(
            f"Computed steps {measured}, predicted ones at {bandwidth / 1e12:.4g} TB/s; {text} text tokens, {streams} "
            f"transformer call{'s' if streams > 1 else ''} a step.",
            "Without text encoders, decoding, and what the host adds to each step.",
        ),
    )


def _sample(model, height, width, frames) -> tuple[str, Costs, int]:
    """Family and costs of a model, and the image tokens of a sample."""
    config, preset, scale, frame_scale = find_configuration(model)
    family = _family(config)
    costs = family.costs(config)
    given = zip(("height", "width", "frames"), (height, width, frames), preset)
    height, width, frames = (check_int(name, default if value is None else value) for name, value, default in given)
    return family.family, costs, costs.image_tokens(height, width, frames, scale, frame_scale)


def _day(images_per_day, batch: int, full_seconds: float, seconds: float, price) -> tuple:
    """GPU-hours of a day with all steps computed and with few, and the money that this saves; None where unknown."""
    if images_per_day is None:
        return None, None, None
    calls = _positive("images_per_day", images_per_day) / batch
    full_hours, hours = calls * full_seconds / 3600, calls * seconds / 3600
    return full_hours, hours, None if price is None else (full_hours - hours) * _positive("price", price)


def _rates(device, bandwidth, flops_rate, efficiency) -> tuple[str, float, float]:
    """Name, bytes per second and FLOPs per second of a device: those given, else the datasheet's."""
    if device not in work.DATASHEETS:
        remedy = "For another device, leave `device` out and give its `bandwidth` and `flops_rate`."
        raise argument_error("device", f"be one of {', '.join(work.DATASHEETS)}", device, remedy)
    name, sheet_bandwidth, sheet_rate = work.DATASHEETS[device]
    bandwidth = _positive("bandwidth", sheet_bandwidth if bandwidth is None else bandwidth)
    rate = _positive("flops_rate", sheet_rate if flops_rate is None else flops_rate)
    if (bandwidth, rate) != (sheet_bandwidth, sheet_rate):
        name = "a device with the given rates"
    return name, bandwidth, rate * _positive("efficiency", efficiency, maximum=1.0)


def transformer_flops(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one call of a transformer with one sample: products with weights, and attention.

    Args:
        config: of the transformer, with its `_class_name`. What it lacks is taken from the family's usual model.
        image_tokens, text_tokens: of the sample.

    Raises:
        ValueError: the transformer is of no supported family.
    """
    return _family(config).costs(config).flops(image_tokens, text_tokens)


def _family(config: Mapping[str, Any]) -> type[Adapter]:
    kinds = {adapter.costs.usual_config["_class_name"]: adapter for adapter in ADAPTERS}
    kind = config.get("_class_name")
    if kind not in kinds:
        must = f"be of a transformer of a supported family, {', '.join(kinds)}"
        raise argument_error("config._class_name", must, kind, "Use such a model.")
    for name, usual in kinds[kind].costs.usual_config.items():
        if isinstance(usual, (int, float)) and not isinstance(usual, bool) and config.get(name) is not None:
            least = 1 if "size" in name else 0
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 2**31:
                must = f"have a number of at least {least} as {name} in its configuration"
                raise argument_error("model", must, value, "Get the configuration again.")
    return kinds[kind]


def _predictor(predictor, dim: int, family: str) -> PredictorConfig:
    """The configuration of one that fits the model."""
    if predictor is None:
        return PredictorConfig(dim, family=family)
    if not isinstance(predictor, PredictorConfig):
        file = Path(predictor) / "config.json"
        if not file.is_file():
            remedy = "Pass a folder that `lesa train` wrote, or a PredictorConfig."
            raise argument_error("predictor", "hold a config.json", Said(str(predictor)), remedy, FileNotFoundError)
        found = read_json(file, "predictor")
        try:
            predictor = PredictorConfig.from_dict(found)
        except (TypeError, ValueError) as error:
            raise usage_error(f"`predictor` has a {file} that cannot be used.", str(error), type(error)) from None
    for name, wanted in (("feature_dim", dim), ("family", family)):
        got = getattr(predictor, name)
        if got not in (None, wanted):
            remedy = "Use a predictor of this model."
            raise argument_error(f"predictor.config.{name}", f"be the model's, {wanted!r}", got, remedy)
    return predictor


def _computed(schedule, predictor: PredictorConfig, total: int) -> tuple[int, ...]:
    """The steps that a run of `total` steps computes, as far as they are known without its noise levels."""
    name, trained, follow = "schedule", predictor.num_inference_steps, "Pass an interval or a list of steps."
    if schedule is None and predictor.schedule is not None:
        if total < FEW_STEPS and trained is None:
            return tuple(range(total))  # as in a run
        if total in predictor.step_counts[1:]:
            reason = "the steps that the predictor computes in them depend on their noise levels"
            raise usage_error(f"`schedule` is required for {total} steps: {reason}.", follow)
        if trained not in (None, total):
            reason = f"the predictor was trained for {trained} steps"
            raise usage_error(f"`schedule` is required for {total} steps: {reason}.", follow)
        name, schedule = "predictor.config.schedule", Schedule(predictor.schedule)
    if schedule is None:
        schedule = Schedule.spread(min(9, total), total)
    chosen = as_schedule(schedule, total)
    if chosen.sigmas is not None and chosen.num_inference_steps not in (None, total):
        got = Said(f"noise levels of a run of {chosen.num_inference_steps} steps")
        raise argument_error(name, f"be for a run of {total} steps", got, follow)
    if chosen.steps[-1] >= total:
        remedy = "Remove the larger steps, or change `num_inference_steps`."
        raise argument_error(name, f"hold steps below {total}, the number of steps", chosen.steps, remedy)
    return chosen.steps


def predicted_work(
    config: PredictorConfig, sizes: tuple[int, int, int, torch.dtype], out_channels: int
) -> tuple[float, float]:
    """Bytes and FLOPs of a predicted step of one stream; the mean over the stages.

    Args:
        config: of the predictor.
        sizes: batch, tokens, width and dtype of the features.
        out_channels: of the output head.
    """
    parts = []
    for history in config.lengths:
        parts.append(config.forecaster.work(config, sizes, out_channels, history))
        if config.history == "steps":
            parts[-1] = work.both(parts[-1], work.ring_push(*sizes))
    moved, flops = (sum(part[name] for part in parts) / len(parts) for name in ("bytes", "flops"))
    return moved, flops


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _positive(name: str, value, maximum: float = float("inf")) -> float:
    value = check_float(name, value, 0.0, maximum)
    if value == 0:
        raise argument_error(name, "be above 0", value, f"Choose a larger value for `{name}`.")
    return value
