"""Compares evaluations with this project's targets: `python benchmarks/studies/targets.py EVALUATION ...`.

For each run of newton it finds the best of the others that need no training, by three measures of what a run may cost:
step equivalents, whole steps of the model, and seconds. It also finds the best run of each other trained predictor, and
of linear extrapolation, by whole steps. With 5 computed steps, the targets of these leads are lower, and there is one
more row: the best without training may then have 8 step equivalents. Then it compares our forecaster that needs no
training with the best of the others that need none, for each number of step equivalents. Others may cost as much as
ours; counts are rounded. The lead is the mean of the paired differences in PSNR, with a bootstrap interval of 95 %. For
the bundled photographs, another table compares the PSNR with 5 computed steps with a target of its own. In the mean
over several evaluations, all have the same weight.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from lesa.contenders import Dense, Newton, Reference
from lesa.evaluation.budgets import rounded, title_of
from lesa.evaluation.quality import RESAMPLES, paired_lead, signed
from lesa.evaluation.rivals import is_trained
from lesa_kernels.forecasters import UNTRAINED

TARGETS = {"step_equivalents": 10.0, "whole_steps": 5.0, "seconds": 0.0}
"""Of the lead over the best contender without training, in dB."""
OVER = {Dense.name: 7.0, "lesa": 7.0, "l2p": 7.0, "linear": 7.0}
"""Of the lead over the best run of another forecaster, in dB."""
AT_FIVE = 5.0
"""Of all these leads with 5 computed steps, where the target is not lower, in dB."""
OVER_EIGHT = 1.0
"""Of the lead of 5 computed steps over what the best without training reaches at 8 step equivalents, in dB."""
LEAST_AT_FIVE = {"QwenImagePipeline": 33.0}
"""Of the PSNR with 5 computed steps, in dB, by the pipeline of a bundled model."""
UNTRAINED_LEAD = 0.0
"""Of the lead of our forecaster without training over the best other one, on average over the models, in dB."""

NO_RIVALS = (UNTRAINED, Reference.name)
"""The contenders without training that ours are not compared with."""

HEAD = ("ours", "PSNR", "compared by", "contender", "its run", "its PSNR", "ahead by, dB", "target", "reached")
OWN_HEAD = ("ours", "PSNR", "target", "reached")
MEAN_HEAD = ("step equivalents", "evaluations", "ahead by, dB", "target", "reached")


def cost(run: dict, by: str) -> float:
    """What a run costs, rounded where it is a count."""
    return run[by] if by == "seconds" else rounded(run[by])


def best_at_most(runs: list[dict], limit: float, by: str) -> dict | None:
    """The run of highest PSNR that costs no more than `limit`, or None."""
    within = [run for run in runs if cost(run, by) <= limit and run["psnr"] is not None]
    return max(within, key=lambda run: run["psnr"], default=None)


def of_contender(runs: list[dict], name: str) -> list[dict]:
    """The runs of one contender."""
    return [run for run in runs if run["contender"] == name]


def others_without_training(runs: list[dict]) -> list[dict]:
    """The runs of all contenders of others that need no training."""
    return [run for run in runs if not is_trained(run["contender"]) and run["contender"] not in NO_RIVALS]


def lead(ours: dict, other: dict) -> tuple[float, float, float]:
    """Mean of the paired differences in PSNR, and the ends of its interval, in dB."""
    return paired_lead(ours["per_sample"]["psnr"], other["per_sample"]["psnr"])


def row_of(run: dict, by: str, kind: str, other: dict | None, target: float, certain: bool = True) -> tuple[str, ...]:
    """One comparison. If `certain`, a target counts as reached only if the whole interval is above 0."""
    name, psnr = run["name"], f"{run['psnr']:.2f}"
    if other is None:
        return name, psnr, by, kind, "none costs as little", "", "", "", ""
    mean, low, high = lead(run, other)
    reached = "yes" if mean >= target and (low > 0 or not certain) else "no"
    return name, psnr, by, kind, other["name"], f"{other['psnr']:.2f}", figures(mean, low, high), f"{target:g}", reached


def figures(mean: float, low: float, high: float) -> str:
    """A lead and its interval."""
    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def rows_of(runs: list[dict]) -> list[tuple[str, ...]]:
    """One row per run of newton and comparison."""
    others = others_without_training(runs)
    rows = []
    for run in sorted(of_contender(runs, Newton.name), key=lambda run: -run["whole_steps"]):
        has_five = rounded(run["whole_steps"]) == 5
        most = AT_FIVE if has_five else math.inf
        for by, target in TARGETS.items():
            best = best_at_most(others, cost(run, by), by)
            rows.append(row_of(run, by, "the best without training", best, min(target, most)))
        for name, target in OVER.items():
            if theirs := of_contender(runs, name):
                best = best_at_most(theirs, cost(run, "whole_steps"), "whole_steps")
                rows.append(row_of(run, "whole_steps", title_of(name), best, min(target, most)))
        if has_five:
            far = best_at_most(others, 8, "step_equivalents")
            rows.append(row_of(run, "step_equivalents", "the best without training at 8", far, OVER_EIGHT))
    return rows


def own_rows(model: str, runs: list[dict]) -> list[tuple[str, ...]]:
    """One row per run of newton with 5 computed steps, if its PSNR has a target."""
    target = next((target for name, target in LEAST_AT_FIVE.items() if name in model), None)
    if target is None:
        return []
    rows: list[tuple[str, ...]] = []
    for run in of_contender(runs, Newton.name):
        if rounded(run["whole_steps"]) == 5:
            reached = "yes" if run["psnr"] >= target else "no"
            rows.append((run["name"], f"{run['psnr']:.2f}", f"{target:g}", reached))
    return rows


def untrained_pairs(runs: list[dict]) -> dict[int, tuple[dict, dict | None]]:
    """By step equivalents, from many to few: our best run without training, and the best other that costs no more."""
    by, ours = "step_equivalents", of_contender(runs, UNTRAINED)
    budgets = sorted({rounded(run[by]) for run in ours}, reverse=True)
    best = {count: best_at_most([run for run in ours if rounded(run[by]) == count], count, by) for count in budgets}
    others = others_without_training(runs)
    return {count: (run, best_at_most(others, count, by)) for count, run in best.items() if run is not None}


def untrained_rows(runs: list[dict]) -> list[tuple[str, ...]]:
    """One row per number of step equivalents of our forecaster without training."""
    kind = "the best other without training"
    pairs = untrained_pairs(runs).values()
    return [row_of(run, "step_equivalents", kind, other, UNTRAINED_LEAD, certain=False) for run, other in pairs]


def mean_rows(evaluations: list[list[dict]]) -> list[tuple[str, ...]]:
    """One row per number of step equivalents that every evaluation has: the mean of the leads without training."""
    pairs = [untrained_pairs(runs) for runs in evaluations]
    rows = []
    for count in pairs[0] if pairs else ():
        found = [pair[count] for pair in pairs if pair.get(count, (None, None))[1] is not None]
        if len(found) == len(pairs) > 1:
            mean, low, high = mean_lead(found)
            reached = "yes" if mean >= UNTRAINED_LEAD else "no"
            rows.append((str(count), str(len(found)), figures(mean, low, high), f"{UNTRAINED_LEAD:g}", reached))
    return rows


def mean_lead(pairs: list[tuple[dict, dict]]) -> tuple[float, float, float]:
    """The mean of the leads of some pairs of runs, in dB, and its interval; each pair's samples are drawn apart."""
    generator, drawn, leads = np.random.default_rng(0), np.zeros(RESAMPLES), []
    for ours, other in pairs:
        psnr = np.array([run["per_sample"]["psnr"] for run in (ours, other)], dtype=np.float64)
        differences = psnr[0] - psnr[1]
        leads.append(differences.mean())
        drawn += differences[generator.integers(len(differences), size=(RESAMPLES, len(differences)))].mean(axis=1)
    low, high = np.percentile(drawn / len(pairs), (2.5, 97.5))
    return float(np.mean(leads)), float(low), float(high)


def table(rows: list[tuple[str, ...]], head: tuple[str, ...] = HEAD) -> str:
    """The rows as a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders that `lesa evaluate` wrote")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in parser.parse_args().evaluations]
    for summary in summaries:
        print(f"{summary['model']}, {summary['samples']} samples from seed {summary['seed']}\n")
        for rows in (rows_of(summary["runs"]), untrained_rows(summary["runs"])):
            if rows:
                print(table(rows), end="\n\n")
        if rows := own_rows(summary["model"], summary["runs"]):
            print(table(rows, OWN_HEAD), end="\n\n")
    rows = mean_rows([summary["runs"] for summary in summaries])
    if rows:
        print("Without training, mean over the evaluations\n")
        print(table(rows, MEAN_HEAD))


if __name__ == "__main__":
    main()
