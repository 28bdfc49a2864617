"""The push into the feature ring as a torch operator, and its public function."""

import torch

from lesa_kernels._checks import Said, argument_error, check_tensor
from lesa_kernels._dispatch import resolve_backend
from lesa_kernels._extension import extension
from lesa_kernels.feature_ring.reference import ring_push_ref

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGE_DTYPES = (*FEATURE_DTYPES, torch.float8_e4m3fn)

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

_LIBRARY = torch.library.Library("lesa_kernels", "FRAGMENT")
_LIBRARY.define(
    "ring_push(Tensor(a!) storage, Tensor(b!)? scales, Tensor(c!) sigmas, Tensor(d!) cursor, Tensor(e!) count, "
    "Tensor features, Tensor sigma, Tensor? rows) -> ()"
)


def _check_push(storage, scales, sigmas, cursor, count, features, sigma, rows):
    capacity, batch, tokens, dim = check_tensor(
        "storage", storage, ("capacity", "batch", "tokens", "dim"), STORAGE_DTYPES
    ).shape
    device = storage.device
    check_tensor("sigmas", sigmas, (capacity, batch), (torch.float32,), device)
    check_tensor("cursor", cursor, (batch,), (torch.int32,), device)
    check_tensor("count", count, (batch,), (torch.int32,), device)
    if storage.dtype == torch.float8_e4m3fn:
        remedy = "Pass the `scales` of the ring."
        check_tensor("scales", scales, (capacity, batch, tokens), (torch.float32,), device, remedy)
    elif scales is not None:
        remedy = "Scales belong to a ring of float8_e4m3fn."
        raise argument_error("scales", "be None for this dtype of `storage`", scales, remedy)
    buffers = {"storage": storage, "scales": scales, "sigmas": sigmas, "cursor": cursor, "count": count}
    for name, buffer in buffers.items():
        if buffer is not None and not buffer.is_contiguous():
            remedy = "Allocate the ring with `FeatureRing`."
            raise argument_error(name, "be contiguous", Said(f"strides {list(buffer.stride())}"), remedy)
    samples = batch
    if rows is not None:
        samples = check_tensor("rows", rows, ("n",), (torch.int64,), device).shape[0]
    check_tensor("features", features, (samples, tokens, dim), FEATURE_DTYPES, device)
    check_tensor("sigma", sigma, (samples,), (torch.float32,), device)
    if torch.compiler.is_compiling() or features.numel() == 0:
        return  # nothing has an address
    if features.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr():
        must, got = "share no memory with the ring", Said("a view of `storage`")
        raise argument_error("features", must, got, "Pass a copy, `features.clone()`.")


def check_rows(rows: torch.Tensor, batch: int) -> None:
    """Raises `ValueError` unless `rows` are distinct and in range; skipped on a GPU and in a traced graph."""
    if rows.is_cuda or torch.compiler.is_compiling() or rows.numel() == 0:
        return
    listed = rows.tolist()
    if min(listed) < 0 or max(listed) >= batch or len(set(listed)) < len(listed):
        must = f"be distinct and lie in [0, {batch})"
        raise argument_error("rows", must, Said(str(listed)), "Pass each row of the ring's batch at most once.")


def _ring_push_extension(storage, scales, sigmas, cursor, count, features, sigma, rows):
    # All checks are here, since the operator can be called without `ring_push`; the compiled code checks rows' values.
    _check_push(storage, scales, sigmas, cursor, count, features, sigma, rows)
    if scales is not None:
        remedy = 'Pass backend="auto" or backend="torch".'
        must = "have one of the dtypes float32, float16, bfloat16 for the compiled extension"
        raise argument_error("storage", must, storage, remedy, TypeError)
    samples = features.shape[0]
    if samples == 0:
        return
    sigma = sigma.contiguous()
    rows = None if rows is None else rows.contiguous()
    on_cuda = storage.is_cuda
    extension().ring_push(
        storage=storage.data_ptr(),
        storage_dtype=_NAMES[storage.dtype],
        storage_sizes=tuple(storage.shape),
        sigmas=sigmas.data_ptr(),
        cursor=cursor.data_ptr(),
        count=count.data_ptr(),
        features=features.data_ptr(),
        features_dtype=_NAMES[features.dtype],
        features_strides=features.stride(),
        sigma=sigma.data_ptr(),
        rows=0 if rows is None else rows.data_ptr(),
        samples=samples,
        device=storage.device.index if on_cuda else -1,
        stream=torch.cuda.current_stream(storage.device).cuda_stream if on_cuda else 0,
        threads=torch.get_num_threads(),
    )
    # Autograd must know that values were overwritten which it may have saved. Inference tensors count nothing.
    torch.autograd.graph.increment_version(
        [buffer for buffer in (storage, sigmas, cursor, count) if not buffer.is_inference()]
    )


_LIBRARY.impl("ring_push", _ring_push_extension, "CPU")
_LIBRARY.impl("ring_push", _ring_push_extension, "CUDA")


@torch.library.register_fake("lesa_kernels::ring_push", lib=_LIBRARY)
def _(storage, scales, sigmas, cursor, count, features, sigma, rows):
    return None


def ring_push(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    features: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Stores one feature per sample in a ring, in place, with its sigma.

    Per sample, by its sigma against that of the row's newest anchor: a smaller one is appended, over the oldest anchor
    when the ring is full; an equal one replaces the newest; any other (greater, or NaN) starts a new history. So the
    anchors of a row are always strictly decreasing in sigma. Features are converted as `Tensor.to` does, or to float8
    with a scale per token: the token's largest magnitude over 448, one for zeros, NaN where a value is not finite. No
    gradient is recorded.

    Args:
        storage: `[capacity, B, T, D]` float32, float16, bfloat16 or float8_e4m3fn, contiguous.
        scales: `[capacity, B, T]` float32, contiguous, for float8: what a token's values are multiples of; else None.
        sigmas: `[capacity, B]` float32, contiguous: the sigma of each stored feature.
        cursor: `[B]` int32: the slot that the next append writes.
        count: `[B]` int32: how many anchors are valid.
        features: `[n, T, D]` float32, float16 or bfloat16, any strides, sharing no memory with the ring.
        sigma: `[n]` float32.
        rows: `[n]` int64, distinct: the ring's row of each sample. None: sample i goes to row i, and n = B.
            Its values are not checked on a GPU.
        backend: "auto" (the compiled extension for CPU tensors, plain torch for CUDA tensors and for float8),
            "extension" or "torch".

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: an argument has another shape or device, is not contiguous, `features` share memory with `storage`,
            or `rows` repeat or are out of range.
        RuntimeError: the backend can't run here.

    Equivalent to `ring_push_ref`.
    """
    tensors = {"storage": storage, "sigmas": sigmas, "cursor": cursor, "count": count}
    optional = {name: value for name, value in (("scales", scales), ("rows", rows)) if value is not None}
    tensors |= {"features": features, "sigma": sigma} | optional
    for name, value in tensors.items():
        check_tensor(name, value)
    in_torch = storage.is_cuda or storage.dtype == torch.float8_e4m3fn
    implemented = ("torch",) if in_torch else ("extension", "torch")
    if resolve_backend(backend, storage, implemented, "ring_push") == "extension":
        state = (storage, scales, sigmas, cursor, count)
        torch.ops.lesa_kernels.ring_push(*state, features.detach(), sigma.detach(), rows)
    else:
        _check_push(storage, scales, sigmas, cursor, count, features, sigma, rows)
        if rows is not None:
            check_rows(rows, storage.shape[1])
        ring_push_ref(storage, scales, sigmas, cursor, count, features, sigma, rows)
