"""LESA as its authors released it, against an independent transcription in float64."""

import math

import pytest
import torch

import released_lesa
from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import lesa
from lesa_kernels.stream import StoredFeatures, stream_forecast

SHAPE = (2, 5, 12)  # batch, tokens and width
LINEAR = [1 - i / 50 for i in range(51)]


def shifted(shift=3.0, steps=50):
    """Noise levels of a run, and 0: float32 numbers, as a ring stores them."""
    levels = torch.tensor([1 - i / steps for i in range(steps + 1)], dtype=torch.float64)
    return (shift * levels / (1 + (shift - 1) * levels)).float().tolist()


def loaded(tmp_path, state, **options):
    return FusedKANPredictor.from_lesa_checkpoint(
        released_lesa.save(tmp_path / "released.pt", state), feature_dim=SHAPE[-1], **options
    )


def true_features(steps=50, seed=0):
    """A smooth path with noise."""
    random = torch.Generator().manual_seed(seed)
    start, end, noise = (torch.randn(SHAPE, generator=random, dtype=torch.float64) for _ in range(3))
    return [math.cos(i / 20) * start + (i / steps) ** 2 * end + 0.05 * math.sin(i) * noise for i in range(steps)]


def levels_before(times, step, length=8):
    return [times[i] for i in range(step - 1, max(step - length, 0) - 1, -1)]


def stored(history, length=8):
    """The buffers of a full ring whose slots are oldest first; those before the first feature are NaN."""
    newest = history[-length:]
    missing = [torch.full_like(newest[0], math.nan)] * (length - len(newest))
    state = torch.zeros(SHAPE[0], dtype=torch.int32, device=newest[0].device)
    return StoredFeatures(torch.stack(missing + newest), None, state, state + len(newest))


@pytest.mark.parametrize("endings", [("",), ("_cond", "_uncond")], ids=["one stream", "two streams"])
@torch.no_grad()
def test_a_run_equals_the_transcription(tmp_path, endings):
    """Fifty steps in closed loop, computed steps and bounds of the released code, each stream of guidance by itself."""
    state, times = released_lesa.state_dict(endings=endings), shifted()
    predictor = loaded(tmp_path, state, backend="torch").double()
    computed, features = released_lesa.computed_steps(7, 50), true_features()
    for ending in endings:
        planned = [step for step in range(50) if step not in computed]
        levels = [levels_before(times, step) for step in planned]
        weights = predictor.plan(levels, [times[s] for s in planned], SHAPE[0], times, stream=ending[1:] or None)
        ours, theirs = [], []
        for step, feature in enumerate(features):
            if step in computed:
                ours.append(feature)
                theirs.append(feature)
                continue
            made = weights[planned.index(step)]
            theirs.append(released_lesa.forecast(state, theirs, times[step], times, ending))
            ours.append(stream_forecast(stored(ours), made, backend="torch"))
            assert (ours[-1] - theirs[-1]).norm() <= 1e-10 * theirs[-1].norm()
            weight, bias, alpha = released_lesa.parts(state, times[step], times, ending)
            wanted = (alpha * weight).flip(0)
            wanted[0] += 1
            read = len(weight) if len(weight) <= step else step
            got = made.anchors[0, :read].clone()
            assert made.count.tolist() == [read] * SHAPE[0] and not made.anchors[:, read:].any()
            if read == len(weight):
                assert (got - wanted).norm() <= 1e-10 * wanted.norm()
            assert abs(made.constant[0] - alpha * bias) <= 1e-10 * abs(alpha * bias)
        assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(ours, features)), "it must matter what is forecast"


@torch.no_grad()
def test_a_history_shorter_than_the_stage_reads_repeats_its_oldest_feature(tmp_path):
    """With equally spaced noise levels, the stage that reads eight begins at step 5."""
    state, times = released_lesa.state_dict(), torch.tensor(LINEAR).tolist()
    predictor, features = loaded(tmp_path, state).double(), true_features()
    for step in range(1, 9):
        (weights,) = predictor.plan([levels_before(times, step)], [times[step]], SHAPE[0], times)
        wanted = released_lesa.forecast(state, features[:step], times[step], times)
        got = stream_forecast(stored(features[:step]), weights)
        assert (got - wanted).norm() <= 1e-10 * wanted.norm(), step


@torch.no_grad()
def test_outside_of_a_run_the_times_are_equally_spaced(tmp_path):
    state = released_lesa.state_dict(steps=10)
    predictor, features = loaded(tmp_path, state).double(), true_features()[:6]
    times = torch.linspace(1, 0, 11).tolist()
    buffers, sigma = stored(features), torch.tensor([0.35, 0.95])
    sigmas = torch.rand(8, SHAPE[0])
    got = predictor.forecast(buffers.storage, None, sigmas, buffers.cursor, buffers.count, sigma)
    for row, level in enumerate(sigma.tolist()):  # two stages in one batch
        history = [feature[row] for feature in features]
        torch.testing.assert_close(got[row], released_lesa.forecast(state, history, level, times), rtol=1e-10, atol=0)
    given = predictor.forecast(
        buffers.storage, None, sigmas, buffers.cursor, buffers.count, sigma, times=torch.tensor(shifted(steps=10))
    )
    wanted = released_lesa.forecast(state, [f[1] for f in features], float(sigma[1]), shifted(steps=10))
    torch.testing.assert_close(given[1], wanted, rtol=1e-10, atol=0)


@torch.no_grad()
def test_another_step_count_is_refused_by_name(tmp_path):
    predictor = loaded(tmp_path, released_lesa.state_dict())
    message = r"`times` must be of a run that executes 50 steps.*, but got those of 28 executed steps\..*`strength`"
    with pytest.raises(ValueError, match=message):
        predictor.plan([[1.0]], [0.9], 1, shifted(steps=28))
    ring = predictor.make_ring(1, 2)
    ring.push(torch.ones(1, 2, SHAPE[-1]), 1.0)
    with pytest.raises(ValueError, match="executes 50 steps.*got those of 49"):
        predictor(ring, 0.9, times=shifted(steps=49))


def test_only_the_stream_of_its_name_has_the_second_experts(tmp_path):
    predictor = loaded(tmp_path, released_lesa.state_dict(endings=("_cond", "_uncond")))
    times = shifted()

    def anchors(stream):
        return predictor.plan([levels_before(times, 9)], [times[9]], 1, times, stream=stream)[0].anchors

    first, second = anchors("cond"), anchors("uncond")
    assert not torch.allclose(first, second)
    torch.testing.assert_close(anchors(None), first, rtol=0, atol=0)
    for other in ("main", "main-2", "main-with-prompt"):
        with pytest.raises(ValueError, match=f"`stream` must be 'cond', 'uncond' or None.*but got '{other}'"):
            anchors(other)
    one = loaded(tmp_path, released_lesa.state_dict())
    ring = one.make_ring(*SHAPE[:2])
    for step in range(9):
        ring.push(torch.randn(SHAPE), times[step])
    torch.testing.assert_close(one(ring, times[9], times, "uncond"), one(ring, times[9], times), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "extension"])
@torch.no_grad()
def test_kernels_are_as_exact_as_plain_torch(tmp_path, backend, kernel_device):
    """The weights of a run, and forecasts with them: at most twice as far off as in plain torch."""
    device = torch.device(kernel_device)
    if backend == "extension" and device.type != "cpu":
        pytest.skip("the extension is for the CPU")
    state, times, features = released_lesa.state_dict(), shifted(), true_features()
    steps = [step for step in range(50) if step not in released_lesa.computed_steps(7, 50)]

    def run(backend, dtype):
        predictor = loaded(tmp_path, state, backend=backend).to(device, dtype)
        levels = [levels_before(times, step) for step in steps]
        weights = predictor.plan(levels, [times[step] for step in steps], SHAPE[0], times)
        forecasts = []
        for step, made in list(zip(steps, weights))[::8]:  # some of each stage
            buffers = stored([feature.to(device, dtype) for feature in features[:step]])
            forecasts.append(stream_forecast(buffers, made, backend=backend))
        parts = ([made.anchors for made in weights], [made.constant for made in weights], forecasts)
        return [torch.stack(part).cpu().double() for part in parts]

    exact = run("torch", torch.float64)
    for got, plain, wanted in zip(run(backend, torch.float32), run("torch", torch.float32), exact):
        error, allowed = (float((values - wanted).norm() / wanted.norm()) for values in (got, plain))
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps
        assert allowed < 1e-5


@torch.no_grad()
def test_a_plan_calls_each_layer_once_for_all_steps(tmp_path, monkeypatch):
    predictor, times, rows = loaded(tmp_path, released_lesa.state_dict()), shifted(), []
    layer = lesa.bspline_kan
    monkeypatch.setattr(lesa, "bspline_kan", lambda x, *more: rows.append(x.shape[:-1].numel()) or layer(x, *more))
    steps = range(4, 50)
    predictor.plan([levels_before(times, step) for step in steps], [times[step] for step in steps], 3, times)
    assert rows == [len(steps)] * 9  # three layers of three stages


def test_gradients_reach_every_parameter_that_is_read(tmp_path):
    config = PredictorConfig(SHAPE[-1], mixer="lesa", hidden=6, num_inference_steps=20)
    predictor = FusedKANPredictor(config).double()
    times = [*shifted(steps=20)]
    (early, late) = predictor.plan([levels_before(times, 4), levels_before(times, 15)], [times[4], times[15]], 1, times)
    loss = sum((made.anchors**2).sum() + made.constant.square().sum() for made in (early, late))
    gradients = torch.autograd.grad(loss, list(predictor.parameters()))
    names = [name for name, _ in predictor.named_parameters()]
    for name, gradient in zip(names, gradients):
        assert gradient[0, 0].any() and gradient[0, 2].any(), name
        assert not gradient[0, 1].any(), name  # no step of this stage
    weight = gradients[names.index("latent_weight")]
    assert not weight[0, 0, 4:].any() and weight[0, 2].all()  # the first stage reads four


def test_it_begins_as_the_released_code_does():
    """The ranges of its initialisation, and the same numbers for the same seed."""
    config = PredictorConfig(SHAPE[-1], mixer="lesa")
    assert PredictorConfig(mixer="lesa", options={"streams": 2}).stage_bounds == (0.9, 0.4)
    predictor, other = FusedKANPredictor(config), FusedKANPredictor(config)
    for each in (predictor, other):
        each.reset_parameters(torch.Generator().manual_seed(3))
    for name, value in predictor.named_parameters():
        assert torch.equal(value, dict(other.named_parameters())[name]), name
    assert config.stage_bounds == (0.9, 0.5) and config.lengths == (4, 8, 8) and config.history == "steps"
    sizes = {name: tuple(value.shape) for name, value in predictor.named_parameters()}
    assert sizes["latent_weight"] == (1, 3, 8) and sizes["latent_bias"] == (1, 3)
    inputs = (51, 256, 256)
    for layer, wide in enumerate(inputs):
        narrow = (256, 256, 1)[layer]
        assert sizes[f"spline_weight_{layer}"] == (1, 3, narrow, wide, 8)
        _assert_uniform(getattr(predictor, f"base_weight_{layer}"), 1 / math.sqrt(wide))
        _assert_uniform(getattr(predictor, f"spline_scaler_{layer}"), math.sqrt(5 / wide))
    assert not predictor.latent_weight[:, 0, 4:].any()
    # At the knots the splines are the noise, uniform within half of 0.02 / 5.
    t = torch.tensor([-3 + 1.2 * i for i in range(6)])
    state = {
        f"x.{n}": getattr(predictor, f"{n}_1")[0, 1].detach() for n in ("base_weight", "spline_weight", "spline_scaler")
    }
    state["x.base_weight"] = torch.zeros(256, 256)
    state["x.spline_scaler"] = torch.eye(256)
    values = torch.stack([released_lesa.spline_layer(x.double().expand(256), state, "x") for x in t])
    _assert_uniform(values, 0.002)


def _assert_uniform(values, bound):
    values = values.detach().double()
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert values.abs().max() > 0.95 * bound
    spread = bound / math.sqrt(3)
    assert abs(values.std() - spread) < 4 * spread / math.sqrt(values.numel())
    assert abs(values.mean()) < 4 * spread / math.sqrt(values.numel())


@torch.no_grad()
def test_autocast_changes_nothing(tmp_path):
    predictor, times = loaded(tmp_path, released_lesa.state_dict()), shifted()

    ring = predictor.make_ring(*SHAPE[:2])
    for step, feature in enumerate(true_features()[:30]):
        ring.push(feature.float(), times[step])

    def forecasts():
        return predictor.plan([levels_before(times, 30)], [times[30]], 1, times)[0].anchors, predictor(ring, 0.6, times)

    with torch.autocast("cpu", torch.bfloat16):
        under = forecasts()
    torch.testing.assert_close(under, forecasts(), rtol=0, atol=0)


@torch.no_grad()
def test_a_ring_of_features_gives_what_a_plan_gives(tmp_path):
    predictor, times = loaded(tmp_path, released_lesa.state_dict()), shifted()
    ring = predictor.make_ring(*SHAPE[:2])
    assert isinstance(ring, FeatureRing) and ring.capacity == 8
    for step, feature in enumerate(true_features()[:12]):
        ring.push(feature.float(), times[step])
    (weights,) = predictor.plan([levels_before(times, 12)], [times[12]], SHAPE[0], times)
    torch.testing.assert_close(predictor.forecast_with(ring, weights), predictor(ring, times[12], times))
