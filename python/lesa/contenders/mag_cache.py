"""MagCache of diffusers."""

import ast
import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusers.hooks import MagCacheConfig

from lesa.contenders.base import BISECTED, Color, Grid, Peer, Pipeline
from lesa.contenders.switching import diffusers_cache, why_no_diffusers_cache
from lesa.models import transformers_of


@dataclass(frozen=True)
class MagCache(Peer):
    """A setting of diffusers' `MagCacheConfig`.

    Args:
        threshold: `threshold`, on the accumulated error.
        max_skip_steps: `max_skip_steps`, the most steps to skip in a row.
        warm_up: steps before any is skipped; `retention_ratio` is this over the steps of a run.
        mag_ratios: `mag_ratios` as `calibrate` measures them, one per step.
    """

    threshold: float
    max_skip_steps: int
    warm_up: int
    mag_ratios: tuple[float, ...]

    name = "mag-cache"
    title = "MagCache"
    color = Color("#b02a5c", "#f28bb0")
    counted_in = ("step_equivalents",)
    calibration = "mag_ratios"

    def __str__(self) -> str:
        return f"mag-cache-threshold{self.threshold:.4g}-skip{self.max_skip_steps}-warmup{self.warm_up}"

    def describe(self) -> str:
        """The setting in words."""
        skipped = f"at most {self.max_skip_steps} skipped in a row"
        return f"threshold {self.threshold:.4g}, {skipped}, {self.warm_up} steps of warm-up, ratios calibrated"

    def on(self, pipe: Pipeline, num_inference_steps: int) -> contextlib.AbstractContextManager[None]:
        """The context in which it is on."""
        config = MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip_steps,
            retention_ratio=self.warm_up / num_inference_steps,
            num_inference_steps=num_inference_steps,
            mag_ratios=list(self.mag_ratios),
        )
        return diffusers_cache(pipe, config)

    @classmethod
    def why_not_on(cls, pipe: Pipeline) -> str | None:
        """Why no setting can be switched on for this pipeline, or None."""
        if len(transformers_of(pipe)) > 1:
            return "MagCache counts the steps of each of two transformers from the start"
        return why_no_diffusers_cache(pipe)

    @classmethod
    def grid(cls, num_inference_steps: int, budgets: Sequence[int], calibration: tuple[float, ...] = ()) -> Grid:
        """Steps to skip, steps of warm-up, and the threshold."""
        axes = [cls(0.06, skip, warm_up, tuple(calibration)) for skip in (4, 6, 8, 12) for warm_up in (1, 2, 4)]
        return Grid(f"max_skip_steps of 4, 6, 8 or 12; 1, 2 or 4 steps of warm-up; {BISECTED}", axes=axes)

    @classmethod
    def calibrate(cls, pipe: Pipeline, run: Callable[[], None], num_inference_steps: int) -> tuple[float, ...]:
        """Measures the ratios with MagCache's own calibration, which prints them.

        Args:
            pipe: the pipeline.
            run: called without arguments, it runs the pipeline once on some inputs.
            num_inference_steps: steps of that run.

        Returns:
            One ratio per step: the mean over the streams of calls, such as the two of classifier-free guidance.
        """
        config = MagCacheConfig(calibrate=True, num_inference_steps=num_inference_steps)
        with contextlib.redirect_stdout(io.StringIO()) as printed, diffusers_cache(pipe, config):
            run()
        lines = printed.getvalue().splitlines()
        lists = [ast.literal_eval(line) for line in lines if line.startswith("[") and "," in line]
        if not lists:
            raise RuntimeError("MagCache's calibration printed no ratios.")
        return tuple(sum(ratios) / len(ratios) for ratios in zip(*lists))
