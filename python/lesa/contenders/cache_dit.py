"""cache-dit."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from diffusers import ModularPipeline

from lesa.contenders.base import BISECTED, Color, Grid, Peer, Pipeline
from lesa.contenders.switching import quiet, restored
from lesa_kernels.checks import Said, argument_error


@dataclass(frozen=True)
class CacheDiT(Peer):
    """A setting of cache-dit's DBCache with F1B0: the first block runs in every step, and no last ones do.

    Args:
        threshold: `residual_diff_threshold`.
        order: `taylorseer_order` of the TaylorSeer calibrator; 0 for no calibrator.
        warm_up: `max_warmup_steps`.
    """

    threshold: float
    order: int = 1
    warm_up: int = 3

    name = "cache-dit"
    title = "cache-dit"
    color = Color("#7a6100", "#dcbf45")
    counted_in = ("step_equivalents", "whole_steps")

    def __str__(self) -> str:
        return f"cache-dit-order{self.order}-warmup{self.warm_up}-threshold{self.threshold:.4g}"

    def describe(self) -> str:
        """The setting in words."""
        calibrator = f"TaylorSeer of order {self.order}" if self.order else "no calibrator"
        return f"DBCache F1B0, {calibrator}, {self.warm_up} steps of warm-up, threshold {self.threshold:.4g}"

    @contextmanager
    def on(self, pipe: Pipeline, num_inference_steps: int) -> Iterator[None]:
        """The context in which it is on."""
        self.check_available()
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
        with restored(pipe), quiet("cache_dit"):
            cache_dit.enable_cache(pipe, cache_config=config, **more)
            try:
                yield
            finally:
                cache_dit.disable_cache(pipe)

    @classmethod
    def grid(cls, num_inference_steps: int, budgets: Sequence[int], calibration: tuple[float, ...] = ()) -> Grid:
        """Calibrator, steps of warm-up, and the threshold."""
        axes = [cls(0.08, order, warm_up) for order in (0, 1, 2) for warm_up in (1, 2, 4)]
        text = "F1B0; no calibrator, or TaylorSeer of order 1 or 2; warm-up of 1, 2 or 4 steps"
        return Grid(f"{text}; {BISECTED}", axes=axes)

    @classmethod
    def why_not_on(cls, pipe: Pipeline) -> str | None:
        """Why no setting can be switched on for this pipeline, or None."""
        return "cache-dit does not support modular pipelines" if isinstance(pipe, ModularPipeline) else None

    @classmethod
    def check_available(cls) -> None:
        """Raises `ImportError`, with the remedy, if cache-dit is not installed."""
        if importlib.util.find_spec("cache_dit") is None:
            remedy = "Install it with `pip install cache-dit`, or leave 'cache-dit' out of `against`."
            got = Said("cache-dit, which is not")
            raise argument_error("against", "name what is installed", got, remedy, ImportError)
