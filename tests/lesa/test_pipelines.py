import pytest
from diffusers import DiffusionPipeline

from lesa.pipelines import load_pipeline


@pytest.fixture
def seen(monkeypatch):
    """The options with which diffusers was asked, by method."""
    seen = {}

    def load_config(source, **options):
        seen["load_config"] = options
        return {"_class_name": "FluxPipeline", "text_encoder": [None, None], "vae": ["diffusers", "AutoencoderKL"]}

    def from_pretrained(source, **options):
        seen["from_pretrained"] = options

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    return seen


def test_hub_options_reach_the_index_too(seen):
    hub = {"revision": "v2", "token": "t", "cache_dir": "c", "local_files_only": True}
    load_pipeline("some/model", torch_dtype="bfloat16", **hub)
    assert seen["load_config"] == hub
    assert seen["from_pretrained"] == {"text_encoder": None, "torch_dtype": "bfloat16", **hub}


def test_a_component_that_is_passed_is_not_absent(seen):
    load_pipeline("some/model", text_encoder="mine")
    assert seen["from_pretrained"] == {"text_encoder": "mine"}
