"""What a predictor was made for: how it is kept, and what is said of a pipeline that differs."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import lesa
from lesa import provenance
from lesa.artifacts import fingerprint
from lesa.demo import digits
from lesa.provenance import in_words, of_manifest
from lesa_kernels import FusedKANPredictor, PredictorConfig

BEGIN = "this pipeline differs from the one that the predictor was made for: "
CONFIG = PredictorConfig(128, rank=2, hidden=4)


def inputs():
    return [{**item, "height": digits.SIDE, "width": digits.SIDE} for item in digits.inputs_for((1, 2))]


@pytest.fixture(scope="session")
def recording(_digits_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("provenance") / "recording"
    return lesa.record(_digits_pipeline, inputs(), folder, num_inference_steps=12, progress=False)


@pytest.fixture(scope="session")
def trained(recording):
    return lesa.train(recording, CONFIG, [0, 2, 5, 8], epochs=1, progress=False)


@pytest.fixture
def predictor(trained):
    return copy.deepcopy(trained)


def notes_of(pipe, predictor):
    """What is said when the cache is enabled: the same line as a warning and in the stats."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, predictor) as handle:
            notes = [*handle.stats.notes]
    said = [str(warning.message) for warning in caught if str(warning.message).startswith("lesa: ")]
    assert said == [f"lesa: {note}" for note in notes]
    return [note.removeprefix(BEGIN) for note in notes]


# What is kept


def test_a_trained_predictor_knows_its_model(trained, recording):
    assert trained.provenance == of_manifest(recording.manifest)
    found = trained.provenance
    assert (found["family"], found["pipeline"], found["samples"]) == ("flux", "FluxPipeline", 2)
    assert (found["dtypes"], found["scheduler"]["shift"]) == ({"transformer": "float32"}, 1.0)
    assert found["transformer"] == recording.manifest["transformer"]


def test_it_survives_what_is_done_with_a_predictor(predictor, tmp_path):
    expected = copy.deepcopy(predictor.provenance)
    predictor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "provenance.json").read_text()) == expected
    copies = (
        FusedKANPredictor.from_pretrained(tmp_path),
        copy.copy(predictor),
        copy.deepcopy(predictor),
        pickle.loads(pickle.dumps(predictor)),
        predictor.to(torch.float64),
        predictor.train().eval(),
    )
    assert all(each.provenance == expected for each in copies)


@pytest.mark.slow
def test_refining_keeps_it(predictor, recording, pipe, tmp_path):
    expected = {**predictor.provenance, "mine": 3}
    predictor.provenance = {**expected, "samples": 99}
    options = {"rounds": 1, "epochs": 1, "progress": False, "out_dir": tmp_path / "refined"}
    refined = lesa.refine(predictor, recording, pipe, inputs(), **options)
    assert refined.provenance == expected == FusedKANPredictor.from_pretrained(tmp_path / "refined").provenance
    assert predictor.provenance["samples"] == 99


def test_fingerprints_are_those_of_the_transformers():
    manifest = {"transformer": "ab", "weights": {"transformer_2": "cd", "text_encoder": "ef"}}
    both = {**manifest, "transformers": ["transformer", "transformer_2"]}
    assert of_manifest(both) == {"transformer": "ab", "weights": {"transformer_2": "cd"}}
    assert of_manifest(manifest) == {"transformer": "ab"}


def test_in_words(predictor):
    facts = in_words({**predictor.provenance, "adapters": {"transformer": {"style": 0.8}}})
    assert {"pipeline: `FluxPipeline`", "dtype of `transformer`: float32", "adapters: style with scale 0.8"} <= {*facts}
    assert "scheduler: `FlowMatchEulerDiscreteScheduler`, shift 1.0" in facts
    assert in_words(None) == ["unknown: the predictor does not say it"]


# What differs


def test_nothing_is_said_of_the_same_pipeline_or_without_knowledge(pipe, predictor, generate):
    assert notes_of(pipe, predictor) == []
    for unknown in (None, {}, {"mine": 3}):
        predictor.provenance = unknown
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        assert notes_of(pipe, predictor) == []


def test_a_note_is_in_the_stats_of_each_run_and_warned_of_once(pipe, predictor, generate):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.warns(RuntimeWarning, match="scheduler.shift was 1.0 and is 3.0"):
        handle = lesa.enable_cache(pipe, predictor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(2):
            generate(pipe)
            assert handle.stats.notes[0] == f"{BEGIN}scheduler.shift was 1.0 and is 3.0"
    assert handle.stats.notes[0] in handle.stats.summary()


def test_another_scheduler_is_named(pipe, predictor):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    said = "the scheduler was FlowMatchEulerDiscreteScheduler and is FlowMatchHeunDiscreteScheduler"
    assert notes_of(pipe, predictor) == [said]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0, invert_sigmas=True, base_shift=0.1, max_shift=2.0)
    (said,) = notes_of(pipe, predictor)
    assert said.startswith("scheduler.base_shift was 0.5 and is 0.1; scheduler.invert_sigmas was False and is True; ")
    assert said.endswith("1 more options of the scheduler differ")


def test_an_option_of_a_newer_diffusers_is_no_difference(pipe, predictor):
    del predictor.provenance["scheduler"]["max_shift"]
    assert notes_of(pipe, predictor) == []


def test_another_dtype_is_not_other_weights(fresh_pipe, predictor):
    fresh_pipe.to(torch.bfloat16)
    assert notes_of(fresh_pipe, predictor) == ["the dtype of `transformer` was float32 and is bfloat16"]


def test_other_weights(fresh_pipe, predictor):
    with torch.no_grad():
        next(fresh_pipe.transformer.parameters()).view(-1)[0] += 1
    assert notes_of(fresh_pipe, predictor) == ["the weights of `transformer` are others"]


def test_quantisation_is_named(pipe, predictor):
    predictor.provenance["quantisation"] = {"transformer": {"config": {"quant_method": "bitsandbytes", "bits": 8}}}
    said = "the quantisation of `transformer` was bits 8, quant_method bitsandbytes and is none"
    assert notes_of(pipe, predictor) == [said]


def test_weights_are_read_again_only_if_they_have_changed(fresh_pipe, predictor, monkeypatch):
    read = []
    monkeypatch.setattr(provenance, "fingerprint", lambda model: read.append(model) or fingerprint(model))
    for _ in range(3):
        assert notes_of(fresh_pipe, predictor) == []
    assert len(read) == 1
    weight = fresh_pipe.transformer.x_embedder.weight
    weight.data += 1  # as PEFT fuses adapters; the version of the tensor stays
    assert notes_of(fresh_pipe, predictor) == ["the weights of `transformer` are others"]
    weight.data -= 1
    with torch.no_grad():
        weight[3, 1] += 1  # a value that is not probed
    assert notes_of(fresh_pipe, predictor) == ["the weights of `transformer` are others"]
    weight.data = weight.data.clone()
    assert notes_of(fresh_pipe, predictor) == ["the weights of `transformer` are others"]
    assert len(read) == 4 and notes_of(fresh_pipe, predictor) and len(read) == 4


def test_weights_that_are_offloaded_are_not_read(pipe, predictor, monkeypatch):
    monkeypatch.setattr("lesa.provenance.fingerprint", lambda model: pytest.fail("read the weights"))
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda", 0))
    predictor.provenance["transformer"] = "another"
    assert notes_of(pipe, predictor) == []


def test_a_provenance_of_another_form_is_named(pipe, predictor):
    predictor.provenance["dtypes"] = "float32"
    with pytest.raises(ValueError, match=r"`predictor.provenance\['dtypes'\]` must be a dict, but got 'float32'"):
        lesa.enable_cache(pipe, predictor)
    assert not hasattr(pipe.transformer, "_diffusers_hook")


def test_a_lora_is_named_once(fresh_pipe, predictor, generate):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    transformer = fresh_pipe.transformer
    transformer.add_adapter(peft.LoraConfig(r=1, lora_alpha=2, target_modules=["to_q"]), adapter_name="style")
    with pytest.warns(RuntimeWarning) as caught, lesa.enable_cache(fresh_pipe, predictor) as handle:
        generate(fresh_pipe)
    assert handle.stats.notes == [f"{BEGIN}the adapter style is on with scale 2.0, and was not"]
    assert len([warning for warning in caught if "style" in str(warning.message)]) == 1
    predictor.provenance["adapters"] = {"transformer": {"style": 0.5, "other": 1.0}}
    said = "the adapter other was on with scale 1.0, and is not; the scale of the adapter style was 0.5 and is 2.0"
    assert notes_of(fresh_pipe, predictor) == [said]
    known = {"adapters": {"transformer": {"style": 2.0}}, "transformer": fingerprint(transformer)}
    predictor.provenance |= known
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with lesa.enable_cache(fresh_pipe, predictor) as handle:
            generate(fresh_pipe)
    assert handle.stats.notes == []


def test_a_lora_that_is_off_or_comes_later(fresh_pipe, predictor, generate):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    with lesa.enable_cache(fresh_pipe, predictor) as handle:
        fresh_pipe.transformer.add_adapter(peft.LoraConfig(r=1, target_modules=["to_q"]), adapter_name="style")
        with pytest.warns(RuntimeWarning, match="the adapters style are on: unless"):
            generate(fresh_pipe)
        assert len(handle.stats.notes) == 1
    fresh_pipe.transformer.disable_adapters()
    assert notes_of(fresh_pipe, predictor) == []  # its parameters are there, and change nothing
    predictor.provenance["fused_loras"] = ["style"]
    assert notes_of(fresh_pipe, predictor) == ["the fused LoRAs were style and are none"]
