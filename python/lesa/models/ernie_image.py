"""ERNIE-Image: `ErnieImageTransformer2DModel` and the pipeline built on it."""

import torch

from lesa.models.adapter import Adapter, decoded
from lesa.models.cogview import CogView4Head
from lesa.models.costs import CountedCosts, near_square, valueless

_MODULE = "diffusers.models.transformers.transformer_ernie_image"


class ErnieImageCosts(CountedCosts):
    """What an ERNIE-Image transformer costs."""

    usual_config = {
        "_class_name": "ErnieImageTransformer2DModel",
        "patch_size": 1,
        "in_channels": 128,
        "text_in_dim": 2560,
    }
    presets = {"ernie-image-1024": (1024, 1024, 1)}
    text_tokens = 128
    streams = 2
    packing = 2
    projection = "final_linear"

    def call(self, image_tokens, text_tokens):
        image = 1, self.config["in_channels"], *near_square(image_tokens)
        return {
            "hidden_states": torch.zeros(image, device="cpu"),  # autocast knows no device without values
            "timestep": valueless(1),
            "text_bth": valueless(1, text_tokens, self.config["text_in_dim"]),
            "text_lens": torch.tensor([text_tokens], device="cpu"),
        }


class ErnieImageHead(CogView4Head):
    """An AdaLN without an activation, which gets the tokens in the first dimension, then a linear layer."""

    def run(self, features, conditioning):
        normed = self.entry(features.transpose(0, 1), conditioning).type_as(features)
        return self.projection(normed).transpose(0, 1)

    def parts(self):
        return {**super().parts(), self.norm_path: (self.entry, f"{_MODULE}.ErnieImageAdaLNContinuous")}


class ErnieImageAdapter(Adapter):
    """An ERNIE-Image transformer. Text comes after the tokens of the image, and is not forecast."""

    family = "ernie-image"
    costs = ErnieImageCosts
    transformer_classes = ("ErnieImageTransformer2DModel",)
    embedders = ("time_embedding",)
    text_argument = "text_bth"
    attention_kwargs = None
    block_lists = {"layers": "self_attention.to_out.0"}

    def make_head(self):
        return ErnieImageHead(self.transformer, "final_norm", "final_linear")

    def width(self):
        return self.transformer.config.hidden_size

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_embedding(self.transformer.time_proj(timestep).to(dtype))

    def shape(self, call):
        batch, side, rows, columns = self._grid(call)
        return batch, rows * columns

    def features(self, call, entered):
        return entered[: self.shape(call)[1]].transpose(0, 1)

    def arrange(self, call, velocity):
        batch, side, rows, columns = self._grid(call)
        patches = velocity.reshape(batch, rows, columns, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * side, columns * side)

    def output(self, call, velocity):
        from diffusers.models.transformers.transformer_ernie_image import ErnieImageTransformer2DModelOutput

        sample = self.arrange(call, velocity)
        return ErnieImageTransformer2DModelOutput(sample=sample) if call["return_dict"] else (sample,)

    def decode(self, pipe, latents, height=None, width=None):
        norm = pipe.vae.bn  # the pipeline takes another epsilon than the VAE names
        mean, deviation = norm.running_mean, torch.sqrt(norm.running_var + 1e-5)
        patches = latents * deviation.to(latents)[:, None, None] + mean.to(latents)[:, None, None]
        return decoded(pipe, pipe._unpatchify_latents(patches))

    def _grid(self, call: dict) -> tuple[int, int, int, int]:
        """Batch, the side of a token, and rows and columns of the tokens."""
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, side, height // side, width // side
