"""The pictures of a report: the runs' images and the maps of their errors, as data URIs."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from lesa_kernels.checks import Said, argument_error

ERROR_SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Mean absolute errors of a pixel, of a range of 1. The error maps show one of them as their brightest colour: the
smallest that 95 % of all pixels are below."""

LARGEST_MOVING_PICTURE = 12 << 20
"""In bytes. A larger one is named, but not embedded."""

LARGEST_SIDE = 768
"""Of an embedded picture, in pixels. A larger one is scaled down, so that the page can be sent by mail."""


def pictures_of(summary: dict, budgets: Sequence[dict], folder: Path) -> dict[str, Any]:
    """Pictures and error maps of the runs that the page can show.

    Args:
        summary: what `lesa evaluate` wrote.
        budgets: as `lesa.evaluation.budgets.budgets_of` gives them.
        folder: of the pictures' files.

    Raises:
        FileNotFoundError: a picture is missing.
        ValueError: a picture is outside of the folder.
    """
    files = summary.get("images") or {}
    reference = summary["runs"][0]["name"]
    shown = {name for budget in budgets for name in (budget["ours"], *budget["peers"])}
    shown = shown or {run["name"] for run in summary["runs"][1:] if run.get("is_best", True)}
    names = [run["name"] for run in summary["runs"][1:] if run["name"] in shown and files.get(run["name"])]
    none = {"pictures": {}, "reference_pictures": [], "samples": 0, "pictured": [], "scaled": "", "error_scale": 1.0}
    if not names or not files.get(reference):
        return {**none, "aspect": "1", "pixelated": False}
    count = min(len(files[name]) for name in (reference, *names))
    wanted = [_open(folder, file) for file in files[reference][:count]]
    first = wanted[0]
    large = max(first.size) > LARGEST_SIDE
    images = {name: [_open(folder, file) for file in files[name][:count]] for name in names}
    errors = {name: [_error(image, full) for image, full in zip(images[name], wanted)] for name in names}
    most = np.quantile(np.concatenate([error.ravel() for maps in errors.values() for error in maps]), 0.95)
    scale = next(scale for scale in ERROR_SCALES if scale >= min(most, 1.0))
    return {
        "pictures": {
            name: [
                {"picture": _picture_uri(image), "error": _map_uri(error, scale), "mean": float(error.mean())}
                for image, error in zip(images[name], errors[name])
            ]
            for name in names
        },
        "error_scale": scale,
        "reference_pictures": [_picture_uri(image) for image in wanted],
        "samples": count,
        "pictured": names,
        "aspect": f"{first.width}/{first.height}",
        "pixelated": max(first.size) < 128,
        "scaled": f"Pictures are scaled down to {LARGEST_SIDE} pixels here, figures are not." if large else "",
    }


def moving_picture_of(summary: dict, folder: Path) -> dict[str, Any] | None:
    """The moving picture of an evaluation of videos, or None.

    Args:
        summary, folder: as for `pictures_of`.

    Returns:
        `file`, its name; `uri`, its contents; None in place of the contents if it is too large to be embedded.

    Raises:
        FileNotFoundError, ValueError: as `pictures_of` does.
    """
    file = summary.get("moving_picture")
    if file is None:
        return None
    path = _path(folder, file, "moving_picture")
    uri = None
    if path.stat().st_size <= LARGEST_MOVING_PICTURE:
        uri = f"data:image/gif;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"file": file, "uri": uri}


def _open(folder: Path, file: str) -> Image.Image:
    with Image.open(_path(folder, file)) as image:
        return image.convert("RGB")


def _path(folder: Path, file: str, field: str = "images") -> Path:
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise argument_error(field, "be in the evaluation's folder", file, "Remove it from summary.json.")
    if not path.is_file():
        remedy = "Keep the pictures beside summary.json, or run `lesa evaluate` again."
        raise argument_error(field, "exist", Said(f"no {path}"), remedy, FileNotFoundError)
    return path


def _error(image: Image.Image, wanted: Image.Image) -> np.ndarray:
    """The mean absolute error of each pixel, as a part of the range."""
    image = image if image.size == wanted.size else image.resize(wanted.size)
    return np.abs(np.asarray(image, np.float32) - np.asarray(wanted, np.float32)).mean(-1) / 255


def _map_uri(error: np.ndarray, scale: float) -> str:
    levels = Image.fromarray(np.minimum(error / scale * 255, 255).round().astype(np.uint8))
    levels.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    levels.putpalette((matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes())
    return _uri(levels, "png")


def _picture_uri(image: Image.Image) -> str:
    if max(image.size) <= 256:
        return _uri(image, "png")
    image = image.copy()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return _uri(image, "webp", quality=88)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
