"""Small Lumina 2 pipelines of random weights, with and without guidance."""

import diffusers
import torch

from small_pipelines import DIM, LATENT_CHANNELS, TEXT_DIM, Small, image_vae

_TEXT_TOKENS = 6


def _transformer(**options):
    return diffusers.Lumina2Transformer2DModel(
        **{
            "sample_size": 8,
            "in_channels": LATENT_CHANNELS,
            "hidden_size": DIM,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": TEXT_DIM,
            **options,
        }
    )


def _prompts(batch, negative=False):
    """Prompts of different lengths, with their masks."""
    generator = torch.Generator().manual_seed(100 + negative)
    lengths = torch.tensor([_TEXT_TOKENS - (number + negative) % 3 for number in range(batch)])
    sign = "negative_" if negative else ""
    return {
        f"{sign}prompt_embeds": torch.randn(batch, _TEXT_TOKENS, TEXT_DIM, generator=generator),
        f"{sign}prompt_attention_mask": (torch.arange(_TEXT_TOKENS) < lengths[:, None]).long(),
    }


def lumina(pipeline, transformer, *, negative=False, options=None, **rest):
    def arguments(batch):
        return {**_prompts(batch), **(_prompts(batch, negative=True) if negative else {})}

    return Small(
        pipeline,
        lambda: {"vae": image_vae()},
        transformer,
        arguments,
        {"height": 64, "width": 96},  # they take it that a latent pixel has 8 by 8 pixels
        options={"guidance_scale": 2.0 if negative else 1.0, **(options or {})},
        **rest,
    )


CASES = {
    "lumina2": lumina("Lumina2Pipeline", _transformer),
    "lumina2 cfg": lumina("Lumina2Pipeline", _transformer, negative=True, streams=("main", "main-2")),
}

FAMILY, QUICK, RECORDED = "lumina2", "lumina2 cfg", "lumina2 cfg"
