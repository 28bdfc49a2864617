"""Lumina 2 and Lumina-Next: `Lumina2Transformer2DModel`, `LuminaNextDiT2DModel` and the pipelines built on them."""

import torch

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import CountedCosts, near_square, valueless
from lesa.models.final_layer import FinalLayerHead


class Lumina2Costs(CountedCosts):
    """What a Lumina 2 transformer costs."""

    usual_config = {
        "_class_name": "Lumina2Transformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "cap_feat_dim": 2304,
    }
    presets = {"lumina2-1024": (1024, 1024, 1)}
    text_tokens = 256
    streams = 2
    projection = "norm_out.linear_2"

    def call(self, image_tokens, text_tokens):
        rows, columns = near_square(image_tokens)
        side = self.config["patch_size"]
        return {
            "hidden_states": valueless(1, self.config["in_channels"], side * rows, side * columns),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["cap_feat_dim"]),
            "encoder_attention_mask": torch.ones(1, text_tokens, dtype=torch.int64),
        }


class LuminaNextCosts(Lumina2Costs):
    """What a Lumina-Next transformer costs."""

    usual_config = {
        "_class_name": "LuminaNextDiT2DModel",
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 2304,
        "num_attention_heads": 32,
        "num_kv_heads": 8,
        "cross_attention_dim": 2048,
    }
    presets = {"lumina-next-1024": (1024, 1024, 1)}

    def call(self, image_tokens, text_tokens):
        rows, columns = near_square(image_tokens)
        side, half = self.config["patch_size"], self.config["hidden_size"] // self.config["num_attention_heads"] // 2
        return {
            "hidden_states": valueless(1, self.config["in_channels"], side * rows, side * columns),
            "timestep": valueless(1),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["cross_attention_dim"]),
            "encoder_mask": valueless(1, text_tokens),
            "image_rotary_emb": valueless(rows, columns, half, dtype=torch.complex64),
            "cross_attention_kwargs": {},
        }


class Lumina2Adapter(Adapter):
    """A Lumina 2 transformer. Captions of different lengths come before the image's tokens, and are not forecast."""

    family = "lumina2"
    costs = Lumina2Costs
    transformer_classes = ("Lumina2Transformer2DModel",)
    embedders = ("time_caption_embed.timestep_embedder",)
    block_lists = {
        "context_refiner": "attn.to_out.0",
        "noise_refiner": "attn.to_out.0",
        "layers": "attn.to_out.0",
    }

    def make_head(self):
        return FinalLayerHead(
            self.transformer,
            "norm_out",
            "diffusers.models.normalization.LuminaLayerNormContinuous",
            norm="norm",
            silu="silu",
            modulation="linear_1",
            projection="linear_2",
            conditioning=("conditioning_embedding",),
        )

    def width(self):
        return self.transformer.config.hidden_size

    def pass_timesteps(self, timesteps, scheduler):
        return 1 - timesteps / scheduler.config.num_train_timesteps

    def condition(self, timestep, inputs, dtype):
        embed = self.transformer.time_caption_embed
        return embed.timestep_embedder(embed.time_proj(timestep).to(dtype))

    def shape(self, call):
        batch, _, rows, columns = self._grid(call)
        return batch, rows * columns

    def features(self, call, entered):
        tokens = self.shape(call)[1]
        begins = call["encoder_attention_mask"].sum(1).tolist()
        return torch.stack([row[begin : begin + tokens] for row, begin in zip(entered, begins)])

    def arrange(self, call, velocity):
        batch, side, rows, columns = self._grid(call)
        patches = velocity.reshape(batch, rows, columns, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * side, columns * side)

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0))

    def _grid(self, call: dict) -> tuple[int, int, int, int]:
        """Batch, the side of a token, and rows and columns of the tokens."""
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, side, height // side, width // side


class LuminaNextAdapter(Lumina2Adapter):
    """A Lumina-Next transformer. Half of the channels that it gives are not used by its pipelines."""

    family = "lumina-next"
    costs = LuminaNextCosts
    transformer_classes = ("LuminaNextDiT2DModel",)
    embedders = ("time_caption_embed",)
    attention_kwargs = None
    prompts_first = True
    block_lists = {"layers": "attn1.to_q"}
    conditioned_on = ("encoder_hidden_states", "encoder_mask")

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_caption_embed(timestep, inputs["encoder_hidden_states"], inputs["encoder_mask"])

    def features(self, call, entered):
        return entered

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents / pipe.vae.config.scaling_factor)
