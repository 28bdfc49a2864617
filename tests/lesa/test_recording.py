import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from lesa import Trajectories, enable_cache, record
from lesa.demo import digits
from lesa.inputs import collate
from lesa.training import recording as recording_module
from lesa_kernels import FusedKANPredictor, OutputHead, PredictorConfig
from lesa_kernels.predictor import output_head

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
    """Lets the transformer's last block raise at its `call`-th forward."""
    block = pipe.transformer.single_transformer_blocks[-1]
    forward, calls = block.forward, iter(range(10**6))

    def fail(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(block, "forward", fail)


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
    (tmp_path / "sample-00001.safetensors").unlink()
    assert counts() == ["2", "2.3", "2.7", "3"]  # of two samples in a call, one was there


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
    "name", ["callback_on_step_end", "generator", "num_inference_steps", "output_type", "return_dict"]
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
    (tmp_path / "manifest.json").write_text(json.dumps({**recording.manifest, "format_version": 2}))
    with pytest.raises(ValueError, match=r"format_version.*must be 1.*got 2"):
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
