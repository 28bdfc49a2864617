"""How a predictor is trained through whole runs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lesa.training.settings import check_seed
from lesa_kernels.checks import argument_error, check_float, check_int

UPDATES = 50
"""How many steps the optimiser takes by default."""


@dataclass(frozen=True)
class EndToEndSettings:
    """How a predictor is trained through whole runs. For the arguments, see `train_end_to_end`.

    Raises:
        TypeError, ValueError: a setting is out of range; the message names it.
    """

    num_inference_steps: int | Sequence[int]
    updates: int = UPDATES
    batch_size: int = 8
    samples_per_call: int = 8
    learning_rate: float = 1e-3
    seed: int = 0
    learn_levels: bool = False

    def __post_init__(self) -> None:
        counts = self.num_inference_steps
        given = counts if isinstance(counts, Sequence) and not isinstance(counts, str) else (counts,)
        checked = tuple(sorted(check_int("num_inference_steps", each) for each in given))
        if not checked:
            raise argument_error(
                "num_inference_steps", "be one number or several", counts, "Pass some, or leave it out."
            )
        object.__setattr__(self, "num_inference_steps", checked[0] if len({*checked}) == 1 else checked)
        if self.learn_levels and len({*checked}) > 1:
            remedy = "They belong to one schedule. Pass one number of steps."
            raise argument_error("learn_levels", "be False with several `num_inference_steps`", True, remedy)
        for name in ("updates", "batch_size", "samples_per_call"):
            object.__setattr__(self, name, check_int(name, getattr(self, name)))
        if len({*checked}) > 1 and self.updates < len(checked):
            must = f"be at least {len(checked)}, so that each of `num_inference_steps` has an update"
            raise argument_error("updates", must, self.updates, "Pass more updates, or fewer numbers of steps.")
        object.__setattr__(self, "learning_rate", check_float("learning_rate", self.learning_rate, minimum=1e-8))
        object.__setattr__(self, "seed", check_seed(self.seed))

    @property
    def counts(self) -> tuple[int, ...]:
        """All numbers of steps, rising; each of them once."""
        given = self.num_inference_steps
        return (given,) if isinstance(given, int) else tuple(sorted({*given}))

    def count_of_each_update(self) -> list[int]:
        """The number of steps of each update: all that were given in a new random order, again and again."""
        rng, given = random.Random(self.seed), self.num_inference_steps
        drawn, chosen = [given] if isinstance(given, int) else [*given], list[int]()
        while len(chosen) < self.updates:
            chosen += rng.sample(drawn, len(drawn))
        return chosen[: self.updates]
