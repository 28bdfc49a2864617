"""Which of our runs a report shows, what stands beside each of them, and what its first lines say."""

import math
from collections.abc import Container, Sequence
from typing import Any

from lesa.contenders import Ours, every_contender, kind_of, order_of
from lesa.contenders.base import Count
from lesa.evaluation.quality import signed
from lesa_kernels.forecasters import UNTRAINED


def title_of(contender: str) -> str:
    """What people call a contender; its name if it is not registered."""
    kind = kind_of(contender)
    return contender if kind is None else kind.title


def label_of(contender: str) -> str:
    """A short title of a contender; its name if it is not registered."""
    kind = kind_of(contender)
    return contender if kind is None else kind.label


def color_of(contender: str) -> str:
    """Name of the page's colour of a contender."""
    return "--other" if kind_of(contender) is None else f"--c-{contender}"


def ours_among(evaluated: Container[str], given: Container[str] = ()) -> str | None:
    """The contender that a report calls ours, or None.

    It is the first one that was trained, in the order of the report; else the forecaster that `enable_cache` takes by
    default; else the one that was registered last. Those that the user gave come before those that were searched.

    Args:
        evaluated: names of contenders.
        given: those of them that have runs of predictors which the user gave.
    """
    kinds = [kind for kind in every_contender() if issubclass(kind, Ours) and kind.name in evaluated]
    kinds = [kind for kind in kinds if kind.is_trained or kind.name in given] or kinds
    trained, others = ([kind.name for kind in kinds if kind.is_trained == part] for part in (True, False))
    return next(iter([*trained, *(name for name in others if name == UNTRAINED), *reversed(others)]), None)


def budgets_of(runs: Sequence[dict], ours: str | None) -> list[dict[str, Any]]:
    """Our runs from most to least steps, each with the best runs of the other contenders within its budget.

    Args:
        runs: those of `summary.json`, without the reference.
        ours: the contender that is ours, or None.

    Returns:
        For each of our runs: `ours`, its name; `text`, its step equivalents; `peers`, names of the best runs of the
        others by step equivalents; `absent`, titles of contenders that cannot reach the budget.
    """
    mine = [run for run in runs if run["contender"] == ours and run.get("is_best", True)]
    budgets = []
    for run in sorted(mine, key=lambda run: -run["step_equivalents"]):
        best = {name: best_at_most(runs, name, run, "step_equivalents") for name in others(runs, ours)}
        budgets.append(
            {
                "ours": run["name"],
                "text": f"{run['step_equivalents']:.4g}",
                "peers": [peer["name"] for peer in best.values() if peer is not None],
                "absent": [title_of(name) for name, peer in best.items() if peer is None],
            }
        )
    return budgets


def chosen(budgets: Sequence[dict], num_inference_steps: int) -> int:
    """The budget that the page opens with: the one nearest to 9 steps of 50."""
    distances = [abs(float(budget["text"]) - 0.18 * num_inference_steps) for budget in budgets]
    return distances.index(min(distances)) if distances else 0


def others(runs: Sequence[dict], ours: str | None) -> list[str]:
    """The contenders of the runs, without ours, in the order of the report."""
    return sorted(dict.fromkeys(run["contender"] for run in runs if run["contender"] != ours), key=order_of)


def rounded(count: float) -> int:
    """A count of steps as a whole number. A half is rounded up."""
    return math.floor(count + 0.5 + 1e-6)


def best_at_most(runs: Sequence[dict], contender: str, run: dict, count: Count) -> dict | None:
    """The run of a contender with the best PSNR that needs no more than `run`, or None. Counts are rounded."""
    theirs = [peer for peer in runs if peer["contender"] == contender and peer.get(count) is not None]
    within = [peer for peer in theirs if rounded(peer[count]) <= rounded(run[count])]
    return max(within, key=quality_of, default=None)


def quality_of(run: dict) -> float:
    """PSNR in dB; runs without one are last."""
    return float("-inf") if run["psnr"] is None else run["psnr"]


def words_of(count: Count) -> str:
    """What people call a count."""
    return count.replace("_", " ")


def headline(summary: dict, budget: dict | None) -> tuple[str, str, list[tuple[str, str]]]:
    """The sentence at the top, the text below it, and figures with what they mean.

    Args:
        summary: what `lesa evaluate` wrote.
        budget: one of `budgets_of`, or None if no run is ours.
    """
    total, samples = summary["num_inference_steps"], summary["samples"]
    same = (
        f"Mean over {samples} samples. Each is compared with the one of the same seed, computed in all {total} steps."
    )
    if budget is None:
        return f"What fewer than {total} steps give", same, []
    runs = summary["runs"][1:]
    run = next(run for run in runs if run["name"] == budget["ours"])
    computed, faster = f"{run['step_equivalents']:.3g} of {total}", f"{run['speedup']:.1f}"
    sentence = f"{computed} steps computed, {faster} times as fast"
    tiles = [(f"{faster}×", "as fast, end to end"), (computed, "steps computed")]
    if run["psnr"] is None:
        return f"{sentence}, and the same pictures.", same, tiles
    sentence += f", and {run['psnr']:.1f} dB PSNR to the full run"
    tiles.append((f"{run['psnr']:.1f} dB", "PSNR against the full run"))
    names = others(runs, run["contender"])
    if not names:
        return f"{sentence}.", same, tiles
    most = f"{rounded(run['step_equivalents'])} step equivalents"
    best = _best_of_all(runs, names, run, "step_equivalents")
    by_whole_steps = _by_whole_steps(runs, names, run, best)
    if best is None:
        none = "" if budget["peers"] else f" No other contender needs as few as {most}."
        return f"{sentence}.{none}", f"{by_whole_steps}{same}", tiles
    ahead = run["psnr"] - best["psnr"]
    sentence += (
        f": {abs(ahead):.1f} dB {'above' if ahead >= 0 else 'below'} the best of the others with at most {most}."
    )
    tiles.append((f"{signed(ahead, 1)} dB".replace("-", "\N{MINUS SIGN}"), f"to {title_of(best['contender'])}"))
    text = f"By this count, the best of the others is {_figures(best, 'step_equivalents')}. {by_whole_steps}{same}"
    paired = best.get("against_ours") or {}
    if paired.get("ours") == run["name"] and paired.get("low") is not None:
        text += f" The 95 % interval of the difference is {paired['low']:.1f} to {paired['high']:.1f} dB."
    return sentence, text, tiles


def _best_of_all(runs: Sequence[dict], names: Sequence[str], run: dict, count: Count) -> dict | None:
    found = [best_at_most(runs, name, run, count) for name in names]
    return max((peer for peer in found if peer is not None and peer["psnr"] is not None), key=quality_of, default=None)


def _figures(run: dict, count: Count) -> str:
    return f"{title_of(run['contender'])} with {run[count]:.3g} {words_of(count)}, {run['psnr']:.1f} dB"


def _by_whole_steps(runs: Sequence[dict], names: Sequence[str], run: dict, best: dict | None) -> str:
    """A sentence about the best of the others by whole steps, if it is another run than `best`; it ends in a space."""
    other = _best_of_all(runs, names, run, "whole_steps") if run.get("whole_steps") is not None else None
    if other is None or other is best:
        return ""
    return f"By whole steps, the best of the others is {_figures(other, 'whole_steps')}. "
