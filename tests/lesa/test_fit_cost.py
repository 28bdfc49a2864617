"""What `lesa fit` says after its first sample about what it will cost."""

import pytest
import torch

from lesa.fitting import cost
from lesa.fitting.amounts import Amounts
from lesa.fitting.cost import FirstSample, fit_cost, measured
from made_recordings import STEPS, TOKENS, WIDTH, write_recording

FIRST = FirstSample(30.0, 40_000_000, 50, optimiser_step_seconds=0.05, predicted_step_seconds=0.1)
PLAN = {"samples": 8, "more_samples": 0, "test_samples": 4, "rounds": 2, "optimiser_steps": 600}


def test_the_parts_add_up():
    found = fit_cost(FIRST, budgets=[10], **PLAN)
    assert found.recording_seconds == 7 * 30
    assert found.roll_out_seconds == pytest.approx(2 * 8 * 10 / 50 * 30)
    assert found.training_seconds == pytest.approx(600 * 0.05)
    assert found.test_seconds == pytest.approx(4 * (50 + 3 * 10) / 50 * 30)  # all steps, ours, untrained and fewer
    assert found.seconds == pytest.approx(210 + 96 + 30 + 192)
    assert found.nbytes == (8 + 2 * 8 * 10 / 50) * 40e6
    assert found.sample_seconds(10) == pytest.approx(30 * 10 / 50 + 40 * 0.1)


def test_each_budget_has_roll_outs_and_a_test_of_its_own():
    one, other, both = (fit_cost(FIRST, budgets=budgets, **PLAN) for budgets in ([12], [7], [12, 7]))
    assert both.roll_out_seconds == pytest.approx(one.roll_out_seconds + other.roll_out_seconds)
    reference = 4 * 30
    assert both.test_seconds == pytest.approx(one.test_seconds + other.test_seconds - reference)
    assert both.recording_seconds == one.recording_seconds


def test_what_is_said():
    lines = fit_cost(FIRST, budgets=[10, 5], **{**PLAN, "more_samples": 16}).text().splitlines()
    assert lines == [
        "The first sample took 30 s.",
        "Predicted for the rest: at most 10 min; recording 7 more samples 4 min, the roll-outs 2 min, the training "
        "30 s, the test with 4 samples 4 min.",
        "Predicted for the files until it is finished: 512 MB.",
        "Up to 16 more samples are recorded if they improve the predictor: 8 min.",
        "Predicted for a sample with 10 of 50 steps computed: 10 s. It has 5.0 times fewer computed steps.",
        "Predicted for a sample with 5 of 50 steps computed: 7.5 s. It has 10.0 times fewer computed steps.",
    ]


def test_a_plan_without_roll_outs_names_none():
    text = fit_cost(FIRST, budgets=[10], **{**PLAN, "rounds": 0, "samples": 2}).text()
    assert "roll-outs" not in text and "recording 1 more sample 30 s" in text


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
