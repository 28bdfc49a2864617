"""Small pipelines of the families beside the four of `small_pipelines`: a file for each family, collected here."""

from importlib import import_module

import small_probed
from small_pipelines import Small

_FILES: dict[str, str] = {
    "sd3": "small_sd3_others",
    "wan": "small_wan",
}
"""For each family, the file beside this one that has its `CASES`."""

QUICK: set[str] = {"wan cfg"}
"""The cases that are no slow tests: one for each family, the cheapest."""

NOT_FUSED: dict[str, str] = {}
"""Cases whose output head runs in the model's own modules, and why."""

PROBED: dict[str, tuple[str, ...]] = small_probed.PROBED
"""Transformers without an adapter that the probe was tried on, and the pipeline classes that were run."""

REFUSED: dict[str, str] = {}
"""Transformers that neither an adapter nor the probe can do, and why."""

FAMILIES: dict[str, dict[str, Small]] = {family: import_module(file).CASES for family, file in _FILES.items()}
"""For each family, the ways to run its pipelines."""

ALL = {name: case for cases in FAMILIES.values() for name, case in cases.items()}
