"""Reads the checkpoints that the authors of LESA save: facts of their format, and no code of theirs."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lesa_kernels.bspline_kan.knots import knots_refusal
from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import Said, argument_error, check_tensor
from lesa_kernels.forecasters.lesa import BOUNDS, GRID_RANGE, GRID_SIZE, LAYERS, SPLINE_ORDER
from lesa_kernels.predictor.config import PredictorConfig

_PREFIXES = re.compile(r"(?:(?:module|model|_orig_mod)\.)+")
"""What wrappers of a module put before the names of its parameters."""

_STAGES = 3
_REMEDY = "Pass a file that the released training of LESA saved."


class _Inert:
    """Stands for an object whose contents are not needed. It keeps nothing and does nothing."""

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_CONFIGURATION: list[Any] = [
    (_Inert, f"predictor.model.config.{name}") for name in ("Config", "ModelConfig", "KANConfig", "SolverConfig")
]
"""The types of the authors that every file of theirs has, in its entry `config`."""


def read_lesa_checkpoint(
    file: str | os.PathLike, feature_dim: int | None = None, family: str | None = None
) -> tuple[PredictorConfig, dict[str, torch.Tensor]]:
    """The configuration and the float32 parameters of a predictor; see `FusedKANPredictor.from_lesa_checkpoint`."""
    tensors = _tensors_of(_load(file))
    endings = ("_cond", "_uncond") if any("_cond." in name or "_uncond." in name for name in tensors) else ("",)
    stages = [_Reader(tensors, ending, stage) for ending in endings for stage in range(_STAGES)]
    hidden, inputs = stages[0].sizes()
    lengths = tuple(each.history() for each in stages[:_STAGES])
    config = PredictorConfig(
        feature_dim,
        mixer="lesa",
        history_length=lengths,
        stage_bounds=BOUNDS[len(endings)],  # a file does not hold them
        hidden=hidden,
        family=family,
        num_inference_steps=inputs - 1,
        options={"streams": len(endings)},
    )
    read = [each.read(lengths[each.stage], config.max_history, inputs, hidden) for each in stages]
    if tensors:
        must = f"hold only the parameters of LESA, with keys such as {stages[0].key('layers.0.grid')!r}"
        raise argument_error("file", must, Said(f"the key {min(tensors)!r} too"), _REMEDY)
    sizes = (len(endings), _STAGES)
    return config, {name: torch.stack([part[name] for part in read]).unflatten(0, sizes) for name in read[0]}


def _load(file: str | os.PathLike) -> Any:
    """The contents of the file. Nothing in it is executed."""
    if not isinstance(file, (str, os.PathLike)):
        raise argument_error("file", "be a path", file, "Pass the path of a checkpoint.", TypeError)
    if not Path(file).is_file():
        got = Said(f"{os.fspath(file)!r}, where there is none")
        raise argument_error("file", "be an existing file", got, "Check the path.", FileNotFoundError)
    with safe_globals(_CONFIGURATION):
        try:
            foreign = get_unsafe_globals_in_checkpoint(os.fspath(file))
        except Exception as error:  # damaged bytes lead to many kinds of errors
            raise _unreadable(error) from None
        if foreign:
            must = "hold tensors, numbers and the configuration of the released code only"
            remedy = (
                "Do not load a file from a source that you do not trust. Save only `model` of it, with `torch.save`."
            )
            raise argument_error("file", must, Said(f"the types {', '.join(sorted(foreign))}"), remedy)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _unreadable(error) from None


def _unreadable(error: Exception) -> Exception:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return argument_error("file", "be a whole file of `torch.save`", Said(f"another one ({reason})"), _REMEDY)


def _tensors_of(contents: Any) -> dict[str, torch.Tensor]:
    """The parameters in the entry `model`, by the names that they had before a wrapper added to them."""
    model = contents.get("model") if isinstance(contents, Mapping) else None
    if not isinstance(model, Mapping):
        got = contents if not isinstance(contents, Mapping) else Said(f"the entries {', '.join(map(str, contents))}")
        raise argument_error("file", "hold a dict with the state dict `model`", got, _REMEDY)
    tensors = {}
    for key, value in model.items():
        name = _PREFIXES.sub("", key, count=1) if isinstance(key, str) and _PREFIXES.match(key) else key
        if not isinstance(name, str) or name in tensors:
            must = "have strings as keys in `model`, each of which names one parameter"
            raise argument_error("file", must, Said(f"the key {key!r}"), _REMEDY)
        tensors[name] = value
    return tensors


class _Reader:
    """Takes the parameters of one stage of one stream out of a state dict.

    Args:
        tensors: the state dict. What is read is removed.
        ending: of the names of this stream.
        stage: its number.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], ending: str, stage: int):
        self.tensors, self.ending, self.stage = tensors, ending, stage

    def key(self, name: str) -> str:
        """The key of a parameter in the state dict."""
        part = "timestep" if name.startswith("layers.") else "latent"
        return f"{part}{self.ending}.{self.stage}.{name}"

    def tensor(self, name: str, shape: tuple[int | str, ...]) -> torch.Tensor:
        """The parameter, which must have that shape; strings are sizes that are not known yet.

        The file must have as many elements as the shape says, so a small file cannot ask for much memory.
        """
        key = self.key(name)
        if key not in self.tensors:
            raise argument_error("file", f"hold {key!r} in `model`", Said("a file without it"), _REMEDY)
        value = check_tensor(f"model[{key!r}]", self.tensors[key], shape, FLOAT_DTYPES, remedy=_REMEDY)
        if value.layout != torch.strided or value.device.type != "cpu":
            got = Said(f"one of layout {value.layout} on the device {value.device}")
            raise argument_error(f"model[{key!r}]", "be a dense tensor with values", got, _REMEDY)
        there = value.untyped_storage().nbytes() // value.element_size()
        if there < value.numel():
            got = Said(f"{there} in the file for the shape {list(value.shape)}")
            raise argument_error(f"model[{key!r}]", "have all of its elements in the file", got, _REMEDY)
        return value

    def sizes(self) -> tuple[int, int]:
        """The hidden width, and S + 1, the number of inputs."""
        name = "layers.0.base_weight"
        hidden, inputs = self.tensor(name, ("hidden", "S + 1")).shape
        if hidden < 1 or inputs < 2:
            must = "have at least one row, and two columns for a run of one step"
            raise argument_error(f"model[{self.key(name)!r}]", must, Said(f"shape [{hidden}, {inputs}]"), _REMEDY)
        return hidden, inputs

    def history(self) -> int:
        """K, the history length of the stage."""
        name = "weight"
        length = self.tensor(name, (1, "K")).shape[1]
        if not length:
            raise argument_error(f"model[{self.key(name)!r}]", "have at least one weight", Said("none"), _REMEDY)
        return length

    def taken(self, name: str, shape: tuple[int | str, ...]) -> torch.Tensor:
        """The parameter as float32, removed from the state dict."""
        value = self.tensor(name, shape)
        del self.tensors[self.key(name)]
        return value.detach().to(torch.float32, copy=True)

    def read(self, history: int, longest: int, inputs: int, hidden: int) -> dict[str, torch.Tensor]:
        """All parameters of the stage, by the names of the predictor's."""
        latent = self.taken("weight", (1, history))[0].flip(0)  # the newest feature first
        parameters = {
            "latent_weight": F.pad(latent, (0, longest - history)),
            "latent_bias": self.taken("bias", (1,))[0],
        }
        widths = (inputs, *(hidden,) * (LAYERS - 1), 1)
        for layer, (wide, narrow) in enumerate(zip(widths, widths[1:])):
            self._check_grid(f"layers.{layer}.grid", wide)
            for part, more in (
                ("base_weight", ()),
                ("spline_weight", (GRID_SIZE + SPLINE_ORDER,)),
                ("spline_scaler", ()),
            ):
                parameters[f"{part}_{layer}"] = self.taken(f"layers.{layer}.{part}", (narrow, wide, *more))
        return parameters

    def _check_grid(self, name: str, inputs: int) -> None:
        grid = self.tensor(name, (inputs, "knots"))
        bases = GRID_SIZE + SPLINE_ORDER
        remedy = "Only the grid of the released code is supported: train with it."
        key = f"model[{self.key(name)!r}]"
        refusal = knots_refusal(key, grid, bases, inputs, GRID_SIZE, SPLINE_ORDER, GRID_RANGE, remedy)
        if refusal is not None:
            raise refusal
        del self.tensors[self.key(name)]
