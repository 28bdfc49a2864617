"""Files that are whole or absent, and settings that must be the same."""

import pytest

from lesa.artifacts import check_same_settings, remove_partial, whole_file, write_text


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
