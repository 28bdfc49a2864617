"""Forecasters that need no training, in `against`: the search for their best options and schedule."""

import json
import re

import pytest
import torch

import lesa
import small_pipelines as small
from lesa.contenders import kind_of
from lesa.contenders.schedules import schedules_within
from lesa.evaluation import forecaster_search
from lesa.evaluation.contest import Contest
from lesa.schedule import Spread
from lesa_kernels import FusedKANPredictor, PredictorConfig, Weights
from lesa_kernels.forecasters import FORECASTERS, Forecaster, register

STEPS, BUDGET = 8, 4


@pytest.fixture(scope="module")
def pipe():
    return small.ALL["flux"].build()


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes most of the time."""
    monkeypatch.setattr("lesa.evaluation.result.draw_comparison", lambda runs, images, file: file.touch())


@pytest.fixture
def registry():
    """What a test registers ends with it."""
    before = dict(FORECASTERS)
    yield
    FORECASTERS.clear()
    FORECASTERS.update(before)


def evaluate(pipe, folder, against, predictors=(), samples=1, **options):
    inputs = [small.ALL["flux"].inputs(1)] * samples
    return lesa.evaluate(pipe, inputs, predictors, against, STEPS, out_dir=folder, progress=False, **options)


def kept_in(folder, name):
    """What is kept of a search: figures of settings, and schedules that were found."""
    (file,) = (folder / "runs").glob(f"search_{name}-*.json")
    kept = json.loads(file.read_text())["figures"]
    return {k: v for k, v in kept.items() if isinstance(v, list)}, {
        k: v for k, v in kept.items() if isinstance(v, dict)
    }


def test_a_forecaster_without_training_is_searched(pipe):
    evaluation = lesa.evaluate(pipe, [small.ALL["flux"].inputs(1)], [], ["linear-2"], 4, progress=False)
    searched, (_, run) = evaluation.facts["searched"]["linear"], evaluation.runs
    assert (run.name, run.whole_steps, run.predictor) == ("linear-2", 2, None) and run.setting.startswith(
        "linear, steps "
    )
    assert searched["budgets"] == [{"budget": 2, "by": "step_equivalents", "run": "linear-2", "why": None}]
    assert searched["tried"] == 2 and searched["grid"].startswith(
        "steps by noise level; 3 or 4 steps and then every N-th"
    )


@pytest.mark.slow
def test_the_best_options_and_schedule_are_searched_and_kept(pipe, tmp_path, monkeypatch):
    by_hand = FusedKANPredictor(PredictorConfig(mixer="taylor"))
    mine = {"mine": (by_hand, lesa.Schedule((0, 1, 2, 3)))}
    arguments = (["taylor-4", "taylor-1"], mine)
    evaluation = evaluate(pipe, tmp_path, *arguments)
    searched = evaluation.facts["searched"]["taylor"]
    settings, found = kept_in(tmp_path, "taylor")
    assert searched["tried"] == len(settings) and len(found) == forecaster_search.FOUND_FOR
    given = [schedules_within(budget, STEPS) for budget in (BUDGET, 1)]
    found_steps = {f"{value['steps']}" for value in found.values()}
    assert len(settings) == 3 * sum(map(len, given)) + len(found) and 1 <= len(found_steps) <= 2
    four, one = (evaluation[row["run"]] for row in searched["budgets"])
    assert (four.step_equivalents, one.step_equivalents, one.steps) == (BUDGET, 1, (0,))
    # The search had all the inputs, so that its figure is that of the run.
    assert four.psnr == max(psnr for psnr, whole, equivalents in settings.values() if equivalents <= BUDGET)
    names = [run.name for run in evaluation.runs]
    assert names[:2] == ["reference", "taylor-4@mine"] and re.fullmatch("taylor-4@[0-9a-f]{8}", names[2])
    assert names[3:] == ["taylor-1"] and [run.predictor for run in evaluation.runs[1:]] == ["mine", None, None]
    assert (
        re.match(r"taylor, order [123], steps", four.setting)
        and "order 1 or order 2 or order 3; steps" in searched["grid"]
    )
    # Nothing is run, recorded or searched again.
    for owner, name in ((Contest, "outcome"), (forecaster_search, "record"), (forecaster_search, "find_schedule")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("it is kept"))
    assert [run.name for run in evaluate(pipe, tmp_path, *arguments).runs] == names


@pytest.mark.parametrize("name", ["newton", "l2p-9"])
def test_what_must_be_trained_is_refused(pipe, name):
    kind = name.partition("-")[0]
    message = f"`against` must name contenders that need no training, .*Train a {kind} predictor, and pass it in `pred"
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, None, [name])


@pytest.mark.slow
def test_a_setting_that_was_given_too_runs_once(pipe, tmp_path):
    setting = kind_of("universal").variants(small.DIM)[0]
    given = {"mine": (setting, Spread(2)), "too": (setting, Spread(2))}
    evaluation = evaluate(pipe, tmp_path, ["universal-2"], given)
    assert {"universal-2@mine", "universal-2@too"} <= {run.name for run in evaluation.runs}
    settings, _ = kept_in(tmp_path, "universal")
    best = max(settings, key=lambda key: settings[key][0])
    is_given = best == kind_of("universal")(setting, Spread(2)).identity()
    assert len(evaluation.runs) == (3 if is_given else 4)


@pytest.mark.slow
def test_forecasters_of_users_that_fail_or_cannot_be_searched_are_told_of(registry, pipe, tmp_path, monkeypatch):
    class Repeated(Forecaster):
        name, title = "repeated", "repeated feature"

        def history_length(self, config):
            return 1

        def weights(self, predictor, steps):
            return Weights(torch.ones_like(steps.levels), self.read(predictor.config, steps), None, None, None)

    class Broken(Repeated):
        name, title = "broken", "broken one"

        def weights(self, predictor, steps):
            raise ZeroDivisionError("no weights")

    for forecaster in (Repeated(), Broken()):
        register(forecaster)
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise ValueError("no recording")

    monkeypatch.setattr(forecaster_search, "record", fail)
    evaluation = evaluate(pipe, tmp_path, ["repeated-4", "repeated-3", "broken-4"])
    assert "ZeroDivisionError: no weights" in evaluation.facts["not_available"]["broken"]
    searched = evaluation.facts["searched"]["repeated"]
    assert searched["grid"].endswith("it finds none for 4, 3: it fails on this model: ValueError: no recording")
    assert [evaluation[row["run"]].name for row in searched["budgets"]] == ["repeated-4", "repeated-3"]
    assert len(calls) == 1
