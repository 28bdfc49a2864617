"""`search_schedule` and `find_schedule`, on trajectories for which the best schedules are known."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lesa
from lesa.training import schedule_search, trainer, training_run
from lesa.training.batches import Batch, Head, Plan, predict, roll_out
from lesa.training.schedule_search import ScheduleErrors, find_schedule, search_schedule
from lesa.training.training_run import Training
from lesa.training.trajectories import FORMAT_VERSION, HEAD, MANIFEST, Trajectory
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import FORECASTERS, Forecaster
from lesa_kernels.stream import Weights
from made_recordings import write_recording

STEPS, TOKENS, WIDTH = 14, 4, 8


def write_trajectories(folder, feature, samples=4):
    """`feature(step)` scales a direction of each token; the head shows the features as they are, but for its norm."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file({"weight": torch.eye(WIDTH), "bias": torch.zeros(WIDTH)}, folder / HEAD)
    sigmas = torch.linspace(1, 1 / STEPS, STEPS)
    scales = torch.tensor([float(feature(step)) for step in range(STEPS)])
    for number in range(samples):
        base, direction = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
        tensors = {
            "features": base + scales[:, None, None] * direction,
            "sigmas": sigmas,
            "scale": torch.zeros(STEPS, WIDTH),
            "shift": torch.zeros(STEPS, WIDTH),
            "token_index": torch.arange(TOKENS),
        }
        save_file(tensors, folder / f"sample-{number:05d}.safetensors")
    facts = {"family": "flux", "feature_dim": WIDTH, "num_inference_steps": STEPS, "samples": samples, "head_eps": 1e-6}
    (folder / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "seed": 0, **facts}))
    return lesa.Trajectories(folder)


def line(history="anchors"):
    """Draws a line through the newest two features of the history."""
    return FusedKANPredictor(PredictorConfig(WIDTH, rank=0, hidden=4, history=history))


def bent(step):
    """Constant, with steps 5 to 8 on a slope."""
    return min(max(step - 5, 0), 4)


def errors(trajectories, history="anchors"):
    return ScheduleErrors(trajectories, line(history), samples=4, tokens=TOKENS, seed=0)


@pytest.mark.parametrize("count, history", [(3, "anchors"), (4, "anchors"), (5, "anchors"), (4, "steps")])
def test_the_found_schedule_is_the_best_of_all(tmp_path, count, history):
    """Against all schedules, tried one by one."""
    trajectories = write_trajectories(tmp_path / "t", bent)
    predictor = line(history)
    found = search_schedule(trajectories, predictor, count, samples=4, tokens_per_sample=TOKENS, progress=False)
    of = errors(trajectories, history).of
    every = {steps: of((0, *steps)) for steps in itertools.combinations(range(1, STEPS), count - 1)}
    assert of(found.steps) <= min(every.values()) * 1.05 + 1e-12
    assert of(found.steps) < 0.3 * sorted(every.values())[len(every) // 2]
    assert len(found) == count and found.num_inference_steps == STEPS
    assert found.sigmas == tuple(trajectories[0].sigmas[list(found.steps)].tolist())


def test_the_error_is_that_of_forecasts_written_out_here(tmp_path):
    trajectories, steps = write_trajectories(tmp_path / "t", bent, samples=1), (0, 2, 7)
    features, sigmas = trajectories[0].features, trajectories[0].sigmas

    def head(h):
        return torch.nn.functional.layer_norm(h, (WIDTH,), eps=1e-6)

    off = 0
    for step in range(STEPS):
        known = [s for s in steps if s <= step]
        if step in steps:
            continue
        newest = features[known[-1]]
        if len(known) > 1:
            slope = (newest - features[known[-2]]) / (sigmas[known[-1]] - sigmas[known[-2]])
            newest = newest + slope * (sigmas[step] - sigmas[known[-1]])
        off = off + (head(newest) - head(features[step])) / STEPS
    order = torch.randperm(TOKENS, generator=torch.Generator())  # any order: the error is a mean over tokens
    expected = float(off[order].square().mean())
    assert ScheduleErrors(trajectories, line(), 1, TOKENS, 0).of(steps) == pytest.approx(expected, rel=1e-4)


def test_the_error_of_a_history_with_forecasts_is_that_of_roll_outs_written_out_here(tmp_path):
    """Each gap begins with the recorded features, also of the steps before it that are not computed."""
    trajectories, steps = write_trajectories(tmp_path / "t", bent, samples=1), (0, 6, 7, 10)
    features = trajectories[0].features

    def head(h):
        return torch.nn.functional.layer_norm(h, (WIDTH,), eps=1e-6)

    off = 0
    for start, end in zip(steps, (*steps[1:], STEPS)):
        seen = [*features[: start + 1]]
        for step in range(start + 1, end):
            seen.append(2 * seen[-1] - seen[-2] if len(seen) > 1 else seen[-1])
            off = off + (head(seen[-1]) - head(features[step])) / STEPS
    expected = float(off.square().mean())
    found = ScheduleErrors(trajectories, line("steps"), 1, TOKENS, 0)
    assert found.of(steps) == pytest.approx(expected, rel=1e-4)
    assert found.costs((0, 2, 10), 3) == found.costs((10,), 3)  # only the start counts


def write_guided(folder, weights=(2.5, -1.5), samples=3):
    """Two streams of calls: what is wrong with the second's forecasts is wrong with the first's too, and more."""
    trajectories = write_trajectories(folder, bent, samples)
    generator = torch.Generator().manual_seed(1)
    for number in range(samples):
        file = folder / f"sample-{number:05d}.safetensors"
        first = load_file(file)
        second = {**first, "features": first["features"] + torch.randn(1, TOKENS, WIDTH, generator=generator)}
        batches = [Batch([Trajectory(**t)], Head(trajectories, "cpu"), None, None, "cpu") for t in (first, second)]
        velocity = sum(weight * batch.velocities for weight, batch in zip(weights, batches))
        moved = (velocity * batches[0].widths[:, None, None]).cumsum(0)
        latents = torch.cat([torch.zeros(1, TOKENS, WIDTH), -moved[:-1]])
        latents[:, -1] = 1.0  # a token of an image that is given
        save_file({**first, "latents": latents}, file)
        save_file({**second, "latents": latents}, file.with_stem(file.stem + "-uncond"))
    return lesa.Trajectories(folder)


def test_what_guidance_makes_of_the_streams_is_what_counts(tmp_path):
    trajectories = write_guided(tmp_path / "t")
    found = ScheduleErrors(trajectories, line(), 2 * 3, TOKENS, 0)
    expected = torch.tensor([2.5, -1.5])[:, None].expand(2, 3 * TOKENS)
    torch.testing.assert_close(found.weights, expected, rtol=1e-3, atol=1e-3)
    alone = []
    for stream, batch in enumerate(found.batches):
        one = ScheduleErrors.__new__(ScheduleErrors)
        vars(one).update({**vars(found), "batches": [batch], "weights": torch.ones(1, 1), "_gaps": {}})
        alone.append(one.after((0, 2), 6))
        assert alone[-1].abs().max() > 0.01, stream
    torch.testing.assert_close(found.after((0, 2), 6), 2.5 * alone[0] - 1.5 * alone[1], rtol=1e-3, atol=1e-5)
    steps = search_schedule(trajectories, line(), 3, samples=6, tokens_per_sample=TOKENS, progress=False).steps
    every = [found.of((0, *steps)) for steps in itertools.combinations(range(1, STEPS), 2)]
    assert found.of(steps) <= min(every) * 1.05 + 1e-12


GUIDANCE = ((2.5, -1.5), (1.5, -0.5), (4.0, -3.0), (2.0, -1.0))


def write_shared(folder, tokens=12):
    """Two streams with the same bends in steps 1 to 6, which guidance cancels in every token; later only one bends.

    Each sample has a guidance of its own, and the head of its second stream makes as much more of the same features.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    save_file({"weight": torch.eye(WIDTH)}, folder / HEAD)
    sigmas = torch.linspace(1, 1 / STEPS, STEPS)
    shared, own = torch.zeros(STEPS), torch.zeros(STEPS)
    shared[1:7] = torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0, -3.0])
    own[8:] = torch.tensor([0.0, 0.6, 1.2, 1.2, 1.2, 1.2])
    for number, weights in enumerate(GUIDANCE):
        stretch = -weights[0] / weights[1]
        base, direction, other = (normal(tokens, WIDTH) for _ in range(3))
        second = base + shared[:, None, None] * direction
        features = second + own[:, None, None] * other, second
        modulations = torch.zeros(STEPS, WIDTH), torch.full((STEPS, WIDTH), stretch - 1)
        shifts = torch.zeros(STEPS, WIDTH), normal(STEPS, WIDTH)
        velocities = [
            torch.nn.functional.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
            for h, scale, shift in zip(features, modulations, shifts)
        ]
        moved = sum(weight * velocity for weight, velocity in zip(weights, velocities)).cumsum(0) / STEPS
        common = {"sigmas": sigmas, "token_index": torch.arange(tokens)}
        common["latents"] = torch.cat([torch.zeros(1, tokens, WIDTH), -moved[:-1]])
        for name, h, scale, shift in zip(("", "-uncond"), features, modulations, shifts):
            tensors = {**common, "features": h, "scale": scale, "shift": shift}
            save_file(tensors, folder / f"sample-{number:05d}{name}.safetensors")
    facts = {"family": "flux", "feature_dim": WIDTH, "num_inference_steps": STEPS, "samples": 4, "head_eps": 1e-6}
    (folder / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "seed": 0, **facts}))
    return lesa.Trajectories(folder)


def guided_displacement(trajectories, steps):
    """By how much the forecasts of `steps` move the samples of `write_shared` off, squared: over all their tokens."""
    weights = torch.tensor(GUIDANCE)
    off = 0
    for step in {*range(STEPS)} - {*steps}:
        *before, newest = [s for s in steps if s < step]
        for stream in (0, 1):
            features, scale, sigmas = trajectories[stream]
            forecast = features[:, newest]
            if before:
                slope = (forecast - features[:, before[-1]]) / (sigmas[newest] - sigmas[before[-1]])
                forecast = forecast + slope * (sigmas[step] - sigmas[newest])
            made, true = (torch.nn.functional.layer_norm(h, (WIDTH,), eps=1e-6) for h in (forecast, features[:, step]))
            error = (made - true) * (1 + scale[:, step, None])
            off = off + weights[:, stream, None, None] * error / STEPS
    return off.square().mean().item()


def test_streams_share_the_tokens_that_are_looked_at(tmp_path):
    """What guidance cancels in each token costs nothing, whichever tokens are looked at."""
    trajectories = write_shared(tmp_path / "t")
    streams = []
    for first in (0, 1):
        stream = [trajectories[number] for number in range(first, 8, 2)]
        features, scale = (torch.stack([getattr(t, name) for t in stream]) for name in ("features", "scale"))
        streams.append((features, scale, stream[0].sigmas))
    every = ((0, *steps) for steps in itertools.combinations(range(1, STEPS), 3))
    best, second = sorted((guided_displacement(streams, steps), steps) for steps in every)[:2]
    assert best[0] < 0.01 * second[0]
    for seed, tokens in ((0, 12), (0, 5), (1, 5), (2, 5)):
        options = {"samples": 8, "tokens_per_sample": tokens, "seed": seed, "progress": False}
        assert lesa.search_schedule(trajectories, line(), 4, **options).steps == best[1]


def test_several_streams_without_latents_are_refused(tmp_path):
    trajectories = write_trajectories(tmp_path / "t", bent, samples=2)
    for file in sorted(trajectories.folder.glob("sample-*")):
        file.with_stem(file.stem + "-uncond").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="`trajectories` must hold the latents, but got an older recording without"):
        search_schedule(lesa.Trajectories(trajectories.folder), line(), 4, progress=False)


def test_a_straight_world_needs_two_steps_only(tmp_path):
    trajectories = write_trajectories(tmp_path / "t", lambda step: 0.3 * step)
    assert errors(trajectories).of((0, 1)) < 1e-10 < errors(trajectories).of((0, 5))
    assert search_schedule(trajectories, line(), 2, progress=False).steps == (0, 1)


def test_searching_by_turns_with_training(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule_search, "BRIEF_UPDATES", 25)
    trajectories = write_trajectories(tmp_path / "t", bent, samples=9)
    config = PredictorConfig(WIDTH, rank=2, hidden=4)
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    found = find_schedule(trajectories, 4, config, progress=False)
    hook.remove()
    cosine = [3e-3 * (1 + math.cos(math.pi * n / 24)) / 2 for n in range(24)]
    assert rates == pytest.approx(cosine * 2)  # two brief trainings: twelve epochs, two batches for all nine samples
    predictor = lesa.train(trajectories, config, budget=4, epochs=1, progress=False)  # it finds the same again
    assert predictor.config.schedule == found.steps and predictor.config.schedule_sigmas == found.sigmas


def test_a_history_with_forecasts_is_searched_after_one_brief_training(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule_search, "BRIEF_UPDATES", 6)
    trajectories = write_trajectories(tmp_path / "t", bent, samples=9)
    config = PredictorConfig(WIDTH, mixer="lesa", hidden=4)
    plans, brief = [], Training.fit
    monkeypatch.setattr(training_run, "Plan", lambda *args: plans.append(Plan(*args)) or plans[-1])

    def fit(self):
        brief(self)
        assert self.settings.learning_rate == 3e-3 and not self.settings.head_aware

    monkeypatch.setattr(Training, "fit", fit)
    found = find_schedule(trajectories, 4, config, progress=False)
    assert len(found) == 4 and found.steps[0] == 0
    assert [plan.steps for plan in plans] == [[*range(1, STEPS)]] * 6  # three epochs of two batches, of all steps


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["lesa", "dense", "l2p"])
def test_a_budget_is_for_each_forecaster_that_can_be_trained(tmp_path, monkeypatch, mixer):
    monkeypatch.setattr(schedule_search, "BRIEF_UPDATES", 2)
    trajectories = write_trajectories(tmp_path / "t", bent)
    config = PredictorConfig(mixer=mixer, feature_dim=WIDTH, history_length=2, stage_bounds=())
    found = find_schedule(trajectories, 4, config, progress=False)
    predictor = lesa.train(trajectories, config, budget=4, epochs=1, progress=False)
    assert len(found) == 4 and predictor.config.schedule == found.steps


def test_a_stopped_training_with_a_budget_keeps_its_schedule(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule_search, "BRIEF_UPDATES", 12)
    trajectories, config = write_trajectories(tmp_path / "t", bent), PredictorConfig(WIDTH, rank=2, hidden=4)
    options = {"budget": 4, "epochs": 3, "out_dir": tmp_path / "out", "progress": False}
    whole = lesa.train(trajectories, config, **{**options, "out_dir": None})
    save = Training._save_checkpoint

    def stop(self, *arguments):
        save(self, *arguments)
        if self.out_dir == options["out_dir"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        lesa.train(trajectories, config, **options)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="`budget` must be 4, as in the unfinished training"):
        lesa.train(trajectories, config, **{**options, "budget": 5})
    monkeypatch.setattr(trainer, "found_schedule", None)  # it is not searched for again
    resumed = lesa.train(trajectories, config, **options)
    assert resumed.config == whole.config
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_what_does_not_fit_is_refused(tmp_path):
    trajectories = write_trajectories(tmp_path / "t", bent, samples=1)
    with pytest.raises(TypeError, match="`predictor` must be a FusedKANPredictor, but got None"):
        search_schedule(trajectories, None, 4)
    with pytest.raises(ValueError, match="`num_computed` must be an integer of at least 2 and at most 13, but got 14"):
        search_schedule(trajectories, line(), 14)
    with pytest.raises(ValueError, match="^`schedule` and `budget` cannot both be given. Pass one"):
        lesa.train(trajectories, None, 7, budget=4)
    with pytest.raises(ValueError, match="`budget` must be an integer of at least 2 and at most 13"):
        lesa.train(trajectories, budget=1)


# What a forecaster reads


class Older(FusedKANPredictor):
    """Of a user: its `forecast` knows no times and no stream of calls."""

    def forecast(self, storage, scales, sigmas, cursor, count, sigma):
        return super().forecast(storage, scales, sigmas, cursor, count, sigma) / 2


@torch.no_grad()
@pytest.mark.parametrize("history", ["anchors", "steps"])
def test_a_subclass_with_the_older_signature(tmp_path, history):
    trajectories = write_trajectories(tmp_path / "t", bent, samples=2)
    config = PredictorConfig(WIDTH, rank=0, hidden=4, history=history)
    older, own = Older(config), FusedKANPredictor(config)
    batch = Batch([trajectories[0]], Head(trajectories, "cpu"), None, None, "cpu", stream="cond")
    plan = Plan([0, 3, 7], STEPS, config.max_history, every_step=history == "steps")
    half = predict(own, batch, plan, batch.features) / 2
    torch.testing.assert_close(predict(older, batch, plan, batch.features), half)
    if history == "steps":
        # A plan would not have what the subclass computes.
        torch.testing.assert_close(roll_out(older, batch, plan)[0], roll_out(own, batch, plan)[0] / 2)
    found = search_schedule(trajectories, older, 3, samples=2, tokens_per_sample=TOKENS, progress=False)
    assert len(found) == 3


class Noting(Forecaster):
    """Repeats the newest feature, and notes the streams of calls and the times that it is asked for."""

    name = "noting"
    title = "noting"
    reads_stream = True

    def __init__(self):
        self.seen = []

    def history_length(self, config):
        return 1

    def weights(self, predictor, steps):
        self.seen.append((steps.stream, steps.times.tolist()))
        return Weights(torch.ones(*steps.sigma.shape, 1), steps.count.clamp(max=1), None, None, None)


@pytest.mark.parametrize("history", ["anchors", "steps"])
def test_a_search_tells_the_forecaster_the_stream(tmp_path, monkeypatch, history):
    noting = Noting()
    monkeypatch.setitem(FORECASTERS, "noting", noting)
    trajectories = write_recording(tmp_path / "t", samples=2, streams=2)
    predictor = FusedKANPredictor(PredictorConfig(None, "noting", history=history))
    ScheduleErrors(trajectories, predictor, samples=4, tokens=2, seed=0).after((0, 1), 2)
    times = [*trajectories[0].sigmas.tolist(), 0.0]
    assert noting.seen == [(None, times), ("uncond", times)]
