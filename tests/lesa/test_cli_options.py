"""What of the command line reaches the library: every option of every command, and what comes without any."""

import contextlib
import copy
import functools
import importlib
import inspect
import json
import pkgutil
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

import lesa
from lesa import cli
from lesa.contenders.taylorseer import TaylorSeer
from lesa.demo import digits, photos
from lesa.demo.run import export, run_demo
from lesa.fitting.prompts import PICTURES
from lesa.inputs import read_inputs, write_inputs
from lesa.pipelines import load_pipeline
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.env_report import main as env_report

WHOLE_CALL = FluxPipeline.__call__
MODEL = str(digits.PIPELINE_DIR)
NAMED = ("fit", "record", "train", "refine", "enable_cache", "evaluate", "report", "estimate")
LIBRARY = {name: getattr(lesa, name) for name in NAMED} | {
    "run_demo": run_demo,
    "export": export,
    "load_pipeline": load_pipeline,
    "env_report": env_report,
}
"""What the commands call, by the names in the expected calls below."""


for command in pkgutil.walk_packages(getattr(cli, "__path__", []), f"{cli.__name__}."):
    importlib.import_module(command.name)  # one that came later would keep the stand-ins below


def replace_everywhere(monkeypatch, others):
    """Replaces functions of the library, given by name, under each name by which a loaded module has them."""
    named = {id(LIBRARY[name]): name for name in others}
    places = [
        (module, attribute, named[id(value)])
        for key, module in [*sys.modules.items()]
        if key.startswith("lesa")
        for attribute, value in [*vars(module).items()]
        if id(value) in named
    ]
    assert {name for *_, name in places} == {*others}
    for module, attribute, name in places:
        monkeypatch.setattr(module, attribute, others[name])


def bound(function, args, kwargs):
    """The arguments of a call by name, defaults included."""
    made = inspect.signature(function).bind(*args, **kwargs)
    made.apply_defaults()
    return dict(made.arguments)


def write_evaluations(folder, budget):
    """What `lesa.fit` writes of its tests. The figures are PSNR and SSIM of three runs."""
    figures = {"newton": (40.125, 0.98765), "universal": (38.0, None), "steps": (None, 0.5)}
    for place in [folder] if isinstance(budget, int) else [folder / f"budget-{each}" for each in budget]:
        place.mkdir(parents=True)
        runs = [{"contender": "reference"}]
        for contender, (psnr, ssim) in figures.items():
            total = 9 if contender == "steps" else 50
            runs.append({"contender": contender, "psnr": psnr, "ssim": ssim, "whole_steps": 9.0})
            runs[-1]["num_inference_steps"] = total
        evaluation = {"compared": "pictures", "num_inference_steps": 50, "samples": 8, "runs": runs}
        evaluation |= {"inputs_are_new": True, "not_available": {}}
        (place / "evaluation.json").write_text(json.dumps(evaluation))


def plain(value):
    """The value with pipelines, predictors and so on as what the command line decides of them."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device.type, None if value.is_meta else value.double().sum().item()
    if isinstance(value, DiffusionPipeline):
        return type(value).__name__, value.transformer.dtype, value.transformer.device.type
    if isinstance(value, FusedKANPredictor):
        return "predictor", value.config.rank, next(value.parameters()).device.type
    if isinstance(value, torch.Generator):
        return "generator", str(value.device), value.initial_seed()
    return value.folder if isinstance(value, lesa.Trajectories) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, recordings and predictors of which there are two each."""
    folder = tmp_path_factory.mktemp("options")
    write_inputs(folder / "inputs.safetensors", digits.inputs_for([3, 8]))
    write_inputs(folder / "other.safetensors", digits.inputs_for([5]))
    pipe = digits.load_pipeline()
    lesa.record(pipe, digits.inputs_for([3]), folder / "recording", 2, tokens_per_sample=2, progress=False)
    shutil.copytree(folder / "recording", folder / "other-recording")
    known = {"family": "flux", "num_inference_steps": 50, "schedule": (0, 7), "schedule_sigmas": (1.0, 0.8)}
    for name, rank in {"mine": 2, "other": 3, "again/mine": 4}.items():
        FusedKANPredictor(PredictorConfig(128, rank=rank, hidden=4, **known)).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def digits_pipe():
    return digits.load_pipeline()


@pytest.fixture
def calls_of(monkeypatch, settings_of_the_command, tmp_path, folder, digits_pipe):
    """`calls_of("record ...")` -> every call that the command makes of the library, its arguments by name.

    Each is "function.argument", defaults included, or "function 2.argument" for a second call. The library itself does
    not run; whichever pipeline is to be loaded, it is that of the digits.
    """
    made = {
        "train": FusedKANPredictor(PredictorConfig(128, schedule=(0, 7), schedule_sigmas=(1.0, 0.8))),
        "evaluate": SimpleNamespace(table=lambda: "the table", has_moving_picture=False),
        "run_demo": SimpleNamespace(table=lambda: "the table", has_moving_picture=False),
        "estimate": SimpleNamespace(table=lambda: "the table", to_dict=lambda: {"as": "json"}),
        "export": ["lesa fit", "lesa record"],
        "report": Path("page.html"),
    }
    seen, state = {}, {"cached": False, "interrupted": None}

    def note(name, arguments):
        number = 1 + len({key.split(".")[0] for key in seen if re.fullmatch(rf"{name}( \d+)?", key.split(".")[0])})
        label = name if number == 1 else f"{name} {number}"
        seen[label] = True
        seen.update({f"{label}.{key}": plain(value) for key, value in arguments.items()})

    def spy(name):
        @functools.wraps(LIBRARY[name])
        def called(*args, **kwargs):
            arguments = bound(LIBRARY[name], args, kwargs)
            arguments |= arguments.pop("options", {})  # those of `load_pipeline` that have no name of their own
            note(name, arguments)
            if name == state["interrupted"]:
                raise KeyboardInterrupt
            if name == "load_pipeline":
                pipe = copy.deepcopy(digits_pipe).to(arguments["torch_dtype"])
                if any(word.startswith("--prompt") for word in state["words"]):  # they need an encoder
                    pipe.text_encoder = pipe.text_encoder_2 = pipe.vae
                return pipe
            if name == "fit":
                write_evaluations(arguments["out_dir"], arguments["budget"])
            if name == "record":
                return lesa.Trajectories(folder / "recording")
            if name == "enable_cache":
                return cached()
            return made.get(name)

        return called

    @contextlib.contextmanager
    def cached():
        state["cached"] = True
        yield SimpleNamespace(
            stats=SimpleNamespace(computed_steps=2, predicted_steps=48, summary=lambda: "the summary")
        )
        state["cached"] = False

    @functools.wraps(FluxPipeline.__call__)
    def draw(self, *args, **kwargs):
        assert not args
        note("pipe", {"self": self, "cached": state["cached"], **kwargs})
        return SimpleNamespace(images=[Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8))])

    replace_everywhere(monkeypatch, {name: spy(name) for name in LIBRARY})
    monkeypatch.setattr(FluxPipeline, "__call__", draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Nothing computes here, so that `meta` stands for another device.
    monkeypatch.setattr("lesa.cli.loading.usable_device", torch.device)
    monkeypatch.chdir(tmp_path)

    def calls(words, interrupted=None):
        state.update(words=words, interrupted=interrupted)
        cli.main(words)
        return seen

    return calls


# What is expected. `{}` in a word stands for the folder of the fixture.

INPUTS, OTHER_INPUTS = digits.inputs_for([3, 8]), digits.inputs_for([5])


def placed(inputs, dtype=torch.float32, device="cpu"):
    """Inputs as the library gets them: tensors on the device, in the model's dtype."""
    return plain(
        [{k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in item.items()} for item in inputs]
    )


def pipe(dtype=torch.float32, device="cpu"):
    return "FluxPipeline", dtype, device


def elsewhere(name, **more):
    """What `--device meta` and `--dtype float16` change of a command that loads the model and reads inputs."""
    other, half = torch.bfloat16, torch.float16
    return [
        ("--model user/name", {"load_pipeline.folder_or_id": "user/name"}),
        ("--inputs {}/other.safetensors", {f"{name}.inputs": placed(OTHER_INPUTS)}),
        (
            "--device meta",
            {
                "load_pipeline.torch_dtype": other,
                f"{name}.pipe": pipe(other, "meta"),
                f"{name}.inputs": placed(INPUTS, other, "meta"),
                **more,
            },
        ),
        (
            "--dtype float16",
            {
                "load_pipeline.torch_dtype": half,
                f"{name}.pipe": pipe(half),
                f"{name}.inputs": placed(INPUTS, half),
            },
        ),
    ]


@dataclass
class Command:
    """A command as it is tried.

    Args:
        required: the words without which it does nothing.
        calls: what it then asks of the library.
        options: words with one option more, or instead, and what that changes.
    """

    required: str
    calls: dict
    options: list[tuple[str, dict]] = field(default_factory=list)


LOADED = {"load_pipeline": True, "load_pipeline.folder_or_id": MODEL, "load_pipeline.torch_dtype": torch.float32}


def called(name, **arguments):
    return {name: True, **{f"{name}.{key}": value for key, value in arguments.items()}}


def drawn(number, seed, item, steps=50, dtype=torch.float32, device="cpu", **size):
    """A call of the pipeline by `lesa generate`."""
    generator = ("generator", "cpu", seed)
    (item,) = placed([item], dtype, device)
    arguments = {"self": pipe(dtype, device), "cached": True, **item, "num_inference_steps": steps}
    return called("pipe" if number == 1 else f"pipe {number}", **{**arguments, "generator": generator, **size})


def both_drawn(**options):
    return drawn(1, 0, INPUTS[0], **options) | drawn(2, 1, INPUTS[1], **options)


def config(**options):
    return {"train.config": PredictorConfig(128, **options)}


MINE, OTHER = ("predictor", 2, "cpu"), ("predictor", 3, "cpu")
COMMANDS = {
    "demo": Command(
        "",
        called("run_demo", out_dir=Path("demo-out"), num_samples=None, progress=True, model="digits"),
        [
            ("--out elsewhere", {"run_demo.out_dir": Path("elsewhere")}),
            ("--model photos", {"run_demo.model": "photos"}),
        ],
    ),
    "fit": Command(
        f"--model {MODEL} --inputs {{}}/inputs.safetensors --budget 9 --out new",
        LOADED
        | called(
            "fit",
            pipe=pipe(),
            inputs=placed(INPUTS),
            budget=9,
            out_dir=Path("new"),
            num_inference_steps=50,
            batch_size=1,
            end_to_end=False,
            loss="latents",
            seed=0,
            progress=True,
        ),
        [
            *elsewhere("fit"),
            ("--budget 7", {"fit.budget": 7}),
            ("--budget 12,9,7", {"fit.budget": [12, 9, 7]}),
            ("--out other", {"fit.out_dir": Path("other")}),
            ("--steps 20", {"fit.num_inference_steps": 20}),
            ("--batch-size 4", {"fit.batch_size": 4}),
            ("--end-to-end", {"fit.end_to_end": True}),
            ("--end-to-end --loss pixels", {"fit.end_to_end": True, "fit.loss": "pixels"}),
            ("--seed 5", {"fit.seed": 5}),
        ],
    ),
    "record": Command(
        f"--model {MODEL} --inputs {{}}/inputs.safetensors --out new",
        LOADED
        | called(
            "record",
            pipe=pipe(),
            inputs=placed(INPUTS),
            out_dir=Path("new"),
            num_inference_steps=50,
            tokens_per_sample=None,
            seed=0,
            batch_size=1,
            progress=True,
            predictor=None,
        ),
        [
            *elsewhere("record"),
            ("--out other", {"record.out_dir": Path("other")}),
            ("--steps 7", {"record.num_inference_steps": 7}),
            ("--seed 5", {"record.seed": 5}),
            ("--tokens-per-sample 3", {"record.tokens_per_sample": 3}),
            ("--batch-size 4", {"record.batch_size": 4}),
        ],
    ),
    "train": Command(
        "--trajectories {}/recording --out new",
        called(
            "train",
            trajectories=Path("{}/recording"),
            config=None,
            schedule=None,
            budget=None,
            find_stages=False,
            out_dir=Path("new"),
            guided_epochs=None,
            controlled=False,
            epochs=None,
            batch_size=8,
            tokens_per_batch=16,
            learning_rate=None,
            head_aware=None,
            validation_fraction=0.1,
            seed=0,
            device="cpu",
            progress=True,
        ),
        [
            ("--trajectories {}/other-recording", {"train.trajectories": Path("{}/other-recording")}),
            ("--out other", {"train.out_dir": Path("other")}),
            ("--schedule 7", {"train.schedule": 7}),
            ("--schedule 0,3", {"train.schedule": [0, 3]}),
            ("--budget 6", {"train.budget": 6}),
            ("--mixer dense", config(mixer="dense")),
            ("--mixer newton", config(mixer="newton")),
            ("--mixer lesa --option streams=2", config(mixer="lesa", options={"streams": 2})),
            ("--rank 0", config(rank=0)),
            ("--hidden 5", config(hidden=5)),
            ("--history-length 3", config(history_length=3)),
            ("--history-length 2,3,3", config(history_length=(2, 3, 3))),
            ("--stage-bounds 0.5", config(stage_bounds=(0.5,), history_length=4)),
            ("--stage-bounds auto", {"train.find_stages": True}),
            ("--stage-bounds auto --rank 1", {"train.find_stages": True, **config(rank=1)}),
            ("--epochs 3", {"train.epochs": 3}),
            ("--controlled", {"train.controlled": True}),
            ("--seed 5", {"train.seed": 5}),
            ("--device meta", {"train.device": "meta"}),
        ],
    ),
    "refine": Command(
        f"--model {MODEL} --inputs {{}}/inputs.safetensors --predictor {{}}/mine --trajectories {{}}/recording "
        "--out new",
        LOADED
        | called(
            "refine",
            predictor=MINE,
            trajectories=Path("{}/recording"),
            pipe=pipe(),
            inputs=placed(INPUTS),
            out_dir=Path("new"),
            rounds=3,
            epochs=None,
            batch_size=8,
            tokens_per_batch=16,
            learning_rate=None,
            samples_per_call=1,
            seed=0,
            device="cpu",
            progress=True,
        ),
        [
            *elsewhere("refine", **{"refine.device": "meta"}),
            ("--predictor {}/other", {"refine.predictor": OTHER}),
            ("--trajectories {}/other-recording", {"refine.trajectories": Path("{}/other-recording")}),
            ("--out other", {"refine.out_dir": Path("other")}),
            ("--rounds 4", {"refine.rounds": 4}),
            ("--epochs 4", {"refine.epochs": 4}),
            ("--batch-size 5", {"refine.samples_per_call": 5}),
            ("--seed 6", {"refine.seed": 6}),
        ],
    ),
    "generate": Command(
        f"--model {MODEL} --inputs {{}}/inputs.safetensors --predictor {{}}/mine --output x.png",
        LOADED
        | called(
            "enable_cache",
            pipe=pipe(),
            predictor=MINE,
            schedule=None,
            max_device_bytes=None,
            strict=False,
            steps=None,
            quality=None,
        )
        | both_drawn()
        | {"files": ["x-00000.png", "x-00001.png"]},
        [
            ("--model user/name", {"load_pipeline.folder_or_id": "user/name"}),
            (
                "--device meta",
                {
                    "load_pipeline.torch_dtype": torch.bfloat16,
                    "enable_cache.pipe": pipe(torch.bfloat16, "meta"),
                    "enable_cache.predictor": ("predictor", 2, "meta"),
                    **both_drawn(dtype=torch.bfloat16, device="meta"),
                },
            ),
            (
                "--dtype float16",
                {
                    "load_pipeline.torch_dtype": torch.float16,
                    "enable_cache.pipe": pipe(torch.float16),
                    **both_drawn(dtype=torch.float16),
                },
            ),
            ("--predictor {}/other", {"enable_cache.predictor": OTHER}),
            ("--steps 8", both_drawn(steps=8)),
            ("--seed 5", {"pipe.generator": ("generator", "cpu", 5), "pipe 2.generator": ("generator", "cpu", 6)}),
            ("--height 8", both_drawn(height=8)),
            ("--width 12", both_drawn(width=12)),
            ("--schedule 7", {"enable_cache.schedule": 7}),
            ("--schedule 0,3", {"enable_cache.schedule": [0, 3]}),
            ("--computed 6", {"enable_cache.steps": 6}),
            ("--quality fast", {"enable_cache.quality": "fast"}),
            ("--tolerance 0.5", {"enable_cache.schedule": lesa.ErrorControl(0.5)}),
            ("--output new/y.png", {"files": ["new", "new/y-00000.png", "new/y-00001.png"]}),
        ],
    ),
    "evaluate": Command(
        f"--model {MODEL} --inputs {{}}/inputs.safetensors --predictor {{}}/mine --out new",
        LOADED
        | called(
            "evaluate",
            pipe=pipe(),
            inputs=placed(INPUTS),
            predictors={"{}/mine": MINE},
            against=["steps", "taylorseer"],
            num_inference_steps=50,
            seed=0,
            batch_size=None,
            out_dir=Path("new"),
            progress=True,
            search_samples=4,
        ),
        [
            *elsewhere("evaluate", **{"evaluate.predictors": {"{}/mine": ("predictor", 2, "meta")}}),
            ("--predictor {}/other", {"evaluate.predictors": {"{}/mine": MINE, "{}/other": OTHER}}),
            (
                "--predictor {}/again/mine",
                {"evaluate.predictors": {"{}/mine": MINE, "{}/again/mine": ("predictor", 4, "cpu")}},
            ),
            ("--against cache-dit-9,steps", {"evaluate.against": ["cache-dit-9", "steps"]}),
            ("--steps 7", {"evaluate.num_inference_steps": 7}),
            ("--seed 5", {"evaluate.seed": 5}),
            ("--batch-size 2", {"evaluate.batch_size": 2}),
            ("--search-samples 3", {"evaluate.search_samples": 3}),
            ("--out other", {"evaluate.out_dir": Path("other")}),
        ],
    ),
    "report": Command(
        "--evaluation results",
        called("report", folder=Path("results"), out=None),
        [
            ("--evaluation others", {"report.folder": Path("others")}),
            ("--out page.html", {"report.out": Path("page.html")}),
        ],
    ),
    "estimate": Command(
        "--model flux-1024",
        called(
            "estimate",
            model="flux-1024",
            height=None,
            width=None,
            frames=None,
            num_inference_steps=50,
            schedule=None,
            predictor=None,
            device="H100",
            bandwidth=None,
            flops_rate=None,
            efficiency=0.5,
            step_seconds=None,
            batch=1,
            dtype="bfloat16",
            text_tokens=None,
            streams=None,
            images_per_day=None,
            price=None,
        )
        | {"printed": "the table\n"},
        [
            ("--model sd3-1024", {"estimate.model": "sd3-1024"}),
            ("--height 512", {"estimate.height": 512}),
            ("--width 768", {"estimate.width": 768}),
            ("--frames 33", {"estimate.frames": 33}),
            ("--steps 28", {"estimate.num_inference_steps": 28}),
            ("--schedule 7", {"estimate.schedule": 7}),
            ("--schedule 0,3", {"estimate.schedule": [0, 3]}),
            ("--predictor mine", {"estimate.predictor": Path("mine")}),
            ("--device A100", {"estimate.device": "A100"}),
            ("--bandwidth 500", {"estimate.bandwidth": 500e9}),
            ("--tflops 100", {"estimate.flops_rate": 100e12}),
            ("--efficiency 0.25", {"estimate.efficiency": 0.25}),
            ("--step-seconds 0.2", {"estimate.step_seconds": 0.2}),
            ("--batch-size 3", {"estimate.batch": 3}),
            ("--dtype float16", {"estimate.dtype": "float16"}),
            ("--text-tokens 0", {"estimate.text_tokens": 0}),
            ("--streams 3", {"estimate.streams": 3}),
            ("--images-per-day 1000", {"estimate.images_per_day": 1000}),
            ("--price 2.5", {"estimate.price": 2.5}),
            ("--json", {"printed": '{\n  "as": "json"\n}\n'}),
        ],
    ),
    "env": Command("", called("env_report")),
}
INSTEAD = {  # options that replace required words, and all that is then called
    "demo --export there": called("export", out_dir=Path("there"), model="digits"),
    "demo --export there --model photos": called("export", out_dir=Path("there"), model="photos"),
    f"generate --model {MODEL} --prompt=a_prompt --predictor {{}}/mine --output x.png": {
        **{k: v for k, v in COMMANDS["generate"].calls.items() if not k.startswith("pipe")},
        **called(
            "pipe",
            self=pipe(),
            cached=True,
            prompt="a prompt",
            num_inference_steps=50,
            generator=("generator", "cpu", 0),
        ),
        "files": ["x.png"],
    },
    f"generate --model {MODEL} --inputs {{}}/inputs.safetensors --output x.png": {
        **COMMANDS["generate"].calls,
        "enable_cache.predictor": None,
    },
}


def in_folder(value, folder):
    """The expected value with `{}` filled in."""
    if isinstance(value, dict):
        return {in_folder(key, folder): in_folder(part, folder) for key, part in value.items()}
    if isinstance(value, (str, Path)):
        return type(value)(str(value).replace("{}", str(folder)))
    return value


def assert_calls(calls_of, folder, capsys, text, expected):
    words = [word.replace("{}", str(folder)).replace("a_prompt", "a prompt") for word in text.split()]
    capsys.readouterr()
    seen = dict(calls_of(words))
    if "printed" in expected:
        seen["printed"] = capsys.readouterr().out
    if "files" in expected:
        seen["files"] = sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*"))
    assert seen == in_folder(expected, folder)


EVERY = [(name, "", {}) for name in COMMANDS] + [
    (name, words, changes) for name, command in COMMANDS.items() for words, changes in command.options
]


@pytest.mark.parametrize(("name", "words", "changes"), EVERY, ids=[f"{name} {words}" for name, words, _ in EVERY])
def test_an_option_changes_what_it_says_and_nothing_else(calls_of, folder, capsys, name, words, changes):
    command = COMMANDS[name]
    expected = {**command.calls, **changes}
    assert bool(words) == (expected != command.calls), "each option is given a value that is not its default"
    assert_calls(calls_of, folder, capsys, f"{name} {command.required} {words}", expected)


@pytest.mark.parametrize("text", INSTEAD, ids=lambda text: re.search(r"--(export|prompt|inputs).*", text)[0][:30])
def test_what_is_asked_for_instead(calls_of, folder, capsys, text):
    assert_calls(calls_of, folder, capsys, text, INSTEAD[text])


def usage(capsys, *words) -> str:
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    return capsys.readouterr().out


def test_no_command_and_no_option_is_left_out(capsys):
    commands = re.findall(r"^    (\w+) ", usage(capsys).partition("command")[2], re.MULTILINE)
    assert sorted(commands) == sorted(COMMANDS)
    for name, command in COMMANDS.items():
        summary = usage(capsys, name).partition("\n\n")[0]
        known = set(re.findall(r"--[a-z][a-z-]*", summary)) - {"--help"}
        texts = [words for words, _ in command.options] + [text for text in INSTEAD if text.startswith(name + " ")]
        tried = {word.partition("=")[0] for text in texts for word in text.split() if word.startswith("--")}
        # They are only for videos, and for models on disk: see test_cli_outputs.py and test_large_models.py.
        elsewhere = {"--device-map"} & known | ({"--fps"} if name == "generate" else set())
        assert known - tried == elsewhere


INTERRUPTED = {
    "demo": ("run_demo", False),
    "fit": ("fit", True),
    "record": ("record", True),
    "train": ("train", True),
    "refine": ("refine", True),
    "generate": ("enable_cache", False),
    "evaluate": ("evaluate", True),
    "report": ("report", False),
    "estimate": ("estimate", False),
    "env": ("env_report", False),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_says_where_the_same_command_goes_on(calls_of, folder, capsys, name):
    function, resumes = INTERRUPTED[name]
    words = f"{name} {COMMANDS[name].required}".replace("{}", str(folder)).split()
    with pytest.raises(SystemExit) as exit:
        calls_of(words, interrupted=function)
    assert exit.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "lesa: interrupted" + ("; the same command continues where it stopped" if resumes else "")


def test_training_is_on_the_gpu_where_there_is_one(calls_of, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert calls_of(["train", "--trajectories", f"{folder}/recording", "--out", "new"])["train.device"] == "cuda"


def test_generating_from_one_input_numbers_nothing(calls_of, folder, tmp_path):
    words = f"generate --model {MODEL} --inputs {folder}/other.safetensors --predictor {folder}/mine --output x.png"
    seen = calls_of(words.split())
    assert seen["pipe.prompt_embeds"] == plain(OTHER_INPUTS[0]["prompt_embeds"]) and "pipe 2" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_the_mask_of_a_prompt_keeps_its_dtype(calls_of, folder):
    """Only what is a floating number takes the model's dtype."""
    mask = torch.tensor([[1, 0]])
    item = {**digits.inputs_for([3])[0], "latents": torch.zeros(1, 64, 4), "prompt_embeds": mask}
    write_inputs(folder / "integers.safetensors", [item])
    words = f"record --model {MODEL} --inputs {folder}/integers.safetensors --out new --dtype float16"
    ((given),) = calls_of(words.split())["record.inputs"]
    assert given["prompt_embeds"] == (torch.int64, "cpu", 1.0)
    assert given["latents"] == (torch.float16, "cpu", 0.0)


def test_a_fit_shows_the_figures_of_each_budget_and_its_files(calls_of, folder, capsys):
    words = f"fit --model {MODEL} --inputs {folder}/inputs.safetensors --budget 9,7 --out new"
    calls_of(words.split())
    *parts, last = capsys.readouterr().out.strip().split("\n\n")
    table, wrote = parts[0].splitlines(), parts[1].splitlines()[0]
    assert table == [
        "Mean of 8 samples (inputs and seeds that served nothing else), against all 50 steps and the same seed:",
        "                  computed steps  PSNR, dB    SSIM",
        "this predictor           9 of 50     40.12  0.9877",
        "without training         9 of 50     38.00       -",
        "fewer steps               9 of 9         -  0.5000",
    ]
    assert wrote == "Wrote evaluation.json to new/budget-9"
    assert last.splitlines()[0] == "Wrote evaluation.json to new/budget-7"
    assert re.fullmatch(r"This call took \d+\.\d minutes\.", last.splitlines()[1])


def test_a_fit_without_inputs_takes_the_built_in_prompts(calls_of, digits_pipe, monkeypatch):
    """They are checked by the pipeline, but `lesa.fit` gets None, so that its model card says it."""
    refused = digits_pipe.check_inputs
    asked = []

    def check_inputs(self, prompt, *args, **options):
        asked.append(prompt)
        return refused(prompt, *args, **options)

    monkeypatch.setattr(FluxPipeline, "check_inputs", check_inputs)
    monkeypatch.setattr("lesa.fitting.inputs.needed_encoders", lambda pipe: [])
    monkeypatch.setattr("lesa.cli.loading.needed_encoders", lambda pipe: [])
    monkeypatch.setattr("lesa.cli.loading.absent_encoders", lambda pipe: [])
    monkeypatch.setattr(FluxPipeline, "__call__", inspect.unwrap(WHOLE_CALL))
    seen = calls_of(f"fit --model {MODEL} --budget 9 --out new".split())
    assert seen["fit.inputs"] is None
    assert asked == [*PICTURES]


def test_a_fit_of_a_model_without_text_encoders_names_the_option_that_is_missing(calls_of, capsys):
    with pytest.raises(SystemExit):
        calls_of(f"fit --model {MODEL} --budget 9 --out new".split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lesa: error: `--inputs` are required for this FluxPipeline: it has no text encoder")
    assert "prompt_embeds and pooled_prompt_embeds" in line and not Path("new").exists()


# The demo


@pytest.mark.parametrize(
    ("model", "predictors", "intervals"),
    [
        (digits, ["newton-9", "newton-8", "dense-9"], (7, 10)),
        (photos, ["photos-newton-9", "photos-newton-8"], (7, 8)),
    ],
    ids=["digits", "photos"],
)
def test_what_the_demo_compares(monkeypatch, tmp_path, model, predictors, intervals):
    name, seen = model.__name__.rpartition(".")[2], {}

    def evaluate(*args, **kwargs):
        seen.update(bound(LIBRARY["evaluate"], args, kwargs))

    replace_everywhere(monkeypatch, {"evaluate": evaluate})
    run_demo(tmp_path, num_samples=12, progress=False, model=name)
    assert type(seen.pop("pipe")) is type(model.load_pipeline())
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert plain(seen.pop("inputs")) == plain(model.inputs_for(labels))
    contestants, budget = seen.pop("predictors"), int(predictors[0][-1])
    untrained, spread = contestants.pop(f"universal-{budget}")
    assert (untrained.config.mixer, spread) == ("universal", lesa.schedule.Spread(budget))
    for label, predictor in contestants.items():
        assert label == predictors.pop(0)
        bundled = FusedKANPredictor.from_pretrained(digits.WEIGHTS / label)
        assert predictor.config == bundled.config
        assert all(map(torch.equal, predictor.parameters(), bundled.parameters()))
    assert not predictors
    settings = [TaylorSeer(interval, 1, lite, 3) for interval in intervals for lite in (False, True)]
    assert seen == {
        "against": ("steps", *settings),
        "num_inference_steps": 50,
        "seed": 10_000,
        "batch_size": None,
        "out_dir": tmp_path,
        "progress": False,
        "search_samples": 4,
    }


WALKS = {
    "digits": ("0,2,7,13,19,26,34,41,47", "digit.png"),
    "photos": ("0,2,5,9,15,22,31,40,46", "photo.png"),
}


@pytest.mark.parametrize("model", WALKS)
def test_the_commands_of_the_demo(tmp_path, model):
    schedule, picture = WALKS[model]
    at = f"{tmp_path}/"
    recorded = f"--model {at}model --inputs {at}inputs.safetensors --batch-size 16"
    fresh = f"--model {at}model --predictor {at}predictor --seed 10000"
    assert export(tmp_path, model) == [
        f"lesa fit {recorded} --budget 9 --out {at}fitted",
        f"lesa record {recorded} --out {at}trajectories",
        f"lesa train --trajectories {at}trajectories --schedule {schedule} --out {at}trained",
        f"lesa refine {recorded} --trajectories {at}trajectories --predictor {at}trained --out {at}predictor",
        f"lesa generate {fresh} --inputs {at}prompts.safetensors --output {at}{picture}",
        f"lesa evaluate {fresh} --inputs {at}test-inputs.safetensors --out {at}evaluation",
    ]
    module = {"digits": digits, "photos": photos}[model]
    counts = {"inputs": 160 if model == "digits" else 320, "prompts": 10, "test-inputs": 64}
    for name, count in counts.items():
        expected = module.inputs_for([number % 10 for number in range(count)])
        assert plain(read_inputs(tmp_path / f"{name}.safetensors")) == plain(expected)
    walked = sorted(path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*"))
    assert walked == sorted(path.relative_to(module.PIPELINE_DIR) for path in module.PIPELINE_DIR.rglob("*"))
