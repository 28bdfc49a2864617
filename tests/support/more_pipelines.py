"""Small pipelines of the families beside the four of `small_pipelines`: a file for each family, collected here."""

from importlib import import_module

from small_pipelines import Small

_FILES: dict[str, str] = {
    "ltx-video": "small_ltx",
    "cogvideox": "small_cogvideox",
}
"""For each family, the file beside this one that has its `CASES`."""

QUICK: set[str] = {
    "ltx image",
    "cogvideox",
}
"""The cases that are no slow tests: one for each family, the cheapest."""

FAMILIES: dict[str, dict[str, Small]] = {family: import_module(file).CASES for family, file in _FILES.items()}
"""For each family, the ways to run its pipelines."""

ALL = {name: case for cases in FAMILIES.values() for name, case in cases.items()}
