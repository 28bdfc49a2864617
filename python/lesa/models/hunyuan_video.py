"""HunyuanVideo: `HunyuanVideoTransformer3DModel`, FramePack's variant of it, and the pipelines built on them."""

import math

import torch

from lesa.models.adapter import Adapter
from lesa.models.costs import Costs, VideoCosts, attention_flops, feed_forward_flops, product_flops, timestep_flops


class HunyuanVideoCosts(VideoCosts):
    """What a HunyuanVideo transformer costs."""

    usual_config = {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
    }
    presets = {"hunyuan-video-480p": (480, 640, 65), "hunyuan-video-720p": (720, 1280, 129)}
    text_tokens = 256

    def embedding_flops(self, image_tokens, text_tokens):
        """A small transformer of its own refines the text."""
        c, dim, width = self.config, self.dim, self.config["text_embed_dim"]
        image = product_flops(image_tokens, c["in_channels"] * c["patch_size"] ** 2 * c["patch_size_t"], dim)
        layer = attention_flops(text_tokens, text_tokens, dim) + feed_forward_flops(text_tokens, dim)
        layer += product_flops(1, dim, 2 * dim)
        text = timestep_flops(dim) + product_flops(1, width, dim, dim) + product_flops(text_tokens, width, dim)
        return image + text + c["num_refiner_layers"] * layer


class HunyuanVideoAdapter(Adapter):
    """A HunyuanVideo transformer.

    FramePack generates a video in sections. Each section is a separate run.
    """

    family = "hunyuan-video"
    costs: type[Costs] = HunyuanVideoCosts
    transformer_classes: tuple[str, ...] = ("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel")
    conditioned_on: tuple[str, ...] = ("guidance", "pooled_projections")

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
        """See the base. FramePack's sections are decoded together; the pipeline itself blends their overlaps."""
        if isinstance(latents, list):  # FramePack gives the latents after each section
            latents = latents[-1]
        video = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return pipe.video_processor.postprocess_video(video, output_type="np")

    def _token_grid(self, call) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens."""
        side, duration = self.transformer.config.patch_size, self.transformer.config.patch_size_t
        frames, height, width = call["hidden_states"].shape[2:]
        return frames // duration, height // side, width // side
