import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import lesa
from lesa import cli
from lesa.cli.arguments import QUALITIES as OFFERED
from lesa.demo import digits
from lesa.inputs import write_inputs
from lesa.schedule import QUALITIES
from lesa.training.training_run import Training
from lesa_kernels import FusedKANPredictor, PredictorConfig

pytestmark = pytest.mark.usefixtures("settings_of_the_command")

MODEL = str(digits.PIPELINE_DIR)
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with inputs, a recording and a predictor, made by the command itself."""
    folder = tmp_path_factory.mktemp("lesa")
    write_inputs(folder / "inputs.safetensors", digits.inputs_for([3, 8, 1, 0]))
    write_inputs(folder / "two.safetensors", digits.inputs_for([5, 6]))
    (folder / "prompts.jsonl").write_text('"a digit"\n')
    run = f"--model {MODEL} --inputs {folder}/inputs.safetensors --steps {STEPS} --batch-size 4 --device cpu"
    cli.main(["record", *run.split(), "--out", f"{folder}/recording", "--tokens-per-sample", "16"])
    shape = "--schedule 0,1,4,8 --rank 2 --hidden 4 --history-length 3 --stage-bounds 0.5 --epochs 2 --device cpu"
    cli.main(["train", "--trajectories", f"{folder}/recording", "--out", f"{folder}/mine", *shape.split()])
    return folder


def refused(capsys, *arguments) -> str:
    """The one line on stderr with which the command refuses these arguments."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("lesa: warning")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("lesa: error: ")
    return lines[0]


def test_help_needs_no_torch():
    script = """
import sys
from lesa.cli import main
try:
    main(["train", "--help"])
finally:
    print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--schedule" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "command", ["demo", "fit", "record", "train", "refine", "generate", "evaluate", "report", "estimate", "env"]
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: lesa {command}" in capsys.readouterr().out


def test_refine_goes_on_with_what_was_recorded(folder, tmp_path, capsys):
    run = f"--model {MODEL} --inputs {folder}/inputs.safetensors --batch-size 4 --device cpu --rounds 1 --epochs 1"
    where = ["--predictor", f"{folder}/mine", "--trajectories", f"{folder}/recording", "--out", str(tmp_path / "out")]
    cli.main(["refine", *run.split(), *where])
    assert f"Wrote the refined predictor to {tmp_path / 'out'}" in capsys.readouterr().out
    refined = FusedKANPredictor.from_pretrained(tmp_path / "out")
    assert refined.config.schedule == (0, 1, 4, 8)
    other = ["refine", *run.replace("inputs.", "two.").split(), *where[:-1], str(tmp_path / "other")]
    assert "`--inputs` must be what the trajectories were recorded with" in refused(capsys, *other)


def test_record_writes_a_recording(folder):
    trajectories = lesa.Trajectories(folder / "recording")
    assert len(trajectories) == 4
    assert trajectories[0].features.shape == (STEPS, 16, 128)


def test_train_writes_the_predictor_that_was_asked_for(folder):
    config = FusedKANPredictor.from_pretrained(folder / "mine").config
    assert config.schedule == (0, 1, 4, 8)
    assert (config.mixer, config.rank, config.hidden, config.history_length) == ("newton", 2, 4, (3, 3))
    assert (config.stage_bounds, config.family, config.num_inference_steps) == ((0.5,), "flux", STEPS)


def test_train_makes_a_dense_predictor_with_an_interval(folder, tmp_path):
    shape = "--mixer dense --hidden 4 --history-length 2,3,3 --schedule 5 --epochs 1 --device cpu"
    cli.main(["train", "--trajectories", f"{folder}/recording", "--out", f"{tmp_path}/dense", *shape.split()])
    config = FusedKANPredictor.from_pretrained(tmp_path / "dense").config
    assert (config.mixer, config.history_length, config.schedule) == ("dense", (2, 3, 3), (0, 1, 2, 7))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--mixer lesa --option streams=3", "`--option['streams']` must be .* at most 2, but got 3"),
        ("--mixer lesa --option order=2", "`--option` must hold 'streams' for 'lesa', but got 'order'"),
        ("--option streams=2", "`--option` must hold nothing for 'newton', but got 'streams'"),
    ],
)
def test_train_names_the_option_that_the_mixer_does_not_have(folder, tmp_path, capsys, words, said):
    line = refused(capsys, "train", "--trajectories", folder / "recording", "--out", tmp_path / "no", *words.split())
    assert re.search(said.replace("[", r"\[").replace("]", r"\]"), line), line


def test_train_without_options_leaves_the_choices_to_the_library(folder, tmp_path, monkeypatch, capsys):
    seen = {}

    def train(trajectories, config, schedule, **options):
        seen.update(config=config, schedule=schedule, **options)
        return FusedKANPredictor.from_pretrained(folder / "mine")

    monkeypatch.setattr(lesa, "train", train, raising=False)
    cli.main(["train", "--trajectories", str(folder / "recording"), "--out", str(tmp_path), "--device", "cpu"])
    assert seen == {"config": None, "schedule": None, "out_dir": tmp_path, "seed": 0, "device": "cpu"}
    assert f"to {tmp_path}" in capsys.readouterr().out


def test_generate_writes_numbered_pictures_and_says_what_was_computed(folder, tmp_path, capsys):
    arguments = ["generate", "--model", MODEL, "--predictor", folder / "mine", "--inputs", folder / "two.safetensors"]
    output = tmp_path / "new" / "digit.png"
    cli.main([*map(str, arguments), "--steps", str(STEPS), "--seed", "5", "--output", str(output), "--device", "cpu"])
    files = [output.with_name(f"digit-0000{i}.png") for i in (0, 1)]
    assert sorted(output.parent.iterdir()) == files
    pictures = [np.asarray(Image.open(file)) for file in files]
    assert all(picture.shape == (16, 16, 3) for picture in pictures)
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 5
    out = capsys.readouterr().out
    assert f"Wrote {files[1]}: 4 of {STEPS} steps computed" in out
    assert "computed 4 (0,1,4,8), predicted 8 steps" in out


def test_generate_needs_no_predictor(tmp_path, capsys):
    write_inputs(tmp_path / "one.safetensors", digits.inputs_for([3]))
    words = f"generate --model {MODEL} --inputs {tmp_path}/one.safetensors --output {tmp_path}/x.png --steps 10"
    cli.main([*words.split(), "--device", "cpu", "--computed", "4"])
    out = capsys.readouterr().out
    assert "4 of 10 steps computed" in out and "the forecaster is 'universal', and 4 of 10 steps" in out
    assert (tmp_path / "x.png").stat().st_size > 100
    with_tolerance = [*words.split(), "--device", "cpu", "--tolerance", "1"]
    assert "`--tolerance` needs a predictor whose config has typical errors" in refused(capsys, *with_tolerance)


def test_the_qualities_of_the_command_are_those_of_the_library():
    assert tuple(QUALITIES) == OFFERED


@pytest.mark.slow
def test_generate_says_how_many_steps_the_run_had(folder, tmp_path, capsys):
    sigmas = [1.0, 0.6, 0.3]
    write_inputs(tmp_path / "own.safetensors", [{**digits.inputs_for([3])[0], "sigmas": sigmas}])
    words = f"generate --model {MODEL} --predictor {folder}/mine --device cpu --output {tmp_path}/x.png --steps {STEPS}"
    inputs = ["--inputs", f"{tmp_path}/own.safetensors"]
    cli.main([*words.split(), *inputs, "--schedule", "0,2"])
    assert "x.png: 2 of 3 steps computed" in capsys.readouterr().out
    cli.main([*words.split(), *inputs, "--steps", "2", "--schedule", "0,2"])  # --steps does not count here
    assert "x.png: 2 of 3 steps computed" in capsys.readouterr().out


def test_generate_chooses_steps_by_a_tolerance(folder, tmp_path, monkeypatch, capsys):
    seen, enable_cache = [], lesa.enable_cache

    def spy(pipe, predictor, schedule, **options):
        seen.append(schedule)
        return enable_cache(pipe, predictor, schedule, **options)

    monkeypatch.setattr(lesa, "enable_cache", spy, raising=False)
    arguments = ["generate", "--model", MODEL, "--predictor", folder / "mine", "--inputs", folder / "two.safetensors"]
    options = ["--steps", STEPS, "--tolerance", "0.001", "--output", tmp_path / "x.png", "--device", "cpu"]
    cli.main([str(argument) for argument in (*arguments, *options)])
    assert seen == [lesa.ErrorControl(0.001)]
    computed = re.findall(r"([0-9]+) of 12 steps computed", capsys.readouterr().out)
    assert len(computed) == 2 and min(map(int, computed)) > 4  # as `mine` was trained


def test_train_for_control_says_so_to_the_library(folder, tmp_path, monkeypatch):
    seen = {}

    def train(trajectories, config, schedule, **options):
        seen.update(options)
        return FusedKANPredictor.from_pretrained(folder / "mine")

    monkeypatch.setattr(lesa, "train", train, raising=False)
    arguments = ["--trajectories", str(folder / "recording"), "--out", str(tmp_path), "--device", "cpu"]
    cli.main(["train", *arguments, "--controlled"])
    assert seen["controlled"] is True


def test_generate_with_every_step_computed_equals_the_plain_pipeline(folder, tmp_path):
    steps = ",".join(map(str, range(6)))
    arguments = ["generate", "--model", MODEL, "--predictor", folder / "mine", "--inputs", folder / "two.safetensors"]
    options = ["--steps", "6", "--seed", "5", "--schedule", steps, "--output", tmp_path / "x.png", "--device", "cpu"]
    cli.main([str(argument) for argument in (*arguments, *options)])
    generator = torch.Generator().manual_seed(6)
    plain = digits.load_pipeline()(**digits.inputs_for([6])[0], num_inference_steps=6, generator=generator).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x-00001.png")), np.asarray(plain))


def test_evaluate_writes_summary_and_picture(folder, tmp_path, capsys):
    arguments = f"--model {MODEL} --inputs {folder}/two.safetensors --steps {STEPS} --seed 5 --batch-size 2".split()
    against = f"--device cpu --predictor {folder}/mine --against steps,steps-3,taylorseer-6 --out {tmp_path}/results"
    cli.main(["evaluate", *arguments, *against.split(), "--search-samples", "1"])
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    runs = {run["name"]: run for run in summary["runs"]}
    assert runs["newton-4"]["steps"] == [0, 1, 4, 8]
    assert all(runs[name]["computed_steps"] <= 6 for name in runs if name.startswith("taylorseer"))
    assert summary["searched"]["taylorseer"]["samples"] == 1
    assert {"reference", "fewer-steps-4", "fewer-steps-3"} < set(runs)
    assert (summary["samples"], summary["seed"], summary["batch_size"]) == (2, 5, 2)
    out = capsys.readouterr().out
    assert "newton-4" in out
    assert f"Wrote {tmp_path}/results/comparison.png and {tmp_path}/results/summary.json" in out
    assert Image.open(tmp_path / "results" / "comparison.png").size[0] > 600


def test_demo_export_prints_one_command_and_then_the_path_by_hand(tmp_path, capsys):
    cli.main(["demo", "--export", str(tmp_path)])
    out = capsys.readouterr().out
    assert (tmp_path / "model" / "model_index.json").is_file()
    commands = [line.split()[1] for line in out.splitlines() if line.startswith("  lesa ")]
    assert commands == ["fit", "record", "train", "refine", "generate", "evaluate"]


def test_env_prints_the_versions(capsys):
    cli.main(["env"])
    out = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in out
    assert "diffusers" in out


GENERATE = ("generate", "--model", MODEL, "--device", "cpu", "--output", "x.png")
PROMPT = (*GENERATE, "--predictor", "p", "--prompt", "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "arguments are required: command"),
        (("paint",), "invalid choice: 'paint'"),
        (("record", "--model", MODEL), "--inputs, --out"),
        ((*GENERATE, "--predictor", "p"), "one of the arguments --inputs --prompt is required"),
        ((*PROMPT, "--steps", "0"), "--steps: must be an integer of at least 1"),
        ((*PROMPT, "--seed", "-1"), "--seed: must be an integer of at least 0"),
        ((*PROMPT, "--schedule", "x"), "--schedule: must be an interval such as 7"),
        ((*PROMPT, "--schedule", "0,5,3"), "--schedule: must be rising steps"),
        ((*PROMPT, "--schedule", "0"), "--schedule: must be an interval"),
        (
            (*PROMPT, "--schedule", "0,60", "--steps", "50"),
            "--schedule: each step must be below --steps (50), but got 60",
        ),
        ((*PROMPT, "--tolerance", "0"), "--tolerance: must be a number above 0"),
        ((*PROMPT, "--tolerance", "high"), "--tolerance: must be a number above 0"),
        ((*PROMPT, "--tolerance", "1", "--schedule", "7"), "--schedule: not allowed with argument --tolerance"),
        (("train", "--trajectories", "no/such/folder", "--out", "o"), "no/such/folder"),
        (("train", "--trajectories", "t", "--out", "o", "--stage-bounds", "high"), "--stage-bounds: must be falling"),
        (("train", "--trajectories", "t", "--out", "o", "--mixer", "mlp"), "--mixer: invalid choice: 'mlp'"),
        ((*GENERATE, "--predictor", "no-such-folder", "--prompt", "a"), "there is no folder 'no-such-folder'"),
        ((*GENERATE[:-1], "x.txt", "--predictor", "p", "--prompt", "a"), "--output: x.txt must end in"),
        (("record", "--model", "./nowhere", "--inputs", "i.jsonl", "--out", "o"), "no folder './nowhere'"),
        (("record", "--model", MODEL, "--inputs", "no.jsonl", "--out", "o", "--device", "cpu"), "no.jsonl"),
        (
            ("record", "--model", MODEL, "--inputs", "i", "--out", "o", "--device", "abacus"),
            "`--device` must be one on which",
        ),
    ],
)
def test_bad_options_and_missing_files_are_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_prompts_for_a_model_without_text_encoders_name_the_remedy(folder, capsys):
    line = refused(capsys, *GENERATE, "--predictor", folder / "mine", "--prompt", "a digit")
    assert "no text encoder (text_encoder, text_encoder_2)" in line
    assert "--inputs" in line
    record = (
        "record",
        "--model",
        MODEL,
        "--inputs",
        folder / "prompts.jsonl",
        "--out",
        folder / "o",
        "--device",
        "cpu",
    )
    assert "no text encoder" in refused(capsys, *record)


def test_arguments_that_the_pipeline_does_not_know_are_named(folder, tmp_path, capsys):
    write_inputs(tmp_path / "odd.safetensors", [{**item, "colour": "red"} for item in digits.inputs_for([1])])
    line = refused(capsys, *GENERATE, "--predictor", folder / "mine", "--inputs", tmp_path / "odd.safetensors")
    assert "FluxPipeline has no argument colour" in line


@pytest.mark.parametrize(
    ("config", "field"),
    [({"feature_dim": 64, "family": "flux"}, "feature_dim"), ({"feature_dim": 128, "family": "qwen-image"}, "family")],
)
def test_mismatched_predictors_are_refused_by_field(folder, tmp_path, capsys, config, field):
    FusedKANPredictor(PredictorConfig(**config)).save_pretrained(tmp_path / "p")
    for command in (GENERATE, ("evaluate", "--model", MODEL, "--out", tmp_path / "out", "--device", "cpu")):
        line = refused(capsys, *command, "--predictor", tmp_path / "p", "--inputs", folder / "two.safetensors")
        assert f"`--predictor` (config.{field}) must be" in line
    output = tmp_path / "new" / "x.png"
    options = ("--predictor", tmp_path / "p", "--inputs", folder / "two.safetensors", "--output", output)
    refused(capsys, *GENERATE[:-2], *options)
    assert not output.parent.exists()


def test_arguments_that_the_pipeline_refuses_are_one_line(folder, tmp_path, capsys):
    write_inputs(tmp_path / "half.safetensors", [{"prompt_embeds": digits.inputs_for([1])[0]["prompt_embeds"]}])
    line = refused(capsys, *GENERATE, "--predictor", folder / "mine", "--inputs", tmp_path / "half.safetensors")
    assert "`pooled_prompt_embeds` also have to be passed" in line


def test_broken_predictor_files_are_one_line(folder, tmp_path, capsys):
    FusedKANPredictor(PredictorConfig(128)).save_pretrained(tmp_path / "p")
    weights = tmp_path / "p" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = refused(capsys, *GENERATE, "--predictor", tmp_path / "p", "--inputs", folder / "two.safetensors")
    assert "must hold a readable model.safetensors" in line


@pytest.mark.parametrize("bug", [lambda self, path: len(None), lambda self, path: int("x")], ids=["type", "value"])
def test_bugs_keep_their_traceback(folder, monkeypatch, bug):
    monkeypatch.setattr(lesa.Trajectories, "__init__", bug)
    with pytest.raises((TypeError, ValueError), match="NoneType|invalid literal"):
        cli.main(["train", "--trajectories", str(folder / "recording"), "--out", str(folder / "o")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "meta"), "`--device` must be one on which torch can compute"),
        (("--rank", "1000000000", "--device", "cpu"), "can't allocate memory"),
        (("--rank", "2147483647", "--device", "cpu"), "error: "),
    ],
)
def test_what_no_machine_can_do_is_one_line(folder, tmp_path, capsys, options, message):
    words = ("train", "--trajectories", folder / "recording", "--out", tmp_path / "o", "--epochs", "1", *options)
    with pytest.raises(SystemExit) as exit:
        cli.main([str(word) for word in words])
    assert exit.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]  # above it, the bar of a training that began
    assert line.startswith("lesa: error: ") and message in line


@pytest.mark.parametrize(("command", "resumes"), [("train", True), ("env", False)])
def test_an_interrupt_ends_with_130_and_says_how_to_resume(folder, monkeypatch, capsys, command, resumes):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lesa, "train", interrupted, raising=False)
    monkeypatch.setattr("lesa_kernels.env_report.main", interrupted)
    more = ["--trajectories", str(folder / "recording"), "--out", str(folder / "o")] if resumes else []
    with pytest.raises(SystemExit) as exit:
        cli.main([command, *more])
    assert exit.value.code == 130
    err = capsys.readouterr().err
    assert err.startswith("lesa: interrupted")
    assert ("continues where it stopped" in err) == resumes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "24"), "`--epochs` must be 2, as in the unfinished training"),
        (("--controlled",), "`--controlled` must be False, as in"),
        (("--rank", "3"), "`--rank` must be 2, as in"),
        (("--schedule", "0,1,5"), "`--schedule` must be (0, 1, 4, 8), as in"),
        (("--seed", "4"), "`--seed` must be 0, as in"),
        (("--stage-bounds", "0.6,0.3"), "`--stage-bounds` must be (0.5,), as in"),
        (("--history-length", "0"), "`--history-length` must be an integer of at least 1"),
        (("--stage-bounds", "0.3,0.6"), "`--stage-bounds` must fall strictly"),
        (("--budget", "3"), "`--schedule` and `--budget` cannot both be given"),
        (("--mixer", "dense", "--stage-bounds", "auto"), "`--mixer` must be 'newton'"),
    ],
)
def test_errors_of_train_name_its_options(folder, tmp_path, monkeypatch, capsys, arguments, message):
    shape = "--schedule 0,1,4,8 --rank 2 --hidden 4 --history-length 3 --stage-bounds 0.5 --epochs 2 --device cpu"
    train = ["train", "--trajectories", f"{folder}/recording", "--out", f"{tmp_path}/mine", *shape.split()]

    def stop(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Training, "finish", stop)
        cli.main(train)
    capsys.readouterr()
    assert message in refused(capsys, *train, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--output", "x.png"), "`--predictor` must be a folder or a hub id"),
        (("evaluate", "--out", "o"), "`--predictor` must be a folder or a hub id"),
        (("refine", "--trajectories", "t", "--out", "o"), "`--predictor` must be a folder or a hub id"),
    ],
)
def test_a_missing_predictor_is_named_by_its_option(folder, capsys, arguments, message):
    model = ("--model", MODEL, "--device", "cpu", "--inputs", folder / "two.safetensors")
    assert message in refused(capsys, *arguments, *model, "--predictor", "/nowhere/p")


def test_evaluate_needs_a_predictor_or_budgets(folder, capsys):
    words = ("evaluate", "--model", MODEL, "--inputs", folder / "two.safetensors", "--out", "o", "--steps", "4")
    message = "argument --predictor: without a predictor, linear has no budget. Give a predictor, or write --against "
    assert f"{message}linear-4." in refused(capsys, *words, "--against", "steps-2,linear")


def test_errors_of_record_and_estimate_name_their_options(folder, capsys):
    record = ("record", "--model", MODEL, "--device", "cpu", "--steps", STEPS)
    record += ("--tokens-per-sample", "16", "--out", folder / "recording")
    assert "`--inputs (samples)` must be 4, as in" in refused(capsys, *record, "--inputs", folder / "two.safetensors")
    small = refused(capsys, "estimate", "--model", "flux-1024", "--height", "3")
    assert "`--height` and `--width` must be at least 16, but got 3 and 1024" in small
    assert "--bandwidth: must be a number above 0, but got '-3'" in refused(
        capsys, "estimate", "--model", "flux-1024", "--bandwidth", "-3"
    )
