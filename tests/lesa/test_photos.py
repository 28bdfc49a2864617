"""The bundled Qwen-Image model with true classifier-free guidance, its predictor, and how its data is made."""

import json

import pytest
import torch
from diffusers import QwenImagePipeline

import lesa
from lesa import cli
from lesa.demo import photos
from lesa.demo.run import DEMOS, PHOTOS_SCHEDULES, TEST_SAMPLES, export, run_demo
from lesa.inputs import collate, read_inputs
from lesa.pipelines import load_pipeline
from lesa_kernels import FusedKANPredictor

PREDICTOR = photos.WEIGHTS / "photos-newton-9"


@pytest.fixture(scope="module")
def pipe():
    return photos.load_pipeline()


@pytest.fixture
def predictor():
    return FusedKANPredictor.from_pretrained(PREDICTOR)


def draw(pipe, labels, steps=4, seed=10_000, **options):
    generator = [torch.Generator().manual_seed(seed + number) for number in range(len(labels))]
    call = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", **options}
    return pipe(**{**collate(photos.inputs_for(labels)), **call}).images


def pixels(pipe, latents):
    unpacked = pipe._unpack_latents(latents, photos.SIDE, photos.SIDE, pipe.vae_scale_factor)
    with torch.no_grad():
        return pipe.vae.decode(unpacked).sample[:, :, 0]


def test_the_folder_is_a_diffusers_pipeline(pipe):
    saved = load_pipeline(photos.PIPELINE_DIR)
    saved.set_progress_bar_config(disable=True)
    assert type(saved) is QwenImagePipeline
    assert saved.vae.config.patch_size == 2
    assert torch.equal(draw(saved, [0, 7], output_type="pt"), draw(pipe, [0, 7], output_type="pt"))


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in photos.WEIGHTS.rglob("photos*/**/*") if path.is_file()]
    assert len(sizes) >= 7
    assert sum(sizes) + photos.EMBEDDINGS_FILE.stat().st_size < 8e6
    assert (PREDICTOR / "model.safetensors").stat().st_size < 400e3


def test_the_autoencoder_moves_pixels_only():
    vae = photos.pixel_autoencoder()
    images = 2 * torch.rand(2, 3, photos.SIDE, photos.SIDE, generator=torch.Generator().manual_seed(0)) - 1
    images[0, :, :16], images[0, :, 16:] = 1.0, -1.0  # its norm has the most to divide by
    with torch.no_grad():
        latents = vae.encode(images[:, :, None]).latent_dist.mode()
        back = vae.decode(latents).sample[:, :, 0]
    assert latents.shape == (2, 12, 1, 16, 16)
    torch.testing.assert_close(latents[:, 0, 0], images[:, 0, ::2, ::2], rtol=0, atol=2e-5)
    torch.testing.assert_close(back, images, rtol=0, atol=2e-5)


def test_training_packs_pixels_as_the_pipeline_unpacks_them(pipe):
    make_photos = pytest.importorskip("lesa.demo.make_photos", reason="needs scikit-learn")
    images = 2 * torch.rand(2, 3, photos.SIDE, photos.SIDE, generator=torch.Generator().manual_seed(0)) - 1
    tokens = make_photos.packed(images)
    assert tokens.shape == (2, 64, pipe.transformer.config.in_channels)
    torch.testing.assert_close(pixels(pipe, tokens), images, rtol=0, atol=2e-5)


def test_details_are_cut_from_the_photograph_of_their_label():
    make_photos = pytest.importorskip("lesa.demo.make_photos", reason="needs scikit-learn")
    labels = torch.tensor([3, 8, 3, 9])
    pyramids = [[torch.full((3, size, size), float(label)) for size in (32, 40, 64, 80)] for label in range(10)]
    details = make_photos.details(pyramids, labels)
    assert details.shape == (4, 3, photos.SIDE, photos.SIDE)
    assert torch.equal(details.amax((1, 2, 3)), labels.float()) and torch.equal(details.amin((1, 2, 3)), labels.float())


def test_there_is_a_photograph_for_each_name():
    make_photos = pytest.importorskip("lesa.demo.make_photos", reason="needs scikit-learn")
    heights = [[photo.shape[:2] for photo in make_photos.pyramid(name)] for name in ("china", "camera")]
    assert heights == [[(3, 64), (3, 96), (3, 144), (3, 216)]] * 2
    assert tuple(make_photos._SOURCES) == photos.NAMES


def test_the_same_seed_draws_the_same_bits(pipe):
    first = draw(pipe, [1, 4])
    assert torch.equal(first, draw(pipe, [1, 4]))
    assert not torch.equal(first, draw(pipe, [1, 4], seed=1))
    assert not torch.equal(first, draw(pipe, [1, 5]))


def test_guidance_counts(pipe):
    assert not torch.allclose(draw(pipe, [1]), draw(pipe, [1], true_cfg_scale=1.0001), atol=0.05)


def test_both_streams_of_guidance_are_forecast(pipe, predictor):
    with lesa.enable_cache(pipe, predictor) as cache:
        draw(pipe, [2], steps=50)
    assert {name: stream.computed for name, stream in cache.stats.streams.items()} == {
        "cond": list(PHOTOS_SCHEDULES[9]),
        "uncond": list(PHOTOS_SCHEDULES[9]),
    }


@pytest.mark.slow
def test_nine_of_fifty_steps_stay_close_to_all(tmp_path):
    evaluation = run_demo(tmp_path, num_samples=4, progress=False, model="photos")
    computed = {
        run["name"]: run["computed_steps"] for run in json.loads((tmp_path / "summary.json").read_text())["runs"]
    }
    settings = DEMOS["photos"].taylorseer
    assert computed == {
        "reference": 50,
        "newton-9": 9,
        "newton-8": 8,
        "universal-9": 9,
        **{str(setting): setting.computed_in(50) for setting in settings},
        "fewer-steps-9": 9,
        "fewer-steps-8": 8,
    }
    assert sorted({setting.computed_in(50) for setting in settings}) == [9, 10]
    taylorseer = max(run.psnr for run in evaluation.runs if run.name.startswith("taylorseer"))
    # Measured on these four samples: 32.1 dB, and by 8.4 and 13.6 dB more than the others.
    assert evaluation["newton-9"].psnr > 30
    assert evaluation["newton-9"].psnr > taylorseer + 6
    assert evaluation["newton-9"].psnr > evaluation["fewer-steps-9"].psnr + 10


def test_the_export_can_be_walked_from_the_command_line(tmp_path, pipe):
    commands = export(tmp_path, model="photos")
    assert "--schedule 0,2,5,9,15,22,31,40,46 " in commands[2]
    counts = {"inputs": 320, "prompts": 10, "test-inputs": TEST_SAMPLES}
    assert {name: len(read_inputs(tmp_path / f"{name}.safetensors")) for name in counts} == counts
    generate = ["--model", str(tmp_path / "model"), "--inputs", str(tmp_path / "prompts.safetensors"), "--steps", "2"]
    cli.main(["generate", *generate, "--predictor", str(PREDICTOR), "--output", str(tmp_path / "photo.png")])
    arguments = read_inputs(tmp_path / "prompts.safetensors")[4]
    assert arguments["true_cfg_scale"] == photos.GUIDANCE
    assert len(sorted(tmp_path.glob("photo*.png"))) == 10


def test_the_command_line_knows_both_models(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("lesa.demo.run.export", lambda folder, model: asked.append(model) or ["lesa fit"])
    for option in ([], ["--model", "photos"], ["--model", "digits"]):
        cli.main(["demo", "--export", str(tmp_path), *option])
    assert asked == ["digits", "photos", "digits"]


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`?model`? must be one of 'digits', 'photos'"):
        run_demo(tmp_path, model="faces")
    with pytest.raises(ValueError, match="`?model`? must be one of 'digits', 'photos'"):
        export(tmp_path, model="faces")
    assert list(tmp_path.iterdir()) == []
