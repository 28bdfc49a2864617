"""HunyuanImage 2.1: `HunyuanImageTransformer2DModel` and the pipelines built on it, the refiner included."""

import math

import torch

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import CountedCosts, near_square, valueless


class HunyuanImageCosts(CountedCosts):
    """What a HunyuanImage transformer costs."""

    usual_config = {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": 64,
        "out_channels": 64,
        "num_attention_heads": 28,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "patch_size": (1, 1),
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
    }
    presets = {"hunyuan-image-2.1-2048": (2048, 2048, 1)}
    text_tokens = 1000
    streams = 2
    scale = 32
    glyph_tokens = 128  # of letters to draw; always there

    def call(self, image_tokens, text_tokens):
        c, (rows, columns) = self.config, near_square(image_tokens)
        *durations, height, width = c["patch_size"]
        arguments = {
            "hidden_states": valueless(1, c["in_channels"], *durations, rows * height, columns * width),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, text_tokens, c["text_embed_dim"]),
            "encoder_attention_mask": torch.ones(1, text_tokens),
            "guidance": valueless(1),
        }
        if c.get("text_embed_2_dim") is not None:
            arguments["encoder_hidden_states_2"] = valueless(1, self.glyph_tokens, c["text_embed_2_dim"])
            arguments["encoder_attention_mask_2"] = torch.zeros(1, self.glyph_tokens)
        return arguments


class HunyuanImageAdapter(Adapter):
    """A HunyuanImage transformer. That of the refiner has frames too."""

    family = "hunyuan-image"
    costs = HunyuanImageCosts
    transformer_classes = ("HunyuanImageTransformer2DModel",)
    embedders = ("time_guidance_embed",)
    conditioned_on = ("timestep_r", "guidance")

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_guidance_embed(timestep, **inputs)

    def shape(self, call):
        return len(call["hidden_states"]), math.prod(self._token_grid(call))

    def arrange(self, call, velocity):
        grid, patch = self._token_grid(call), self.transformer.config.patch_size
        axes = range(1, len(grid) + 1)
        patches = velocity.reshape(len(velocity), *grid, -1, *patch)
        order = [place for axis in axes for place in (axis, len(grid) + 1 + axis)]
        sizes = [tokens * size for tokens, size in zip(grid, patch)]
        return patches.permute(0, len(grid) + 1, *order).reshape(len(velocity), -1, *sizes)

    def decode(self, pipe, latents, height=None, width=None):
        """See the base. The refiner's latents have frames, and each frame holds two of the VAE."""
        latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        return decoded(pipe, pipe._restore_image_tokens_order(latents) if latents.ndim == 5 else latents)

    def _token_grid(self, call) -> tuple[int, ...]:
        """Rows and columns of the tokens, and frames before them if there are any."""
        sizes, patch = call["hidden_states"].shape[2:], self.transformer.config.patch_size
        return tuple(size // of_patch for size, of_patch in zip(sizes, patch))
