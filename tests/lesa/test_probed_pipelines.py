"""The probe on every pipeline class in `probed_pipelines`, small and random: the same checks for each of them."""

import diffusers
import pytest
import torch

import lesa
import probed_pipelines
from lesa.models import ADAPTERS, adapters_or_probes
from lesa_kernels import FusedKANPredictor, PredictorConfig
from more_pipelines import PROBED, REFUSED

STEPS = 12
SOME = [0, 1, 2, 5, 9]
REST = [step for step in range(STEPS) if step not in SOME]
NEAR = 0.02
"""Relative error that forecasts along a line stay below."""


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(verbosity)


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def distance(latents, wanted):
    return float((latents - wanted).norm() / wanted.norm())


def counted(adapter):
    """A list of how often each block of the transformer ran, and what ends the counting."""
    counts, hooks = [0] * len(adapter.blocks), []
    for number, block in enumerate(adapter.blocks):

        def count(*_, number=number):
            counts[number] += 1

        hooks.append(block.register_forward_pre_hook(count))
    return counts, lambda: [hook.remove() for hook in hooks]


def test_classes_with_an_adapter_are_not_probed():
    adapted = {name for adapter in ADAPTERS for name in adapter.transformer_classes}
    assert not adapted & {*PROBED, *REFUSED} and not {*PROBED} & {*REFUSED}


@pytest.mark.parametrize(
    "kind, name",
    [
        pytest.param(kind, name, id=name, marks=[] if name == probed_pipelines.QUICK else [pytest.mark.slow])
        for kind, cases in probed_pipelines.CASES.items()
        for name in cases
    ],
)
def test_the_probe_skips_the_blocks_and_stays_near(kind, name):
    case = probed_pipelines.CASES[kind][name]
    pipe = case.build()
    assert type(pipe.transformer).__name__ == kind
    wanted, calls = case.latents(pipe, steps=STEPS), len(case.streams) * case.runs
    adapter = adapters_or_probes(pipe)["transformer"]
    assert adapter.family == "probe"
    counts, end = counted(adapter)
    with lesa.enable_cache(pipe, line(), range(STEPS), strict=True) as handle:
        assert torch.equal(case.latents(pipe, steps=STEPS), wanted)
    assert [*handle.stats.streams] == [*case.streams] and handle.stats.unlocated == 0
    assert all(s.computed == [*range(STEPS)] and not s.predicted for s in handle.stats.streams.values())
    end()
    run_always = case.always_run
    counts, end = counted(adapter)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        cached = case.latents(pipe, steps=STEPS)
    end()
    assert all((s.computed, s.predicted) == (SOME, REST) for s in handle.stats.streams.values())
    assert counts == [
        (STEPS if any(block in {*blocks} for blocks in run_always(pipe.transformer)) else len(SOME)) * calls
        for block in adapter.blocks
    ]
    with lesa.enable_cache(pipe, line(), [0]):
        held = case.latents(pipe, steps=STEPS)
    assert cached.shape == wanted.shape and cached.isfinite().all()
    assert 0 < distance(cached, wanted) < NEAR and distance(cached, wanted) < distance(held, wanted) / 4
    assert torch.equal(case.latents(pipe, steps=STEPS), wanted)
