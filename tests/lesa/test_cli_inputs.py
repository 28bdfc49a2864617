"""Inputs of the commands that are as users have them: without a text encoder, with images, in any file that is text."""

import inspect
import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lesa
import prompted_pipelines
import small_pipelines as small
from lesa import cli
from lesa.cache.choosing import Chooser
from lesa.cli.matching import check_widths, matched
from lesa.cli.trying import check_by_pipeline
from lesa.inputs import Sample, check_inputs, read_inputs, write_inputs
from lesa_kernels import FusedKANPredictor, PredictorConfig

pytestmark = pytest.mark.usefixtures("settings_of_the_command")


def run(capsys, words, **named) -> str:
    """What a command prints on stdout; it may print nothing on stderr but progress bars."""
    capsys.readouterr()
    cli.main([word.format(**named) for word in words.split()])
    return capsys.readouterr().out


def refused(capsys, words, **named) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main([word.format(**named) for word in words.split()])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def predictor(folder):
    config = PredictorConfig(
        small.DIM,
        rank=1,
        hidden=2,
        history_length=2,
        schedule=(0, 2),
        schedule_sigmas=(1.0, 0.5),
        num_inference_steps=4,
    )
    FusedKANPredictor(config).save_pretrained(folder / "p")
    return folder


# Stable Diffusion 3 without its largest text encoder


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """The folder of a small SD3 with two text encoders and without the third, and a predictor."""
    folder = predictor(tmp_path_factory.mktemp("sd3"))
    pipe = prompted_pipelines.sd3(folder)
    pipe.save_pretrained(folder / "model")
    pipe.register_modules(text_encoder_2=None)
    pipe.save_pretrained(folder / "less")
    return folder


SIZE = f"--height {small.HEIGHT} --width {small.WIDTH}"


@pytest.mark.slow
def test_sd3_without_its_third_text_encoder_runs_in_every_command(sd3, tmp_path, capsys):
    model = "--model {sd3}/model --steps 4 --device cpu"
    out = run(
        capsys,
        f"generate {model} --predictor {{sd3}}/p --prompt cat --output {{tmp}}/x.png {SIZE}",
        sd3=sd3,
        tmp=tmp_path,
    )
    assert "2 of 4 steps computed" in out
    drawn = np.asarray(Image.open(tmp_path / "x.png"))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3 / "model", text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with lesa.enable_cache(pipe, FusedKANPredictor.from_pretrained(sd3 / "p")):
        size = {"height": small.HEIGHT, "width": small.WIDTH}
        plain = pipe("cat", **size, num_inference_steps=4, generator=generator).images[0]
    assert np.array_equal(drawn, np.asarray(plain))
    size = f'"height": {small.HEIGHT}, "width": {small.WIDTH}'
    (tmp_path / "i.jsonl").write_text(f'{{"prompt": "a cat", {size}}}\n{{"prompt": "a dog", {size}}}\n')
    inputs = f"{model} --inputs {{tmp}}/i.jsonl"
    assert "Wrote 4 trajectories" in run(capsys, f"record {inputs} --out {{tmp}}/recording", sd3=sd3, tmp=tmp_path)
    evaluate = f"evaluate {inputs} --predictor {{sd3}}/p --against steps --out {{tmp}}/results"
    assert "newton-2" in run(capsys, evaluate, sd3=sd3, tmp=tmp_path)


@pytest.mark.slow
def test_prompts_are_refused_where_the_pipeline_needs_the_text_encoder_that_is_absent(sd3, tmp_path, capsys):
    words = (
        f"generate --model {{sd3}}/less --predictor {{sd3}}/p --prompt cat --output {{tmp}}/x.png {SIZE} --device cpu"
    )
    line = refused(capsys, words, sd3=sd3, tmp=tmp_path)
    assert "argument --prompt with --height 16 --width 24: this model has no text encoder (text_encoder_2)" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("negative_prompt", "blurry", "'negative_prompt': this model has no text encoder (text_encoder_2)"),
        ("negative_prompt_2", ["blurry"], "'negative_prompt_2': this model has no text encoder (text_encoder_2)"),
        ("prompt_2", "cat", "'prompt_2': this model has no text encoder (text_encoder_2)"),
        ("prompt_3", "cat", "'prompt_3': this model has no text encoder (text_encoder_3)"),
    ],
)
def test_every_text_for_an_absent_text_encoder_is_refused(sd3, tmp_path, capsys, key, value, message):
    write_inputs(tmp_path / "i.safetensors", [{**small.embeddings(1), key: value}])
    words = "record --model {sd3}/less --inputs {tmp}/i.safetensors --out {tmp}/o --device cpu"
    line = refused(capsys, words, sd3=sd3, tmp=tmp_path)
    assert f"i.safetensors, row 0, {message} for prompts. Pass embeddings with --inputs" in line
    names = "negative_prompt_embeds and negative_pooled_prompt_embeds"
    assert (names in line) == key.startswith("negative")


@pytest.mark.slow
def test_a_prompt_for_the_optional_text_encoder_is_not_ignored(sd3, tmp_path, capsys):
    (tmp_path / "i.jsonl").write_text('"cat"\n{"prompt": "cat", "prompt_3": "a cat on a mat"}\n')
    words = "record --model {sd3}/model --inputs {tmp}/i.jsonl --out {tmp}/o --device cpu"
    line = refused(capsys, words, sd3=sd3, tmp=tmp_path)
    assert "i.jsonl, line 2, 'prompt_3': this model has no text encoder (text_encoder_3) for prompts. Leave it" in line


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_numbers_that_are_not_finite_are_found_in_every_dtype(tmp_path, dtype):
    file, value = tmp_path / "i.safetensors", torch.ones(2, 2, 3)
    save_file({"prompt_embeds": value.to(dtype), "mask": torch.tensor([[-torch.inf], [0.0]])}, file)
    assert len(read_inputs(file)) == 2
    value[1, 1, 2] = float("nan")
    save_file({"prompt_embeds": value.to(dtype)}, file)
    with pytest.raises(ValueError, match="`i.safetensors, row 1, 'prompt_embeds'` must hold no NaN"):
        read_inputs(file)


@pytest.mark.parametrize("empty", [[], (), torch.zeros(0), np.zeros(0)], ids=["list", "tuple", "tensor", "array"])
@pytest.mark.parametrize("key", ["sigmas", "timesteps"])
def test_no_noise_levels_are_refused_in_python_too(key, empty):
    with pytest.raises(ValueError, match=rf"`inputs\[0\]\['{key}'\]` must have at least one noise level"):
        check_inputs([{"prompt": "a", key: empty}])


@pytest.mark.parametrize(("key", "value"), [("height", 0), ("width", -1), ("num_frames", 0), ("layers", 0.5)])
def test_sizes_below_one_are_refused_in_python_too(key, value):
    with pytest.raises(ValueError, match=rf"`inputs\[0\]\['{key}'\]` must be at least 1"):
        check_inputs([{"prompt": "a", key: value}])


# Images


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """The folder of a small pipeline that repaints images, a predictor, and images of several kinds."""
    folder = predictor(tmp_path_factory.mktemp("painter"))
    case = small.FLUX["flux inpaint"]
    case.build().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    small.image(1).save(folder / "images" / "cat.png")
    small.image(1).convert("P").save(folder / "images" / "palette.gif")
    small.image(1, mode="RGBA").save(folder / "images" / "transparent.png")
    small.mask_image().save(folder / "images" / "mask.png")
    turned = small.image(1).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(folder / "images" / "turned.png", exif=exif)
    return folder


def image_lines(painter, *names, **more):
    """A file of lines with these images, and the mask."""
    lines = [
        {"prompt": "a", "image": name, "mask_image": "images/mask.png", "strength": 0.75, **more} for name in names
    ]
    (painter / "i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def encoded(monkeypatch):
    """The pipeline's prompts become the random embeddings, without text encoders."""

    def encode(self, *args, device=None, **kwargs):
        embeds = small.embeddings(1)
        return embeds["prompt_embeds"], embeds["pooled_prompt_embeds"], torch.zeros(small.TEXT_TOKENS, 3)

    monkeypatch.setattr(diffusers.FluxInpaintPipeline, "encode_prompt", encode)
    monkeypatch.setattr("lesa.cli.loading._check_prompts", lambda pipe, samples: None)


GENERATE = (
    f"generate --model {{painter}}/model --predictor {{painter}}/p --inputs {{painter}}/i.jsonl {SIZE} --steps 4 "
)
GENERATE += "--schedule 0,1 --device cpu --output {tmp}/x.png"


@pytest.mark.slow
def test_images_are_opened_beside_the_file_of_inputs(painter, encoded, tmp_path, capsys):
    absolute = str(painter / "images" / "cat.png")
    image_lines(painter, "images/cat.png", absolute, "images/turned.png")
    run(capsys, GENERATE, painter=painter, tmp=tmp_path)
    first, second, third = (np.asarray(Image.open(tmp_path / f"x-0000{number}.png")) for number in range(3))
    assert first.shape == (small.HEIGHT, small.WIDTH, 3)
    case = small.FLUX["flux inpaint"]
    pipe = diffusers.FluxInpaintPipeline.from_pretrained(
        painter / "model", text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None
    )
    pipe.set_progress_bar_config(disable=True)
    for seed, drawn in enumerate((first, second, third)):
        call = {"image": small.image(1), "mask_image": small.mask_image(), **small.embeddings(1), **case.size}
        generator = torch.Generator().manual_seed(seed)
        with lesa.enable_cache(pipe, FusedKANPredictor.from_pretrained(painter / "p"), [0, 1]):
            plain = pipe(**call, strength=0.75, num_inference_steps=4, generator=generator).images[0]
        assert np.array_equal(drawn, np.asarray(plain))


@pytest.mark.slow
def test_images_of_all_kinds_are_recorded(painter, encoded, tmp_path, capsys):
    image_lines(painter, "images/palette.gif", "images/transparent.png", height=small.HEIGHT, width=small.WIDTH)
    words = (
        "record --model {painter}/model --inputs {painter}/i.jsonl --steps 4 --device cpu --batch-size 2 --out {tmp}/r"
    )
    assert "Wrote 2 trajectories" in run(capsys, words, painter=painter, tmp=tmp_path)


@pytest.mark.slow
def test_what_only_the_pipeline_itself_finds_is_named_by_line(painter, encoded, tmp_path, capsys):
    image_lines(painter, "images/cat.png", strength=7.5)
    line = refused(capsys, GENERATE, painter=painter, tmp=tmp_path)
    assert "i.jsonl, line 1 with --height 16 --width 24: FluxInpaintPipeline refuses it: The value of strength" in line
    image_lines(painter, "images/cat.png")
    with (painter / "i.jsonl").open("a") as file:
        file.write('{"prompt": "a", "mask_image": "images/mask.png"}\n')
    assert "i.jsonl, line 2 with --height 16 --width 24: " in refused(capsys, GENERATE, painter=painter, tmp=tmp_path)
    image_lines(painter, "images/cat.png", strength=0.0)
    assert "i.jsonl, line 1 with" in refused(capsys, GENERATE, painter=painter, tmp=tmp_path)


@pytest.mark.slow
def test_a_bug_under_the_pipeline_keeps_its_traceback(painter, encoded, tmp_path, capsys, monkeypatch):
    def bug(self, *args, **kwargs):
        raise TypeError("a bug")

    image_lines(painter, "images/cat.png")
    monkeypatch.setattr(Chooser, "_scheduled", bug)
    with pytest.raises(TypeError, match="a bug"):
        run(capsys, GENERATE, painter=painter, tmp=tmp_path)


class Unchecked:
    """A pipeline without a check of its arguments. It must not run while inputs are checked."""

    def __call__(self, **arguments):
        raise AssertionError("it ran")


class Checked(Unchecked):
    def check_inputs(self, height):
        if height % 16:
            raise ValueError(f"{height} is odd")

    def __call__(self, height=16, num_inference_steps=50):
        logging.getLogger("diffusers.pipelines").warning("a warning")
        self.check_inputs(height)
        raise AssertionError("it ran on")


def test_a_pipeline_checks_its_arguments_and_does_not_run():
    samples = [Sample("x.jsonl, line 1", {"height": 32}), Sample("x.jsonl, line 2", {"height": 33})]
    assert check_by_pipeline(Unchecked(), samples, 4) == []
    pipe = Checked()
    assert check_by_pipeline(pipe, samples[:1] * 2, 4) == ["a warning"]
    with pytest.raises(cli.UsageError, match="x.jsonl, line 2: Checked refuses it: 33 is odd"):
        check_by_pipeline(pipe, samples, 4)
    assert vars(pipe) == {}


# What a pipeline takes is let through


def fitted(pipeline, tmp_path, **arguments):
    (tmp_path / "a.png").exists() or small.image(1).save(tmp_path / "a.png")
    call = getattr(diffusers, pipeline).__call__
    (sample,) = matched([Sample("x.jsonl, line 1", arguments)], pipeline, call, tmp_path)
    return sample.arguments


PIPELINES = sorted({case.pipeline for case in small.ALL.values()})


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_arguments_of_the_small_pipelines_are_let_through(pipeline, tmp_path):
    for case in small.ALL.values():
        if case.pipeline == pipeline:
            inputs = case.inputs(1)
            assert fitted(pipeline, tmp_path, **inputs).keys() == inputs.keys()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_defaults_of_the_small_pipelines_are_let_through(pipeline, tmp_path):
    """And each image argument may be the path of an image, or a list of them."""
    parameters = [*inspect.signature(getattr(diffusers, pipeline).__call__).parameters.values()][1:]
    for parameter in parameters:
        if parameter.default is not parameter.empty:
            fitted(pipeline, tmp_path, **{parameter.name: parameter.default})
        if parameter.name.endswith(("image", "mask")) and "prompt" not in parameter.name:
            opened = fitted(pipeline, tmp_path, **{parameter.name: "a.png"})[parameter.name]
            mode = "RGBA" if "Layered" in pipeline else "RGB"
            assert (opened.mode, opened.size) == (mode, (small.WIDTH, small.HEIGHT))
            pair = fitted(pipeline, tmp_path, **{parameter.name: ["a.png", "a.png"]})[parameter.name]
            assert [image.size for image in pair] == [opened.size] * 2


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"guidance_scale": 3}, 3),
        ({"height": 512.0}, 512),
        ({"height": None}, None),
        ({"sigmas": [1, 0.5]}, [1, 0.5]),
        ({"sigmas": None}, None),
        ({"prompt": ["a"]}, ["a"]),
        ({"prompt": ""}, ""),
        ({"negative_prompt": None}, None),
        ({"joint_attention_kwargs": {"scale": 0.5}}, {"scale": 0.5}),
        ({"max_sequence_length": 128}, 128),
    ],
)
def test_what_a_pipeline_accepts_is_let_through(arguments, kept, tmp_path):
    (value,) = fitted("FluxPipeline", tmp_path, **arguments).values()
    assert value == kept and type(value) is type(kept)


def test_a_pipeline_without_annotations_takes_anything(tmp_path):
    def call(self, prompt, size="one", **rest): ...

    arguments = {"prompt": 3, "size": [1], "colour": True}
    (sample,) = matched([Sample("x", arguments)], "Mine", call, tmp_path)
    assert sample.arguments == arguments


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".JsonL"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \r\n\t\n"], ids=["unix", "windows", "blank"])
def test_a_file_of_prompts_is_read_however_it_was_saved(tmp_path, suffix, mark, end):
    file = tmp_path / f"prompts{suffix}"
    lines = ['"Grüße 😀"'.encode(), b'{"prompt": "b\\ud83d\\ude00", "height": 16}', b'"\\u2028c"']
    file.write_bytes(mark + end.join(lines))
    assert read_inputs(file) == [{"prompt": "Grüße 😀"}, {"prompt": "b😀", "height": 16}, {"prompt": "\u2028c"}]


def test_a_list_of_prompts_is_refused_in_python_too(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"`inputs\[1\]\['prompt'\]` must be one prompt, but got \['a', 'b'\]"):
        lesa.record(pipe, ["a", {"prompt": ["a", "b"]}], tmp_path / "new")
    with pytest.raises(ValueError, match=r"`inputs\[0\]\['num_videos_per_prompt'\]` must be 1, but got 2"):
        lesa.record(pipe, [{"prompt": "a", "num_videos_per_prompt": 2}], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_names_of_widths_are_those_of_the_transformers():
    for name in ("flux", "qwen", "hunyuan", "sd3"):
        case = small.ALL[name]
        config = case.transformer(**case.transformer_options).config
        for key, value in small.embeddings(1, pooled=name != "qwen").items():
            check_widths([Sample("x", {key: value, f"negative_{key}": value})], config)
            wide = torch.cat([value, value], -1)
            for wrong in (key, f"negative_{key}"):
                with pytest.raises(ValueError, match=f"`x, '{wrong}'` must have shape .*16.* for this model"):
                    check_widths([Sample("x", {wrong: wide})], config)
    check_widths([Sample("x", {"prompt_embeds": torch.zeros(1, 2, 3)})], {})
