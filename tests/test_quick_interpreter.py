"""The quicker interpreter computes what Triton's own does, and leaves a Triton that it does not know alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, kernels are compiled"),
]

BOTH = """
import torch, quick_interpreter
from triton.runtime import interpreter

names = ("_patch_builtin", "_patch_lang")
before = [getattr(interpreter, name) for name in names], interpreter.GridExecutor.__call__
options = interpreter.interpreter_builder.options

def is_own():
    now = [getattr(interpreter, name) for name in names], interpreter.GridExecutor.__call__
    return now == before and interpreter.interpreter_builder.options is options

def computed():
    from lesa_kernels import FusedKANPredictor, PredictorConfig

    torch.manual_seed(0)
    config = PredictorConfig(16, rank=2, hidden=4, history_length=2)
    predictor = FusedKANPredictor(config)
    torch.nn.init.normal_([*predictor.parameters()][-1])
    ring = predictor.make_ring(batch=2, tokens=3, dtype=torch.float32, device="cpu")
    for sigma in (1.0, 0.8):
        ring.push(torch.randn(2, 3, 16), sigma)
    with torch.no_grad():
        return predictor(ring, 0.5)

plain = computed()
known = interpreter._patch_lang
interpreter._patch_lang = lambda fn, more: None
assert not quick_interpreter.install()
interpreter._patch_lang = known
assert is_own()
patch_attr = interpreter._patch_attr
del interpreter._patch_attr
assert not quick_interpreter.install()
interpreter._patch_attr = patch_attr
assert is_own()
assert quick_interpreter.install() and not is_own()
assert plain.abs().sum() > 0 and torch.equal(computed(), plain)
print("the same bits")
"""


def test_it_computes_the_same_bits_and_knows_what_it_replaces():
    support = Path(__file__).parent / "support"
    path = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LESA_BACKEND": "triton", "PYTHONPATH": path}
    command = [sys.executable, "-c", BOTH]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "the same bits" in result.stdout


def test_a_test_of_a_kernel_passes_without_it(tmp_path):
    """With a module of that name that changes nothing."""
    (tmp_path / "quick_interpreter.py").write_text("def install():\n    return False\n")
    here = Path(__file__).parent
    test = "tests/lesa_kernels/test_dense_kernels.py::test_tiles_may_be_ragged"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import quick_interpreter, pytest; "
    code += f"sys.exit(pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', {test!r}]))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=here.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "failed" not in result.stdout
