"""Motif-Video: `MotifVideoTransformer3DModel` and the pipelines built on it."""

import torch

from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.hunyuan_video import HunyuanVideoAdapter


class MotifVideoCosts(VideoCosts, CountedCosts):
    """What a Motif-Video transformer costs, for a video from text."""

    usual_config = {
        "_class_name": "MotifVideoTransformer3DModel",
        "in_channels": 33,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 4096,
    }
    presets = {}
    text_tokens = 512
    streams = 2

    def call(self, image_tokens, text_tokens):
        c, (rows, columns) = self.config, near_square(image_tokens)
        side = c["patch_size"]
        return {
            "hidden_states": valueless(1, c["in_channels"], c["patch_size_t"], rows * side, columns * side),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, text_tokens, c["text_embed_dim"]),
        }


class MotifVideoAdapter(HunyuanVideoAdapter):
    """A Motif-Video transformer."""

    family = "motif-video"
    costs = MotifVideoCosts
    transformer_classes = ("MotifVideoTransformer3DModel",)
    conditioned_on = ()

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_text_embed(timestep)

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        config = pipe.vae.config
        latents = pipe._denormalize_latents(latents.to(pipe.vae.dtype), config.latents_mean, config.latents_std)
        video = pipe.vae.decode(latents, return_dict=False)[0]
        return pipe.video_processor.postprocess_video(video, output_type="np")
