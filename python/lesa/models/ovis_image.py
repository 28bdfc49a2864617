"""Ovis-Image: `OvisImageTransformer2DModel` and the pipeline built on it."""

from lesa.models.chroma import ChromaCosts
from lesa.models.flux import FluxAdapter


class OvisImageCosts(ChromaCosts):
    """What an Ovis-Image transformer costs."""

    usual_config = {
        "_class_name": "OvisImageTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 6,
        "num_single_layers": 27,
        "joint_attention_dim": 2048,
    }
    presets = {"ovis-image-1024": (1024, 1024, 1)}
    text_tokens = 256


class OvisImageAdapter(FluxAdapter):
    """An Ovis-Image transformer."""

    family = "ovis-image"
    costs = OvisImageCosts
    transformer_classes = ("OvisImageTransformer2DModel",)
    embedders = ("time_proj", "timestep_embedder")
    conditioned_on = ()

    def condition(self, timestep, inputs, dtype):
        waves = self.transformer.time_proj(timestep.to(dtype) * 1000)
        return self.transformer.timestep_embedder(waves.to(dtype))
