"""LongCat-Image: `LongCatImageTransformer2DModel` and the pipelines built on it."""

from lesa.models.chroma import ChromaCosts
from lesa.models.flux import FluxAdapter


class LongCatImageCosts(ChromaCosts):
    """What a LongCat-Image transformer costs."""

    usual_config = {
        "_class_name": "LongCatImageTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "joint_attention_dim": 3584,
    }
    presets = {}


class LongCatImageAdapter(FluxAdapter):
    """A LongCat-Image transformer. The pipeline that edits an image takes the size from it, and no other one."""

    family = "longcat-image"
    costs = LongCatImageCosts
    transformer_classes = ("LongCatImageTransformer2DModel",)
    embedders = ("time_embed",)
    attention_kwargs = None
    conditioned_on = ()

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_embed(timestep.to(dtype) * 1000, dtype)
