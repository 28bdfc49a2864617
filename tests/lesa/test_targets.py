"""`benchmarks/studies/targets.py`, on an evaluation that nobody ran."""

import runpy
from pathlib import Path

import pytest

from made_evaluations import make_evaluation

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "studies" / "targets.py"


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
    assert targets["best_at_most"](runs, 8, "whole_steps")["psnr"] == 41.0
    assert targets["best_at_most"](runs, 6, "whole_steps") is None


def test_every_contender_is_held_against_every_run_of_ours(targets, runs):
    rows = targets["rows_of"](runs)
    found = {(row[0], row[2], row[3]): row[4] for row in rows}
    assert len(found) == len(rows) == 2 * 4 + 1
    peers = [r for r in runs if r["contender"] not in ("newton", "dense", "reference")]
    (ours,) = (r for r in runs if r["name"] == "newton-8")
    for by, most in (("step_equivalents", 8.5), ("whole_steps", 8.5), ("seconds", ours["seconds"])):
        within = {r["psnr"]: r["name"] for r in peers if r[by] <= most}
        assert found["newton-8", by, "the best of all"] == within[max(within)]
    (dense,) = (row for row in rows if row[:1] == ("newton-8",) and row[3] == "the dense variant")
    assert dense[4] == "dense-8" and dense[-1] == "yes"
    (far,) = (row for row in rows if row[3] == "the best of all at 8")
    assert far[4] == "cache-dit-5.7" and far[-2:] == ("2", "yes")
    best = targets["best_at_most"](runs, 5, "whole_steps")
    behind = {**best, "name": "newton-4", "whole_steps": 4.0, "psnr": 20.0, "per_sample": {"psnr": [20.0] * 3}}
    rows = targets["rows_of"]([behind, *(run for run in runs if run["name"] != "newton-5")])
    assert [row[4] for row in rows if row[0] == "newton-4" and row[2] == "whole_steps"] == ["none costs as little"] * 2
    rows = targets["rows_of"]([{**behind, "whole_steps": 5.0}, *runs])
    assert {row[-1] for row in rows if row[0] == "newton-4" and row[2] == "whole_steps" and row[-1]} == {"no"}
    assert targets["table"](rows).count("\n") == len(rows) + 1
