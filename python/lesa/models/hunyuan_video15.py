"""HunyuanVideo-1.5: `HunyuanVideo15Transformer3DModel` and the pipelines built on it."""

import torch

from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.hunyuan_video import HunyuanVideoAdapter


class HunyuanVideo15Costs(VideoCosts, CountedCosts):
    """What a HunyuanVideo-1.5 transformer costs, for a video from text."""

    usual_config = {
        "_class_name": "HunyuanVideo15Transformer3DModel",
        "in_channels": 65,
        "out_channels": 32,
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 54,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 1152,
    }
    presets = {"hunyuan-video-1.5-480p": (480, 848, 121), "hunyuan-video-1.5-720p": (720, 1280, 121)}
    text_tokens = 1000
    streams = 2
    scale = 16
    glyph_tokens, given_tokens = 256, 729  # of letters to draw, and of an image; always there

    def call(self, image_tokens, text_tokens):
        c, (rows, columns) = self.config, near_square(image_tokens)
        side = c["patch_size"]
        return {
            "hidden_states": valueless(1, c["in_channels"], c["patch_size_t"], rows * side, columns * side),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, text_tokens, c["text_embed_dim"]),
            "encoder_attention_mask": torch.ones(1, text_tokens),
            "encoder_hidden_states_2": valueless(1, self.glyph_tokens, c["text_embed_2_dim"]),
            "encoder_attention_mask_2": torch.zeros(1, self.glyph_tokens),
            "image_embeds": torch.zeros(1, self.given_tokens, c["image_embed_dim"]),
        }


class HunyuanVideo15Adapter(HunyuanVideoAdapter):
    """A HunyuanVideo-1.5 transformer."""

    family = "hunyuan-video-1.5"
    costs = HunyuanVideo15Costs
    transformer_classes = ("HunyuanVideo15Transformer3DModel",)
    embedders = ("time_embed",)
    conditioned_on = ("timestep_r",)

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_embed(timestep, timestep_r=inputs["timestep_r"])
