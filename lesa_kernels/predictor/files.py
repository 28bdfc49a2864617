"""Where the files of a saved predictor are: in a folder, or in a repository on the Hugging Face hub."""

import difflib
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lesa_kernels.checks import Said, argument_error, check_folder_or_id, usage_error

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
PROVENANCE_NAME = "provenance.json"
"""What the predictor was made for. A folder may lack it: then that is unknown."""

HUB_OPTIONS = (
    "cache_dir",
    "endpoint",
    "etag_timeout",
    "force_download",
    "headers",
    "library_name",
    "library_version",
    "local_dir",
    "local_files_only",
    "proxies",
    "repo_type",
    "resume_download",
    "revision",
    "subfolder",
    "token",
    "tqdm_class",
    "user_agent",
)
"""What `huggingface_hub.hf_hub_download` takes, in one release or another."""

_CONVERT = "The weights keep the dtype in which they were saved. Convert them afterwards with `.to(dtype)`."
_MOVE = "The weights are loaded to the CPU. Move them afterwards with `.to(device)`."
_REMEDIES = {
    "dtype": _CONVERT,
    "torch_dtype": _CONVERT,
    "device": _MOVE,
    "device_map": _MOVE,
    "map_location": _MOVE,
    "strict": "Names and shapes of all weights are always checked.",
}


def check_hub_options(given: Collection[str]) -> None:
    """Raises `TypeError` unless all names are options of a download, whether a download is needed or not."""
    for name in given:
        if name not in HUB_OPTIONS:
            close = difflib.get_close_matches(name, ("backend", *HUB_OPTIONS), 1)
            hint = f"Did you mean `{close[0]}`?" if close else "Leave it out."
            remedy = _REMEDIES.get(name, hint)
            raise usage_error(f"`from_pretrained` has no argument `{name}`.", remedy, TypeError)


class Files(NamedTuple):
    """The files of a saved predictor; `provenance` is None if there is none."""

    config: Path
    weights: Path
    provenance: Path | None


def find_files(folder_or_id: str | os.PathLike, hub: Mapping[str, Any]) -> Files:
    """The files in a folder; they are downloaded if it is the id of a repository.

    What looks like a path is never asked of the hub; see `check_folder_or_id`. If the hub cannot be reached, files that
    were downloaded before are taken. Whether there is a `provenance.json` may be unknown then, with a warning.

    Args:
        folder_or_id: a folder, or the id of a repository on the hub.
        hub: options of the download. In a folder, only `subfolder` has a meaning.

    Raises:
        TypeError: `folder_or_id` is no path, or an option is unknown.
        ValueError: it is neither a path nor a possible id.
        FileNotFoundError: it looks like a path and is no folder, or one of its files is missing.
    """
    check_folder_or_id("folder_or_id", folder_or_id)
    check_hub_options(hub)
    name, folder = os.fspath(folder_or_id), Path(folder_or_id)
    if folder.is_dir():
        return _files_in(folder / (hub.get("subfolder") or ""))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        config, weights = (Path(hf_hub_download(name, file, **hub)) for file in (CONFIG_NAME, WEIGHTS_NAME))
    except HFValidationError as error:
        must, got = "be a folder or a hub id such as 'user/name'", Said(f"{name!r}, which is neither ({error})")
        raise argument_error("folder_or_id", must, got, "Check the path.") from None
    return Files(config, weights, _downloaded_provenance(name, hub))


def read_provenance(file: Path) -> dict[str, Any]:
    """The contents of a `provenance.json`; raises `ValueError` if it is damaged."""
    try:
        provenance = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        got = Said(str(error))
    else:
        if isinstance(provenance, dict):
            return provenance
        got = Said("one that is no JSON object")
    remedy = f"Restore the file, or delete it: without it, lesa does not know what the predictor was made for ({file})."
    raise argument_error("folder_or_id", f"hold a readable {PROVENANCE_NAME}", got, remedy)


def _downloaded_provenance(name: str, hub: Mapping[str, Any]) -> Path | None:
    """The `provenance.json` of a repository; None if there is none."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, PROVENANCE_NAME, **hub))
    except LocalEntryNotFoundError as error:
        if not (hub.get("local_files_only") or constants.HF_HUB_OFFLINE):
            text = f"lesa: {name} was loaded without {PROVENANCE_NAME}, which the hub could not be asked for: {error}"
            warnings.warn(" ".join(text.split()), RuntimeWarning, stacklevel=4)
        return None
    except EntryNotFoundError:
        return None


def _files_in(folder: Path) -> Files:
    config, weights, provenance = (folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, PROVENANCE_NAME))
    for file in (config, weights):
        if not file.is_file():
            raise argument_error(
                "folder_or_id",
                "be a folder that `save_pretrained` or `lesa train` wrote",
                Said(f"{folder}, which has no {file.name}"),
                "Check the path, or save the predictor again.",
                FileNotFoundError,
            )
    return Files(config, weights, provenance if provenance.is_file() else None)
