"""`lesa.refine`, and recording along a predictor's own roll-outs, on the digits model."""

from dataclasses import replace

import pytest
import torch

import lesa
from lesa.demo import digits
from lesa.training import recording, refinement
from lesa.training.batches import Batch, Head, Plan
from lesa.training.losses import off_after_gaps
from lesa.training.refinement import RollOuts
from lesa.training.training_run import Training
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, SCHEDULE = 12, [0, 2, 5, 8]
QUICK = {"epochs": 4, "batch_size": 4, "samples_per_call": 8, "progress": False}


def labels(count):
    return [number % 10 for number in range(count)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Trajectories of eight digits, some of their tokens, and their inputs."""
    folder = tmp_path_factory.mktemp("refine") / "trajectories"
    inputs = digits.inputs_for(labels(8))
    pipe = digits.load_pipeline()
    trajectories = lesa.record(pipe, inputs, folder, STEPS, tokens_per_sample=20, batch_size=8, progress=False)
    return trajectories, inputs


@pytest.fixture(scope="module")
def predictor(recorded):
    return lesa.train(recorded[0], schedule=SCHEDULE, epochs=6, batch_size=4, progress=False)


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
    assert lesa.cache.installed_hook(pipe.transformer) is None


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


def test_refining_gets_closer_on_samples_it_has_not_seen(pipe, recorded, predictor):
    before = closeness(pipe, predictor, 1000)
    refined = lesa.refine(predictor, *recorded[:1], pipe, recorded[1], **{**QUICK, "epochs": 20})
    assert refined.config.schedule_errors != predictor.config.schedule_errors  # they are measured again
    assert replace(refined.config, schedule_errors=predictor.config.schedule_errors) == predictor.config
    assert not refined.training
    assert closeness(pipe, refined, 1000) > before + 0.3
    longer = lesa.train(recorded[0], schedule=SCHEDULE, epochs=46, batch_size=4, progress=False)
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


@pytest.mark.parametrize("at", ["roll-out", "training"])
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
    expected = {"config.json", "model.safetensors", "losses.json", "losses.png"}
    assert {file.name for file in (tmp_path / "stopped").iterdir()} == expected


def test_roll_outs_on_another_schedule_are_other_roll_outs(pipe, recorded, predictor, tmp_path):
    """Though the weights are the same."""
    inputs = recorded[1]
    options = {"num_inference_steps": STEPS, "batch_size": 8, "progress": False}
    lesa.record(pipe, inputs, tmp_path / "r", predictor=predictor, **options)
    sigmas = tuple(recorded[0][0].sigmas[[0, 3, 6, 9]].tolist())
    other = FusedKANPredictor(replace(predictor.config, schedule=(0, 3, 6, 9), schedule_sigmas=sigmas))
    other.load_state_dict(predictor.state_dict())
    with pytest.raises(ValueError, match="`predictor` must be"):
        lesa.record(pipe, inputs, tmp_path / "r", predictor=other, **options)


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
    dense = FusedKANPredictor(PredictorConfig(128, mixer="dense"))
    with pytest.raises(ValueError, match="`predictor` must forecast from computed steps only"):
        lesa.refine(dense, trajectories, pipe, inputs, **QUICK)
    with pytest.raises(ValueError, match=r"`predictor.config.family` must be 'flux', but got None"):
        lesa.refine(FusedKANPredictor(PredictorConfig(128)), trajectories, pipe, inputs, **QUICK)
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
    with pytest.raises(ValueError, match="`predictor` must be"):
        lesa.record(pipe, inputs, tmp_path / "r", STEPS, batch_size=8, progress=False)


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
