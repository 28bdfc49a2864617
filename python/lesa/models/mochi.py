"""Mochi: `MochiTransformer3DModel` and the pipelines built on it."""

import torch

from lesa.models.adapter import Adapter, mean_and_deviation
from lesa.models.costs import VideoCosts, product_flops, timestep_flops


class MochiCosts(VideoCosts):
    """What a Mochi transformer costs. Text tokens have a smaller width than image tokens."""

    usual_config = {
        "_class_name": "MochiTransformer3DModel",
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": None,
        "num_layers": 48,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "pooled_projection_dim": 1536,
        "text_embed_dim": 4096,
    }
    presets = {"mochi-480p": (480, 848, 163)}
    text_tokens = 256
    streams = 2
    frame_scale = 6

    def embedding_flops(self, image_tokens, text_tokens):
        c, width = self.config, self.config["text_embed_dim"]
        image = product_flops(image_tokens, c["in_channels"] * c["patch_size"] ** 2, self.dim)
        pooled = product_flops(text_tokens + 1, width, 2 * width) + product_flops(1, width, width, self.dim)
        pooled += 4 * (text_tokens + 1) * width
        return image + pooled + product_flops(text_tokens, width, c["pooled_projection_dim"])

    def conditioning_flops(self):
        return timestep_flops(self.dim)

    def block_flops(self, image_tokens, text_tokens):
        dim, text = self.dim, self.config["pooled_projection_dim"]
        out = product_flops(text_tokens, dim, text) + _gated_flops(text_tokens, text) + product_flops(1, dim, 3 * text)
        block = 4 * product_flops(image_tokens, dim, dim) + 3 * product_flops(text_tokens, text, dim) + out
        block += 4 * (image_tokens + text_tokens) ** 2 * dim + _gated_flops(image_tokens, dim)
        block += product_flops(1, dim, 4 * dim + text)
        return self.config["num_layers"] * block - out  # the last block reads the text only


def _gated_flops(rows: int, dim: int) -> int:
    """FLOPs of a feed-forward network whose first layer has gates."""
    inside = 8 * dim // 3
    return product_flops(rows, dim, 2 * inside) + product_flops(rows, inside, dim)


class MochiAdapter(Adapter):
    """A Mochi transformer. The whole text conditions its head; its timesteps rise while the noise falls."""

    family = "mochi"
    costs = MochiCosts
    transformer_classes = ("MochiTransformer3DModel",)
    embedders = ("time_embed",)
    conditioned_on = ("encoder_hidden_states", "encoder_attention_mask")
    block_lists = {"transformer_blocks": "attn1.norm_q"}

    def condition(self, timestep, inputs, dtype):
        embed = self.transformer.time_embed
        pooled = embed.pooler(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        return embed.timestep_embedder(embed.time_proj(timestep).to(dtype)) + pooled

    def shape(self, call):
        batch, _, frames, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, frames * (height // side) * (width // side)

    def arrange(self, call, velocity):
        batch, _, frames, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        patches = velocity.reshape(batch, frames, height // side, width // side, side, side, -1)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base."""
        config, latents = pipe.vae.config, latents.to(pipe.vae.dtype)
        if config.get("latents_mean") and config.get("latents_std"):
            mean, deviation = mean_and_deviation(pipe.vae, latents)
            latents = latents * deviation / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        return pipe.video_processor.postprocess_video(pipe.vae.decode(latents, return_dict=False)[0], output_type="np")
