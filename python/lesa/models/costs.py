"""What a transformer costs, from its configuration alone: tokens, FLOPs and the width of its head."""

from collections.abc import Mapping
from typing import Any

from lesa_kernels.checks import usage_error


class Costs:
    """Base of the costs of the model families: what `lesa estimate` knows about a transformer.

    A family gives the configuration of its usual model, how its pipelines call the transformer, and the FLOPs of what
    differs between families.

    Args:
        config: of the transformer. What it lacks is taken from `usual_config`.

    Attributes:
        usual_config: of the family's usual model, with its `_class_name`.
        presets: height, width and frames of well-known models with that configuration, by name.
        text_tokens: that the family's pipelines pass, per sample.
        streams: calls of the transformer per step, or samples per image in one call, with the usual guidance.
        packing: latent pixels per token and side, in addition to the transformer's own patches.
        dim: D, the width of the features.
    """

    usual_config: Mapping[str, Any]
    presets: Mapping[str, tuple[int, int, int]]
    text_tokens: int
    streams = 1
    packing = 1

    def __init__(self, config: Mapping[str, Any]):
        known = {name: value for name, value in config.items() if name in self.usual_config}
        self.config: dict[str, Any] = {**self.usual_config, **known}
        self.dim: int = self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def head_width(self) -> int:
        """O, the width of the output head's projection."""
        c = self.config
        return c["patch_size"] ** 2 * c.get("patch_size_t", 1) * (c.get("out_channels") or c["in_channels"])

    def image_tokens(self, height: int, width: int, frames: int, scale: int, frame_scale: int) -> int:
        """Image tokens of a sample.

        Args:
            height, width, frames: of the sample, in pixels.
            scale: pixels per latent and side.
            frame_scale: frames per latent.

        Raises:
            ValueError: the sample is smaller than one token.
        """
        side = scale * (self.packing if self.packing > 1 else self.config["patch_size"])
        rows, columns = height // side, width // side
        if not rows or not columns:
            sentence = f"`height` and `width` must be at least {side}, but got {height} and {width}."
            raise usage_error(sentence, "Use a larger size.")
        return rows * columns * max(1, self.layers(frames, frame_scale) // self.config.get("patch_size_t", 1))

    def layers(self, frames: int, frame_scale: int) -> int:
        """Latent frames of a sample of so many frames."""
        return frames

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        """FLOPs of one call with one sample: the products with weights, and attention."""
        dim = self.dim
        before = self.embedding_flops(image_tokens, text_tokens) + self.conditioning_flops()
        head = product_flops(1, dim, 2 * dim) + product_flops(image_tokens, dim, self.head_width)
        return before + self.block_flops(image_tokens, text_tokens) + head

    def embedding_flops(self, image_tokens: int, text_tokens: int) -> int:
        """Of the projections of image and text tokens to the width of the blocks."""
        image = product_flops(image_tokens, self.config["in_channels"], self.dim)
        return image + product_flops(text_tokens, self.config["joint_attention_dim"], self.dim)

    def conditioning_flops(self) -> int:
        """Of the embedders of timestep, guidance and pooled text."""
        c, dim = self.config, self.dim
        embedders = (2 if c.get("guidance_embeds") else 1) * timestep_flops(dim)
        pooled = c.get("pooled_projection_dim")
        return embedders + (product_flops(1, pooled, dim, dim) if pooled else 0)

    def block_flops(self, image_tokens: int, text_tokens: int) -> int:
        """Of all blocks: those with separate weights for image and text, and those with shared ones."""
        c, dim, tokens = self.config, self.dim, image_tokens + text_tokens
        block = attention_flops(tokens, tokens, dim) + feed_forward_flops(tokens, dim, c.get("mlp_ratio", 4.0))
        double = c["num_layers"] * (block + 2 * product_flops(1, dim, 6 * dim))
        return double + c.get("num_single_layers", 0) * (block + product_flops(1, dim, 3 * dim))


def product_flops(rows: int, *widths: int) -> int:
    """FLOPs of consecutive linear layers."""
    return sum(2 * rows * a * b for a, b in zip(widths, widths[1:]))


def attention_flops(rows: int, keys: int, dim: int) -> int:
    """FLOPs of queries, keys, values, output, and the two products between them."""
    return 4 * product_flops(rows, dim, dim) + 2 * product_flops(rows, dim, keys)


def feed_forward_flops(rows: int, dim: int, ratio: float = 4.0) -> int:
    """FLOPs of the two layers of a feed-forward network."""
    return product_flops(rows, dim, int(dim * ratio), dim)


def timestep_flops(dim: int) -> int:
    """FLOPs of the embedder of one timestep."""
    return product_flops(1, 256, dim, dim)
