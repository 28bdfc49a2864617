"""`lesa.train` on a small linear world whose trajectories are polynomials in sigma, and on recorded digits."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lesa
from lesa.schedule import Schedule
from lesa.training import trainer, training_run
from lesa.training.batches import Batch, Plan, split
from lesa.training.guided_schedules import moved_steps
from lesa.training.losses import head_aware_loss
from lesa.training.settings import TrainingSettings, complete_config
from lesa.training.training_run import CHECKPOINT_NAME, CURVE_NAME, LOSSES_NAME, Training
from lesa.training.trajectories import FORMAT_VERSION, HEAD, MANIFEST
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, TOKENS, WIDTH, OUT = 12, 6, 8, 3


def write_trajectories(folder, samples=6, curvature=1.0, shifts=(1.0,), seed=0):
    """Trajectories in sigma of degree 3 around a line; `shifts` bends the noise levels of every n-th sample."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    world = torch.Generator().manual_seed(100)  # the same model, whatever the samples
    basis, weight = torch.randn(4, 1, WIDTH, generator=world), torch.randn(OUT, WIDTH, generator=world)
    save_file({"weight": weight, "bias": normal(OUT)}, folder / HEAD)
    for number in range(samples):
        shift = shifts[number % len(shifts)]
        sigmas = torch.linspace(1, 1 / STEPS, STEPS)
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        mix = normal(4, TOKENS, 1) * torch.tensor([1.0, 1.0, curvature, curvature])[:, None, None]
        powers = torch.stack([sigmas**p for p in range(4)])
        features = torch.einsum("ps,ptd->std", powers, mix * basis)
        save_file(
            {
                "features": features,
                "sigmas": sigmas,
                "scale": 0.1 * normal(STEPS, WIDTH),
                "shift": 0.1 * normal(STEPS, WIDTH),
                "token_index": torch.arange(TOKENS),
            },
            folder / f"sample-{number:05d}.safetensors",
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "family": "flux",
        "feature_dim": WIDTH,
        "num_inference_steps": STEPS,
        "samples": samples,
        "seed": seed,
        "head_eps": 1e-6,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return lesa.Trajectories(folder)


@pytest.fixture
def trajectories(tmp_path):
    return write_trajectories(tmp_path / "trajectories")


QUICK = {"epochs": 4, "batch_size": 2, "progress": False}


def closed_loop_loss(predictor, trajectories):
    """The loss over all trajectories on the predictor's own schedule."""
    run = Training(trajectories, predictor.config, TrainingSettings())
    run.predictor = predictor
    with torch.no_grad():
        return run.mean_loss(range(len(trajectories)), None, guided=False).item()


def test_a_schedule_for_a_recording_has_nothing_that_belonged_to_the_old_one(trajectories):
    width, total = trajectories.feature_dim, trajectories.num_inference_steps
    own = {"schedule": (0, 3), "schedule_sigmas": (1.0, 0.4), "told_levels": (0.9, 0.4)}
    config = PredictorConfig(width, num_inference_steps=total, **own, more_step_counts=(total + 1,))
    made = complete_config(trajectories, config, [0, 2, 5, 8])
    assert made.told_levels is made.more_step_counts is made.schedule_errors is None


@pytest.mark.parametrize("mixer", ["newton", "dense"])
def test_training_lowers_the_error_on_trajectories_it_has_not_seen(tmp_path, mixer):
    trajectories = write_trajectories(tmp_path / "train", samples=12)
    unseen = write_trajectories(tmp_path / "unseen", seed=1)
    config = PredictorConfig(WIDTH, mixer=mixer, hidden=16, rank=4 if mixer == "newton" else 0)
    arguments = {"epochs": 20, "batch_size": 4, "learning_rate": 1e-2, "head_aware": True, "progress": False}
    trained = lesa.train(trajectories, config, [0, 2, 5, 8], **arguments)
    untrained = FusedKANPredictor(trained.config)
    assert closed_loop_loss(trained, unseen) < 0.8 * closed_loop_loss(untrained, unseen)


def test_the_config_says_what_it_was_trained_on(trajectories):
    predictor = lesa.train(trajectories, schedule=[0, 2, 5, 8], **QUICK)
    config = predictor.config
    assert (config.family, config.feature_dim, config.mixer, config.rank) == ("flux", WIDTH, "newton", 32)
    assert (config.num_inference_steps, config.schedule) == (STEPS, (0, 2, 5, 8))
    assert config.schedule_sigmas == tuple(trajectories[0].sigmas[[0, 2, 5, 8]].tolist())
    assert not predictor.training
    assert all(torch.isfinite(p).all() for p in predictor.parameters())


def test_the_default_schedule_is_nine_spread_steps(trajectories):
    predictor = lesa.train(trajectories, **QUICK)
    assert predictor.config.schedule == Schedule.spread(9, STEPS, trajectories[0].sigmas.tolist()).steps


def test_equal_seeds_give_equal_bits_and_leave_the_global_generator_alone(trajectories):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = lesa.train(trajectories, schedule=4, seed=3, **QUICK)
    assert torch.equal(torch.rand(1), expected)
    second = lesa.train(trajectories, schedule=4, seed=3, **QUICK)
    other = lesa.train(trajectories, schedule=4, seed=4, **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.in_weight, other.in_weight)


@pytest.mark.parametrize("mixer", ["newton", "dense"])
def test_a_stopped_training_goes_on_to_the_same_bits(trajectories, tmp_path, monkeypatch, mixer):
    config = PredictorConfig(WIDTH, mixer=mixer, hidden=8)
    arguments = {"config": config, "schedule": [0, 2, 5, 8], **QUICK}
    whole = lesa.train(trajectories, out_dir=tmp_path / "whole", **arguments)

    save = Training._save_checkpoint

    def save_and_stop(self, optimizer, epoch):
        save(self, optimizer, epoch)
        if epoch == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            lesa.train(trajectories, out_dir=tmp_path / "stopped", **arguments)
    assert (tmp_path / "stopped" / CHECKPOINT_NAME).exists()
    resumed = lesa.train(trajectories, out_dir=tmp_path / "stopped", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    losses = [json.loads((tmp_path / name / LOSSES_NAME).read_text()) for name in ("whole", "stopped")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "samples, batch_size, guided, passes",
    [(2, 8, 3, 20), (9, 4, 1, 10), (23, 2, 0, 2)],
)
def test_by_default_steps_of_the_optimiser_count_and_not_passes(
    tmp_path, monkeypatch, samples, batch_size, guided, passes
):
    monkeypatch.setattr(trainer, "UPDATES", 20)
    trajectories = write_trajectories(tmp_path / "t", samples=samples)  # a tenth of them, at least one, is held out
    config = PredictorConfig(WIDTH, rank=2, hidden=4)
    lesa.train(trajectories, config, 4, out_dir=tmp_path / "out", batch_size=batch_size, progress=False)
    losses = json.loads((tmp_path / "out" / LOSSES_NAME).read_text())
    assert (losses["guided_epochs"], len(losses["training"])) == (guided, guided + passes)


def test_a_training_of_many_epochs_writes_few_checkpoints(trajectories, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "MOST_CHECKPOINTS", 3)
    epochs, save = [], Training._save_checkpoint
    monkeypatch.setattr(Training, "_save_checkpoint", lambda run, *rest: epochs.append(rest[1]) or save(run, *rest))
    config = PredictorConfig(WIDTH, rank=2, hidden=4)
    lesa.train(trajectories, config, 4, out_dir=tmp_path / "out", epochs=7, guided_epochs=1, progress=False)
    assert epochs == [0, 3, 6, 8]


def test_out_dir_gets_the_predictor_the_losses_and_their_picture(trajectories, tmp_path):
    out = tmp_path / "out"
    predictor = lesa.train(trajectories, schedule=4, out_dir=out, guided_epochs=2, **QUICK)
    loaded = FusedKANPredictor.from_pretrained(out)
    assert loaded.config == predictor.config
    assert all(torch.equal(a, b) for a, b in zip(predictor.parameters(), loaded.parameters()))
    losses = json.loads((out / LOSSES_NAME).read_text())
    assert len(losses["training"]) == len(losses["validation"]) == 6
    assert (out / CURVE_NAME).read_bytes().startswith(b"\x89PNG")
    assert not (out / CHECKPOINT_NAME).exists()


@pytest.mark.parametrize(
    "options, begins",
    [({"guided_epochs": 1}, [1.5]), ({"guided_epochs": 0}, []), ({"guided_epochs": 1, "controlled": True}, [])],
)
def test_the_picture_of_the_losses_says_where_the_closed_loop_begins(
    trajectories, tmp_path, monkeypatch, options, begins
):
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", lambda self, x, **_: lines.append(x))
    lesa.train(trajectories, schedule=4, out_dir=tmp_path / "out", **{**QUICK, "epochs": 1, **options})
    assert lines == begins and (tmp_path / "out" / CURVE_NAME).exists()


def test_a_finished_predictor_is_not_overwritten(trajectories, tmp_path):
    lesa.train(trajectories, schedule=4, out_dir=tmp_path / "out", **QUICK)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="`out_dir` must be empty or hold an unfinished training"):
        lesa.train(trajectories, schedule=4, out_dir=tmp_path / "out", seed=1, **QUICK)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.fixture
def unfinished(trajectories, tmp_path, monkeypatch):
    """The folder of a training that was stopped just before its end."""

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            lesa.train(trajectories, schedule=4, out_dir=tmp_path / "out", **QUICK)
    return tmp_path / "out"


def test_going_on_with_other_arguments_names_the_argument(trajectories, unfinished):
    with pytest.raises(
        ValueError, match="`learning_rate` must be 0.003, as in the unfinished training in .*, but got 0.01"
    ):
        lesa.train(trajectories, schedule=4, out_dir=unfinished, learning_rate=1e-2, **QUICK)


def test_going_on_with_other_trajectories_is_refused(unfinished, tmp_path):
    others = write_trajectories(tmp_path / "others", seed=7)
    with pytest.raises(ValueError, match="`trajectories.seed` must be 0, as in .*, but got 7"):
        lesa.train(others, schedule=4, out_dir=unfinished, **QUICK)


@pytest.mark.parametrize("suffix", [".tmp", ".new"])
def test_a_checkpoint_that_was_cut_off_is_no_obstacle(trajectories, tmp_path, suffix):
    """Earlier versions wrote the second."""
    out = tmp_path / "out"
    out.mkdir()
    (out / (CHECKPOINT_NAME + suffix)).write_bytes(b"half")
    lesa.train(trajectories, schedule=4, out_dir=out, **QUICK)
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "provenance.json",
        "losses.json",
        "losses.png",
    }


def test_a_checkpoint_holds_what_those_of_earlier_versions_hold(unfinished):
    """Otherwise an older one could not be resumed."""
    checkpoint = torch.load(unfinished / CHECKPOINT_NAME, weights_only=True)
    assert {*checkpoint} == {"settings", "predictor", "optimizer", "generator", "losses", "epoch"}
    settings = checkpoint["settings"]
    assert settings.pop("config")["schedule"] == (0, 1, 2, 6, 10)
    assert settings.pop("trajectories")["samples"] == 6
    assert settings == {
        "guided_epochs": 0,
        "epochs": 4,
        "batch_size": 2,
        "tokens_per_batch": 16,
        "learning_rate": 3e-3,
        "head_aware": True,
        "validation_fraction": 0.1,
        "seed": 0,
        "reach": 1,
        "controlled": False,
    }


@pytest.mark.parametrize(
    "options, phases",
    [
        ({"guided_epochs": 1}, ["train, phase 1 of 2, guided", "train, phase 2 of 2, closed loop"]),
        ({"guided_epochs": 0}, ["train"]),
        ({"guided_epochs": 1, "controlled": True}, ["train"]),
    ],
)
def test_the_progress_bar_names_the_phases(trajectories, capfd, options, phases):
    lesa.train(trajectories, schedule=4, **{**QUICK, **options, "progress": True})
    shown = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "%" in line]
    assert [*dict.fromkeys(line.split(":")[0] for line in shown)] == phases
    assert f"{4 + options['guided_epochs']}/{4 + options['guided_epochs']} [" in shown[-1]
    assert "validation=0." in shown[-1]


def test_streams_of_one_sample_are_on_the_same_side_of_the_split(tmp_path):
    folder = tmp_path / "cfg"
    write_trajectories(folder, samples=6)
    for file in sorted(folder.glob("sample-*.safetensors")):
        file.with_stem(file.stem + "-uncond").write_bytes(file.read_bytes())
    both = lesa.Trajectories(folder)
    train, validation = split(both, 0.4, seed=0)
    assert len(both) == 12 and len(validation) == 4 and len(train) == 8
    assert not {both.samples[i] for i in train} & {both.samples[i] for i in validation}


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["newton", "dense"])
def test_training_on_a_gpu(trajectories, mixer):
    config = PredictorConfig(WIDTH, mixer=mixer, hidden=8)
    predictor = lesa.train(trajectories, config, [0, 2, 5, 8], device="cuda", **QUICK)
    assert all(p.device.type == "cpu" and torch.isfinite(p).all() for p in predictor.parameters())


def test_one_computed_step_is_enough(trajectories):
    predictor = lesa.train(trajectories, schedule=[0], **QUICK)
    assert predictor.config.schedule == (0,) and predictor.config.schedule_errors == (0.0,)


@pytest.mark.parametrize("schedule", [None, [0, 1, 2, 4, 6, 8, 10]])
def test_training_for_error_control_on_a_dense_schedule(trajectories, schedule):
    predictor = lesa.train(trajectories, schedule=schedule, controlled=True, **QUICK)
    assert all(torch.isfinite(p).all() for p in predictor.parameters())


def test_trajectories_of_different_noise_levels_train_together(tmp_path):
    mixed = write_trajectories(tmp_path / "mixed", samples=4, shifts=(1.0, 3.0))
    config = PredictorConfig(WIDTH, hidden=8, rank=0)
    run = Training(mixed, complete_config(mixed, config, [0, 2, 5, 8]), TrainingSettings())
    together = run.mean_loss([0, 1, 2, 3], None, guided=False)
    apart = sum(run.mean_loss([i, i + 2], None, guided=False) for i in (0, 1)) / 2
    assert torch.allclose(together, apart, rtol=1e-5)


def test_the_loss_of_the_true_features_is_zero_and_has_a_gradient(trajectories):
    run = Training(trajectories, complete_config(trajectories, None, [0, 4]), TrainingSettings())
    batch = Batch([trajectories[0]], run.head, run.generator, None, "cpu")
    plan = Plan([0, 4], STEPS, 4)
    forecast = batch.features[plan.steps].requires_grad_()
    loss = head_aware_loss(batch, plan, forecast)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(forecast.grad).all()


def test_velocities_of_a_batch_are_those_of_the_output_head(trajectories):
    from lesa_kernels import OutputHead
    from lesa_kernels.stream import output_head

    run = Training(trajectories, complete_config(trajectories, None, 4), TrainingSettings())
    batch = Batch([trajectories[0], trajectories[1]], run.head, run.generator, None, "cpu")
    for number in (0, 1):
        t = trajectories[number]
        head = OutputHead(run.head.weight, run.head.bias, t.scale, t.shift, run.head.eps)
        expected = output_head(t.features, head)  # one row per step
        torch.testing.assert_close(batch.velocities[:, number * TOKENS : (number + 1) * TOKENS], expected)


def test_a_plan_lists_the_history_of_each_predicted_step():
    plan = Plan([0, 2, 5], total=8, length=3)
    assert plan.steps == [1, 3, 4, 6, 7]
    assert plan.history.tolist() == [[0, 0, 0], [2, 0, 0], [2, 0, 0], [5, 2, 0], [5, 2, 0]]
    assert plan.count.tolist() == [1, 2, 2, 3, 3]
    assert plan.gaps.tolist() == [0, 1, 1, 2, 2]


def test_moved_schedules_are_near_and_differ():
    generator = torch.Generator().manual_seed(0)
    steps = (0, 2, 7, 13, 49)
    schedules = [sorted(moved_steps(steps, 50, generator, reach=1)) for _ in range(200)]
    assert all(s[0] == 0 and all(abs(a - b) <= 1 for a, b in zip(s, steps)) and s[-1] < 50 for s in schedules)
    assert len({tuple(s) for s in schedules}) > 30


def test_arguments_are_checked(trajectories):
    with pytest.raises(ValueError, match=r"`config.feature_dim` must be that of the trajectories, 8, but got 9"):
        lesa.train(trajectories, PredictorConfig(9))
    with pytest.raises(ValueError, match="`config.family` must be that of the trajectories, 'flux'"):
        lesa.train(trajectories, PredictorConfig(WIDTH, family="other"))
    with pytest.raises(ValueError, match="`schedule` must be made for the 12 steps"):
        lesa.train(trajectories, schedule=[0, 4, 12])
    with pytest.raises(ValueError, match="`schedule` must leave steps to predict"):
        lesa.train(trajectories, schedule=list(range(STEPS)))
    with pytest.raises(ValueError, match="`epochs` must be an integer of at least 1"):
        lesa.train(trajectories, epochs=0)
    with pytest.raises(ValueError, match="`learning_rate` must be"):
        lesa.train(trajectories, learning_rate=0.0)
    with pytest.raises(ValueError, match="`config.num_inference_steps` must be that of the trajectories, 12"):
        lesa.train(trajectories, PredictorConfig(WIDTH, num_inference_steps=50))


def test_a_recording_in_which_the_noise_level_rises_is_refused(trajectories):
    """Also where the level rises in the last sample only."""
    file = trajectories.folder / "sample-00005.safetensors"
    tensors = load_file(file)
    tensors["sigmas"][7] = 0.75
    save_file(tensors, file)
    predictor, l2p = FusedKANPredictor(PredictorConfig(WIDTH)), PredictorConfig(mixer="l2p")
    message = "`trajectories` must have noise levels that never rise in a run, but got sample-00005, in which it rises"
    for call in (
        lambda: lesa.train(trajectories, **QUICK),
        lambda: lesa.train(trajectories, l2p, [0, 1, 5, 8], progress=False),
        lambda: lesa.train(trajectories, budget=4, **QUICK),
        lambda: lesa.find_stages(trajectories),
        lambda: lesa.find_schedule(trajectories, 4),
        lambda: lesa.search_schedule(trajectories, predictor, 4),
    ):
        with pytest.raises(ValueError, match=f"{message} from 0.5 to 0.75 at step 7. Record again"):
            call()


@pytest.mark.parametrize("wrong", [None, 3, ["recording"]])
def test_what_is_no_recording_is_refused(wrong):
    with pytest.raises(TypeError, match="`trajectories` must be the folder of a recording, or what `lesa.record`"):
        lesa.train(wrong)


def test_typical_errors_are_those_that_training_measures(trajectories):
    trained = lesa.train(trajectories, **QUICK)
    unknown = FusedKANPredictor(replace(trained.config, schedule_errors=None))
    unknown.load_state_dict(trained.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        measured = trainer.with_typical_errors(unknown, trajectories)
    assert measured.config == trained.config and unknown.config.schedule_errors is None
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in measured.state_dict().items())
    with torch.no_grad():
        unknown.out_bias.add_(0.5)
    other = trainer.with_typical_errors(unknown, trajectories)
    assert other.config.schedule_errors != trained.config.schedule_errors
