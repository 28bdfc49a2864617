"""FLUX: `FluxTransformer2DModel` and the pipelines built on it."""

from diffusers import FluxTransformer2DModel

from lesa.models.adapter import Adapter, decoded, packed_grid


class FluxAdapter(Adapter):
    """What lesa needs to know of a FLUX transformer."""

    family = "flux"
    transformer_classes = (FluxTransformer2DModel,)
    timestep_scale = 1000.0
    attention_kwargs = "joint_attention_kwargs"
    control_outputs = 2
    conditioned_on = ("guidance", "pooled_projections")

    def condition(self, timestep, inputs, dtype):
        guidance, pooled = inputs["guidance"], inputs["pooled_projections"]
        conditions = [timestep.to(dtype) * 1000, pooled]
        if guidance is not None:
            conditions.insert(1, guidance.to(dtype) * 1000)
        return self.transformer.time_text_embed(*conditions)

    def decode(self, pipe, latents, height=None, width=None):
        side, scale = pipe.default_sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor
        rows, columns = packed_grid(latents.shape[1], height, width, side, 2 * scale)
        latents = pipe._unpack_latents(latents, rows * 2 * scale, columns * 2 * scale, scale)
        return decoded(pipe, latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)
