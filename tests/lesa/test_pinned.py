"""Ways to run a pipeline that must stay right: guidance in windows, two ControlNets, IP-Adapters, odd noise levels."""

import importlib

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import lesa
import small_pipelines as small
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 12
SOME = [0, 1, 4, 8]
REST = [2, 3, 5, 6, 7, 9, 10, 11]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(verbosity)


def predictor():
    torch.manual_seed(0)
    return FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4))


def counter(module):
    """A list that gets an item whenever `module` runs."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def distance(latents, wanted):
    return float((latents - wanted).norm() / wanted.norm())


def compare(pipe, run, schedule=SOME, strict=True):
    """Checks that `run` is exact with everything computed, and again when the cache is off, and that the blocks count
    what the stats say. Returns the uncached latents, the cached latents, and the stats."""
    attributes, calls = dict(vars(pipe.transformer)), counter(pipe.transformer.transformer_blocks[0])
    plain = run()
    total = len(calls)
    with lesa.enable_cache(pipe, predictor(), range(STEPS), strict=strict) as handle:
        assert torch.equal(run(), plain)
    assert sum(len(stream.computed) for stream in handle.stats.streams.values()) == total == len(calls) - total
    calls.clear()
    with lesa.enable_cache(pipe, predictor(), schedule, strict=strict) as handle:
        cached = run()
    assert sum(len(stream.computed) for stream in handle.stats.streams.values()) == len(calls) < total
    assert torch.equal(run(), plain)
    assert {**attributes, **vars(pipe.transformer)} == vars(pipe.transformer) and "forward" not in vars(
        pipe.transformer
    )
    return plain, cached, handle.stats


def psnr(latents, wanted):
    """In decibels, with the range of `wanted` as the peak."""
    peak = wanted.max() - wanted.min()
    return float(10 * torch.log10(peak**2 / (latents - wanted).square().mean()))


def test_modular_guidance_in_a_window_of_the_run():
    """Guidance from 30 to 80 % of the run: its stream begins late and ends early."""
    module = pytest.importorskip("diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage")
    if not hasattr(module, "QwenImageCoreDenoiseStep"):
        pytest.skip("this version of diffusers has no QwenImageCoreDenoiseStep")
    pipe = module.QwenImageCoreDenoiseStep().init_pipeline()
    torch.manual_seed(0)
    pipe.update_components(
        transformer=small.smooth_in_time(small.qwen_transformer()),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        guider=importlib.import_module("diffusers").ClassifierFreeGuidance(3.0, start=0.3, stop=0.8),
    )
    pipe.set_progress_bar_config(disable=True)
    texts = [small.embeddings(1, negative, pooled=False, mask="prompt_embeds_mask") for negative in (False, True)]
    call = {**texts[0], **texts[1], "height": 32, "width": 32, "num_inference_steps": STEPS, "output": "latents"}

    plain, cached, stats = compare(pipe, lambda: pipe(**call, generator=torch.Generator().manual_seed(0)), strict=False)
    cond, uncond = stats.streams.values()
    assert (cond.computed, cond.predicted) == (SOME, REST)
    first = uncond.computed[0]  # of the window, where that stream has no history
    assert uncond.reasons == {first: "the first call of this stream", 4: "scheduled", 8: "scheduled"} and first == 3
    assert uncond.computed == [3, 4, 8] and uncond.predicted == [5, 6, 7]
    assert psnr(cached, plain) > 60


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_two_controlnets_with_windows_of_their_own(family):
    """Each runs in the computed steps, and in no others. Outside of its window its residuals count zero."""
    case = small.ALL[f"{family} controlnet"]
    pipe = case.build()
    if family == "flux":
        nets = [pipe.controlnet, small.opened(small.flux_controlnet())]
        pipe.controlnet = diffusers.FluxMultiControlNetModel(nets)
    else:  # of Qwen-Image, one ControlNet takes several images
        nets = [pipe.controlnet]
        pipe.controlnet = diffusers.QwenImageMultiControlNetModel(nets)
    calls = [counter(net) for net in nets]
    options = {
        "control_image": [small.image(5), small.image(6)],
        "controlnet_conditioning_scale": [1.0, 0.5],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.6, 1.0],
    }

    def run(**changed):
        return case.latents(pipe, steps=STEPS, **options, **changed)

    always = case.latents(pipe, steps=STEPS, **{**options, "control_guidance_start": 0.0, "control_guidance_end": 1.0})
    plain, cached, stats = compare(pipe, run)
    assert distance(plain, always) > 0.01
    assert [stream.computed for stream in stats.streams.values()] == [SOME]
    for ran in calls:
        ran.clear()
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
        assert torch.equal(run(), cached)
    assert [len(ran) for ran in calls] == [len(SOME) * 2 // len(nets)] * len(nets)


def test_an_ip_adapter_with_two_images_of_a_prompt():
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    case = small.ALL["flux cfg"]
    pipe = case.build()
    torch.manual_seed(1)
    size = {"hidden_size": small.DIM, "cross_attention_dim": small.DIM, "num_tokens": (2,)}
    own = pipe.transformer.attn_processors
    adapted = {
        name: FluxIPAdapterAttnProcessor(**size) if name.startswith("transformer") else own[name] for name in own
    }
    pipe.transformer.set_attn_processor(adapted)
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=small.DIM, num_image_text_embeds=2)
    pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    picture = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2))

    def run(picture=picture):
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        embeds = {"ip_adapter_image_embeds": [picture], "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 8)]}
        return case.latents(pipe, steps=STEPS, num_images_per_prompt=2, generator=generators, **embeds)

    plain, cached, stats = compare(pipe, run)
    assert len(plain) == 2 and distance(run(3 * picture), plain) > 0.01
    assert {name: stream.computed for name, stream in stats.streams.items()} == {"cond": SOME, "uncond": SOME}
    assert 0 < distance(cached, plain) < 0.02


@pytest.mark.parametrize("name", ["flux cfg", "qwen cfg", "hunyuan cfg", "flux distilled", "sd3 cfg"])
@pytest.mark.parametrize("at", [2, 5])
def test_guidance_that_a_callback_switches_off(name, at):
    """Where both halves are one batch, the batch changes: the step after that is computed."""
    case = small.ALL[name]
    pipe = case.build()
    batched = name == "sd3 cfg"

    def off(pipe, step, timestep, tensors):
        if step != at:
            return {}
        for attribute in ("_guidance_scale", "_true_cfg_scale"):
            if hasattr(pipe, attribute):
                setattr(pipe, attribute, 1.0)
        return {name: tensor.chunk(2)[1] for name, tensor in tensors.items()} if batched else {}

    inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"]} if batched else {}
    plain, cached, stats = compare(
        pipe, lambda: case.latents(pipe, steps=STEPS, callback_on_step_end=off, **inputs), strict=not batched
    )
    assert 0 < distance(cached, plain) < 0.02
    extra = [at + 1] if batched else []
    assert {s for s in stats.streams} == {*case.streams}
    for stream in stats.streams.values():
        assert stream.computed == sorted({*SOME, *extra} & {*stream.computed, *stream.predicted})
        assert stream.reasons == dict.fromkeys(SOME, "scheduled") | dict.fromkeys(extra, "the shape changed")


@pytest.mark.parametrize("name", ["sd3", "sd3 cfg"])
@pytest.mark.parametrize("options", [{}, {"pag_adaptive_scale": 0.001}], ids=["constant", "adaptive"])
def test_perturbed_attention_guidance(name, options):
    if not hasattr(diffusers, "StableDiffusion3PAGPipeline"):
        pytest.skip("this version of diffusers has no StableDiffusion3PAGPipeline")
    parts = small.ALL["sd3"].build()
    absent = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    pipe = diffusers.StableDiffusion3PAGPipeline(
        transformer=parts.transformer,
        scheduler=parts.scheduler,
        vae=parts.vae,
        **absent,
        pag_applied_layers="blocks.1",
    )
    pipe.set_progress_bar_config(disable=True)

    def run(scale=2.0):
        return small.ALL[name].latents(pipe, steps=STEPS, pag_scale=scale, **options)

    plain, cached, stats = compare(pipe, run)
    assert distance(plain, run(0.0)) > 0.01
    assert {name: (s.computed, s.predicted) for name, s in stats.streams.items()} == {"main": (SOME, REST)}
    assert 0 < distance(cached, plain) < 0.02


SIGMAS = {
    "repeated": [1.0, 0.9, 0.9, 0.8, 0.7, 0.7, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1],
    "the first ones equal": [1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    "the last ones equal": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1],
    "all equal": [0.5] * 12,
    "rising in between": [1.0, 0.9, 0.8, 0.85, 0.9, 0.7, 0.6, 0.65, 0.5, 0.4, 0.2, 0.1],
    "rising": [step / 12 + 0.05 for step in range(12)],
    "tiny gaps": [1.0, 0.9999999, 0.9999998, 0.9, 0.8999999, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
    "zero before the end": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0],
}
DIFFUSERS_FAILS = {("sd3 cfg", "the first ones equal"), ("sd3 cfg", "all equal")}
"""It starts at the second of the equal steps, and runs over the end."""


@pytest.fixture(scope="module")
def pipes():
    return {name: small.ALL[name].build() for name in ("flux cfg", "qwen cfg", "hunyuan cfg", "sd3 cfg")}


@pytest.mark.parametrize(
    "name, levels",
    [(name, levels) for name in ("flux cfg", "sd3 cfg") for levels in SIGMAS]
    + [(name, levels) for name in ("qwen cfg", "hunyuan cfg") for levels in ("repeated", "the first ones equal")],
)
def test_noise_levels_of_the_callers_own(pipes, name, levels):
    pipe, case = pipes[name], small.ALL[name]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # neither shifts nor sorts them

    def run():
        return case.latents(pipe, steps=STEPS, sigmas=SIGMAS[levels])

    if (name, levels) in DIFFUSERS_FAILS:
        with pytest.raises(IndexError):
            run()
        with lesa.enable_cache(pipe, predictor(), SOME), pytest.raises(IndexError):
            run()
        return
    risen = [step for step in REST if SIGMAS[levels][step] > SIGMAS[levels][step - 1]]  # they begin a new history
    rest = [step for step in REST if step not in risen]
    if rest:
        plain, cached, stats = compare(pipe, run)
    else:
        plain = run()
        with lesa.enable_cache(pipe, predictor(), SOME, strict=True) as handle:
            cached, stats = run(), handle.stats
        assert torch.equal(cached, plain)
    assert stats.unlocated == 0
    streams = {name: (s.computed, s.predicted) for name, s in stats.streams.items()}
    assert streams == dict.fromkeys(case.streams, (sorted(SOME + risen), rest))
    assert cached.isfinite().all() and distance(cached, plain) < 0.1
