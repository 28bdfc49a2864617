"""Small pipelines whose transformers no adapter knows."""

from dataclasses import dataclass
from functools import partial

import diffusers
import torch
from diffusers.models.embeddings import TimestepEmbedding

from small_pipelines import (
    DIM,
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_DIM,
    TEXT_TOKENS,
    WIDTH,
    Small,
    embeddings,
    image_vae,
)

_WIDTHS = {"num_attention_heads": 2, "attention_head_dim": DIM // 2}
_MASK = "prompt_attention_mask"
_SIZE = {"height": HEIGHT, "width": WIDTH}


@dataclass(frozen=True)
class Probed(Small):
    """As `Small`, of a pipeline whose transformer no adapter knows."""

    def build(self):
        torch.manual_seed(0)
        parts = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler_options), **self.parts()}
        parts["transformer"] = slow(self.transformer(**self.transformer_options)).eval()
        absent = dict.fromkeys({*self.pipeline_class._get_signature_keys(self.pipeline_class)[0]} - {*parts})
        pipe = self.pipeline_class(**parts, **absent)
        pipe.set_progress_bar_config(disable=True)
        for part in (pipe.transformer, pipe.vae):
            part.requires_grad_(False)
        return pipe


def slow(transformer):
    """Makes the random transformer a slow function of the noise level; see `small_pipelines.smooth_in_time`."""
    for first in (module.linear_1 for module in transformer.modules() if isinstance(module, TimestepEmbedding)):
        half = first.in_features // 2
        is_slow = torch.exp(torch.arange(half) / half * torch.log(torch.tensor(10000.0))) > 300
        with torch.no_grad():
            first.weight.mul_(is_slow.repeat(2))
    return transformer


def _texts(batch, *, negative, pooled=False, mask=None, more=None):
    made = embeddings(batch, pooled=pooled, mask=mask)
    if negative:
        made = made | embeddings(batch, negative=True, pooled=pooled, mask=mask)
    return made | (more or {})


def _probed(pipeline, transformer, *, negative=False, mask=None, parts=None, size=None, more=None, **rest):
    arguments = partial(_texts, negative=negative, mask=mask, more=more)
    return Probed(pipeline, parts or _vae, transformer, arguments, _SIZE if size is None else size, **rest)


def _vae(channels=LATENT_CHANNELS):
    return {"vae": image_vae(channels)}


def aura_flow(**options):
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        **_WIDTHS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=DIM,
        pos_embed_max_size=64,
        **options,
    )


def pixart(**options):
    return diffusers.PixArtTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=2,
        **_WIDTHS,
        cross_attention_dim=DIM,
        caption_channels=TEXT_DIM,
        sample_size=16,
        **options,
    )


def latte(**options):
    return diffusers.LatteTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=2,
        **_WIDTHS,
        cross_attention_dim=DIM,
        caption_channels=TEXT_DIM,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        video_length=2,
        **options,
    )


def hunyuan_dit(**options):
    return diffusers.HunyuanDiT2DModel(
        in_channels=LATENT_CHANNELS,
        hidden_size=DIM,
        num_layers=4,
        **_WIDTHS,
        patch_size=2,
        sample_size=8,
        cross_attention_dim=TEXT_DIM,
        cross_attention_dim_t5=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        text_len=TEXT_TOKENS,
        text_len_t5=TEXT_TOKENS,
        use_style_cond_and_image_meta_size=False,
        **options,
    )


def allegro(**options):
    return diffusers.AllegroTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=TEXT_DIM,
        sample_height=2,
        sample_width=4,
        sample_frames=2,
        interpolation_scale_h=1.0,
        interpolation_scale_w=1.0,
        interpolation_scale_t=1.0,
        **options,
    )


def prx(**options):
    return diffusers.PRXTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        context_in_dim=TEXT_DIM,
        hidden_size=DIM,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
        **options,
    )


def _denoising():
    """A scheduler of the kind that the older models have, which sets noise levels like the others."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return _vae() | {"scheduler": diffusers.DPMSolverMultistepScheduler(**options)}


def _second_texts():
    """HunyuanDiT has two text encoders."""
    made = embeddings(1, pooled=False, mask=_MASK) | embeddings(1, negative=True, pooled=False, mask=_MASK)
    return {f"{name}_2": value for name, value in made.items()}


def _allegro_parts():
    vae = diffusers.AutoencoderKLAllegro(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return _denoising() | {"vae": vae.eval()}


_NO_BINS = {"use_resolution_binning": False}

CASES = {
    "aura flow cfg": _probed(
        "AuraFlowPipeline", aura_flow, negative=True, mask=_MASK, scheduler_options={"shift": 1.73}
    ),
    "pixart alpha cfg": _probed(
        "PixArtAlphaPipeline",
        pixart,
        negative=True,
        mask=_MASK,
        parts=_denoising,
        options=_NO_BINS | {"negative_prompt": None},
    ),
    "pixart sigma cfg": _probed(
        "PixArtSigmaPipeline",
        pixart,
        negative=True,
        mask=_MASK,
        parts=_denoising,
        options=_NO_BINS | {"negative_prompt": None},
    ),
    "latte cfg": _probed(
        "LattePipeline",
        latte,
        negative=True,
        parts=_denoising,
        size=_SIZE | {"video_length": 2},
        options={"negative_prompt": None, "mask_feature": False},
    ),
    "prx cfg": _probed("PRXPipeline", prx, negative=True, mask=_MASK, options=_NO_BINS),
    "hunyuan dit cfg": _probed(
        "HunyuanDiTPipeline",
        hunyuan_dit,
        negative=True,
        mask=_MASK,
        parts=lambda: _denoising() | {"requires_safety_checker": False},
        more=_second_texts(),
        options=_NO_BINS | {"negative_prompt": None},
    ),
    "allegro cfg": _probed(
        "AllegroPipeline",
        allegro,
        negative=True,
        mask=_MASK,
        parts=_allegro_parts,
        size={"height": 16, "width": 32, "num_frames": 2},
        options={"negative_prompt": None},
    ),
}

PROBED = {
    "AllegroTransformer3DModel": ("AllegroPipeline",),
    "AuraFlowTransformer2DModel": ("AuraFlowPipeline",),
    "HunyuanDiT2DModel": ("HunyuanDiTPipeline",),
    "LatteTransformer3DModel": ("LattePipeline",),
    "PRXTransformer2DModel": ("PRXPipeline",),
    "PixArtTransformer2DModel": ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
}
"""For each transformer, the pipeline classes of `CASES`."""
