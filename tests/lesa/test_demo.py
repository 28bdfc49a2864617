import argparse
import json
import shlex

import pytest
import torch
from diffusers import FluxPipeline

from lesa import cli
from lesa.cli import demo
from lesa.demo import digits, few_step
from lesa.demo.run import DEMOS, SCHEDULES, SEED, TAYLORSEER, TEST_SAMPLES, TRAINING_SAMPLES, export, run_demo
from lesa.inputs import read_inputs
from lesa.pipelines import load_pipeline
from lesa.schedule import as_schedule
from lesa_kernels import FusedKANPredictor


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder")
    return folder, export(folder)


def test_the_command_knows_every_model():
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    (model,) = (action for action in parser._actions if action.dest == "model")
    assert model.choices == (*DEMOS,) and all(f"{name}: " in model.help for name in DEMOS)


def test_export_writes_the_model(exported, generate):
    folder, _ = exported
    pipe = load_pipeline(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is FluxPipeline
    assert torch.equal(generate(pipe, steps=2), generate(digits.load_pipeline(), steps=2))


def test_export_writes_the_inputs(exported):
    folder, _ = exported
    for name, count in {"inputs": TRAINING_SAMPLES, "prompts": 10, "test-inputs": TEST_SAMPLES}.items():
        inputs = read_inputs(folder / f"{name}.safetensors")
        expected = digits.inputs_for([number % 10 for number in range(count)])
        assert len(inputs) == count
        assert inputs[-1].keys() == expected[-1].keys()
        assert torch.equal(inputs[-1]["prompt_embeds"], expected[-1]["prompt_embeds"])
        assert (inputs[0]["height"], inputs[0]["width"]) == (16, 16)


def test_export_names_commands_that_the_command_line_takes(exported):
    folder, commands = exported
    parsed = [cli.parse(shlex.split(command)[1:]) for command in commands]
    fit, record, train, refine, generate, evaluate = parsed
    assert fit.inputs == record.inputs == refine.inputs == folder / "inputs.safetensors"
    assert record.out == train.trajectories == refine.trajectories
    assert str(train.out) == refine.predictor
    assert str(refine.out) == generate.predictor == evaluate.predictor[0]
    assert train.schedule == list(SCHEDULES[9]) and fit.budget == 9
    assert fit.model == record.model and not fit.out.exists()
    assert generate.seed == evaluate.seed == SEED


@pytest.mark.parametrize("model", tuple(DEMOS))
def test_bundled_predictors_are_those_that_the_demo_names(model):
    for name, (mixer, schedule) in DEMOS[model].predictors.items():
        config = FusedKANPredictor.from_pretrained(digits.WEIGHTS / name).config
        steps = DEMOS[model].num_inference_steps
        assert (config.mixer, config.num_inference_steps) == (mixer, steps)
        assert config.schedule == as_schedule(schedule, steps).steps
        assert (config.schedule_errors is None) == (mixer == "dense")


@pytest.mark.slow
def test_a_student_draws_like_its_updates_in_diffusers(generate):
    pytest.importorskip("peft")
    student, plain = few_step.load_pipeline(steps=4), digits.load_pipeline()
    plain.load_lora_weights(few_step.file_of(4))
    assert torch.allclose(generate(student, steps=2), generate(plain, steps=2), atol=1e-5)
    with pytest.raises(ValueError, match="`steps` must be one of 8, 4, but got 6"):
        few_step.load_pipeline(steps=6)


@pytest.mark.slow
def test_export_of_a_student(tmp_path, generate):
    commands = export(tmp_path / "out", "few-step")
    parsed = [cli.parse(shlex.split(command)[1:]) for command in commands]
    assert [options.steps for options in parsed if "steps" in options] == [8, 8, 8, 8]
    assert parsed[0].budget == 6 and parsed[2].schedule == list(DEMOS["few-step"].schedules[6])
    pipe = load_pipeline(tmp_path / "out" / "model")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(generate(pipe, steps=2), generate(few_step.load_pipeline(), steps=2))


def test_taylorseer_settings_have_the_demo_s_budgets():
    assert [setting.computed_in(50) for setting in TAYLORSEER] == [10, 10, 8, 8]


@pytest.mark.slow
def test_demo_with_the_bundled_predictors(tmp_path):
    evaluation = run_demo(tmp_path, num_samples=2, progress=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    computed = {run["name"]: run["computed_steps"] for run in summary["runs"]}
    assert computed == {
        "reference": 50,
        "newton-9": 9,
        "newton-8": 8,
        "dense-9": 9,
        "universal-9": 9,
        **{str(setting): setting.computed_in(50) for setting in TAYLORSEER},
        "fewer-steps-9": 9,
        "fewer-steps-8": 8,
    }
    taylorseer = {run.computed_steps: run.psnr for run in evaluation.shown if run.name.startswith("taylorseer")}
    # Measured on these two samples: 9.0, 5.5 and 12.2 dB.
    assert evaluation["newton-9"].psnr > taylorseer[10] + 6
    assert evaluation["universal-9"].psnr > evaluation["fewer-steps-9"].psnr + 3
    assert evaluation["newton-8"].psnr > taylorseer[8] + 8
    assert taylorseer[10] > evaluation["fewer-steps-9"].psnr
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.slow
def test_demo_of_a_student(tmp_path):
    evaluation = run_demo(tmp_path, num_samples=2, progress=False, model="few-step")
    assert evaluation["reference"].num_inference_steps == 8
    assert evaluation["newton-6"].psnr > evaluation["universal-6"].psnr
    assert evaluation["newton-6"].psnr > evaluation["fewer-steps-6"].psnr


def test_export_overwrites_nothing(tmp_path):
    (tmp_path / "inputs.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="`out_dir` must be empty or absent, but got files in"):
        export(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["inputs.safetensors"]
    assert (tmp_path / "inputs.safetensors").read_bytes() == b"mine"
