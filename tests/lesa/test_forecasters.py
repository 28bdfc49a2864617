"""Forecasters without parameters in runs of a pipeline, against transcriptions and against diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks.taylorseer_cache import TaylorSeerState

import lesa
from driven_loops import FIRST, SOME, STEPS, guided
from forecasts import TRANSCRIPTIONS
from lesa.cache.forecasting import ForecastingHook
from lesa_kernels import FusedKANPredictor, PredictorConfig
from predictors import DIM, untrained_predictor

SCHEDULE = [0, 1, 3, 6, 7, 13, 15]
TOTAL = 20
CASES = {
    "linear": ("linear", None),
    "taylor": ("taylor", None),
    "taylor-2": ("taylor", {"order": 2}),
    "taylor-3": ("taylor", {"order": 3}),
    "chebyshev": ("chebyshev", None),
    "chebyshev-blend": ("chebyshev", {"degree": 2, "blend": 0.3}),
}


def make(name, width=DIM):
    mixer, options = CASES[name]
    return FusedKANPredictor(PredictorConfig(width, mixer, options=options))


@pytest.fixture
def seen(monkeypatch):
    """A list that gets, for each forecast, the step, the weights and the forecast, which no fused head keeps away."""
    found, features = [], ForecastingHook._features

    def remember(self, track, call, plan):
        forecast = features(self, track, call, plan)
        found.append((call.step, None if plan is None else plan.weights[call.step], forecast))
        return forecast

    monkeypatch.setattr(ForecastingHook, "_features", remember)
    monkeypatch.setattr(FusedKANPredictor, "fuses_velocity", lambda self, ring, head=None: False)
    return found


@pytest.fixture
def computed(monkeypatch):
    """Step -> the features that were computed."""
    found, keep = {}, ForecastingHook.keep

    def remember(self, state, call, head, features, conditioning):
        found[call.step] = features.clone()
        keep(self, state, call, head, features, conditioning)

    monkeypatch.setattr(ForecastingHook, "keep", remember)
    return found


def with_shift(pipe, shift=3.0):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)


@pytest.mark.parametrize(("name", "width"), [*((name, DIM) for name in CASES), ("taylor-2", None)])
def test_weights_in_a_run(pipe, generate, seen, computed, name, width):
    with_shift(pipe)
    predictor = make(name, width)
    with lesa.enable_cache(pipe, predictor, SCHEDULE, strict=True) as cache:
        generate(pipe, TOTAL)
    assert cache.stats.predicted_steps == TOTAL - len(SCHEDULE) == len(seen)
    sigmas = pipe.scheduler.sigmas.tolist()
    for step, weights, forecast in seen:
        before = [c for c in reversed(SCHEDULE) if c < step][: predictor.config.max_history]
        levels, mixer = [sigmas[c] for c in before], predictor.config.mixer
        expected = TRANSCRIPTIONS[mixer](predictor.config.options, levels, sigmas[step], before, step, TOTAL)
        np.testing.assert_allclose(weights.anchors[0, : len(before)], expected, rtol=1e-6, atol=1e-6)
        assert weights.count.tolist() == [len(before)] * 2
        total = sum(weight * computed[c].double() for weight, c in zip(expected, before))
        torch.testing.assert_close(forecast.double(), total, rtol=1e-5, atol=1e-5 * float(total.abs().max()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_forecasts_as_the_series_of_diffusers(pipe, generate, seen, computed, order):
    with_shift(pipe)
    with lesa.enable_cache(pipe, make("taylor" if order == 1 else f"taylor-{order}"), SCHEDULE, strict=True):
        generate(pipe, TOTAL)
    series, forecasts = TaylorSeerState(torch.float64, order), {step: forecast for step, _, forecast in seen}
    for step in range(TOTAL):
        series.current_step = step
        if step in SCHEDULE:
            series.update((computed[step].double(),))
        else:
            (expected,) = series.predict()
            atol = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(forecasts[step].double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", ["linear", "taylor-3"])
def test_a_run_with_gradients_has_the_same_forecasts(pipe, seen, name):
    """It makes each forecast on its own, from the times of the run."""
    with_shift(pipe)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), lesa.enable_cache(pipe, make(name), SOME, strict=True):
            pipe.scheduler.set_timesteps(STEPS)
            for timestep in pipe.scheduler.timesteps:
                pipe.transformer(**FIRST, timestep=(timestep / 1000).expand(2))
    half = len(seen) // 2
    for (step, weights, forecast), (other_step, none, other) in zip(seen[:half], seen[half:], strict=True):
        assert step == other_step and weights is not None and none is None
        torch.testing.assert_close(other, forecast, rtol=1e-4, atol=1e-4 * float(forecast.abs().max()))


def test_a_line_is_an_untrained_newton_predictor(pipe, generate):
    outputs = []
    for predictor in (make("linear"), untrained_predictor(rank=0)):
        with lesa.enable_cache(pipe, predictor, SOME, strict=True):
            outputs.append(generate(pipe, **guided()))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_one_plan_for_each_run(pipe, generate, monkeypatch):
    made, plan = [], FusedKANPredictor.plan

    def counted(self, levels, sigmas, batch, *more, **options):
        made.append(len(sigmas))
        return plan(self, levels, sigmas, batch, *more, **options)

    monkeypatch.setattr(FusedKANPredictor, "plan", counted)
    with lesa.enable_cache(pipe, make("chebyshev"), SOME, strict=True):
        generate(pipe)
        generate(pipe)
    assert made == [STEPS - len(SOME)] * 2


@pytest.mark.parametrize("name", ["linear", "chebyshev"])
def test_other_ways_to_run_give_the_same(pipe, generate, monkeypatch, name):
    """A part of the ring in host memory, and the head computed from its weights as in a fused step."""
    outputs = []
    for bytes_, fuses in ((None, False), (400_000, False), (None, True)):
        with monkeypatch.context() as patch, lesa.enable_cache(pipe, make(name), SOME, bytes_, strict=True) as cache:
            patch.setattr(FusedKANPredictor, "fuses_velocity", lambda self, ring, head=None, fuses=fuses: fuses)
            outputs.append(generate(pipe))
        (stream,) = cache.stats.streams.values()
        assert bool(stream.ring_host_bytes) == (bytes_ is not None and name == "chebyshev")
        assert len(stream.fused) == (STEPS - len(SOME) if fuses else 0)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


def test_a_width_that_does_not_fit_is_named(pipe):
    with pytest.raises(ValueError, match=r"`predictor\.config\.feature_dim` must be the transformer's width, 128"):
        lesa.enable_cache(pipe, make("taylor", 64), SOME)
