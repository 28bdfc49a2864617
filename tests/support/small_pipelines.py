"""Small pipelines of random weights: every pipeline class of the families that lesa supports, and arguments to run it.

Text encoders are left out; prompts are random embeddings. All sizes are the smallest that keep several tokens.
"""

import importlib
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import TimestepEmbedding
from PIL import Image

from lesa.models import adapter_for

HEIGHT, WIDTH = 16, 24
"""Of an image, in pixels."""
VIDEO_HEIGHT, VIDEO_WIDTH, FRAMES = 32, 48, 9
DIM = 32
"""Width of the transformers."""
TEXT_DIM, TEXT_TOKENS = 16, 5
LATENT_CHANNELS = 6
"""Neither 3 nor 4, by which pipelines tell pixels from latents."""

_WIDTHS = {"num_attention_heads": 2, "attention_head_dim": DIM // 2}


@dataclass(frozen=True)
class Small:
    """One way to run a pipeline class.

    Args:
        pipeline: name of the class in diffusers.
        parts: makes its components but transformer and empty ones. The scheduler is of flow matching unless it is here.
        transformer: makes its transformer; it takes `transformer_options`.
        arguments: `arguments(batch)` -> what a call takes beside the size, the steps and the generators.
        size: arguments that tell the size.
        options: further arguments of every call.
        transformer_options: how its transformer differs from others of the family.
        scheduler_options: how its scheduler differs from the default.
        streams: names of the streams of calls of a run.
        strength: the part of the steps that are executed, where the pipeline takes it.
        runs: how often a call goes through the steps.
        most: of prompts in a call, as the class allows.
        returns_latents: whether the class can; else they are taken from the last step.
    """

    pipeline: str
    parts: Callable[[], dict]
    transformer: Callable
    arguments: Callable[[int], dict]
    size: dict
    options: dict = field(default_factory=dict)
    transformer_options: dict = field(default_factory=dict)
    scheduler_options: dict = field(default_factory=dict)
    streams: tuple[str, ...] = ("main",)
    strength: float | None = None
    runs: int = 1
    most: int | None = None
    returns_latents: bool = True

    @property
    def pipeline_class(self) -> type:
        return getattr(diffusers, self.pipeline)

    def build(self):
        """A new pipeline; always with the same weights."""
        torch.manual_seed(0)
        parts = {**self.parts(), "transformer": smooth_in_time(self.transformer(**self.transformer_options))}
        if "scheduler" not in parts:
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler_options)
        absent = dict.fromkeys({*self.pipeline_class._get_signature_keys(self.pipeline_class)[0]} - {*parts})
        pipe = self.pipeline_class(**parts, **absent)
        pipe.set_progress_bar_config(disable=True)
        for part in (pipe.transformer, pipe.vae):
            part.requires_grad_(False)
        return pipe

    def inputs(self, batch: int = 1, **changed) -> dict:
        """Pipeline arguments but for steps and generators."""
        return {**self.size, **self.arguments(batch), **self.options, **changed}

    def run(self, pipe, steps: int = 12, batch: int = 1, seed: int = 0, output_type: str = "latent", **changed):
        """What the pipeline returns, from `steps` executed steps."""
        total = steps if self.strength is None else round(steps / self.strength)
        if self.strength is not None:
            changed = {"strength": self.strength, **changed}
        torch.manual_seed(seed)  # not all of them draw from the generators alone
        generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        generator = generators if batch > 1 else generators[0]
        call = {"num_inference_steps": total, "output_type": output_type, "generator": generator, **changed}
        return pipe(**self.inputs(batch, **call), return_dict=False)[0]

    def latents(self, pipe, **options) -> torch.Tensor:
        """The latents of a run `[B, ...]`; of several sections, all of them."""
        if self.returns_latents:
            latents = self.run(pipe, **options)
            return latents[-1] if isinstance(latents, list) else latents
        kept = {}

        def keep(pipe, step, timestep, tensors):
            kept.update(tensors)
            return {}

        self.run(pipe, output_type="pil", callback_on_step_end=keep, **options)
        return kept["latents"]


def small_areas():
    """While it is entered, the pipelines that scale their images to an area of their own take the small size."""
    stack, size = ExitStack(), (WIDTH, HEIGHT)
    for name, also_ratio in (("edit", True), ("edit_inpaint", True), ("edit_plus", False), ("layered", False)):
        module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
        answer = (*size, None) if also_ratio else size
        stack.enter_context(mock.patch.object(module, "calculate_dimensions", return_value=answer))
    return stack


def smooth_in_time(transformer):
    """Makes the random transformer a slow function of the noise level, as trained ones are.

    Random weights on the fast waves of the time embedding would jump from step to step, and no forecast could follow.
    """
    head = adapter_for(SimpleNamespace(transformer=transformer)).head_modules.modules()
    first = next(module for module in head if isinstance(module, TimestepEmbedding)).linear_1
    half = first.in_features // 2
    slow = torch.exp(torch.arange(half) / half * torch.log(torch.tensor(10000.0))) > 300  # their period is above 1900
    with torch.no_grad():
        first.weight.mul_(slow.repeat(2))
    return transformer.eval()


@cache
def embeddings(batch: int, negative: bool = False, pooled: bool = True, mask: str | None = None) -> dict:
    """Random prompts; `mask` is the name of the mask's argument with `{}` for "prompt_embeds" or "prompt"."""
    generator = torch.Generator().manual_seed(100 + negative)
    prompts = torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator)
    pooleds = torch.randn(batch, TEXT_DIM, generator=generator)
    sign = "negative_" if negative else ""
    made = {f"{sign}prompt_embeds": prompts}
    if pooled:
        made[f"{sign}pooled_prompt_embeds"] = pooleds
    if mask:
        made[sign + mask] = torch.ones(batch, TEXT_TOKENS)
    return made


def image(seed: int = 0, height: int = HEIGHT, width: int = WIDTH, mode: str = "RGB") -> Image.Image:
    """A random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def mask_image() -> Image.Image:
    """The left half is to be kept, the right half to be painted."""
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[:, WIDTH // 2 :] = 255
    return Image.fromarray(pixels, "L")


def _image_arguments(batch, named, embed, negative):
    made = dict(embed(batch))
    if negative:
        made |= embed(batch, negative=True)
    return {**made, **{name: make(batch) for name, make in named.items()}}


def _images(seed):
    return lambda batch: [image(seed + i) for i in range(batch)]


def _one(make, *args, **options):
    return lambda batch: make(*args, **options)


# FLUX


def image_vae(channels=LATENT_CHANNELS):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=channels,
        shift_factor=0.1,
        scaling_factor=0.7,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def flux_transformer(**options):
    return diffusers.FluxTransformer2DModel(
        **{
            "in_channels": 4 * LATENT_CHANNELS,
            "out_channels": 4 * LATENT_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            **_WIDTHS,
            "joint_attention_dim": TEXT_DIM,
            "pooled_projection_dim": TEXT_DIM,
            "axes_dims_rope": (4, 6, 6),
            **options,
        }
    )


def flux_controlnet(num_single_layers=1):
    return diffusers.FluxControlNetModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=num_single_layers,
        **_WIDTHS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    )


def opened(controlnet):
    """A ControlNet begins with zeros, by which it changes nothing."""
    with torch.no_grad():
        for weight in controlnet.parameters():
            if not weight.any() and weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)
    return controlnet.eval()


def _flux(pipeline, named=None, *, negative=False, controlnet=False, options=None, contexts=False, **rest):
    def parts():
        return {"vae": image_vae()} | ({"controlnet": opened(flux_controlnet())} if controlnet else {})

    streams = (("cond", "uncond") if negative else ("cond",)) if contexts else ("main", "main-2")[: 1 + negative]
    return Small(
        pipeline,
        parts,
        flux_transformer,
        partial(_image_arguments, named=named or {}, embed=embeddings, negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        options=({"true_cfg_scale": 3.0} if negative else {}) | (options or {}),
        scheduler_options={"use_dynamic_shifting": True},
        streams=streams,
        **rest,
    )


_MASKS = {"image": _images(1), "mask_image": _one(mask_image)}
_CONTROL = {"control_image": _images(5)}
_TWO_IMAGES = {"in_channels": 8 * LATENT_CHANNELS}
_DISTILLED = {"guidance_embeds": True}
_AREA = {"max_area": HEIGHT * WIDTH}

FLUX = {
    "flux": _flux("FluxPipeline", contexts=True),
    "flux distilled": _flux("FluxPipeline", contexts=True, transformer_options=_DISTILLED),
    "flux cfg": _flux("FluxPipeline", contexts=True, negative=True),
    "flux distilled cfg": _flux("FluxPipeline", contexts=True, negative=True, transformer_options=_DISTILLED),
    "flux img2img": _flux("FluxImg2ImgPipeline", {"image": _images(1)}, strength=0.75),
    "flux img2img cfg": _flux("FluxImg2ImgPipeline", {"image": _images(1)}, negative=True, strength=0.75),
    "flux inpaint": _flux("FluxInpaintPipeline", _MASKS, strength=0.75),
    "flux inpaint cfg": _flux("FluxInpaintPipeline", _MASKS, negative=True, strength=0.75),
    "flux fill": _flux(
        "FluxFillPipeline", _MASKS, transformer_options={"in_channels": 8 * LATENT_CHANNELS + 4 * 2**2, **_DISTILLED}
    ),
    "flux control": _flux("FluxControlPipeline", _CONTROL, transformer_options=_TWO_IMAGES | _DISTILLED),
    "flux control img2img": _flux(
        "FluxControlImg2ImgPipeline",
        {"image": _images(1), **_CONTROL},
        strength=0.75,
        transformer_options=_TWO_IMAGES,
    ),
    "flux control inpaint": _flux(
        "FluxControlInpaintPipeline", {**_MASKS, **_CONTROL}, strength=0.75, transformer_options=_TWO_IMAGES
    ),
    "flux controlnet": _flux("FluxControlNetPipeline", _CONTROL, controlnet=True),
    "flux controlnet cfg": _flux("FluxControlNetPipeline", _CONTROL, controlnet=True, negative=True),
    "flux controlnet distilled": _flux(
        "FluxControlNetPipeline", _CONTROL, controlnet=True, transformer_options=_DISTILLED
    ),
    "flux controlnet img2img": _flux(
        "FluxControlNetImg2ImgPipeline", {"image": _images(1), **_CONTROL}, controlnet=True, strength=0.75
    ),
    "flux controlnet inpaint": _flux(
        "FluxControlNetInpaintPipeline", {**_MASKS, **_CONTROL}, controlnet=True, strength=0.75
    ),
    "flux kontext": _flux("FluxKontextPipeline", {"image": _images(1)}, options=_AREA | {"_auto_resize": False}),
    "flux kontext cfg": _flux(
        "FluxKontextPipeline", {"image": _images(1)}, negative=True, options=_AREA | {"_auto_resize": False}
    ),
    "flux kontext inpaint": _flux(
        "FluxKontextInpaintPipeline", _MASKS, options=_AREA | {"_auto_resize": False}, strength=0.75
    ),
}


def _guided_by_embeddings(case):
    """Some of them had to be given a negative prompt in words, and so a text encoder, before diffusers 0.39."""
    return "negative_prompt_embeds is not None" in inspect.getsource(case.pipeline_class.__call__)


FLUX = {name: case for name, case in FLUX.items() if len(case.streams) == 1 or _guided_by_embeddings(case)}

# Qwen-Image


class TextEncoderOfNothing(torch.nn.Module):
    """Stands for a text encoder where a pipeline asks for its dtype, though it gets embeddings."""

    dtype, device = torch.float32, torch.device("cpu")


def qwen_vae(channels=3):
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        input_channels=channels,
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.5, -0.4],
        latents_std=[1.1, 0.9, 1.3, 0.7, 1.0, 1.2],
    ).eval()


def qwen_transformer(**options):
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        **_WIDTHS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def qwen_controlnet(**options):
    return diffusers.QwenImageControlNetModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=1,
        **_WIDTHS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def _qwen(pipeline, named=None, *, negative=False, parts=dict, size=None, channels=3, options=None, **rest):
    embed = partial(embeddings, pooled=False, mask="prompt_embeds_mask")
    return Small(
        pipeline,
        lambda: {"vae": qwen_vae(channels), **parts()},
        qwen_transformer,
        partial(_image_arguments, named=named or {}, embed=embed, negative=negative),
        {"height": HEIGHT, "width": WIDTH} if size is None else size,
        options={"true_cfg_scale": 3.0 if negative else 1.0, **(options or {})},
        scheduler_options={"use_dynamic_shifting": True},
        streams=("cond", "uncond")[: 1 + negative],
        **rest,
    )


def _with_control(**options):
    return lambda: {"controlnet": opened(qwen_controlnet(**options))}


_QWEN = {
    "qwen": ("QwenImagePipeline", {}, {}),
    "qwen img2img": ("QwenImageImg2ImgPipeline", {"image": _images(1)}, {"strength": 0.75}),
    "qwen inpaint": ("QwenImageInpaintPipeline", _MASKS, {"strength": 0.75}),
    "qwen controlnet": ("QwenImageControlNetPipeline", {"control_image": _one(image, 5)}, {"parts": _with_control()}),
    "qwen controlnet inpaint": (
        "QwenImageControlNetInpaintPipeline",
        {"control_image": _one(image, 5), "control_mask": _one(mask_image)},
        {"parts": _with_control(extra_condition_channels=4)},
    ),
    "qwen edit": ("QwenImageEditPipeline", {"image": _one(image, 1)}, {"transformer_options": {"zero_cond_t": True}}),
    "qwen edit inpaint": (
        "QwenImageEditInpaintPipeline",
        {"image": _one(image, 1), "mask_image": _one(mask_image)},
        {"strength": 0.75},
    ),
    "qwen edit plus": (
        "QwenImageEditPlusPipeline",
        {"image": lambda batch: [image(1), image(2)]},
        {"most": 1, "transformer_options": {"zero_cond_t": True}},
    ),
    "qwen layered": (
        "QwenImageLayeredPipeline",
        {"image": _one(image, 1, mode="RGBA"), "prompt": lambda batch: ["words"] * batch},
        {
            "size": {},
            "channels": 4,
            "returns_latents": False,
            "options": {"layers": 2},
            "parts": lambda: {"text_encoder": TextEncoderOfNothing()},
            "transformer_options": {"use_additional_t_cond": True, "use_layer3d_rope": True},
        },
    ),
}

QWEN_IMAGE = {
    name + suffix: _qwen(pipeline, named, negative=negative, **rest)
    for name, (pipeline, named, rest) in _QWEN.items()
    for suffix, negative in (("", False), (" cfg", True))
}

# HunyuanVideo


def video_vae():
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    ).eval()


_HUNYUAN = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    **_WIDTHS,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "rope_axes_dim": (4, 6, 6),
}
_IMAGE_DIM = 8


def hunyuan_transformer(**options):
    return diffusers.HunyuanVideoTransformer3DModel(**{**_HUNYUAN, **options})


def framepack_transformer(**options):
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        **{**_HUNYUAN, "has_image_proj": True, "image_proj_dim": _IMAGE_DIM, "has_clean_x_embedder": True, **options}
    )


def _vision_parts():
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=_IMAGE_DIM,
        intermediate_size=_IMAGE_DIM,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    return {"vae": video_vae(), "image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": processor}


def _hunyuan(pipeline, named=None, *, negative=False, contexts=False, parts=None, options=None, **rest):
    embed = partial(embeddings, mask="prompt_attention_mask")
    streams = ("cond", "uncond") if contexts else ("main", "main-2")
    return Small(
        pipeline,
        parts or (lambda: {"vae": video_vae()}),
        rest.pop("transformer", hunyuan_transformer),
        partial(_image_arguments, named=named or {}, embed=embed, negative=negative),
        {"height": VIDEO_HEIGHT, "width": VIDEO_WIDTH, "num_frames": FRAMES},
        options={"true_cfg_scale": 3.0 if negative else 1.0, **(options or {})},
        scheduler_options={"shift": 7.0},
        streams=streams[: 1 + negative],
        **rest,
    )


def _video_images(batch):
    return [image(1 + i, VIDEO_HEIGHT, VIDEO_WIDTH) for i in range(batch)]


_FIRST = {"image": _video_images}
_CONCAT = {
    "in_channels": 2 * LATENT_CHANNELS + 1,
    "guidance_embeds": False,
    "image_condition_type": "latent_concat",
}
_REPLACE = {"image_condition_type": "token_replace"}

HUNYUAN_VIDEO = {
    "hunyuan": _hunyuan("HunyuanVideoPipeline", contexts=True),
    "hunyuan cfg": _hunyuan("HunyuanVideoPipeline", contexts=True, negative=True),
    "hunyuan image concat": _hunyuan("HunyuanVideoImageToVideoPipeline", _FIRST, transformer_options=_CONCAT),
    "hunyuan image concat cfg": _hunyuan(
        "HunyuanVideoImageToVideoPipeline", _FIRST, negative=True, transformer_options=_CONCAT
    ),
    "hunyuan image replace": _hunyuan("HunyuanVideoImageToVideoPipeline", _FIRST, transformer_options=_REPLACE),
    "hunyuan skyreels": _hunyuan(
        "HunyuanSkyreelsImageToVideoPipeline", _FIRST, transformer_options={"in_channels": 2 * LATENT_CHANNELS}
    ),
    "hunyuan skyreels cfg": _hunyuan(
        "HunyuanSkyreelsImageToVideoPipeline",
        _FIRST,
        negative=True,
        transformer_options={"in_channels": 2 * LATENT_CHANNELS},
    ),
    "hunyuan framepack": _hunyuan(
        "HunyuanVideoFramepackPipeline",
        _FIRST,
        parts=_vision_parts,
        transformer=framepack_transformer,
        options={"latent_window_size": 3},
    ),
    "hunyuan framepack sections cfg": _hunyuan(
        "HunyuanVideoFramepackPipeline",
        _FIRST,
        negative=True,
        parts=_vision_parts,
        transformer=framepack_transformer,
        options={"latent_window_size": 2},
        runs=2,
    ),
}

# Stable Diffusion 3


def sd3_transformer(**options):
    return diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 16,
            "in_channels": 16,  # the inpainting pipeline takes no other number
            "out_channels": 16,
            "num_layers": 3,
            **_WIDTHS,
            "joint_attention_dim": TEXT_DIM,
            "caption_projection_dim": DIM,
            "pooled_projection_dim": TEXT_DIM,
            "pos_embed_max_size": 16,
            **options,
        }
    )


def _sd3(pipeline, named=None, *, negative=False, options=None, **rest):
    return Small(
        pipeline,
        lambda: {"vae": image_vae(16)},
        sd3_transformer,
        partial(_image_arguments, named=named or {}, embed=embeddings, negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 3.0 if negative else 1.0, **(options or {})},
        scheduler_options={"shift": 3.0},
        **rest,
    )


_SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}

SD3 = {
    "sd3": _sd3("StableDiffusion3Pipeline"),
    "sd3 cfg": _sd3("StableDiffusion3Pipeline", negative=True, transformer_options=_SD35),
    "sd3 img2img cfg": _sd3("StableDiffusion3Img2ImgPipeline", {"image": _images(1)}, negative=True, strength=0.75),
    "sd3 inpaint cfg": _sd3("StableDiffusion3InpaintPipeline", _MASKS, negative=True, strength=0.75),
}

FAMILIES = {
    "flux": ("flux", FLUX),
    "qwen-image": ("qwenimage", QWEN_IMAGE),
    "hunyuan-video": ("hunyuan_video", HUNYUAN_VIDEO),
    "sd3": ("stable_diffusion_3", SD3),
}
"""For each family, the folder of diffusers that has its pipelines, and the ways to run them."""

ALL = {name: case for _, cases in FAMILIES.values() for name, case in cases.items()}
