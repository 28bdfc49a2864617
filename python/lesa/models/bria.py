"""Bria 3.2 and FIBO: `BriaTransformer2DModel`, `BriaFiboTransformer2DModel` and the pipelines built on them."""

from lesa.models.adapter import Adapter, decoded, mean_and_deviation, packed_grid
from lesa.models.costs import PackedCosts, valueless


class BriaCosts(PackedCosts):
    """What a Bria transformer costs."""

    usual_config = {
        "_class_name": "BriaTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "joint_attention_dim": 4096,
    }
    presets = {}
    text_tokens = 128
    streams = 2


class BriaFiboCosts(BriaCosts):
    """What a FIBO transformer costs. The number of text tokens is typical; the prompt decides it."""

    usual_config = {
        **BriaCosts.usual_config,
        "_class_name": "BriaFiboTransformer2DModel",
        "in_channels": 48,
        "text_encoder_dim": 2048,
    }
    text_tokens = 1000
    scale = 16
    packing = 1

    def call(self, image_tokens, text_tokens):
        layer = valueless(1, text_tokens, self.config["text_encoder_dim"])
        layers = self.config["num_layers"] + self.config["num_single_layers"]
        return {**super().call(image_tokens, text_tokens), "text_encoder_layers": [layer] * layers}


class BriaAdapter(Adapter):
    """A Bria transformer."""

    family = "bria"
    costs = BriaCosts
    transformer_classes = ("BriaTransformer2DModel",)
    embedders = ("time_embed",)

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_embed(timestep.to(dtype), dtype=dtype)

    def decode(self, pipe, latents, height=None, width=None):
        patch = pipe.vae_scale_factor  # of a token
        rows, columns = packed_grid(latents.shape[1], height, width, pipe.default_sample_size * patch, patch)
        latents = pipe._unpack_latents(latents, rows * patch, columns * patch, patch).float()
        return decoded(pipe, latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)


class BriaFiboAdapter(Adapter):
    """A FIBO transformer. Each of its blocks reads another layer of the text encoder."""

    family = "bria-fibo"
    costs = BriaFiboCosts
    transformer_classes = ("BriaFiboTransformer2DModel",)
    embedders = ("time_embed",)
    attention_kwargs = "joint_attention_kwargs"
    conditioned_on = ("guidance",)

    def condition(self, timestep, inputs, dtype):
        conditioning = self.transformer.time_embed(timestep.to(dtype), dtype=dtype)
        if inputs["guidance"] is not None:
            conditioning = conditioning + self.transformer.guidance_embed(inputs["guidance"].to(dtype), dtype=dtype)
        return conditioning

    def decode(self, pipe, latents, height=None, width=None):
        """See the base. With `do_patching`, a token holds four latents."""
        config, scale = pipe.vae.config, pipe.vae_scale_factor
        is_patched = latents.shape[-1] != config.z_dim
        side, patch = pipe.default_sample_size * scale, scale * (1 + is_patched)
        rows, columns = packed_grid(latents.shape[1], height, width, side, patch)
        unpack = pipe._unpack_latents if is_patched else pipe._unpack_latents_no_patch
        latents = unpack(latents, rows * patch, columns * patch, scale)[:, :, None]
        mean, deviation = mean_and_deviation(pipe.vae, latents)
        return decoded(pipe, latents / (1 / deviation) + mean)
