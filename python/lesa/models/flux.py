"""FLUX: `FluxTransformer2DModel` and the pipelines built on it."""

import inspect

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale

from lesa.models.plain_head import why_not_plain
from lesa_kernels import OutputHead


class FluxAdapter:
    """What the cache, the recorder and the trainer need to know of a FLUX transformer.

    Args:
        transformer: a `FluxTransformer2DModel`.
    """

    family = "flux"
    _signature = inspect.signature(FluxTransformer2DModel.forward)

    def __init__(self, transformer: FluxTransformer2DModel):
        self.transformer = transformer
        self.feature_dim = transformer.inner_dim

    @staticmethod
    def handles(transformer) -> bool:
        """Whether this adapter is made for `transformer`."""
        return isinstance(transformer, FluxTransformer2DModel)

    @property
    def head_entry(self) -> torch.nn.Module:
        """The module whose first input is the features to forecast `[B, T, D]`, and the second the conditioning."""
        return self.transformer.norm_out

    @property
    def counted_module(self) -> torch.nn.Module:
        """A module inside the first block's attention, which runs exactly when that attention is computed.

        lesa skips all of a step or nothing. A cache that skips only attentions computes the rest in every step.
        """
        return self.transformer.transformer_blocks[0].attn.norm_q

    @property
    def projection(self) -> torch.nn.Module:
        """The head's last layer, which a recording keeps the weights of."""
        return self.transformer.proj_out

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """The transformer's arguments by name."""
        call = self._signature.bind(self.transformer, *args, **kwargs)
        call.apply_defaults()
        return call.arguments

    def shape(self, call: dict) -> tuple[int, int]:
        """Batch and tokens of the features that this call would compute."""
        return tuple(call["hidden_states"].shape[:2])

    def head(self, call: dict, features: torch.Tensor):
        """The transformer's output from forecast features: what its forward does after the last block."""
        velocity = _head(self.transformer, call, features, joint_attention_kwargs=call["joint_attention_kwargs"])
        return self.output(call, velocity)

    def output(self, call: dict, velocity: torch.Tensor):
        """A velocity `[B, T, O]` as the transformer returns it."""
        return Transformer2DModelOutput(sample=velocity) if call["return_dict"] else (velocity,)

    def why_head_not_plain(self, own_hook: int, device: torch.device) -> str | None:
        """Why the head of this call must run in the model's own modules, or None; see `why_not_plain`."""
        return why_not_plain(self.transformer.norm_out, self.transformer.proj_out, own_hook, device)

    def head_of(self, call: dict, dtype: torch.dtype) -> OutputHead:
        """The head as plain tensors, modulated for this call, as `head` applies it to features of `dtype`."""
        conditioning = _condition(self.transformer, call, dtype, joint_attention_kwargs=call["joint_attention_kwargs"])
        return self.output_head(conditioning)

    def output_head(self, conditioning: torch.Tensor) -> OutputHead:
        """The head as plain tensors, modulated for one step.

        Args:
            conditioning: `[B, D]`, the second input of `head_entry`.
        """
        norm, projection = self.transformer.norm_out, self.transformer.proj_out
        scale, shift = norm.linear(norm.silu(conditioning).to(norm.linear.weight.dtype)).chunk(2, dim=1)
        return OutputHead(projection.weight, projection.bias, scale, shift, norm.norm.eps)

    def decode(self, pipe, latents: torch.Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Images from what the pipeline returns with `output_type="latent"`, as the pipeline itself decodes them.

        Args:
            pipe: the pipeline.
            latents: `[B, T, C]`, packed.
            height, width: as they were passed to the pipeline, in pixels.

        Returns:
            `[B, height, width, 3]` float32 in [0, 1].
        """
        side = pipe.default_sample_size * pipe.vae_scale_factor
        latents = pipe._unpack_latents(latents, height or side, width or side, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        with torch.no_grad():
            images = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
        return pipe.image_processor.postprocess(images, output_type="np")


@apply_lora_scale("joint_attention_kwargs")
def _head(transformer, call, features, joint_attention_kwargs=None):
    return transformer.proj_out(transformer.norm_out(features, _conditioning(transformer, call, features.dtype)))


@apply_lora_scale("joint_attention_kwargs")
def _condition(transformer, call, dtype, joint_attention_kwargs=None):
    return _conditioning(transformer, call, dtype)


def _conditioning(transformer, call, dtype):
    """The second input of the last AdaLN: `[B, D]`."""
    timestep = call["timestep"].to(dtype) * 1000
    conditions = [timestep, call["pooled_projections"]]
    if call["guidance"] is not None:
        conditions.insert(1, call["guidance"].to(dtype) * 1000)
    return transformer.time_text_embed(*conditions)
