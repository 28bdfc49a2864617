"""Small Lumina-Next pipelines of random weights, with and without guidance."""

import diffusers
import torch

from small_lumina2 import lumina
from small_pipelines import DIM, LATENT_CHANNELS, TEXT_DIM


def _transformer(**options):
    model = diffusers.LuminaNextDiT2DModel(
        **{
            "sample_size": 8,
            "in_channels": LATENT_CHANNELS,
            "hidden_size": DIM,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": TEXT_DIM,
            **options,
        }
    )
    with torch.no_grad():
        model.pad_token.zero_()  # it is made without values
        for layer in model.layers:
            layer.gate.fill_(0.5)
    return model


CASES = {
    "lumina-next": lumina("LuminaPipeline", _transformer),
    "lumina-next cfg": lumina("LuminaPipeline", _transformer, negative=True),
}

FAMILY, QUICK, RECORDED = "lumina-next", "lumina-next cfg", "lumina-next cfg"
