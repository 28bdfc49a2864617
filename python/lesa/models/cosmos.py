"""Cosmos: `CosmosTransformer3DModel` and the pipelines built on it, of Predict 1, 2 and 2.5 and Transfer 2.5."""

from collections.abc import Iterator

import diffusers
import numpy as np
import torch

from lesa.models.adapter import Adapter
from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.heads import HeadForm, folded

_MOST_COLUMNS = 120
"""Of tokens that the transformer has positions for."""
_BY_RECIPROCAL = ("Cosmos2TextToImagePipeline", "Cosmos2_5_PredictBasePipeline")
"""Pipelines that divide latents by the reciprocal of the deviation."""


class CosmosCosts(VideoCosts, CountedCosts):
    """What a Cosmos transformer costs, without its padding mask; the usual model is the smaller one of Predict 2."""

    usual_config = {
        "_class_name": "CosmosTransformer3DModel",
        "patch_size": (1, 2, 2),
        "in_channels": 17,
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 28,
        "text_embed_dim": 1024,
        "extra_pos_embed_type": None,
    }
    presets = {"cosmos2-720p": (704, 1280, 93)}
    text_tokens = 512
    streams = 2

    def __init__(self, config):
        super().__init__({**config, "concat_padding_mask": False})

    def call(self, image_tokens, text_tokens):
        config, (duration, side) = self.config, self.patch
        grids = ((frames, *near_square(image_tokens // frames)) for frames in _divisors(image_tokens))
        frames, rows, columns = next(grid for grid in grids if grid[2] <= _MOST_COLUMNS or grid[0] == image_tokens)
        width = config.get("crossattn_proj_in_channels", 1024) if config.get("use_crossattn_projection") else None
        text = valueless(1, text_tokens, width or config["text_embed_dim"])
        given = config.get("img_context_dim_in")  # of an embedded image
        return {
            "hidden_states": valueless(1, config["in_channels"], frames * duration, rows * side, columns * side),
            "encoder_hidden_states": (
                (text, valueless(1, config.get("img_context_num_tokens", 256), given)) if given else text
            ),
            "timestep": valueless(1),
        }


class CosmosHead(HeadForm):
    """`CosmosAdaLayerNorm`, then a linear layer. Its two conditions `[..., D]` and `[..., 2 D]` are joined here."""

    @property
    def eps(self):
        return self.entry.norm.eps

    def entered(self, args, kwargs):
        return args[0], torch.cat([args[1], args[2][..., : 2 * args[1].shape[-1]]], dim=-1)

    def run(self, features, conditioning):
        dim = features.shape[-1]
        return self.projection(self.entry(features, conditioning[..., :dim], conditioning[..., dim:]))

    def modulation(self, conditioning):
        norm, dim = self.entry, self.entry.embedding_dim
        low_rank = norm.linear_2(norm.linear_1(norm.activation(conditioning[..., :dim])))
        shift, scale = (low_rank + conditioning[..., dim:]).chunk(2, dim=-1)
        return folded(norm.norm, scale, shift)

    def parts(self):
        norm, path = self.entry, self.norm_path
        return {
            path: (norm, "diffusers.models.transformers.transformer_cosmos.CosmosAdaLayerNorm"),
            f"{path}.activation": (norm.activation, torch.nn.SiLU),
            f"{path}.linear_1": (norm.linear_1, torch.nn.Linear),
            f"{path}.linear_2": (norm.linear_2, torch.nn.Linear),
            f"{path}.norm": (norm.norm, torch.nn.LayerNorm),
            self.projection_path: (self.projection, torch.nn.Linear),
        }


class CosmosAdapter(Adapter):
    """A Cosmos transformer. Where images or clips are given, each frame has its own timestep."""

    family = "cosmos"
    costs = CosmosCosts
    transformer_classes = ("CosmosTransformer3DModel",)
    embedders = ("time_embed",)
    untold = "it gets a timestep for each frame in some pipelines, and the part of noise in others"
    attention_kwargs = None
    control_outputs = 1
    block_lists = {"transformer_blocks": "attn1.norm_q"}

    def make_head(self):
        return CosmosHead(self.transformer)

    def pass_timesteps(self, timesteps, scheduler):
        """Predict 1 passes the timesteps, 2 the part of noise in the sample, and 2.5 the scheduler's own sigmas."""
        if isinstance(scheduler, diffusers.EDMEulerScheduler):
            return timesteps
        end = len(scheduler.timesteps)
        sigmas = scheduler.sigmas[end - len(timesteps) : end].to(timesteps.device)  # `timesteps` are the last ones
        if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            sigmas = sigmas / (sigmas + 1)
        return sigmas.to(timesteps.dtype) if timesteps.is_floating_point() else sigmas

    def timestep(self, call):
        """See the base. Given frames come first. Transfer rounds as the transformer does, and passes float32."""
        timestep = call["timestep"]
        return timestep if timestep.ndim == 1 else timestep[:, 0, -1, 0, 0].to(call["hidden_states"].dtype)

    def text(self, call):
        text = call["encoder_hidden_states"]
        return text[0] if isinstance(text, tuple) else text

    def condition(self, timestep, inputs, dtype):
        temb, embedded = self.transformer.time_embed(timestep.new_empty(0, dtype=dtype), timestep.flatten())
        conditioning = torch.cat([embedded, temb[..., : 2 * embedded.shape[-1]]], dim=-1)
        return conditioning if timestep.ndim == 1 else conditioning.unflatten(0, (len(timestep), -1))

    def conditioning(self, call, dtype, device=None):
        conditioning = super().conditioning(call, dtype, device)
        if conditioning.ndim == 2:
            return conditioning
        _, _, rows, columns = self._token_grid(call)
        return conditioning.repeat_interleave(rows * columns, dim=1)  # the tokens of a frame share its timestep

    def shape(self, call):
        batch, frames, rows, columns = self._token_grid(call)
        return batch, frames * rows * columns

    def arrange(self, call, velocity):
        duration, height, width = self.transformer.config.patch_size
        patches = velocity.reshape(*self._token_grid(call), height, width, duration, -1)
        return patches.permute(0, 7, 1, 6, 2, 4, 3, 5).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base. The pipeline's guardrail looks at the frames. Transfer itself decodes in pieces."""
        config, is_image = pipe.vae.config, latents.ndim == 4
        latents = latents[:, :, None] if is_image else latents
        scale = pipe.scheduler.config.get("sigma_data", 1.0)
        if config.get("latents_mean") is None:
            latents = latents / scale
        else:
            channels = latents.shape[1]
            mean, deviation = (torch.tensor(config[name]) for name in ("latents_mean", "latents_std"))
            mean, deviation = (
                part.view(1, channels, -1, 1, 1)[:, :, : latents.shape[2]].to(latents) for part in (mean, deviation)
            )
            scaled = latents / (1.0 / deviation) if type(pipe).__name__ in _BY_RECIPROCAL else latents * deviation
            latents = scaled / scale + mean
        video = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
        clips = (pipe.video_processor.postprocess_video(video, output_type="np") * 255).astype(np.uint8)
        pipe.safety_checker.to(pipe._execution_device)
        checked = [(clip, pipe.safety_checker.check_video_safety(clip)) for clip in clips]
        pipe.safety_checker.to("cpu")
        video = np.stack([np.zeros_like(clip) if safe is None else safe for clip, safe in checked])
        video = torch.from_numpy(video.astype(np.float32) / 255.0 * 2 - 1).permute(0, 4, 1, 2, 3)
        frames = pipe.video_processor.postprocess_video(video, output_type="np")
        return frames[:, 0] if is_image else frames

    def _token_grid(self, call) -> tuple[int, ...]:
        """Batch, and frames, rows and columns of the tokens."""
        batch, _, *size = call["hidden_states"].shape
        return batch, *(length // patch for length, patch in zip(size, self.transformer.config.patch_size))


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)
