"""What `lesa fit` says after its first sample about what it will cost."""

import math
from dataclasses import replace

import pytest
import torch

from lesa.fitting import cost
from lesa.fitting.amounts import Amounts, EndToEndAmounts
from lesa.fitting.cost import FirstSample, fit_cost, measured
from lesa.fitting.planning import SEARCH_UPDATES, Work
from made_recordings import STEPS, TOKENS, WIDTH, write_recording

FIRST = FirstSample(30.0, 40_000_000, 50, optimiser_step_seconds=0.05, predicted_step_seconds=0.1)
SMALL = Amounts(samples=8, most_samples=32, rounds=3, validation_samples=8, test_samples=8)
WORK = Work(SMALL, 50, 1, 1)
WITH_9 = 30 * 9 / 50 + 41 * 0.1
"""Seconds of a sample with nine computed steps."""


def test_the_parts_add_up():
    found = fit_cost(FIRST, WORK, [9])
    assert FIRST.sample_seconds(9) == pytest.approx(WITH_9)
    assert found.recording_seconds == (31 + 8) * 30  # to train on, and those of the validation with all steps
    rolled_out = 8 + (16 + 8) + (32 + 16 + 16)  # of the latest predictor, and of earlier ones on new samples
    assert found.roll_out_seconds == pytest.approx((rolled_out + 4 * 8) * WITH_9)  # four predictors are validated
    assert found.test_seconds == pytest.approx(8 * (30 + 3 * WITH_9))  # all steps; ours, untrained and fewer steps
    assert found.training_seconds == WORK.optimiser_steps * 0.05
    parts = [found.recording_seconds, found.roll_out_seconds, found.training_seconds, found.test_seconds]
    assert found.seconds == pytest.approx(sum(parts))
    assert found.nbytes == pytest.approx((32 + rolled_out * 9 / 50) * 40e6)


def test_the_cost_counts_the_runs_that_the_bar_counts():
    for amounts in (SMALL, Amounts(), replace(SMALL, rounds=1)):
        work, steps = Work(amounts, 50, 1, 1), 50
        runs = work.recorded_samples - 1 + amounts.validation_samples
        runs += work.rolled_out_samples + work.validated_samples + 4 * amounts.test_samples
        trained = work.search_steps(9) + work.training_steps + amounts.rounds * amounts.round_updates
        assert work.all_steps([9]) == runs * steps + trained


LARGE = EndToEndAmounts(schedule_updates=32, updates=56, batch_size=2, moves=12, trial_samples=4)
THROUGH_RUNS = replace(WORK, through_runs=LARGE, levels=[1 - step / 50 for step in range(50)])


def test_training_through_whole_runs_has_parts_of_its_own():
    first = replace(FIRST, latents_nbytes=1_000_000)
    plain, found = fit_cost(first, WORK, [9]), fit_cost(first, THROUGH_RUNS, [9])
    trials = 21 + 2 + 12  # of the family, of the searches on the recording, and near the best ones
    assert THROUGH_RUNS.trials(9) == trials
    # Of each sample of an update, four runs with nine computed steps.
    assert found.schedule_seconds == pytest.approx(32 * 2 * 4 * WITH_9)
    assert found.trial_seconds == pytest.approx(trials * 4 * WITH_9)
    assert found.end_to_end_seconds == pytest.approx(56 * 2 * 4 * WITH_9)
    assert found.recording_seconds == (31 + 8 + 16 + 4) * 30  # all steps of 16 samples to train on, and of the trials
    again, validated = 8, 4 * 8  # roll-outs of another round, and four more predictors
    assert found.roll_out_seconds == pytest.approx(plain.roll_out_seconds + (again + validated) * WITH_9)
    assert found.training_seconds == pytest.approx(plain.training_seconds + (300 + 700 + 2 * 200) * 0.05)
    through_runs = found.schedule_seconds + found.trial_seconds + found.end_to_end_seconds
    assert found.test_seconds == plain.test_seconds
    assert plain.schedule_seconds == plain.trial_seconds == plain.end_to_end_seconds == 0
    others = (found.recording_seconds, found.roll_out_seconds, found.training_seconds, found.test_seconds)
    assert found.seconds == pytest.approx(sum(others) + through_runs)
    assert found.nbytes == pytest.approx(plain.nbytes + again * 9 / 50 * 40e6 + 16 * 1e6)
    assert f"; {31 + 8 + 16 + 4} more samples " in found.text()
    words = f"training on many schedules {cost._time(found.schedule_seconds)}, comparing 35 schedules "
    words += f"{cost._time(found.trial_seconds)}, training through whole runs "
    assert f"{words}{cost._time(found.end_to_end_seconds)}, the test" in found.text()
    of_pixels = "\nDecoding the pictures for the loss takes time and disk space that are not counted.\n"
    assert of_pixels in found.text(of_pixels=True) and of_pixels not in found.text()


def test_its_cost_counts_the_runs_that_the_bar_counts():
    runs = 31 + 8 + 16 + 4 + THROUGH_RUNS.rolled_out_samples + THROUGH_RUNS.validated_samples + 4 * 8 + 35 * 4
    updates = 32 + 56
    search = THROUGH_RUNS.search_steps(9) + THROUGH_RUNS.fitted_steps(9)
    trained = search + 2 * THROUGH_RUNS.training_steps + (3 + 1) * 200 + updates
    assert THROUGH_RUNS.all_steps([9]) == (runs + 2 * updates) * 50 + trained
    both = THROUGH_RUNS.all_steps([9, 7]) - THROUGH_RUNS.all_steps([9])
    assert both < THROUGH_RUNS.all_steps([7]) - (31 + 8 + 16 + 4) * 50  # all steps run once


def test_processes_share_the_runs_that_compare_schedules_only():
    one, two = (fit_cost(FIRST, replace(THROUGH_RUNS, width=width), [9]) for width in (1, 2))
    assert two.end_to_end_seconds == one.end_to_end_seconds and two.schedule_seconds == one.schedule_seconds
    assert two.trial_seconds == one.trial_seconds / 2 > 0


@pytest.mark.parametrize(("budget", "minutes"), [(10, 39.7), (9, 37.1), (5, 26.6)])
def test_a_model_of_12_billion_parameters_takes_less_than_40_minutes(budget, minutes):
    """A picture of FLUX.1-dev of 1024 x 1024 pixels, whose step takes 0.15 s, as `lesa estimate` assumes on an H100."""
    flops, shift = 2 * 12e9 * 50 * 4608, math.exp(1.15)
    levels = [shift * level / (1 + (shift - 1) * level) for level in (1 - step / 50 for step in range(50))]
    more = EndToEndAmounts().for_model(flops, on_cpu=False)
    work = Work(Amounts().for_model(flops, on_cpu=False), 50, 1, 1, through_runs=more, levels=levels)
    first = FirstSample(50 * 0.15, 157_000_000, 50, optimiser_step_seconds=0.05, predicted_step_seconds=0.001)
    found = fit_cost(first, work, [budget]).seconds / 60
    assert work.trials(9) == 55
    assert found == pytest.approx(minutes, abs=0.1) and found < 40
    assert fit_cost(first, replace(work, through_runs=None), [budget]).seconds / 60 < 14


def test_processes_share_the_samples_but_not_the_training():
    one, two = fit_cost(FIRST, WORK, [9]), fit_cost(FIRST, replace(WORK, width=2), [9])
    assert two.training_seconds == one.training_seconds
    for name in ("recording_seconds", "roll_out_seconds", "test_seconds"):
        assert getattr(two, name) == getattr(one, name) / 2
    assert Work(SMALL, 50, 2, batch_size=3, width=2).recording_steps(8) == 2 * 50 * 2  # two of three batches


def test_each_budget_has_roll_outs_training_and_a_test_of_its_own():
    one, other, both = (fit_cost(FIRST, WORK, budgets) for budgets in ([12], [7], [12, 7]))
    assert both.roll_out_seconds == pytest.approx(one.roll_out_seconds + other.roll_out_seconds)
    assert both.training_seconds == pytest.approx(one.training_seconds + other.training_seconds)
    assert both.test_seconds == pytest.approx(one.test_seconds + other.test_seconds - 8 * 30)
    assert both.recording_seconds == one.recording_seconds


def test_a_search_takes_longer_where_a_step_has_several_calls():
    two = replace(WORK, calls=2)
    assert two.optimiser_steps - WORK.optimiser_steps == 3 * SEARCH_UPDATES


def test_what_is_said():
    work = Work(replace(SMALL, rounds=1, validation_samples=2), 50, 1, 1)
    first = replace(FIRST, optimiser_step_seconds=0.0)
    assert fit_cost(first, work, [10, 5]).text().splitlines() == [
        "The first sample took 30 s.",
        "Predicted for all after it: about 19 min; 9 more samples 4.5 min, runs with the predictors 3.5 min, "
        "training 0.01 s, the test with 8 samples 11 min.",
        "Predicted for the files until it is finished: 416 MB.",
        "Predicted for a sample with 10 of 50 steps computed: 10 s. It has 5.0 times fewer computed steps.",
        "Predicted for a sample with 5 of 50 steps computed: 7.5 s. It has 10.0 times fewer computed steps.",
    ]


def test_what_the_figure_does_not_know_is_said():
    alone, batches = (fit_cost(FIRST, replace(WORK, batch_size=size), [9]).text(True) for size in (1, 16))
    assert "\nAn earlier call has done a part of it.\nIt takes less if a round" in alone and "counted like" not in alone
    assert "\nRuns of 16 samples are counted like 16 runs, and may take less.\n" in batches


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0.01 s"), (0.314, "0.31 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (90, "1.5 min"),
        (598, "10 min"), (5940, "99 min"), (5990, "1.7 h"), (3600 * 10.4, "10 h"), (3600 * 123.4, "123 h"),
    ],
)  # fmt: skip
def test_times_have_two_digits(seconds, said):
    assert cost._time(seconds) == said


@pytest.mark.parametrize(("samples", "streams"), [(1, 1), (3, 2)])
def test_what_is_measured_of_the_first_sample(tmp_path, monkeypatch, samples, streams):
    """The size of the first sample's files, with all of its streams, and a step of the optimiser on a batch of it."""
    trained = []

    class Seen(cost.Training):
        def loss_of(self, batch, guided):
            trained.append((batch.features.shape, guided, sorted(self.computed_in(batch.sigmas.tolist()))))
            return super().loss_of(batch, guided)

    monkeypatch.setattr(cost, "Training", Seen)
    monkeypatch.setattr(cost, "_bandwidth", lambda device: 1e6)
    recording = write_recording(tmp_path / "recording", samples, streams)
    with torch.no_grad():  # a caller may have it off
        first = measured(recording, 2.5, Amounts(batch_size=3, tokens_per_batch=2), 4, "cpu")
    assert trained == [((STEPS, 3 * 2, WIDTH), False, trained[0][2])] * 4 and len(trained[0][2]) == 4
    assert (first.seconds, first.num_inference_steps) == (2.5, STEPS)
    assert first.latents_nbytes == recording[0].latents.nbytes > 0
    files = [tmp_path / "recording" / name for name in ("sample-00000.safetensors", "sample-00000-uncond.safetensors")]
    size = sum(file.stat().st_size for file in files[:streams])
    assert size - 2000 * streams < first.nbytes < size
    assert first.optimiser_step_seconds > 0
    features = 4 * TOKENS * WIDTH * 4  # read for each predicted step
    assert features * streams / 1e6 < first.predicted_step_seconds < 40 * features * streams / 1e6


def test_the_bandwidth_is_one_that_memory_has():
    assert 1e8 < cost._bandwidth(torch.device("cpu")) < 1e13


@pytest.mark.parametrize("kept", [96, 4096])
def test_the_number_of_tokens_follows_from_the_kept_ones(kept):
    counts = []
    for seed in range(20):
        drawn = torch.randperm(4096, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
        counts.append(cost._all_tokens(drawn.tolist()))
    assert sum(counts) / 20 == pytest.approx(4096, rel=0.01)
