import pytest
import torch
from diffusers.utils import logging as diffusers_logging

import digits_pipelines
import lesa
from lesa.demo import digits
from lesa_kernels.forecasters import FORECASTERS


@pytest.fixture
def registry():
    """The forecasters that a test registers end with it."""
    before = dict(FORECASTERS)
    yield
    FORECASTERS.clear()
    FORECASTERS.update(before)


@pytest.fixture(scope="session")
def _digits_pipeline():
    return digits_pipelines.cut_pipeline()


@pytest.fixture(scope="session")
def whole_pipeline():
    """The digits pipeline with all of its blocks. A file whose tests need them names it `_digits_pipeline`."""
    return digits.load_pipeline()


def parts_of(pipe):
    """Name -> facts: all by which one test could change what another test gets from the same pipeline."""
    transformer = pipe.transformer
    facts = {name: (weight.data_ptr(), weight._version) for name, weight in transformer.state_dict().items()}
    for name, module in transformer.named_modules():
        # Attributes of the transformer itself are mended after a test.
        attributes = [attribute for attribute in vars(module) if name or attribute == "training"]
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        facts[name or "transformer"] = type(module), sorted(attributes), hooks, module.training
    return {**facts, "scheduler": dict(pipe.scheduler.config)}


@pytest.fixture
def pipe(_digits_pipeline):
    """The digits pipeline with half of its blocks, one for the whole session.

    Tests that change its weights or dtype take `fresh_pipe`.
    """
    pipe, scheduler = _digits_pipeline, _digits_pipeline.scheduler
    before = parts_of(pipe)
    yield pipe
    lesa.disable_cache(pipe)
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()
    for attribute in ("forward", "_diffusers_hook"):  # whatever a failed test left
        pipe.transformer.__dict__.pop(attribute, None)
    pipe.scheduler = scheduler
    after = parts_of(pipe)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    assert not changed, "the test shares the pipeline with others, and leaves these parts of it changed"


@pytest.fixture
def fresh_pipe():
    """A digits pipeline of the test's own, with half of its blocks."""
    return digits_pipelines.cut_pipeline()


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


@pytest.fixture
def settings_of_the_command(monkeypatch):
    """What `lesa.cli.main` sets for its process ends with the test."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    before = diffusers_logging.get_verbosity()
    yield
    diffusers_logging.set_verbosity(before)
    diffusers_logging.enable_progress_bar()
