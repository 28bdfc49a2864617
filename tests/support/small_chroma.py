"""Small Chroma pipelines."""

from functools import partial

import diffusers

from small_pipelines import (
    _MASKS,
    DIM,
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_DIM,
    WIDTH,
    Small,
    _image_arguments,
    _images,
    embeddings,
    image_vae,
    leave_slow_waves,
)

_APPROXIMATED = 64
"""Width of what the network reads that makes the modulations: a quarter of it is the timestep."""


def transformer():
    made = diffusers.ChromaTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=_APPROXIMATED,
        approximator_hidden_dim=DIM,
        approximator_layers=2,
    )
    made.register_to_config(guidance_embeds=False)  # the pipeline for inpainting reads it, though no such model has it
    leave_slow_waves(made.distilled_guidance_layer.in_proj, _APPROXIMATED // 4)
    return made


def _small(pipeline, named=None, *, negative=False, **rest):
    embed = partial(embeddings, pooled=False, mask="prompt_attention_mask")
    return Small(
        pipeline,
        lambda: {"vae": image_vae()},
        transformer,
        partial(_image_arguments, named=named or {}, embed=embed, negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 3.0 if negative else 1.0},
        streams=("main", "main-2")[: 1 + negative],
        **rest,
    )


CASES = {
    "chroma": _small("ChromaPipeline"),
    "chroma cfg": _small("ChromaPipeline", negative=True),
    "chroma img2img cfg": _small("ChromaImg2ImgPipeline", {"image": _images(1)}, negative=True, strength=0.75),
    "chroma inpaint cfg": _small("ChromaInpaintPipeline", _MASKS, negative=True, strength=0.75),
}

FAMILY, QUICK, RECORDED = "chroma", "chroma cfg", "chroma cfg"
CONDITIONED_TO_ROUNDING = {*CASES}
