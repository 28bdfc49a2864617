"""Ideogram 4: `Ideogram4Transformer2DModel` and the pipeline built on it."""

import importlib

import torch
import torch.nn.functional as F

from lesa.models.adapter import Adapter, decoded, packed_grid
from lesa.models.costs import CountedCosts, valueless
from lesa.models.final_layer import FinalLayerHead


class Ideogram4Costs(CountedCosts):
    """What an Ideogram 4 transformer costs. The second transformer of its pipeline, without text, is not counted."""

    usual_config = {
        "_class_name": "Ideogram4Transformer2DModel",
        "patch_size": 2,
        "in_channels": 128,
        "llm_features_dim": 53248,
    }
    presets = {"ideogram-4-1024": (1024, 1024, 1)}
    text_tokens = 2048
    packing = 2
    projection = "final_layer.linear"

    def call(self, image_tokens, text_tokens):
        tokens = image_tokens + text_tokens
        return {
            "hidden_states": valueless(1, tokens, self.config["in_channels"]),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, tokens, self.config["llm_features_dim"]),
            "position_ids": torch.zeros(1, tokens, 3, dtype=torch.int64),  # autocast knows no device without values
            "segment_ids": valueless(1, tokens, dtype=torch.int64),
            "indicator": valueless(1, tokens, dtype=torch.int64),
        }


class Ideogram4Adapter(Adapter):
    """An Ideogram 4 transformer. Text comes before the tokens of the image, and is not forecast.

    Its pipeline has a second transformer, `unconditional_transformer`, which is computed in every step. A second handle
    predicts it too: that of a pipeline with the same components but that one as its `transformer`.
    """

    family = "ideogram-4"
    costs = Ideogram4Costs
    transformer_classes = ("Ideogram4Transformer2DModel",)
    embedders = ("t_embedding", "adaln_proj")
    block_lists = {"layers": "attention.to_out.0"}

    def __init__(self, transformer):
        super().__init__(transformer)
        self._counted: tuple[torch.Tensor, int] | None = None  # the latest indicator, and its image tokens

    def make_head(self):
        return FinalLayerHead(
            self.transformer,
            "final_layer",
            "diffusers.models.transformers.transformer_ideogram4.Ideogram4FinalLayer",
            silu=None,
            modulation="adaln_modulation",
            conditioning=("conditioning",),
        )

    def pass_timesteps(self, timesteps, scheduler):
        passed = 1 - timesteps.float() / scheduler.config.num_train_timesteps
        return passed.to(timesteps.dtype)

    def condition(self, timestep, inputs, dtype):
        embedded = self.transformer.t_embedding(timestep)
        return F.silu(self.transformer.adaln_proj(embedded.unsqueeze(1)))

    def shape(self, call):
        indicator = call["indicator"]
        if self._counted is None or self._counted[0] is not indicator:  # one that was counted needs no wait for a GPU
            of_image = importlib.import_module(
                "diffusers.models.transformers.transformer_ideogram4"
            ).OUTPUT_IMAGE_INDICATOR
            self._counted = indicator, int((indicator[0] == of_image).sum())
        return len(indicator), self._counted[1]

    def features(self, call, entered):
        return entered[:, -self.shape(call)[1] :]

    def latents(self, call):
        return self.features(call, call["hidden_states"])

    def arrange(self, call, velocity):
        text = call["hidden_states"].shape[1] - velocity.shape[1]
        return F.pad(velocity, (0, 0, text, 0))

    def decode(self, pipe, latents, height=None, width=None):
        batch, tokens, channels = latents.shape
        side = pipe.patch_size
        rows, columns = packed_grid(tokens, height, width, 2048, side * pipe.vae_scale_factor)
        norm = pipe.vae.bn
        mean, deviation = norm.running_mean, torch.sqrt(norm.running_var + pipe.vae.config.batch_norm_eps)
        patches = latents * deviation.to(latents) + mean.to(latents)
        patches = patches.reshape(batch, rows, columns, side, side, channels // side**2)
        images = patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * side, columns * side)
        return decoded(pipe, images)
