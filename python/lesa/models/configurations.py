"""Configurations of transformers: of well-known models, of local folders, and of models in the hub's cache."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesa.models import ADAPTERS
from lesa_kernels.checks import Said, argument_error

_COSTS = {name: adapter.costs for adapter in ADAPTERS for name in adapter.costs.presets}
PRESETS = {name: (costs.usual_config, *costs.presets[name]) for name, costs in _COSTS.items()}
"""Configuration, height, width and frames of well-known models, by name."""


def find_configuration(model: str | os.PathLike) -> tuple[Mapping[str, Any], tuple[int, ...], int, int]:
    """The configuration of a model's transformer, and the sizes that go with it.

    Args:
        model: a name in `PRESETS`, the folder of a pipeline or of its transformer, or a hub id in the local cache.

    Returns:
        The configuration; height, width and frames of a usual sample; pixels per latent and side; frames per latent.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its configuration cannot be read.
    """
    if model in PRESETS:
        config, *sizes = PRESETS[model]
        return config, tuple(sizes), _COSTS[model].scale, _COSTS[model].frame_scale
    folder = Path(model)
    file: Path | None
    vae: Path | None
    if folder.is_dir():
        inside = [folder / "transformer" / "config.json", folder / "config.json"]
        found = next((path for path in inside if path.is_file()), inside[0])
        file, vae = found, found.parent.parent / "vae" / "config.json"
    else:
        file, vae = (_cached(str(model), f"{part}/config.json") for part in ("transformer", "vae"))
    if file is None or not file.is_file():
        presets = ", ".join(PRESETS)
        remedy = f"Pass one, or a preset: {presets}. A model of the hub must have been downloaded before."
        must = "be a folder with transformer/config.json, or a hub id in the local cache"
        raise argument_error("model", must, str(model), remedy, FileNotFoundError)
    known = read_json(vae) if vae is not None and vae.is_file() else {}
    return read_json(file), (1024, 1024, 1), *_compression(known)


def _cached(model: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(model, name)
    except HFValidationError:  # no hub id
        return None
    return Path(file) if isinstance(file, str) else None


def read_json(file: Path, argument: str = "model") -> dict:
    """The contents of a configuration file. Raises `ValueError`, which names the argument, if it cannot be read."""
    must, remedy = f"have a readable {file}", "Get the file again."
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise argument_error(argument, must, Said(str(error)), remedy) from None
    if not isinstance(contents, dict):
        raise argument_error(argument, must, Said(f"a {type(contents).__name__} in it, and no object"), remedy)
    return contents


def _compression(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels and frames per latent: those of the VAE, or 8 and 4 if it isn't known."""
    if "spatial_compression_ratio" in vae:
        return vae["spatial_compression_ratio"], vae.get("temporal_compression_ratio", 4)
    if "temperal_downsample" in vae:  # of Qwen-Image, in diffusers' spelling
        return 2 ** len(vae["temperal_downsample"]), 1
    if "block_out_channels" in vae:
        return 2 ** (len(vae["block_out_channels"]) - 1), 1
    return 8, 4
