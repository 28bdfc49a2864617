"""The examples in the documentation run: with small pipelines of random weights instead of the large ones."""

import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image

import lesa
import lesa_kernels
import released_lesa
import small_pipelines as small
from interrupted_fits import make_quick
from lesa.cache.placement import installed_hook
from lesa.demo import digits
from lesa_kernels import FusedKANPredictor, PredictorConfig

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = (0, 2, 6, 12, 18, 25, 32, 39, 46)
CASES = {  # of the pipeline classes that the pages load
    "FluxPipeline": "flux distilled",
    "FluxControlNetPipeline": "flux controlnet",
    "QwenImagePipeline": "qwen cfg",
    "QwenImageEditPipeline": "qwen edit",
    "HunyuanVideoPipeline": "hunyuan",
    "StableDiffusion3Pipeline": "sd3 cfg",
}
SMALLER = {"height=480, width=640, num_frames=65": "height=32, width=48, num_frames=9"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def examples():
    """Every Python block of the pages that loads a pipeline, without those that need several GPUs."""
    for page in (page for page in PAGES if page.stem != "large-models"):  # `test_large_models.py` makes these calls
        for number, block in enumerate(b for b in python_blocks(page) if "Pipeline.from_pretrained(" in b):
            yield pytest.param(block, id=f"{page.stem}-{number}")


def encode_prompt(pipe, *args, **kwargs):
    """What each family's own returns, from random embeddings."""
    kind = type(pipe.transformer).__name__
    made = small.embeddings(1)
    prompt, pooled = made["prompt_embeds"], made["pooled_prompt_embeds"]
    mask = torch.ones(1, small.TEXT_TOKENS)
    if kind.startswith("Flux"):
        return prompt, pooled, torch.zeros(small.TEXT_TOKENS, 3)
    if kind.startswith("Qwen"):
        return prompt, mask.to(torch.int64)
    if kind.startswith("Hunyuan"):
        return prompt, pooled, mask
    other = small.embeddings(1, negative=True)
    return prompt, other["negative_prompt_embeds"], pooled, other["negative_pooled_prompt_embeds"]


@pytest.fixture
def stand_ins(monkeypatch):
    """Makes whatever the examples load: pipelines, ControlNets, predictors, pictures."""
    used = SimpleNamespace(pipelines=[], written=[])

    def stay(thing):
        thing.to = lambda *device: thing
        return thing

    def finish(pipe):
        pipe.default_sample_size = 8
        pipe.set_progress_bar_config(disable=True)
        used.pipelines.append(type(pipe).__name__)
        return stay(pipe)

    def load_pipeline(cls, name, torch_dtype=None, **parts):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name) and torch_dtype == torch.bfloat16
        pipe = small.ALL[CASES[cls.__name__]].build()
        if parts:
            pipe.register_modules(**parts)
        return finish(pipe)

    def load_predictor(cls, name, **options):
        sigmas = tuple(1 - step / 50 for step in SCHEDULE)
        steps = {"num_inference_steps": 50, "schedule": SCHEDULE, "schedule_sigmas": sigmas}
        return stay(FusedKANPredictor(PredictorConfig(small.DIM, rank=4, hidden=8, **steps)))

    for name in {*CASES, "FluxImg2ImgPipeline"}:
        cls = getattr(diffusers, name)
        monkeypatch.setattr(cls, "encode_prompt", encode_prompt)
        monkeypatch.setattr(cls, "from_pretrained", classmethod(load_pipeline))
    from_pipe = diffusers.FluxImg2ImgPipeline.from_pipe.__func__
    made_from = classmethod(lambda cls, pipe: finish(from_pipe(cls, pipe)))
    monkeypatch.setattr(diffusers.FluxImg2ImgPipeline, "from_pipe", made_from)
    controlnet = classmethod(lambda cls, name, **options: small.flux_controlnet().eval())
    monkeypatch.setattr(diffusers.FluxControlNetModel, "from_pretrained", controlnet)
    monkeypatch.setattr(FusedKANPredictor, "from_pretrained", classmethod(load_predictor))
    monkeypatch.setattr(diffusers.utils, "load_image", lambda name: small.image(3))
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, name, fps: used.written.append(name))
    with small.small_areas():
        yield used


def test_the_three_lines_of_the_readme_run(stand_ins):
    example, _ = python_blocks(ROOT / "README.md")
    pipe = diffusers.FluxPipeline.from_pretrained("a/b", torch_dtype=torch.bfloat16)
    names, calls = {"pipe": pipe}, []
    pipe.transformer.context_embedder.register_forward_hook(lambda *_: calls.append(1))  # only in computed steps
    exec(compile(example, "example", "exec"), names)
    assert isinstance(names["image"], Image.Image)
    assert len(calls) == 12
    lesa.disable_cache(pipe)


def test_the_readme_example_for_a_cpu_runs(tmp_path, monkeypatch, capsys):
    """With the bundled model, as it is written."""
    _, example = python_blocks(ROOT / "README.md")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})
    assert "computed 12 (0,1,4,8,12,17,22,28,33,39,44,48), predicted 38 steps" in capsys.readouterr().out
    with Image.open(tmp_path / "seven.png") as image:
        assert image.size == (256, 256)
        darkest, brightest = image.convert("L").getextrema()
        assert brightest - darkest > 200  # a digit, not a grey square


def test_the_training_example_runs(stand_ins, tmp_path, monkeypatch, capsys):
    """With 12 steps and short training, but otherwise as it is written."""
    monkeypatch.chdir(tmp_path)
    (example,) = [block for block in python_blocks(ROOT / "docs" / "training.md") if "lesa.train(" in block]
    pipe = diffusers.FluxPipeline.from_pretrained("a/b", torch_dtype=torch.bfloat16)
    record, train, refine = lesa.record, lesa.train, lesa.refine
    fewer = {"num_inference_steps=50": "num_inference_steps=12", "tokens_per_sample=96": "tokens_per_sample=8"}
    for large, little in {**fewer, "budget=9": "schedule=[0, 1, 2, 5, 9]"}.items():
        assert large in example
        example = example.replace(large, little)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.FluxPipeline, "encode_prompt", encode_prompt)
    monkeypatch.setattr(lesa, "record", lambda *a, **k: record(*a, **k, progress=False), raising=False)
    monkeypatch.setattr(lesa, "train", lambda *a, **k: train(*a, **k, epochs=1, progress=False), raising=False)
    little = {"rounds": 1, "epochs": 1, "progress": False}
    monkeypatch.setattr(lesa, "refine", lambda *a, **k: refine(*a, **k, **little), raising=False)
    monkeypatch.setattr(FusedKANPredictor, "to", lambda self, device: self)
    evaluate = lesa.evaluate
    shorter = {"num_inference_steps": 12, "against": ["steps"], "progress": False}
    monkeypatch.setattr(lesa, "evaluate", lambda *a, **k: evaluate(*a, **k, **shorter), raising=False)
    prompts = ["a fox", "a crow"]
    exec(compile(example, "example", "exec"), {"pipe": pipe, "prompts": prompts, "test_prompts": prompts})
    assert (tmp_path / "flux-predictor" / "model.safetensors").exists()
    assert "newton-5" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_a_fit_runs(stand_ins, tmp_path, monkeypatch):
    """With 12 steps, few samples and short training, but otherwise as it is written."""
    (example,) = [block for block in python_blocks(ROOT / "docs" / "training.md") if "lesa.fit(" in block]
    pipe = diffusers.FluxPipeline.from_pretrained("a/b", torch_dtype=torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    make_quick(monkeypatch.setattr)
    monkeypatch.setattr(diffusers.FluxPipeline, "encode_prompt", encode_prompt)
    monkeypatch.setattr(FusedKANPredictor, "to", lambda self, device: self)
    fit = lesa.fit
    monkeypatch.setattr(
        lesa, "fit", lambda *a, **k: fit(*a, **k, num_inference_steps=12, progress=False), raising=False
    )
    names = {"pipe": pipe, "prompts": ["a fox", "a crow"]}
    exec(compile(example, "example", "exec"), names)
    assert len(names["predictor"].config.schedule) == 9
    assert (tmp_path / "flux-predictor" / "README.md").exists()
    lesa.disable_cache(pipe)


def test_the_examples_of_released_lesa_run(tmp_path, monkeypatch):
    """On 12 steps of a small model, and with short training."""
    monkeypatch.chdir(tmp_path)
    train_example, load_example = python_blocks(ROOT / "docs" / "lesa.md")
    pipe, inputs = digits.load_pipeline(), digits.inputs_for([3, 4])
    recorded = lesa.record(pipe, inputs, "flux-trajectories", 12, progress=False)
    train, refine, config = lesa.train, lesa.refine, lesa_kernels.PredictorConfig
    short = {"epochs": 1, "progress": False}
    monkeypatch.setattr(lesa, "train", lambda *a, **k: train(*a, **k, **short), raising=False)
    monkeypatch.setattr(lesa, "refine", lambda *a, **k: refine(*a, **k, **short, rounds=1), raising=False)
    monkeypatch.setattr(lesa_kernels, "PredictorConfig", lambda *a, **k: config(*a, **k, hidden=4), raising=False)
    names = {"pipe": pipe, "prompts": inputs}
    exec(compile(train_example.replace("50", "12"), "example", "exec"), names)
    assert names["predictor"].config.schedule == (0, 1, 2, 3, 9)
    released_lesa.save("predictor_flux_N7_E3.pt", released_lesa.state_dict(steps=12))
    width = str(recorded.feature_dim)
    assert "3072" in load_example
    exec(compile(load_example.replace("50", "12").replace("3072", width), "example", "exec"), names)
    pipe(**inputs[0], num_inference_steps=12, output_type="latent")
    assert names["handle"].stats.predicted_steps == 7
    names["handle"].disable()


@pytest.mark.parametrize("example", [*examples()])
def test_examples_run(example, stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for large, little in SMALLER.items():
        example = example.replace(large, little)
    names = {}
    exec(compile(example, "example", "exec"), names)
    cache = names["cache"]
    assert cache.stats.predicted_steps > cache.stats.computed_steps > 3
    printed = capsys.readouterr().out
    assert cache.stats.summary() in printed
    assert installed_hook(names["pipe"].transformer) is None
    wanted = re.findall(r'"(\w+\.(?:png|mp4))"', re.sub(r"load_image\(.*?\)", "", example))
    assert sorted([path.name for path in tmp_path.iterdir()] + stand_ins.written) == sorted(wanted)
    assert names["pipe"].__class__.__name__ in stand_ins.pipelines
