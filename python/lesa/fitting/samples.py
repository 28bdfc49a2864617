"""The samples that `fit` records and runs, and which of them serve what."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.artifacts import digest
from lesa.fitting.amounts import Amounts
from lesa.training.joined import JoinedTrajectories
from lesa.training.recording import record
from lesa.training.trajectories import Trajectories

VALIDATION, TEST = 500_000, 1_000_000
"""The numbers of the first samples for choices and for the test."""

LEAST = 8
"""So many inputs at least are left to train on; see docs/research.md. With fewer, no inputs are kept for the rest."""


@dataclass(frozen=True)
class Shares:
    """The inputs of the samples for each purpose. Inputs repeat where there are fewer of them than samples.

    Args:
        training: those to train on. Sample i has the input `training[i % len(training)]`.
        validation: one for each sample for choices.
        test: one for each sample of the test.
    """

    training: Sequence[dict]
    validation: Sequence[dict]
    test: Sequence[dict]

    @property
    def test_is_new(self) -> bool:
        """Whether no input of the test serves another purpose too. Inputs of equal values are one input."""
        others = {digest(item) for item in (*self.training, *self.validation)}
        return others.isdisjoint(digest(item) for item in self.test)


def shares_of(inputs: Sequence[dict], amounts: Amounts) -> Shares:
    """Divides the inputs: the last ones are for the test, those before them for the choices, the rest to train on.

    Where less than `LEAST` would be left to train on, the samples have the same inputs, but stay the last ones.

    Args:
        inputs: dicts of pipeline arguments.
        amounts: how many samples there are for choices and for the test.
    """
    left, held = [*inputs], []
    for count in (amounts.test_samples, amounts.validation_samples):
        last = left[-count:]
        held.append([last[number % len(last)] for number in range(count)])
        if len(left) - count >= LEAST:
            left = left[:-count]
    test, validation = held
    return Shares(left, validation, test)


class Samples:
    """Numbered samples to train on. Sample i is drawn from `inputs[i % len(inputs)]` with the seed `seed + i`.

    They are recorded in parts, so that there are more of them only where they are needed.

    Args:
        pipe: the pipeline.
        inputs: those to train on, dicts of pipeline arguments.
        folder: of the recordings.
        num_inference_steps: of a run.
        tokens: kept of each sample.
        batch_size: samples per call of the pipeline.
        seed: of sample 0.
        amounts: how many samples each part has.
    """

    def __init__(
        self,
        pipe: Any,
        inputs: Sequence[dict],
        folder: Path,
        num_inference_steps: int,
        tokens: int,
        batch_size: int,
        seed: int,
        amounts: Amounts,
    ):
        self.pipe, self.inputs, self.folder, self.seed = pipe, inputs, folder, seed
        self.num_inference_steps, self.tokens, self.batch_size = num_inference_steps, tokens, batch_size
        self.ends = amounts.ends
        self._parts: list[Trajectories] = []

    def inputs_of(self, first: int, end: int) -> list[dict]:
        """The inputs of the samples with these numbers."""
        return [self.inputs[number % len(self.inputs)] for number in range(first, end)]

    def part(self, number: int) -> Trajectories:
        """A part of the recording. What is missing of it is recorded."""
        while len(self._parts) <= number:
            place = len(self._parts)
            begin, end = self.bounds(place)
            recorded = record(
                self.pipe,
                self.inputs_of(begin, end),
                self.folder / f"part-{place}",
                self.num_inference_steps,
                self.tokens,
                self.seed + begin,
                self.batch_size,
                progress=False,
            )
            self._parts.append(recorded)
        return self._parts[number]

    def bounds(self, number: int) -> tuple[int, int]:
        """The numbers of the first sample of a part, and of the one after its last sample."""
        return [0, *self.ends][number], self.ends[number]

    def parts_within(self, count: int) -> int:
        """How many parts the first `count` samples have."""
        return sum(end <= count for end in self.ends)

    def missing(self, count: int) -> int:
        """How many of the first `count` samples this call has not recorded or looked at yet."""
        return count - [0, *self.ends][len(self._parts)] if len(self._parts) < self.parts_within(count) else 0

    def joined(self, count: int) -> JoinedTrajectories:
        """The first samples, as one recording. `count` is one of `ends`."""
        parts = [self.part(number) for number in range(self.parts_within(count))]
        return JoinedTrajectories(parts, self.inputs_of(0, count))
