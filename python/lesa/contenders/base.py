"""What a contender is."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lesa.contenders import Setting

THRESHOLDS = (0.01, 4.0)
"""Between which thresholds are searched."""


@dataclass(frozen=True)
class Grid:
    """What is searched of a contender.

    Args:
        text: the grid in words.
        settings: those that are tried as they are.
        axes: settings whose thresholds are searched, for each budget by itself.
    """

    text: str
    settings: Sequence["Setting"] = ()
    axes: Sequence["Setting"] = ()


def bisected(axis: "Setting", count, budget: float, probes: int = 7) -> Iterator["Setting"]:
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
def diffusers_cache(pipe, config):
    with restored(pipe):
        pipe.transformer.enable_cache(config)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


@contextmanager
def quiet(prefix: str):
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
def restored(pipe):
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
