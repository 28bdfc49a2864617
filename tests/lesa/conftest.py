import pytest
import torch

import digits_pipelines
import lesa
from lesa.demo import digits


@pytest.fixture(scope="session")
def _digits_pipeline():
    return digits.load_pipeline()


@pytest.fixture(scope="session")
def cut_pipeline():
    """The digits pipeline with half of its blocks. A file whose tests need no more names it `_digits_pipeline`."""
    return digits_pipelines.cut_pipeline()


@pytest.fixture
def pipe(_digits_pipeline):
    """The digits pipeline, one for the whole session. Tests that change its weights or dtype take `fresh_pipe`."""
    pipe, scheduler = _digits_pipeline, _digits_pipeline.scheduler
    yield pipe
    lesa.disable_cache(pipe)
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()
    for attribute in ("forward", "_diffusers_hook"):  # whatever a failed test left
        pipe.transformer.__dict__.pop(attribute, None)
    pipe.scheduler = scheduler


@pytest.fixture
def fresh_pipe():
    """A digits pipeline of the test's own."""
    return digits.load_pipeline()


@pytest.fixture
def generate():
    """`generate(pipe, steps=12, labels=(3, 8), seed=0, **options)` -> latents `[N, 64, 4]`."""

    def run(pipe, steps=12, labels=(3, 8), seed=0, **options):
        inputs = digits.inputs_for(labels)
        dtype = pipe.transformer.dtype
        arguments = {
            name: torch.cat([i[name] for i in inputs]).to(dtype) for name in ("prompt_embeds", "pooled_prompt_embeds")
        }
        generator = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
        arguments |= {"height": digits.SIDE, "width": digits.SIDE, "output_type": "latent", "generator": generator}
        return pipe(**{**arguments, "num_inference_steps": steps, **options}).images

    return run
