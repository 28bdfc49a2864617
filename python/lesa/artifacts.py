"""What long work leaves on disk.

Files are whole or absent. Work that was interrupted continues with the same settings, or there is a clear error. A
digest identifies what was used.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import argument_error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, beside `path`. The file gets its own name when it is complete.

    After an interruption, `path` is absent or has its earlier contents.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    yield temporary
    os.replace(temporary, path)


def remove_partial(path: Path) -> None:
    """Removes what an interrupted `whole_file` left beside `path`."""
    path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_same_settings(work: str, kept: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless unfinished work can continue with the settings that were given.

    Args:
        work: what continues and where, such as "the unfinished training in runs/a".
        kept: its settings, by name.
        given: the settings of this call, by name. All of them are compared. The message names the first one that
            differs, and of a nested setting its first entry that differs, as "config.rank".
    """
    for name, value in given.items():
        before = kept.get(name)
        if before == value:
            continue
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            keys = {**value, **before}
            nested = {f"{name}.{key}": value.get(key) for key in keys}
            check_same_settings(work, {f"{name}.{key}": before.get(key) for key in keys}, nested)
        remedy = "Continue with the same arguments and model, or choose another folder."
        raise argument_error(name, f"be {before!r}, as in {work}", value, remedy)


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a nested value: of all its names, values, shapes and dtypes.

    Args:
        value: dicts, lists, tuples, tensors, arrays, images, strings, numbers and None, nested in any way. Of anything
            else, such as a function, the qualified name is used.
    """
    running = hashlib.sha256()
    _update(running, value)
    return running.hexdigest()


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of the names, shapes and sums of a module's parameters, and of the names of its active adapters.

    A sum adds up the bits of the values as integers. It is exact: device and threads do not change it. Of a parameter
    whose values are elsewhere (offloaded to the meta device, sharded or packed), name and shape are used.
    """
    model: Any = module  # a model of diffusers, where it has adapters
    adapters = model.active_adapters() if getattr(model, "_hf_peft_config_loaded", False) else []
    running = hashlib.sha256(f"{adapters}\n".encode())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.detach()
        is_here = type(values) is torch.Tensor and not values.is_meta
        total = int(values.view(integers[values.element_size()]).sum(dtype=torch.int64)) if is_here else None
        running.update(f"{name} {values.dtype} {list(values.shape)} {total}\n".encode())
    return running.hexdigest()


def predictor_identity(predictor: FusedKANPredictor) -> dict[str, Any]:
    """What distinguishes a predictor from others: its weights and its configuration. Only types that JSON has."""
    return json.loads(json.dumps({"weights": fingerprint(predictor), "config": predictor.config.to_dict()}))


def _update(running: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Image):
        value = np.asarray(value)
    parts: Sequence[Any] = ()
    if isinstance(value, dict):
        head, parts = f"dict {len(value)}", [part for key in sorted(value) for part in (key, value[key])]
    elif isinstance(value, (list, tuple)):
        head, parts = f"list {len(value)}", value
    elif isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        head = f"tensor {value.dtype} {list(value.shape)} {hashlib.sha256(raw.data).hexdigest()}"
    elif isinstance(value, np.ndarray):
        head = f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif value is None or isinstance(value, (bool, int, float, str)):
        head = f"{type(value).__name__} {value!r}"
    elif isinstance(value, np.generic):
        head = f"{type(value).__name__} {value.item()!r}"
    else:
        head = getattr(value, "__qualname__", type(value).__qualname__)
    running.update(f"{head}\n".encode())
    for part in parts:
        _update(running, part)
