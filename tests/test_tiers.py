"""Which tests `pytest` runs: the fast ones in several processes, and the slow ones when they are asked for."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TESTS = """
import os
from pathlib import Path

import pytest

def note(name):
    with Path(__file__).with_name("ran").open("a") as file:
        print(name, "worker" if "PYTEST_XDIST_WORKER" in os.environ else "alone", file=file)

def test_fast():
    note("fast")

@pytest.mark.slow
def test_slow():
    note("slow")
"""
SPREAD = """
import os
from pathlib import Path

import pytest

@pytest.mark.parametrize("name", ["first", "second"])
def test_case(name):
    with Path(__file__).with_name("ran").open("a") as file:
        print(name, os.environ["PYTEST_XDIST_WORKER"], file=file)
"""
# What `conftest.py` needs of them. Importing PyTorch and Triton takes longer than all else here.
STAND_INS = {
    "torch.py": """
from types import SimpleNamespace

cuda = SimpleNamespace(is_available=lambda: False)
device, set_num_threads = object, int
""",
    "tests/support/quick_interpreter.py": "def install():\n    pass\n",
}
MESSAGE = "1 slow tests were left out. Run them with `pytest -m slow`"


@pytest.fixture
def ran(tmp_path):
    """`ran(*arguments)` runs pytest on a fast and a slow test; returns what ran and what was printed."""
    (tmp_path / "tests" / "support").mkdir(parents=True)
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
    shutil.copy(HERE / "conftest.py", tmp_path / "tests")
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_both.py").write_text(TESTS)

    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # their import takes long
        plugins = ["-p", "xdist"] if importlib.util.find_spec("xdist") else []
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        noted = tmp_path / "tests" / "ran"
        names = sorted(noted.read_text().splitlines())
        noted.unlink()
        return names, result.stdout

    return run


@pytest.mark.slow
def test_slow_tests_are_left_out_unless_they_are_asked_for(ran):
    names, printed = ran("tests")
    assert names == ["fast alone"] and MESSAGE in printed
    names, printed = ran("tests/test_both.py::test_slow")
    assert names == ["slow alone"] and MESSAGE not in printed
    names, printed = ran("-n", "0", "-m", "")
    assert names == ["fast alone", "slow alone"] and MESSAGE not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, tests run one after the other")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs two cores")
@pytest.mark.slow
def test_a_whole_tier_runs_in_several_processes(ran):
    pytest.importorskip("xdist")
    names, printed = ran()
    assert names == ["fast worker"] and MESSAGE in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, tests run one after the other")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs two cores")
@pytest.mark.slow
def test_cases_that_share_nothing_go_to_any_process(ran, tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "tests" / "test_both.py").unlink()
    (tmp_path / "tests" / "test_more_families.py").write_text(SPREAD)
    names, _ = ran()
    assert names in (["first gw0", "second gw1"], ["first gw1", "second gw0"])
