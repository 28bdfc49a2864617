"""Small FIBO pipelines. They take prompts in words, so their text encoder is replaced."""

import json
from dataclasses import dataclass
from functools import partial

import diffusers
import torch

from small_bria import WIDTHS
from small_pipelines import (
    LATENT_CHANNELS,
    TEXT_DIM,
    TEXT_TOKENS,
    Small,
    TextEncoderOfNothing,
    image,
)


def layers_of(prompt, num_images_per_prompt=1, **_):
    """What the pipeline's text encoder gives: the last two layers, all layers, and a mask."""
    batch = num_images_per_prompt * (1 if isinstance(prompt, str) else len(prompt))
    words = TEXT_TOKENS - (not prompt[0])  # a negative prompt is shorter
    generator = torch.Generator().manual_seed(300 + words)
    layers = tuple(torch.randn(batch, words, TEXT_DIM // 2, generator=generator) for _ in range(3))
    return torch.cat([layers[-1], layers[-2]], dim=-1), layers, torch.ones(batch, words)


@dataclass(frozen=True)
class Encoded(Small):
    """A pipeline whose text encoder is replaced by `layers_of`."""

    def build(self):
        pipe = super().build()
        pipe.get_prompt_embeds = layers_of
        return pipe


def fibo_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.5, -0.4],
        latents_std=[1.1, 0.9, 1.3, 0.7, 1.0, 1.2],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


def fibo_transformer(channels=LATENT_CHANNELS):
    return diffusers.BriaFiboTransformer2DModel(
        in_channels=channels,
        joint_attention_dim=TEXT_DIM,
        text_encoder_dim=TEXT_DIM // 2,
        axes_dims_rope=[4, 6, 6],
        **WIDTHS,
    )


def _fibo(pipeline, words, scale, named=None, **rest):
    return Encoded(
        pipeline,
        lambda: {"vae": fibo_vae(), "text_encoder": TextEncoderOfNothing()},
        rest.pop("transformer", fibo_transformer),
        lambda batch: {"prompt": [words] * batch, **{name: make(batch) for name, make in (named or {}).items()}},
        {"height": 32 * 2, "width": 32 * 3},
        options={"guidance_scale": scale, **rest.pop("options", {})},
        scheduler_options={"use_dynamic_shifting": True},
        **rest,
    )


_PATCHED = {"transformer": partial(fibo_transformer, 4 * LATENT_CHANNELS), "options": {"do_patching": True}}
_EDIT = json.dumps({"edit_instruction": "words"})

CASES = {
    "fibo": _fibo("BriaFiboPipeline", "words", 1.0),
    "fibo cfg": _fibo("BriaFiboPipeline", "words", 3.0),
    "fibo patched cfg": _fibo("BriaFiboPipeline", "words", 3.0, **_PATCHED),
    "fibo edit": _fibo("BriaFiboEditPipeline", _EDIT, 1.0),
    "fibo edit references cfg": _fibo(
        "BriaFiboEditPipeline", _EDIT, 3.0, {"image": lambda batch: [image(1, 32, 64), image(2, 64, 32)]}, most=1
    ),
}

FAMILY, QUICK, RECORDED = "bria-fibo", "fibo cfg", "fibo cfg"
