"""Models larger than a device: parts are dispatched by hooks of accelerate, as with `device_map`, to CPU and disk.

The hooks are those that bring parts to several GPUs.
"""

import accelerate
import numpy as np
import pytest
import torch
from diffusers.models import model_loading_utils
from PIL import Image

import digits_pipelines
import lesa
import small_pipelines
from driven_loops import REST, SOME, STEPS
from lesa import cli
from lesa.artifacts import fingerprint
from lesa.demo import digits
from lesa.inputs import write_inputs
from lesa.models import adapter_for, features_device
from lesa.pipelines import load_divided, load_pipeline
from predictors import make_predictor

slow = pytest.mark.slow
CPU = torch.device("cpu")
OPTIONS = {"num_inference_steps": STEPS, "progress": False}


def parts_of(transformer):
    return dict.fromkeys([name for name, _ in transformer.named_children()], "cpu")


def blocks_on_disk(transformer, folder):
    """The output head is on the CPU."""
    device_map = {**parts_of(transformer), "transformer_blocks": "disk"}
    accelerate.dispatch_model(transformer, device_map, "cpu", offload_dir=folder, force_hooks=True)


def head_on_disk(transformer, folder):
    device_map = {**parts_of(transformer), "norm_out": "disk", "proj_out": "disk", "single_transformer_blocks": "disk"}
    accelerate.dispatch_model(transformer, device_map, "cpu", offload_dir=folder, force_hooks=True)


def all_on_one_device(transformer, folder):
    accelerate.dispatch_model(transformer, {"": "cpu"}, force_hooks=True)


def all_in_memory(transformer, folder):
    """As `enable_sequential_cpu_offload`: weights are on the meta device between calls."""
    accelerate.cpu_offload(transformer, CPU)


def one_block_in_memory(transformer, folder):
    """There are no hooks on the output head."""
    accelerate.cpu_offload(transformer.single_transformer_blocks[0], CPU)


def groups_on_disk(transformer, folder):
    """Of diffusers: weights that are not used hold no values."""
    transformer.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


EXACT = [blocks_on_disk, head_on_disk, all_on_one_device, all_in_memory, one_block_in_memory]
WAYS = [*EXACT, groups_on_disk]
MORE = [all_on_one_device, one_block_in_memory]  # slow tests
ROUNDING = {"rtol": 0, "atol": 1e-5}


def dispatched(way, folder):
    pipe = digits_pipelines.cut_pipeline()
    way(pipe.transformer, folder)
    # By it diffusers knows where to make tensors; else it may take the first weight's device, which can be meta.
    accelerate.hooks.add_hook_to_module(pipe.vae, accelerate.hooks.AlignDevicesHook(CPU, io_same_device=True))
    return pipe


@pytest.fixture(
    scope="module",
    params=[pytest.param(way, marks=slow if way in MORE else ()) for way in WAYS],
    ids=lambda way: way.__name__,
)
def way(request):
    return request.param


@pytest.fixture(scope="module")
def divided(way, tmp_path_factory):
    """One pipeline for the tests of a way. They do not change it."""
    return dispatched(way, tmp_path_factory.mktemp("offloaded"))


@pytest.fixture(scope="module")
def inputs():
    return digits.inputs_for((3, 8))


@pytest.fixture(scope="module")
def recorded(_digits_pipeline, inputs, tmp_path_factory):
    """A recording of the model when it is whole."""
    return lesa.record(_digits_pipeline, inputs, tmp_path_factory.mktemp("whole") / "recorded", **OPTIONS)


def test_the_fingerprint_is_that_of_the_whole_model(pipe, divided, generate):
    whole = fingerprint(pipe.transformer)
    assert fingerprint(divided.transformer) == whole
    generate(divided, steps=1)
    assert fingerprint(divided.transformer) == whole


def test_the_cache_does_what_it_does_with_a_whole_model(pipe, divided, generate, way):
    # Weights that are read from a file may begin at any byte, and then the CPU adds products in another order.
    same = {"rtol": 0, "atol": 0} if way in EXACT else ROUNDING
    torch.testing.assert_close(generate(divided), plain := generate(pipe), **same)
    has_plain_head = way is one_block_in_memory
    hook = None if has_plain_head else pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: None)
    try:
        with lesa.enable_cache(pipe, make_predictor(), SOME):
            wanted = generate(pipe)
    finally:
        hook and hook.remove()
    with lesa.enable_cache(divided, make_predictor(), SOME) as handle:
        torch.testing.assert_close(generate(divided), wanted, **same)
        assert not torch.equal(wanted, plain)
    (stream,) = handle.stats.streams.values()
    assert (stream.computed, stream.predicted) == (SOME, REST)
    assert stream.fused == (REST if has_plain_head else [])
    notes = [note for note in handle.stats.notes if "the output head ran in the model's own modules" in note]
    assert bool(notes) != has_plain_head
    torch.testing.assert_close(generate(divided), plain, **same)


def test_a_recording_has_the_same_bytes(recorded, inputs, divided, tmp_path, way):
    again = lesa.record(divided, inputs, tmp_path / "recorded", **OPTIONS)
    names = sorted(file.name for file in recorded.folder.iterdir())
    assert names == sorted(file.name for file in again.folder.iterdir())
    for name in names if way in EXACT else ["head.safetensors", "manifest.json"]:
        assert (again.folder / name).read_bytes() == (recorded.folder / name).read_bytes(), name
    for ours, wanted in zip(again, recorded, strict=True):
        for name, value in vars(wanted).items():
            torch.testing.assert_close(getattr(ours, name), value, **ROUNDING)


@pytest.mark.parametrize("way", [head_on_disk, groups_on_disk, all_in_memory], ids=lambda way: way.__name__)
def test_other_weights_are_noticed_where_they_are_offloaded(inputs, recorded, tmp_path, way):
    other = digits_pipelines.cut_pipeline()
    with torch.no_grad():
        other.transformer.single_transformer_blocks[1].proj_out.weight[3, 5] += 0.5
    way(other.transformer, tmp_path)
    with pytest.raises(ValueError, match="`transformer` must be .*, as in the recording that .* holds, but got"):
        lesa.record(other, inputs, recorded.folder, **OPTIONS)


@slow
@pytest.mark.parametrize("way", [head_on_disk, all_in_memory], ids=lambda way: way.__name__)
def test_refining_and_evaluating_give_the_same(pipe, recorded, inputs, tmp_path, way):
    """With a recording of the whole model."""
    divided = dispatched(way, tmp_path / "offloaded")
    trained = lesa.train(recorded, schedule=SOME, epochs=2, progress=False)
    refined = [
        lesa.refine(trained, recorded, each, inputs, rounds=1, epochs=1, progress=False) for each in (pipe, divided)
    ]
    for name, value in refined[0].state_dict().items():
        torch.testing.assert_close(refined[1].state_dict()[name], value, rtol=0, atol=1e-4)  # the head is not fused
    one, other = (lesa.evaluate(each, inputs, refined[:1], ["steps-5"], **OPTIONS) for each in (pipe, divided))
    for run, same in zip(one.runs[1:], other.runs[1:], strict=True):
        assert (same.name, same.steps) == (run.name, run.steps)
        assert same.psnr == pytest.approx(run.psnr, abs=0.01)


def test_a_predictor_must_be_where_the_last_block_gives_the_features(fresh_pipe):
    """The meta device stands for a second GPU."""
    transformer = fresh_pipe.transformer
    device_map = parts_of(transformer)
    del device_map["single_transformer_blocks"]
    device_map |= {"single_transformer_blocks.0": "cpu", "single_transformer_blocks.1": "meta"}
    accelerate.dispatch_model(transformer, device_map, force_hooks=True)
    assert features_device(fresh_pipe, adapter_for(fresh_pipe)) == torch.device("meta")
    accelerate.hooks.add_hook_to_module(fresh_pipe.vae, accelerate.hooks.AlignDevicesHook(CPU))
    message = r"`predictor` must be on the transformer's device, meta, but got one on cpu. Move it with .*to\('meta'\)"
    with pytest.raises(ValueError, match=message):
        lesa.enable_cache(fresh_pipe, make_predictor(), SOME)
    lesa.enable_cache(fresh_pipe, None, SOME).disable()  # it has no weights


@pytest.fixture
def exported(tmp_path):
    """A pipeline and inputs on disk."""
    digits_pipelines.cut_pipeline().save_pretrained(tmp_path / "model")
    write_inputs(tmp_path / "inputs.safetensors", digits.inputs_for((3,)))
    return tmp_path


def test_a_pipeline_has_the_settings_that_its_transformer_gives(tmp_path):
    small_pipelines.SD3["sd3"].build().save_pretrained(tmp_path / "model")
    whole, divided = load_pipeline(tmp_path / "model"), load_divided(tmp_path / "model", "cpu", f"{tmp_path}/offloaded")
    names = [name for name, value in vars(whole).items() if isinstance(value, (bool, int, float, str))]
    assert whole.default_sample_size != 128, "what the pipeline has without a transformer"
    assert {name: getattr(divided, name) for name in names} == {name: getattr(whole, name) for name in names}
    assert divided.config == whole.config


@slow
def test_commands_divide_a_model_that_is_too_large(exported, monkeypatch, settings_of_the_command):
    run = ["--model", f"{exported}/model", "--inputs", f"{exported}/inputs.safetensors", "--steps", f"{STEPS}"]
    for command in ("record", "generate"):
        out = ["--out", f"{exported}/whole"] if command == "record" else ["--output", f"{exported}/whole.png"]
        cli.main([command, *run, *out])
    places, infer = [], accelerate.infer_auto_device_map

    def infer_for_little_memory(model, max_memory=None, **options):
        places.append(infer(model, max_memory={"cpu": 3_500_000}, **options))  # bytes
        return places[-1]

    monkeypatch.setattr(model_loading_utils, "infer_auto_device_map", infer_for_little_memory)
    for command in ("record", "generate"):
        out = ["--out", f"{exported}/parts"] if command == "record" else ["--output", f"{exported}/parts.png"]
        cli.main([command, *run, *out, "--device-map", "auto"])
    assert [{*place.values()} for place in places] == 2 * [{"cpu", "disk"}]
    for file in (exported / "whole").iterdir():
        assert (exported / "parts" / file.name).read_bytes() == file.read_bytes()
    pictures = [np.asarray(Image.open(exported / f"{name}.png")).astype(int) for name in ("whole", "parts")]
    assert abs(pictures[0] - pictures[1]).max() <= 1  # the head is not fused
