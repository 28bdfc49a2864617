"""The moving picture of an evaluation: the contenders' videos, one row per run and one column per sample."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lesa.artifacts import whole_file
from lesa.evaluation.picture import color_of_run, figures_of_run, place_of_run, title_of_run
from lesa.evaluation.shown import GIF, MP4
from lesa.videos import why_no_mp4, write_gif, write_mp4

if TYPE_CHECKING:
    from lesa.evaluation.result import EvaluatedRun

FPS = 10
"""Frames per second of the moving picture."""

SMALLEST_SIDE = 96
"""Narrower frames are shown enlarged, by a whole factor."""

MOST_PIXELS = 12 << 20
"""Of all frames of the moving picture together. Larger videos are shown scaled down."""

GAP = 4
"""Between the cells of the grid and around them, in pixels."""


def moving_pictures(runs: Sequence["EvaluatedRun"], clips: Mapping[str, np.ndarray]) -> list[Image.Image]:
    """The frames of the moving picture; empty if none of the runs has clips.

    Args:
        runs: those to show. Those without clips are left out.
        clips: by run, as `lesa.evaluation.shown.Shown` has them.
    """
    shown = sorted((run for run in runs if run.name in clips), key=place_of_run)
    return _frames(shown, clips) if shown else []


def save_gif(frames: Sequence[Image.Image], folder: Path) -> list[Path]:
    """Writes `comparison.gif` if there are frames. Returns its path, in a list."""
    file = folder / GIF
    if not frames:
        file.unlink(missing_ok=True)  # one of an earlier evaluation would show other runs
        return []
    with whole_file(file) as temporary:
        write_gif(_of_one_palette(frames), temporary, FPS)
    return [file]


def save_mp4(frames: Sequence[Image.Image], folder: Path) -> list[Path]:
    """Writes `comparison.mp4` if there are frames and it can be written. Returns its path, in a list.

    Raises:
        OSError: ffmpeg has failed.
    """
    file = folder / MP4
    file.unlink(missing_ok=True)  # as above
    if not frames or why_no_mp4() is not None:
        return []
    with whole_file(file) as temporary:
        write_mp4(frames, temporary, FPS)
    return [file]


def _frames(runs: Sequence["EvaluatedRun"], clips: Mapping[str, np.ndarray]) -> list[Image.Image]:
    count = min(len(clips[run.name]) for run in runs)
    _, length, height, width, _ = clips[runs[0].name].shape
    size = _cell(width, height, len(runs) * count * length)
    resampling = Image.Resampling.NEAREST if size[0] > width else Image.Resampling.LANCZOS
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    bold, plain = (ImageFont.truetype(fonts / name, 12) for name in ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf"))
    texts = [((bold, title_of_run(run)), (plain, figures_of_run(run, timed=False))) for run in runs]
    left = 2 * GAP + math.ceil(max(font.getlength(text) for lines in texts for font, text in lines))
    row = max(size[1], 32)  # its text must fit
    grid = Image.new("RGB", (left + count * (size[0] + GAP), GAP + len(runs) * (row + GAP)), "white")
    draw = ImageDraw.Draw(grid)
    for number, (run, lines) in enumerate(zip(runs, texts)):
        middle = GAP + number * (row + GAP) + row / 2
        for (font, text), anchor, color in zip(lines, ("lb", "lt"), (color_of_run(run), "#404040")):
            draw.text((GAP, middle), text, color, font, anchor)
    frames = []
    for moment in range(length):
        frame = grid.copy()
        for number, run in enumerate(runs):
            for sample in range(count):
                picture = Image.fromarray(clips[run.name][sample, moment]).resize(size, resampling)
                frame.paste(picture, (left + sample * (size[0] + GAP), GAP + number * (row + GAP)))
        frames.append(frame)
    return frames


def _cell(width: int, height: int, cells: int) -> tuple[int, int]:
    """The size in which a frame is shown, if so many are shown in all."""
    if width < SMALLEST_SIDE:
        return width * (times := math.ceil(SMALLEST_SIDE / width)), height * times
    scale = min(1.0, math.sqrt(MOST_PIXELS / (cells * width * height)))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _of_one_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames in the same 256 colours, without dithering: both would add a flicker that the videos do not have."""
    some = frames[:: math.ceil(len(frames) / 8)]
    together = Image.new("RGB", (frames[0].width, frames[0].height * len(some)))
    for number, frame in enumerate(some):
        together.paste(frame, (0, number * frame.height))
    palette = together.quantize(256)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
