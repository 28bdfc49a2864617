"""What an evaluation refuses before it runs, and inputs that set the steps of a run themselves."""

import pytest
import torch

import lesa
import small_pipelines as small
from lesa.contenders import FewerSteps
from lesa.contenders.taylorseer import TaylorSeer
from lesa.evaluation.contest import Contest
from lesa.evaluation.store import Store
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 4
SIGMAS = [1.0, 0.8, 0.5, 0.2]


@pytest.fixture(scope="module")
def pipe():
    return small.ALL["flux"].build()


def predictor():
    known = {"num_inference_steps": STEPS, "schedule": (0, 1), "schedule_sigmas": (1.0, 0.8)}
    return FusedKANPredictor(PredictorConfig(small.DIM, rank=1, hidden=2, history_length=2, family="flux", **known))


def evaluate(pipe, against, steps=STEPS, **more):
    inputs = [{**small.ALL["flux"].inputs(1), **more}]
    return lesa.evaluate(pipe, inputs, {"mine": predictor()}, against, steps, progress=False)


@pytest.mark.slow
def test_fewer_steps_are_not_available_where_the_inputs_set_the_steps(pipe):
    found = evaluate(pipe, ("steps", "steps-3"), sigmas=SIGMAS)
    assert [run.contender for run in found.runs] == ["reference", "newton"]
    assert found.facts["not_available"]["steps"] == "the inputs set the steps themselves"
    assert evaluate(pipe, ("steps",)).runs[2].name == "fewer-steps-2"


@pytest.mark.slow
def test_a_setting_of_fewer_steps_is_refused_where_the_inputs_set_the_steps(pipe):
    with pytest.raises(ValueError, match="`against` has the setting fewer-steps-2, but the inputs set the steps"):
        evaluate(pipe, (FewerSteps(2),), sigmas=SIGMAS)


def test_another_number_of_steps_than_the_inputs_set_is_refused(pipe):
    match = r"`inputs\[0\]` must have as many noise levels as `num_inference_steps`, 6, but got 4. Pass 4 as"
    with pytest.raises(ValueError, match=match):
        evaluate(pipe, ("steps",), steps=6, sigmas=SIGMAS)


@pytest.mark.parametrize("asked", ["steps-5", "taylorseer-5", FewerSteps(5), FewerSteps(0)], ids=str)
def test_a_budget_that_the_run_does_not_have_names_against(pipe, asked):
    with pytest.raises(ValueError, match=r"`against` has .*, but the run has 4 steps \(`num_inference_steps`\)"):
        evaluate(pipe, (asked,))


@pytest.mark.slow
@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError("no disk"), torch.OutOfMemoryError("no memory")])
def test_an_error_of_the_machine_is_not_blamed_on_a_setting(pipe, monkeypatch, error):
    def fail(self, pipe, num_inference_steps):
        raise error

    monkeypatch.setattr(TaylorSeer, "on", fail)
    with pytest.raises(type(error), match="^no (memory|disk)$"):
        evaluate(pipe, (TaylorSeer(2),))


def test_a_store_without_a_folder_keeps_nothing(pipe):
    inputs = [small.ALL["flux"].inputs(1)]
    store = Store(None, pipe, adapter_for(pipe), inputs, 0, 1, STEPS)
    assert store.settings == {} and not store.has_settings() and store.read_search("steps", 1) == {}
    store.check_settings()


@pytest.mark.parametrize("name", ["summary.json", "runs.csv", "comparison.png", "images", "runs"])
def test_a_name_that_is_taken_is_refused_before_anything_runs(pipe, tmp_path, monkeypatch, name):
    monkeypatch.setattr(Contest, "run", None)
    path = tmp_path / name
    path.mkdir() if "." in name else path.write_text("")
    inputs = [small.ALL["flux"].inputs(1)]
    with pytest.raises(ValueError, match=f"`out_dir` must have a (file|folder) as {name}, or nothing, but got "):
        lesa.evaluate(pipe, inputs, {"mine": predictor()}, (), STEPS, out_dir=tmp_path, progress=False)
    assert [*tmp_path.iterdir()] == [path]
