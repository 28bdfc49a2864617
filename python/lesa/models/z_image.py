"""Z-Image: `ZImageTransformer2DModel` and the pipelines built on it."""

import importlib

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import CountedCosts, near_square, valueless
from lesa.models.final_layer import FinalLayerHead


class ZImageCosts(CountedCosts):
    """What a Z-Image transformer costs."""

    usual_config = {"_class_name": "ZImageTransformer2DModel"}
    presets = {"z-image-1024": (1024, 1024, 1)}
    text_tokens = 128
    streams = 2

    @property
    def projection(self):
        duration, side = self.patch
        return f"all_final_layer.{side}-{duration}.linear"

    @property
    def patch(self):
        """See the base; the first size of those that the transformer has."""
        return self.config.get("all_f_patch_size", (1,))[0], self.config.get("all_patch_size", (2,))[0]

    def call(self, image_tokens, text_tokens):
        (rows, columns), (duration, side) = near_square(image_tokens), self.patch
        channels, width = self.config.get("in_channels", 16), self.config.get("cap_feat_dim", 2560)
        image = valueless(channels, duration, side * rows, side * columns)
        sizes = {"patch_size": side, "f_patch_size": duration}
        return {"x": [image], "t": valueless(1), "cap_feats": [valueless(text_tokens, width)], **sizes}


class ZImageAdapter(Adapter):
    """A Z-Image transformer.

    Its sample is a list with one image for each sample. In the omni pipeline, each sample is a list of images, of which
    the last one is drawn. Captions and given images enter the head too, and are not forecast.
    """

    family = "z-image"
    costs = ZImageCosts
    transformer_classes = ("ZImageTransformer2DModel",)
    embedders = ("t_embedder",)
    sample_argument, timestep_argument, text_argument = "x", "t", "cap_feats"
    attention_kwargs = "joint_attention_kwargs"
    prompts_first = True
    block_lists = {"layers": "attention.to_out.0"}  # a ControlNet runs the refiners too

    def make_head(self):
        layer = next(iter(self.transformer.all_final_layer))
        kind = "diffusers.models.transformers.transformer_z_image.FinalLayer"
        return FinalLayerHead(self.transformer, f"all_final_layer.{layer}", kind, conditioning=("c", "c_noisy"))

    def width(self):
        return self.transformer.config.dim

    def condition(self, timestep, inputs, dtype):
        return self.transformer.t_embedder(timestep * self.transformer.t_scale).to(dtype)

    def pass_timesteps(self, timesteps, scheduler):
        return (1000 - timesteps) / 1000

    def sample(self, call):
        return self._drawn(call)[0]

    def text(self, call):
        first = call["cap_feats"][0]
        return first[0] if isinstance(first, list) else first

    def shape(self, call):
        images = self._drawn(call)
        return len(images), max(self._tokens(call, image) for image in images)

    def features(self, call, entered):
        tokens = self.shape(call)[1]
        begins = [self._begin(call, row) for row in range(len(entered))]
        return torch.stack([row[begin : begin + tokens] for row, begin in zip(entered, begins)])

    def output(self, call, velocity):
        sizes = [tuple(image.shape[1:]) for image in self._drawn(call)]
        sample = self.transformer.unpatchify([*velocity], sizes, call["patch_size"], call["f_patch_size"])
        return Transformer2DModelOutput(sample=sample) if call["return_dict"] else (sample,)

    def latents(self, call):
        side, duration = call["patch_size"], call["f_patch_size"]
        images = torch.stack(self._drawn(call))
        patches = images.unfold(2, duration, duration).unfold(3, side, side).unfold(4, side, side)
        return patches.permute(0, 2, 3, 4, 5, 6, 7, 1).reshape(*self.shape(call), -1)

    def decode(self, pipe, latents, height=None, width=None):
        latents = latents.to(pipe.vae.dtype)
        return decoded(pipe, latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)

    def _drawn(self, call: dict) -> list[torch.Tensor]:
        """The image `[C, F, H, W]` of each sample that is drawn."""
        return [images[-1] if isinstance(images, list) else images for images in call["x"]]

    def _tokens(self, call: dict, image: torch.Tensor) -> int:
        return image[0].numel() // (call["patch_size"] ** 2 * call["f_patch_size"])

    def _begin(self, call: dict, row: int) -> int:
        """Where the tokens of the drawn image begin: at once, or after the captions and the given images."""
        images, captions = call["x"][row], call["cap_feats"][row]
        if not isinstance(images, list):
            return 0
        lengths = [len(caption) for caption in captions]
        lengths += [1 if image is None else self._tokens(call, image) for image in images[:-1]]
        multiple = importlib.import_module("diffusers.models.transformers.transformer_z_image").SEQ_MULTI_OF
        return sum(-(-length // multiple) * multiple for length in lengths)  # each is padded
