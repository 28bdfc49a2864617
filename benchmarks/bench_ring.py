"""Pushing a computed step into the feature ring, against the plain torch form and a bare `Tensor.copy_`."""

import itertools

import pytest
import torch
import work

from lesa_kernels import FeatureRing

CAPACITY = 4
CONVERSIONS = {"kept": None, "to-bfloat16": torch.bfloat16}


def falling_sigmas():
    return (1.0 - 1e-5 * i for i in itertools.count())


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("backend", ["extension", "torch"])
def test_push(benchmark, timed, against_floor, shape, device, backend, conversion):
    torch.manual_seed(0)
    stored = CONVERSIONS[conversion] or shape.dtype
    if conversion != "kept" and stored == shape.dtype:
        pytest.skip("the features have this dtype already")
    sizes = (CAPACITY, shape.batch, shape.tokens, shape.dim, stored, device)
    ring, expected = FeatureRing(*sizes, backend=backend), FeatureRing(*sizes, backend="torch")
    features = torch.randn(shape.batch, shape.tokens, shape.dim, device=device).to(shape.dtype)
    sigmas = falling_sigmas()
    for _, sigma in zip(range(CAPACITY + 1), sigmas):
        try:
            ring.push(features * sigma, sigma)
        except RuntimeError as error:
            pytest.skip(str(error))
        expected.push(features * sigma, sigma)
    for name in ("storage", "sigmas", "cursor", "count"):
        assert torch.equal(getattr(ring, name), getattr(expected, name)), name
    timed(lambda: ring.push(features, next(sigmas)), f"push {shape} {conversion}")
    against_floor(benchmark, **work.ring_push(*shape.sizes, stored))


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_copy(benchmark, timed, against_floor, shape, device, conversion):
    """The peer: the same bytes without a ring."""
    stored = CONVERSIONS[conversion] or shape.dtype
    if conversion != "kept" and stored == shape.dtype:
        pytest.skip("the features have this dtype already")
    features = torch.randn(shape.batch, shape.tokens, shape.dim, device=device).to(shape.dtype)
    slots = torch.empty(CAPACITY, *features.shape, dtype=stored, device=device)
    slot = itertools.cycle(slots)
    next(slot).copy_(features)
    assert torch.equal(slots[0], features.to(stored))
    timed(lambda: next(slot).copy_(features), f"push {shape} {conversion}")
    against_floor(benchmark, **work.ring_push(*shape.sizes, stored))
