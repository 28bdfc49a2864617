"""Small Kandinsky 5 pipelines of random weights, for images and videos."""

from functools import partial

import diffusers
import torch

from small_pipelines import (
    DIM,
    FRAMES,
    LATENT_CHANNELS,
    TEXT_DIM,
    TEXT_TOKENS,
    VIDEO_HEIGHT,
    VIDEO_WIDTH,
    Small,
    _image_arguments,
    image,
    leave_slow_waves,
    video_vae,
)

HEIGHT, WIDTH = 32, 64
"""Of images."""


def image_vae_of_eight():
    """A VAE of eight pixels per latent and side, on which the pipelines insist."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=0.7,
    ).eval()


def kandinsky5_transformer(**options):
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=LATENT_CHANNELS,
        out_visual_dim=LATENT_CHANNELS,
        in_text_dim=TEXT_DIM,
        in_text_dim2=TEXT_DIM,
        time_dim=12,
        model_dim=DIM,
        ff_dim=2 * DIM,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        **options,
    )
    leave_slow_waves(transformer.time_embeddings.in_layer)
    with torch.no_grad():
        transformer.out_layer.out_layer.weight.mul_(0.3)
    for name, part in transformer.named_modules():
        if name.endswith("modulation"):  # they begin with zeros
            torch.nn.init.normal_(part.out_layer.weight, std=0.2)
    return transformer


class SmallImage(Small):
    """The pipelines for images take few sizes only."""

    def build(self):
        pipe = super().build()
        pipe.resolutions = [(WIDTH, HEIGHT)]
        return pipe


def _embeddings(batch, negative=False):
    generator, sign = torch.Generator().manual_seed(100 + negative), "negative_" if negative else ""
    return {
        f"{sign}prompt_embeds_qwen": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
        f"{sign}prompt_embeds_clip": torch.randn(batch, TEXT_DIM, generator=generator),
        f"{sign}prompt_cu_seqlens": torch.arange(batch + 1, dtype=torch.int32) * TEXT_TOKENS,
    }


class SmallOfWords(Small):
    """Its embeddings are made from words: given ones come with numbers of tokens, which are no tensor per sample."""

    def build(self):
        pipe = super().build()
        pipe.encode_prompt = lambda prompt, **options: tuple(_embeddings(len(prompt), prompt[0] != "words").values())
        return pipe


def _kandinsky5(pipeline, named=None, *, negative=False, is_image=False, frames=FRAMES, kind=Small, **rest):
    kind, vae = (SmallImage, image_vae_of_eight) if is_image else (kind, video_vae)
    video = {"height": VIDEO_HEIGHT, "width": VIDEO_WIDTH, "num_frames": frames}
    return kind(
        pipeline,
        lambda: {"vae": vae()},
        kandinsky5_transformer,
        rest.pop("arguments", partial(_image_arguments, named=named or {}, embed=_embeddings, negative=negative)),
        {"height": HEIGHT, "width": WIDTH} if is_image else video,
        options={"guidance_scale": 3.0 if negative else 1.0},
        scheduler_options={"shift": 3.0},
        streams=("main", "main-2")[: 1 + negative],
        **rest,
    )


def _images(batch):
    return [image(1 + i, HEIGHT, WIDTH) for i in range(batch)]


def _video_images(batch):
    return [image(1 + i, VIDEO_HEIGHT, VIDEO_WIDTH) for i in range(batch)]


_GIVEN = {"visual_cond": True}

CASES = {
    "kandinsky5 words cfg": _kandinsky5(
        "Kandinsky5T2VPipeline",
        negative=True,
        kind=SmallOfWords,
        arguments=lambda batch: {"prompt": ["words"] * batch},
        transformer_options=_GIVEN,
    ),
    "kandinsky5": _kandinsky5("Kandinsky5T2VPipeline"),
    "kandinsky5 cfg": _kandinsky5("Kandinsky5T2VPipeline", negative=True, transformer_options=_GIVEN),
    "kandinsky5 image to video cfg": _kandinsky5(
        "Kandinsky5I2VPipeline", {"image": _video_images}, negative=True, transformer_options=_GIVEN, frames=21
    ),
    "kandinsky5 image cfg": _kandinsky5("Kandinsky5T2IPipeline", negative=True, is_image=True),
    "kandinsky5 image to image cfg": _kandinsky5(
        "Kandinsky5I2IPipeline", {"image": _images}, negative=True, is_image=True, transformer_options=_GIVEN
    ),
}

FAMILY, QUICK, RECORDED = "kandinsky5", "kandinsky5", "kandinsky5 words cfg"
