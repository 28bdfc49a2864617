"""Small modular pipelines of diffusers: the denoise blocks of every family that has them, and a block that decodes."""

import importlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import more_pipelines
import small_ltx2
import small_pipelines
import small_qwen_image_21
import small_wan
from lesa.pipelines import quiet_progress, run_pipeline


@dataclass(frozen=True)
class Modular:
    """One way to put a modular pipeline together.

    Args:
        case: the ordinary small pipeline whose components and arguments it takes.
        denoise: module and class of its denoise blocks, below `diffusers.modular_pipelines`.
        decode: likewise of the block that decodes.
        size: arguments that tell the size, where it is not that of the case.
        arguments: makes further arguments, or other ones than those of the case, from the pipeline.
        streams: names of the streams of calls with guidance; one stream if the blocks have no guider.
        options: of its own configuration.
    """

    case: str
    denoise: tuple[str, str]
    decode: tuple[str, str]
    size: dict = field(default_factory=dict)
    arguments: object = None
    streams: tuple[str, ...] = ("main",)
    options: dict = field(default_factory=dict)

    @property
    def small(self):
        """The ordinary small pipeline."""
        return {**small_pipelines.ALL, **more_pipelines.ALL, **small_wan.EXPERTS}[self.case]

    def build(self, guider=None, decodes=True, plain=None):
        """A new pipeline, of the components of `plain` or of a new ordinary one.

        The guider is given to all blocks that take one; None stands for their default.
        """
        plain = self.small.build() if plain is None else plain
        parts = {"denoise": blocks(*self.denoise)} | ({"decode": blocks(*self.decode)} if decodes else {})
        modular = importlib.import_module("diffusers.modular_pipelines")
        pipe = modular.SequentialPipelineBlocks.from_blocks_dict(parts).init_pipeline()
        components = {name: part for name, part in plain.components.items() if name in pipe.components}
        if guider is not None:
            components |= {name: guider for name in pipe.components if name.startswith("guider")}
        pipe.update_components(**{name: part for name, part in components.items() if part is not None}, **self.options)
        return pipe

    def inputs(self, pipe, batch=1):
        """Arguments of a call, but for steps and generators."""
        given = self.small.inputs(batch, **self.size) | (self.arguments(pipe, batch) if self.arguments else {})
        known = {name for known in pipe._blocks.inputs for name in (known.name, known.kwargs_type) if name}
        return {name: value for name, value in given.items() if name in known}

    def latents(self, pipe, steps, batch=1, **changed):
        """What the last denoise step gives."""
        torch.manual_seed(0)  # some guiders drop features out
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        with quiet_progress(pipe):
            return run_pipeline(pipe, {**self.inputs(pipe, batch), **changed}, generators, steps)


def blocks(module, name):
    """An instance of a class of blocks, which older versions of diffusers do not have."""
    module = pytest.importorskip(f"diffusers.modular_pipelines.{module}")
    if not hasattr(module, name):
        pytest.skip(f"this version of diffusers has no {name}")
    return getattr(module, name)()


def distance(latents, wanted):
    """The relative L2 error."""
    return float((latents - wanted).norm() / wanted.norm())


@contextmanager
def counted_blocks(adapter):
    """Gives a list of how often each block ran."""
    counts = [0] * len(adapter.blocks)

    def counter(number):
        def count(*_):
            counts[number] += 1

        return count

    handles = [block.register_forward_pre_hook(counter(number)) for number, block in enumerate(adapter.blocks)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _first_frame(pipe, batch):
    """What the encoders of Wan make from the first frame."""
    channels = pipe.transformer.config.in_channels - small_wan.CHANNELS
    frames = (small_wan.FRAMES - 1) // 4 + 1
    rows, columns = (side // pipe.vae_scale_factor_spatial for side in (small_wan.HEIGHT, small_wan.WIDTH))
    generator = torch.Generator().manual_seed(8)
    return {
        "image_condition_latents": torch.randn(batch, channels, frames, rows, columns, generator=generator),
        "image_embeds": torch.randn(batch, 2, small_wan.IMAGE_DIM, generator=generator),
    }


def _qwen_prompts(pipe, batch):
    """What the encoders of Qwen-Image 2.1 make from prompts without images."""
    encoder, given = SimpleNamespace(), {}
    small_qwen_image_21.CASES["qwen 2.1"].prepare(encoder)
    for sign, prompt in (("", "something"), ("negative_", "nothing")):
        made = encoder._get_qwen_prompt_embeds([prompt] * batch, None, None)
        names = ("prompt_embeds", "prompt_embeds_mask", "image_pad_mask")
        given |= {f"{sign}{name}": value for name, value in zip(names, made, strict=True)}
    return given


def _ltx2_prompts(pipe, batch):
    """What the connectors of LTX-2 make from prompts."""
    case = small_ltx2.CASES["ltx-2 cfg"]
    connectors, prompts, given = case.build().connectors, case.inputs(batch), {"batch_size": batch}
    for sign in ("", "negative_"):
        with torch.no_grad():
            made = connectors(prompts[f"{sign}prompt_embeds"], prompts[f"{sign}prompt_attention_mask"])
        names = ("connector_prompt_embeds", "connector_audio_prompt_embeds", "connector_attention_mask")
        given |= {f"{sign}{name}": value for name, value in zip(names, made, strict=True)}
    return given | {"dtype": torch.float32}


CASES = {
    "flux": Modular("flux", ("flux.modular_blocks_flux", "FluxCoreDenoiseStep"), ("flux.decoders", "FluxDecodeStep")),
    "qwen": Modular(
        "qwen cfg",
        ("qwenimage.modular_blocks_qwenimage", "QwenImageCoreDenoiseStep"),
        ("qwenimage.modular_blocks_qwenimage", "QwenImageDecodeStep"),
        streams=("main", "main-2"),
    ),
    "sd3": Modular(
        "sd3 cfg",
        ("stable_diffusion_3.modular_blocks_stable_diffusion_3", "StableDiffusion3AutoCoreDenoiseStep"),
        ("stable_diffusion_3.decoders", "StableDiffusion3DecodeStep"),
        streams=("main", "main-2"),
    ),
    "z-image": Modular(
        "z-image cfg",
        ("z_image.modular_blocks_z_image", "ZImageCoreDenoiseStep"),
        ("z_image.decoders", "ZImageVaeDecoderStep"),
        size={"height": 32, "width": 48},
        streams=("main", "main-2"),
    ),
    "wan": Modular(
        "wan cfg",
        ("wan.modular_blocks_wan", "WanCoreDenoiseStep"),
        ("wan.decoders", "WanVaeDecoderStep"),
        streams=("main", "main-2"),
    ),
    "flux2": Modular(
        "flux2",
        ("flux2.modular_blocks_flux2", "Flux2CoreDenoiseStep"),
        ("flux2.decoders", "Flux2DecodeStep"),
    ),
    "flux2 klein": Modular(
        "flux2 klein",
        ("flux2.modular_blocks_flux2_klein", "Flux2KleinCoreDenoiseStep"),
        ("flux2.decoders", "Flux2DecodeStep"),
    ),
    "flux2 klein base": Modular(
        "flux2 klein cfg",
        ("flux2.modular_blocks_flux2_klein_base", "Flux2KleinBaseCoreDenoiseStep"),
        ("flux2.decoders", "Flux2DecodeStep"),
        streams=("main", "main-2"),
    ),
    "ltx": Modular(
        "ltx cfg",
        ("ltx.modular_blocks_ltx", "LTXCoreDenoiseStep"),
        ("ltx.decoders", "LTXVaeDecoderStep"),
        streams=("pred_cond", "pred_uncond"),
    ),
    "wan image": Modular(
        "wan image clip cfg",
        ("wan.modular_blocks_wan_i2v", "WanImage2VideoCoreDenoiseStep"),
        ("wan.decoders", "WanVaeDecoderStep"),
        arguments=_first_frame,
        streams=("main", "main-2"),
    ),
    "hunyuan 1.5": Modular(
        "hunyuan 1.5 cfg",
        ("hunyuan_video1_5.modular_blocks_hunyuan_video1_5", "HunyuanVideo15CoreDenoiseStep"),
        ("hunyuan_video1_5.decoders", "HunyuanVideo15VaeDecoderStep"),
        streams=("pred_cond", "pred_uncond"),
    ),
    "qwen 2.1": Modular(
        "qwen 2.1 cfg",
        ("qwenimage21.modular_blocks_qwenimage21", "QwenImage21CoreDenoiseStep"),
        ("qwenimage21.decoders", "QwenImage21DecodeStep"),
        arguments=_qwen_prompts,
        streams=("pred_cond", "pred_uncond"),
    ),
}

EXPERTS = Modular(
    "wan 2.2 cfg",
    ("wan.modular_blocks_wan22", "Wan22CoreDenoiseStep"),
    ("wan.decoders", "WanVaeDecoderStep"),
    streams=("main", "main-2", "transformer_2-main", "transformer_2-main-2"),
    options={"boundary_ratio": 0.8},
)
"""Two transformers, one after the other."""

SOUND = Modular(
    "ltx-2 cfg",
    ("ltx2.modular_blocks_ltx2", "LTX2CoreDenoiseStep"),
    ("ltx2.modular_blocks_ltx2", "LTX2DecoderStep"),
    arguments=_ltx2_prompts,
    streams=("pred_cond", "pred_uncond", "pred_cond_stg", "pred_cond_modality"),
)
"""Video and sound, each with a guider of its own."""
