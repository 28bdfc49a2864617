"""Ideogram 4: its pipeline has a second transformer, which draws without text."""

import torch

import lesa
from lesa_kernels import FusedKANPredictor, PredictorConfig
from small_ideogram4 import CASES

STEPS = 12
SOME = [0, 1, 2, 5, 9]
REST = [step for step in range(STEPS) if step not in SOME]


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def test_a_second_handle_predicts_the_transformer_without_text():
    case = CASES["ideogram4"]
    pipe, ran = case.build(), []
    wanted = case.latents(pipe, steps=STEPS)
    second = type(pipe)(**{**pipe.components, "transformer": pipe.unconditional_transformer})
    hook = pipe.unconditional_transformer.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with hook, lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        case.latents(pipe, steps=STEPS)
        assert handle.stats.streams["main"].predicted == REST and len(ran) == STEPS
        ran.clear()
        with lesa.enable_cache(second, line(), SOME, strict=True) as other:
            cached = case.latents(pipe, steps=STEPS)
        assert len(ran) == len(SOME)
        for stats in (handle.stats, other.stats):
            assert stats.streams["main"].predicted == stats.streams["main"].fused == REST
    assert 0 < (cached - wanted).norm() < 0.02 * wanted.norm()
    assert torch.equal(case.latents(pipe, steps=STEPS), wanted)
