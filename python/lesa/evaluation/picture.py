"""The picture of an evaluation: the contenders' images side by side, and how far they are from the reference."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lesa.contenders import UNKNOWN_COLOR, Plain, Reference, kind_of, order_of

if TYPE_CHECKING:
    from lesa.evaluation.result import EvaluatedRun

ERROR_SCALE = 0.1
"""Mean absolute error per pixel, of a range of 1, that the error maps show as their brightest colour."""


def draw_comparison(
    runs: Sequence["EvaluatedRun"], images: Mapping[str, np.ndarray], file: str | os.PathLike, timed: bool = True
) -> None:
    """Draws one row per run: its name and figures, its images, and maps of their error against the first run.

    Args:
        runs: the first is the reference.
        images: by run, `[n, height, width, 3]` in [0, 1].
        file: the picture to write, in PNG.
        timed: whether it says how long the runs took.
    """
    reference = images[runs[0].name]
    rows = sorted(runs, key=place_of_run)
    count, height, width, _ = reference.shape
    row_inches = 0.62
    strip_inches = row_inches * (count * width + count - 1) / height
    label_inches, gap, margin, top = 2.45, 0.2, 0.15, 0.75
    column = max(strip_inches, 2.4)  # its heading must fit
    size = (margin + label_inches + 2 * column + gap + margin, top + len(rows) * (row_inches + 0.1) + 0.2)
    figure = Figure(figsize=size, dpi=max(150, height / row_inches if height < 512 else 512 / row_inches))
    FigureCanvasAgg(figure)
    smoothing = "nearest" if height < 64 else "antialiased"

    def place(left: float, bottom: float, strip_width: float, strip_height: float) -> Axes:
        return figure.add_axes((left / size[0], bottom / size[1], strip_width / size[0], strip_height / size[1]))

    def text(x: float, y: float, string: str, **style: Any) -> None:
        figure.text(x / size[0], y / size[1], string, **style)

    left = margin + label_inches
    right = left + column + gap
    heading = {"fontsize": 10, "va": "center", "color": "#202020", "fontweight": "bold"}
    text(left, size[1] - 0.5, "samples", **heading)
    text(right, size[1] - 0.5, "error against the reference", **heading)
    for number, run in enumerate(rows):
        bottom = size[1] - top - (number + 1) * row_inches - number * 0.1
        style = {"fontsize": 9.5, "fontweight": "bold", "va": "center", "color": color_of_run(run)}
        text(margin, bottom + 0.68 * row_inches, title_of_run(run), **style)
        text(margin, bottom + 0.30 * row_inches, figures_of_run(run, timed), fontsize=8, va="center", color="#404040")
        pictures = place(left, bottom, strip_inches, row_inches)
        pictures.imshow(_strip(images[run.name], fill=1.0), vmin=0, vmax=1, interpolation=smoothing, aspect="auto")
        pictures.axis("off")
        if run is runs[0]:
            bar = place(right, bottom + 0.52 * row_inches, column / 2, 0.22 * row_inches)
            bar.imshow(np.linspace(0, 1, 256)[None], cmap="magma", aspect="auto", extent=(0, ERROR_SCALE, 0, 1))
            bar.set_yticks([])
            bar.set_xticks([0, ERROR_SCALE / 2, ERROR_SCALE])
            bar.set_xticklabels(["0", f"{ERROR_SCALE / 2:.0%}", f"{ERROR_SCALE:.0%} of the range"], fontsize=7.5)
            bar.tick_params(length=2, pad=1.5)
            continue
        error = np.abs(images[run.name] - reference).mean(-1)
        maps = place(right, bottom, strip_inches, row_inches)
        maps.imshow(
            _strip(error, fill=np.nan), cmap="magma", vmin=0, vmax=ERROR_SCALE, interpolation=smoothing, aspect="auto"
        )
        maps.axis("off")
    figure.savefig(file, facecolor="white", format="png")


def _strip(images: np.ndarray, fill: float) -> np.ndarray:
    """The images `[n, height, width, ...]` in one row, a gap of about a sixteenth of their width between them."""
    gap = np.full((images.shape[1], max(1, images.shape[2] // 16), *images.shape[3:]), fill, images.dtype)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def place_of_run(run: "EvaluatedRun") -> tuple[int, int]:
    """Of its row: the reference, contenders in their order, those that are not registered, runs without a cache."""
    kind = kind_of(run.contender)
    if kind is Reference:
        return 0, 0
    return (2 if kind is not None and issubclass(kind, Plain) else 1), order_of(run.contender)


def color_of_run(run: "EvaluatedRun") -> str:
    """Of its title."""
    kind = kind_of(run.contender)
    return (UNKNOWN_COLOR if kind is None else kind.color).light


def title_of_run(run: "EvaluatedRun") -> str:
    """Its name, as people call it."""
    kind = kind_of(run.contender)
    return run.name if kind is None else kind.heading(run.name)


def figures_of_run(run: "EvaluatedRun", timed: bool) -> str:
    """Its steps and its PSNR, and how long it took if `timed`."""
    steps = f"{run.whole_steps:.3g} of {run.num_inference_steps} steps"
    if run.num_inference_steps == round(run.whole_steps):
        steps = f"{run.whole_steps:.3g} steps"
    elif abs(run.whole_steps - run.step_equivalents) >= 0.05:
        steps = f"{run.whole_steps:.3g} whole steps, cost {run.step_equivalents:.1f}"
    if run.contender == Reference.name:
        return f"{steps} computed, {run.seconds:.2f} s" if timed else f"{steps} computed"
    if "cost" in steps or not timed:  # one line has no room for both a cost and a speed-up
        return f"{steps}, {run.psnr:.1f} dB"
    return f"{steps}, speed-up {run.speedup:.1f}x, {run.psnr:.1f} dB"
