"""What lesa needs to know of a transformer whose output head is a norm, scale and shift, and a linear projection."""

import math
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale

from lesa.models.costs import Costs
from lesa.models.heads import AdaLayerNormHead, HeadForm
from lesa.models.own_forward import OwnForward
from lesa.models.plain_head import why_not_plain
from lesa.spread import all_tokens
from lesa_kernels import OutputHead
from lesa_kernels.checks import usage_error


class Adapter:
    """Base of the adapters, one for each model family.

    A family names its classes and says what conditions its head, and how the output is built if it is not just the
    projected tokens. The base expects the head to be the modules `norm_out` (an `AdaLayerNormContinuous`) and
    `proj_out` (a linear layer); a family with another head overrides `make_head`.

    Args:
        transformer: an instance of one of `transformer_classes`.

    Attributes:
        family: its name, which predictors and recordings store.
        transformer_classes: the names of its transformers' classes in diffusers. They are imported when they are used,
            so a version of diffusers that lacks one does not matter.
        costs: what `lesa estimate` knows about the family.
        embedders: paths of the modules that `condition` calls.
        timestep_scale: the family's pipelines divide the scheduler's timesteps by this for the transformer.
        sample_argument, timestep_argument, text_argument: names of `forward`'s arguments of sample, timestep and text.
        attention_kwargs: name of the argument of `forward` that holds the scale of LoRA; None if there is none.
        control_outputs: how many lists of residuals the family's ControlNets return in a tuple; 0 for one bare list;
            None if that is not known, so that they run in every step.
        control_is_converted: whether the pipelines go through these lists and convert each residual.
        prompts_first: whether guidance in one batch has the rows with the prompts first.
        conditioned_on: names of the arguments, other than the timestep, that `condition` reads. Each is None or has a
            leading dimension of B.
        block_lists: the lists of blocks, in the order in which they run, and for each the path of a module in a block
            that runs exactly when the block's attention is computed.
        head_form: the form of the output head.
        feature_dim: D, the width of the features.
        own_forward: the forward of the transformer's class.
        notes: what is said of each run.
        runs_around: whether a predicted step is `run_around`, the forward without its blocks, and not `run_head`. Then
            `compute` stands in place of the forward in computed steps.
        untold: why the transformer cannot be told another noise level than that of its latents; empty if it can.
    """

    family: str
    transformer_classes: tuple[str, ...]
    costs: type[Costs]
    embedders: tuple[str, ...] = ("time_text_embed",)
    timestep_scale = 1.0
    sample_argument = "hidden_states"
    timestep_argument = "timestep"
    text_argument = "encoder_hidden_states"
    attention_kwargs: str | None = "attention_kwargs"
    control_outputs: int | None = 0
    control_is_converted: bool = False
    prompts_first: bool = False
    notes: tuple[str, ...] = ()
    runs_around = False
    untold = ""
    conditioned_on: tuple[str, ...] = ()
    block_lists: Mapping[str, str] = {"transformer_blocks": "attn.norm_q", "single_transformer_blocks": "attn.norm_q"}

    def __init_subclass__(cls):
        super().__init_subclass__()
        needed = ("family", "transformer_classes", "costs")
        absent = [name for name in needed if not hasattr(cls, name)]
        absent += [name for name in ("condition", "decode") if getattr(cls, name) is getattr(Adapter, name)]
        if absent:
            raise TypeError(f"{cls.__name__} must define {', '.join(absent)}. See docs/adding-a-family.md.")

    def __init__(self, transformer: Any):
        self.transformer = transformer
        self.head_form = self.make_head()
        self.feature_dim = self.width()
        self.own_forward = OwnForward(transformer, self.present_classes())
        self._embedders = [attrgetter(path) for path in self.embedders]
        self._head = _HeadModules((), [])

    # What a family must define, or may override

    def condition(self, timestep: torch.Tensor, inputs: dict, dtype: torch.dtype) -> torch.Tensor:
        """What conditions the output head, as the transformer's forward makes it; see `HeadForm.modulation`.

        Args:
            timestep: `[B]`, or as it was passed to the transformer.
            inputs: the arguments that `conditioned_on` names.
            dtype: of the features.

        Returns:
            A tensor with a leading dimension of B, such as `[B, D]`.
        """
        raise NotImplementedError

    def make_head(self) -> HeadForm:
        """The form of the output head."""
        return AdaLayerNormHead(self.transformer)

    def width(self) -> int:
        """D, the width of the features."""
        return self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim

    def pass_timesteps(self, timesteps: torch.Tensor, scheduler: Any) -> torch.Tensor:
        """What the family's pipelines pass to the transformer for the scheduler's timesteps.

        Args:
            timesteps: some of the scheduler's, in the dtype in which they are passed.
            scheduler: the pipeline's scheduler.
        """
        return timesteps if self.timestep_scale == 1 else timesteps / self.timestep_scale

    def sample(self, call: dict) -> torch.Tensor:
        """The sample of a call, whose device and dtype are those of the call."""
        return call[self.sample_argument]

    def timestep(self, call: dict) -> Any:
        """The timesteps `[B]` of a call, by which its step is found.

        If each token has one, these are the largest ones: the tokens of what is given have others.
        """
        timestep: Any = call.get(self.timestep_argument)
        is_of_tokens = isinstance(timestep, torch.Tensor) and timestep.ndim > 1
        return timestep.flatten(1).amax(1) if is_of_tokens else timestep

    def text(self, call: dict) -> torch.Tensor | tuple | None:
        """The embedded text of a call, by which streams of calls are told apart; a tuple of all inputs if unknown."""
        return call.get(self.text_argument)

    def modulates_tokens(self, call: dict) -> bool:
        """Whether the tokens of a sample are modulated each in its own way in this call."""
        return call[self.timestep_argument].ndim > 1

    def shape(self, call: dict) -> tuple[int, int]:
        """Batch and tokens of the features that this call computes."""
        batch, tokens = self.sample(call).shape[:2]
        return batch, tokens

    def features(self, call: dict, entered: torch.Tensor) -> torch.Tensor:
        """The features `[B, T, D]` of a call, from what entered the head. Other tokens, such as text, are left out."""
        return entered.to(self.sample(call).dtype) if self.head_form.enters_in_float32 else entered

    def all_features(self, call: dict, features: torch.Tensor) -> torch.Tensor:
        """The features of all tokens of a call, if each process has some of them. All processes must call it."""
        return all_tokens(features, self.shape(call)[1], self.transformer)

    def arrange(self, call: dict, velocity: torch.Tensor) -> torch.Tensor:
        """The transformer's output from the projected tokens `[B, T, O]`."""
        return velocity

    def output(self, call: dict, velocity: torch.Tensor) -> Any:
        """Projected tokens `[B, T, O]` as the transformer returns them."""
        sample = self.arrange(call, velocity)
        return Transformer2DModelOutput(sample=sample) if call["return_dict"] else (sample,)

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

    @property
    def branches(self) -> tuple["Adapter", ...]:
        """The adapters of the transformer's output heads: this one alone, unless there are more."""
        return (self,)

    @classmethod
    def present_classes(cls) -> tuple[type, ...]:
        """Those of the transformers' classes that the installed diffusers has."""
        return tuple(getattr(diffusers, name) for name in cls.transformer_classes if hasattr(diffusers, name))

    @classmethod
    def handles(cls, transformer: Any) -> bool:
        """Whether `transformer` is of this family."""
        names = {base.__name__ for base in type(transformer).__mro__}
        return not names.isdisjoint(cls.transformer_classes) and isinstance(transformer, cls.present_classes())

    @property
    def head_entry(self) -> Any:
        """The module whose first input is the features to forecast."""
        return self.head_form.entry

    @property
    def projection(self) -> Any:
        """The head's last layer. A recording stores its weights."""
        return self.head_form.projection

    def on_entry(self, function: Callable) -> Any:
        """Lets `function` be called as a forward pre-hook where the features enter the head.

        Returns:
            A handle with an `id` and `remove()`.
        """
        return self.head_entry.register_forward_pre_hook(function, prepend=True, with_kwargs=True)

    @property
    def has_other_form(self) -> bool:
        """Whether the latest timestep has shown that the pipeline passes all of them in another form than before."""
        return False

    @property
    def place(self) -> Any:
        """Where the features of the latest call came from. Those of two places are no history together."""
        return None

    def compute(self, stream: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Computes a call of a stream by the transformer's own forward."""
        return forward(*args, **kwargs)

    def run_around(self, stream: str, forward: Callable[[], Any], call: dict, features: torch.Tensor) -> Any:
        """The output of the forward around its blocks, with the forecast in their place; None if that is impossible.

        Args:
            stream: of the call.
            forward: runs the transformer's forward with its arguments.
            call: the arguments by name.
            features: `[B, T, D]`.
        """
        raise NotImplementedError

    def why_unseen(self, stream: str, call: dict, is_first: bool = False) -> tuple[str, str] | None:
        """Why features are not seen in calls of a stream with such arguments, and what helps, if the adapter knows it.

        Args:
            stream: of the call.
            call: its arguments by name.
            is_first: whether no call of the stream was computed before, so that none can have been seen.
        """
        return None

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
            modules = *(embedder(self.transformer) for embedder in self._embedders), *self.head_form.modules
            paths = [name.split(".") for name, module in self.transformer.named_modules() if module in modules]
            around = {".".join(path[:depth]) for path in paths for depth in range(len(path))}
            self._head = _HeadModules(modules, [self.transformer.get_submodule(name) for name in around])
        return self._head

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The transformer's blocks, in the order in which they run."""
        return [block for name in self.block_lists for block in getattr(self.transformer, name, ())]

    @property
    def counted_modules(self) -> list[torch.nn.Module]:
        """For each of `blocks`, a module inside its attention. It runs exactly when that attention is computed.

        lesa skips a whole step or nothing. A cache that skips only attentions computes the rest in every step.
        """
        lists = ((getattr(self.transformer, name, ()), path) for name, path in self.block_lists.items())
        return [block.get_submodule(path) for blocks, path in lists for block in blocks]

    @property
    def counted_module(self) -> torch.nn.Module:
        """The first of `counted_modules`."""
        return self.counted_modules[0]

    def latents(self, call: dict) -> torch.Tensor:
        """The sample that a call was given, as tokens `[B, T, O]` in the layout of the projected tokens.

        Pipelines may append other channels to it, such as masks. These are left out. Channels that the transformer only
        gives, such as a variance, are zeros.
        """
        batch, tokens = self.shape(call)
        width, sample = self.projection.out_features, self.sample(call)
        places = torch.arange(tokens * width, device=sample.device).reshape(1, tokens, width).expand(batch, -1, -1)
        places = self.arrange(call, places)
        sample, places = sample[tuple(map(slice, places.shape))], places[tuple(map(slice, sample.shape))]
        flat = sample.new_zeros(batch, tokens * width)
        return flat.scatter_(1, places.flatten(1), sample.flatten(1)).reshape(batch, tokens, width)

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """The transformer's arguments by name. Unknown ones stay, and the transformer refuses them."""
        return self.own_forward.bind(args, kwargs)

    def conditioning(self, call: dict, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """`condition` for one call, under the call's LoRA scale. Its inputs are moved to `device`, if it is given."""

        def there(value: Any) -> Any:
            return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value

        inputs = {name: there(call[name]) for name in self.conditioned_on}
        return self.scaled(call, self.condition, there(call[self.timestep_argument]), inputs, dtype)

    def run_head(self, features: torch.Tensor, conditioning: torch.Tensor, call: dict) -> torch.Tensor:
        """The projected tokens `[B, T, O]` by the model's own modules, under the call's LoRA scale."""
        return self.scaled(call, self.head_form.run, features, conditioning)

    def lora_scale(self, call: dict) -> float | None:
        """The scale of LoRA in this call, or None if the call does not name one."""
        return None if self.attention_kwargs is None else (call[self.attention_kwargs] or {}).get("scale")

    def scaled(self, call: dict, function: Callable, *args: Any) -> Any:
        """`function(*args)`, with the LoRA scale of this call in the head's layers."""
        if self.attention_kwargs is None or self.lora_scale(call) in (None, 1.0):  # as the layers are
            return function(*args)
        return _scaled(self.head_modules, function, args, joint_attention_kwargs=call[self.attention_kwargs])

    def why_head_not_plain(self, own_hook: int, device: torch.device) -> str | None:
        """Why the head must run in the model's own modules, or None; see `why_not_plain`."""
        return why_not_plain(self.head_form.parts(), own_hook, device)

    def output_head(self, conditioning: torch.Tensor) -> OutputHead:
        """The head as plain tensors, modulated for one step.

        Args:
            conditioning: as `condition` gives it.
        """
        return self.head_form.output_head(conditioning)


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


def mean_and_deviation(vae, latents: torch.Tensor) -> list[torch.Tensor]:
    """Those of the channels of a VAE's latents `[B, C, ...]`, in their dtype, such that they can be applied to them."""
    told = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    return [part.to(latents).view(-1, *[1] * (latents.ndim - 2)) for part in told]


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
