"""Small Qwen-Image 2.1 pipelines of random weights, with and without guidance and given images."""

from types import SimpleNamespace

import diffusers
import torch

from small_pipelines import LATENT_CHANNELS, TEXT_DIM, Small, image

_SIDE = 64
_SLOTS = _SIDE**2 // 16**2 // 4
"""The text has so many tokens for a given image of this side. Each stands for four tokens of its latents."""


class ProcessorOfNothing:
    """Stands for the processor of the text encoder, which the pipeline asks for two numbers."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *args, **kwargs):
        return [[0]]


def _vae():
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.5, -0.4],
        latents_std=[1.1, 0.9, 1.3, 0.7, 1.0, 1.2],
    ).eval()


def _transformer(**options):
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        context_in_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def _prompt(batch, negative=False, images=0):
    """Embedded prompts, their masks, and where the tokens of the given images are."""
    generator = torch.Generator().manual_seed(100 + negative)
    slots = torch.tensor([False] * 3 + ([True] * _SLOTS + [False]) * images).expand(batch, -1)
    embeds = torch.randn(*slots.shape, TEXT_DIM, generator=generator)
    return embeds, torch.ones(slots.shape, dtype=torch.long), slots


def _encode(pipe):
    """In the place of the text encoder: prompts and images -> random embeddings."""
    pipe._get_qwen_prompt_embeds = lambda prompt, images, device: _prompt(
        len(prompt), prompt[0] == "nothing", len(images or ())
    )


def _qwen(*, negative=False, images=0, options=None, **rest):
    def arguments(batch):
        made = {"prompt": ["something"] * batch}
        if negative:
            made["negative_prompt"] = ["nothing"] * batch
        if images:
            made["image"] = [image(number, _SIDE, _SIDE) for number in range(images)]
        return made

    return Small(
        "QwenImage21Pipeline",
        lambda: {"vae": _vae(), "processor": ProcessorOfNothing()},
        _transformer,
        arguments,
        {"height": 64, "width": 96},
        options={"true_cfg_scale": 3.0 if negative else 1.0, "output_resolution": _SIDE, **(options or {})},
        scheduler_options={"use_dynamic_shifting": True},
        streams=("cond", "uncond")[: 1 + negative],
        prepare=_encode,
        **rest,
    )


CASES = {
    "qwen 2.1": _qwen(),
    "qwen 2.1 cfg": _qwen(negative=True),
    "qwen 2.1 edit cfg": _qwen(negative=True, images=2),
    "qwen 2.1 edit": _qwen(images=1, options={"use_kv_cache": False}),
    "qwen 2.1 of one time": _qwen(images=1, transformer_options={"causal_condition": False}),
}

FAMILY, QUICK, RECORDED = "qwen-image-2.1", "qwen 2.1", "qwen 2.1 edit cfg"

GIVES_MORE = True
