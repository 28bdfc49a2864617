"""Files that are whole or absent, settings that must be the same, and digests of values."""

import copy
import dataclasses
import enum
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from lesa.artifacts import check_same_settings, digest, remove_partial, whole_file, write_text


def test_a_file_that_is_cut_off_keeps_its_earlier_contents(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "fünf")
    assert file.read_bytes() == "fünf".encode() and [*tmp_path.iterdir()] == [file]
    with pytest.raises(KeyboardInterrupt), whole_file(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text(encoding="utf-8") == "fünf"
    remove_partial(file)
    remove_partial(file)  # there is nothing to remove
    assert [*tmp_path.iterdir()] == [file]


def test_a_setting_that_differs_is_named_with_both_values():
    kept = {"seed": 3, "rate": 0.1, "old": 1}
    check_same_settings("the work in a", kept, {"seed": 3, "rate": 0.1})
    with pytest.raises(ValueError, match="^`rate` must be 0.1, as in the work in a, but got 0.2 .*another folder"):
        check_same_settings("the work in a", kept, {"seed": 3, "rate": 0.2})
    with pytest.raises(ValueError, match="^`new` must be None, as in the work in a, but got 5"):
        check_same_settings("the work in a", kept, {"new": 5})


def test_of_nested_settings_the_entry_that_differs_is_named():
    kept = {"config": {"width": 8, "shape": {"rank": 2, "hidden": 4}, "family": "flux"}}
    given = {"config": {"width": 8, "shape": {"rank": 3, "hidden": 4}, "family": "flux", "seed": 1}}
    with pytest.raises(ValueError) as refusal:
        check_same_settings("the work in a", kept, given)
    assert str(refusal.value).startswith("`config.shape.rank` must be 2, as in the work in a, but got 3 (int).")
    with pytest.raises(ValueError, match="^`config.seed` must be None, as in the work in a, but got 1"):
        check_same_settings("the work in a", {"config": {"width": 8}}, {"config": {"width": 8, "seed": 1}})
    with pytest.raises(ValueError, match="^`config` must be None, as in the work in a, but got {'width': 8}"):
        check_same_settings("the work in a", {"config": None}, {"config": {"width": 8}})


# Digests


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Skipped:
    indices: list[int]
    share: float = 1.0


DIFFERENT = {
    "dtypes": [torch.float16, torch.bfloat16],
    "devices": [torch.device("cpu"), torch.device("meta"), torch.device("cuda", 1), torch.device("cuda", 0)],
    "sets": [set(), {1}, {2}, {1, 2}, frozenset({3})],
    "enums": [Colour.RED, Colour.BLUE, Level.LOW, Level.HIGH, 1, 2],
    "paths": [Path("a"), Path("b"), Path("a/b")],
    "complex numbers": [1j, 2j, 1 + 0j],
    "bytes": [b"", b"a", b"b", bytearray(b"a")],
    "generators": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
    "dataclasses": [Skipped([1]), Skipped([2]), Skipped([1], 0.5)],
    "keys": [{1: "a", "b": 2}, {"1": "a", "b": 2}, {1: "b", "b": 2}, {None: "a", "b": 2}, {(1, 2): "a"}, {}],
    "mappings": [types.MappingProxyType({"a": 1}), types.MappingProxyType({"a": 2})],
}


@pytest.mark.slow
@pytest.mark.parametrize("values", DIFFERENT.values(), ids=DIFFERENT)
def test_different_values_have_different_digests(values):
    digests = [digest({"option": [value]}) for value in values]
    assert len({*digests}) == len(values)
    assert [digest({"option": [copied(value)]}) for value in values] == digests


def copied(value):
    """An equal value that is another object. Sets and dicts get their entries in another order."""
    if isinstance(value, (set, dict)):
        return type(value)(reversed([*value.items()] if isinstance(value, dict) else [*value]))
    if isinstance(value, torch.Generator):
        return torch.Generator().manual_seed(value.initial_seed())
    return types.MappingProxyType(dict(value)) if isinstance(value, types.MappingProxyType) else copy.deepcopy(value)


def test_digests_are_those_of_earlier_versions():
    """Recordings and evaluations keep them."""
    value = {
        "b": [1, 2.5, None, True, "a"],
        "a": (np.arange(3), torch.ones(2, dtype=torch.bfloat16)),
        "f": np.float32(1),
    }
    assert digest(value) == "f4cb5ffb70a57497dd15512d3623edac297f68f776a45827148a10c752736bf2"
