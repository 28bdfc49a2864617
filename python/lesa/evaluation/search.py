"""Searches the best settings of a peer."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from lesa.contenders import THRESHOLDS, Peer
from lesa.contenders.base import Count
from lesa.evaluation.contest import Contest, sample_pairs
from lesa.evaluation.quality import psnr
from lesa.evaluation.result import sortable

CALIBRATION_SAMPLES = 2
ATTEMPTS = 4
"""How many of the best settings within a budget are run on all inputs, at most, to find one that is within it there."""


class NotAvailableError(Exception):
    """A contender can't run on this model; the message says why."""


class SettingSearch:
    """Finds a peer's best settings with a few inputs, and runs them on all.

    Args:
        contest: runs the settings.
        inputs: of the search.
        peer: the kind of contender.
        budgets: how much a run may cost.
    """

    def __init__(self, contest: Contest, inputs: list[dict], peer: type[Peer], budgets: Iterable[int]):
        self.contest, self.inputs, self.peer, self.budgets = contest, inputs, peer, sorted(budgets, reverse=True)
        self._batches = contest.batches_of(inputs)
        self._tried: dict[Peer, dict[str, float]] = {}  # "psnr" and both counts
        self._failed: dict[Peer, NotAvailableError] = {}
        self._kept = contest.store.read_search(peer.name, len(inputs))

    def run(self) -> dict[str, Any]:
        """Searches, runs the best, and says what was searched.

        Returns:
            What is searched, for `summary.json`; the `run` of each of the `budgets` is the run itself, or None.

        Raises:
            NotAvailableError: the peer can't run on this model.
        """
        peer, calibration = self.peer, ()
        if peer.calibration is not None:
            if peer.calibration not in self._kept:
                self.contest.check_reference()
            calibration = tuple(self._kept.get(peer.calibration) or self._attempt(self._calibrate))
            self._kept[peer.calibration] = list(calibration)
        grid = peer.grid(self.contest.num_inference_steps, self.budgets, calibration)
        for setting in grid.settings:
            self._figures(setting)
        for axis in grid.axes:
            for count in peer.counted_in:
                for budget in self.budgets:
                    for setting in bisected(axis, lambda s: self._figures(s)[count], budget + 1e-6):  # noqa: B023
                        self._figures(setting)
        if self._failed and len(self._failed) == len(self._tried):
            raise next(iter(self._failed.values()))
        budgets = [self._best(budget, count) for count in peer.counted_in for budget in self.budgets]
        result = {"grid": grid.text, "samples": len(self.inputs), "tried": len(self._tried), "budgets": budgets}
        if self._failed:
            result["failed"] = {str(setting): str(error) for setting, error in self._failed.items()}
        return result if peer.calibration is None else {**result, peer.calibration: list(calibration)}

    def _calibrate(self) -> tuple[float, ...]:
        contest = self.contest
        samples = self.inputs[:CALIBRATION_SAMPLES]
        return self.peer.calibrate(contest.pipe, lambda: contest.call_once(samples), contest.num_inference_steps)

    def _figures(self, setting: Peer) -> dict[str, float]:
        """PSNR, whole steps and step equivalents of a setting on the inputs of the search."""
        if setting not in self._tried:
            key = repr(setting)
            if key not in self._kept:
                self.contest.check_reference()
                self.contest.bar.set_postfix_str(f"search: {setting}, {len(self._tried)} tried")
                try:
                    self._kept[key] = self._attempt(lambda: self._measured(setting))
                except NotAvailableError as error:
                    self._failed[setting] = error
                    self._tried[setting] = {"psnr": math.nan, "whole_steps": math.inf, "step_equivalents": math.inf}
                    return self._tried[setting]
                self.contest.store.write_search(self.peer.name, len(self.inputs), self._kept)
            self._tried[setting] = dict(zip(("psnr", "whole_steps", "step_equivalents"), self._kept[key]))
        return self._tried[setting]

    def _measured(self, setting: Peer) -> tuple[float, float, float]:
        made = self.contest.outcome(self._batches, setting, warm=False)
        values = [psnr(*pair, peak=1.0) for pair in sample_pairs(made.images, self.contest.reference.images)]
        return float(np.mean(values)), made.counts[0], made.counts[1]

    def _attempt(self, function: Callable[[], Any]) -> Any:
        """Calls it; a failure of the peer's code on this model makes the peer not available."""
        try:
            return function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            raise NotAvailableError(f"it fails on this model: {type(error).__name__}: {message}") from error

    def _best(self, budget: int, count: Count) -> dict[str, Any]:
        """Runs the best setting within a budget on all inputs."""
        row = {"budget": budget, "by": count, "run": None, "why": None}
        words = count.replace("_", " ")
        if not self._tried:
            return {**row, "why": f"its grid has no setting of at most {budget} {words}"}
        within = [s for s, figures in self._tried.items() if figures[count] <= budget + 1e-6]
        if not within:
            least = min(figures[count] for figures in self._tried.values())  # those that fail need infinitely many
            return {**row, "why": f"no setting has at most {budget} {words}; the least is {least:.2f}"}
        ranked = sorted(within, key=lambda s: -sortable(self._tried[s]["psnr"]))
        for setting in ranked[:ATTEMPTS]:
            run = self.contest.run(setting)
            if getattr(run, count) <= budget + 1e-6:
                return {**row, "run": run}
        return {**row, "why": f"the best settings need more than {budget} {words} on all inputs"}


def bisected(axis: Peer, count: Callable[[Peer], float], budget: float, probes: int = 7) -> Iterator[Peer]:
    """Yields settings on both sides of the smallest threshold that keeps within a budget.

    Args:
        axis: the setting, with any threshold.
        count: gives what a setting costs. It is assumed to fall as the threshold rises.
        budget: how much a setting may cost.
        probes: how many settings to try. If the highest threshold costs more than the budget, it is the only one.
    """
    low, high = THRESHOLDS
    last = axis.with_threshold(high)
    yield last
    if count(last) > budget:
        return
    for _ in range(probes - 1):
        middle = float(f"{(low * high) ** 0.5:.4g}")
        setting = axis.with_threshold(middle)
        yield setting
        low, high = (middle, high) if count(setting) > budget else (low, middle)
