"""`benchmarks/targets.py`, on an evaluation that nobody ran."""

import runpy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from made_evaluations import make_evaluation  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "targets.py"


@pytest.fixture(scope="module")
def targets():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def runs(tmp_path):
    return make_evaluation(tmp_path, budgets=(8, 5))["runs"]


def test_a_lead_is_the_mean_of_the_paired_differences(targets):
    ours, other = ({"per_sample": {"psnr": values}} for values in ([50.0, 40.0, 45.0], [42.0, 33.0, 36.0]))
    mean, low, high = targets["lead"](ours, other)
    assert mean == pytest.approx(8.0)
    assert 7.0 <= low < 8.0 < high <= 9.0


def test_the_best_is_of_those_that_cost_no_more(targets):
    runs = [{"whole_steps": count, "psnr": value} for count, value in ((7, 40.0), (8.4, 41.0), (9, 45.0), (8, None))]
    assert targets["best_within"](runs, 8, "whole_steps")["psnr"] == 41.0
    assert targets["best_within"](runs, 6, "whole_steps") is None


def test_every_contender_is_held_against_every_run_of_ours(targets, runs):
    rows = targets["rows_of"](runs)
    kinds = {(row[0], row[2], row[3]) for row in rows}
    for ours in ("newton-8", "newton-5"):
        for by in ("step_equivalents", "whole_steps", "seconds"):
            for kind in ("steps", "taylorseer", "first-block-cache", "mag-cache", "cache-dit"):
                assert (ours, by, kind) in kinds
        assert (ours, "whole_steps", "the paper's predictor") in kinds
    assert ("newton-5", "step_equivalents", "any, at 8") in kinds
    (paper,) = (row for row in rows if row[:1] == ("newton-8",) and row[3] == "the paper's predictor")
    assert paper[4] == "dense-8" and paper[-1] == "yes"
    (far,) = (row for row in rows if row[3] == "any, at 8")
    assert far[4] == "cache-dit-5.7" and far[-2:] == ("2", "yes")
    best = targets["best_within"](runs, 5, "whole_steps")
    behind = {**best, "name": "newton-4", "whole_steps": 4.0, "psnr": 20.0, "per_sample": {"psnr": [20.0] * 3}}
    rows = targets["rows_of"]([behind, *(run for run in runs if run["name"] != "newton-5")])
    (lost,) = (row for row in rows if row[:1] == ("newton-4",) and row[2:4] == ("whole_steps", "steps"))
    assert lost[4] == "none costs as little"
    rows = targets["rows_of"]([{**behind, "whole_steps": 5.0}, *runs])
    assert {row[-1] for row in rows if row[0] == "newton-4" and row[2] == "whole_steps" and row[-1]} == {"no"}
    assert targets["table"](rows).count("\n") == len(rows) + 1
