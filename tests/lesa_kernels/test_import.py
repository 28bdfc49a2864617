"""Importing the package needs nothing but Python; what can't run says why when it is called."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lesa_kernels

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}, says the test", name=name)

sys.meta_path.insert(0, Block())
"""


def run_without(blocked, code, **variables):
    """Runs `code` in a new interpreter that can't import the modules in `blocked`; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "LESA_BACKEND"}
    program = f"BLOCKED = {blocked!r}\n{BLOCK}\n{textwrap.dedent(code)}"
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_without_torch():
    code = """
        import lesa_kernels
        assert "FeatureRing" in dir(lesa_kernels) and lesa_kernels.__version__
        assert not hasattr(lesa_kernels, "no_such_name")
        try:
            lesa_kernels.FeatureRing
        except ModuleNotFoundError as error:
            print(error)
    """
    assert "No module named 'torch'" in run_without(["torch", "triton", "lesa_kernels._C"], code)


PUBLIC = """
    import importlib, pkgutil
    import lesa_kernels

    def import_all_submodules():
        for module in pkgutil.walk_packages(lesa_kernels.__path__, "lesa_kernels."):
            if not module.name.endswith("._C"):
                importlib.import_module(module.name)

    if SUBMODULES_FIRST:
        import_all_submodules()
    from lesa_kernels import *
    import_all_submodules()
    for name in lesa_kernels.__all__:
        defined = getattr(importlib.import_module(lesa_kernels._SOURCES[name]), name)
        assert callable(defined) and defined.__name__ == name, name
        assert getattr(lesa_kernels, name) is globals()[name] is defined, name
    print(*sorted(lesa_kernels.__all__))
"""


@pytest.mark.slow
@pytest.mark.parametrize("submodules_first", [True, False])
def test_public_names_stay_what_they_are(submodules_first):
    names = run_without([], f"SUBMODULES_FIRST = {submodules_first}\n" + textwrap.dedent(PUBLIC)).split()
    assert {"FeatureRing", "bspline_basis", "bspline_evaluate", "newton_predict", "output_head"} <= set(names)


@pytest.mark.slow
def test_the_layers_function_is_in_the_package_of_its_name():
    code = """
        from lesa_kernels import bspline_kan
        print(type(bspline_kan).__name__, callable(bspline_kan.bspline_kan))
    """
    assert run_without([], code).split() == ["module", "True"]


def test_import_loads_nothing_heavy():
    code = """
        import lesa_kernels
        print(sorted({"torch", "triton", "numpy", "lesa_kernels._C"} & set(sys.modules)))
    """
    assert run_without([], code).strip() == "[]"


def test_env_report_without_torch_and_extension():
    code = """
        import json
        from lesa_kernels.env_report import env_report
        print(json.dumps(env_report()))
    """
    report = json.loads(run_without(["torch", "lesa_kernels._C"], code, LESA_BACKEND="torch"))
    assert report["torch"] == "can't be imported: No module named 'torch', says the test"
    assert report["extension"] == "No module named 'lesa_kernels._C', says the test"
    assert report["python"] == sys.version.split()[0]
    assert report["LESA_BACKEND"] == "torch"


def test_env_report_prints_the_versions():
    result = subprocess.run(
        [sys.executable, "-m", "lesa_kernels.env_report"], capture_output=True, text=True, check=True, timeout=120
    )
    import torch

    lines = {name.strip(): value.strip() for name, value in (line.split(":", 1) for line in result.stdout.splitlines())}
    assert lines["torch"] == torch.__version__
    assert set(lines) >= {"lesa_kernels", "python", "triton", "diffusers", "gpus", "extension", "LESA_BACKEND"}


PUSH = """
    import os
    import torch
    from lesa_kernels import FeatureRing
    for backend, variable in CASES:
        os.environ.pop("LESA_BACKEND", None)
        if variable:
            os.environ["LESA_BACKEND"] = variable
        ring = FeatureRing(2, 1, 3, 4, backend=backend)
        try:
            ring.push(torch.ones(1, 3, 4), 0.5)
        except (RuntimeError, RuntimeWarning) as error:
            print(type(error).__name__, error)
        print(ring.count.tolist(), end="END OF CASE")
"""


@pytest.mark.slow
def test_without_the_extension():
    """All in one process, whose start takes longest. The first case is the one that is said once in a process."""
    expected = {
        ("auto", ""): "RuntimeWarning lesa: ring_push runs in plain torch",  # warnings are errors here
        ("extension", ""): "RuntimeError The compiled extension lesa_kernels._C is not available",
        ("auto", "torch"): "[1]",
        ("torch", ""): "[1]",
    }
    printed = run_without(["lesa_kernels._C"], f"CASES = {[*expected]!r}\n" + textwrap.dedent(PUSH))
    *said, rest = printed.split("END OF CASE")
    assert len(said) == len(expected) and not rest.strip()
    for case, wanted in zip(expected, said):
        assert wanted.startswith(expected[case]), (case, wanted)
        if "Runtime" in expected[case]:
            assert "No module named 'lesa_kernels._C', says the test" in wanted
            assert "pip install ." in wanted


def test_without_triton():
    code = """
        from lesa_kernels import *
        import torch
        predictor = FusedKANPredictor(PredictorConfig(4))
        ring = predictor.make_ring(1, 3)
        for sigma in (0.9, 0.8):
            ring.push(torch.full((1, 3, 4), sigma), sigma)
        print(predictor(ring, 0.5).shape, float(predictor(ring, 0.5).mean()))
    """
    # First-order extrapolation of features that equal sigma. Plain torch, so that the extension need not be there.
    shape, value = run_without(["triton"], code, LESA_BACKEND="torch").rsplit(maxsplit=1)
    assert shape == "torch.Size([1, 3, 4])" and float(value) == pytest.approx(0.5)


def test_type_checkers_see_the_public_names():
    """`py.typed` is there, the names are the lazy ones, and every public signature is annotated in full."""
    assert (Path(lesa_kernels.__file__).parent / "py.typed").is_file()
    assert set(lesa_kernels.__all__) == set(lesa_kernels._SOURCES)
    assert len(lesa_kernels.__all__) == len(set(lesa_kernels.__all__))
    checked = 0
    for name in lesa_kernels.__all__:
        value = getattr(lesa_kernels, name)
        methods = vars(value).items() if inspect.isclass(value) else [(name, value)]
        for method, function in methods:
            function = getattr(function, "fget", None) or getattr(function, "__func__", function)
            if method != "__init__" and method.startswith("_") or not inspect.isfunction(function):
                continue
            signature = inspect.signature(function)
            parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
            missing = [p.name for p in parameters if p.annotation is p.empty]
            if method != "__init__" and signature.return_annotation is signature.empty:
                missing.append("return")
            assert not missing, (name, method, missing)
            checked += 1
    assert checked > 40
