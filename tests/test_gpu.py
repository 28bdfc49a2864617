"""What can only be seen on a GPU: launches, synchronisation, CUDA graphs, streams, and results there."""

import math

import pytest
import torch

from lesa_kernels import BSplineKAN, FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig

pytestmark = pytest.mark.gpu

BATCH, TOKENS, DIM, OUT = 3, 200, 192, 16
SIGMA = (0.8, 0.5, 0.2)  # one sample in each stage
STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
# Largest difference between the kernels and plain torch on the same GPU, by the largest value: both round once to the
# output, and the kernels' products run in the features' dtype (float8: bfloat16).
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float8_e4m3fn: 2e-2}

CALLS = {
    "newton-rank0": {"mixer": "newton", "rank": 0},
    "newton-rank32": {"mixer": "newton", "rank": 32},
    "dense": {"mixer": "dense"},
    "velocity-rank0": {"mixer": "newton", "rank": 0},
    "velocity-rank32": {"mixer": "newton", "rank": 32},
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def make_predictor(name, dtype, backend="auto"):
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(DIM, **CALLS[name]), backend)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.normal_(std=0.3 / math.sqrt(parameter.shape[-1]))
    cast = name == "dense" and dtype.itemsize > 1
    return predictor.to("cuda", dtype if cast else torch.float32).requires_grad_(False)


def make_ring(predictor, dtype) -> FeatureRing:
    ring = predictor.make_ring(BATCH, TOKENS, dtype, "cuda")
    for i in range(ring.capacity + 1):
        sigmas = torch.tensor(SIGMA, device="cuda") + 0.02 * (ring.capacity + 1 - i)
        ring.push(randn(BATCH, TOKENS, DIM, seed=i), sigmas)
    return ring


def make_head():
    return OutputHead(randn(OUT, DIM) / DIM**0.5, randn(OUT), 0.1 * randn(BATCH, DIM), 0.1 * randn(BATCH, DIM, seed=1))


class Call:
    """`call()` forecasts; its inputs are on the GPU, so nothing in it needs the host."""

    def __init__(self, name, dtype, backend="auto"):
        self.name, self.predictor = name, make_predictor(name, dtype, backend)
        self.ring, self.head = make_ring(self.predictor, dtype), make_head()
        self.sigma = torch.tensor(SIGMA, device="cuda")

    def __call__(self):
        if self.name.startswith("velocity"):
            return self.predictor.predict_velocity(self.ring, self.sigma, self.head)
        return self.predictor(self.ring, self.sigma)


@pytest.fixture(params=CALLS)
def call(request):
    """A forecast of bfloat16 features whose kernel has been compiled."""
    call = Call(request.param, torch.bfloat16)
    call()
    torch.cuda.synchronize()
    return call


def test_one_launch(call):
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


def test_nothing_waits_for_the_host(call):
    features = randn(BATCH, TOKENS, DIM)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.ring.push(features, call.sigma + 0.01)
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for seed in (7, 8):
        # Other anchors, other noise levels: nothing of the capture may stay but addresses.
        call.ring.push(randn(BATCH, TOKENS, DIM, seed=seed), torch.tensor(SIGMA, device="cuda") + 0.01 / seed)
        call.sigma.sub_(0.01)
        output.fill_(math.nan)
        graph.replay()
        assert torch.equal(output, call())


def test_on_another_stream(call):
    expected = call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    features, sigma = randn(BATCH, TOKENS, DIM, seed=9), call.sigma + 0.005
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows on this stream has to wait, and nothing else may
        call.ring.push(features, sigma)
        moved = call()
    stream.synchronize()
    assert not torch.equal(moved, expected)
    assert torch.equal(moved, call())


def test_two_streams_at_once(call):
    """Programs of one call count each other; those of another stream must not be among them."""
    expected = call()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # until all calls of both are enqueued, so that they run side by side
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_equals_plain_torch(name, dtype):
    result, expected = Call(name, dtype)(), Call(name, dtype, backend="torch")()
    assert result.dtype == expected.dtype and result.shape == expected.shape
    error = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < TOLERANCES[dtype], float(error)


@pytest.mark.parametrize("dtype", STORED[:3], ids=str)
@pytest.mark.parametrize("sizes", [(256, 256, 8), (3072, 64, 5), (5, 3, 100)], ids=str)
def test_layer_equals_float64(sizes, dtype):
    """Values and gradients; the error is at most twice that of plain torch in the same dtype."""
    n_in, n_out, grid_size = sizes
    torch.manual_seed(0)
    layer = BSplineKAN(n_in, n_out, grid_size).to("cuda", dtype)
    inputs = {"x": randn(300, n_in).to(dtype).requires_grad_(), **dict(layer.named_parameters())}
    grad = randn(300, n_out, seed=1).to(dtype)

    def run(layer, x, backend):
        layer.backend = backend
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.dtype))

    kernels, plain = run(layer, inputs["x"], "auto"), run(layer, inputs["x"], "torch")
    exact_layer = BSplineKAN(n_in, n_out, grid_size).to("cuda", torch.float64)
    exact_layer.load_state_dict(layer.state_dict())
    exact = run(exact_layer, inputs["x"].detach().double().requires_grad_(), "torch")
    for name, ours, theirs, wanted in zip(("y", *inputs), kernels, plain, exact):
        allowed = 2 * (theirs.double() - wanted).norm() + torch.finfo(dtype).eps * wanted.norm()
        assert (ours.double() - wanted).norm() <= allowed, name


def test_gradients_are_the_same_every_time():
    torch.manual_seed(0)
    layer = BSplineKAN(128, 128, 8).cuda()
    x, grad = randn(5000, 128).requires_grad_(), randn(5000, 128, seed=1)
    first, second = (torch.autograd.grad(layer(x), [x, *layer.parameters()], grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
