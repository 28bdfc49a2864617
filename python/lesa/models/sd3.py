"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel` and the pipelines built on it."""

from diffusers import SD3Transformer2DModel

from lesa.models.adapter import Adapter, decoded


class SD3Adapter(Adapter):
    """What lesa needs to know of a Stable Diffusion 3 transformer."""

    family = "sd3"
    transformer_classes = (SD3Transformer2DModel,)
    attention_kwargs = "joint_attention_kwargs"
    control_outputs = 1
    conditioned_on = ("pooled_projections",)

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_text_embed(timestep, inputs["pooled_projections"])

    def shape(self, call):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, (height // side) * (width // side)

    def arrange(self, call, velocity):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        patches = velocity.reshape(batch, height // side, width // side, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height // side * side, width // side * side)

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)

    @property
    def counted_module(self):
        return self.transformer.transformer_blocks[0].attn.to_out[0]  # not all of these models have norm_q
