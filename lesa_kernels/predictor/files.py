"""Where the files of a saved predictor are: in a folder, or in a repository on the Hugging Face hub."""

import difflib
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lesa_kernels.checks import Said, argument_error, check_folder_or_id, check_int, usage_error

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


_BUDGET = re.compile("budget-([1-9][0-9]*)")
"""The folder of one of several predictors."""


class Files(NamedTuple):
    """The files of a saved predictor; `provenance` is None if there is none."""

    config: Path
    weights: Path
    provenance: Path | None


def find_files(folder_or_id: str | os.PathLike, hub: Mapping[str, Any], budget: int | None = None) -> Files:
    """The files in a folder; they are downloaded if it is the id of a repository.

    What looks like a path is never asked of the hub; see `check_folder_or_id`. If the hub cannot be reached, files that
    were downloaded before are taken. Whether there is a `provenance.json` may be unknown then, with a warning.

    Args:
        folder_or_id: a folder, or the id of a repository on the hub.
        hub: options of the download. In a folder, only `subfolder` has a meaning.
        budget: which predictor to take, if there is one for each of several budgets.

    Raises:
        TypeError: `folder_or_id` is no path, or an option is unknown.
        ValueError: it is neither a path nor a possible id, or it has other budgets than `budget`.
        FileNotFoundError: it looks like a path and is no folder, or one of its files is missing.
    """
    check_folder_or_id("folder_or_id", folder_or_id)
    check_hub_options(hub)
    name = os.fspath(folder_or_id)
    inside = hub
    if budget is not None:
        folder = f"budget-{check_int('budget', budget)}"
        inside = {**hub, "subfolder": f"{hub['subfolder']}/{folder}" if hub.get("subfolder") else folder}
    try:
        if Path(name).is_dir():
            return _files_in(Path(name, inside.get("subfolder") or ""))
        return _downloaded(name, inside)
    except Exception as error:
        is_unknown = _is_unreachable(error) and budget is None  # there may be several predictors in the hub's cache
        if not _is_absent(error) and not is_unknown:
            raise
        budgets = budgets_in(folder_or_id, hub)
        if budgets:
            listed = ", ".join(map(str, budgets))
            must, remedy = (
                f"be one of {listed}",
                f"Pass one of them, or its folder, such as {name}/budget-{budgets[0]}.",
            )
            raise argument_error("budget", f"{must}, for which {name} has predictors", budget, remedy) from None
        if budget is not None:
            must, remedy = f"be left out for {name}, which has no folders such as budget-9", "Leave it out."
            raise argument_error("budget", must, budget, remedy) from None
        raise


def budgets_in(folder_or_id: str | os.PathLike, hub: Mapping[str, Any] = MappingProxyType({})) -> list[int]:
    """The budgets for which there are predictors, in rising order; empty if there is one predictor, or none.

    Args:
        folder_or_id, hub: as in `find_files`. A predictor of the budget 9 is in the folder `budget-9`. If the hub
            cannot be reached, the predictors are those that were downloaded before.
    """
    name, subfolder = os.fspath(folder_or_id), hub.get("subfolder") or ""
    if Path(name).is_dir():
        files = Path(name, subfolder).glob(f"*/{CONFIG_NAME}")
        places = [file.parent.name for file in files] if not Path(name, subfolder, CONFIG_NAME).is_file() else []
    else:
        places = _places_on_hub(name, hub)
    found = (_BUDGET.fullmatch(place) for place in places)
    return sorted(int(match[1]) for match in found if match is not None)


def _places_on_hub(name: str, hub: Mapping[str, Any]) -> list[str]:
    """The folders of a repository that have a configuration; empty if that is not in a folder.

    If the hub cannot be reached, they are those that were downloaded before.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        hf_hub_download(name, CONFIG_NAME, **hub)
        return []
    except Exception as error:
        if _is_unreachable(error) and (places := _downloaded_places(name, hub)):
            return places
        if not _is_absent(error):
            raise
    options = {key: hub[key] for key in ("revision", "repo_type") if key in hub}
    files = HfApi(endpoint=hub.get("endpoint"), token=hub.get("token")).list_repo_files(name, **options)
    prefix = f"{hub['subfolder']}/" if hub.get("subfolder") else ""
    inside = [file.removeprefix(prefix).split("/") for file in files if file.startswith(prefix)]
    return [place for place, *rest in inside if rest == [CONFIG_NAME]]


def _downloaded_places(name: str, hub: Mapping[str, Any]) -> list[str]:
    """The folders with a configuration of what was downloaded of a repository before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = {key: hub[key] for key in ("revision", "repo_type", "cache_dir", "local_dir") if key in hub}
    try:
        snapshot = snapshot_download(name, local_files_only=True, **options)
    except LocalEntryNotFoundError:
        return []
    files = Path(snapshot, hub.get("subfolder") or "").glob(f"*/{CONFIG_NAME}")
    return [file.parent.name for file in files]


def _is_unreachable(error: Exception) -> bool:
    """Whether an error says that the hub cannot be reached, or must not be asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error, LocalEntryNotFoundError)


def _is_absent(error: Exception) -> bool:
    """Whether an error says that there is no such file, and not that the hub cannot be reached."""
    from huggingface_hub.errors import EntryNotFoundError

    if isinstance(error, EntryNotFoundError):
        return not _is_unreachable(error)
    return isinstance(error, FileNotFoundError) and hasattr(error, "lesa_message")


def _downloaded(name: str, hub: Mapping[str, Any]) -> Files:
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
            warnings.warn(" ".join(text.split()), RuntimeWarning, stacklevel=5)
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
