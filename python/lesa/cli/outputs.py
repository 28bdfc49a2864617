"""Files of pictures and videos: which formats can be written, and under which names."""

import inspect
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from lesa.cli import UsageError
from lesa.inputs import Sample
from lesa.videos import why_no_mp4, write_gif, write_mp4

FPS = 24
"""Frames per second of a video, if no rate is given; HunyuanVideo is trained for it."""
_USUAL = (".png", ".jpg", ".webp", ".gif", ".tif", ".bmp")
"""The suffixes that a message names."""

_MOST_CHECKED = 10_000
"""Frames of a video whose files are checked before the run."""

MOST_FPS = {".gif": 50}
"""A gif stores the time of a frame in hundredths of a second, and readers show none shorter than two."""


def makes_videos(call: Callable) -> bool:
    """Whether this `__call__` of a pipeline makes videos."""
    return "num_frames" in inspect.signature(call).parameters


def makes_layers(call: Callable) -> bool:
    """Whether this `__call__` of a pipeline makes several pictures that may be transparent."""
    return "layers" in inspect.signature(call).parameters


@cache
def can_be_written(suffix: str, mode: str = "RGB") -> bool:
    """Whether pictures of this mode can be saved with this suffix, and have the same size when they are read."""
    kind, size = Image.registered_extensions().get(suffix), (258, 2)  # icons have at most 256
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of formats that Pillow will drop one day
        try:
            Image.new(mode, size).save(file := io.BytesIO(), kind or "")
        except (KeyError, OSError, ValueError):  # no writer, or none for this mode
            return False
        try:
            return Image.open(file).size == size
        except OSError:  # no reader
            return True


def check_output(file: Path, call: Callable | None, fps: float | None = None) -> None:
    """Raises `UsageError` if the results of a pipeline cannot be written to this file.

    Args:
        file: the value of `--output`.
        call: the `__call__` of the pipeline, or None if it is not known yet.
        fps: the value of `--fps`, if it was given.
    """
    suffix = file.suffix.lower()
    pictures = makes_layers(call) if call is not None else False
    mode = "RGBA" if pictures else "RGB"
    if suffix != ".mp4" and not can_be_written(suffix, mode):
        known = ", ".join(usual for usual in _USUAL if can_be_written(usual, mode))
        what = f"{suffix!r} cannot be written" if suffix else "it has no suffix"
        raise UsageError(f"argument --output: {file} must end in the suffix of a format, but {what}. Use .mp4 for a "
                         f"video, or {known} or another format that Pillow can write.")  # fmt: skip
    if suffix == ".mp4" and (why := why_no_mp4()) is not None:
        raise UsageError(f"argument --output: {file} cannot be written: {why} Or use .gif or .png.")
    if call is not None and not makes_videos(call) and (suffix == ".mp4" or fps is not None):
        option = "--output: an .mp4 file holds a video" if fps is None else "--fps: it is for videos"
        raise UsageError(f"argument {option}, and this model makes pictures. Use .png, without --fps.")
    if fps is not None and suffix not in (".mp4", ".gif"):
        raise UsageError(f"argument --fps: {file} holds single pictures. Use it with .mp4 or .gif.")
    if fps is not None and fps > MOST_FPS.get(suffix, fps):
        raise UsageError(f"argument --fps: a {suffix} file has at most {MOST_FPS[suffix]}, but got {fps:g}. Use .mp4.")
    _check_file(file)
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UsageError(f"argument --output: {folder} is a file, so that {file} cannot be in it. Choose another file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"argument --output: nothing can be written to the folder {folder}. Choose another one.")


def file_of(output: Path, number: int, count: int) -> Path:
    """The file of one of `count` samples: `x.png` is `x-00000.png` and so on, unless there is one sample."""
    return output if count == 1 else output.with_name(f"{output.stem}-{number:05d}{output.suffix}")


def check_files(output: Path, samples: Sequence[Sample], call: Callable | None) -> None:
    """Raises `UsageError` if one of the files that `write` will make cannot be written.

    Args:
        output: the value of `--output`.
        samples: one for each call of the pipeline.
        call: its `__call__`, or None if it is not known yet.
    """
    defaults = {} if call is None else {n: p.default for n, p in inspect.signature(call).parameters.items()}
    if output.suffix.lower() in (".mp4", ".gif"):
        defaults.pop("num_frames", None)
    counted = next((name for name in ("num_frames", "layers") if name in defaults), None)
    for number, sample in enumerate(samples):
        count = 1 if counted is None else sample.arguments.get(counted, defaults[counted])
        is_count = isinstance(count, int) and not isinstance(count, bool)  # another value is refused later, or fitted
        for file in _numbered(file_of(output, number, len(samples)), min(count, _MOST_CHECKED) if is_count else 1):
            _check_file(file)


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise UsageError(f"argument --output: {file} is a folder. Give the name of a file in it.")
    if file.exists() and not os.access(file, os.W_OK):
        raise UsageError(f"argument --output: {file} exists and is write-protected. Choose another file.")


def write(result: Any, file: Path, fps: float | None) -> list[Path]:
    """Writes what a pipeline returned, and returns the files.

    A video is one file in `.mp4` and `.gif`. In other formats, each frame is a file: `v.png` becomes `v-0000.png` and
    so on. If a call returns several pictures, such as layers, each is a file in the same way.

    Args:
        result: with `images` or `frames`.
        file: its suffix is the format. The folder is made if missing.
        fps: frames per second of a video. None: 24.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    suffix, rate = file.suffix.lower(), FPS if fps is None else fps
    if hasattr(result, "frames") and suffix in (".mp4", ".gif"):
        videos = [[*_pictures(video)] for video in result.frames]
        files = _numbered(file, len(videos))
        for video, name in zip(videos, files):
            (write_mp4 if suffix == ".mp4" else write_gif)(video, name, rate)
        return files
    pictures = [*_pictures(result.frames if hasattr(result, "frames") else result.images)]
    files = _numbered(file, len(pictures))
    for picture, name in zip(pictures, files):
        picture.save(name)
    return files


def _pictures(value: Any) -> Iterator[Image.Image]:
    """The pictures in nested lists."""
    if isinstance(value, Image.Image):
        yield value
    else:
        for part in value:
            yield from _pictures(part)


def _numbered(file: Path, count: int) -> list[Path]:
    if count == 1:
        return [file]
    return [file.with_name(f"{file.stem}-{number:04d}{file.suffix}") for number in range(count)]
