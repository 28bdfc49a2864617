"""Newton's kernels against plain torch in float64: on the GPU, or in Triton's interpreter on the CPU."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from lesa_kernels import (
    FeatureRing,
    FusedKANPredictor,
    OutputHead,
    PredictorConfig,
    dense_predict,
    newton_coefficients,
    newton_predict,
    newton_velocity,
    output_head,
)
from lesa_kernels.predictor.arguments import DenseExperts, NewtonExperts, RingState, Shape
from lesa_kernels.predictor.reference import kan_hidden

pytest.importorskip("triton")
from lesa_kernels.predictor.kernels import coefficients, newton  # noqa: E402
from lesa_kernels.stream.kernels import forecast, sums  # noqa: E402

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FLOAT8]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")
HEADS = {"rank0": 4, "windows": 1, "blocks": 48, "blocks-rank0": 64, "k1": 3}  # outputs of the head


def each_dtype_of(heads):
    """Each dtype of each predictor. Of those of several blocks, which take longest, one is slow in each other dtype."""
    names = HEADS if heads else ["rank0", "windows", "blocks"]
    rows = []
    for name, dtype in itertools.product(names, DTYPES):
        is_slow = (name, dtype) in {
            ("blocks", torch.float16),
            ("blocks", torch.float32),
            ("blocks-rank0", torch.bfloat16),
            ("blocks-rank0", FLOAT8),
        }
        values, each = ([name, HEADS[name]] if heads else [name]), str(dtype).removeprefix("torch.")
        marks = [pytest.mark.slow] if is_slow else []
        rows.append(pytest.param(*values, dtype, marks=marks, id="-".join([*map(str, values), each])))
    return pytest.mark.parametrize("name, outs, dtype" if heads else "name, dtype", rows)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(config, device, seed=0):
    """A predictor whose every parameter counts, and whose forecasts stay of the size of the features."""
    torch.manual_seed(seed)
    predictor = FusedKANPredictor(config, backend="triton")
    generator = seeded(seed)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            spread = config.feature_dim**-0.5 if name in ("down", "up") else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return predictor.to(device)


def filled_ring(config, device, pushes, sigmas, tokens=5, dtype=torch.float32, capacity=None, mean=0.0, seed=1):
    """A ring whose row b got `pushes[b]` features at levels that fall towards `sigmas[b]`, 0.06 apart.

    Memory that nobody wrote is NaN.
    """
    generator = seeded(seed)
    ring = FeatureRing(capacity or config.max_history, len(pushes), tokens, config.feature_dim, dtype)
    ring.storage.view(torch.uint8).fill_(0xFF)
    ring.sigmas.fill_(math.nan)
    wide = torch.float32 if dtype == FLOAT8 else dtype
    for row, count in enumerate(pushes):
        steady = torch.randn(1, tokens, config.feature_dim, generator=generator) + mean
        for i in range(count):
            feature = steady + 0.3 * torch.randn(1, tokens, config.feature_dim, generator=generator)
            ring.push(feature.to(wide), sigmas[row] + 0.05 + 0.06 * (count - 1 - i), rows=[row])
    for name in ("storage", "scales", "sigmas", "cursor", "count"):
        if getattr(ring, name) is not None:
            setattr(ring, name, getattr(ring, name).to(device))
    ring.device = ring.storage.device
    return ring


def state_of(ring, sigma):
    return ring.storage, ring.scales, ring.sigmas, ring.cursor, ring.count, sigma


def in_torch(predictor):
    plain = FusedKANPredictor(predictor.config, backend="torch").to(predictor.in_weight.device)
    plain.load_state_dict(predictor.state_dict())
    return plain


def exact_forecast(predictor, ring, sigma):
    storage = ring.storage.float() if ring.scales is None else ring.storage.float() * ring.scales[..., None]
    return in_torch(predictor).double().forecast(storage.double(), None, *state_of(ring, sigma)[2:])


def eager_forecast(predictor, ring, sigma):
    """The formula as one would write it in torch, every tensor in the features' dtype."""
    config, rows = predictor.config, []
    for b in range(ring.batch):
        dtype = torch.bfloat16 if ring.dtype == FLOAT8 else ring.dtype
        stage = int(sum(sigma[b] <= bound for bound in config.stage_bounds))
        n = min(config.history_length[stage], int(ring.count[b]))
        slots = (ring.cursor[b] - 1 - torch.arange(n, device=ring.device)) % ring.capacity
        s, g = ring.sigmas[slots, b], ring.storage[slots, b].float()
        g = (g if ring.scales is None else g * ring.scales[slots, b][..., None]).to(dtype)
        z = torch.zeros(1, config.max_history + 1, device=ring.device)
        z[0, :n], z[0, -1] = 5 * (sigma[b] - s), 2 * sigma[b] - 1
        units = (predictor.in_weight[stage], predictor.in_bias[stage], predictor.spline[stage])
        units = kan_hidden(z, *units, config.grid_size, config.spline_order)[0]
        coefficients = predictor.out_weight[stage] @ units + predictor.out_bias[stage]
        forecast = g[0]
        if predictor.up is not None:
            forecast = forecast + predictor.up_bias[stage].to(dtype)
        for j in range(1, n):
            g = (g[:-1] - g[1:]) / (s[:-j] - s[j:])[:, None, None].to(dtype)
            tap = g[0] * (sigma[b] - s[:j]).prod().to(dtype)
            forecast = forecast + coefficients[j - 1].to(dtype) * tap
            if predictor.up is not None:
                read = F.linear(tap, predictor.down[stage, :, j - 1].to(dtype))
                forecast = forecast + F.linear(read, predictor.up[stage].to(dtype))
        rows.append(forecast)
    return torch.stack(rows)


def assert_as_good(actual, plain, exact):
    """At most twice as far from the exact values as plain torch in the same dtype, but for the result's rounding.

    The interpreter cuts bfloat16 off where a GPU rounds, which is up to one unit in the last place.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs() + 1e-6
    assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed.min():.3g}"


CONFIGS = {
    "rank0": PredictorConfig(24, rank=0, hidden=5),
    "rank3": PredictorConfig(24, rank=3, hidden=5),
    "windows": PredictorConfig(24, rank=2, hidden=7, history_length=(2, 4, 3)),
    "one-stage": PredictorConfig(24, rank=2, hidden=5, stage_bounds=()),
    "five-stages": PredictorConfig(24, rank=1, hidden=5, stage_bounds=(0.8, 0.6, 0.4, 0.2), grid_size=3),
    "k1": PredictorConfig(24, rank=2, hidden=5, history_length=1),
    "k2": PredictorConfig(24, rank=2, hidden=5, history_length=2, spline_order=1),
    "k6": PredictorConfig(24, rank=0, hidden=5, history_length=6, spline_order=5),
    "blocks": PredictorConfig(140, rank=5, hidden=70),
    "blocks-rank0": PredictorConfig(140, rank=0, hidden=70, spline_order=2),
    "one-channel": PredictorConfig(1, rank=1, hidden=2),
}
PUSHES = [0, 1, 2, 3, 4, 9]
SIGMAS = [0.5, 0.42, 0.05, 0.7, 0.3, 0.1]


def make(name, device, dtype=torch.float32, pushes=PUSHES, tokens=5, sigmas=SIGMAS, **options):
    config = CONFIGS[name]
    ring = filled_ring(config, device, pushes, sigmas, tokens, dtype, **options)
    return trained(config, device), ring, torch.tensor(sigmas[: len(pushes)], device=device)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("capacity", [pytest.param(None, marks=pytest.mark.slow), 7], ids=["fits", "roomy"])
@pytest.mark.slow
def test_forecast_in_float32(name, capacity, kernel_device):
    predictor, ring, sigma = make(name, kernel_device, capacity=capacity)
    exact = exact_forecast(predictor, ring, sigma)
    forecast = predictor(ring, sigma)
    assert forecast[0].isnan().all() and forecast[1:].isfinite().all()
    assert_as_good(forecast[1:], in_torch(predictor)(ring, sigma)[1:], exact[1:])


@torch.no_grad()
@each_dtype_of(heads=False)
def test_forecast_in_each_dtype(name, dtype, kernel_device):
    predictor, ring, sigma = make(name, kernel_device, dtype, pushes=[1, 3, 9], tokens=20)
    forecast = predictor(ring, sigma)
    assert forecast.dtype == (torch.bfloat16 if dtype == FLOAT8 else dtype)
    assert_as_good(forecast, eager_forecast(predictor, ring, sigma), exact_forecast(predictor, ring, sigma))


@torch.no_grad()
def test_float8_is_decoded_by_its_bits_where_triton_has_no_such_type(kernel_device, monkeypatch):
    predictor, ring, sigma = make("windows", kernel_device, FLOAT8, pushes=PUSHES[1:])
    ring.storage[:, :, 0] = torch.arange(24, device=kernel_device).sub(12).mul(37.3).to(FLOAT8)  # all sizes of exponent
    ring.storage[0, 0, 1] = torch.tensor(2.0**-9, device=kernel_device).to(FLOAT8)  # subnormal
    native = predictor(ring, sigma)
    for module in (newton, forecast, sums):
        monkeypatch.setattr(module, "stored_bits", lambda storage: (storage.view(torch.uint8), 2))
    assert torch.equal(predictor(ring, sigma), native)


@torch.no_grad()
def test_taps_may_be_out_of_float16s_range(kernel_device):
    """Anchors 0.06 apart, a target ten times as far away: the third tap is a thousand times the anchors."""
    predictor, ring, _ = make("rank3", kernel_device, torch.float16, pushes=[4, 4], sigmas=[0.5, 0.4])
    predictor.out_weight.zero_()
    predictor.out_bias.fill_(1e-4)
    predictor.up.mul_(1e-4)
    ring.storage.mul_(50)
    sigma, head = torch.tensor([-1.9, -1.8], device=kernel_device), make_head(ring, 4)
    exact = exact_forecast(predictor, ring, sigma)
    largest = max(float(t.abs().max()) for t in newton_taps(ring, sigma))
    assert largest > torch.finfo(torch.float16).max > 10 * exact.abs().max()
    error = (predictor(ring, sigma).double() - exact).abs().max()
    assert error < 0.02 * exact.abs().max()
    wanted = output_head(exact, in_float64(head))
    assert (predictor.predict_velocity(ring, sigma, head).double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def newton_taps(ring, sigma):
    """The taps of every row with four anchors, one tensor for each order."""
    slots = (ring.cursor - 1 - torch.arange(4, device=ring.device)[:, None]) % ring.capacity
    rows = torch.arange(ring.batch, device=ring.device)
    s, g, reach = ring.sigmas[slots, rows].double(), ring.storage[slots, rows].double(), 1.0
    for j in range(1, 4):
        g = (g[:-1] - g[1:]) / (s[:-j] - s[j:])[..., None, None]
        reach = reach * (sigma.double() - s[j - 1])
        yield g[0] * reach[:, None, None]


@torch.no_grad()
def test_an_empty_batch(kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4])
    state, experts, shape = functional(predictor, ring, sigma)
    none = [None if t is None else t[:, :0] if t.ndim > 1 else t[:0] for t in state]
    head = make_head(ring, 3)
    head = OutputHead(head.weight, head.bias, head.scale[:0], head.shift[:0])
    assert newton_predict(*none, *experts, *shape, backend="triton").shape == (0, 5, 24)
    assert newton_velocity(*none, *experts, head, *shape, backend="triton").shape == (0, 5, 3)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_numbers_of_tokens(tokens, kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=PUSHES[1:], tokens=tokens)
    head = make_head(ring, 3)
    expected = in_torch(predictor)(ring, sigma)
    torch.testing.assert_close(predictor(ring, sigma), expected, rtol=1e-4, atol=1e-4)
    expected = in_torch(predictor).predict_velocity(ring, sigma, head)
    torch.testing.assert_close(predictor.predict_velocity(ring, sigma, head), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_with_strides_and_bad_alignment(dtype, kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, dtype, pushes=PUSHES[1:])
    head = make_head(ring, 3)
    expected = predictor(ring, sigma), predictor.predict_velocity(ring, sigma, head)
    padded = torch.full((8, 11, 9, 24 + 3), math.nan, dtype=dtype, device=kernel_device)
    view = padded[::2, 1::2, 2:7, 1:-2]  # every other slot and row, a range of tokens, channels from an odd address on
    ring.storage = view.copy_(ring.storage)
    assert torch.equal(predictor(ring, sigma), expected[0])
    assert torch.equal(predictor.predict_velocity(ring, sigma, head), expected[1])
    ring.storage = ring.storage.mT.contiguous().mT  # channels are apart: not for the kernels
    with pytest.raises(RuntimeError, match=r"one that newton_predict has for cpu|cuda tensors \(torch\)"):
        predictor(ring, sigma)


@torch.no_grad()
def test_each_sample_is_in_a_stage_of_its_own(kernel_device):
    levels = [0.9, 0.8, 0.5, 0.3, 0.1]  # one of them on a bound
    predictor, ring, sigma = make("five-stages", kernel_device, pushes=[4, 4, 4, 4, 4], sigmas=levels)
    together = predictor(ring, sigma)
    for row in range(5):
        alone = filled_ring(predictor.config, kernel_device, [4], levels[row:])
        for name in ("storage", "sigmas"):
            getattr(alone, name).copy_(getattr(ring, name)[:, row : row + 1])
        assert torch.equal(predictor(alone, sigma[row : row + 1])[0], together[row])
    exact = exact_forecast(predictor, ring, sigma)
    assert_as_good(together, in_torch(predictor)(ring, sigma), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_at_an_anchor(dtype, kernel_device):
    """All taps are zero at the newest anchor, and all but the first at the second: two calls of a step at one level."""
    predictor, ring, _ = make("windows", kernel_device, dtype, pushes=[4, 4])
    sigma, head = torch.stack([ring.sigmas[3, 0], ring.sigmas[2, 1]]), make_head(ring, 3)
    with torch.no_grad():
        exact = exact_forecast(predictor, ring, sigma)
        assert_as_good(predictor(ring, sigma), eager_forecast(predictor, ring, sigma), exact)
        result = predictor.predict_velocity(ring, sigma, head)
        assert_as_good(
            result, eager_head(eager_forecast(predictor, ring, sigma), head), output_head(exact, in_float64(head))
        )
    predictor(ring, sigma).float().sum().backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad.isfinite().all(), name


@torch.no_grad()
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(bad, kernel_device):
    predictor, ring, sigma = make("rank0", kernel_device, pushes=[4, 4])
    ring.storage[(ring.cursor[0] - 2) % 4, 0, 1, 2] = bad
    forecast = predictor(ring, sigma)
    assert not forecast[0, 1, 2].isfinite() and (~forecast.isfinite()).sum() == 1
    predictor, ring, sigma = make("blocks", kernel_device, pushes=[4, 4])
    ring.storage[(ring.cursor[0] - 2) % 4, 0, 1, 2] = bad
    forecast = predictor(ring, sigma)  # the residual mixes the channels of a token
    assert (~forecast[0, 1].isfinite()).all() and (~forecast.isfinite()).sum() == 140
    result = predictor.predict_velocity(ring, sigma, make_head(ring, 3))
    assert result[0, 1].isnan().all() and (~result.isfinite()).sum() == 3


def make_head(ring, outs, bias=True, dtype=torch.float32):
    generator, dim = seeded(7), ring.dim

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(ring.device, dtype)

    weight, offset = normal(outs, dim, scale=dim**-0.5), normal(outs) if bias else None
    return OutputHead(weight, offset, *normal(ring.batch, 2 * dim, scale=0.3).chunk(2, dim=1))  # as a model has them


def in_float64(head):
    parts = (head.weight, head.bias, head.scale, head.shift)
    return OutputHead(*(None if part is None else part.double() for part in parts), head.eps)


def eager_head(features, head):
    """The head as a model runs it, in the features' dtype."""
    dtype = features.dtype
    normed = F.layer_norm(features, features.shape[-1:], eps=head.eps)
    modulated = normed * (1 + head.scale.to(dtype))[:, None] + head.shift.to(dtype)[:, None]
    return F.linear(modulated, head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))


@torch.no_grad()
@each_dtype_of(heads=True)
def test_velocity(name, outs, dtype, kernel_device):
    predictor, ring, sigma = make(name, kernel_device, dtype, pushes=[1, 3, 9], tokens=20)
    head = make_head(ring, outs, bias=outs != 1)
    exact = output_head(exact_forecast(predictor, ring, sigma), in_float64(head))
    plain = eager_head(eager_forecast(predictor, ring, sigma), head)
    assert_as_good(predictor.predict_velocity(ring, sigma, head), plain, exact)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks", "blocks-rank0"])
def test_velocity_of_features_far_from_zero(name, kernel_device):
    """The variance is a difference of large numbers if it is taken about zero. One anchor forecasts itself exactly."""
    predictor, ring, sigma = make(name, kernel_device, pushes=[1, 1], mean=1000.0)
    head = make_head(ring, 8)
    exact = output_head(exact_forecast(predictor, ring, sigma), in_float64(head))
    plain = in_torch(predictor).predict_velocity(ring, sigma, head)
    assert_as_good(predictor.predict_velocity(ring, sigma, head), plain, exact)


@torch.no_grad()
def test_velocity_of_features_without_spread(kernel_device):
    predictor, ring, sigma = make("rank0", kernel_device, pushes=[1, 1])
    ring.storage.fill_(3.0)
    head = make_head(ring, 4)
    shifted = F.linear(head.shift, head.weight, head.bias)[:, None].expand(2, 5, 4)
    torch.testing.assert_close(predictor.predict_velocity(ring, sigma, head), shifted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_velocity_without_history_is_nan(kernel_device):
    predictor, ring, sigma = make("blocks", kernel_device, pushes=[0, 2])
    result = predictor.predict_velocity(ring, sigma, make_head(ring, 4))
    assert result[0].isnan().all() and result[1].isfinite().all()


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    seen = []

    def spy(module, name):
        kernel = getattr(module, name)

        class Spy:
            def __getitem__(self, grid):
                seen.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Spy())

    spy(newton, "_newton_predict_fwd_kernel")
    spy(newton, "_newton_predict_bwd_kernel")
    spy(coefficients, "_newton_coefficients_fwd_kernel")
    spy(forecast, "_stream_forecast_fwd_kernel")
    spy(sums, "_stream_sums_fwd_kernel")
    return seen


COEFFICIENTS, FORECAST, SUMS = (
    "_newton_coefficients_fwd_kernel",
    "_stream_forecast_fwd_kernel",
    "_stream_sums_fwd_kernel",
)


@torch.no_grad()
@pytest.mark.parametrize("name, kernels", [("rank0", ["_newton_predict_fwd_kernel"]), ("rank3", [COEFFICIENTS, SUMS])])
def test_how_many_kernels_a_call_launches(name, kernels, kernel_device, launches):
    predictor, ring, sigma = make(name, kernel_device, pushes=[4, 3])
    head = make_head(ring, 4)
    predictor(ring, sigma)
    assert launches == kernels
    predictor.predict_velocity(ring, sigma, head)
    assert launches[len(kernels) :] == [COEFFICIENTS, SUMS]
    del launches[:]
    (weights,) = predictor.plan([[0.6, 0.7, 0.8]], [0.5], 2)
    low_rank = predictor.low_rank(ring.dtype)
    predictor.forecast_with(ring, weights, low_rank)
    predictor.velocity_with(ring, weights, head, low_rank)
    assert launches == [COEFFICIENTS, FORECAST if name == "rank0" else SUMS, SUMS]


@torch.no_grad()
@each_dtype
@pytest.mark.parametrize("name", ["rank0", "windows"])
def test_a_plan_gives_the_same_forecasts_and_velocities(name, dtype, kernel_device):
    predictor, ring, _ = make(name, kernel_device, dtype, pushes=[4, 4], sigmas=[0.4, 0.4])
    head = make_head(ring, 3)
    levels = ring.sigmas[(ring.cursor[0] - 1 - torch.arange(4, device=kernel_device)) % 4, 0].tolist()
    (weights,) = predictor.plan([levels], [0.37], 2)
    low_rank = predictor.low_rank(ring.dtype)
    sigma = torch.full((2,), 0.37, device=kernel_device)
    exact = exact_forecast(predictor, ring, sigma)
    assert_as_good(predictor.forecast_with(ring, weights, low_rank), eager_forecast(predictor, ring, sigma), exact)
    result = predictor.velocity_with(ring, weights, head, low_rank)
    plain = eager_head(eager_forecast(predictor, ring, sigma), head)
    assert_as_good(result, plain, output_head(exact, in_float64(head)))


@torch.no_grad()
def test_a_head_with_a_modulation_for_each_token_or_without_shift(kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4, 3])
    head = make_head(ring, 4)
    per_token = torch.randn(2, 2, 5, 24, generator=seeded(2)).to(kernel_device)
    for changed in (OutputHead(head.weight, head.bias, *per_token), OutputHead(head.weight, None, head.scale, None)):
        expected = in_torch(predictor).predict_velocity(ring, sigma, changed)
        torch.testing.assert_close(predictor.predict_velocity(ring, sigma, changed), expected, rtol=1e-4, atol=1e-4)
        assert predictor.fuses_velocity(ring, changed) == (changed.scale.ndim == 2)


def test_which_kernels_a_gradient_launches(kernel_device, launches):
    predictor, ring, sigma = make("rank3", kernel_device, pushes=[4, 3])
    predictor.predict_velocity(ring, sigma, make_head(ring, 4)).sum().backward()  # through the forecast
    assert launches == [COEFFICIENTS, SUMS, COEFFICIENTS, SUMS, "_newton_predict_bwd_kernel"]


@pytest.mark.slow
def test_kernels_run_one_after_the_other_on_the_same_counters(kernel_device):
    """A kernel leaves the arrival counters as it found them, so the next one may have another shape."""
    with torch.no_grad():
        for name, tokens in (("blocks", 20), ("windows", 5), ("blocks", 40), ("blocks", 20)):
            predictor, ring, sigma = make(name, kernel_device, pushes=[4, 3], tokens=tokens)
            expected = in_torch(predictor)(ring, sigma)
            for _ in range(2):
                torch.testing.assert_close(predictor(ring, sigma), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["rank0", "windows", "k1", "k2", "k6", pytest.param("blocks", marks=pytest.mark.slow), "five-stages"]
)
def test_gradients(name, kernel_device):
    predictor, ring, sigma = make(name, kernel_device, pushes=[0, 1, 9], tokens=20)
    ring.storage = ring.storage.nan_to_num().requires_grad_()
    exact = in_torch(predictor).double()
    storage = ring.storage.detach().double().requires_grad_()
    up = torch.randn(ring.storage.shape[1:], generator=seeded(3)).to(kernel_device)
    forecast = predictor.forecast(*state_of(ring, sigma))
    wanted = exact.forecast(storage, *state_of(ring, sigma)[1:])
    inputs = [ring.storage, *predictor.parameters()]
    gradients = torch.autograd.grad(forecast, inputs, up, allow_unused=True)
    exact_inputs = [storage, *exact.parameters()]
    expected = torch.autograd.grad(wanted, exact_inputs, up.double(), allow_unused=True)
    for label, gradient, value in zip(["storage", *dict(predictor.named_parameters())], gradients, expected):
        value = torch.zeros_like(gradient) if value is None else value
        if gradient.numel() == 0:
            continue
        error = (gradient.double() - value.double()).abs().max()
        assert error <= 2e-4 * value.abs().max() + 1e-6, f"{label}: {error:.3g} of {value.abs().max():.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[2:])])
def test_gradients_in_narrow_dtypes(dtype, kernel_device):
    predictor, ring, sigma = make("blocks", kernel_device, dtype, pushes=[1, 3, 9], tokens=20)
    exact = in_torch(predictor)
    up = torch.randn(ring.storage.shape[1:], generator=seeded(3)).to(kernel_device)
    forecast, wanted = predictor(ring, sigma), exact(ring, sigma)
    gradients = torch.autograd.grad(forecast, [*predictor.parameters()], up.to(forecast.dtype))
    expected = torch.autograd.grad(wanted, [*exact.parameters()], up.to(forecast.dtype))
    for label, gradient, value in zip(dict(predictor.named_parameters()), gradients, expected):
        error = (gradient - value).norm() / value.norm()
        assert error < 3 * torch.finfo(forecast.dtype).eps, f"{label}: {error:.3g}"


@pytest.mark.slow
def test_gradients_are_the_same_every_time(kernel_device):
    predictor, ring, sigma = make("blocks", kernel_device, torch.bfloat16, pushes=[3, 9], tokens=70)
    runs = [torch.autograd.grad(predictor(ring, sigma).float().square().sum(), [*predictor.parameters()]) for _ in "ab"]
    for first, second in zip(*runs):
        assert torch.equal(first, second)


def test_float16_gradients_stay_in_range(kernel_device):
    """As under loss scaling, with large features: sums over tokens leave float16's range."""
    predictor, ring, sigma = make("rank3", kernel_device, torch.float16, pushes=[4, 4], tokens=30)
    ring.storage.mul_(200)
    up = torch.full(ring.storage.shape[1:], 3e4, dtype=torch.float16, device=kernel_device)
    exact = in_torch(predictor)
    gradients = torch.autograd.grad(predictor(ring, sigma), [*predictor.parameters()], up)
    expected = torch.autograd.grad(exact(ring, sigma), [*exact.parameters()], up)
    for label, gradient, value in zip(dict(predictor.named_parameters()), gradients, expected):
        assert (gradient - value).norm() < 0.02 * value.norm(), label


def test_there_are_no_second_derivatives(kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4, 3], tokens=2)
    ring.storage = ring.storage.nan_to_num()
    (first,) = torch.autograd.grad(predictor(ring, sigma).square().sum(), predictor.out_weight, create_graph=True)
    with pytest.raises(RuntimeError, match="newton_predict_bwd on Triton has no second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("requires", ["sigma", "sigmas"])
def test_gradients_of_noise_levels_are_left_to_torch(requires, kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4, 3])
    levels = ring.sigmas.clone().requires_grad_(requires == "sigmas")
    target = sigma.clone().requires_grad_(requires == "sigma")
    state = (ring.storage, None, levels, ring.cursor, ring.count, target)
    with pytest.raises(RuntimeError, match=r"`backend` must be one that newton_predict has for .* \(torch\)"):
        predictor.forecast(*state)
    predictor.backend = "auto"
    predictor.forecast(*state).sum().backward()
    assert (levels if requires == "sigmas" else target).grad.abs().sum() > 0


def functional(predictor, ring, sigma):
    config = predictor.config
    experts = [getattr(predictor, n) for n in ("in_weight", "in_bias", "spline", "out_weight", "out_bias")]
    experts += [predictor.down, predictor.up, predictor.up_bias]
    shape = (config.stage_bounds, config.history_length, config.grid_size, config.spline_order)
    return state_of(ring, sigma), tuple(experts), shape


@pytest.mark.parametrize("name", [pytest.param("rank0", marks=pytest.mark.slow), "windows"])
@pytest.mark.slow
def test_opcheck(name, kernel_device):
    predictor, ring, sigma = make(name, kernel_device, pushes=[4, 3], tokens=3)
    ring.storage.nan_to_num_()
    state, experts, shape = functional(predictor, ring, sigma)
    ops = torch.ops.lesa_kernels
    torch.library.opcheck(ops.newton_predict.default, (*state, *experts, *shape))
    one_level = (*state[:-1], torch.tensor(0.5))
    torch.library.opcheck(ops.newton_predict.default, (*one_level, *experts, *shape))
    head = make_head(ring, 4)
    parts = (head.weight, head.bias, head.scale, head.shift, head.eps, head.norm)
    detached = [None if e is None else e.detach() for e in experts]
    torch.library.opcheck(ops.newton_velocity.default, (*state, *detached, *parts, *shape))
    grad = torch.randn(2, 3, 24, device=kernel_device)
    torch.library.opcheck(ops.newton_predict_bwd.default, (grad, *state, *detached, *shape, True))
    levels = torch.tensor([[[0.6, 0.7, 0.8, 0.9]]], device=kernel_device)
    count, target = torch.tensor([[3]], dtype=torch.int32, device=kernel_device), levels[..., 0] - 0.1
    torch.library.opcheck(ops.newton_coefficients.default, (levels, count, target, *detached, *shape))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.slow
def test_compiles_without_a_graph_break(backend, kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4, 3], tokens=3)
    predictor.backend = backend
    head = make_head(ring, 4)

    def step(storage, sigmas, cursor, count, sigma):
        ring.storage, ring.sigmas, ring.cursor, ring.count = storage, sigmas, cursor, count
        return predictor(ring, sigma) * 2, predictor.predict_velocity(ring, sigma, head)

    arguments = (ring.storage, ring.sigmas, ring.cursor, ring.count, sigma)
    with torch.no_grad():
        expected = step(*arguments)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    for actual, wanted in zip(compiled, expected):
        assert torch.equal(actual, wanted)
    if backend == "auto" and kernel_device.type == "cpu":
        return  # a gradient is plain torch's there, which waits for the stages that occur
    loss = torch.compile(lambda *a: step(*a)[0].square().sum(), fullgraph=True, backend="aot_eager")(*arguments)
    loss.backward()
    gradients = [p.grad.clone() for p in predictor.parameters()]
    wanted = torch.autograd.grad(step(*arguments)[0].square().sum(), [*predictor.parameters()])
    for actual, value in zip(gradients, wanted):
        torch.testing.assert_close(actual, value)


@pytest.mark.slow
@torch.no_grad()
def test_two_graphs_serve_all_sizes(kernel_device):
    """One for the first, and one for all others: nothing is compiled again for a size."""
    predictor, _, _ = make("windows", kernel_device)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(predictor.predict_velocity, fullgraph=True, backend=counter)
    for tokens in (3, 5, 8, 9):
        _, ring, sigma = make("windows", kernel_device, pushes=[4, 3], tokens=tokens)
        head = make_head(ring, 4)
        assert torch.equal(step(ring, sigma, head), predictor.predict_velocity(ring, sigma, head))
    assert counter.frame_count == 2


def test_autocast_changes_nothing(kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4, 3])
    head = make_head(ring, 4)

    def all_of_it():
        forecast = predictor(ring, sigma)
        with torch.no_grad():
            result = predictor.predict_velocity(ring, sigma, head)
        return forecast, result, *torch.autograd.grad(forecast.sum(), [*predictor.parameters()])

    plain = all_of_it()
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        under = all_of_it()
    for actual, expected in zip(under, plain):
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_parameters_may_be_narrow(kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4, 3])
    narrow = predictor.bfloat16()
    torch.testing.assert_close(narrow(ring, sigma), in_torch(narrow)(ring, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"spline_order": 6}, {}], ids=["degree", "float64"])
def test_what_the_kernels_are_not_made_for_runs_in_torch(change, kernel_device):
    config = PredictorConfig(8, rank=2, hidden=5, **change)
    predictor, ring = trained(config, kernel_device), filled_ring(config, kernel_device, [4, 3], [0.5, 0.2])
    sigma = torch.tensor([0.5, 0.2], device=kernel_device)
    if not change:
        predictor, ring.storage = predictor.double(), ring.storage.double()
    with pytest.raises(RuntimeError, match=r"`backend` must be one that newton_predict has for .* \(torch\)"):
        predictor(ring, sigma)
    predictor.backend = "auto"
    assert torch.equal(predictor(ring, sigma), in_torch(predictor).to(ring.storage.dtype)(ring, sigma))


def test_the_operators_check_their_arguments(kernel_device):
    predictor, ring, sigma = make("windows", kernel_device, pushes=[4, 3], tokens=3)
    state, experts, shape = functional(predictor, ring, sigma)
    with pytest.raises(ValueError, match=r"`storage` must have a last stride of 1, but got strides"):
        apart = ring.storage.mT.contiguous().mT
        torch.ops.lesa_kernels.newton_predict(apart, *state[1:], *experts, *shape)
    with pytest.raises(ValueError, match=r"`sigmas` must have shape \[4, 2\]"):
        torch.ops.lesa_kernels.newton_predict(state[0], None, ring.sigmas[:1], *state[3:], *experts, *shape)
    with pytest.raises(ValueError, match=r"`sigma` must have shape \[2\]"):
        torch.ops.lesa_kernels.newton_predict(*state[:-1], torch.tensor([0.5]), *experts, *shape)
    head = make_head(ring, 4)
    parts = (head.weight, head.bias, head.scale[:1], head.shift, head.eps, head.norm)
    with pytest.raises(ValueError, match=r"`head.scale` must have shape \[2, 24\]"):
        torch.ops.lesa_kernels.newton_velocity(*state, *experts, *parts, *shape)


def test_names_and_order_of_arguments_are_those_of_the_public_functions():
    """One order at every level: named tuples and operators have what the public functions take."""

    def names(function):
        return [*inspect.signature(function).parameters]

    def schema(operator):
        return [argument.name for argument in getattr(torch.ops.lesa_kernels, operator).default._schema.arguments]

    newton, dense = (
        [*RingState._fields, *experts._fields, *Shape._fields] for experts in (NewtonExperts, DenseExperts)
    )
    assert names(newton_predict) == [*newton, "backend"]
    assert schema("newton_predict") == schema("newton_predict_cpu") == newton
    levels = ["sigmas", "count", "sigma", *newton[len(RingState._fields) :]]
    assert names(newton_coefficients) == [*levels, "backend"]
    assert schema("newton_coefficients") == levels
    assert schema("newton_predict_bwd") == ["grad", *newton, "needs_storage"]
    assert names(dense_predict) == [*dense, "backend"]
    assert schema("dense_predict") == dense
    assert schema("dense_predict_bwd") == ["grad", *dense, "needs_storage"]
    head = len(newton) - len(Shape._fields)
    assert names(newton_velocity) == [*newton[:head], "head", *newton[head:], "backend"]
    parts = ["weight", "bias", "scale", "shift", "eps", "norm"]
    assert schema("newton_velocity") == [*newton[:head], *parts, *newton[head:]]


def test_the_schemas_of_the_operators():
    ring = "Tensor storage, Tensor? scales, Tensor sigmas, Tensor cursor, Tensor count, Tensor sigma"
    kan = "Tensor in_weight, Tensor in_bias, Tensor spline, Tensor out_weight, Tensor out_bias"
    newton = f"{ring}, {kan}, Tensor? down, Tensor? up, Tensor? up_bias"
    dense = f"{ring}, {kan}, Tensor mix_weight, Tensor mix_bias"
    head = "Tensor weight, Tensor? bias, Tensor scale, Tensor? shift, float eps, str? norm"
    levels = newton.replace(ring, "Tensor sigmas, Tensor count, Tensor sigma")
    shape = "float[] stage_bounds, int[] history_length, int grid_size, int spline_order"
    wanted = {
        "newton_predict": f"{newton}, {shape}) -> Tensor",
        "newton_predict_cpu": f"{newton}, {shape}) -> Tensor",
        "newton_coefficients": f"{levels}, {shape}) -> Tensor[]",
        "newton_predict_bwd": f"Tensor grad, {newton}, {shape}, bool needs_storage) -> Tensor[]",
        "newton_velocity": f"{newton}, {head}, {shape}) -> Tensor",
        "dense_predict": f"{dense}, {shape}) -> Tensor",
        "dense_predict_bwd": f"Tensor grad, {dense}, {shape}, bool needs_storage) -> Tensor[]",
    }
    for name, schema in wanted.items():
        assert str(getattr(torch.ops.lesa_kernels, name).default._schema) == f"lesa_kernels::{name}({schema}"


def test_the_tags_of_the_operators():
    """Compilers must neither refuse an operator nor change the strides of what it reads."""
    names = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "lesa_kernels::" in name]
    found = {}
    for name in names:
        packet, _, overload = name.partition(".")
        found[name] = getattr(getattr(torch.ops.lesa_kernels, packet), overload or "default")
    assert {"newton_predict", "newton_predict_bwd", "newton_coefficients", "dense_predict", "bspline_kan"} <= {*found}
    wanted = {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides}
    assert {name: {*operator.tags} & wanted for name, operator in found.items()} == dict.fromkeys(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rank0", "windows", "k1"])
def test_one_level_for_all_samples_is_a_number(name, kernel_device):
    """The kernel takes it as it is; on a GPU there is no tensor to fill."""
    predictor, ring, _ = make(name, kernel_device, pushes=[4, 3, 0])
    head = make_head(ring, 3)
    each = torch.full((3,), 0.4, device=kernel_device)
    assert torch.equal(predictor(ring, 0.4)[:2], predictor(ring, each)[:2])
    one = predictor.predict_velocity(ring, 0.4, head)
    assert torch.equal(one[:2], predictor.predict_velocity(ring, each, head)[:2]) and one[2].isnan().all()


def test_gradients_at_one_level_for_all_samples(kernel_device):
    predictor, ring, _ = make("windows", kernel_device, pushes=[4, 3])
    each = torch.full((2,), 0.4, device=kernel_device)
    one, many = ([*torch.autograd.grad(predictor(ring, s).sum(), [*predictor.parameters()])] for s in (0.4, each))
    assert all(torch.equal(a, b) for a, b in zip(one, many))


@torch.no_grad()
def test_a_residual_that_does_not_fit_is_refused_where_triton_was_asked_for(kernel_device, monkeypatch):
    from lesa_kernels.stream.kernels import sums

    predictor, ring, sigma = make("rank3", kernel_device, pushes=[4, 3])
    monkeypatch.setattr(sums, "sums_launch", lambda *args: "a rank of 3 needs more registers than sm_00 has")
    with pytest.raises(RuntimeError, match="`backend` must .*a rank of 3 needs more registers.*'triton'.*torch"):
        predictor(ring, sigma)
    predictor.backend = "auto"
    assert predictor(ring, sigma).isfinite().all()
