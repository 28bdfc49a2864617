"""Pushing a computed step into the feature ring and reading one back, beside plain torch and what needs no ring."""

import itertools

import pytest
import torch
from shapes import ONE_TOKEN

from lesa_kernels import FeatureRing, work
from lesa_kernels.dispatch import extension_problem
from lesa_kernels.feature_ring.reference import dequantise_float8

CAPACITY = 4
AGE = 2
CONVERSIONS = {"kept": None, "to-bfloat16": torch.bfloat16, "to-float8": torch.float8_e4m3fn}
RINGS = {"kept": None, "float8": torch.float8_e4m3fn}
SHORT = pytest.mark.benchmark(max_time=0.3)  # with a second for each of so many cases, this would be half of the suite


def falling_sigmas():
    return (1.0 - 1e-5 * i for i in itertools.count())


def stored_as(shape, conversion: str) -> torch.dtype:
    stored = CONVERSIONS[conversion] or shape.dtype
    if conversion != "kept" and stored == shape.dtype:
        pytest.skip("the features have this dtype already")
    return stored


def make_features(shape, device) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape.batch, shape.tokens, shape.dim, device=device).to(shape.dtype)


def make_ring(shape, stored, device, backend: str) -> FeatureRing:
    if backend == "extension" and (problem := extension_problem(device)) is not None:
        pytest.skip(f"the extension can't run on {device}: {problem}")
    return FeatureRing(CAPACITY, shape.batch, shape.tokens, shape.dim, stored, device, backend)


@SHORT
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("backend", ["extension", "torch"])
def test_push(benchmark, timed, against_floor, shape, device, backend, conversion):
    stored = stored_as(shape, conversion)
    ring, expected = make_ring(shape, stored, device, backend), make_ring(shape, stored, device, "torch")
    features, sigmas = make_features(shape, device), falling_sigmas()
    for _, sigma in zip(range(CAPACITY + 1), sigmas):
        for each in (ring, expected):
            each.push(features * sigma, sigma)
    for name, buffer in vars(expected.snapshot()).items():
        actual = getattr(ring, name)
        assert actual is buffer or torch.equal(actual.view(torch.uint8), buffer.view(torch.uint8)), name
    timed(lambda: ring.push(features, next(sigmas)), f"push {shape} {conversion}")
    against_floor(benchmark, **work.ring_push(*shape.sizes, stored))


@SHORT
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_copy(benchmark, timed, against_floor, shape, device, conversion):
    """The peer: the same bytes without a ring. That is `Tensor.copy_`, unless each token needs a scale."""
    stored = stored_as(shape, conversion)
    features = make_features(shape, device)
    slots = itertools.cycle(torch.empty(CAPACITY, *features.shape, dtype=stored, device=device))
    scales = itertools.cycle(torch.empty(CAPACITY, *features.shape[:2], 1, device=device))

    def quantise():
        slot, scale = next(slots), next(scales)
        scale.copy_(features.abs().amax(-1, keepdim=True)).div_(448)
        return slot.copy_(features / scale), scale

    if stored.itemsize == 1:
        function = quantise
        slot, scale = function()
        error = (slot.float() * scale - features.float()).abs()
        # Of three bits of mantissa, and of subnormal numbers 2^-9 apart.
        assert (error <= 2**-4 * features.float().abs() + 2**-10 * scale).all() and scale.min() > 0
    else:
        assert torch.equal(next(slots).copy_(features), features.to(stored))
        function = lambda: next(slots).copy_(features)  # noqa: E731
    timed(function, f"push {shape} {conversion}")
    against_floor(benchmark, **work.ring_push(*shape.sizes, stored))


@SHORT
@pytest.mark.parametrize("stored", RINGS)
@pytest.mark.parametrize("backend", ["extension", "torch"])
def test_gather(benchmark, timed, against_floor, shape, device, backend, stored):
    dtype = RINGS[stored] or shape.dtype
    ring, features = make_ring(shape, dtype, device, backend), make_features(shape, device)
    for _, sigma in zip(range(CAPACITY + 1), falling_sigmas()):
        ring.push(features * sigma, sigma)
    assert torch.equal(ring.gather(AGE), ring.newest_first()[0][AGE])
    timed(lambda: ring.gather(AGE), f"gather {shape} {stored}")
    against_floor(benchmark, **work.ring_gather(shape.batch, shape.tokens, shape.dim, dtype))


@SHORT
@pytest.mark.parametrize("stored", RINGS)
def test_clone(benchmark, timed, against_floor, shape, device, stored):
    """The peer: a copy of a slot that the host knows, multiplied with its scales where it has some."""
    dtype = RINGS[stored] or shape.dtype
    ring, features = make_ring(shape, dtype, device, "torch"), make_features(shape, device)
    ring.push(features, 0.5)

    def read():
        return ring.storage[0].clone() if ring.scales is None else dequantise_float8(ring.storage[0], ring.scales[0])

    assert torch.equal(read(), ring.newest_first()[0][0])
    timed(read, f"gather {shape} {stored}")
    against_floor(benchmark, **work.ring_gather(shape.batch, shape.tokens, shape.dim, dtype))


@pytest.mark.parametrize("sigma", ["float", "tensor"])
@pytest.mark.parametrize("backend", ["extension", "torch"])
def test_push_launch(launched, device, backend, sigma):
    """What a push takes the host: of a feature that is too small to take time itself."""
    ring, features = make_ring(ONE_TOKEN, ONE_TOKEN.dtype, device, backend), make_features(ONE_TOKEN, device)
    level = 0.5 if sigma == "float" else torch.full((1,), 0.5, device=device)  # the same again replaces the newest
    for _ in range(2):
        ring.push(features, level)
    assert torch.equal(ring.storage[0], features) and ring.count.tolist() == [1]
    launched(lambda: ring.push(features, level), "push launch")


def test_copy_launch(launched, device):
    features = make_features(ONE_TOKEN, device)
    slot = torch.empty_like(features)
    assert torch.equal(slot.copy_(features), features)
    launched(lambda: slot.copy_(features), "push launch")
