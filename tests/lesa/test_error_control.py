"""`lesa.ErrorControl`: the steps that a run computes by the errors of its forecasts."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lesa
from driven_loops import guided
from lesa.cache import device_values, observed
from lesa.cache.error_control import MOST_STRETCH, ControlledSteps
from lesa.cache.run import Run
from lesa.demo import digits, photos
from lesa.inputs import collate
from lesa.schedule import Schedule
from lesa.training import training_run as training
from lesa_kernels import FusedKANPredictor, PredictorConfig
from predictors import with_nan

STEPS = 50
TRAINED = Schedule(
    (0, 2, 7, 13, 19, 26, 34, 41, 47), sigmas=tuple(1 - s / STEPS for s in (0, 2, 7, 13, 19, 26, 34, 41, 47))
)
SIGMAS = [1 - step / STEPS for step in range(STEPS)]
ERRORS = (0.0, 0.2, 0.04, 0.04, 0.04, 0.04, 0.05, 0.06, 0.1)


@pytest.fixture(scope="module")
def _digits_pipeline(whole_pipeline):
    """What the bundled predictors were trained on."""
    return whole_pipeline


def bundled(name="newton-9", model=digits, **changes):
    predictor = FusedKANPredictor.from_pretrained(model.WEIGHTS / name)
    predictor.config = replace(predictor.config, **changes)
    return predictor


def spoiled(amount, **changes):
    """A predictor whose forecasts are further off than it says."""
    predictor = bundled(**changes)
    with torch.no_grad():
        predictor.out_bias[:, 1:] += amount
    return predictor


def all_chosen(steps, errors, total=STEPS):
    """Goes through the run; `errors` gives the error at a step."""
    while max(steps.chosen) < total:
        steps.choose_next(errors(max(steps.chosen)))
    return sorted(steps.chosen - {total})


def typical_at(sigma):
    """By hand: linear between the trained steps."""
    pairs = [*zip(TRAINED.sigmas, ERRORS)][1:]
    for (high, first), (low, second) in zip(pairs, pairs[1:]):
        if low <= sigma <= high:
            return first + (second - first) * (high - sigma) / (high - low)
    return pairs[0][1] if sigma > pairs[0][0] else pairs[-1][1]


@pytest.mark.parametrize(
    ("stretch", "error", "expected"),
    [
        (1.0, 0.1, 1.0),  # as is typical
        (1.0, 0.4, 0.5),
        (1.0, 0.2, 2**-0.5),
        (1.0, 0.05, 2**0.5),
        (2.0, 0.4, 1.0),  # typical for a gap of twice the length
        (0.5, 0.1, 0.5),
        (1.0, 0.0, MOST_STRETCH),
        (1.0, 1e9, 1 / MOST_STRETCH),
        (1.0, math.inf, 1 / MOST_STRETCH),
    ],
)
def test_a_gap_is_as_long_as_its_error_would_be_tolerated(stretch, error, expected):
    assert lesa.ErrorControl(growth=2).next_stretch(stretch, error, 0.1) == pytest.approx(expected)


def test_the_tolerance_is_a_part_of_the_typical_error():
    assert lesa.ErrorControl(0.25, growth=1).next_stretch(1.0, 0.05, 0.1) == pytest.approx(0.5)
    assert lesa.ErrorControl(4.0, growth=4).next_stretch(1.0, 0.1, 0.1) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tolerance", 0), ("tolerance", math.nan), ("tolerance", "1"), ("longest", 0), ("longest", 1.5), ("growth", 0)],
)
def test_arguments_are_checked(name, value):
    with pytest.raises((ValueError, TypeError), match=f"`{name}` must .* but got .*"):
        lesa.ErrorControl(**{name: value})


def test_typical_errors_give_the_trained_schedule():
    steps = ControlledSteps(lesa.ErrorControl(), TRAINED, ERRORS, SIGMAS)
    assert steps.chosen == {0, 2, 7}
    assert all_chosen(steps, lambda step: typical_at(SIGMAS[step])) == [*TRAINED.steps]


def test_hard_samples_have_more_steps_and_easy_ones_fewer():
    def chosen(hardness, longest=STEPS):
        """Errors grow with the gap, as they are taken to."""
        control = lesa.ErrorControl(longest=longest)
        steps = ControlledSteps(control, TRAINED, ERRORS, SIGMAS)

        def error(step):
            before = max(steps.chosen - {step})
            return hardness * typical_at(SIGMAS[step]) * (steps._place(step) - steps._place(before)) ** control.growth

        return all_chosen(steps, error)

    counts = [len(chosen(hardness)) for hardness in (0.01, 0.5, 1, 2, 100)]
    assert counts == sorted(counts) and len({*counts}) == 5
    gaps = [b - a for a, b in zip(chosen(0.01, longest=8), [*chosen(0.01, longest=8)[1:], STEPS])]
    assert max(gaps) == 8


def test_an_unknown_error_leaves_the_trained_gap():
    steps = ControlledSteps(lesa.ErrorControl(), TRAINED, ERRORS, SIGMAS)
    steps.choose_next(None)
    assert max(steps.chosen) == 13


@pytest.mark.parametrize("total", [1, 2, 3, 7, 28, 200])
def test_runs_of_other_lengths_are_controlled_by_noise_level(total):
    sigmas = [1 - step / total for step in range(total)]
    steps = ControlledSteps(lesa.ErrorControl(longest=total), TRAINED, ERRORS, sigmas)
    chosen = all_chosen(steps, lambda step: typical_at(sigmas[step]), total)
    assert chosen[0] == 0 and chosen[-1] < total
    if total >= 28:
        assert len(chosen) == pytest.approx(len(TRAINED), abs=1)


def test_a_run_computes_its_control_s_steps(pipe, generate):
    predictor = bundled(schedule_errors=ERRORS)
    counts = []
    for tolerance in (0.1, 1.0, 100.0):
        with lesa.enable_cache(pipe, predictor, lesa.ErrorControl(tolerance), strict=True) as cache:
            generate(pipe, STEPS)
        stream = cache.stats.streams["cond"]
        counts.append(len(stream.computed))
        assert sorted(stream.computed + stream.predicted) == [*range(STEPS)]
        assert [*stream.errors] == stream.computed[2:]
        assert {*stream.reasons.values()} == {"scheduled"}
        assert max(b - a for a, b in zip(stream.computed, [*stream.computed[1:], STEPS])) <= 12
    assert counts[0] > counts[1] > counts[2]


def test_a_worse_predictor_computes_more(pipe, generate):
    counts = []
    for amount in (0.0, 0.5):
        with lesa.enable_cache(pipe, spoiled(amount, schedule_errors=ERRORS), lesa.ErrorControl()) as cache:
            generate(pipe, STEPS)
        counts.append(cache.stats.computed_steps)
    assert counts[1] >= counts[0] + 3


def test_a_lower_tolerance_is_closer_to_the_plain_run(pipe, generate):
    predictor = FusedKANPredictor(bundled(schedule_errors=ERRORS).config)  # repeats the newest features
    plain, found = generate(pipe, STEPS), []
    for tolerance in (0.1, 100.0):
        with lesa.enable_cache(pipe, predictor, lesa.ErrorControl(tolerance)) as cache:
            found.append((generate(pipe, STEPS) - plain).square().mean().item())
        found[-1] = (found[-1], max(list(cache.stats.streams["cond"].errors.values())[1:]))
    assert found[0][0] < found[1][0] and found[0][1] < found[1][1]


def test_errors_are_those_of_the_model_s_own_head(pipe, generate):
    """The features that the model computed, forecast again from those before, through the model's own modules."""
    predictor, transformer = bundled(schedule_errors=ERRORS), pipe.transformer
    seen = []

    def keep(call, features, conditioning):
        seen.append((features.clone(), conditioning.clone()))

    observer = SimpleNamespace(on_run=lambda run, computed: None, keep=keep)
    with observed(pipe, observer, predictor, lesa.ErrorControl()) as stats:
        generate(pipe, STEPS)
    stats, sigmas = stats.streams["cond"], pipe.scheduler.sigmas.tolist()
    assert len(seen) == len(stats.computed) > 5
    batch, tokens, _ = seen[0][0].shape
    ring = predictor.make_ring(batch, tokens, seen[0][0].dtype, seen[0][0].device)

    def velocity(features, conditioning):
        return transformer.proj_out(transformer.norm_out(features, conditioning)).double()

    for number, (step, (features, conditioning)) in enumerate(zip(stats.computed, seen)):
        if number > 1:  # from two steps before, like a run's first forecast
            with torch.no_grad():
                truth = velocity(features, conditioning)
                error = velocity(predictor(ring, sigmas[step]), conditioning) - truth
            expected = max((e.norm() / t.norm()).item() for e, t in zip(error, truth))
            assert stats.errors[step] == pytest.approx(expected, rel=2e-2)
        ring.push(features, sigmas[step])


def test_the_worst_sample_decides(pipe, generate):
    found = {}
    predictor = bundled(schedule_errors=ERRORS)
    for name, labels, seed in (("first", (3,), 0), ("second", (8,), 1), ("both", (3, 8), 0)):
        with lesa.enable_cache(pipe, predictor, lesa.ErrorControl()) as cache:
            generate(pipe, STEPS, labels, seed)
        found[name] = cache.stats.streams["cond"].errors
    step = 7  # until then their steps are the same
    assert found["both"][step] == pytest.approx(max(found["first"][step], found["second"][step]), rel=1e-2)


def test_a_run_of_another_length(pipe, generate):
    with lesa.enable_cache(pipe, bundled(schedule_errors=ERRORS), lesa.ErrorControl(), strict=True) as cache:
        generate(pipe, 28)
    stream = cache.stats.streams["cond"]
    assert 5 <= len(stream.computed) <= 20
    assert sorted(stream.computed + stream.predicted) == [*range(28)]


def test_each_run_is_controlled_anew(pipe, generate):
    with lesa.enable_cache(pipe, bundled(schedule_errors=ERRORS), lesa.ErrorControl()) as cache:
        latents = generate(pipe, STEPS)
        steps = cache.stats.streams["cond"].computed
        assert torch.equal(generate(pipe, STEPS), latents)
    assert cache.stats.streams["cond"].computed == steps


def test_streams_share_their_steps():
    pipe = photos.load_pipeline()
    call = collate(photos.inputs_for([0, 7]))
    generator = [torch.Generator().manual_seed(number) for number in range(2)]
    predictor = bundled("photos-newton-9", photos, schedule_errors=ERRORS)
    with lesa.enable_cache(pipe, predictor, lesa.ErrorControl(), strict=True) as cache:
        pipe(**call, num_inference_steps=STEPS, generator=generator, output_type="latent")
    first, second = cache.stats.streams.values()
    assert first.computed == second.computed and first.predicted == second.predicted
    assert [*first.errors] == [*second.errors] == first.computed[2:]
    assert first.errors != second.errors
    steps = ControlledSteps(lesa.ErrorControl(), _schedule_of(predictor), ERRORS, pipe.scheduler.sigmas.tolist()[:-1])
    chosen = all_chosen(steps, lambda step: max(first.errors[step], second.errors[step]))
    assert chosen == first.computed


class Uneven(FusedKANPredictor):
    """The forecast for step 7, which is not used but for its error, is spoiled in one sample of one stream."""

    def make_ring(self, *args):
        self.rings.append(super().make_ring(*args))
        return self.rings[-1]

    def forward(self, ring, sigma):
        forecast = super().forward(ring, sigma)
        if 0.85 < sigma < 0.87 and self.spoiled is not None and ring is self.rings[self.spoiled[0]]:
            signs = 1.0 - 2.0 * (torch.arange(forecast.shape[-1]) % 2)
            forecast[self.spoiled[1]] += self.amount * signs
        return forecast


TYPICAL = 0.4


def uneven(spoiled, amount=100.0):
    """Its errors are small for the typical ones that it claims, but for the spoiled stream and sample."""
    known = {"schedule": TRAINED.steps, "schedule_sigmas": TRAINED.sigmas, "schedule_errors": (0.0, *[TYPICAL] * 8)}
    predictor = bundled(**known)
    predictor.__class__, predictor.rings = Uneven, []
    predictor.spoiled, predictor.amount = spoiled, amount
    return predictor


@pytest.mark.parametrize("amount", [100.0, math.nan, math.inf])
@pytest.mark.parametrize("spoiled", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_the_worst_stream_and_sample_decides_of_the_next_gap_alone(pipe, generate, spoiled, amount):
    predictor = uneven(spoiled, amount)
    with lesa.enable_cache(pipe, predictor, lesa.ErrorControl(growth=1.0), strict=True) as cache:
        generate(pipe, STEPS, **guided())
    streams = [*cache.stats.streams.values()]
    errors = [stream.errors[7] for stream in streams]
    worst, best = errors[spoiled[0]], errors[1 - spoiled[0]]
    assert best < TYPICAL / 2 and (worst > TYPICAL * 2 if math.isfinite(amount) else not math.isfinite(worst))
    for stream in streams:
        # Step 7 is at 2 gaps. Half a gap more is sigma 0.8, step 10. Then the errors are small, and the gap is twice
        # the trained one, to 4.5 gaps and sigma 0.55: step 22. The best stream alone would lead to 4 gaps, step 19.
        assert stream.computed[:5] == [0, 2, 7, 10, 22]
        assert stream.errors[10] < 0.5 * TYPICAL / 2


def test_errors_that_all_streams_have_small_make_the_gap_long(pipe, generate):
    with lesa.enable_cache(pipe, uneven(None), lesa.ErrorControl(growth=1.0), strict=True) as cache:
        generate(pipe, STEPS, **guided())
    assert [stream.computed[:4] for stream in cache.stats.streams.values()] == [[0, 2, 7, 19]] * 2


def _schedule_of(predictor):
    return Schedule(predictor.config.schedule, sigmas=predictor.config.schedule_sigmas)


def test_an_error_that_is_not_finite_makes_the_gap_short(pipe, generate):
    # NaN in the forecast for the third computed step, which is used for its error only.
    predictor = with_nan(bundled(schedule_errors=ERRORS), below=0.87, above=0.85)
    with lesa.enable_cache(pipe, predictor, lesa.ErrorControl()) as cache:
        assert generate(pipe, STEPS).isfinite().all()
    stream = cache.stats.streams["cond"]
    assert math.isnan(stream.errors[7])
    with lesa.enable_cache(pipe, bundled(schedule_errors=ERRORS), lesa.ErrorControl()) as cache:
        generate(pipe, STEPS)
    assert stream.computed[3] - 7 < cache.stats.streams["cond"].computed[3] - 7


def test_everything_is_computed_when_forecasts_are_not_finite(pipe, generate):
    predictor = bundled(schedule_errors=ERRORS)
    plain = generate(pipe, STEPS)
    predictor.forward = lambda ring, sigma: torch.full((ring.batch, ring.tokens, ring.dim), math.nan)
    with (
        lesa.enable_cache(pipe, predictor, lesa.ErrorControl()) as cache,
        pytest.warns(RuntimeWarning, match="not finite"),
    ):
        assert torch.equal(generate(pipe, STEPS), plain)
    assert cache.stats.computed_steps == STEPS


def test_the_trained_gaps_stand_where_the_head_is_not_plain(fresh_pipe, generate):
    fresh_pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: output)
    with lesa.enable_cache(fresh_pipe, bundled(schedule_errors=ERRORS), lesa.ErrorControl(0.01)) as cache:
        generate(fresh_pipe, STEPS)
    stream = cache.stats.streams["cond"]
    assert not stream.errors and tuple(stream.computed) == bundled().config.schedule
    assert any("errors are not measured" in note for note in cache.stats.notes)


class Sent:
    """The event of a value that arrives when somebody waits for it."""

    arrived = False

    def synchronize(self):
        self.arrived = True

    def query(self):
        return self.arrived


def copied_late(value, slots):
    """Stands for `copy_to_host`, as on a GPU."""
    return value.detach().reshape(1).float(), Sent()


class StopError(Exception):
    pass


def test_a_late_value_that_ends_the_run_leads_to_computing(pipe, generate, monkeypatch):
    """As on a GPU: what says that another scheduler drives the transformer arrives when the next gap is chosen."""
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    plain = generate(other, STEPS)
    monkeypatch.setattr(device_values, "copy_to_host", copied_late)
    monkeypatch.setattr(Run, "value_of", lambda self, timestep, waits: None)

    def stop(pipe, step, timestep, tensors):
        if step == 7:
            raise StopError
        return tensors

    with lesa.enable_cache(pipe, bundled(schedule_errors=ERRORS), lesa.ErrorControl()) as cache:
        with pytest.raises(StopError):  # nobody tells lesa that the run of a copy has failed
            generate(copy.copy(pipe), STEPS, callback_on_step_end=stop)
        with pytest.warns(RuntimeWarning, match="not one of the scheduler's"):
            latents = generate(other, STEPS)
        assert cache.stats.unlocated > 0
        assert (latents - plain).square().mean() < 0.1  # its first steps may have been forecast before that was known


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("streams", [1, 2])
def test_errors_of_an_abandoned_run_do_not_reach_the_next(pipe, generate, monkeypatch, streams, late):
    """The run is left after step 7. Its large error is on the host, or comes to it later, as from a GPU."""
    options = guided() if streams == 2 else {}
    predictor = uneven((0, 1))

    def stop(pipe, step, timestep, tensors):
        if step == 7:
            raise StopError
        return tensors

    if late:
        monkeypatch.setattr(device_values, "copy_to_host", copied_late)
    with lesa.enable_cache(pipe, predictor, lesa.ErrorControl(growth=1.0), strict=True) as cache:
        for _ in range(2):
            with pytest.raises(StopError):
                generate(pipe, STEPS, callback_on_step_end=stop, **options)
            spoiled, predictor.spoiled = predictor.spoiled, None
            generate(pipe, STEPS, **options)
            assert [stream.computed[:4] for stream in cache.stats.streams.values()] == [[0, 2, 7, 19]] * streams
            assert all(stream.errors[7] < TYPICAL / 2 for stream in cache.stats.streams.values())
            predictor.spoiled = spoiled
            predictor.rings.clear()


def test_a_dense_predictor_is_refused(pipe):
    with pytest.raises(
        ValueError, match="`ErrorControl` needs a predictor that does not use its own.*`history='anchors'`"
    ):
        lesa.enable_cache(pipe, bundled("dense-9"), lesa.ErrorControl())


def test_a_shared_transformer_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "_parallel_config", object())
    with pytest.raises(ValueError, match="`ErrorControl` cannot be used where several processes share"):
        lesa.enable_cache(pipe, bundled(schedule_errors=ERRORS), lesa.ErrorControl())


def test_a_predictor_that_knows_no_typical_errors_is_refused(pipe):
    with pytest.raises(ValueError, match="has typical errors, as `schedule_errors`.*`lesa.train"):
        lesa.enable_cache(pipe, bundled(schedule_errors=None), lesa.ErrorControl())


def config_with(**changes):
    known = {"num_inference_steps": STEPS, "schedule": TRAINED.steps, "schedule_sigmas": TRAINED.sigmas}
    return PredictorConfig(8, **{**known, **changes})


def test_typical_errors_are_saved(tmp_path):
    config = config_with(schedule_errors=[*ERRORS])
    assert config.schedule_errors == ERRORS
    assert PredictorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    FusedKANPredictor(config).save_pretrained(tmp_path)
    assert FusedKANPredictor.from_pretrained(tmp_path).config == config


def test_a_config_of_before_has_none(tmp_path):
    FusedKANPredictor(config_with()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["schedule_errors"]
    file.write_text(json.dumps(values))
    assert FusedKANPredictor.from_pretrained(tmp_path).config == config_with()


@pytest.mark.parametrize(
    "wrong", [ERRORS[1:], (*ERRORS[1:], -0.1), (*ERRORS[1:], math.nan), 0.1, ("0.1",) * 9], ids=str
)
def test_typical_errors_are_checked(wrong):
    with pytest.raises((ValueError, TypeError), match="`schedule_errors` must .* but got .*"):
        config_with(schedule_errors=wrong)


def test_typical_errors_need_a_schedule():
    with pytest.raises(ValueError, match="`schedule_errors` must have one error for each of the 0 steps"):
        PredictorConfig(8, schedule_errors=ERRORS)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("error control")
    return lesa.record(digits.load_pipeline(), digits.inputs_for(range(6)), folder, 12, batch_size=6, progress=False)


QUICK = {"schedule": [0, 1, 4, 8], "epochs": 2, "batch_size": 4, "progress": False}


def errors_by_hand(predictor, trajectories):
    """By trajectory, the error at each computed step from the second on: from the true steps before, head by hand."""
    steps, found = QUICK["schedule"], []
    for trajectory in trajectories:
        of_one = []
        for number, step in enumerate(steps[1:], start=1):
            ring = predictor.make_ring(1, trajectory.features.shape[1], torch.float32, torch.device("cpu"))
            for earlier in steps[:number]:
                ring.push(trajectory.features[None, earlier].float(), trajectory.sigmas[earlier].item())
            with torch.no_grad():
                forecast = predictor(ring, trajectory.sigmas[step].item())[0]

            def velocity(features, step=step, trajectory=trajectory):
                normed = torch.nn.functional.layer_norm(
                    features.float(), features.shape[-1:], eps=trajectories.head_eps
                )
                modulated = normed * (1 + trajectory.scale[step].float()) + trajectory.shift[step].float()
                return modulated @ trajectories.head_weight.float().T + trajectories.head_bias.float()

            truth = velocity(trajectory.features[step])
            of_one.append(((velocity(forecast) - truth).norm() / truth.norm()).item())
        found.append(of_one)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("validation_fraction", [0.0, 0.5])
def test_training_measures_the_typical_errors(recording, validation_fraction, pipe):
    predictor = lesa.train(recording, validation_fraction=validation_fraction, **QUICK)
    errors, expected = predictor.config.schedule_errors, errors_by_hand(predictor, recording)
    if validation_fraction:
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        expected = expected[order[:3]]
    middle = expected.quantile(0.5, dim=0)
    assert errors[0] == 0.0
    assert errors[1:] == pytest.approx(middle.tolist(), rel=1e-3)


def test_of_two_streams_the_worse_one_is_typical(tmp_path):
    """Whichever of them comes first."""
    inputs = []
    for labels in ((3, 0), (0, 5), (8, 0)):
        first, second = digits.inputs_for(labels)
        negative = {f"negative_{name}": second[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        inputs.append({**first, **negative, "true_cfg_scale": 2.0})
    recording = lesa.record(digits.load_pipeline(), inputs, tmp_path, 12, batch_size=3, progress=False)
    predictor = lesa.train(recording, validation_fraction=0.0, **QUICK)
    errors = errors_by_hand(predictor, recording).reshape(3, 2, 3)  # by sample, stream and step
    assert recording.by_sample == [[0, 1], [2, 3], [4, 5]]
    first, second = errors.unbind(1)
    worse = torch.maximum(first, second)
    middle, others = worse.median(dim=0).values, (first.median(0).values, second.median(0).values)
    assert all(((middle - other) / middle).max() > 0.02 for other in others)
    assert predictor.config.schedule_errors == pytest.approx((0.0, *middle.tolist()), rel=1e-3)


def test_a_dense_training_and_another_schedule_know_none(recording):
    config = PredictorConfig(128, mixer="dense", hidden=4)
    assert lesa.train(recording, config, **QUICK).config.schedule_errors is None
    again = config_with(schedule=(0, 1), schedule_sigmas=(1.0, 0.9), num_inference_steps=12, schedule_errors=(0.0, 0.1))
    again = replace(again, feature_dim=128)
    predictor = lesa.train(recording, again, **{**QUICK, "schedule": [0, 2, 5]})
    assert len(predictor.config.schedule_errors) == 3


def test_controlled_training_is_on_gaps_of_many_lengths(recording, monkeypatch):
    seen, plan = [], training.Plan

    def spy(computed, *args, **options):
        seen.append(sorted(computed))
        return plan(computed, *args, **options)

    monkeypatch.setattr(training, "Plan", spy)
    schedule = [0, 1, 2, 5, 8]
    options = {**QUICK, "schedule": schedule, "epochs": 30, "batch_size": 8, "validation_fraction": 0.0}
    predictor = lesa.train(recording, controlled=True, **options)
    drawn = seen[:35]  # as many as there are epochs in both stages; then the errors are measured
    assert all(steps[:3] == schedule[:3] and steps[-1] < 12 for steps in drawn)
    assert min(map(len, drawn)) < len(schedule) < max(map(len, drawn))
    assert len({*map(tuple, drawn)}) > 5
    assert predictor.config.schedule == tuple(schedule)


def test_a_dense_predictor_is_not_trained_for_control(recording):
    config = PredictorConfig(128, mixer="dense", hidden=4)
    with pytest.raises(ValueError, match="`controlled` must be left out .* but got True"):
        lesa.train(recording, config, controlled=True, **QUICK)
