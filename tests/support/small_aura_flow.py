"""Small AuraFlow pipelines of random weights, with and without guidance."""

from functools import partial

import diffusers

from small_pipelines import (
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_DIM,
    WIDTH,
    Small,
    _image_arguments,
    embeddings,
    image_vae,
)


def _transformer(**options):
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=32,
        pos_embed_max_size=64,
        **options,
    )


def _aura_flow(*, negative=False):
    embed = partial(embeddings, pooled=False, mask="prompt_attention_mask")
    return Small(
        "AuraFlowPipeline",
        lambda: {"vae": image_vae()},
        _transformer,
        partial(_image_arguments, named={}, embed=embed, negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 3.0 if negative else 1.0},
    )


CASES = {"aura flow": _aura_flow(), "aura flow cfg": _aura_flow(negative=True)}

FAMILY, QUICK, RECORDED = "aura-flow", "aura flow cfg", "aura flow cfg"
