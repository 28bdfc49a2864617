"""Loading pipelines by name, for the command line and the demo."""

import contextlib
import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from lesa_kernels.checks import Said, argument_error

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def load_pipeline(folder_or_id: str | os.PathLike, **options: Any) -> DiffusionPipeline:
    """Loads a pipeline that may have been saved with some components empty, such as its text encoders.

    `DiffusionPipeline.from_pretrained` needs the names of the absent components. They are read from `model_index.json`.

    Args:
        folder_or_id: a folder, or a repository on the Hugging Face hub.
        options: passed to `DiffusionPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: it looks like a path, and there is no such folder. The hub is not asked.
    """
    check_folder_or_id("folder_or_id", folder_or_id)
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    index = DiffusionPipeline.load_config(folder_or_id, **hub)
    absent = {name: None for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is None}
    return DiffusionPipeline.from_pretrained(folder_or_id, **{**absent, **options})


def check_folder_or_id(name: str, value: str | os.PathLike) -> None:
    """Raises `FileNotFoundError` if `value` is no folder and cannot be meant as a hub id, which is "user/name".

    It is meant as a path if it is absolute or begins with a dot or "~", if it does not have exactly one separator, or
    if its parent folder exists.

    Args:
        name: the argument's name.
        value: what was received.
    """
    text, path = os.fspath(value).rstrip("/"), Path(value)
    if path.is_dir():
        return
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or path.parent.is_dir():
        given = repr(os.fspath(value))
        got = Said(f"{given}, which is a file" if path.is_file() else f"{given}, and there is no folder {given}")
        must = "be a folder or a hub id such as 'user/name'"
        raise argument_error(name, must, got, "Check the path.", FileNotFoundError)


@contextlib.contextmanager
def quiet_progress(pipe):
    """A context in which the pipeline's own progress bar is off."""
    had_config = hasattr(pipe, "_progress_bar_config")
    config = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        if had_config:
            pipe._progress_bar_config = config
        else:
            del pipe._progress_bar_config
