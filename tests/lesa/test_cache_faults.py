"""Faults that change little: in one sample, in one stream, in runs that begin late, in inputs that are freed."""

import copy
import gc
import math
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from scipy.interpolate import BSpline

import lesa
import small_pipelines as small
from driven_loops import (
    FIRST,
    REST,
    SECOND,
    SOME,
    STEPS,
    BareScheduler,
    call_arguments,
    drive,
    guided,
    ours,
)
from lesa.demo import digits
from lesa_kernels import FusedKANPredictor, PredictorConfig, TieredRing
from predictors import DIM, make_predictor, rings_of, untrained_predictor

# One sample, or one stream, of several


class Sick(FusedKANPredictor):
    """Its forecasts for low noise are spoiled in one place of one of its rings."""

    def forward(self, ring, sigma):
        forecast = super().forward(ring, sigma)
        if sigma < 0.55 and ring is self.rings[self.stream]:  # steps 6 and later
            forecast[self.place] = self.value
        return forecast


def sick(place, value=math.nan, stream=0):
    predictor = make_predictor()
    predictor.rings = rings_of(predictor)
    predictor.__class__, predictor.place, predictor.value, predictor.stream = Sick, place, value, stream
    return predictor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, (0, 0, 0), (1, -1, -1)], ids=str)
def test_one_sample_that_is_not_finite_is_enough_to_compute(pipe, place, value):
    plain = drive(pipe, lambda step: [("it", FIRST)])["it"]
    with (
        pytest.warns(RuntimeWarning, match="the forecast was not finite"),
        lesa.enable_cache(pipe, sick(place, value), SOME) as handle,
    ):
        outputs = drive(pipe, lambda step: [("it", FIRST)])["it"]
    stream = handle.stats.streams["main"]
    assert stream.predicted == [3, 4] and stream.computed == [s for s in range(STEPS) if s not in (3, 4)]
    assert stream.reasons[6] == "the forecast was not finite"
    assert all(torch.equal(outputs[step], plain[step]) for step in stream.computed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, -1, -1)], ids=str)
def test_one_number_of_the_velocity_that_is_not_finite_is_enough_to_compute(fresh_pipe, place, value):
    """The head may overflow where the forecast of the features does not."""
    transformer, heads = fresh_pipe.transformer, []
    plain = drive(fresh_pipe, lambda step: [("it", FIRST)])["it"]

    def overflow(module, args, output):
        heads.append(len(heads))
        if heads[-1] == 6:
            output[place] = value
        return output

    transformer.proj_out.register_forward_hook(overflow)
    with (
        pytest.warns(RuntimeWarning, match="the forecast was not finite"),
        lesa.enable_cache(fresh_pipe, make_predictor(), SOME) as handle,
    ):
        outputs = drive(fresh_pipe, lambda step: [("it", FIRST)])["it"]
    stream = handle.stats.streams["main"]
    assert stream.predicted == [3, 4] and stream.reasons[6] == "the forecast was not finite"
    assert all(torch.equal(outputs[step], plain[step]) for step in stream.computed)


@pytest.mark.parametrize("sick_stream", [0, 1])
def test_one_stream_that_is_not_finite_ends_the_forecasts_of_all(pipe, sick_stream):
    def calls(step):
        return [("main", FIRST), ("main-2", SECOND)]

    plain = drive(pipe, calls)
    with (
        pytest.warns(RuntimeWarning, match="the forecast was not finite"),
        lesa.enable_cache(pipe, sick(1, stream=sick_stream), SOME) as handle,
    ):
        outputs = drive(pipe, calls)
    predicted = {"main": [3, 4] + [6] * sick_stream, "main-2": [3, 4]}  # the first one's step 6 was over by then
    earlier = "an earlier forecast was not finite"
    for name, stream in handle.stats.streams.items():
        assert stream.predicted == predicted[name]
        assert stream.computed == [s for s in range(STEPS) if s not in predicted[name]]
        assert all(torch.equal(outputs[name][step], plain[name][step]) for step in stream.computed)
        assert {stream.reasons[step] for step in (7, 8, 10, 11)} == {earlier}
    first, second = handle.stats.streams.values()
    assert (first, second)[sick_stream].reasons[6] == "the forecast was not finite"
    assert second.reasons[6] == ("the forecast was not finite" if sick_stream else earlier)
    assert (handle.stats.computed_steps, handle.stats.predicted_steps) == (STEPS - 2, 2)


def test_finite_forecasts_whose_sum_is_beyond_half_precision_are_good(fresh_pipe):
    pipe = fresh_pipe.to(torch.float16)
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, 1000.0)
    call = {n: v.half() if isinstance(v, torch.Tensor) else v for n, v in FIRST.items()}
    with lesa.enable_cache(pipe, make_predictor(), SOME, strict=True) as handle:
        outputs = drive(pipe, lambda step: [("it", call)])["it"]
    assert handle.stats.streams["main"].predicted == REST
    assert outputs[3].isfinite().all() and outputs[3].sum().isinf()


def with_weights_of(mixer):
    return {name for name, _ in untrained_predictor(mixer=mixer).named_parameters()}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("mixer", "name"), [(mixer, name) for mixer in ("newton", "dense") for name in sorted(with_weights_of(mixer))]
)
def test_one_weight_that_is_not_finite_is_refused_by_the_name_of_its_tensor(pipe, mixer, name, value):
    predictor = untrained_predictor(mixer=mixer)
    with torch.no_grad():
        predictor.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"`predictor` must have finite weights, but got NaN or Inf in {name}[. ]"):
        lesa.enable_cache(pipe, predictor, SOME)


# Runs that begin late, with predictors that were trained

BEGIN, TOTAL = 12, 24


def weights_of(predictor):
    return {name: weight.detach().double().numpy() for name, weight in predictor.named_parameters()}


def hidden_units(weights, stage, inputs, config):
    """Splines of uniform knots on [-1, 1], by scipy, and SiLU, at the squashed inputs."""
    u = np.tanh(weights["in_weight"][stage] @ inputs + weights["in_bias"][stage])
    order, knots = config.spline_order, np.arange(-config.spline_order, config.grid_size + config.spline_order + 1)
    splines = (BSpline(-1 + knots * 2 / config.grid_size, c, order) for c in weights["spline"][stage])
    return np.array([spline(x) for spline, x in zip(splines, u)]) + u / (1 + np.exp(-u))


def forecast_by_hand(predictor, history, sigma):
    """The forecast `[B, T, D]` in float64, from the formulas.

    Args:
        predictor: whose weights and configuration are taken.
        history: pairs of noise level and features, newest first.
        sigma: the noise level to forecast at.
    """
    config, weights = predictor.config, weights_of(predictor)
    stage = sum(sigma <= bound for bound in config.stage_bounds)
    history = history[: config.history_length[stage]]
    levels, features = [level for level, _ in history], [f.double().numpy() for _, f in history]
    inputs = np.zeros(weights["in_weight"].shape[2])
    inputs[: len(levels)] = [5 * (sigma - level) for level in levels]
    if config.mixer == "dense":
        alpha = hidden_units(weights, stage, inputs, config) @ weights["out_weight"][stage] + weights["out_bias"][stage]
        mixed, first = weights["mix_bias"][stage], sum(config.history_length[:stage])
        for age in range(config.history_length[stage]):
            mixed = mixed + features[min(age, len(features) - 1)] @ weights["mix_weight"][first + age].T
        return torch.tensor(features[0] + alpha * mixed)
    inputs[-1] = 2 * sigma - 1
    units = hidden_units(weights, stage, inputs, config)
    forecast, residual, column, product = features[0], 0.0, features, 1.0
    for tap in range(1, len(features)):
        column = [(a - b) / (levels[i] - levels[i + tap]) for i, (a, b) in enumerate(zip(column, column[1:]))]
        product *= sigma - levels[tap - 1]
        coefficient = weights["out_weight"][stage, tap - 1] @ units + weights["out_bias"][stage, tap - 1]
        forecast = forecast + coefficient * column[0] * product
        residual = residual + (column[0] * product) @ weights["down"][stage, :, tap - 1].T
    return torch.tensor(forecast + residual @ weights["up"][stage].T + weights["up_bias"][stage])


class Late:
    """Runs an image-to-image pipeline that executes the last half of the scheduler's steps, and watches it.

    Attributes:
        features: by step, what the last block gave; of the steps that ran it.
        velocities: by step, what the transformer gave.
    """

    def __init__(self, pipe, shift=1.0):
        self.pipe = FluxImg2ImgPipeline(
            **{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
        )
        self.pipe.set_progress_bar_config(disable=True)
        even = np.linspace(1, 1 / TOTAL, TOTAL)[BEGIN:]
        self.sigmas = (shift * even / (1 + (shift - 1) * even)).tolist()  # as the flow-matching scheduler shifts them
        self.features, self.velocities = {}, []

    def run(self, generate, **options):
        def keep(module, args, output):
            self.features[len(self.velocities)] = output[1]

        transformer = self.pipe.transformer
        spies = [
            transformer.single_transformer_blocks[-1].register_forward_hook(keep),
            transformer.register_forward_hook(lambda module, args, output: self.velocities.append(output[0])),
        ]
        image = {"image": torch.zeros(2, 3, 16, 16), "latents": FIRST["hidden_states"]}
        try:
            generate(self.pipe, steps=TOTAL, strength=0.5, **image, **options)
        finally:
            for spy in spies:
                spy.remove()

    @torch.no_grad()
    def velocity(self, features, step):
        """Through the model's own head."""
        transformer, timestep = self.pipe.transformer, torch.full((2,), self.sigmas[step] * 1000)
        conditioning = transformer.time_text_embed(timestep, FIRST["pooled_projections"])
        return transformer.proj_out(transformer.norm_out(features.float(), conditioning))


def bundled(name, **changes):
    predictor = FusedKANPredictor.from_pretrained(digits.WEIGHTS / name)
    predictor.config = PredictorConfig(**{**predictor.config.to_dict(), **changes})
    return predictor


@pytest.mark.parametrize(("name", "shift"), [("newton-9", 1.0), ("newton-9", 3.0), ("dense-9", 1.0)])
def test_a_run_that_begins_late_has_the_schedulers_noise_levels_from_there_on(pipe, generate, name, shift):
    predictor, late, held = bundled(name), Late(pipe, shift), []
    rings = rings_of(predictor)

    def look(pipe, step, timestep, tensors):
        _, sigmas, count = rings[0].newest_first()
        held.append(sigmas[: count[0], 0].tolist())
        return {}

    with lesa.enable_cache(late.pipe, predictor, SOME) as handle:
        late.run(generate, callback_on_step_end=look)
    assert handle.stats.streams["main"].predicted == REST and handle.stats.runs == 1
    history = []
    for step, sigma in enumerate(late.sigmas):
        if step in SOME:
            history.insert(0, (sigma, late.features[step]))
        else:
            forecast = forecast_by_hand(predictor, history, sigma)
            expected, unforecast = late.velocity(forecast, step), late.velocity(history[0][1], step)
            torch.testing.assert_close(late.velocities[step], expected, rtol=2e-4, atol=2e-4)
            assert (unforecast - expected).abs().max() > 0.01  # what repeats the newest features is told from it
            if predictor.config.history == "steps":
                history.insert(0, (sigma, forecast))
        assert held[step] == pytest.approx([level for level, _ in history[: rings[0].capacity]], abs=1e-6)


def test_errors_of_a_run_that_begins_late_are_those_at_its_noise_levels(pipe, generate):
    config = bundled("newton-9").config
    predictor, late = bundled("newton-9", schedule_errors=(0.05,) * len(config.schedule)), Late(pipe)
    with lesa.enable_cache(late.pipe, predictor, lesa.ErrorControl(0.2)) as handle:
        late.run(generate)
    stream, history = handle.stats.streams["main"], []
    assert [*stream.errors] == stream.computed[2:] and len(stream.errors) > 1
    for step in stream.computed:
        if len(history) > 1:
            error = late.velocity(forecast_by_hand(predictor, history, late.sigmas[step]), step)
            error, truth = error - late.velocities[step], late.velocities[step]
            worst = max((e.norm() / t.norm()).item() for e, t in zip(error, truth))
            assert stream.errors[step] == pytest.approx(worst, rel=1e-2)
        history.insert(0, (late.sigmas[step], late.features[step]))


def test_a_run_that_begins_late_has_the_trained_gaps_where_nothing_is_measured(fresh_pipe, generate):
    """By hand: linear between the noise levels of the trained steps, and the nearest step of the run."""
    changes = {"schedule": (0, 2, 7, 13, 19, 26, 34, 41, 47), "schedule_errors": (0.05,) * 9}
    changes["schedule_sigmas"] = tuple(1 - step / 50 for step in changes["schedule"])
    late = Late(fresh_pipe)
    fresh_pipe.transformer.proj_out.register_forward_hook(lambda *_: None)
    with lesa.enable_cache(late.pipe, bundled("newton-9", **changes), lesa.ErrorControl(0.01)) as handle:
        late.run(generate)
    stream = handle.stats.streams["main"]
    # From 0.5, 4.857 gaps after the beginning, to 5.857, which is at 0.343; and so on.
    assert stream.computed == [0, 4, 7, 10] and stream.errors == {}


# Where the run is


class Loop:
    """A hand-written loop over steps of the scheduler, which is told where to begin, like a pipeline's."""

    def __init__(self, pipe, positioned=True):
        self.pipe, self.positioned = pipe, positioned
        if positioned:
            pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
            self.timesteps = pipe.scheduler.timesteps
        else:
            self.timesteps = torch.linspace(1000, 1000 / STEPS, STEPS)
            pipe.scheduler = BareScheduler(timesteps=self.timesteps, num_inference_steps=STEPS, config={})

    @torch.no_grad()
    def run(self, indices, off=None):
        """Outputs by index; `off` says by how much the timesteps of some indices are off."""
        outputs, off = {}, off or {}
        if self.positioned:
            self.pipe.scheduler._step_index = None  # diffusers has no public way to begin again
            self.pipe.scheduler.set_begin_index(indices[0])
        for index in indices:
            t = self.timesteps[index]
            latents = FIRST["hidden_states"] * (1 - 0.5 * index / STEPS)
            timestep = (t + off.get(index, 0.0)).expand(2) / 1000
            outputs[index] = self.pipe.transformer(**{**FIRST, "hidden_states": latents, "timestep": timestep})[0]
            if self.positioned:
                self.pipe.scheduler.step(outputs[index], t, latents)
        return outputs


@pytest.mark.parametrize("positioned", [True, False], ids=["positioned", "bare"])
@pytest.mark.parametrize("off", [0.5, -0.5, 0.05, -0.05])
def test_a_timestep_that_is_a_little_off_is_not_located(pipe, positioned, off):
    loop = Loop(pipe, positioned)
    plain = loop.run(range(STEPS), {6: off})
    with (
        pytest.warns(RuntimeWarning, match="not one of the scheduler's") as caught,
        lesa.enable_cache(pipe, make_predictor(), SOME) as handle,
    ):
        outputs = loop.run(range(STEPS), {6: off})
    assert sum("not one of the scheduler's" in str(w.message) for w in caught) == 1
    stream = handle.stats.streams["main"]
    if positioned:
        assert handle.stats.unlocated == 1 and stream.reasons[7] == "no history"
        assert (stream.computed, stream.predicted) == ([0, 1, 2, 5, 7, 9], [3, 4, 8, 10, 11])
    else:  # who has no position is not known to have done step 6: what follows would leave out a step
        assert handle.stats.unlocated == 6
        assert (stream.computed, stream.predicted) == ([0, 1, 2, 5], [3, 4])
    computed = {*range(STEPS)} - {*stream.predicted}
    assert all(torch.equal(outputs[step], plain[step]) for step in computed)


@pytest.mark.parametrize("off", [0.5, 0.05, None])
def test_a_family_whose_timesteps_are_the_schedulers_own_is_as_exact(off):
    case = small.ALL["sd3"]
    pipe = case.build()
    call = {
        "hidden_states": torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(1, 5, small.TEXT_DIM),
        "pooled_projections": torch.randn(1, small.TEXT_DIM),
        "return_dict": False,
    }
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(small.DIM, rank=0, hidden=4))
    with lesa.enable_cache(pipe, predictor, [0, 1, 2], strict=True) as handle, torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        for step, t in enumerate(pipe.scheduler.timesteps):
            wrong = off is not None and step == 6
            if wrong:
                with pytest.raises(RuntimeError, match="not one of the scheduler's"):
                    pipe.transformer(**call, timestep=(t + off).expand(1))
                break
            velocity = pipe.transformer(**call, timestep=t.expand(1))[0]
            pipe.scheduler.step(velocity, t, call["hidden_states"])
    assert handle.stats.streams["main"].predicted == [*range(3, 6 if off else STEPS)]


@pytest.mark.parametrize("positioned", [True, False], ids=["positioned", "bare"])
@pytest.mark.parametrize("first, second", [(range(8), range(4, STEPS)), (range(STEPS), range(1, STEPS))], ids=str)
def test_a_loop_that_begins_again_at_a_later_index_is_a_new_run(pipe, positioned, first, second):
    loop = Loop(pipe, positioned)
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        alone = loop.run(second)
    predictor = make_predictor()
    rings = rings_of(predictor)
    with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
        loop.run(first)
        outputs = loop.run(second)
        held = rings[1].newest_first()[1][:4, 0].tolist()
    assert [*outputs] == [*alone] and all(torch.equal(outputs[index], alone[index]) for index in second)
    assert handle.stats.runs == 2 and handle.stats.unlocated == 0
    stream, executed = handle.stats.streams["main"], [*range(len(second))]
    assert stream.computed == [step for step in SOME if step in executed]
    assert stream.predicted == [step for step in executed if step not in SOME]
    newest = [1 - second[step] / STEPS for step in reversed(stream.computed)]
    assert held == pytest.approx(newest[:4], abs=1e-6)


def test_noise_levels_of_a_scheduler_without_any_are_parts_of_its_training_steps(pipe):
    timesteps = torch.linspace(500, 50, 10)
    pipe.scheduler = BareScheduler(
        timesteps=timesteps, num_inference_steps=10, config=SimpleNamespace(num_train_timesteps=500)
    )
    predictor = make_predictor(history_length=6)
    rings = rings_of(predictor)
    with lesa.enable_cache(pipe, predictor, [0, 1, 4, 7], strict=True) as handle, torch.no_grad():
        for t in timesteps:
            pipe.transformer(**FIRST, timestep=t.expand(2) / 1000)
        assert rings[0].newest_first()[1][:4, 0].tolist() == pytest.approx([0.3, 0.6, 0.9, 1.0])
    assert handle.stats.streams["main"].computed == [0, 1, 4, 7]


# What the head is conditioned on


def distilled_call(guidance, samples=(0, 1), pooled=None):
    """Arguments of a small transformer of FLUX that takes guidance, for some of two samples."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 6, 4 * small.LATENT_CHANNELS, generator=generator)
    prompts = small.embeddings(2)
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")
    return {
        "hidden_states": latents[[*samples]],
        "encoder_hidden_states": prompts["prompt_embeds"][[*samples]],
        "pooled_projections": prompts["pooled_prompt_embeds"][[*samples]] if pooled is None else pooled,
        "img_ids": torch.stack([torch.zeros(2, 3), rows, columns], -1).reshape(-1, 3),
        "txt_ids": torch.zeros(small.TEXT_TOKENS, 3),
        "guidance": torch.tensor(guidance),
        "return_dict": False,
    }


@pytest.fixture(scope="module")
def distilled():
    pipe = small.ALL["flux distilled"].build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipe


def distilled_run(pipe, call):
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(small.DIM, rank=0, hidden=4))
    with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
        outputs = drive(pipe, lambda step: [("it", call)])["it"]
    assert handle.stats.streams["main"].predicted == REST
    return torch.stack([*outputs.values()])  # [S, B, T, O]


def test_one_row_of_guidance_is_for_every_sample(distilled):
    one, two = (distilled_run(distilled, distilled_call(guidance)) for guidance in ([3.5], [3.5, 3.5]))
    assert one.shape == two.shape and one.shape[1] == 2
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert (one - distilled_run(distilled, distilled_call([7.0]))).abs().amax((1, 2, 3)).min() > 1e-3


def test_one_row_of_pooled_text_is_for_every_sample(distilled):
    pooled = small.embeddings(2)["pooled_prompt_embeds"]
    one, two = (
        distilled_run(distilled, distilled_call([3.5, 2.0], pooled=rows)) for rows in (pooled[:1], pooled[[0, 0]])
    )
    assert one.shape == two.shape
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    other = distilled_run(distilled, distilled_call([3.5, 2.0], pooled=pooled[[0, 1]]))
    assert (one - other)[:, 1].abs().amax((1, 2)).min() > 1e-3


def test_every_sample_has_its_own_guidance(distilled):
    both = distilled_run(distilled, distilled_call([1.5, 7.0]))
    for sample, guidance in enumerate((1.5, 7.0)):
        alone = distilled_run(distilled, distilled_call([guidance], (sample,)))
        torch.testing.assert_close(both[:, sample : sample + 1], alone, rtol=0, atol=1e-5)
    assert (both - distilled_run(distilled, distilled_call([7.0, 1.5]))).abs().amax((2, 3)).min() > 1e-3


class Freed:
    """Makes a tensor after the one before it was let go. If nobody else holds that one, the new one often has its id.

    Attributes:
        tensor: the latest.
        same: how often a tensor had the id of the one before it.
    """

    def __init__(self):
        self.tensor, self.same = None, 0

    def make(self, make):
        before, self.tensor, others = id(self.tensor), None, []
        while self.tensor is None:
            made = make()
            if id(made) == before or len(others) == 99:  # the others fill the places before it
                self.tensor = made
            others.append(made)
        self.same += id(self.tensor) == before
        return self.tensor


def test_an_id_is_used_again_where_nobody_holds_the_tensor():
    freed = Freed()
    for number in range(5):
        freed.make(lambda number=number: torch.full((2, 3), float(number)))
    assert freed.same > 0


@torch.no_grad()
def freed_loop(pipe, name, value_at, change=(0,)):
    """A loop in which only the argument `name` changes: `value_at` makes a new one at each step in `change`.

    Nothing here holds the old tensor when the new one is made. Returns the outputs.
    """
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    call, freed, outputs = {n: v for n, v in FIRST.items() if n != name}, Freed(), []
    for step, t in enumerate(pipe.scheduler.timesteps):
        if step in change:
            freed.make(lambda step=step: value_at(step))
        outputs.append(pipe.transformer(**call, **{name: freed.tensor}, timestep=t.expand(2) / 1000)[0])
        pipe.scheduler.step(outputs[-1], t, FIRST["hidden_states"])
    return outputs


@pytest.mark.parametrize("change", [range(STEPS), (0, 4), (0, 7), (0, 6, 7, 8)], ids=["all", "4", "7", "6 to 8"])
def test_conditioning_that_is_made_in_the_place_of_the_old_is_seen(pipe, change):
    """Every forecast is the newest features, so that the conditioning alone makes the velocity."""
    predictor = untrained_predictor()
    torch.nn.init.zeros_(predictor.out_bias)
    base, features = FIRST["pooled_projections"], []
    grab = pipe.transformer.single_transformer_blocks[-1].register_forward_hook(
        lambda module, args, output: features.append(output[1])
    )
    with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
        outputs = freed_loop(pipe, "pooled_projections", lambda step: base * (1 + 0.2 * step), change)
    grab.remove()
    assert handle.stats.streams["main"].predicted == REST
    transformer = pipe.transformer
    for step in REST:
        pooled = base * (1 + 0.2 * max(c for c in change if c <= step))
        newest = features[sum(s <= step for s in SOME) - 1]
        with torch.no_grad():
            conditioning = transformer.time_text_embed(torch.full((2,), 1000 * (1 - step / STEPS)), pooled)
            expected = transformer.proj_out(transformer.norm_out(newest, conditioning))
        torch.testing.assert_close(outputs[step], expected, rtol=0, atol=2e-5)


def test_a_text_that_is_made_in_the_place_of_the_old_is_another(pipe):
    texts = {0: FIRST, 6: SECOND}

    def value_at(step):
        return texts[step]["encoder_hidden_states"].clone()

    plain = freed_loop(pipe, "encoder_hidden_states", value_at, (0, 6))
    with (
        pytest.warns(RuntimeWarning, match="the text changed"),
        lesa.enable_cache(pipe, make_predictor(), SOME) as handle,
    ):
        outputs = freed_loop(pipe, "encoder_hidden_states", value_at, (0, 6))
    stream = handle.stats.streams["main"]
    assert stream.computed == [0, 1, 2, 5, 6, 9] and stream.reasons[6] == "the text changed"
    assert torch.equal(outputs[6], plain[6])


# Statistics and memory


def test_stats_of_a_changed_shape_are_those_of_the_ring_that_is_there(pipe):
    large, small_one = call_arguments(), call_arguments(tokens=16)
    predictor, alive = make_predictor(), []
    make_ring, storages = predictor.make_ring, []

    def remember(*args):
        gc.collect()
        alive.append(sum(storage() is not None for storage in storages))
        ring = make_ring(*args)
        storages.append(weakref.ref(ring.storage))
        return ring

    predictor.make_ring = remember
    with (
        pytest.warns(RuntimeWarning, match="the shape changed"),
        lesa.enable_cache(pipe, predictor, SOME) as handle,
    ):
        drive(pipe, lambda step: [("it", large if step < 6 else small_one)])
    assert alive == [0, 0]  # the old ring is freed before there is a new one
    bytes_of_small = 4 * (2 * (16 * DIM * 4 + 4)) + 2 * 8
    assert handle.stats.ring_device_bytes == handle.stats.streams["main"].ring_device_bytes == bytes_of_small


@pytest.mark.parametrize("schedule", ["list", "control"])
def test_the_rings_of_all_streams_are_freed_when_a_run_has_ended(pipe, generate, schedule):
    predictor = bundled("newton-9", schedule_errors=(0.05,) * len(bundled("newton-9").config.schedule))
    rings = rings_of(predictor)
    with lesa.enable_cache(pipe, predictor, SOME if schedule == "list" else lesa.ErrorControl()) as handle:
        generate(pipe, **guided())
        storages = [weakref.ref(ring.storage) for ring in rings]
        taken = sum(ring.device_nbytes for ring in rings)
        rings.clear()
        gc.collect()
        assert [storage() for storage in storages] == [None, None]
        assert handle.stats.ring_device_bytes == taken > 0
        assert handle.stats.ring_host_bytes == 0


def test_every_stream_has_the_whole_budget(pipe):
    predictor = make_predictor()
    calls = [("first", FIRST), ("second", SECOND)]
    with lesa.enable_cache(pipe, predictor, SOME) as handle:
        expected = drive(pipe, lambda step: calls)
        whole = handle.stats.streams["main"].ring_device_bytes
    rings = rings_of(predictor)
    with lesa.enable_cache(pipe, predictor, SOME, max_device_bytes=whole * 3 // 4) as handle:
        outputs = drive(pipe, lambda step: calls)
        assert len(rings) == 2 and all(isinstance(ring, TieredRing) for ring in rings)
        for ring, stream in zip(rings, handle.stats.streams.values()):
            assert stream.ring_device_bytes == ring.device_nbytes <= whole * 3 // 4
            assert stream.ring_host_bytes == ring.host_nbytes > 0
        assert handle.stats.ring_device_bytes == sum(ring.device_nbytes for ring in rings)
        assert handle.stats.ring_host_bytes == sum(ring.host_nbytes for ring in rings)
    for name, output in expected.items():
        assert all(torch.equal(outputs[name][step], output[step]) for step in range(STEPS))


def test_stats_are_of_the_latest_run_only(pipe, generate):
    """But for the runs and the calls that belonged to none, which are counted since the cache is on."""
    with lesa.enable_cache(pipe, make_predictor(), [0, 1, 2, 5, 40]) as handle:
        generate(pipe, **guided())
        assert sorted(handle.stats.streams) == ["cond", "uncond"] and len(handle.stats.notes) == 1
        with pytest.warns(RuntimeWarning, match="not one of the scheduler's"), torch.no_grad():
            pipe.transformer(**FIRST, timestep=torch.full((2,), 0.4321))
        generate(pipe, steps=41)
        assert [*handle.stats.streams] == ["cond"] and handle.stats.notes == []
        assert handle.stats.streams["cond"].computed == [0, 1, 2, 5, 40]
        assert (handle.stats.runs, handle.stats.unlocated) == (2, 1)
        assert sorted(handle.stats.streams["cond"].seconds) == [*range(41)]


def changed_text(step):
    return FIRST if step < 6 else FIRST | {"encoder_hidden_states": SECOND["encoder_hidden_states"]}


def test_strict_raises_where_the_text_changed(pipe):
    with (
        lesa.enable_cache(pipe, make_predictor(), SOME, strict=True) as handle,
        pytest.raises(RuntimeError, match="a step can't be predicted: the text changed"),
    ):
        drive(pipe, lambda step: [("it", changed_text(step))])
    assert handle.stats.streams["main"].predicted == [3, 4]


def test_a_head_that_is_replaced_while_the_cache_is_on_is_computed_or_an_error(fresh_pipe):
    transformer, calls = fresh_pipe.transformer, lambda step: [("it", FIRST)]
    plain, another = drive(fresh_pipe, calls)["it"], copy.deepcopy(transformer.norm_out)
    reason = "the output head did not run where lesa sees it"
    handle = lesa.enable_cache(fresh_pipe, make_predictor(), SOME, strict=True)
    transformer.norm_out, watched = another, transformer.norm_out
    with handle, pytest.raises(RuntimeError, match=f"a step can't be predicted: {reason}"):
        drive(fresh_pipe, calls)
    assert handle.stats.streams["main"].computed == [0]
    transformer.norm_out = watched
    handle = lesa.enable_cache(fresh_pipe, make_predictor(), SOME)
    transformer.norm_out = another
    with handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = drive(fresh_pipe, calls)["it"]
    assert [message for message in ours(caught) if reason in message] == ours(caught)[:1]
    stream = handle.stats.streams["main"]
    assert stream.computed == [*range(STEPS)] and {stream.reasons[step] for step in REST} == {"no history"}
    assert all(torch.equal(outputs[step], plain[step]) for step in range(STEPS))


# Loops that do not step the scheduler


@pytest.mark.parametrize("begins", [None, 0, 3], ids=["no begin index", "begins at 0", "begins at 3"])
@pytest.mark.parametrize("streams", [1, 2])
def test_a_loop_that_never_steps_the_scheduler(pipe, begins, streams):
    """As the community pipelines for inversion do: they set the begin index, and move the latents by themselves."""
    scheduler = pipe.scheduler

    @torch.no_grad()
    def drive_by_hand():
        scheduler.set_timesteps(STEPS)
        if begins is not None:
            scheduler.set_begin_index(begins)
        outputs = []
        for step, t in enumerate(scheduler.timesteps[begins or 0 :]):
            for call in (FIRST, SECOND)[:streams]:
                latents = call["hidden_states"] * (1 - 0.5 * step / STEPS)
                arguments = {**call, "hidden_states": latents, "timestep": (t / 1000).expand(len(latents))}
                outputs.append(pipe.transformer(**arguments)[0])
        return torch.stack(outputs)

    plain, steps = drive_by_hand(), STEPS - (begins or 0)
    with lesa.enable_cache(pipe, make_predictor(), range(STEPS), strict=True):
        assert torch.equal(drive_by_hand(), plain)
    with lesa.enable_cache(pipe, make_predictor(), [0, 1, 4], strict=True) as handle:
        for _ in range(2):
            forecast = drive_by_hand()
            assert [*handle.stats.streams] == ["main", "main-2"][:streams]
            for stream in handle.stats.streams.values():
                assert stream.computed == [0, 1, 4] and len(stream.predicted) == steps - 3
    computed = [step * streams + i for step in (0, 1, 4) for i in range(streams)]
    assert torch.equal(forecast[computed], plain[computed]) and not torch.equal(forecast, plain)


@pytest.mark.parametrize("begin", [None, STEPS - 1])
def test_a_loop_whose_timesteps_rise_is_noticed(pipe, begin):
    """As inversion runs: from the picture to the noise. Each call looks like a run of its own."""
    scheduler = pipe.scheduler
    with lesa.enable_cache(pipe, make_predictor(), SOME, strict=True):
        scheduler.set_timesteps(STEPS)
        if begin is not None:
            scheduler.set_begin_index(begin)
        with pytest.raises(RuntimeError, match="not one of the scheduler's, or not its current one"), torch.no_grad():
            for t in scheduler.timesteps.flip(0):
                pipe.transformer(**{**FIRST, "timestep": (t / 1000).expand(len(FIRST["hidden_states"]))})
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in [*scheduler.timesteps.flip(0), *scheduler.timesteps]:  # there and back
            pipe.transformer(**{**FIRST, "timestep": (t / 1000).expand(len(FIRST["hidden_states"]))})
        if begin is None:
            assert handle.stats.streams["main"].computed[-len(SOME) :] == SOME
            assert handle.stats.streams["main"].predicted == REST


def test_a_call_for_warm_up_in_the_first_step_is_noticed(pipe):
    other = call_arguments((3, 8), seed=9)
    other["encoder_hidden_states"] = FIRST["encoder_hidden_states"]

    def loop(warm_up):
        calls = [("warm-up", other)] if warm_up else []
        return drive(pipe, lambda step: [*(calls if step == 0 else []), ("call", FIRST)])["call"]

    plain = loop(warm_up=False)
    noticed = pytest.raises(RuntimeError, match="called twice")
    with lesa.enable_cache(pipe, make_predictor(), [0, 1, 5], strict=True), noticed:
        loop(warm_up=True)
    with lesa.enable_cache(pipe, make_predictor(), [0, 1, 5]) as handle:
        with pytest.warns(RuntimeWarning, match="called twice with the same text"):
            cached = loop(warm_up=True)
        assert handle.stats.streams["main"].computed == [0, 1, 2, 5]
    assert torch.equal(cached[2], plain[2])
    with lesa.enable_cache(pipe, make_predictor(), SOME, strict=True) as handle:  # two samples of one prompt
        drive(pipe, lambda step: [("one", other), ("two", FIRST)])
        assert [*handle.stats.streams] == ["main", "main-2"] and handle.stats.predicted_steps == len(REST)
