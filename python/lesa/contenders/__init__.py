"""The caches of others that `evaluate` compares with: their settings, how each is turned on, and the grids to search.

A setting has a `contender`, the name of its kind; `str(setting)`, the name of its run; `describe()` for people; and
`on(pipe, num_inference_steps)`, a context in which it is on, and after which the pipeline is as it was.
"""

from collections.abc import Iterable

from lesa.contenders.base import THRESHOLDS, Grid
from lesa.contenders.cache_dit import CacheDiT
from lesa.contenders.first_block_cache import FirstBlockCache
from lesa.contenders.mag_cache import MagCache
from lesa.contenders.taylorseer import TaylorSeer, taylorseer_grid

PEERS = ("taylorseer", "first-block-cache", "mag-cache", "cache-dit")


Setting = TaylorSeer | FirstBlockCache | MagCache | CacheDiT


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
