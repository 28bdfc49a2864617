"""How much work a fit is: what it runs and trains, and how many steps of the progress bar each part has, about."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lesa.fitting.amounts import Amounts, EndToEndAmounts
from lesa.fitting.schedule_family import family
from lesa.training.schedule_search import BRIEF_UPDATES, SEARCH_TURNS

MOVES = 5
"""How often a search moves a step of the schedule, about."""

CONTENDERS = 3
"""The runs of each budget in the test, beside the one with all steps: trained, without training, and fewer steps."""

SEARCH_UPDATES = 300
"""One search takes as long as so many steps of the optimiser, for each call of the transformer in a step.

It was measured on the bundled models. A search uses about as many tokens whatever the number of samples.
"""

GIVEN = 2
"""The schedules that are tried beside the family and those near it: what the searches on recordings find."""

STAGES = 4
"""The predictors that are validated in addition where the training goes through whole runs."""


@dataclass(frozen=True)
class Work:
    """Counts calls of the transformer, steps of the optimiser and parts of the search alike.

    Args:
        amounts: how much is recorded and trained.
        steps: of a run.
        calls: of the transformer in each step.
        batch_size: samples per call of the pipeline.
        width: how many processes share the samples. The steps are those of one of them.
        through_runs: how much is trained through whole runs in addition; None if nothing is.
        levels: the noise levels of the steps of a run. They are needed with `through_runs`.
    """

    amounts: Amounts
    steps: int
    calls: int
    batch_size: int
    width: int = 1
    through_runs: EndToEndAmounts | None = None
    levels: Sequence[float] = ()

    @property
    def recorded_samples(self) -> int:
        """How many samples are recorded to train on, if all rounds of refining take place."""
        return self.amounts.samples_of(self.amounts.rounds)

    @property
    def rolled_out_samples(self) -> int:
        """How many roll-outs all rounds of refining for one budget need."""
        again = self.amounts.samples if self.through_runs else 0
        return sum(sum(self._roll_outs(number)) for number in range(1, self.amounts.rounds + 1)) + again

    @property
    def validated_samples(self) -> int:
        """How many runs with the predictors of one budget compare them: after the training, and after each round."""
        return (1 + self.amounts.rounds + (STAGES if self.through_runs else 0)) * self.amounts.validation_samples

    def recording_steps(self, samples: int) -> int:
        """Of runs of so many samples."""
        return math.ceil(math.ceil(samples / self.batch_size) / self.width) * self.steps * self.calls

    @property
    def validation_steps(self) -> int:
        """Of one run on the validation samples."""
        return self.recording_steps(self.amounts.validation_samples)

    @property
    def training_steps(self) -> int:
        """Of the first training, which has a guided phase too."""
        return self.amounts.updates + self.amounts.updates // 6

    @property
    def brief_steps(self) -> int:
        """Of the brief trainings of a search."""
        return SEARCH_TURNS * BRIEF_UPDATES

    def search_steps(self, budget: int) -> int:
        """Of the search for a schedule."""
        return self.brief_steps + (SEARCH_TURNS + 1) * (budget - 1 + MOVES)

    @property
    def optimiser_steps(self) -> int:
        """Of all trainings for one budget, and of the searches, in steps of the first training.

        One of round n of refining takes as long as n + 1, as it also learns from n roll-outs of each sample.
        """
        rounds = sum((number + 1) * self.amounts.round_updates for number in range(1, self.amounts.rounds + 1))
        searches = (SEARCH_TURNS + 1) * SEARCH_UPDATES * self.calls
        again = 0
        if self.through_runs:
            again = SEARCH_UPDATES * self.calls + self.training_steps + 2 * self.amounts.round_updates
        return self.brief_steps + searches + self.training_steps + rounds + again

    def refining_steps(self, number: int) -> int:
        """Of a round of refining, with its roll-outs."""
        return sum(map(self.recording_steps, self._roll_outs(number))) + self.amounts.round_updates

    def round_steps(self, number: int) -> int:
        """Of a round of refining, with its validation."""
        return self.refining_steps(number) + self.validation_steps

    @property
    def learning_samples(self) -> int:
        """With how many samples predictors are trained through whole runs. The runs with all steps are made first."""
        return self.amounts.samples_of(2) if self.through_runs else 0

    @property
    def trial_samples(self) -> int:
        """With how many samples schedules are compared. Their runs with all steps are made first."""
        return min(self.through_runs.trial_samples, self.learning_samples) if self.through_runs else 0

    def trials(self, budget: int) -> int:
        """How many schedules are compared."""
        if self.through_runs is None:
            return 0
        return len(family(budget, self.levels)) + GIVEN + self.through_runs.moves

    def trial_steps(self, budget: int) -> int:
        """Of the comparison of schedules."""
        return self.trials(budget) * self.recording_steps(self.trial_samples)

    def learning_steps(self, updates: int) -> int:
        """Of so many steps of the optimiser with gradients through whole runs, which one process takes."""
        if self.through_runs is None:
            return 0
        samples = min(self.through_runs.batch_size, self.learning_samples)
        return updates * (math.ceil(samples / self.batch_size) * self.steps * self.calls + 1)

    @property
    def again_steps(self) -> int:
        """Of the training on recorded features for another schedule, and of its round of refining."""
        return self.training_steps + self.recording_steps(self.amounts.samples) + self.amounts.round_updates

    def fitted_steps(self, budget: int) -> int:
        """Of the search for the schedule of another predictor, which is one of those that are compared."""
        return budget - 1 + MOVES

    def _through_runs_steps(self, budgets: list[int]) -> int:
        """Of all that is there because of the training through whole runs, but for the test."""
        more = self.through_runs
        if more is None:
            return 0
        learning = self.learning_steps(more.schedule_updates + more.updates)
        each = learning + self.again_steps + STAGES * self.validation_steps
        first = self.recording_steps(self.learning_samples) + self.recording_steps(self.trial_samples)
        return first + sum(each + self.fitted_steps(budget) + self.trial_steps(budget) for budget in budgets)

    def test_steps(self, budgets: int) -> int:
        """Of the test of all predictors."""
        return (1 + CONTENDERS * budgets) * self.recording_steps(self.amounts.test_samples)

    def all_steps(self, budgets: list[int]) -> int:
        """Of all that comes after the first sample."""
        rounds = range(1, self.amounts.rounds + 1)
        each = self.validation_steps + sum(self.round_steps(number) for number in rounds)
        return (
            self.validation_steps
            + self.recording_steps(self.recorded_samples - 1)
            + sum(self.search_steps(budget) + self.training_steps + each for budget in budgets)
            + self._through_runs_steps(budgets)
            + self.test_steps(len(budgets))
        )

    def _roll_outs(self, number: int) -> list[int]:
        """Of how many samples a round needs roll-outs: of the latest predictor, and of each earlier one.

        Those of an earlier predictor are there already but for the samples that are new.
        """
        most = self.amounts.samples_of(number)
        return [most] + (number - 1) * [most - self.amounts.samples_of(number - 1)] if number > 1 else [most]
