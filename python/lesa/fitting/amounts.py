"""How much is recorded and trained by default.

The numbers of samples, of steps of the optimiser and of rounds follow from measurements; see docs/research.md. How much
a large model needs is not measured: its numbers of samples and tokens are chosen so that there are more tokens in all
than the small models have needed.
"""

from dataclasses import dataclass, replace

from lesa.training.settings import REFINING_UPDATES, ROUNDS, TOKENS_PER_BATCH, UPDATES

RECORDED_FLOPS, RECORDED_FLOPS_ON_CPU = 1e15, 1e13
"""How much work of the transformer the first samples may be: seconds to minutes, less than what the training takes."""

SMALL_FLOPS, SMALL_FLOPS_ON_CPU = 3e14, 1e11
"""The work of one sample of a model for which there is all of the training through whole runs. Larger ones get less."""


@dataclass(frozen=True)
class Amounts:
    """How much work `fit` does at most.

    Args:
        samples: recorded before the first training, at least.
        first_samples: the same, at most, for models of which samples take little time.
        most_samples: recorded in the end, at most. Each round may double the samples until then.
        updates: steps of the optimiser in the closed loop of the first training.
        round_updates: the same in each round of refining.
        rounds: of refining, at most.
        gain: in dB. A round that gains less is the last one.
        tokens: kept of each sample, at most.
        validation_samples: with which rounds are compared.
        test_samples: on which the predictor is tested in the end.
        batch_size: trajectories per step of the optimiser.
        tokens_per_batch: random tokens of each trajectory per step of the optimiser.
    """

    samples: int = 8
    first_samples: int = 160
    most_samples: int = 160
    updates: int = UPDATES
    round_updates: int = REFINING_UPDATES
    rounds: int = ROUNDS
    gain: float = 0.1
    tokens: int = 512
    validation_samples: int = 8
    test_samples: int = 8
    batch_size: int = 8
    tokens_per_batch: int = TOKENS_PER_BATCH

    def for_model(self, flops: float, on_cpu: bool) -> "Amounts":
        """The amounts for a model: as many first samples as `RECORDED_FLOPS` allow.

        Args:
            flops: of the run of one sample, about.
            on_cpu: whether the model runs on a CPU.
        """
        allowed = int((RECORDED_FLOPS_ON_CPU if on_cpu else RECORDED_FLOPS) / flops)
        return replace(self, samples=min(max(self.samples, allowed), self.first_samples))

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


@dataclass(frozen=True)
class EndToEndAmounts:
    """How much work `fit` does in addition where it trains through whole runs. The defaults are those of small models.

    Args:
        schedule_updates: steps of the optimiser on many schedules, before schedules are compared.
        updates: steps of the optimiser on the chosen schedule.
        batch_size: samples for each of them.
        moves: how many schedules are tried beside those of the family.
        trial_samples: with which schedules are compared, at most as many as there are samples to train on.
    """

    schedule_updates: int = 100
    updates: int = 200
    batch_size: int = 8
    moves: int = 60
    trial_samples: int = 32

    def for_model(self, flops: float, on_cpu: bool) -> "EndToEndAmounts":
        """The amounts for a model, between these and those that every model gets. For the arguments, see `Amounts`."""
        part = min(1.0, (SMALL_FLOPS_ON_CPU if on_cpu else SMALL_FLOPS) / flops)
        found = {name: max(int(most * part), _LEAST[name]) for name, most in vars(self).items()}
        return EndToEndAmounts(**{name: min(each, getattr(self, name)) for name, each in found.items()})


_LEAST = {"schedule_updates": 32, "updates": 48, "batch_size": 2, "moves": 12, "trial_samples": 4}
"""What every model gets. A fit of a model of 12 B parameters for up to ten computed steps stays below 40 minutes on an
H100 by estimate."""

AMOUNTS, END_TO_END = Amounts(), EndToEndAmounts()
