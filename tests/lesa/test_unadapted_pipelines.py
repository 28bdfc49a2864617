"""The probe on every pipeline class in `unadapted_pipelines`, small and random: the same checks for each of them."""

from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch

import lesa
import unadapted_pipelines
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


@contextmanager
def counted(adapter):
    """A list of how often each block of the transformer ran."""
    counts, hooks = [0] * len(adapter.blocks), []
    for number, block in enumerate(adapter.blocks):

        def count(*_, number=number):
            counts[number] += 1

        hooks.append(block.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def test_classes_with_an_adapter_are_not_probed():
    adapted = {name for adapter in ADAPTERS for name in adapter.transformer_classes}
    assert not adapted & {*unadapted_pipelines.CASES, *REFUSED} and not {*PROBED} & {*REFUSED}


@pytest.mark.parametrize(
    "kind, name",
    [
        pytest.param(kind, name, id=name, marks=[] if name == unadapted_pipelines.QUICK else [pytest.mark.slow])
        for kind, cases in unadapted_pipelines.CASES.items()
        for name in cases
    ],
)
def test_the_probe_skips_the_blocks_and_stays_near(kind, name):
    case = unadapted_pipelines.CASES[kind][name]
    pipe = case.build()
    assert type(pipe.transformer).__name__ == kind
    wanted, streams = case.latents(pipe, steps=STEPS), len(case.streams)
    adapter = adapters_or_probes(pipe)["transformer"]
    assert adapter.family == "probe"
    with counted(adapter) as counts, lesa.enable_cache(pipe, line(), range(STEPS)) as handle:
        assert torch.equal(case.latents(pipe, steps=STEPS), wanted)
    assert [*handle.stats.streams] == [*case.streams] and not handle.stats.unlocated
    assert counts == [STEPS * streams] * len(counts)
    with lesa.enable_cache(pipe, line(), SOME) as handle, counted(adapter) as counts:
        cached = case.latents(pipe, steps=STEPS)
    assert [*handle.stats.streams] == [*case.streams] and any(n.startswith("probe: ") for n in handle.stats.notes)
    assert all((s.computed, s.predicted) == (SOME, REST) for s in handle.stats.streams.values())
    assert counts == [len(SOME) * streams] * len(counts)
    with lesa.enable_cache(pipe, line(), [0]):
        held = case.latents(pipe, steps=STEPS)
    assert cached.shape == wanted.shape and cached.isfinite().all()
    assert 0 < distance(cached, wanted) < NEAR and distance(cached, wanted) < distance(held, wanted) / 4
    assert torch.equal(case.latents(pipe, steps=STEPS), wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lesa")
@pytest.mark.parametrize("kind", unadapted_pipelines.COMPUTED)
def test_where_the_way_is_not_clear_all_is_computed(kind):
    cases, reason = unadapted_pipelines.COMPUTED[kind]
    for case in cases.values():
        pipe = case.build()
        assert type(pipe.transformer).__name__ == kind
        wanted = case.latents(pipe, steps=STEPS)
        with lesa.enable_cache(pipe, line(), SOME) as handle:
            assert torch.equal(case.latents(pipe, steps=STEPS), wanted)
        for stream in handle.stats.streams.values():
            assert not stream.predicted and {stream.reasons[step] for step in REST} == {reason}


@pytest.mark.parametrize("kind", ["Cosmos3OmniTransformer", "RFD4ProteinaTransformer"])
def test_transformers_without_a_timestep_are_refused(kind):
    class Stand(getattr(diffusers, kind)):
        """It has the forward of the class, and one list of blocks, but no weights of its own."""

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])

    with pytest.raises(TypeError, match="without an argument timestep or"):
        lesa.enable_cache(SimpleNamespace(transformer=Stand()), line(), SOME)
