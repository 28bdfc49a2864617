"""`enable_cache`: predicts most denoising steps of a diffusers pipeline."""

import contextlib
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lesa.cache.choosing import budget_for, note_of_budget
from lesa.cache.error_control import ErrorControl, check_controllable
from lesa.cache.forecasting import ForecastingHook
from lesa.cache.observing import ComputingHook
from lesa.cache.placement import hook_of
from lesa.cache.run import StepObserver
from lesa.cache.stats import CacheStats
from lesa.cache.told import check_can_be_told
from lesa.models import Adapter, adapters_for, adapters_or_probes, hooked_device
from lesa.schedule import Schedule, ScheduleLike, Spread, as_schedule, schedule_of
from lesa.spread import is_spread
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import Said, argument_error, check_folder_or_id, check_int, usage_error
from lesa_kernels.forecasters import UNTRAINED
from lesa_kernels.predictor.files import budgets_in

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModularPipeline


class CacheHandle:
    """A cache that is on. The end of its `with` block, or `disable()`, turns it off.

    Args:
        hook: the hook that is on the transformer.

    Attributes:
        stats: what happened in the latest run.
    """

    def __init__(self, hook: ForecastingHook):
        self._hook = hook
        self.stats: CacheStats = hook.stats

    def disable(self) -> None:
        """Restores the transformer. Does nothing if the cache is off already."""
        self._hook.uninstall()

    def __enter__(self) -> "CacheHandle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


PredictorLike = FusedKANPredictor | str | os.PathLike | None
"""A predictor, the name of a saved one, or None for the forecaster "universal"."""


def enable_cache(
    pipe: "DiffusionPipeline | ModularPipeline",
    predictor: PredictorLike | Mapping[str, PredictorLike] = None,
    schedule: ScheduleLike | Spread | ErrorControl | None = None,
    max_device_bytes: int | None = None,
    strict: bool = False,
    *,
    steps: int | None = None,
    quality: str | None = None,
) -> CacheHandle:
    """Lets `predictor` forecast those steps of `pipe` that are not computed. `enable_cache(pipe)` needs no training.

    At most one of `schedule`, `steps` and `quality` says which steps are computed. With none of them, they are the
    steps that the predictor was trained for. A predictor that has nothing to train has no such steps, so its default is
    `quality="balanced"`.

    Of a pipeline of Wan 2.2, both transformers have the cache. Steps are counted over the whole call. The first step of
    `transformer_2` is computed even if the schedule leaves it out. Names of its streams begin with "transformer_2-".

    Args:
        pipe: a diffusers pipeline, modular or not. A transformer without an adapter is watched in the first step, and
            predicted steps run its forward without the blocks; docs/limits.md says when this works.
        predictor: trained for the pipeline's transformer, on the transformer's device; or the folder or hub id of a
            saved one, which is loaded to that device. What exists as a folder is not asked of the hub. If it has
            predictors for several budgets, in folders such as `budget-9`, `steps`, `quality` or the number of steps in
            `schedule` chooses one of them, and `stats` has a note of it. None: the
            forecaster "universal", which fits every model without training. Of a pipeline with two transformers, it
            serves both. A dict by the names of the components, such as `{"transformer": a, "transformer_2": b}`, gives
            each its own.
        schedule: which steps are computed: a `lesa.Schedule`, a list of step indices counted over the steps that a call
            executes, an interval N for steps 0, 1, 2 and then every N, a `lesa.ErrorControl`, which chooses them during
            the run by the errors of the forecasts so far, or a `lesa.schedule.Spread`, which stands for `steps` or
            `quality`. Where the noise level rises in a run, the first step after each rise is computed in addition.
            None: as `steps` or `quality` says, else the steps that the predictor was trained for. Then a run of fewer
            than 10 steps is computed in full, unless the predictor was trained with that number of steps.
        max_device_bytes: the most bytes that the stored features of one stream of calls may take on the device. Beyond
            it, the oldest features are kept in host memory, which costs time. Guidance by two calls per step has two
            streams.
        strict: raise `RuntimeError` if a step that the schedule leaves out cannot be predicted. If false, such a step
            is computed, with a warning, and `stats` says why. It is not an error, but a warning, if a run of few steps
            is computed in full. It is neither if the first call of a stream that begins late, such as guidance in a
            part of the run, is computed.
        steps: how many of the steps that a call executes are computed, also in a run of few steps. A run that has no
            more is computed in full. `Schedule.spread` chooses them, by the noise levels of the run; the trained steps
            of the predictor are used if there are as many of them. Where the noise level rises in a run, the first step
            after each rise is one of them, and so is the first step of `transformer_2`; more are computed if need be.
        quality: "high", "balanced" or "fast": 16, 12 or 9 of 50 steps are computed. Of another number of steps it is
            the same part, rounded up, and at least six; up to 18 steps, all three are the same. `Schedule.spread`
            chooses them. Runs of fewer than 8 steps are computed in full. A predictor with a trained schedule has been
            trained for these steps alone, so every quality is its trained schedule, and `stats` has a note of it.

    Returns:
        A handle with `stats` and `disable()`, usable as a context manager.

    Raises:
        TypeError: `pipe` has no transformer that lesa can use, or `predictor` is no predictor, or no dict of them.
        FileNotFoundError: `predictor` is the name of a folder that does not exist.
        ValueError: there are predictors for several budgets, and none for `steps`. Or the predictor was made for
            another family or width, is on another device, has weights that are not finite, can be trained but has no
            schedule although nothing says which steps are computed, or cannot be used with an `ErrorControl`. A dict of
            predictors has other names than the pipeline's transformers, or its predictors were trained for different
            steps and nothing says which steps are computed. Two of `schedule`, `steps` and `quality` are given, or one
            is out of range. The first computed step raises it if `max_device_bytes` is too small for its features.
        RuntimeError: a cache is on already. A run also raises it if another cache was enabled in the meantime, or if a
            second thread enters the transformer.
    """
    chosen = one_of(schedule, steps, quality)
    names = [*adapters_or_probes(pipe)]  # refuses what no cache can be on for, before a predictor is loaded
    given = _by_transformer(names, predictor)
    notes: list[str] = []
    by_id = {id(value): value for value in given.values()}
    loaded = {key: _loaded(pipe, value, chosen, notes.append) for key, value in by_id.items()}
    if isinstance(chosen, Spread) and chosen.steps is None and len(notes) == len(loaded):
        chosen = None  # each predictor was chosen by the quality, and computes the steps that it was trained for
    predictors = {name: loaded[id(value)] for name, value in given.items()}
    owned = [predictors[name] for name, value in given.items() if predictors[name] is not value]
    return _enable(pipe, predictors, chosen, max_device_bytes, strict, None, owned, notes)


def _by_transformer(
    names: Sequence[str], predictor: PredictorLike | Mapping[str, PredictorLike]
) -> Mapping[str, PredictorLike]:
    """What the user gives as predictors, by the names of the pipeline's transformers."""
    given = predictor if isinstance(predictor, Mapping) else dict.fromkeys(names, predictor)
    if given and all(isinstance(key, numbers.Integral) for key in given):
        got = Said(f"a dict of predictors for {', '.join(map(str, given))} computed steps")
        remedy = f"Choose one by its number of computed steps, as in `predictors[{next(iter(given))}]`."
        raise argument_error("predictor", "be one predictor, or one for each transformer", got, remedy)
    if {*given} != {*names}:
        must = f"have the names of the pipeline's transformers, {', '.join(map(repr, names))}"
        remedy = "Give one predictor for each, or one for all."
        raise argument_error("predictor", must, Said(f"{', '.join(map(repr, given))}"), remedy)
    return given


def one_of(
    schedule: ScheduleLike | Spread | ErrorControl | None, steps: int | None, quality: str | None
) -> ScheduleLike | ErrorControl | Spread | None:
    """What says which steps are computed: one of the arguments of `enable_cache`, which are refused together."""
    given = {"schedule": schedule, "steps": steps, "quality": quality}
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise usage_error(f"{' and '.join(names)} cannot be given together.", "Pass only one of them.")
    if steps is not None:
        return Spread(steps=steps)
    return schedule if quality is None else Spread(quality=quality)


def _loaded(pipe: Any, predictor: PredictorLike, which: Any, note: Callable[[str], None]) -> FusedKANPredictor:
    """The predictor; one that is loaded is on the device of the transformer. Notes which of several it is."""
    if predictor is None:
        return FusedKANPredictor(PredictorConfig(mixer=UNTRAINED))
    if not isinstance(predictor, (str, os.PathLike)):
        return predictor
    check_folder_or_id("predictor", predictor)
    budgets, budget = budgets_in(predictor), None
    if budgets:
        budget = budget_for(budgets, which, predictor)
        note(note_of_budget(budget, budgets))
    return FusedKANPredictor.from_pretrained(predictor, budget=budget).to(pipe._execution_device)


def disable_cache(pipe: "DiffusionPipeline | ModularPipeline") -> None:
    """Turns the cache of `pipe` off and restores its transformer. Does nothing if it is off already."""
    hook = hook_of(pipe)
    if hook is None:
        adapters_or_probes(pipe)  # refuses what no cache can be on for
    else:
        hook.uninstall()


@contextlib.contextmanager
def observed(
    pipe: "DiffusionPipeline | ModularPipeline",
    observer: StepObserver,
    predictor: FusedKANPredictor | None = None,
    schedule: ScheduleLike | ErrorControl | None = None,
) -> Iterator[CacheStats | None]:
    """Shows an observer every call that the transformer computes, as long as the context is entered.

    Args:
        pipe: a diffusers pipeline of a supported family.
        observer: is told of each run and each computed call.
        predictor: forecasts the steps that the schedule leaves out, as with `enable_cache(..., strict=True)`. None: all
            steps are computed.
        schedule: as in `enable_cache`; used only with a predictor.

    Yields:
        The stats of the predictor's cache; None without a predictor.

    Raises:
        TypeError, ValueError, RuntimeError: what `enable_cache` raises.
    """
    if predictor is None:
        hook = ComputingHook(pipe, adapters_for(pipe), observer)
        hook.install()
        try:
            yield None
        finally:
            hook.uninstall()
    else:
        predictors = dict.fromkeys(adapters_for(pipe), predictor)
        with _enable(pipe, predictors, schedule, None, True, observer) as handle:
            yield handle.stats


def _enable(
    pipe: "DiffusionPipeline | ModularPipeline",
    predictors: Mapping[str, FusedKANPredictor],
    schedule: ScheduleLike | ErrorControl | Spread | None,
    max_device_bytes: int | None,
    strict: bool,
    observer: StepObserver | None,
    owned: Sequence[FusedKANPredictor] = (),
    notes: Sequence[str] = (),
) -> CacheHandle:
    adapters = adapters_or_probes(pipe)
    for name, adapter in adapters.items():
        _check_in_one_process(adapter)
        _check_predictor(adapter, predictors[name])
        if not any(predictors[name] is each for each in owned):
            _check_device(pipe, adapter, predictors[name])
        _check_finite(predictors[name])
        if predictors[name].config.told_levels is not None:
            check_can_be_told(pipe, adapter)
    schedules = [_checked_schedule(adapters[name], predictors[name], schedule) for name in adapters]
    chosen = schedules[0]
    if any(other != chosen for other in schedules):
        raise usage_error(
            "`schedule` is required: the predictors were trained for different computed steps.",
            "Pass an interval such as 7, a list of the steps to compute, or their number as `steps`.",
        )
    if isinstance(chosen, ErrorControl) and len({id(each) for each in predictors.values()}) > 1:
        raise usage_error(
            "`ErrorControl` needs one predictor for all transformers of the pipeline.",
            "Pass one predictor, or a list of steps.",
        )
    if max_device_bytes is not None:
        check_int("max_device_bytes", max_device_bytes)
    as_trained = schedule is None or isinstance(schedule, Spread)
    options = (chosen, as_trained, max_device_bytes, strict, observer, owned, notes)
    hook = ForecastingHook(pipe, adapters, {name: each.eval() for name, each in predictors.items()}, *options)
    if observer is None:  # a recording compares the pipeline with what it holds
        hook.compare()
    hook.install()
    return CacheHandle(hook)


def _check_in_one_process(adapter: Adapter) -> None:
    """Raises `TypeError` if processes share a transformer without an adapter. They would not watch the same in it."""
    if adapter.runs_around and is_spread(adapter.transformer):
        must = "have a transformer with an adapter, because several processes share it"
        got, remedy = Said(f"a {type(adapter.transformer).__name__}"), "Let each process have the whole transformer."
        raise argument_error("pipe", must, got, remedy, TypeError)


def _check_predictor(adapter: Adapter, predictor: FusedKANPredictor) -> None:
    """Checks that the predictor can forecast the features of the pipeline's transformer."""
    if not isinstance(predictor, FusedKANPredictor):
        raise argument_error(
            "predictor",
            "be a FusedKANPredictor, or the folder or hub id of one",
            predictor,
            "Train one with `lesa.train`, or leave it out.",
            TypeError,
        )
    config = predictor.config
    if adapter.runs_around and predictor.forecaster.is_trained:
        name = type(adapter.transformer).__name__
        raise argument_error(
            "predictor",
            f"have nothing to train, because lesa has no adapter for {name}",
            Said(f"the forecaster {config.mixer!r}, which is trained"),
            f"Leave it out, or use a forecaster without training, such as {UNTRAINED!r}.",
        )
    if config.family not in (None, adapter.family):
        raise argument_error(
            "predictor.config.family",
            f"be {adapter.family!r}",
            config.family,
            "Use a predictor of this model's family.",
        )
    if adapter.feature_dim is not None and config.feature_dim not in (None, adapter.feature_dim):
        raise argument_error(
            "predictor.config.feature_dim",
            f"be the transformer's width, {adapter.feature_dim}",
            config.feature_dim,
            "Use a predictor that was trained for this model.",
        )


def _check_finite(predictor: FusedKANPredictor) -> None:
    """Raises `ValueError` if a weight is NaN or Inf."""
    with torch.no_grad():  # the weights may belong to an inference mode
        bad = [name for name, weight in predictor.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise argument_error(
            "predictor", "have finite weights", Said(f"NaN or Inf in {', '.join(bad)}"), "Load or train it again."
        )


def _check_device(pipe: Any, adapter: Adapter, predictor: FusedKANPredictor) -> None:
    """Raises `ValueError` if the predictor is known to be on another device than the features."""
    device, hooked = predictor.device, hooked_device(adapter)
    where = hooked or next(adapter.projection.parameters()).device
    if device not in (None, where) and (hooked or where == pipe._execution_device):  # else it is offloaded
        raise argument_error(
            "predictor",
            f"be on the transformer's device, {where}",
            Said(f"one on {device}"),
            f"Move it with `predictor.to('{where}')`.",
        )


def _checked_schedule(
    adapter: Adapter, predictor: FusedKANPredictor, schedule: ScheduleLike | ErrorControl | Spread | None
) -> Schedule | int | Spread | ErrorControl:
    """The schedule to follow: the given one, or the predictor's own or the default one if none is given."""
    if schedule is None:
        trained = schedule_of(predictor.config)
        if trained is None and predictor.forecaster.is_trained:
            raise usage_error(
                "`schedule` is required: this predictor was trained without one.",
                "Pass an interval such as 7, a list of the steps to compute, or their number as `steps`.",
            )
        return Spread() if trained is None else trained
    if isinstance(schedule, Spread):
        return schedule
    if isinstance(schedule, ErrorControl):
        check_controllable(adapter, predictor.config)
        return schedule
    if isinstance(schedule, numbers.Integral):
        interval: Any = schedule
        as_schedule(interval, 1)  # a wrong interval is an error here, not at the first step
        return interval
    return as_schedule(schedule)
