"""The harder small model: a 3.1 M-parameter Qwen-Image transformer that draws 32x32 details of ten photographs.

The pipeline is a plain `diffusers.QwenImagePipeline` with true classifier-free guidance. It has no text encoder: a
prompt is one of ten class embeddings, and the negative prompt is the embedding of no class. Its autoencoder moves each
square of 2x2 pixels into the channels of one latent and back, so that latents are pixels in [-1, 1] and every quality
figure is about pixels.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file

from lesa.demo.digits import WEIGHTS

SIDE = 32
"""Height and width of an image, in pixels."""
NAMES = ("china", "flower", "astronaut", "camera", "cat", "coffee", "galaxies", "retina", "rocket", "tissue")
"""The photograph that each label stands for."""
NUM_CLASSES = len(NAMES)
NOTHING = NUM_CLASSES
"""Row of the negative prompt among the embeddings."""
EMBEDDING_DIM = 64
GUIDANCE = 2.5
"""The `true_cfg_scale` of `inputs_for`."""

PIPELINE_DIR = WEIGHTS / "photos"
EMBEDDINGS_FILE = WEIGHTS / "photos-embeddings.safetensors"

_LATENT_CHANNELS = 3 * 2 * 2

TRANSFORMER_CONFIG = {
    "patch_size": 2,
    "in_channels": _LATENT_CHANNELS * 4,
    "out_channels": _LATENT_CHANNELS,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": EMBEDDING_DIM,
    "axes_dims_rope": (8, 12, 12),
}


def pixel_autoencoder() -> AutoencoderKLWan:
    """An autoencoder whose latents are the squares of 2x2 pixels, in both directions within 1e-5 in float32.

    `AutoencoderKLWan` moves the pixels by itself; weights make the rest of it the identity. Residual branches are zero.
    Of the 25 channels that reach the last norm, 12 hold x, 12 hold -x, and one holds a number so large that the norm
    does little but divide by it. The activation turns them into silu(x) and silu(-x), whose difference is x.
    """
    count, large = _LATENT_CHANNELS, 1280.0
    vae = AutoencoderKLWan(
        base_dim=2 * count + 1,
        z_dim=count,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[False],  # the pipeline takes its length for the number of halvings
        latents_mean=[0.0] * count,
        latents_std=[1.0] * count,
        in_channels=count,
        out_channels=count,
        patch_size=2,
        scale_factor_temporal=1,
        scale_factor_spatial=2,
    )
    same = torch.eye(count)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for part in (vae.encoder, vae.decoder):
            part.conv_in.weight[: 2 * count, :, -1, 1, 1] = torch.cat([same, -same])  # the newest frame, the middle
            part.conv_in.bias[-1] = large
            part.norm_out.gamma.fill_(large / part.norm_out.scale)
            part.conv_out.weight[:count, : 2 * count, -1, 1, 1] = torch.cat([same, -same], 1)
        vae.encoder.conv_out.bias[count:] = -30.0  # the logarithm of the variance
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight[..., 0, 0, 0] = torch.eye(len(conv.weight))
    return vae.eval()


def build_pipeline(transformer: QwenImageTransformer2DModel) -> QwenImagePipeline:
    """A `QwenImagePipeline` around `transformer`, without a text encoder."""
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=pixel_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def load_pipeline(folder: Path = PIPELINE_DIR) -> QwenImagePipeline:
    """The photographs' pipeline in float32, with its progress bar off."""
    # Loading the folder as a whole warns that the autoencoder is of another class than the pipeline expects.
    pipe = build_pipeline(QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_for(labels: Iterable[int], embeddings_file: Path = EMBEDDINGS_FILE) -> list[dict]:
    """Pipeline arguments that ask for details of the given photographs under guidance, one dict per detail."""
    embeddings = load_file(embeddings_file)["class_embeddings"].float()
    return [
        {
            "prompt_embeds": embeddings[label][None, None],
            "prompt_embeds_mask": torch.ones(1, 1),
            "negative_prompt_embeds": embeddings[NOTHING][None, None],
            "negative_prompt_embeds_mask": torch.ones(1, 1),
            "true_cfg_scale": GUIDANCE,
            "height": SIDE,
            "width": SIDE,
        }
        for label in labels
    ]
