"""How many steps of the progress bar each part of the work has, about."""

import math
from dataclasses import dataclass

from lesa.fitting.amounts import Amounts
from lesa.fitting.cost import CONTENDERS
from lesa.training.schedule_search import BRIEF_UPDATES, SEARCH_TURNS

MOVES = 5
"""How often a search moves a step of the schedule, about."""


SEARCH_UPDATES = 80
"""A turn of the search with eight samples takes as long as so many steps of the optimiser, on both bundled models."""


@dataclass(frozen=True)
class Work:
    """Counts calls of the transformer, steps of the optimiser and parts of the search alike.

    Args:
        amounts: how much is recorded and trained.
        steps: of a run.
        calls: of the transformer in each step.
        batch_size: samples per call of the pipeline.
    """

    amounts: Amounts
    steps: int
    calls: int
    batch_size: int

    def recording_steps(self, samples: int) -> int:
        """Of runs of so many samples."""
        return math.ceil(samples / self.batch_size) * self.steps * self.calls

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
        return self.brief_steps + SEARCH_TURNS * SEARCH_UPDATES + self.training_steps + rounds

    def refining_steps(self, number: int) -> int:
        """Of a round of refining: its roll-outs, and those of earlier predictors on samples that are new."""
        most, before = self.amounts.samples_of(number), self.amounts.samples_of(max(number - 1, 1))
        new = most - before if number > 1 else most
        return self.recording_steps(most) + (number - 1) * self.recording_steps(new) + self.amounts.round_updates

    def round_steps(self, number: int) -> int:
        """Of a round of refining, with its validation."""
        return self.refining_steps(number) + self.validation_steps

    def test_steps(self, budgets: int) -> int:
        """Of the test of all predictors."""
        return (1 + CONTENDERS * budgets) * self.recording_steps(self.amounts.test_samples)

    def all_steps(self, budgets: list[int]) -> int:
        """Of all that comes after the first sample."""
        amounts = self.amounts
        each = self.validation_steps + sum(self.round_steps(number) for number in range(1, amounts.rounds + 1))
        return (
            self.validation_steps
            + self.recording_steps(amounts.samples_of(amounts.rounds) - 1)
            + sum(self.search_steps(budget) + self.training_steps + each for budget in budgets)
            + self.test_steps(len(budgets))
        )
