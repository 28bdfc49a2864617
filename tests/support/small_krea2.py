"""Small Krea 2 pipelines of random weights, with and without guidance."""

import diffusers
import torch

from small_pipelines import HEIGHT, LATENT_CHANNELS, TEXT_DIM, TEXT_TOKENS, WIDTH, Small, qwen_vae

_TEXT_LAYERS = 2


def _transformer(**options):
    model = diffusers.Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        text_hidden_dim=TEXT_DIM,
        num_text_layers=_TEXT_LAYERS,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
        **options,
    )
    with torch.no_grad():  # they begin with zeros
        model.final_layer.norm.weight.normal_(std=0.3)
        model.final_layer.scale_shift_table.normal_(std=0.3)
    return model


def _krea(*, negative=False):
    def arguments(batch):
        made = {}
        for sign in ("", "negative_")[: 1 + negative]:
            generator = torch.Generator().manual_seed(100 + len(sign))
            shape = (batch, TEXT_TOKENS, _TEXT_LAYERS, TEXT_DIM)
            made[f"{sign}prompt_embeds"] = torch.randn(shape, generator=generator)
            made[f"{sign}prompt_embeds_mask"] = torch.ones(shape[:2], dtype=torch.bool)
        return made

    return Small(
        "Krea2Pipeline",
        lambda: {"vae": qwen_vae()},
        _transformer,
        arguments,
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 2.0 if negative else 0.0},
        scheduler_options={"use_dynamic_shifting": True},
        streams=("main", "main-2")[: 1 + negative],
    )


CASES = {"krea2": _krea(), "krea2 cfg": _krea(negative=True)}

FAMILY, QUICK, RECORDED = "krea-2", "krea2 cfg", "krea2 cfg"
