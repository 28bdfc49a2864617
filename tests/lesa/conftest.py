from contextlib import contextmanager

import pytest
import torch

import digits_pipelines
import lesa
from lesa.demo import digits


@pytest.fixture(scope="session")
def _digits_pipeline():
    return digits.load_pipeline()


@pytest.fixture(scope="session")
def _cut_pipeline():
    return digits_pipelines.cut_pipeline()


@contextmanager
def _lent(pipe):
    scheduler = pipe.scheduler
    yield pipe
    lesa.disable_cache(pipe)
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()
    for attribute in ("forward", "_diffusers_hook"):  # whatever a failed test left
        pipe.transformer.__dict__.pop(attribute, None)
    pipe.scheduler = scheduler


@pytest.fixture
def pipe(_digits_pipeline):
    """The digits pipeline, one for the whole session. Tests that change its weights or dtype take `fresh_pipe`."""
    with _lent(_digits_pipeline) as pipe:
        yield pipe


@pytest.fixture
def cut_pipe(_cut_pipeline):
    """As `pipe`, with half of the blocks: for tests that need no trained predictor."""
    with _lent(_cut_pipeline) as pipe:
        yield pipe


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
