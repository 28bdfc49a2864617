"""The picture of an evaluation: the contenders' images side by side, and how far they are from the reference."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from lesa.evaluation import EvaluatedRun


_ERROR_SCALE = 0.1
"""Mean absolute error per pixel, of a range of 1, that the error maps show as their brightest colour."""


_GROUPS = {  # by the beginning of the name, in the order of the rows
    "reference": "#202020",
    "newton": "#0b6e4f",
    "dense": "#3a6ea5",
    "taylorseer": "#b3541e",
    "first-block-cache": "#8a6d00",
    "mag-cache": "#8b3a8f",
    "cache-dit": "#a11d33",
    "fewer-steps": "#6b6b6b",
}


_TITLES = {"first-block-cache": "First Block Cache", "mag-cache": "MagCache", "cache-dit": "cache-dit"}


def draw_comparison(runs: Sequence["EvaluatedRun"], images: Mapping[str, np.ndarray], file: str | os.PathLike) -> None:
    """Draws one row per run: its name and figures, its images, and maps of their error against the first run.

    Args:
        runs: the first is the reference.
        images: by run, `[n, height, width, 3]` in [0, 1].
        file: the picture to write.
    """
    reference = images[runs[0].name]
    rows = sorted(runs, key=lambda run: next(i for i, group in enumerate(_GROUPS) if run.name.startswith(group)))
    count, height, width, _ = reference.shape
    row_inches = 0.62
    strip_inches = row_inches * (count * width + count - 1) / height
    label_inches, gap, margin, top = 2.45, 0.2, 0.15, 0.75
    column = max(strip_inches, 2.4)  # its heading must fit
    size = (margin + label_inches + 2 * column + gap + margin, top + len(rows) * (row_inches + 0.1) + 0.2)
    figure = Figure(figsize=size, dpi=max(150, height / row_inches if height < 512 else 512 / row_inches))
    FigureCanvasAgg(figure)
    smoothing = "nearest" if height < 64 else "antialiased"

    def place(left, bottom, strip_width, strip_height):
        return figure.add_axes((left / size[0], bottom / size[1], strip_width / size[0], strip_height / size[1]))

    def text(x, y, string, **style):
        figure.text(x / size[0], y / size[1], string, **style)

    left = margin + label_inches
    right = left + column + gap
    heading = {"fontsize": 10, "va": "center", "color": "#202020", "fontweight": "bold"}
    text(left, size[1] - 0.5, "samples", **heading)
    text(right, size[1] - 0.5, "error against the reference", **heading)
    for number, run in enumerate(rows):
        bottom = size[1] - top - (number + 1) * row_inches - number * 0.1
        color = next(color for group, color in _GROUPS.items() if run.name.startswith(group))
        text(margin, bottom + 0.68 * row_inches, _title(run), fontsize=9.5, fontweight="bold", va="center", color=color)
        text(margin, bottom + 0.30 * row_inches, _figures(run), fontsize=8, va="center", color="#404040")
        pictures = place(left, bottom, strip_inches, row_inches)
        pictures.imshow(_strip(images[run.name], fill=1.0), vmin=0, vmax=1, interpolation=smoothing, aspect="auto")
        pictures.axis("off")
        if run is runs[0]:
            bar = place(right, bottom + 0.52 * row_inches, column / 2, 0.22 * row_inches)
            bar.imshow(np.linspace(0, 1, 256)[None], cmap="magma", aspect="auto", extent=(0, _ERROR_SCALE, 0, 1))
            bar.set_yticks([])
            bar.set_xticks([0, _ERROR_SCALE / 2, _ERROR_SCALE])
            bar.set_xticklabels(["0", f"{_ERROR_SCALE / 2:.0%}", f"{_ERROR_SCALE:.0%} of the range"], fontsize=7.5)
            bar.tick_params(length=2, pad=1.5)
            continue
        error = np.abs(images[run.name] - reference).mean(-1)
        maps = place(right, bottom, strip_inches, row_inches)
        maps.imshow(
            _strip(error, fill=np.nan), cmap="magma", vmin=0, vmax=_ERROR_SCALE, interpolation=smoothing, aspect="auto"
        )
        maps.axis("off")
    figure.savefig(file, facecolor="white")


def _strip(images: np.ndarray, fill: float) -> np.ndarray:
    """The images `[n, height, width, ...]` in one row, a gap of about a sixteenth of their width between them."""
    gap = np.full((images.shape[1], max(1, images.shape[2] // 16), *images.shape[3:]), fill, images.dtype)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def _title(run) -> str:
    if run.name.startswith("taylorseer"):
        return "TaylorSeer " + " ".join(run.name.split("-")[1:3]).replace("order", "order ")
    if run.contender in _TITLES:
        return _TITLES[run.contender]
    return run.name.replace("fewer-steps", "fewer steps").replace("-", " ")


def _figures(run) -> str:
    steps = f"{run.whole_steps:.3g} of {run.num_inference_steps} steps"
    if run.num_inference_steps == round(run.whole_steps):
        steps = f"{run.whole_steps:.3g} steps"
    elif abs(run.whole_steps - run.step_equivalents) >= 0.05:
        steps = f"{run.whole_steps:.3g} whole steps, cost {run.step_equivalents:.1f}"
    if run.name == "reference":
        return f"{steps} computed, {run.seconds:.2f} s"
    speed = "" if "cost" in steps else f"speed-up {run.speedup:.1f}x, "  # one line has room for one of both
    return f"{steps}, {speed}{run.psnr:.1f} dB"
