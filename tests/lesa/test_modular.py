"""Modular pipelines of diffusers, which do not tell a cache that a run has ended."""

import gc
import importlib
import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import lesa
import small_pipelines as small
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 10
SOME = [0, 1, 2, 6]
REST = [3, 4, 5, 7, 8, 9]
SIDE = 32


def blocks(module, name):
    """An instance of a class of blocks, which older versions of diffusers do not have."""
    module = pytest.importorskip(f"diffusers.modular_pipelines.{module}")
    if not hasattr(module, name):
        pytest.skip(f"this version of diffusers has no {name}")
    return getattr(module, name)()


def flux():
    pipe = blocks("flux.modular_blocks_flux", "FluxCoreDenoiseStep").init_pipeline()
    pipe.update_components(transformer=small.flux_transformer().eval(), scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe, small.embeddings(1)


def qwen(**guidance):
    guiders = importlib.import_module("diffusers")
    pipe = blocks("qwenimage.modular_blocks_qwenimage", "QwenImageCoreDenoiseStep").init_pipeline()
    pipe.update_components(
        transformer=small.qwen_transformer().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        guider=guiders.ClassifierFreeGuidance(3.0, **guidance),
    )
    texts = [small.embeddings(1, negative, pooled=False, mask="prompt_embeds_mask") for negative in (False, True)]
    return pipe, {**texts[0], **texts[1]}


CASES = {
    "flux": (flux, {"main": STEPS}),
    "qwen with guidance": (qwen, {"main": STEPS, "main-2": STEPS}),
    "qwen with guidance in the first half": (lambda: qwen(stop=0.5), {"main": STEPS, "main-2": STEPS // 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_modular_pipeline_frees_its_rings(case):
    torch.manual_seed(0)
    make, streams = CASES[case]
    pipe, arguments = make()
    pipe.set_progress_bar_config(disable=True)
    predictor, rings = FusedKANPredictor(PredictorConfig(small.DIM, rank=0, hidden=4)), []
    make_ring = predictor.make_ring

    def remember(*args):
        ring = make_ring(*args)
        rings.append(weakref.ref(ring.storage))
        return ring

    predictor.make_ring = remember

    def generate():
        generator = torch.Generator().manual_seed(0)
        options = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "generator": generator}
        return pipe(**arguments, **options, output="latents")

    plain = generate()
    with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
        made = []
        for number in range(2):
            made.append(generate())
            gc.collect()
            assert len(rings) == len(streams) * (number + 1) and [ring() for ring in rings] == [None] * len(rings)
            assert handle.stats.runs == number + 1
            for name, steps in streams.items():
                stream = handle.stats.streams[name]
                assert stream.computed == [step for step in SOME if step < steps]
                assert stream.predicted == [step for step in REST if step < steps]
                assert stream.ring_device_bytes > 0
    assert torch.equal(*made) and not torch.equal(made[0], plain)
    assert torch.equal(generate(), plain)
