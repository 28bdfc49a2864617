"""What a transformer costs, from its configuration alone: tokens, FLOPs and the width of its head."""

import inspect
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lesa_kernels.checks import Said, argument_error, usage_error

_MOST_LAYERS = 1000
"""Larger numbers in a configuration are mistakes, and a transformer with so many layers takes too long to count."""
_MOST_VALUES = 2**22
"""While FLOPs are counted, larger tensors have no values."""


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
        scale: pixels per latent and side of the well-known models.
        frame_scale: frames per latent of the well-known models.
        dim: D, the width of the features.
    """

    usual_config: Mapping[str, Any]
    presets: Mapping[str, tuple[int, int, int]]
    text_tokens: int
    streams = 1
    packing = 1
    scale = 8
    frame_scale = 4

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
        duration, side = self.patch
        side = scale * (self.packing if self.packing > 1 else side)
        rows, columns = height // side, width // side
        if not rows or not columns:
            sentence = f"`height` and `width` must be at least {side}, but got {height} and {width}."
            raise usage_error(sentence, "Use a larger size.")
        return rows * columns * max(1, self.layers(frames, frame_scale) // duration)

    @property
    def patch(self) -> tuple[int, int]:
        """Latent frames, and latent pixels per side, of one of the transformer's patches."""
        size = self.config["patch_size"]
        if isinstance(size, int):
            return self.config.get("patch_size_t") or 1, size
        return size[0] if len(size) == 3 else 1, size[-1]

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


class VideoCosts(Costs):
    """Base of the costs of video families: the first frame has a latent frame of its own."""

    def layers(self, frames, frame_scale):
        return (frames - 1) // frame_scale + 1


class CountedCosts(Costs):
    """Costs of a family whose FLOPs are counted: torch counts them while the transformer runs without any values.

    A family gives the same attributes as for `Costs`, and `call`. The width of the features and of the head are those
    of the transformer's last layer.

    Args:
        config: of the transformer. What it lacks is taken from `usual_config`, and then from the transformer's class.

    Raises:
        ValueError: the installed diffusers doesn't have the class, or it can't be built from the configuration.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = {**self.usual_config, **config}
        self._key = json.dumps(self.config, sort_keys=True, default=str)
        layer = _transformer(self._key).get_submodule(self.projection)
        self.dim, self._head_width = int(layer.in_features), int(layer.out_features)

    @property
    def projection(self) -> str:
        """Path of the head's last layer in the transformer."""
        return "proj_out"

    @property
    def head_width(self):
        return self._head_width

    def call(self, image_tokens: int, text_tokens: int) -> dict[str, Any]:
        """The arguments of the transformer's forward for one sample, by name.

        Tensors are made with `valueless`. Only small ones whose values change the course of the forward, such as masks
        with which it selects tokens, have values.

        Args:
            image_tokens: of the sample. Where the forward needs rows and columns, any that give this number are right;
                see `near_square`.
            text_tokens: of the sample.
        """
        raise NotImplementedError

    def flops(self, image_tokens, text_tokens):
        return _counted_flops(type(self), self._key, image_tokens, text_tokens)


class PackedCosts(CountedCosts):
    """Costs of a family whose pipelines pack two by two latent pixels into a token, and pass a position for each token.

    Attributes:
        axes: of a position.
    """

    packing = 2
    axes = 3

    def call(self, image_tokens, text_tokens):
        return {
            "hidden_states": valueless(1, image_tokens, self.config["in_channels"]),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["joint_attention_dim"]),
            "timestep": valueless(1),
            "img_ids": valueless(image_tokens, self.axes),
            "txt_ids": valueless(text_tokens, self.axes),
        }


def valueless(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of this shape that has no values and no memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def near_square(tokens: int) -> tuple[int, int]:
    """Rows and columns of a grid of so many tokens whose sides are as equal as possible."""
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return rows, tokens // rows


@lru_cache(maxsize=4)
def _transformer(key: str) -> Any:
    """A transformer without weights. `key` is its configuration as JSON."""
    config = json.loads(key)
    kind = getattr(diffusers, config["_class_name"], None)
    if kind is None:
        sentence = f"diffusers {diffusers.__version__} has no {config['_class_name']}."
        raise usage_error(sentence, "Install a newer version of diffusers.")
    for name, value in config.items():
        if name.endswith("layers") and isinstance(value, int) and value > _MOST_LAYERS:
            must = f"have at most {_MOST_LAYERS} as {name} in its configuration"
            raise argument_error("model", must, value, "Get the configuration again.")
    known = {name: value for name, value in config.items() if name in inspect.signature(kind).parameters}
    try:
        with torch.device("meta"):
            return kind.from_config(known)
    except Exception as error:  # whatever a class does with values that it doesn't expect
        must = f"have a configuration with which a {kind.__name__} can be built"
        raise argument_error("model", must, Said(str(error)), "Get the configuration again.") from error


@lru_cache(maxsize=256)
def _counted_flops(costs: type[CountedCosts], key: str, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one call with one sample. `key` is the transformer's configuration as JSON."""
    transformer = _transformer(key)
    # Attention is counted as two products. Fused attention isn't known to the counter on every device.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    try:
        arguments = costs(json.loads(key)).call(image_tokens, text_tokens)
        with torch.no_grad(), plain, _FewValues(), FlopCounterMode(display=False) as counter:
            transformer(**arguments)
    except Exception as error:  # a size that the model doesn't take, or a configuration that `call` doesn't know
        tokens = f"{image_tokens} image tokens and {text_tokens} text tokens"
        sentence = f"The FLOPs of a {type(transformer).__name__} can't be counted with {tokens}: {error}."
        remedy = "Use a size that the model takes. If it takes this one, lesa can't estimate this configuration."
        raise usage_error(sentence, remedy) from error
    return counter.get_total_flops()


class _FewValues(TorchDispatchMode):
    """Lets tensors with and without values meet. While it is entered, only small tensors on the CPU have values.

    What follows from a tensor without values has none. Only the selection by a mask reads its values in any case.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        reads_values = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
        copies = func is torch.ops.aten._to_copy.default
        if reads_values or copies or all(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        shapes = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        result = func(*shapes[0], **shapes[1])
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors) or max(sizes, default=0) > _MOST_VALUES:
            return result
        return func(*args, **kwargs)


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
