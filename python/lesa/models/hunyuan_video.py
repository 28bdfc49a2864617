"""HunyuanVideo: `HunyuanVideoTransformer3DModel`, FramePack's variant of it, and the pipelines built on them."""

import math

import diffusers
import torch
from diffusers import HunyuanVideoTransformer3DModel

from lesa.models.adapter import Adapter

_FRAMEPACK = getattr(diffusers, "HunyuanVideoFramepackTransformer3DModel", None)


class HunyuanVideoAdapter(Adapter):
    """What lesa needs to know of a HunyuanVideo transformer.

    FramePack makes a video section by section. Each section is a run of its own.
    """

    family = "hunyuan-video"
    transformer_classes = tuple(c for c in (HunyuanVideoTransformer3DModel, _FRAMEPACK) if c is not None)
    conditioned_on = ("guidance", "pooled_projections")

    def condition(self, timestep, inputs, dtype):
        conditioning, _of_given_frame = self.transformer.time_text_embed(
            timestep, inputs["pooled_projections"], inputs["guidance"]
        )
        return conditioning

    def shape(self, call):
        return len(call["hidden_states"]), math.prod(self._token_grid(call))

    def arrange(self, call, velocity):
        side, duration = self.transformer.config.patch_size, self.transformer.config.patch_size_t
        frames, rows, columns = self._token_grid(call)
        patches = velocity.reshape(len(velocity), frames, rows, columns, -1, duration, side, side)
        return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(
            len(velocity), -1, frames * duration, rows * side, columns * side
        )

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """As the base says; of FramePack all sections at once, which the pipeline blends where they overlap."""
        if isinstance(latents, list):  # of FramePack: all that there was after each section
            latents = latents[-1]
        video = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return pipe.video_processor.postprocess_video(video, output_type="np")

    def _token_grid(self, call) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens."""
        side, duration = self.transformer.config.patch_size, self.transformer.config.patch_size_t
        frames, height, width = call["hidden_states"].shape[2:]
        return frames // duration, height // side, width // side
