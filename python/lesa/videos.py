"""Files of videos."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def why_no_mp4() -> str | None:
    """Why `write_mp4` cannot write; None if it can."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return "it needs imageio-ffmpeg, which is not installed. Install it with `pip install lesa-kernels[video]`."
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        return f"it needs ffmpeg: {error}"
    return None


def write_mp4(pictures: Iterable[Image.Image], file: Path, fps: float) -> None:
    """Writes a video in H.264, which needs an even height and width. If one is odd, the last row or column is repeated.

    Args:
        pictures: the frames.
        file: it may have any suffix.
        fps: frames per second.

    Raises:
        OSError: ffmpeg has failed.
    """
    import imageio_ffmpeg

    writer = None
    try:
        for picture in pictures:
            pixels = np.asarray(picture.convert("RGB"))
            odd = [(0, side % 2) for side in pixels.shape[:2]]
            pixels = np.ascontiguousarray(np.pad(pixels, (*odd, (0, 0)), mode="edge"))
            if writer is None:
                size = pixels.shape[1], pixels.shape[0]
                options: dict[str, Any] = {"fps": fps, "codec": "libx264", "macro_block_size": 1}
                writer = imageio_ffmpeg.write_frames(str(file), size, output_params=["-f", "mp4"], **options)
                writer.send(None)
            writer.send(pixels)
    finally:
        if writer is not None:
            writer.close()


def write_gif(pictures: Sequence[Image.Image], file: Path, fps: float) -> None:
    """Writes a gif. Frame times are rounded to hundredths of a second so that the total length is right.

    Args:
        pictures: the frames.
        file: it may have any suffix.
        fps: frames per second.
    """
    ends = [round(100 * number / fps) for number in range(len(pictures) + 1)]
    durations = [10 * (end - start) for start, end in zip(ends, ends[1:])]
    options: dict[str, Any] = {"append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0].save(file, "gif", save_all=True, **options)
