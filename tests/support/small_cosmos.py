"""Small Cosmos pipelines of random weights. Their transformers have no padding mask, which needs torchvision."""

from functools import partial
from types import SimpleNamespace

import diffusers
import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import CosmosSafetyChecker
from diffusers.utils import is_torchvision_available

from small_pipelines import (
    DIM,
    FRAMES,
    LATENT_CHANNELS,
    TEXT_DIM,
    VIDEO_HEIGHT,
    VIDEO_WIDTH,
    Small,
    _image_arguments,
    embeddings,
    image,
    opened,
)
from small_sana import wan_vae


class Harmless(CosmosSafetyChecker, torch.nn.Module):
    """Stands for the guardrail, a package of its own. It finds no fault with random pixels."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        torch.nn.Module.__init__(self)

    def check_text_safety(self, text):
        return True

    def check_video_safety(self, video):
        return video


def cosmos_vae():
    return diffusers.AutoencoderKLCosmos(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(4,) * 4,
        decode_block_out_channels=(4,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    ).eval()


_SMALL = {"num_attention_heads": 2, "attention_head_dim": DIM // 2, "text_embed_dim": TEXT_DIM, "adaln_lora_dim": 4}


def cosmos_transformer(**options):
    """A slow function of its timesteps, which are around 1, and of the latents."""
    transformer = diffusers.CosmosTransformer3DModel(
        **{
            **_SMALL,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": 2,
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,
            **options,
        }
    )
    is_slow = (torch.exp(torch.arange(DIM // 2) / (DIM // 2) * torch.log(torch.tensor(10000.0))) > 5).repeat(2)
    with torch.no_grad():
        transformer.time_embed.norm.weight.mul_(is_slow)
        transformer.time_embed.t_embedder.linear_1.weight.mul_(is_slow)
        transformer.patch_embed.proj.weight.mul_(0.2)
        transformer.proj_out.weight.mul_(0.1)
    return transformer


def _cosmos(pipeline, named=None, *, negative=False, parts=dict, size=None, options=None, **rest):
    return Small(
        pipeline,
        lambda: {"vae": wan_vae(), "safety_checker": Harmless(), **parts()},
        cosmos_transformer,
        partial(_image_arguments, named=named or {}, embed=partial(embeddings, pooled=False), negative=negative),
        {"height": VIDEO_HEIGHT, "width": VIDEO_WIDTH, "num_frames": FRAMES} if size is None else size,
        options={"guidance_scale": 3.0 if negative else 1.0, **(options or {})},
        streams=("main", "main-2")[: 1 + negative],
        **rest,
    )


def _edm():
    """The models have sigmas from 80 to 0.002, along which random ones do not change evenly."""
    return {
        "vae": cosmos_vae(),
        "scheduler": diffusers.EDMEulerScheduler(
            sigma_min=0.3, sigma_max=5.0, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
    }


def _solver():
    return {
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
    }


def _controlled():
    controlnet = diffusers.CosmosControlNetModel(
        **_SMALL,
        n_controlnet_blocks=1,
        in_channels=LATENT_CHANNELS + 2,
        latent_channels=LATENT_CHANNELS + 2,
        model_channels=DIM,
    )
    if not is_torchvision_available():  # it scales a mask
        nearest = SimpleNamespace(resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size))
        controlnet_cosmos.transforms = SimpleNamespace(
            functional=nearest, InterpolationMode=SimpleNamespace(NEAREST=None)
        )
    return {"controlnet": opened(controlnet), **_solver()}


def _video(batch):
    return [image(seed, VIDEO_HEIGHT, VIDEO_WIDTH) for seed in range(FRAMES)]


def _image(batch):
    return image(1, VIDEO_HEIGHT, VIDEO_WIDTH)


_GIVEN = {"in_channels": LATENT_CHANNELS + 1}
_KARRAS = {"scheduler_options": {"use_karras_sigmas": True}}

CASES = {
    "cosmos": _cosmos("CosmosTextToWorldPipeline", parts=_edm),
    "cosmos cfg": _cosmos("CosmosTextToWorldPipeline", negative=True, parts=_edm),
    "cosmos video cfg": _cosmos(
        "CosmosVideoToWorldPipeline", {"image": _image}, negative=True, parts=_edm, transformer_options=_GIVEN, most=1
    ),
    "cosmos2 image cfg": _cosmos(
        "Cosmos2TextToImagePipeline",
        negative=True,
        size={"height": VIDEO_HEIGHT, "width": VIDEO_WIDTH},
        **_KARRAS,
    ),
    "cosmos2 video cfg": _cosmos(
        "Cosmos2VideoToWorldPipeline",
        {"image": _image},
        negative=True,
        transformer_options=_GIVEN,
        most=1,
        **_KARRAS,
    ),
    "cosmos2.5 cfg": _cosmos("Cosmos2_5_PredictBasePipeline", negative=True, parts=_solver, transformer_options=_GIVEN),
    "cosmos2.5 video cfg": _cosmos(
        "Cosmos2_5_PredictBasePipeline",
        {"video": _video},
        negative=True,
        parts=_solver,
        options={"num_latent_conditional_frames": 1, "conditional_frame_timestep": 0.1},
        transformer_options=_GIVEN,
        most=1,
    ),
    "cosmos transfer cfg": _cosmos(
        "Cosmos2_5_TransferPipeline",
        {"controls": _video},
        negative=True,
        parts=_controlled,
        options={"num_frames_per_chunk": FRAMES},
        transformer_options=_GIVEN | {"controlnet_block_every_n": 2},
        most=1,
    ),
}

FAMILY, QUICK, RECORDED = "cosmos", "cosmos", "cosmos2 image cfg"
