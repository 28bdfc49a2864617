"""Pipelines of Stable Diffusion 3 in other folders of diffusers: with a ControlNet, and with perturbed attention."""

import diffusers

from small_pipelines import (
    DIM,
    HEIGHT,
    TEXT_DIM,
    WIDTH,
    Small,
    embeddings,
    image,
    image_vae,
    mask_image,
    opened,
    sd3_transformer,
)


def controlnet(**options):
    return opened(
        diffusers.SD3ControlNetModel(
            sample_size=16,
            in_channels=16,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=DIM // 2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=DIM,
            pooled_projection_dim=TEXT_DIM,
            pos_embed_max_size=16,
            force_zeros_for_pooled_projection=False,
            **options,
        )
    )


def _case(pipeline, named, *, parts=dict, options=None, **rest):
    return Small(
        pipeline,
        lambda: {"vae": image_vae(16), **parts()},
        sd3_transformer,
        lambda batch: {
            **embeddings(batch),
            **embeddings(batch, negative=True),
            **{name: make(batch) for name, make in named.items()},
        },
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 3.0, **(options or {})},
        scheduler_options={"shift": 3.0},
        **rest,
    )


CASES = {
    "sd3 controlnet": _case(
        "StableDiffusion3ControlNetPipeline",
        {"control_image": lambda batch: [image(5 + n) for n in range(batch)]},
        parts=lambda: {"controlnet": controlnet()},
    ),
    "sd3 controlnet inpaint": _case(
        "StableDiffusion3ControlNetInpaintingPipeline",
        {"control_image": lambda batch: image(5), "control_mask": lambda batch: mask_image()},
        parts=lambda: {"controlnet": controlnet(extra_conditioning_channels=1)},
    ),
    "sd3 pag": _case("StableDiffusion3PAGPipeline", {}, options={"pag_scale": 2.0}),
    "sd3 pag img2img": _case(
        "StableDiffusion3PAGImg2ImgPipeline",
        {"image": lambda batch: [image(1 + n) for n in range(batch)]},
        options={"pag_scale": 2.0},
        strength=0.75,
    ),
}

FAMILY = "sd3"
