"""Forecasts most denoising steps of diffusers pipelines with the predictors of `lesa_kernels`.

Public names resolve on first use: importing the package is quick, and needs neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING

from lesa_kernels import __version__

if TYPE_CHECKING:
    from lesa.cache import CacheHandle, disable_cache, enable_cache
    from lesa.cache.error_control import ErrorControl
    from lesa.cache.stats import CacheStats
    from lesa.estimation import estimate
    from lesa.evaluation.evaluator import evaluate
    from lesa.evaluation.report import report
    from lesa.fitting import fit
    from lesa.fitting.find_schedule_in_runs import find_schedule_in_runs
    from lesa.schedule import Schedule
    from lesa.training.end_to_end import train_end_to_end
    from lesa.training.recording import record
    from lesa.training.refinement import refine
    from lesa.training.schedule_search import find_schedule, search_schedule
    from lesa.training.stages import find_stages
    from lesa.training.trainer import train
    from lesa.training.trajectories import Trajectories

__all__ = [
    "CacheHandle",
    "CacheStats",
    "ErrorControl",
    "Schedule",
    "Trajectories",
    "__version__",
    "disable_cache",
    "enable_cache",
    "estimate",
    "evaluate",
    "find_schedule",
    "find_schedule_in_runs",
    "find_stages",
    "fit",
    "record",
    "refine",
    "report",
    "search_schedule",
    "train",
    "train_end_to_end",
]

_SOURCES = {  # a test holds it against the imports above
    "CacheHandle": "cache",
    "CacheStats": "cache.stats",
    "ErrorControl": "cache.error_control",
    "Schedule": "schedule",
    "Trajectories": "training.trajectories",
    "disable_cache": "cache",
    "enable_cache": "cache",
    "estimate": "estimation",
    "evaluate": "evaluation.evaluator",
    "find_schedule": "training.schedule_search",
    "find_schedule_in_runs": "fitting.find_schedule_in_runs",
    "find_stages": "training.stages",
    "fit": "fitting",
    "record": "training.recording",
    "refine": "training.refinement",
    "report": "evaluation.report",
    "search_schedule": "training.schedule_search",
    "train": "training.trainer",
    "train_end_to_end": "training.end_to_end",
}


def __getattr__(name: str):
    if name not in _SOURCES:
        raise AttributeError(f"module 'lesa' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lesa.{_SOURCES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
