"""Forecasting one skipped step: newton with rank 0 and 32, dense, and the plain polynomial through the same anchors."""

import pytest
import torch

from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig

SIGMAS = [0.95, 0.9, 0.84, 0.77, 0.7, 0.64, 0.57, 0.5]
TARGET = 0.45  # in the middle stage of three
MIXERS = {
    "newton-rank0": {"mixer": "newton", "rank": 0},
    "newton-rank32": {"mixer": "newton", "rank": 32},
    "dense": {"mixer": "dense"},
}


def random_predictor(shape, device, mixer, **options) -> FusedKANPredictor:
    """A predictor whose experts all contribute, as after training."""
    predictor = FusedKANPredictor(PredictorConfig(shape.dim, mixer, **options))
    with torch.no_grad():
        for name in ("out_weight", "up", "mix_weight"):
            weight = getattr(predictor, name, None)
            if weight is not None:
                weight.normal_(std=0.1 / shape.dim**0.5)
    return predictor.to(device).eval()


def filled_ring(predictor, shape, device) -> FeatureRing:
    ring = predictor.make_ring(shape.batch, shape.tokens, shape.dtype, device)
    for sigma in SIGMAS:
        ring.push(torch.randn(shape.batch, shape.tokens, shape.dim, device=device).to(shape.dtype), sigma)
    return ring


def in_float64(predictor, ring) -> torch.Tensor:
    """What the predictor means: the plain torch form in double precision."""
    exact = FusedKANPredictor(predictor.config, backend="torch").to(ring.device, torch.float64)
    exact.load_state_dict(predictor.state_dict())
    sigma = torch.full((ring.batch,), TARGET, device=ring.device)
    return exact.forecast(ring.storage.double(), ring.sigmas, ring.cursor, ring.count, sigma)


def polynomial(storage, sigmas, cursor, sigma) -> torch.Tensor:
    """The polynomial through the anchors in Lagrange's form: one weight per anchor, the least a forecast can read."""
    total = torch.zeros_like(storage[0])
    for k, s in enumerate(sigmas):
        others = [q for j, q in enumerate(sigmas) if j != k]
        weight = torch.tensor([(sigma - q) / (s - q) for q in others], dtype=torch.float64).prod()
        total.add_(storage[(cursor - 1 - k) % len(storage)], alpha=float(weight))
    return total


def assert_close(forecast, exact, dtype):
    error = (forecast.double() - exact).abs().max() / exact.abs().max()
    assert error < 4 * torch.finfo(dtype).eps + 1e-5, f"relative error {float(error):.2e}"


@pytest.mark.parametrize("name", MIXERS)
def test_predict(benchmark, timed, against_floor, shape, device, name):
    torch.manual_seed(0)
    predictor = random_predictor(shape, device, **MIXERS[name])
    config = predictor.config
    ring = filled_ring(predictor, shape, device)
    sigma = torch.full((shape.batch,), TARGET, device=device)
    state = (ring.storage, ring.sigmas, ring.cursor, ring.count, sigma)
    with torch.no_grad():
        assert_close(predictor.forecast(*state), in_float64(predictor, ring), shape.dtype)
        timed(lambda: predictor.forecast(*state), f"predict {shape}")
    history = config.history_length[1]
    tokens = shape.batch * shape.tokens
    moved, flops = (history + 1) * shape.nbytes, 0
    if config.mixer == "newton":
        moved += (history - 1) * shape.dim * (config.hidden + 1) * 4  # one stage's coefficients
        flops = 2 * tokens * shape.dim * config.rank * history  # K - 1 taps down, one product up
    else:
        moved += history * shape.dim**2 * 4
        flops = 2 * tokens * shape.dim**2 * history
    against_floor(benchmark, bytes=moved, flops=flops, dtype=shape.dtype)


def test_polynomial(benchmark, timed, against_floor, shape, device):
    """The peer: no learned part. It equals an untrained predictor whose coefficients are all one."""
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(shape.dim, rank=0)).to(device).eval()
    torch.nn.init.ones_(predictor.out_bias)
    ring = filled_ring(predictor, shape, device)
    anchors, cursor = ring.newest_first()[1][:, 0].tolist(), int(ring.cursor[0])
    with torch.no_grad():
        exact = polynomial(ring.storage.double(), anchors, cursor, TARGET)
        assert_close(predictor(ring, TARGET), exact, shape.dtype)
        timed(lambda: polynomial(ring.storage, anchors, cursor, TARGET), f"predict {shape}")
    against_floor(benchmark, bytes=(ring.capacity + 1) * shape.nbytes)
