"""Chooses the computed steps of a run, and notes what the user may not expect of them."""

import os
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

from lesa.cache import reasons
from lesa.cache.planning import making_room
from lesa.models import SECOND
from lesa.schedule import DEFAULT_QUALITY, FEW_STEPS, FEW_UNTRAINED, Schedule, Spread, as_schedule, schedule_of
from lesa_kernels import PredictorConfig
from lesa_kernels.checks import argument_error


class Chosen(NamedTuple):
    """The computed steps of a run.

    Args:
        computed: all of them.
        added: those of them that the schedule leaves out, and why they are computed.
    """

    computed: frozenset[int]
    added: Mapping[int, str]


def note_of_switch(switch: int) -> str:
    """What is said of the first step of the second transformer where the schedule leaves it out."""
    return f"step {switch} is computed because it is the first step of {SECOND}"


def budget_for(budgets: Sequence[int], which: Any, source: Any) -> int:
    """Which of several predictors to take, by what says which steps are computed.

    Args:
        budgets: for which there are predictors, in rising order.
        which: a `Spread` of as many steps as a budget, or of a quality: the smallest budget is "fast", the largest one
            "high", and the middle one, of two the larger, "balanced". Of a list of steps or a `Schedule`, the budget
            that is nearest to their number. Anything else, also None: as for "balanced".
        source: where the predictors are.

    Raises:
        ValueError: there is no predictor for so many steps.
    """
    if isinstance(which, Spread) and which.steps is not None:
        if which.steps not in budgets:
            must = f"be one of {', '.join(map(str, budgets))}, for which {os.fspath(source)} has predictors"
            raise argument_error("steps", must, which.steps, "Pass one of them, or a quality.")
        return which.steps
    if isinstance(which, Sized):
        return min(budgets, key=lambda budget: (abs(budget - len(which)), -budget))
    quality = which.quality if isinstance(which, Spread) else DEFAULT_QUALITY
    return {"fast": budgets[0], "high": budgets[-1]}.get(quality, budgets[len(budgets) // 2])


def note_of_budget(budget: int, budgets: Sequence[int]) -> str:
    """What is said of the predictor that was chosen."""
    return f"the predictor is the one for {budget} computed steps, of those for {', '.join(map(str, budgets))}"


class Chooser:
    """Chooses the computed steps of runs.

    Args:
        schedule: what says which steps are computed.
        as_trained: whether nothing but the predictor or a quality chose the steps.
        configs: of the predictors. The first one names the forecaster.
        note: called with what the user may not expect.
        remark: called with what the user must be told without looking for it. It is a note too.
    """

    def __init__(
        self,
        schedule: Schedule | int | Spread,
        as_trained: bool,
        configs: list[PredictorConfig],
        note: Callable[[str], None],
        remark: Callable[[str], None],
    ):
        self._schedule, self._as_trained, self._configs, self._note = schedule, as_trained, configs, note
        self._remark, self._first = remark, configs[0]

    def choose(self, sigmas: list[float], rises: frozenset[int], switch: int | None) -> Chosen:
        """The computed steps of a run.

        Args:
            sigmas: its noise levels.
            rises: the steps at which a new history begins, because the noise level has risen or the run begins.
            switch: the step at which the pipeline goes over to its second transformer; None if it does not.
        """
        begins = rises if switch is None else rises | {switch}
        if isinstance(self._schedule, Spread):
            chosen = self._spread(self._schedule, sigmas, begins)
        else:
            chosen = self._scheduled(self._schedule, sigmas)
        added = dict.fromkeys(begins - chosen, reasons.RISEN[0])
        if switch is not None and switch in added:
            added[switch] = reasons.FIRST_OF_SECOND
            self._note(note_of_switch(switch))
        if risen := added.keys() - {switch}:
            steps = ",".join(map(str, sorted(risen)))
            self._note(f"the noise level rises in the run, so the first step after each rise is computed: {steps}")
        return Chosen(begins | chosen, added)

    def _spread(self, spread: Spread, sigmas: list[float], begins: frozenset[int]) -> frozenset[int]:
        """The computed steps of a run with these noise levels, beside `begins`. Notes which they are."""
        total, count = len(sigmas), spread.count_of(len(sigmas))
        trained = schedule_of(self._first)
        if trained is not None and spread.steps is None:
            self._note(f"every quality is the {len(trained)} computed steps that the predictor was trained for")
            return self._scheduled(trained, sigmas)
        if count == total:
            if spread.steps is None:
                self._note_few(total)
            else:
                self._note(f"computed everything: the run has {total} steps")
            return frozenset(range(total))
        chosen = frozenset() if trained is None else trained.computed_in(sigmas)
        if len(chosen) != count:
            chosen = making_room(spread.computed_in(sigmas), begins)
        computed = chosen | begins
        steps, name = ",".join(map(str, sorted(computed))), self._first.mixer
        self._note(f"the forecaster is {name!r}, and {len(computed)} of {total} steps are computed: {steps}")
        self._note_other_training(computed, sigmas)
        return chosen

    def _scheduled(self, schedule: Schedule | int, sigmas: list[float]) -> frozenset[int]:
        """The computed steps of a run with these noise levels. Notes what the user may not expect."""
        config, total = self._first, len(sigmas)
        if self._as_trained and total < FEW_STEPS and total not in config.step_counts:
            self._note_few(total)
            return frozenset(range(total))
        schedule = as_schedule(schedule, total)
        if schedule.sigmas is None and schedule.num_inference_steps not in (None, total):
            meant = schedule.num_inference_steps
            self._note(
                f"the schedule is for {meant} steps and has no noise levels: its step numbers are used unchanged"
            )
        beyond = [step for step in schedule.steps if step >= total]
        if schedule.sigmas is None and beyond:
            steps = ",".join(map(str, beyond))
            self._note(f"the run has {total} steps, which leaves out the schedule's {steps}")
        chosen = schedule.computed_in(sigmas)
        self._note_other_training(chosen, sigmas)
        return chosen

    def _note_few(self, total: int) -> None:
        instead = ". Pass steps= to forecast some, and compare with a run of fewer steps"
        if total < 3:
            instead = ""
        elif total == 4:  # the only number for which a plain run of fewer steps is known to be better
            instead = ". Take fewer steps instead"
        elif total >= FEW_UNTRAINED and self._first.step_counts:
            instead = f". The predictor is for another number of steps: train one for {total}, or pass none"
        elif total >= FEW_UNTRAINED:
            instead = ". Pass steps= or a schedule to forecast some"
        self._remark(f"computed everything: {total} steps are too few to predict any{instead}")

    def _note_other_training(self, chosen: frozenset[int], sigmas: list[float]) -> None:
        """Notes if a predictor's steps, computed steps or noise levels are others than those of the run."""
        for config in self._configs:
            self._note_trained(config, chosen, sigmas)

    def _note_trained(self, config: PredictorConfig, chosen: frozenset[int], sigmas: list[float]) -> None:
        total = len(sigmas)
        near = 1e-5 if config.forecaster.is_fitted else 1e-3  # a fit is for its own noise levels only
        if config.step_counts and total not in config.step_counts:
            trained = ", ".join(map(str, sorted(config.step_counts)))
            self._note(f"the predictor was trained at {trained} steps, this run has {total}")
        elif total in (config.more_step_counts or ()):
            self._note_mapped(config, chosen, sigmas)
        elif config.schedule is not None and chosen != frozenset(config.schedule):
            steps = ",".join(map(str, config.schedule))
            self._note(f"the predictor was trained with the computed steps {steps}")
        elif any(abs(sigmas[s] - level) > near for s, level in zip(sorted(chosen), config.schedule_sigmas or ())):
            self._note("the predictor's schedule was made for other noise levels than those of this run")

    def _note_mapped(self, config: PredictorConfig, chosen: frozenset[int], sigmas: list[float]) -> None:
        """Notes if the computed steps are not those nearest to the schedule, with which a predictor was trained too."""
        trained = schedule_of(config)
        if trained is not None and chosen != trained.computed_in(sigmas):
            steps = ",".join(map(str, sorted(trained.computed_in(sigmas))))
            self._note(f"the predictor was trained with the computed steps {steps}")
