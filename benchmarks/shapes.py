"""The sizes that the benchmarks run at, by name. A CPU takes reduced ones, so that the whole suite stays short."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureShape:
    """Features `[batch, tokens, dim]` as they enter a transformer's output head.

    Args:
        name: what it is named after.
        batch, tokens, dim: the sizes.
        dtype: of the features.
    """

    name: str
    batch: int
    tokens: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> tuple[int, int, int, torch.dtype]:
        """What the functions of `lesa_kernels.work` begin with: batch, tokens, dim, dtype."""
        return self.batch, self.tokens, self.dim, self.dtype


ONE_TOKEN = FeatureShape("one-token", 1, 1, 8, torch.float32)  # nothing to do: what is left is the cost of a call
DIGITS = FeatureShape("digits-64", 64, 64, 128, torch.float32)  # the bundled model, 64 samples
FLUX_512PX = FeatureShape("flux-512px", 1, 1024, 3072, torch.float32)
FLUX_REDUCED = FeatureShape("flux-1024px-quarter", 1, 1024, 768, torch.float32)  # a quarter of its tokens and width
FLUX = FeatureShape("flux-1024px", 1, 4096, 3072, torch.bfloat16)
QWEN_IMAGE = FeatureShape("qwen-image-1328px", 1, 6889, 3072, torch.bfloat16)
HUNYUAN_VIDEO = FeatureShape("hunyuan-video-480x640x65", 1, 20400, 3072, torch.bfloat16)

FEATURES = {"cpu": (DIGITS, FLUX_REDUCED, FLUX_512PX), "cuda": (DIGITS, FLUX, QWEN_IMAGE, HUNYUAN_VIDEO)}


@dataclass(frozen=True)
class LayerShape:
    """A KAN layer from `[rows, in_features]` to `[rows, out_features]`.

    Args:
        name: what it is called.
        rows, in_features, out_features: the sizes.
        dtype: of the input and the parameters.
        grid_size: G, the number of intervals; the splines are cubic.
        autocast: the dtype of the products and the output, if it is another one.
    """

    name: str
    rows: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    grid_size: int = 5
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name


LAYERS = {
    "cpu": (LayerShape("kan-64", 4096, 64, 64, torch.float32), LayerShape("kan-256", 1024, 256, 256, torch.float32)),
    "cuda": (
        LayerShape("kan-256-rows-65536", 65536, 256, 256, torch.float32, 8),
        LayerShape("kan-256-rows-65536-autocast", 65536, 256, 256, torch.float32, 8, torch.bfloat16),
        LayerShape("kan-1024", 8192, 1024, 1024, torch.float32),
        LayerShape("kan-3072", 4096, 3072, 3072, torch.bfloat16),
    ),
}


@dataclass(frozen=True)
class ModelShape:
    """A FLUX transformer with random weights, and what it is given.

    Args:
        name: what it is named after.
        image_tokens, text_tokens: lengths of the two sequences.
        num_layers, num_single_layers: double-stream and single-stream blocks.
        num_attention_heads: of 64 channels each.
        text_dim: width of the prompt embeddings.
        dtype: of weights and activations.
    """

    name: str
    image_tokens: int
    text_tokens: int
    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    text_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.name

    @property
    def parameters(self) -> int:
        """About how many weights it has: those of the blocks' products."""
        dim = 64 * self.num_attention_heads
        return dim**2 * (36 * self.num_layers + 15 * self.num_single_layers)

    def transformer_config(self) -> dict:
        """Arguments of `FluxTransformer2DModel`."""
        return {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": self.num_layers,
            "num_single_layers": self.num_single_layers,
            "attention_head_dim": 64,
            "num_attention_heads": self.num_attention_heads,
            "joint_attention_dim": self.text_dim,
            "pooled_projection_dim": self.text_dim,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 24, 24),
        }


MODELS = {
    "cpu": (ModelShape("flux-13M", 256, 32, 1, 2, 6, 256, torch.float32),),
    "cuda": (ModelShape("flux-12B", 4096, 512, 19, 38, 48, 4096, torch.bfloat16),),  # all 57 blocks of FLUX
}

FLUX_53M = ModelShape("flux-53M", 256, 32, 3, 6, 8, 256, torch.float32)
FLUX_100M = ModelShape("flux-100M", 1024, 64, 2, 6, 12, 768, torch.float32)
FLUX_TINY = ModelShape("flux-tiny", 64, 8, 1, 1, 2, 64, torch.float32)
