"""Forecasting one predicted step, against plain torch, as it is and compiled, and what a matrix product costs.

Newton with rank 0 and 32 and dense; then newton together with the output head.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig, output_head, work
from lesa_kernels.feature_ring.reference import newest_slots
from lesa_kernels.predictor.reference import OFFSET_SCALE, kan_hidden, newton_weights

SIGMAS = [0.95, 0.9, 0.84, 0.77, 0.7, 0.64, 0.57, 0.5]
TARGET = 0.45  # in the middle stage of three
STAGE = 1
OUT_CHANNELS = 64
MIXERS = {
    "newton-rank0": {"mixer": "newton", "rank": 0},
    "newton-rank32": {"mixer": "newton", "rank": 32},
    "dense": {"mixer": "dense"},
}


def random_predictor(shape, device, mixer, backend="auto", **options) -> FusedKANPredictor:
    """A predictor whose experts all contribute, as after training; dense in the features' dtype."""
    predictor = FusedKANPredictor(PredictorConfig(shape.dim, mixer, **options), backend)
    with torch.no_grad():
        # So large that a forecast without any of its parts would be far off.
        spreads = {"out_weight": predictor.config.hidden**-0.5, "up": 0.3, "mix_weight": shape.dim**-0.5}
        for name, spread in spreads.items():
            weight = getattr(predictor, name, None)
            if weight is not None:
                weight.normal_(std=spread)
    return predictor.to(device, shape.dtype if mixer == "dense" else torch.float32).eval()


def filled_ring(predictor, shape, device) -> FeatureRing:
    ring = predictor.make_ring(shape.batch, shape.tokens, shape.dtype, device)
    for sigma in SIGMAS:
        ring.push(torch.randn(shape.batch, shape.tokens, shape.dim, device=device).to(shape.dtype), sigma)
    return ring


def random_head(shape, device) -> OutputHead:
    weight = torch.randn(OUT_CHANNELS, shape.dim, device=device) / shape.dim**0.5
    scale, shift = (0.1 * torch.randn(shape.batch, shape.dim, device=device) for _ in range(2))
    return OutputHead(*(t.to(shape.dtype) for t in (weight, weight[:, 0], scale, shift)))


def in_float64(predictor, ring) -> torch.Tensor:
    """What the predictor means: the plain torch form in double precision."""
    exact = FusedKANPredictor(predictor.config, backend="torch").to(ring.device, torch.float64)
    exact.load_state_dict(predictor.state_dict())
    wide = copy.copy(ring)
    wide.storage = ring.storage.double()
    return exact(wide, TARGET)


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


def skip_needless(implementation, shape, device):
    """Compiling takes long, so only two sizes of a GPU have it."""
    if implementation == "compiled" and (device.type == "cpu" or not shape.name.startswith(("flux", "hunyuan"))):
        pytest.skip("compiled on a GPU only, at the sizes of FLUX and HunyuanVideo")


def skip_large_products(shape, device):
    """A CPU takes seconds for a dense forecast at full width, in any implementation."""
    if device.type == "cpu" and shape.dim > 1024:
        pytest.skip("at full width on a GPU only")


class NewtonPeer:
    """Newton's forecast in plain torch, its stage known beforehand, so that nothing waits for the device."""

    def __init__(self, predictor):
        self.config = predictor.config
        names = ("in_weight", "in_bias", "spline", "out_weight", "out_bias", "down", "up", "up_bias")
        parts = (getattr(predictor, name) for name in names)
        self.parts = [None if part is None else part[STAGE] for part in parts]

    def __call__(self, ring, sigma):
        in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias = self.parts
        slots = newest_slots(ring.cursor, ring.count, ring.capacity)
        rows = torch.arange(ring.batch, device=ring.device)
        features, levels = ring.storage[slots, rows].float(), ring.sigmas[slots, rows]
        inputs = torch.cat([(sigma - levels).T * OFFSET_SCALE, (2 * sigma - 1)[:, None]], 1)
        hidden = kan_hidden(inputs, in_weight, in_bias, spline, self.config.grid_size, self.config.spline_order)
        coefficients = torch.einsum("bm,jdm->bjd", hidden, out_weight) + out_bias
        weights = newton_weights(levels, ring.count, sigma)
        shares = torch.einsum("bjd,bjk->kbd", coefficients, weights)
        forecast = features[0] + (shares[:, :, None] * features).sum(0)
        if down is not None:
            maps = torch.einsum("rjd,bjk->kbdr", down, weights)
            forecast = forecast + F.linear((features @ maps).sum(0), up, up_bias)
        return forecast.to(ring.dtype)


def peer_of(predictor, implementation):
    """The predictor itself, on its own backend or in plain torch, or a peer beside it, as it is or compiled."""
    if implementation in ("lesa", "reference"):
        return predictor
    peer = NewtonPeer(predictor) if predictor.config.mixer == "newton" else predictor
    if implementation == "eager":
        return peer
    torch._dynamo.reset()  # so that each size is compiled for itself
    return torch.compile(peer, dynamic=False)


def work_of(predictor, shape) -> dict:
    config = predictor.config
    history = config.history_length[STAGE]
    if config.mixer == "newton":
        return work.newton_predict(*shape.sizes, history, config.rank, config.hidden)
    return work.dense_predict(*shape.sizes, history, parameter_bytes=shape.dtype.itemsize)


@pytest.mark.parametrize("implementation", ["lesa", "reference", "eager", "compiled"])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_predict(benchmark, timed, against_floor, shape, device, name, implementation):
    skip_needless(implementation, shape, device)
    if name == "dense":
        skip_large_products(shape, device)
        if implementation == "eager":
            pytest.skip("the reference is the eager form")
    torch.manual_seed(0)
    predictor = random_predictor(shape, device, backend="auto" if implementation == "lesa" else "torch", **MIXERS[name])
    ring = filled_ring(predictor, shape, device)
    sigma = torch.full((shape.batch,), TARGET, device=device)
    predict = peer_of(predictor, implementation)
    assert_close(predict(ring, sigma), in_float64(predictor, ring), shape.dtype)
    timed(lambda: predict(ring, sigma), f"predict {shape} {name}")
    against_floor(benchmark, **work_of(predictor, shape), dtype=shape.dtype)


@torch.no_grad()
def test_polynomial(benchmark, timed, against_floor, shape, device):
    """The peer: no learned part. It equals an untrained predictor whose coefficients are all one."""
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(shape.dim, rank=0)).to(device).eval()
    torch.nn.init.ones_(predictor.out_bias)
    ring = filled_ring(predictor, shape, device)
    anchors, cursor = ring.newest_first()[1][:, 0].tolist(), int(ring.cursor[0])
    exact = polynomial(ring.storage.double(), anchors, cursor, TARGET)
    assert_close(predictor(ring, TARGET), exact, shape.dtype)
    timed(lambda: polynomial(ring.storage, anchors, cursor, TARGET), f"predict {shape} newton-rank0")
    against_floor(benchmark, **work.polynomial(*shape.sizes))


class DensePeer:
    """The dense forecast by library calls alone, its KAN's scalar known beforehand."""

    def __init__(self, shape, device):
        self.predictor = random_predictor(shape, device, "dense")
        self.ring = filled_ring(self.predictor, shape, device)
        config = self.predictor.config
        first, history = sum(config.history_length[:STAGE]), config.history_length[STAGE]
        self.maps = self.predictor.mix_weight[first : first + history].transpose(1, 2).flatten(0, 1).contiguous()
        self.bias = self.predictor.mix_bias[STAGE]
        features, sigmas, _ = self.ring.newest_first()
        self.features = [feature.flatten(0, 1) for feature in features[:history]]
        offsets = F.pad((TARGET - sigmas[:history]).T.double(), (0, config.max_history - history)) * OFFSET_SCALE
        kan = (t[STAGE].double() for t in (self.predictor.in_weight, self.predictor.in_bias, self.predictor.spline))
        hidden = kan_hidden(offsets, *kan, config.grid_size, config.spline_order)
        alpha = hidden @ self.predictor.out_weight[STAGE].double() + self.predictor.out_bias[STAGE]
        self.alpha = alpha.repeat_interleave(shape.tokens)[:, None].to(shape.dtype)

    def epilogue(self, mixed: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.features[0], self.alpha, mixed)


@torch.no_grad()
def test_dense_product(benchmark, timed, against_floor, shape, device):
    """The peer: the matrix product alone, over a history that has been concatenated before."""
    skip_large_products(shape, device)
    torch.manual_seed(0)
    peer = DensePeer(shape, device)
    history = torch.cat(peer.features, 1)

    def product():
        return torch.addmm(peer.bias, history, peer.maps)

    forecast = peer.epilogue(product()).view(peer.ring.storage.shape[1:])
    assert_close(forecast, in_float64(peer.predictor, peer.ring), shape.dtype)
    timed(product, f"predict {shape} dense")
    against_floor(benchmark, **work_of(peer.predictor, shape), dtype=shape.dtype)


@torch.no_grad()
def test_dense_concatenated(benchmark, timed, against_floor, shape, device):
    """The peer: concatenation, product and epilogue."""
    skip_large_products(shape, device)
    torch.manual_seed(0)
    peer = DensePeer(shape, device)

    def forecast():
        return peer.epilogue(torch.addmm(peer.bias, torch.cat(peer.features, 1), peer.maps))

    exact = in_float64(peer.predictor, peer.ring)
    assert_close(forecast().view(exact.shape), exact, shape.dtype)
    timed(forecast, f"predict {shape} dense")
    against_floor(benchmark, **work_of(peer.predictor, shape), dtype=shape.dtype)


@pytest.mark.parametrize("implementation", ["fused", "separate"])
@pytest.mark.parametrize("rank", [0, 32])
@torch.no_grad()
def test_velocity(benchmark, timed, against_floor, shape, device, rank, implementation):
    """The forecast and the output head in one call, against one after the other."""
    torch.manual_seed(0)
    predictor = random_predictor(shape, device, "newton", rank=rank)
    ring, head = filled_ring(predictor, shape, device), random_head(shape, device)
    sigma = torch.full((shape.batch,), TARGET, device=device)
    wide = OutputHead(*(getattr(head, name).double() for name in ("weight", "bias", "scale", "shift")))
    exact = output_head(in_float64(predictor, ring), wide, backend="torch")

    def velocity():
        if implementation == "fused":
            return predictor.predict_velocity(ring, sigma, head)
        return output_head(predictor(ring, sigma), head)

    assert_close(velocity(), exact, shape.dtype)
    timed(velocity, f"velocity {shape} rank{rank}")
    least = work.predict_velocity(*shape.sizes, OUT_CHANNELS, rank=rank, hidden=predictor.config.hidden)
    against_floor(benchmark, **least, dtype=shape.dtype)
