"""What single adapters do beside what `test_more_families.py` sees in the runs of their pipelines."""

from types import SimpleNamespace

import pytest
import torch

import lesa.cache.conditioning
import more_pipelines as small
from lesa.cache.conditioning import Conditioner
from lesa.models import adapter_for

STEPS = 6


def adapter_of(name):
    return adapter_for(SimpleNamespace(transformer=small.ALL[name].transformer().eval()))


@pytest.mark.parametrize("return_dict", [True, False])
@torch.no_grad()
def test_predicted_outputs_of_flux2_are_of_the_class_of_computed_ones(return_dict):
    adapter = adapter_of(small.QUICK["flux2"])
    config, tokens = adapter.transformer.config, 6
    call = {
        "hidden_states": torch.randn(1, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(1, 3, config.joint_attention_dim),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1) if config.guidance_embeds else None,
        "img_ids": torch.zeros(tokens, len(config.axes_dims_rope)),
        "txt_ids": torch.zeros(3, len(config.axes_dims_rope)),
        "return_dict": return_dict,
    }
    computed = adapter.transformer(**call)
    predicted = adapter.output(adapter.bind((), call), torch.zeros_like(computed[0]))
    assert type(predicted) is type(computed) and len(predicted) == len(computed) == 1
    assert predicted[0].shape == computed[0].shape


@pytest.mark.parametrize("steps_at_a_time", [1, 2, 4, STEPS])
@torch.no_grad()
def test_conditioning_by_the_text_is_planned_for_as_many_steps_as_fit(steps_at_a_time, monkeypatch):
    adapter, seen = adapter_of("mochi"), []
    config, batch, tokens = adapter.transformer.config, 2, 5
    own = adapter.condition

    def condition(timestep, inputs, dtype):
        seen.append(sum(value.nbytes for value in inputs.values()))
        return own(timestep, inputs, dtype)

    timesteps = torch.linspace(900, 100, STEPS)
    call = adapter.bind(
        (),
        {
            "hidden_states": torch.randn(batch, config.in_channels, 1, 4, 4),
            "encoder_hidden_states": torch.randn(batch, tokens, config.text_embed_dim),
            "encoder_attention_mask": torch.ones(batch, tokens),
            "timestep": timesteps[:1].expand(batch),
        },
    )
    expected = [adapter.conditioning({**call, "timestep": t.expand(batch)}, torch.float32) for t in timesteps]
    monkeypatch.setattr(adapter, "condition", condition)
    size = sum(call[name].nbytes for name in adapter.conditioned_on)
    most = steps_at_a_time * size + size // 2
    monkeypatch.setattr(lesa.cache.conditioning, "_MOST_BYTES", most)
    run = SimpleNamespace(exact=True, index=0, identity=timesteps, passes=lambda passed: passed)
    conditioner = Conditioner(adapter)
    for run.index in range(STEPS):
        made = conditioner.conditioning(run, call, torch.float32, is_passed=True)
        torch.testing.assert_close(made, expected[run.index], rtol=0, atol=1e-5)
    assert max(seen) == steps_at_a_time * size <= most
    assert len(seen) == -(-STEPS // steps_at_a_time)
