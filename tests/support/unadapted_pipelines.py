"""More small pipelines of random weights whose transformers have no adapter, beside those of `probed_pipelines`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import diffusers
import torch
from diffusers.models.embeddings import TimestepEmbedding
from transformers import BatchEncoding

from small_hunyuan_dit import scheduler as without_noise
from small_hunyuan_dit import vae as four_channels_vae
from small_pipelines import DIM, TEXT_DIM, TEXT_TOKENS, Small, embeddings, leave_slow_waves

_CHANNELS = 4
_WAVES = 256
"""So many has the embedding of the time in most transformers."""
_HEADS = {"num_attention_heads": 2, "attention_head_dim": DIM // 2}


@dataclass(frozen=True)
class Probed(Small):
    """One way to run a pipeline class whose transformer has no adapter.

    Args:
        damped: `damped(transformer)` -> the layer that reads the latents. It hears little of them, as the way of the
            latents is less straight without flow matching.
        heard: how much it hears.
    """

    damped: Callable | None = None
    heard: float = 0.25

    def build(self):
        """A new pipeline; always with the same weights."""
        torch.manual_seed(0)
        transformer = self.transformer(**self.transformer_options)
        with torch.no_grad():
            for weight in transformer.parameters():
                if weight.ndim > 1 and not weight.any():
                    torch.nn.init.normal_(weight, std=0.1)
            if self.damped is not None:
                self.damped(transformer).weight.mul_(self.heard)
        for module in transformer.modules():
            if isinstance(module, TimestepEmbedding):
                leave_slow_waves(module.linear_1)
            elif isinstance(module, torch.nn.Linear) and module.in_features == _WAVES:
                leave_slow_waves(module)
        parts = {**self.parts(), "transformer": transformer.eval()}
        if "scheduler" not in parts:
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(**self.scheduler_options)
        absent = dict.fromkeys({*self.pipeline_class._get_signature_keys(self.pipeline_class)[0]} - {*parts})
        pipe = self.pipeline_class(**parts, **absent)
        pipe.set_progress_bar_config(disable=True)
        transformer.requires_grad_(False)
        if self.prepare is not None:
            self.prepare(pipe)
        return pipe

    def latents(self, pipe, **options):
        """The latents of a run, or its images where the class gives nothing else."""
        return torch.as_tensor(super().latents(pipe, **options))


def _prompts(batch, negative=False, mask=None):
    made = {**embeddings(batch, pooled=False, mask=mask)}
    return made | embeddings(batch, negative=True, pooled=False, mask=mask) if negative else made


_NO_WORDS = {"negative_prompt": None}


def _case(pipeline, transformer, parts, size, negative=False, mask=None, named=None, options=None, **rest):
    return Probed(
        pipeline,
        parts,
        transformer,
        lambda batch: {**_prompts(batch, negative, mask), **(named(batch) if named else {})},
        size,
        options={"guidance_scale": 3.0 if negative else 1.0, **(options or {})},
        **rest,
    )


# PixArt


def _pixart(**options):
    return diffusers.PixArtTransformer2DModel(
        **_HEADS,
        in_channels=_CHANNELS,
        out_channels=2 * _CHANNELS,
        num_layers=3,
        cross_attention_dim=DIM,
        caption_channels=TEXT_DIM,
        sample_size=8,
        use_additional_conditions=False,
        **options,
    )


_pixart_case = partial(
    _case,
    transformer=_pixart,
    size={"height": 32, "width": 48},
    mask="prompt_attention_mask",
    damped=lambda transformer: transformer.pos_embed.proj,
)


def _image_parts(**more):
    return {"vae": four_channels_vae(), "scheduler": without_noise(), **more}


_NO_BINS = {"use_resolution_binning": False}
_PIXART = {**_NO_BINS, **_NO_WORDS}

PIXART = {
    "pixart sigma pag": _pixart_case(
        "PixArtSigmaPAGPipeline",
        parts=partial(_image_parts, pag_applied_layers=["blocks.1"]),
        negative=True,
        options={**_PIXART, "guidance_scale": 2.0, "pag_scale": 1.0},
    ),
}


# PRX


def _prx(**options):
    return diffusers.PRXTransformer2DModel(
        **{
            "in_channels": _CHANNELS,
            "patch_size": 2,
            "context_in_dim": TEXT_DIM,
            "hidden_size": DIM,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": (8, 8),
            **options,
        }
    )


_prx_case = partial(_case, transformer=_prx, negative=True, mask="prompt_attention_mask")

PRX = {
    "prx pixel cfg": _prx_case(
        "PRXPixelPipeline",
        parts=dict,
        size={"height": 8, "width": 12},
        transformer_options={"in_channels": 3},
        options=_NO_BINS,
        damped=lambda transformer: transformer.img_in,
        heard=0.05,
    ),
}


# DiT


def _dit():
    return diffusers.DiTTransformer2DModel(
        **_HEADS, in_channels=_CHANNELS, out_channels=2 * _CHANNELS, num_layers=3, sample_size=4
    )


DIT = {
    "dit cfg": Probed(
        "DiTPipeline",
        _image_parts,
        _dit,
        lambda batch: {"class_labels": [*range(1, 1 + batch)]},
        {},
        options={"guidance_scale": 3.0},
        damped=lambda transformer: transformer.pos_embed.proj,
    ),
}


# Nucleus


def _nucleus():
    made = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * _CHANNELS,
        out_channels=_CHANNELS,
        num_layers=5,
        **_HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        num_experts=4,
        moe_intermediate_dim=DIM,
        capacity_factors=[4.0] * 5,  # each expert takes all tokens; otherwise the choice jumps
    )
    for name, weight in made.named_parameters():
        if ".experts." in name:  # they are made without values
            torch.nn.init.normal_(weight, std=0.1)
    return made


NUCLEUS = {
    "nucleus image cfg": _case(
        "NucleusMoEImagePipeline",
        _nucleus,
        dict,
        {"height": 32, "width": 48},
        negative=True,
        mask="prompt_embeds_mask",
        streams=("main", "main-2"),
    ),
}


# EasyAnimate


def _magvit():
    return diffusers.AutoencoderKLMagvit(
        latent_channels=_CHANNELS,
        block_out_channels=(4, 4, 4),
        down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def _easy(**options):
    return diffusers.EasyAnimateTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": DIM // 2,
            "in_channels": _CHANNELS,
            "out_channels": _CHANNELS,
            "patch_size": 2,
            "sample_width": 12,
            "sample_height": 8,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": DIM,
            "text_embed_dim": TEXT_DIM,
            **options,
        }
    )


def _clip(frames, seed=0):
    return torch.rand(1, 3, frames, 16, 32, generator=torch.Generator().manual_seed(seed))


_easy_case = partial(
    _case,
    transformer=_easy,
    parts=lambda: {"vae": _magvit()},
    size={"height": 16, "width": 32, "num_frames": 5},
    negative=True,
    mask="prompt_attention_mask",
)

EASY_ANIMATE = {
    "easy animate cfg": _easy_case("EasyAnimatePipeline"),
    "easy animate inpaint cfg": _easy_case(
        "EasyAnimateInpaintPipeline",
        transformer_options={"in_channels": 2 * _CHANNELS + 1},
        named=lambda batch: {"video": _clip(5), "mask_video": torch.full((1, 1, 5, 16, 32), 255.0)},
    ),
}


# AnyFlow


def _anyflow():
    return diffusers.AnyFlowTransformer3DModel(
        **_HEADS,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=_WAVES,
        ffn_dim=DIM,
        num_layers=2,
        rope_max_seq_len=32,
    )


ANYFLOW = {
    "anyflow cfg": _case(
        "AnyFlowPipeline",
        _anyflow,
        lambda: {"scheduler": diffusers.FlowMapEulerDiscreteScheduler()},
        {"height": 32, "width": 48, "num_frames": 9},
        negative=True,
    ),
}


def _anyflow_far():
    return diffusers.AnyFlowFARTransformer3DModel(
        **_HEADS,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=_WAVES,
        ffn_dim=DIM,
        num_layers=2,
        rope_max_seq_len=32,
        chunk_partition=(1, 2),
    )


ANYFLOW_FAR = {
    "anyflow far cfg": _case(
        "AnyFlowFARPipeline",
        _anyflow_far,
        lambda: {"scheduler": diffusers.FlowMapEulerDiscreteScheduler()},
        {"height": 32, "width": 64, "num_frames": 9},
        negative=True,
        runs=2,
    ),
}


# Audio


def _stable_audio():
    made = diffusers.StableAudioDiTModel(
        sample_size=12,
        in_channels=_CHANNELS,
        num_layers=2,
        attention_head_dim=DIM // 2,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=_CHANNELS,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=2 * TEXT_DIM,
        cross_attention_input_dim=TEXT_DIM,
    )
    with torch.no_grad():
        made.time_proj.weight.mul_(0.03)  # it has no waves but random ones
    return made


def _stable_audio_parts():
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=_CHANNELS,
        sampling_rate=4,
    )
    return {
        "vae": vae.eval(),
        "projection_model": StableAudioProjectionModel(TEXT_DIM, TEXT_DIM, 0, 512).eval(),
        "scheduler": diffusers.EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=10, solver_order=1, prediction_type="v_prediction", sigma_schedule="exponential"
        ),
    }


STABLE_AUDIO = {
    "stable audio cfg": _case(
        "StableAudioPipeline",
        _stable_audio,
        _stable_audio_parts,
        {},
        negative=True,
        damped=lambda transformer: transformer.proj_in,
    ),
}


# FIBO 2, JoyImage


def _fibo2():
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=_CHANNELS,
        dim=DIM,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=TEXT_DIM,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=4,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=8,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )


def _bundles(batch):
    generator, made = torch.Generator().manual_seed(9), {}
    for sign in ("", "negative_"):
        made[f"{sign}prompt_embeds"] = torch.randn(batch, 2, TEXT_TOKENS, TEXT_DIM, generator=generator)
        made[f"{sign}prompt_embeds_mask"] = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool)
    return made


FIBO2 = {
    "fibo 2 cfg": _case(
        "BriaFibo2Pipeline",
        _fibo2,
        dict,
        {"height": 32, "width": 48},
        negative=True,
        named=_bundles,
        streams=("main", "main-2"),
    ),
}


def _joy():
    return diffusers.JoyImageEditTransformer3DModel(
        in_channels=_CHANNELS,
        hidden_size=DIM,
        num_attention_heads=2,
        text_dim=TEXT_DIM,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def _of_any_size(pipe):
    pipe.vae_image_processor.get_default_height_width = lambda image, height, width: (height, width)


JOY = {
    "joy image cfg": _case(
        "JoyImageEditPipeline",
        _joy,
        dict,
        {"height": 32, "width": 48},
        negative=True,
        mask="prompt_embeds_mask",
        streams=("main", "main-2"),
        prepare=_of_any_size,
    ),
}


def _joy_plus():
    return diffusers.JoyImageEditPlusTransformer3DModel(
        in_channels=_CHANNELS,
        hidden_size=DIM,
        num_attention_heads=2,
        text_dim=TEXT_DIM,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def _with_prompts(pipe):
    made = _prompts(1, mask="prompt_embeds_mask")
    pipe.encode_prompt_multiple_images = lambda prompt, **options: (made["prompt_embeds"], made["prompt_embeds_mask"])


JOY_PLUS = {
    "joy image plus": Probed(
        "JoyImageEditPlusPipeline",
        dict,
        _joy_plus,
        lambda batch: {"prompt": ["a"] * batch},
        {"height": 32, "width": 48},
        options={"guidance_scale": 1.0},
        prepare=_with_prompts,
    ),
}


# OmniGen


def _omni_gen():
    return diffusers.OmniGenTransformer2DModel(
        in_channels=_CHANNELS,
        hidden_size=DIM,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=DIM,
        num_layers=2,
        pad_token_id=0,
        vocab_size=TEXT_TOKENS,
        rope_scaling={"short_factor": [1.0] * (DIM // 4), "long_factor": [1.0] * (DIM // 4)},
        pos_embed_max_size=8,
        time_step_dim=_WAVES,
    )


class _Processor:
    """It gives the same words for each prompt; a text encoder is no part of OmniGen."""

    max_image_size = 1024

    def __call__(self, prompts, images, height, width, **options):
        tokens = TEXT_TOKENS + 1 + (height // 16) * (width // 16)
        return {
            "input_ids": torch.stack([torch.arange(TEXT_TOKENS), torch.zeros(TEXT_TOKENS, dtype=torch.long)]),
            "attention_mask": torch.ones(2, tokens, tokens),
            "position_ids": torch.arange(tokens).expand(2, -1),
            "input_pixel_values": None,
            "input_image_sizes": {},
        }


def _omni_gen_parts():
    from diffusers.pipelines.omnigen import pipeline_omnigen

    if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):  # it needs torchvision
        pipeline_omnigen.OmniGenMultiModalProcessor = lambda tokenizer, max_image_size: None
    return {"vae": four_channels_vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)}


def _with_processor(pipe):
    pipe.multimodal_processor = _Processor()
    pipe.encode_input_images = lambda pixels, device: []


OMNI_GEN = {
    "omni gen cfg": Probed(
        "OmniGenPipeline",
        _omni_gen_parts,
        _omni_gen,
        lambda batch: {"prompt": ["a"] * batch},
        {"height": 32, "width": 48},
        options={"guidance_scale": 2.5},
        prepare=_with_processor,
    ),
}


# More audio


def _stable_audio_3():
    made = diffusers.StableAudio3DiTModel(
        io_channels=_CHANNELS,
        embed_dim=DIM,
        depth=2,
        num_heads=2,
        cond_token_dim=TEXT_DIM,
        global_cond_dim=TEXT_DIM,
        local_add_cond_dim=_CHANNELS + 1,
        timestep_features_dim=8,
        num_memory_tokens=2,
    )
    with torch.no_grad():
        made.to_timestep_embed[0].weight[:, [*range(1, 4), *range(5, 8)]] = 0  # the fast waves
    return made


class _AudioVae(torch.nn.Module):
    """As much of an autoencoder as a pipeline that gives latents asks for."""

    device, dtype, downsampling_ratio, latent_hop_length = torch.device("cpu"), torch.float32, 2, 8000
    config = SimpleNamespace(sampling_rate=8, latent_dim=_CHANNELS, sample_rate=48000, downsampling_ratio=2)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode(self, audio):
        return SimpleNamespace(latents=audio[:, :1, ::2].repeat(1, _CHANNELS, 1))


def _stable_audio_3_parts():
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    return {"vae": _AudioVae(), "duration_embedder": StableAudio3DurationEmbedder(TEXT_DIM, 16).eval()}


def _with_sound(batch):
    sound = torch.rand(batch, 2, 16, generator=torch.Generator().manual_seed(3)) - 0.5
    return {**_prompts(batch), "audio": sound}


_SECONDS = {"duration": 2.0}


STABLE_AUDIO_3 = {
    "stable audio 3 cfg": _case(
        "StableAudio3Pipeline", _stable_audio_3, _stable_audio_3_parts, _SECONDS, negative=True
    ),
    "stable audio 3 to audio": Probed(
        "StableAudio3AudioToAudioPipeline", _stable_audio_3_parts, _stable_audio_3, _with_sound, _SECONDS
    ),
    "stable audio 3 inpaint": Probed(
        "StableAudio3InpaintPipeline",
        _stable_audio_3_parts,
        _stable_audio_3,
        _with_sound,
        _SECONDS,
        options={"mask_start_seconds": 0.5, "mask_end_seconds": 1.0},
    ),
}


class _Words:
    """A tokenizer that gives the same words for each prompt."""

    model_max_length = TEXT_TOKENS

    def __call__(self, prompts, **options):
        ids = torch.arange(TEXT_TOKENS).expand(len(prompts), -1)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class _TextEncoder(torch.nn.Module):
    """A text encoder of one table."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(TEXT_TOKENS, TEXT_DIM)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, **options):
        return SimpleNamespace(last_hidden_state=self.table(input_ids), hidden_states=None)


def _long_cat():
    return diffusers.LongCatAudioDiTTransformer(
        dit_dim=DIM, dit_depth=2, dit_heads=2, dit_text_dim=TEXT_DIM, latent_dim=_CHANNELS
    )


LONG_CAT = {
    "longcat audio cfg": Probed(
        "LongCatAudioDiTPipeline",
        lambda: {
            "vae": _AudioVae(),
            "text_encoder": _TextEncoder().eval(),
            "tokenizer": _Words(),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
        },
        _long_cat,
        lambda batch: {"prompt": ["a"] * batch},
        {"audio_duration_s": 0.0005},
        options={"guidance_scale": 3.0},
        streams=("main", "main-2"),
    ),
}


def _ace_step():
    return diffusers.AceStepTransformer1DModel(
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=DIM // 2,
        in_channels=3 * _CHANNELS,
        audio_acoustic_hidden_dim=_CHANNELS,
        sliding_window=4,
        encoder_hidden_size=TEXT_DIM,
    )


def _ace_step_parts():
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

    encoder = AceStepConditionEncoder(
        hidden_size=TEXT_DIM,
        intermediate_size=TEXT_DIM,
        text_hidden_dim=TEXT_DIM,
        timbre_hidden_dim=_CHANNELS,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
    )
    return {
        "condition_encoder": encoder.eval(),
        "text_encoder": _TextEncoder().eval(),
        "tokenizer": _Words(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    }


ACE_STEP = {
    "ace step cfg": Probed(
        "AceStepPipeline",
        _ace_step_parts,
        _ace_step,
        lambda batch: {"prompt": ["a"] * batch, "lyrics": ["la"] * batch},
        {"audio_duration": 0.5},
        options={"guidance_scale": 3.0},
    ),
}


# Kandinsky 6


def _kandinsky6():
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=_CHANNELS,
        out_visual_dim=_CHANNELS,
        in_text_dim=TEXT_DIM,
        in_text_dim2=TEXT_DIM,
        time_dim=DIM,
        model_dim=DIM,
        ff_dim=DIM,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=3,
        out_audio_dim=3,
    )


def _pooled_prompts(batch):
    return {**embeddings(batch), **embeddings(batch, negative=True)}


KANDINSKY6 = {
    "kandinsky 6 silent cfg": _case(
        "Kandinsky6TI2VAPipeline",
        _kandinsky6,
        dict,
        {"height": 32, "width": 48, "num_frames": 5},
        negative=True,
        named=_pooled_prompts,
        options={"sample_audio": False},
        streams=("cond", "uncond"),
    ),
}

KANDINSKY6_SOUND = {
    "kandinsky 6 with sound cfg": _case(
        "Kandinsky6TI2VAPipeline",
        _kandinsky6,
        lambda: {"audio_vae": _AudioVae(), "vocoder": _AudioVae()},
        {"height": 32, "width": 48, "num_frames": 5},
        negative=True,
        named=_pooled_prompts,
        streams=("cond", "uncond"),
    ),
}


CASES: dict[str, dict[str, Probed]] = {
    "PixArtTransformer2DModel": PIXART,
    "PRXTransformer2DModel": PRX,
    "DiTTransformer2DModel": DIT,
    "NucleusMoEImageTransformer2DModel": NUCLEUS,
    "EasyAnimateTransformer3DModel": EASY_ANIMATE,
    "AnyFlowTransformer3DModel": ANYFLOW,
    "StableAudioDiTModel": STABLE_AUDIO,
    "BriaFibo2Transformer2DModel": FIBO2,
    "JoyImageEditTransformer3DModel": JOY,
    "StableAudio3DiTModel": STABLE_AUDIO_3,
    "LongCatAudioDiTTransformer": LONG_CAT,
    "Kandinsky6Transformer3DModel": KANDINSKY6,
    "JoyImageEditPlusTransformer3DModel": JOY_PLUS,
    "OmniGenTransformer2DModel": OMNI_GEN,
    "AceStepTransformer1DModel": ACE_STEP,
}
"""For each class of transformers, the ways to run its pipelines."""

COMPUTED: dict[str, tuple[dict[str, Probed], str]] = {
    "AnyFlowFARTransformer3DModel": (ANYFLOW_FAR, "the shape changed"),
    "Kandinsky6Transformer3DModel": (KANDINSKY6_SOUND, "what the blocks make reaches the output in more than one way"),
}
"""For some classes, ways in which all steps are computed, and the reason that is given."""

ALL = {name: case for cases in CASES.values() for name, case in cases.items()}
PROBED = {kind: tuple(dict.fromkeys(case.pipeline for case in cases.values())) for kind, cases in CASES.items()}
QUICK = "prx pixel cfg"
