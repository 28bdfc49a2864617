"""What is kept of a run's images and videos, to be shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

GIF, MP4 = "comparison.gif", "comparison.mp4"
"""The files of the moving picture."""

PICTURED_SAMPLES = 8
MOST_SAMPLES, MOST_FRAMES, LARGEST_WIDTH = 4, 64, 256
"""What is kept of a run's videos: so many of them, so many frames of each, and frames so wide."""

MOST_BYTES = 12 << 20
"""Of what is kept of a run. Fewer videos are kept where these would be more, but at least one."""


@dataclass(frozen=True)
class Shown:
    """What is kept of a run's images and videos, to be shown.

    Args:
        images: the first few of one size, `[n, height, width, 3]` in [0, 1]; of videos the middle frames.
        clips: the first few videos, uint8 `[n, frames, height, width, 3]`: evenly chosen frames where there are many,
            scaled down where they are wide. None for images, and if an older release kept the run.
    """

    images: np.ndarray
    clips: np.ndarray | None = None

    @classmethod
    def of(cls, samples: Sequence[np.ndarray]) -> "Shown":
        """Of all samples of a run, `[height, width, 3]` or `[frames, height, width, 3]` in [0, 1]."""
        alike = [sample for sample in samples if sample.shape == samples[0].shape]
        if samples[0].ndim != 4:
            return cls(np.stack(alike[:PICTURED_SAMPLES]))
        return cls(np.stack([video[len(video) // 2] for video in alike[:PICTURED_SAMPLES]]), _clips_of(alike))


def _clips_of(videos: Sequence[np.ndarray]) -> np.ndarray:
    stride = math.ceil(len(videos[0]) / MOST_FRAMES)
    clips: list[np.ndarray] = []
    for video in videos[:MOST_SAMPLES]:
        clips.append(np.stack([_small(frame) for frame in video[::stride]]))
        if clips[0].nbytes * (len(clips) + 1) > MOST_BYTES:
            break
    return np.stack(clips)


def _small(frame: np.ndarray) -> np.ndarray:
    picture = Image.fromarray((np.nan_to_num(frame).clip(0, 1) * 255).round().astype(np.uint8))
    picture.thumbnail((LARGEST_WIDTH, LARGEST_WIDTH * picture.height), Image.Resampling.LANCZOS)
    return np.asarray(picture)
