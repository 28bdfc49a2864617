"""Small Bria pipelines."""

from functools import partial

import diffusers

from small_pipelines import (
    DIM,
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_DIM,
    WIDTH,
    Small,
    _image_arguments,
    embeddings,
    image_vae,
)

WIDTHS = {"num_attention_heads": 2, "attention_head_dim": DIM // 2, "num_layers": 2, "num_single_layers": 2}


def bria_transformer():
    return diffusers.BriaTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, joint_attention_dim=TEXT_DIM, axes_dims_rope=[4, 6, 6], **WIDTHS
    )


def _bria(negative, **rest):
    return Small(
        "BriaPipeline",
        lambda: {"vae": image_vae()},
        bria_transformer,
        partial(_image_arguments, named={}, embed=partial(embeddings, pooled=False), negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 3.0 if negative else 1.0},
        **rest,
    )


CASES = {
    "bria": _bria(False),
    "bria cfg": _bria(True),
    "bria shifting cfg": _bria(True, scheduler_options={"use_dynamic_shifting": True}),
}

FAMILY, QUICK, RECORDED = "bria", "bria cfg", "bria cfg"
