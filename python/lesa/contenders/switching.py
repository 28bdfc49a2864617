"""Switches caches of others on, and leaves the pipeline as it was."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lesa.contenders.base import Pipeline
from lesa.models import transformers_of


def why_no_diffusers_cache(pipe: Pipeline) -> str | None:
    """Why no cache of diffusers can be switched on for the pipeline's transformer, or None."""
    if hasattr(pipe.transformer, "enable_cache"):
        return None
    return f"the caches of diffusers do not support {type(pipe.transformer).__name__}"


@contextmanager
def diffusers_cache(pipe: Pipeline, config: Any) -> Iterator[None]:
    """A context in which a cache of diffusers is on.

    Args:
        pipe: the pipeline.
        config: what `pipe.transformer.enable_cache` takes. It is on for each of two transformers.
    """
    transformers = transformers_of(pipe).values()
    with restored(pipe):
        for transformer in transformers:
            transformer.enable_cache(config)
        try:
            yield
        finally:
            for transformer in transformers:
                transformer.disable_cache()


@contextmanager
def quiet(prefix: str) -> Iterator[None]:
    """A context in which loggers show errors only.

    Args:
        prefix: how their names begin, in lower case. Loggers that are made inside the context are not silenced.
    """
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
def restored(pipe: Pipeline) -> Iterator[None]:
    """After this context, the pipeline, its class and all modules of its transformers have their old attributes.

    cache-dit leaves its forwards in the transformer and its blocks, and leaves the transformer's children in another
    order. diffusers' caches take the first child for the first block. diffusers leaves its hook registries.
    """
    modules = [module for transformer in transformers_of(pipe).values() for module in transformer.modules()]
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
