"""The two stages in which LESA is trained: on true histories, then on those that hold its own forecasts."""

import json

import pytest
import torch

import lesa
from lesa.training.batches import Batch, Head, Plan, predict, roll_out
from lesa.training.settings import TrainingSettings, complete_config
from lesa.training.training_run import Training
from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig
from made_recordings import STEPS, WIDTH, write_recording

SCHEDULE = [0, 1, 2, 3, 6, 9]
SKIPPED = [step for step in range(STEPS) if step not in SCHEDULE]


def config(**options):
    return PredictorConfig(WIDTH, mixer="lesa", hidden=6, num_inference_steps=STEPS, **options)


def random_predictor(**options):
    predictor = FusedKANPredictor(config(**options))
    predictor.reset_parameters(torch.Generator().manual_seed(4))
    return predictor


def run(predictor, trajectory, computed, stream=None, features=None):
    """Forecasts of the steps that are not computed, from a ring to which each step is pushed, as in a run.

    What is not computed is pushed as `features`, or as the forecast if that is None.
    """
    sigmas = trajectory.sigmas.tolist()
    ring = FeatureRing(8, 1, trajectory.features.shape[1], WIDTH, torch.float32, "cpu")
    forecasts = []
    for step, sigma in enumerate(sigmas):
        value = trajectory.features[step][None]
        if step not in computed:
            forecasts.append(predictor(ring, sigma, [*sigmas, 0.0], stream))
            value = forecasts[-1] if features is None else features[step][None]
        ring.push(value, sigma)
    return torch.cat(forecasts)


def relative_l1(forecasts, trajectory):
    truth = trajectory.features[SKIPPED]
    return float((forecasts - truth).abs().mean() / truth.abs().mean())


@pytest.fixture
def trajectories(tmp_path):
    return write_recording(tmp_path / "recording", streams=2)


@torch.no_grad()
def test_the_first_stage_forecasts_the_skipped_steps_from_true_features(trajectories):
    predictor, trajectory = random_predictor(), trajectories[0]
    settings = TrainingSettings(head_aware=False)
    training = Training(trajectories, complete_config(trajectories, config(), SCHEDULE), settings)
    training.predictor.load_state_dict(predictor.state_dict())
    batch = Batch([trajectory], training.head, None, None, "cpu")
    true = run(predictor, trajectory, SCHEDULE, features=trajectory.features)
    assert training.loss_of(batch, guided=True).item() == pytest.approx(relative_l1(true, trajectory), rel=1e-5)
    closed = run(predictor, trajectory, SCHEDULE)
    assert training.loss_of(batch, guided=False).item() == pytest.approx(relative_l1(closed, trajectory), rel=1e-5)
    assert relative_l1(closed, trajectory) != pytest.approx(relative_l1(true, trajectory), rel=1e-2)


def test_train_is_the_first_stage_only(trajectories, tmp_path):
    trained = lesa.train(trajectories, config(), SCHEDULE, epochs=7, out_dir=tmp_path / "out", progress=False)
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert losses["guided_epochs"] == len(losses["training"]) == 7
    assert trained.config.schedule == tuple(SCHEDULE) and trained.config.mixer == "lesa"
    again = FusedKANPredictor.from_pretrained(tmp_path / "out")
    assert again.config == trained.config


def test_training_lowers_the_error_on_samples_it_has_not_seen(tmp_path):
    trajectories = write_recording(tmp_path / "seen", samples=8)
    trained = lesa.train(trajectories, config(), SCHEDULE, epochs=20, learning_rate=2e-2, progress=False)
    others = write_recording(tmp_path / "unseen", samples=3, seed=1)
    with torch.no_grad():
        errors = [
            sum(relative_l1(run(each, t, SCHEDULE, features=t.features), t) for t in others)
            for each in (trained, random_predictor())
        ]
    assert errors[0] < 0.7 * errors[1]


def test_each_stream_trains_its_own_experts(trajectories):
    """A batch is of one stream, whose name is in the names of the files, and only its experts get a gradient."""
    assert trajectories.streams == [None, "uncond"] * (len(trajectories) // 2)
    chosen = complete_config(trajectories, config(options={"streams": 2}), SCHEDULE)
    training = Training(trajectories, chosen, TrainingSettings(head_aware=False))
    for number, (expert, other) in ((0, (0, 1)), (1, (1, 0))):
        training.predictor.zero_grad()
        training.mean_loss([number], None, guided=True).backward()
        gradient = training.predictor.latent_weight.grad
        assert gradient[expert].any() and not gradient[other].any()
    both = training.mean_loss([0, 1], None, guided=True)
    single = [training.mean_loss([number], None, guided=True) for number in (0, 1)]
    torch.testing.assert_close(both, sum(single) / 2)
    with torch.no_grad():
        own = run(training.predictor, trajectories[1], SCHEDULE, "uncond", trajectories[1].features)
    assert single[1].item() == pytest.approx(relative_l1(own, trajectories[1]), rel=1e-5)


@pytest.mark.parametrize(
    "second, said",
    [("main-2", "a first stream and then 'main-2'"), ("cond", "a first stream and then 'cond'"), (None, "a single")],
)
def test_experts_of_two_streams_are_trained_on_streams_of_their_names_only(tmp_path, second, said):
    """With other names, or in another order, experts would be trained on the wrong stream, or not at all."""
    folder = tmp_path / "recording"
    write_recording(folder, streams=2)
    for file in folder.glob("*-uncond.safetensors"):
        file.unlink() if second is None else file.rename(str(file).replace("uncond", second))
    trajectories = lesa.Trajectories(folder)
    assert set(trajectories.streams) == {None, second}
    message = f"`trajectories` must have the stream 'cond' first and 'uncond' second.*got {said}"
    with pytest.raises(ValueError, match=message):
        lesa.train(trajectories, config(options={"streams": 2}), SCHEDULE, epochs=1, progress=False)


def test_a_roll_out_takes_the_computed_steps_from_elsewhere_and_can_cut_the_gradient(trajectories):
    predictor, trajectory = random_predictor(), trajectories[0]
    batch = Batch([trajectory], Head(trajectories, "cpu"), None, None, "cpu")
    plan = Plan(SCHEDULE, STEPS, 8, every_step=True)
    rolled = trajectory.features + 0.1 * torch.randn_like(trajectory.features)
    steps = torch.tensor(SCHEDULE)
    forecasts = [roll_out(predictor, batch, plan, rolled[SCHEDULE], steps, detach=detach) for detach in (True, False)]
    torch.testing.assert_close(forecasts[0], forecasts[1], rtol=0, atol=0)
    moved = lesa.training.trajectories.Trajectory(
        rolled, *[getattr(trajectory, n) for n in ("sigmas", "scale", "shift", "token_index")]
    )
    torch.testing.assert_close(forecasts[0], run(predictor, moved, SCHEDULE), rtol=1e-4, atol=1e-5)
    # Cut, the gradient of a forecast is that of the same forecast from a given history.
    whole = rolled.clone()
    whole[SKIPPED] = forecasts[0].detach()
    given = predict(predictor, batch, plan, whole)
    torch.testing.assert_close(given, forecasts[0], rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(f.abs().sum(), predictor.latent_weight)[0] for f in (given, *forecasts)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gradients[2], gradients[0], rtol=1e-2)
