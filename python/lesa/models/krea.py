"""Krea 2: `Krea2Transformer2DModel` and the pipeline built on it."""

import torch

from lesa.models.adapter import Adapter, decoded, mean_and_deviation, packed_grid
from lesa.models.costs import CountedCosts, valueless
from lesa.models.heads import HeadForm
from lesa.spread import whole

_MODULE = "diffusers.models.transformers.transformer_krea2"


class Krea2Costs(CountedCosts):
    """What a Krea 2 transformer costs."""

    usual_config = {
        "_class_name": "Krea2Transformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "text_hidden_dim": 2560,
        "num_text_layers": 12,
    }
    presets = {"krea-2-1024": (1024, 1024, 1)}
    text_tokens = 512
    streams = 2
    packing = 2
    projection = "final_layer.linear"

    def call(self, image_tokens, text_tokens):
        c = self.config
        return {
            "hidden_states": valueless(1, image_tokens, c["in_channels"]),
            "encoder_hidden_states": valueless(1, text_tokens, c["num_text_layers"], c["text_hidden_dim"]),
            "timestep": valueless(1),
            "position_ids": torch.zeros(text_tokens + image_tokens, 3),
        }


class Krea2Head(HeadForm):
    """An RMS norm whose weights are added to one, a table with the scale before the shift, and a linear layer."""

    norm_kind = "rms"

    def __init__(self, transformer):
        super().__init__(transformer, "final_layer", "final_layer.linear")

    @property
    def modules(self):
        return (self.entry,)

    @property
    def eps(self):
        return self.entry.norm.eps

    def entered(self, args, kwargs):
        return args[0], args[1]

    def run(self, features, conditioning):
        return self.entry(features, conditioning)

    def modulation(self, conditioning):
        scale, shift = (conditioning + whole(self.entry, "scale_shift_table")).unbind(1)
        return (1 + whole(self.entry.norm, "weight")) * (1 + scale) - 1, shift

    def parts(self):
        layer = self.entry
        return {
            "final_layer": (layer, f"{_MODULE}.Krea2FinalLayer"),
            "final_layer.norm": (layer.norm, f"{_MODULE}.Krea2RMSNorm"),
            "final_layer.linear": (layer.linear, torch.nn.Linear),
        }


class Krea2Adapter(Adapter):
    """A Krea 2 transformer."""

    family = "krea-2"
    costs = Krea2Costs
    transformer_classes = ("Krea2Transformer2DModel",)
    embedders = ("time_embed",)
    timestep_scale = 1000.0
    block_lists = {"transformer_blocks": "attn.to_out.0"}

    def make_head(self):
        return Krea2Head(self.transformer)

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_embed(timestep, dtype=dtype)

    def decode(self, pipe, latents, height=None, width=None):
        batch, tokens, channels = latents.shape
        side = pipe.patch_size
        rows, columns = packed_grid(tokens, height, width, 1024, side * pipe.vae_scale_factor)
        patches = latents.reshape(batch, rows, columns, channels // side**2, side, side).permute(0, 3, 1, 4, 2, 5)
        frames = patches.reshape(batch, -1, 1, rows * side, columns * side).to(pipe.vae.dtype)
        mean, deviation = mean_and_deviation(pipe.vae, frames)
        return decoded(pipe, frames / (1 / deviation) + mean)
