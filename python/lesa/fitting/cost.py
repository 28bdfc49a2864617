"""What a fit will cost on this machine, and what the predictor will save, from the first recorded sample."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lesa.estimation import predicted_work
from lesa.fitting.amounts import Amounts
from lesa.fitting.planning import CONTENDERS, Work
from lesa.training.batches import Batch, Split
from lesa.training.end_to_end import CALLS_PER_COMPUTED_STEP
from lesa.training.settings import TrainingSettings, complete_config, spread_over
from lesa.training.training_run import Training
from lesa.training.trajectories import Trajectories, latents_of
from lesa_kernels import PredictorConfig
from lesa_kernels.torch_modes import default_modes

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
        latents_nbytes: of the latents after each step of its run.
    """

    seconds: float
    nbytes: int
    num_inference_steps: int
    optimiser_step_seconds: float
    predicted_step_seconds: float
    latents_nbytes: int = 0

    def sample_seconds(self, budget: int) -> float:
        """Of a sample with so many computed steps, without the host's part of the predicted ones."""
        predicted = self.num_inference_steps - budget
        return self.seconds * budget / self.num_inference_steps + predicted * self.predicted_step_seconds


@dataclass(frozen=True)
class FitCost:
    """What a fit will cost, predicted from its first sample, if all rounds of refining take place.

    Args:
        first: the first sample.
        budgets: numbers of computed steps, one for each predictor.
        work: what there is to do.
        recording_seconds: of all runs with all steps but that of the first sample, and without the test.
        roll_out_seconds: of all runs with a predictor, without the test.
        training_seconds: of the searches too, but not through whole runs.
        test_seconds: of the test.
        nbytes: of the files that are kept meanwhile, without the pictures of a training with the loss "pixels".
        schedule_seconds: of the training on many schedules through whole runs.
        trial_seconds: of the runs that compare schedules.
        end_to_end_seconds: of the training through whole runs on the chosen schedules.
    """

    first: FirstSample
    budgets: tuple[int, ...]
    work: Work
    recording_seconds: float
    roll_out_seconds: float
    training_seconds: float
    test_seconds: float
    nbytes: int
    schedule_seconds: float = 0.0
    trial_seconds: float = 0.0
    end_to_end_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all that comes after the first sample."""
        through_runs = self.schedule_seconds + self.trial_seconds + self.end_to_end_seconds
        return self.recording_seconds + self.roll_out_seconds + self.training_seconds + through_runs + self.test_seconds

    def text(self, is_continued: bool = False, of_pixels: bool = False) -> str:
        """What it costs and saves, in a few sentences, each on a line.

        Args:
            is_continued: whether an earlier call has done a part of it.
            of_pixels: whether the loss of the training through whole runs compares pictures.
        """
        amounts, batch_size = self.work.amounts, self.work.batch_size
        parts = [
            f"{_counted(_whole_runs(self.work), 'more sample')} {_time(self.recording_seconds)}",
            f"runs with the predictors {_time(self.roll_out_seconds)}",
            f"training {_time(self.training_seconds)}",
            *self._through_runs(),
            f"the test with {_counted(amounts.test_samples, 'sample')} {_time(self.test_seconds)}",
        ]
        lines = [
            f"The first sample took {_time(self.first.seconds)}.",
            f"Predicted for all after it: about {_time(self.seconds)}; {', '.join(parts)}.",
        ]
        if is_continued:
            lines.append("An earlier call has done a part of it.")
        if amounts.rounds > 1:
            lines.append("It takes less if a round of refining gains so little that it is the last one.")
        if batch_size > 1:
            lines.append(f"Runs of {batch_size} samples are counted like {batch_size} runs, and may take less.")
        if of_pixels:
            lines.append("Decoding the pictures for the loss takes time and disk space that are not counted.")
        lines.append(f"Predicted for the files until it is finished: {_size(self.nbytes)}.")
        total = self.first.num_inference_steps
        for budget in self.budgets:
            line = f"Predicted for a sample with {budget} of {total} steps computed"
            fewer = f"It has {total / budget:.1f} times fewer computed steps."
            lines.append(f"{line}: {_time(self.first.sample_seconds(budget))}. {fewer}")
        return "\n".join(lines)

    def _through_runs(self) -> list[str]:
        """The parts of a training through whole runs, if there is one."""
        if self.work.through_runs is None:
            return []
        trials = sum(map(self.work.trials, self.budgets))
        return [
            f"training on many schedules {_time(self.schedule_seconds)}",
            f"comparing {trials} schedules {_time(self.trial_seconds)}",
            f"training through whole runs {_time(self.end_to_end_seconds)}",
        ]


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
        latents_nbytes=round(latents_of(first[0]).nbytes * tokens / len(first[0].token_index)),
    )


def fit_cost(first: FirstSample, work: Work, budgets: Sequence[int]) -> FitCost:
    """What a fit will cost, from its first sample, if all rounds of refining take place.

    All but that sample is counted. Each sample counts as if it ran alone, and processes that share the samples as if
    each had the same part of them. One process trains. A training through whole runs counts four runs with the
    predictor for each sample: the forward pass, twice the same for the backward pass, and the gradients. What the loss
    "pixels" adds, decoding and pictures on the disk, is not counted.

    Args:
        first: what `measured` returned.
        work: what there is to do.
        budgets: numbers of computed steps, one for each predictor.
    """
    amounts = work.amounts
    of_each = [first.sample_seconds(budget) for budget in budgets]  # a sample
    whole = _whole_runs(work)
    with_predictor = work.rolled_out_samples + work.validated_samples
    parts = sum(budget / first.num_inference_steps for budget in budgets)  # of the features of a sample
    trials = sum(work.trials(budget) * each for budget, each in zip(budgets, of_each)) * work.trial_samples
    on_many = end_to_end = 0.0
    if more := work.through_runs:
        update = min(more.batch_size, work.learning_samples) * CALLS_PER_COMPUTED_STEP * sum(of_each)
        on_many, end_to_end = more.schedule_updates * update, more.updates * update
    return FitCost(
        first=first,
        budgets=tuple(budgets),
        work=work,
        recording_seconds=whole * first.seconds / work.width,
        roll_out_seconds=with_predictor * sum(of_each) / work.width,
        training_seconds=len(budgets) * work.optimiser_steps * first.optimiser_step_seconds,
        test_seconds=amounts.test_samples * (first.seconds + CONTENDERS * sum(of_each)) / work.width,
        nbytes=round((work.recorded_samples + work.rolled_out_samples * parts) * first.nbytes)
        + work.learning_samples * first.latents_nbytes,
        schedule_seconds=on_many,
        trial_seconds=trials / work.width,
        end_to_end_seconds=end_to_end,
    )


def _whole_runs(work: Work) -> int:
    """How many samples run with all steps after the first one, without those of the test."""
    references = work.amounts.validation_samples + work.learning_samples + work.trial_samples
    return work.recorded_samples - 1 + references


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
    """In words, with two digits."""
    if seconds < 59.5:
        return f"{max(seconds, 0.01):.2g} s"
    if seconds < 99.5 * 60:
        return f"{max(seconds / 60, 1):.2g} min"
    hours = seconds / 3600
    return f"{hours:.2g} h" if hours < 99.5 else f"{hours:.0f} h"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{max(1, round(nbytes / 1e6))} MB"
