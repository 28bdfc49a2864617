"""The costs of each family are what a real call of its transformer takes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import more_pipelines as small
from lesa.models import adapter_for

FAMILIES = (
    "ltx-video",
    "cogvideox",
    "sana",
    "sana-video",
    "mochi",
    "cogview4",
    "cogview3plus",
    "kandinsky5",
    "cosmos",
)
"""Those whose pipelines pass all tokens of the text to the transformer, and nothing else."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [small.RECORDED[family] for family in FAMILIES])
@torch.no_grad()
def test_a_call_takes_as_many_flops_as_are_told(name):
    case, calls = small.ALL[name], []
    pipe = case.build()
    adapter = adapter_for(pipe)

    def keep(module, args, kwargs):
        calls.append((args, kwargs))

    with pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True):
        case.latents(pipe, steps=2)
    args, kwargs = calls[-1]
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        pipe.transformer(*args, **kwargs)
    call = adapter.bind(args, kwargs)
    (batch, tokens), text = adapter.shape(call), adapter.text(call)
    costs = adapter.costs({**pipe.transformer.config, "_class_name": type(pipe.transformer).__name__})
    assert (costs.dim, costs.head_width) == (adapter.feature_dim, adapter.projection.out_features)
    assert batch * costs.flops(tokens, text.shape[1]) == pytest.approx(counter.get_total_flops(), rel=0.002)
