"""The forms of output heads: which module the features enter, and where scale and shift come from.

Every head is a norm, a modulation `(1 + scale) * norm(h) + shift`, and a linear projection. Models differ in the
modules that make these.
"""

from operator import attrgetter
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormContinuous, FP32LayerNorm

from lesa.spread import unshard, whole
from lesa_kernels import OutputHead


class HeadForm:
    """Base of the forms. A form finds the head's modules in the transformer each time, because others replace them.

    Args:
        transformer: the transformer.
        norm, projection: paths of the norm, which the features enter, and of the last linear layer.

    Attributes:
        norm_kind: what the norm does: "layer", "rms", or None where there is none.
        enters_in_float32: whether the norm gets the features in float32, though the blocks give them in another dtype.
    """

    norm_kind: str | None = "layer"
    enters_in_float32 = False

    def __init__(self, transformer: Any, norm: str = "norm_out", projection: str = "proj_out"):
        self.transformer = transformer
        self.norm_path, self.projection_path = norm, projection
        self._norm, self._projection = attrgetter(norm), attrgetter(projection)

    @property
    def entry(self) -> Any:
        """The module whose first input is the features to forecast `[B, T, D]`."""
        return self._norm(self.transformer)

    @property
    def projection(self) -> Any:
        """The last layer."""
        return self._projection(self.transformer)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The modules that `run` calls."""
        return self.entry, self.projection

    @property
    def eps(self) -> float:
        """Of the norm."""
        raise NotImplementedError

    def entered(self, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features, and the conditioning if the entry gets it too, from the arguments of a call of the entry."""
        return args[0], None

    def run(self, features: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """The projected tokens `[B, T, O]`, by the model's own modules."""
        raise NotImplementedError

    def modulation(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and shift, each `[B, D]` or `[B, T, D]`; the shift is None if the head only scales."""
        raise NotImplementedError

    def output_head(self, conditioning: torch.Tensor) -> OutputHead:
        """The head as plain tensors."""
        norm, projection = self.entry, self.projection
        for module in (norm, projection):
            unshard(module)
        scale, shift = self.modulation(conditioning)
        weight: Any = whole(projection, "weight")
        return OutputHead(weight, whole(projection, "bias"), scale, shift, self.eps, self.norm_kind)

    def parts(self) -> dict[str, tuple[Any, type | str]]:
        """By path, the modules that a kernel replaces, and their types; a str is a type's full name."""
        raise NotImplementedError


class AdaLayerNormHead(HeadForm):
    """`AdaLayerNormContinuous`, which gets the conditioning `[B, D]` as its second input, then a linear layer."""

    @property
    def eps(self) -> float:
        return self.entry.norm.eps

    def entered(self, args, kwargs):
        named = kwargs.get("temb", kwargs.get("conditioning_embedding"))
        return args[0], args[1] if len(args) > 1 else named

    def run(self, features, conditioning):
        return self.projection(self.entry(features, conditioning))

    def modulation(self, conditioning):
        norm = self.entry
        scale, shift = norm.linear(norm.silu(conditioning).to(norm.linear.weight.dtype)).chunk(2, dim=1)
        return folded(norm.norm, scale, shift)

    def parts(self):
        norm, path = self.entry, self.norm_path
        return {
            path: (norm, AdaLayerNormContinuous),
            f"{path}.linear": (getattr(norm, "linear", None), torch.nn.Linear),
            f"{path}.silu": (getattr(norm, "silu", None), torch.nn.SiLU),
            f"{path}.norm": (getattr(norm, "norm", None), torch.nn.LayerNorm),
            self.projection_path: (self.projection, torch.nn.Linear),
        }


class TableHead(HeadForm):
    """A norm, a table of two rows to which the conditioning is added, and a linear layer.

    The first row gives the shift and the second one the scale. The conditioning is `[B, D]`, or `[B, T, D]` for each
    token. The transformer's own forward applies them, so `run` does it here.

    Args:
        table: path of the table, a parameter `[2, D]` or `[1, 2, D]`.
        in_float32: whether the forward passes the features to the norm in float32, and rounds after the shift.
    """

    def __init__(
        self,
        transformer: Any,
        norm: str = "norm_out",
        projection: str = "proj_out",
        table: str = "scale_shift_table",
        in_float32: bool = False,
    ):
        super().__init__(transformer, norm, projection)
        self._table, self.enters_in_float32 = attrgetter(table), in_float32

    @property
    def eps(self) -> float:
        return self.entry.eps

    def run(self, features, conditioning):
        scale, shift = (part if part.ndim == 3 else part[:, None] for part in self._rows(conditioning))
        normed = self.entry(features.float() if self.enters_in_float32 else features) * (1 + scale) + shift
        return self.projection(normed.type_as(features) if self.enters_in_float32 else normed)

    def modulation(self, conditioning):
        return folded(self.entry, *self._rows(conditioning))

    def _rows(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._table(self.transformer).reshape(2, -1).to(conditioning.device)
        shift, scale = (row + conditioning for row in rows)
        return scale, shift

    def parts(self):
        norm = self.entry
        kind = FP32LayerNorm if type(norm) is FP32LayerNorm else torch.nn.LayerNorm
        return {self.norm_path: (norm, kind), self.projection_path: (self.projection, torch.nn.Linear)}


def folded(norm: Any, scale: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and shift with the weights of the norm in them: the modulation of what the norm gives without weights.

    They are made in float32 at least, because a narrow dtype loses digits of `scale` when the weights are small.
    """
    weight, bias = whole(norm, "weight"), whole(norm, "bias")
    if weight is None and bias is None:
        return scale, shift
    dtype = torch.promote_types(scale.dtype, torch.float32)
    scale, shift = scale.to(dtype), None if shift is None else shift.to(dtype)
    if bias is not None:
        shift = bias * (1 + scale) + (0 if shift is None else shift)
    return scale if weight is None else weight * (1 + scale) - 1, shift
