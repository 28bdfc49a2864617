"""What a fit will cost on this machine, and what the predictor will save, from the first recorded sample."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lesa.estimation import predicted_work
from lesa.fitting.amounts import Amounts
from lesa.training.batches import Batch, Split
from lesa.training.settings import TrainingSettings, complete_config, spread_over
from lesa.training.training_run import Training
from lesa.training.trajectories import Trajectories
from lesa_kernels import PredictorConfig
from lesa_kernels.torch_modes import default_modes

CONTENDERS = 3
"""The runs of each budget in the test, beside the one with all steps: trained, without training, and fewer steps."""

_TIMED = 3
"""Steps of the optimiser whose time is measured, after one whose time is not."""
_COPIED = 2**24
"""How many numbers are copied to measure the bandwidth."""


@dataclass(frozen=True)
class FirstSample:
    """What was measured with the first recorded sample.

    Args:
        seconds: to record it.
        nbytes: of its files.
        num_inference_steps: steps of its run.
        optimiser_step_seconds: of one step of the optimiser in the training.
        predicted_step_seconds: of one predicted step of a run: its bytes at the bandwidth of the device, without the
            host's part.
    """

    seconds: float
    nbytes: int
    num_inference_steps: int
    optimiser_step_seconds: float
    predicted_step_seconds: float


@dataclass(frozen=True)
class FitCost:
    """What a fit will cost, predicted from its first sample.

    Args:
        first: the first sample.
        budgets: numbers of computed steps, one for each predictor.
        samples: how many are recorded, the first one included.
        more_samples: how many are recorded in addition if they improve the predictor.
        test_samples: on how many it is tested.
        recording_seconds, roll_out_seconds, training_seconds, test_seconds: what is left of each part, at most.
        nbytes: of the files that are kept meanwhile, without those of `more_samples`.
    """

    first: FirstSample
    budgets: tuple[int, ...]
    samples: int
    more_samples: int
    test_samples: int
    recording_seconds: float
    roll_out_seconds: float
    training_seconds: float
    test_seconds: float
    nbytes: int

    @property
    def seconds(self) -> float:
        """What is left in all, without `more_samples`."""
        return self.recording_seconds + self.roll_out_seconds + self.training_seconds + self.test_seconds

    def sample_seconds(self, budget: int) -> float:
        """Of a sample with so many computed steps, without the host's part of the predicted ones."""
        predicted = self.first.num_inference_steps - budget
        return self.first.seconds * self._part(budget) + predicted * self.first.predicted_step_seconds

    def text(self) -> str:
        """What it costs and saves, in a few sentences, each on a line."""
        parts = {
            f"recording {_counted(self.samples - 1, 'more sample')}": self.recording_seconds,
            "the roll-outs": self.roll_out_seconds,
            "the training": self.training_seconds,
            f"the test with {_counted(self.test_samples, 'sample')}": self.test_seconds,
        }
        said = ", ".join(f"{name} {_time(seconds)}" for name, seconds in parts.items() if seconds)
        lines = [
            f"The first sample took {_time(self.first.seconds)}.",
            f"Predicted for the rest: at most {_time(self.seconds)}; {said}.",
            f"Predicted for the files until it is finished: {_size(self.nbytes)}.",
        ]
        if self.more_samples:
            more = f"Up to {_counted(self.more_samples, 'more sample')} are recorded if they improve the predictor"
            lines.append(f"{more}: {_time(self.more_samples * self.first.seconds)}.")
        total = self.first.num_inference_steps
        for budget in self.budgets:
            line = (
                f"Predicted for a sample with {budget} of {total} steps computed: {_time(self.sample_seconds(budget))}"
            )
            lines.append(f"{line}. It has {total / budget:.1f} times fewer computed steps.")
        return "\n".join(lines)

    def _part(self, budget: int) -> float:
        return budget / self.first.num_inference_steps


@default_modes()
def measured(
    trajectories: Trajectories, seconds: float, amounts: Amounts, budget: int, device: torch.device | str
) -> FirstSample:
    """Measures what the first sample says about the cost of a fit. It trains on that sample for a moment.

    The predictor is the one that `lesa.train` makes by default. A step of the optimiser is measured with the first
    sample in place of each sample of a batch.

    Args:
        trajectories: the recording, whose first sample is used.
        seconds: that the recording of this sample took.
        amounts: the size of a step of the optimiser.
        budget: how many steps the predictor computes.
        device: where the predictor is trained, and the pipeline runs.

    Raises:
        ValueError: the recording cannot be trained on; see `lesa.train`.
    """
    device, alike = torch.device(device), trajectories.by_sample[0]
    first = [trajectories[number] for number in alike]
    tensors = [tensor for each in first for tensor in vars(each).values() if tensor is not None]
    tokens = _all_tokens(first[0].token_index.tolist())
    sizes = (1, tokens, trajectories.feature_dim, first[0].features.dtype)
    moved, _ = predicted_work(PredictorConfig(trajectories.feature_dim), sizes, len(trajectories.head_weight))
    streams = len(alike) // len(trajectories.projections)  # of each step
    return FirstSample(
        seconds=seconds,
        nbytes=sum(tensor.nbytes for tensor in tensors),
        num_inference_steps=len(trajectories.run_sigmas),
        optimiser_step_seconds=_optimiser_step_seconds(trajectories, amounts, budget, device),
        predicted_step_seconds=streams * moved / _bandwidth(device),
    )


def fit_cost(
    first: FirstSample,
    *,
    budgets: Sequence[int],
    samples: int,
    more_samples: int,
    test_samples: int,
    rounds: int,
    optimiser_steps: int,
) -> FitCost:
    """What a fit will cost, from its first sample. All but that sample is counted.

    A roll-out takes a sample's time for each computed step. The test runs each sample with all steps computed, and for
    each budget as many times as there are `CONTENDERS`.

    Args:
        first: what `measured` returned.
        budgets: numbers of computed steps, one for each predictor.
        samples: how many are recorded, the first one included.
        more_samples: how many are recorded in addition if they improve the predictor.
        test_samples: on how many it is tested.
        rounds: of refining, for each budget, at most.
        optimiser_steps: of all trainings together, at most. One of a round of refining counts as several, as it also
            learns from the roll-outs.
    """
    parts = sum(budget / first.num_inference_steps for budget in budgets)  # of the time of a sample
    rolled = rounds * samples * parts
    return FitCost(
        first=first,
        budgets=tuple(budgets),
        samples=samples,
        more_samples=more_samples,
        test_samples=test_samples,
        recording_seconds=(samples - 1) * first.seconds,
        roll_out_seconds=rolled * first.seconds,
        training_seconds=optimiser_steps * first.optimiser_step_seconds,
        test_seconds=test_samples * (1 + CONTENDERS * parts) * first.seconds,
        nbytes=round((samples + rolled) * first.nbytes),
    )


def _all_tokens(index: Sequence[int]) -> int:
    """About how many tokens the sample has of which those with these numbers, rising and drawn at random, were kept."""
    most = index[-1] + 1
    return most if most == len(index) else round(index[-1] * (len(index) + 1) / len(index))


def _optimiser_step_seconds(trajectories: Trajectories, amounts: Amounts, budget: int, device: torch.device) -> float:
    config = complete_config(trajectories, None, spread_over(trajectories, budget))
    numbers = Split(trajectories.by_sample[0], [])
    run = Training(trajectories, config, TrainingSettings(), numbers=numbers, device=device)
    number = numbers.training[0]
    end, alike = trajectories.end_of(number), [trajectories[number]] * amounts.batch_size
    batch = Batch(alike, run.head, run.generator, amounts.tokens_per_batch, device, end=end)
    optimizer = torch.optim.AdamW(run.predictor.parameters(), lr=0.0)
    seconds = []
    for _ in range(1 + _TIMED):
        start = time.perf_counter()
        loss = run.loss_of(batch, guided=False)
        loss.backward()
        optimizer.step()
        loss.item()  # after it, the step has ended, but for the optimiser's part
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy on the device."""
    source = torch.zeros(_COPIED, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # after it, the copy has ended
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _time(seconds: float) -> str:
    """In words, with two digits where it is shorter than a minute."""
    if seconds < 60:
        return f"{max(seconds, 0.01):.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{max(1, round(nbytes / 1e6))} MB"
