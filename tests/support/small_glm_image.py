"""Small GLM-Image pipelines of random weights, with and without guidance."""

import diffusers
import torch

from small_pipelines import LATENT_CHANNELS, TEXT_DIM, TEXT_TOKENS, Small

_CODES = 20


def _vae():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=LATENT_CHANNELS,
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.5, -0.4],
        latents_std=[1.1, 0.9, 1.3, 0.7, 1.0, 1.2],
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _transformer(**options):
    return diffusers.GlmImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=256,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=_CODES,
        **options,
    )


def _glm(*, negative=False):
    def arguments(batch):
        generator = torch.Generator().manual_seed(100)
        made = {"prior_token_ids": torch.randint(_CODES, (batch, 24), generator=generator)}
        for sign in ("", "negative_")[: 1 + negative]:
            made[f"{sign}prompt_embeds"] = torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator)
        return made

    return Small(
        "GlmImagePipeline",
        lambda: {"vae": _vae()},
        _transformer,
        arguments,
        {"height": 16, "width": 24},
        options={"guidance_scale": 2.0 if negative else 1.0},
        streams=("main", "main-2")[: 1 + negative],
    )


CASES = {"glm image": _glm(), "glm image cfg": _glm(negative=True)}

FAMILY, QUICK, RECORDED = "glm-image", "glm image cfg", "glm image cfg"
