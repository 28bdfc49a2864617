"""What can only be seen on a GPU: launches, synchronisation, CUDA graphs, streams, and results there."""

import math
import random
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ring_fuzz
from lesa_kernels import BSplineKAN, FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig, newton_coefficients
from lesa_kernels.extension import extension, extension_error
from lesa_kernels.stream import Weights, head_sums
from lesa_kernels.tune import device_seconds, graph_seconds
from ring_fuzz import assert_same_bytes

pytestmark = pytest.mark.gpu

# A build that should have kernels and can't run them is a failure, not a skip.
NO_KERNELS = extension_error() or ("" if extension().build_info()["cuda_version"] else "built without CUDA")
needs_kernels = pytest.mark.skipif(bool(NO_KERNELS), reason=f"the extension has no CUDA kernels: {NO_KERNELS}")

BATCH, TOKENS, DIM, OUT = 3, 200, 192, 16
SIGMA = (0.8, 0.5, 0.2)  # one sample in each stage
STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
# Largest difference between the kernels and plain torch on the same GPU, by the largest value: both round once to the
# output, and the kernels' products run in the features' dtype (float8: bfloat16).
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float8_e4m3fn: 2e-2}

# "forecast" and "step": within a run, with weights that were made before.
CALLS = {
    "forecast-rank0": {"mixer": "newton", "rank": 0},
    "forecast-rank32": {"mixer": "newton", "rank": 32},
    "step-rank0": {"mixer": "newton", "rank": 0},
    "step-rank32": {"mixer": "newton", "rank": 32},
    "newton-rank0": {"mixer": "newton", "rank": 0},
    "newton-rank32": {"mixer": "newton", "rank": 32},
    "dense": {"mixer": "dense"},
    "velocity-rank0": {"mixer": "newton", "rank": 0},
    "velocity-rank32": {"mixer": "newton", "rank": 32},
}
# Outside of a run, a rank above zero takes a launch for the weights and one for the rest. With the head, plain torch
# makes the head's sums in addition, and nobody promises how many launches that takes.
LAUNCHES = dict.fromkeys(CALLS, 1) | {"newton-rank32": 2, "velocity-rank0": None, "velocity-rank32": None}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def random_predictor(name, dtype, backend="auto"):
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
        self.name, self.predictor = name, random_predictor(name, dtype, backend)
        self.ring, self.head = make_ring(self.predictor, dtype), make_head()
        self.sigma = torch.tensor(SIGMA, device="cuda")
        if name.startswith(("forecast", "step")):
            self.prepare(dtype)

    def prepare(self, dtype):
        """The weights of each sample, whose stages differ, and what else a run prepares."""
        levels = self.ring.newest_first()[1].T.tolist()
        steps = [self.predictor.plan([of_one], [sigma], 1)[0] for of_one, sigma in zip(levels, SIGMA)]
        self.weights = Weights(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*steps)))
        self.low_rank = self.predictor.low_rank(torch.bfloat16 if dtype.itemsize == 1 else dtype)
        self.sums = head_sums(self.head, self.low_rank, self.weights.stage)

    def __call__(self):
        if self.name.startswith("forecast"):
            return self.predictor.forecast_with(self.ring, self.weights, self.low_rank)
        if self.name.startswith("step"):
            return self.predictor.velocity_with(self.ring, self.weights, self.head, self.low_rank, self.sums)
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


def launches(function) -> list[str]:
    """What a call of `function` gives the GPU to do: names of kernels and copies."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_launches(call):
    expected, kernels = LAUNCHES[call.name], launches(call)
    if expected is None:
        pytest.skip(f"not promised: {len(kernels)} launches here")
    assert len(kernels) == expected, kernels


@pytest.mark.parametrize("rank", [0, 32])
def test_the_weights_of_all_steps_are_one_launch(rank):
    predictor = random_predictor(f"newton-rank{rank}", torch.bfloat16)
    config, experts = predictor.config, predictor.experts()
    sigma = (0.5 - 0.01 * torch.arange(30, device="cuda").float())[:, None].repeat(1, BATCH)
    sigmas = sigma[..., None] + 0.02 * torch.arange(1, 1 + config.max_history, device="cuda")
    count = torch.full((30, BATCH), config.max_history, dtype=torch.int32, device="cuda")
    settings = config.stage_bounds, config.lengths, config.grid_size, config.spline_order

    def made():
        return newton_coefficients(sigmas, count, sigma, *experts, *settings)

    expected = newton_coefficients(sigmas, count, sigma, *experts, *settings, backend="torch")
    for ours, theirs in zip(made(), expected):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)
    kernels = launches(made)
    assert len(kernels) == 1, kernels


def test_nothing_waits_for_the_host(call):
    features = randn(BATCH, TOKENS, DIM)
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        call.ring.push(features, call.sigma + 0.01)
        output = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, call())


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


# The ring


def assert_same_rings(actual: FeatureRing, expected: FeatureRing):
    for name, buffer in vars(expected.snapshot()).items():
        if buffer is not None:
            assert_same_bytes(getattr(actual, name), buffer, name)
    for age in range(expected.capacity):
        assert_same_bytes(actual.gather(age), expected.gather(age), f"gather({age})")


def rings_to_compare(*sizes) -> list[FeatureRing]:
    """A ring of the kernels, and what it has to be: in plain torch on the same GPU, and of the extension on the CPU."""
    places = (("cuda", "extension"), ("cuda", "torch"), ("cpu", "extension"))
    rings = [FeatureRing(*sizes, device=device, backend=backend) for device, backend in places]
    for ring in rings:
        ring.storage.view(torch.uint8).fill_(0x7F)  # so that it shows where nobody should have written
    return rings


def values(n, tokens, dim, dtype, seed=0):
    """On the CPU. Tokens of all magnitudes; one is zero, and one has a value that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (12 * torch.rand(n, tokens, 1, generator=generator) - 8)
    result = torch.randn(n, tokens, dim, generator=generator) * magnitude
    result[0, 0] = 0
    result[-1, -1, -1] = (math.nan, math.inf, -math.inf, 1.0)[seed % 4]
    return result.to(dtype)


LAYOUTS = {
    "contiguous": torch.clone,
    "slice of tokens": lambda x: F.pad(x, (0, 0, 2, 1))[:, 2:-1],
    "slice of the width": lambda x: F.pad(x, (1, 4))[..., 1:-4],
    "other order": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
}
RING_SIZES = {"aligned": (9, 64), "odd": (5, 33), "one value": (1, 1), "long": (3, 3072), "long and odd": (2, 3073)}
SIGMAS_AND_ROWS = (
    (0.9, None),
    ([0.8, 0.85], None),
    ([0.8, 0.7], None),  # replaces the newest, and is appended
    (0.6, [1]),
    ([0.5, 0.55], [1, 0]),
    ([0.45, 0.4], None),  # over the oldest
    ([math.nan, 0.9], None),  # new histories
)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", STORED[:3], ids=str)
def test_pushes_and_gathers_give_the_bytes_of_plain_torch_and_of_the_cpu(dtype, stored, layout):
    for tokens, dim in RING_SIZES.values():
        rings = rings_to_compare(3, 2, tokens, dim, stored)
        for seed, (sigma, rows) in enumerate(SIGMAS_AND_ROWS):
            for other in rings[1:]:
                assert_same_rings(rings[0], other)
            features = values(2 if rows is None else len(rows), tokens, dim, dtype, seed)
            for ring in rings:
                level = sigma if isinstance(sigma, float) else torch.tensor(sigma, device=ring.device)
                where = None if rows is None else torch.tensor(rows, device=ring.device)
                ring.push(LAYOUTS[layout](features.to(ring.device)), level, where)
        for other in rings[1:]:
            assert_same_rings(rings[0], other)
        assert rings[0].count.tolist() == [1, 1]


@needs_kernels
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_pushes_and_gathers_of_the_size_of_flux(stored):
    rings = rings_to_compare(2, 1, 4096, 3072, stored)
    for seed in range(3):
        features = values(1, 4096, 3072, torch.bfloat16, seed)
        for ring in rings:
            ring.push(features.to(ring.device), 0.9 - 0.1 * seed)
    for other in rings[1:]:
        assert_same_rings(rings[0], other)


def on_gpu(tensor):
    """A copy with the same strides and offset."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@needs_kernels
@pytest.mark.parametrize("seed", range(4))
def test_random_pushes_and_gathers(seed):
    """Random sizes, layouts and alignments, as `ring_fuzz.py` makes them for the CPU."""
    rng = random.Random(seed)
    for _ in range(50):
        dim = rng.choice((1, 3, 8, 16, 17, 48, 65, 200, 513, 3072, 3073, 4100, rng.randint(1, 300)))
        sizes = rng.choice((1, 2, 3, 5)), rng.randint(1, 4), rng.choice((0, 1, 2, 5, rng.randint(1, 40))), dim
        stored = rng.choice(STORED)
        tested = FeatureRing(*sizes, stored, "cuda", "extension")
        plain = FeatureRing(*sizes, stored, "cpu", "torch")
        for name, buffer in vars(plain.snapshot()).items():
            if buffer is not None:
                setattr(tested, name, on_gpu(ring_fuzz.ragged(rng, buffer)))
        for _ in range(2 * plain.capacity + 2):
            rows = ring_fuzz.random_rows(rng, plain.batch)
            listed = list(range(plain.batch)) if rows is None else list(map(int, rows))
            features = ring_fuzz.random_values(rng, (len(listed), *sizes[2:]), rng.choice(STORED[:3]))
            push = ring_fuzz.random_layout(rng, features), ring_fuzz.random_sigma(rng, plain, listed), rows
            plain.push(*push)
            tested.push(*(on_gpu(each) if isinstance(each, torch.Tensor) else each for each in push))
            assert_same_rings(tested, plain)


def ring_calls(stored=torch.bfloat16, backend="extension"):
    """A ring, and what a program does with it whose tensors are on the GPU; all of it has been done before."""
    ring = FeatureRing(3, BATCH, TOKENS, DIM, stored, "cuda", backend)
    features, sigma = randn(BATCH, TOKENS, DIM), torch.tensor(SIGMA, device="cuda")
    rows = torch.tensor([2, 0], device="cuda")
    calls = {
        "push": lambda: ring.push(features, sigma),
        "push, sigma a float": lambda: ring.push(features, 0.5),
        "push of rows": lambda: ring.push(features[:2], sigma[:2], rows),
        "push of rows, sigma a float": lambda: ring.push(features[:2], 0.4, rows),
        "gather": lambda: ring.gather(1),
        "reset of rows": lambda: ring.reset(rows),
        "reset": lambda: ring.reset(),
    }
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    return ring, calls


@needs_kernels
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_push_and_a_gather_are_one_launch_each(stored):
    calls = ring_calls(stored)[1]
    for name, call in calls.items():
        if name.startswith("reset"):
            continue
        kernels = launches(call)
        assert len(kernels) == 1 and f"ring_{name.partition(' ')[0].strip(',')}" in kernels[0], (name, kernels)


@needs_kernels
@pytest.mark.parametrize(
    ("backend", "variable", "extends"),
    [("auto", None, True), ("auto", "triton", True), ("auto", "torch", False), ("torch", None, False)],
)
def test_which_backend_runs_on_a_gpu(backend, variable, extends, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("LESA_BACKEND", variable)
    calls = ring_calls(backend=backend)[1]
    for name in ("push", "gather"):
        assert any(f"ring_{name}" in kernel for kernel in launches(calls[name])) == extends, name


@needs_kernels
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_nothing_about_a_ring_waits_for_the_host(stored):
    calls = ring_calls(stored)[1]
    torch.cuda.set_sync_debug_mode("error")  # sees torch, but not what the extension does
    try:
        torch.cuda._sleep(200_000_000)  # a tenth of a second; whoever waits comes back when it is over
        for call in calls.values():
            call()
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_kernels
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_push_in_a_cuda_graph_walks_through_the_slots(stored):
    ring, eager, warm = (FeatureRing(3, 2, 5, 33, stored, "cuda", "extension") for _ in range(3))
    features, sigma = randn(2, 5, 33), torch.full((2,), 1.0, device="cuda")
    warm.push(features, sigma)  # loads the kernels, which a capture must not
    warm.gather()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ring.push(features, sigma)
        newest = ring.gather()
    assert_same_rings(ring, eager)
    lower, same, higher = -0.125, 0.0, 0.375
    steps = ((lower, 1, 1), (lower, 2, 2), (lower, 0, 3), (lower, 1, 3), (same, 1, 3), (higher, 2, 1), (lower, 0, 2))
    for seed, (change, cursor, count) in enumerate(steps):
        features.copy_(randn(2, 5, 33, seed=seed))
        sigma.add_(change)
        newest.fill_(math.nan)
        graph.replay()
        assert ring.cursor.tolist() == [cursor] * 2 and ring.count.tolist() == [count] * 2, seed
        eager.push(features, sigma)
        assert_same_rings(ring, eager)
        assert_same_bytes(newest, eager.gather(), "newest")


FIRST_CALLS = {
    "push": "ring.push(features, sigma)",
    "push, sigma a float": "ring.push(features, 0.5)",
    "push of rows": "ring.push(features[:1], sigma[:1], rows)",
    "gather": "gathered = ring.gather(1)",
    "reset": "ring.reset()",
}


@needs_kernels
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", FIRST_CALLS)
def test_the_first_call_of_a_process_may_be_captured(name, stored, tmp_path):
    """Making a ring loads its kernels; while a graph is captured, that would fail."""
    program = f"""
import torch
from lesa_kernels import FeatureRing

ring = FeatureRing(3, 2, 5, 32, {stored}, "cuda", "extension")
features, rows = torch.randn(2, 5, 32, device="cuda"), torch.tensor([1], device="cuda")
sigma = torch.tensor([0.75, 0.5], device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    {FIRST_CALLS[name]}
graph.replay()
torch.cuda.synchronize()
print("count", ring.count.tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    expected = {"push of rows": [0, 1], "gather": [0, 0], "reset": [0, 0]}.get(name, [1, 1])
    assert result.stdout.split("\n")[0] == f"count {expected}"


@needs_kernels
def test_a_float_is_a_constant_of_a_cuda_graph():
    ring, features = FeatureRing(3, 2, 5, 32, torch.bfloat16, "cuda", "extension"), randn(2, 5, 32)
    ring.push(features, 0.75)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ring.push(features, 0.5)
    for seed in range(3):
        features.copy_(randn(2, 5, 32, seed=seed))
        graph.replay()
        assert ring.count.tolist() == [2, 2]  # the first is appended, the others replace it
        assert torch.equal(ring.storage[1], features.to(torch.bfloat16))
        assert ring.sigmas[:2].tolist() == [[0.75, 0.75], [0.5, 0.5]]


@needs_kernels
def test_a_push_and_a_forecast_in_one_cuda_graph(call):
    eager = Call(call.name, torch.bfloat16)
    features, level = randn(BATCH, TOKENS, DIM), call.sigma + 0.015  # below the newest anchors, which are 0.02 higher
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.ring.push(features, level)
        output = call()
    for seed in (11, 12, 13):
        features.copy_(randn(BATCH, TOKENS, DIM, seed=seed))
        level.sub_(0.002)
        output.fill_(math.nan)
        graph.replay()
        eager.ring.push(features, level)
        assert_same_rings(call.ring, eager.ring)
        assert torch.equal(output, eager())


@needs_kernels
def test_a_forecast_sees_a_push_that_its_stream_waited_for(call):
    eager = Call(call.name, torch.bfloat16)
    features, level = randn(BATCH, TOKENS, DIM, seed=9), call.sigma + 0.005
    before = call()
    eager.ring.push(features, level)
    expected = eager()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        call.ring.push(features, level)
        pushed = side.record_event()
    torch.cuda.current_stream().wait_event(pushed)
    result = call()
    torch.cuda.synchronize()
    assert torch.equal(result, expected) and not torch.equal(result, before)


@needs_kernels
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_pushed_features_may_be_overwritten_or_freed_at_once(stored):
    ring, _ = ring_calls(stored)
    expected = FeatureRing(3, BATCH, TOKENS, DIM, stored, "cuda", "torch")
    for seed, sigma in ((1, 0.8), (2, 0.7)):
        expected.push(randn(BATCH, TOKENS, DIM, seed=seed), sigma)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # all below is enqueued before any of it is done
        features = randn(BATCH, TOKENS, DIM, seed=1)
        ring.push(features, 0.8)
        features.fill_(math.nan)
        features = randn(BATCH, TOKENS, DIM, seed=2)
        ring.push(features, 0.7)
        address = features.data_ptr()
        del features
        others = [torch.full((BATCH, TOKENS, DIM), math.nan, device="cuda") for _ in range(8)]
    side.synchronize()
    assert address in {each.data_ptr() for each in others}
    for age in range(2):
        assert_same_bytes(ring.gather(age), expected.gather(age), f"gather({age})")


@needs_kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_ring_on_another_than_the_current_device(stored):
    ring = FeatureRing(3, 2, 5, 33, stored, "cuda:1", "extension")
    expected = FeatureRing(3, 2, 5, 33, stored, "cpu", "extension")
    with torch.cuda.device(0):
        for seed in range(4):
            features, sigma = values(2, 5, 33, torch.float32, seed), torch.tensor([0.9, 0.8]) - 0.1 * seed
            ring.push(features.to("cuda:1"), sigma.to("cuda:1"))
            expected.push(features, sigma)
        assert_same_rings(ring, expected)
        assert torch.cuda.current_device() == 0


@needs_kernels
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_more_elements_than_32_bits_can_count(stored):
    tokens, dim, part = 400_000, 3072, 40_000  # two slots of 1.2 * 2^30 elements
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 14e9:
        pytest.skip(f"needs 14 GB of memory on the GPU, and {free / 1e9:.1f} GB are free")
    ring = FeatureRing(2, 1, tokens, dim, stored, "cuda", "extension")
    assert ring.storage.numel() > 2**31
    features = torch.empty(1, tokens, dim, dtype=torch.bfloat16, device="cuda")
    for slot in range(2):
        features.normal_(generator=torch.Generator("cuda").manual_seed(slot))
        ring.push(features, 0.9 - 0.1 * slot)
        gathered = ring.gather()
        for begin in range(0, tokens, part):
            plain = FeatureRing(1, 1, part, dim, stored, "cuda", "torch")
            plain.push(features[:, begin : begin + part], 0.5)
            bits = ring.storage[slot, :, begin : begin + part].view(torch.uint8)
            assert torch.equal(bits, plain.storage[0].view(torch.uint8)), (slot, begin)
            assert torch.equal(gathered[:, begin : begin + part], plain.gather()), (slot, begin)
        del gathered
    first = features.normal_(generator=torch.Generator("cuda").manual_seed(0))[:, :part]
    plain.push(first, 0.4)
    assert torch.equal(ring.storage[0, :, :part].view(torch.uint8), plain.storage[0].view(torch.uint8))


BROKEN = {
    "row too large": ("rows.fill_(2)", "lesa_kernels.ring_push: the rows must lie in the ring's batch"),
    "row negative": ("rows.fill_(-1)", "lesa_kernels.ring_push: the rows must lie in the ring's batch"),
    "row twice": (
        "features, rows = features.expand(2, 3, 8), rows.repeat(2)",
        "lesa_kernels.ring_push: the rows must be distinct",
    ),
    "cursor": ("ring.cursor.fill_(2)", "lesa_kernels.ring_push: the ring's cursor and count must be in range"),
    "count": ("ring.count.fill_(0x10001)", "lesa_kernels.ring_push: the ring's cursor and count must be in range"),
    "count of 64 blocks": (
        "features = torch.ones(1, 4096, 64, device='cuda')\n"
        "ring = FeatureRing(2, 2, 4096, 64, device='cuda', backend='extension')\n"
        "ring.count.fill_(0x200001)",
        "lesa_kernels.ring_push: the ring's count must not change while a push is under way",
    ),
}


def run_broken(change, backend, folder):
    """What a process says that pushes something broken; its GPU can't be used afterwards."""
    program = f"""
import torch
from lesa_kernels import FeatureRing

ring = FeatureRing(2, 2, 3, 8, device="cuda", backend="{backend}")
features, rows = torch.ones(1, 3, 8, device="cuda"), torch.tensor([1], device="cuda")
ring.push(features, 0.75, rows)
torch.cuda.synchronize()
print("pushed")
{change}
try:
    ring.push(features, 0.5, rows)
    torch.cuda.synchronize()
except RuntimeError as error:
    print("synchronize:", error)
try:
    ring.push(features, 0.25, rows)
except RuntimeError as error:
    print("push:", error)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    first, *said = result.stdout.splitlines()
    assert first == "pushed"
    assert any(line.startswith("synchronize:") and "device-side assert" in line for line in said), said
    return result.stderr, said


@needs_kernels
@pytest.mark.parametrize("case", BROKEN)
def test_what_only_the_device_can_see_fails_by_name(case, tmp_path):
    change, message = BROKEN[case]
    errors, said = run_broken(change, "extension", tmp_path)
    assert message in errors, errors
    assert any(line.startswith("push: lesa_kernels.ring_push on CUDA device 0 failed: ") for line in said), said


@pytest.mark.parametrize("case", ["row too large", "row negative", "row twice"])
def test_bad_rows_fail_by_name_in_plain_torch_too(case, tmp_path):
    errors, _ = run_broken(BROKEN[case][0], "torch", tmp_path)
    assert "lesa_kernels.ring_push: the rows must be distinct and lie in [0, 2)" in errors, errors


def test_predicted_steps_of_a_transformer_do_not_wait_for_the_gpu():
    """The host looks at the GPU at the first call of a run, and never in a predicted one."""
    diffusers = pytest.importorskip("diffusers")
    lesa = pytest.importorskip("lesa")
    torch.manual_seed(0)
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    config |= {"in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    transformer = diffusers.FluxTransformer2DModel(**config).eval().to("cuda", torch.bfloat16)
    scheduler, device = diffusers.FlowMatchEulerDiscreteScheduler(), torch.device("cuda")
    pipe = SimpleNamespace(transformer=transformer, scheduler=scheduler, _execution_device=device)
    call = {
        "encoder_hidden_states": randn(1, 8, 16).bfloat16(),
        "pooled_projections": randn(1, 16).bfloat16(),
        "img_ids": torch.zeros(64, 3, device="cuda"),
        "txt_ids": torch.zeros(8, 3, device="cuda"),
        "return_dict": False,
    }
    predictor, computed = FusedKANPredictor(PredictorConfig(32)).cuda(), [0, 1, 2, 6]

    @torch.no_grad()
    def run(mode):
        scheduler.set_timesteps(10, device="cuda")
        scheduler.set_begin_index(0)
        latents, outputs = randn(1, 64, 4).bfloat16(), []
        for step, t in enumerate(scheduler.timesteps):
            timestep = t.expand(1).to(latents.dtype) / 1000
            torch.cuda.set_sync_debug_mode(mode if step not in computed else "default")
            try:
                outputs.append(transformer(hidden_states=latents, timestep=timestep, **call)[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            latents = scheduler.step(outputs[-1], t, latents, return_dict=False)[0]
        return outputs

    with lesa.enable_cache(pipe, predictor, computed, strict=True) as cache:
        first = run("default")  # compiles the kernels
        again = run("error")
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and cache.stats.predicted_steps == 6
    assert all(seconds > 0 for stream in cache.stats.streams.values() for seconds in stream.seconds.values())


def test_a_recording_is_what_copies_that_wait_make(tmp_path, monkeypatch):
    """Copies beside the run have the same bytes. After the first call of a stream, no kept step waits for the GPU."""
    lesa = pytest.importorskip("lesa")
    small_pipelines = pytest.importorskip("small_pipelines")
    from lesa.training.host_copies import HostCopies
    from lesa.training.recorder import Recorder

    case = small_pipelines.ALL["flux cfg"]
    pipe, inputs, seen = case.build().to("cuda"), [case.inputs(1) for _ in range(3)], []
    options = {"num_inference_steps": 6, "batch_size": 2, "progress": False}

    def keep(recorder, call, *tensors):
        torch.cuda.set_sync_debug_mode("error" if call.stream in recorder.streams else "default")
        try:
            whole(recorder, call, *tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append(len(recorder._copies._pending))

    whole = Recorder.keep
    for tokens in (None, 7):
        folders = [tmp_path / f"{name} {tokens}" for name in ("beside", "waiting")]
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "keep", keep)
            lesa.record(pipe, inputs, folders[0], tokens_per_sample=tokens, **options)
        assert max(seen) == 2  # they were copied beside the run
        with monkeypatch.context() as patch:
            patch.setattr(HostCopies, "is_copied_aside", lambda self, tensor: False)
            lesa.record(pipe, inputs, folders[1], tokens_per_sample=tokens, **options)
        files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
        assert len(files[0]) == 8 and files[0] == files[1]


def test_a_tensor_that_is_overwritten_afterwards_arrives_as_it_was():
    """The GPU is busy when the copy is asked for, so that it cannot have been made before the tensor is overwritten."""
    pytest.importorskip("lesa")
    from lesa.training.host_copies import HostCopies

    copies, received, values = HostCopies(), [], torch.empty(1 << 20, device="cuda")
    for step in range(6):
        torch.cuda._sleep(20_000_000)
        values.fill_(step)
        copies.give([values, values[::2]], received.append)
        values.fill_(math.nan)
        torch.full_like(values, math.nan)  # takes memory that was given back too early
    copies.finish()
    assert [[each.unique().tolist() for each in tensors] for tensors in received] == [[[s], [s]] for s in range(6)]


def test_times_on_the_device_agree():
    """A large copy takes as long alone as in a graph, and about what memory allows; a dirty cache does not help."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)  # noqa: E731
    alone, dirty, in_graph = (
        statistics.median(times)
        for times in (device_seconds(copy, 10), device_seconds(copy, 10, dirty=True), graph_seconds(copy, 5))
    )
    assert 2 * source.nbytes / 20e12 < alone < 2 * source.nbytes / 0.2e12
    assert 0.7 * alone < in_graph < 1.4 * alone and dirty > 0.9 * alone


def test_a_call_that_waits_has_no_time_in_a_graph():
    value = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError):
        graph_seconds(value.item)
    assert graph_seconds(value.zero_)[0] > 0  # and nothing is broken afterwards
