"""How much is recorded and trained by default. The figures follow from measurements; see docs/research.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Amounts:
    """How much work `fit` does at most.

    Args:
        samples: recorded before the first training.
        most_samples: recorded in the end, at most. Each round may double the samples until then.
        updates: steps of the optimiser in the first training.
        round_updates: the same in each round of refining.
        rounds: of refining, at most.
        gain: in dB. A round that gains less is the last one.
        tokens: kept of each sample, at most.
        validation_samples: with which rounds are compared.
        test_samples: on which the predictor is tested in the end.
        batch_size: trajectories per step of the optimiser.
        tokens_per_batch: random tokens of each trajectory per step of the optimiser.
    """

    samples: int = 16
    most_samples: int = 64
    updates: int = 600
    round_updates: int = 200
    rounds: int = 3
    gain: float = 0.1
    tokens: int = 96
    validation_samples: int = 4
    test_samples: int = 8
    batch_size: int = 8
    tokens_per_batch: int = 32

    @property
    def ends(self) -> list[int]:
        """How many samples there are after each part of the recording: one, then the first ones, then twice as many."""
        ends, end = [1], self.samples
        while ends[-1] < self.most_samples:
            if end > ends[-1]:
                ends.append(min(end, self.most_samples))
            end *= 2
        return ends

    def samples_of(self, number: int) -> int:
        """How many samples a round of refining is trained on.

        Args:
            number: of the round, from 1.
        """
        return min(self.samples * 2 ** (number - 1), self.most_samples)


AMOUNTS = Amounts()
