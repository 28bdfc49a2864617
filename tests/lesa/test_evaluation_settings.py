"""What `lesa.evaluate` keeps in its folder is used again only where every setting is the same."""

import inspect
import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import lesa
import small_pipelines as small
from lesa.contenders.taylorseer import TaylorSeer
from lesa.evaluation.result import Evaluation
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 6
SIGMAS = (1.0, 0.8, 0.6)
"""Of steps 0, 1 and 2; those of the pipeline are near, which is enough here."""


def save_summary(evaluation, folder):
    (folder / "summary.json").write_text(json.dumps(evaluation.summary()))


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    """They take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "save", lambda self, folder: save_summary(self, folder))
        yield


def inputs_of(*numbers):
    """For each number an input with a prompt of its own."""
    inputs = [small.ALL["flux"].inputs(1) for _ in numbers]
    for number, item in zip(numbers, inputs):
        generator = torch.Generator().manual_seed(number)
        item |= {key: torch.randn(item[key].shape, generator=generator) for key in item if "embeds" in key}
    return inputs


def predictor(seed=0, **options):
    known = {"num_inference_steps": STEPS, "schedule": (0, 1, 2), "schedule_sigmas": SIGMAS}
    known |= {"schedule_errors": (0.0, 0.1, 0.1)}
    torch.manual_seed(seed)
    return FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4, family="flux", **{**known, **options}))


def nudged():
    """The predictor with one bit of one number changed."""
    made = predictor()
    weight = [*made.parameters()][-1].data.view(-1)
    weight[-1] = torch.nextafter(weight[-1], weight[-1] + 1)
    return made


def controlled(**options):
    return (predictor(), lesa.ErrorControl(**options))


PEER = TaylorSeer(3)
SETTINGS = {
    "inputs": inputs_of(3, 8),
    "predictors": {"mine": controlled()},
    "against": (PEER, "steps-3"),
    "num_inference_steps": STEPS,
    "seed": 1,
    "batch_size": 2,
    "progress": False,
}


def other_pipe(change):
    """The pipeline, but for one thing."""
    pipe = small.ALL["flux"].build()
    if change == "one weight":
        weight = pipe.transformer.proj_out.bias.data
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    elif change == "decoder":
        weight = next(pipe.vae.decoder.parameters()).data.view(-1)
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    elif change == "scheduler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=2.0)
    elif change == "dtype":
        pipe.to(torch.bfloat16)
    elif change == "class":
        pipe = type("OtherPipeline", (type(pipe),), {})(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
    return pipe


def halves(inputs):
    return [{k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in item.items()} for item in inputs]


CHANGES = {  # what differs, and which contenders run again; or what the refusal names
    "nothing": ({}, []),
    "one weight of the model": ({"pipe": "one weight"}, "pipe.transformer"),
    "one weight of the decoder": ({"pipe": "decoder"}, "pipe.vae"),
    "the noise levels of the scheduler": ({"pipe": "scheduler"}, "scheduler.shift"),
    "the model's dtype": ({"pipe": "dtype", "inputs": halves(SETTINGS["inputs"])}, "dtype"),
    "the pipeline's class": ({"pipe": "class"}, "model"),
    "an input": ({"inputs": inputs_of(3, 9)}, "inputs[1]"),
    "the order of the inputs": ({"inputs": inputs_of(8, 3)}, "inputs[0]"),
    "the number of inputs": ({"inputs": inputs_of(3)}, "samples"),
    "the number of steps": ({"num_inference_steps": 7}, "num_inference_steps"),
    "the seed": ({"seed": 2}, "seed"),
    "the batch size": ({"batch_size": 1}, "batch_size"),
    "one weight of a predictor": ({"predictors": {"mine": (nudged(), lesa.ErrorControl())}}, ["newton"]),
    "what a predictor was trained on": (
        {"predictors": {"mine": (predictor(schedule=(0, 2, 4)), lesa.ErrorControl())}},
        ["newton"],
    ),
    "the tolerance": ({"predictors": {"mine": controlled(tolerance=0.5)}}, ["newton"]),
    "the longest gap": ({"predictors": {"mine": controlled(longest=2)}}, ["newton"]),
    "the growth": ({"predictors": {"mine": controlled(growth=1.0)}}, ["newton"]),
    "the schedule": ({"predictors": {"mine": (predictor(), [0, 1, 4])}}, ["newton"]),
    "the schedule as trained": ({"predictors": {"mine": predictor()}}, ["newton"]),
    "the label": ({"predictors": {"other": controlled()}}, ["newton"]),
    "a second predictor": ({"predictors": {"mine": controlled(), "b": predictor(1)}}, ["newton"]),
    "no predictor": ({"predictors": {}}, []),
    "a peer's interval": ({"against": (TaylorSeer(4), "steps-3")}, ["taylorseer"]),
    "a peer's order": ({"against": (TaylorSeer(3, order=2), "steps-3")}, ["taylorseer"]),
    "a peer's mode": ({"against": (TaylorSeer(3, lite=True), "steps-3")}, ["taylorseer"]),
    "a peer's warm-up": ({"against": (TaylorSeer(3, warm_up=2), "steps-3")}, ["taylorseer"]),
    "another number of fewer steps": ({"against": (PEER, "steps-4")}, ["steps"]),
}


def counting(monkeypatch, pipe):
    """A list of the numbers of steps of every call of the pipeline, from now on."""
    calls, call = [], type(pipe).__call__

    def noted(self, *args, **arguments):
        calls.append(arguments["num_inference_steps"])
        return call(self, *args, **arguments)

    monkeypatch.setattr(type(pipe), "__call__", noted)
    return calls


def figures(evaluation):
    """By contender, predictor and setting, all that was measured but times, and the pictures."""
    untimed = {"seconds": 1, "denoise_seconds": 1, "speedup": 1, "reference_seconds": 1, "name": ""}
    return {
        (run.contender, run.predictor, run.setting): (replace(run, **untimed), evaluation.images[run.name].tobytes())
        for run in evaluation.runs
    }


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a finished evaluation."""
    folder = tmp_path_factory.mktemp("kept")
    before = lesa.evaluate(small.ALL["flux"].build(), out_dir=folder, **SETTINGS)
    return before, {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def copy_of(kept, folder):
    for name, contents in kept[1].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    return folder


@pytest.mark.parametrize("change", [name for name, (_, result) in CHANGES.items() if isinstance(result, str)])
def test_an_evaluation_of_something_else_is_refused_by_name(kept, tmp_path, monkeypatch, change):
    options, name = CHANGES[change]
    settings = {**SETTINGS, **{key: value for key, value in options.items() if key != "pipe"}}
    pipe = other_pipe(options.get("pipe"))
    calls = counting(monkeypatch, pipe)
    folder = copy_of(kept, tmp_path)
    with pytest.raises(ValueError, match=rf"`{re.escape(name)}` must .* in the evaluation in .*hoose another folder"):
        lesa.evaluate(pipe, out_dir=folder, **settings)
    assert not calls
    _, files = kept
    assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize("change", [name for name, (_, result) in CHANGES.items() if isinstance(result, list)])
def test_a_changed_contender_runs_again_and_nothing_else_does(kept, tmp_path, monkeypatch, change):
    options, again = CHANGES[change]
    settings = {**SETTINGS, **options}
    pipe = other_pipe(None)
    fresh = figures(lesa.evaluate(pipe, **settings))
    calls = counting(monkeypatch, pipe)
    resumed = lesa.evaluate(pipe, out_dir=copy_of(kept, tmp_path), **settings)
    made, before = figures(resumed), figures(kept[0])
    assert made == {**{key: before[key] for key in made.keys() - fresh.keys()}, **fresh}
    predictors = {run.predictor for run in resumed.runs} - {None}
    assert predictors == {"mine", *settings["predictors"]}  # those of before are kept
    assert len({run.name for run in resumed.runs}) == len(resumed.runs)
    # The reference is timed again if anything runs, after one call to warm up.
    assert len(calls) == len(again) + 2 * bool(again)
    calls.clear()
    once_more = lesa.evaluate(pipe, out_dir=tmp_path, **settings)
    assert not calls and once_more.summary() == resumed.summary()


def test_what_is_only_written_or_shown_runs_nothing_again(kept, tmp_path, monkeypatch):
    pipe = small.ALL["flux"].build()
    calls = counting(monkeypatch, pipe)
    lesa.evaluate(pipe, out_dir=copy_of(kept, tmp_path), **{**SETTINGS, "progress": True, "search_samples": 1})
    assert not calls


def test_every_argument_is_tried_with_another_value():
    """One that is new needs a place here; the search has tests of its own."""
    tried = {key for options, _ in CHANGES.values() for key in options}
    assert {*inspect.signature(lesa.evaluate).parameters} == tried | {"out_dir", "progress", "search_samples"}
