"""First Block Cache of diffusers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from diffusers import FirstBlockCacheConfig

from lesa.contenders.base import BISECTED, Color, Grid, Peer, Pipeline
from lesa.contenders.switching import diffusers_cache, why_no_diffusers_cache


@dataclass(frozen=True)
class FirstBlockCache(Peer):
    """A setting of diffusers' `FirstBlockCacheConfig`, which runs the first block in every step.

    Args:
        threshold: `threshold`, on the relative change of the first block's residual.
    """

    threshold: float

    name = "first-block-cache"
    title = "First Block Cache"
    color = Color("#8145a0", "#cba0e6")
    counted_in = ("step_equivalents", "whole_steps")

    def __str__(self) -> str:
        return f"first-block-cache-threshold{self.threshold:.4g}"

    def describe(self) -> str:
        """The setting in words."""
        return f"threshold {self.threshold:.4g}"

    def on(self, pipe: Pipeline, num_inference_steps: int) -> AbstractContextManager[None]:
        """The context in which it is on."""
        return diffusers_cache(pipe, FirstBlockCacheConfig(threshold=self.threshold))

    @classmethod
    def why_not_on(cls, pipe: Pipeline) -> str | None:
        """Why no setting can be switched on for this pipeline, or None."""
        return why_no_diffusers_cache(pipe)

    @classmethod
    def grid(cls, num_inference_steps: int, budgets: Sequence[int], calibration: tuple[float, ...] = ()) -> Grid:
        """The threshold."""
        return Grid(BISECTED, axes=[cls(0.05)])
