"""The run that everything else is compared with."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lesa.contenders.base import Color, Contender, Pipeline


@dataclass(frozen=True)
class Reference(Contender):
    """The run of all steps. All of them are computed."""

    name = "reference"
    title = "reference"
    color = Color("#202020", "#ececed")

    def __str__(self) -> str:
        return self.name

    def describe(self) -> str:
        """The setting in words."""
        return "all steps"

    def on(self, pipe: Pipeline, num_inference_steps: int) -> AbstractContextManager[None]:
        """A context that changes nothing."""
        return nullcontext()
