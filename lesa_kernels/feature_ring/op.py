"""The push into a feature ring and the read of one feature: torch operators and public functions."""

import torch

from lesa_kernels.checks import Said, argument_error, check_float, check_int, check_tensor
from lesa_kernels.dispatch import resolve_backend
from lesa_kernels.extension import extension
from lesa_kernels.feature_ring.reference import ring_gather_ref, ring_push_ref
from lesa_kernels.register import OPERATOR_TAGS

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGE_DTYPES = (*FEATURE_DTYPES, torch.float8_e4m3fn)

_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES}

_LIBRARY = torch.library.Library("lesa_kernels", "FRAGMENT")
_RING = "Tensor(a!) storage, Tensor(b!)? scales, Tensor(c!) sigmas, Tensor(d!) cursor, Tensor(e!) count"
for _schema in (
    f"ring_push({_RING}, Tensor features, Tensor sigma, Tensor? rows) -> ()",
    f"ring_push.Scalar({_RING}, Tensor features, float sigma, Tensor? rows) -> ()",
    "ring_gather(Tensor storage, Tensor? scales, Tensor cursor, Tensor count, int age) -> Tensor",
):
    _LIBRARY.define(_schema, tags=OPERATOR_TAGS)


def _check_ring(storage, scales, cursor, count):
    capacity, batch, tokens, dim = check_tensor(
        "storage", storage, ("capacity", "batch", "tokens", "dim"), STORAGE_DTYPES
    ).shape
    device = storage.device
    check_tensor("cursor", cursor, (batch,), (torch.int32,), device)
    check_tensor("count", count, (batch,), (torch.int32,), device)
    if storage.dtype == torch.float8_e4m3fn:
        remedy = "Pass the `scales` of the ring."
        check_tensor("scales", scales, (capacity, batch, tokens), (torch.float32,), device, remedy)
    elif scales is not None:
        remedy = "Scales belong to a ring of float8_e4m3fn."
        raise argument_error("scales", "be None for this dtype of `storage`", scales, remedy)
    for name, buffer in {"storage": storage, "scales": scales, "cursor": cursor, "count": count}.items():
        _check_contiguous(name, buffer)


def _check_contiguous(name, buffer):
    if buffer is not None and not buffer.is_contiguous():
        remedy = "Allocate the ring with `FeatureRing`."
        raise argument_error(name, "be contiguous", Said(f"strides {list(buffer.stride())}"), remedy)


def check_push(storage, scales, sigmas, cursor, count, features, sigma, rows) -> None:
    """Raises `TypeError` or `ValueError` if an argument of a push has the wrong shape, dtype, device or layout."""
    if _fits(storage, scales, sigmas, cursor, count, features, sigma, rows):
        return
    _check_ring(storage, scales, cursor, count)
    capacity, batch, tokens, dim = storage.shape
    device = storage.device
    check_tensor("sigmas", sigmas, (capacity, batch), (torch.float32,), device)
    _check_contiguous("sigmas", sigmas)
    samples = batch
    if rows is not None:
        samples = check_tensor("rows", rows, ("n",), (torch.int64,), device).shape[0]
    check_tensor("features", features, (samples, tokens, dim), FEATURE_DTYPES, device)
    if isinstance(sigma, torch.Tensor):
        check_tensor("sigma", sigma, (samples,), (torch.float32,), device)


def _fits(storage, scales, sigmas, cursor, count, features, sigma, rows) -> bool:
    """Whether the rest of `check_push` would find nothing wrong. Takes a fraction of its time."""
    if storage.dim() != 4:
        return False
    device, stored = storage.device, storage.dtype
    capacity, batch, tokens, dim = storage.shape
    samples = batch if rows is None else rows.numel()
    return (
        (rows is None or (rows.dim() == 1 and rows.dtype == torch.int64 and rows.device == device))
        and (not isinstance(sigma, torch.Tensor) or _is(sigma, (samples,), torch.float32, device))
        and (stored in FEATURE_DTYPES if scales is None else stored == torch.float8_e4m3fn)
        and (
            scales is None or (_is(scales, (capacity, batch, tokens), torch.float32, device) and scales.is_contiguous())
        )
        and features.shape == (samples, tokens, dim)
        and features.dtype in FEATURE_DTYPES
        and sigmas.shape == (capacity, batch)
        and cursor.shape == count.shape == (batch,)
        and cursor.dtype == count.dtype == torch.int32
        and sigmas.dtype == torch.float32
        and sigmas.device == cursor.device == count.device == features.device == device
        and storage.is_contiguous()
        and sigmas.is_contiguous()
        and cursor.is_contiguous()
        and count.is_contiguous()
    )


def _is(tensor, shape, dtype, device) -> bool:
    return tensor.shape == shape and tensor.dtype == dtype and tensor.device == device


def check_apart(features: torch.Tensor, storage: torch.Tensor) -> None:
    """Raises `ValueError` if they share memory. Not needed for the compiled code, which checks it."""
    if torch.compiler.is_compiling() or features.numel() == 0:
        return  # there are no addresses
    last = sum((size - 1) * stride for size, stride in zip(features.shape, features.stride()))
    begin, end = features.data_ptr(), features.data_ptr() + (last + 1) * features.itemsize
    if begin < storage.data_ptr() + storage.nbytes and storage.data_ptr() < end:
        must, got = "share no memory with the ring", Said("a view of `storage`")
        raise argument_error("features", must, got, "Pass a copy, `features.clone()`.")


def check_rows(rows: torch.Tensor, batch: int) -> None:
    """Raises `ValueError` unless `rows` are distinct and in range. Skipped on a GPU and in a traced graph."""
    if rows.is_cuda or torch.compiler.is_compiling() or rows.numel() == 0:
        return
    listed = rows.tolist()
    if min(listed) < 0 or max(listed) >= batch or len(set(listed)) < len(listed):
        must = f"be distinct and lie in [0, {batch})"
        raise argument_error("rows", must, Said(str(listed)), "Pass each row of the ring's batch at most once.")


def _assert_rows(rows: torch.Tensor, batch: int) -> None:
    """Like `check_rows`, but as an assertion on the device of `rows`, so that the host does not wait."""
    inside = ((rows >= 0) & (rows < batch)).all()
    ordered = rows.sort().values
    distinct = (ordered[1:] != ordered[:-1]).all()
    must = f"the rows must be distinct and lie in [0, {batch})"
    torch._assert_async(inside & distinct, f"lesa_kernels.ring_push: {must}")


def _check_tensors(**named) -> None:
    for name, value in named.items():
        check_tensor(name, value)


def _where(tensor) -> tuple[int, int]:
    """The index of a tensor's CUDA device and its current stream, for compiled code; -1 and 0 for the CPU."""
    if not tensor.is_cuda:
        return -1, 0
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device_index, stream.cuda_stream


def _address(tensor) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def push_arguments(storage, scales, sigmas, cursor, count, features, sigma, rows) -> tuple:
    """The arguments of the compiled `ring_push`. `sigma` and `rows` are contiguous, or a float and None."""
    level = 0.0
    if not isinstance(sigma, torch.Tensor):
        sigma, level = None, sigma
    return (
        storage.data_ptr(),
        _NAMES[storage.dtype],
        storage.shape,
        _address(scales),
        sigmas.data_ptr(),
        cursor.data_ptr(),
        count.data_ptr(),
        features.data_ptr(),
        _NAMES[features.dtype],
        features.stride(),
        _address(sigma),
        level,
        _address(rows),
        features.shape[0],
        *_where(storage),
        torch.get_num_threads(),
    )


def gather_arguments(storage, scales, cursor, count, age, output) -> tuple:
    """The arguments of the compiled `ring_gather`."""
    return (
        storage.data_ptr(),
        _NAMES[storage.dtype],
        storage.shape,
        _address(scales),
        cursor.data_ptr(),
        count.data_ptr(),
        age,
        output.data_ptr(),
        *_where(storage),
        torch.get_num_threads(),
    )


def _ring_push_extension(storage, scales, sigmas, cursor, count, features, sigma, rows):
    # All checks are here, since the operator can be called without `ring_push`. Only the values of the rows are checked
    # by the compiled code.
    check_push(storage, scales, sigmas, cursor, count, features, sigma, rows)
    if isinstance(sigma, torch.Tensor):
        sigma = sigma.contiguous()
    if rows is not None:
        if rows.shape[0] == 0:
            return
        rows = rows.contiguous()
    extension().ring_push(*push_arguments(storage, scales, sigmas, cursor, count, features, sigma, rows))
    # Autograd must notice if values that it has saved were overwritten. Inference tensors have no version.
    written = (storage, sigmas, cursor, count) if scales is None else (storage, scales, sigmas, cursor, count)
    torch.autograd.graph.increment_version([buffer for buffer in written if not buffer.is_inference()])


def _gather_output(storage) -> torch.Tensor:
    dtype = torch.float32 if storage.dtype == torch.float8_e4m3fn else storage.dtype
    return torch.empty(storage.shape[1:], dtype=dtype, device=storage.device)


def _ring_gather_extension(storage, scales, cursor, count, age):
    _check_ring(storage, scales, cursor, count)
    output = _gather_output(storage)
    extension().ring_gather(*gather_arguments(storage, scales, cursor, count, age, output))
    return output


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("ring_push", _ring_push_extension, _device)
    _LIBRARY.impl("ring_push.Scalar", _ring_push_extension, _device)
    _LIBRARY.impl("ring_gather", _ring_gather_extension, _device)


@torch.library.register_fake("lesa_kernels::ring_push", lib=_LIBRARY)
@torch.library.register_fake("lesa_kernels::ring_push.Scalar", lib=_LIBRARY)
def _(storage, scales, sigmas, cursor, count, features, sigma, rows):
    return None


@torch.library.register_fake("lesa_kernels::ring_gather", lib=_LIBRARY)
def _(storage, scales, cursor, count, age):
    return _gather_output(storage)


_PUSH, _PUSH_SCALAR = torch.ops.lesa_kernels.ring_push.default, torch.ops.lesa_kernels.ring_push.Scalar


def ring_backend(backend: str, storage: torch.Tensor, operation: str) -> str:
    """The backend that runs `operation` on a ring; see `resolve_backend`, also for the errors."""
    implemented = ("extension", "torch") if storage.device.type in ("cpu", "cuda") else ("torch",)
    return resolve_backend(backend, storage, implemented, operation)


def ring_push(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    features: torch.Tensor,
    sigma: float | torch.Tensor,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Stores one feature per sample in a ring, in place, with its sigma.

    For each sample its sigma is compared with that of the row's newest anchor. If it is smaller, the feature is
    appended, over the oldest anchor when the ring is full. If it is equal, the feature replaces the newest one.
    Otherwise (greater, or NaN) a new history starts. So the sigmas of a row's anchors always decrease strictly.
    Features are converted like `Tensor.to` does, or to float8 with a scale for each token: the token's largest
    magnitude over 448, one for zeros, NaN if a value is not finite. No gradient is recorded.

    On a GPU the extension launches one kernel on the current stream, and nothing waits for the host. In a CUDA graph, a
    float sigma is a constant of the graph: pass a tensor, and change its value between replays.

    Args:
        storage: `[capacity, B, T, D]` float32, float16, bfloat16 or float8_e4m3fn, contiguous. On a GPU the capacity is
            at most 65535.
        scales: `[capacity, B, T]` float32, contiguous, for float8: the factor of a token's values; else None.
        sigmas: `[capacity, B]` float32, contiguous: the sigma of each stored feature.
        cursor: `[B]` int32: the slot that the next append writes.
        count: `[B]` int32: how many anchors are valid.
        features: `[n, T, D]` float32, float16 or bfloat16, any strides, sharing no memory with the ring.
        sigma: `[n]` float32, or a float for all.
        rows: `[n]` int64, distinct: the ring's row of each sample. None: sample i goes to row i, and n = B. On a GPU
            only the device checks the values: a row that is out of range or repeated fails an assertion there. After
            that, the process can't use the device any more.
        backend: "auto" (the compiled extension, plain torch where it can't run), "extension" or "torch".

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device, is not contiguous, `features` share memory with `storage`,
            or `rows` repeat or are out of range.
        RuntimeError: the backend can't run here.

    Equivalent to `ring_push_ref`.
    """
    Tensor = torch.Tensor
    if not (isinstance(storage, Tensor) and isinstance(features, Tensor) and isinstance(sigmas, Tensor)):
        _check_tensors(storage=storage, sigmas=sigmas, features=features)
    if not (isinstance(cursor, Tensor) and isinstance(count, Tensor)):
        _check_tensors(cursor=cursor, count=count)
    if not ((scales is None or isinstance(scales, Tensor)) and (rows is None or isinstance(rows, Tensor))):
        _check_tensors(**{name: value for name, value in (("scales", scales), ("rows", rows)) if value is not None})
    if not isinstance(sigma, Tensor):
        sigma = check_float("sigma", sigma)
    extends = ring_backend(backend, storage, "ring_push") == "extension"
    if extends and features.requires_grad:
        features = features.detach()
    if not isinstance(sigma, Tensor):
        if extends and not torch.compiler.is_compiling():
            _PUSH_SCALAR(storage, scales, sigmas, cursor, count, features, sigma, rows)
            return
        samples = cursor.shape[0] if rows is None else rows.numel()
        sigma = torch.full((samples,), sigma, dtype=torch.float32, device=storage.device)
    if extends:
        _PUSH(storage, scales, sigmas, cursor, count, features, sigma.detach(), rows)
    else:
        check_push(storage, scales, sigmas, cursor, count, features, sigma, rows)
        check_apart(features, storage)
        if rows is not None:
            check = _assert_rows if rows.is_cuda or torch.compiler.is_compiling() else check_rows
            check(rows, storage.shape[1])
        ring_push_ref(storage, scales, sigmas, cursor, count, features, sigma, rows)


def ring_gather(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    cursor: torch.Tensor,
    count: torch.Tensor,
    age: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Reads one feature of each row of a ring. No gradient is recorded.

    Args:
        storage, scales, cursor, count: the ring's buffers, as `ring_push` has them.
        age: which feature, from 0 for the newest to `capacity - 1`. Beyond a row's count its oldest is read.
        backend: "auto" (the compiled extension, plain torch where it can't run), "extension" or "torch".

    Returns:
        `[B, T, D]` in the dtype of `storage`; for float8 in float32, multiplied by the scales. Rows without an anchor
        are NaN.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device, or is not contiguous, or `age` is out of range.
        RuntimeError: the backend can't run here.

    Equivalent to `ring_gather_ref`.
    """
    _check_ring(storage, scales, cursor, count)
    age = check_int("age", age, minimum=0, maximum=storage.shape[0] - 1)
    if ring_backend(backend, storage, "ring_gather") == "extension":
        return torch.ops.lesa_kernels.ring_gather(storage.detach(), scales, cursor, count, age)
    return ring_gather_ref(storage, scales, cursor, count, age)
