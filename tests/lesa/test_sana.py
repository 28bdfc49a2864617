"""What is special about the pipelines of Sana."""

import pytest
import torch

import lesa
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig
from small_sana import CASES

STEPS, SOME = 12, [0, 1, 2, 5, 9]


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def test_a_controlnet_runs_in_computed_steps_only():
    """The pipeline converts each residual before the transformer gets it."""
    case, calls = CASES["sana controlnet cfg"], []
    pipe = case.build()
    plain = case.latents(pipe, steps=STEPS)
    with pipe.controlnet.register_forward_hook(lambda *_: calls.append(1)):
        with lesa.enable_cache(pipe, line(), range(STEPS)):
            assert torch.equal(case.latents(pipe, steps=STEPS), plain)
        assert len(calls) == STEPS
        calls.clear()
        with lesa.enable_cache(pipe, line(), SOME):
            cached = case.latents(pipe, steps=STEPS)
        assert len(calls) == len(SOME)
    assert 0 < (cached - plain).norm() < 0.02 * plain.norm()


def test_the_angles_of_sprint_are_taken_as_noise_levels():
    case = CASES["sana sprint"]
    pipe = case.build()
    with lesa.enable_cache(pipe, line(), SOME) as handle:
        case.latents(pipe, steps=STEPS)
    angles = pipe.scheduler.timesteps
    passed = adapter_for(pipe).pass_timesteps(angles, pipe.scheduler)
    assert passed[0] == pytest.approx(1.0, abs=1e-5) and passed[-1] == 0 and (passed.diff() < 0).all()
    assert handle.stats.unlocated == 0
