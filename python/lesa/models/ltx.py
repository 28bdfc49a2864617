"""LTX-Video: `LTXVideoTransformer3DModel` and the pipelines built on it."""

import torch

from lesa.models.adapter import Adapter
from lesa.models.costs import CountedCosts, VideoCosts, valueless
from lesa.models.heads import TableHead


class LTXVideoCosts(VideoCosts, CountedCosts):
    """What an LTX-Video transformer costs; the usual model is that of 2 billion parameters."""

    usual_config = {"_class_name": "LTXVideoTransformer3DModel", "patch_size": 1, "num_layers": 28}
    presets = {"ltx-video": (512, 704, 161)}
    text_tokens = 128
    streams = 2
    scale = 32
    frame_scale = 8

    def call(self, image_tokens, text_tokens):
        config = self.config
        return {
            "hidden_states": valueless(1, image_tokens, config.get("in_channels", 128)),
            "encoder_hidden_states": valueless(1, text_tokens, config.get("caption_channels", 4096)),
            "encoder_attention_mask": valueless(1, text_tokens),
            "timestep": valueless(1),
            "video_coords": valueless(1, 3, image_tokens),
        }


class LTXVideoAdapter(Adapter):
    """An LTX-Video transformer. Where images or clips are given, each token has its own timestep."""

    family = "ltx-video"
    costs = LTXVideoCosts
    transformer_classes = ("LTXVideoTransformer3DModel",)
    embedders = ("time_embed",)
    block_lists = {"transformer_blocks": "attn1.norm_q"}

    def make_head(self):
        return TableHead(self.transformer)

    def condition(self, timestep, inputs, dtype):
        _, embedded = self.transformer.time_embed(timestep.flatten(), hidden_dtype=dtype)
        return embedded if len(embedded) == len(timestep) else embedded.unflatten(0, (len(timestep), -1))

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base. A VAE that takes a timestep gets zero, and the latents without noise."""
        vae = pipe.vae
        if latents.ndim == 3:
            rows, columns = (side // pipe.vae_spatial_compression_ratio for side in (height or 512, width or 704))
            latents = pipe._unpack_latents(latents, latents.shape[1] // (rows * columns), rows, columns)
        if hasattr(pipe, "vae_decode_tiled"):
            return pipe.vae_decode_tiled(latents, decode_timestep=0.05, output_type="np")
        latents = pipe._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        latents = latents.to(vae.dtype)
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        video = vae.decode(latents, timestep, return_dict=False)[0]
        return pipe.video_processor.postprocess_video(video, output_type="np")
