"""A fit that is interrupted goes on, and its files have the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import interrupted_fits
import lesa
from interrupted_fits import BUDGET, CASE, OPTIONS, inputs, make_quick
from lesa.fitting import whole

PROGRAM = Path(interrupted_fits.__file__)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    make_quick(monkeypatch.setattr)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("left", ["state", "empty work"])
def test_a_fit_that_was_interrupted_while_it_cleaned_up_only_cleans_up(tmp_path, monkeypatch, left):
    pipe, unlink = CASE.build(), Path.unlink

    def ended(path, **options):
        if path.name in ("work", "state.json"):
            raise Interrupted
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(whole.OneBudget, "fit", lambda self: whole.Fitted("a predictor", {}))
        patch.setattr(whole.Fit, "_test", lambda self, samples, fitted, bar: write(tmp_path))
        patch.setattr(Path, "rmdir" if left == "empty work" else "unlink", ended)
        with pytest.raises(Interrupted):
            lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert (tmp_path / "work").is_dir()
    monkeypatch.setattr(whole.Fit, "_make", lambda *arguments: pytest.fail("it was finished"))
    made = lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert made.config.feature_dim == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def write(folder):
    from lesa_kernels import FusedKANPredictor, PredictorConfig

    FusedKANPredictor(PredictorConfig(4)).save_pretrained(folder)


@pytest.mark.slow
def test_a_fit_that_is_killed_at_20_random_moments_leaves_the_same_bytes(tmp_path):
    folders = [PROGRAM.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(tmp_path), "20", "3"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    result = json.loads(said[-1])
    assert len(said) == 1, said
    assert result["killed"] >= 20 and result["same"] and all(result["same"]), result
    assert "model.safetensors" in result["files"]
