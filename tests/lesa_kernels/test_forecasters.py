"""Forecasters without parameters, and l2p: their weights against transcriptions in plain Python, and how they run."""

import contextlib
import copy
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forecasts import TRANSCRIPTIONS, l2p_row
from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig
from lesa_kernels.extension import extension_error
from lesa_kernels.forecasters import FORECASTERS, Forecaster, Option, Steps, forecaster_of, register
from lesa_kernels.stream import StoredFeatures, Weights, output_head, stream_forecast

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DIM = 12
TOTAL = 28
# Of a run with a shift, as a scheduler gives them: float32 numbers.
TIMES = torch.tensor([3 * s / (1 + 2 * s) for s in np.linspace(1, 1 / TOTAL, TOTAL)] + [0.0], dtype=torch.float32)
COMPUTED = [0, 1, 4, 5, 9, 11, 12, 17, 20, 21, 22, 25]

CASES = {
    "linear": ("linear", {}),
    "linear-of-one": ("linear", {"history_length": 1}),
    "linear-of-four": ("linear", {"history_length": 4}),
    "taylor": ("taylor", {}),
    "taylor-2": ("taylor", {"options": {"order": 2}}),
    "taylor-3": ("taylor", {"options": {"order": 3}}),
    "taylor-3-stages": ("taylor", {"options": {"order": 3}, "stage_bounds": (0.8,), "history_length": (2, 4)}),
    "chebyshev": ("chebyshev", {}),
    "chebyshev-0": ("chebyshev", {"options": {"degree": 0, "ridge": 1.0}}),
    "chebyshev-blend": ("chebyshev", {"options": {"degree": 3, "ridge": 1e-3, "blend": 0.4}, "history_length": 6}),
    "chebyshev-line": ("chebyshev", {"options": {"blend": 0.0}, "history_length": 1}),
    "universal": ("universal", {}),
    "universal-of-two": ("universal", {"history_length": 2}),
    "universal-of-six": ("universal", {"history_length": 6}),
    "l2p": ("l2p", {}),
    "l2p-of-three": ("l2p", {"history_length": 3}),
}
each_case = pytest.mark.parametrize("name", CASES)


def make(name, width=DIM, backend="auto", **options):
    mixer, given = CASES[name]
    predictor = FusedKANPredictor(PredictorConfig(width, mixer, **{**given, **options}), backend)
    if mixer == "l2p":
        fit_even_steps(predictor)
    return predictor


@torch.no_grad()
def fit_even_steps(predictor):
    """Gives an l2p predictor the weights of `l2p_row` for the even steps, from the computed ones before them."""
    levels = torch.zeros(predictor.level_bits.shape)
    for step in (step for step in range(2, TOTAL, 2) if step not in COMPUTED):
        before = [c for c in reversed(COMPUTED) if c < step][: predictor.config.max_history]
        predictor.rows[step, : len(before)] = torch.tensor(l2p_row(step, len(before)), dtype=torch.float64)
        levels[step, : len(before) + 1] = TIMES[[step, *before]]
    predictor.level_bits.copy_(levels.view(torch.int32))


def position(level):
    return float(np.interp(-level, -TIMES.double().numpy(), np.arange(TOTAL + 1)))


def oracle(config, levels, sigma):
    """The weights `[K]` of the forecast at `sigma` from features at `levels`, newest first, of which there are any."""
    stage = sum(sigma <= bound for bound in config.stage_bounds)
    levels = levels[: config.history_length[stage]]
    steps = [position(level) for level in levels]
    made = TRANSCRIPTIONS[config.mixer](config.options, levels, sigma, steps, position(sigma), TOTAL)
    return np.concatenate([made, np.zeros(config.max_history - len(levels))])


def histories():
    """For each predicted step of a run, and for two levels between steps: the levels before it, and its own."""
    times = TIMES.tolist()
    targets = [step for step in range(1, TOTAL) if step not in COMPUTED]
    found = [([times[c] for c in reversed(COMPUTED) if c < step], times[step]) for step in targets]
    return [*found, ([0.93, 0.951], 0.911), ([0.41, 0.5, 0.77, 0.771, 0.9], 0.33)]


def steps_of(config, pairs):
    longest = config.max_history
    rows = [[*levels[:longest], *[math.nan] * (longest - len(levels))] for levels, _ in pairs]
    count = torch.tensor([[len(levels)] for levels, _ in pairs], dtype=torch.int32)
    sigma = torch.tensor([[sigma] for _, sigma in pairs], dtype=torch.float64)
    return Steps(torch.tensor(rows, dtype=torch.float64)[:, None], count, sigma, TIMES)


@torch.no_grad()
@each_case
def test_weights_equal_the_transcription(name):
    predictor, pairs = make(name), histories()
    weights = predictor.forecaster.weights(predictor, steps_of(predictor.config, pairs))
    expected = np.stack([oracle(predictor.config, *pair) for pair in pairs])
    assert weights.anchors.dtype == torch.float64 and weights.anchors.shape == (len(pairs), 1, expected.shape[1])
    assert np.abs(weights.anchors[:, 0].numpy() - expected).max() <= 1e-10 * max(1, np.abs(expected).max())
    assert (weights.constant, weights.taps, weights.stage) == (None, None, None)
    bounds, lengths = predictor.config.stage_bounds, predictor.config.history_length
    read = [min(len(levels), lengths[sum(sigma <= b for b in bounds)]) for levels, sigma in pairs]
    assert weights.count.dtype == torch.int32 and weights.count[:, 0].tolist() == read


def test_a_line_is_what_newton_begins_with():
    newton, line = FusedKANPredictor(PredictorConfig(DIM)), make("linear")
    ring = filled(4, [0.6, 0.75, 0.8, 0.9])
    ring.storage = ring.storage.double()
    torch.testing.assert_close(line(ring, 0.5), newton.double()(ring, 0.5), rtol=1e-12, atol=1e-12)


@each_case
def test_a_plan_has_the_weights_of_each_step(name):
    predictor, pairs = make(name), histories()
    plan = predictor.plan([levels for levels, _ in pairs], [sigma for _, sigma in pairs], 3, TIMES.tolist())
    for weights, pair in zip(plan, pairs, strict=True):
        expected = torch.tensor(oracle(predictor.config, *map(rounded, pair)), dtype=torch.float64)
        wide = torch.float64 if predictor.config.mixer == "l2p" else torch.float32  # l2p has parameters, in float64
        assert weights.anchors.dtype == wide and weights.anchors.shape == (3, predictor.config.max_history)
        torch.testing.assert_close(weights.anchors.double(), expected.expand(3, -1), rtol=1e-6, atol=1e-6)
        assert (
            weights.count.tolist() == [min(len(pair[0]), predictor.config.history_length[stage(predictor, pair)])] * 3
        )


def rounded(value):
    """Noise levels as a ring stores them."""
    return torch.tensor(value, dtype=torch.float32).double().tolist()


def stage(predictor, pair):
    return sum(pair[1] <= bound for bound in predictor.config.stage_bounds)


def filled(capacity, levels, dtype=torch.float32, batch=2, tokens=5, device="cpu"):
    """A ring with features at these levels, newest first."""
    generator = torch.Generator().manual_seed(1)
    ring = FeatureRing(capacity, batch, tokens, DIM, dtype, device)
    for level in reversed(levels):
        ring.push(torch.randn(batch, tokens, DIM, generator=generator).to(device), level)
    return ring


@each_case
@pytest.mark.parametrize("times", ["tensor", "list"])
def test_outside_of_a_run(name, times):
    """In float64, and from a ring that holds more than is read."""
    predictor, levels = make(name), rounded([0.41, 0.5, 0.77, 0.8, 0.9])
    ring = filled(predictor.config.max_history + 2, [0.41, 0.5, 0.77, 0.8, 0.9])
    ring.storage = ring.storage.double()
    given = TIMES if times == "tensor" else TIMES.tolist()
    forecast = predictor(ring, 0.33, given)
    weights = torch.tensor(oracle(predictor.config, levels, rounded(0.33)))
    features = ring.newest_first()[0][: len(weights)]
    expected = torch.einsum("k,kbtd->btd", weights[: len(features)], features)
    torch.testing.assert_close(forecast, expected, rtol=1e-10, atol=1e-10)


def test_samples_of_one_batch_have_histories_of_their_own():
    predictor, ring = make("taylor-2"), FeatureRing(4, 3, 2, DIM)
    ring.storage.fill_(math.nan)
    ring.sigmas.fill_(math.nan)
    for row, levels in enumerate([[], [0.9], [0.9, 0.8, 0.7, 0.6, 0.5]]):
        for level in levels:
            ring.push(torch.randn(1, 2, DIM), level, rows=[row])
    forecast = predictor(ring, torch.tensor([0.3, 0.35, 0.4]), TIMES)
    features = ring.newest_first()[0]
    assert forecast[0].isnan().all() and torch.equal(forecast[1], features[0, 1])
    weights = torch.tensor(oracle(predictor.config, rounded([0.5, 0.6, 0.7]), rounded(0.4)), dtype=torch.float32)
    torch.testing.assert_close(forecast[2], torch.einsum("k,ktd->td", weights, features[:3, 2]), rtol=1e-5, atol=1e-5)


def test_a_run_that_nobody_describes():
    ring = filled(4, [0.5, 0.6, 0.8])
    for total in (50, 20):
        predictor = make("taylor-3", num_inference_steps=None if total == 50 else total)
        usual = torch.linspace(1, 0, total + 1)
        assert torch.equal(predictor(ring, 0.4), predictor(ring, 0.4, usual))
        (plan,), (other,) = (predictor.plan([[0.5, 0.6, 0.8]], [0.4], 2, t) for t in (None, usual.tolist()))
        torch.testing.assert_close(plan.anchors, other.anchors)
    assert not torch.allclose(predictor(ring, 0.4), predictor(ring, 0.4, TIMES), rtol=1e-2, atol=1e-2)


# Times


def test_positions():
    steps = Steps(*[torch.zeros(0)] * 3, TIMES)
    assert torch.equal(steps.positions(TIMES), torch.arange(TOTAL + 1, dtype=torch.float64))
    between = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0))
    wanted = [position(level) for level in between.flatten().tolist()]
    expected = torch.tensor(wanted, dtype=torch.float64).view_as(between)
    torch.testing.assert_close(steps.positions(between), expected, rtol=1e-10, atol=1e-10)
    beyond = steps.positions(torch.tensor([1.0 + (1.0 - TIMES[1].item()), -TIMES[-2].item()]))
    torch.testing.assert_close(beyond, torch.tensor([-1.0, TOTAL + 1.0], dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_positions_where_steps_have_the_same_level():
    steps = Steps(*[torch.zeros(0)] * 3, torch.tensor([1.0, 0.75, 0.75, 0.5, 0.0, 0.0]))
    assert steps.positions(torch.tensor([1.0, 0.75, 0.625, 0.5, 0.0])).tolist()[:4] == [0, 2, 2.5, 3]
    assert steps.positions(torch.tensor([0.875, 0.0])).isfinite().all()


# How they run


HEAD_OUTPUTS = 6


def make_head(batch, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(2)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(device, dtype)

    return OutputHead(normal(HEAD_OUTPUTS, DIM), normal(HEAD_OUTPUTS), normal(batch, DIM), normal(batch, DIM))


LEVELS = [0.41, 0.5, 0.77, 0.8, 0.9]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "extension"])
@pytest.mark.parametrize("name", ["linear", "taylor-3", "chebyshev-blend"])
def test_each_backend_is_as_good_as_torch(name, backend, dtype, kernel_device):
    if backend == "triton":
        pytest.importorskip("triton")
    elif extension_error() is not None or kernel_device.type != "cpu":
        pytest.skip("needs the compiled extension on a CPU")
    predictor = make(name, backend=backend)
    ring = filled(predictor.config.max_history, LEVELS, dtype, device=kernel_device)
    exact_ring = copy.copy(ring)
    exact_ring.storage = ring.storage.double()
    exact = make(name, backend="torch")(exact_ring, 0.33, TIMES.to(kernel_device))
    (weights,) = predictor.plan([LEVELS], [0.33], 2, TIMES.tolist(), kernel_device)
    in_run = predictor.forecast_with(ring, weights)
    plain = make(name, backend="torch").forecast_with(ring, weights)
    for forecast in (in_run, predictor(ring, 0.33, TIMES.to(kernel_device))):
        assert forecast.dtype == dtype
        error, allowed = ((each.double() - exact).abs().max() for each in (forecast, plain))
        assert error <= 2 * allowed + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "taylor-2", "chebyshev"])
def test_one_launch_for_each_predicted_step(name, kernel_device, monkeypatch):
    pytest.importorskip("triton")
    from lesa_kernels.stream.kernels import forecast, sums

    seen = []

    def spy(module, name):
        kernel = getattr(module, name)

        class Spy:
            def __getitem__(self, grid):
                seen.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Spy())

    spy(forecast, "_stream_forecast_fwd_kernel")
    spy(sums, "_stream_sums_fwd_kernel")
    predictor, batch = make(name, backend="triton"), 2
    ring = filled(predictor.config.max_history, LEVELS, device=kernel_device)
    head = make_head(batch, device=kernel_device)
    predictor(ring, 0.33)
    predictor.predict_velocity(ring, 0.33, head)
    assert seen == ["_stream_forecast_fwd_kernel", "_stream_sums_fwd_kernel"]
    assert predictor.fuses_velocity(ring) and predictor.fuses_velocity(ring, head)
    del seen[:]
    first, second = predictor.plan([LEVELS, LEVELS], [0.33, 0.3], batch, TIMES.tolist(), kernel_device)
    assert seen == []
    plain = predictor.forecast_with(ring, first)
    velocity = predictor.velocity_with(ring, first, head)
    predictor.velocity_with(ring, second, head)
    assert seen == ["_stream_forecast_fwd_kernel", *["_stream_sums_fwd_kernel"] * 2]
    torch.testing.assert_close(velocity, output_head(plain, head), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_features():
    predictor, ring = make("chebyshev"), filled(10, LEVELS)
    ring.storage.requires_grad_()
    predictor(ring, 0.33).sum().backward()
    assert ring.storage.grad[:5].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "taylor-2", "chebyshev-blend"])
def test_a_plan_is_one_copy_to_the_device(name):
    """The meta device stands for a GPU: reading a number from it would raise."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_meta:
                copies.extend(function for each in args if isinstance(each, torch.Tensor) and not each.is_meta)
            return result

    predictor = make(name)
    with Copies():
        plan = predictor.plan([LEVELS, LEVELS[1:], [0.9]], [0.3, 0.4, 0.5], 2, TIMES.tolist(), "meta")
    assert [str(each) for each in copies] == ["aten._to_copy.default"]
    for weights in plan:
        assert weights.anchors.is_meta and weights.anchors.shape == (2, predictor.config.max_history)
        assert weights.count.dtype == torch.int32 and weights.anchors.storage_offset() % 4 == 0


@torch.no_grad()
@pytest.mark.parametrize("has_times", [True, False])
@pytest.mark.parametrize("name", ["linear", "taylor-3", "chebyshev-blend", "universal", "lesa"])
def test_outside_of_a_run_the_host_reads_nothing(name, has_times, monkeypatch):
    """As on a GPU: on the meta device a number that is read would raise."""
    # Autocast does not know this device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with torch.device("meta"):
        if name == "lesa":
            config = PredictorConfig(DIM, "lesa", hidden=4, num_inference_steps=TOTAL)
            predictor = FusedKANPredictor(config, backend="torch")
        else:
            predictor = make(name, backend="torch")
        batch, history = 2, predictor.config.max_history
        count, sigma = torch.empty(batch, dtype=torch.int32), torch.empty(batch)
        times = torch.empty(TOTAL + 1)
        steps = Steps(torch.empty(1, batch, history), count[None], sigma[None], times)
        storage, levels = torch.empty(history, batch, 3, DIM), torch.empty(history, batch)
        state = (storage, None, levels, torch.empty_like(count), count, sigma)
    weights = predictor.forecaster.weights(predictor, steps)
    assert weights.anchors.is_meta and weights.anchors.shape == (1, batch, history)
    forecast = predictor.forecast(*state, times=times if has_times else None)
    assert forecast.is_meta and forecast.shape == (batch, 3, DIM)


# The configuration


def test_no_parameters_and_no_width(tmp_path):
    predictor = make("taylor-2", width=None)
    assert predictor.device is None and not predictor.state_dict() and predictor.config.feature_dim is None
    predictor.to(torch.bfloat16).eval().requires_grad_(False).reset_parameters()
    predictor.save_pretrained(tmp_path)
    loaded = FusedKANPredictor.from_pretrained(tmp_path)
    assert loaded.config == predictor.config and hash(loaded.config) == hash(predictor.config)
    ring = filled(3, LEVELS[:3])
    for other in (loaded, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert torch.equal(other(ring, 0.33), predictor(ring, 0.33))
    made = loaded.make_ring(1, 2, feature_dim=7)
    assert (made.capacity, made.dim) == (3, 7)
    with pytest.raises(TypeError, match="`feature_dim` must be an integer of at least 1, but got None"):
        loaded.make_ring(1, 2)
    with pytest.raises(ValueError, match=f"`feature_dim` must be the predictor's feature_dim, {DIM}, but got 7"):
        make("taylor").make_ring(1, 2, feature_dim=7)
    with pytest.raises(TypeError, match="`feature_dim` must be an integer of at least 1, but got None"):
        PredictorConfig(None, "newton")


def test_options_are_complete_and_do_not_change():
    config = PredictorConfig(DIM, "chebyshev", options={"degree": np.int64(3)})
    assert config.options == {"degree": 3, "ridge": 0.1, "blend": 1.0} and type(config.options["degree"]) is int
    assert json.loads(json.dumps(config.to_dict()))["options"] == config.options
    assert PredictorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config == PredictorConfig(DIM, "chebyshev", options={"ridge": 0.1, "degree": 3})
    assert config != PredictorConfig(DIM, "chebyshev") == replace(config, options={})
    assert hash(config) != hash(replace(config, options={"ridge": 0.2}))
    for change in (lambda o: o.update(degree=1), lambda o: o.pop("degree"), lambda o: o.__setitem__("degree", 1)):
        with pytest.raises(TypeError, match=r"The `options` of a configuration cannot be changed\. Make another"):
            change(config.options)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert PredictorConfig(DIM).options is None and PredictorConfig(DIM, "linear", options={}).options is None


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("taylor", {"order": 0}, r"`options\['order'\]` must be an integer of at least 1 and at most 3, but got 0"),
        ("taylor", {"order": 4}, r"`options\['order'\]` must be an integer of at least 1 and at most 3, but got 4"),
        ("taylor", {"order": 1.5}, r"`options\['order'\]` must be an integer"),
        ("chebyshev", {"ridge": 0}, r"`options\['ridge'\]` must be a finite number of at least 1e-09"),
        ("chebyshev", {"blend": 1.1}, r"`options\['blend'\]` must be a finite number of at least 0 and at most 1"),
        ("chebyshev", {"order": 2}, "`options` must hold 'degree', 'ridge', 'blend' for 'chebyshev', but got 'order'"),
        ("newton", {"order": 2}, "`options` must hold nothing for 'newton', but got 'order'"),
        ("taylor", [("order", 2)], "`options` must be a dict or None, but got"),
    ],
)
def test_wrong_options_are_named(mixer, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PredictorConfig(DIM, mixer, options=options)


def test_format_versions():
    """What earlier releases can read has version 1, and no field that they do not know."""
    for mixer in FORECASTERS:
        config = PredictorConfig(DIM, mixer)
        version = 1 if mixer in ("newton", "dense") else 2
        assert config.format_version == version and ("options" in config.to_dict()) == (version == 2)
        assert "told_levels" not in config.to_dict()
    values = PredictorConfig(DIM, "taylor").to_dict()
    with pytest.raises(ValueError, match="`format_version` must be 1 or 2, but got 3"):
        PredictorConfig.from_dict({**values, "format_version": 3})
    with pytest.raises(ValueError, match="`format_version` must be 1 or 2, but got 3"):
        PredictorConfig.from_dict({**values, "format_version": 3, "mixer": "of-tomorrow"})
    with pytest.raises(ValueError, match="`mixer` must be one of 'newton', .*, but got 'of-tomorrow'"):
        PredictorConfig.from_dict({**values, "mixer": "of-tomorrow"})
    with pytest.raises(ValueError, match="`config` has unknown fields: options"):
        PredictorConfig.from_dict({**PredictorConfig(DIM).to_dict(), "options": None})


def test_a_configuration_made_from_another_has_a_format_version_of_its_own():
    for mixer, other, version in (("linear", "newton", 1), ("newton", "linear", 2), ("taylor", "dense", 1)):
        config = replace(PredictorConfig(DIM, mixer), mixer=other, options=None, history_length=None)
        assert config.format_version == version and PredictorConfig.from_dict(config.to_dict()) == config
    assert replace(PredictorConfig(DIM), format_version=2).format_version == 1


# The times of a run


WRONG_TIMES = [
    [],
    [1.0],
    [0.0, 1.0],
    [1.0, 0.5, 0.75, 0.0],
    [0.5] * 5,
    [1.0, math.nan, 0.0],
    [math.inf, 0.5, 0.0],
    [[1.0, 0.0]],
    [1.0, None, 0.0],
    0.5,
    "10",
]


@pytest.mark.parametrize("times", WRONG_TIMES, ids=str)
@pytest.mark.parametrize("name", ["linear", "taylor"])
def test_wrong_times_are_named(name, times):
    """Also for a forecaster that does not read them, outside of a run."""
    predictor, ring = make(name), filled(2, LEVELS[:2])
    calls = [lambda t: predictor(ring, 0.3, t), lambda t: predictor.predict_velocity(ring, 0.3, make_head(2), t)]
    if name == "taylor":
        calls.append(lambda t: predictor.plan([LEVELS], [0.3], 2, t))
    given = [times]
    if isinstance(times, list) and None not in times:
        given.append(torch.tensor(times))
    for call in calls:
        for value in given:
            with pytest.raises((ValueError, TypeError), match="`times` must be at least 2 finite noise levels in one"):
                call(value)


def test_times_on_another_device_are_named():
    predictor, ring = make("taylor"), filled(2, LEVELS[:2])
    calls = [predictor, lambda *given: predictor.predict_velocity(*given[:2], make_head(2), given[2])]
    for call in (*calls, lambda ring, sigma, times: predictor.plan([LEVELS], [sigma], 2, times)):
        with pytest.raises(ValueError, match="`times` must be on cpu, but got a tensor on meta.*times.to"):
            call(ring, 0.3, TIMES.to("meta"))
    line = make("linear")  # reads no times
    assert torch.equal(line(ring, 0.3, TIMES.to("meta")), line(ring, 0.3))


def test_times_may_repeat_a_level_and_end_early():
    predictor, ring = make("taylor"), filled(2, LEVELS[:2])
    for times in ([1.0, 0.9, 0.5, 0.5, 0.41, 0.2], (1.0, 0.0), np.linspace(1, 0, 5).tolist()):
        expected = predictor(ring, 0.3, torch.tensor(times))
        assert torch.equal(predictor(ring, 0.3, times), expected) and expected.isfinite().all()


# What is trained


class Trained(Forecaster):
    """A line over the step number, in float64, whose slope has a factor, by a product that autocast would round."""

    name = "trained-line"
    title = "trained line"
    is_trained = True

    def history_length(self, config):
        return 2

    def build(self, predictor, config):
        predictor.gain = torch.nn.Parameter(torch.empty(1, 1))

    def reset(self, predictor, generator):
        predictor.gain.fill_(0.3)

    def weights(self, predictor, steps):
        count = self.read(predictor.config, steps)
        at = steps.positions(torch.where(steps.levels.isnan(), 0.0, steps.levels))
        ahead = (steps.positions(steps.sigma) - at[..., 0]) / (at[..., 0] - at[..., 1])
        ahead = torch.where(count > 1, ahead, 0.0)
        slope = ahead * (steps.sigma[..., None] @ predictor.gain)[..., 0]
        return Weights(torch.stack([1 + slope, -slope], -1), count, None, None, None)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["triton", "extension", "torch", "auto"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_plan_of_trained_parameters_has_the_dtype_of_a_forecast(monkeypatch, kernel_device, autocast, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    elif backend == "extension" and (extension_error() is not None or kernel_device.type != "cpu"):
        pytest.skip("needs the compiled extension on a CPU")
    monkeypatch.setitem(FORECASTERS, "trained-line", Trained())
    predictor = FusedKANPredictor(PredictorConfig(None, "trained-line"), backend).to(kernel_device)
    ring = filled(2, LEVELS[:2], torch.bfloat16, device=kernel_device)
    with torch.autocast(kernel_device.type, torch.bfloat16, enabled=autocast):
        (weights,) = predictor.plan([LEVELS], [0.33], 2, TIMES.tolist())
        forecasts = predictor.forecast_with(ring, weights), predictor(ring, 0.33, TIMES.to(kernel_device))
    assert weights.anchors.dtype == torch.float32 and weights.count.dtype == torch.int32
    first, second = (position(level) for level in rounded(LEVELS[:2]))
    slope = 0.3 * 0.33 * (position(rounded(0.33)) - first) / (first - second)
    expected = torch.tensor([1 + slope, -slope], device=kernel_device).expand(2, 2)
    torch.testing.assert_close(weights.anchors, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(*forecasts)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "wanted"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_plan_of_converted_parameters(monkeypatch, dtype, wanted):
    def weights(self, predictor, steps):
        return Weights(predictor.gain.expand(*steps.sigma.shape, 1), steps.count, None, None, None)

    monkeypatch.setitem(FORECASTERS, "trained-line", Trained())
    monkeypatch.setattr(Trained, "weights", weights)
    for mixer in ("trained-line", "l2p"):
        predictor = FusedKANPredictor(PredictorConfig(None, mixer)).to(dtype)
        assert predictor.plan([LEVELS], [0.33], 2)[0].anchors.dtype == wanted
        assert predictor.plan([LEVELS], [0.33], 2, dtype=torch.float32)[0].anchors.dtype == torch.float32


@torch.no_grad()
def test_a_run_that_nobody_describes_has_the_same_times_in_a_plan(monkeypatch):
    """Up to the last bit."""
    seen = []
    monkeypatch.setattr(
        Repeat,
        "weights",
        lambda self, predictor, steps: (
            seen.append(steps.times) or Weights(torch.ones(*steps.sigma.shape, 1), steps.count, None, None, None)
        ),
    )
    monkeypatch.setitem(FORECASTERS, "repeat", Repeat())
    for total in (None, 3, 7, 28, 49):
        predictor = FusedKANPredictor(PredictorConfig(None, "repeat", num_inference_steps=total))
        predictor.plan([LEVELS], [0.33], 2)
        predictor(filled(1, LEVELS[:1]), 0.33)
        in_plan, outside = seen[-2:]
        assert torch.equal(in_plan, outside)


# The registry


class Repeat(Forecaster):
    """Repeats the newest feature."""

    name = "repeat"
    title = "repetition"

    def history_length(self, config):
        return 1

    def weights(self, predictor, steps):
        count = self.read(predictor.config, steps)
        return Weights(
            torch.ones(*count.shape, 1, dtype=torch.float64), count, torch.full(count.shape, 0.5), None, None
        )


def test_a_registered_forecaster_is_a_mixer(monkeypatch):
    monkeypatch.setitem(FORECASTERS, "repeat", Repeat())
    assert isinstance(forecaster_of("repeat"), Repeat) and Repeat.label == "repetition"
    predictor, ring = FusedKANPredictor(PredictorConfig(None, "repeat")), filled(1, [0.5])
    expected = ring.storage[0] + 0.5
    assert torch.equal(predictor(ring, 0.3), expected)
    (weights,) = predictor.plan([[0.5]], [0.3], 2)
    assert torch.equal(predictor.forecast_with(ring, weights), expected)
    assert predictor.forecaster.describe(predictor.config) == "repeat"
    assert make("taylor-2").forecaster.describe(make("taylor-2").config) == "taylor, order 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Repeat it"}, r"`Changed\.name` must be lower-case words with hyphens"),
        ({"name": None}, r"`Changed\.name` must be a text"),
        ({"title": ""}, r"`Changed\.title` must be a text"),
        ({"history": "some"}, r"`Changed\.history` must be 'anchors' or 'steps'"),
        ({"options": {"a": 3}}, r"`Changed\.options\['a'\]` must be an Option"),
        ({"options": {"a": Option(3, 4, 5)}}, r"`Changed\.options\['a'\]` must be an Option whose default is in"),
        ({"name": "newton"}, r"`Changed\.name` must differ from that of Newton"),
        ({"title": "dense variant"}, r"`Changed\.title` must differ from that of Dense"),
    ],
)
def test_what_can_not_be_registered_is_named(change, message):
    before = dict(FORECASTERS)
    with pytest.raises((TypeError, ValueError), match=message):
        register(type("Changed", (Repeat,), {"title": "changed", **change})())
    with pytest.raises(TypeError, match="`forecaster` must be a Forecaster"):
        register(Repeat)
    assert before == FORECASTERS


@torch.no_grad()
def test_a_forecaster_of_its_own_forecasts_needs_no_velocity(monkeypatch):
    """One without weights: the velocity is the output head of what the predictor forecasts."""

    class Mean(Repeat):
        name = "mean"
        title = "mean"
        plans = False

        def weights(self, predictor, steps):
            raise RuntimeError("it has none")

        def forecast(self, predictor, state, times=None, stream=None):
            return state.storage.mean(0) * (1.0 if times is None else times[0])

    monkeypatch.setitem(FORECASTERS, "mean", Mean())
    predictor, ring, head = FusedKANPredictor(PredictorConfig(None, "mean")), filled(1, LEVELS[:1]), make_head(2)
    assert torch.equal(predictor.predict_velocity(ring, 0.3, head), output_head(predictor(ring, 0.3), head))
    times = [0.5, 0.25, 0.0]
    half = predictor.predict_velocity(ring, 0.3, head, times)
    assert torch.equal(half, output_head(predictor(ring, 0.3, times), head))
    assert torch.equal(predictor(ring, 0.3, times), ring.storage.mean(0) / 2) and not predictor.fuses_velocity(ring)


def test_what_is_registered_can_be_saved(monkeypatch, tmp_path):
    """The format version does not depend on what a class says of itself."""
    changes = {"name": "with-options", "title": "with options", "options": {"a": Option(1, 1, 3)}}
    for version in (1, 3):
        kind = type("WithOptions", (Repeat,), {**changes, "format_version": version})
        monkeypatch.setitem(FORECASTERS, "with-options", kind())
        predictor = FusedKANPredictor(PredictorConfig(None, "with-options", options={"a": 2}))
        predictor.save_pretrained(tmp_path / str(version))
        loaded = FusedKANPredictor.from_pretrained(tmp_path / str(version)).config
        assert loaded == predictor.config and loaded.options == {"a": 2} and loaded.format_version == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_work_of_a_predicted_step(dtype):
    """Each feature is read once, with its scales; beside it, the head's weights and modulation, and the velocity."""
    predictor, size = make("taylor-3"), dtype.itemsize
    found = predictor.forecaster.work(predictor.config, (2, 10, 8, dtype), 3, 4)
    features = 4 * 2 * 10 * (8 * size + (4 if size == 1 else 0))
    assert found == {"bytes": features + 2 * (3 * 8 + 2 * 2 * 8 + 2 * 10 * 3), "flops": 2 * 2 * 10 * 8 * (4 + 3)}


def test_a_plan_is_made_of_stored_features_alone():
    """A forecast with the weights of a plan is the sum that `stream_forecast` defines."""
    predictor, ring = make("taylor-3"), filled(4, LEVELS)
    (weights,) = predictor.plan([LEVELS], [0.33], 2)
    features = StoredFeatures(ring.storage, ring.scales, ring.cursor, ring.count)
    assert torch.equal(predictor.forecast_with(ring, weights), stream_forecast(features, weights))


def test_the_universal_coefficients_are_finite_where_the_noise_level_rises():
    levels = [0.6, 0.8, 1.0]
    (weights,) = FusedKANPredictor(PredictorConfig(mixer="universal")).plan([levels], [0.9], 1)
    expected = TRANSCRIPTIONS["universal"]({}, levels, 0.9, None, None, None)
    np.testing.assert_allclose(weights.anchors[0, :3], expected, rtol=1e-5, atol=1e-6)
