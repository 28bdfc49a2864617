"""Small ERNIE-Image pipelines of random weights, with and without guidance."""

import diffusers
import torch

from small_flux2 import vae
from small_pipelines import DIM, HEIGHT, LATENT_CHANNELS, TEXT_DIM, WIDTH, Small


def _transformer(**options):
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=DIM,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=48,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS,
        text_in_dim=TEXT_DIM,
        rope_axes_dim=(4, 6, 6),
        **options,
    )
    with torch.no_grad():
        for layer in (model.adaLN_modulation[-1], model.final_linear):  # they begin with zeros
            layer.weight.normal_(std=0.2)
        model.time_embedding.linear_1.weight.mul_((torch.arange(DIM // 2) > 9).repeat(2))  # slow waves alone
    return model.eval()


def _captions(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6 - number % 2, TEXT_DIM, generator=generator) for number in range(batch)]


def _ernie(*, negative=False):
    def arguments(batch):
        made = {"prompt_embeds": _captions(batch, 100)}
        return {**made, **({"negative_prompt_embeds": _captions(batch, 101)} if negative else {})}

    return Small(
        "ErnieImagePipeline",
        lambda: {"vae": vae()},
        _transformer,
        arguments,
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 2.0 if negative else 1.0},
    )


CASES = {"ernie image": _ernie(), "ernie image cfg": _ernie(negative=True)}

FAMILY, QUICK, RECORDED = "ernie-image", "ernie image cfg", "ernie image cfg"
