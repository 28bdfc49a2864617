"""Loading pipelines by name, for the command line and the demo."""

import contextlib
import os
from typing import Any

from diffusers import DiffusionPipeline

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def load_pipeline(folder_or_id: str | os.PathLike, **options: Any) -> DiffusionPipeline:
    """Loads a pipeline that may have been saved with some components empty, such as its text encoders.

    `DiffusionPipeline.from_pretrained` needs the names of the absent components. They are read from `model_index.json`.

    Args:
        folder_or_id: a folder, or a repository on the Hugging Face hub.
        options: passed to `DiffusionPipeline.from_pretrained`.
    """
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    index = DiffusionPipeline.load_config(folder_or_id, **hub)
    absent = {name: None for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is None}
    return DiffusionPipeline.from_pretrained(folder_or_id, **{**absent, **options})


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
