"""Which steps to compute: found on recorded trajectories, for a predictor and a number of computed steps."""

import math

import torch
from tqdm import tqdm

from lesa.schedule import Schedule
from lesa.training.batches import Batch, Head
from lesa.training.training_run import Training, complete_config
from lesa.training.trajectories import Trajectories, check_latents, check_plain
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import argument_error, check_int

SEARCH_TURNS, PROBE_EPOCHS = 2, 12


def find_schedule(
    trajectories: Trajectories,
    budget: int,
    config: PredictorConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Schedule:
    """Chooses which steps to compute, by turns with training: `search_schedule` for a predictor, a predictor for that.

    The first search is for an untrained predictor. The ones after it are for predictors that were trained briefly on
    many schedules around the one before, so that they favour none.

    Args:
        trajectories: what `lesa.record` made.
        budget: how many steps to compute.
        config: of the predictor; a newton one. Default: as of `train`.
        seed: of all that is random.
        device: where to train.
        progress: whether to show progress bars.

    Returns:
        The schedule.

    Raises:
        ValueError: `config` or `budget` does not fit the trajectories, or the predictor is not a newton one.
    """
    check_plain(trajectories)
    total = trajectories.num_inference_steps
    budget = check_int("budget", budget, minimum=2, maximum=total - 1)
    schedule = Schedule.spread(budget, total)
    for turn in range(SEARCH_TURNS + 1):
        probe = Training(trajectories, complete_config(trajectories, config, schedule), None, device, seed, reach=3)
        if turn:
            probe.fit(
                guided_epochs=PROBE_EPOCHS,
                epochs=0,
                batch_size=8,
                tokens=32,
                learning_rate=3e-3,
                head_aware=True,
                validation_fraction=0.0,
                progress=progress,
            )
        schedule = search_schedule(trajectories, probe.predictor.cpu(), budget, seed=seed, progress=progress)
    return schedule


_WIDEST = 2.5
"""How many times the mean gap a gap may be."""


def search_schedule(
    trajectories: Trajectories,
    predictor: FusedKANPredictor,
    num_computed: int,
    *,
    samples: int = 24,
    tokens_per_sample: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Schedule:
    """Chooses the steps whose computing leaves the smallest error of the forecasts between them.

    A gap between two computed steps costs the square of the displacement by which its forecast velocities miss the
    true ones. Dynamic programming finds the cheapest chain of gaps: for each number of computed steps and each last two
    of them, the cheapest chain that ends there, whose steps are the history of the gaps that follow. Then single steps
    are moved as long as that makes the error of the whole run smaller, to which all gaps add up.

    Args:
        trajectories: recorded with all steps computed.
        predictor: what forecasts; a newton predictor, trained or not.
        num_computed: how many steps to compute.
        samples: trajectories to look at. Where guidance combines several streams of calls, so many in all.
        tokens_per_sample: random tokens of each.
        seed: of their choice.
        progress: whether to show a progress bar.

    Returns:
        The schedule, with the noise levels of the trajectories.

    Raises:
        ValueError: the predictor feeds on its own forecasts, there are fewer steps than `num_computed`, or the
            trajectories have several streams and no latents, which say how guidance combines them.
    """
    if predictor.config.history != "anchors":
        raise argument_error(
            "predictor",
            "forecast from computed steps only",
            predictor.config.history,
            "Use a newton predictor, or set the schedule by hand.",
        )
    total = trajectories.num_inference_steps
    count = check_int("num_computed", num_computed, minimum=2, maximum=total - 1)
    errors = _Errors(trajectories, predictor, samples, tokens_per_sample, seed)
    steps = _cheapest_chain(errors, count, progress)
    steps = _refined(errors, steps)
    sigmas = trajectories[0].sigmas.tolist()
    return Schedule(steps, total, tuple(sigmas[step] for step in steps))


class _Errors:
    """Errors of forecasts on some tokens of some trajectories.

    Args:
        trajectories, predictor, samples, tokens, seed: as of `search_schedule`.
    """

    def __init__(self, trajectories, predictor, samples, tokens, seed):
        numbers = trajectories.by_sample
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(numbers), generator=generator).tolist()
        count = len(numbers[order[0]])
        order = order[: max(1, samples // count)]
        chosen = [[trajectories[number] for number in numbers[i]] for i in order]
        levels = chosen[0][0].sigmas
        alike = [streams for streams in chosen if len(streams) == count and torch.equal(streams[0].sigmas, levels)]
        self.total = len(levels)
        head, state = Head(trajectories, "cpu"), generator.get_state()
        self.batches = [  # one for each stream, of the same tokens
            Batch([*stream], head, generator.set_state(state), tokens, "cpu") for stream in zip(*alike)
        ]
        self.weights = torch.ones(1, 1)
        if count > 1:
            tokens_each = self.batches[0].features.shape[1] // len(alike)
            weights = torch.stack([_guidance_weights(trajectories, sample) for sample in alike], 1)
            self.weights = weights.repeat_interleave(tokens_each, 1)
        self.predictor = predictor
        self._gaps: dict[tuple[int, ...], torch.Tensor] = {}  # by history and end, the displacement over the gap
        self._longest = predictor.config.max_history

    @torch.no_grad()
    def after(self, history: tuple[int, ...], length: int) -> torch.Tensor:
        """How far the sample is off after 0, 1, 2, ... forecast steps `[length + 1, N, O]`.

        Args:
            history: the computed steps so far, oldest first; only the newest matter.
            length: how many steps to forecast after the last of them.
        """
        history = history[-self._longest :]
        length = min(length, self.total - 1 - history[-1])
        targets = torch.arange(history[-1] + 1, history[-1] + 1 + length)
        slots = torch.tensor(history + history[-1:] * (self._longest - len(history)))  # those beyond are not read
        cursor = torch.full((length,), len(history) % self._longest, dtype=torch.int32)
        held = torch.full_like(cursor, len(history))
        off = 0
        for batch, weight in zip(self.batches, self.weights):
            features = batch.features[slots][:, None].expand(-1, length, -1, -1)
            sigmas = batch.sigmas[slots][:, None].expand(-1, length)
            forecast = self.predictor.forecast(features, None, sigmas, cursor, held, batch.sigmas[targets])
            error = batch.velocity(forecast, targets) - batch.velocities[targets]
            off = off + weight[:, None] * error * batch.widths[targets, None, None]
        return torch.cat([torch.zeros_like(self.batches[0].velocities[:1]), off.cumsum(0)])

    def costs(self, history: tuple[int, ...], length: int) -> list[float]:
        """The squared displacement after 0, 1, 2, ... forecast steps."""
        return self.after(history, length).square().mean((1, 2)).tolist()

    def of(self, steps: tuple[int, ...]) -> float:
        """The squared displacement at the end of a run that computes `steps`."""
        off = 0
        for number, end in enumerate((*steps[1:], self.total), start=1):
            gap = (*steps[max(0, number - self._longest) : number], end)
            if gap not in self._gaps:
                self._gaps[gap] = self.after(gap[:-1], end - gap[-2] - 1)[-1]
            off = off + self._gaps[gap]
        return float(off.square().mean())


def _guidance_weights(trajectories, streams) -> torch.Tensor:
    """How much each stream of calls of a sample adds to its velocity `[J]`: by least squares over a recorded run.

    Args:
        trajectories: for the output head.
        streams: the trajectories of the sample.
    """
    check_latents(streams[0])
    head = Head(trajectories, "cpu")
    ways = []
    for stream in streams:
        batch = Batch([stream], head, None, None, "cpu")
        ways.append((batch.velocities * batch.widths[:, None, None])[:-1])
    latents = streams[0].latents.float()
    moved = latents[:-1] - latents[1:]  # sigma falls
    drawn = moved.any(2).any(0)  # tokens of an image that is given stay as they are
    ways = torch.stack([way[:, drawn].flatten() for way in ways], 1)
    return torch.linalg.lstsq(ways, moved[:, drawn].reshape(-1, 1)).solution[:, 0]


def _cheapest_chain(errors: _Errors, count: int, progress: bool) -> tuple[int, ...]:
    """The chain of `count` steps from step 0 whose gaps cost least together."""
    total = errors.total
    widest = min(math.ceil(_WIDEST * total / count), total)
    best = {(0,): ((0,), 0.0)}  # by the last two steps: the chain, and what its gaps cost
    for number in tqdm(range(1, count), desc="search", unit="step", disable=not progress):
        left = count - number  # steps to choose, this one included
        found: dict[tuple[int, ...], tuple[tuple[int, ...], float]] = {}
        for chain, cost in best.values():
            last = chain[-1]
            gaps = errors.costs(chain, widest - 1)
            for step in range(last + 1, min(last + widest, total - left) + 1):
                if total - step > widest * left or step >= total:
                    continue  # too far from the end
                sum_ = cost + gaps[step - last - 1]
                if sum_ < found.get((last, step), (None, math.inf))[1]:
                    found[last, step] = ((*chain, step), sum_)
        best = found
    ends = [(cost + errors.costs(chain, total - 1 - chain[-1])[-1], chain) for chain, cost in best.values()]
    return min(ends)[1]


def _refined(errors: _Errors, steps: tuple[int, ...]) -> tuple[int, ...]:
    """Moves single steps as long as that lowers the error of the whole run."""
    error = errors.of(steps)
    while True:
        moved = []
        for n in range(1, len(steps)):
            for move in (-2, -1, 1, 2):
                other = (*steps[:n], steps[n] + move, *steps[n + 1 :])
                if other[-1] < errors.total and all(a < b for a, b in zip(other, other[1:])):
                    moved.append((errors.of(other), other))
        best = min(moved)
        if best[0] >= error * (1 - 1e-6):
            return steps
        error, steps = best
