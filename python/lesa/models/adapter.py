"""What lesa needs to know of a transformer whose output head is an AdaLN and a linear projection."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale

from lesa.models.costs import Costs
from lesa.models.own_forward import OwnForward
from lesa.models.plain_head import why_not_plain
from lesa_kernels import OutputHead
from lesa_kernels.checks import usage_error


class Adapter:
    """Base of the adapters, one for each model family.

    A family names its classes and says what conditions its head. If the transformer's output is not just the projected
    tokens, the family also says how the output is built from them. The base expects the modules `norm_out` (an
    `AdaLayerNormContinuous`), `proj_out` (a linear layer) and `time_text_embed`, and blocks in `transformer_blocks`.
    If the first three have other names, a family overrides `head_entry`, `projection` or `embedder`.

    Args:
        transformer: an instance of one of `transformer_classes`.

    Attributes:
        family: its name, which predictors and recordings store.
        transformer_classes: the classes of its transformers.
        costs: what `lesa estimate` knows about the family.
        timestep_scale: the family's pipelines divide the scheduler's timesteps by this for the transformer.
        attention_kwargs: name of the argument of `forward` that holds the scale of LoRA.
        control_outputs: how many lists of residuals the family's ControlNets return in a tuple; 0 for one bare list.
        conditioned_on: names of the arguments, other than `timestep`, that `condition` reads. Each is None or has a
            leading dimension of B.
        feature_dim: D, the width of the features.
        own_forward: the forward of the transformer's class.
    """

    family: str
    transformer_classes: tuple[type, ...]
    costs: type[Costs]
    timestep_scale = 1.0
    attention_kwargs = "attention_kwargs"
    control_outputs = 0
    conditioned_on: tuple[str, ...] = ()

    def __init_subclass__(cls):
        super().__init_subclass__()
        needed = ("family", "transformer_classes", "costs")
        absent = [name for name in needed if not hasattr(cls, name)]
        absent += [name for name in ("condition", "decode") if getattr(cls, name) is getattr(Adapter, name)]
        if absent:
            raise TypeError(f"{cls.__name__} must define {', '.join(absent)}. See docs/adding-a-family.md.")

    def __init__(self, transformer: Any):
        self.transformer = transformer
        config = transformer.config
        self.feature_dim: int = config.num_attention_heads * config.attention_head_dim
        self.own_forward = OwnForward(transformer, self.transformer_classes)
        self._head = _HeadModules((), [])

    # What a family must define, or may override

    def condition(self, timestep: torch.Tensor, inputs: dict, dtype: torch.dtype) -> torch.Tensor:
        """The second input of `head_entry`, as the transformer's forward makes it.

        Args:
            timestep: `[B]`, as it was passed to the transformer.
            inputs: the arguments that `conditioned_on` names.
            dtype: of the features.

        Returns:
            `[B, D]`.
        """
        raise NotImplementedError

    def shape(self, call: dict) -> tuple[int, int]:
        """Batch and tokens of the features that this call computes."""
        return tuple(call["hidden_states"].shape[:2])

    def arrange(self, call: dict, velocity: torch.Tensor) -> torch.Tensor:
        """The transformer's output from the projected tokens `[B, T, O]`."""
        return velocity

    def decode(
        self, pipe: Any, latents: torch.Tensor, height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """Images from what the pipeline returns with `output_type="latent"`. They equal the pipeline's own.

        Args:
            pipe: the pipeline.
            latents: as the pipeline returned them.
            height, width: as they were passed to the pipeline, in pixels.

        Returns:
            `[B, height, width, 3]` float32 in [0, 1]; videos `[B, frames, height, width, 3]`.
        """
        raise NotImplementedError

    # What follows from that

    @classmethod
    def handles(cls, transformer: Any) -> bool:
        """Whether `transformer` is of this family."""
        return isinstance(transformer, cls.transformer_classes)

    @property
    def head_entry(self) -> Any:
        """The module whose inputs are the features to forecast `[B, T, D]` and the conditioning."""
        return self.transformer.norm_out

    @property
    def projection(self) -> Any:
        """The head's last layer. A recording stores its weights."""
        return self.transformer.proj_out

    @property
    def embedder(self) -> Any:
        """The module that embeds the timestep. `condition` calls it."""
        return self.transformer.time_text_embed

    @property
    def head_modules(self) -> torch.nn.ModuleList:
        """The modules of the transformer that a predicted step runs."""
        return self._known_head.modules

    @property
    def has_adapters(self) -> bool:
        """Whether a module of the head has adapters such as LoRA. They can change what it computes at any time."""
        return self._known_head.has_adapters

    @property
    def _known_head(self) -> "_HeadModules":
        if not self._head.is_current():  # peft replaces a plain layer by one with LoRA
            modules = self.embedder, self.head_entry, self.projection
            paths = [name.split(".") for name, module in self.transformer.named_modules() if module in modules]
            around = {".".join(path[:depth]) for path in paths for depth in range(len(path))}
            self._head = _HeadModules(modules, [self.transformer.get_submodule(name) for name in around])
        return self._head

    @property
    def counted_module(self) -> torch.nn.Module:
        """A module inside the first block's attention. It runs exactly when that attention is computed.

        lesa skips a whole step or nothing. A cache that skips only attentions computes the rest in every step.
        """
        return self.transformer.transformer_blocks[0].attn.norm_q

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The transformer's blocks, in the order in which they run."""
        return [*self.transformer.transformer_blocks, *getattr(self.transformer, "single_transformer_blocks", ())]

    @property
    def counted_modules(self) -> list[torch.nn.Module]:
        """For each of `blocks`, the module that `counted_module` is in the first one."""
        first = self.blocks[0]
        path = next(name for name, module in first.named_modules() if module is self.counted_module)
        return [block.get_submodule(path) for block in self.blocks]

    def latents(self, call: dict) -> torch.Tensor:
        """The sample that a call was given, as tokens `[B, T, O]` in the layout of the projected tokens.

        Pipelines may append other channels to it, such as masks. These are left out.
        """
        batch, tokens = self.shape(call)
        width, sample = self.projection.out_features, call["hidden_states"]
        places = torch.arange(tokens * width, device=sample.device).reshape(1, tokens, width).expand(batch, -1, -1)
        places = self.arrange(call, places)
        sample = sample[tuple(map(slice, places.shape))]
        flat = sample.new_empty(batch, tokens * width)
        return flat.scatter_(1, places.flatten(1), sample.flatten(1)).reshape(batch, tokens, width)

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """The transformer's arguments by name. Unknown ones stay, and the transformer refuses them."""
        return self.own_forward.bind(args, kwargs)

    def conditioning(self, call: dict, dtype: torch.dtype) -> torch.Tensor:
        """`condition` for one call `[B, D]`, under the call's LoRA scale."""
        inputs = {name: call[name] for name in self.conditioned_on}
        return self.scaled(call, self.condition, call["timestep"], inputs, dtype)

    def head(self, features: torch.Tensor, conditioning: torch.Tensor, call: dict) -> torch.Tensor:
        """The model's own `norm_out` and `proj_out` `[B, T, O]`, under the call's LoRA scale."""
        return self.scaled(call, lambda: self.projection(self.head_entry(features, conditioning)))

    def scaled(self, call: dict, function: Callable, *args: Any) -> Any:
        """`function(*args)`, with the LoRA scale of this call in the head's layers."""
        if (call[self.attention_kwargs] or {}).get("scale", 1.0) == 1.0:  # as the layers are
            return function(*args)
        return _scaled(self.head_modules, function, args, joint_attention_kwargs=call[self.attention_kwargs])

    def output(self, call: dict, velocity: torch.Tensor) -> Any:
        """Projected tokens `[B, T, O]` as the transformer returns them."""
        sample = self.arrange(call, velocity)
        return Transformer2DModelOutput(sample=sample) if call["return_dict"] else (sample,)

    def why_head_not_plain(self, own_hook: int, device: torch.device) -> str | None:
        """Why the head must run in the model's own modules, or None; see `why_not_plain`."""
        return why_not_plain(self.head_entry, self.projection, own_hook, device)

    def output_head(self, conditioning: torch.Tensor) -> OutputHead:
        """The head as plain tensors, modulated for one step.

        Args:
            conditioning: `[B, D]`, the second input of `head_entry`.
        """
        norm, projection = self.head_entry, self.projection
        scale, shift = norm.linear(norm.silu(conditioning).to(norm.linear.weight.dtype)).chunk(2, dim=1)
        return OutputHead(projection.weight, projection.bias, scale, shift, norm.norm.eps)


class _HeadModules:
    """The modules of a head, and what is known of them until one of them is replaced.

    Args:
        modules: the modules.
        around: the modules that have them as parts, at any depth.

    Attributes:
        modules: a list of the modules.
        has_adapters: see `Adapter`.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], around: Iterable[torch.nn.Module]):
        self.modules = torch.nn.ModuleList(modules)
        inside = [*self.modules.modules()][1:]
        self.has_adapters = any("base_layer" in module._modules for module in inside)
        self._parts = [module._modules for module in (*around, *inside)]
        self._children = self._list_children()

    def is_current(self) -> bool:
        """Whether the modules have the parts that they had."""
        return bool(self._parts) and self._list_children() == self._children

    def _list_children(self) -> list[torch.nn.Module | None]:
        return [child for parts in self._parts for child in parts.values()]


@apply_lora_scale("joint_attention_kwargs")
def _scaled(modules, function, args, joint_attention_kwargs=None):
    return function(*args)


@torch.no_grad()
def decoded(pipe, latents: torch.Tensor) -> np.ndarray:
    """Images that the VAE and image processor of a pipeline make from latents `[B, C, h, w]` or `[B, C, 1, h, w]`."""
    images = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    images = images[:, :, 0] if images.ndim == 5 else images
    return pipe.image_processor.postprocess(images, output_type="np")


def packed_grid(
    tokens: int, height: int | None, width: int | None, side: int, patch: int, one_frame: bool = True
) -> tuple[int, int]:
    """Rows and columns of the tokens of an image.

    Pipelines that edit an image may change the requested size and keep its aspect ratio. Then the grid with this number
    of tokens is chosen whose aspect ratio is nearest.

    Args:
        tokens: of the image, or of all its frames.
        height, width: as they were passed to the pipeline, in pixels.
        side: what the pipeline uses instead of None.
        patch: height and width of a token, in pixels.
        one_frame: whether the tokens belong to one frame. Otherwise they belong to any number of frames of this size.

    Raises:
        ValueError: the image does not have the given size.
    """
    rows, columns = (height or side) // patch, (width or side) // patch
    if tokens == rows * columns or (not one_frame and rows * columns and tokens % (rows * columns) == 0):
        return rows, columns
    if height is None or width is None or not one_frame:
        raise usage_error(
            f"`height` and `width` must be the size of the images, but got {height} and {width} for {tokens} tokens of "
            f"{patch} pixels per side.",
            "Pass the size that the pipeline used. It may have taken the size from an input image.",
        )
    grids = ((n, tokens // n) for n in range(1, tokens + 1) if tokens % n == 0)
    return min(grids, key=lambda grid: abs(math.log(grid[0] / grid[1] * width / height)))
