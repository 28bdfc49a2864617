"""Small pipelines of more families than the four of `small_pipelines`, from the files `small_*.py` beside this.

Such a file has `FAMILY`, the family's name, and `CASES`. It may have

- `QUICK`, the name of its cheapest case, which is no slow test;
- `RECORDED`, the name of the case that is recorded, trained on and evaluated, or `NOT_RECORDED`, why none is;
- `NOT_FUSED`, the cases whose output head runs in the model's own modules, and why;
- `NOT_DECODED_ALIKE`, the cases whose pipeline makes other images than `decode`, and why;
- `GIVES_MORE`: the transformer also gives something for text and given images, which no pipeline uses;
- `CONDITIONED_TO_ROUNDING`, the cases whose conditioning is made in a smaller product than in the forward, which may
  round in another way.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import probed_pipelines
from small_pipelines import Small

_FILES: list[ModuleType] = [
    import_module(path.stem)
    for path in sorted(Path(__file__).parent.glob("small_*.py"))
    if path.stem != "small_pipelines"
]

FAMILIES: dict[str, dict[str, Small]] = {}
"""For each family, the ways to run its pipelines."""

for _file in _FILES:
    FAMILIES.setdefault(_file.FAMILY, {}).update(_file.CASES)

ALL = {name: case for cases in FAMILIES.values() for name, case in cases.items()}
QUICK = {_file.FAMILY: _file.QUICK for _file in _FILES if hasattr(_file, "QUICK")}
RECORDED = {_file.FAMILY: _file.RECORDED for _file in _FILES if hasattr(_file, "RECORDED")}
NOT_RECORDED = {_file.FAMILY: _file.NOT_RECORDED for _file in _FILES if hasattr(_file, "NOT_RECORDED")}
GIVE_MORE = {_file.FAMILY for _file in _FILES if hasattr(_file, "GIVES_MORE")}
NOT_FUSED = {name: why for _file in _FILES for name, why in getattr(_file, "NOT_FUSED", {}).items()}
NOT_DECODED_ALIKE = {name: why for _file in _FILES for name, why in getattr(_file, "NOT_DECODED_ALIKE", {}).items()}
CONDITIONED_TO_ROUNDING = {name for _file in _FILES for name in getattr(_file, "CONDITIONED_TO_ROUNDING", ())}

PROBED: dict[str, tuple[str, ...]] = probed_pipelines.PROBED
"""Transformers without an adapter that the probe was tried on, and the pipeline classes that were run."""

REFUSED: dict[str, str] = {}
"""Transformers that neither an adapter nor the probe can do, and why."""
