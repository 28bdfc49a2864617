"""Small pipelines of LTX-2, which make a video and its sound."""

from functools import cache

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from small_pipelines import DIM, TEXT_DIM, TEXT_TOKENS, Small, image

FAMILY, QUICK, RECORDED = "ltx-2", "ltx-2 cfg", "ltx-2 cfg"

HEIGHT, WIDTH, FRAMES = 32, 64, 5
LATENT_CHANNELS, SOUND_CHANNELS = 4, 2
LAYERS = 2
"""Of a text encoder, whose hidden states are packed into the embedded prompts."""


def transformer(**options):
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        cross_attention_dim=DIM,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=DIM // 4,
        audio_cross_attention_dim=DIM // 2,
        num_layers=2,
        caption_channels=TEXT_DIM,
        rope_double_precision=False,
        rope_type="split",
        **options,
    )


def video_vae():
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=4,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def connectors():
    sizes = {
        f"{name}_connector_{key}": value
        for name in ("video", "audio")
        for key, value in {
            "num_attention_heads": 2,
            "attention_head_dim": TEXT_DIM // 2,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    return LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=LAYERS,
        **sizes,
        connector_rope_base_seq_len=16,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    ).eval()


def parts():
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=SOUND_CHANNELS,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=SOUND_CHANNELS,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    ).eval()
    vocoder = LTX2Vocoder(
        in_channels=SOUND_CHANNELS * 8,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    ).eval()
    return {"vae": video_vae(), "audio_vae": audio_vae, "connectors": connectors(), "vocoder": vocoder}


@cache
def _prompts(batch, negative):
    generator = torch.Generator().manual_seed(100 + negative)
    prompts = torch.randn(batch, TEXT_TOKENS, LAYERS * TEXT_DIM, generator=generator)
    sign = "negative_" if negative else ""
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.int64)
    return {f"{sign}prompt_embeds": prompts, f"{sign}prompt_attention_mask": mask}


def _case(pipeline, named=None, *, guidance=3.0, options=None, **rest):
    return Small(
        pipeline,
        parts,
        transformer,
        lambda batch: {
            **_prompts(batch, False),
            **(_prompts(batch, True) if guidance > 1 else {}),
            **{name: make() for name, make in (named or {}).items()},
        },
        {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES},
        options={
            "frame_rate": 25.0,
            "guidance_scale": guidance,
            "audio_guidance_scale": guidance,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_modality_scale": 1.0,
            **(options or {}),
        },
        streams=("cond_uncond",),
        **rest,
    )


def _image():
    return image(1, HEIGHT, WIDTH)


def _condition():
    return [LTX2VideoCondition(_image(), index=0, strength=1.0, crf=0)]


CASES = {
    "ltx-2": _case("LTX2Pipeline", guidance=1.0),
    "ltx-2 cfg": _case("LTX2Pipeline"),
    "ltx-2 condition cfg": _case("LTX2ConditionPipeline", {"conditions": _condition}),
    "ltx-2 image cfg": _case("LTX2ImageToVideoPipeline", {"image": _image}, options={"image_crf": 0}),
}
