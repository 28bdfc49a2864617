"""What long work leaves on disk: files that are whole or absent, settings that must agree, digests that identify."""

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


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_same_settings(work: str, kept: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless unfinished work can go on with the settings that were given.

    Args:
        work: what goes on and where, such as "the unfinished training in runs/a".
        kept: its settings, by name.
        given: the settings of this call, by name. All of them are compared.
    """
    for name, value in given.items():
        if kept.get(name) != value:
            must = f"be {kept.get(name)!r}, as in {work}"
            remedy = "Continue with the same arguments and model, or choose another folder."
            raise argument_error(name, must, value, remedy)


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, over the names, values, shapes and dtypes that a nested value holds.

    Args:
        value: dicts, lists, tuples, tensors, arrays, images, strings, numbers and None, nested in any way. Anything
            else, such as a function, counts by its qualified name.
    """
    running = hashlib.sha256()
    _update(running, value)
    return running.hexdigest()


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and sums of the parameters, and over the names of the active adapters.

    The sums are of the values' bits as integers, which are exact: neither device nor threads change them. A parameter
    whose values are elsewhere (offloaded to the meta device, sharded or packed) counts by name and shape.
    """
    with_adapters: Any = module if getattr(module, "_hf_peft_config_loaded", False) else None
    adapters = [] if with_adapters is None else with_adapters.active_adapters()
    running = hashlib.sha256(f"{adapters}\n".encode())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.detach()
        is_here = type(values) is torch.Tensor and not values.is_meta
        total = int(values.view(integers[values.element_size()]).sum(dtype=torch.int64)) if is_here else None
        running.update(f"{name} {values.dtype} {list(values.shape)} {total}\n".encode())
    return running.hexdigest()


def predictor_identity(predictor: FusedKANPredictor) -> dict:
    """What distinguishes a predictor from others, in JSON's types: its weights and its configuration."""
    return json.loads(json.dumps({"weights": fingerprint(predictor), "config": predictor.config.to_dict()}))


def _update(running, value: Any) -> None:
    if isinstance(value, Image):
        value = np.asarray(value)
    if isinstance(value, np.generic):
        value = value.item()
    head: str
    parts: Sequence = ()
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
    else:
        head = getattr(value, "__qualname__", type(value).__qualname__)
    running.update(f"{head}\n".encode())
    for part in parts:
        _update(running, part)
