"""Small pipelines of HunyuanVideo-1.5. Their guidance is an object that the pipeline has."""

import diffusers
import torch

from small_pipelines import (
    DIM,
    FRAMES,
    HEIGHT,
    TEXT_DIM,
    TEXT_TOKENS,
    WIDTH,
    Small,
    _vision_parts,
    image,
    leave_slow_waves,
)

WIDTHS = {"num_attention_heads": 2, "attention_head_dim": DIM // 2, "num_layers": 2, "num_refiner_layers": 1}
GLYPH_DIM, _GLYPHS = 12, 3
_IMAGE_DIM = 8
_CHANNELS = 6


def guider(scale):
    return diffusers.ClassifierFreeGuidance(guidance_scale=scale)


def embeddings(batch, negative=False, glyphs=True, masked=False):
    """Prompts and letters; with `masked`, without the letters and the last word."""
    generator, sign = torch.Generator().manual_seed(200 + negative), "negative_" if negative else ""
    mask, letters = torch.ones(batch, TEXT_TOKENS), torch.ones(batch, _GLYPHS)
    if masked:
        mask[:, -1], letters = 0, letters * 0
    made = {"prompt_embeds": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator), "prompt_embeds_mask": mask}
    if glyphs:
        made["prompt_embeds_2"] = torch.randn(batch, _GLYPHS, GLYPH_DIM, generator=generator)
        made["prompt_embeds_mask_2"] = letters
    return {sign + name: value for name, value in made.items()}


def prompts(negative, named=None, **options):
    def arguments(batch):
        made = embeddings(batch, **options) | (embeddings(batch, negative=True, **options) if negative else {})
        return made | {name: make(batch) for name, make in (named or {}).items()}

    return arguments


def streams(negative):
    return ("pred_cond", "pred_uncond")[: 1 + negative]


def video_vae():
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=_CHANNELS,
        block_out_channels=(24, 24, 24),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
    ).eval()


def video_transformer(**options):
    made = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * _CHANNELS + 1,
        out_channels=_CHANNELS,
        **WIDTHS,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=_IMAGE_DIM,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        **options,
    )
    if made.time_embed.use_meanflow:
        leave_slow_waves(made.time_embed.timestep_embedder_r.linear_1)
    return narrow_glyphs(made)


def narrow_glyphs(transformer):
    """Makes the embedder of letters as wide as the rest: its class has 2048 channels, by far the most of all."""
    if transformer.context_embedder_2 is not None:
        transformer.context_embedder_2 = type(transformer.context_embedder_2)(GLYPH_DIM, DIM, DIM)
    return transformer


def _video(pipeline, negative, size, named=None, parts=dict, masked=False, **rest):
    return Small(
        pipeline,
        lambda: {**parts(), "vae": video_vae(), "guider": guider(3.0 if negative else 1.0)},
        video_transformer,
        prompts(negative, named, masked=masked),
        {"num_frames": FRAMES, **size},
        scheduler_options={"shift": 5.0},
        streams=streams(negative),
        **rest,
    )


def _few_image_tokens(pipe):
    pipe.vision_num_semantic_tokens = 5  # of an image that is not given: zeros


_SIZE = {"height": HEIGHT, "width": WIDTH}
_FIRST = {"image": lambda batch: image(1)}
_MEANFLOW = {"transformer_options": {"use_meanflow": True}}

CASES = {
    "hunyuan 1.5": _video("HunyuanVideo15Pipeline", False, _SIZE, prepare=_few_image_tokens),
    "hunyuan 1.5 cfg": _video("HunyuanVideo15Pipeline", True, _SIZE, masked=True, prepare=_few_image_tokens),
    "hunyuan 1.5 image": _video("HunyuanVideo15ImageToVideoPipeline", False, {}, _FIRST, _vision_parts, **_MEANFLOW),
    "hunyuan 1.5 image cfg": _video("HunyuanVideo15ImageToVideoPipeline", True, {}, _FIRST, _vision_parts),
}

FAMILY, QUICK, RECORDED = "hunyuan-video-1.5", "hunyuan 1.5 cfg", "hunyuan 1.5 image cfg"
