"""Small Z-Image pipelines of random weights: every class, with and without guidance."""

from functools import partial

import diffusers
import torch

from small_pipelines import (
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_DIM,
    WIDTH,
    Small,
    image,
    image_vae,
    mask_image,
    opened,
)

_SHORT, _LONG = 5, 37
"""Tokens of captions. The transformer pads each to a multiple of 32, so these two differ in length inside it."""
_VISION_DIM = 8

_TRANSFORMER = {
    "dim": 32,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
}


def transformer(**options):
    return diffusers.ZImageTransformer2DModel(
        **{
            **_TRANSFORMER,
            "n_layers": 2,
            "in_channels": LATENT_CHANNELS,
            "cap_feat_dim": TEXT_DIM,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 64, 64],
            **options,
        }
    )


def _controlnet(channels=LATENT_CHANNELS):
    return opened(
        diffusers.ZImageControlNetModel(
            control_layers_places=[0, 1],
            control_refiner_layers_places=[0, 1],
            control_in_dim=channels,
            add_control_noise_refiner="control_noise_refiner",
            **_TRANSFORMER,
        )
    )


def _captions(batch, seed, parts=None):
    """A list of the samples' captions; with `parts`, each of them is a list of so many."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [_LONG if number % 2 else _SHORT for number in range(batch)]

    def caption(length):
        return torch.randn(length, TEXT_DIM, generator=generator)

    return [caption(n) if parts is None else [caption(n) for _ in range(parts)] for n in lengths]


def _arguments(batch, named, negative, parts):
    made = {"prompt_embeds": _captions(batch, 100, parts)}
    if negative:
        made["negative_prompt_embeds"] = _captions(batch, 101, parts)
    return {**made, **{name: make(batch) for name, make in named.items()}}


def _z_image(pipeline, named=None, *, negative=False, extra=dict, parts=None, options=None, **rest):
    return Small(
        pipeline,
        lambda: {"vae": image_vae(), **extra()},
        transformer,
        partial(_arguments, named=named or {}, negative=negative, parts=parts),
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 1.0 if negative else 0.0, **(options or {})},
        **rest,
    )


def _images(seed):
    return lambda batch: [image(seed + i) for i in range(batch)]


def _omni_parts():
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=_VISION_DIM,
        intermediate_size=_VISION_DIM,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_patches=16,
        patch_size=8,
    )
    return {
        "vae": image_vae().to(torch.bfloat16),  # the pipeline gives it no other dtype
        "siglip": Siglip2VisionModel(config).eval(),
        "siglip_processor": Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    }


_MASKS = {"image": lambda batch: image(1), "mask_image": lambda batch: [mask_image()] * batch}
_CONTROL = {"control_image": lambda batch: image(5)}
_GIVEN = {"image": lambda batch: [image(1, 64, 72), image(2, 76, 64)]}  # it takes no smaller ones
_VISION = {"siglip_feat_dim": _VISION_DIM}


CASES = {
    "z-image": _z_image("ZImagePipeline"),
    "z-image cfg": _z_image("ZImagePipeline", negative=True),
    "z-image img2img cfg": _z_image("ZImageImg2ImgPipeline", {"image": _images(1)}, negative=True, strength=0.75),
    "z-image inpaint cfg": _z_image("ZImageInpaintPipeline", _MASKS, negative=True, strength=0.75),
    "z-image controlnet": _z_image(
        "ZImageControlNetPipeline", _CONTROL, extra=lambda: {"controlnet": _controlnet(2 * LATENT_CHANNELS)}
    ),
    "z-image controlnet cfg": _z_image(
        "ZImageControlNetPipeline", _CONTROL, negative=True, extra=lambda: {"controlnet": _controlnet()}
    ),
    "z-image controlnet inpaint cfg": _z_image(
        "ZImageControlNetInpaintPipeline",
        {**_MASKS, **_CONTROL},
        negative=True,
        extra=lambda: {"controlnet": _controlnet(2 * LATENT_CHANNELS + 1)},
    ),
    "z-image omni": _z_image("ZImageOmniPipeline", extra=_omni_parts, parts=1),
    "z-image omni edit cfg": _z_image(
        "ZImageOmniPipeline", _GIVEN, negative=True, extra=_omni_parts, parts=4, transformer_options=_VISION
    ),
}

FAMILY, QUICK, RECORDED = "z-image", "z-image cfg", "z-image cfg"
