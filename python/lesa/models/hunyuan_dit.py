"""HunyuanDiT: `HunyuanDiT2DModel` and the pipelines built on it."""

import torch

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import CountedCosts, near_square, valueless


class HunyuanDiTCosts(CountedCosts):
    """What a HunyuanDiT transformer costs; the usual model is HunyuanDiT 1.2.

    The text tokens are those of its two text encoders, and always as many.
    """

    usual_config = {
        "_class_name": "HunyuanDiT2DModel",
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": 1408,
        "num_attention_heads": 16,
        "attention_head_dim": 88,
        "num_layers": 40,
        "mlp_ratio": 4.3637,
        "cross_attention_dim": 1024,
        "cross_attention_dim_t5": 2048,
        "text_len": 77,
        "text_len_t5": 256,
        "use_style_cond_and_image_meta_size": False,
    }
    presets = {"hunyuan-dit-1024": (1024, 1024, 1)}
    text_tokens = 333
    streams = 2

    def call(self, image_tokens, text_tokens):
        c, (rows, columns) = self.config, near_square(image_tokens)
        side, words, pieces = c["patch_size"], c["text_len"], c["text_len_t5"]
        return {
            "hidden_states": valueless(1, c["in_channels"], rows * side, columns * side),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, words, c["cross_attention_dim"]),
            "text_embedding_mask": valueless(1, words),
            "encoder_hidden_states_t5": valueless(1, pieces, c["cross_attention_dim_t5"]),
            "text_embedding_mask_t5": valueless(1, pieces),
            "image_meta_size": valueless(1, 6),
            "style": valueless(1, dtype=torch.int64),
        }


class HunyuanDiTAdapter(Adapter):
    """A HunyuanDiT transformer. It also gives variances, which its pipelines leave out."""

    family = "hunyuan-dit"
    costs = HunyuanDiTCosts
    transformer_classes = ("HunyuanDiT2DModel",)
    embedders = ("time_extra_emb",)
    attention_kwargs = None
    control_outputs = 1
    conditioned_on = ("encoder_hidden_states_t5", "image_meta_size", "style")
    block_lists = {"blocks": "attn1.norm_q"}

    def condition(self, timestep, inputs, dtype):
        others = (inputs[name] for name in self.conditioned_on)
        return self.transformer.time_extra_emb(timestep, *others, hidden_dtype=timestep.dtype).float()

    def shape(self, call):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, (height // side) * (width // side)

    def arrange(self, call, velocity):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        patches = velocity.reshape(batch, height // side, width // side, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height // side * side, width // side * side)

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents / pipe.vae.config.scaling_factor)
