"""Perturbed-attention guidance, whose passes cannot be recorded."""

import diffusers
import pytest

import lesa
import small_pipelines as small


def pag_pipeline():
    parts = small.SD3["sd3"].build().components
    parts = {name: part for name, part in parts.items() if "image" not in name and "feature" not in name}
    return diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.0"])


@pytest.mark.slow
def test_perturbed_attention_guidance_is_named(tmp_path):
    case = small.SD3["sd3"]
    inputs = {**small.embeddings(1), **case.size, **case.options}
    with pytest.raises(ValueError, match="perturbed-attention guidance .*Pass 0 as `pag_scale`"):
        lesa.record(pag_pipeline(), [inputs], tmp_path / "no", 3, progress=False)
    done = lesa.record(pag_pipeline(), [{**inputs, "pag_scale": 0.0}], tmp_path / "yes", 3, progress=False)
    assert len(done) == 1
