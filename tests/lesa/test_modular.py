"""Modular pipelines of diffusers, which do not tell a cache that a run has ended."""

import gc
import importlib
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lesa
import small_pipelines as small
from lesa.models import adapter_for
from lesa.pipelines import blocks_of, quiet_progress
from lesa_kernels import FusedKANPredictor, PredictorConfig
from modular_pipelines import CASES, EXPERTS, counted_blocks, distance

USING = Path(__file__).resolve().parents[2] / "docs/using-the-cache.md"
STEPS = 10
SOME = [0, 1, 2, 6]
REST = [3, 4, 5, 7, 8, 9]
SIDE = 32


def guided(**options):
    return importlib.import_module("diffusers").ClassifierFreeGuidance(3.0, **options)


FREED = {
    "flux": ("flux", dict, {"main": STEPS}),
    "qwen with guidance": ("qwen", guided, {"main": STEPS, "main-2": STEPS}),
    "qwen with guidance in the first half": (
        "qwen",
        lambda: guided(stop=0.5),
        {"main": STEPS, "main-2": STEPS // 2},
    ),
}


@pytest.mark.parametrize("name", FREED)
def test_a_modular_pipeline_frees_its_rings(name):
    kind, guider, streams = FREED[name]
    case, pipe = CASES[kind], CASES[kind].build(guider() or None)
    torch.manual_seed(0)
    predictor, rings = FusedKANPredictor(PredictorConfig(small.DIM, rank=0, hidden=4)), []
    make_ring = predictor.make_ring

    def remember(*args):
        ring = make_ring(*args)
        rings.append(weakref.ref(ring.storage))
        return ring

    predictor.make_ring = remember

    def generate():
        return case.latents(pipe, STEPS)

    plain = generate()
    with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
        made = []
        for number in range(2):
            made.append(generate())
            gc.collect()
            assert len(rings) == len(streams) * (number + 1) and [ring() for ring in rings] == [None] * len(rings)
            assert handle.stats.runs == number + 1
            for name, steps in streams.items():
                stream = handle.stats.streams[name]
                assert stream.computed == [step for step in SOME if step < steps]
                assert stream.predicted == [step for step in REST if step < steps]
                assert stream.ring_device_bytes > 0
    assert torch.equal(*made) and not torch.equal(made[0], plain)
    assert torch.equal(generate(), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_computed_is_bit_exact_and_forecasts_skip_the_blocks(name):
    case = CASES[name]
    pipe, total = case.build(guided()), 12
    some = [0, 1, 2, 5, 9]
    rest = [step for step in range(total) if step not in some]
    plain, adapter = case.latents(pipe, total), adapter_for(pipe)

    def line():
        return FusedKANPredictor(PredictorConfig(mixer="linear"))

    with counted_blocks(adapter) as counts, lesa.enable_cache(pipe, line(), range(total), strict=True) as handle:
        assert torch.equal(case.latents(pipe, total), plain)
    assert [*handle.stats.streams] == [*case.streams]
    assert counts == [len(case.streams) * total] * len(counts)
    with counted_blocks(adapter) as counts, lesa.enable_cache(pipe, line(), some, strict=True) as handle:
        cached = case.latents(pipe, total)
    for stream in handle.stats.streams.values():
        assert (stream.computed, stream.predicted, stream.fused) == (some, rest, rest)
    assert counts == [len(case.streams) * len(some)] * len(counts)
    with lesa.enable_cache(pipe, line(), [0]):
        held = case.latents(pipe, total)
    assert 0 < distance(cached, plain) < 0.02 and distance(cached, plain) < distance(held, plain) / 4
    assert torch.equal(case.latents(pipe, total), plain)


@pytest.mark.slow
def test_both_experts_of_a_modular_pipeline_are_cached():
    pipe, total = EXPERTS.build(guided()), 12
    plain = EXPERTS.latents(pipe, total)
    with lesa.enable_cache(pipe, None, range(total), strict=True):
        assert torch.equal(EXPERTS.latents(pipe, total), plain)
    with lesa.enable_cache(pipe, None, [0, 1, 2, 5, 9], strict=True) as handle:
        cached = EXPERTS.latents(pipe, total)
    streams = handle.stats.streams
    assert [*streams] == [*EXPERTS.streams]
    assert [stream.computed for stream in streams.values()] == 2 * [[0, 1, 2, 5]] + 2 * [[6, 9]]
    assert [stream.predicted for stream in streams.values()] == 2 * [[3, 4]] + 2 * [[7, 8, 10, 11]]
    assert 0 < distance(cached, plain) < 0.02


# Recording, refining and evaluating

KINDS = ["flux", "qwen", "sd3"]
"""Modular pipelines whose ordinary ones draw the same noise."""


def pair(kind, guidance=1.0, decodes=True):
    """An ordinary and a modular pipeline of the same components, and two inputs for each."""
    small_case = small.ALL[kind]
    plain = small_case.build()
    guider = importlib.import_module("diffusers").ClassifierFreeGuidance(guidance)
    pipe = CASES[kind].build(guider, decodes, plain)
    inputs, generator = [], torch.Generator().manual_seed(5)
    for _ in range(2):
        item = {**small_case.inputs(1), "height": SIDE, "width": SIDE}
        for name in [name for name in item if name.endswith("prompt_embeds")]:
            item[name] = torch.randn(item[name].shape, generator=generator)
        inputs.append(item)
    known = {given.name for given in pipe._blocks.inputs}
    return plain, inputs, pipe, [{n: v for n, v in item.items() if n in known} for item in inputs]


@pytest.fixture(scope="module")
def paired():
    """`paired(kind)` -> what `pair` makes, once."""
    made = {}
    return lambda kind: made.setdefault(kind, pair(kind))


OPTIONS = {"num_inference_steps": STEPS, "progress": False}


@pytest.fixture(scope="module")
def recordings(paired, tmp_path_factory):
    """`recordings(kind)` -> the recordings of the ordinary and of the modular pipeline."""
    made = {}

    def of(kind):
        if kind not in made:
            plain, inputs, pipe, known = paired(kind)
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = lesa.record(plain, inputs, folder / "plain", **OPTIONS)
            made[kind] = made[kind], lesa.record(pipe, known, folder / "modular", **OPTIONS)
        return made[kind]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_modular_pipeline_records_what_the_ordinary_one_records(recordings, kind):
    plain, modular = recordings(kind)
    assert len(plain) == len(modular) == 2
    for one, other in zip(plain, modular, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))
    assert torch.equal(plain.head_weight, modular.head_weight) and plain.family == modular.family


def bars_of(pipe):
    return {path: vars(block).get("_progress_bar_config") for path, block in blocks_of(pipe).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [None, {"leave": True}])
def test_the_bars_of_a_modular_pipeline_are_off_only_while_it_records(tmp_path, capfd, kind, config):
    _, _, pipe, inputs = pair(kind, decodes=False)
    loop = next(block for block in blocks_of(pipe).values() if hasattr(block, "set_progress_bar_config"))
    if config is not None:
        loop.set_progress_bar_config(**config)
    before, names = bars_of(pipe), [*blocks_of(pipe)]
    lesa.record(pipe, inputs[:1], tmp_path, **OPTIONS)
    assert "it/s" not in capfd.readouterr().err and bars_of(pipe) == before and [*blocks_of(pipe)] == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen", "sd3"])
def test_a_modular_recording_with_guidance_has_both_streams(tmp_path, kind):
    _, _, pipe, inputs = pair(kind, guidance=3.0, decodes=False)
    for item in inputs:
        item |= {f"negative_{name}": -item[name] for name in [*item] if name.endswith("prompt_embeds")}
        if "prompt_embeds_mask" in item:
            item["negative_prompt_embeds_mask"] = item["prompt_embeds_mask"]
    made = lesa.record(pipe, inputs, tmp_path / "a", **OPTIONS, batch_size=2)
    assert made.names == [f"sample-0000{n}{stream}" for n in range(2) for stream in ("", "-main-2")]
    assert not torch.equal(made[0].features, made[1].features)
    pipe.update_components(guider=type(pipe.guider)(4.0))
    with pytest.raises(ValueError, match=r"`pipeline_config\.guider\.guidance_scale` must be 3.0"):
        lesa.record(pipe, inputs, tmp_path / "a", **OPTIONS)
    pipe.guider.guidance_scale = 3.0
    assert lesa.record(pipe, inputs, tmp_path / "a", **OPTIONS).recorded.kept == (0, 1)
    pipe.guider.guidance_scale = 5.0
    with pytest.raises(ValueError, match=r"`pipeline_config\.guider\.guidance_scale` must be 3.0"):
        lesa.record(pipe, inputs, tmp_path / "a", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_that_a_modular_pipeline_would_ignore_is_named(paired, tmp_path, kind):
    _, _, pipe, inputs = paired(kind)
    with pytest.raises(ValueError, match="`inputs` must have arguments that the blocks.*got 'true_cfg_scael'"):
        lesa.record(pipe, [{**inputs[0], "true_cfg_scael": 4.0}], tmp_path, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_modular_pipeline_refines_and_evaluates_as_the_ordinary_one(paired, recordings, tmp_path, kind):
    plain, inputs, pipe, known = paired(kind)
    (of_plain, of_modular), quick = recordings(kind), {"epochs": 1, "progress": False}
    config = PredictorConfig(small.DIM, rank=2, hidden=4)
    predictor = lesa.train(of_modular, config=config, schedule=SOME, guided_epochs=1, **quick)
    refined = lesa.refine(predictor, of_modular, pipe, known, rounds=1, out_dir=tmp_path / "a", **quick)
    wanted = lesa.refine(predictor, of_plain, plain, inputs, rounds=1, **quick)
    assert all(map(torch.equal, refined.state_dict().values(), wanted.state_dict().values()))

    options = {"against": ["steps"], "num_inference_steps": STEPS, "progress": False, "batch_size": 1}
    ours = lesa.evaluate(pipe, known, {"a": refined}, **options)
    theirs = lesa.evaluate(plain, inputs, {"a": refined}, **options)
    for one, other in zip(ours.runs, theirs.runs, strict=True):
        for field in ("name", "steps", "psnr", "ssim", "step_equivalents", "step_errors"):
            assert getattr(one, field) == getattr(other, field), field
        for field, values in one.per_sample.items():
            # Equal latents in another order in memory have a norm that may differ in the last bit.
            assert values == pytest.approx(other.per_sample[field], rel=0 if field != "latent_error" else 1e-15, abs=0)
    assert [run.steps for run in ours.runs][:2] == [tuple(range(STEPS)), tuple(SOME)]


@pytest.mark.slow
def test_pictures_need_a_vae_and_its_block():
    _, _, pipe, inputs = pair("flux", decodes=False)
    with pytest.raises(TypeError, match="`pipe` must have a VAE, so that pictures can be compared.*block `decode`"):
        lesa.evaluate(pipe, inputs, [], num_inference_steps=STEPS, progress=False)
    _, _, pipe, inputs = pair("flux")
    del pipe._blocks.sub_blocks["decode"]
    with pytest.raises(TypeError, match="`pipe` must have a last block 'decode', so that pictures can be compared"):
        lesa.evaluate(pipe, inputs, [], num_inference_steps=STEPS, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in KINDS])
def test_a_modular_pipeline_is_recorded_refined_evaluated_and_generates(tmp_path, name):
    case = CASES[name]
    pipe = case.build(guided())
    inputs, options = [case.inputs(pipe)] * 2, {"num_inference_steps": STEPS, "progress": False}
    plain = case.latents(pipe, STEPS)
    made = lesa.record(pipe, inputs, tmp_path, **options)
    assert torch.equal(case.latents(pipe, STEPS), plain)
    suffixes = ["", *(f"-{stream}" for stream in case.streams[1:])]
    assert made.names == [f"sample-0000{number}{suffix}" for number in range(2) for suffix in suffixes]
    width, quick = adapter_for(pipe).feature_dim, {"epochs": 1, "progress": False}
    predictor = lesa.train(made, PredictorConfig(width, rank=2, hidden=4), SOME, guided_epochs=1, **quick)
    refined = lesa.refine(predictor, made, pipe, inputs, rounds=1, **quick)
    reference, mine = lesa.evaluate(pipe, inputs, [refined], [], batch_size=1, **options).runs
    assert (reference.computed_steps, mine.steps) == (STEPS, tuple(SOME))
    assert mine.whole_steps == mine.step_equivalents == mine.block_passes == len(SOME)
    assert 20 < mine.psnr < 100
    drawn = {"output_type": "np", "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    with lesa.enable_cache(pipe, refined) as handle, quiet_progress(pipe):
        state = pipe(**{**inputs[0], **drawn})
    assert handle.stats.streams[case.streams[0]].computed == SOME
    assert np.isfinite(next(value for name in ("images", "videos") if (value := state.get(name)) is not None)).all()


@pytest.mark.slow
def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch, capsys):
    (example,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", USING.read_text(), re.M | re.S)
        if "init_pipeline" in block
    ]
    case = CASES["qwen"]
    pipe, loaded = case.build(), []
    kind = type(pipe)
    draw = kind.__call__

    def call(self, prompt, **options):
        loaded.append(prompt)
        return draw(self, **{**case.inputs(self), **options})

    monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(kind, "load_components", lambda self, torch_dtype: loaded.append(torch_dtype))
    monkeypatch.setattr(kind, "to", lambda self, device: loaded.append(device))
    monkeypatch.setattr(
        importlib.import_module("diffusers.modular_pipelines").QwenImageAutoBlocks,
        "init_pipeline",
        lambda self, name: pipe if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None,
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})
    assert loaded == [torch.bfloat16, "cuda", "a red fox in the snow"]
    assert Image.open("fox.png").size == (case.small.size["width"], case.small.size["height"])
    assert "main-2: computed 8 (0,2,5,9,14,20,25,31)" in capsys.readouterr().out
