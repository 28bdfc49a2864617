"""What a contender is: its name, its titles and its colour, what is searched of it, and how it is switched on.

A class is a kind of contender. An instance of it is one setting, which `evaluate` can run. `lesa.contenders.CONTENDERS`
lists the kinds. Everything that is missing in a class is an error when the class is made, which is at import.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch

from lesa.artifacts import digest
from lesa.cache import CacheHandle, enable_cache
from lesa.cache.error_control import ErrorControl
from lesa.schedule import Schedule, Spread
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import argument_error

THRESHOLDS = (0.01, 4.0)
"""The lowest and the highest threshold that the search tries."""

BISECTED = f"the threshold by bisection between {THRESHOLDS[0]:g} and {THRESHOLDS[1]:g} for each budget"
"""How the search finds a threshold, for the text of a `Grid`."""

Pipeline: TypeAlias = Any
"""A diffusers pipeline. Its parts, such as `transformer`, are attributes that its class does not declare."""

Count = Literal["step_equivalents", "whole_steps"]
"""What a budget counts. Both are fields of `lesa.evaluation.EvaluatedRun`."""


class Color(NamedTuple):
    """A colour of the report and of the picture, as "#rrggbb".

    Args:
        light: on a light page and in the picture.
        dark: on a dark page.
    """

    light: str
    dark: str


UNKNOWN_COLOR = Color("#4b6a78", "#8fb6c7")
"""Of a contender that is not registered."""


@dataclass(frozen=True)
class Grid:
    """What the search tries.

    Args:
        text: the grid in words.
        settings: settings that are tried as they are.
        axes: settings whose `threshold` is searched, for each budget separately.
    """

    text: str
    settings: Sequence["Peer"] = ()
    axes: Sequence["Peer"] = ()


class Contender(ABC):
    """A kind of contender; an instance is one setting of it. Use `Peer` for a cache of others.

    Attributes:
        name: lower case, with hyphens, such as "mag-cache". It is the `contender` of its runs in `summary.json`.
        title: for people, such as "MagCache".
        label: a shorter title, where there is little room. Default: the title.
        color: in the report and in the picture.
        each_call: whether it is switched on for each call of the pipeline separately, so that nothing that it stores
            gets from one call into the next.
        is_trained: whether it was trained for the model with which it is evaluated. The report compares such contenders
            with each other, and the others with each other.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    label: ClassVar[str]
    color: ClassVar[Color]
    each_call: ClassVar[bool] = True
    is_trained: ClassVar[bool] = False

    _texts: ClassVar[tuple[str, ...]] = ("name", "title", "label")
    _methods: ClassVar[tuple[str, ...]] = ("__str__", "describe", "on")

    def __init_subclass__(cls, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not abstract:
            cls.label = getattr(cls, "label", getattr(cls, "title", ""))
            cls._check()

    @property
    def contender(self) -> str:
        """The name of its kind."""
        return self.name

    @abstractmethod
    def __str__(self) -> str:
        """The name of its run, such as "mag-cache-threshold0.1". "{whole}" in it means the number of whole steps."""

    @abstractmethod
    def describe(self) -> str:
        """The setting in words."""

    @abstractmethod
    def on(self, pipe: Pipeline, num_inference_steps: int) -> AbstractContextManager[Any]:
        """The context in which it is on. After it, the pipeline is as it was before."""

    def steps_of(self, num_inference_steps: int) -> int:
        """How many steps of the scheduler its run has, where the reference has `num_inference_steps`."""
        return num_inference_steps

    def identity(self) -> str:
        """What distinguishes it from other settings, so that `evaluate` can resume its run."""
        return repr(self)

    @classmethod
    def heading(cls, run: str) -> str:
        """The title in the picture of the run that has this name."""
        name, *folder = run.partition("@")
        return name.replace("-", " ") + "".join(folder)

    @classmethod
    def note(cls, runs: Sequence[str]) -> str | None:
        """What the reader of a table must know about these runs of it, or None."""
        return None

    @classmethod
    def _check(cls) -> None:
        """Raises `TypeError` or `ValueError` if something is missing or has the wrong form."""
        for text in cls._texts:
            if not isinstance(getattr(cls, text, None), str) or not getattr(cls, text):
                raise cls._error(text, "be a text", getattr(cls, text, None))
        if not re.fullmatch("[a-z][a-z0-9]*(-[a-z][a-z0-9]*)*", cls.name):
            raise cls._error("name", "be lower-case words with hyphens between them", cls.name, ValueError)
        color = getattr(cls, "color", None)
        if not isinstance(color, Color) or not all(re.fullmatch("#[0-9a-f]{6}", part) for part in color):
            raise cls._error("color", 'be a Color of two texts such as "#0b6e4f"', color)
        for method in cls._methods:
            if getattr(getattr(cls, method), "__isabstractmethod__", False):
                raise cls._error(method, "be defined", None)

    @classmethod
    def _error(cls, what: str, must: str, got: Any, kind: type[Exception] = TypeError) -> Exception:
        return argument_error(f"{cls.__qualname__}.{what}", must, got, "See docs/adding-a-contender.md.", kind)


class Ours(Contender, abstract=True):
    """A predictor of lesa with its schedule. The name of the contender is the predictor's `config.mixer`.

    Args:
        predictor: on the pipeline's device.
        schedule: the computed steps, or how they are chosen. None: as the predictor was trained.

    Attributes:
        counted_in: what the budgets count, where `evaluate` searches the best settings: it does if nothing is trained.
    """

    each_call = False
    counted_in: ClassVar[tuple[Count, ...]] = ("step_equivalents",)
    _methods = ("detail", "variants")

    def __init__(self, predictor: FusedKANPredictor, schedule: Schedule | Spread | ErrorControl | None = None):
        self.predictor, self.schedule = predictor, schedule

    @classmethod
    @abstractmethod
    def detail(cls, config: PredictorConfig) -> str:
        """What a reader must know about a predictor, such as "newton, rank 32"."""

    @classmethod
    @abstractmethod
    def variants(cls, feature_dim: int) -> list[FusedKANPredictor]:
        """The predictors whose settings the search tries, for features of this width; not trained."""

    def __str__(self) -> str:
        return f"{self.name}-{{whole}}"

    def describe(self) -> str:
        """The predictor and its schedule in words."""
        text = self.detail(self.predictor.config)
        if isinstance(self.schedule, ErrorControl):
            return f"{text}, error control at {self.schedule.tolerance:g}"
        if isinstance(self.schedule, Spread):
            return f"{text}, steps by noise level"
        return text if self.schedule is None else f"{text}, steps {self.schedule}"

    def on(self, pipe: Pipeline, num_inference_steps: int) -> CacheHandle:
        """The context in which the predictor replaces the steps that are not computed."""
        return enable_cache(pipe, self.predictor, self.schedule)

    def identity(self) -> str:
        """A digest of weights, configuration and schedule; without parameters, also of what the formula gives."""
        state = {name: value.detach().cpu() for name, value in self.predictor.state_dict().items()}
        has_formula = self.predictor.forecaster.plans and not state and not self.is_trained
        formula = [_example_of(self.predictor)] if has_formula else []
        return digest([state, _text_of(self.predictor.config), repr(self.schedule), *formula])


def _text_of(config: PredictorConfig) -> str:
    """The fields of a configuration. Newer ones that are None are left out, as in the digests of earlier releases."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    newer = {name for name in ("told_levels", "more_step_counts") if values[name] is None}
    return f"PredictorConfig({', '.join(f'{name}={value!r}' for name, value in values.items() if name not in newer)})"


def _example_of(predictor: FusedKANPredictor) -> list[list[float]]:
    """The weights for a run of 50 steps, to six digits. They change with the code of the forecaster."""
    total = 50
    times = [1 - step / total for step in range(total + 1)]
    computed = sorted(Spread(9).computed_in(times[:-1]))
    steps = [step for step in range(total) if step not in computed]
    levels = [[times[before] for before in reversed(computed) if before < step] for step in steps]
    made = predictor.plan(levels, [times[step] for step in steps], 1, times, "cpu", dtype=torch.float64)
    parts = [part for weights in made for part in weights if part is not None]
    return [[round(number, 6) + 0.0 for number in part.double().flatten().tolist()] for part in parts]


class Plain(Contender, abstract=True):
    """Runs that need neither predictor nor cache, and no search: one run for each budget."""

    @classmethod
    @abstractmethod
    def at(cls, budget: int) -> "Plain":
        """The setting that costs `budget` step equivalents."""

    _methods = (*Contender._methods, "at")


class Peer(Contender, abstract=True):
    """A cache of others, whose best settings `evaluate` searches. Make it a frozen dataclass.

    Attributes:
        counted_in: what its budgets count: ("step_equivalents",); or ("step_equivalents", "whole_steps") for a cache
            that runs a part of the model in every step, which gets both kinds of budget.
        calibration: the name in `summary.json` of what `calibrate` measures, or None if nothing is to be measured.
    """

    counted_in: ClassVar[tuple[Count, ...]]
    calibration: ClassVar[str | None] = None

    _methods = (*Contender._methods, "grid")

    @classmethod
    @abstractmethod
    def grid(cls, num_inference_steps: int, budgets: Sequence[int], calibration: tuple[float, ...]) -> Grid:
        """What the search tries.

        Args:
            num_inference_steps: steps of a run.
            budgets: how much a run may cost, in step equivalents or whole steps.
            calibration: what `calibrate` returned; empty if the contender has none.
        """

    @classmethod
    def check_available(cls) -> None:
        """Raises `ImportError`, with the remedy, if something that it needs is not installed."""

    @classmethod
    def why_not_on(cls, pipe: Pipeline) -> str | None:
        """Why no setting can be switched on for this pipeline, or None. Asked before anything runs."""
        return None

    @classmethod
    def calibrate(cls, pipe: Pipeline, run: Callable[[], None], num_inference_steps: int) -> tuple[float, ...]:
        """Measures what its settings need to know of the model. Called only if `calibration` has a name.

        Args:
            pipe: the pipeline.
            run: called without arguments, it runs the pipeline once on some inputs.
            num_inference_steps: steps of that run.
        """
        return ()

    def with_threshold(self, threshold: float) -> "Peer":
        """The same setting with another threshold, for the axes of its grid."""
        return replace(self, threshold=threshold)  # type: ignore[type-var]

    @classmethod
    def heading(cls, run: str) -> str:
        """The title in the picture of the run that has this name."""
        return cls.title

    @classmethod
    def _check(cls) -> None:
        super()._check()
        counts = getattr(cls, "counted_in", ())
        if not isinstance(counts, tuple) or not counts or not set(counts) <= set(get_args(Count)):
            raise cls._error("counted_in", f"be a tuple of {' and '.join(map(repr, get_args(Count)))}", counts)
        if (cls.calibration is not None) != (cls.calibrate.__func__ is not Peer.calibrate.__func__):  # type: ignore
            raise cls._error("calibrate", "be defined exactly if `calibration` has a name", cls.calibration)
