"""Small Ideogram 4 pipelines of random weights."""

import diffusers
import torch

from small_pipelines import DIM, HEIGHT, LATENT_CHANNELS, TEXT_DIM, WIDTH, Small

_TEXT_TOKENS = 8


def _vae():
    made = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=LATENT_CHANNELS,
    )
    made.bn.running_mean.normal_(std=0.3)
    made.bn.running_var.uniform_(0.5, 1.5)
    return made.eval()


def _transformer(**options):
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=DIM // 2,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=24,
        llm_features_dim=TEXT_DIM,
        mrope_section=(4, 2, 2),
        **options,
    )
    with torch.no_grad():  # the slow waves of the time alone, as `smooth_in_time` does
        model.t_embedding.mlp_in.weight.mul_((torch.arange(DIM // 2) > 12).repeat(2))
    return model.eval()


def _encode(pipe):
    """In the place of the text encoder: prompts of different lengths -> random embeddings."""

    def encode_prompt(prompt, grid_h, grid_w, max_sequence_length, device):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        lengths = [max_sequence_length - 3 * number - 2 for number in range(len(prompts))]
        generator = torch.Generator().manual_seed(100)
        features = torch.randn(len(prompts), max_sequence_length, TEXT_DIM, generator=generator)
        features = torch.cat([features, features.new_zeros(len(prompts), grid_h * grid_w, TEXT_DIM)], 1)
        return features, *pipe._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)

    pipe.encode_prompt = encode_prompt


CASES = {
    "ideogram4": Small(
        "Ideogram4Pipeline",
        lambda: {"vae": _vae(), "unconditional_transformer": _transformer()},
        _transformer,
        lambda batch: {"prompt": ["something"] * batch},
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 2.0, "guidance_schedule": None, "max_sequence_length": _TEXT_TOKENS},
        prepare=_encode,
    ),
}

FAMILY, QUICK, RECORDED = "ideogram-4", "ideogram4", "ideogram4"

GIVES_MORE = True
