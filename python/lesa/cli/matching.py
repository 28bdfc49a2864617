"""Checks the inputs of a file against the signature of the pipeline's `__call__`."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lesa.cli.outputs import makes_layers
from lesa.inputs import Sample
from lesa_kernels.checks import Said, argument_error, usage_error

_WORDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}
_PLURALS = {str: "texts", int: "integers", float: "numbers"}
_IMAGE = "the path of an image"
_WIDTHS = {
    "prompt_embeds": ("joint_attention_dim", "text_embed_dim"),
    "pooled_prompt_embeds": ("pooled_projection_dim",),
}
"""The entries of a transformer's configuration that say how wide an argument is; the first that it has."""


def matched(samples: Iterable[Sample], name: str, call: Callable, folder: Path) -> list[Sample]:
    """The samples with images opened, after their arguments were compared with those of a pipeline.

    A number without a fraction, such as 512.0, becomes an integer where one is needed.

    Args:
        samples: of a file.
        name: of the pipeline's class.
        call: its `__call__`. What its annotations and defaults do not exclude is allowed.
        folder: where the paths of images begin.

    Raises:
        TypeError, ValueError: an argument is unknown or of another type, or an image can't be opened. The message names
            file, line and argument.
    """
    hints = _hints_of(call)
    has_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values())
    mode = "RGBA" if makes_layers(call) else "RGB"
    images: dict[str, Image.Image] = {}
    fitted = []
    for sample in samples:
        arguments = {}
        for key, value in sample.arguments.items():
            if key not in hints:
                if not has_any:
                    raise _unknown(sample.place, name, key, hints)
                arguments[key] = value
                continue
            place, hint = f"{sample.place}, {key!r}", hints[key]
            is_image = _is_image(key, hint)
            if is_image:
                value = _opened(place, value, folder, mode, images)
            arguments[key] = value = _converted(value, hint)
            if not (_fits(value, hint) or (is_image and _all_images(value))):
                must = f"be {_in_words(hint, is_image)}"
                raise argument_error(place, must, value, _remedy(value, hint, is_image), TypeError)
        fitted.append(replace(sample, arguments=arguments))
    return fitted


def check_widths(samples: Iterable[Sample], config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if embeddings are not as wide as the transformer with this configuration needs them.

    Args:
        samples: fitted to the pipeline.
        config: of the transformer.
    """
    for sample in samples:
        for key, value in sample.arguments.items():
            entries = _WIDTHS.get(key.removeprefix("negative_"), ())
            width = next((config[entry] for entry in entries if entry in config), None)
            if not (isinstance(value, torch.Tensor) and value.is_floating_point() and isinstance(width, int)):
                continue
            ndim = 2 if key.endswith("pooled_prompt_embeds") else 3
            if value.ndim != ndim or value.shape[-1] != width:
                shape = ["samples", "tokens", width] if ndim == 3 else ["samples", width]
                must = f"have shape [{', '.join(map(str, shape))}] for this model"
                remedy = "Encode the prompts with the text encoders of this model."
                raise argument_error(f"{sample.place}, {key!r}", must, value, remedy)


def _hints_of(call: Callable) -> dict[str, Any]:
    """By name, what the arguments of the call may be. A default of None allows None."""
    try:
        known = typing.get_type_hints(call)
    except (NameError, TypeError):  # an annotation of a class that is not imported there
        known = {}
    hints = {}
    for name, parameter in [*inspect.signature(call).parameters.items()][1:]:  # without self
        if parameter.kind is not parameter.VAR_KEYWORD:
            hint = known.get(name, Any)
            hints[name] = hint | None if parameter.default is None and hint is not Any else hint
    return hints


def _unknown(place: str, pipeline: str, key: str, known: Iterable[str]) -> Exception:
    near = difflib.get_close_matches(key, known, 1)
    remedy = f"Did you mean {near[0]!r}?" if near else "Remove it from the file."
    shown = key if key.isidentifier() else repr(key)
    return usage_error(f"`{place}`: {pipeline} has no argument {shown}.", remedy)


def _parts(hint: Any) -> list[Any]:
    """The members of a union; of anything else, itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(hint) for part in _parts(member)]
    return [None if hint is type(None) else hint]


def _is_tensor(hint: Any) -> bool:
    return getattr(hint, "__module__", "").startswith("torch") and getattr(hint, "__name__", "").endswith("Tensor")


def _is_image(name: str, hint: Any) -> bool:
    """Whether an argument takes images. Some that do are annotated as tensors only."""
    if name.endswith(("_latents", "_embeds")):
        return False
    return Image.Image in _parts(hint) or (name.endswith(("image", "mask")) and "prompt" not in name)


def _all_images(value: Any) -> bool:
    return all(map(_all_images, value)) if isinstance(value, list) else isinstance(value, Image.Image)


def _fits(value: Any, hint: Any) -> bool:
    """Whether the hint allows the value. Tensors, which a pipeline may use as numbers too, fit everywhere."""
    return isinstance(value, torch.Tensor) or any(_fits_one(value, part) for part in _parts(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin = _origin(hint)
    if origin in (list, tuple):
        members = typing.get_args(hint) or (Any,)
        return isinstance(value, list) and all(any(_fits(part, member) for member in members) for part in value)
    if origin is bool:
        return isinstance(value, int) and value in (0, 1)
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if origin is None:
        return value is None
    if origin in (str, dict, Image.Image):
        return isinstance(value, origin)
    return not (_is_tensor(origin) or origin is np.ndarray)  # what is unknown here is left to the pipeline


def _converted(value: Any, hint: Any) -> Any:
    """The value, as an integer where it is a number without a fraction and only an integer fits."""
    if isinstance(value, float) and value.is_integer() and not _fits(value, hint) and _fits(int(value), hint):
        return int(value)
    return value


def _in_words(hint: Any, is_image: bool) -> str:
    words = []
    for part in _parts(hint):
        origin, members = _origin(part), typing.get_args(part)
        if origin in _WORDS:  # a list of prompts would be several samples
            words.append(_WORDS[origin])
        elif origin is list and is_image:
            words.append("a list of such paths")
        elif origin is list and members and _WORDS[str] not in words:
            words.append(f"a list of {_PLURALS.get(members[0], 'tensors')}")
        elif _is_tensor(origin) and not is_image:
            words.append("a tensor")
    if is_image:
        words.insert(0, _IMAGE)
    return " or ".join(dict.fromkeys(words)) or "as the pipeline's documentation says"


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _remedy(value: Any, hint: Any, is_image: bool) -> str:
    if is_image:
        return "Write the path from the folder of the inputs, or an absolute one."
    if value is None:
        return "Leave it out to use the default."
    if not any(part in _WORDS for part in map(_origin, _parts(hint))) and any(map(_is_tensor, _parts(hint))):
        return "Pass tensors in a .safetensors file."
    if isinstance(value, str) and str not in _parts(hint):
        return "Write numbers, lists and true or false without quotes."
    return "Correct this value in the file."


def _opened(place: str, value: Any, folder: Path, mode: str, known: dict[str, Image.Image]) -> Any:
    """The image at a path, upright and in the mode; the images of a list of paths; anything else as it is."""
    if isinstance(value, list):
        return [_opened(place, part, folder, mode, known) for part in value]
    if not isinstance(value, str):
        return value
    if value not in known:
        try:
            with Image.open(folder / value) as file:
                known[value] = ImageOps.exif_transpose(file).convert(mode)
        except Exception as error:  # damaged files make readers fail in many ways
            missing = isinstance(error, FileNotFoundError)
            reason = f"and there is no such file in {folder}" if missing else f"which can't be opened: {error}"
            remedy = "Write the path from the folder of the inputs, or an absolute one."
            raise argument_error(place, f"be {_IMAGE}", Said(f"{value!r}, {reason}"), remedy) from None
    return known[value]
