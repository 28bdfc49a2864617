import inspect
import itertools
import json
import math
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError

from lesa_kernels import (
    FeatureRing,
    FusedKANPredictor,
    OutputHead,
    PredictorConfig,
    bspline_evaluate,
    dense_predict,
    newton_predict,
    output_head,
)
from lesa_kernels.extension import extension_error

DIM = 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_ring(pushes, capacity=4, tokens=3, dim=DIM, dtype=torch.float32, seed=0):
    """A ring whose row b got `pushes[b]` features at falling sigmas; memory that nobody wrote is NaN."""
    generator = seeded(seed)
    ring = FeatureRing(capacity, len(pushes), tokens, dim, dtype)
    ring.storage.fill_(math.nan)
    ring.sigmas.fill_(math.nan)
    for row, count in enumerate(pushes):
        gaps = torch.rand(max(count, 1), generator=generator) * 0.4 / max(count, 1) + 0.02
        for sigma in (1.0 - gaps.cumsum(0)).tolist()[:count]:
            ring.push(torch.randn(1, tokens, dim, generator=generator), sigma, rows=[row])
    return ring


def in_float64(predictor, ring):
    """Both in float64, so that rounding is out of the way."""
    ring.storage = ring.storage.double()
    return predictor.double(), ring


def randomized(config, seed=0):
    """A predictor none of whose parameters is zero."""
    predictor = FusedKANPredictor(config)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return predictor


def anchors_of(ring, row):
    """Sigmas and features of one row, newest first, in float64: read by walking back from the cursor."""
    found = []
    for back in range(int(ring.count[row])):
        slot = (int(ring.cursor[row]) - 1 - back) % ring.capacity
        found.append((float(ring.sigmas[slot, row]), ring.storage[slot, row].double()))
    return found


def stage_of(sigma, bounds):
    sigma = torch.tensor(sigma, dtype=torch.float32)
    return sum(bool(sigma <= torch.tensor(bound, dtype=torch.float32)) for bound in bounds)


def spline_oracle(u, coefficients, grid_size, order):
    """One spline at one point by the Cox-de Boor recursion."""
    knots = [-1 + 2 / grid_size * (i - order) for i in range(grid_size + 2 * order + 1)]
    bases = [float(a <= u < b) for a, b in zip(knots, knots[1:])]
    for d in range(1, order + 1):
        bases = [
            (u - knots[i]) / (knots[i + d] - knots[i]) * bases[i]
            + (knots[i + d + 1] - u) / (knots[i + d + 1] - knots[i + 1]) * bases[i + 1]
            for i in range(len(bases) - 1)
        ]
    return sum(c * b for c, b in zip(coefficients, bases))


def hidden_oracle(predictor, stage, inputs):
    values = []
    for m in range(predictor.config.hidden):
        u = float(predictor.in_bias[stage, m])
        u = math.tanh(u + sum(float(w) * x for w, x in zip(predictor.in_weight[stage, m], inputs)))
        spline = spline_oracle(u, predictor.spline[stage, m].tolist(), predictor.config.grid_size, 3)
        values.append(spline + u / (1 + math.exp(-u)))
    return values


def kan_inputs(sigma, anchors, width):
    offsets = [5 * (sigma - s) for s, _ in anchors]
    return offsets + [0.0] * (width - len(offsets))


def newton_taps(sigma, anchors):
    """The Newton taps by the table of divided differences."""
    sigmas, column = [s for s, _ in anchors], [g for _, g in anchors]
    taps, reach = [], 1.0
    for j in range(1, len(anchors)):
        column = [(column[i] - column[i + 1]) / (sigmas[i] - sigmas[i + j]) for i in range(len(column) - 1)]
        reach *= sigma - sigmas[j - 1]
        taps.append(column[0] * reach)
    return taps


@torch.no_grad()
def newton_oracle(predictor, ring, sigmas):
    config, rows = predictor.config, []
    for row, sigma in enumerate(sigmas):
        stage = stage_of(sigma, config.stage_bounds)
        anchors = anchors_of(ring, row)[: config.history_length[stage]]
        if not anchors:
            rows.append(torch.full(ring.storage.shape[2:], math.nan, dtype=torch.float64))
            continue
        inputs = kan_inputs(sigma, anchors, config.max_history) + [2 * sigma - 1]
        hidden = hidden_oracle(predictor, stage, inputs)
        taps = newton_taps(sigma, anchors)
        forecast = anchors[0][1].clone()
        for j, tap in enumerate(taps):
            coefficient = predictor.out_bias[stage, j].double().clone()
            for m, value in enumerate(hidden):
                coefficient += predictor.out_weight[stage, j, :, m].double() * value
            forecast += coefficient * tap
        if config.rank:
            residual = predictor.up_bias[stage].double().expand_as(forecast).clone()
            for r in range(config.rank):
                read = sum(((tap * predictor.down[stage, r, j].double()).sum(-1) for j, tap in enumerate(taps)), 0.0)
                if taps:
                    residual += read[:, None] * predictor.up[stage, :, r].double()
            forecast += residual
        rows.append(forecast)
    return torch.stack(rows)


@torch.no_grad()
def dense_oracle(predictor, ring, sigmas):
    config, rows = predictor.config, []
    for row, sigma in enumerate(sigmas):
        stage = stage_of(sigma, config.stage_bounds)
        length = config.history_length[stage]
        anchors = anchors_of(ring, row)[:length]
        if not anchors:
            rows.append(torch.full(ring.storage.shape[2:], math.nan, dtype=torch.float64))
            continue
        hidden = hidden_oracle(predictor, stage, kan_inputs(sigma, anchors, config.max_history))
        alpha = float(predictor.out_bias[stage])
        alpha += sum(float(w) * value for w, value in zip(predictor.out_weight[stage], hidden))
        features = [g for _, g in anchors] + [anchors[-1][1]] * (length - len(anchors))
        first = sum(config.history_length[:stage])
        mixed = predictor.mix_bias[stage].double().expand_as(features[0]).clone()
        for k, feature in enumerate(features):
            for out, token in itertools.product(range(config.feature_dim), range(len(feature))):
                mixed[token, out] += (predictor.mix_weight[first + k, out].double() * feature[token]).sum()
        rows.append(features[0] + alpha * mixed)
    return torch.stack(rows)


ORACLES = {"newton": newton_oracle, "dense": dense_oracle}
CONFIGS = {
    "newton": PredictorConfig(DIM, rank=2, hidden=5),
    "newton-rank0": PredictorConfig(DIM, rank=0, hidden=5),
    "newton-windows": PredictorConfig(DIM, rank=2, hidden=5, history_length=(2, 4, 3)),
    "newton-one-stage": PredictorConfig(DIM, rank=2, hidden=5, stage_bounds=()),
    "newton-five-stages": PredictorConfig(DIM, rank=1, hidden=5, stage_bounds=(0.8, 0.6, 0.4, 0.2)),
    "newton-k2": PredictorConfig(DIM, rank=2, hidden=5, history_length=2),
    "newton-k1": PredictorConfig(DIM, rank=2, hidden=5, history_length=1),
    "dense": PredictorConfig(DIM, mixer="dense", hidden=5, history_length=(2, 3, 4)),
    "dense-one-stage": PredictorConfig(DIM, mixer="dense", hidden=5, stage_bounds=()),
    "dense-k1": PredictorConfig(DIM, mixer="dense", hidden=5, history_length=1),
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_mixers = pytest.mark.parametrize("config", [CONFIGS["newton-windows"], CONFIGS["dense"]], ids=["newton", "dense"])

# Rows that were never pushed to, partly filled, just full, and wrapped around.
PUSHES = [0, 1, 2, 3, 4, 5, 9]
SIGMAS = torch.tensor([0.5, 0.42, 0.05, 0.7, 0.3, 0.45, 0.1])


@all_configs
@pytest.mark.parametrize("capacity", [4, 7], ids=["fits", "roomy"])
def test_forecast_equals_the_loop_oracle(config, capacity):
    predictor, ring = in_float64(randomized(config), make_ring(PUSHES, capacity))
    expected = ORACLES[config.mixer](predictor, ring, SIGMAS.tolist())
    torch.testing.assert_close(predictor(ring, SIGMAS), expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert expected[0].isnan().all() and expected[1:].isfinite().all()


@all_configs
def test_forecast_in_float32_is_close_to_the_oracle(config):
    predictor, ring = randomized(config), make_ring(PUSHES)
    expected = ORACLES[config.mixer](predictor, ring, SIGMAS.tolist())
    forecast = predictor(ring, SIGMAS)
    assert forecast.dtype == torch.float32
    # The third divided difference cancels: its error grows with the size of the taps, not of the result.
    scale = expected[1:].abs().amax((1, 2), keepdim=True)
    assert ((forecast[1:] - expected[1:]).abs() <= 1e-3 * scale).all()
    assert forecast[0].isnan().all()


def test_untrained_newton_is_first_order_extrapolation():
    predictor, ring = in_float64(FusedKANPredictor(PredictorConfig(DIM)), make_ring([2, 3, 4, 6]))
    sigmas = torch.tensor([0.4, 0.35, 0.2, 0.01])
    for row, sigma in enumerate(sigmas.tolist()):
        (s0, g0), (s1, g1) = anchors_of(ring, row)[:2]
        expected = g0 + (g0 - g1) / (s0 - s1) * (sigma - s0)
        torch.testing.assert_close(predictor(ring, sigmas)[row], expected, rtol=1e-10, atol=1e-10)


def polynomial_predictor(length, **options):
    predictor = FusedKANPredictor(PredictorConfig(DIM, history_length=length, rank=2, **options))
    torch.nn.init.ones_(predictor.out_bias)
    return predictor


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_newton_with_unit_coefficients_is_exact_on_polynomials(length):
    sigmas = [1.0 - 0.09 * i for i in range(length + 2)]
    coefficients = torch.randn(length, 2, 3, DIM, dtype=torch.float64, generator=seeded())

    def features(sigma):
        return sum(c * sigma**power for power, c in enumerate(coefficients))

    ring = FeatureRing(length, 2, 3, DIM)
    ring.storage = ring.storage.double()
    rounded = torch.tensor(sigmas)  # what a ring stores
    for i, sigma in enumerate(rounded.tolist()):
        ring.storage[i % length] = features(sigma)
        ring.sigmas[i % length] = sigma
    ring.cursor.fill_(len(sigmas) % length)
    ring.count.fill_(length)
    target = torch.tensor([0.2, 0.33])
    expected = torch.stack([features(s)[row] for row, s in enumerate(target.tolist())])
    forecast = polynomial_predictor(length).double()(ring, target)
    torch.testing.assert_close(forecast, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pushes", [1, 2, 3, 4, 6])
def test_newton_with_unit_coefficients_is_lagrange_interpolation_of_the_anchors_that_are_there(pushes):
    predictor, ring = in_float64(polynomial_predictor(4), make_ring([pushes]))
    sigma = float(torch.tensor(0.3))
    anchors = anchors_of(ring, 0)[:4]
    expected = torch.zeros(3, DIM, dtype=torch.float64)
    for k, (s, g) in enumerate(anchors):
        expected += g * math.prod((sigma - q) / (s - q) for i, (q, _) in enumerate(anchors) if i != k)
    torch.testing.assert_close(predictor(ring, sigma)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pushes", [1, 2, 5])
def test_untrained_dense_repeats_the_newest_feature(pushes):
    predictor = FusedKANPredictor(PredictorConfig(DIM, mixer="dense", stage_bounds=()))
    ring = make_ring([pushes])
    assert torch.equal(predictor(ring, 0.3)[0].double(), anchors_of(ring, 0)[0][1])


@both_mixers
def test_stages_of_one_batch_equal_each_sample_alone(config):
    predictor = randomized(config)
    ring = make_ring([4, 3, 4])
    sigma = torch.tensor([0.9, 0.5, 0.1])
    together = predictor(ring, sigma)
    for row in range(3):
        alone = FeatureRing(4, 1, 3, DIM)
        for name in ("storage", "sigmas"):
            getattr(alone, name).copy_(getattr(ring, name)[:, row : row + 1])
        for name in ("cursor", "count"):
            getattr(alone, name).copy_(getattr(ring, name)[row : row + 1])
        torch.testing.assert_close(predictor(alone, sigma[row])[0], together[row], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictor(ring, 0.9)[2], predictor(ring, torch.tensor([0.9, 0.9, 0.1]))[2])


@both_mixers
@pytest.mark.parametrize("bound", [0.7, 1 / 3, 0.123])
def test_a_sigma_at_a_bound_belongs_to_the_lower_noise_stage(config, bound):
    config = PredictorConfig(DIM, mixer=config.mixer, hidden=5, rank=2, history_length=3, stage_bounds=(bound,))
    predictor = randomized(config)
    ring = make_ring([4], capacity=3)
    at = torch.tensor(bound)
    above = torch.nextafter(at, torch.tensor(2.0))
    forecasts = torch.stack([predictor(ring, s) for s in (above, at)])
    for number in (0, 1):  # each of the two experts alone, at both points
        single = FusedKANPredictor(
            PredictorConfig(DIM, mixer=config.mixer, hidden=5, rank=2, history_length=3, stage_bounds=())
        )
        for name, value in predictor.named_parameters():
            chosen = value[3 * number : 3 * number + 3] if name == "mix_weight" else value[number : number + 1]
            getattr(single, name).data = chosen.detach()
        torch.testing.assert_close(forecasts[number], single(ring, (above, at)[number]))
    assert (forecasts[0] - forecasts[1]).abs().max() > 0.01


@both_mixers
def test_scalar_and_tensor_sigmas_agree(config):
    predictor, ring = randomized(config), make_ring([4, 2])
    expected = predictor(ring, torch.tensor([0.25, 0.25]))
    for sigma in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        assert torch.equal(predictor(ring, sigma), expected)
    assert torch.equal(predictor(ring, torch.tensor([0.25, 0.25], dtype=torch.float64)), expected)
    assert predictor(ring, 0).shape == expected.shape
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(predictor(ring, 0.7), predictor(ring, torch.tensor(0.7, dtype=torch.float32)))
    finally:
        torch.set_default_dtype(torch.float32)


@both_mixers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rings_only_round_the_result(config, dtype):
    predictor, ring = randomized(config), make_ring([4, 2, 6], dtype=dtype)
    with torch.no_grad():
        for parameter in predictor.parameters():  # keep float16 in range
            parameter.mul_(0.5)
    sigma = torch.tensor([0.5, 0.4, 0.1])
    forecast = predictor(ring, sigma)
    assert forecast.dtype == dtype
    wide, double = in_float64(randomized(config), make_ring([4, 2, 6], dtype=dtype))
    wide.load_state_dict(predictor.state_dict())
    exact = wide(double, sigma)
    error, rounding = (forecast.double() - exact).abs(), (exact.float().to(dtype).double() - exact).abs()
    assert error.max() <= 2 * rounding.max()


@both_mixers
def test_half_precision_parameters_are_computed_in_float32(config):
    predictor, ring = randomized(config).bfloat16(), make_ring([4, 2])
    forecast = predictor(ring, 0.3)
    assert forecast.dtype == torch.float32
    torch.testing.assert_close(forecast, predictor.float()(ring, 0.3), rtol=0, atol=0)


@both_mixers
def test_autocast_changes_nothing(config):
    predictor, ring = randomized(config), make_ring([4, 2])
    head = make_head(2)
    plain = predictor(ring, 0.3), predictor.predict_velocity(ring, 0.3, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = predictor(ring, 0.3), predictor.predict_velocity(ring, 0.3, head)
        assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16  # autocast itself is on
    for expected, actual in zip(plain, under):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@both_mixers
def test_strided_storage(config):
    predictor, ring = randomized(config), make_ring([4, 2, 3])
    expected = predictor(ring, 0.3)
    padded = torch.full((8, 6, 5, DIM + 3), math.nan)
    padded[::2, ::2, 1:4, 1:-2] = ring.storage
    transposed = torch.empty(4, 3, DIM, 3).transpose(2, 3).copy_(ring.storage)
    for storage in (padded[::2, ::2, 1:4, 1:-2], transposed):
        assert not storage.is_contiguous()
        ring.storage = storage
        torch.testing.assert_close(predictor(ring, 0.3), expected, rtol=1e-6, atol=1e-6)


@both_mixers
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(config, tokens):
    predictor, ring = randomized(config), make_ring([4, 2], tokens=max(tokens, 1))
    if tokens:
        expected = ORACLES[config.mixer](predictor, ring, [0.5, 0.5])
        torch.testing.assert_close(predictor(ring, 0.5).double(), expected, rtol=1e-3, atol=1e-3)
    else:
        ring.storage = ring.storage[:, :, :0]
        assert predictor(ring, torch.tensor([0.9, 0.1])).shape == (2, 0, DIM)


@pytest.mark.parametrize("mixer", ["newton", "dense"])
def test_one_channel(mixer):
    predictor = randomized(PredictorConfig(1, mixer=mixer, hidden=5, rank=1, history_length=3))
    predictor, ring = in_float64(predictor, make_ring([4, 2], capacity=3, dim=1))
    expected = ORACLES[mixer](predictor, ring, [0.5, 0.25])
    torch.testing.assert_close(predictor(ring, torch.tensor([0.5, 0.25])), expected, rtol=1e-9, atol=1e-9)


@both_mixers
def test_only_rows_without_history_are_nan(config):
    predictor, ring = randomized(config), make_ring([3, 0, 4])
    forecast = predictor(ring, 0.3)
    assert forecast[1].isnan().all()
    assert forecast[[0, 2]].isfinite().all()
    ring.reset()
    assert predictor(ring, 0.3).isnan().all()


def test_a_nan_feature_shows():
    ring = make_ring([4, 4])
    ring.storage[(ring.cursor[0] - 2) % 4, 0, 1, 2] = math.nan  # the second newest
    newton = randomized(CONFIGS["newton-rank0"])(ring, 0.3)
    assert newton[0, 1, 2].isnan() and newton.isnan().sum() == 1  # newton keeps channels apart
    for name in ("newton", "dense"):
        forecast = randomized(CONFIGS[name])(ring, 0.3)
        assert forecast[0, 1].isnan().all() and forecast.isnan().sum() == DIM


def arguments_of(predictor, ring, sigma):
    """The functional form's arguments, by name."""
    config = predictor.config
    state = {name: getattr(ring, name) for name in ("storage", "scales", "sigmas", "cursor", "count")}
    parameters = dict(predictor.named_parameters())
    if config.mixer == "newton" and not config.rank:
        parameters |= {"down": None, "up": None, "up_bias": None}
    shape = {n: getattr(config, n) for n in ("stage_bounds", "history_length", "grid_size", "spline_order")}
    return {**state, "sigma": sigma, **parameters, **shape}


FUNCTIONS = {"newton": newton_predict, "dense": dense_predict}


@pytest.mark.parametrize(
    "config",
    [
        PredictorConfig(3, rank=2, hidden=3, history_length=(2, 3), stage_bounds=(0.5,)),
        PredictorConfig(3, rank=0, hidden=3, history_length=(2, 3), stage_bounds=(0.5,)),
        PredictorConfig(3, mixer="dense", hidden=3, history_length=(2, 3), stage_bounds=(0.5,)),
    ],
    ids=["newton", "newton-rank0", "dense"],
)
def test_gradients(config):
    predictor, ring = in_float64(randomized(config), make_ring([5, 2], capacity=3, tokens=2, dim=3))
    ring.storage = ring.storage.nan_to_num().requires_grad_()
    arguments = arguments_of(predictor, ring, torch.tensor([0.7, 0.3]))
    names = [n for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    assert {"storage", *dict(predictor.named_parameters())} == set(names)

    def forecast(*values):
        return FUNCTIONS[config.mixer](**{**arguments, **dict(zip(names, values))})

    assert torch.autograd.gradcheck(forecast, [arguments[n] for n in names])


@both_mixers
def test_module_and_function_agree(config):
    predictor, ring = randomized(config), make_ring([4, 2])
    sigma = torch.tensor([0.7, 0.2])
    expected = FUNCTIONS[config.mixer](**arguments_of(predictor, ring, sigma))
    assert torch.equal(predictor(ring, sigma), expected)


def equivalent_code(function):
    """The example under "Equivalent to" in a docstring."""
    lines = inspect.getdoc(function).partition("Equivalent to")[2].partition("::\n")[2].splitlines()
    return "\n".join(line[4:] for line in itertools.takewhile(lambda line: not line or line[0] == " ", lines))


@all_configs
def test_the_docstring_says_what_is_computed(config):
    predictor, ring = in_float64(randomized(config), make_ring(PUSHES, capacity=5))
    expected = predictor(ring, SIGMAS)
    names = arguments_of(predictor, ring, SIGMAS) | {"sigmas": ring.sigmas.double(), "sigma": SIGMAS.double()}
    names |= {"torch": torch, "F": F, "bspline_evaluate": bspline_evaluate}
    for b in range(1, len(PUSHES)):
        names["b"] = b
        torch.set_default_dtype(torch.float64)
        try:
            exec(equivalent_code(FUNCTIONS[config.mixer]), names)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(names["h_hat"], expected[b], rtol=1e-9, atol=1e-9)


def test_the_docstring_of_the_head_says_what_is_computed():
    names = {"features": torch.randn(2, 5, DIM, generator=seeded()), "head": make_head(2), "F": F}
    exec(equivalent_code(output_head), names)
    torch.testing.assert_close(names["velocity"], output_head(names["features"], names["head"]))


def test_default_configurations():
    newton, dense = PredictorConfig(8), PredictorConfig(8, mixer="dense")
    assert (newton.history, newton.history_length, newton.rank) == ("anchors", (4, 4, 4), 32)
    assert (dense.history, dense.history_length, dense.hidden) == ("steps", (4, 6, 8), 256)
    assert PredictorConfig(8, mixer="dense", stage_bounds=(0.5,)).history_length == (4, 4)
    ring = FusedKANPredictor(dense).make_ring(2, 5, torch.bfloat16)
    assert (ring.capacity, ring.batch, ring.tokens, ring.dim, ring.dtype) == (8, 2, 5, 8, torch.bfloat16)


def test_untrained_predictors_are_seeded_by_torch():
    first, second, third = ((torch.manual_seed(s), FusedKANPredictor(PredictorConfig(DIM)))[1] for s in (0, 0, 1))
    assert torch.equal(first.spline, second.spline)
    assert not torch.equal(first.spline, third.spline)


def make_head(batch, dim=DIM, out=4, bias=True):
    generator = seeded(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return OutputHead(
        normal(out, dim), normal(out) if bias else None, normal(batch, dim) * 0.3, normal(batch, dim) * 0.3
    )


@both_mixers
@pytest.mark.parametrize("bias", [True, False])
def test_predict_velocity_is_the_head_of_the_forecast(config, bias):
    predictor, ring, head = randomized(config), make_ring([4, 2]), make_head(2, bias=bias)
    velocity = predictor.predict_velocity(ring, 0.3, head)
    features = predictor(ring, 0.3).double()
    centred = features - features.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    modulated = normed * (1 + head.scale.double()[:, None]) + head.shift.double()[:, None]
    expected = modulated @ head.weight.double().T + (head.bias.double() if bias else 0)
    torch.testing.assert_close(velocity.double(), expected, rtol=1e-4, atol=1e-4)


def test_output_head_in_bfloat16_only_rounds_the_result():
    features, head = torch.randn(2, 5, DIM, generator=seeded()).bfloat16(), make_head(2)
    velocity = output_head(features, head)
    assert velocity.dtype == torch.bfloat16
    assert torch.equal(velocity, output_head(features.float(), head).bfloat16())


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift"])
def test_a_head_that_does_not_fit_is_named(name):
    fields = vars(make_head(2))
    with pytest.raises(ValueError, match=rf"`head\.{name}` must have shape .* but got .*\[9, 9, 9\]"):
        output_head(torch.zeros(2, 5, DIM), OutputHead(**fields | {name: torch.zeros(9, 9, 9)}))
    with pytest.raises(TypeError, match=rf"`head\.{name}` must have one of the dtypes .* but got a int64 tensor"):
        output_head(torch.zeros(2, 5, DIM), OutputHead(**fields | {name: fields[name].long()}))


@both_mixers
def test_every_tensor_argument_is_checked(config):
    predictor, ring = randomized(config), make_ring([4, 2])
    arguments = arguments_of(predictor, ring, torch.tensor([0.7, 0.2]))
    tensors = [n for n, v in arguments.items() if isinstance(v, torch.Tensor)]
    function = FUNCTIONS[config.mixer]
    for name in tensors:
        wrong = arguments[name].new_zeros([n + 1 for n in arguments[name].shape] + [1])
        with pytest.raises(ValueError, match=f"`{name}` must have shape .* but got a .* tensor of shape .*"):
            function(**{**arguments, name: wrong})
        with pytest.raises(TypeError, match=f"`{name}` must be a torch.Tensor, but got 'no' "):
            function(**{**arguments, name: "no"})
    for name in tensors:
        with pytest.raises(TypeError, match=f"`{name}` must have .*dtype.* but got a int64 tensor"):
            function(**{**arguments, name: arguments[name].long()})


@both_mixers
def test_experts_must_have_equally_many_spline_units(config):
    predictor, ring = randomized(config), make_ring([4, 2])
    arguments = arguments_of(predictor, ring, torch.tensor([0.7, 0.2]))
    arguments["out_weight"] = torch.cat([arguments["out_weight"]] * 2, -1)
    with pytest.raises(ValueError, match=r"`out_weight` must have shape \[3, .*5\], but got .*10\]"):
        FUNCTIONS[config.mixer](**arguments)


@both_mixers
def test_history_length_is_checked(config):
    predictor, ring = randomized(config), make_ring([4, 2])
    arguments = arguments_of(predictor, ring, torch.tensor([0.7, 0.2]))
    with pytest.raises(ValueError, match=r"`history_length` must have one entry per stage, 3, but got \(4,\)"):
        FUNCTIONS[config.mixer](**{**arguments, "history_length": (4,)})
    for length, kind in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(kind, match=f"`history_length` must be an integer of at least 1, but got {length}"):
            FUNCTIONS[config.mixer](**{**arguments, "history_length": (4, length, 4)})
    with pytest.raises(ValueError, match="`history_length` must be at most the ring's capacity, 3"):
        predictor(make_ring([3], capacity=3), 0.3)


@both_mixers
@pytest.mark.parametrize("bounds", [(0.3, 0.6), (0.5, 0.5), (0.5, math.nan)], ids=str)
def test_stage_bounds_must_fall(config, bounds):
    arguments = arguments_of(randomized(config), make_ring([4, 2]), torch.tensor([0.7, 0.2]))
    with pytest.raises(ValueError, match="`stage_bounds` must fall strictly, from high to low noise, but got"):
        FUNCTIONS[config.mixer](**{**arguments, "stage_bounds": bounds})


def test_a_ring_or_sigma_that_does_not_fit_is_named():
    predictor = FusedKANPredictor(PredictorConfig(DIM))
    with pytest.raises(ValueError, match=r"`ring\.dim` must be the predictor's feature_dim, 6, but got 5"):
        predictor(make_ring([2], dim=5), 0.3)
    ring = make_ring([2, 2])
    with pytest.raises(ValueError, match=r"`sigma` must have shape \[2\], but got .* \[3\]"):
        predictor(ring, torch.zeros(3))
    with pytest.raises(TypeError, match="`sigma` must be a finite number, but got 'x'"):
        predictor(ring, "x")
    with pytest.raises(ValueError, match="`sigma` must be a finite number, but got nan"):
        predictor(ring, math.nan)


def test_config_must_be_a_config():
    with pytest.raises(TypeError, match="`config` must be a PredictorConfig, but got 128"):
        FusedKANPredictor(128)


@pytest.mark.parametrize(
    "field, value",
    [
        ("feature_dim", 0),
        ("feature_dim", 1.5),
        ("mixer", "quadratic"),
        ("history", "tokens"),
        ("stage_bounds", (0.3, 0.6)),
        ("stage_bounds", (0.3, 0.3)),
        ("stage_bounds", (1.5,)),
        ("stage_bounds", (1.0, 0.5)),
        ("stage_bounds", (0.5, 0.0)),
        ("stage_bounds", 0.5),
        ("history_length", 0),
        ("history_length", (4, 4)),
        ("history_length", "4"),
        ("rank", -1),
        ("hidden", 0),
        ("grid_size", 0),
        ("spline_order", 0),
        ("num_inference_steps", 0),
        ("schedule", (0, -1)),
        ("schedule", 7),
        ("schedule", (1, 2)),
        ("schedule", (0, 2, 2)),
        ("schedule", ()),
        ("schedule_sigmas", (1.0, math.nan)),
        ("schedule_sigmas", (1.0, 1.0)),
        ("more_step_counts", 28),
        ("more_step_counts", ()),
        ("more_step_counts", (28, 20)),
        ("more_step_counts", (0, 20)),
        ("more_step_counts", (20, 28)),
        ("format_version", 4),
    ],
)
def test_config_fields_are_checked(field, value):
    with pytest.raises((ValueError, TypeError), match=f"`{field}` must .* but got .*"):
        PredictorConfig(**{"feature_dim": DIM, field: value})


def test_more_step_counts_are_saved_only_where_there_are_some():
    """An earlier release knows no such field, and names it: so an ordinary predictor must not have it."""
    options = {"num_inference_steps": 50, "schedule": (0, 9), "schedule_sigmas": (1.0, 0.8)}
    config = PredictorConfig(DIM, **options)
    assert "more_step_counts" not in config.to_dict() and config.step_counts == (50,)
    several = PredictorConfig(DIM, **options, more_step_counts=[20, 28])
    values = json.loads(json.dumps(several.to_dict()))
    assert values["more_step_counts"] == [20, 28] and values["format_version"] == 3
    assert PredictorConfig.from_dict(values) == several and several.step_counts == (50, 20, 28)
    with pytest.raises(ValueError, match="`more_step_counts` must rise, without 50"):
        PredictorConfig(DIM, **options, more_step_counts=(28, 50))


def test_a_schedule_fits_its_number_of_steps():
    options = {"schedule": (0, 9), "schedule_sigmas": (1.0, 0.1)}
    assert PredictorConfig(DIM, num_inference_steps=10, **options).schedule == (0, 9)
    with pytest.raises(ValueError, match="`schedule` must be an integer of at least 0 and at most 8, but got 9"):
        PredictorConfig(DIM, num_inference_steps=9, **options)


def test_numpy_integers_become_ints():
    four = numpy.int64(4)
    names = ("feature_dim", "rank", "hidden", "grid_size", "spline_order", "num_inference_steps")
    given = dict.fromkeys(names, four) | {"history_length": four, "schedule": [numpy.int64(0), numpy.int64(3)]}
    config = PredictorConfig(**given, schedule_sigmas=(1.0, 0.5))
    for name in names:
        assert type(getattr(config, name)) is int
    assert {type(n) for n in (*config.history_length, *config.schedule)} == {int}
    assert json.loads(json.dumps(config.to_dict()))["schedule"] == [0, 3]


@pytest.mark.parametrize("given", [{"schedule": (0, 1)}, {"schedule_sigmas": (1.0, 0.5)}], ids=str)
def test_schedule_and_its_sigmas_come_together(given):
    with pytest.raises(ValueError, match="`schedule_sigmas` must have one noise level for each"):
        PredictorConfig(DIM, **given)


@both_mixers
def test_backends_that_can_not_run_say_so(config, monkeypatch, without_interpreter):
    ring = make_ring([4])
    for backend in ("triton", "extension"):
        predictor = FusedKANPredictor(config, backend=backend)
        with pytest.raises(RuntimeError, match=rf"`backend` must be one .* \(torch\), but got '{backend}'"):
            predictor(ring, 0.3)
    with pytest.raises(ValueError, match="`backend` must be one of .* but got 'nonsense'"):
        FusedKANPredictor(config, backend="nonsense")
    predictor = FusedKANPredictor(config)
    monkeypatch.setenv("LESA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="`LESA_BACKEND` must be one of .* but got 'nonsense'"):
        predictor(ring, 0.3)
    assert FusedKANPredictor(config, backend="torch")(ring, 0.3).isfinite().all()  # the argument goes before


@both_mixers
@pytest.mark.parametrize("variable", ["", "torch", "triton", "extension"])
def test_the_variable_leaves_operations_alone_that_have_no_such_backend(
    config, variable, monkeypatch, without_interpreter
):
    predictor, ring, head = randomized(config), make_ring([4]), make_head(1)
    expected = predictor.predict_velocity(ring, 0.3, head)
    monkeypatch.setenv("LESA_BACKEND", variable)
    assert torch.equal(predictor.predict_velocity(ring, 0.3, head), expected)


@pytest.fixture
def extension_calls(monkeypatch):
    """Grows by one whenever a newton forecast runs in the compiled extension."""
    from lesa_kernels.predictor import extension

    calls, run = [], extension.newton_predict_extension
    monkeypatch.setattr(extension, "newton_predict_extension", lambda *args: (calls.append(1), run(*args))[1])
    return calls


@pytest.mark.skipif(extension_error() is not None, reason=f"needs the compiled extension: {extension_error()}")
def test_the_extension_runs_where_no_gradient_is_needed(extension_calls, monkeypatch):
    predictor, ring, head = randomized(CONFIGS["newton"]), make_ring([4, 2]), make_head(2)
    expected = predictor(ring, 0.3), predictor.predict_velocity(ring, 0.3, head)
    assert not extension_calls
    with torch.no_grad():
        for value, wanted in zip((predictor(ring, 0.3), predictor.predict_velocity(ring, 0.3, head)), expected):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
        assert len(extension_calls) == 2
        monkeypatch.setenv("LESA_BACKEND", "torch")
        assert torch.equal(predictor(ring, 0.3), expected[0])
        monkeypatch.setenv("LESA_BACKEND", "extension")
        predictor(ring, 0.3)
        assert len(extension_calls) == 3
        predictor.double()
        ring.storage = ring.storage.double()
        predictor(ring, 0.3)  # in plain torch: the extension has no float64
        predictor.backend = "extension"
        with pytest.raises(RuntimeError, match=r"`backend` must be one that newton_predict has for cpu .* \(torch\)"):
            predictor(ring, 0.3)
    assert len(extension_calls) == 3


@pytest.mark.skipif(extension_error() is not None, reason=f"needs the compiled extension: {extension_error()}")
def test_a_float8_ring_is_forecast_in_bfloat16(extension_calls):
    for config in (CONFIGS["newton"], CONFIGS["dense"]):
        predictor, ring = randomized(config), make_ring([4, 2])
        narrow = FeatureRing(4, 2, 3, DIM, torch.float8_e4m3fn)
        features, sigmas, count = ring.newest_first()
        for row in range(2):
            for k in reversed(range(int(count[row]))):
                narrow.push(features[k, row : row + 1], sigmas[k, row : row + 1], rows=[row])
        wide, _, _ = narrow.newest_first()
        for k in reversed(range(4)):
            ring.storage[(ring.cursor - 1 - k) % 4, torch.arange(2)] = wide[k]
        with torch.no_grad():
            forecast = predictor(narrow, 0.3)
            state = (ring.storage, None, ring.sigmas, ring.cursor, ring.count)
            expected = predictor.forecast(*state, torch.full((2,), 0.3))
        assert forecast.dtype == torch.bfloat16
        torch.testing.assert_close(forecast, expected.bfloat16(), rtol=2**-7, atol=1e-3)


def assert_same_predictor(actual, expected):
    assert actual.config == expected.config
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        found = actual.state_dict()[name]
        assert found.dtype == value.dtype and torch.equal(found, value)


@all_configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(config, dtype, tmp_path):
    predictor = randomized(config).to(dtype)
    predictor.save_pretrained(tmp_path / "new" / "folder")
    loaded = FusedKANPredictor.from_pretrained(tmp_path / "new" / "folder", backend="torch")
    assert_same_predictor(loaded, predictor)
    assert loaded.backend == "torch"
    assert all(p.requires_grad for p in loaded.parameters())
    ring = make_ring([4, 1])
    assert torch.equal(loaded(ring, 0.2), predictor(ring, 0.2))
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_everything_it_was_trained_for_is_saved(tmp_path):
    trained = PredictorConfig(
        DIM, family="flux", num_inference_steps=50, schedule=(0, 2, 9), schedule_sigmas=(1.0, 0.96, 0.82)
    )
    FusedKANPredictor(trained).save_pretrained(str(tmp_path))
    assert FusedKANPredictor.from_pretrained(str(tmp_path)).config == trained


def test_saving_overwrites(tmp_path):
    randomized(CONFIGS["newton"], seed=1).save_pretrained(tmp_path)
    second = randomized(CONFIGS["dense"], seed=2)
    second.save_pretrained(tmp_path)
    assert_same_predictor(FusedKANPredictor.from_pretrained(tmp_path), second)


@pytest.mark.parametrize("broken", ["json.dumps", "safetensors.torch.save_file"])
def test_a_save_that_fails_leaves_what_was_there(saved, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="disk full"):
            FusedKANPredictor(CONFIGS["dense"]).save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_two_predictors_coexist(tmp_path):
    first, second = (randomized(CONFIGS["newton"], seed) for seed in (1, 2))
    ring = make_ring([4, 2])
    alone = first(ring, 0.3)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    loaded = [FusedKANPredictor.from_pretrained(tmp_path / name) for name in ("first", "second")]
    assert not torch.allclose(loaded[1](ring, 0.3), alone)
    assert torch.equal(loaded[0](ring, 0.3), alone)


@pytest.fixture
def saved(tmp_path):
    FusedKANPredictor(CONFIGS["newton"]).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "drop"}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "`format_version` must be 1, but got 2"),
        ({"format_version": "drop"}, "`format_version` must be 1, but got None"),
        ({"colour": "red"}, r"`config` has unknown fields: colour\. Remove them\."),
        ({"feature_dim": "drop"}, "`feature_dim` is required, but `config` does not have it"),
        ({"mixer": "quadratic"}, "`mixer` must be one of 'newton', 'dense'.*, but got 'quadratic'"),
        ({"hidden": 7}, r"safetensors: in_bias` must match its config, which says shape \[3, 7\], .* shape \[3, 5\]"),
        ({"rank": 0}, "`model.safetensors: down` must match its config, which says nothing, but got shape"),
        ({"stage_bounds": [0.5], "history_length": 4}, "must match its config, which says shape"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_named(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        FusedKANPredictor.from_pretrained(saved)


@pytest.mark.parametrize("text", [b"{ not json", b"", b"\xff\xfe"], ids=["syntax", "empty", "bytes"])
def test_an_unreadable_config(saved, text):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"`folder_or_id` must hold a readable config\.json, but got .*\."):
        FusedKANPredictor.from_pretrained(saved)


def test_a_config_that_is_no_object(saved):
    (saved / "config.json").write_text("[1, 2]")
    with pytest.raises(TypeError, match=r"`config` must be a dict, but got \[1, 2\]"):
        FusedKANPredictor.from_pretrained(saved)


def test_unreadable_weights(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"`folder_or_id` must hold a readable model\.safetensors, but got .*\."):
        FusedKANPredictor.from_pretrained(saved)


def test_weights_of_integers_are_refused_by_name(saved):
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    weights["spline"] = weights["spline"].int()
    safetensors.torch.save_file(weights, saved / "model.safetensors")
    with pytest.raises(TypeError, match="`model.safetensors: spline` must have one of the dtypes .* but got a int32"):
        FusedKANPredictor.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        FusedKANPredictor.from_pretrained(saved)


@pytest.mark.parametrize("where", ["nowhere", "./no/where", "file", "a/b/c"])
def test_a_folder_that_is_not_there(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder")
    why = "'file', which is a file" if where == "file" else f"there is no folder '{where}'"
    with pytest.raises(FileNotFoundError, match=why):
        FusedKANPredictor.from_pretrained(where)
    with pytest.raises(FileNotFoundError, match="which is a file" if where == "file" else "there is no folder"):
        FusedKANPredictor.from_pretrained(tmp_path / where)


def test_loading_from_the_hub(saved, monkeypatch):
    asked = []

    def download(repo, file, **options):
        asked.append((repo, file, options))
        if file == "provenance.json":
            raise EntryNotFoundError("the repository has no such file")
        return str(saved / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = FusedKANPredictor.from_pretrained("someone/flux-newton", revision="v1")
    assert loaded.config == CONFIGS["newton"]
    options = {"revision": "v1"}
    files = ("config.json", "model.safetensors", "provenance.json")
    assert asked == [("someone/flux-newton", file, options) for file in files]
    assert loaded.provenance is None


def test_push_to_hub(tmp_path, monkeypatch):
    predictor = randomized(CONFIGS["newton"])
    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            seen["repo"] = (repo_id, private, exist_ok)
            return f"https://hub/{repo_id}"

        def file_exists(self, repo_id, filename):
            return False

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            seen["uploaded_to"] = repo_id
            seen["loaded"] = FusedKANPredictor.from_pretrained(folder_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert predictor.push_to_hub("someone/mine", private=True, token="t") == "https://hub/someone/mine"
    assert (seen["token"], seen["repo"], seen["uploaded_to"]) == ("t", ("someone/mine", True, True), "someone/mine")
    assert_same_predictor(seen["loaded"], predictor)
