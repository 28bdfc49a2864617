"""The small video model: a 2.6 M-parameter HunyuanVideo transformer that draws videos of moving handwritten digits.

The pipeline is a plain `diffusers.HunyuanVideoPipeline`, with the shift of the noise levels that HunyuanVideo has. Its
text encoders are `None`: a prompt is one of ten class embeddings. Its autoencoder moves each square of 4x4 pixels into
the channels of one latent and back, and leaves time as it is, so that every quality figure is about pixels.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import load_file

from lesa.demo.digits import WEIGHTS

SIDE = 16
"""Height and width of a frame, in pixels."""
FRAMES = 12
NUM_CLASSES = 10
EMBEDDING_DIM = 64
SHIFT = 7.0
"""Of the noise levels, as in HunyuanVideo."""

PIPELINE_DIR = WEIGHTS / "video"
EMBEDDINGS_FILE = WEIGHTS / "video-embeddings.safetensors"

PATCH = 4
"""Height and width of the square of pixels that one latent holds."""

TRANSFORMER_CONFIG = {
    "in_channels": PATCH**2,
    "out_channels": PATCH**2,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_refiner_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "text_embed_dim": EMBEDDING_DIM,
    "pooled_projection_dim": EMBEDDING_DIM,
    "guidance_embeds": False,
    "rope_axes_dim": (12, 10, 10),
}


def pixel_autoencoder() -> AutoencoderKLLTXVideo:
    """An autoencoder whose latents are the squares of 4x4 grey pixels, in both directions within 1e-4 in float32.

    `AutoencoderKLLTXVideo` moves the pixels by itself; weights make the rest of it the identity. Of the 33 channels
    that reach the last norm, 16 hold x, 16 hold -x, and one holds a number so large that the norm does little but
    divide by it. The activation turns them into silu(x) and silu(-x), whose difference is x. HunyuanVideo's own class
    has no form that keeps every frame.
    """
    count, colours, large = PATCH**2, 3, 1280.0
    width = 2 * count + 1
    vae = AutoencoderKLLTXVideo(
        latent_channels=count,
        block_out_channels=(width,),
        down_block_types=("LTXVideoDownBlock3D",),
        decoder_block_out_channels=(width,),
        layers_per_block=(0, 0),
        decoder_layers_per_block=(0, 0),
        spatio_temporal_scaling=(False,),
        decoder_spatio_temporal_scaling=(False,),
        decoder_inject_noise=(False, False),
        downsample_type=("conv",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=PATCH,
    )
    same = torch.eye(count)
    grey = same.repeat(1, colours) / colours  # the encoder takes the mean of the three colours
    norm = large / width**0.5
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        # The encoder looks at the newest frame of three, the decoder at the one in the middle.
        for part, frame, into, out in ((vae.encoder, -1, grey, same), (vae.decoder, 1, same, same.repeat(colours, 1))):
            part.conv_in.conv.weight[: 2 * count, :, frame, 1, 1] = torch.cat([into, -into])
            part.conv_in.conv.bias[-1] = large
            part.conv_out.conv.weight[: len(out), : 2 * count, frame, 1, 1] = torch.cat([out, -out], 1) * norm
        vae.encoder.conv_out.conv.bias[-1] = -30.0  # the logarithm of the variance
    return vae.eval()


def build_pipeline(transformer: HunyuanVideoTransformer3DModel) -> HunyuanVideoPipeline:
    """A `HunyuanVideoPipeline` around `transformer`, without text encoders."""
    return HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=pixel_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def load_pipeline(folder: Path = PIPELINE_DIR) -> HunyuanVideoPipeline:
    """The video pipeline in float32, with its progress bar off."""
    # Loading the folder as a whole warns that the autoencoder is of another class than the pipeline expects.
    pipe = build_pipeline(HunyuanVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_for(labels: Iterable[int], embeddings_file: Path = EMBEDDINGS_FILE) -> list[dict]:
    """Pipeline arguments that ask for videos of the given digits, one dict per video."""
    embeddings = load_file(embeddings_file)["class_embeddings"].float()
    return [
        {
            "prompt_embeds": embeddings[label][None, None],
            "prompt_attention_mask": torch.ones(1, 1),
            "pooled_prompt_embeds": embeddings[label][None],
            "height": SIDE,
            "width": SIDE,
            "num_frames": FRAMES,
        }
        for label in labels
    ]
