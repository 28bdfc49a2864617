"""The two tables of a report: what was trained for the model, and what needs no training, each at its best."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, get_args

from lesa.contenders import kind_of, order_of
from lesa.contenders.base import Count
from lesa.evaluation.budgets import best_at_most, color_of, label_of, quality_of, rounded, title_of, words_of
from lesa.evaluation.quality import paired_lead, signed
from lesa_kernels.forecasters import UNTRAINED

COUNTS: tuple[Count, ...] = get_args(Count)

_TITLES = {True: "Trained for this model", False: "Without training"}


def rivals(runs: Sequence[dict], ours: str | None, chosen: Sequence[dict]) -> list[dict[str, Any]]:
    """Compares trained contenders with each other, and the others with each other.

    Args:
        runs: those of `summary.json`, without the reference.
        ours: the contender that is ours, or None.
        chosen: runs of it, which set the budgets.

    Returns:
        The groups that have something to compare. Of each: `title`; whether it is `trained`; `own`, the title of the
        contender that the others are compared with; `is_inside`, whether that one belongs to the group; and `tables`,
        one for each budget.
    """
    groups = []
    names = sorted(dict.fromkeys(run["contender"] for run in runs), key=order_of)
    for trained, title in _TITLES.items():
        inside = [name for name in names if is_trained(name) == trained]
        own = next((name for name in (ours, UNTRAINED) if name in inside), ours)
        if own is not None and set(inside) - {own}:
            tables = [_table(runs, inside, own, run) for run in chosen]
            head = {"title": title, "trained": trained, "own": title_of(own), "is_inside": own in inside}
            groups.append({**head, "tables": tables})
    return groups


def is_trained(contender: str) -> bool:
    """Whether a contender was trained for the model; one that is not registered counts as not trained."""
    kind = kind_of(contender)
    return kind is not None and kind.is_trained


def _table(runs: Sequence[dict], names: Sequence[str], own: str, run: dict) -> dict[str, Any]:
    """Contenders within the budget of a run, the best first.

    Returns:
        `heads`, a text for each count; `lead`, the head of the column of leads; and `rows`: of each contender its title
        and colour, whether it is ours, and a cell for each count. A cell has either `why` or the run's figures.
    """
    counts = [count for count in COUNTS if run.get(count) is not None]
    best = {count: {name: best_at_most(runs, name, run, count) for name in names} for count in counts}
    standard = {c: run if run["contender"] == own else best_at_most(runs, own, run, c) for c in counts}
    for count in counts:
        best[count] |= {name: run for name in names if name == run["contender"]}
    if len(counts) > 1 and best[counts[0]] == best[counts[1]]:
        counts = counts[:1]  # whole steps tell nothing else

    def rank(name: str) -> float:
        peer = best[counts[0]][name]
        return math.inf if peer is None else -quality_of(peer)

    rows = [
        {
            "title": title_of(name),
            "color": color_of(name),
            "ours": name == own,
            "cells": [_cell(runs, name, best[count][name], standard[count], count) for count in counts],
        }
        for name in sorted(names, key=rank)
    ]
    return {
        "heads": [f"at most {rounded(run[count])} {words_of(count)}" for count in counts],
        "lead": f"lead of {label_of(own)}, dB",
        "rows": rows,
    }


def _cell(runs: Sequence[dict], contender: str, best: dict | None, own: dict | None, count: Count) -> dict[str, str]:
    """What a table says of a contender's best run."""
    if best is None:
        needed = [peer[count] for peer in runs if peer["contender"] == contender and peer.get(count) is not None]
        return {"why": "cannot reach this budget" + (f"; the least is {min(needed):.3g}" if needed else "")}
    return {
        "run": best["name"],
        "psnr": "no difference" if best["psnr"] is None else f"{best['psnr']:.2f}",
        "needs": f"{best[count]:.3g}",
        "lead": "\N{EN DASH}" if own is None or own is best else _lead(own, best),
    }


def _lead(own: dict, other: dict) -> str:
    """The paired difference of the PSNR in words."""
    ours, theirs = (tuple((run.get("per_sample") or {}).get("psnr") or ()) for run in (own, other))
    mean, low, high = _paired_lead(ours, theirs) if len(ours) == len(theirs) > 1 else (math.nan,) * 3
    if not math.isnan(low):
        text = f"{signed(mean)} ({signed(low)} to {signed(high)})" + ("" if low > 0 or high < 0 else ", not certain")
    elif own["psnr"] is None or other["psnr"] is None:
        return "\N{EN DASH}"
    else:
        text = f"{signed(own['psnr'] - other['psnr'])}, no interval"
    return text.replace("-", "\N{MINUS SIGN}")


_paired_lead = lru_cache(maxsize=1024)(paired_lead)  # several budgets and both counts have the same pairs
