"""The small real model: a 2.3 M-parameter FLUX transformer that draws handwritten digits.

The pipeline is a plain `diffusers.FluxPipeline`. Its text encoders are `None`: a prompt is one of ten class embeddings,
passed as `prompt_embeds` and `pooled_prompt_embeds`. Its autoencoder is an `AutoencoderTiny` whose weights make it the
identity, so that latents are pixels in [-1, 1] and every quality figure of the demo is about pixels.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

SIDE = 16
"""Height and width of an image, in pixels."""
NUM_CLASSES = 10
EMBEDDING_DIM = 64

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE_DIR = WEIGHTS / "digits"
EMBEDDINGS_FILE = WEIGHTS / "digits-embeddings.safetensors"

TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": EMBEDDING_DIM,
    "pooled_projection_dim": EMBEDDING_DIM,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}


def identity_autoencoder() -> AutoencoderTiny:
    """An autoencoder for one-channel latents that returns them as grey RGB pixels, unchanged up to 1e-4.

    Two hidden channels hold relu(x) and relu(-x), whose difference is x. The scaling factor keeps the decoder's
    built-in tanh in its linear part.
    """
    scaling = 64.0
    vae = AutoencoderTiny(
        latent_channels=1,
        encoder_block_out_channels=(2,),
        decoder_block_out_channels=(2,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=scaling,
        shift_factor=0.0,
    )
    split, merge = vae.decoder.layers[0], vae.decoder.layers[2]
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        split.weight[:, 0, 1, 1] = torch.tensor([1.0, -1.0])
        merge.weight[:, :, 1, 1] = torch.tensor([0.5, -0.5]) * scaling  # the decoder's range is [0, 1]
        merge.bias.fill_(0.5)
    return vae.eval()


def build_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """A `FluxPipeline` around `transformer`, without text encoders."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=identity_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def load_pipeline(folder: Path = PIPELINE_DIR) -> FluxPipeline:
    """The digits pipeline in float32, with its progress bar off."""
    # Loading the folder as a whole warns that the autoencoder is of another class than the pipeline expects.
    pipe = build_pipeline(FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_for(labels: Iterable[int], embeddings_file: Path = EMBEDDINGS_FILE) -> list[dict]:
    """Pipeline arguments that ask for the given digits, one dict per digit."""
    embeddings = load_file(embeddings_file)["class_embeddings"].float()
    return [
        {
            "prompt_embeds": embeddings[label][None, None],
            "pooled_prompt_embeds": embeddings[label][None],
            "height": SIDE,
            "width": SIDE,
        }
        for label in labels
    ]
