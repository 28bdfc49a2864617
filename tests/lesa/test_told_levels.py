"""Noise levels that the model is told in computed steps in place of those of its latents."""

import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lesa
import more_pipelines
import small_ltx
import small_pipelines as small
from lesa.cache import reasons
from lesa.cache.run import Run
from lesa.cache.told import check_can_be_told, timesteps_at
from lesa.inputs import collate
from lesa.models import adapter_for
from lesa.schedule import Schedule
from lesa.training.differentiable_runs import DifferentiableRuns
from lesa.training.end_to_end_run import _log_rms
from lesa.training.learned_levels import LearnedLevels
from lesa_kernels import FusedKANPredictor, PredictorConfig

CASES = {**small.ALL, **more_pipelines.ALL}
STEPS, SCHEDULE = 8, (0, 2, 5)
TOLD = (0.95, 0.72, 0.35)


def run_of(pipe, inputs, steps=STEPS, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(inputs))]
    call = {"num_inference_steps": steps, "generator": generators, "output_type": "latent", "return_dict": False}
    return pipe(**collate(inputs), **{**call, **options})[0]


def inputs_of(name="flux", count=2):
    return [CASES[name].inputs(1) for _ in range(count)]


def sigmas_in(pipe, inputs):
    """The noise levels of a run."""
    run_of(pipe, inputs)
    return lesa.cache.run.sigmas_of(pipe.scheduler, pipe.scheduler.timesteps.tolist())[:STEPS]


@functools.cache
def levels_of_flux():
    return sigmas_in(small.ALL["flux"].build(), inputs_of(count=1))


def predictor_of(pipe, told=TOLD, schedule=SCHEDULE, sigmas=None, mixer="linear", **options):
    adapter = adapter_for(pipe)
    sigmas = tuple(levels_of_flux()[step] for step in schedule) if sigmas is None else sigmas
    known = {"family": adapter.family, "num_inference_steps": STEPS, "schedule": schedule, "schedule_sigmas": sigmas}
    return FusedKANPredictor(PredictorConfig(adapter.feature_dim, mixer, **known, told_levels=told, **options))


@pytest.fixture
def pipe():
    return small.ALL["flux"].build()


class Seen:
    """The timesteps that a transformer gets in each call."""

    def __init__(self, pipe, argument="timestep"):
        self.timesteps = []
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: self.timesteps.append(kwargs[argument].clone()), with_kwargs=True
        )


def test_the_model_is_told_in_computed_steps_only(pipe):
    with lesa.enable_cache(pipe, predictor_of(pipe)) as handle:
        seen = Seen(pipe)
        run_of(pipe, inputs_of())
    assert handle.stats.notes == [] and handle.stats.streams["cond"].computed == [*SCHEDULE]
    wanted = [*levels_of_flux()]
    for step, level in zip(SCHEDULE, TOLD):
        wanted[step] = level
    assert torch.allclose(torch.stack(seen.timesteps), torch.tensor(wanted)[:, None].expand(-1, 2), atol=1e-6)


def test_a_step_that_is_not_of_the_schedule_is_told_its_own_level(pipe, monkeypatch):
    """Such as one that is computed because a forecast was not finite."""
    predictor = predictor_of(pipe)
    monkeypatch.setattr(type(predictor), "forecast_with", lambda self, ring, *_: torch.full((2, 8, 32), math.nan))
    monkeypatch.setattr("lesa.cache.forecasting.ForecastingHook._reads_head", lambda *_: False)
    with lesa.enable_cache(pipe, predictor) as handle, pytest.warns(RuntimeWarning, match="not finite"):
        seen = Seen(pipe)
        run_of(pipe, inputs_of())
    assert handle.stats.streams["cond"].computed == [*range(STEPS)]
    passed = [timestep[0].item() for timestep in seen.timesteps]
    levels = levels_of_flux()
    assert passed[-3:] == pytest.approx([TOLD[2], *levels[6:]], abs=1e-6)
    assert {round(level, 4) for level in levels} - {round(level, 4) for level in passed} == {
        round(levels[step], 4) for step in SCHEDULE
    }


MANY = ("z-image", "lumina2", "sana", "wan", "glm image", "mochi", "hidream", "qwen cfg", "sd3 cfg", "ltx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", *MANY])
def test_the_levels_of_the_latents_change_no_bit(name):
    """What is told is what the family's pipelines pass: the same numbers, dtypes and shapes."""
    pipe, inputs = CASES[name].build(), inputs_of(name, 1)
    levels = sigmas_in(pipe, inputs)
    own = tuple(levels[step] for step in SCHEDULE)
    found = []
    for told in (None, own, tuple(0.9 * level for level in own)):
        with lesa.enable_cache(pipe, predictor_of(pipe, told, sigmas=own)) as handle:
            found.append(run_of(pipe, inputs))
            assert not [note for note in handle.stats.notes if "not used" in note]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


OTHERS = {
    "steps": ({"steps": 6}, {}),
    "schedule": ({}, {"schedule": [0, 3, 5]}),
    "error control": ({}, {"schedule": lesa.ErrorControl()}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OTHERS])
def test_another_run_than_the_schedules_is_told_its_own_levels(pipe, name):
    options, cache = OTHERS[name]
    found = []
    for told in (TOLD, None):
        predictor = predictor_of(pipe, told, mixer="newton", rank=0, schedule_errors=(0.0, 0.1, 0.1))
        with lesa.enable_cache(pipe, predictor, **cache) as handle:
            found.append(run_of(pipe, inputs_of(), **options))
        assert (reasons.UNTOLD in handle.stats.notes) == (told is not None)
    assert torch.equal(*found)


def test_other_noise_levels_than_the_schedules_are_told_as_they_are(pipe):
    found = [predictor_of(pipe, told, sigmas=(1.0, 0.8, 0.4)) for told in (TOLD, None)]
    for place, predictor in enumerate(found):
        with lesa.enable_cache(pipe, predictor, [*SCHEDULE]) as handle:
            found[place] = run_of(pipe, inputs_of())
        assert (reasons.UNTOLD in handle.stats.notes) == (place == 0)
    assert torch.equal(*found)


REFUSED = {
    "wan tokens cfg": "a timestep for each token",
    "ltx-2": "a timestep for the sound too",
    "skyreels": "a timestep for each frame",
    "cosmos": "the part of noise",
    "helios": "whole numbers",
}


@pytest.mark.parametrize("name", ["ltx-2", *(pytest.param(n, marks=pytest.mark.slow) for n in REFUSED if n != "ltx-2")])
def test_what_cannot_be_told_is_refused_by_name(name):
    pipe = CASES[name].build()
    match = rf"`predictor.config.told_levels` must be None .* {type(pipe.transformer).__name__}: .*{REFUSED[name]}"
    with pytest.raises(ValueError, match=match):
        lesa.enable_cache(pipe, predictor_of(pipe))
    assert not hasattr(pipe.transformer, "_diffusers_hook")
    match = rf"`learn_levels` must be False .* {type(pipe.transformer).__name__}: .*{REFUSED[name]}"
    with pytest.raises(ValueError, match=match):
        check_can_be_told(pipe, adapter_for(pipe), learns_levels=True)


@pytest.mark.slow
def test_a_timestep_for_each_token_is_left_as_it_is():
    case = small_ltx.CASES["ltx image"]
    pipe, inputs = case.build(), [case.inputs(1)]
    levels = sigmas_in(pipe, inputs)
    own, found = tuple(levels[step] for step in SCHEDULE), []
    for told in (TOLD, None):
        with lesa.enable_cache(pipe, predictor_of(pipe, told, sigmas=own)) as handle:
            found.append(run_of(pipe, inputs))
        assert (reasons.UNTOLD_TOKENS in handle.stats.notes) == (told is not None)
    assert torch.equal(*found)


def test_levels_become_timesteps_by_straight_lines():
    scheduler = SimpleNamespace(timesteps=torch.tensor([1000.0, 900.0, 500.0]), sigmas=torch.tensor([1, 0.8, 0.6, 0]))
    run = Run(scheduler, lambda timesteps: timesteps)
    levels = torch.tensor([*run.sigmas[:3], 0.9, 0.7, 0.5], dtype=torch.float64)
    found = timesteps_at(run, levels)
    assert found[:3].float().tolist() == [1000, 900, 500]
    assert found[3:].tolist() == pytest.approx([950, 700, 300], abs=1e-3)


def backend_that_counts(compiled):
    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    return backend


@pytest.mark.slow
def test_a_compiled_transformer_is_not_compiled_again(pipe):
    compiled, found = [], []
    pipe.transformer.compile(backend=backend_that_counts(compiled))
    for told in (None, TOLD):
        with lesa.enable_cache(pipe, predictor_of(pipe, told)):
            found.append(run_of(pipe, inputs_of()))
        if told is None:
            before = len(compiled)
    assert before > 0 and len(compiled) == before and not torch.equal(*found)


# The configuration


def test_told_levels_are_saved_and_loaded(tmp_path):
    config = PredictorConfig(8, schedule=(0, 3), schedule_sigmas=(1.0, 0.4), told_levels=[0.98, 0.41])
    assert config.told_levels == (0.98, 0.41) and config.format_version == 3
    FusedKANPredictor(config).save_pretrained(tmp_path)
    assert FusedKANPredictor.from_pretrained(tmp_path).config == config
    assert json.loads((tmp_path / "config.json").read_text())["told_levels"] == [0.98, 0.41]
    without = replace(config, told_levels=None)
    assert without.format_version == 1 and "told_levels" not in without.to_dict()
    values = {**config.to_dict(), "format_version": 1}
    with pytest.raises(ValueError, match="unknown fields: options, told_levels"):
        PredictorConfig.from_dict(values)


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ((0.9,), "for each of the 2 steps of `schedule`"),
        ((0.9, 1.1), "at most 1"),
        ((0.9, math.nan), "finite"),
        (0.9, "be a tuple"),
    ],
)
def test_wrong_told_levels_are_named(told, match):
    with pytest.raises((ValueError, TypeError), match=f"`told_levels` must .*{match}"):
        PredictorConfig(8, schedule=(0, 3), schedule_sigmas=(1.0, 0.4), told_levels=told)


def test_told_levels_need_a_schedule():
    with pytest.raises(ValueError, match="`told_levels` must .*Pass `schedule` too"):
        PredictorConfig(8, told_levels=(0.9,))


# The training

QUICK = {"updates": 3, "batch_size": 2, "progress": False, "learn_levels": True}


def trained(pipe, predictor, folder=None, **options):
    return lesa.train_end_to_end(predictor, pipe, inputs_of(), out_dir=folder, **{**QUICK, **options})


def loss_of(pipe, config, offsets, wanted):
    """The loss of a run in which the levels have these offsets, against the run of all steps, and its gradient."""
    predictor = FusedKANPredictor(config)
    levels = LearnedLevels(config)
    with torch.no_grad():
        levels.offsets.copy_(torch.tensor(offsets))
    runs = DifferentiableRuns(pipe, predictor, levels)
    with runs.on():
        run = runs.run(inputs_of(), [0, 1], STEPS, Schedule(SCHEDULE))
        loss = _log_rms(run.latents[run.last], wanted)
        loss.backward()
    return loss.item(), levels.offsets.grad.clone()


@pytest.mark.slow
def test_the_gradient_is_that_of_differences(pipe):
    config, middle, small_step = predictor_of(pipe).config, [-0.3, 0.2, 0.1], 0.02
    wanted = run_of(pipe, inputs_of())
    _, gradient = loss_of(pipe, config, middle, wanted)
    for place in range(3):
        ends = []
        for sign in (1, -1):
            offsets = [*middle]
            offsets[place] += sign * small_step
            ends.append(loss_of(pipe, config, offsets, wanted)[0])
        difference = (ends[0] - ends[1]) / (2 * small_step)
        assert math.isclose(gradient[place].item(), difference, rel_tol=0.03, abs_tol=2e-3 * gradient.abs().max())


@pytest.mark.slow
def test_a_forecaster_without_training_learns_levels(pipe, tmp_path):
    predictor = predictor_of(pipe, told=None)
    made = trained(pipe, predictor, tmp_path, updates=2)
    assert predictor.config.told_levels is None and made.config.told_levels != predictor.config.schedule_sigmas
    assert made.config == replace(predictor.config, told_levels=made.config.told_levels)
    assert FusedKANPredictor.from_pretrained(tmp_path).config == made.config
    assert all(0 <= level <= 1 for level in made.config.told_levels)
    with pytest.raises(ValueError, match="be one that has something to train"):
        trained(pipe, predictor, learn_levels=False)


@pytest.mark.slow
def test_levels_and_predictor_are_learned_together_and_bring_the_loss_down(pipe, tmp_path):
    predictor = predictor_of(pipe, told=None, mixer="newton", rank=4, hidden=8)
    made = trained(pipe, predictor, tmp_path / "made", updates=12)
    losses = json.loads((tmp_path / "made" / "losses.json").read_text())["training"]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    before = predictor.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in made.state_dict().items())
    without = trained(pipe, predictor, updates=2, learn_levels=False)
    assert without.config.told_levels is None
    again = trained(pipe, made, updates=2, learn_levels=False)  # with the levels that it has
    assert again.config.told_levels == made.config.told_levels


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_its_levels(pipe, tmp_path, monkeypatch):
    predictor = predictor_of(pipe, told=None, mixer="newton", rank=4, hidden=8)
    wanted = trained(pipe, predictor, tmp_path / "whole")
    calls, keep = iter(range(1, 100)), LearnedLevels.keep_in_range

    def interrupt(self):
        if next(calls) == 3:
            raise KeyboardInterrupt
        keep(self)

    monkeypatch.setattr(LearnedLevels, "keep_in_range", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(pipe, predictor, tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="`learn_levels` must be True, as in the unfinished training"):
        trained(pipe, predictor, tmp_path / "cut", learn_levels=False)
    assert trained(pipe, predictor, tmp_path / "cut").config == wanted.config


@pytest.mark.slow
def test_levels_are_learned_where_timesteps_are_whole_numbers():
    """The training has the timesteps before they are rounded, which have a gradient."""
    pipe, inputs = CASES["wan"].build(), inputs_of("wan", 1)
    levels = sigmas_in(pipe, inputs)
    assert not pipe.scheduler.timesteps.is_floating_point()
    predictor = predictor_of(pipe, None, sigmas=tuple(levels[step] for step in SCHEDULE))
    made = lesa.train_end_to_end(predictor, pipe, inputs, **{**QUICK, "updates": 2})
    assert all(a != b for a, b in zip(made.config.told_levels[1:], predictor.config.schedule_sigmas[1:]))


@pytest.mark.slow
def test_levels_for_other_runs_are_not_learned(pipe):
    predictor = predictor_of(pipe, told=None, sigmas=(1.0, 0.8, 0.4))
    with pytest.raises(ValueError, match="`predictor.config.schedule_sigmas` must have the steps and noise levels"):
        trained(pipe, predictor, updates=1)


def test_offsets_stay_in_range():
    config = PredictorConfig(8, schedule=(0, 3), schedule_sigmas=(1.0, 0.4))
    levels = LearnedLevels(config)
    assert levels.values() == (1.0, 0.4)
    with torch.no_grad():
        levels.offsets.copy_(torch.tensor([0.5, -3.0]))
    levels.keep_in_range()
    assert levels.values() == (1.0, 0.0) and levels().tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="noise levels above 0"):
        LearnedLevels(PredictorConfig(8))
