"""Wan 2.1 and 2.2: the transformers for text, images and videos, VACE and Animate, and the pipelines built on them."""

import math

import torch

from lesa.models.adapter import Adapter, mean_and_deviation
from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.heads import TableHead


class WanCosts(VideoCosts, CountedCosts):
    """What a Wan transformer costs; the usual model is that of Wan 2.1 and 2.2 with 14 billion parameters."""

    usual_config = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": (1, 2, 2),
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "num_layers": 40,
        "ffn_dim": 13824,
        "text_dim": 4096,
        "freq_dim": 256,
    }
    presets = {"wan-480p": (480, 832, 81), "wan-720p": (720, 1280, 81)}
    text_tokens = 512
    streams = 2

    def call(self, image_tokens, text_tokens):
        (rows, columns), (duration, side) = near_square(image_tokens), self.patch
        call = {
            "hidden_states": valueless(1, self.config["in_channels"], duration, rows * side, columns * side),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["text_dim"]),
        }
        if self.config.get("image_dim"):  # of an image that CLIP embeds
            call["encoder_hidden_states_image"] = valueless(1, 257, self.config["image_dim"])
        return call


class WanAdapter(Adapter):
    """A Wan transformer.

    TI2V-5B gets a timestep for each token, so each token is modulated in its own way.
    """

    family = "wan"
    costs = WanCosts
    transformer_classes: tuple[str, ...] = (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
    )
    embedders = ("condition_embedder.time_embedder",)
    block_lists = {"vace_blocks": "attn1.norm_q", "blocks": "attn1.norm_q"}

    def make_head(self):
        return TableHead(self.transformer, in_float32=True)

    def condition(self, timestep, inputs, dtype):
        embedder = self.transformer.condition_embedder
        waves = embedder.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
        kind = next(embedder.time_embedder.parameters()).dtype
        return embedder.time_embedder(waves if kind == torch.int8 else waves.to(kind)).to(dtype)

    def shape(self, call):
        return len(call["hidden_states"]), math.prod(self._token_grid(call))

    def arrange(self, call, velocity):
        patch, (frames, rows, columns) = self.transformer.config.patch_size, self._token_grid(call)
        patches = velocity.reshape(len(velocity), frames, rows, columns, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base. Reference images of VACE become the first frames, which the pipeline itself leaves out.

        Of a video that Animate makes in several segments, the pipeline returns the latents of the last one.
        """
        latents = latents.to(pipe.vae.dtype)
        if hasattr(self.transformer, "motion_encoder"):  # Animate: scaled already; the first frame is the character's
            latents = latents[:, :, 1:]
        else:
            mean, deviation = mean_and_deviation(pipe.vae, latents)
            latents = latents / (1.0 / deviation) + mean
        video = pipe.vae.decode(latents, return_dict=False)[0]
        return pipe.video_processor.postprocess_video(video, output_type="np")

    def _token_grid(self, call) -> tuple[int, ...]:
        """Frames, rows and columns of the tokens."""
        sizes = zip(call["hidden_states"].shape[2:], self.transformer.config.patch_size)
        return tuple(size // patch for size, patch in sizes)
