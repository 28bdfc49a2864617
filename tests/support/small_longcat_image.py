"""Small LongCat-Image pipelines. They take prompts in words, so their text encoder is replaced."""

from dataclasses import dataclass
from unittest import mock

import diffusers
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit

from small_pipelines import DIM, HEIGHT, TEXT_DIM, TEXT_TOKENS, WIDTH, Small, image, image_vae

_CHANNELS = 16
"""The pipelines take no other number."""
_SIDE = 16
"""Of an edited image. Its size is no argument of the pipeline, and `decode` knows that of a square one alone."""


@dataclass(frozen=True)
class Encoded(Small):
    """A pipeline whose text encoder is replaced."""

    def build(self):
        pipe = super().build()
        pipe._encode_prompt, pipe.default_sample_size = encode, _SIDE // pipe.vae_scale_factor
        return pipe

    def run(self, pipe, *args, **options):
        with mock.patch.object(pipeline_longcat_image_edit, "calculate_dimensions", return_value=(_SIDE, _SIDE)):
            return super().run(pipe, *args, **options)


class NoProcessor:
    """Stands for what prepares images for the text encoder."""

    image_processor = None


def encode(prompt, image=None):
    generator = torch.Generator().manual_seed(400 + len(prompt[0]))
    return torch.randn(len(prompt), TEXT_TOKENS, TEXT_DIM, generator=generator)


def transformer():
    return diffusers.LongCatImageTransformer2DModel(
        in_channels=4 * _CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=[4, 6, 6],
    )


def _small(pipeline, negative, named, **rest):
    return Encoded(
        pipeline,
        lambda: {"vae": image_vae(_CHANNELS), "text_processor": NoProcessor()},
        transformer,
        lambda batch: {"prompt": ["words"] * batch, "negative_prompt": [""] * batch, **named},
        rest.pop("size", {"height": HEIGHT, "width": WIDTH}),
        options={"guidance_scale": 3.0 if negative else 1.0, **rest.pop("options", {})},
        scheduler_options={"use_dynamic_shifting": True},
        streams=("cond", "uncond")[: 1 + negative],
        **rest,
    )


_AS_IS = {"options": {"enable_prompt_rewrite": False}}

CASES = {
    "longcat": _small("LongCatImagePipeline", False, {}, **_AS_IS),
    "longcat cfg": _small("LongCatImagePipeline", True, {}, **_AS_IS),
    "longcat edit": _small("LongCatImageEditPipeline", False, {"image": image(1)}, size={}, most=1),
    "longcat edit cfg": _small("LongCatImageEditPipeline", True, {"image": image(1)}, size={}, most=1),
}

FAMILY, QUICK, RECORDED = "longcat-image", "longcat cfg", "longcat cfg"
