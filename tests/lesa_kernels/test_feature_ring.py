import itertools
import os
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from lesa_kernels import FeatureRing, dispatch, ring_gather, ring_push
from lesa_kernels.extension import extension, extension_error
from lesa_kernels.feature_ring import op, ring_push_ref
from ring_fuzz import assert_same_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = list(itertools.product(DTYPES, DTYPES))

needs_extension = pytest.mark.skipif(extension_error() is not None, reason=f"no extension: {extension_error()}")
backends = pytest.mark.parametrize("backend", [pytest.param("extension", marks=needs_extension), "torch"])


def state(ring):
    return ring.storage, ring.sigmas, ring.cursor, ring.count


def both_rings(*sizes, dtype=torch.float32):
    """The same ring over the extension and in plain torch, NaN in every byte that nobody has written yet."""
    rings = [FeatureRing(*sizes, dtype=dtype, backend=backend) for backend in ("extension", "torch")]
    for ring in rings:
        ring.storage.fill_(float("nan"))
        ring.sigmas.fill_(float("nan"))
    return rings


def assert_same_after_push(rings, features, sigma, rows=None):
    """Pushes into both rings, and compares all of their buffers byte by byte."""
    for ring in rings:
        ring.push(features, sigma, rows)
    for actual, expected in zip(state(rings[0]), state(rings[1])):
        assert_same_bytes(actual, expected)


def bit_patterns(dtype):
    """All values of a 16-bit dtype; for float32 those, the neighbourhoods of rounding ties, and random bits."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if dtype != torch.float32:
        return halves.view(dtype)
    exact = [halves.view(half).float().view(torch.int32) for half in (torch.float16, torch.bfloat16)]
    ties = [bits + delta for bits in exact for delta in (0, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)]
    random = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0))
    return torch.cat([*ties, random.to(torch.int32)]).view(torch.float32)


@needs_extension
@pytest.mark.parametrize("stride", [1, 2], ids=["contiguous", "strided"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_conversion_equals_tensor_to(source, target, stride):
    values = bit_patterns(source)[:, None].expand(-1, stride).reshape(-1)[::stride]
    ring = FeatureRing(1, 1, 1, len(values), dtype=target, backend="extension")
    ring.push(values[None, None], 0.5)
    assert ring.storage[0, 0, 0].isnan().equal(values.isnan())
    assert_same_bytes(ring.storage[0, 0, 0], values.to(target))


LAYOUTS = {
    "contiguous": lambda b, t, d: torch.randn(b, t, d),
    "token slice": lambda b, t, d: torch.randn(b, t + 3, d)[:, 2 : 2 + t],
    "width slice": lambda b, t, d: torch.randn(b, t, d + 5)[..., 1 : 1 + d],
    "every other": lambda b, t, d: torch.randn(b, 2 * t, 2 * d)[:, ::2, ::2],
    "transposed": lambda b, t, d: torch.randn(d, t, b).permute(2, 1, 0),
    "expanded batch": lambda b, t, d: torch.randn(1, t, d).expand(b, t, d),
    "expanded width": lambda b, t, d: torch.randn(b, t, 1).expand(b, t, d),
}


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_extension_equals_reference_for_strided_features(source, target, layout):
    torch.manual_seed(0)
    rings = both_rings(3, 3, 7, 13, dtype=target)
    for sigma in (1.0, 0.75, 0.5, 0.25):
        assert_same_after_push(rings, LAYOUTS[layout](3, 7, 13).to(source), sigma)


@needs_extension
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (4, 2, 0, 8), (2, 3, 5, 1), (5, 1, 1, 257), (3, 2, 31, 33)], ids=str)
def test_extension_equals_reference_for_odd_sizes(sizes):
    torch.manual_seed(0)
    rings = both_rings(*sizes)
    for step in range(2 * sizes[0] + 1):
        assert_same_after_push(rings, torch.randn(sizes[1:]), 1.0 - step / 50)


@needs_extension
def test_extension_equals_reference_for_random_pushes_into_some_rows():
    generator = torch.Generator().manual_seed(0)
    rings = both_rings(3, 5, 4, 6, dtype=torch.bfloat16)
    for _ in range(60):
        rows = torch.randperm(5, generator=generator)[: torch.randint(0, 6, (), generator=generator)]
        sigma = torch.randint(0, 4, (len(rows),), generator=generator) / 4  # few levels: equal, rising and falling
        sigma[sigma == 0.75] = float("nan")
        assert_same_after_push(rings, torch.randn(len(rows), 4, 6, generator=generator), sigma, rows)


@needs_extension
@pytest.mark.parametrize(("source", "target"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
def test_threads_cover_large_features(source, target):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.manual_seed(0)
        sizes = (2, 2, 2101, 1003)  # 4.2 M elements: above the size from which threads are used, no round chunks
        assert_same_after_push(both_rings(*sizes, dtype=target), torch.randn(sizes[1:]).to(source), 0.5)
        assert_same_after_push(both_rings(*sizes, dtype=target), torch.randn(2, 2101, 1010).to(source)[..., :1003], 0.5)
    finally:
        torch.set_num_threads(threads)


FORKS = """
import os, torch
from lesa_kernels import FeatureRing
torch.set_num_threads(2)
small, large = torch.randn(1, 8, 8), torch.randn(1, 1024, 1024) + 1  # on PyTorch's threads
for pushed in (None, small, large):
    if pushed is not None:
        FeatureRing(2, *pushed.shape, backend="extension").push(pushed, 0.5)
    ring = FeatureRing(2, 1, 1024, 1024, backend="extension")  # PyTorch would wait for its threads in the child
    child = os.fork()
    if child == 0:
        ring.push(large, 0.25)
        os._exit(ring.storage[0].numpy().tobytes() != large.numpy().tobytes())
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(code)
"""


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_pushes_whatever_its_parent_pushed(tmp_path):
    """The threads of PyTorch and those of a push do not exist there, so no push may wait for them."""
    process = subprocess.Popen([sys.executable, "-c", FORKS], cwd=tmp_path, start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the child, which waits
            process.wait()


@backends
def test_non_finite_features_are_kept(backend):
    ring = FeatureRing(1, 1, 1, 4, dtype=torch.float16, backend=backend)
    ring.push(torch.tensor([[[float("nan"), float("inf"), -float("inf"), 1e6]]]), 0.5)
    stored = ring.storage[0, 0, 0]
    assert stored[0].isnan()
    assert stored[1:].tolist() == [float("inf"), -float("inf"), float("inf")]


@backends
def test_newest_first_keeps_the_last_capacity_anchors(backend):
    ring = FeatureRing(3, 2, 4, 5, backend=backend)
    pushed = [torch.randn(2, 4, 5) for _ in range(5)]
    for step, features in enumerate(pushed):
        ring.push(features, 1.0 - step / 8)
    features, sigmas, count = ring.newest_first()
    assert torch.equal(features, torch.stack(pushed[:1:-1]))
    assert sigmas.tolist() == [[0.5, 0.5], [0.625, 0.625], [0.75, 0.75]]
    assert count.tolist() == [3, 3]


@backends
def test_newest_first_repeats_the_oldest_anchor_and_marks_empty_rows(backend):
    ring = FeatureRing(3, 2, 1, 2, backend=backend)
    first, second = torch.ones(1, 1, 2), torch.full((1, 1, 2), 2.0)
    ring.push(first, 0.75, rows=[1])
    ring.push(second, 0.5, rows=[1])
    features, sigmas, count = ring.newest_first()
    assert count.tolist() == [0, 2]
    assert features[:, 1, 0, 0].tolist() == [2.0, 1.0, 1.0]
    assert sigmas[:, 1].tolist() == [0.5, 0.75, 0.75]
    assert features[:, 0].isnan().all() and sigmas[:, 0].isnan().all()


@backends
def test_sigma_decides_per_sample_what_a_push_does(backend):
    ring = FeatureRing(3, 3, 1, 1, backend=backend)
    ring.push(torch.full((3, 1, 1), 1.0), 0.8)
    ring.push(torch.full((3, 1, 1), 2.0), 0.6)
    ring.push(torch.full((3, 1, 1), 3.0), torch.tensor([0.4, 0.6, 0.9]))  # smaller, equal, greater
    features, sigmas, count = ring.newest_first()
    assert count.tolist() == [3, 2, 1]
    assert features[:, :, 0, 0].T.tolist() == [[3.0, 2.0, 1.0], [3.0, 1.0, 1.0], [3.0, 3.0, 3.0]]
    expected = torch.tensor([[0.4, 0.6, 0.8], [0.6, 0.8, 0.8], [0.9, 0.9, 0.9]])
    assert torch.equal(sigmas.T, expected)


@backends
def test_a_nan_sigma_never_shares_a_history(backend):
    ring = FeatureRing(4, 1, 1, 1, backend=backend)
    for sigma, count in ((0.8, 1), (0.6, 2), (float("nan"), 1), (0.5, 1), (0.4, 2)):
        ring.push(torch.zeros(1, 1, 1), torch.tensor([sigma]))
        assert ring.count.item() == count


@backends
def test_a_push_is_a_copy_without_gradient(backend):
    ring = FeatureRing(2, 1, 2, 3, backend=backend)
    features = torch.ones(1, 2, 3, requires_grad=True)
    sigma = torch.tensor([0.5], requires_grad=True)
    ring.push(features, sigma)
    features.data.zero_()
    sigma.data.zero_()
    assert not ring.storage.requires_grad and not ring.sigmas.requires_grad
    assert ring.storage[0].eq(1).all() and ring.sigmas[0].item() == 0.5


@backends
def test_reset_forgets_only_the_rows_named(backend):
    ring = FeatureRing(2, 3, 1, 1, backend=backend)
    ring.push(torch.arange(3.0)[:, None, None], 0.5)
    ring.reset(rows=[0, 2])
    assert ring.count.tolist() == [0, 1, 0]
    ring.push(torch.full((3, 1, 1), 7.0), 0.4)
    assert ring.count.tolist() == [1, 2, 1]
    ring.reset()
    assert ring.count.tolist() == [0, 0, 0] and ring.cursor.tolist() == [0, 0, 0]


@backends
def test_restore_brings_the_bytes_back(backend):
    torch.manual_seed(0)
    ring = FeatureRing(2, 2, 3, 4, dtype=torch.bfloat16, backend=backend)
    for sigma in (0.9, 0.8, 0.7):
        ring.push(torch.randn(2, 3, 4), sigma)
    before = [buffer.clone() for buffer in state(ring)]
    snapshot = ring.snapshot()
    ring.push(torch.randn(2, 3, 4), torch.tensor([0.6, 0.9]))
    ring.restore(snapshot)
    for actual, expected in zip(state(ring), before):
        assert_same_bytes(actual, expected)
    with pytest.raises(ValueError, match=r"`snapshot.storage` must have shape \[3, 2, 3, 4\].*Restore a snapshot"):
        FeatureRing(3, 2, 3, 4, dtype=torch.bfloat16).restore(snapshot)
    with pytest.raises(TypeError, match="`snapshot` must be a RingSnapshot"):
        ring.restore(before)


def test_nbytes_and_repr():
    ring = FeatureRing(4, 2, 256, 128, dtype=torch.bfloat16)
    assert ring.nbytes == 4 * 2 * 256 * 128 * 2 + 4 * 2 * 4 + 2 * 4 + 2 * 4
    assert "capacity=4, batch=2, tokens=256, dim=128, dtype=bfloat16" in repr(ring)
    assert "0.5 MiB, count=[0, 0]" in repr(ring)


BAD_PUSHES = {
    "wrong width": (dict(features=torch.zeros(2, 3, 5)), ValueError, r"`features` must have shape \[2, 3, 4\]"),
    "wrong dtype": (dict(features=torch.zeros(2, 3, 4).double()), TypeError, "`features` must have one of the dtypes"),
    "no tensor": (dict(features=[1.0]), TypeError, "`features` must be a torch.Tensor"),
    "sigma shape": (dict(sigma=torch.zeros(3)), ValueError, r"`sigma` must have shape \[2\]"),
    "sigma dtype": (dict(sigma=torch.zeros(2).double()), TypeError, "`sigma` must have dtype float32"),
    "sigma not finite": (dict(sigma=float("nan")), ValueError, "`sigma` must be a finite number"),
    "row out of range": (dict(rows=[0, 2]), ValueError, "`rows` must be an integer of at least 0 and at most 1"),
    "row negative": (dict(rows=torch.tensor([0, -1])), ValueError, r"`rows` must (be distinct and )?lie in \[0, 2\)"),
    "row twice": (dict(rows=torch.tensor([1, 1])), ValueError, r"`rows` must be distinct.*row .*at most once"),
    "list twice": (dict(rows=[1, 1]), ValueError, r"`rows` must be distinct.*row .*at most once"),
    "rows scalar": (dict(rows=torch.tensor(1), sigma=torch.zeros(1)), ValueError, r"`rows` must have shape \[n\]"),
    "rows dtype": (dict(rows=torch.tensor([True, False])), TypeError, "`rows` must have dtype int64"),
    "rows count": (dict(rows=[1]), ValueError, r"`features` must have shape \[1, 3, 4\]"),
}


@backends
@pytest.mark.parametrize("case", BAD_PUSHES)
def test_a_bad_push_is_refused_and_changes_nothing(backend, case):
    changes, kind, message = BAD_PUSHES[case]
    ring = FeatureRing(2, 2, 3, 4, backend=backend)
    ring.push(torch.ones(2, 3, 4), 0.75)
    before = [buffer.clone() for buffer in state(ring)]
    with pytest.raises(kind, match=message):
        ring.push(**{"features": torch.zeros(2, 3, 4), "sigma": 0.5} | changes)
    assert all(map(torch.equal, state(ring), before))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(capacity=0), ValueError, "`capacity` must be an integer of at least 1"),
        (dict(batch=1.5), TypeError, "`batch` must be an integer"),
        (dict(tokens=-1), ValueError, "`tokens` must be an integer of at least 0"),
        (dict(dtype=torch.float64), ValueError, "`dtype` must be one of torch.float32"),
        (dict(backend="cuda"), ValueError, "`backend` must be one of 'auto'"),
    ],
)
def test_a_bad_ring_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        FeatureRing(**{"capacity": 2, "batch": 1, "tokens": 3, "dim": 4} | arguments)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([2], ValueError, "`rows` must be an integer of at least 0 and at most 1, but got 2"),
        ([0, 0], ValueError, "`rows` must be distinct"),
        (torch.tensor([0, -1]), ValueError, r"`rows` must be distinct and lie in \[0, 2\)"),
        (torch.tensor([0.0]), TypeError, "`rows` must have dtype int64"),
    ],
)
def test_a_bad_reset_is_refused(rows, kind, message):
    with pytest.raises(kind, match=message):
        FeatureRing(2, 2, 3, 4).reset(rows)


BAD_OPERANDS = {
    "storage gaps": (dict(storage=torch.zeros(2, 2, 4, 3).mT), ValueError, "`storage` must be contiguous, but got str"),
    "sigmas gaps": (dict(sigmas=torch.zeros(2, 2).mT), ValueError, "`sigmas` must be contiguous"),
    "cursor gaps": (dict(cursor=torch.zeros(4, dtype=torch.int32)[::2]), ValueError, "`cursor` must be contiguous"),
    "count gaps": (dict(count=torch.zeros(4, dtype=torch.int32)[::2]), ValueError, "`count` must be contiguous"),
    "storage dtype": (dict(storage=torch.zeros(2, 2, 3, 4).int()), TypeError, "`storage` must have one of the dtypes"),
    "sigmas shape": (dict(sigmas=torch.zeros(1, 2)), ValueError, r"`sigmas` must have shape \[2, 2\]"),
    "cursor dtype": (dict(cursor=torch.zeros(2)), TypeError, "`cursor` must have dtype int32"),
    "count length": (dict(count=torch.zeros(1, dtype=torch.int32)), ValueError, r"`count` must have shape \[2\]"),
    "features shape": (dict(features=torch.zeros(2, 9, 4)), ValueError, r"`features` must have shape \[2, 3, 4\]"),
    "features dtype": (dict(features=torch.zeros(2, 3, 4).int()), TypeError, "`features` must have one of the dtypes"),
    "sigma length": (dict(sigma=torch.zeros(1)), ValueError, r"`sigma` must have shape \[2\]"),
    "rows dtype": (dict(rows=torch.tensor([0, 1], dtype=torch.int32)), TypeError, "`rows` must have dtype int64"),
    "rows length": (dict(rows=torch.tensor([0])), ValueError, r"`features` must have shape \[1, 3, 4\]"),
    "rows range": (dict(rows=torch.tensor([0, 5])), ValueError, r"`rows` must (be distinct and )?lie in \[0, 2\)"),
}

PUSHES = {
    "op": torch.ops.lesa_kernels.ring_push,
    "extension": lambda *args: ring_push(*args, backend="extension"),
    "torch": lambda *args: ring_push(*args, backend="torch"),
}


@pytest.mark.parametrize("push", ["torch", *(pytest.param(p, marks=needs_extension) for p in ("op", "extension"))])
@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_bad_operands_are_refused_by_the_operator_too(push, case):
    changes, kind, message = BAD_OPERANDS[case]
    operands = dict(zip(("storage", "sigmas", "cursor", "count"), state(FeatureRing(2, 2, 3, 4))))
    operands = {"storage": operands.pop("storage"), "scales": None, **operands}
    operands |= {"features": torch.ones(2, 3, 4), "sigma": torch.ones(2), "rows": None} | changes
    with pytest.raises(kind, match=message):
        PUSHES[push](*operands.values())
    assert not operands["storage"].any()


@backends
def test_features_that_share_the_rings_memory_are_refused(backend):
    ring = FeatureRing(2, 2, 3, 4, backend=backend)
    ring.push(torch.ones(2, 3, 4), 0.75)
    with pytest.raises(ValueError, match=r"`features` must share no memory with the ring.*`features\.clone\(\)`"):
        ring.push(ring.storage[0], 0.5)
    assert ring.count.tolist() == [1, 1]
    ring.push(ring.storage[0].clone(), 0.5)
    empty = FeatureRing(2, 2, 0, 4, backend=backend)
    empty.push(empty.storage[0], 0.5)  # nothing is shared where there is nothing
    assert empty.count.tolist() == [1, 1]


@backends
@pytest.mark.parametrize("buffer", ["storage", "sigmas"])
def test_autograd_sees_that_a_push_overwrites(backend, buffer):
    ring = FeatureRing(1, 2, 3, 4, backend=backend)
    weight = torch.ones((), requires_grad=True)
    product = (getattr(ring, buffer) * weight).sum()  # saves the buffer for the backward
    ring.push(torch.ones(2, 3, 4), 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@backends
def test_a_ring_made_in_inference_mode(backend):
    with torch.inference_mode():
        ring = FeatureRing(2, 1, 2, 3, backend=backend)
        ring.push(torch.ones(1, 2, 3), 0.5)
    assert ring.storage[0].eq(1).all() and ring.count.tolist() == [1]


def raw_push(**changes):
    """Calls the compiled function as the operator does, with `changes`, on a ring of 2 slots and a batch of 3."""
    storage, sigmas = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3)
    cursor, count = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    features, sigma = torch.ones(3, 4, 5), torch.ones(3)
    rows = changes.pop("row_values", None)
    if (start := changes.pop("cursor_value", None)) is not None:
        cursor.fill_(start)
    arguments = dict(
        storage=storage.data_ptr(),
        storage_dtype="float32",
        storage_sizes=(2, 3, 4, 5),
        scales=0,
        sigmas=sigmas.data_ptr(),
        cursor=cursor.data_ptr(),
        count=count.data_ptr(),
        features=features.data_ptr(),
        features_dtype="float32",
        features_strides=(20, 5, 1),
        sigma=sigma.data_ptr(),
        level=0.0,
        rows=0 if rows is None else rows.data_ptr(),
        samples=3,
        device=-1,
        stream=0,
        threads=1,
    )
    try:
        extension().ring_push(**arguments | changes)
    finally:
        if changes or rows is not None:
            assert not storage.any() and not count.any()
    return storage


BAD_CALLS = {
    "null storage": (dict(storage=0), "`storage` must not be a null pointer"),
    "null features": (dict(features=0), "`features` must not be a null pointer"),
    "null sigmas": (dict(sigmas=0), "`sigmas` must not be a null pointer"),
    "null cursor": (dict(cursor=0), "`cursor` must not be a null pointer"),
    "null count": (dict(count=0), "`count` must not be a null pointer"),
    "null scales": (dict(storage_dtype="float8_e4m3fn"), "`scales` must not be a null pointer"),
    "scales of float32": (dict(scales=64), "`scales` must be a null pointer for this dtype of `storage`"),
    "odd storage": (dict(storage=4097), "`storage` must be aligned to its elements of 4 bytes"),
    "odd features": (dict(features=4098), "`features` must be aligned to its elements of 4 bytes"),
    "odd sigma": (dict(sigma=4098), "`sigma` must be aligned to its elements of 4 bytes"),
    "odd rows": (dict(rows=4100), "`rows` must be aligned to its elements of 8 bytes"),
    "negative size": (dict(storage_sizes=(2, 3, -4, 5)), "`tokens` must be at least 0, but got -4"),
    "no slot": (dict(storage_sizes=(0, 3, 4, 5)), "`capacity` must be at least 1, but got 0"),
    "negative stride": (dict(features_strides=(20, -5, 1)), "`features_strides` must be at least 0"),
    "huge storage": (dict(storage_sizes=(2, 3, 2**31, 2**31)), r"`storage` must address at most 2\^63 - 1 bytes"),
    "huge capacity": (
        dict(storage_sizes=(2**31, 3, 4, 5)),
        "`capacity` must be at most 2147483647, but got 2147483648",
    ),
    "huge capacity on a GPU": (dict(storage_sizes=(65536, 3, 4, 5), device=0), "`capacity` must be at most 65535"),
    "huge stride": (dict(features_strides=(2**62, 5, 1)), r"`features` must address at most 2\^63 - 1 bytes"),
    "unknown dtype": (
        dict(features_dtype="float64"),
        "`features_dtype` must be one of float32, float16, bfloat16, but",
    ),
    "unknown storage dtype": (
        dict(storage_dtype="int8"),
        "`storage_dtype` must be one of .*, float8_e4m3fn, but got 'i",
    ),
    "no such device": (dict(device=-2), "`device` must be at least -1"),
    "no thread": (dict(threads=0), "`threads` must be at least 1"),
    "too few samples": (dict(samples=2), "`samples` must equal `batch` where no `rows` are given"),
    "row out of range": (dict(row_values=torch.tensor([0, 1, 3])), r"`rows` must lie in \[0, 3\), but got 3"),
    "row twice": (dict(row_values=torch.tensor([0, 1, 0])), "`rows` must be distinct, but got 0 twice"),
    "broken cursor": (dict(cursor_value=2), "`cursor and count` must lie within the ring's capacity of 2"),
}


@needs_extension
@pytest.mark.parametrize("case", BAD_CALLS)
def test_the_compiled_function_checks_before_it_writes(case):
    changes, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        raw_push(**dict(changes))


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_where_cuda_cannot_run_the_compiled_function_says_why():
    assert raw_push()[0].eq(1).all()
    problem = extension().cuda_problem(0)
    assert ("built without CUDA" in problem) == (extension().build_info()["cuda_version"] is None)
    assert problem and ("built without CUDA" in problem or "cudaError" in problem)
    with pytest.raises(
        RuntimeError, match=r"lesa_kernels\.ring_push on CUDA device 0 failed: .*(without CUDA|cudaError)"
    ):
        raw_push(device=0)


@backends
def test_disjoint_parts_of_one_memory_are_no_overlap(backend):
    memory = torch.zeros(3 * 2 * 4 * 5 + 10)
    ring = FeatureRing(2, 2, 4, 5, backend=backend)
    ring.storage = memory[:80].view(2, 2, 4, 5)
    ring.push(memory[80:120].fill_(1).view(2, 4, 5), 0.5)
    assert ring.storage[0].eq(1).all()
    with pytest.raises(ValueError, match="`features` must share no memory"):
        ring.push(memory[79:119].view(2, 4, 5), 0.4)


def test_a_list_of_rows_is_refused_in_a_graph(monkeypatch):
    ring = FeatureRing(2, 2, 3, 4)
    ring.push(torch.ones(1, 3, 4), 0.5, rows=[1])
    monkeypatch.setattr("lesa_kernels.feature_ring.ring.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="`rows` must be a tensor on the GPU in a CUDA graph"):
        ring.push(torch.ones(1, 3, 4), 0.4, rows=[0])
    with pytest.raises(RuntimeError, match="`rows` must be a tensor on the GPU in a CUDA graph"):
        ring.reset([0])
    assert ring.count.tolist() == [0, 1]
    ring.push(torch.ones(1, 3, 4), 0.4, rows=torch.tensor([0]))
    assert ring.count.tolist() == [1, 1]


def test_a_problem_of_cuda_may_pass(monkeypatch):
    answers = ["out of memory", "out of memory", "", "asked once more than needed"]
    monkeypatch.setattr(dispatch, "extension", lambda: SimpleNamespace(cuda_problem=lambda index: answers.pop(0)))
    monkeypatch.setattr(dispatch, "extension_error", lambda: None)
    monkeypatch.setattr(dispatch, "_RUNS_ON", set())
    asked = [dispatch.extension_problem(torch.device("cuda", 3)) for _ in range(4)]
    assert asked == ["out of memory", "out of memory", None, None] and len(answers) == 1


def spied(monkeypatch):
    """Records which implementations of a push run."""
    ran = []
    reference = op.ring_push_ref
    monkeypatch.setattr(op, "ring_push_ref", lambda *args: (ran.append("torch"), reference(*args))[1])
    if extension_error() is None:
        compiled = extension()

        class Spy:
            @staticmethod
            def ring_push(*args):
                ran.append("extension")
                compiled.ring_push(*args)

        monkeypatch.setattr(op, "extension", lambda: Spy)
    return ran


@needs_extension
@pytest.mark.parametrize(
    ("backend", "variable", "expected"),
    [
        ("auto", None, "extension"),
        ("auto", "torch", "torch"),
        ("auto", "extension", "extension"),
        ("auto", "triton", "extension"),
        ("torch", "extension", "torch"),
        ("extension", "torch", "extension"),
    ],
)
def test_which_backend_runs(monkeypatch, backend, variable, expected):
    if variable is not None:
        monkeypatch.setenv("LESA_BACKEND", variable)
    ran = spied(monkeypatch)
    ring = FeatureRing(2, 1, 2, 3, backend=backend)
    ring.push(torch.ones(1, 2, 3), 0.5)
    assert ran == [expected]
    assert ring.storage[0].eq(1).all()


def test_triton_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"one that ring_push has for cpu tensors \(extension, torch\)"):
        FeatureRing(2, 1, 2, 3, backend="triton").push(torch.ones(1, 2, 3), 0.5)


def test_without_the_extension_auto_warns_once_and_extension_is_refused(monkeypatch):
    monkeypatch.setattr("lesa_kernels.extension._module", None)
    monkeypatch.setattr("lesa_kernels.extension._error", "a reason for the test")
    dispatch._warn_once.cache_clear()
    ring = FeatureRing(2, 1, 2, 3)
    with pytest.warns(RuntimeWarning, match=r"not available \(a reason for the test\).*pip install"):
        ring.push(torch.ones(1, 2, 3), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ring.push(torch.full((1, 2, 3), 2.0), 0.4)
    assert ring.storage[:, 0, 0, 0].tolist() == [1.0, 2.0]
    with pytest.raises(RuntimeError, match=r"not available \(a reason for the test\).*backend=\"torch\""):
        FeatureRing(2, 1, 2, 3, backend="extension").push(torch.ones(1, 2, 3), 0.5)
    monkeypatch.setenv("LESA_BACKEND", "extension")
    with pytest.raises(RuntimeError, match=r"not available \(a reason for the test\)"):
        ring.push(torch.ones(1, 2, 3), 0.5)


USES = {
    "push": lambda ring: ring.push(torch.ones(1, 2, 3), 0.5),
    "gather": lambda ring: ring.gather(),
    "ring_push": lambda ring: ring_push(*ring.state, torch.ones(1, 2, 3), 0.5),
    "ring_gather": lambda ring: ring_gather(ring.storage, ring.scales, ring.cursor, ring.count),
}


@pytest.mark.parametrize("name", USES)
def test_the_warning_names_the_users_line(monkeypatch, name):
    monkeypatch.setattr(dispatch, "extension_problem", lambda device: "a reason for the test")
    dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="a reason for the test") as caught:
        USES[name](FeatureRing(2, 1, 2, 3))
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, USES[name].__code__.co_firstlineno)


@needs_extension
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])])
def test_opcheck(rows):
    ring = FeatureRing(2, 3, 4, 5, dtype=torch.bfloat16)
    n = 3 if rows is None else len(rows)
    arguments = (ring.storage, None, *state(ring)[1:], torch.randn(n, 4, 5), torch.full((n,), 0.5), rows)
    torch.library.opcheck(torch.ops.lesa_kernels.ring_push.default, arguments)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # the check can't compute with float8
def test_opcheck_of_the_other_operators(dtype):
    ring = FeatureRing(2, 3, 4, 5, dtype=dtype)
    operators = torch.ops.lesa_kernels
    torch.library.opcheck(operators.ring_push.Scalar, (*ring.state, torch.randn(3, 4, 5), 0.5, None))
    ring.push(torch.randn(3, 4, 5), 0.5)
    state = (ring.storage, ring.scales, ring.cursor, ring.count)
    torch.library.opcheck(operators.ring_gather.default, (*state, 1))


@needs_extension
def test_operators_say_what_compilers_may_do():
    operators = torch.ops.lesa_kernels
    for operator in (operators.ring_push.default, operators.ring_push.Scalar, operators.ring_gather.default):
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(operator.tags), operator


@backends
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_gather_reads_by_age(backend, dtype):
    ring = FeatureRing(3, 2, 4, 16, dtype=dtype, backend=backend)
    pushed = [torch.full((2, 4, 16), float(value)) for value in (1, 2, 4, 8)]
    assert ring.gather().isnan().all()
    for step, features in enumerate(pushed):
        ring.push(features, 0.9 - 0.1 * step)
    ring.push(torch.zeros(1, 4, 16), 0.95, rows=[1])  # starts a new history
    for age, value in enumerate((8.0, 4.0, 2.0)):
        result = ring.gather(age)
        assert result.dtype == (torch.float32 if dtype.itemsize == 1 else dtype) and result.shape == (2, 4, 16)
        assert result[0].eq(value).all() and result[1].eq(0).all()  # beyond its count a row's oldest
    for age, kind in ((3, ValueError), (-1, ValueError), (1.0, TypeError)):
        with pytest.raises(kind, match="`age` must be an integer of at least 0 and at most 2"):
            ring.gather(age)
    with pytest.raises(TypeError, match="`cursor` must have dtype int32"):
        ring_gather(ring.storage, ring.scales, ring.cursor.long(), ring.count)
    empty = FeatureRing(2, 2, 0, 4, dtype=dtype, backend=backend)
    assert empty.gather(1).shape == (2, 0, 4)


@backends
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])])
def test_compiles_without_a_graph_break(backend, rows):
    torch.manual_seed(0)
    n = 3 if rows is None else len(rows)
    rings = [FeatureRing(2, 3, 4, 5, backend=backend) for _ in range(2)]

    def step(ring, features, sigma):
        ring.push(features * 2, sigma, rows)
        return *ring.newest_first(), ring.gather(1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for level in (0.9, 0.8, 0.8, 0.7):
        arguments = torch.randn(n, 4, 5), torch.full((n,), level)
        for actual, expected in zip(compiled(rings[0], *arguments), step(rings[1], *arguments)):
            assert_same_bytes(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_reference_gives_the_same_bytes_on_a_gpu(source, target):
    torch.manual_seed(0)
    rings = [FeatureRing(3, 2, 5, 7, dtype=target, device=device, backend="torch") for device in ("cpu", "cuda")]
    for sigma in (0.9, 0.8, 0.8, 0.7, 0.6, 0.9):
        features = torch.randn(2, 5, 7).to(source)
        for ring in rings:
            ring.push(features.to(ring.device), sigma)
    for expected, actual in zip(*map(state, rings)):
        assert_same_bytes(actual, expected)


def test_the_reference_moves_no_value_to_the_host():
    """Under fake tensors a read of a value raises, so this is what lets a push live in a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        numbers = [torch.empty(3, dtype=torch.int32) for _ in range(2)]
        ring = [torch.empty(2, 3, 4, 5), None, torch.empty(2, 3), *numbers]
        assert ring_push_ref(*ring, torch.empty(3, 4, 5), torch.empty(3)) is None


ROWS = {"negative": [0, -1], "too large": [2, 1], "twice": [1, 0, 1], "good": [1, 0], "none": []}
BAD_ROWS = r"lesa_kernels\.ring_push: the rows must be distinct and lie in \[0, 2\)"


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_checked_where_they_are(name):
    """As in plain torch on a GPU, where nothing may wait for their values."""
    rows = torch.tensor(ROWS[name], dtype=torch.int64)
    if name in ("good", "none"):
        op._assert_rows(rows, 2)
    else:
        with pytest.raises(RuntimeError, match=BAD_ROWS):
            op._assert_rows(rows, 2)


def test_the_check_of_rows_moves_no_value_to_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        op._assert_rows(torch.empty(3, dtype=torch.int64), 2)


def test_rows_are_checked_in_a_traced_graph():
    ring = FeatureRing(2, 2, 3, 4, backend="torch")
    compiled = torch.compile(ring.push, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(2, 3, 4), torch.ones(2), torch.tensor([1, 0]))
    with pytest.raises(RuntimeError, match=BAD_ROWS):
        compiled(torch.ones(2, 3, 4), torch.ones(2), torch.tensor([0, -1]))


def float8_oracle(token):
    """One token as e4m3: its scale, and the values that come back, from a list of all numbers of that type."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    scale = (token.abs().max() / 448).float()  # torch divides in IEEE's way
    scale = torch.tensor(1.0) if scale == 0 else scale
    quotients = (token / scale).double()
    nearest = []
    for value in quotients:
        distance = (numbers - value).abs()
        ties = numbers[distance == distance.min()]
        even = [n for n in ties if n.float().to(torch.float8_e4m3fn).view(torch.uint8) % 2 == 0]
        nearest.append(float(ties[0] if len(ties) == 1 else even[0]))
    return scale, torch.tensor(nearest) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float8_ring_keeps_a_scale_per_token(dtype):
    ring = FeatureRing(2, 1, 5, 33, dtype=torch.float8_e4m3fn)
    features = (torch.randn(1, 5, 33) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 400.0])[:, None]).to(dtype)
    ring.push(features, 0.5)
    stored, sigmas, count = ring.newest_first()
    assert stored.dtype == torch.float32 and ring.scales.shape == (2, 1, 5) and count.tolist() == [1]
    for t in range(5):
        scale, values = float8_oracle(features[0, t].float())
        assert ring.scales[0, 0, t] == scale
        assert torch.equal(stored[0, 0, t], values)
    assert (stored[0] - features.float()).abs().max() <= features.abs().max() / 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_float8_token_that_is_not_finite_is_nan(bad):
    ring = FeatureRing(1, 2, 3, 4, dtype=torch.float8_e4m3fn)
    features = torch.ones(2, 3, 4)
    features[1, 2, 0] = bad
    ring.push(features, 0.5)
    stored = ring.newest_first()[0][0]
    assert stored[1, 2].isnan().all() and stored.isnan().sum() == 4


def test_a_float8_ring_walks_resets_and_restores_as_others_do():
    ring = FeatureRing(2, 2, 3, 4, dtype=torch.float8_e4m3fn)
    plain = FeatureRing(2, 2, 3, 4, backend="torch")
    for sigma in (0.9, 0.7, 0.5):
        features = torch.randint(-8, 9, (2, 3, 4)).float()
        features[..., 0] = 7.0 * 64  # so that the scale is one and small integers are exact
        for each in (ring, plain):
            each.push(features, sigma)
    snapshot = ring.snapshot()
    ring.push(torch.ones(1, 3, 4), 0.1, rows=[1])
    assert ring.sigmas[:, 1].tolist() != snapshot.sigmas[:, 1].tolist()
    ring.restore(snapshot)
    for actual, expected in zip(ring.newest_first(), plain.newest_first()):
        assert torch.equal(actual, expected)
    assert ring.nbytes == 2 * 2 * 3 * 4 + 2 * 2 * 3 * 4 + 2 * 2 * 4 + 2 * 4 + 2 * 4
    ring.reset()
    assert ring.newest_first()[0].isnan().all()


def test_scales_belong_to_float8():
    ring, plain = FeatureRing(1, 1, 2, 3, dtype=torch.float8_e4m3fn), FeatureRing(1, 1, 2, 3)
    rest = (ring.sigmas, ring.cursor, ring.count, torch.ones(1, 2, 3), torch.ones(1))
    with pytest.raises(TypeError, match="`scales` must be a torch.Tensor, but got None .*scales"):
        ring_push(ring.storage, None, *rest)
    with pytest.raises(ValueError, match="`scales` must be None for this dtype of `storage`"):
        ring_push(plain.storage, ring.scales, *rest)
    assert ring.count.tolist() == [0]
