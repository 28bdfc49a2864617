"""Small HunyuanDiT pipelines. Their scheduler adds no noise, unlike the usual one, or no forecast could follow."""

import diffusers
import torch

from small_pipelines import DIM, TEXT_DIM, TEXT_TOKENS, Small, image

_CHANNELS = 4
_MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": DIM // 2,
    "in_channels": _CHANNELS,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": DIM,
    "cross_attention_dim": TEXT_DIM,
    "cross_attention_dim_t5": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "text_len": TEXT_TOKENS,
    "text_len_t5": TEXT_TOKENS,
}


def scheduler():
    levels = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.03}
    return diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **levels)


def vae():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=_CHANNELS,
        scaling_factor=0.7,
    ).eval()


def transformer(**options):
    """It hears little of the latents: their way is less straight than that of flow matching."""
    made = diffusers.HunyuanDiT2DModel(num_layers=4, **_MODEL, **options)
    with torch.no_grad():
        made.pos_embed.proj.weight.mul_(0.25)
    return made


def controlnet():
    options = {name: value for name, value in _MODEL.items() if name != "num_layers"}
    made = diffusers.HunyuanDiT2DControlNetModel(transformer_num_layers=4, **options)
    with torch.no_grad():
        for weight in made.parameters():
            if not weight.any() and weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.1)
        made.pos_embed.proj.weight.mul_(0.25)
    return made.eval()


def embeddings(batch, negative=False):
    generator, sign = torch.Generator().manual_seed(500 + negative), "negative_" if negative else ""
    made = {}
    for number in ("", "_2"):
        made[f"{sign}prompt_embeds{number}"] = torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator)
        made[f"{sign}prompt_attention_mask{number}"] = (torch.arange(TEXT_TOKENS) < 4).expand(batch, -1).long()
    return made


def _small(pipeline, negative, named=None, parts=dict, options=None, **rest):
    return Small(
        pipeline,
        lambda: {"vae": vae(), "scheduler": scheduler(), **parts()},
        transformer,
        lambda batch: {
            **embeddings(batch),
            **embeddings(batch, negative=True),
            **{name: make(batch) for name, make in (named or {}).items()},
        },
        {"height": 32, "width": 48},
        options={"guidance_scale": 3.0 if negative else 1.0, "use_resolution_binning": False, **(options or {})},
        **rest,
    )


_CONTROL = {"control_image": lambda batch: [image(1 + i, 32, 48) for i in range(batch)]}
_PERTURBED = {"parts": lambda: {"pag_applied_layers": ["blocks.1"]}}

CASES = {
    "hunyuan dit": _small("HunyuanDiTPipeline", False),
    "hunyuan dit cfg": _small(
        "HunyuanDiTPipeline", True, transformer_options={"use_style_cond_and_image_meta_size": False}
    ),
    "hunyuan dit controlnet cfg": _small(
        "HunyuanDiTControlNetPipeline", True, _CONTROL, lambda: {"controlnet": controlnet()}
    ),
    "hunyuan dit pag": _small(
        "HunyuanDiTPAGPipeline", True, options={"guidance_scale": 2.0, "pag_scale": 1.0}, **_PERTURBED
    ),
}

FAMILY, QUICK, RECORDED = "hunyuan-dit", "hunyuan dit", "hunyuan dit cfg"
