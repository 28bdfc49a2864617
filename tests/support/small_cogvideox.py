"""Small CogVideoX and ConsisID pipelines of random weights."""

from functools import partial

import diffusers
import torch
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

from small_pipelines import (
    DIM,
    FRAMES,
    LATENT_CHANNELS,
    TEXT_DIM,
    TEXT_TOKENS,
    VIDEO_HEIGHT,
    VIDEO_WIDTH,
    Small,
    _image_arguments,
    embeddings,
    image,
)


def cogvideox_vae():
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4,) * 4, latent_channels=LATENT_CHANNELS, layers_per_block=1, norm_num_groups=2
    ).eval()


_SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": DIM // 2,
    "out_channels": LATENT_CHANNELS,
    "time_embed_dim": 12,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    "sample_width": VIDEO_WIDTH // 8,
    "sample_height": VIDEO_HEIGHT // 8,
    "sample_frames": FRAMES,
    "max_text_seq_length": TEXT_TOKENS,
}


def _with_weights(transformer):
    """Its last norms begin with ones and zeros, which would hide a mistake."""
    for norm in (transformer.norm_final, transformer.norm_out.norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, std=0.2)
    return transformer


def cogvideox_transformer(**options):
    config = {**_SMALL, "in_channels": LATENT_CHANNELS, **options}
    return _with_weights(diffusers.CogVideoXTransformer3DModel(**config))


def deaf_transformer(**options):
    """It hears little of the latents, to which its scheduler adds noise in each step; no forecast knows that noise."""
    transformer = cogvideox_transformer(**options)
    with torch.no_grad():
        transformer.patch_embed.proj.weight.mul_(0.1)
    return transformer


def consisid_transformer(**options):
    config = {**_SMALL, "in_channels": 2 * LATENT_CHANNELS, **options}
    return _with_weights(diffusers.ConsisIDTransformer3DModel(**config))


class SmallConsisID(Small):
    """diffusers gives the class only where OpenCV is installed, which makes nothing but its inputs."""

    pipeline_class = ConsisIDPipeline


def _cogvideox(
    pipeline, named=None, *, negative=False, scheduler="CogVideoXDDIMScheduler", size=None, kind=Small, **rest
):
    return kind(
        pipeline,
        lambda: {"vae": cogvideox_vae(), "scheduler": getattr(diffusers, scheduler)()},
        rest.pop("transformer", cogvideox_transformer),
        partial(_image_arguments, named=named or {}, embed=partial(embeddings, pooled=False), negative=negative),
        {"height": VIDEO_HEIGHT, "width": VIDEO_WIDTH, "num_frames": FRAMES} if size is None else size,
        options={"guidance_scale": 3.0 if negative else 1.0},
        **{"streams": ("cond_uncond",), **rest},
    )


def _images(batch):
    return [image(1 + i, VIDEO_HEIGHT, VIDEO_WIDTH) for i in range(batch)]


def _videos(batch):
    return [[image(10 * i + frame, VIDEO_HEIGHT, VIDEO_WIDTH) for frame in range(FRAMES)] for i in range(batch)]


_SIZE = {"height": VIDEO_HEIGHT, "width": VIDEO_WIDTH}
_TWO = {"in_channels": 2 * LATENT_CHANNELS}
_ROTARY = {"use_rotary_positional_embeddings": True}
_PATCHES_IN_TIME = {"patch_size_t": 2, "patch_bias": False, **_ROTARY}

CASES = {
    "cogvideox": _cogvideox("CogVideoXPipeline"),
    "cogvideox cfg": _cogvideox("CogVideoXPipeline", negative=True, transformer_options=_ROTARY),
    "cogvideox dpm": _cogvideox("CogVideoXPipeline", scheduler="CogVideoXDPMScheduler", transformer=deaf_transformer),
    "cogvideox 1.5 cfg": _cogvideox("CogVideoXPipeline", negative=True, transformer_options=_PATCHES_IN_TIME),
    "cogvideox image cfg": _cogvideox(
        "CogVideoXImageToVideoPipeline", {"image": _images}, negative=True, transformer_options=_TWO | _ROTARY
    ),
    "cogvideox 1.5 image cfg": _cogvideox(
        "CogVideoXImageToVideoPipeline",
        {"image": _images},
        negative=True,
        transformer_options=_TWO | _PATCHES_IN_TIME | {"ofs_embed_dim": 12},
    ),
    "cogvideox video cfg": _cogvideox(
        "CogVideoXVideoToVideoPipeline", {"video": _videos}, negative=True, size=_SIZE, strength=0.8
    ),
    "cogvideox control cfg": _cogvideox(
        "CogVideoXFunControlPipeline",
        {"control_video": _videos},
        negative=True,
        size=_SIZE,
        transformer_options=_TWO | _ROTARY,
    ),
    "consisid cfg": _cogvideox(
        "ConsisIDPipeline",
        {"image": _images},
        negative=True,
        kind=SmallConsisID,
        transformer=consisid_transformer,
        streams=("main",),
    ),
}

FAMILY, QUICK, RECORDED = "cogvideox", "cogvideox", "cogvideox cfg"
