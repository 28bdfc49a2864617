"""Argument checks and their messages, for both packages.

A message has four parts: the argument, what it must be, what was received, and the remedy. Where these four make a bad
sentence, `usage_error` takes a sentence of your own and the remedy.
"""

import math
import numbers
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch


def describe(value: Any) -> str:
    """What was received, short enough for one line of an error message."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def argument_error(name: str, must: str, got: Any, remedy: str, kind: type[Exception] = ValueError) -> Exception:
    """Builds `kind` with the message "`name` must <must>, but got <got>. <remedy>". The caller raises it.

    `got` is described with `describe`. If it is a `Said`, its text is used unchanged.
    """
    received = got.text if isinstance(got, Said) else describe(got)
    return usage_error(f"`{name}` must {must}, but got {received}.", remedy, kind)


def usage_error(sentence: str, remedy: str, kind: type[Exception] = ValueError) -> Exception:
    """Builds `kind` with the message "<sentence> <remedy>". The caller raises it.

    For what `argument_error` would say badly, such as a missing argument: "`schedule` is required: this predictor was
    trained without one. Pass an interval such as 7, or a list of steps."

    Args:
        sentence: what is wrong; it names the argument and ends with a full stop.
        remedy: what the caller can do.
        kind: the class of the error.
    """
    error: Any = kind(f"{sentence} {remedy}")
    error.lesa_message = True  # an error of usage, not a bug: the command line shows it without a traceback
    return error


def check_folder_or_id(name: str, value: Any) -> None:
    """Checks that `value` is a folder or may be the id of a repository on a hub, which is "user/name".

    What looks like a path is never asked of the hub: an absolute path, one that begins with a dot or "~", one that does
    not have exactly one separator, and one whose parent folder exists.

    Args:
        name: the argument's name.
        value: what was received.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty.
        FileNotFoundError: it looks like a path, and there is no such folder.
    """
    must = "be a folder or a hub id such as 'user/name'"
    if not isinstance(value, (str, os.PathLike)):
        raise argument_error(name, must, value, "Pass a string.", TypeError)
    given, path = os.fspath(value), Path(value)
    if not given:  # as a path, it would be the current folder
        raise argument_error(name, must, value, "Pass a name.")
    if path.is_dir():
        return
    if path.is_absolute() or given.startswith((".", "~")) or given.count("/") != 1 or path.parent.is_dir():
        what = "which is a file" if path.is_file() else f"and there is no folder {given!r}"
        raise argument_error(name, must, Said(f"{given!r}, {what}"), "Check the path.", FileNotFoundError)


class Said:
    """What was received, already described in words."""

    def __init__(self, text: str):
        self.text = text


def check_int(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """Returns `value` as an int; raises `TypeError` or `ValueError` unless it is an integer in range."""
    bounds = f"be an integer of at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise argument_error(name, bounds, value, f"Pass an int for `{name}`.", TypeError)
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        raise argument_error(name, bounds, value, f"Choose a value in that range for `{name}`.")
    return number


def check_float(name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """Returns `value` as a float; raises `TypeError` or `ValueError` unless it is a finite number in range."""
    must = "be a finite number"
    if minimum > -math.inf:
        must += f" of at least {minimum:g}"
    if maximum < math.inf:
        must += f" and at most {maximum:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise argument_error(name, must, value, f"Pass a float for `{name}`.", TypeError)
    number = float(value)
    if not math.isfinite(number) or not minimum <= number <= maximum:
        raise argument_error(name, must, value, f"Choose a value in that range for `{name}`.")
    return number


def check_choice(name: str, value: Any, choices: Collection) -> Any:
    """Returns `value`; raises `ValueError` unless it is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise argument_error(name, f"be one of {listed}", value, f"Choose one of these for `{name}`.")
    return value


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int | str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    remedy: str | None = None,
) -> torch.Tensor:
    """Returns `value`; raises unless it is a tensor of that shape, dtype and device.

    Args:
        name: the argument's name.
        value: what was received.
        shape: one entry per dimension: an int to demand that size, a string to name a free one.
        dtypes: the dtypes allowed; any if None.
        device: the device demanded; any if None.
        remedy: what the caller can do; a generic sentence if None.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(value, torch.Tensor):
        raise argument_error(name, "be a torch.Tensor", value, remedy or "Pass a tensor.", TypeError)
    if shape is not None:
        fits = value.ndim == len(shape) and all(isinstance(s, str) or s == n for s, n in zip(shape, value.shape))
        if not fits:
            must = f"have shape [{', '.join(str(s) for s in shape)}]"
            raise argument_error(name, must, value, remedy or "Reshape or slice it to that shape.")
    if dtypes is not None and value.dtype not in dtypes:
        listed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        must = f"have dtype {listed}" if len(dtypes) == 1 else f"have one of the dtypes {listed}"
        raise argument_error(name, must, value, remedy or "Convert it with `.to(dtype)`.", TypeError)
    if device is not None and value.device != device:
        raise argument_error(name, f"be on {device}", value, remedy or f"Move it with `.to('{device}')`.")
    return value
