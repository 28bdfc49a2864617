"""Searches the best settings of a contender."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from lesa.contenders import THRESHOLDS, Contender, Ours, Peer
from lesa.contenders.base import Count
from lesa.evaluation.contest import Contest, sample_pairs
from lesa.evaluation.quality import psnr
from lesa.evaluation.result import sortable
from lesa.processes import OthersEndedError

Searched = type[Peer] | type[Ours]
"""A kind of contender whose settings can be searched."""

CALIBRATION_SAMPLES = 2
ATTEMPTS = 4
"""How many of the best settings within a budget are run on all inputs, at most, to find one that is within it there."""


class NotAvailableError(Exception):
    """A contender can't run on this model; the message says why."""


class SettingSearch(ABC):
    """Finds the best settings of a kind of contender with a few inputs, and runs them on all.

    Args:
        contest: runs the settings.
        inputs: of the search.
        kind: the kind of contender.
        budgets: how much a run may cost.
    """

    def __init__(self, contest: Contest, inputs: list[dict], kind: Searched, budgets: Iterable[int]):
        self.contest, self.inputs, self.kind, self.budgets = contest, inputs, kind, sorted(budgets, reverse=True)
        self._batches = contest.batches_of(inputs)
        # By the identity of a setting:
        self._tried: dict[str, Contender] = {}
        self._figures: dict[str, dict[str, float]] = {}  # "psnr" and both counts
        self._failed: dict[str, NotAvailableError] = {}
        self._kept = contest.processes.by_first(lambda: contest.store.read_search(kind.name, len(inputs)))

    @abstractmethod
    def _try_all(self) -> str:
        """Tries the settings, and says in words which these are."""

    def run(self) -> dict[str, Any]:
        """Searches, runs the best, and says what was searched.

        Returns:
            What is searched, for `summary.json`; the `run` of each of the `budgets` is the run itself, or None.

        Raises:
            NotAvailableError: the contender can't run on this model.
        """
        text = self._try_all()
        if self._failed and len(self._failed) == len(self._tried):
            raise next(iter(self._failed.values()))
        budgets = [self._best(budget, count) for count in self.kind.counted_in for budget in self.budgets]
        result = {"grid": text, "samples": len(self.inputs), "tried": len(self._tried), "budgets": budgets}
        if self._failed:
            result["failed"] = {_words(self._tried[key]): str(error) for key, error in self._failed.items()}
        return result

    def _figures_of(self, setting: Contender) -> dict[str, float]:
        """PSNR, whole steps and step equivalents of a setting on the inputs of the search."""
        key = setting.identity()
        if key not in self._figures:
            self._tried[key] = setting
            words = f"{_words(setting)}, {len(self._tried)} tried"
            try:
                values = self._once(key, lambda: self._measured(setting), words)
            except NotAvailableError as error:
                self._failed[key], values = error, (math.nan, math.inf, math.inf)
            self._figures[key] = dict(zip(("psnr", "whole_steps", "step_equivalents"), values))
        return self._figures[key]

    def _measured(self, setting: Contender) -> tuple[float, float, float]:
        made = self.contest.outcome(self._batches, setting, warm=False)

        def mean() -> float:
            pairs = sample_pairs(made.images, self.contest.reference.images)
            return float(np.mean([psnr(*pair, peak=1.0) for pair in pairs]))

        return self.contest.processes.by_first(mean), made.counts[0], made.counts[1]

    def _once(self, key: str, function: Callable[[], Any], words: str) -> Any:
        """What is kept under the key, or else what the function gives, which is kept then.

        Args:
            key: no other part of the search has it.
            function: gives what can be written as JSON.
            words: what the progress says.

        Raises:
            NotAvailableError: the function fails.
        """
        if key not in self._kept:
            self.contest.check_reference()
            self.contest.bar.set_postfix_str(f"search: {words}")
            self._kept[key] = self._attempt(function)
            store, kind, samples = self.contest.store, self.kind.name, len(self.inputs)
            self.contest.processes.by_first(lambda: store.write_search(kind, samples, self._kept))
        return self._kept[key]

    def _attempt(self, function: Callable[[], Any]) -> Any:
        """Calls it; a failure of the contender's code on this model makes its setting not available."""
        try:
            return function()
        except (torch.OutOfMemoryError, OthersEndedError):
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
        within = [key for key, figures in self._figures.items() if figures[count] <= budget + 1e-6]
        if not within:
            least = min(figures[count] for figures in self._figures.values())  # those that fail need infinitely many
            return {**row, "why": f"no setting has at most {budget} {words}; the least is {least:.2f}"}
        ranked = sorted(within, key=lambda key: -sortable(self._figures[key]["psnr"]))
        for key in ranked[:ATTEMPTS]:
            run = self.contest.run(self._tried[key])
            if getattr(run, count) <= budget + 1e-6:
                return {**row, "run": run}
        return {**row, "why": f"the best settings need more than {budget} {words} on all inputs"}


def _words(setting: Contender) -> str:
    """What a setting is called before it runs."""
    return setting.describe() if isinstance(setting, Ours) else str(setting)


class PeerSearch(SettingSearch):
    """The search for a cache of others, among the settings of its grid."""

    kind: type[Peer]

    def run(self) -> dict[str, Any]:
        """Searches, runs the best, and says what was searched, with what the calibration measured."""
        result = super().run()
        name = self.kind.calibration
        return result if name is None else {**result, name: self._kept[name]}

    def _try_all(self) -> str:
        peer, calibration = self.kind, ()
        if (name := peer.calibration) is not None:
            calibration = tuple(self._once(name, lambda: [*self._calibrate()], f"calibration of {peer.title}"))
        grid = peer.grid(self.contest.num_inference_steps, self.budgets, calibration)
        for setting in grid.settings:
            self._figures_of(setting)
        for axis in grid.axes:
            for count in peer.counted_in:
                for budget in self.budgets:
                    for setting in bisected(axis, lambda s: self._figures_of(s)[count], budget + 1e-6):  # noqa: B023
                        self._figures_of(setting)
        return grid.text

    def _calibrate(self) -> tuple[float, ...]:
        contest = self.contest
        samples = self.inputs[:CALIBRATION_SAMPLES]

        def calibrate() -> tuple[float, ...]:
            return self.kind.calibrate(contest.pipe, lambda: contest.call_once(samples), contest.num_inference_steps)

        found = contest.processes.in_all(calibrate)  # their pipelines may work together
        return contest.processes.by_first(lambda: found)  # all use the same values, to the last bit


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
