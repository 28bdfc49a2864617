"""TaylorSeer of diffusers."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import TaylorSeerCacheConfig

from lesa.contenders.base import Color, Grid, Peer, Pipeline
from lesa.contenders.switching import diffusers_cache, why_no_diffusers_cache

ATTENTIONS = (r"^((single_|temporal_)?transformer_)?blocks.*attn\d*",)
"""Which modules the full mode predicts: those of diffusers' default, and the numbered ones, such as Wan's `attn1`."""


@dataclass(frozen=True)
class TaylorSeer(Peer):
    """A setting of diffusers' `TaylorSeerCacheConfig`.

    Args:
        interval: `cache_interval`.
        order: `max_order`.
        lite: `use_lite_mode`: predict the model's output only, instead of every attention's.
        warm_up: `disable_cache_before_step`.
    """

    interval: int
    order: int = 1
    lite: bool = False
    warm_up: int = 3

    name = "taylorseer"
    title = "TaylorSeer"
    color = Color("#b3541e", "#f09a60")
    counted_in = ("step_equivalents",)

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
            cache_identifiers=None if self.lite else list(ATTENTIONS),
        )

    def on(self, pipe: Pipeline, num_inference_steps: int) -> AbstractContextManager[None]:
        """The context in which it is on."""
        return diffusers_cache(pipe, self.config(pipe.transformer.dtype))

    @classmethod
    def why_not_on(cls, pipe: Pipeline) -> str | None:
        """Why no setting can be switched on for this pipeline, or None."""
        return why_no_diffusers_cache(pipe)

    @classmethod
    def grid(cls, num_inference_steps: int, budgets: Sequence[int], calibration: tuple[float, ...] = ()) -> Grid:
        """Those of `taylorseer_grid`."""
        text = (
            "order 1, 2 or 3; full or lite mode; warm-up of 1, 2, 3 or 5 steps; the smallest and the largest interval "
            "for each budget"
        )
        return Grid(text, settings=taylorseer_grid(num_inference_steps, budgets))

    @classmethod
    def heading(cls, run: str) -> str:
        """Title, mode and order."""
        return " ".join([cls.title, *run.partition("@")[0].split("-")[1:3]]).replace("order", "order ")

    @classmethod
    def note(cls, runs: Sequence[str]) -> str | None:
        """What its full mode does in the steps that are not whole."""
        if any(run.startswith("taylorseer-full") for run in runs):
            return (
                "TaylorSeer's full mode predicts attentions only. Its counts are of attentions; everything else in a "
                "block runs in every step."
            )
        return None


def taylorseer_grid(num_inference_steps: int, budgets: Iterable[int]) -> list[TaylorSeer]:
    """The TaylorSeer settings to try for given numbers of computed steps.

    Args:
        num_inference_steps: steps of a run.
        budgets: numbers of computed steps.

    Returns:
        Orders 1 to 3, full and lite, with 1, 2, 3 and 5 steps of warm-up, each at the smallest and the largest interval
        that gives the largest number of computed steps within the budget. A warm-up that leaves no interval for a
        budget is left out.
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
