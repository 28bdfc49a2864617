"""Qwen-Image 2.1: `QwenImage21Transformer2DModel` and the pipeline built on it."""

import math

import torch

from lesa.models.adapter import Adapter, decoded, mean_and_deviation, packed_grid
from lesa.models.costs import CountedCosts, near_square, valueless
from lesa.models.heads import AdaLayerNormHead


class QwenImage21Costs(CountedCosts):
    """What a Qwen-Image 2.1 transformer costs, if it reads the text in every step."""

    usual_config = {
        "_class_name": "QwenImage21Transformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "context_in_dim": 4096,
    }
    presets = {"qwen-image-2.1-1024": (1024, 1024, 1)}
    text_tokens = 128
    streams = 2
    scale = 16

    def call(self, image_tokens, text_tokens):
        mask = torch.zeros(1, text_tokens + image_tokens // 4, dtype=torch.bool)
        mask[:, text_tokens:] = True
        return {
            "hidden_states": valueless(1, image_tokens, self.config["in_channels"]),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["context_in_dim"]),
            "timestep": valueless(1),
            "img_shapes": [[(1, *near_square(image_tokens))]],
            "img_mask": mask,
        }


class QwenImage21Head(AdaLayerNormHead):
    """An AdaLN that only scales. Its last row of conditioning is for text and given images, at time zero."""

    def entered(self, args, kwargs):
        return args[0], args[1][: len(args[0])]

    def modulation(self, conditioning):
        norm = self.entry
        return norm.linear(norm.silu(conditioning).to(norm.linear.weight.dtype)), None

    def parts(self):
        kind = "diffusers.models.transformers.transformer_qwenimage21.QwenImage21AdaLayerNormContinuous"
        return {**super().parts(), self.norm_path: (self.entry, kind)}


class QwenImage21Adapter(Adapter):
    """A Qwen-Image 2.1 transformer.

    Text and given images come before the tokens of the image that is drawn, and are not forecast. The output of a
    predicted step has the tokens of that image alone, as the output of most computed steps.
    """

    family = "qwen-image-2.1"
    costs = QwenImage21Costs
    transformer_classes = ("QwenImage21Transformer2DModel",)
    timestep_scale = 1000.0
    block_lists = {"transformer_blocks": "attn.to_out.0"}

    def make_head(self):
        return QwenImage21Head(self.transformer)

    def condition(self, timestep, inputs, dtype):
        batch, timestep = len(timestep), timestep.to(dtype)
        if self.transformer.config.causal_condition:
            timestep = torch.cat([timestep, timestep.new_zeros(1)])
        return self.transformer.time_text_embed(timestep, timestep)[:batch]

    def shape(self, call):
        return len(call["hidden_states"]), math.prod(call["img_shapes"][0][-1])

    def features(self, call, entered):
        return entered[:, -self.shape(call)[1] :]

    def latents(self, call):
        return self.features(call, call["hidden_states"])

    def decode(self, pipe, latents, height=None, width=None):
        batch, tokens, channels = latents.shape
        scale = pipe.vae_scale_factor
        height, width = (None if side is None else side // (2 * scale) * 2 * scale for side in (height, width))
        rows, columns = packed_grid(tokens, height, width, 1024, scale)
        frames = latents.transpose(1, 2).reshape(batch, channels, 1, rows, columns).to(pipe.vae.dtype)
        mean, deviation = mean_and_deviation(pipe.vae, frames)
        return decoded(pipe, frames * deviation + mean)
