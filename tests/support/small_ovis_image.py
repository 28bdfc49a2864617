"""Small Ovis-Image pipelines."""

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


def transformer():
    return diffusers.OvisImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    )


def _small(negative):
    return Small(
        "OvisImagePipeline",
        lambda: {"vae": image_vae()},
        transformer,
        partial(_image_arguments, named={}, embed=partial(embeddings, pooled=False), negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 3.0, "negative_prompt": None} if negative else {"guidance_scale": 1.0},
        scheduler_options={"use_dynamic_shifting": True},
        streams=("cond", "uncond")[: 1 + negative],
    )


CASES = {"ovis": _small(False), "ovis cfg": _small(True)}

FAMILY, QUICK, RECORDED = "ovis-image", "ovis cfg", "ovis cfg"
