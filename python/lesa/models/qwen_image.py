"""Qwen-Image: `QwenImageTransformer2DModel` and the pipelines built on it."""

import diffusers
import torch

from lesa.models.adapter import Adapter, decoded, packed_grid
from lesa.models.costs import Costs

_LAYERED = getattr(diffusers, "QwenImageLayeredPipeline", ())


class QwenImageCosts(Costs):
    """What a Qwen-Image transformer costs. The number of text tokens is typical; the prompt decides it."""

    usual_config = {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
    }
    presets = {"qwen-image-1328": (1328, 1328, 1)}
    text_tokens = 128
    streams = 2
    packing = 2


class QwenImageAdapter(Adapter):
    """A Qwen-Image transformer."""

    family = "qwen-image"
    costs = QwenImageCosts
    transformer_classes = ("QwenImageTransformer2DModel",)
    timestep_scale = 1000.0
    conditioned_on = ("additional_t_cond",)

    def condition(self, timestep, inputs, dtype):
        timestep, kind = timestep.to(dtype), inputs["additional_t_cond"]
        batch = len(timestep)
        if kind is not None:  # one row for each prompt; a prompt may make several images
            kind = kind.repeat_interleave(batch // len(kind))
        if self.transformer.config.get("zero_cond_t"):  # the tokens of input images have time zero
            timestep = torch.cat([timestep, timestep * 0])
            kind = None if kind is None else torch.cat([kind, kind])
        like_features = timestep.new_empty(0)
        kinds = () if kind is None else (kind,)
        return self.transformer.time_text_embed(timestep, like_features, *kinds)[:batch]

    def decode(self, pipe, latents, height=None, width=None):
        """See the base. A layered pipeline gives `[B, layers, height, width, channels]`, by default of 640 pixels."""
        layered, (batch, tokens, channels) = isinstance(pipe, _LAYERED), latents.shape
        side = 640 if layered else pipe.default_sample_size * pipe.vae_scale_factor
        rows, columns = packed_grid(tokens, height, width, side, 2 * pipe.vae_scale_factor, one_frame=not layered)
        patches = latents.reshape(batch, -1, rows, columns, channels // 4, 2, 2)  # [B, frames, ...]
        frames = patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels // 4, -1, 2 * rows, 2 * columns)
        config, frames = pipe.vae.config, frames.to(pipe.vae.dtype)
        mean, deviation = (
            torch.tensor(v, dtype=torch.float32)[:, None, None, None] for v in (config.latents_mean, config.latents_std)
        )
        frames = frames / (1 / deviation).to(frames) + mean.to(frames)
        if layered:
            frames = frames[:, :, 1:].transpose(1, 2).flatten(0, 1)[:, :, None]  # the first layer is the whole image
        images = decoded(pipe, frames)
        return images.reshape(batch, -1, *images.shape[1:]) if layered else images
