"""The configuration of a predictor: its shape, and what it was trained for."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from lesa_kernels.checks import argument_error, check_choice, check_float, check_int, usage_error
from lesa_kernels.forecasters.base import Forecaster
from lesa_kernels.forecasters.registry import forecaster_of

FORMAT_VERSIONS = (1, 2, 3)
"""Version 3 has `told_levels` or `more_step_counts`. Version 2 may have `options`, and no width. Earlier releases know
lower versions only; what they can read has these."""
_SINCE = {"options": 2, "told_levels": 3, "more_step_counts": 3}
"""The first version that has a field."""
_OF_VERSION_1 = ("newton", "dense")
"""The mixers that the first releases know."""


class Options(dict[str, int | float]):
    """The options of a forecaster: a dict that cannot be changed, so that a configuration can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        return Options, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        remedy = "Make another configuration with `dataclasses.replace`."
        raise usage_error("The `options` of a configuration cannot be changed.", remedy, TypeError)

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


@dataclass(frozen=True)
class PredictorConfig:
    """The configuration of a `FusedKANPredictor`, which is also the content of a saved predictor's `config.json`.

    Args:
        feature_dim: width D of the features, the hidden size of the transformer. It may be None for a forecaster that
            has no parameters of one width: then the predictor fits any width.
        mixer: who makes the weights of the stored features, a name in `lesa_kernels.forecasters.FORECASTERS`, such as
            "newton" (Newton extrapolation whose coefficients, one per channel, come from a KAN), "dense" (the dense
            variant, which follows the idea of the LESA paper: a linear map over the concatenated history, scaled by a
            KAN of the time offsets) or "lesa" (what the authors of that paper released: one scalar per step of the
            history, scaled by a KAN of all times).
        history: what the ring holds: "anchors" (computed steps only) or "steps" (every step, also the forecasts).
            Default: that of the forecaster, "anchors" for newton and "steps" for dense and lesa.
        history_length: K, how many entries of the ring are read: one int for all stages, or one for each stage.
            Default: that of the forecaster: 4 for newton, and with three stages, from high to low noise, 4, 6, 8 for
            dense and 4, 8, 8 for lesa.
        stage_bounds: the noise levels between the stages, falling, strictly within (0, 1). n bounds make n + 1 stages.
            The stage of a sample is the number of bounds at or above its noise level. Default: that of the forecaster,
            0.67 and 0.33 for newton and dense, 0.9 and 0.5 for lesa, or 0.9 and 0.4 with two streams.
        rank: rank of the linear residual over newton's taps; 0 means no residual. Forecasters without a residual ignore
            it.
        hidden: number M of spline units of the KAN. Default: 64 for newton, 256 for dense and lesa. None for
            forecasters without such units, which ignore it and the next two. lesa ignores the next two: its grid is
            that of the released code.
        grid_size: number of intervals of the spline grid on [-1, 1].
        spline_order: degree of the splines.
        family: the model family for which it was trained, such as "flux"; None if it was not trained.
        num_inference_steps: the number of steps in training, or None.
        schedule: the steps that were computed in training, rising from 0, or None.
        schedule_sigmas: the noise levels of those steps, falling, or None.
        schedule_errors: for each of those steps, the typical relative L2 error of the velocity when the step is
            forecast; 0 for the first step. Or None. `lesa.ErrorControl` compares with these errors.
        format_version: version of the format of a saved predictor. It is always the oldest that can hold the other
            fields, also if another known version is given.
        options: settings of the forecaster by name, such as `{"order": 2}`; its class lists them. What is not given has
            its default. None for a forecaster without options.
        told_levels: for each step of `schedule`, the noise level in [0, 1] that the model is told when the step is
            computed, in place of that of its latents. Or None: that of its latents. Only a run with the steps and noise
            levels of `schedule` uses them. `lesa.train_end_to_end` trains them with `learn_levels=True`.
        more_step_counts: other numbers of steps for which it was trained too, rising. In their runs, the steps that are
            nearest to `schedule_sigmas` were computed. None: `num_inference_steps` was the only one.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.

    Source: LESA, arXiv 2602.20497, for experts of noise stages. LD3, arXiv 2405.15506, whose released code learns the
    times that the model is told apart from those of the solver, for `told_levels`.
    """

    feature_dim: int | None = None
    mixer: str = "newton"
    history: str | None = None
    history_length: int | tuple[int, ...] | None = None
    stage_bounds: tuple[float, ...] = None  # type: ignore[assignment]  # which the forecaster's replace
    rank: int = 32
    hidden: int | None = None
    grid_size: int = 8
    spline_order: int = 3
    family: str | None = None
    num_inference_steps: int | None = None
    schedule: tuple[int, ...] | None = None
    schedule_sigmas: tuple[float, ...] | None = None
    schedule_errors: tuple[float, ...] | None = None
    format_version: int = None  # type: ignore[assignment]  # which the oldest that fits replaces
    options: dict[str, int | float] | None = None
    told_levels: tuple[float, ...] | None = None
    more_step_counts: tuple[int, ...] | None = None

    def __post_init__(self):
        put, put_all = self._put, self._put_all
        forecaster = forecaster_of(self.mixer)
        put("options", self._complete_options(forecaster))
        if self.feature_dim is not None or forecaster.knows_width:
            put("feature_dim", check_int("feature_dim", self.feature_dim))
        if self.format_version is not None:
            _check_format_version(self.format_version, max(FORMAT_VERSIONS))
        put("format_version", _format_version_of(vars(self)))
        put("history", check_choice("history", self.history or forecaster.history, ("anchors", "steps")))
        if self.stage_bounds is None:
            put("stage_bounds", forecaster.default_bounds(self))
        put_all("stage_bounds", check_float, minimum=0.0, maximum=1.0)
        edges = (1.0, *self.stage_bounds, 0.0)
        if any(a <= b for a, b in zip(edges, edges[1:])):
            must = "fall strictly, from high to low noise, within (0, 1)"
            raise argument_error("stage_bounds", must, self.stage_bounds, "Sort and deduplicate them.")
        lengths = forecaster.history_length(self) if self.history_length is None else self.history_length
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
        put("rank", check_int("rank", self.rank, minimum=0) if forecaster.has_residual else 0)
        units = forecaster.hidden
        put("hidden", None if units is None else check_int("hidden", units if self.hidden is None else self.hidden))
        put("grid_size", check_int("grid_size", self.grid_size))
        put("spline_order", check_int("spline_order", self.spline_order))
        if self.family is not None and not isinstance(self.family, str):
            remedy = "Pass a name such as 'flux', or None."
            raise argument_error("family", "be a string or None", self.family, remedy, TypeError)
        self._check_schedule()
        self._check_more_step_counts()

    def _complete_options(self, forecaster: Forecaster) -> Options | None:
        """The options, checked, with the defaults of those that are not given."""
        known, given = forecaster.options, {} if self.options is None else self.options
        if not isinstance(given, dict):
            raise argument_error("options", "be a dict or None", given, 'Pass a dict such as {"order": 2}.', TypeError)
        for name in given:
            if name not in known:
                names = ", ".join(map(repr, known)) or "nothing"
                raise argument_error("options", f"hold {names} for {self.mixer!r}", name, "Leave it out.")
        values: dict[str, int | float] = {}
        for name, option in known.items():
            value, what = given.get(name, option.default), f"options[{name!r}]"
            if isinstance(option.default, int):
                values[name] = check_int(what, value, int(option.minimum), int(option.maximum))
            else:
                values[name] = check_float(what, value, option.minimum, option.maximum)
        return Options(values) if values else None

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
        if self.told_levels is not None:
            self._put_all("told_levels", check_float, minimum=0.0, maximum=1.0)
            if not steps or len(self.told_levels) != steps:
                must = f"have one noise level for each of the {steps} steps of `schedule`"
                remedy = "Pass one level for each step, or None." if steps else "Pass `schedule` too, or None."
                raise argument_error("told_levels", must, self.told_levels, remedy)

    def _check_more_step_counts(self) -> None:
        """Checks the other numbers of steps for which it was trained."""
        if self.more_step_counts is None:
            return
        self._put_all("more_step_counts", check_int)
        counts = self.more_step_counts
        if not counts or any(a >= b for a, b in zip(counts, counts[1:])) or self.num_inference_steps in counts:
            must = f"rise, without {self.num_inference_steps}, the `num_inference_steps`"
            raise argument_error("more_step_counts", must, counts, "Sort them and remove repeats, or pass None.")
        if self.num_inference_steps is None or self.schedule is None:
            must = "be None where there is no `num_inference_steps` or no `schedule`"
            raise argument_error("more_step_counts", must, counts, "Pass all of them.")

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _put_all(self, name: str, check: Callable[..., Any], **limits: Any) -> None:
        values = getattr(self, name)
        if not isinstance(values, (tuple, list)):
            raise argument_error(name, "be a tuple", values, "Pass a tuple or a list.", TypeError)
        self._put(name, tuple(check(name, value, **limits) for value in values))

    @property
    def step_counts(self) -> tuple[int, ...]:
        """All numbers of steps for which it was trained, that of `schedule` first; empty if that is unknown."""
        own = () if self.num_inference_steps is None else (self.num_inference_steps,)
        return own + (self.more_step_counts or ())

    @property
    def forecaster(self) -> Forecaster:
        """Who makes the weights: the forecaster that `mixer` names."""
        return forecaster_of(self.mixer)

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
        """The fields as a dict for JSON: those that its format version has, of those of version 3 the given ones."""
        values = asdict(self)
        for name, since in _SINCE.items():
            if self.format_version < since or (since == 3 and values[name] is None):
                del values[name]
        if values.get("options") is not None:
            values["options"] = dict(values["options"])
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "PredictorConfig":
        """The inverse of `to_dict`.

        Raises:
            TypeError: `values` is not a dict.
            ValueError: the format version is another one, or a field is unknown or missing; the message names it.
        """
        if not isinstance(values, dict):
            raise argument_error("config", "be a dict", values, "Pass what `to_dict` returned.", TypeError)
        version: Any = values.get("format_version")  # first, since other versions have other fields
        _check_format_version(version, _format_version_of(values))
        known = {f.name for f in fields(cls)} - {name for name, since in _SINCE.items() if version < since}
        unknown = sorted(set(values) - known)
        if unknown:
            remedy = "Remove them. If a newer release of lesa-kernels wrote it, use that release."
            raise usage_error(f"`config` has unknown fields: {', '.join(unknown)}.", remedy)
        if "feature_dim" not in values:
            raise usage_error("`feature_dim` is required, but `config` does not have it.", "Add it to `config`.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def _format_version_of(values: Mapping[str, Any]) -> int:
    """The oldest format version that can hold a configuration with these fields."""
    if any(values.get(name) is not None for name, since in _SINCE.items() if since == 3):
        return 3
    return 1 if values.get("mixer") in _OF_VERSION_1 else 2


def _check_format_version(version: Any, latest: int) -> None:
    """Raises `ValueError` unless `version` is one of those up to the latest one that is expected."""
    if isinstance(version, bool) or version not in FORMAT_VERSIONS[:latest]:
        must = f"be {' or '.join(map(str, FORMAT_VERSIONS[:latest]))}"
        remedy = "Train the predictor again, or use the release of lesa-kernels that wrote it."
        raise argument_error("format_version", must, version, remedy)
