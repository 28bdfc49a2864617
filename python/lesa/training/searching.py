"""The folder of a training, and what an interrupted search has left there."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lesa.artifacts import check_same_settings, read_json, remove_partial, write_text
from lesa_kernels.checks import Said, argument_error

SEARCH_NAME = "search"
PARTS_NAME = "parts.json"


class Search:
    """The finished parts of a search. After an interruption, they are not done again.

    Args:
        out_dir: folder of the training for which something is searched. None: nothing is written.
        settings: all that must be the same for the search to continue, by name.

    Raises:
        ValueError: the folder has an unfinished search with other settings, or one that cannot be read.
    """

    def __init__(self, out_dir: Path | None = None, settings: Mapping[str, Any] | None = None):
        self.folder = None if out_dir is None else out_dir / SEARCH_NAME
        self._parts: dict[str, Any] = {}
        self._settings = _as_json({} if settings is None else settings)
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        file = self.folder / PARTS_NAME
        remove_partial(file)
        if file.exists():
            kept = _read(file)
            check_same_settings(f"the unfinished search in {out_dir}", kept["settings"], self._settings)
            self._parts = kept["parts"]
        self._write()

    def part(self, name: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        """What `compute(*arguments)` gives, as JSON has it: tuples become lists.

        Args:
            name: of this part of the search; no other part has it.
            compute: gives what can be written as JSON. It is called unless the part was finished before.
            arguments: of `compute`.
        """
        if name not in self._parts:
            self._parts[name] = _as_json(compute(*arguments))
            self._write()
        return self._parts[name]

    def training_folder(self, name: str) -> Path | None:
        """A folder for the checkpoint of a training within the search, or None."""
        return None if self.folder is None else self.folder / name

    def _write(self) -> None:
        if self.folder is not None:
            write_text(self.folder / PARTS_NAME, json.dumps({"settings": self._settings, "parts": self._parts}) + "\n")


def has_search(out_dir: Path) -> bool:
    """Whether the folder holds an unfinished search."""
    return (out_dir / SEARCH_NAME / PARTS_NAME).exists()


def discard_search(out_dir: Path) -> None:
    """Removes what a search has left in the folder, if anything."""
    if (out_dir / SEARCH_NAME).exists():
        shutil.rmtree(out_dir / SEARCH_NAME)


def _as_json(value: Any) -> Any:
    """The value as it is after it was written and read: numbers are the same, to the last bit."""
    return json.loads(json.dumps(value))


def _read(file: Path) -> dict[str, Any]:
    kept = read_json(file)
    if isinstance(kept, dict) and all(isinstance(kept.get(name), dict) for name in ("settings", "parts")):
        return kept
    must, got = "hold a search that can be read", Said(f"{file}, which is damaged")
    raise argument_error("out_dir", must, got, f"Delete {file.parent} to search again.")
