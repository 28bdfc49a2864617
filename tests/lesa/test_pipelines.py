import pytest
from diffusers import DiffusionPipeline

from lesa.pipelines import load_pipeline
from lesa_kernels.checks import check_folder_or_id


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


@pytest.mark.parametrize(
    "name",
    ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "nowhere", "nowhere/", "a/b/c", "models/nowhere", "file"],
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(monkeypatch, tmp_path, name):
    def ask(*_, **__):
        raise AssertionError("it was looked for")

    monkeypatch.setattr(DiffusionPipeline, "load_config", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("")
    reason = "which is a file" if name == "file" else f"and there is no folder '{name}'"
    with pytest.raises(FileNotFoundError, match=rf"`folder_or_id` must be a folder or a hub id .* '{name}', {reason}"):
        load_pipeline(name)


def test_a_folder_and_a_hub_id_are_let_through(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for value in ("some/model", "models", "./models", tmp_path / "models", tmp_path):
        check_folder_or_id("model", value)


def test_a_modular_pipeline_is_not_loaded_by_name(tmp_path):
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "FluxModularPipeline"}')
    with pytest.raises(ValueError, match="has a modular pipeline, .* Put it together in Python"):
        load_pipeline(tmp_path)
    (tmp_path / "modular_model_index.json").unlink()
    with pytest.raises(OSError, match="model_index.json"):
        load_pipeline(tmp_path)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`model` must be a folder or a hub id such as 'user/name', but got ''"):
        check_folder_or_id("model", "")
