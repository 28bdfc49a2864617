"""`report`: one self-contained page of HTML from what `lesa evaluate` wrote."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np

from lesa import contenders
from lesa.artifacts import write_text
from lesa.contenders import UNKNOWN_COLOR, Reference, order_of
from lesa.evaluation.budgets import budgets_of, chosen, color_of, headline, label_of, ours_among, title_of
from lesa.evaluation.naming import SEPARATOR
from lesa.evaluation.quality import signed
from lesa.evaluation.report_pictures import moving_picture_of, pictures_of
from lesa.evaluation.rivals import rivals
from lesa.evaluation.summaries import read_summary

_PAGE = Path(__file__).with_name("page")

_METRICS = (  # key, short, name, digits, whether errors: the less the better, and on a logarithmic axis
    ("psnr", "PSNR", "PSNR, dB", 2, False),
    ("frame_psnr", "frames", "PSNR per frame, dB", 2, False),
    ("temporal_psnr", "temporal", "temporal PSNR, dB", 2, False),
    ("ssim", "SSIM", "SSIM", 4, False),
    ("latent_error", "latents", "relative error of the latents", 4, True),
    ("lpips", "LPIPS", "LPIPS", 4, True),
    ("clip_score", "CLIP", "CLIP score", 3, False),
    ("image_reward", "ImageReward", "ImageReward", 3, False),
)


def report(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Writes one HTML page that shows an evaluation: curves, pictures, schedules, figures. It loads no other file.

    Args:
        folder: what `lesa evaluate` wrote: `summary.json`, and the pictures that it names.
        out: the page. None: `report.html` in `folder`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no summary, or a picture that it names is missing.
        ValueError: the summary is not of this format; the message names the field.
    """
    folder = Path(folder)
    out = folder / "report.html" if out is None else Path(out)
    summary = read_summary(folder, "folder", "Run `lesa evaluate` of this release again.")
    runs = summary["runs"][1:]
    ours = ours_among({run["contender"] for run in runs}, {run["contender"] for run in runs if run.get("predictor")})
    page = _page(summary, ours, folder)
    sentence, comparison, tiles = headline(summary, page["budgets"][page["chosen"]] if page["budgets"] else None)
    columns, rows = _table(summary, ours)
    by_name = {run["name"]: run for run in runs}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    html = environment.get_template("page.html").render(
        title=f"lesa report: {summary['model']}",
        summary=summary,
        headline=sentence,
        comparison=comparison,
        tiles=tiles,
        page=page,
        rivals=rivals(runs, ours, [by_name[budget["ours"]] for budget in page["budgets"]]),
        columns=columns,
        rows=rows,
        has_others=any(row["other"] for row in rows),
        facts=_facts(summary),
        tried=_tried(runs, ours),
        colors=[(f"c-{kind.name}", kind.color) for kind in contenders.every_contender()] + [("other", UNKNOWN_COLOR)],
        error_scale=f"{page.pop('error_scale'):.0%}",
        gradient=", ".join(matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["magma"](np.linspace(0, 1, 9))),
        scaled=page.pop("scaled"),
        moving=moving_picture_of(summary, folder),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)
    return out


def _page(summary: dict, ours: str | None, folder: Path) -> dict[str, Any]:
    """The data of the page's script."""
    reference, *runs = summary["runs"]
    budgets = budgets_of(runs, ours)
    metrics: list[dict[str, Any]] = [
        {"key": key, "short": short, "name": name, "digits": digits, "log": log}
        for key, short, name, digits, log in _METRICS
        if any(run.get(key) is not None for run in runs)
    ]
    return {
        "runs": [_run(run, reference, key_names=[metric["key"] for metric in metrics]) for run in runs],
        "timed_apart": any(_timed_apart(run, reference) for run in runs),
        "contenders": {
            name: {"label": title_of(name), "color": color_of(name), "shape": order_of(name), "ours": name == ours}
            for name in _names(runs, ours)
        },
        "ours_label": title_of(ours) if ours else "",
        "budgets": budgets,
        "chosen": chosen(budgets, summary["num_inference_steps"]),
        "metrics": metrics,
        "sigmas": summary.get("sigmas") or [],
        "stage_bounds": summary.get("stage_bounds") or [],
        "has_errors": any(error for run in runs for error in run.get("step_errors") or ()),
        **pictures_of(summary, budgets, folder),
    }


def _names(runs: Sequence[dict], ours: str | None) -> list[str]:
    """The contenders of the runs, ours first."""
    return sorted(dict.fromkeys(run["contender"] for run in runs), key=lambda name: (name != ours, order_of(name)))


def _folder(name: str) -> str:
    """What distinguishes a run from others of its name, with the separator before it; empty if there is nothing."""
    _, separator, folder = name.partition(SEPARATOR)
    return separator + folder


def _timed_apart(run: dict, reference: dict) -> bool:
    """Whether the speed-up of a run refers to another timing of the reference than the latest one."""
    latest = reference.get("reference_seconds")
    return latest is not None and run.get("reference_seconds") != latest


def _run(run: dict, reference: dict, key_names: Sequence[str]) -> dict[str, Any]:
    kept = ("name", "contender", "step_equivalents", "seconds", "speedup", "num_inference_steps", *key_names)
    apart = _timed_apart(run, reference)
    return {name: run.get(name) for name in kept} | {
        "pace": reference["seconds"] / run["speedup"] if apart else run["seconds"],
        "label": f"{label_of(run['contender'])} {round(run['step_equivalents'], 1):g}{_folder(run['name'])}",
        "short": label_of(run["contender"]),
        "setting": run.get("setting") or "",
        "is_best": run.get("is_best", True),
        "steps": run["steps"] or [],
        "step_errors": run.get("step_errors") or [],
        "per_sample_psnr": (run.get("per_sample") or {}).get("psnr") or [],
    }


def _table(summary: dict, ours: str | None) -> tuple[list[dict], list[dict]]:
    """Columns, and rows of cells. A column without any figure is left out."""
    apart = any(_timed_apart(run, summary["runs"][0]) for run in summary["runs"][1:])

    def plain(key: str, digits: int) -> Callable[[dict], tuple[Any, str]]:
        return lambda run: (run.get(key), "" if run.get(key) is None else f"{run[key]:.{digits}f}")

    def text(key: str) -> Callable[[dict], tuple[Any, str]]:
        return lambda run: (run.get(key), str(run.get(key) or ""))

    def of_reference(run: dict) -> tuple[Any, str]:
        """Only where they differ."""
        return plain("reference_seconds", 2)(run) if apart else (None, "")

    def memory(run: dict) -> tuple[Any, str]:
        nbytes = run.get("peak_memory_bytes")
        return nbytes, "" if nbytes is None else f"{nbytes / 1e9:.2f}"

    def difference(run: dict) -> tuple[Any, str]:
        paired = run.get("against_ours") or {}
        value, low, high = (paired.get(key) for key in ("psnr_difference", "low", "high"))
        if value is None:
            return None, ""
        return value, signed(value) + ("" if low is None or high is None else f" [{signed(low)}, {signed(high)}]")

    every = [
        ("Run", "name of the run", text("name"), False),
        ("Predictor", "where it came from", text("predictor"), True),
        ("Step equivalents", "block forwards over the number of blocks", plain("step_equivalents", 2), False),
        ("Whole steps", "steps in which every block ran", plain("whole_steps", 2), False),
        ("Seconds", "end to end, with decoding", plain("seconds", 2), False),
        ("Denoising", "seconds without decoding", plain("denoise_seconds", 2), False),
        ("Speed-up", "of the seconds, to the reference in the same command", plain("speedup", 2), False),
        ("Reference, seconds", "of the reference in the same command", of_reference, False),
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
            "other": not run.get("is_best", True) and run["contender"] != Reference.name,
            "color": color_of(run["contender"]),
            "cells": [
                {"value": "" if value is None else value, "text": shown or "\N{EN DASH}", "is_text": is_text}
                for _, _, cell, is_text in used
                for value, shown in [cell(run)]
            ],
        }
        for run in runs
    ]
    return columns, rows


def _facts(summary: dict) -> list[tuple[str, str]]:
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
    """By contender, the settings with which it was run, and their figures."""
    names = _names(runs, ours)
    return [(title_of(name), [_line(run) for run in runs if run["contender"] == name]) for name in names]


def _line(run: dict) -> str:
    quality = "no difference" if run["psnr"] is None else f"{run['psnr']:.2f} dB"
    setting = f"{run['setting']}: " if run.get("setting") else ""
    return f"{run['name']}: {setting}{run['step_equivalents']:.4g} step equivalents, {quality}"
