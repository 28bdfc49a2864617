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
    assert targets["figures"](-0.004, -0.006, 0.004) == "0.00 (-0.01 to 0.00)"


def test_the_best_is_of_those_that_cost_no_more(targets):
    runs = [{"whole_steps": count, "psnr": value} for count, value in ((7, 40.0), (8.4, 41.0), (8.5, 45.0), (8, None))]
    assert targets["best_at_most"](runs, 8, "whole_steps")["psnr"] == 41.0
    assert targets["best_at_most"](runs, 6, "whole_steps") is None


def test_every_contender_is_held_against_every_run_of_ours(targets, runs):
    rows = targets["rows_of"](runs)
    found = {(row[0], row[2], row[3]): row[4] for row in rows}
    assert len(found) == len(rows) == 2 * 4 + 1  # nobody ran LESA and L2P
    peers = [r for r in runs if r["contender"] not in ("newton", "dense", "reference")]
    (ours,) = (r for r in runs if r["name"] == "newton-8")
    for by, most in (("step_equivalents", 8.5), ("whole_steps", 8.5), ("seconds", ours["seconds"])):
        within = {r["psnr"]: r["name"] for r in peers if r[by] <= most}
        assert found["newton-8", by, "the best without training"] == within[max(within)]
    (dense,) = (row for row in rows if row[:1] == ("newton-8",) and row[3] == "dense variant")
    assert dense[4] == "dense-8" and dense[-1] == "yes"
    (far,) = (row for row in rows if row[3] == "the best without training at 8")
    assert far[4] == "cache-dit-5.7" and far[-2:] == ("1", "yes")
    best = targets["best_at_most"](runs, 5, "whole_steps")
    behind = {**best, "name": "newton-4", "whole_steps": 4.0, "psnr": 20.0, "per_sample": {"psnr": [20.0] * 3}}
    rows = targets["rows_of"]([behind, *(run for run in runs if run["name"] != "newton-5")])
    assert [row[4] for row in rows if row[0] == "newton-4" and row[2] == "whole_steps"] == ["none costs as little"] * 2
    rows = targets["rows_of"]([{**behind, "whole_steps": 5.0}, *runs])
    assert {row[-1] for row in rows if row[0] == "newton-4" and row[2] == "whole_steps" and row[-1]} == {"no"}
    assert targets["table"](rows).count("\n") == len(rows) + 1


def run_of(contender: str, count: float, *psnr: float) -> dict:
    counts = {"whole_steps": count, "step_equivalents": count, "seconds": count}
    made = {"name": f"{contender}-{count}", "contender": contender, "psnr": sum(psnr) / len(psnr)}
    return {**made, **counts, "per_sample": {"psnr": list(psnr)}}


def test_trained_predictors_are_held_against_each_other_at_equal_steps(targets):
    """The best of several; ahead by enough, and certainly so."""
    ours = run_of("newton", 9, 50, 50)
    lesa = [run_of("lesa", 9, 42, 41), run_of("lesa", 9, 42.5, 42), run_of("lesa", 10, 60, 60)]
    without = [run_of("universal", 9, 49, 49), run_of("chebyshev", 9, 44, 44), run_of("linear", 9, 44, 43)]
    runs = [ours, *lesa, run_of("l2p", 9, 51, 33), *without]
    rows = targets["rows_of"](runs)
    found = {(row[2], row[3]): row[4:] for row in rows}
    assert found["whole_steps", "LESA"][1:] == ("42.25", "+7.75 (+7.50 to +8.00)", "7", "yes")
    assert found["whole_steps", "L2P"] == ("l2p-9", "42.00", "+8.00 (-1.00 to +17.00)", "7", "no")
    assert found["whole_steps", "linear extrapolation"] == ("linear-9", "43.50", "+6.50 (+6.00 to +7.00)", "7", "no")
    assert found["step_equivalents", "the best without training"][0] == "chebyshev-9"  # the other one is ours
    assert found["step_equivalents", "the best without training"][-2:] == ("10", "no")
    short = [{**run, "whole_steps": 5.0} for run in (ours, *lesa[:2], *without)]
    at_five = {(row[2], row[3]): row[-2:] for row in targets["rows_of"](short)}
    assert at_five["whole_steps", "LESA"] == at_five["step_equivalents", "the best without training"] == ("5", "yes")


def test_the_photographs_have_a_target_of_their_own_with_five_steps(targets):
    runs = [run_of("newton", 5, 32, 35), run_of("newton", 5, 32, 33.9), run_of("newton", 7, 40), run_of("lesa", 5, 9)]
    model = "QwenImagePipeline, QwenImageTransformer2DModel, 3.1 M parameters"
    rows = targets["own_rows"](model, runs)
    assert rows == [("newton-5", "33.50", "33", "yes"), ("newton-5", "32.95", "33", "no")]
    assert targets["own_rows"]("FluxPipeline, FluxTransformer2DModel, 2.3 M parameters", runs) == []


def test_without_training_the_best_other_counts_and_evaluations_have_equal_weights(targets):
    one = [
        run_of("universal", 9, 40, 42), run_of("universal", 9, 30, 30), run_of("universal", 7, 35, 35),
        run_of("taylor", 9.3, 39, 41), run_of("cache-dit", 9.6, 60, 60), run_of("newton", 9, 70, 70),
    ]  # fmt: skip
    two = [run_of("universal", 9, 30, 30, 30, 30), run_of("cache-dit", 8, 32, 33, 34, 33)]
    rows = targets["untrained_rows"](one)
    assert rows[0][4:] == ("taylor-9.3", "40.00", "+1.00 (+1.00 to +1.00)", "0", "yes")
    assert [row[0] for row in rows] == ["universal-9", "universal-7"] and rows[1][4] == "none costs as little"
    assert [row[-1] for row in targets["untrained_rows"](two)] == ["no"]
    ((count, number, lead, target, reached),) = targets["mean_rows"]([one, two])
    assert (count, number, target, reached) == ("9", "2", "0", "no")
    # (1 - 3) / 2. Of `two`, four draws differ from their mean as 8 tosses of a coin do from 4: 3 of 4 at 2.5 %.
    assert lead == "-1.00 (-1.38 to -0.62)"
    assert targets["mean_rows"]([one]) == []
