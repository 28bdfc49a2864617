"""Chroma: `ChromaTransformer2DModel` and the pipelines built on it."""

import torch

from lesa.models.costs import PackedCosts
from lesa.models.flux import FluxAdapter
from lesa.models.heads import AdaLayerNormHead, folded


class ChromaCosts(PackedCosts):
    """What a Chroma transformer costs."""

    usual_config = {
        "_class_name": "ChromaTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
    }
    presets = {"chroma-1024": (1024, 1024, 1)}
    text_tokens = 512
    streams = 2


class _PrunedHead(AdaLayerNormHead):
    """The conditioning `[B, 2, D]` is shift and scale themselves."""

    def entered(self, args, kwargs):
        return args[0], args[1] if len(args) > 1 else kwargs["emb"]

    def modulation(self, conditioning):
        shift, scale = conditioning.to(self.projection.weight.dtype).unbind(1)
        return folded(self.entry.norm, scale, shift)

    def parts(self):
        norm, path = self.entry, self.norm_path
        kind = "diffusers.models.transformers.transformer_chroma.ChromaAdaLayerNormContinuousPruned"
        return {
            path: (norm, kind),
            f"{path}.norm": (getattr(norm, "norm", None), torch.nn.LayerNorm),
            self.projection_path: (self.projection, torch.nn.Linear),
        }


class ChromaAdapter(FluxAdapter):
    """A Chroma transformer.

    A small network makes the shifts and scales of all blocks and of the head, a row for each. Here it makes those of
    the head alone, which are the last two.
    """

    family = "chroma"
    costs = ChromaCosts
    transformer_classes = ("ChromaTransformer2DModel",)
    embedders = ("time_text_embed", "distilled_guidance_layer")
    conditioned_on = ()

    def make_head(self):
        return _PrunedHead(self.transformer)

    def condition(self, timestep, inputs, dtype):
        rows = self.transformer.time_text_embed(timestep.to(dtype) * 1000)
        return self.transformer.distilled_guidance_layer(rows[:, -2:])
