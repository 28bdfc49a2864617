"""The form of an output head that is one module, with the norm, the modulation and the projection in it."""

from operator import attrgetter
from typing import Any

import torch

from lesa.models.heads import HeadForm, folded


class FinalLayerHead(HeadForm):
    """A module that gets the features and the conditioning `[B, C]`, norms, modulates and projects.

    A SiLU and a linear layer make the modulation: the scale alone, or the shift and then the scale.

    Args:
        transformer: as in `HeadForm`.
        layer: path of the module.
        kind: full name of its type.
        norm, silu, modulation, projection: paths of its parts inside it. The SiLU may be a function, which has none.
        conditioning: names under which the transformer's forward may pass the conditioning to it.
    """

    def __init__(
        self,
        transformer: Any,
        layer: str,
        kind: str,
        norm: str = "norm_final",
        silu: str | None = "adaLN_modulation.0",
        modulation: str = "adaLN_modulation.1",
        projection: str = "linear",
        conditioning: tuple[str, ...] = (),
    ):
        super().__init__(transformer, layer, f"{layer}.{projection}")
        self._kind, self._names = kind, conditioning
        parts = {
            norm: torch.nn.LayerNorm,
            silu: torch.nn.SiLU,
            modulation: torch.nn.Linear,
            projection: torch.nn.Linear,
        }
        self._inside = {f"{layer}.{path}": kind for path, kind in parts.items() if path is not None}
        self._norm_inside, self._modulation = attrgetter(norm), attrgetter(modulation)
        self._silu = attrgetter(silu) if silu is not None else lambda layer: torch.nn.functional.silu

    @property
    def modules(self):
        return (self.entry,)

    @property
    def eps(self):
        return self._norm_inside(self.entry).eps

    def entered(self, args, kwargs):
        named = (kwargs[name] for name in self._names if kwargs.get(name) is not None)
        return args[0], args[1] if len(args) > 1 else next(named, None)

    def run(self, features, conditioning):
        return self.entry(features, conditioning)

    def modulation(self, conditioning):
        layer = self.entry
        linear = self._modulation(layer)
        made = linear(self._silu(layer)(conditioning).to(linear.weight.dtype))
        made = made[:, 0] if made.ndim == 3 and made.shape[1] == 1 else made  # one row for all tokens
        norm = self._norm_inside(layer)
        *shift, scale = made.split(norm.normalized_shape[0], dim=-1)
        return folded(norm, scale, shift[0] if shift else None)

    def parts(self):
        inside = {path: (attrgetter(path)(self.transformer), kind) for path, kind in self._inside.items()}
        return {self.norm_path: (self.entry, self._kind), **inside}
