"""CogView 4 and CogView 3 Plus: their transformers and the pipelines built on them."""

import torch

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import CountedCosts, near_square, valueless
from lesa.models.heads import AdaLayerNormHead, folded

_MODULE = "diffusers.models.transformers.transformer_cogview4"


class CogView4Costs(CountedCosts):
    """What a CogView 4 transformer costs."""

    usual_config = {
        "_class_name": "CogView4Transformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 28,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "text_embed_dim": 4096,
    }
    presets = {"cogview4-1024": (1024, 1024, 1)}
    text_tokens = 224
    streams = 2

    def call(self, image_tokens, text_tokens):
        side, (rows, columns) = self.config["patch_size"], near_square(image_tokens)
        return {
            "hidden_states": valueless(1, self.config["in_channels"], rows * side, columns * side),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["text_embed_dim"]),
            "timestep": valueless(1),
            **{name: valueless(1, 2) for name in ("original_size", "target_size", "crop_coords")},
        }


class CogView3PlusCosts(CogView4Costs):
    """What a CogView 3 Plus transformer costs."""

    usual_config = {
        **CogView4Costs.usual_config,
        "_class_name": "CogView3PlusTransformer2DModel",
        "num_layers": 30,
        "num_attention_heads": 64,
        "attention_head_dim": 40,
    }
    presets = {"cogview3plus-1024": (1024, 1024, 1)}


class CogView4Head(AdaLayerNormHead):
    """An AdaLN without an activation before its linear layer."""

    def modulation(self, conditioning):
        norm = self.entry
        scale, shift = norm.linear(conditioning.to(norm.linear.weight.dtype)).chunk(2, dim=1)
        return folded(norm.norm, scale, shift)

    def parts(self):
        parts = {**super().parts(), self.norm_path: (self.entry, f"{_MODULE}.CogView4AdaLayerNormContinuous")}
        del parts[f"{self.norm_path}.silu"]
        return parts


class CogView3PlusAdapter(Adapter):
    """A CogView 3 Plus transformer."""

    family = "cogview3plus"
    costs: type[CogView4Costs] = CogView3PlusCosts
    transformer_classes: tuple[str, ...] = ("CogView3PlusTransformer2DModel",)
    embedders = ("time_condition_embed",)
    attention_kwargs: str | None = None
    conditioned_on: tuple[str, ...] = ("original_size", "target_size", "crop_coords")
    block_lists = {"transformer_blocks": "attn1.norm_q"}

    def condition(self, timestep, inputs, dtype):
        sizes = (inputs[name] for name in self.conditioned_on)
        return self.transformer.time_condition_embed(timestep, *sizes, dtype)

    def shape(self, call):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, (height // side) * (width // side)

    def arrange(self, call, velocity):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        patches = velocity.reshape(batch, height // side, width // side, -1, side, side)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor)


class CogView4Adapter(CogView3PlusAdapter):
    """A CogView 4 transformer."""

    family = "cogview4"
    costs = CogView4Costs
    transformer_classes = ("CogView4Transformer2DModel",)
    attention_kwargs = "attention_kwargs"

    def make_head(self):
        return CogView4Head(self.transformer)

    def condition(self, timestep, inputs, dtype):
        return torch.nn.functional.silu(super().condition(timestep, inputs, dtype))
