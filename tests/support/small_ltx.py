"""Small LTX-Video pipelines of random weights."""

from functools import partial
from types import SimpleNamespace

import diffusers
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

from small_pipelines import DIM, LATENT_CHANNELS, TEXT_DIM, TEXT_TOKENS, Small, _image_arguments, embeddings, image

HEIGHT, WIDTH, FRAMES = 32, 64, 9
"""The pipelines take only multiples of 32."""


def ltx_vae(patch_size=4):
    four, five = (4,) * 4, (1,) * 5
    scaling = (True, True, False, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=four,
        decoder_block_out_channels=four,
        layers_per_block=five,
        decoder_layers_per_block=five,
        spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling,
        patch_size=patch_size,
        scaling_factor=0.7,
    )
    torch.nn.init.normal_(vae.latents_mean, std=0.3)
    torch.nn.init.uniform_(vae.latents_std, 0.7, 1.3)
    return vae.eval()


def ltx_transformer(**options):
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        cross_attention_dim=DIM,
        num_layers=2,
        caption_channels=TEXT_DIM,
        **options,
    )


class TokenizerOfBytes:
    """Stands for a tokenizer where a pipeline takes words only."""

    model_max_length = TEXT_TOKENS

    def __call__(self, texts, max_length=TEXT_TOKENS, **options):
        rows = [(text.encode() + bytes(max_length))[:max_length] for text in texts]
        ids = torch.tensor([list(row) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def batch_decode(self, ids, **options):
        return [""] * len(ids)


class EncoderOfBytes(torch.nn.Module):
    """Stands for a text encoder: a random embedding of each token."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, TEXT_DIM)

    dtype = property(lambda self: self.embedding.weight.dtype)
    device = property(lambda self: self.embedding.weight.device)

    def forward(self, input_ids, **options):
        return (self.embedding(input_ids),)


def _video(batch):
    return [image(seed, HEIGHT, WIDTH) for seed in range(5)]


class SmallLong(Small):
    """The pipeline leaves out the last of its steps."""

    def run(self, pipe, steps=12, **options):
        return super().run(pipe, steps + 1, **options)


def _ltx(pipeline, named=None, *, negative=False, options=None, parts=dict, width=WIDTH, kind=Small, **rest):
    embed = partial(embeddings, pooled=False, mask="prompt_attention_mask")
    arguments = partial(_image_arguments, named=named or {}, embed=embed, negative=negative)
    return kind(
        pipeline,
        lambda: {"vae": ltx_vae(), **parts()},
        ltx_transformer,
        rest.pop("arguments", arguments),
        {"height": HEIGHT, "width": width, "num_frames": FRAMES},
        options={"guidance_scale": 3.0 if negative else 1.0, **(options or {})},
        streams=("cond_uncond",),
        **rest,
    )


def _images(batch):
    return [image(1 + i, HEIGHT, WIDTH) for i in range(batch)]


def _one_image(batch):
    return image(1, HEIGHT, WIDTH)


def _conditions(batch):
    """The first frame, softly, and the frames of a clip later on."""
    return [
        LTXVideoCondition(image=image(1, HEIGHT, WIDTH), frame_index=0, strength=0.8),
        LTXVideoCondition(video=_video(batch), frame_index=4, strength=1.0),
    ]


def _long_parts():
    return {
        "vae": ltx_vae(patch_size=1),  # it is decoded in tiles, which must have some latents
        "tokenizer": TokenizerOfBytes(),
        "text_encoder": EncoderOfBytes(),
        "scheduler": diffusers.LTXEulerAncestralRFScheduler(eta=0.0),  # otherwise it adds noise in each step
    }


def _long(negative, **rest):
    return _ltx(
        "LTXI2VLongMultiPromptPipeline",
        negative=negative,
        arguments=lambda batch: {"prompt": "one|two"} | ({"negative_prompt": "three"} if negative else {}),
        parts=_long_parts,
        width=HEIGHT,
        kind=SmallLong,
        options={"temporal_tile_size": 8, "temporal_overlap": 4, "cond_image": image(1, HEIGHT, HEIGHT)},
        most=1,
        runs=2,
        **rest,
    )


_DYNAMIC = {"scheduler_options": {"use_dynamic_shifting": True}}

CASES = {
    "ltx": _ltx("LTXPipeline", **_DYNAMIC),
    "ltx cfg": _ltx("LTXPipeline", negative=True, **_DYNAMIC),
    "ltx image": _ltx("LTXImageToVideoPipeline", {"image": _images}, **_DYNAMIC),
    "ltx image cfg": _ltx("LTXImageToVideoPipeline", {"image": _images}, negative=True, **_DYNAMIC),
    "ltx condition without": _ltx("LTXConditionPipeline"),
    "ltx condition cfg": _ltx("LTXConditionPipeline", {"conditions": _conditions}, negative=True, most=1),
    "ltx condition image cfg": _ltx("LTXConditionPipeline", {"image": _one_image}, negative=True),
    "ltx long": _long(False),
    "ltx long cfg": _long(True),
}

FAMILY, QUICK, RECORDED = "ltx-video", "ltx image", "ltx cfg"
