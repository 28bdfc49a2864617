"""The configuration of a predictor: its shape, and what it was trained for."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from lesa_kernels.checks import argument_error, check_choice, check_float, check_int, usage_error

FORMAT_VERSION = 1

_DENSE_WINDOWS = (4, 6, 8)  # high, middle and low noise; the LESA paper gives the first and the last


@dataclass(frozen=True)
class PredictorConfig:
    """The configuration of a `FusedKANPredictor`, which is also the content of a saved predictor's `config.json`.

    Args:
        feature_dim: width D of the features, the hidden size of the transformer.
        mixer: "newton" (Newton extrapolation whose coefficients, one per channel, come from a KAN) or "dense" (the
            dense variant, which follows the idea of the LESA paper: a linear map over the concatenated history, scaled
            by a KAN of the time offsets).
        history: what the ring holds: "anchors" (computed steps only) or "steps" (every step, also the forecasts).
            Default: "anchors" for newton, "steps" for dense.
        history_length: K, how many entries of the ring are read: one int for all stages, or one for each stage.
            Default: 4 for newton, and 4, 6, 8 from high to low noise for dense with three stages.
        stage_bounds: the noise levels between the stages, falling, strictly within (0, 1). n bounds make n + 1 stages.
            The stage of a sample is the number of bounds at or above its noise level.
        rank: rank of newton's linear residual over the taps; 0 means no residual. Ignored by dense.
        hidden: number M of spline units of the KAN. Default: 64 for newton, 256 for dense.
        grid_size: number of intervals of the spline grid on [-1, 1].
        spline_order: degree of the splines.
        family: the model family for which it was trained, such as "flux"; None if it was not trained.
        num_inference_steps: the number of steps in training, or None.
        schedule: the steps that were computed in training, rising from 0, or None.
        schedule_sigmas: the noise levels of those steps, falling, or None.
        schedule_errors: for each of those steps, the typical relative L2 error of the velocity when the step is
            forecast; 0 for the first step. Or None. `lesa.ErrorControl` compares with these errors.
        format_version: version of the format of a saved predictor.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.

    Source: LESA, arXiv 2602.20497, whose windows and stages the dense variant uses.
    """

    feature_dim: int
    mixer: str = "newton"
    history: str | None = None
    history_length: int | tuple[int, ...] | None = None
    stage_bounds: tuple[float, ...] = (0.67, 0.33)
    rank: int = 32
    hidden: int | None = None
    grid_size: int = 8
    spline_order: int = 3
    family: str | None = None
    num_inference_steps: int | None = None
    schedule: tuple[int, ...] | None = None
    schedule_sigmas: tuple[float, ...] | None = None
    schedule_errors: tuple[float, ...] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        put, put_all = self._put, self._put_all
        _check_format_version(self.format_version)
        put("feature_dim", check_int("feature_dim", self.feature_dim))
        check_choice("mixer", self.mixer, ("newton", "dense"))
        newton = self.mixer == "newton"
        history = self.history or ("anchors" if newton else "steps")
        put("history", check_choice("history", history, ("anchors", "steps")))
        put_all("stage_bounds", check_float, minimum=0.0, maximum=1.0)
        edges = (1.0, *self.stage_bounds, 0.0)
        if any(a <= b for a, b in zip(edges, edges[1:])):
            must = "fall strictly, from high to low noise, within (0, 1)"
            raise argument_error("stage_bounds", must, self.stage_bounds, "Sort and deduplicate them.")
        lengths = self.history_length
        if lengths is None:
            lengths = _DENSE_WINDOWS if not newton and self.num_stages == len(_DENSE_WINDOWS) else 4
        if isinstance(lengths, (tuple, list)):
            if len(lengths) != self.num_stages:
                raise argument_error(
                    "history_length",
                    f"have one entry per stage, {self.num_stages}",
                    lengths,
                    "Pass one int for all stages, or one entry more than `stage_bounds` has.",
                )
        else:
            lengths = (lengths,) * self.num_stages
        put("history_length", tuple(check_int("history_length", k) for k in lengths))
        put("rank", check_int("rank", self.rank, minimum=0) if newton else 0)
        put("hidden", check_int("hidden", self.hidden if self.hidden is not None else (64 if newton else 256)))
        put("grid_size", check_int("grid_size", self.grid_size))
        put("spline_order", check_int("spline_order", self.spline_order))
        if self.family is not None and not isinstance(self.family, str):
            remedy = "Pass a name such as 'flux', or None."
            raise argument_error("family", "be a string or None", self.family, remedy, TypeError)
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Checks what it was trained on."""
        total = self.num_inference_steps
        if total is not None:
            self._put("num_inference_steps", check_int("num_inference_steps", total))
        if self.schedule is not None:
            self._put_all("schedule", check_int, minimum=0, maximum=None if total is None else total - 1)
            if self.schedule[:1] != (0,) or any(a >= b for a, b in zip(self.schedule, self.schedule[1:])):
                remedy = "Sort and deduplicate the steps, and compute the first one."
                raise argument_error("schedule", "rise strictly from 0", self.schedule, remedy)
        if self.schedule_sigmas is not None:
            self._put_all("schedule_sigmas", check_float)
            if any(a <= b for a, b in zip(self.schedule_sigmas, self.schedule_sigmas[1:])):
                remedy = "Pass the noise levels of `schedule`, in its order."
                raise argument_error("schedule_sigmas", "fall strictly", self.schedule_sigmas, remedy)
        steps = len(self.schedule or ())
        if steps != len(self.schedule_sigmas or ()):
            raise argument_error(
                "schedule_sigmas",
                f"have one noise level for each of the {steps} steps of `schedule`",
                self.schedule_sigmas,
                "Pass both or neither.",
            )
        if self.schedule_errors is not None:
            self._put_all("schedule_errors", check_float, minimum=0.0)
            if len(self.schedule_errors) != steps:
                raise argument_error(
                    "schedule_errors",
                    f"have one error for each of the {steps} steps of `schedule`",
                    self.schedule_errors,
                    "Pass one error for each step, or None.",
                )

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _put_all(self, name: str, check: Callable[..., Any], **limits: Any) -> None:
        values = getattr(self, name)
        if not isinstance(values, (tuple, list)):
            raise argument_error(name, "be a tuple", values, "Pass a tuple or a list.", TypeError)
        self._put(name, tuple(check(name, value, **limits) for value in values))

    @property
    def num_stages(self) -> int:
        """Number of noise stages; each has an expert of its own."""
        return len(self.stage_bounds) + 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """`history_length` as a tuple with one entry for each stage."""
        return cast(tuple[int, ...], self.history_length)

    @property
    def max_history(self) -> int:
        """The longest history that any stage reads, which is the capacity that a ring needs."""
        return max(self.lengths)

    def to_dict(self) -> dict:
        """The fields as a dict for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "PredictorConfig":
        """The inverse of `to_dict`.

        Raises:
            TypeError: `values` is not a dict.
            ValueError: the format version is another one, or a field is unknown or missing; the message names it.
        """
        if not isinstance(values, dict):
            raise argument_error("config", "be a dict", values, "Pass what `to_dict` returned.", TypeError)
        _check_format_version(values.get("format_version"))  # first, since other versions have other fields
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            remedy = "Remove them. If a newer release of lesa-kernels wrote it, use that release."
            raise usage_error(f"`config` has unknown fields: {', '.join(unknown)}.", remedy)
        if "feature_dim" not in values:
            raise usage_error("`feature_dim` is required, but `config` does not have it.", "Add it to `config`.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def _check_format_version(version: Any) -> None:
    if isinstance(version, bool) or version != FORMAT_VERSION:
        remedy = "Train the predictor again, or use the release of lesa-kernels that wrote it."
        raise argument_error("format_version", f"be {FORMAT_VERSION}", version, remedy)
