"""The thin layer that plugs lesa-kernels' predictors into diffusers pipelines, and the work around it."""

import importlib

_SOURCES = {
    "CacheHandle": "lesa.cache",
    "CacheStats": "lesa.cache",
    "ErrorControl": "lesa.schedule",
    "Schedule": "lesa.schedule",
    "Trajectories": "lesa.recording",
    "disable_cache": "lesa.cache",
    "enable_cache": "lesa.cache",
    "estimate": "lesa.estimation",
    "evaluate": "lesa.evaluation",
    "find_schedule": "lesa.training",
    "find_stages": "lesa.stages",
    "record": "lesa.recording",
    "search_schedule": "lesa.search",
    "refine": "lesa.refinement",
    "report": "lesa.reporting",
    "train": "lesa.training",
}

__all__ = [*_SOURCES]  # noqa: PLE0604  (names resolve in __getattr__)


def __getattr__(name: str):
    if name not in _SOURCES:
        raise AttributeError(f"module 'lesa' has no attribute {name!r}")
    return getattr(importlib.import_module(_SOURCES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_SOURCES])
