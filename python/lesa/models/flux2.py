"""FLUX.2: `Flux2Transformer2DModel` and the pipelines built on it, of the models dev and klein."""

import importlib

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from lesa.models.adapter import Adapter, decoded, packed_grid
from lesa.models.costs import PackedCosts, valueless
from lesa_kernels.checks import usage_error


class Flux2Costs(PackedCosts):
    """What a FLUX.2 transformer costs; the usual model is FLUX.2-dev."""

    usual_config = {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 8,
        "num_single_layers": 48,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
    }
    presets = {"flux2-1024": (1024, 1024, 1)}
    text_tokens = 512
    axes = 4

    def call(self, image_tokens, text_tokens):
        return {**super().call(image_tokens, text_tokens), "guidance": valueless(1)}


class Flux2Adapter(Adapter):
    """A FLUX.2 transformer.

    The tokens of reference images enter the head too, after those of the image. With a KV cache they are in the first
    call alone, before those of the image, and do not enter the head.
    """

    family = "flux2"
    costs = Flux2Costs
    transformer_classes = ("Flux2Transformer2DModel",)
    embedders = ("time_guidance_embed",)
    timestep_scale = 1000.0
    attention_kwargs = "joint_attention_kwargs"
    conditioned_on = ("guidance",)

    def condition(self, timestep, inputs, dtype):
        guidance = inputs["guidance"]
        guidance = None if guidance is None else guidance.to(dtype) * 1000
        return self.transformer.time_guidance_embed(timestep.to(dtype) * 1000, guidance)

    def sample(self, call):
        given = call["num_ref_tokens"] if call.get("kv_cache_mode") == "extract" else 0
        return call["hidden_states"][:, given:]

    def output(self, call, velocity):
        if call.get("kv_cache_mode") == "extract":
            sentence = "A call that fills the KV cache of the reference images can't be predicted."
            raise usage_error(sentence, "Let the first step of the run fill it.", RuntimeError)
        if not call["return_dict"]:
            return (velocity,)
        module = importlib.import_module("diffusers.models.transformers.transformer_flux2")
        return getattr(module, "Flux2Transformer2DModelOutput", Transformer2DModelOutput)(sample=velocity)

    def decode(self, pipe, latents, height=None, width=None):
        """See the base. The pipelines of klein give `[B, C, h, w]`, as the VAE takes them."""
        if latents.ndim == 3:
            side, patch = pipe.default_sample_size * pipe.vae_scale_factor, 2 * pipe.vae_scale_factor
            grid = packed_grid(latents.shape[1], height, width, side, patch)
            patches = latents.transpose(1, 2).reshape(len(latents), -1, *grid)
            mean, variance = (
                v.view(1, -1, 1, 1).to(patches) for v in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var)
            )
            patches = patches * (variance + pipe.vae.config.batch_norm_eps).sqrt() + mean
            latents = torch.nn.functional.pixel_shuffle(patches, 2)
        return decoded(pipe, latents)
