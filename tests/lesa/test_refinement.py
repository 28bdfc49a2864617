"""`lesa.refine`, and recording along a predictor's own roll-outs, on the digits model."""

import contextlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import digits_pipelines
import lesa
from lesa.artifacts import predictor_identity
from lesa.cache.placement import installed_hook
from lesa.demo import digits
from lesa.training import recording, refinement
from lesa.training.batches import Batch, Head, Plan
from lesa.training.losses import off_after_gaps
from lesa.training.refinement import RollOuts
from lesa.training.settings import TrainingSettings
from lesa.training.training_run import CHECKPOINT_NAME, Training
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, SCHEDULE = 12, [0, 2, 5, 8]
QUICK = {"rounds": 2, "epochs": 4, "tokens_per_batch": 32, "batch_size": 4, "samples_per_call": 8, "progress": False}


def labels(count):
    return [number % 10 for number in range(count)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Trajectories of eight digits, some of their tokens, and their inputs."""
    folder = tmp_path_factory.mktemp("refine") / "trajectories"
    inputs = digits.inputs_for(labels(8))
    pipe = digits_pipelines.cut_pipeline()
    trajectories = lesa.record(pipe, inputs, folder, STEPS, tokens_per_sample=20, batch_size=8, progress=False)
    return trajectories, inputs


@pytest.fixture(scope="module")
def predictor(recorded):
    return lesa.train(recorded[0], schedule=SCHEDULE, epochs=6, batch_size=4, tokens_per_batch=32, progress=False)


def latents_of(pipe, inputs, steps=STEPS):
    """The latents before each step of a run on seed 0 and up, `[S, B, T, C]`."""
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    arguments = {name: torch.cat([i[name] for i in inputs]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    pipe(
        **arguments,
        height=digits.SIDE,
        width=digits.SIDE,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(number) for number in range(len(inputs))],
        output_type="latent",
        callback_on_step_end=keep,
    )
    return torch.stack([torch.zeros_like(seen[0]), *seen[:-1]])  # before the first step both runs have the same noise


def test_a_roll_out_has_what_the_model_computed_on_the_way(pipe, recorded, predictor, tmp_path):
    trajectories, inputs = recorded
    rolled = lesa.record(
        pipe, inputs, tmp_path / "r", STEPS, tokens_per_sample=20, batch_size=8, progress=False, predictor=predictor
    )
    assert len(rolled) == len(trajectories)
    for plain, one in zip(trajectories, rolled):
        assert one.features.shape == (len(SCHEDULE), 20, digits.TRANSFORMER_CONFIG["num_attention_heads"] * 32)
        assert torch.equal(one.token_index, plain.token_index)
        assert torch.equal(one.sigmas, plain.sigmas[SCHEDULE])
        assert torch.equal(one.scale, plain.scale[SCHEDULE])
        torch.testing.assert_close(one.features[0], plain.features[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one.features[-1], plain.features[-1], rtol=1e-5, atol=1e-5)
    assert installed_hook(pipe.transformer) is None


def test_the_drift_is_how_far_the_latents_are_off(pipe, recorded, predictor, tmp_path):
    trajectories, inputs = recorded
    roll_outs = RollOuts(trajectories, predictor, pipe, inputs, tmp_path / "r", 8)
    plain = latents_of(pipe, inputs)
    with lesa.enable_cache(pipe, predictor):
        rolled = latents_of(pipe, inputs)
    for number, trajectory in enumerate(trajectories):
        off = (plain - rolled)[:, number][:, trajectory.token_index]  # an Euler step goes down in sigma
        torch.testing.assert_close(roll_outs.drifts[number][1:], off[SCHEDULE[1:]], rtol=1e-4, atol=1e-5)
        assert off[-1].abs().max() > 0.01
        # What training makes of it is what happened: how far off a gap ends is how far off the next one begins.
        rolled_out = roll_outs.of(number)
        batch = Batch([trajectory], Head(trajectories, "cpu"), None, None, "cpu", [[rolled_out]])
        plan, steps = Plan(SCHEDULE, STEPS, 4), torch.tensor(SCHEDULE)
        with torch.no_grad():
            after, _ = off_after_gaps(predictor, batch, plan, steps, batch.roll_outs[0])
        torch.testing.assert_close(after[:-1], rolled_out.drift[1:], rtol=1e-3, atol=1e-4)


def closeness(pipe, predictor, seed):
    """PSNR of latents, mean over eight digits, of seeds that nothing was trained on."""

    def run():
        inputs = digits.inputs_for(labels(8))
        arguments = {name: torch.cat([i[name] for i in inputs]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        generator = [torch.Generator().manual_seed(seed + number) for number in range(8)]
        size = {"height": digits.SIDE, "width": digits.SIDE}
        return pipe(**arguments, **size, num_inference_steps=STEPS, generator=generator, output_type="latent").images

    plain = run()
    with lesa.enable_cache(pipe, predictor):
        off = (run() - plain).square().mean((1, 2))
    return (10 * torch.log10(4 / off)).mean().item()


@pytest.mark.slow
def test_refining_gets_closer_on_samples_it_has_not_seen(pipe, recorded, predictor):
    before = closeness(pipe, predictor, 1000)
    refined = lesa.refine(predictor, *recorded[:1], pipe, recorded[1], **{**QUICK, "epochs": 20})
    assert refined.config.schedule_errors != predictor.config.schedule_errors  # they are measured again
    assert replace(refined.config, schedule_errors=predictor.config.schedule_errors) == predictor.config
    assert not refined.training
    assert closeness(pipe, refined, 1000) > before + 0.3
    longer = lesa.train(recorded[0], schedule=SCHEDULE, epochs=46, batch_size=4, tokens_per_batch=32, progress=False)
    assert closeness(pipe, refined, 1000) > closeness(pipe, longer, 1000)  # it is not for training longer


def test_the_given_predictor_stays_as_it_is_and_the_bars_name_the_rounds(pipe, recorded, predictor, capfd):
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    lesa.refine(predictor, recorded[0], pipe, recorded[1], **{**QUICK, "epochs": 1, "progress": True})
    shown = capfd.readouterr().err
    named = [line.split(":")[0] for line in shown.replace("\r", "\n").splitlines() if "%" in line]
    rounds = [f"round {number} of 2, {what}" for number in (1, 2) for what in ("roll out", "train")]
    assert [*dict.fromkeys(named)] == rounds
    assert "validation with roll-outs=" in shown and "validation=" not in shown
    assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())


@pytest.mark.parametrize("at", ["roll-out", pytest.param("training", marks=pytest.mark.slow)])
def test_what_was_stopped_goes_on_to_the_same_bits(pipe, recorded, predictor, tmp_path, monkeypatch, at):
    trajectories, inputs = recorded
    arguments = (predictor, trajectories, pipe, inputs)
    whole = lesa.refine(*arguments, out_dir=tmp_path / "whole", **QUICK)

    class StopError(Exception):
        pass

    calls = []

    def stopping(method, after):
        def stop(*args, **options):
            calls.append(1)
            if len(calls) > after:
                raise StopError
            return method(*args, **options)

        return stop

    with monkeypatch.context() as patch:
        if at == "training":
            save = Training._save_checkpoint
            patch.setattr(Training, "_save_checkpoint", stopping(save, 6))  # in the second round
        else:
            save = recording.save_sample
            patch.setattr(recording, "save_sample", stopping(save, 12))
        with pytest.raises(StopError):
            lesa.refine(*arguments, out_dir=tmp_path / "stopped", **QUICK)
    assert (tmp_path / "stopped" / "round-2").is_dir()
    with pytest.raises(ValueError, match="`epochs` must be 4, as in the unfinished refinement in .*, but got 5"):
        lesa.refine(*arguments, out_dir=tmp_path / "stopped", **{**QUICK, "epochs": 5})
    resumed = lesa.refine(*arguments, out_dir=tmp_path / "stopped", **QUICK)
    loaded = FusedKANPredictor.from_pretrained(tmp_path / "stopped")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]) and torch.equal(value, loaded.state_dict()[name])
    expected = {"config.json", "model.safetensors", "provenance.json", "losses.json", "losses.png"}
    assert {file.name for file in (tmp_path / "stopped").iterdir()} == expected


def test_roll_outs_on_another_schedule_are_other_roll_outs(pipe, recorded, predictor, tmp_path):
    """Though the weights are the same."""
    inputs = recorded[1]
    options = {"num_inference_steps": STEPS, "batch_size": 8, "progress": False}
    lesa.record(pipe, inputs, tmp_path / "r", predictor=predictor, **options)
    sigmas = tuple(recorded[0][0].sigmas[[0, 3, 6, 9]].tolist())
    other = FusedKANPredictor(replace(predictor.config, schedule=(0, 3, 6, 9), schedule_sigmas=sigmas))
    other.load_state_dict(predictor.state_dict())
    with pytest.raises(ValueError, match=r"`predictor[\w.]*` must be"):
        lesa.record(pipe, inputs, tmp_path / "r", predictor=other, **options)


@pytest.mark.slow
def test_cleaning_up_that_is_cut_off_loses_nothing(pipe, recorded, predictor, tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    def stop(folder):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(refinement.shutil, "rmtree", stop)
        with pytest.raises(StopError):
            lesa.refine(predictor, recorded[0], pipe, recorded[1], out_dir=tmp_path, **{**QUICK, "rounds": 1})
    assert FusedKANPredictor.from_pretrained(tmp_path).config.schedule == tuple(SCHEDULE)
    assert not (tmp_path / refinement.SETTINGS_NAME).exists()


def test_what_does_not_belong_together_is_refused(pipe, recorded, predictor, tmp_path, fresh_pipe):
    trajectories, inputs = recorded
    with pytest.raises(ValueError, match="`inputs` must be what the trajectories were recorded with"):
        lesa.refine(predictor, trajectories, pipe, inputs[:7], **QUICK)
    fresh_pipe.transformer.proj_out.bias.data.add_(1)
    with pytest.raises(ValueError, match=r"`pipe.transformer` must be what the trajectories were recorded with"):
        lesa.refine(predictor, trajectories, fresh_pipe, inputs, **QUICK)
    with pytest.raises(TypeError, match="`predictor` must be a FusedKANPredictor, but got 'newton-4'"):
        lesa.refine("newton-4", trajectories, pipe, inputs, **QUICK)
    linear = FusedKANPredictor(PredictorConfig(128, mixer="linear"))
    with pytest.raises(ValueError, match="`predictor.config.mixer` must be one that has something to train"):
        lesa.refine(linear, trajectories, pipe, inputs, **QUICK)
    loaded = FusedKANPredictor(PredictorConfig(mixer="lesa", hidden=4, family="flux", num_inference_steps=STEPS))
    with pytest.raises(ValueError, match="`predictor.config.schedule` must be the steps to compute, but got None"):
        lesa.refine(loaded, trajectories, pipe, inputs, **QUICK)
    with pytest.raises(ValueError, match=r"`predictor.config.family` must be 'flux', but got None"):
        lesa.refine(FusedKANPredictor(PredictorConfig(128)), trajectories, pipe, inputs, **QUICK)
    told = FusedKANPredictor(replace(predictor.config, told_levels=predictor.config.schedule_sigmas))
    with pytest.raises(ValueError, match=r"`predictor.config.told_levels` must be None to refine"):
        lesa.refine(told, trajectories, pipe, inputs, **QUICK)
    with pytest.raises(ValueError, match="`epochs` must be an integer of at least 1"):
        lesa.refine(predictor, trajectories, pipe, inputs, **{**QUICK, "epochs": 0})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="`out_dir` must be empty or hold an unfinished refinement"):
        lesa.refine(predictor, trajectories, pipe, inputs, out_dir=tmp_path, **QUICK)
    rolled = lesa.record(pipe, inputs, tmp_path / "r", STEPS, batch_size=8, progress=False, predictor=predictor)
    with pytest.raises(ValueError, match="`trajectories` must be of plain runs"):
        lesa.refine(predictor, rolled, pipe, inputs, **QUICK)
    with pytest.raises(ValueError, match="`trajectories` must be of plain runs"):
        lesa.train(rolled, schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"`predictor[\w.]*` must be"):
        lesa.record(pipe, inputs, tmp_path / "r", STEPS, batch_size=8, progress=False)


REFUSED = {
    "a file": (ValueError, "`out_dir` must be a folder, but got .*, where there is a file"),
    "below a file": (ValueError, "`out_dir` must be a folder, but got .*, where there is a file"),
    "files": (ValueError, "`out_dir` must be empty or hold an unfinished refinement, but got files in"),
    "a predictor": (ValueError, "`out_dir` must be empty or hold an unfinished refinement, but got files in"),
    "a damaged refinement": (ValueError, "`out_dir` must hold a refinement that can be read, but got .*damaged"),
    "a list": (ValueError, "`out_dir` must hold a refinement that can be read, but got .*damaged"),
    "no path": (TypeError, "`out_dir` must be a path, but got 3"),
    "meta": (ValueError, "`device` must be one on which torch can compute, but got 'meta'"),
    "no device": (ValueError, "`device` must be one on which torch can compute, but got 'gpu'"),
    "rounds": (ValueError, "`rounds` must be an integer of at least 1"),
    "epochs": (TypeError, "`epochs` must be an integer"),
    "samples_per_call": (ValueError, "`samples_per_call` must be an integer of at least 1"),
    "learning_rate": (ValueError, "`learning_rate` must be a finite number"),
    "not finite": (ValueError, "sample-00007.safetensors` is damaged: it has NaN or Inf in 'features'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_before_the_pipeline_runs(pipe, recorded, predictor, tmp_path, monkeypatch, what):
    (trajectories, inputs), out, options = recorded, tmp_path / "out", {}
    if what in ("a file", "below a file"):
        out.write_text("")
        options = {"out_dir": out / "deeper" if what == "below a file" else out}
    elif what == "files":
        out.mkdir()
        (out / "notes.txt").write_text("")
    elif what == "a predictor":
        predictor.save_pretrained(out)
    elif what in ("a damaged refinement", "a list"):
        out.mkdir()
        (out / refinement.SETTINGS_NAME).write_text("{" if what == "a damaged refinement" else "[]")
    elif what == "not finite":
        shutil.copytree(trajectories.folder, tmp_path / "t")
        file = tmp_path / "t" / "sample-00007.safetensors"
        tensors = load_file(file)
        tensors["features"][-1, -1, -1] = torch.nan
        save_file(tensors, file)
        trajectories = lesa.Trajectories(tmp_path / "t")
    else:
        options = {
            "no path": {"out_dir": 3},
            "meta": {"device": "meta"},
            "no device": {"device": "gpu"},
            "rounds": {"rounds": 0},
            "epochs": {"epochs": 1.5},
            "samples_per_call": {"samples_per_call": 0},
            "learning_rate": {"learning_rate": float("nan")},
        }[what]
    monkeypatch.setattr(refinement, "Recording", lambda *args, **options: pytest.fail("work has begun"))
    error, message = REFUSED[what]
    with pytest.raises(error, match=message) as refused:
        lesa.refine(predictor, trajectories, pipe, inputs, **{"out_dir": out, **QUICK, **options})
    assert refused.value.lesa_message  # it is no bug


@pytest.mark.slow
def test_guidance_in_two_streams_is_refined(tmp_path):
    from lesa.demo import photos

    pipe, inputs = photos.load_pipeline(), photos.inputs_for([0, 4])
    trajectories = lesa.record(pipe, inputs, tmp_path / "t", STEPS, tokens_per_sample=8, batch_size=2, progress=False)
    predictor = lesa.train(trajectories, schedule=SCHEDULE, epochs=1, progress=False)
    roll_outs = RollOuts(trajectories, predictor, pipe, inputs, tmp_path / "r", 2)
    assert len(trajectories) == len(roll_outs.drifts) == 4
    assert torch.equal(roll_outs.drifts[0], roll_outs.drifts[1])  # both streams are off by the same
    assert roll_outs.drifts[0][-1].abs().max() > 0.01
    refined = lesa.refine(predictor, trajectories, pipe, inputs, **{**QUICK, "rounds": 1, "epochs": 1})
    assert not torch.equal(refined.up, predictor.up)


GAPS = [(0, 2), (2, 5), (5, 8), (8, STEPS)]
PREDICTED = [step for step in range(STEPS) if step not in SCHEDULE]


def forecasts(predictor, trajectory, computed):
    """Of the predicted steps `[P, T, D]`, in a run whose computed steps have the features `[C, T, D]`."""
    ring, made = predictor.make_ring(1, computed.shape[1]), []
    for step, sigma in enumerate(trajectory.sigmas.tolist()):
        if step in SCHEDULE:
            ring.push(computed[SCHEDULE.index(step)][None], sigma)
        else:
            with torch.no_grad():
                made.append(predictor(ring, sigma)[0])
    return torch.stack(made)


def velocity(trajectories, trajectory, features, steps):
    """What the output head makes of features `[P, T, D]`, in double precision."""
    normed = torch.nn.functional.layer_norm(features.double(), features.shape[-1:], eps=trajectories.head_eps)
    modulated = normed * (1 + trajectory.scale[steps][:, None]) + trajectory.shift[steps][:, None]
    return modulated @ trajectories.head_weight.double().T + trajectories.head_bias


def loss_of(predictor, trajectories, roll_outs, numbers, tokens=slice(None)):
    """The loss of `lesa.train` on the plain runs; for each roll-out, the drift after the gaps and 0.3 of the errors.

    The drift after a gap is the one before it, and what the computed step and the forecasts add.
    """
    parts = {name: [] for name in ("truth", "made", "velocity", "error", "moved", "moved_off")}
    rolled_parts = [{"error": [], "off": []} for _ in roll_outs]
    for number in numbers:
        plain = trajectories[number]
        widths = (plain.sigmas - torch.cat([plain.sigmas[1:], torch.zeros(1)])).double()[:, None, None]

        def over_gaps(velocities, widths=widths):
            moves = dict(zip(PREDICTED, velocities * widths[PREDICTED]))
            return torch.stack([sum(moves[step] for step in range(begin + 1, end)) for begin, end in GAPS])

        features = plain.features[:, tokens].float()
        true = velocity(trajectories, plain, features[PREDICTED], PREDICTED)
        made = forecasts(predictor, plain, features[SCHEDULE])
        error = velocity(trajectories, plain, made, PREDICTED) - true
        found = features[PREDICTED], made, true, error, over_gaps(true), over_gaps(error)
        for values, value in zip(parts.values(), found):
            values.append(value)
        for roll_out, rolled_part in zip(roll_outs, rolled_parts):
            rolled = roll_out[number].features[:, tokens].float()
            made = forecasts(predictor, plain, rolled)
            error = velocity(trajectories, plain, made, PREDICTED) - true
            drift = (plain.latents[SCHEDULE] - roll_out[number].latents)[:, tokens]
            heads = [velocity(trajectories, plain, h, SCHEDULE) for h in (rolled, features[SCHEDULE])]
            rolled_part["error"].append(error)
            rolled_part["off"].append(drift + (heads[0] - heads[1]) * widths[SCHEDULE] + over_gaps(error))
    whole = {name: torch.cat(values, 1) for name, values in parts.items()}
    loss = 0.1 * (whole["made"] - whole["truth"]).abs().mean() / whole["truth"].abs().mean()
    loss += 0.3 * whole["error"].norm() / whole["velocity"].norm() + whole["moved_off"].norm() / whole["moved"].norm()
    for rolled_part in rolled_parts:
        off, error = (torch.cat(rolled_part[name], 1) for name in ("off", "error"))
        loss += off.norm() / whole["moved"].norm() + 0.3 * error.norm() / whole["velocity"].norm()
    return loss.item()


def roll_out(pipe, recorded, predictor, folder):
    options = {"tokens_per_sample": 20, "batch_size": 8, "progress": False, "predictor": predictor}
    return lesa.record(pipe, recorded[1], folder, STEPS, **options)


@pytest.fixture(scope="module")
def rolled(recorded, predictor, tmp_path_factory):
    """The roll-outs of the predictor that is refined."""
    return roll_out(digits_pipelines.cut_pipeline(), recorded, predictor, tmp_path_factory.mktemp("rolled") / "r")


def close(value):
    return pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_each_round_trains_on_plain_runs_and_on_all_roll_outs_so_far(pipe, recorded, predictor, rolled, tmp_path):
    trajectories, inputs = recorded
    options = {"epochs": 1, "learning_rate": 1e-2, "tokens_per_batch": None, "samples_per_call": 8, "progress": False}
    refined, losses = [predictor], []
    for rounds in (1, 2):
        out = tmp_path / f"{rounds}"
        refined.append(lesa.refine(predictor, trajectories, pipe, inputs, out_dir=out, rounds=rounds, **options))
        losses.append(json.loads((out / "losses.json").read_text()))
    roll_outs = [rolled, roll_out(pipe, recorded, refined[1], tmp_path / "r")]
    # Of the first round: one sample is for validation, after training; the seven others were trained on, before it.
    of_each = [loss_of(refined[1], trajectories, roll_outs[:1], [number]) for number in range(8)]
    (validation,) = [number for number in range(8) if losses[0]["validation"] == [close(of_each[number])]]
    others = [number for number in range(8) if number != validation]
    assert losses[0]["training"] == [close(loss_of(predictor, trajectories, roll_outs[:1], others))]
    # Of the second: on the roll-outs of both.
    assert losses[1]["training"] == [close(loss_of(refined[1], trajectories, roll_outs, others))]
    assert losses[1]["validation"] == [close(loss_of(refined[2], trajectories, roll_outs, [validation]))]
    assert losses[0]["guided_epochs"] == losses[1]["guided_epochs"] == 0
    # What is typical is that of the validation sample in the plain run.
    plain = trajectories[validation]
    ring, errors = refined[2].make_ring(1, 20), [0.0]
    for step in SCHEDULE:
        if step:
            with torch.no_grad():
                made = refined[2](ring, plain.sigmas[step].item())
            of_both = [velocity(trajectories, plain, h, [step]) for h in (made, plain.features[step][None])]
            errors.append(((of_both[0] - of_both[1]).norm() / of_both[1].norm()).item())
        ring.push(plain.features[step][None], plain.sigmas[step].item())
    assert refined[2].config.schedule_errors == tuple(map(close, errors))


@pytest.mark.slow
def test_tokens_of_plain_runs_and_roll_outs_are_the_same(pipe, recorded, predictor, rolled, tmp_path):
    """With nineteen of twenty tokens, the loss is that of recordings without one of them."""
    options = {"rounds": 1, "epochs": 1, "tokens_per_batch": 19, "samples_per_call": 8, "progress": False}
    with watched_rates() as rates:
        refined = lesa.refine(predictor, recorded[0], pipe, recorded[1], out_dir=tmp_path / "out", **options)
    assert rates == [1e-3]  # the default
    (found,) = json.loads((tmp_path / "out" / "losses.json").read_text())["validation"]
    without = [[token for token in range(20) if token != left_out] for left_out in range(20)]
    assert any(
        found == close(loss_of(refined, recorded[0], [rolled], [number], kept))
        for number in range(8)
        for kept in without
    )


UNFINISHED = {
    "rounds": 2,
    "epochs": 2,
    "batch_size": 4,
    "tokens_per_batch": 10,
    "learning_rate": 2e-3,
    "seed": 1,
    "samples_per_call": 8,
    "progress": False,
}


@contextlib.contextmanager
def watched_rates(stop_before=None):
    """Notes the learning rate of each step of the optimiser; raises before the step `stop_before`."""
    rates = []

    def see(optimizer, args, kwargs):
        if len(rates) == stop_before:
            raise KeyboardInterrupt
        rates.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(see)
    try:
        yield rates
    finally:
        hook.remove()


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def _unfinished(recorded, predictor, tmp_path_factory):
    """The folder of a refinement that was stopped in its second round, and what one that was not stopped writes."""
    folder, arguments = tmp_path_factory.mktemp("refinements"), (predictor, recorded[0])
    pipe = digits_pipelines.cut_pipeline()
    with watched_rates(stop_before=7), pytest.raises(KeyboardInterrupt):
        lesa.refine(*arguments, pipe, recorded[1], out_dir=folder / "stopped", **UNFINISHED)
    with watched_rates() as rates:
        lesa.refine(*arguments, pipe, recorded[1], out_dir=folder / "whole", **UNFINISHED)
    half = 0.5**0.5  # two batches of the seven samples that are trained on, in each of two epochs of a round
    assert rates == pytest.approx([2e-3, 1e-3 * (1 + half), 1e-3, 1e-3 * (1 - half)] * 2)
    return folder / "stopped", bytes_in(folder / "whole")


@pytest.fixture
def unfinished(_unfinished, tmp_path):
    shutil.copytree(_unfinished[0], tmp_path / "unfinished")
    return tmp_path / "unfinished"


@pytest.mark.slow
def test_the_checkpoint_of_a_round_says_whose_roll_outs_it_trains_on(predictor, unfinished):
    settings = torch.load(unfinished / "round-2" / "predictor" / CHECKPOINT_NAME, weights_only=True)["settings"]
    first = FusedKANPredictor.from_pretrained(unfinished / "round-1" / "predictor")
    assert settings["roll_outs"] == [predictor_identity(predictor), predictor_identity(first)]


def test_a_stopped_refinement_goes_on_to_the_same_bytes(pipe, recorded, predictor, unfinished, _unfinished):
    with watched_rates() as rates:
        lesa.refine(predictor, recorded[0], pipe, recorded[1], out_dir=unfinished, **UNFINISHED)
    assert rates == pytest.approx([1e-3, 1e-3 * (1 - 0.5**0.5)])  # the second epoch of the second round
    assert bytes_in(unfinished) == _unfinished[1]


@pytest.mark.parametrize(
    "name, value",
    [
        ("rounds", 3),
        ("rounds", 1),
        ("epochs", 3),
        ("batch_size", 3),
        ("tokens_per_batch", 9),
        ("tokens_per_batch", None),
        ("learning_rate", 1e-3),
        ("seed", 2),
        ("predictor", "weights"),
        ("predictor", "typical errors"),
        ("trajectories", "tokens"),
    ],
)
def test_going_on_with_another_setting_is_refused(pipe, recorded, predictor, unfinished, tmp_path, name, value):
    (trajectories, inputs), options, before = recorded, dict(UNFINISHED), bytes_in(unfinished)
    if name == "predictor":
        config = predictor.config
        if value == "typical errors":
            config = replace(config, schedule_errors=(0.0, *(2 * e for e in config.schedule_errors[1:])))
        other = FusedKANPredictor(config)
        other.load_state_dict(predictor.state_dict())
        if value == "weights":
            with torch.no_grad():
                other.out_bias[1, 0, 5] += 0.01
        predictor = other
    elif name == "trajectories":
        trajectories = lesa.record(
            pipe, inputs, tmp_path / "t", STEPS, tokens_per_sample=19, batch_size=8, progress=False
        )
    else:
        options[name] = value
    with pytest.raises(ValueError, match=rf"`{name}[\w.]*` must be .*, as in the unfinished refinement in .*, but got"):
        lesa.refine(predictor, trajectories, pipe, inputs, out_dir=unfinished, **options)
    assert bytes_in(unfinished) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda pipe: pipe.scheduler.set_shift(5.0), r"`scheduler\.shift` must be"),
        (lambda pipe: setattr(pipe, "tokenizer_max_length", 5), r"`pipeline_config\.tokenizer_max_length` must be"),
        (lambda pipe: pipe.vae.to(torch.bfloat16), r"`dtypes\.vae` must be"),
    ],
)
def test_a_pipeline_that_is_not_as_it_was_recorded_is_refused(recorded, predictor, fresh_pipe, change, words):
    """Its roll-outs would be those of other runs."""
    change(fresh_pipe)
    with pytest.raises(ValueError, match=words):
        lesa.refine(predictor, recorded[0], fresh_pipe, recorded[1], **QUICK)


RATES = {"lesa": 1e-2, "dense": 1e-3}


@pytest.fixture(scope="module", params=RATES)
def with_forecasts(recorded, request):
    """A predictor whose history holds its own forecasts: LESA after its first stage, or the dense variant."""
    config = PredictorConfig(128, mixer=request.param, hidden=8)
    rate = RATES[request.param]
    return lesa.train(
        recorded[0], config, SCHEDULE, epochs=8, learning_rate=rate, batch_size=4, tokens_per_batch=32, progress=False
    )


def test_a_history_with_forecasts_is_compared_with_the_recorded_features(pipe, recorded, with_forecasts, tmp_path):
    """The second stage of LESA: along a roll-out, whose forecasts are those of the pipeline."""
    trajectories, inputs = recorded
    predicted = [step for step in range(STEPS) if step not in SCHEDULE]
    rolled = RollOuts(trajectories, with_forecasts, pipe, inputs, tmp_path / "r", 8)
    settings = TrainingSettings(head_aware=False, validation_fraction=0)
    run = refinement._Refinement(trajectories, with_forecasts.config, settings)
    run.start_from(with_forecasts, [rolled])
    seen = FeaturesSeen(with_forecasts)
    with lesa.enable_cache(pipe, seen):
        arguments = {name: torch.cat([i[name] for i in inputs]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        generator = [torch.Generator().manual_seed(number) for number in range(8)]
        size = {"height": digits.SIDE, "width": digits.SIDE, "output_type": "latent"}
        pipe(**arguments, **size, num_inference_steps=STEPS, generator=generator)
    features = torch.stack(seen.features)  # of the predicted steps, as the pipeline had them
    for number, trajectory in enumerate(trajectories):
        batch = Batch([trajectory], run.head, None, None, "cpu", [[rolled.of(number)]])
        truth = trajectory.features[predicted]
        off = (features[:, number][:, trajectory.token_index] - truth).abs().mean() / truth.abs().mean()
        assert run.loss_of(batch, guided=False).item() == pytest.approx(off.item(), rel=1e-3)


class FeaturesSeen(FusedKANPredictor):
    """Keeps its forecasts."""

    def __init__(self, predictor):
        super().__init__(predictor.config)
        self.load_state_dict(predictor.state_dict())
        self.features = []

    def forward(self, *arguments, **more):
        self.features.append(super().forward(*arguments, **more))
        return self.features[-1]


@pytest.mark.slow
def test_refining_a_history_with_forecasts_lowers_its_loss(pipe, recorded, with_forecasts, tmp_path):
    trajectories, inputs = recorded
    rate = RATES[with_forecasts.config.mixer] / 3
    refined = lesa.refine(with_forecasts, trajectories, pipe, inputs, learning_rate=rate, **{**QUICK, "rounds": 1})
    run = refinement._Refinement(trajectories, with_forecasts.config, TrainingSettings(head_aware=False))
    losses = []
    for predictor in (refined, with_forecasts):
        run.start_from(predictor, [RollOuts(trajectories, predictor, pipe, inputs, tmp_path / f"{len(losses)}", 8)])
        with torch.no_grad():
            losses.append(run.mean_loss(range(8), None, guided=False).item())
    assert losses[0] < 0.98 * losses[1], losses
    assert refined.config == with_forecasts.config
    assert any(not torch.equal(a, b) for a, b in zip(refined.parameters(), with_forecasts.parameters()))
