"""What `lesa.train` reports and writes is compared with numpy and with forecasts that are pushed into a `FeatureRing`.

At the smallest learning rate a predictor does not change. A newton predictor then draws a line through the two newest
computed features; a dense predictor repeats the newest feature. So this file can work out each figure in `losses.json`,
and the figure shows which samples and which steps were used.
"""

import contextlib
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lesa
from lesa_kernels import FusedKANPredictor, PredictorConfig
from made_recordings import STEPS, TOKENS, WIDTH, write_recording

SCHEDULE = (0, 2, 5, 8)
STILL = 1e-8
NEWTON = PredictorConfig(WIDTH, hidden=4, rank=0)
DENSE = PredictorConfig(WIDTH, mixer="dense", hidden=4)
QUIET = {"progress": False, "tokens_per_batch": None}


def alike(folder, samples=2):
    """A recording whose samples are all the same."""
    write_recording(folder, samples)
    for number in range(1, samples):
        shutil.copy(folder / "sample-00000.safetensors", folder / f"sample-{number:05d}.safetensors")
    return lesa.Trajectories(folder)


@pytest.fixture
def trajectories(tmp_path):
    return write_recording(tmp_path / "trajectories")


def train(trajectories, config, out, **options):
    """The trained predictor and what `losses.json` says."""
    predictor = lesa.train(trajectories, config, **{"schedule": SCHEDULE, "out_dir": out, **QUIET, **options})
    return predictor, json.loads((Path(out) / "losses.json").read_text())


def velocity_of(trajectories, number, features, steps):
    """The head's output, in numpy: `[P, T, D]` -> `[P, T, O]`."""
    trajectory = trajectories[number]
    scale, shift = (getattr(trajectory, name).double().numpy()[steps][:, None] for name in ("scale", "shift"))
    centred = features - features.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + trajectories.head_eps)
    bias = 0.0 if trajectories.head_bias is None else trajectories.head_bias.double().numpy()
    return (normed * (1 + scale) + shift) @ trajectories.head_weight.double().numpy().T + bias


def line(trajectory, computed, step):
    """Through the two newest computed features."""
    features, sigmas = trajectory.features.double().numpy(), trajectory.sigmas.double().numpy()
    *earlier, newest = [s for s in sorted(computed) if s < step]
    if not earlier:
        return features[newest]
    before = earlier[-1]
    slope = (features[newest] - features[before]) / (sigmas[newest] - sigmas[before])
    return features[newest] + slope * (sigmas[step] - sigmas[newest])


def newest(trajectory, computed, step):
    """The newest computed feature, which dense forecasts repeat."""
    return trajectory.features.double().numpy()[max(s for s in computed if s < step)]


def step_before(trajectory, computed, step):
    """The true feature before, which dense forecasts repeat in the guided phase."""
    return trajectory.features.double().numpy()[step - 1]


def untrained(forecast):
    return lambda trajectory, computed, steps: np.stack([forecast(trajectory, computed, step) for step in steps])


def in_a_run(predictor, guided=False):
    """Forecasts from a ring, as in a run: features are pushed step by step, and forecasts too for a dense predictor.

    With `guided`, the truth is pushed instead of forecasts.
    """

    def forecasts(trajectory, computed, steps):
        ring = predictor.make_ring(1, trajectory.features.shape[1])
        made = []
        for step, sigma in enumerate(trajectory.sigmas.tolist()):
            feature = trajectory.features[step][None]
            if step in steps:
                with torch.no_grad():
                    forecast = predictor(ring, sigma)
                made.append(forecast[0].double().numpy())
                feature = feature if step in computed or guided else forecast
            if step in computed or predictor.config.history == "steps":
                ring.push(feature, sigma)
        return np.stack(made)

    return forecasts


def size(values):
    return np.sqrt((values**2).sum())


def loss_of(trajectories, numbers, forecasts, computed=SCHEDULE, head_aware=True):
    """The mean error of the features over their mean size.

    With `head_aware` this counts a tenth, the error of the velocities 0.3 and that of the gaps' displacements 1.
    `forecasts(trajectory, computed, steps)` gives `[P, T, D]`.
    """
    steps = [step for step in range(STEPS) if step not in computed]
    truths, made, true_velocities, errors = [], [], [], []
    for number in numbers:
        trajectory = trajectories[number]
        truths.append(trajectory.features.double().numpy()[steps])
        made.append(forecasts(trajectory, computed, steps))
        true_velocities.append(velocity_of(trajectories, number, truths[-1], steps))
        errors.append(velocity_of(trajectories, number, made[-1], steps) - true_velocities[-1])
    truth, made, velocity, error = (np.concatenate(parts, 1) for parts in (truths, made, true_velocities, errors))
    feature_loss = np.abs(made - truth).mean() / np.abs(truth).mean()
    if not head_aware:
        return feature_loss
    levels = [*trajectories[numbers[0]].sigmas.double().numpy(), 0.0]
    bounds = [*sorted(computed), STEPS]

    def moved(velocities):
        """By how much each gap's velocities move the sample."""
        gaps = []
        for begin, end in zip(bounds, bounds[1:]):
            inside = [p for p, step in enumerate(steps) if begin < step < end]
            if inside:
                gaps.append(sum((levels[steps[p]] - levels[steps[p] + 1]) * velocities[p] for p in inside))
        return np.stack(gaps)

    displacement_loss = size(moved(error)) / size(moved(velocity))
    return 0.1 * feature_loss + 0.3 * size(error) / size(velocity) + displacement_loss


def close(value):
    return pytest.approx(value, rel=2e-5)


class Optimiser:
    """Notes what each step of the optimiser is made with; raises before the step `stop_before`."""

    def __init__(self, stop_before=None):
        self.stop_before = stop_before
        self.kinds, self.rates, self.decays, self.norms, self.parameters, self.gradients = [], [], [], [], [], []

    def see(self, optimizer, args, kwargs):
        if len(self.rates) == self.stop_before:
            raise KeyboardInterrupt
        (group,) = optimizer.param_groups
        self.kinds.append(type(optimizer))
        self.rates.append(group["lr"])
        self.decays.append(group["weight_decay"])
        self.parameters.append([p.detach().clone() for p in group["params"]])
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in group["params"]])
        self.norms.append(math.sqrt(sum(g.double().square().sum().item() for g in self.gradients[-1])))


@contextlib.contextmanager
def watched_optimiser(stop_before=None):
    optimiser = Optimiser(stop_before)
    hook = register_optimizer_step_pre_hook(optimiser.see)
    try:
        yield optimiser
    finally:
        hook.remove()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head_aware", [True, False])
@pytest.mark.parametrize("config, forecast", [(NEWTON, line), (DENSE, newest)], ids=["newton", "dense"])
def test_the_training_loss_is_the_one_written_out_here(tmp_path, config, forecast, head_aware, bias):
    trajectories = write_recording(tmp_path / "t", samples=3, bias=bias)
    options = {"epochs": 1, "guided_epochs": 0, "learning_rate": STILL, "validation_fraction": 0}
    _, losses = train(trajectories, config, tmp_path / "out", head_aware=head_aware, **options)
    expected = loss_of(trajectories, [0, 1, 2], untrained(forecast), head_aware=head_aware)
    assert losses == {"guided_epochs": 0, "training": [close(expected)], "validation": []}


def test_gaps_of_one_step_and_a_last_computed_step_count_too(tmp_path):
    trajectories, schedule = write_recording(tmp_path / "t", samples=2), (0, 1, 3, 4, 5, 11)
    options = {"epochs": 1, "learning_rate": STILL, "validation_fraction": 0, "schedule": schedule}
    _, losses = train(trajectories, NEWTON, tmp_path / "out", **options)
    assert losses["training"] == [close(loss_of(trajectories, [0, 1], untrained(line), schedule))]


def test_samples_of_rarer_noise_levels_weigh_less(tmp_path):
    """Three samples have the same noise levels. A fourth has others, so that other steps of it are computed."""
    trajectories = write_recording(tmp_path / "t", samples=4, shifts=(1.0, 1.0, 1.0, 4.0))
    options = {"epochs": 1, "learning_rate": STILL, "validation_fraction": 0}
    _, losses = train(trajectories, NEWTON, tmp_path / "out", **options)
    wanted, levels = (trajectories[number].sigmas.numpy() for number in (0, 3))
    nearest = tuple(int(np.abs(levels - wanted[step]).argmin()) for step in SCHEDULE)
    assert nearest not in (SCHEDULE, nearest[:1] * 4) and len({*nearest}) == 4
    several, one = (loss_of(trajectories, n, untrained(line), c) for n, c in (([0, 1, 2], SCHEDULE), ([3], nearest)))
    assert losses["training"] == [close(0.75 * several + 0.25 * one)]
    assert several != pytest.approx(one, rel=0.05)


@pytest.mark.parametrize("head_aware", [True, False])
@pytest.mark.parametrize("config", [NEWTON, DENSE], ids=["newton", "dense"])
def test_the_validation_loss_is_that_of_forecasts_pushed_step_by_step_into_a_ring(tmp_path, config, head_aware):
    """The predictor is trained, so its forecasts depend on the age and the number of the entries."""
    trajectories = alike(tmp_path / "t")
    options = {"epochs": 8, "guided_epochs": 2, "learning_rate": 3e-2, "head_aware": head_aware}
    predictor, losses = train(trajectories, config, tmp_path / "out", **options)
    assert losses["validation"][-1] == close(loss_of(trajectories, [1], in_a_run(predictor), head_aware=head_aware))
    forecast = untrained(line if config is NEWTON else newest)
    assert losses["validation"][-1] != pytest.approx(
        loss_of(trajectories, [1], forecast, head_aware=head_aware), rel=0.01
    )


@pytest.mark.parametrize("schedule", [(0,), (0, 1, 2, 3), (0, 6, 11), (0, 1, 11)])
def test_early_steps_of_a_roll_out_are_those_of_a_ring(tmp_path, schedule):
    """The first forecast has one entry of history, or four; the last computed step comes early, or is the last step."""
    trajectories = alike(tmp_path / "t")
    options = {"epochs": 6, "guided_epochs": 2, "learning_rate": 3e-2, "schedule": schedule}
    predictor, losses = train(trajectories, DENSE, tmp_path / "out", **options)
    expected = loss_of(trajectories, [1], in_a_run(predictor), schedule, head_aware=False)
    assert losses["validation"][-1] == close(expected)


@pytest.mark.parametrize("config, head_aware", [(NEWTON, True), (DENSE, False)], ids=["newton", "dense"])
def test_the_gradient_is_that_of_the_loss(tmp_path, config, head_aware):
    """Central differences along the gradient give its length; a dense history passes it on through its forecasts."""
    trajectories, schedule = alike(tmp_path / "t", samples=1), (0, 2, 5, 8, 10)
    options = {"epochs": 3, "guided_epochs": 0, "learning_rate": 1e-3, "head_aware": head_aware, "schedule": schedule}
    with watched_optimiser() as optimiser:
        predictor, _ = train(trajectories, config, tmp_path / "out", **options)
    parameters, gradients, norm = optimiser.parameters[-1], optimiser.gradients[-1], optimiser.norms[-1]

    def loss(move):
        moved = FusedKANPredictor(predictor.config)
        with torch.no_grad():
            for parameter, value, gradient in zip(moved.parameters(), parameters, gradients):
                parameter.copy_(value + move / norm * gradient)
        return loss_of(trajectories, [0], in_a_run(moved), schedule, head_aware)

    assert norm < 0.99  # it was not clipped
    assert norm == pytest.approx((loss(1e-3) - loss(-1e-3)) / 2e-3, rel=0.02)


@pytest.mark.parametrize("config, rate", [(NEWTON, 3e-3), (DENSE, 1e-4)], ids=["newton", "dense"])
def test_the_learning_rate_falls_along_a_cosine_at_each_step(tmp_path, config, rate):
    """It begins at the mixer's default and ends near 0. Both stages share one curve, and no batch is left out."""
    trajectories = write_recording(tmp_path / "t", samples=6)
    options = {"epochs": 5, "guided_epochs": 2, "batch_size": 2}  # one sample is for validation: three batches
    with watched_optimiser() as optimiser:
        train(trajectories, config, tmp_path / "out", **options)
    assert optimiser.rates == pytest.approx([rate * (1 + math.cos(math.pi * n / 21)) / 2 for n in range(21)])
    assert {*optimiser.kinds} == {torch.optim.AdamW} and {*optimiser.decays} == {1e-4}


def test_a_learning_rate_that_is_given_counts(tmp_path):
    trajectories = write_recording(tmp_path / "t", samples=2)
    with watched_optimiser() as optimiser:
        train(trajectories, DENSE, tmp_path / "out", epochs=2, guided_epochs=0, learning_rate=0.5)
    assert optimiser.rates == pytest.approx([0.5, 0.25])


def test_long_gradients_are_shortened_to_one_and_short_ones_are_kept(tmp_path):
    trajectories = write_recording(tmp_path / "t", samples=2)
    with watched_optimiser() as optimiser:
        train(trajectories, DENSE, tmp_path / "out", epochs=1, guided_epochs=1)
    assert max(optimiser.norms) == pytest.approx(1.0, rel=1e-4)
    with watched_optimiser() as optimiser:
        train(trajectories, NEWTON, tmp_path / "short", epochs=1)
    assert optimiser.norms[0] < 0.9  # as the test of the gradient says, it is as long as it should be


@pytest.mark.parametrize("config, head_aware", [(NEWTON, True), (DENSE, False)], ids=["newton", "dense"])
def test_defaults_follow_the_mixer(tmp_path, config, head_aware):
    """They are the loss and the number of guided epochs: a sixth for newton, a third for dense."""
    trajectories = write_recording(tmp_path / "t", samples=2)
    _, losses = train(trajectories, config, tmp_path / "out", epochs=7, learning_rate=STILL, validation_fraction=0)
    guided = losses["guided_epochs"]
    assert guided == (1 if config is NEWTON else 2)
    assert len(losses["training"]) == 7 + guided
    forecast = untrained(line if config is NEWTON else newest)
    assert losses["training"][-1] == close(loss_of(trajectories, [0, 1], forecast, head_aware=head_aware))


def test_a_dense_history_is_true_in_guided_epochs_and_holds_forecasts_after_them(tmp_path):
    trajectories = write_recording(tmp_path / "t", samples=2)
    options = {"epochs": 3, "guided_epochs": 2, "learning_rate": STILL, "head_aware": True, "batch_size": 1}
    _, losses = train(trajectories, DENSE, tmp_path / "out", validation_fraction=0.5, **options)
    (of_training,) = [
        number
        for number in range(2)
        if losses["training"][0] == close(loss_of(trajectories, [number], untrained(step_before), (0,)))
    ]
    guided = close(loss_of(trajectories, [of_training], untrained(step_before), (0,)))
    closed = close(loss_of(trajectories, [of_training], untrained(newest)))
    assert losses["training"] == [guided] * 2 + [closed] * 3
    validation = close(loss_of(trajectories, [1 - of_training], untrained(newest)))
    assert losses["validation"] == [validation] * 5  # always as at inference


def test_guided_forecasts_of_a_dense_predictor_are_those_of_a_ring_of_true_features(tmp_path):
    """The training loss is compared, which is of the predictor before its last guided step."""
    trajectories = alike(tmp_path / "t", samples=1)
    options = {"epochs": 1, "guided_epochs": 5, "learning_rate": 3e-2}
    with watched_optimiser() as optimiser:
        predictor, losses = train(trajectories, DENSE, tmp_path / "out", **options)
    with torch.no_grad():
        for parameter, value in zip(predictor.parameters(), optimiser.parameters[4]):
            parameter.copy_(value)
    expected = loss_of(trajectories, [0], in_a_run(predictor, guided=True), (0,), head_aware=False)
    assert losses["training"][4] == close(expected)
    assert losses["training"][4] != pytest.approx(losses["training"][0], rel=0.01)


def schedules_read(trajectories, losses, choices):
    """The schedule that gives each loss, for a predictor that draws lines. All samples are the same."""
    known = {loss_of(trajectories, [0], untrained(line), choice): choice for choice in choices}
    read = []
    for loss in losses:
        nearest, second = sorted(known, key=lambda other: abs(other - loss))[:2]
        assert loss == close(nearest), "no schedule that begins with step 0 has this loss"
        assert abs(second - loss) > 3 * abs(nearest - loss)
        read.append(known[nearest])
    return read


@pytest.mark.slow
def test_guided_schedules_are_one_step_off_at_most_and_always_compute_step_0(tmp_path):
    trajectories = alike(tmp_path / "t")
    options = {"schedule": (0, 1, 5, 11), "guided_epochs": 40, "epochs": 1, "learning_rate": STILL}
    _, losses = train(trajectories, NEWTON, tmp_path / "out", **options)
    choices = [(0, *choice) for n in (1, 2, 3) for choice in itertools.combinations(range(1, STEPS), n)]
    *guided, last = schedules_read(trajectories, losses["training"], choices)
    assert last == (0, 1, 5, 11)  # the second stage has the schedule itself
    assert [{*steps} for steps in zip(*guided)] == [{0}, {1, 2}, {4, 5, 6}, {10, 11}]
    assert len({*guided}) > 6  # each step moves by itself
    assert losses["validation"] == [close(loss_of(trajectories, [0], untrained(line), (0, 1, 5, 11)))] * 41


@pytest.mark.slow
def test_schedules_for_error_control_have_gaps_half_to_twice_as_long(tmp_path):
    trajectories, schedule = alike(tmp_path / "t"), (0, 1, 2, 5, 8, 11)
    options = {"schedule": schedule, "guided_epochs": 10, "epochs": 30, "learning_rate": STILL, "controlled": True}
    _, losses = train(trajectories, NEWTON, tmp_path / "out", **options)
    assert losses["guided_epochs"] == len(losses["training"]) == 40  # the second stage has none
    choices = [(0, 1, 2, *choice) for n in range(1, 9) for choice in itertools.combinations(range(3, STEPS), n)]
    schedules = schedules_read(trajectories, losses["training"], choices)
    gaps = [schedule[3] - 2 for schedule in schedules]
    assert {*gaps} <= {*range(1, 7)}
    assert min(gaps) == 1 and max(gaps) >= 5 and len({*schedules}) > 10
    after_short = [schedule[4] - schedule[3] for schedule in schedules if schedule[3] == 3]
    assert after_short and max(after_short) <= 3  # neighbours are alike
    assert losses["validation"] == [close(loss_of(trajectories, [0], untrained(line), schedule))] * 40


def validation_samples(trajectories, found, forecasts, streams=1):
    """The samples that have this loss together; no others do."""
    count = len(trajectories) // streams
    matching = [
        samples
        for n in range(1, count)
        for samples in itertools.combinations(range(count), n)
        if found == close(loss_of(trajectories, numbers_of(samples, streams), forecasts))
    ]
    (samples,) = matching
    return samples


def numbers_of(samples, streams):
    return [number for sample in samples for number in range(sample * streams, (sample + 1) * streams)]


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(
    "samples, fraction, expected", [(6, 0.1, 1), (6, 0.4, 2), (6, 0.6, 4), (3, 0.9, 2), (2, 0.1, 1)]
)
def test_no_sample_is_both_trained_on_and_validated_with(tmp_path, samples, fraction, expected, streams):
    """The validation loss is of some samples, the training loss of all the others, each seen once an epoch."""
    trajectories = write_recording(tmp_path / "t", samples, streams)
    options = {"epochs": 2, "guided_epochs": 0, "learning_rate": STILL, "batch_size": 1}
    _, losses = train(trajectories, NEWTON, tmp_path / "out", validation_fraction=fraction, **options)
    validation = validation_samples(trajectories, losses["validation"][0], untrained(line), streams)
    assert len(validation) == expected
    others = numbers_of({*range(samples)} - {*validation}, streams)
    each = [loss_of(trajectories, [number], untrained(line)) for number in others]
    assert losses["training"] == [close(sum(each) / len(each))] * 2
    assert losses["validation"][1] == close(losses["validation"][0])


@pytest.mark.slow
def test_the_seed_chooses_the_validation_samples(trajectories, tmp_path):
    chosen = set()
    for seed in range(4):
        options = {"epochs": 1, "learning_rate": STILL, "seed": seed}
        _, losses = train(trajectories, NEWTON, tmp_path / f"{seed}", **options)
        chosen.add(validation_samples(trajectories, losses["validation"][0], untrained(line)))
    assert len(chosen) > 1


def test_a_single_sample_is_trained_on(tmp_path):
    trajectories = write_recording(tmp_path / "t", samples=1)
    _, losses = train(trajectories, NEWTON, tmp_path / "out", epochs=1, learning_rate=STILL)
    assert losses["training"] == [close(loss_of(trajectories, [0], untrained(line)))]
    assert losses["validation"] == []


@pytest.mark.slow
def test_batches_and_tokens_are_drawn_again_each_epoch(trajectories, tmp_path):
    options = {"epochs": 6, "guided_epochs": 0, "learning_rate": STILL, "validation_fraction": 0}
    _, losses = train(trajectories, NEWTON, tmp_path / "batches", batch_size=2, **options)
    assert len({round(loss, 5) for loss in losses["training"]}) > 3
    _, losses = train(trajectories, NEWTON, tmp_path / "tokens", tokens_per_batch=2, **options)
    assert len({round(loss, 5) for loss in losses["training"]}) > 3
    _, losses = train(trajectories, NEWTON, tmp_path / "all", tokens_per_batch=TOKENS, **options)
    assert losses["training"] == [close(loss_of(trajectories, range(6), untrained(line)))] * 6


def test_tokens_keep_their_sample_and_step(tmp_path):
    """With four of five tokens, the loss is that of a recording without one of them."""
    trajectories = write_recording(tmp_path / "t", samples=1)
    options = {"epochs": 8, "guided_epochs": 0, "learning_rate": STILL, "tokens_per_batch": TOKENS - 1}
    _, losses = train(trajectories, NEWTON, tmp_path / "out", **options)

    class Without:
        """The recording without a token."""

        head_eps, head_weight, head_bias = trajectories.head_eps, trajectories.head_weight, trajectories.head_bias

        def __init__(self, token):
            self.token = token

        def __getitem__(self, number):
            whole = trajectories[number]
            kept = [token for token in range(TOKENS) if token != self.token]
            return replace(whole, features=whole.features[:, kept])

    left_out = [loss_of(Without(token), [0], untrained(line)) for token in range(TOKENS)]
    seen = {token for loss in losses["training"] for token in range(TOKENS) if loss == close(left_out[token])}
    assert all(any(loss == close(expected) for expected in left_out) for loss in losses["training"])
    assert len(seen) > 1


def errors_at_computed_steps(trajectories, number, forecasts, computed=SCHEDULE):
    """The relative error of the velocity at each computed step but the first, if that step were forecast."""
    steps = [*computed[1:]]
    truth = velocity_of(trajectories, number, trajectories[number].features.double().numpy()[steps], steps)
    made = velocity_of(trajectories, number, forecasts(trajectories[number], computed, steps), steps)
    return np.array([size(m - t) / size(t) for m, t in zip(made, truth)])


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_typical_errors_are_the_median_of_the_validation_samples_and_the_worst_of_their_streams(tmp_path, streams):
    trajectories = write_recording(tmp_path / "t", samples=7, streams=streams)
    options = {"epochs": 1, "learning_rate": STILL, "validation_fraction": 0.4}
    predictor, losses = train(trajectories, NEWTON, tmp_path / "out", **options)
    validation = validation_samples(trajectories, losses["validation"][0], untrained(line), streams)
    assert len(validation) == 3
    by_sample = [
        [errors_at_computed_steps(trajectories, n, untrained(line)) for n in numbers_of([sample], streams)]
        for sample in validation
    ]
    assert streams == 1 or {int(np.argmax(e)) for sample in by_sample for e in zip(*sample)} == {0, 1}
    worst = np.array([np.max(sample, axis=0) for sample in by_sample])
    assert predictor.config.schedule_errors == (0.0, *map(close, np.sort(worst, axis=0)[1]))
    assert FusedKANPredictor.from_pretrained(tmp_path / "out").config == predictor.config


def test_typical_errors_are_those_of_the_trained_predictor(tmp_path):
    """There are two training samples and none for validation, so the errors are those of the two."""
    trajectories = write_recording(tmp_path / "t", samples=2)
    options = {"epochs": 6, "learning_rate": 3e-2, "validation_fraction": 0}
    predictor, _ = train(trajectories, NEWTON, tmp_path / "out", **options)
    both = [errors_at_computed_steps(trajectories, number, in_a_run(predictor)) for number in range(2)]
    assert predictor.config.schedule_errors == (0.0, *map(close, sum(both) / 2))
    assert not np.allclose(both[0], errors_at_computed_steps(trajectories, 0, untrained(line)), rtol=0.01)


def test_typical_errors_of_other_noise_levels_are_taken_at_those_of_the_schedule(tmp_path):
    trajectories = write_recording(tmp_path / "t", samples=2, shifts=(1.0, 4.0))
    options = {"epochs": 1, "learning_rate": STILL, "validation_fraction": 0}
    predictor, _ = train(trajectories, NEWTON, tmp_path / "out", **options)
    wanted, levels = (trajectory.sigmas.double().numpy() for trajectory in trajectories)
    nearest = tuple(int(np.abs(levels - wanted[step]).argmin()) for step in SCHEDULE)
    first = errors_at_computed_steps(trajectories, 0, untrained(line))
    second = errors_at_computed_steps(trajectories, 1, untrained(line), nearest)
    rising = [-levels[step] for step in nearest[1:]]
    second = [np.interp(-wanted[step], rising, second) for step in SCHEDULE[1:]]
    assert predictor.config.schedule_errors == (0.0, *map(close, (first + second) / 2))


def test_a_dense_predictor_has_no_typical_errors(trajectories, tmp_path):
    predictor, _ = train(trajectories, DENSE, tmp_path / "out", epochs=1)
    assert predictor.config.schedule_errors is None


UNFINISHED = {
    "config": PredictorConfig(WIDTH, hidden=4, rank=2),
    "schedule": SCHEDULE,
    "guided_epochs": 2,
    "epochs": 2,
    "batch_size": 2,
    "tokens_per_batch": 3,
    "learning_rate": 1e-2,
    "head_aware": True,
    "validation_fraction": 0.4,
    "seed": 3,
    "controlled": False,
    "progress": False,
}
STEPS_IN_ALL = 4 * 2  # two batches of the four samples that are trained on


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("recording") / "t")


@pytest.fixture(scope="module")
def _whole(recording, tmp_path_factory):
    """What a training that is not stopped writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    lesa.train(recording, out_dir=folder, **UNFINISHED)
    return bytes_in(folder)


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_before(number, recording, folder, **options):
    with watched_optimiser(number), pytest.raises(KeyboardInterrupt):
        lesa.train(recording, out_dir=folder, **{**UNFINISHED, **options})


@pytest.fixture(scope="module")
def _unfinished(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    stop_before(5, recording, folder)
    return folder


@pytest.fixture
def unfinished(_unfinished, tmp_path):
    """The folder of a training that was stopped in its third epoch."""
    shutil.copytree(_unfinished, tmp_path / "unfinished")
    return tmp_path / "unfinished"


@pytest.mark.parametrize("before", [1, 2, 3, 4, 7])
def test_a_stopped_training_goes_on_to_the_same_bytes(recording, _whole, tmp_path, before):
    """It is stopped in the first epoch, after it, in the second, after the guided phase, and in the last epoch."""
    out = tmp_path / "out"
    stop_before(before, recording, out)
    with watched_optimiser() as optimiser:
        lesa.train(recording, out_dir=out, **UNFINISHED)
    assert bytes_in(out) == _whole
    assert {*_whole} == {"config.json", "model.safetensors", "provenance.json", "losses.json", "losses.png"}
    whole_epochs = before // 2 * 2
    rates = [1e-2 * (1 + math.cos(math.pi * n / STEPS_IN_ALL)) / 2 for n in range(STEPS_IN_ALL)]
    assert optimiser.rates == pytest.approx(rates[whole_epochs:])  # no epoch is trained twice


CHANGES = [
    ("guided_epochs", 1),
    ("guided_epochs", None),
    ("epochs", 3),
    ("batch_size", 3),
    ("tokens_per_batch", 2),
    ("tokens_per_batch", None),
    ("learning_rate", 2e-2),
    ("learning_rate", None),
    ("head_aware", False),
    ("validation_fraction", 0.35),  # of as many samples
    ("validation_fraction", 0.0),
    ("seed", 4),
    ("controlled", True),
    ("schedule", (0, 2, 5, 9)),
    ("schedule", (0, 2, 5)),
    ("schedule", None),
    ("config", None),
    *(
        ("config", PredictorConfig(WIDTH, **{"hidden": 4, "rank": 2, **changed}))
        for changed in (
            {"hidden": 5},
            {"rank": 3},
            {"grid_size": 9},
            {"spline_order": 2},
            {"history_length": 3},
            {"history_length": (4, 3, 4)},
            {"stage_bounds": (0.7, 0.33)},
            {"stage_bounds": (0.5,)},
            {"mixer": "dense"},
        )
    ),
]


@pytest.mark.parametrize("name, value", CHANGES, ids=lambda value: str(value)[:80])
def test_going_on_with_another_setting_is_refused(recording, unfinished, name, value):
    before = bytes_in(unfinished)
    with pytest.raises(ValueError, match="must be .*, as in the unfinished training in .*, but got") as refusal:
        lesa.train(recording, out_dir=unfinished, **{**UNFINISHED, name: value})
    if name == "schedule":
        name = "config"  # where it is kept
    if name != "controlled":  # it makes all epochs guided ones
        assert re.match(rf"`{name}(\.\w+)?`", str(refusal.value))
    assert bytes_in(unfinished) == before


def test_going_on_with_other_trajectories_is_refused(unfinished, tmp_path):
    """Their manifest says what they are."""
    others = write_recording(tmp_path / "others", samples=5)
    with pytest.raises(ValueError, match=r"`trajectories\.\w+` must be .*, as in the unfinished training"):
        lesa.train(others, out_dir=unfinished, **UNFINISHED)


@pytest.mark.parametrize("now", [True, False])
def test_going_on_with_or_without_error_control_is_refused(recording, tmp_path, now):
    """In both directions."""
    out = tmp_path / "out"
    stop_before(5, recording, out, controlled=not now)
    with pytest.raises(ValueError, match="must be .*, as in the unfinished training"):
        lesa.train(recording, out_dir=out, **{**UNFINISHED, "controlled": now})


def test_what_no_training_depends_on_may_change(recording, unfinished, _whole, capfd):
    lesa.train(recording.folder, out_dir=unfinished, **{**UNFINISHED, "progress": True})
    assert bytes_in(unfinished) == _whole
    shown = capfd.readouterr().err
    assert "2/4" in shown  # it begins after the epochs that are done
    for loss in json.loads(_whole["losses.json"])["validation"][2:]:
        assert f"validation={loss:.4f}" in shown
