"""Kandinsky 5: `Kandinsky5Transformer3DModel` and the pipelines built on it, for images and videos."""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from lesa.models.adapter import Adapter
from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.heads import HeadForm

_MODULE = "diffusers.models.transformers.transformer_kandinsky"


class Kandinsky5Costs(VideoCosts, CountedCosts):
    """What a Kandinsky 5 transformer costs; the usual model is Lite, which makes videos."""

    projection = "out_layer.out_layer"
    usual_config = {
        "_class_name": "Kandinsky5Transformer3DModel",
        "patch_size": (1, 2, 2),
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
        "time_dim": 512,
        "model_dim": 1792,
        "ff_dim": 7168,
        "num_text_blocks": 2,
        "num_visual_blocks": 32,
        "axes_dims": (16, 24, 24),
        "visual_cond": True,
    }
    presets = {"kandinsky5-lite": (512, 768, 121)}
    text_tokens = 256
    streams = 2

    def call(self, image_tokens, text_tokens):
        config, (duration, side), (rows, columns) = self.config, self.patch, near_square(image_tokens)
        channels = config["in_visual_dim"] * (2 if config["visual_cond"] else 1) + bool(config["visual_cond"])
        places = (torch.zeros(length, dtype=torch.int64, device="meta") for length in (1, rows, columns))
        return {
            "hidden_states": valueless(1, duration, rows * side, columns * side, channels),
            "encoder_hidden_states": valueless(1, text_tokens, config["in_text_dim"]),
            "pooled_projections": valueless(1, config["in_text_dim2"]),
            "timestep": valueless(1),
            "visual_rope_pos": [*places],
            "text_rope_pos": torch.zeros(text_tokens, dtype=torch.int64, device="meta"),
        }


class Kandinsky5Head(HeadForm):
    """A module `out_layer` that gets the features on a grid, the text and the conditioning, and makes the output."""

    def __init__(self, transformer):
        super().__init__(transformer, "out_layer", "out_layer.out_layer")

    @property
    def eps(self):
        return self.entry.norm.eps

    def entered(self, args, kwargs):
        return args[0].flatten(1, 3), args[2]

    def run(self, features, conditioning):
        scale, shift = (part.float()[:, None] for part in self.modulation(conditioning))
        normed = self.entry.norm(features.float()) * (scale + 1.0) + shift
        return self.projection(normed.type_as(features))

    def modulation(self, conditioning):
        shift, scale = self.entry.modulation(conditioning).chunk(2, dim=-1)
        return scale, shift

    def parts(self):
        entry, path = self.entry, self.norm_path
        return {
            path: (entry, f"{_MODULE}.Kandinsky5OutLayer"),
            f"{path}.modulation": (entry.modulation, f"{_MODULE}.Kandinsky5Modulation"),
            f"{path}.modulation.out_layer": (entry.modulation.out_layer, torch.nn.Linear),
            f"{path}.norm": (entry.norm, torch.nn.LayerNorm),
            self.projection_path: (self.projection, torch.nn.Linear),
        }


class Kandinsky5Adapter(Adapter):
    """A Kandinsky 5 transformer. Its samples have their channels last, and its head works in float32."""

    family = "kandinsky5"
    costs = Kandinsky5Costs
    transformer_classes = ("Kandinsky5Transformer3DModel",)
    embedders = ("time_embeddings", "pooled_text_embeddings")
    attention_kwargs = None
    conditioned_on = ("pooled_projections",)
    block_lists = {
        "text_transformer_blocks": "self_attention.to_query",
        "visual_transformer_blocks": "self_attention.to_query",
    }

    def make_head(self):
        return Kandinsky5Head(self.transformer)

    def width(self):
        return self.transformer.config.model_dim

    def condition(self, timestep, inputs, dtype):
        embedded = self.transformer.time_embeddings(timestep)
        return embedded + self.transformer.pooled_text_embeddings(inputs["pooled_projections"])

    def shape(self, call):
        batch, frames, rows, columns = self._token_grid(call)
        return batch, frames * rows * columns

    def arrange(self, call, velocity):
        patches = velocity.reshape(*self._token_grid(call), -1, *self.transformer.config.patch_size)
        return patches.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(1, 2).flatten(2, 3).flatten(3, 4)

    def output(self, call, velocity):
        sample = self.arrange(call, velocity)
        return Transformer2DModelOutput(sample=sample) if call["return_dict"] else sample

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base."""
        is_image, latents = hasattr(pipe, "image_processor"), latents.to(pipe.vae.dtype)
        batch, frames, *size, channels = latents.shape
        shape = (batch, channels, *size) if is_image else (batch, channels, frames, *size)
        latents = latents[:, None].movedim(-1, 2).reshape(shape)  # with the strides that it has in the pipeline
        sample = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        if is_image:
            return pipe.image_processor.postprocess(sample, output_type="np")
        return pipe.video_processor.postprocess_video(sample, output_type="np")

    def _token_grid(self, call) -> tuple[int, ...]:
        """Batch, and frames, rows and columns of the tokens."""
        batch, *size = call["hidden_states"].shape[:4]
        return batch, *(length // patch for length, patch in zip(size, self.transformer.config.patch_size))
