"""The weights of newton's forecasts: the kernel against plain torch in float64, and the plan of a run."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig, newton_coefficients
from lesa_kernels.forecasters import newton
from lesa_kernels.predictor.arguments import NewtonExperts
from lesa_kernels.predictor.reference import newton_coefficients_ref
from lesa_kernels.stream.arguments import Weights
from predictors import make_predictor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CONFIGS = {
    "rank0": PredictorConfig(24, rank=0, hidden=5),
    "windows": PredictorConfig(24, rank=2, hidden=7, history_length=(2, 4, 3)),
    "k1": PredictorConfig(24, rank=2, hidden=5, history_length=1),
    "k2-degree1": PredictorConfig(24, rank=2, hidden=5, history_length=2, spline_order=1, grid_size=1),
    "k3-degree5": PredictorConfig(9, rank=1, hidden=5, history_length=3, spline_order=5, grid_size=3),
    "k6-degree4": PredictorConfig(24, rank=0, hidden=5, history_length=6, spline_order=4, grid_size=20),
    "k8-degree2": PredictorConfig(24, rank=3, hidden=5, history_length=8, spline_order=2),
    "five-stages": PredictorConfig(24, rank=1, hidden=5, stage_bounds=(0.8, 0.6, 0.4, 0.2), grid_size=3),
    "nine-stages": PredictorConfig(8, rank=1, hidden=3, stage_bounds=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)),
    "one-stage": PredictorConfig(24, rank=2, hidden=5, stage_bounds=()),
    "blocks": PredictorConfig(140, rank=5, hidden=70),
}


def trained(config, backend="triton", seed=0):
    """A predictor whose every parameter counts."""
    predictor = FusedKANPredictor(config, backend)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return predictor


def some_levels(config):
    """Three steps of two samples, in all stages, with all numbers of anchors; what is not to be read is NaN."""
    history = config.max_history
    sigma = torch.tensor([[0.95, 0.75], [0.67, 0.33], [0.3, 0.02]])  # two of them on the default bounds
    count = torch.tensor([[0, 1], [2, history], [history + 3, max(history - 1, 1)]], dtype=torch.int32)
    levels = sigma[..., None] + 0.05 + 0.06 * torch.arange(history)
    order = torch.arange(history)
    return levels.masked_fill(order >= count[..., None], math.nan), count, sigma


def arguments_of(predictor, dtype=None):
    config = predictor.config
    experts = [None if part is None else part.detach().to(dtype or part.dtype) for part in predictor.experts()]
    return *experts, config.stage_bounds, config.lengths, config.grid_size, config.spline_order


@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernel_is_as_good_as_torch(name):
    pytest.importorskip("triton")
    predictor = trained(CONFIGS[name])
    levels, count, sigma = some_levels(predictor.config)
    experts = NewtonExperts(*arguments_of(predictor, torch.float64)[:8])
    exact = newton_coefficients_ref(levels, count, sigma, experts, predictor.shape(), torch.float64)
    plain = newton_coefficients(levels, count, sigma, *arguments_of(predictor), backend="torch")
    weights = newton_coefficients(levels, count, sigma, *arguments_of(predictor), backend="triton")
    for field, actual, other, wanted in zip(weights._fields, weights, plain, exact):
        if wanted is None:
            assert actual is None, field
            continue
        assert (actual.shape, actual.dtype) == (other.shape, other.dtype), field
        error = (actual.double() - wanted).abs()
        allowed = 2 * (other.double() - wanted).abs().max() + 1e-6 * wanted.abs() + 1e-6
        assert (error <= allowed).all(), f"{field}: {error.max():.3g}"
    assert weights.count[0, 0] == 0 and weights.anchors.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_steps_and_no_samples(backend):
    pytest.importorskip("triton")
    predictor = trained(CONFIGS["windows"])
    levels, count, sigma = some_levels(predictor.config)
    for rows in (slice(0, 0), slice(None)):
        columns = slice(None) if rows.stop == 0 else slice(0, 0)
        state = (each[rows, columns] for each in (levels, count, sigma))
        weights = newton_coefficients(*state, *arguments_of(predictor), backend=backend)
        assert weights.anchors.shape == (*sigma[rows, columns].shape, 4, 24)


def test_gradients_are_left_to_torch():
    pytest.importorskip("triton")
    predictor = trained(CONFIGS["windows"])
    levels, count, sigma = some_levels(predictor.config)
    arguments = (*predictor.experts(), *arguments_of(predictor)[8:])
    with pytest.raises(RuntimeError, match=r"one that newton_coefficients has for cpu tensors \(torch\)"):
        newton_coefficients(levels, count, sigma, *arguments, backend="triton")
    newton_coefficients(levels.nan_to_num(), count, sigma, *arguments).anchors.sum().backward()
    assert predictor.out_bias.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("sigmas", lambda t: t[..., :3], r"`sigmas` must have shape \[P, B, 4\]"),
        ("count", lambda t: t.long(), "`count` must have dtype int32"),
        ("sigma", lambda t: t[:2], r"`sigma` must have shape \[3, 2\]"),
        ("out_weight", lambda t: t[:2], r"`out_weight` must have shape \[3, 3, 24, 7\]"),
        ("up", lambda t: t[:, :5], r"`up` must have shape \[3, 24, R\]|`up` must have shape \[3, 24, 2\]"),
        ("stage_bounds", lambda t: t[::-1], "`stage_bounds` must fall strictly"),
        ("history_length", lambda t: t[1:], "`history_length` must have one entry per stage, 3"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_arguments_are_checked(name, change, message, backend):
    pytest.importorskip("triton")
    predictor = trained(CONFIGS["windows"])
    names = ("sigmas", "count", "sigma", *NewtonExperts._fields, *predictor.shape()._fields)
    arguments = dict(zip(names, (*some_levels(predictor.config), *arguments_of(predictor))))
    arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError), match=message):
        newton_coefficients(**arguments, backend=backend)


# The plan of a run


def filled(predictor, levels, batch=2, tokens=5, dtype=torch.float32):
    """A ring with features at these levels, newest first."""
    config, generator = predictor.config, torch.Generator().manual_seed(1)
    ring = FeatureRing(config.max_history + 1, batch, tokens, config.feature_dim, dtype)
    wide = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    for level in reversed(levels):
        ring.push(torch.randn(batch, tokens, config.feature_dim, generator=generator).to(wide), level)
    return ring


LEVELS = [[0.9], [0.9, 0.95], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]]
TARGETS = [0.8, 0.7, 0.45, 0.1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["rank0", "windows", "k1"])
def test_a_plan_gives_the_forecasts(name):
    predictor = trained(CONFIGS[name], "torch")
    plan = predictor.plan(LEVELS, TARGETS, 2)
    assert len(plan) == 4
    low_rank = predictor.low_rank(torch.float32)
    for weights, levels, target in zip(plan, LEVELS, TARGETS):
        ring = filled(predictor, levels)
        assert weights.count.tolist() == [min(len(levels), predictor.config.lengths[_stage(predictor, target)])] * 2
        forecast = predictor.forecast_with(ring, weights, low_rank)
        # The weights of a far target are large and cancel one another: an error is of the size of the largest value.
        torch.testing.assert_close(forecast, predictor(ring, target), rtol=0, atol=1e-6 * float(forecast.abs().max()))


def _stage(predictor, sigma):
    return sum(sigma <= bound for bound in predictor.config.stage_bounds)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_plan_for_a_longer_history_than_kernels_are_made_for(rank):
    history = 17
    predictor = trained(PredictorConfig(8, rank=rank, hidden=3, history_length=history), "auto").requires_grad_(False)
    ring = predictor.make_ring(2, 3)
    levels = [1 - 0.05 * step for step in range(history)]
    for level in levels:
        ring.push(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(int(100 * level))), level)
    (weights,) = predictor.plan([levels[::-1]], [0.15], 2)
    actual = predictor.forecast_with(ring, weights, predictor.low_rank(ring.dtype))
    torch.testing.assert_close(actual, predictor(ring, 0.15), rtol=1e-4, atol=1e-4 * float(actual.abs().max()))


@torch.no_grad()
def test_an_empty_plan():
    assert make_predictor().plan([], [], 1) == []


@torch.no_grad()
def test_a_step_without_history_is_nan():
    predictor = trained(CONFIGS["windows"], "torch")
    (weights,) = predictor.plan([[]], [0.5], 2)
    assert predictor.forecast_with(filled(predictor, [0.9]), weights).isnan().all()


@torch.no_grad()
def test_a_plan_needs_the_levels_of_each_step():
    with pytest.raises(ValueError, match="`levels` must have one entry for each of the 2 steps in `sigmas`, but got 1"):
        make_predictor().plan([[0.9]], [0.8, 0.7], 1)


@torch.no_grad()
def test_a_dense_predictor_has_no_plan():
    with pytest.raises(RuntimeError, match="`config.mixer` must be a forecaster of weights for a plan"):
        make_predictor(mixer="dense").plan([[0.9]], [0.8], 1)


@torch.no_grad()
def test_a_plan_is_one_copy_to_the_device_and_the_host_does_not_wait(monkeypatch):
    """The meta device stands for a GPU: reading a number from it would raise."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_meta:
                copies.extend(function for each in args if isinstance(each, torch.Tensor) and not each.is_meta)
            return result

    def coefficients(levels, count, sigma, experts, shape, backend):
        assert levels.is_meta and levels.shape == (4, 1, 4) and levels.is_contiguous()
        assert (count.shape, count.dtype, sigma.shape, sigma.dtype) == ((4, 1), torch.int32, (4, 1), torch.float32)
        return Weights(levels.new_empty(4, 1, 4, 24), count, None, None, None)

    monkeypatch.setattr(newton, "run_newton_coefficients", coefficients)
    predictor = trained(CONFIGS["rank0"], "torch").to("meta")
    with Copies():
        plan = predictor.plan(LEVELS, TARGETS, 2)
    assert [str(each) for each in copies] == ["aten._to_copy.default"]
    assert all(weights.anchors.shape == (2, 4, 24) and weights.anchors.is_meta for weights in plan)
