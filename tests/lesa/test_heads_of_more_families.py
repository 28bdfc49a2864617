"""The output heads of families as plain tensors, against the models' own modules in float64."""

import pytest
import torch

import more_pipelines as small
from lesa.models import adapter_for
from lesa_kernels import output_head

CASES = {
    "z-image": 1e-12,
    "z-image omni": 1e-12,
    "lumina2": 1e-12,
    "lumina-next": 1e-12,
    "hidream": 1e-12,
    "qwen 2.1": 1e-12,
    "ideogram4": 1e-12,
    "krea2": 1e-6,  # its norm computes in float32
    "aura flow": 1e-12,
    "ernie image": 1e-12,
    "glm image": 1e-12,
}
"""Relative errors that are allowed."""


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_head_as_tensors_is_the_models(name):
    case, seen = small.ALL[name], []
    pipe = case.build()
    adapter = adapter_for(pipe)

    def see(module, args, kwargs):
        seen.append((adapter.bind(args, kwargs), adapter.conditioning(adapter.bind(args, kwargs), torch.float32)))

    with pipe.transformer.register_forward_pre_hook(see, with_kwargs=True):
        case.latents(pipe, steps=1, batch=2)
    call, conditioning = seen[0]
    pipe.transformer.double()
    conditioning = conditioning.double()
    features = torch.randn(*adapter.shape(call), adapter.feature_dim, dtype=torch.float64)
    expected = adapter.run_head(features, conditioning, call)
    actual = output_head(features, adapter.output_head(conditioning))
    assert expected.dtype == actual.dtype == torch.float64 and expected.std() > 0.01
    assert (actual - expected).abs().max() <= CASES[name] * expected.abs().max()
