"""The guiders of diffusers' modular pipelines: their calls are streams, and the cache does not change what they do."""

import warnings

import diffusers
import pytest
import torch
from diffusers import guiders

import lesa
import small_pipelines as small
from lesa.conditions import conditions_of
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig
from modular_pipelines import CASES, SOUND, counted_blocks, distance

STEPS = 12
SOME = [0, 1, 2, 5, 9]
ALL = [*range(STEPS)]
LATER = ALL[1:]
"""The steps of a call that skips layers: diffusers leaves out the first one."""
NEAR = 0.02


def skipped(**options):
    """Layers for a guider. Skipping a whole block fails in diffusers if the block has text tokens too."""
    return diffusers.LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False, **options)


def decoupled():
    """A guider that needs kornia, whose two functions are simple ones here."""
    from diffusers.guiders import frequency_decoupled_guidance as module

    def build(image, levels):
        small = torch.nn.functional.avg_pool2d(image, 2)
        return [image - double(small), small]

    def double(image):
        return torch.nn.functional.interpolate(image, scale_factor=2)

    module._CAN_USE_KORNIA = True
    module.build_laplacian_pyramid_func, module.upsample_and_blur_func = build, double
    return guiders.FrequencyDecoupledGuidance([3.0, 2.0])


TWO = {"main": ALL, "main-2": ALL}
THREE = {**TWO, "main-3": LATER}
GUIDERS = {
    "cfg": ("sd3", lambda: guiders.ClassifierFreeGuidance(3.0), TWO),
    "cfg off": ("sd3", lambda: guiders.ClassifierFreeGuidance(3.0, enabled=False), {"main": ALL}),
    "cfg late": ("qwen", lambda: guiders.ClassifierFreeGuidance(3.0, start=0.3), {"main": ALL, "main-2": ALL[3:]}),
    "cfg early": ("qwen", lambda: guiders.ClassifierFreeGuidance(3.0, stop=0.5), {"main": ALL, "main-2": ALL[:6]}),
    "cfg between": (
        "qwen",
        lambda: guiders.ClassifierFreeGuidance(3.0, start=0.3, stop=0.7),
        {"main": ALL, "main-2": ALL[3:8]},
    ),
    "cfg-zero*": ("sd3", lambda: guiders.ClassifierFreeZeroStarGuidance(3.0), TWO),
    "apg": ("qwen", lambda: guiders.AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5), TWO),
    "apg mix": (
        "sd3",
        lambda: guiders.AdaptiveProjectedMixGuidance(3.0, adaptive_projected_guidance_start_step=3),
        TWO,
    ),
    "tangential": ("sd3", lambda: guiders.TangentialClassifierFreeGuidance(3.0), TWO),
    "magnitude": ("qwen", lambda: guiders.MagnitudeAwareGuidance(3.0), TWO),
    "frequencies": ("sd3", decoupled, TWO),
    "smoothed energy": (
        "qwen",
        lambda: guiders.SmoothedEnergyGuidance(3.0, seg_guidance_layers=[0], seg_guidance_stop=1.0),
        THREE,
    ),
    "pag": (
        "qwen",
        lambda: guiders.PerturbedAttentionGuidance(3.0, perturbed_guidance_layers=[0], perturbed_guidance_stop=0.5),
        {**TWO, "main-3": LATER[:5]},
    ),
    "pag alone": (
        "sd3 plain",
        lambda: guiders.PerturbedAttentionGuidance(1.0, perturbed_guidance_layers=[0], perturbed_guidance_stop=1.0),
        {"main": ALL, "main-2": LATER},
    ),
    "skipped layers": (
        "qwen",
        lambda: guiders.SkipLayerGuidance(3.0, skip_layer_config=skipped(), skip_layer_guidance_stop=1.0),
        THREE,
    ),
    "skipped layers, cfg early": (
        "sd3",
        lambda: guiders.SkipLayerGuidance(3.0, skip_layer_config=skipped(), skip_layer_guidance_stop=1.0, stop=0.5),
        {**TWO, "main-3": LATER[:5]},  # without guidance, diffusers skips no layers, and takes the negative prompt
    ),
    "auto": ("qwen", lambda: guiders.AutoGuidance(3.0, auto_guidance_config=skipped()), TWO),
    "auto with dropout": ("qwen", lambda: guiders.AutoGuidance(3.0, auto_guidance_config=skipped(dropout=0.1)), TWO),
}
"""For each way to guide: the pipeline, the guider, and the steps of each stream."""

QUICK = {"pag", "cfg between"}


def built(name):
    kind, guider, streams = GUIDERS[name]
    case = CASES[kind.removesuffix(" plain")]
    plain = small.ALL["sd3"].build() if kind.endswith("plain") else None  # diffusers knows no layers of SD 3.5
    return case, case.build(guider(), plain=plain), streams


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def watched(guider):
    """Lists, for each step, how often the guider prepared the model and what it then got."""
    told, forward = [], guider.forward

    def listen(**predictions):
        told.append((guider._step, guider._count_prepared, [*predictions]))
        return forward(**predictions)

    guider.forward = listen
    return told


def test_every_guider_of_diffusers_is_here():
    kinds = {type(guider()).__name__ for _, guider, _ in GUIDERS.values()}
    tested_apart = {"LTX2Guidance", "BaseGuidance"}
    assert kinds | tested_apart == {name for name in vars(guiders) if name.endswith("Guidance")}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in GUIDERS])
def test_a_guider_works_with_the_cache(name):
    case, pipe, streams = built(name)
    plain, told = case.latents(pipe, STEPS), watched(pipe.guider)
    adapter = adapter_for(pipe)
    with counted_blocks(adapter) as counts, lesa.enable_cache(pipe, line(), ALL, strict=True) as handle:
        assert torch.equal(case.latents(pipe, STEPS), plain)
    assert {name: stream.computed for name, stream in handle.stats.streams.items()} == streams
    assert counts == [sum(map(len, streams.values()))] * len(counts)
    calls = [sum(step in steps for steps in streams.values()) for step in ALL]
    prepared = 0 if "smoothed" in name else 1  # that guider does not count
    assert [(step, count, len(given)) for step, count, given in told] == [
        (s, n * prepared, n) for s, n in zip(ALL, calls)
    ]

    with counted_blocks(adapter) as counts, lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        cached = case.latents(pipe, STEPS)
    for stream, steps in streams.items():
        computed = sorted({*SOME, steps[0]} & {*steps})
        stats = handle.stats.streams[stream]
        assert (stats.computed, stats.predicted) == (computed, [step for step in steps if step not in computed])
        assert stats.reasons[steps[0]] == ("scheduled" if steps[0] in SOME else "the first call of this stream")
    assert counts == [sum(len(stream.computed) for stream in handle.stats.streams.values())] * len(counts)
    assert told[STEPS:] == told[:STEPS]
    with lesa.enable_cache(pipe, line(), [0]):
        held = case.latents(pipe, STEPS)
    assert cached.isfinite().all()
    if "dropout" not in name:  # what is dropped is new noise in every step, which no forecast can follow
        assert 0 < distance(cached, plain) < NEAR and distance(cached, plain) < distance(held, plain) / 4
    assert torch.equal(case.latents(pipe, STEPS), plain)


@pytest.mark.slow
def test_the_guiders_of_video_and_sound_work_with_the_cache():
    guider = guiders.LTX2Guidance(3.0, stg_scale=1.0, modality_scale=2.0, spatio_temporal_guidance_blocks=[0])
    pipe = SOUND.build()
    pipe.update_components(guider=guider, audio_guider=guider.new())
    plain = SOUND.latents(pipe, STEPS)
    with lesa.enable_cache(pipe, line(), ALL, strict=True) as handle:
        assert torch.equal(SOUND.latents(pipe, STEPS), plain)
    assert [*handle.stats.streams] == [*SOUND.streams]
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        cached = SOUND.latents(pipe, STEPS)
    assert all(stream.computed == SOME for stream in handle.stats.streams.values())
    assert 0 < distance(cached, plain) < 1.5 * NEAR  # four forecasts are added up


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pag", "skipped layers, cfg early", "cfg between", "apg", "auto"])
def test_the_streams_of_the_whole_run_are_recorded_refined_and_evaluated(tmp_path, name):
    case, pipe, streams = built(name)
    inputs = [case.inputs(pipe), {**case.inputs(pipe), "prompt_embeds": 1.1 * case.inputs(pipe)["prompt_embeds"]}]
    whole = [stream for stream, steps in streams.items() if steps == ALL]
    parts = {
        f"lesa: the stream '{stream}' is not recorded, because it is called in {len(steps)} of the {STEPS} steps."
        for stream, steps in streams.items()
        if steps != ALL
    }
    options = {"num_inference_steps": STEPS, "progress": False}

    def record(pipe):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = lesa.record(pipe, inputs, tmp_path, **options)
        return made, {str(w.message) for w in caught if str(w.message).startswith("lesa: the stream")}

    made, warned = record(pipe)
    suffixes = ["" if stream == "main" else f"-{stream}" for stream in whole]
    assert made.names == [f"sample-0000{number}{suffix}" for number in range(2) for suffix in suffixes]
    assert warned == parts
    assert all(len(trajectory.sigmas) == STEPS for trajectory in made)
    for again in (pipe, built(name)[1]):  # a guider that has run, and a new one
        assert record(again)[0].recorded.kept == (0, 1)

    quick = {"epochs": 1, "progress": False}
    predictor = lesa.train(made, PredictorConfig(small.DIM, rank=2, hidden=4), SOME, guided_epochs=1, **quick)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refined = lesa.refine(predictor, made, pipe, inputs, rounds=1, **quick)
    reference, mine = lesa.evaluate(pipe, inputs, [refined], [], batch_size=1, **options).runs
    assert (reference.computed_steps, reference.step_equivalents) == (STEPS, STEPS)
    calls = {stream: len({*SOME, steps[0]} & {*steps}) for stream, steps in streams.items()}
    share = sum(calls.values()) / sum(map(len, streams.values()))
    assert mine.step_equivalents == mine.block_passes == pytest.approx(STEPS * share)
    assert 20 < mine.psnr < 100


@pytest.mark.slow
def test_a_recording_names_the_layers_of_a_guider(tmp_path):
    case, pipe, _ = built("skipped layers")
    options = {"num_inference_steps": 2, "progress": False}
    with pytest.warns(UserWarning, match="the stream 'main-3' is not recorded"):
        lesa.record(pipe, [case.inputs(pipe)], tmp_path, **options)
    pipe.guider.skip_layer_config[0].indices = [0]
    with pytest.raises(ValueError, match=r"`pipeline_config\.guider\.skip_layer_config` must be \[\{'indices': \[1\]"):
        lesa.record(pipe, [case.inputs(pipe)], tmp_path, **options)


def test_the_list_of_blocks_that_a_guider_finds_is_named_before_it_finds_it():
    _, pipe, _ = built("pag")

    def layers():
        return conditions_of(pipe)["pipeline_config"]["guider"]["skip_layer_config"]

    before = layers()
    assert pipe.guider.skip_layer_config[0].fqn == "auto" and before[0]["fqn"] == "transformer_blocks"
    pipe.guider.skip_layer_config[0].fqn = "transformer_blocks"  # as in a run
    assert layers() == before
