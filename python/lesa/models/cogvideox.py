"""CogVideoX: `CogVideoXTransformer3DModel`, its variant ConsisID, and the pipelines built on them."""

import torch
from diffusers.models.normalization import AdaLayerNorm

from lesa.models.adapter import Adapter
from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.heads import AdaLayerNormHead, folded

_PAD = {"CogVideoXPipeline", "CogVideoXImageToVideoPipeline"}
"""Pipelines that put frames of padding before the latents."""


class CogVideoXCosts(VideoCosts, CountedCosts):
    """What a CogVideoX transformer costs; the usual model is that of 5 billion parameters."""

    usual_config = {
        "_class_name": "CogVideoXTransformer3DModel",
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 42,
        "num_attention_heads": 48,
        "attention_head_dim": 64,
        "text_embed_dim": 4096,
        "use_rotary_positional_embeddings": True,
    }
    presets = {"cogvideox-480p": (480, 720, 49)}
    text_tokens = 226
    streams = 2

    def call(self, image_tokens, text_tokens):
        config, (duration, side) = self.config, self.patch
        rows, columns = near_square(image_tokens)
        return {
            "hidden_states": valueless(1, duration, config["in_channels"], rows * side, columns * side),
            "encoder_hidden_states": valueless(1, text_tokens, config["text_embed_dim"]),
            "timestep": valueless(1),
            **({"ofs": valueless(1)} if config.get("ofs_embed_dim") else {}),
        }


class CogVideoXHead(AdaLayerNormHead):
    """`AdaLayerNorm`, whose linear layer gives the shift first, and whose norm has weights of its own."""

    def run(self, features, conditioning):
        return self.projection(self.entry(features, temb=conditioning))

    def modulation(self, conditioning):
        norm = self.entry
        shift, scale = norm.linear(norm.silu(conditioning)).chunk(2, dim=1)
        return folded(norm.norm, scale, shift)

    def parts(self):
        return {**super().parts(), self.norm_path: (self.entry, AdaLayerNorm)}


class CogVideoXAdapter(Adapter):
    """A CogVideoX transformer. Its features are what its last norm without a timestep gives."""

    family = "cogvideox"
    costs = CogVideoXCosts
    transformer_classes = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    block_lists = {"transformer_blocks": "attn1.norm_q"}

    @property
    def embedders(self):
        ofs = getattr(self.transformer, "ofs_embedding", None)
        return ("time_proj", "time_embedding", *(() if ofs is None else ("ofs_proj", "ofs_embedding")))

    @property
    def conditioned_on(self):
        return ("timestep_cond", "ofs") if "ofs_embedding" in self.embedders else ("timestep_cond",)

    def make_head(self):
        return CogVideoXHead(self.transformer)

    def condition(self, timestep, inputs, dtype):
        model = self.transformer
        conditioning = model.time_embedding(model.time_proj(timestep).to(dtype), inputs["timestep_cond"])
        if "ofs" not in inputs:
            return conditioning
        return conditioning + model.ofs_embedding(model.ofs_proj(inputs["ofs"]).to(dtype))

    def shape(self, call):
        batch, *grid = self._token_grid(call)
        return batch, grid[0] * grid[1] * grid[2]

    def arrange(self, call, velocity):
        config = self.transformer.config
        side, duration = config.patch_size, config.get("patch_size_t") or 1
        patches = velocity.reshape(*self._token_grid(call), -1, duration, side, side)
        patches = patches.permute(0, 1, 5, 4, 2, 6, 3, 7)
        return patches.flatten(6, 7).flatten(4, 5).flatten(1, 2)

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base. A model of patches in time is taken to have padded the latents by what a patch lacks."""
        is_padded = not _PAD.isdisjoint(base.__name__ for base in type(pipe).__mro__)
        padding = (self.transformer.config.get("patch_size_t") or 1) - 1 if is_padded else 0
        video = pipe.decode_latents(latents[:, padding:].to(pipe.vae.dtype))
        return pipe.video_processor.postprocess_video(video, output_type="np")

    def _token_grid(self, call) -> tuple[int, int, int, int]:
        """Batch, and frames, rows and columns of the tokens."""
        config = self.transformer.config
        batch, frames, _, height, width = call["hidden_states"].shape
        side, duration = config.patch_size, config.get("patch_size_t") or 1
        return batch, -(-frames // duration), height // side, width // side
