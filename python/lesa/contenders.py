"""The caches of others that `evaluate` compares with: their settings, how each is turned on, and the grids to search.

A setting has a `contender`, the name of its kind; `str(setting)`, the name of its run; `describe()` for people; and
`on(pipe, num_inference_steps)`, a context in which it is on, and after which the pipeline is as it was.
"""

import ast
import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import MagCacheConfig

from lesa_kernels.checks import Said, argument_error

PEERS = ("taylorseer", "first-block-cache", "mag-cache", "cache-dit")
THRESHOLDS = (0.01, 4.0)
"""Between which thresholds are searched."""


@dataclass(frozen=True)
class TaylorSeer:
    """A setting of diffusers' `TaylorSeerCacheConfig`.

    Args:
        interval: `cache_interval`.
        order: `max_order`.
        lite: `use_lite_mode`: forecast the model's output only, instead of every attention's.
        warm_up: `disable_cache_before_step`.
    """

    interval: int
    order: int = 1
    lite: bool = False
    warm_up: int = 3

    contender = "taylorseer"

    def __str__(self) -> str:
        warm_up = "" if self.warm_up == 3 else f"-warmup{self.warm_up}"
        return f"taylorseer-{'lite' if self.lite else 'full'}-order{self.order}-interval{self.interval}{warm_up}"

    def describe(self) -> str:
        """The setting in words."""
        mode = "lite" if self.lite else "full"
        return f"{mode} mode, order {self.order}, interval {self.interval}, {self.warm_up} steps of warm-up"

    def computed_in(self, num_inference_steps: int) -> int:
        """Number of steps that it computes: with the usual warm-up 0, 1, 2, 4 and then every `interval`-th."""
        start = self.warm_up
        return sum(i < start or (i - start - 1) % self.interval == 0 for i in range(num_inference_steps))

    def config(self, dtype: torch.dtype) -> TaylorSeerCacheConfig:
        """The configuration for a model of that dtype: the factors are kept in the model's own precision."""
        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warm_up,
            max_order=self.order,
            use_lite_mode=self.lite,
            taylor_factors_dtype=dtype,
        )

    def on(self, pipe, num_inference_steps: int):
        """The context in which it is on."""
        return _diffusers_cache(pipe, self.config(pipe.transformer.dtype))


def taylorseer_grid(num_inference_steps: int, budgets: Iterable[int]) -> list[TaylorSeer]:
    """The TaylorSeer settings to try for given numbers of computed steps.

    Args:
        num_inference_steps: steps of a run.
        budgets: numbers of computed steps.

    Returns:
        Orders 1 to 3, full and lite, with 1, 2, 3 and 5 steps of warm-up, each at the smallest and the largest interval
        that gives the largest number of computed steps that is not above the budget. A warm-up that leaves no interval
        for a budget is left out.
    """
    intervals = range(1, num_inference_steps + 1)
    chosen = set()
    for warm_up in (1, 2, 3, 5):
        counts = {n: TaylorSeer(n, warm_up=warm_up).computed_in(num_inference_steps) for n in intervals}
        for budget in budgets:
            count = max((c for c in counts.values() if c <= budget), default=None)
            giving = [n for n in intervals if counts[n] == count]
            chosen |= {(warm_up, n) for n in (giving[:1] + giving[-1:])}
    return [
        TaylorSeer(interval, order, lite, warm_up)
        for warm_up, interval in sorted(chosen)
        for order in (1, 2, 3)
        for lite in (False, True)
    ]


@dataclass(frozen=True)
class FirstBlockCache:
    """A setting of diffusers' `FirstBlockCacheConfig`, which runs the first block in every step.

    Args:
        threshold: `threshold`, on the relative change of the first block's residual.
    """

    threshold: float

    contender = "first-block-cache"

    def __str__(self) -> str:
        return f"first-block-cache-threshold{self.threshold:.4g}"

    def describe(self) -> str:
        """The setting in words."""
        return f"threshold {self.threshold:.4g}"

    def on(self, pipe, num_inference_steps: int):
        """The context in which it is on."""
        return _diffusers_cache(pipe, FirstBlockCacheConfig(threshold=self.threshold))


@dataclass(frozen=True)
class MagCache:
    """A setting of diffusers' `MagCacheConfig`.

    Args:
        threshold: `threshold`, on the accumulated error.
        max_skip_steps: `max_skip_steps`, the most steps to skip in a row.
        warm_up: steps before any is skipped; `retention_ratio` is this over the steps of a run.
        mag_ratios: `mag_ratios` as `calibrate_mag_cache` measures them, one per step.
    """

    threshold: float
    max_skip_steps: int
    warm_up: int
    mag_ratios: tuple[float, ...]

    contender = "mag-cache"

    def __str__(self) -> str:
        return f"mag-cache-threshold{self.threshold:.4g}-skip{self.max_skip_steps}-warmup{self.warm_up}"

    def describe(self) -> str:
        """The setting in words."""
        skipped = f"at most {self.max_skip_steps} skipped in a row"
        return f"threshold {self.threshold:.4g}, {skipped}, {self.warm_up} steps of warm-up, ratios calibrated"

    def on(self, pipe, num_inference_steps: int):
        """The context in which it is on."""
        config = MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip_steps,
            retention_ratio=self.warm_up / num_inference_steps,
            num_inference_steps=num_inference_steps,
            mag_ratios=list(self.mag_ratios),
        )
        return _diffusers_cache(pipe, config)


def calibrate_mag_cache(pipe, run, num_inference_steps: int) -> tuple[float, ...]:
    """Measures MagCache's ratios with its own calibration, which prints them.

    Args:
        pipe: the pipeline.
        run: called without arguments, it runs the pipeline once on some inputs.
        num_inference_steps: steps of that run.

    Returns:
        One ratio per step: the mean over the streams of calls, such as the two of classifier-free guidance.
    """
    config = MagCacheConfig(calibrate=True, num_inference_steps=num_inference_steps)
    with contextlib.redirect_stdout(io.StringIO()) as printed, _diffusers_cache(pipe, config):
        run()
    lists = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[") and "," in line]
    if not lists:
        raise RuntimeError("MagCache's calibration printed no ratios.")
    return tuple(sum(ratios) / len(ratios) for ratios in zip(*lists))


@dataclass(frozen=True)
class CacheDiT:
    """A setting of cache-dit's DBCache with F1B0: the first block runs in every step, and no last ones do.

    Args:
        threshold: `residual_diff_threshold`.
        order: `taylorseer_order` of the TaylorSeer calibrator; 0 for no calibrator.
        warm_up: `max_warmup_steps`.
    """

    threshold: float
    order: int = 1
    warm_up: int = 3

    contender = "cache-dit"

    def __str__(self) -> str:
        return f"cache-dit-order{self.order}-warmup{self.warm_up}-threshold{self.threshold:.4g}"

    def describe(self) -> str:
        """The setting in words."""
        calibrator = f"TaylorSeer of order {self.order}" if self.order else "no calibrator"
        return f"DBCache F1B0, {calibrator}, {self.warm_up} steps of warm-up, threshold {self.threshold:.4g}"

    @contextmanager
    def on(self, pipe, num_inference_steps: int):
        """The context in which it is on."""
        check_cache_dit()
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warm_up,
        )
        more = {}
        if self.order:
            more["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order)
        with _restored(pipe), _quiet("cache_dit"):
            cache_dit.enable_cache(pipe, cache_config=config, **more)
            try:
                yield
            finally:
                cache_dit.disable_cache(pipe)


def check_cache_dit() -> None:
    """Raises `ImportError`, with the remedy, if cache-dit is not installed."""
    if importlib.util.find_spec("cache_dit") is None:
        remedy = "Install it with `pip install cache-dit`, or leave 'cache-dit' out of `against`."
        raise argument_error("against", "name what is installed", Said("cache-dit, which is not"), remedy, ImportError)


Setting = TaylorSeer | FirstBlockCache | MagCache | CacheDiT


@dataclass(frozen=True)
class Grid:
    """What is searched of a contender.

    Args:
        text: the grid in words.
        settings: those that are tried as they are.
        axes: settings whose thresholds are searched, for each budget by itself.
    """

    text: str
    settings: Sequence[Setting] = ()
    axes: Sequence[Setting] = ()


def grid_of(contender: str, num_inference_steps: int, budgets: Iterable[int], mag_ratios=()) -> Grid:
    """The grid that is searched for the best settings of a contender.

    Args:
        contender: one of `PEERS`.
        num_inference_steps: steps of a run.
        budgets: numbers of step equivalents.
        mag_ratios: for MagCache.
    """
    searched = f"the threshold by bisection between {THRESHOLDS[0]:g} and {THRESHOLDS[1]:g} for each budget"
    if contender == "taylorseer":
        text = (
            "order 1, 2 or 3; full or lite mode; warm-up of 1, 2, 3 or 5 steps; the smallest and the largest interval "
            "for each budget"
        )
        return Grid(text, settings=taylorseer_grid(num_inference_steps, budgets))
    if contender == "first-block-cache":
        return Grid(searched, axes=[FirstBlockCache(0.05)])
    if contender == "mag-cache":
        axes = [MagCache(0.06, skip, warm_up, tuple(mag_ratios)) for skip in (4, 6, 8, 12) for warm_up in (1, 2, 4)]
        return Grid(f"max_skip_steps of 4, 6, 8 or 12; 1, 2 or 4 steps of warm-up; {searched}", axes=axes)
    axes = [CacheDiT(0.08, order, warm_up) for order in (0, 1, 2) for warm_up in (1, 2, 4)]
    return Grid(
        f"F1B0; no calibrator, or TaylorSeer of order 1 or 2; warm-up of 1, 2 or 4 steps; {searched}", axes=axes
    )


def bisected(axis: Setting, count, budget: float, probes: int = 7) -> Iterator[Setting]:
    """Yields settings on both sides of the smallest threshold that keeps within a budget.

    Args:
        axis: the setting but for its threshold.
        count: gives what a setting costs. It is assumed to fall as the threshold rises.
        budget: what it may cost.
        probes: how many to try. If the highest threshold costs more than the budget, it is the only one.
    """
    low, high = THRESHOLDS
    last = replace(axis, threshold=high)
    yield last
    if count(last) > budget:
        return
    for _ in range(probes - 1):
        middle = float(f"{(low * high) ** 0.5:.4g}")
        setting = replace(axis, threshold=middle)
        yield setting
        low, high = (middle, high) if count(setting) > budget else (low, middle)


@contextmanager
def _diffusers_cache(pipe, config):
    with _restored(pipe):
        pipe.transformer.enable_cache(config)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


@contextmanager
def _quiet(prefix: str):
    """Silences the loggers whose names begin so, in any case; those that come up meanwhile, too late."""
    names = [name for name in logging.root.manager.loggerDict if name.lower().startswith(prefix)]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def _restored(pipe):
    """Puts the attributes of the pipeline, its class and all modules of its transformer back to what they were.

    cache-dit leaves the forwards that it has put into the transformer and its blocks, and the transformer's children in
    another order, by which diffusers' caches tell which block is the first. diffusers leaves its registries.
    """
    modules = [*pipe.transformer.modules()]
    kind = type(pipe)
    things = [*map(vars, (pipe, *modules)), *(module._modules for module in modules)]
    before, class_before = [dict(values) for values in things], dict(vars(kind))
    try:
        yield
    finally:
        for thing, values in zip(things, before):
            thing.clear()
            thing.update(values)
        for name in set(vars(kind)) - set(class_before):
            delattr(kind, name)
        for name, value in class_before.items():
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)
