"""Malformed command lines and files: each is refused by one line that names the option, or file, line and key."""

import inspect
import json
import re
import shlex
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lesa
import lesa.cli.loading
from lesa import cli
from lesa.demo import digits
from lesa.demo.run import export
from lesa.pipelines import load_pipeline
from lesa_kernels import FusedKANPredictor, PredictorConfig

pytestmark = pytest.mark.usefixtures("settings_of_the_command")

MODEL = str(digits.PIPELINE_DIR)

CALLED = (lesa.record, lesa.train, lesa.refine, lesa.evaluate, lesa.estimate, lesa.report, load_pipeline, export)
PYTHON_ONLY = {
    *(name for function in CALLED for name in inspect.signature(function).parameters if "_" in name),
    *(name for name in inspect.signature(FusedKANPredictor.from_pretrained).parameters if name != "budget"),
    "requested_num_inference_steps",
}
"""Names that mean nothing to someone who uses the commands."""


def embeddings(rows=1, width=64, pooled=64):
    return {"prompt_embeds": torch.zeros(rows, 1, width), "pooled_prompt_embeds": torch.zeros(rows, pooled)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Predictors, and folders and files with faults. `{}` below stands for it."""
    folder = tmp_path_factory.mktemp("malformed")
    shape = {"rank": 1, "hidden": 2, "schedule": (0, 7), "schedule_sigmas": (1.0, 0.8), "num_inference_steps": 50}
    FusedKANPredictor(PredictorConfig(128, **shape)).save_pretrained(folder / "p")
    FusedKANPredictor(PredictorConfig(128, rank=1, hidden=2)).save_pretrained(folder / "untrained")
    FusedKANPredictor(PredictorConfig(64, family="flux", **shape)).save_pretrained(folder / "narrow")
    FusedKANPredictor(PredictorConfig(128, family="sd3", **shape)).save_pretrained(folder / "sd3")
    for name, contents in {"list": "[]", "newer": '{"format_version": 99}', "cut": '{"rank": '}.items():
        FusedKANPredictor(PredictorConfig(128, **shape)).save_pretrained(folder / name)
        (folder / name / "config.json").write_text(contents)
    FusedKANPredictor(PredictorConfig(128, **shape)).save_pretrained(folder / "weights")
    (folder / "weights" / "model.safetensors").write_bytes((folder / "narrow" / "model.safetensors").read_bytes())
    (folder / "empty").mkdir()
    for name, index in {
        "no-json": "{",
        "no-class": '{"_class_name": "PipelineOfNobody"}',
        "no-dict": "[]",
        "no-parts": '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}',
    }.items():
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(index)
    flux = '{"_class_name": "FluxTransformer2DModel", '
    for name, contents in {
        "unet": '{"_class_name": "UNet2DConditionModel"}',
        "no-object": "[]",
        "texts": flux + '"num_layers": "19"}',
        "zero": flux + '"patch_size": 0}',
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(contents)
    (folder / "a-file").write_text("x")
    (folder / "manifest").mkdir()
    (folder / "manifest" / "manifest.json").write_text("{}")
    (folder / "summary").mkdir()
    (folder / "summary" / "summary.json").write_text("{")
    save_file(embeddings(width=32), folder / "width.safetensors")
    save_file(embeddings(pooled=32), folder / "pooled.safetensors")
    save_file({**embeddings(), "prompt_embeds": torch.zeros(1, 64)}, folder / "rank.safetensors")
    save_file({"prompt_embeds": torch.zeros(1, 1, 64)}, folder / "half.safetensors")
    save_file(embeddings(), folder / "odd.safetensors", {"colour": '"red"'})
    save_file(embeddings(), folder / "words.safetensors", {"guidance_scale": "high"})
    save_file(embeddings(), folder / "nan.safetensors", {"guidance_scale": "NaN"})
    save_file(embeddings(), folder / "text.safetensors", {"height": '"16"'})
    save_file(embeddings(), folder / "fine.safetensors")
    broken = embeddings()
    broken["pooled_prompt_embeds"][0, 3] = float("nan")
    save_file(broken, folder / "no-number.safetensors")
    save_file({**embeddings(), "prompt_embeds": torch.full((1, 1, 64), float("inf"))}, folder / "inf.safetensors")
    save_file({**embeddings(), "prompt_embeds": torch.full((1, 1, 64), 1e6)}, folder / "large.safetensors")
    save_file(embeddings(), folder / "negative.safetensors", {"negative_prompt": '"blurry"'})
    save_file(embeddings(), folder / "sigmas.safetensors", {"sigmas": "[1.0, 0.5]"})
    save_file(embeddings(2), folder / "two.safetensors")
    (folder / "taken-00001.png").mkdir()
    save_file({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, folder / "rows.safetensors")
    save_file({"a": torch.zeros(())}, folder / "scalar.safetensors")
    save_file({}, folder / "none.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "fine.safetensors").read_bytes()[:100])
    (folder / "huge.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / "cat.png")
    (folder / "cut.png").write_bytes((folder / "cat.png").read_bytes()[:40])
    return folder


GENERATE = f"generate --model {MODEL} --device cpu --predictor {{}}/p"
PROMPT = f"{GENERATE} --prompt a --output x.png"
RECORD = f"record --model {MODEL} --device cpu --out new"
TRAIN = "train --trajectories {}/manifest --out new"
ESTIMATE = "estimate --model flux-1024"
EVALUATE = f"evaluate --model {MODEL} --device cpu --out new --predictor {{}}/p --inputs {{}}/fine.safetensors"

LINES = [
    (f"{TRAIN} --mixer lesa --option streams", "--option: must be a name and a number such as streams=2"),
    (f"{TRAIN} --mixer lesa --option =2", "--option"),
    (f"{TRAIN} --mixer lesa --option streams=two", "--option"),
    # words and options
    ("", "arguments are required: command"),
    ("paint", "invalid choice: 'paint'"),
    ("generate", "--model"),
    (f"{PROMPT} --colour red", "--colour"),
    (f"{PROMPT} extra", "extra"),
    (f"{PROMPT} --inputs i.jsonl", "--inputs: not allowed with argument --prompt"),
    (f"{PROMPT} --steps", "--steps"),
    (f"{PROMPT} --steps 0", "--steps"),
    (f"{PROMPT} --steps 1e3", "--steps"),
    (f"{PROMPT} --steps ٠", "--steps"),
    (f"{PROMPT} --seed ²", "--seed"),
    (f"{PROMPT} --seed -1", "--seed"),
    (f"{PROMPT} --seed 99999999999999999999", "--seed"),
    (f"{PROMPT} --height 1.5", "--height"),
    (f"{PROMPT} --width -8", "--width"),
    (f"{PROMPT} --width 99999999999", "--width"),
    (f"{PROMPT} --fps 0", "--fps"),
    (f"{PROMPT} --fps nan", "--fps"),
    (f"{PROMPT} --fps 1e-9", "--fps"),
    (f"{PROMPT} --fps 1000", "--fps"),
    (f"{PROMPT} --fps 24", "--fps"),
    (f"{PROMPT} --dtype float64", "--dtype"),
    (f"{PROMPT} --tolerance inf", "--tolerance"),
    (f"{PROMPT} --tolerance 1 --schedule 7", "--schedule: not allowed with argument --tolerance"),
    (f"{PROMPT} --schedule ,", "--schedule"),
    (f"{PROMPT} --schedule 0,,5", "--schedule"),
    (f"{PROMPT} --schedule 0", "--schedule"),
    (f"{PROMPT} --schedule -7", "--schedule"),
    (f"{PROMPT} --schedule 0,5,5", "--schedule"),
    (f"{PROMPT} --schedule 1,5", "--schedule"),
    (f"{PROMPT} --schedule 0,5.0", "--schedule"),
    (f"{PROMPT} --schedule 0,50", "--schedule: each step must be below --steps (50), but got 50"),
    (f"{PROMPT} --device abacus", "--device"),
    (f"{PROMPT} --device cuda:99", "--device"),
    (f"{PROMPT} --device cpu:x", "--device"),
    (f"{TRAIN} --mixer mlp", "--mixer"),
    (f"{TRAIN} --rank -1", "--rank"),
    (f"{TRAIN} --hidden 0", "--hidden"),
    (f"{TRAIN} --history-length 4,x", "--history-length"),
    (f"{TRAIN} --stage-bounds high", "--stage-bounds"),
    (f"{TRAIN} --stage-bounds 0.5,nan", "--stage-bounds"),
    (f"{TRAIN} --budget 0", "--budget"),
    (f"{TRAIN} --epochs many", "--epochs"),
    (f"{EVALUATE} --search-samples 0", "--search-samples"),
    (f"{EVALUATE} --batch-size 0", "--batch-size"),
    (f"{EVALUATE} --against steps,nobody", "--against"),
    (f"{EVALUATE} --against steps-0", "--against"),
    (f"{EVALUATE} --against ,", "--against"),
    (f"{EVALUATE} --against steps-9 --steps 8", "`--against` has 'steps-9', but the run has 8 steps (`--steps`)"),
    (f"{EVALUATE} --against taylorseer-51", "`--against` has 'taylorseer-51'"),
    (f"{EVALUATE} --predictor {{}}/p", "argument --predictor: {}/p is given twice"),
    (f"{EVALUATE} --predictor {{}}/../{{name}}/p", "is given twice"),
    (f"{EVALUATE} --device meta", "`--device` must be"),
    (f"{GENERATE} --inputs {{}}/fine.safetensors --output x.png --device meta", "`--device` must be"),
    (f"{EVALUATE} --inputs {{}}/sigmas.safetensors", "sigmas.safetensors, row 0` must have as many noise levels as"),
    (
        f"{GENERATE} --inputs {{}}/sigmas.safetensors --output x.png --schedule 0,2",
        "--schedule: each step must be below the 2 steps of sigmas.safetensors, row 0, but got 2",
    ),
    # nothing where a name is needed
    (f"{PROMPT} --model ''", "--model"),
    (f"{PROMPT} --predictor ''", "--predictor"),
    (f"{PROMPT} --output ''", "--output"),
    (f"{RECORD} --out '' --inputs {{}}/fine.safetensors", "--out"),
    (f"{RECORD} --inputs ''", "--inputs"),
    ("train --trajectories '' --out new", "--trajectories"),
    ("report --evaluation ''", "--evaluation"),
    ("report --evaluation {}/summary --out ''", "--out"),
    ("estimate --model ''", "--model"),
    (f"{ESTIMATE} --predictor ''", "--predictor"),
    (f"{ESTIMATE} --device TPU", "--device"),
    (f"{ESTIMATE} --height 3", "--height"),
    (f"{ESTIMATE} --efficiency 2", "--efficiency"),
    (f"{ESTIMATE} --bandwidth -3", "--bandwidth"),
    (f"{ESTIMATE} --price free", "--price"),
    (f"{ESTIMATE} --dtype int8", "--dtype"),
    (f"{ESTIMATE} --schedule 0,1,99", "--schedule"),
    (f"{ESTIMATE} --schedule 0,8,12 --steps 12", "--schedule"),
    ("demo --model birds", "--model"),
    ("demo --out {}/a-file", "--out"),
    ("train --trajectories {}/manifest --out {}/a-file", "--out"),
    ("demo --out a --export b", "--export"),
    ("demo --export {}/p", "--export"),
    ("demo --export {}/a-file", "--export"),
    ("env --json", "--json"),
    # files and folders that are not there, or not what they must be
    ("estimate --model {}/nowhere", "--model"),
    ("estimate --model {}/empty", "--model"),
    ("estimate --model {}/unet", "--model"),
    (f"{ESTIMATE} --predictor {{}}/nowhere", "--predictor"),
    (f"{ESTIMATE} --predictor {{}}/narrow", "--predictor"),
    (f"{ESTIMATE} --predictor {{}}/list", "--predictor"),
    (f"{ESTIMATE} --predictor {{}}/cut", "--predictor"),
    ("train --trajectories {}/nowhere --out new", "--trajectories"),
    ("train --trajectories {}/a-file --out new", "--trajectories"),
    ("train --trajectories {}/empty --out new", "--trajectories"),
    (TRAIN, "--trajectories"),
    ("report --evaluation {}/nowhere", "--evaluation"),
    ("report --evaluation {}/empty", "--evaluation"),
    ("report --evaluation {}/summary", "--evaluation"),
    ("report --evaluation {}/summary --out {}/empty", "--out"),
    ("estimate --model {}/no-object", "--model"),
    ("estimate --model {}/texts", "`--model` must have a number of at least 0 as num_layers"),
    ("estimate --model {}/zero", "`--model` must have a number of at least 1 as patch_size"),
    ("record --model {}/nowhere --inputs i.jsonl --out new", "--model"),
    ("record --model nowhere --inputs i.jsonl --out new", "--model"),
    ("record --model ~/nowhere --inputs i.jsonl --out new", "--model"),
    ("record --model ../now/here --inputs i.jsonl --out new", "--model"),
    ("record --model a/b/c --inputs i.jsonl --out new", "--model"),
    ("record --model {}/a-file --inputs i.jsonl --out new", "--model"),
    (f"{RECORD} --inputs {{}}/nowhere.jsonl", "--inputs"),
    (f"{RECORD} --inputs {{}}", "--inputs"),
    (f"{RECORD} --inputs {{}}/cat.png", "--inputs"),
    (f"generate --model {MODEL} --predictor {{}}/nowhere --prompt a --output x.png", "--predictor"),
    (f"generate --model {MODEL} --predictor nowhere --prompt a --output x.png", "--predictor"),
    (f"generate --model {MODEL} --predictor {{}}/a-file --prompt a --output x.png", "--predictor"),
    (f"generate --model {MODEL} --predictor {{}}/empty --prompt a --output x.png", "--predictor"),
    (f"generate --model {MODEL} --predictor {{}}/newer --prompt a --output x.png", "--predictor"),
    (f"generate --model {MODEL} --predictor {{}}/list --prompt a --output x.png", "--predictor"),
    (f"generate --model {MODEL} --predictor {{}}/weights --prompt a --output x.png", "--predictor"),
    (f"generate --model {MODEL} --predictor {{}}/cut --prompt a --output x.png", "--predictor"),
    # outputs
    *((f"{GENERATE} --prompt a --output {name}", "--output") for name in ("x", "x.txt", "x.psd", "x.XPM", "x.fits")),
    *((f"{GENERATE} --prompt a --output {name}", "--output") for name in ("x.ico", "x.webm", "{}/a-file/x.png", "{}")),
    # tensors
    (f"{RECORD} --inputs {{}}/rows.safetensors", "--inputs"),
    (f"{RECORD} --inputs {{}}/scalar.safetensors", "--inputs"),
    (f"{RECORD} --inputs {{}}/none.safetensors", "--inputs"),
    (f"{RECORD} --inputs {{}}/cut.safetensors", "--inputs"),
    (f"{RECORD} --inputs {{}}/huge.safetensors", "--inputs"),
    (f"{RECORD} --inputs {{}}/odd.safetensors", "odd.safetensors, row 0`: FluxPipeline has no argument colour"),
    (f"{RECORD} --inputs {{}}/words.safetensors", "words.safetensors, metadata 'guidance_scale'"),
    (f"{RECORD} --inputs {{}}/nan.safetensors", "nan.safetensors, metadata 'guidance_scale'"),
    (f"{RECORD} --inputs {{}}/text.safetensors", "text.safetensors, row 0, 'height'"),
    (f"{RECORD} --inputs {{}}/no-number.safetensors", "no-number.safetensors, row 0, 'pooled_prompt_embeds'"),
    (f"{RECORD} --inputs {{}}/inf.safetensors", "inf.safetensors, row 0, 'prompt_embeds'"),
    (f"{GENERATE} --inputs {{}}/two.safetensors --output {{}}/taken.png", "taken-00001.png is a folder"),
]
"""Command lines that are refused before a model is loaded, and what the line must hold."""

LOADED = [
    (f"{PROMPT} --output x.mp4", "--output"),
    (f"{PROMPT} --output x.gif --fps 12", "--fps"),
    (PROMPT, "argument --prompt: this model has no text encoder (text_encoder, text_encoder_2)"),
    (f"{RECORD} --inputs {{}}/width.safetensors", "width.safetensors, row 0, 'prompt_embeds'"),
    (f"{RECORD} --inputs {{}}/pooled.safetensors", "pooled.safetensors, row 0, 'pooled_prompt_embeds'"),
    (f"{RECORD} --inputs {{}}/rank.safetensors", "rank.safetensors, row 0, 'prompt_embeds'"),
    (f"{RECORD} --inputs {{}}/half.safetensors", "half.safetensors, row 0: FluxPipeline refuses it"),
    (f"{RECORD} --inputs {{}}/large.safetensors --dtype float16", "large.safetensors, row 0, 'prompt_embeds'"),
    (f"{RECORD} --inputs {{}}/negative.safetensors", "row 0, 'negative_prompt': this model has no text encoder"),
    (f"{EVALUATE} --predictor {{}}/narrow", "`--predictor` (config.feature_dim)"),
    (f"{EVALUATE} --predictor {{}}/sd3", "`--predictor` (config.family)"),
    (f"{EVALUATE} --predictor {{}}/untrained", "--predictor"),
    (f"{GENERATE} --inputs {{}}/fine.safetensors --predictor {{}}/untrained --output x.png", "--schedule"),
    (f"{GENERATE} --inputs {{}}/fine.safetensors --output x.png --height 1 --width 1", "--height 1 --width 1"),
    ("record --model {}/empty --inputs {}/fine.safetensors --out new --device cpu", "--model"),
    ("record --model {}/no-json --inputs {}/fine.safetensors --out new --device cpu", "--model"),
    ("record --model {}/no-class --inputs {}/fine.safetensors --out new --device cpu", "--model"),
    ("record --model {}/no-dict --inputs {}/fine.safetensors --out new --device cpu", "--model"),
    ("record --model {}/no-parts --inputs {}/fine.safetensors --out new --device cpu", "--model"),
]
"""Command lines that are refused after the model was loaded and before it runs, or by its first step."""

TEXTS = [
    ("a cat", "line 1"),
    ("'a cat'", "line 1"),
    ('"a cat', "line 1"),
    ("3", "line 1"),
    ("null", "line 1"),
    ("[" * 100_000, "line 1"),
    ('{"height": ' + "9" * 5000 + "}", "line 1"),
    ('["a", "b"]', "line of its own"),
    ('[\n"a",\n"b"\n]', "line of its own"),
    ('{\n"prompt": "a"\n}', "line of its own"),
    ("\n \n", "--inputs"),
    ("", "--inputs"),
    ('"a"\n{"prompt": ["a", "b"]}', "line 2, 'prompt'"),
    ('{"prompt": []}', "line 1, 'prompt'"),
    ('{"prompt": "a", "negative_prompt": ["b", "c"]}', "line 1, 'negative_prompt'"),
    ('{"prompt": 3}', "line 1, 'prompt'"),
    ('{"prompt": ["a", 3]}', "line 1, 'prompt'"),
    ('{"prompt": {"a": 1}}', "line 1, 'prompt'"),
    ('{"prompt": true}', "line 1, 'prompt'"),
    ('"\\ud83d"', "line 1, 'prompt'"),
    ('{"prompt": "a", "negative_prompt": "\\udc00"}', "line 1, 'negative_prompt'"),
    ('{"prompt": "a", "guidance_scale": "3.5"}', "line 1, 'guidance_scale'"),
    ('{"prompt": "a", "guidance_scale": true}', "line 1, 'guidance_scale'"),
    ('{"prompt": "a", "guidance_scale": null}', "line 1, 'guidance_scale'"),
    ('{"prompt": "a", "guidance_scale": [3.5]}', "line 1, 'guidance_scale'"),
    ('{"prompt": "a", "guidance_scale": NaN}', "line 1, 'guidance_scale'"),
    ('{"prompt": "a", "guidance_scale": -Infinity}', "line 1, 'guidance_scale'"),
    ('{"prompt": "a", "guidance_scale": 1e999}', "line 1, 'guidance_scale'"),
    ('{"prompt": "a", "height": "512"}', "line 1, 'height'"),
    ('{"prompt": "a", "height": 512.5}', "line 1, 'height'"),
    ('{"prompt": "a", "height": 99999999999999999999}', "line 1, 'height'"),
    ('{"prompt": "a", "sigmas": [1.0, "0.5"]}', "line 1, 'sigmas'"),
    ('{"prompt": "a", "sigmas": []}', "line 1, 'sigmas'"),
    ('"a"\n{"prompt": "a", "height": 0}', "line 2, 'height'"),
    ('{"prompt": "a", "width": -16}', "line 1, 'width'"),
    ('{"prompt": "a", "width": 0.0}', "line 1, 'width'"),
    ('{"prompt": "a", "max_sequence_length": 0}', "line 1, 'max_sequence_length'"),
    ('{"prompt": "a", "sigmas": [[1.0]]}', "line 1, 'sigmas'"),
    ('{"prompt": "a", "sigmas": "1.0"}', "line 1, 'sigmas'"),
    ('{"prompt": "a", "max_sequence_length": "long"}', "line 1, 'max_sequence_length'"),
    ('{"prompt": "a", "joint_attention_kwargs": [1]}', "line 1, 'joint_attention_kwargs'"),
    ('{"prompt_embeds": [[[0.5]]], "pooled_prompt_embeds": [[0.5]]}', "line 1, 'prompt_embeds'"),
    ('{"prompt": "a", "guidence_scale": 3.5}', "Did you mean 'guidance_scale'?"),
    ('{"prompt": "a", "colour": "red"}', "FluxPipeline has no argument colour"),
    ('{"prompt": "a", "": 1}', "line 1"),
    ('{"prompt": "a", "\\ud800": 1}', "line 1"),
    ('{"prompt": "a", "prompt": "b"}', "line 1` must have 'prompt' once"),
    ('{"prompt": "a", "num_inference_steps": 4}', "line 1` must leave 'num_inference_steps' out"),
    ('{"prompt": "a", "generator": 4}', "line 1` must leave 'generator' out"),
    ('{"prompt": "a", "num_images_per_prompt": 4}', "line 1` must leave 'num_images_per_prompt' out"),
    ('{"prompt": "a", "ip_adapter_image": "nowhere.png"}', "line 1, 'ip_adapter_image'"),
    ('{"prompt": "a", "ip_adapter_image": ["cat.png", "nowhere.png"]}', "line 1, 'ip_adapter_image'"),
    ('{"prompt": "a", "ip_adapter_image": "cut.png"}', "line 1, 'ip_adapter_image'"),
    ('{"prompt": "a", "ip_adapter_image": ""}', "line 1, 'ip_adapter_image'"),
    ('{"prompt": "a", "ip_adapter_image": "a\\u0000.png"}', "line 1, 'ip_adapter_image'"),
    ('{"prompt": "a", "ip_adapter_image": 3}', "line 1, 'ip_adapter_image'"),
    ('{"prompt": "a", "ip_adapter_image": {"path": "cat.png"}}', "line 1, 'ip_adapter_image'"),
    ('"Grüße"'.encode("latin-1"), "byte 3, in line 1"),
    ('"a"\n"Grüße"'.encode("latin-1"), "byte 7, in line 2"),
    ('"a"'.encode("utf-16"), "UTF-16"),
    ('"a"'.encode("utf-16-le"), "UTF-16"),
    ('"a"'.encode("utf-32"), "UTF-16"),
    (b"\xff\xd8\xff\xe0", "byte 0, in line 1"),
]
"""Contents of a file of inputs, and what the line must hold."""


def refused(capsys, words) -> str:
    """The one line on stderr with which the command refuses these words."""
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    (line,) = err.splitlines()
    assert line.startswith("lesa: error: ") and "Traceback" not in line
    assert not {*re.findall(r"`(\w+)`", line)} & PYTHON_ONLY
    return line


def split(text, folder):
    return [word.replace("{}", str(folder)).replace("{name}", folder.name) for word in shlex.split(text)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, in which nothing is left."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "named"), LINES, ids=[text[:70] or "nothing" for text, _ in LINES])
def test_a_malformed_line_is_refused_before_a_model_is_loaded(folder, elsewhere, capsys, monkeypatch, text, named):
    monkeypatch.setattr(lesa.cli.loading, "load_pipeline", None)
    assert named.replace("{}", str(folder)) in refused(capsys, split(text, folder))


@pytest.fixture(scope="module")
def digits_pipe():
    return load_pipeline(MODEL)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "named"), LOADED, ids=[text[-60:] for text, _ in LOADED])
def test_a_malformed_line_is_refused_before_a_model_runs(
    folder, elsewhere, capsys, monkeypatch, digits_pipe, text, named
):
    def load(folder, **options):
        is_shared = str(folder) == MODEL and "float16" not in text
        return digits_pipe if is_shared else load_pipeline(folder, **options)

    monkeypatch.setattr(lesa.cli.loading, "load_pipeline", load)
    assert named in refused(capsys, split(text, folder))


@pytest.mark.slow
@pytest.mark.parametrize(("text", "named"), TEXTS, ids=[str(text)[:50] for text, _ in TEXTS])
def test_malformed_inputs_are_named_by_line_and_key(folder, elsewhere, capsys, monkeypatch, text, named):
    monkeypatch.setattr(lesa.cli.loading, "load_pipeline", None)
    (folder / "inputs.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(capsys, split(f"{RECORD} --inputs {{}}/inputs.jsonl", folder))
    assert named in line and "inputs.jsonl" in line


def test_there_are_enough_of_them():
    assert len({text for text, _ in [*LINES, *LOADED]}) >= 80
    assert json.loads(TEXTS[12][0].splitlines()[1])["prompt"] == ["a", "b"]  # the case that was reported
