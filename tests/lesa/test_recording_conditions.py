"""A recording does not continue under other conditions, and says which one differs."""

import functools
import json
import shutil
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import interrupted_recordings as trials
import small_pipelines as small
from lesa import record
from lesa.conditions import common_conditions, conditions_of
from lesa.training import recording

INPUTS = trials.inputs()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    record(trials.CASE.build(), INPUTS, folder, **trials.OPTIONS)
    return folder


@pytest.fixture
def pipe():
    return trials.CASE.build()


def stored(pipe):
    """The conditions as the manifest has them."""
    return {name: value for name, value in json.loads(json.dumps(conditions_of(pipe))).items() if name != "unset"}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def unfinished(whole, folder):
    shutil.copytree(whole, folder)
    (folder / "sample-00001.safetensors").unlink()
    return folder


# What differs


def scheduler(**changed):
    def change(pipe):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changed)

    return change


def of_class(name):
    def change(pipe):
        pipe.scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction")

    return change


class OtherEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    pass


def other_class(pipe):
    pipe.scheduler = OtherEuler(**{k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")})


CHANGES = {
    "the shift in the configuration": (scheduler(shift=5.0), r"scheduler\.shift"),
    "the shift on the scheduler": (lambda pipe: pipe.scheduler.set_shift(5.0), r"scheduler\.shift"),
    "dynamic shifting": (scheduler(use_dynamic_shifting=False), r"scheduler\.use_dynamic_shifting"),
    "the largest shift": (scheduler(max_shift=1.2), r"scheduler\.max_shift"),
    "the last sigma": (scheduler(shift_terminal=0.1), r"scheduler\.shift_terminal"),
    "Karras sigmas": (scheduler(use_karras_sigmas=True), r"scheduler\.use_karras_sigmas"),
    "random steps": (scheduler(stochastic_sampling=True), r"scheduler\.stochastic_sampling"),
    "another scheduler": (of_class("DPMSolverMultistepScheduler"), r"scheduler\.class"),
    "a scheduler with the same options": (other_class, r"scheduler\.class"),
    "a registered option": (lambda pipe: pipe.register_to_config(is_distilled=True), r"pipeline_config\.is_distilled"),
    "the length of prompts": (
        lambda pipe: setattr(pipe, "tokenizer_max_length", 5),
        r"pipeline_config\.tokenizer_max_length",
    ),
    "the default size": (lambda pipe: setattr(pipe, "default_sample_size", 4), r"pipeline_config\.default_sample_size"),
    "the transformer's dtype": (
        lambda pipe: pipe.transformer.to(torch.bfloat16),
        r"transformer` must be as in .*`dtypes\.transformer` was 'float32' and is 'bfloat16'",
    ),
    "the dtype of a part": (
        lambda pipe: pipe.transformer.time_text_embed.to(torch.float64),
        r"`dtypes\.transformer` was 'float32' and is 'float32 and float64'",
    ),
    "the VAE's dtype": (lambda pipe: pipe.vae.to(torch.bfloat16), r"dtypes\.vae"),
    "the VAE's weights": (lambda pipe: next(pipe.vae.parameters()).data.add_(1), r"weights\.vae"),
    "the transformer's configuration": (
        lambda pipe: pipe.transformer.register_to_config(guidance_embeds=True),
        r"configs\.transformer\.guidance_embeds",
    ),
    "the VAE's scale": (lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5), r"configs\.vae\.scaling_factor"),
    "the transformer's weights": (lambda pipe: pipe.transformer.proj_out.bias.data.add_(1), "transformer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES)
def test_nothing_goes_on_after(pipe, whole, tmp_path, monkeypatch, change, words):
    """Neither if samples are missing, nor if none is."""
    started = unfinished(whole, tmp_path / "unfinished")
    change(pipe)
    monkeypatch.setattr(recording, "run_pipeline", lambda *args: pytest.fail("nothing is drawn"))
    for folder in (whole, started):
        before = contents(folder)
        with pytest.raises(ValueError, match=rf"`{words}|{words}") as error:
            record(pipe, INPUTS, folder, **trials.OPTIONS)
        assert f"the recording that {folder} holds" in str(error.value)
        assert "another folder" in str(error.value) and contents(folder) == before


def lora(seed, name, pipe, scale=1.0):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, name)
    pipe.transformer.set_adapters([name], [scale])


def both(pipe):
    lora(0, "one", pipe)
    lora(1, "two", pipe)
    pipe.transformer.set_adapters(["one", "two"], [1.0, 0.5])


ADAPTERS = {
    "another scale": (both, lambda p: p.transformer.set_adapters(["one", "two"], [1.0, 0.6]), r"adapters.*\.two"),
    "one of them off": (both, lambda p: p.transformer.set_adapters(["one"], [1.0]), r"adapters.*\.two"),
    "all off": (both, lambda p: p.transformer.disable_adapters(), r"adapters"),
    "one more": (lambda p: lora(0, "one", p), lambda p: lora(1, "two", p), r"adapters"),
    "another scale in one layer": (
        both,
        lambda p: p.transformer.transformer_blocks[0].attn.to_q.scaling.update(two=0.6),
        r"adapters\.transformer\.two",
    ),
    "no more": (lambda p: lora(0, "one", p), lambda p: p.transformer.delete_adapters(["one"]), "adapters"),
    "one": (lambda p: None, lambda p: lora(0, "one", p), "adapters"),
    "fused": (
        lambda p: lora(0, "one", p),
        lambda p: p.fuse_lora(["transformer"], adapter_names=["one"]),
        "fused_loras",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("start, change, words", ADAPTERS.values(), ids=ADAPTERS)
def test_nothing_goes_on_with_other_adapters(pipe, tmp_path, start, change, words):
    start(pipe)
    record(pipe, INPUTS, tmp_path, **trials.OPTIONS)
    record(pipe, INPUTS, tmp_path, **trials.OPTIONS)
    (tmp_path / "sample-00000.safetensors").unlink()
    record(pipe, INPUTS, tmp_path, **trials.OPTIONS)
    change(pipe)
    with pytest.raises(ValueError, match=words):
        record(pipe, INPUTS, tmp_path, **trials.OPTIONS)


@pytest.mark.slow
def test_nothing_goes_on_with_another_image_prompt_scale(pipe, tmp_path):
    """An IP-Adapter's scale is kept by the attention processors, not in the weights."""
    processor = torch.nn.Module()
    processor.scale = [0.5]
    first = conditions_of(pipe)
    pipe.transformer.transformer_blocks[0].attn.processor = processor
    half = conditions_of(pipe)
    processor.scale = [0.6]
    assert first["adapters"] == {} and half["adapters"] == {"transformer": {"ip_adapter": [0.5]}}
    assert conditions_of(pipe)["adapters"] == {"transformer": {"ip_adapter": [0.6]}}


@pytest.mark.slow
def test_nothing_goes_on_with_a_quantised_model(pipe, whole):
    """torchao packs the weights into tensors of its own, which a fingerprint does not look into."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    # The head stays plain, so that it can be recorded.
    inner = lambda module, name: isinstance(module, torch.nn.Linear) and "blocks" in name  # noqa: E731
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig(), filter_fn=inner)
    with pytest.raises(ValueError, match=r"`quantisation\.transformer.*` was None"):
        record(pipe, INPUTS, whole, **trials.OPTIONS)
    kept = conditions_of(pipe)["quantisation"]["transformer"]
    assert kept["types"] == ["Int8Tensor"] and json.loads(json.dumps(kept)) == kept
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    weight.qdata[0, 0] += 1
    assert conditions_of(pipe)["quantisation"]["transformer"]["weights"] != kept["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux cfg", "qwen cfg", "hunyuan cfg", "sd3 cfg", "flux controlnet"])
def test_a_recording_goes_on_with_what_was_loaded_again(tmp_path, name):
    """Nothing of the conditions depends on how the pipeline was made, or on the runs that it has made."""
    with small.small_areas():
        case = small.ALL[name]
        pipe, item = case.build(), case.inputs(1)
        before = stored(pipe)
        record(pipe, [item], tmp_path / "a", 2, progress=False)
        assert stored(pipe) == before
        pipe.save_pretrained(tmp_path / "saved")
        empty = [part for part, value in pipe.components.items() if value is None]
        loaded = type(pipe).from_pretrained(tmp_path / "saved", **dict.fromkeys(empty))
        assert stored(loaded) == before
        loaded.transformer.eval()
        (tmp_path / "a" / "sample-00000.safetensors").unlink()
        assert record(loaded, [item], tmp_path / "a", 2, progress=False).recorded.new == (0,)


@pytest.mark.slow
def test_nothing_goes_on_under_autocast(pipe, whole):
    with pytest.raises(ValueError, match="`autocast.cpu` must be None"), torch.autocast("cpu", torch.bfloat16):
        record(pipe, INPUTS, whole, **trials.OPTIONS)


@pytest.mark.slow
def test_options_of_a_newer_diffusers_are_checked_only_if_they_are_set(pipe, whole, tmp_path):
    """As if the version that recorded did not have them yet."""
    folder = unfinished(whole, tmp_path / "unfinished")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["scheduler"]["invert_sigmas"], manifest["pipeline_config"]["tokenizer_max_length"]
    del manifest["configs"]["transformer"]["guidance_embeds"], manifest["configs"]["vae"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    record(pipe, INPUTS, folder, **trials.OPTIONS)
    pipe.scheduler.register_to_config(invert_sigmas=True)
    with pytest.raises(ValueError, match=r"`scheduler\.invert_sigmas` must be None"):
        record(pipe, INPUTS, folder, **trials.OPTIONS)


@pytest.mark.slow
def test_compiling_makes_no_difference(pipe):
    before = stored(pipe)
    pipe.transformer, pipe.vae = torch.compile(pipe.transformer), torch.compile(pipe.vae)
    assert stored(pipe) == before


@pytest.mark.slow
def test_a_component_that_is_not_there_makes_no_difference(pipe, whole, tmp_path):
    """Who passes embeddings may leave out the VAE and the text encoders."""
    folder = unfinished(whole, tmp_path / "unfinished")
    pipe.vae = None
    record(pipe, INPUTS, folder, **trials.OPTIONS)
    assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", ["scheduler", "pipeline_config", "configs", "dtypes", "adapters", "weights", "arguments"]
)
def test_what_an_old_manifest_does_not_say_is_not_checked(pipe, whole, tmp_path, lost):
    folder = unfinished(whole, tmp_path / "unfinished")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[lost]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if lost == "scheduler":
        scheduler(shift=5.0)(pipe)
    if lost == "pipeline_config":
        pipe.tokenizer_max_length = 5
    record(pipe, INPUTS, folder, **trials.OPTIONS)
    assert lost not in json.loads((folder / "manifest.json").read_text())


@pytest.mark.slow
def test_the_arguments_that_differ_are_named(pipe, whole):
    changed = [{**INPUTS[0], "guidance_scale": 2.0}, {**INPUTS[1], "true_cfg_scale": 7.0}]
    with pytest.raises(ValueError, match="The inputs differ in 'guidance_scale', 'true_cfg_scale'. Continue") as error:
        record(pipe, changed, whole, **trials.OPTIONS)
    assert str(error.value).startswith("`inputs_digest` must be ")


@pytest.mark.slow
def test_options_of_any_type_are_compared_after_they_were_read(pipe):
    values = {
        "nan": float("nan"),
        "inf": float("inf"),
        "tuple": (1, 2.5, "a"),
        "nested": {"a": [np.float64(0.1), None, True], 3: (torch.ones(2),)},
        "array": np.arange(3),
        "tensor": torch.arange(3),
        "dtype": torch.bfloat16,
    }
    pipe.scheduler.register_to_config(**values)
    one = json.loads(json.dumps(conditions_of(pipe)))
    assert one == json.loads(json.dumps(conditions_of(pipe))) and one["scheduler"]["tuple"] == [1, 2.5, "a"]
    pipe.scheduler.register_to_config(array=np.arange(3)[::-1])
    assert one["scheduler"]["array"] != conditions_of(pipe)["scheduler"]["array"]


def louder(module, *arguments, **options):
    return module.original(*arguments, **options)


def wrapped_forward(pipe):
    forward = pipe.transformer.forward
    pipe.transformer.forward = functools.wraps(forward)(lambda *args, **options: forward(*args, **options))


def under_autocast(pipe):
    pipe.transformer.forward = torch.autocast("cpu", torch.bfloat16)(pipe.transformer.forward)


def wrapped_under_torch(pipe):
    forward = pipe.transformer.forward
    pipe.transformer.forward = torch.no_grad()(lambda *args, **options: forward(*args, **options))


def another_processor(pipe):
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.processor = type("Mine", (type(attention.processor),), {"__module__": "mine"})()


def of_a_block(pipe):
    pipe.transformer.transformer_blocks[0].forward = types.MethodType(louder, pipe.transformer)


REPLACED = {
    "a wrapped forward": wrapped_forward,
    "autocast around the forward": under_autocast,
    "a wrapper without gradients": wrapped_under_torch,
    "a bound function": lambda pipe: setattr(pipe.transformer, "forward", functools.partial(louder, pipe.transformer)),
    "the forward of a block": of_a_block,
    "an attention processor": another_processor,
    "the forward of the VAE": lambda pipe: setattr(pipe.vae, "forward", functools.partial(louder, pipe.vae)),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_nothing_goes_on_under_functions_that_are_put_around_the_model(pipe, whole, tmp_path, monkeypatch, change):
    """And what began under them does not go on without them."""
    folder = unfinished(whole, tmp_path / "unfinished")
    plain = stored(pipe)
    change(pipe)
    changed = stored(pipe)
    assert stored(pipe) == changed and plain["replaced"] == {}
    monkeypatch.setattr(recording, "run_pipeline", lambda *args: pytest.fail("nothing is drawn"))
    for place in (whole, folder):
        with pytest.raises(ValueError, match=r"`replaced\.(transformer|vae)` must be None, as in the recording that"):
            record(pipe, INPUTS, place, **trials.OPTIONS)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "replaced": changed["replaced"]}))
    with pytest.raises(ValueError, match=r"`replaced.*` must be {.*}, as in the recording"):
        record(trials.CASE.build(), INPUTS, folder, **trials.OPTIONS)


@pytest.mark.slow
def test_a_forward_of_the_class_that_was_replaced_is_seen(pipe, monkeypatch):
    forward = type(pipe.transformer).forward
    monkeypatch.setattr(type(pipe.transformer), "forward", functools.wraps(forward)(lambda *args: forward(*args)))
    assert [*stored(pipe)["replaced"]["transformer"]] == ["itself"]


@pytest.mark.slow
def test_offloading_compiling_and_hooks_are_no_functions_around_the_model(pipe):
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    plain = stored(pipe)
    for part in (pipe.transformer, pipe.transformer.transformer_blocks[0], pipe.vae):
        accelerate.hooks.add_hook_to_module(part, accelerate.hooks.ModelHook())
        part.compile()
        part.register_forward_hook(lambda *arguments: None)  # many hooks only watch a run
    assert stored(pipe) == plain


def applied_layers(*layers):
    return lambda pipe: setattr(pipe, "pag_applied_layers", list(layers))


@pytest.mark.slow
@pytest.mark.parametrize(
    "one, other",
    [
        (applied_layers("blocks.1"), applied_layers("blocks.2")),
        (lambda pipe: setattr(pipe, "sizes", {"a": 1}), lambda pipe: setattr(pipe, "sizes", {"a": 2})),
        (lambda pipe: setattr(pipe, "parts", {1, 2}), lambda pipe: setattr(pipe, "parts", {1, 3})),
        (lambda pipe: setattr(pipe, "pair", (1, 2)), lambda pipe: setattr(pipe, "pair", (2, 1))),
    ],
)
def test_lists_and_dicts_that_are_set_on_a_pipeline_are_compared(pipe, one, other):
    one(pipe)
    first = stored(pipe)
    one(pipe)
    assert stored(pipe) == first
    other(pipe)
    assert stored(pipe)["pipeline_config"] != first["pipeline_config"]


@pytest.mark.slow
def test_options_that_cannot_be_written_as_json_are_compared(pipe):
    for one, other in ((torch.float16, torch.bfloat16), ({1}, {2}), (Path("a"), Path("b")), (1j, 2j)):
        pipe.scheduler.register_to_config(option=one)
        first = stored(pipe)
        pipe.scheduler.register_to_config(option=other)
        assert stored(pipe)["scheduler"]["option"] != first["scheduler"]["option"]


@pytest.mark.slow
def test_tokenizers_are_compared():
    with small.small_areas():
        pipe = small.ALL["sd3 cfg"].build()
    pipe.tokenizer = Tokenizer()
    first = stored(pipe)
    assert stored(pipe) == first and first["tokenizers"]["tokenizer"]["special"] == [1, 3]
    for name, value in (("padding_side", "left"), ("model_max_length", 9), ("size", 5), ("chat_template", "{{x}}")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.tokenizer, name, value)
            assert stored(pipe)["tokenizers"] != first["tokenizers"]
    given = conditions_of(pipe)
    assert "tokenizers" not in common_conditions({n: v for n, v in first.items() if n != "tokenizers"}, given)
    pipe.tokenizer = None
    assert common_conditions(first, conditions_of(pipe))["tokenizers"] == first["tokenizers"]


class Tokenizer:
    all_special_ids, padding_side, truncation_side, chat_template = [3, 1], "right", "right", None
    model_max_length, size = 8, 4

    def __len__(self):
        return self.size


@pytest.mark.slow
def test_another_dtype_is_named_also_if_the_inputs_were_cast(pipe, whole):
    """As the command does, which casts them to the dtype of the model."""
    pipe.transformer.to(torch.bfloat16)
    cast = [{n: v.bfloat16() if isinstance(v, torch.Tensor) else v for n, v in item.items()} for item in INPUTS]
    with pytest.raises(ValueError, match=r"`dtypes\.transformer` was 'float32' and is 'bfloat16'"):
        record(pipe, cast, whole, **trials.OPTIONS)


# What is set globally


def in_inference_mode(use):
    with torch.inference_mode():
        return use()


def without_gradients(use):
    with torch.set_grad_enabled(False):
        return use()


def with_default_dtype(dtype):
    def around(use):
        torch.set_default_dtype(dtype)
        try:
            return use()
        finally:
            torch.set_default_dtype(torch.float32)

    return around


def deterministic(use):
    torch.use_deterministic_algorithms(True)
    try:
        return use()
    finally:
        torch.use_deterministic_algorithms(False)


AROUND = {
    "inference mode": in_inference_mode,
    "no gradients": without_gradients,
    "bfloat16 by default": with_default_dtype(torch.bfloat16),
    "float64 by default": with_default_dtype(torch.float64),
    "deterministic algorithms": deterministic,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux cfg", "qwen cfg", "sd3 cfg", "hunyuan cfg"])
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_is_set_globally_changes_no_byte(tmp_path, name, around):
    with small.small_areas():
        case = small.ALL[name]
        pipe, item = case.build(), case.inputs(1)
    record(pipe, [item], tmp_path / "a", 2, 7, progress=False)
    around(lambda: record(pipe, [item], tmp_path / "b", 2, 7, progress=False))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    read = around(lambda: [*record(pipe, [item], tmp_path / "a", 2, 7, progress=False)])
    plain = [*record(pipe, [item], tmp_path / "b", 2, 7, progress=False)]
    for one, other in zip(read, plain, strict=True):
        assert all(torch.equal(getattr(one, field), getattr(other, field)) for field in vars(one))
        assert one.features.dtype == torch.float32 and one.sigmas.dtype == torch.float32


@pytest.mark.slow
def test_a_buffer_that_is_saved_with_the_weights_is_compared(tmp_path):
    """The positions of Stable Diffusion 3 are one."""
    case = small.ALL["sd3"]
    pipe, inputs = case.build(), [{**case.inputs()}]
    record(pipe, inputs, tmp_path / "a", num_inference_steps=3, progress=False)
    pipe.transformer.pos_embed.pos_embed.mul_(2)
    with pytest.raises(ValueError, match=r"`buffers\.transformer` must be"):
        record(pipe, inputs, tmp_path / "a", num_inference_steps=3, progress=False)
