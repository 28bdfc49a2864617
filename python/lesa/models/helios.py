"""Helios: `HeliosTransformer3DModel` and the pipelines built on it, which make a video chunk by chunk."""

from lesa.models.costs import product_flops
from lesa.models.heads import TableHead
from lesa.models.wan import WanAdapter, WanCosts


class HeliosCosts(WanCosts):
    """What a Helios transformer costs, without the frames before the chunk.

    It is counted as a Wan transformer with a second timestep. Its own forward cannot run without values.
    """

    usual_config = WanCosts.usual_config | {"_class_name": "HeliosTransformer3DModel"}
    presets = {"helios-384p": (384, 640, 33)}

    def __init__(self, config):
        super().__init__({**config, "_class_name": "WanTransformer3DModel"})

    def flops(self, image_tokens, text_tokens):
        again = product_flops(1, self.config["freq_dim"], self.dim, self.dim, 6 * self.dim)
        return super().flops(image_tokens, text_tokens) + again


class HeliosAdapter(WanAdapter):
    """A Helios transformer.

    Each chunk of a video is a run of its own, and so is each stage of a pyramid. The tokens of the frames before the
    chunk are left out before the norm of the head.
    """

    family = "helios"
    costs = HeliosCosts
    transformer_classes = ("HeliosTransformer3DModel",)
    untold = "its timesteps are whole numbers, and those of the given frames are others"

    def make_head(self):
        return TableHead(self.transformer, "norm_out.norm", table="norm_out.scale_shift_table", in_float32=True)

    def pass_timesteps(self, timesteps, scheduler):
        is_pyramid = getattr(scheduler.config, "stages", 1) > 1
        return timesteps.trunc() if is_pyramid else timesteps  # the pipeline passes them as integers
