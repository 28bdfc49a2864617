"""Small Mochi pipelines of random weights."""

from functools import partial

import diffusers
import torch

from small_pipelines import (
    DIM,
    TEXT_DIM,
    VIDEO_HEIGHT,
    VIDEO_WIDTH,
    Small,
    _image_arguments,
    embeddings,
)

CHANNELS = 12
"""Of the latents; the pipeline takes no other number."""


def mochi_vae():
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    ).eval()


def mochi_transformer(**options):
    """Its last steps are long, and so its velocities must be small, or its latents would leave a line."""
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        num_layers=2,
        pooled_projection_dim=TEXT_DIM,
        in_channels=CHANNELS,
        text_embed_dim=TEXT_DIM,
        **options,
    )
    with torch.no_grad():
        transformer.proj_out.weight.mul_(0.3)
    return transformer


def _mochi(negative):
    embed = partial(embeddings, pooled=False, mask="prompt_attention_mask")
    return Small(
        "MochiPipeline",
        lambda: {"vae": mochi_vae()},
        mochi_transformer,
        partial(_image_arguments, named={}, embed=embed, negative=negative),
        {"height": VIDEO_HEIGHT, "width": VIDEO_WIDTH, "num_frames": 7},
        options={"guidance_scale": 3.0 if negative else 1.0},
        scheduler_options={"invert_sigmas": True},
        streams=("cond_uncond",),
    )


CASES = {"mochi": _mochi(False), "mochi cfg": _mochi(True)}

FAMILY, QUICK, RECORDED = "mochi", "mochi", "mochi cfg"
