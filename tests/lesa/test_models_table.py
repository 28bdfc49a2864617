"""The table of the supported models is that of the installed diffusers."""

import importlib.util
import re
from pathlib import Path

import diffusers
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "docs" / "models_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_is_up_to_date(script):
    page = script.PAGE.read_text()
    if script.version(page) != diffusers.__version__:
        pytest.skip(f"the table is of diffusers {script.version(page)}; it lacks {script.missing(page)}")
    assert script.with_table(page, script.table()) == page, "run python docs/models_table.py"
    assert script.missing(page) == []


def test_a_class_that_the_table_lacks_is_named(script, monkeypatch):
    page = script.PAGE.read_text()
    rows = re.findall(r"^\| (\w+Model) \|", page, re.MULTILINE)
    monkeypatch.setattr(script, "transformers", lambda: dict.fromkeys([*rows, "NewTransformer2DModel"]))
    assert script.missing(page) == ["NewTransformer2DModel"]
