"""What `lesa estimate` knows of the families in `more_pipelines`, held to what torch counts in a call of a pipeline."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import more_pipelines as small
from lesa.models import adapter_for

CALLS = {
    "z-image": 5,
    "lumina2": 6,
    "lumina-next": 6,
    "hidream square": 10,
    "qwen 2.1": 3,
    "ideogram4": 8,
    "krea2": 5,
    "aura flow": 5,
    "ernie image": 6,
    "glm image": 5,
    "mochi": 5,
}
"""Cases without guidance, and how many text tokens they have."""

NEAR = {"mochi": 0.002}
"""What a formula may leave out: the products of the positions, which no weights are in."""


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_flops_are_those_that_torch_counts(name):
    case = small.ALL[name]
    pipe, calls = case.build(), []
    adapter = adapter_for(pipe)
    with pipe.transformer.register_forward_pre_hook(lambda *args: calls.append(args[1:]), with_kwargs=True):
        case.latents(pipe, steps=2)
    args, kwargs = calls[0]
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        pipe.transformer(*args, **kwargs)
    costs = adapter.costs({**pipe.transformer.config, "_class_name": type(pipe.transformer).__name__})
    _, tokens = adapter.shape(adapter.bind(args, kwargs))
    assert costs.flops(tokens, CALLS[name]) == pytest.approx(counter.get_total_flops(), rel=NEAR.get(name, 0), abs=0)
    assert (costs.dim, costs.head_width) == (adapter.feature_dim, adapter.projection.out_features)
    usual = type(costs)(costs.usual_config)
    size = next(iter(costs.presets.values()))
    if size[2] == 1:  # an image of 1024² pixels
        assert usual.image_tokens(*size, costs.scale, costs.frame_scale) == 4096
