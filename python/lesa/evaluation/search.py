"""Searches the best settings of a peer."""

from collections.abc import Iterable

import numpy as np
import torch

from lesa.contenders import Setting, grid_of
from lesa.contenders.base import bisected
from lesa.contenders.mag_cache import calibrate_mag_cache
from lesa.evaluation.contest import Contest, sample_pairs
from lesa.evaluation.quality import psnr
from lesa.evaluation.result import sortable

_CALIBRATION_SAMPLES = 2


_ATTEMPTS = 4


class NotAvailableError(Exception):
    """A contender can't run on this model; the message says why."""


class SettingSearch:
    """Finds a peer's best settings with a few inputs, and runs them on all."""

    def __init__(self, contest: Contest, inputs: list[dict], peer: str, budgets: Iterable[int]):
        self.contest, self.inputs, self.peer, self.budgets = contest, inputs, peer, sorted(budgets, reverse=True)
        self._batches = contest.batches_of(inputs)
        self._tried: dict[Setting, tuple[float, float, float]] = {}  # PSNR, whole steps, step equivalents
        self._kept = contest.store.read_search(peer, len(inputs))

    def run(self) -> dict:
        """Searches, runs the best, and says what was searched."""
        contest = self.contest
        steps = contest.num_inference_steps
        ratios = ()
        if self.peer == "mag-cache":
            ratios = self._kept.get("mag_ratios") or self._attempt(self._calibrate)
            self._kept["mag_ratios"] = list(ratios)
        grid = grid_of(self.peer, steps, self.budgets, ratios)
        for setting in grid.settings:
            self._figures(setting)
        measures = (2,) if self.peer in ("taylorseer", "mag-cache") else (2, 1)  # others run a block in every step
        for axis in grid.axes:
            for measure in measures:
                for budget in self.budgets:
                    for setting in bisected(axis, lambda s: self._figures(s)[measure], budget + 1e-6):  # noqa: B023
                        self._figures(setting)
        budgets = [self._best(budget, measure) for measure in measures for budget in self.budgets]
        result = {"grid": grid.text, "samples": len(self.inputs), "tried": len(self._tried), "budgets": budgets}
        return {**result, "mag_ratios": list(ratios)} if ratios else result

    def _calibrate(self):
        contest = self.contest
        samples = self.inputs[:_CALIBRATION_SAMPLES]
        return calibrate_mag_cache(contest.pipe, lambda: contest.call_once(samples), contest.num_inference_steps)

    def _figures(self, setting: Setting) -> tuple[float, float, float]:
        """PSNR, whole steps and step equivalents of a setting on the inputs of the search."""
        if setting not in self._tried:
            key = repr(setting)
            if key not in self._kept:
                self.contest.bar.set_postfix_str(f"search: {setting}, {len(self._tried)} tried")
                self._kept[key] = self._attempt(lambda: self._measured(setting))
                self.contest.store.write_search(self.peer, len(self.inputs), self._kept)
            self._tried[setting] = tuple(self._kept[key])
        return self._tried[setting]

    def _measured(self, setting):
        contest = self.contest
        steps = contest.num_inference_steps
        made = contest.outcome(
            self._batches, steps, lambda: setting.on(contest.pipe, steps), each_call=True, warm=False
        )
        values = [psnr(*pair, peak=1.0) for pair in sample_pairs(made.images, contest._reference.images)]
        return float(np.mean(values)), made.counts[0], made.counts[1]

    def _attempt(self, function):
        """Calls it; a failure of the peer's code on this model makes the peer not available."""
        try:
            return function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            raise NotAvailableError(f"it fails on this model: {type(error).__name__}: {message}") from error

    def _best(self, budget: int, measure: int) -> dict:
        """Runs the best setting within a budget on all inputs."""
        by = "step_equivalents" if measure == 2 else "whole_steps"
        row = {"budget": budget, "by": by, "run": None, "why": None}
        if not self._tried:
            return {**row, "why": f"its grid has no setting of at most {budget} {by.replace('_', ' ')}"}
        within = [s for s, figures in self._tried.items() if figures[measure] <= budget + 1e-6]
        if not within:
            least = min(figures[measure] for figures in self._tried.values())
            return {**row, "why": f"no setting has at most {budget} {by.replace('_', ' ')}; the least is {least:.2f}"}
        ranked = sorted(within, key=lambda s: -sortable(self._tried[s][0]))
        for setting in ranked[:_ATTEMPTS]:
            run = self.contest.run_setting(setting)
            if getattr(run, by) <= budget + 1e-6:
                return {**row, "run": run.name}
        return {**row, "why": f"the best settings go above {budget} {by.replace('_', ' ')} on all inputs"}
