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
from lesa_kernels.forecasters import Forecaster, register

STEPS, BUDGET = 8, 4


@pytest.fixture(scope="module")
def pipe():
    return small.ALL["flux"].build()


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes most of the time."""
    monkeypatch.setattr("lesa.evaluation.result.draw_comparison", lambda runs, images, file: file.touch())


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


def test_windows_grow_as_fast_as_a_budget_needs():
    assert lesa.Schedule((0, 1, 2, 3, 4, 6, 21), 50) in schedules_within(7, 50)  # a flex of 13.5
    of_windows = [s for s in schedules_within(6, 50) if isinstance(s, lesa.Schedule) and s.steps[:5] == (0, 1, 2, 3, 4)]
    assert [s.steps for s in of_windows] == [(0, 1, 2, 3, 4, 6)]


@pytest.mark.slow
def test_schedules_are_those_of_the_steps_that_are_executed(monkeypatch):
    """With `strength`, a run begins later."""
    case = small.ALL["flux img2img"]
    tried = []
    figures_of = forecaster_search.ForecasterSearch._figures_of
    monkeypatch.setattr(
        forecaster_search.ForecasterSearch, "_figures_of", lambda *a: tried.append(a[1]) or figures_of(*a)
    )
    inputs = [{**case.inputs(1), "strength": 0.5}]
    evaluation = lesa.evaluate(case.build(), inputs, [], ["linear-4"], 2 * STEPS, progress=False)
    assert evaluation.runs[0].steps == tuple(range(STEPS))
    given = [*schedules_within(4, STEPS)]
    assert [setting.schedule for setting in tried[: len(given)]] == given
    assert {s.num_inference_steps for s in (t.schedule for t in tried) if isinstance(s, lesa.Schedule)} == {STEPS}


@pytest.mark.slow
def test_a_setting_that_was_given_too_runs_once(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(forecaster_search, "find_schedule", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(forecaster_search, "schedules_within", lambda *_: [Spread(2)])
    setting = kind_of("universal").variants(small.DIM)[0]
    given = {"mine": (setting, Spread(2)), "too": (setting, Spread(2))}
    evaluation = evaluate(pipe, tmp_path, ["universal-2"], given)
    names = [run.name for run in evaluation.runs]
    assert names == ["reference", "universal-2@mine", "universal-2@too"]
    (row,) = evaluation.facts["searched"]["universal"]["budgets"]
    assert row["run"] in names[1:]
    # A later search in this folder finds the run too, and the run keeps its name.
    again = evaluate(pipe, tmp_path, ["universal-2"])
    assert sorted(run.name for run in again.runs) == sorted(names)
    assert again.facts["searched"]["universal"]["budgets"][0]["run"] in names[1:]
    assert {run.name for run in evaluate(pipe, tmp_path, ["universal-1"]).runs} == {*names}


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

    class Unbuilt(Repeated):
        name, title = "unbuilt", "one without parts"

        def build(self, predictor, config):
            raise ZeroDivisionError("no parts")

    class Unknown(Repeated):
        name, title = "unknown", "one of other options"
        variants = ({"nothing": 1},)

    for forecaster in (Repeated(), Broken(), Unbuilt(), Unknown()):
        register(forecaster)
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise ValueError("no recording")

    monkeypatch.setattr(forecaster_search, "record", fail)
    evaluation = evaluate(pipe, tmp_path, ["repeated-4", "repeated-3", "broken-4", "unbuilt-4", "unknown-4"])
    why = evaluation.facts["not_available"]
    assert "ZeroDivisionError: no weights" in why["broken"] and "ZeroDivisionError: no parts" in why["unbuilt"]
    assert "nothing" in why["unknown"]
    searched = evaluation.facts["searched"]["repeated"]
    assert searched["grid"].endswith("it finds none for 4, 3: it fails on this model: ValueError: no recording")
    assert [evaluation[row["run"]].name for row in searched["budgets"]] == ["repeated-4", "repeated-3"]
    assert len(calls) == 1


def test_another_formula_is_another_setting(registry):
    """So an evaluation that is continued runs it again."""

    class Scaled(Forecaster):
        name, title, factor = "scaled", "scaled feature", 1.0

        def history_length(self, config):
            return 1

        def weights(self, predictor, steps):
            anchors = torch.full_like(steps.levels, self.factor)
            return Weights(anchors, self.read(predictor.config, steps), None, None, None)

    register(Scaled())
    setting = kind_of("scaled")(FusedKANPredictor(PredictorConfig(mixer="scaled")), Spread(2))
    before = setting.identity()
    assert setting.identity() == before
    Scaled.factor = 0.5
    assert setting.identity() != before


@pytest.mark.parametrize("against", [["linear"], ["steps-2", "steps"], lesa.contenders.AGAINST])
def test_without_predictors_a_name_needs_a_budget(pipe, against):
    name = next(each for each in against if "-" not in each)
    with pytest.raises(ValueError, match=f"`against` has '{name}' without a budget.*Write '{name}-8', or pass"):
        evaluate(pipe, None, against)
