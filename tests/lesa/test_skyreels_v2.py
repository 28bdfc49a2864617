"""What the frames of SkyReels-V2 and ChronoEdit do in a run beside what all families do."""

import diffusers
import pytest
import torch

import lesa
import small_chronoedit
import small_skyreels_v2
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, SOME = 12, [0, 1, 2, 5, 9]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(verbosity)


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


@pytest.mark.parametrize(
    ("of_frames", "expected"),
    [
        ([0, 0, 700, 700], 700),
        ([60, 60, 700, 700], 700),  # with the most noise for which the pipelines do not warn
        ([20, 20, 5, 5], 5),  # a last step below the noise of the given frames
        ([700, 700, 700, 700], 700),
        ([61, 61, 700, 700], None),
        ([500, 600, 700, 700], None),
    ],
)
def test_the_step_of_frames_is_that_of_the_last_one(of_frames, expected):
    transformer = small_skyreels_v2.CASES["skyreels forced cfg"].build().transformer
    adapter = adapter_for(type("Pipe", (), {"transformer": transformer})())
    found = adapter.timestep({"timestep": torch.tensor([of_frames, of_frames])})
    wanted = torch.full((2,), torch.nan if expected is None else float(expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("ar_step", [1, 3])
def test_frames_at_different_steps_are_computed(ar_step):
    case = small_skyreels_v2.CASES["skyreels forced cfg"]
    pipe, more = case.build(), {"ar_step": ar_step, "causal_block_size": 1}
    plain = case.latents(pipe, steps=STEPS, **more)
    with (
        lesa.enable_cache(pipe, line(), SOME) as handle,
        pytest.warns(RuntimeWarning, match="the timestep is not one of the scheduler's"),
    ):
        cached = case.latents(pipe, steps=STEPS, **more)
    assert torch.equal(cached, plain)
    assert handle.stats.unlocated > 2 * STEPS and handle.stats.predicted_steps == 0


@pytest.mark.slow
def test_noise_that_is_added_to_given_frames_does_not_hide_the_step():
    case = small_skyreels_v2.CASES["skyreels forced image cfg"]
    pipe = case.build()
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        case.latents(pipe, steps=STEPS, addnoise_condition=20)
    assert all(stream.computed == SOME for stream in handle.stats.streams.values())


@pytest.mark.slow
def test_the_step_after_frames_are_left_out_is_computed():
    case = small_chronoedit.CASES["chronoedit"]
    pipe = case.build()
    more = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 4, "num_frames": 9}
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="the shape changed"):
        latents = case.latents(pipe, steps=STEPS, **more)
    (stream,) = handle.stats.streams.values()
    assert latents.shape[2] == 2 and stream.computed == sorted([*SOME, 4])
    assert stream.reasons[4] == "the shape changed"
