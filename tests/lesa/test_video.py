"""The bundled HunyuanVideo model, how its data is made, and its demo."""

import json

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from PIL import Image

from lesa import cli
from lesa.demo import video
from lesa.demo.run import DEMOS, export, run_demo
from lesa.evaluation import moving
from lesa.evaluation.shown import GIF
from lesa.inputs import collate, read_inputs
from lesa.models import adapter_for
from lesa.pipelines import load_pipeline


@pytest.fixture(scope="module")
def pipe():
    return video.load_pipeline()


@pytest.fixture
def make_video():
    return pytest.importorskip("lesa.demo.make_video", reason="needs scikit-learn")


def draw(pipe, labels, steps=2, seed=10_000, **options):
    generator = [torch.Generator().manual_seed(seed + number) for number in range(len(labels))]
    call = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", **options}
    return pipe(**{**collate(video.inputs_for(labels)), **call}).frames


def grey_videos(count=2):
    videos = 2 * torch.rand(count, video.FRAMES, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    videos[0, :4], videos[0, 4:8] = 1.0, -1.0  # the autoencoder's norm has the most to divide by
    return videos


@pytest.mark.slow
def test_the_folder_is_a_diffusers_pipeline(pipe):
    saved = load_pipeline(video.PIPELINE_DIR)
    saved.set_progress_bar_config(disable=True)
    assert type(saved) is HunyuanVideoPipeline and saved.scheduler.config.shift == video.SHIFT
    made = draw(saved, [0, 7], output_type="pt")
    assert made.shape == (2, video.FRAMES, 3, video.SIDE, video.SIDE)
    assert torch.equal(made, draw(pipe, [0, 7], output_type="pt"))
    assert not torch.equal(draw(pipe, [1]), draw(pipe, [2]))


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in video.PIPELINE_DIR.rglob("*") if path.is_file()]
    assert len(sizes) >= 6 and sum(sizes) < 6e6


def test_the_autoencoder_moves_pixels_only(pipe, make_video):
    videos = grey_videos()
    coloured = videos[:, None].expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        latents = pipe.vae.encode(coloured).latent_dist.mode()
        back = pipe.vae.decode(latents).sample
    torch.testing.assert_close(latents, make_video.latents_of(videos), rtol=0, atol=1e-4)
    torch.testing.assert_close(back, coloured, rtol=0, atol=1e-4)


def test_training_packs_pixels_as_the_pipeline_unpacks_them(pipe, make_video):
    videos = grey_videos()
    decoded = adapter_for(pipe).decode(pipe, make_video.latents_of(videos), video.SIDE, video.SIDE)
    assert decoded.shape == (2, video.FRAMES, video.SIDE, video.SIDE, 3)
    for channel in np.moveaxis(decoded, -1, 0):
        assert np.abs(channel - (videos.numpy() + 1) / 2).max() < 1e-4


def test_digits_move_at_the_stated_speeds_and_stay_inside(make_video):
    torch.manual_seed(0)
    spots = torch.zeros(200, 8, 8)
    spots[:, 3:5, 3:5] = 1.0
    light = (make_video.moving_digits(spots).double() + 1) / 2
    assert light.shape == (200, video.FRAMES, video.SIDE, video.SIDE) and light.min() >= 0 and light.max() <= 1
    total = light.sum((2, 3))
    middle = torch.arange(video.SIDE, dtype=torch.float64) + 0.5
    place = torch.stack([(light.sum(2) * middle).sum(2), (light.sum(3) * middle).sum(2)], -1) / total[..., None]
    half = make_video.DIGIT / 2
    assert place.min() > half - 0.1 and place.max() < video.SIDE - half + 0.1
    # A bounce makes a step shorter; the longest one of a video has its speed.
    speeds = place.diff(dim=1).norm(dim=2).amax(1)
    slowest, fastest = make_video.SPEEDS
    assert slowest - 0.1 < speeds.min() < slowest + 0.15 and fastest - 0.15 < speeds.max() < fastest + 0.1
    directions = place.diff(dim=1)[:, 0].sign().unique(dim=0)
    assert len(directions) >= 4


@pytest.mark.slow
def test_the_export_is_for_the_command_line(tmp_path):
    commands = export(tmp_path, model="video")
    steps = ",".join(map(str, DEMOS["video"].schedules[9]))
    assert f"--schedule {steps} " in commands[2] and commands[4].endswith("video.gif")
    counts = {"inputs": 96, "prompts": 10, "test-inputs": 32}
    assert {name: len(read_inputs(tmp_path / f"{name}.safetensors")) for name in counts} == counts
    parsed = [cli.parse(command.split()[1:]).command for command in commands]
    assert parsed == ["fit", "record", "train", "refine", "generate", "evaluate"]


@pytest.mark.slow
def test_the_demo_draws_and_measures_videos(tmp_path):
    evaluation = run_demo(tmp_path, num_samples=2, progress=False, model="video")
    computed = {
        run["name"]: run["computed_steps"] for run in json.loads((tmp_path / "summary.json").read_text())["runs"]
    }
    settings = DEMOS["video"].taylorseer
    assert computed == {
        "reference": 50,
        "newton-9": 9,
        "newton-8": 8,
        "universal-9": 9,
        **{str(setting): setting.computed_in(50) for setting in settings},
        "fewer-steps-9": 9,
        "fewer-steps-8": 8,
    }
    assert evaluation["newton-9"].psnr > evaluation["fewer-steps-9"].psnr + 15
    assert evaluation["newton-9"].temporal_psnr > evaluation["fewer-steps-9"].temporal_psnr + 15
    with Image.open(tmp_path / GIF) as gif:
        rows, side = len(evaluation.shown), moving.SMALLEST_SIDE
        assert gif.n_frames == video.FRAMES and gif.height == rows * (side + moving.GAP) + moving.GAP
