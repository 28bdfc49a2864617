"""L2P: its closed form against NumPy's least squares, and what it does where it was not fitted."""

import copy
import json
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import lesa
from lesa.artifacts import predictor_identity
from lesa.cache.planning import Planner
from lesa.demo import digits
from lesa.training.batches import Plan, predict, split
from lesa.training.schedule_search import ScheduleErrors
from lesa.training.training_run import Training, recorded_runs
from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig
from made_recordings import STEPS, TOKENS, WIDTH, write_recording

SCHEDULE = [0, 1, 3, 6, 9]


@pytest.fixture
def trajectories(tmp_path):
    return write_recording(tmp_path / "recording")


def train(trajectories, schedule=SCHEDULE, **options):
    config = PredictorConfig(mixer="l2p", **options)
    return lesa.train(trajectories, config, schedule, progress=False)


def expected_row(trajectories, step, longest):
    """With the history that belongs to it, newest first."""
    history = [c for c in reversed(SCHEDULE) if c < step][:longest]
    numbers = split(trajectories, 0.1, 0).training
    runs = [trajectories[n].features.double().flatten(1).numpy() for n in numbers]
    table = np.concatenate(runs, 1)  # [S, N]
    return history, np.linalg.lstsq(table[history].T, table[step], rcond=None)[0]


@pytest.mark.parametrize("longest", [2, 8])
def test_the_weights_are_those_of_least_squares(trajectories, longest, monkeypatch):
    monkeypatch.setattr("lesa_kernels.forecasters.l2p.ROWS", 37)  # several parts, the last one smaller
    predictor = train(trajectories, history_length=longest)
    assert predictor.rows.dtype == torch.float64
    for step in range(1, STEPS):
        history, row = expected_row(trajectories, step, longest)
        found = predictor.rows[step].detach().numpy()
        assert np.abs(found[: len(row)] - row).max() <= 1e-10 * np.abs(row).max()
        assert not found[len(row) :].any()


def forecast(predictor, trajectory, history, step):
    """From a ring with these steps, oldest first."""
    ring = FeatureRing(8, 1, trajectory.features.shape[1], WIDTH, torch.float32, "cpu")
    for each in history:
        ring.push(trajectory.features[each][None], float(trajectory.sigmas[each]))
    return predictor(ring, float(trajectory.sigmas[step]))[0]


@torch.no_grad()
def test_a_fitted_step_uses_its_row_and_another_one_a_line(trajectories):
    predictor, trajectory = train(trajectories), trajectories[0]
    history, row = expected_row(trajectories, 7, 8)
    features = trajectory.features.double()
    wanted = sum(float(w) * features[h] for w, h in zip(row, history))
    torch.testing.assert_close(forecast(predictor, trajectory, [0, 1, 3, 6], 7).double(), wanted, rtol=1e-4, atol=1e-5)
    line = FusedKANPredictor(PredictorConfig(mixer="linear"))
    for other in ([0, 1, 3, 5], [1, 3, 6]):
        made = forecast(predictor, trajectory, other, 7)
        torch.testing.assert_close(made, forecast(line, trajectory, other, 7), rtol=1e-5, atol=1e-5)
    untrained = FusedKANPredictor(replace(predictor.config, schedule_errors=None))
    made = forecast(untrained, trajectory, [0, 1, 3, 6], 7)
    torch.testing.assert_close(made, forecast(line, trajectory, [0, 1, 3, 6], 7), rtol=1e-5, atol=1e-5)


def test_a_saved_predictor_has_the_same_bits(trajectories, tmp_path, monkeypatch):
    """Also of a fit that was interrupted. It has no losses over epochs to draw, and needs no optimiser."""
    monkeypatch.delattr("torch.optim.AdamW")

    def train():
        config = PredictorConfig(mixer="l2p")
        return lesa.train(trajectories, config, SCHEDULE, out_dir=tmp_path / "l2p", progress=False)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FusedKANPredictor, "save_pretrained", Mock(side_effect=KeyboardInterrupt))
        train()
    predictor = train()
    files = {"config.json", "losses.json", "model.safetensors", "provenance.json"}
    assert {file.name for file in (tmp_path / "l2p").iterdir()} == files
    loaded = FusedKANPredictor.from_pretrained(tmp_path / "l2p")
    assert json.loads((tmp_path / "l2p" / "config.json").read_text())["format_version"] == 2
    assert loaded.config == predictor.config
    for name, value in predictor.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]) and value.dtype == loaded.state_dict()[name].dtype


def test_the_noise_levels_survive_a_conversion(trajectories):
    predictor = train(trajectories)
    bits = predictor.level_bits.clone()
    assert torch.equal(predictor.to(torch.bfloat16).level_bits, bits)


STAGES = {"stage_bounds": (0.5,), "history_length": (2, 3)}


@torch.no_grad()
def test_a_search_fits_each_schedule_that_it_considers(trajectories):
    """The error of a schedule is that of a predictor which was trained on it."""
    config = PredictorConfig(mixer="l2p", **STAGES)
    unfitted = FusedKANPredictor(config)
    errors = ScheduleErrors(trajectories, unfitted, len(trajectories), TOKENS, 0)
    (batch,) = errors.batches
    for steps in (SCHEDULE, [0, 5]):
        trained = lesa.train(trajectories, config, steps, validation_fraction=0.0, progress=False)
        plan = Plan(steps, STEPS, config.max_history)
        forecasts = predict(trained, batch, plan, batch.features)
        error = batch.velocity(forecasts, plan.steps) - batch.velocities[plan.steps]
        displacement = (error * batch.widths[plan.steps, None, None]).sum(0)
        assert errors.of(tuple(steps)) == pytest.approx(float(displacement.square().mean()), rel=1e-5)
    assert not unfitted.rows.any() and not unfitted.level_bits.any()


def test_the_noise_levels_are_no_parameter_and_count_like_one():
    predictor = FusedKANPredictor(PredictorConfig(mixer="l2p")).requires_grad_(True)
    assert [name for name, _ in predictor.named_parameters()] == ["rows"]
    assert [*predictor.state_dict()] == ["rows", "level_bits"]
    with torch.inference_mode():
        copied = copy.deepcopy(predictor)
    other = predictor_identity(copied)
    assert other == predictor_identity(predictor)
    planner = Planner(copied, copied.make_ring(1, 1, feature_dim=4))
    planner.push(1.0)
    with torch.no_grad():
        first = planner.plan(1, [1.0, 0.5], {0})
        assert planner.plan(1, [1.0, 0.5], {0}) is first
        copied.level_bits.fill_(1)  # outside of the inference mode
        assert planner.plan(1, [1.0, 0.5], {0}) is not first
    assert predictor_identity(copied) != other


def test_a_search_takes_it(trajectories):
    """What it was fitted for before does not matter."""
    found = lesa.find_schedule(trajectories, 4, PredictorConfig(mixer="l2p"), progress=False)
    assert len(found) == 4 and found.steps[0] == 0
    assert lesa.search_schedule(trajectories, train(trajectories), 4, progress=False) == found
    errors = ScheduleErrors(trajectories, train(trajectories), 24, 16, 0)
    assert errors.of(found.steps) <= min(errors.of(steps) for steps in ((0, 1, 4, 8), (0, 3, 6, 9), (0, 2, 5, 8)))


@pytest.mark.parametrize("total", [STEPS - 1, STEPS + 1])
def test_a_recording_of_other_steps_than_the_predictor_has_is_refused(trajectories, total):
    predictor = FusedKANPredictor(PredictorConfig(mixer="l2p", num_inference_steps=total))
    with pytest.raises(ValueError, match=f"`predictor` must be for the {STEPS} steps of the recording, but got one"):
        lesa.search_schedule(trajectories, predictor, 4, progress=False)
    runs = recorded_runs(trajectories, range(2), "cpu")
    with pytest.raises(ValueError, match=f"`trajectories` must have {total} steps, but got {STEPS}"):
        predictor.forecaster.fit(predictor, runs, SCHEDULE)


def test_a_predictor_for_any_number_of_steps_is_fitted_for_the_recorded_ones(trajectories):
    predictor = FusedKANPredictor(PredictorConfig(mixer="l2p"))
    predictor.forecaster.fit(predictor, recorded_runs(trajectories, range(2), "cpu"), SCHEDULE)
    assert predictor.rows[1:STEPS].any(1).all() and not predictor.rows[STEPS:].any()


def test_what_a_fit_for_one_schedule_cannot_do_is_refused(trajectories):
    with pytest.raises(ValueError, match="`config.history` must be 'anchors' for l2p"):
        FusedKANPredictor(PredictorConfig(mixer="l2p", history="steps"))
    with pytest.raises(ValueError, match="`controlled` must be left out for l2p, which is fitted for one schedule"):
        lesa.train(trajectories, PredictorConfig(mixer="l2p"), SCHEDULE, controlled=True, progress=False)
    predictor = FusedKANPredictor(replace(train(trajectories).config, family=None, feature_dim=None))
    with pytest.raises(ValueError, match="`ErrorControl` needs a predictor for any computed steps, and l2p is fitted"):
        lesa.enable_cache(digits.load_pipeline(), predictor, lesa.ErrorControl())


def test_the_losses_of_a_fit_are_measured_in_batches(trajectories, monkeypatch):
    sizes, mean = [], Training.mean_loss

    def watched(self, numbers, *args, **kwargs):
        sizes.append(len(numbers))
        return mean(self, numbers, *args, **kwargs)

    monkeypatch.setattr(Training, "mean_loss", watched)
    lesa.train(trajectories, PredictorConfig(mixer="l2p"), SCHEDULE, batch_size=1, progress=False)
    assert {*sizes} == {1} and len(sizes) == len(trajectories) > 2


def test_runs_of_other_noise_levels_are_refused(tmp_path):
    other = write_recording(tmp_path / "recording", shifts=(1.0, 3.0))
    with pytest.raises(ValueError, match="`trajectories` must have the same noise levels in each sample"):
        train(other)


def test_a_forecaster_without_a_closed_form_says_so():
    predictor = FusedKANPredictor(PredictorConfig(mixer="linear"))
    with pytest.raises(NotImplementedError, match="Linear has no closed form"):
        predictor.forecaster.fit(predictor, [], [0])
    with pytest.raises(NotImplementedError, match="Linear has no closed form"):
        predictor.forecaster.fit_steps(predictor, None, [0], [1])


def test_a_run_uses_the_fitted_weights(tmp_path):
    pipe, inputs = digits.load_pipeline(), digits.inputs_for([3, 8])
    recorded = lesa.record(pipe, inputs, tmp_path / "recording", num_inference_steps=12, progress=False)
    predictor = train(recorded)

    def run(mixer):
        with lesa.enable_cache(pipe, mixer, SCHEDULE) as cache:
            noise = torch.Generator().manual_seed(5)
            call = {**inputs[0], "generator": noise, "output_type": "latent"}
            image = pipe(**call, num_inference_steps=12).images
        return image, cache.stats.summary()

    fitted, summary = run(predictor)
    line, _ = run(FusedKANPredictor(PredictorConfig(mixer="linear")))
    assert not torch.equal(fitted, line)
    with torch.no_grad():
        unfitted = FusedKANPredictor(predictor.config)
        unfitted.load_state_dict(predictor.state_dict())
        unfitted.level_bits.zero_()  # no step was fitted
    assert torch.allclose(run(unfitted)[0], line, atol=1e-5)
    assert "computed 5 (0,1,3,6,9), predicted 7 steps" in summary
    assert "other noise levels" not in summary
    pipe.scheduler.register_to_config(shift=1.1)
    pipe.scheduler.set_shift(1.1)
    assert "the predictor's schedule was made for other noise levels than those of this run" in run(predictor)[1]
