"""FLUX: `FluxTransformer2DModel` and the pipelines built on it."""

from lesa.models.adapter import Adapter, decoded, packed_grid
from lesa.models.costs import Costs


class FluxCosts(Costs):
    """What a FLUX transformer costs; the usual model is FLUX.1-dev."""

    usual_config = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    }
    presets = {"flux-1024": (1024, 1024, 1)}
    text_tokens = 512
    packing = 2


class FluxAdapter(Adapter):
    """A FLUX transformer."""

    family = "flux"
    costs: type[Costs] = FluxCosts
    transformer_classes = ("FluxTransformer2DModel",)
    timestep_scale = 1000.0
    attention_kwargs: str | None = "joint_attention_kwargs"
    control_outputs = 2
    conditioned_on: tuple[str, ...] = ("guidance", "pooled_projections")

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
