"""The weights of all forecasts of a run are made at once, and every forecast is what the predictor itself gives."""

import gc
import warnings
import weakref

import pytest
import torch
from diffusers import PNDMScheduler
from torch.nn.utils import parametrize

import lesa
from driven_loops import FIRST, SECOND, SOME, STEPS, call_arguments, drive, guided
from lesa.cache import conditioning
from lesa.cache.forecasting import ForecastingHook
from lesa.cache.planning import Planner, can_plan, falling, times_at
from lesa.demo import digits
from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig
from lesa_kernels.stream import head_sums
from predictors import make_predictor


def trained(**options):
    """A predictor whose weights, all of them, change its forecasts; its stages change in the middle of a run."""
    predictor = make_predictor(**{"stage_bounds": (0.7, 0.4), **options})
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return predictor


@pytest.fixture
def plans(monkeypatch):
    """A list that gets, for each plan, the number of steps in it."""
    made, plan = [], FusedKANPredictor.plan

    def counted(self, levels, sigmas, batch):
        made.append(len(sigmas))
        return plan(self, levels, sigmas, batch)

    monkeypatch.setattr(FusedKANPredictor, "plan", counted)
    return made


@pytest.fixture
def compared(monkeypatch):
    """A list that gets the steps that were forecast by a plan. Each forecast is compared with the predictor's own.

    The output head runs in the model's modules, so that there is a forecast to compare.
    """
    steps, features = [], ForecastingHook._features

    def compare(self, track, call, plan):
        forecast = features(self, track, call, plan)
        own = self.predictor(track.ring, call.sigma)
        if own.isfinite().all():
            torch.testing.assert_close(forecast, own, rtol=2e-5, atol=2e-5)
        else:
            torch.testing.assert_close(forecast.isnan(), own.isnan())
        assert plan is not None
        steps.append(call.step)
        return forecast

    monkeypatch.setattr(ForecastingHook, "_features", compare)
    monkeypatch.setattr(ForecastingHook, "_reads_head", lambda *arguments: False)
    return steps


def test_one_plan_for_each_run_and_stream(pipe, generate, plans, compared):
    with lesa.enable_cache(pipe, trained(), SOME, strict=True):
        generate(pipe)
        assert plans == [STEPS - len(SOME)] and len(compared) == sum(plans)
        generate(pipe, **guided())
        assert plans == [STEPS - len(SOME)] * 3 and len(compared) == sum(plans)


@pytest.mark.parametrize("tolerance", [0.1, 1.0, 100.0])
def test_one_plan_for_each_gap_under_error_control(pipe, generate, plans, compared, tolerance):
    predictor = FusedKANPredictor.from_pretrained(digits.WEIGHTS / "newton-9")
    errors = tuple(0.01 for _ in predictor.config.schedule)
    object.__setattr__(predictor.config, "schedule_errors", errors)
    with lesa.enable_cache(pipe, predictor, lesa.ErrorControl(tolerance), strict=True) as cache:
        generate(pipe, 50)
    (stream,) = cache.stats.streams.values()
    gaps = 1 + sum(step < 49 for step in stream.computed[2:])  # the steps up to the third computed one are one gap
    assert len(plans) == gaps
    assert len(compared) == len(stream.predicted) + len(stream.errors) > 0


@pytest.mark.parametrize("total", [STEPS, 30])
def test_one_plan_for_a_history_that_holds_forecasts_too(pipe, generate, plans, compared, total):
    predictor = trained(history="steps", history_length=(2, 4, 3))
    with lesa.enable_cache(pipe, predictor, SOME, strict=True):
        generate(pipe, total)
    assert plans == [total - len(SOME)] and len(compared) == sum(plans)


def interval(step):
    return [("a", FIRST, "a"), ("b", SECOND, "b")] if 3 <= step <= 8 else [("a", FIRST, "a")]


def pause(step):
    return [("it", FIRST)] if step not in (4, 5, 6) else []


def other_text(step):
    return [("it", FIRST if step < 6 else {**FIRST, "encoder_hidden_states": SECOND["encoder_hidden_states"]})]


def other_image(step):
    return [("it", FIRST if step < 7 else call_arguments(tokens=16))]


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (interval, "the first call of this stream"),
        (pause, None),
        (other_text, "the text changed"),
        (other_image, "the shape changed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_histories_that_no_schedule_tells(pipe, plans, compared, calls, reason):
    with lesa.enable_cache(pipe, trained(), SOME) as cache:
        for _ in range(2):  # the second run begins in the state that the first one left
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", f"lesa: {reason}")
                drive(pipe, calls)
    reasons = {why for stream in cache.stats.streams.values() for why in stream.reasons.values()}
    assert reasons == {"scheduled"} | ({reason} if reason else set())
    assert len(compared) == 2 * sum(len(stream.predicted) for stream in cache.stats.streams.values()) >= 8
    assert len(plans) <= 8


def test_a_step_that_is_computed_after_all_is_planned_with(pipe, plans, compared, monkeypatch):
    why_not = ForecastingHook._why_not

    def but_the_seventh(self, stream, call):
        return ("of a test", "None.") if call.step == 7 else why_not(self, stream, call)

    monkeypatch.setattr(ForecastingHook, "_why_not", but_the_seventh)
    with lesa.enable_cache(pipe, trained(), SOME), pytest.warns(RuntimeWarning, match="of a test"):
        drive(pipe, lambda step: [("it", FIRST)])
    assert plans == [STEPS - len(SOME), 3] and compared == [3, 4, 6, 8, 10, 11]


RISING = [1.0, 0.8, 0.6, 0.9, 0.7, 0.5, 0.3, 0.1]


def test_the_part_of_a_run_over_which_the_level_falls():
    parts = [[*falling(RISING, step)] for step in range(len(RISING))]
    assert parts == [[0, 1, 2]] * 3 + [[3, 4, 5, 6, 7]] * 5
    assert times_at(RISING, 1) == [1.0, 0.8, 0.6, 0.0] and times_at(RISING, 3) == [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    assert [*falling([0.5, 0.5, 0.2], 0)] == [0, 1, 2] and [*falling([0.1, 0.2, 0.3], 1)] == [1]


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_rising_noise_level_begins_a_new_history(fresh_pipe, monkeypatch, with_gradients):
    """A series over step numbers counts the steps of the part of the run over which the level falls."""
    made, forecasts, plan, forward = {}, [], FusedKANPredictor.plan, FusedKANPredictor.forward

    def seen(self, levels, sigmas, batch, *args, **more):
        weights = plan(self, levels, sigmas, batch, *args, **more)
        made.update({round(s, 3): each.anchors[0].tolist() for s, each in zip(sigmas, weights)})
        return weights

    def forecast(self, ring, sigma, times):
        forecasts.append((round(sigma, 3), times))
        return forward(self, ring, sigma, times)

    monkeypatch.setattr(FusedKANPredictor, "plan", seen)
    monkeypatch.setattr(FusedKANPredictor, "forward", forecast)
    predictor = FusedKANPredictor(PredictorConfig(mixer="taylor"))
    with lesa.enable_cache(fresh_pipe, predictor, [0, 1, 3, 4]) as cache, torch.set_grad_enabled(with_gradients):
        fresh_pipe.scheduler.set_timesteps(sigmas=RISING)
        for timestep in fresh_pipe.scheduler.timesteps:
            fresh_pipe.transformer(**FIRST, timestep=(timestep / 1000).expand(2))
    assert cache.stats.predicted_steps == 4
    if with_gradients:
        times = [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
        expected = [(0.6, [1.0, 0.8, 0.6, 0.0]), (0.5, times), (0.3, times), (0.1, times)]
        assert [sigma for sigma, _ in forecasts] == [sigma for sigma, _ in expected]
        for (_, found), (_, wanted) in zip(forecasts, expected):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))
    else:
        expected = {0.6: [2.0, -1.0], 0.5: [2.0, -1.0], 0.3: [3.0, -2.0], 0.1: [4.0, -3.0]}
        assert made.keys() == expected.keys()
        for sigma, weights in expected.items():
            torch.testing.assert_close(torch.tensor(made[sigma]), torch.tensor(weights), rtol=1e-4, atol=1e-4)


TWO_RISES = [1.0, 0.6, 0.5, 0.9, 0.7, 0.4, 0.8, 0.7]


def run_of(pipe, sigmas, skipped=()):
    pipe.scheduler.set_timesteps(sigmas=sigmas)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        with pipe.transformer.cache_context("other" if step in skipped else "it"):
            pipe.transformer(**FIRST, timestep=(timestep / 1000).expand(2))


@pytest.mark.parametrize("mixer", ["taylor", "linear"])  # with the times of the run, and without
def test_the_first_step_after_a_rise_is_computed(fresh_pipe, monkeypatch, mixer):
    """The level rises at step 3, and stays below that of the computed step before it."""
    histories, plan = {}, FusedKANPredictor.plan

    def seen(self, levels, sigmas, *args, **more):
        histories.update({round(s, 3): [round(level, 3) for level in each] for s, each in zip(sigmas, levels)})
        return plan(self, levels, sigmas, *args, **more)

    monkeypatch.setattr(FusedKANPredictor, "plan", seen)
    predictor = FusedKANPredictor(PredictorConfig(mixer=mixer))
    with lesa.enable_cache(fresh_pipe, predictor, [0, 4, 6], strict=True) as cache, torch.no_grad():
        run_of(fresh_pipe, TWO_RISES)
    (stream,) = cache.stats.streams.values()
    assert stream.reasons == dict.fromkeys([0, 4, 6], "scheduled") | {3: "the noise level rose"}
    assert histories == {0.6: [1.0], 0.5: [1.0], 0.4: [0.7, 0.9], 0.7: [0.8]}
    assert cache.stats.notes == ["the noise level rises in the run, so the first step after each rise is computed: 3"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_a_number_of_steps_some_are_those_after_a_rise(fresh_pipe, count):
    with lesa.enable_cache(fresh_pipe, steps=count, strict=True) as cache, torch.no_grad():
        run_of(fresh_pipe, TWO_RISES)
    (stream,) = cache.stats.streams.values()
    assert len(stream.computed) == max(count, 3) and {0, 3, 6} <= {*stream.computed}
    steps = ",".join(map(str, stream.computed))
    assert cache.stats.notes[0].endswith(f"{len(stream.computed)} of 8 steps are computed: {steps}")


def test_a_stream_without_a_call_at_the_rise_is_computed_at_the_next_one(fresh_pipe):
    predictor = FusedKANPredictor(PredictorConfig(mixer="linear"))
    warned = pytest.warns(RuntimeWarning, match="the noise level rose: computing. Pass a list of steps that has this")
    with lesa.enable_cache(fresh_pipe, predictor, [0, 6]) as cache, torch.no_grad(), warned:
        run_of(fresh_pipe, TWO_RISES, skipped=[3])
    stream = cache.stats.streams["it"]
    assert stream.reasons == {0: "scheduled", 4: "the noise level rose", 6: "scheduled"}
    refused = pytest.raises(RuntimeError, match="a step can't be predicted: the noise level rose")
    with lesa.enable_cache(fresh_pipe, predictor, [0, 6], strict=True), torch.no_grad(), refused:
        run_of(fresh_pipe, TWO_RISES, skipped=[3])


@pytest.mark.parametrize("mixer", ["l2p", "newton"])
def test_parameters_in_float64_make_weights_that_kernels_take(mixer):
    predictor = FusedKANPredictor(PredictorConfig(4, mixer))
    if mixer == "newton":
        predictor.double()
    planner = Planner(predictor, predictor.make_ring(2, 3))
    planner.push(1.0)
    with torch.no_grad():
        plan = planner.plan(1, [1.0, 0.5, 0.25], {0})
    assert [weights.anchors.dtype for weights in plan.weights.values()] == [torch.float32] * 2


def test_after_a_forecast_that_is_not_finite_nothing_is_planned(pipe, plans):
    with lesa.enable_cache(pipe, make_predictor(below=0.45), SOME), pytest.warns(RuntimeWarning, match="not finite"):
        drive(pipe, lambda step: [("it", FIRST)])
    assert plans == [STEPS - len(SOME)]


@pytest.mark.parametrize("change", ["in_place", "data", "replaced"])
def test_parameters_that_change_in_a_run(pipe, plans, compared, change):
    predictor = trained()

    def calls(step):
        if step == 6:
            if change == "in_place":
                predictor.out_bias.mul_(1.5)
            elif change == "data":
                predictor.up.data = predictor.up.data * 3
            else:
                predictor.in_weight = torch.nn.Parameter(predictor.in_weight.detach() * 0.5)
        return [("it", FIRST)]

    with lesa.enable_cache(pipe, predictor, SOME, strict=True):
        drive(pipe, calls)
    assert plans == [7, 5] and len(compared) == 7


def test_a_scheduler_that_repeats_a_step(fresh_pipe, plans, compared):
    fresh_pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    with lesa.enable_cache(fresh_pipe, trained(), SOME):
        drive(fresh_pipe, lambda step: [("it", FIRST)])
    assert len(plans) == 1 and len(compared) >= 7


@torch.no_grad()
def test_a_loop_without_steps_of_the_scheduler(pipe, plans, compared):
    with lesa.enable_cache(pipe, trained(), SOME, strict=True):
        pipe.scheduler.set_timesteps(STEPS)
        for timestep in pipe.scheduler.timesteps:
            pipe.transformer(**FIRST, timestep=(timestep / 1000).expand(2))
    assert plans == [STEPS - len(SOME)] and len(compared) == sum(plans)


def test_the_host_knows_the_levels_of_the_ring():
    predictor = trained()
    sigmas = [0.9, 0.7, 0.7, 1 / 3, 0.3, 0.1, 0.05, 0.8, 0.5, 0.5 - 1e-9, 0.2]
    ring = predictor.make_ring(1, 1)
    planner = Planner(predictor, ring)
    for sigma in sigmas:
        ring.push(torch.zeros(1, 1, predictor.config.feature_dim), sigma)
        planner.push(sigma)
        _, levels, count = ring.newest_first()
        held = torch.tensor(planner._levels)
        assert count == len(held)
        assert torch.equal(levels[: len(held), 0], held)


def test_who_is_not_planned(pipe, generate, plans):
    class Other(FusedKANPredictor):
        def forward(self, ring, sigma):
            return super().forward(ring, sigma)

    other, exchanged = trained(), trained()
    other.__class__ = Other
    exchanged.forward = lambda ring, sigma: FusedKANPredictor.forward(exchanged, ring, sigma)
    dense = make_predictor(mixer="dense", rank=0)
    hooked, hooked_before, parametrized = trained(), trained(), trained()
    hooked.register_forward_hook(lambda module, inputs, output: output)
    hooked_before.register_forward_pre_hook(lambda module, inputs: None)
    parametrize.register_parametrization(parametrized, "out_bias", torch.nn.Identity())
    for predictor in (other, exchanged, dense, hooked, hooked_before, parametrized):
        assert not can_plan(predictor)
        with lesa.enable_cache(pipe, predictor, SOME, strict=True) as cache:
            generate(pipe)
        assert cache.stats.predicted_steps == STEPS - len(SOME)
    with torch.enable_grad(), lesa.enable_cache(pipe, trained(), SOME) as cache:
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:  # the pipeline itself switches gradients off
            output = pipe.transformer(**FIRST, timestep=(timestep / 1000).expand(2))[0]
    assert cache.stats.predicted_steps == 1 and output.requires_grad
    assert not plans


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("most", [2**25, 1])
def test_sums_of_the_head_are_made_at_once(pipe, generate, monkeypatch, rank, most):
    calls, seen, velocity_with = [], [], FusedKANPredictor.velocity_with

    def counted(*arguments):
        calls.append(len(arguments[0].scale))
        return head_sums(*arguments)

    def compare(self, ring, weights, head, low_rank, sums):
        for got, wanted in zip(sums, head_sums(head, low_rank, weights.stage)):
            assert (got is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        seen.append(1)
        return velocity_with(self, ring, weights, head, low_rank, sums)

    def fuses(self, ring, head=None):
        asked.append(head is not None)
        return True

    asked = []
    monkeypatch.setattr(FusedKANPredictor, "velocity_with", compare)
    monkeypatch.setattr(FusedKANPredictor, "fuses_velocity", fuses)
    monkeypatch.setattr(FusedKANPredictor, "reads_sums", lambda self, ring: True)
    monkeypatch.setattr(conditioning, "head_sums", counted)
    monkeypatch.setattr(conditioning, "_MOST_BYTES", most)
    predictor = trained(rank=rank)
    with lesa.enable_cache(pipe, predictor, SOME, strict=True) as cache:
        fused = generate(pipe)
    assert len(seen) == STEPS - len(SOME) == len(cache.stats.streams["cond"].fused)
    assert asked == [False, True]  # with the ring, and with the first head; the answer may need the residual
    assert calls == ([2 * len(seen)] if most > 1 else [2] * len(seen))
    monkeypatch.undo()
    monkeypatch.setattr(ForecastingHook, "_reads_head", lambda *arguments: False)
    with lesa.enable_cache(pipe, predictor, SOME, strict=True):
        torch.testing.assert_close(generate(pipe), fused, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("change", ["in_place", "data", "replaced"])
def test_sums_of_a_head_whose_weights_change_in_a_run(fresh_pipe, monkeypatch, change):
    seen, velocity_with, projection = [], FusedKANPredictor.velocity_with, fresh_pipe.transformer.proj_out

    def compare(self, ring, weights, head, low_rank, sums):
        assert head.weight is projection.weight
        for got, wanted in zip(sums, head_sums(head, low_rank, weights.stage)):
            if wanted is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        seen.append(1)
        return velocity_with(self, ring, weights, head, low_rank, sums)

    def calls(step):
        if step == 6 and change == "in_place":
            projection.weight.mul_(1.5)
        elif step == 6 and change == "data":
            projection.weight.data = projection.weight.data * 1.5
        elif step == 6:
            projection.weight = torch.nn.Parameter(projection.weight * 1.5)
        return [("it", FIRST)]

    monkeypatch.setattr(FusedKANPredictor, "velocity_with", compare)
    monkeypatch.setattr(FusedKANPredictor, "fuses_velocity", lambda self, ring, head=None: True)
    monkeypatch.setattr(FusedKANPredictor, "reads_sums", lambda self, ring: True)
    with lesa.enable_cache(fresh_pipe, trained(), SOME, strict=True):
        drive(fresh_pipe, calls)
    assert len(seen) == STEPS - len(SOME)


def test_a_plan_keeps_no_ring(pipe):
    predictor = trained()
    ring = FeatureRing(predictor.config.max_history, 1, 1, predictor.config.feature_dim)
    planner, known = Planner(predictor, ring), weakref.ref(ring)
    del ring
    gc.collect()
    assert known() is None and planner.predictor is predictor
