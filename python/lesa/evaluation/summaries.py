"""Reads `summary.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lesa.contenders import Reference
from lesa.evaluation.result import FORMAT_VERSION
from lesa_kernels.checks import Said, argument_error

SUMMARY = "summary.json"

_NEEDED = ("model", "samples", "seed", "num_inference_steps", "runs")
_NEEDED_OF_RUN = ("name", "contender", "steps", "num_inference_steps", "step_equivalents", "seconds", "speedup", "psnr")


def read_summary(folder: Path, argument: str, remedy: str) -> dict[str, Any]:
    """The summary in a folder.

    Args:
        folder: what `lesa evaluate` wrote.
        argument: the name that error messages use for the folder.
        remedy: what the user can do about a summary that can't be read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not of this format; the message names the field.
    """
    file = folder / SUMMARY
    if not file.is_file():
        missing = "Pass the folder that `lesa evaluate` wrote."
        raise argument_error(argument, f"hold a {SUMMARY}", Said(str(folder)), missing, FileNotFoundError)
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise argument_error(argument, f"have a {SUMMARY} with valid JSON", Said(f"{file}: {error}"), remedy) from None
    version = summary.get("format_version") if isinstance(summary, dict) else None
    if version != FORMAT_VERSION:
        raise argument_error("format_version", f"be {FORMAT_VERSION} in {file}", version, remedy)
    _check_fields(str(file), summary, _NEEDED, remedy)
    for number, run in enumerate(summary["runs"]):
        _check_fields(f"{file}, run {number}", run, _NEEDED_OF_RUN, remedy)
    if not summary["runs"] or summary["runs"][0]["contender"] != Reference.name:
        raise argument_error("runs", f"begin with the reference in {file}", Said("another one, or none"), remedy)
    return summary


def _check_fields(place: str, values: Any, needed: Sequence[str], remedy: str) -> None:
    absent = [name for name in needed if name not in values] if isinstance(values, dict) else list(needed)
    if absent:
        raise argument_error(absent[0], f"be given in {place}", Said("no such field"), remedy)
