"""Small Sana pipelines of random weights, for images and videos."""

from functools import partial

import diffusers
import torch

from small_pipelines import (
    DIM,
    LATENT_CHANNELS,
    TEXT_DIM,
    Small,
    _image_arguments,
    embeddings,
    image,
    opened,
)

HEIGHT, WIDTH, FRAMES = 32, 64, 9
"""The pipelines take only multiples of 32."""


def sana_vae():
    kinds, widths, scales = ("ResBlock",) * 3 + ("EfficientViTBlock",), (LATENT_CHANNELS,) * 4, ((), (), (), (5,))
    return diffusers.AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=2,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    ).eval()


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.5, -0.4],
        latents_std=[1.1, 0.9, 1.3, 0.7, 1.0, 1.2],
    ).eval()


_SMALL = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": DIM // 2,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": DIM // 2,
    "cross_attention_dim": DIM,
    "caption_channels": TEXT_DIM,
    "sample_size": 8,
}


def sana_transformer(**options):
    return diffusers.SanaTransformer2DModel(**{**_SMALL, **options})


def sprint_transformer(**options):
    """It hears little of the latents, which its scheduler mixes with new noise in each step; no forecast knows it.

    Its timesteps are below 1, for which the slow waves of the time embedding must be made large.
    """
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads", **options)
    with torch.no_grad():
        transformer.patch_embed.proj.weight.mul_(0.003)
        transformer.time_embed.timestep_embedder.linear_1.weight[:, 128:].mul_(1000)
    return transformer


def sana_video_transformer(**options):
    return diffusers.SanaVideoTransformer3DModel(**{**_SMALL, **options})


def _controlnet():
    return opened(diffusers.SanaControlNetModel(**{**_SMALL, "num_layers": 1}))


def _sana(pipeline, named=None, *, negative=False, parts=dict, options=None, frames=None, **rest):
    embed = partial(embeddings, pooled=False, mask="prompt_attention_mask")
    return Small(
        pipeline,
        lambda: {"vae": sana_vae(), **parts()},
        rest.pop("transformer", sana_transformer),
        partial(_image_arguments, named=named or {}, embed=embed, negative=negative),
        {"height": HEIGHT, "width": WIDTH} | ({} if frames is None else {"frames": frames}),
        options={"guidance_scale": 3.0 if negative else 1.0, "use_resolution_binning": False}
        | (options or {})
        | ({"negative_prompt": None} if negative else {}),
        scheduler_options={"shift": 3.0},
        **rest,
    )


def _image(batch):
    return image(1, HEIGHT, WIDTH)


def _images(batch):
    return [image(1 + i, HEIGHT, WIDTH) for i in range(batch)]


def _flow_solver():
    """The scheduler of the published models."""
    return {
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    }


_SPRINT = {
    "transformer": sprint_transformer,
    "parts": lambda: {"scheduler": diffusers.SCMScheduler()},
    "options": {"guidance_scale": 4.5, "intermediate_timesteps": None},
}
_VIDEO = {"transformer": sana_video_transformer, "frames": FRAMES}

CASES = {
    "sana": _sana("SanaPipeline", transformer_options={"timestep_scale": 0.5}),
    "sana cfg": _sana("SanaPipeline", negative=True),
    "sana solver cfg": _sana("SanaPipeline", negative=True, parts=_flow_solver),
    "sana controlnet cfg": _sana(
        "SanaControlNetPipeline",
        {"control_image": _image},
        negative=True,
        parts=lambda: {"controlnet": _controlnet()},
    ),
    "sana pag cfg": _sana("SanaPAGPipeline", negative=True, options={"pag_scale": 2.0}),
    "sana pag": _sana("SanaPAGPipeline", options={"pag_scale": 2.0}),
    "sana sprint": _sana("SanaSprintPipeline", **_SPRINT),
    "sana sprint img2img": _sana("SanaSprintImg2ImgPipeline", {"image": _images}, strength=0.75, **_SPRINT),
}

VIDEO_CASES = {
    "sana video": _sana("SanaVideoPipeline", parts=lambda: {"vae": wan_vae()}, **_VIDEO),
    "sana video cfg": _sana(
        "SanaVideoPipeline", negative=True, parts=lambda: {"vae": wan_vae(), **_flow_solver()}, **_VIDEO
    ),
    "sana video image cfg": _sana(
        "SanaImageToVideoPipeline", {"image": _image}, negative=True, parts=lambda: {"vae": wan_vae()}, **_VIDEO
    ),
}

FAMILY, QUICK, RECORDED = "sana", "sana", "sana cfg"
