"""AuraFlow: `AuraFlowTransformer2DModel` and the pipeline built on it."""

import torch

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import CountedCosts, near_square, valueless
from lesa.models.heads import AdaLayerNormHead


class AuraFlowCosts(CountedCosts):
    """What an AuraFlow transformer costs."""

    usual_config = {
        "_class_name": "AuraFlowTransformer2DModel",
        "sample_size": 64,
        "patch_size": 2,
        "in_channels": 4,
        "joint_attention_dim": 2048,
        "pos_embed_max_size": 9216,
    }
    presets = {"aura-flow-1024": (1024, 1024, 1)}
    text_tokens = 256
    streams = 2

    def call(self, image_tokens, text_tokens):
        rows, columns = near_square(image_tokens)
        side = self.config["patch_size"]
        return {
            "hidden_states": valueless(1, self.config["in_channels"], side * rows, side * columns),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["joint_attention_dim"]),
            "timestep": valueless(1),
        }


class AuraFlowHead(AdaLayerNormHead):
    """Scale and shift without a norm, then a linear layer."""

    norm_kind, eps = None, 0.0

    def modulation(self, conditioning):
        layer = self.entry
        scale, shift = layer.linear(layer.silu(conditioning).to(layer.linear.weight.dtype)).chunk(2, dim=1)
        return scale, shift

    def parts(self):
        layer, path = self.entry, self.norm_path
        return {
            path: (layer, "diffusers.models.transformers.auraflow_transformer_2d.AuraFlowPreFinalBlock"),
            f"{path}.linear": (getattr(layer, "linear", None), torch.nn.Linear),
            f"{path}.silu": (getattr(layer, "silu", None), torch.nn.SiLU),
            self.projection_path: (self.projection, torch.nn.Linear),
        }


class AuraFlowAdapter(Adapter):
    """An AuraFlow transformer."""

    family = "aura-flow"
    costs = AuraFlowCosts
    transformer_classes = ("AuraFlowTransformer2DModel",)
    embedders = ("time_step_proj",)
    timestep_scale = 1000.0
    block_lists = {"joint_transformer_blocks": "attn.to_out.0", "single_transformer_blocks": "attn.to_out.0"}

    def make_head(self):
        return AuraFlowHead(self.transformer)

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_step_proj(self.transformer.time_step_embed(timestep).to(dtype))

    def shape(self, call):
        batch, side, rows, columns = self._grid(call)
        return batch, rows * columns

    def arrange(self, call, velocity):
        batch, side, rows, columns = self._grid(call)
        patches = velocity.reshape(batch, rows, columns, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * side, columns * side)

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor)

    def _grid(self, call: dict) -> tuple[int, int, int, int]:
        """Batch, the side of a token, and rows and columns of the tokens."""
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, side, height // side, width // side
