"""Fewer steps of the scheduler: what users do without a cache."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lesa.contenders.base import Color, Pipeline, Plain


@dataclass(frozen=True)
class FewerSteps(Plain):
    """A run of fewer steps, all of which are computed.

    Args:
        steps: the pipeline's `num_inference_steps`.
    """

    steps: int

    name = "steps"
    title = "fewer steps"
    color = Color("#6d6f73", "#a9abb0")

    def __str__(self) -> str:
        return f"fewer-steps-{self.steps}"

    def describe(self) -> str:
        """The setting in words."""
        return f"{self.steps} steps of the scheduler"

    def on(self, pipe: Pipeline, num_inference_steps: int) -> AbstractContextManager[None]:
        """A context that changes nothing."""
        return nullcontext()

    def steps_of(self, num_inference_steps: int) -> int:
        """How many steps of the scheduler its run has."""
        return self.steps

    @classmethod
    def at(cls, budget: int) -> "FewerSteps":
        """The run of `budget` steps."""
        return cls(budget)
