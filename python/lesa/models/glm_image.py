"""GLM-Image: `GlmImageTransformer2DModel` and the pipeline built on it."""

import torch

from lesa.models.adapter import decoded, mean_and_deviation
from lesa.models.cogview import CogView3PlusAdapter, CogView4Costs, CogView4Head
from lesa.models.costs import near_square, valueless

_MODULE = "diffusers.models.transformers.transformer_glm_image"


class GlmImageCosts(CogView4Costs):
    """What a GLM-Image transformer costs."""

    usual_config = {
        "_class_name": "GlmImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "text_embed_dim": 1472,
    }
    presets = {"glm-image-1024": (1024, 1024, 1)}
    text_tokens = 64

    def call(self, image_tokens, text_tokens):
        side, (rows, columns) = self.config["patch_size"], near_square(image_tokens)
        return {
            "hidden_states": valueless(1, self.config["in_channels"], rows * side, columns * side),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["text_embed_dim"]),
            "prior_token_id": valueless(1, image_tokens, dtype=torch.int64),
            "prior_token_drop": torch.zeros(1, image_tokens, dtype=torch.bool),
            "timestep": valueless(1),
            "target_size": valueless(1, 2),
            "crop_coords": valueless(1, 2),
        }


class GlmImageHead(CogView4Head):
    """An AdaLN without an activation, then a linear layer."""

    def parts(self):
        return {**super().parts(), self.norm_path: (self.entry, f"{_MODULE}.GlmImageAdaLayerNormContinuous")}


class GlmImageAdapter(CogView3PlusAdapter):
    """A GLM-Image transformer."""

    family = "glm-image"
    costs = GlmImageCosts
    transformer_classes = ("GlmImageTransformer2DModel",)
    conditioned_on = ("target_size", "crop_coords")
    block_lists = {"transformer_blocks": "attn1.to_out.0"}

    def make_head(self):
        return GlmImageHead(self.transformer)

    def pass_timesteps(self, timesteps, scheduler):
        return timesteps - 1

    def decode(self, pipe, latents, height=None, width=None):
        latents = latents.to(pipe.vae.dtype)
        mean, deviation = mean_and_deviation(pipe.vae, latents)
        return decoded(pipe, latents * deviation + mean)
