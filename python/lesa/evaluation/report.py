"""`report`: one self-contained page of HTML from what `lesa evaluate` wrote."""

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from PIL import Image

from lesa_kernels.checks import Said, argument_error

FORMAT_VERSION = 1
"""Of the `summary.json` that is read."""


ERROR_SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Mean absolute errors of a pixel, of a range of 1, one of which the error maps show as their brightest colour: the
least that 95 % of all pixels are below."""


LARGEST_SIDE = 768
"""Of an embedded picture, in pixels; a larger one is scaled down, so that the page stays of a size to be sent."""


_TEMPLATE = Path(__file__).with_name("report_template.html")


_OURS = ("newton", "dense")  # the first of these that was evaluated


_LABELS = {
    "newton": "newton",
    "dense": "dense, the LESA paper's",
    "taylorseer": "TaylorSeer",
    "steps": "fewer steps",
    "first-block-cache": "First Block Cache",
    "mag-cache": "MagCache",
    "cache-dit": "cache-dit",
}


_METRICS = (  # key, short, name, digits, whether errors: the less the better, and on a logarithmic axis
    ("psnr", "PSNR", "PSNR, dB", 2, False),
    ("ssim", "SSIM", "SSIM", 4, False),
    ("latent_error", "latents", "relative error of the latents", 4, True),
    ("lpips", "LPIPS", "LPIPS", 4, True),
    ("clip_score", "CLIP", "CLIP score", 3, False),
    ("image_reward", "ImageReward", "ImageReward", 3, False),
)


_NEEDED = ("model", "samples", "seed", "num_inference_steps", "runs")


_NEEDED_OF_RUN = ("name", "contender", "steps", "num_inference_steps", "step_equivalents", "seconds", "speedup", "psnr")


def report(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Writes one HTML page that shows an evaluation: curves, pictures, schedules, figures. It loads nothing.

    Args:
        folder: what `lesa evaluate` wrote: `summary.json`, and the pictures that it names.
        out: the page. None: `report.html` in `folder`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no summary, or not the pictures that it names.
        ValueError: the summary is not of this format; the message names the field.
    """
    folder = Path(folder)
    out = folder / "report.html" if out is None else Path(out)
    summary = _read(folder)
    runs = summary["runs"][1:]
    ours = next((c for c in _OURS if any(run["contender"] == c for run in runs)), None)
    page = _page(summary, ours, folder)
    headline, comparison, tiles = _headline(summary, page["budgets"][page["chosen"]] if page["budgets"] else None)
    columns, rows = _table(summary, ours)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"lesa report: {summary['model']}",
        summary=summary,
        headline=headline,
        comparison=comparison,
        tiles=tiles,
        page=page,
        columns=columns,
        rows=rows,
        has_others=any(row["other"] for row in rows),
        facts=facts_of(summary),
        tried=_tried(runs, ours),
        error_scale=f"{page.pop('error_scale'):.0%}",
        gradient=", ".join(matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["magma"](np.linspace(0, 1, 9))),
        scaled=page.pop("scaled"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def _read(folder: Path) -> dict:
    file = folder / "summary.json"
    if not file.is_file():
        remedy = "Pass the folder that `lesa evaluate` wrote."
        raise argument_error("folder", "hold a summary.json", Said(str(folder)), remedy, FileNotFoundError)
    remedy = "Run `lesa evaluate` of this release again."
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise argument_error("folder", "hold a summary.json of JSON", Said(f"{file}: {error}"), remedy) from None
    version = summary.get("format_version") if isinstance(summary, dict) else None
    if version != FORMAT_VERSION:
        raise argument_error("format_version", f"be {FORMAT_VERSION} in {file}", version, remedy)
    _check_fields(str(file), summary, _NEEDED, remedy)
    for number, run in enumerate(summary["runs"]):
        _check_fields(f"{file}, run {number}", run, _NEEDED_OF_RUN, remedy)
    if not summary["runs"] or summary["runs"][0]["contender"] != "reference":
        raise argument_error("runs", f"begin with the reference in {file}", Said("another one, or none"), remedy)
    return summary


def _check_fields(place: str, values: Any, needed: Sequence[str], remedy: str) -> None:
    absent = [name for name in needed if name not in values] if isinstance(values, dict) else list(needed)
    if absent:
        raise argument_error(absent[0], f"be given in {place}", Said("no such field"), remedy)


def _page(summary: dict, ours: str | None, folder: Path) -> dict:
    """What the page's script is given."""
    runs = summary["runs"][1:]
    names = dict.fromkeys(run["contender"] for run in runs)
    budgets = _budgets(runs, ours)
    metrics = [
        {"key": key, "short": short, "name": name, "digits": digits, "log": log}
        for key, short, name, digits, log in _METRICS
        if any(run.get(key) is not None for run in runs)
    ]
    return {
        "runs": [_run(run, key_names=[metric["key"] for metric in metrics]) for run in runs],
        "contenders": {
            name: {"label": _label(name), "color": _color(name), "shape": _shape(name), "ours": name == ours}
            for name in sorted(names, key=lambda name: (name != ours, _shape(name)))
        },
        "ours_label": _label(ours) if ours else "",
        "budgets": budgets,
        "chosen": _chosen(budgets, summary["num_inference_steps"]),
        "metrics": metrics,
        "sigmas": summary.get("sigmas") or [],
        "stage_bounds": summary.get("stage_bounds") or [],
        "has_errors": any(error for run in runs for error in run.get("step_errors") or ()),
        **_pictures(summary, budgets, folder),
    }


def _run(run: dict, key_names: Sequence[str]) -> dict:
    kept = ("name", "contender", "step_equivalents", "seconds", "speedup", "num_inference_steps", *key_names)
    return {name: run.get(name) for name in kept} | {
        "label": f"{_short(run['contender'])} {round(run['step_equivalents'], 1):g}",
        "short": _short(run["contender"]),
        "setting": run.get("setting") or "",
        "is_best": run.get("is_best", True),
        "steps": run["steps"] or [],
        "step_errors": run.get("step_errors") or [],
        "per_sample_psnr": (run.get("per_sample") or {}).get("psnr") or [],
    }


def _budgets(runs: Sequence[dict], ours: str | None) -> list[dict]:
    """Our runs from most to least steps, each with the nearest of every other contender's best settings.

    Of two that are as near, the one of more steps is taken.
    """
    best = [run for run in runs if run.get("is_best", True)]
    mine = [run for run in best if run["contender"] == ours]
    others = [name for name in dict.fromkeys(run["contender"] for run in runs) if name != ours]
    budgets = []
    for run in sorted(mine, key=lambda run: -run["step_equivalents"]):
        count = run["step_equivalents"]
        near = [
            min(
                (peer for peer in best if peer["contender"] == name),
                key=lambda peer: (round(abs(peer["step_equivalents"] - count), 6), -peer["step_equivalents"]),
                default=None,
            )
            for name in sorted(others, key=_shape)
        ]
        peers = [peer["name"] for peer in near if peer is not None]
        budgets.append({"ours": run["name"], "text": f"{count:.4g}", "peers": peers})
    return budgets


def _chosen(budgets: Sequence[dict], num_inference_steps: int) -> int:
    """The budget that the page opens with: the one nearest to 9 steps of 50."""
    distances = [abs(float(budget["text"]) - 0.18 * num_inference_steps) for budget in budgets]
    return distances.index(min(distances)) if distances else 0


def _headline(summary: dict, budget: dict | None) -> tuple[str, str, list[tuple[str, str]]]:
    """The sentence at the top, the one below it, and figures with what they mean."""
    total, samples = summary["num_inference_steps"], summary["samples"]
    same = (
        f"Mean over {samples} samples; each is compared with the one of the same seed, computed in all {total} steps."
    )
    if budget is None:
        return f"What fewer than {total} steps give", same, []
    run = next(run for run in summary["runs"] if run["name"] == budget["ours"])
    computed, faster = f"{run['step_equivalents']:.3g} of {total}", f"{run['speedup']:.1f}"
    sentence = f"{computed} steps computed, {faster} times as fast"
    tiles = [(f"{faster}×", "as fast, end to end"), (computed, "steps computed")]
    if run["psnr"] is None:
        return f"{sentence}, and the same pictures.", same, tiles
    quality = f"{run['psnr']:.1f} dB"
    sentence += f", and {quality} PSNR to the full run"
    tiles.append((quality, "PSNR against the full run"))
    rivals = [
        peer
        for peer in summary["runs"][1:]
        if peer["contender"] != run["contender"]
        and peer["psnr"] is not None
        and peer["step_equivalents"] <= run["step_equivalents"] + 1
    ]
    if not rivals:
        return f"{sentence}.", same, tiles
    best = max(rivals, key=lambda peer: peer["psnr"])
    name, ahead = _label(best["contender"]), run["psnr"] - best["psnr"]
    sentence += f": {abs(ahead):.1f} dB {'above' if ahead >= 0 else 'below'} the best of the others."
    tiles.append((f"{ahead:+.1f} dB".replace("-", "\N{MINUS SIGN}"), f"to {name}"))
    count = f"{best['step_equivalents']:.3g} step equivalents"
    text = f"The best of the others with at most one step more is {name} at {count}, {best['psnr']:.1f} dB. {same}"
    paired = best.get("against_ours") or {}
    if paired.get("ours") == run["name"] and paired.get("low") is not None:
        text += f" The 95 % interval of the difference is {paired['low']:.1f} to {paired['high']:.1f} dB."
    return sentence, text, tiles


def _pictures(summary: dict, budgets: Sequence[dict], folder: Path) -> dict:
    """Pictures and error maps as data URIs, of the runs that the page can show."""
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


def _open(folder: Path, file: str) -> Image.Image:
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise argument_error("images", "be files in the evaluation's folder", file, "Remove it from summary.json.")
    if not path.is_file():
        remedy = "Keep the pictures beside summary.json, or run `lesa evaluate` again."
        raise argument_error("images", "be there", Said(f"no {path}"), remedy, FileNotFoundError)
    with Image.open(path) as image:
        return image.convert("RGB")


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


def _uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(summary: dict, ours: str | None) -> tuple[list[dict], list[dict]]:
    """Columns, and rows of cells. A column in which nobody has a figure is left out."""

    def plain(key: str, digits: int) -> Callable[[dict], tuple[Any, str]]:
        return lambda run: (run.get(key), "" if run.get(key) is None else f"{run[key]:.{digits}f}")

    def text(key: str) -> Callable[[dict], tuple[Any, str]]:
        return lambda run: (run.get(key), str(run.get(key) or ""))

    def memory(run):
        nbytes = run.get("peak_memory_bytes")
        return nbytes, "" if nbytes is None else f"{nbytes / 1e9:.2f}"

    def difference(run):
        paired = run.get("against_ours") or {}
        value, low, high = (paired.get(key) for key in ("psnr_difference", "low", "high"))
        if value is None:
            return None, ""
        return value, f"{value:+.2f}" + ("" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]")

    every = [
        ("Run", "name of the run", text("name"), False),
        ("Step equivalents", "block forwards over the number of blocks", plain("step_equivalents", 2), False),
        ("Whole steps", "steps in which every block ran", plain("whole_steps", 2), False),
        ("Seconds", "end to end, with decoding", plain("seconds", 2), False),
        ("Denoising", "seconds without decoding", plain("denoise_seconds", 2), False),
        ("Speed-up", "of the seconds", plain("speedup", 2), False),
        ("Memory, GB", "peak on the device", memory, False),
        *((name[0].upper() + name[1:], name, plain(key, digits), False) for key, _, name, digits, _ in _METRICS),
        ("Latent PSNR, dB", "of the latents for a peak of 2", plain("latent_psnr", 2), False),
        ("Ours better by, dB", "paired difference of PSNR, with its 95 % interval", difference, False),
        ("Setting", "of the contender", text("setting"), True),
    ]
    runs = summary["runs"]
    used = [c for c in every if any(c[2](run)[0] not in (None, "") for run in runs)]
    columns = [{"title": title, "hint": hint} for title, hint, _, _ in used]
    rows = [
        {
            "ours": run["contender"] == ours,
            "other": not run.get("is_best", True) and run["contender"] != "reference",
            "color": _color(run["contender"]),
            "cells": [
                {"value": "" if value is None else value, "text": shown or "\N{EN DASH}", "is_text": is_text}
                for _, _, cell, is_text in used
                for value, shown in [cell(run)]
            ],
        }
        for run in runs
    ]
    return columns, rows


def facts_of(summary: dict) -> list[tuple[str, str]]:
    """How it was made, as names and values."""
    seed, samples = summary["seed"], summary["samples"]
    facts = [
        ("Model", summary["model"]),
        ("Samples", f"{samples}, of the seeds {seed} to {seed + samples - 1}"),
        ("Steps of the reference", summary["num_inference_steps"]),
        ("Batch size", summary.get("batch_size")),
        ("Dtype", summary.get("dtype")),
        ("Device", summary.get("device")),
        ("CPU threads", summary.get("threads")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())),
    ]
    facts += [(f"Not available: {name}", why) for name, why in (summary.get("not_available") or {}).items()]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _tried(runs: Sequence[dict], ours: str | None) -> list[tuple[str, list[str]]]:
    """By contender, the settings with which it was run, and what came of them."""
    names = sorted(dict.fromkeys(run["contender"] for run in runs), key=lambda name: (name != ours, _shape(name)))
    return [(_label(name), [_line(run) for run in runs if run["contender"] == name]) for name in names]


def _line(run: dict) -> str:
    quality = "no difference" if run["psnr"] is None else f"{run['psnr']:.2f} dB"
    setting = f"{run['setting']}: " if run.get("setting") else ""
    return f"{run['name']}: {setting}{run['step_equivalents']:.4g} step equivalents, {quality}"


def _label(contender: str) -> str:
    return _LABELS.get(contender, contender)


def _short(contender: str) -> str:
    return "dense" if contender == "dense" else _label(contender)


def _shape(contender: str) -> int:
    """Its place in the list of those that are known, by which its mark is chosen."""
    return [*_LABELS].index(contender) if contender in _LABELS else len(_LABELS)


def _color(contender: str) -> str:
    """Name of the page's colour."""
    return f"--c-{contender}" if contender in _LABELS else "--c-other"
