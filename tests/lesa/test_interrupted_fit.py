"""A fit that is interrupted goes on, and its files have the same bytes."""

import json
import os
import shutil
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


@pytest.mark.parametrize("left", ["work", "a part of work", "the state"])
def test_a_fit_that_was_interrupted_while_it_cleaned_up_only_cleans_up(tmp_path, monkeypatch, left):
    """Even then, it knows its arguments."""
    pipe, unlink = CASE.build(), Path.unlink

    def ended(path, **options):
        if Path(path).name in ("work", ".fitted.json"):
            if left == "a part of work":
                unlink(sorted(each for each in path.rglob("*") if each.is_file())[0])
            raise Interrupted
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(whole.OneBudget, "fit", lambda self: whole.Fitted("a predictor", {}))
        patch.setattr(whole.Fit, "_test", lambda self, samples, fitted, bar: write(tmp_path))
        if left == "the state":
            patch.setattr(Path, "unlink", ended)
        else:
            patch.setattr(shutil, "rmtree", ended)
        with pytest.raises(Interrupted):
            lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert (tmp_path / "work").is_dir() == (left != "the state")
    with pytest.raises(ValueError, match="`seed` must be 0, as in the unfinished fit in"):
        lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path, seed=77, **OPTIONS)
    monkeypatch.setattr(whole.Fit, "_make", lambda *arguments: pytest.fail("it was finished"))
    made = lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert made.config.feature_dim == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="but got a predictor in"):
        lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)


def test_an_empty_folder_of_unfinished_work_does_not_make_a_predictor_one_of_this_call(tmp_path):
    write(tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match="but got a predictor in"):
        lesa.fit(CASE.build(), inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)


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
