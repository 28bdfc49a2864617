"""LTX-2: the sound beside the video, which has an output head and a ring of its own."""

import pytest
import torch

import lesa
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig
from small_ltx2 import CASES
from small_pipelines import leave_slow_waves

SOME = [0, 1, 2, 5, 9]
REST = [3, 4, 6, 7, 8, 10, 11]
NEAR = 0.02
"""Relative error that forecasts along a line stay below."""


@pytest.fixture(scope="module")
def pipe():
    pipe = CASES["ltx-2"].build()
    leave_slow_waves(pipe.transformer.audio_time_embed.emb.timestep_embedder.linear_1)
    return pipe


@pytest.fixture(scope="module")
def plain(pipe):
    return video_and_sound(pipe)


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def video_and_sound(pipe):
    """Latents of both."""
    call = {"num_inference_steps": 12, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(**CASES["ltx-2"].inputs(1, **call), return_dict=False)


def distances(latents, wanted):
    return [float((one - other).norm() / other.norm()) for one, other in zip(latents, wanted, strict=True)]


def test_all_steps_computed_give_the_same_video_and_sound(pipe, plain):
    with lesa.enable_cache(pipe, line(), range(12)):
        assert all(torch.equal(one, other) for one, other in zip(video_and_sound(pipe), plain, strict=True))


def test_forecasts_of_video_and_sound_stay_near(pipe, plain):
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        found = distances(video_and_sound(pipe), plain)
    assert [stream.predicted for stream in handle.stats.streams.values()] == [REST]
    with lesa.enable_cache(pipe, line(), [0]):
        held = distances(video_and_sound(pipe), plain)
    for one, other in zip(found, held, strict=True):
        assert 0 < one < NEAR and one < other / 4


def test_a_wrong_forecast_of_the_sound_would_be_noticed(pipe, plain):
    def halved(module, args, output):
        return output / 2 if len(calls) in REST else output

    calls = []
    sound = adapter_for(pipe).branches[1]
    counted = pipe.transformer.register_forward_hook(lambda *_: calls.append(None))
    with counted, sound.projection.register_forward_hook(halved), lesa.enable_cache(pipe, line(), SOME):
        video, of_sound = distances(video_and_sound(pipe), plain)
    assert of_sound > NEAR
