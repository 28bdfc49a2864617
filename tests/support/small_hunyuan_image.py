"""Small pipelines of HunyuanImage 2.1. Their guidance is an object that the pipeline has."""

from functools import partial

import diffusers

from small_hunyuan_video15 import GLYPH_DIM, WIDTHS, guider, narrow_glyphs, prompts, streams
from small_pipelines import HEIGHT, TEXT_DIM, WIDTH, Small, image, leave_slow_waves

_CHANNELS = 8


def mixed_guider():
    return diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=6)


def image_vae():
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=_CHANNELS,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.7,
    ).eval()


def refiner_vae():
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=_CHANNELS // 2,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
    ).eval()


def image_transformer(**options):
    made = diffusers.HunyuanImageTransformer2DModel(
        **{
            "in_channels": _CHANNELS,
            "out_channels": _CHANNELS,
            **WIDTHS,
            "num_single_layers": 2,
            "text_embed_dim": TEXT_DIM,
            "text_embed_2_dim": GLYPH_DIM,
            "rope_axes_dim": (8, 8),
            **options,
        }
    )
    if made.time_guidance_embed.use_meanflow:
        leave_slow_waves(made.time_guidance_embed.timestep_embedder_r.linear_1)
    return narrow_glyphs(made)


def _image(pipeline, guiders, named=None, vae=image_vae, glyphs=True, masked=False, **rest):
    return Small(
        pipeline,
        lambda: {"vae": vae(), **{name: make() for name, make in guiders.items()}},
        image_transformer,
        prompts(bool(guiders), named, glyphs=glyphs, masked=masked),
        {"height": HEIGHT, "width": WIDTH},
        scheduler_options={"shift": 4.0},
        streams=streams(bool(guiders)),
        **rest,
    )


_REFINER = {
    "in_channels": 2 * _CHANNELS,
    "patch_size": (1, 1, 1),
    "text_embed_2_dim": None,
    "rope_axes_dim": (4, 6, 6),
    "guidance_embeds": True,
}
_refiner = partial(
    _image,
    "HunyuanImageRefinerPipeline",
    named={"image": lambda batch: [image(1 + i) for i in range(batch)]},
    vae=refiner_vae,
    glyphs=False,
    transformer_options=_REFINER,
)

CASES = {
    "hunyuan image": _image(
        "HunyuanImagePipeline", {}, transformer_options={"use_meanflow": True, "guidance_embeds": True}
    ),
    "hunyuan image cfg": _image("HunyuanImagePipeline", {"guider": partial(guider, 3.0)}, masked=True),
    "hunyuan image mixed": _image("HunyuanImagePipeline", {"ocr_guider": mixed_guider}),
    "hunyuan image patches": _image(
        "HunyuanImagePipeline", {}, transformer_options={"patch_size": (2, 2), "guidance_embeds": True}
    ),
    "hunyuan image refiner": _refiner({}),
    "hunyuan image refiner mixed": _refiner({"guider": mixed_guider}),
}

FAMILY, QUICK, RECORDED = "hunyuan-image", "hunyuan image cfg", "hunyuan image mixed"
