"""Small HiDream pipelines of random weights, with and without guidance."""

import diffusers
import torch

from small_pipelines import LATENT_CHANNELS, TEXT_DIM, TEXT_TOKENS, Small, image_vae

_LLAMA_DIM, _LLAMA_LAYERS = 12, 4


def _transformer(**options):
    return diffusers.HiDreamImageTransformer2DModel(
        **{
            "patch_size": 2,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [TEXT_DIM, _LLAMA_DIM],
            "text_emb_dim": TEXT_DIM,
            "num_routed_experts": 2,
            "num_activated_experts": 2,  # all of them: no jumps between experts
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 12),
            "llama_layers": [*range(_LLAMA_LAYERS)],
            **options,
        }
    )


def _prompts(batch, negative=False):
    generator = torch.Generator().manual_seed(100 + negative)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    sign = "negative_" if negative else ""
    return {
        f"{sign}prompt_embeds_t5": random(batch, TEXT_TOKENS, TEXT_DIM),
        f"{sign}prompt_embeds_llama3": random(_LLAMA_LAYERS, batch, TEXT_TOKENS, _LLAMA_DIM),
        f"{sign}pooled_prompt_embeds": random(batch, TEXT_DIM),
    }


def _small_area(pipe):
    pipe.default_sample_size = 9  # it scales every size to this area


def _hidream(size, *, negative=False):
    def arguments(batch):
        return {**_prompts(batch), **(_prompts(batch, negative=True) if negative else {})}

    return Small(
        "HiDreamImagePipeline",
        lambda: {"vae": image_vae()},
        _transformer,
        arguments,
        size,
        options={"guidance_scale": 2.0 if negative else 1.0},
        prepare=_small_area,
    )


CASES = {
    "hidream": _hidream({"height": 16, "width": 24}),
    "hidream square": _hidream({"height": 16, "width": 16}),
    "hidream cfg": _hidream({"height": 16, "width": 24}, negative=True),
}

FAMILY, QUICK, RECORDED = "hidream", "hidream cfg", "hidream cfg"
