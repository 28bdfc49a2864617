"""Compares an evaluation with this project's targets: `python benchmarks/studies/targets.py EVALUATION ...`.

For each run of a predictor it finds the best of every other contender, by three measures of what a run may cost: step
equivalents, whole steps of the model, and seconds. Other contenders may cost as much as ours; counts are rounded. The
lead is the mean of the paired differences in PSNR, with a bootstrap interval of 95 %.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from lesa.contenders import Dense, Newton, Reference
from lesa.evaluation.quality import bootstrap_interval

TARGETS = {"step_equivalents": 9.0, "whole_steps": 5.0, "seconds": 0.0}
"""Of the lead over the best other contender, in dB."""
OVER_DENSE = 7.0
"""Of the lead over the dense variant, in dB."""
AT_FIVE = 2.0
"""Of the lead of 5 computed steps over what the best other contender reaches at 8 step equivalents, in dB."""


def cost(run: dict, by: str) -> float:
    """What a run costs, rounded where it is a count."""
    return run[by] if by == "seconds" else round(run[by])


def best_at_most(runs: list[dict], limit: float, by: str) -> dict | None:
    """The run of highest PSNR that costs no more than `limit`, or None."""
    within = [run for run in runs if cost(run, by) <= limit and run["psnr"] is not None]
    return max(within, key=lambda run: run["psnr"], default=None)


def lead(ours: dict, other: dict) -> tuple[float, float, float]:
    """Mean of the paired differences in PSNR, and the ends of its interval, in dB."""
    pairs = np.array([ours["per_sample"]["psnr"], other["per_sample"]["psnr"]], dtype=np.float64)
    return (float((pairs[0] - pairs[1]).mean()), *bootstrap_interval(pairs[0] - pairs[1]))


def rows_of(runs: list[dict]) -> list[tuple[str, ...]]:
    """One row per run of ours and comparison."""
    ours = sorted((run for run in runs if run["contender"] == Newton.name), key=lambda run: -run["whole_steps"])
    apart = (Newton.name, Dense.name, Reference.name)
    others = [run for run in runs if run["contender"] not in apart]
    rows = []

    def row(run, by, kind, other, target):
        name, psnr = run["name"], f"{run['psnr']:.2f}"
        if other is None:
            rows.append((name, psnr, by, kind, "none costs as little", "", "", "", ""))
            return
        mean, low, high = lead(run, other)
        reached = "yes" if mean >= target and low > 0 else "no"
        figures = f"{other['psnr']:.2f}", f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", f"{target:g}", reached
        rows.append((name, psnr, by, kind, other["name"], *figures))

    for run in ours:
        for by, target in TARGETS.items():
            row(run, by, "the best of all", best_at_most(others, cost(run, by), by), target)
        dense = best_at_most([o for o in runs if o["contender"] == Dense.name], cost(run, "whole_steps"), "whole_steps")
        row(run, "whole_steps", f"the {Dense.title}", dense, OVER_DENSE)
        if round(run["whole_steps"]) == 5:
            row(run, "step_equivalents", "the best of all at 8", best_at_most(others, 8, "step_equivalents"), AT_FIVE)
    return rows


def table(rows: list[tuple[str, ...]]) -> str:
    """The rows as a Markdown table."""
    head = ("ours", "PSNR", "compared by", "contender", "its run", "its PSNR", "ahead by, dB", "target", "reached")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders that `lesa evaluate` wrote")
    for folder in parser.parse_args().evaluations:
        summary = json.loads((folder / "summary.json").read_text())
        print(f"{summary['model']}, {summary['samples']} samples from seed {summary['seed']}\n")
        print(table(rows_of(summary["runs"])), end="\n\n")


if __name__ == "__main__":
    main()
