"""Finds which steps to compute, on recorded trajectories, for a predictor and a number of computed steps."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from lesa.schedule import Schedule
from lesa.training.batches import (
    Batch,
    Head,
    Plan,
    check_is_predictor,
    check_whole,
    epochs_per_checkpoint,
    passes,
    roll_out,
)
from lesa.training.searching import Search
from lesa.training.settings import (
    TrainingSettings,
    check_one_transformer,
    check_seed,
    complete_config,
    spread_over,
    usable_device,
)
from lesa.training.training_run import Training, recorded_runs
from lesa.training.trajectories import Trajectories, Trajectory, check_plain, latents_of
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import Said, argument_error, check_int
from lesa_kernels.torch_modes import default_modes

SEARCH_TURNS = 2
"""How many brief trainings there are, each followed by a search."""

BRIEF = TrainingSettings(epochs=0, tokens_per_batch=16, validation_fraction=0.0, reach=3)
"""The settings of a brief training, which has guided epochs only. The loss is that of the forecaster."""

BRIEF_UPDATES = 240
"""How many steps of the optimiser a brief training has.

With 48 of them, the search for a predictor with forecasts in its history finds what it finds for an untrained one.
"""

WIDEST = 2.5
"""The largest gap, as a multiple of the mean gap."""

SAMPLES, TOKENS_PER_SAMPLE = 24, 16
"""How many trajectories, and how many tokens of each, a search uses at most."""

FEWER_TOKENS = 4
"""How many tokens of each a search uses whose schedule is only the middle of those of the next brief training."""


@default_modes()
def find_schedule(
    trajectories: Trajectories,
    budget: int,
    config: PredictorConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Schedule:
    """Chooses which steps to compute. What it does depends on how the predictor is trained.

    For a predictor whose history has computed steps only (newton), it alternates between a search and a brief training.
    The first search is for an untrained predictor. Each later search is for a predictor that was trained briefly on
    many schedules around the latest one, so that it favours none of them. If the history has forecasts too (lesa,
    dense), the brief training forecasts all steps from the recorded ones before them, so it depends on no schedule:
    there is one brief training, and one search after it. If there is nothing to train, or the predictor is fitted for
    each schedule that the search considers (l2p), there is one search.

    Args:
        trajectories: what `lesa.record` made.
        budget: how many steps to compute.
        config: configuration of the predictor. Default: that of `train`.
        seed: seed of all random choices.
        device: where to train.
        progress: whether to show progress bars.

    Returns:
        The schedule.

    Raises:
        TypeError, ValueError: an argument is out of range, `config` or `budget` does not fit the trajectories, or a
            file of the recording is damaged or has NaN or Inf, or the noise level rises in a recorded run.
    """
    check_plain(trajectories)
    check_one_transformer(trajectories, "a search for a schedule")
    budget, seed = check_budget(trajectories, budget), check_seed(seed)
    complete_config(trajectories, config, spread_over(trajectories, budget))
    usable_device(device)
    check_whole(trajectories)
    return found_schedule(trajectories, budget, config, seed, device, progress, Search())


def check_budget(trajectories: Trajectories, budget: int) -> int:
    """The budget; raises `TypeError` or `ValueError` unless a schedule with so many computed steps can be searched."""
    return check_int("budget", budget, minimum=2, maximum=trajectories.num_inference_steps - 1)


def found_schedule(
    trajectories: Trajectories,
    budget: int,
    config: PredictorConfig | None,
    seed: int,
    device: str | torch.device,
    progress: bool,
    search: Search,
) -> Schedule:
    """`find_schedule` for checked arguments; it continues what `search` has."""
    schedule = spread_over(trajectories, budget)
    config = complete_config(trajectories, config, schedule)
    forecaster, every_step = config.forecaster, config.history == "steps"
    settings = replace(BRIEF, seed=seed, head_aware=forecaster.head_aware)
    settings = replace(settings, guided_epochs=passes(trajectories, BRIEF_UPDATES, settings))
    bar = "train for the search" if progress else None
    turn_name = "turn-fitted" if forecaster.is_fitted else "updates-turn"  # parts of earlier versions were other ones

    def steps_of(turn: int) -> tuple[int, ...]:
        # A schedule of one step: all others are forecast in training.
        trained_for = Schedule((0,), len(trajectories[0].sigmas)) if every_step else schedule
        complete, name = complete_config(trajectories, config, trained_for), f"{turn_name}-{turn}"
        out_dir = search.training_folder(name) if turn else None
        run = Training(trajectories, complete, settings, out_dir=out_dir, device=device, bar=bar)
        run.epochs_per_checkpoint = epochs_per_checkpoint(trajectories, settings)
        if turn:
            run.fit()
        tokens = TOKENS_PER_SAMPLE if turn == turns[-1] else FEWER_TOKENS
        errors = ScheduleErrors(trajectories, run.predictor.cpu(), SAMPLES, tokens, seed)
        return _cheapest_steps(errors, budget, progress, search, name)

    turns = range(1)
    if forecaster.is_trained and not forecaster.is_fitted:
        turns = range(1, 2) if every_step else range(SEARCH_TURNS + 1)
    for turn in turns:
        schedule = _with_levels(trajectories, search.part(f"{turn_name}-{turn}", steps_of, turn))
    return schedule


@default_modes()
def search_schedule(
    trajectories: Trajectories,
    predictor: FusedKANPredictor,
    num_computed: int,
    *,
    samples: int = SAMPLES,
    tokens_per_sample: int = TOKENS_PER_SAMPLE,
    seed: int = 0,
    progress: bool = True,
) -> Schedule:
    """Chooses the computed steps that leave the smallest error of the forecasts between them.

    The errors of the forecast velocities in a gap between two computed steps add up to a displacement of the sample.
    The cost of the gap is the square of this displacement. Dynamic programming finds a chain of gaps with a small total
    cost: for each number of computed steps, and each possible pair of last two steps, it keeps the cheapest chain that
    ends with them. The earlier steps of a chain are the history from which its later gaps are forecast. Then single
    steps are moved, as long as this lowers the error of the whole run, which is the sum of the displacements of all
    gaps.

    If the history of the predictor has forecasts too, the search takes the recorded features of all steps before a gap
    as its history, and the forecasts within the gap. In a run, the steps before the gap are partly forecasts. With this
    approximation, the cost of a gap depends on its start and its length only.

    A predictor that is trained in closed form (l2p) is fitted again for each gap, on all trajectories that have the
    noise levels of the chosen ones. What it was fitted for before does not matter, and it is not changed.

    Args:
        trajectories: recorded with all steps computed.
        predictor: trained or not.
        num_computed: how many steps to compute.
        samples: how many trajectories to use at most. If guidance combines several streams of calls, each stream
            counts.
        tokens_per_sample: how many random tokens of each trajectory to use.
        seed: seed of the choice of trajectories and tokens.
        progress: whether to show a progress bar.

    Returns:
        The schedule, with the noise levels of the trajectories.

    Raises:
        TypeError, ValueError: the predictor is none, or for another number of steps; an argument is out of range, such
            as more steps than there are; a file of the recording is damaged or has NaN or Inf; the noise level rises in
            a recorded run; or the trajectories have several streams but no latents, which show how guidance combines
            the streams.
    """
    check_is_predictor(predictor)
    total, steps = trajectories.num_inference_steps, predictor.config.num_inference_steps
    if steps not in (None, total):
        remedy = "Set `num_inference_steps` of the predictor's config."
        raise argument_error(
            "predictor", f"be for the {total} steps of the recording", Said(f"one for {steps}"), remedy
        )
    count = check_int("num_computed", num_computed, minimum=2, maximum=total - 1)
    samples, tokens_per_sample = check_int("samples", samples), check_int("tokens_per_sample", tokens_per_sample)
    seed = check_seed(seed)
    check_whole(trajectories)
    errors = ScheduleErrors(trajectories, predictor, samples, tokens_per_sample, seed)
    return _with_levels(trajectories, _cheapest_steps(errors, count, progress, Search(), ""))


def _with_levels(trajectories: Trajectories, steps: Sequence[int]) -> Schedule:
    """The schedule of these steps, with the noise levels of the trajectories."""
    sigmas = trajectories[0].sigmas.tolist()
    return Schedule(tuple(steps), len(sigmas), tuple(sigmas[step] for step in steps))


class ScheduleErrors:
    """How far the forecasts of a schedule move the sample off, on some tokens of some trajectories.

    Args:
        trajectories, predictor, samples, tokens, seed: see `search_schedule`.

    Attributes:
        total: number of steps of a run.
        batches: one for each stream of calls, of the same tokens.
        weights: `[J, N]`, how much each stream counts for each token.
    """

    def __init__(self, trajectories: Trajectories, predictor: FusedKANPredictor, samples: int, tokens: int, seed: int):
        numbers = trajectories.by_sample
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(numbers), generator=generator).tolist()
        count = len(numbers[order[0]])
        order = order[: max(1, samples // count)]
        chosen = [[trajectories[number] for number in numbers[i]] for i in order]
        names = [trajectories.streams[number] for number in numbers[order[0]]]
        levels = chosen[0][0].sigmas
        alike = [streams for streams in chosen if len(streams) == count and torch.equal(streams[0].sigmas, levels)]
        self.total = len(levels)
        head, state = Head(trajectories, "cpu"), generator.get_state()
        self.batches = [  # the generator begins each batch in the same state: all get the same tokens
            Batch([*stream], head, generator.set_state(state), tokens, "cpu", stream=name)
            for name, stream in zip(names, zip(*alike))
        ]
        self.weights = torch.ones(1, 1, dtype=torch.float32)
        if count > 1:
            tokens_each = self.batches[0].features.shape[1] // len(alike)
            weights = torch.stack([guidance_weights(trajectories, sample) for sample in alike], 1)
            self.weights = weights.repeat_interleave(tokens_each, 1)
        config = predictor.config
        self.predictor, self._summary = predictor, None
        if config.forecaster.is_fitted:
            self.predictor = copy.deepcopy(predictor)  # it is fitted for each gap
            runs = recorded_runs(trajectories, range(len(trajectories)), "cpu")
            of_levels = (run for run in runs if torch.equal(run.sigmas, levels))
            self._summary = config.forecaster.summarise(self.predictor, of_levels)
        self._every_step = config.history == "steps"
        self._longest = 1 if self._every_step else config.max_history  # of the computed steps that a gap depends on
        self._gaps: dict[tuple[int, ...], torch.Tensor] = {}  # by history and end, the displacement over the gap
        self._costs: dict[tuple[tuple[int, ...], int], list[float]] = {}  # by history and length

    @torch.no_grad()
    def after(self, history: tuple[int, ...], length: int) -> torch.Tensor:
        """How far the sample is off after 0, 1, 2, ... forecast steps: `[length + 1, N, O]`.

        Args:
            history: the computed steps so far, oldest first. Only as many as the predictor reads are used.
            length: how many steps to forecast after the last of them.
        """
        history = history[-self._longest :]
        length = min(length, self.total - 1 - history[-1])
        nowhere = torch.zeros_like(self.batches[0].velocities[:1])
        if not length:
            return nowhere
        targets = range(history[-1] + 1, history[-1] + 1 + length)
        if self._summary is not None:
            self.predictor.forecaster.fit_steps(self.predictor, self._summary, history, targets)
        off = torch.zeros((), dtype=torch.float32)
        for batch, weight in zip(self.batches, self.weights):
            forecast = self._forecasts(batch, history, [*targets])
            error = batch.velocity(forecast, [*targets]) - batch.velocities[[*targets]]
            off = off + weight[:, None] * error * batch.widths[[*targets], None, None]
        return torch.cat([nowhere, off.cumsum(0)])

    def _forecasts(self, batch: Batch, history: tuple[int, ...], targets: list[int]) -> torch.Tensor:
        """The forecasts of the steps after the history: `[P, N, D]`."""
        if self._every_step:  # the features before the gap are the recorded ones
            plan = Plan((), self.total, self.predictor.config.max_history, every_step=True, steps=targets)
            return roll_out(self.predictor, batch, plan)
        length = len(targets)
        slots = torch.tensor(history + history[-1:] * (self._longest - len(history)))  # the repeated ones are not read
        cursor = torch.full((length,), len(history) % self._longest, dtype=torch.int32)
        held = torch.full_like(cursor, len(history))
        features = batch.features[slots][:, None].expand(-1, length, -1, -1)
        sigmas = batch.sigmas[slots][:, None].expand(-1, length)
        state = (features, None, sigmas, cursor, held, batch.sigmas[targets])
        return self.predictor.forecast(*state, **self.predictor.extra(batch.times, batch.stream))

    def costs(self, history: tuple[int, ...], length: int) -> list[float]:
        """The squared displacement after 0, 1, 2, ... forecast steps."""
        key = history[-self._longest :], length
        if key not in self._costs:
            self._costs[key] = self.after(history, length).square().mean((1, 2)).tolist()
        return self._costs[key]

    def of(self, steps: tuple[int, ...]) -> float:
        """The squared displacement at the end of a run that computes `steps`."""
        off = torch.zeros((), dtype=torch.float32)
        for number, end in enumerate((*steps[1:], self.total), start=1):
            gap = (*steps[max(0, number - self._longest) : number], end)
            if gap not in self._gaps:
                self._gaps[gap] = self.after(gap[:-1], end - gap[-2] - 1)[-1]
            off = off + self._gaps[gap]
        return float(off.square().mean())


def guidance_weights(trajectories: Trajectories, streams: Sequence[Trajectory]) -> torch.Tensor:
    """With which weights guidance adds up the streams of calls of a sample: `[J]`, least squares over a recorded run.

    Args:
        trajectories: the recording; its output head is used.
        streams: the trajectories of the sample.
    """
    head = Head(trajectories, "cpu")
    batches = [Batch([stream], head, None, None, "cpu") for stream in streams]
    latents = latents_of(streams[0]).float()
    moved = latents[:-1] - latents[1:]  # sigma falls
    drawn = moved.any(0)  # tokens of an input image stay as they are, and so do channels that no sample has
    moves = [(batch.velocities * batch.widths[:, None, None])[:-1, drawn].flatten() for batch in batches]
    return torch.linalg.lstsq(torch.stack(moves, 1), moved[:, drawn].reshape(-1, 1)).solution[:, 0]


def _cheapest_steps(errors: ScheduleErrors, count: int, progress: bool, search: Search, name: str) -> tuple[int, ...]:
    """The steps to compute: the cheapest chain of gaps, then moved."""
    chains: _Chains = [([0], 0.0)]
    for number in tqdm(range(1, count), desc="search", unit="step", disable=not progress):
        chains = search.part(f"{name}, step {number}", _longer_chains, errors, chains, count, number)
    ends = [(cost + errors.costs(tuple(chain), errors.total - 1 - chain[-1])[-1], chain) for chain, cost in chains]
    steps = tuple(min(ends)[1])
    error = errors.of(steps)
    for number in itertools.count(1):
        best_error, best = search.part(f"{name}, move {number}", _best_move, errors, steps)
        if best_error >= error * (1 - 1e-6):
            break
        error, steps = best_error, tuple(best)
    return steps


_Chains = Sequence[tuple[list[int], float]]
"""Chains of computed steps and their costs. No two have the same last two steps."""


def _longer_chains(errors: ScheduleErrors, chains: _Chains, count: int, number: int) -> _Chains:
    """Of the chains with one step more, the cheapest for each pair of last two steps.

    Args:
        errors: gives the costs.
        chains: of `number` steps.
        count: how many steps there are in the end.
        number: how many steps the chains have.
    """
    total, left = errors.total, count - number  # steps to choose, the next one included
    widest = min(math.ceil(WIDEST * total / count), total)
    found: dict[tuple[int, int], tuple[list[int], float]] = {}
    for chain, cost in chains:
        last = chain[-1]
        gaps = errors.costs(tuple(chain), widest - 1)
        for step in range(last + 1, min(last + widest, total - left) + 1):
            if total - step > widest * left or step >= total:
                continue  # too far from the end
            sum_ = cost + gaps[step - last - 1]
            if sum_ < found.get((last, step), (None, math.inf))[1]:
                found[last, step] = ([*chain, step], sum_)
    return [*found.values()]


def _best_move(errors: ScheduleErrors, steps: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """The smallest error of a run that computes these steps with one of them moved, and its steps."""
    moved = []
    for n in range(1, len(steps)):
        for move in (-2, -1, 1, 2):
            other = (*steps[:n], steps[n] + move, *steps[n + 1 :])
            if other[-1] < errors.total and all(a < b for a, b in zip(other, other[1:])):
                moved.append((errors.of(other), other))
    return min(moved)
