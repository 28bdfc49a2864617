import inspect
import itertools
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import more_pipelines as more
import small_pipelines as small
from lesa import Trajectories, enable_cache, record
from lesa.demo import digits
from lesa.inputs import collate
from lesa.models import Adapter
from lesa.training import recording as recording_module
from lesa_kernels import FusedKANPredictor, OutputHead, PredictorConfig
from lesa_kernels.stream import output_head

STEPS = 4
TOKENS = 64


@pytest.fixture(scope="module")
def pipe():
    return digits.load_pipeline()


@pytest.fixture(autouse=True)
def left_alone(request):
    """Whatever happened, the transformer is as it was."""
    yield
    if "pipe" in request.fixturenames:
        transformer = request.getfixturevalue("pipe").transformer
        assert "forward" not in transformer.__dict__
        assert not transformer.norm_out._forward_pre_hooks


@pytest.fixture(scope="module")
def inputs():
    return digits.inputs_for([3, 1, 4])


@pytest.fixture(scope="module")
def recording(pipe, inputs, tmp_path_factory):
    return record(pipe, inputs, tmp_path_factory.mktemp("recording"), STEPS, seed=10, progress=False)


def watched_run(pipe, arguments, seed):
    """Runs the plain pipeline; returns the head's inputs, the velocities and the noise levels it used."""
    features, velocities, timesteps = [], [], []

    def after(module, args, kwargs, output):
        velocities.append(output[0])
        timesteps.append(kwargs["timestep"])

    hooks = [
        pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: features.append(args[0].clone())),
        pipe.transformer.register_forward_hook(after, with_kwargs=True),
    ]
    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        pipe(**arguments, generator=generator, num_inference_steps=STEPS, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(features), torch.cat(velocities), torch.cat(timesteps)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def failing_transformer_call(pipe, monkeypatch, call):
    """Lets a hook of the transformer's last block raise at its `call`-th forward."""
    calls = iter(range(10**6))

    def fail(*args):
        if next(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setitem(pipe.transformer.single_transformer_blocks[-1]._forward_pre_hooks, "fail", fail)


def test_features_and_sigmas_are_those_of_a_plain_run(pipe, inputs, recording):
    assert len(recording) == 3
    for number, trajectory in enumerate(recording):
        features, _, timesteps = watched_run(pipe, inputs[number], seed=10 + number)
        assert torch.equal(trajectory.features, features)
        assert trajectory.features.shape == (STEPS, TOKENS, recording.feature_dim)
        assert trajectory.sigmas.dtype == torch.float32
        torch.testing.assert_close(trajectory.sigmas, timesteps, rtol=0, atol=1e-6)
        assert torch.equal(trajectory.token_index, torch.arange(TOKENS))


def test_head_conditioning_gives_the_velocities(pipe, inputs, recording):
    for number, trajectory in enumerate(recording):
        _, velocities, _ = watched_run(pipe, inputs[number], seed=10 + number)
        modulation = (trajectory.scale, trajectory.shift)
        head = OutputHead(recording.head_weight, recording.head_bias, *modulation, recording.head_eps)
        torch.testing.assert_close(output_head(trajectory.features, head), velocities, rtol=0, atol=1e-5)


def test_manifest_says_what_was_recorded(pipe, recording):
    manifest = json.loads((recording.folder / "manifest.json").read_text())
    assert manifest == recording.manifest
    expected = {
        "format_version": 1,
        "family": "flux",
        "pipeline": "FluxPipeline",
        "feature_dim": pipe.transformer.inner_dim,
        "num_inference_steps": STEPS,
        "seed": 10,
        "tokens_per_sample": None,
        "samples": 3,
        "dtype": "float32",
        "head_eps": 1e-6,
    }
    assert {name: manifest[name] for name in expected} == expected
    assert (recording.family, recording.feature_dim) == ("flux", pipe.transformer.inner_dim)
    assert recording.num_inference_steps == STEPS
    assert torch.equal(recording.head_weight, pipe.transformer.proj_out.weight)
    assert torch.equal(recording.head_bias, pipe.transformer.proj_out.bias)
    assert not recording.head_weight.requires_grad


@pytest.mark.parametrize("name", ["krea2 cfg", "aura flow cfg"])
def test_a_head_without_a_layer_norm_is_recorded_in_the_later_format(name, tmp_path):
    """A release that knows no other norm refuses that version, and would train with a layer norm otherwise."""
    case = more.ALL[name]
    recorded = record(case.build(), [case.inputs(1)], tmp_path, num_inference_steps=3, progress=False)
    assert recorded.manifest["format_version"] == 2 and recorded.manifest["head_norm"] != "layer"


def test_trajectories_are_a_sequence(recording):
    assert torch.equal(recording[-1].features, recording[2].features)
    assert not torch.equal(recording[0].features, recording[1].features)
    with pytest.raises(IndexError):
        recording[3]
    with pytest.raises(TypeError):
        recording["0"]
    assert "3 of flux, 4 steps" in repr(recording)


@pytest.mark.parametrize("tokens", [None, 9])
def test_batches_change_nothing(pipe, inputs, recording, tmp_path, tokens):
    batched = record(pipe, inputs, tmp_path, STEPS, tokens, seed=10, batch_size=2, progress=False)
    for one, other in zip(recording, batched):
        expected = one.features[:, other.token_index]
        torch.testing.assert_close(other.features, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.scale, one.scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.shift, one.shift, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.sigmas, one.sigmas)


def test_token_subset_is_that_of_the_whole_recording(pipe, inputs, recording, tmp_path):
    subset = record(pipe, inputs, tmp_path / "a", STEPS, 9, seed=10, progress=False)
    again = record(pipe, inputs, tmp_path / "b", STEPS, 9, seed=10, batch_size=3, progress=False)
    assert subset.manifest["tokens_per_sample"] == 9
    chosen = [t.token_index for t in subset]
    for index, whole, part, repeated in zip(chosen, recording, subset, again):
        assert part.features.shape == (STEPS, 9, recording.feature_dim)
        assert (index.diff() > 0).all() and index[0] >= 0 and index[-1] < TOKENS
        assert torch.equal(part.features, whole.features[:, index])
        assert torch.equal(index, repeated.token_index)
    assert len({tuple(index.tolist()) for index in chosen}) == 3, "every sample has its own subset"


def test_more_tokens_than_there_are(pipe, inputs, tmp_path):
    with pytest.raises(ValueError, match=r"`tokens_per_sample`.*at most the 64.*got 65.*None for all"):
        record(pipe, inputs, tmp_path, STEPS, TOKENS + 1, progress=False)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_resume_after_a_kill_gives_the_same_bytes(pipe, tmp_path, monkeypatch, batch_size):
    inputs = digits.inputs_for([0, 1, 2, 3, 4])
    options = {"num_inference_steps": STEPS, "tokens_per_sample": 9, "batch_size": batch_size, "progress": False}
    record(pipe, inputs, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        failing_transformer_call(pipe, patch, call=STEPS + 2)  # in the second batch
        with pytest.raises(KeyboardInterrupt):
            record(pipe, inputs, tmp_path / "killed", **options)
    with pytest.raises(ValueError, match=rf"{batch_size} of 5 samples.*`lesa.record` again"):
        Trajectories(tmp_path / "killed")
    kept = tmp_path / "killed" / "sample-00000.safetensors"
    written = kept.stat().st_mtime_ns
    # What a kill in the middle of writing leaves, and of a batch only a part of the samples.
    (tmp_path / "killed" / "sample-00002.safetensors.tmp").write_bytes(kept.read_bytes()[:100])
    last = (tmp_path / "whole" / "sample-00003.safetensors").read_bytes()
    (tmp_path / "killed" / "sample-00003.safetensors").write_bytes(last)
    record(pipe, inputs, tmp_path / "killed", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert kept.stat().st_mtime_ns == written


def test_finished_recording_is_returned_as_it_is(pipe, inputs, recording, monkeypatch):
    failing_transformer_call(pipe, monkeypatch, call=0)
    before = contents(recording.folder)
    again = record(pipe, inputs, recording.folder, STEPS, seed=10, progress=False)
    assert len(again) == 3
    assert contents(recording.folder) == before


@pytest.mark.parametrize(
    "change, field",
    [
        ({"seed": 11}, "seed"),
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"tokens_per_sample": 9}, "tokens_per_sample"),
        ({"inputs": digits.inputs_for([3, 1, 5])}, "inputs_digest"),
        ({"inputs": digits.inputs_for([3, 1])}, "samples"),
    ],
)
def test_resuming_another_recording_names_what_differs(pipe, inputs, recording, change, field):
    arguments = {"inputs": inputs, "num_inference_steps": STEPS, "seed": 10, **change}
    before = contents(recording.folder)
    with pytest.raises(ValueError, match=f"{field}` must be .*as in the recording.*another folder"):
        record(pipe, out_dir=recording.folder, progress=False, **arguments)
    assert contents(recording.folder) == before


@pytest.mark.parametrize("field, value", [("family", "other"), ("feature_dim", 64), ("pipeline", "OtherPipeline")])
def test_resuming_with_another_model(pipe, inputs, recording, tmp_path, field, value):
    (tmp_path / "manifest.json").write_text(json.dumps({**recording.manifest, field: value}))
    with pytest.raises(ValueError, match=f"`{field}` must be {value!r}.*another folder"):
        record(pipe, inputs, tmp_path, STEPS, seed=10, progress=False)


def test_resuming_with_other_weights(fresh_pipe, inputs, recording, tmp_path):
    for path in recording.folder.iterdir():
        if path.name != "sample-00002.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fresh_pipe.transformer.transformer_blocks[0].attn.to_q.bias.data[3] += 1e-3
    with pytest.raises(ValueError, match="`transformer` must be .*as in the recording.*another folder"):
        record(fresh_pipe, inputs, tmp_path, STEPS, seed=10, progress=False)
    assert not (tmp_path / "sample-00002.safetensors").exists()
    with pytest.raises(ValueError, match="`transformer` must be"):
        record(fresh_pipe, inputs, recording.folder, STEPS, seed=10, progress=False)  # though it is finished


def test_adapters_are_told_apart_by_what_is_active(fresh_pipe, inputs, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    transformer = fresh_pipe.transformer
    for name in ("one", "two"):
        transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), name)
    record(fresh_pipe, inputs[:1], tmp_path, 2, progress=False)
    record(fresh_pipe, inputs[:1], tmp_path, 2, progress=False)
    transformer.set_adapter("one")
    with pytest.raises(ValueError, match="`transformer` must be"):
        record(fresh_pipe, inputs[:1], tmp_path, 2, progress=False)


def test_a_projection_with_an_adapter_is_refused(fresh_pipe, inputs, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    fresh_pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["proj_out"]))
    with pytest.raises(TypeError, match=r"plain nn\.Linear.*peft.*Fuse or unload the adapters"):
        record(fresh_pipe, inputs, tmp_path / "new", STEPS, progress=False)
    assert not (tmp_path / "new").exists()


def test_samples_without_a_manifest_are_not_trusted(pipe, inputs, recording, tmp_path):
    (tmp_path / "sample-00000.safetensors").write_bytes((recording.folder / "sample-00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="`out_dir`.*no manifest"):
        record(pipe, inputs, tmp_path, STEPS, progress=False)


def test_two_streams_of_true_guidance(pipe, inputs, tmp_path):
    other = digits.inputs_for([8])[0]
    guided = [
        {
            **item,
            "true_cfg_scale": 2.0,
            "negative_prompt_embeds": other["prompt_embeds"],
            "negative_pooled_prompt_embeds": other["pooled_prompt_embeds"],
        }
        for item in inputs[:2]
    ]
    trajectories = record(pipe, guided, tmp_path, STEPS, seed=10, progress=False)
    names = ["sample-00000", "sample-00000-uncond", "sample-00001", "sample-00001-uncond"]
    assert sorted(p.stem for p in tmp_path.glob("sample*")) == names
    assert len(trajectories) == 4
    for number, item in enumerate(guided):
        features, velocities, _ = watched_run(pipe, item, seed=10 + number)
        for stream in range(2):  # the pipeline calls cond, uncond, cond, ...
            trajectory = trajectories[2 * number + stream]
            assert torch.equal(trajectory.features, features[stream::2])
            modulation = (trajectory.scale, trajectory.shift)
            head = OutputHead(trajectories.head_weight, trajectories.head_bias, *modulation, trajectories.head_eps)
            velocity = output_head(trajectory.features, head)
            torch.testing.assert_close(velocity, velocities[stream::2], rtol=0, atol=1e-5)
    (tmp_path / "sample-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 samples"):
        Trajectories(tmp_path)


def test_sizes_may_differ_and_never_share_a_call(pipe, inputs, tmp_path):
    mixed = [inputs[0], inputs[1], {**inputs[2], "height": 8, "width": 12}]
    trajectories = record(pipe, mixed, tmp_path, STEPS, batch_size=3, progress=False)
    assert [t.features.shape[1] for t in trajectories] == [64, 64, 24]
    features, _, _ = watched_run(pipe, mixed[2], seed=2)
    assert torch.equal(trajectories[2].features, features)


def test_latents_may_be_given(pipe, inputs, recording, tmp_path):
    latents = torch.randn(1, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    trajectory = record(pipe, [{**inputs[0], "latents": latents}], tmp_path, STEPS, seed=10, progress=False)[0]
    features, _, _ = watched_run(pipe, {**inputs[0], "latents": latents}, seed=10)
    assert torch.equal(trajectory.features, features)
    assert not torch.equal(trajectory.features, recording[0].features)


def test_dtype_is_the_models(fresh_pipe, inputs, tmp_path):
    pipe = fresh_pipe.to(torch.bfloat16)
    half = [{n: v.bfloat16() if isinstance(v, torch.Tensor) else v for n, v in item.items()} for item in inputs[:1]]
    trajectories = record(pipe, half, tmp_path, STEPS, progress=False)
    trajectory = trajectories[0]
    features, _, _ = watched_run(pipe, half[0], seed=0)
    assert trajectories.manifest["dtype"] == "bfloat16"
    assert trajectory.features.dtype == trajectory.scale.dtype == trajectories.head_weight.dtype == torch.bfloat16
    assert torch.equal(trajectory.features, features)
    assert (trajectory.sigmas.diff() < 0).all()


def test_prompts_reach_the_pipeline_as_prompts(pipe, inputs, recording, tmp_path, monkeypatch):
    """The digits have no text encoder: a stand-in looks the class up by the prompt."""
    embeddings = {str(n): item for n, item in enumerate(inputs)}

    def encode_prompt(prompt, **kwargs):
        found = collate([embeddings[p] for p in prompt])
        return found["prompt_embeds"], found["pooled_prompt_embeds"], torch.zeros(1, 3)

    monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
    monkeypatch.setattr(pipe, "default_sample_size", digits.SIDE // pipe.vae_scale_factor, raising=False)
    trajectories = record(pipe, ["0", "1", "2"], tmp_path, STEPS, seed=10, progress=False)
    for one, other in zip(trajectories, recording):
        assert torch.equal(one.features, other.features)


def test_restored_after_an_exception(pipe, inputs, tmp_path, monkeypatch):
    config = dict(pipe._progress_bar_config)
    before = watched_run(pipe, inputs[0], seed=0)
    with monkeypatch.context() as patch:
        failing_transformer_call(pipe, patch, call=1)
        with pytest.raises(KeyboardInterrupt):
            record(pipe, inputs, tmp_path, STEPS, progress=False)
    assert "forward" not in pipe.transformer.__dict__
    assert pipe._progress_bar_config == config
    for a, b in zip(before, watched_run(pipe, inputs[0], seed=0)):
        assert torch.equal(a, b)


def test_one_progress_bar(fresh_pipe, inputs, tmp_path, capfd):
    pipe = fresh_pipe
    capfd.readouterr()
    del pipe._progress_bar_config  # as a pipeline that was just loaded
    record(pipe, inputs, tmp_path / "loud", 3)
    shown = capfd.readouterr().err
    assert "record: 100%" in shown and "3/3" in shown
    assert {line.split(":")[0] for line in shown.split("\r")} == {"", "record"}, "the pipeline's own bar stays quiet"
    assert not hasattr(pipe, "_progress_bar_config")
    pipe.set_progress_bar_config(desc="mine")
    record(pipe, inputs[:1], tmp_path / "quiet", 3, progress=False)
    assert "%" not in capfd.readouterr().err
    assert pipe._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize("batch_size, shares", [(1, ["0.3", "0.7", "1", "1.3"]), (2, ["0.7", "1.3", "2", "2.3"])])
def test_the_progress_bar_moves_with_each_computed_step(pipe, inputs, tmp_path, capfd, monkeypatch, batch_size, shares):
    monkeypatch.setattr(recording_module, "tqdm", partial(tqdm, mininterval=0, miniters=0))

    def counts():
        record(pipe, inputs, tmp_path, 3, batch_size=batch_size)
        return [*dict.fromkeys(re.findall(r"\| ([\d.]+)/3 \[", capfd.readouterr().err))]

    found = counts()
    assert found[:5] == ["0", *shares] and found[-1] == "3"
    for number in (1, 2):
        (tmp_path / f"sample-0000{number}.safetensors").unlink()
    assert counts() == ["1", "1.3", "1.7", "2", "2.3", "2.7", "3"]  # sample 0 was there, whatever shares its call


def test_features_that_are_not_finite(pipe, inputs, tmp_path):
    broken = {**inputs[1], "prompt_embeds": torch.full((1, 1, 64), float("nan"))}
    with pytest.raises(RuntimeError, match="sample 2 at step 0"):
        record(pipe, [*inputs[:2], broken], tmp_path, STEPS, batch_size=2, progress=False)
    assert sorted(p.name for p in tmp_path.glob("sample*")) == ["sample-00000.safetensors", "sample-00001.safetensors"]


def after_step_one(pipe, monkeypatch, change):
    """Lets `change(latents)` run when the scheduler has done step 1."""
    step = pipe.scheduler.step

    def changed(*args, **kwargs):
        (latents,) = step(*args, **kwargs)
        if pipe.scheduler.step_index == 2:
            change(latents)
        return (latents,)

    monkeypatch.setattr(pipe.scheduler, "step", changed)


def test_nan_in_the_middle_of_a_batch_is_found(pipe, inputs, tmp_path, monkeypatch):
    after_step_one(pipe, monkeypatch, lambda latents: latents[1].fill_(float("nan")))
    with pytest.raises(RuntimeError, match="sample 1 at step 2"):
        record(pipe, inputs, tmp_path, STEPS, batch_size=3, progress=False)


def test_interrupted_pipeline_is_no_recording(pipe, inputs, tmp_path, monkeypatch):
    after_step_one(pipe, monkeypatch, lambda latents: setattr(pipe, "_interrupt", True))
    with pytest.raises(RuntimeError, match="2 of 4 steps in the stream 'cond'"):
        record(pipe, inputs[:1], tmp_path, STEPS, progress=False)
    assert not [*tmp_path.iterdir()]


def test_all_trajectories_have_the_same_steps(pipe, inputs, tmp_path):
    shorter = {**inputs[1], "sigmas": [1.0, 0.5]}
    with pytest.raises(ValueError, match="`num_inference_steps` must be 4.*got 2"):
        record(pipe, [inputs[0], shorter], tmp_path, STEPS, progress=False)


def test_recording_while_a_cache_is_on(pipe, inputs, tmp_path):
    config = PredictorConfig(feature_dim=pipe.transformer.inner_dim)
    with enable_cache(pipe, FusedKANPredictor(config), 2), pytest.raises(RuntimeError, match="lesa on already"):
        record(pipe, inputs, tmp_path, STEPS, progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "callback_on_step_end",
        "generator",
        "num_images_per_prompt",
        "num_inference_steps",
        "output_type",
        "return_dict",
    ],
)
def test_arguments_that_an_input_can_not_choose(pipe, inputs, tmp_path, name):
    with pytest.raises(ValueError, match=rf"inputs\[1\]` must leave '{name}' out"):
        record(pipe, [inputs[0], {**inputs[1], name: 1}], tmp_path, STEPS, progress=False)


@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"inputs": "a cat"}, TypeError, "`inputs` must be a list"),
        ({"inputs": []}, ValueError, "Pass at least one"),
        ({"inputs": ["a", 3]}, TypeError, r"inputs\[1\]"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"tokens_per_sample": 0}, ValueError, "tokens_per_sample"),
        ({"batch_size": 1.5}, TypeError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_wrong_arguments(pipe, inputs, tmp_path, change, kind, words):
    with pytest.raises(kind, match=words):
        record(**{"pipe": pipe, "inputs": inputs, "out_dir": tmp_path, **change})
    assert not [*tmp_path.iterdir()]


def test_several_samples_in_one_input(pipe, tmp_path):
    two = collate(digits.inputs_for([1, 2]))
    with pytest.raises(ValueError, match="leading dimension of 1"):
        record(pipe, [two], tmp_path, STEPS, progress=False)


def test_folders_that_are_no_recording(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.*record trajectories"):
        Trajectories(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json.*`out_dir`"):
        Trajectories(tmp_path)
    for text in ("no json", "[]", "{}"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="no manifest of a recording"):
            Trajectories(tmp_path)


def test_other_format_version(recording, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({**recording.manifest, "format_version": 3}))
    with pytest.raises(ValueError, match=r"format_version.*must be 1 or 2.*got 3"):
        Trajectories(tmp_path)


@pytest.mark.parametrize("lost", ["samples", "feature_dim", "head_eps"])
def test_a_manifest_that_lacks_something(pipe, inputs, recording, tmp_path, lost):
    manifest = {name: value for name, value in recording.manifest.items() if name != lost}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for read in (lambda: Trajectories(tmp_path), lambda: record(pipe, inputs, tmp_path, STEPS, progress=False)):
        with pytest.raises(ValueError, match=f"manifest.json` must have .* for {lost}. Restore the file"):
            read()


def test_files_hold_what_the_format_says(recording):
    stored = load_file(recording.folder / "sample-00000.safetensors")
    width = recording.feature_dim
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "features": (torch.float32, (STEPS, TOKENS, width)),
        "latents": (torch.float32, (STEPS, TOKENS, 4)),
        "sigmas": (torch.float32, (STEPS,)),
        "scale": (torch.float32, (STEPS, width)),
        "shift": (torch.float32, (STEPS, width)),
        "token_index": (torch.int64, (TOKENS,)),
    }
    assert {*load_file(recording.folder / "head.safetensors")} == {"weight", "bias"}


# Small models of every family. Each of their samples has prompts of its own.

GUIDANCE = 3.0
CASES = {
    **small.ALL,
    "hunyuan of long tokens": replace(
        small.ALL["hunyuan"],
        size={**small.ALL["hunyuan"].size, "num_frames": 13},
        transformer_options={"patch_size_t": 2},
    ),
}


@pytest.fixture(scope="module")
def small_pipe_of():
    """`small_pipe_of(name)` -> the small pipeline of that name, one for the whole file."""
    made = {}

    def pipe_of(name):
        if name not in made:
            made[name] = CASES[name].build()
        return made[name]

    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    with small.small_areas():
        yield pipe_of
    diffusers.logging.set_verbosity(verbosity)
    for pipe in made.values():
        assert "forward" not in vars(pipe.transformer) and not pipe.transformer.norm_out._forward_pre_hooks


def inputs_of(name, count):
    """Inputs with embeddings that all differ."""
    case, generator = CASES[name], torch.Generator().manual_seed(5)
    options = {} if case.strength is None else {"strength": case.strength}
    inputs = [{**case.inputs(1), **options} for _ in range(count)]
    for item in inputs:
        for key in [key for key in item if "embeds" in key and "mask" not in key]:
            item[key] = torch.randn(item[key].shape, generator=generator)
    return inputs


@contextmanager
def watching(pipe):
    """Gives lists of what goes by: the scheduler's samples, the head's inputs, the transformer's arguments and output.

    The scheduler's positions tell the steps that were executed.
    """
    seen = {"samples": [], "features": [], "arguments": [], "outputs": [], "positions": []}
    step = pipe.scheduler.step

    def noted(model_output, timestep, sample, *args, **kwargs):
        seen["samples"].append(sample.clone())
        made = step(model_output, timestep, sample, *args, **kwargs)
        seen["positions"].append(pipe.scheduler.step_index - 1)
        return made

    def after(module, args, arguments, output):
        seen["arguments"].append(dict(arguments))
        seen["outputs"].append(output[0].clone())

    pipe.scheduler.step = noted
    hooks = [
        pipe.transformer.norm_out.register_forward_pre_hook(lambda _, args: seen["features"].append(args[0].clone())),
        pipe.transformer.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        del pipe.scheduler.step
        for hook in hooks:
            hook.remove()


def plain_run(pipe, item, seed, steps=STEPS):
    """What `watching` sees of a run without lesa."""
    with watching(pipe) as seen:
        generator = [torch.Generator("cpu").manual_seed(seed)]
        pipe(**collate([item]), generator=generator, num_inference_steps=steps, output_type="latent")
    return seen


def by_tokens(family, sample, patch_t=1):
    """A sample as the model's last linear layer has its outputs, token by token, worked out from diffusers' forwards.

    FLUX and Qwen-Image get their samples packed. HunyuanVideo goes through channels, frames, rows and columns of a
    token; Stable Diffusion 3 through rows, columns and channels.
    """
    if family in ("flux", "qwen-image"):
        return sample
    if family == "hunyuan-video":
        frames, rows, columns = (range(0, n, k) for n, k in zip(sample.shape[2:], (patch_t, 2, 2)))
        tokens = [
            sample[:, :, f : f + patch_t, r : r + 2, c : c + 2].flatten(1)
            for f, r, c in itertools.product(frames, rows, columns)
        ]
        return torch.stack(tokens, 1)
    rows, columns = (range(0, n, 2) for n in sample.shape[2:])
    tokens = []
    for r, c in itertools.product(rows, columns):
        pixels = [sample[:, :, r + i, c + j] for i in range(2) for j in range(2)]
        tokens.append(torch.cat(pixels, 1))
    return torch.stack(tokens, 1)


LAID_OUT = [
    "flux cfg",
    "flux img2img",
    "flux fill",
    "flux kontext",
    "qwen cfg",
    "qwen edit",
    "hunyuan cfg",
    "hunyuan of long tokens",
    "hunyuan image concat",
    "sd3 cfg",
    "sd3 img2img cfg",
]


@pytest.mark.parametrize("tokens", [None, 7])
@pytest.mark.parametrize("name", LAID_OUT)
def test_features_latents_and_sigmas_are_of_the_same_step_and_tokens(small_pipe_of, tmp_path, name, tokens):
    pipe, (item,) = small_pipe_of(name), inputs_of(name, 1)
    seen = plain_run(pipe, item, seed=10)
    trajectories = record(pipe, [item], tmp_path, STEPS, tokens, seed=10, progress=False)
    executed = seen["positions"]
    assert executed == [*range(STEPS - len(executed), STEPS)]
    assert len(executed) == (STEPS if CASES[name].strength is None else round(STEPS * CASES[name].strength))
    samples = torch.cat([by_tokens(trajectories.family, s, 1 + ("long" in name)) for s in seen["samples"]])
    in_one_call = name.startswith("sd3") and "cfg" in name
    calls = 1 if in_one_call else len(trajectories)
    for number, trajectory in enumerate(trajectories):
        index = trajectory.token_index
        features = torch.cat(seen["features"][0 if in_one_call else number :: calls])
        features = features[number :: len(trajectories)] if in_one_call else features
        assert torch.equal(index, trajectories[0].token_index), "streams of a sample share their tokens"
        assert len(index) == (features.shape[1] if tokens is None else tokens)
        assert torch.equal(trajectory.features, features[:, index])
        drawn = index < samples.shape[1]  # not those of an image that is given
        assert drawn.any() and drawn.all() == (name not in ("flux kontext", "qwen edit"))
        assert torch.equal(trajectory.latents[:, drawn], samples[:, index[drawn]])
        sigmas = pipe.scheduler.sigmas[executed[0] : STEPS]
        assert torch.equal(trajectory.sigmas, sigmas) and (sigmas.diff() < 0).all()
    manifest = trajectories.manifest
    assert manifest["requested_num_inference_steps"] == STEPS
    assert manifest["num_inference_steps"] == trajectories.num_inference_steps == len(executed)


def velocity_of(trajectories, trajectory):
    """What the head makes of the features `[S, T, O]`, in plain torch."""
    features = trajectory.features
    normed = torch.nn.functional.layer_norm(features, features.shape[-1:], eps=trajectories.head_eps)
    modulated = normed * (1 + trajectory.scale[:, None]) + trajectory.shift[:, None]
    return torch.nn.functional.linear(modulated, trajectories.head_weight, trajectories.head_bias)


BOTH = {  # by pipeline, the name of each stream, and the guidance's weight of its velocity
    "flux cfg": {"": GUIDANCE, "-uncond": 1 - GUIDANCE},
    "hunyuan cfg": {"": GUIDANCE, "-uncond": 1 - GUIDANCE},
    "sd3 cfg": {"": 1 - GUIDANCE, "-main-with-prompt": GUIDANCE},
}


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_each_stream_of_guidance_is_in_the_file_of_its_prompt(small_pipe_of, tmp_path, name):
    """Each prompt goes through the transformer by itself, at the latents of the recording."""
    pipe, inputs = small_pipe_of(name), inputs_of(name, 3)
    trajectories = record(pipe, inputs, tmp_path, STEPS, seed=10, batch_size=2, progress=False)
    assert trajectories.names == [f"sample-0000{n}{stream}" for n in range(3) for stream in BOTH[name]]
    assert trajectories.samples == [0, 0, 1, 1, 2, 2] and trajectories.by_sample == [[0, 1], [2, 3], [4, 5]]
    for sample, item in enumerate(inputs):
        seen, moved = plain_run(pipe, item, seed=10 + sample), 0
        for stream, weight in BOTH[name].items():
            trajectory = trajectories[trajectories.names.index(f"sample-0000{sample}{stream}")]
            sign = "" if weight > 0 else "negative_"
            for step in range(STEPS):
                rows = {k: v for k, v in seen["arguments"][0].items() if not isinstance(v, torch.Tensor)}
                rows |= {k: v for k, v in seen["arguments"][0].items() if k in ("img_ids", "txt_ids")}
                if "encoder_attention_mask" in seen["arguments"][0]:
                    rows["encoder_attention_mask"] = item[f"{sign}prompt_attention_mask"]
                if seen["arguments"][0].get("guidance") is not None:
                    rows["guidance"] = seen["arguments"][0]["guidance"]
                scale = 1000 if name.startswith("flux") else 1
                with watching(pipe) as alone:
                    pipe.transformer(
                        **rows,
                        hidden_states=seen["samples"][step],
                        timestep=pipe.scheduler.timesteps[step].expand(1) / scale,
                        encoder_hidden_states=item[f"{sign}prompt_embeds"],
                        pooled_projections=item[f"{sign}pooled_prompt_embeds"],
                    )
                torch.testing.assert_close(
                    trajectory.features[step : step + 1], alone["features"][0], rtol=0, atol=2e-4
                )
                velocity = by_tokens(trajectories.family, alone["outputs"][0])
                torch.testing.assert_close(
                    velocity_of(trajectories, trajectory)[step : step + 1], velocity, rtol=0, atol=2e-4
                )
            moved = moved + weight * velocity_of(trajectories, trajectory)[:-1]
        moved = moved * trajectory.sigmas.diff()[:, None, None]
        torch.testing.assert_close(moved, trajectory.latents.diff(dim=0), rtol=0, atol=2e-3)


@pytest.mark.parametrize("sign", ["", "negative_"])
def test_nan_in_either_half_of_a_batch_names_its_sample(small_pipe_of, tmp_path, sign):
    inputs = inputs_of("sd3 cfg", 4)
    inputs[2][f"{sign}prompt_embeds"][:] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or Inf in sample 2 at step 0"):
        record(small_pipe_of("sd3 cfg"), inputs, tmp_path, STEPS, batch_size=2, progress=False)


@torch.no_grad()
def test_each_half_of_a_batch_is_forecast_by_itself(small_pipe_of):
    """Stable Diffusion 3 puts the rows without prompts before those with them: each draws the line through its own."""
    pipe, inputs = small_pipe_of("sd3 cfg"), inputs_of("sd3 cfg", 2)
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(small.DIM, rank=0))
    with enable_cache(pipe, predictor, [0, 1]), watching(pipe) as seen:
        generator = [torch.Generator("cpu").manual_seed(n) for n in range(2)]
        pipe(**collate(inputs), generator=generator, num_inference_steps=STEPS, output_type="latent")
    first, second = seen["features"][:2]
    sigmas, transformer = pipe.scheduler.sigmas, pipe.transformer
    pooled = [item[f"{sign}pooled_prompt_embeds"] for sign in ("negative_", "") for item in inputs]
    for step in (2, 3):
        part = (sigmas[step] - sigmas[1]) / (sigmas[1] - sigmas[0])
        forecast = second + part * (second - first)
        for row in range(4):
            condition = transformer.time_text_embed(pipe.scheduler.timesteps[step].expand(1), pooled[row])
            wanted = transformer.proj_out(transformer.norm_out(forecast[row : row + 1], condition))
            got = by_tokens("sd3", seen["outputs"][step][row : row + 1])
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_roll_out_has_the_computed_steps_along_its_own_way(small_pipe_of, tmp_path):
    name = "sd3 cfg"
    pipe, (item,) = small_pipe_of(name), inputs_of(name, 1)
    sigmas = plain_run(pipe, item, seed=10, steps=6)["arguments"] and pipe.scheduler.sigmas.tolist()
    computed = (0, 1, 4)
    known = {"num_inference_steps": 6, "schedule": computed, "schedule_sigmas": [sigmas[step] for step in computed]}
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4, family="sd3", **known))
    with enable_cache(pipe, predictor):
        seen = plain_run(pipe, item, seed=10, steps=6)
    recorded = record(pipe, [item], tmp_path, 6, 7, seed=10, progress=False, predictor=predictor)
    assert recorded.num_inference_steps == 6 and len(recorded) == 2
    samples = torch.cat([by_tokens("sd3", seen["samples"][step]) for step in computed])
    for half, trajectory in enumerate(recorded):
        index = trajectory.token_index
        features = torch.stack([seen["features"][step][half] for step in computed])
        assert torch.equal(trajectory.features[:2], features[:2, index])
        assert torch.equal(trajectory.latents[:2], samples[:2, index])
        # Later ones differ by rounding: hooks read what `seen` has, and a head with hooks runs in its own modules.
        torch.testing.assert_close(trajectory.features[2:], features[2:, index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trajectory.latents[2:], samples[2:, index], rtol=1e-5, atol=1e-5)
        assert trajectory.sigmas.tolist() == [sigmas[step] for step in computed]
        velocity = by_tokens("sd3", torch.stack([seen["outputs"][step][half] for step in computed]))
        torch.testing.assert_close(velocity_of(recorded, trajectory), velocity[:, index], rtol=0, atol=1e-4)
    plain = record(pipe, [item], tmp_path / "plain", 6, 7, seed=10, progress=False)
    assert torch.equal(plain[0].latents[0], recorded[0].latents[0])
    assert not torch.equal(plain[0].latents[4], recorded[0].latents[2]), "the forecasts have led elsewhere"
    assert plain.manifest["predictor"] is None and recorded.manifest["predictor"] is not None


def test_the_tokens_of_a_sample_are_those_of_its_own_seed(pipe, inputs, tmp_path):
    first = record(pipe, inputs, tmp_path / "a", 2, 9, seed=10, batch_size=3, progress=False)
    second = record(pipe, inputs[1:], tmp_path / "b", 2, 9, seed=11, progress=False)
    for one, other in zip((first[1], first[2]), second, strict=True):
        assert torch.equal(one.token_index, other.token_index)


def test_who_shares_a_call_and_with_which_seed(pipe, inputs, tmp_path, monkeypatch):
    """Only neighbours that can be joined, at most as many as are asked for; each sample keeps its own seed."""
    calls, call = [], type(pipe).__call__

    def noted(self, **arguments):
        calls.append((len(arguments["prompt_embeds"]), arguments["height"], arguments["generator"]))
        return call(self, **arguments)

    monkeypatch.setattr(type(pipe), "__call__", noted)
    narrow = {**inputs[0], "width": 12}
    many = [inputs[0], inputs[1], inputs[2], narrow, inputs[0], inputs[1]]
    record(pipe, many, tmp_path, 1, seed=20, batch_size=2, progress=False)
    assert [[g.initial_seed() for g in generators] for *_, generators in calls] == [[20, 21], [22], [23], [24, 25]]
    assert [count for count, *_ in calls] == [2, 1, 1, 2]


# Killed, and gone on with


def killing(patch, number, before):
    """Lets the process end when a file gets its name for the `number`-th time, just before that or just after."""
    rename, done = os.replace, []

    def killed(source, target, **options):
        if len(done) == number and before:
            raise KeyboardInterrupt
        rename(source, target, **options)
        done.append(Path(target).name)
        if len(done) == number + 1:
            raise KeyboardInterrupt

    patch.setattr(os, "replace", killed)
    return done


@pytest.mark.parametrize("name", ["flux cfg", "sd3 cfg"])
def test_a_kill_at_any_file_is_made_good(small_pipe_of, tmp_path, monkeypatch, name):
    pipe, inputs = small_pipe_of(name), inputs_of(name, 2)
    options = {"num_inference_steps": 2, "tokens_per_sample": 7, "batch_size": 2, "progress": False}
    whole = record(pipe, inputs, tmp_path / "whole", **options)
    files = contents(whole.folder)
    assert len(files) == 6  # manifest, head, and two for each sample
    for number, before in itertools.product(range(6), (True, False)):
        folder = tmp_path / f"{number} {before}"
        with monkeypatch.context() as patch:
            done = killing(patch, number, before)
            with pytest.raises(KeyboardInterrupt):
                record(pipe, inputs, folder, **options)
        assert len(done) == number + (not before)
        finished = sum(f"sample-0000{n}.safetensors" in done for n in range(2))
        assert set(done) <= {path.name for path in folder.iterdir()} and {*done} <= {*files}
        if "manifest.json" in done and finished < 2:
            with pytest.raises(ValueError, match=f"with {finished} of 2 samples"):
                Trajectories(folder)
        resumed = record(pipe, inputs, folder, **options)
        assert contents(folder) == files, (number, before)
        assert resumed.names == whole.names


# Which settings must be the same


@pytest.fixture(scope="module")
def settled(small_pipe_of, tmp_path_factory):
    """A finished recording, with the arguments that made it, and a copy that lacks its last sample."""
    folder = tmp_path_factory.mktemp("settled")
    inputs = inputs_of("flux cfg", 2)
    arguments = {"inputs": inputs, "num_inference_steps": 3, "tokens_per_sample": 7, "seed": 10, "progress": False}
    record(small_pipe_of("flux cfg"), out_dir=folder / "finished", **arguments)
    shutil.copytree(folder / "finished", folder / "unfinished")
    (folder / "unfinished" / "sample-00001.safetensors").unlink()
    return folder, arguments


def changed(inputs, **options):
    return {"inputs": [inputs[0], {**inputs[1], **options}]}


def flux_predictor(seed=0, **options):
    known = {"num_inference_steps": 3, "schedule": (0, 1), "schedule_sigmas": (1.0, 0.7)}
    torch.manual_seed(seed)
    return FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4, family="flux", **{**known, **options}))


OTHER_SETTINGS = {
    "another seed": ("seed", lambda inputs: {"seed": 11}),
    "more steps": ("requested_num_inference_steps", lambda inputs: {"num_inference_steps": 4}),
    "more tokens": ("tokens_per_sample", lambda inputs: {"tokens_per_sample": 8}),
    "all tokens": ("tokens_per_sample", lambda inputs: {"tokens_per_sample": None}),
    "fewer inputs": ("samples", lambda inputs: {"inputs": inputs[:1]}),
    "more inputs": ("samples", lambda inputs: {"inputs": [*inputs, inputs[0]]}),
    "another order": ("inputs_digest", lambda inputs: {"inputs": inputs[::-1]}),
    "another guidance": ("inputs_digest", lambda inputs: changed(inputs, true_cfg_scale=2.0)),
    "another size": ("inputs_digest", lambda inputs: changed(inputs, height=24, width=16)),
    "one argument more": ("inputs_digest", lambda inputs: changed(inputs, guidance_scale=3.0)),
    "another last bit": (
        "inputs_digest",
        lambda inputs: changed(inputs, prompt_embeds=inputs[1]["prompt_embeds"] * (1 + 2**-23)),
    ),
    "another negative prompt": (
        "inputs_digest",
        lambda inputs: changed(inputs, negative_prompt_embeds=-inputs[1]["negative_prompt_embeds"]),
    ),
    "a predictor": ("predictor", lambda inputs: {"predictor": flux_predictor()}),
}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize("change", OTHER_SETTINGS)
def test_no_recording_goes_on_with(small_pipe_of, settled, monkeypatch, state, change):
    (folder, arguments), pipe = settled, small_pipe_of("flux cfg")
    field, other = OTHER_SETTINGS[change]
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("nothing is drawn"))
    before = contents(folder / state)
    with pytest.raises(ValueError, match=f"`{field}` must be .*, as in the recording that .* holds"):
        record(pipe, out_dir=folder / state, **{**arguments, **other(arguments["inputs"])})
    assert contents(folder / state) == before


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"progress": True}])
def test_a_recording_goes_on_with(small_pipe_of, settled, tmp_path, change):
    """Neither the batches nor the progress bar are part of what is recorded."""
    folder, arguments = settled
    shutil.copytree(folder / "unfinished", tmp_path / "copy")
    resumed = record(small_pipe_of("flux cfg"), out_dir=tmp_path / "copy", **{**arguments, **change})
    for one, other in zip(resumed, Trajectories(folder / "finished"), strict=True):
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.token_index, other.token_index)


def test_every_argument_is_tried_with_another_value():
    """One that is new needs a place among those that must be the same or those that need not."""
    tried = {key for _, other in OTHER_SETTINGS.values() for key in other(inputs_of("flux cfg", 2))}
    assert {*inspect.signature(record).parameters} == tried | {"pipe", "out_dir", "batch_size", "progress"}


@pytest.mark.parametrize(
    "other",
    [
        lambda: flux_predictor(seed=1),
        lambda: flux_predictor(schedule=(0, 2)),
        lambda: flux_predictor(schedule_sigmas=(1.0, 0.6)),
        lambda: flux_predictor(stage_bounds=(0.6, 0.3)),
        lambda: None,
    ],
    ids=["weights", "schedule", "noise levels", "stages", "none"],
)
def test_no_roll_out_goes_on_with_another_predictor(small_pipe_of, tmp_path, other):
    pipe, inputs = small_pipe_of("flux cfg"), inputs_of("flux cfg", 1)
    options = {"num_inference_steps": 3, "progress": False}
    record(pipe, inputs, tmp_path, **options, predictor=flux_predictor())
    record(pipe, inputs, tmp_path, **options, predictor=flux_predictor())
    with pytest.raises(ValueError, match=r"`predictor[\w.]*` must be .*, as in the recording"):
        record(pipe, inputs, tmp_path, **options, predictor=other())


@pytest.mark.parametrize("name", ["flux distilled", "qwen", "hunyuan", "sd3 cfg"])
def test_every_weight_of_the_model_counts(tmp_path, name):
    """A recording refuses a model in which one number of one parameter differs in its last bit."""
    with small.small_areas():
        pipe, inputs = CASES[name].build(), inputs_of(name, 1)
    options = {"num_inference_steps": 1, "progress": False}
    record(pipe, inputs, tmp_path, **options)
    parameters = dict(pipe.transformer.named_parameters())
    assert len(parameters) > 60
    for key, parameter in parameters.items():
        flat = parameter.data.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, kept + 1)
        with pytest.raises(ValueError, match="`transformer` must be"):
            record(pipe, inputs, tmp_path, **options)
            pytest.fail(key)
        flat[-1] = kept
    record(pipe, inputs, tmp_path, **options)
    one, other = (
        parameters["transformer_blocks.0.attn.to_q.weight"],
        parameters["transformer_blocks.1.attn.to_q.weight"],
    )
    one.data, other.data = other.data, one.data
    with pytest.raises(ValueError, match="`transformer` must be"):
        record(pipe, inputs, tmp_path, **options)
    one.data, other.data = other.data, one.data
    pipe.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="`transformer` must be"):
        record(pipe, inputs, tmp_path, **options)


def test_another_pipeline_class_is_another_recording(small_pipe_of, settled):
    (folder, arguments), pipe = settled, small_pipe_of("flux cfg")
    other = type("OtherPipeline", (type(pipe),), {})(**pipe.components)
    with pytest.raises(ValueError, match="`pipeline` must be 'FluxPipeline', as in the recording"):
        record(other, out_dir=folder / "finished", **arguments)


def test_a_head_that_only_scales_is_recorded_with_a_shift_of_zero(pipe, inputs, tmp_path, monkeypatch):
    made = Adapter.output_head

    def without_shift(self, conditioning):
        return replace(made(self, conditioning), shift=None)

    monkeypatch.setattr(Adapter, "output_head", without_shift)
    (trajectory,) = record(pipe, inputs[:1], tmp_path / "recording", 2, seed=10, progress=False)
    assert trajectory.scale.abs().max() > 0 == trajectory.shift.abs().max()
