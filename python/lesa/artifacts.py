"""Files and fingerprints: written whole, compared, identified."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from lesa_kernels import FusedKANPredictor


def fingerprint(transformer) -> str:
    """SHA-256 over names, shapes and sums of the parameters, and over the names of the active adapters.

    The sums are of the values' bits as integers: exact, so that neither device nor threads change them. A parameter
    whose values are not here, for it is offloaded to the meta device, sharded or packed, counts by name and shape.
    """
    adapters = transformer.active_adapters() if getattr(transformer, "_hf_peft_config_loaded", False) else []
    digest = hashlib.sha256(f"{adapters}\n".encode())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in sorted(transformer.named_parameters()):
        values = parameter.detach()
        here = type(values) is torch.Tensor and not values.is_meta
        total = int(values.view(integers[values.element_size()]).sum(dtype=torch.int64)) if here else None
        digest.update(f"{name} {values.dtype} {list(values.shape)} {total}\n".encode())
    return digest.hexdigest()


def predictor_identity(predictor: FusedKANPredictor) -> dict:
    """What tells a predictor from others, as JSON has it."""
    return json.loads(json.dumps({"weights": fingerprint(predictor), "config": predictor.config.to_dict()}))


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; the file gets its own name only when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()
