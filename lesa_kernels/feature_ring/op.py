"""The push into the feature ring as a torch operator, and its public function."""

import functools
import warnings

import torch

from lesa_kernels._checks import Said, argument_error, check_tensor
from lesa_kernels._dispatch import requested_backend, resolve_backend
from lesa_kernels._extension import extension, extension_error
from lesa_kernels.feature_ring.reference import ring_push_ref

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

_LIBRARY = torch.library.Library("lesa_kernels", "FRAGMENT")
_LIBRARY.define(
    "ring_push(Tensor(a!) storage, Tensor(b!) sigmas, Tensor(c!) cursor, Tensor(d!) count, "
    "Tensor features, Tensor sigma, Tensor? rows) -> ()"
)


def _ring_push_extension(storage, sigmas, cursor, count, features, sigma, rows):
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


_LIBRARY.impl("ring_push", _ring_push_extension, "CPU")
_LIBRARY.impl("ring_push", _ring_push_extension, "CUDA")


@torch.library.register_fake("lesa_kernels::ring_push", lib=_LIBRARY)
def _(storage, sigmas, cursor, count, features, sigma, rows):
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"FeatureRing copies with plain torch, because the compiled extension is not available ({reason}). Build it "
        "with `pip install .` in a checkout of lesa-kernels; LESA_BACKEND=torch chooses plain torch without a warning.",
        RuntimeWarning,
        stacklevel=4,
    )


def ring_backend(backend: str, storage: torch.Tensor) -> str:
    """The backend that pushes into `storage`, "extension" or "torch".

    "auto" is the extension for CPU tensors, or plain torch with one `RuntimeWarning` where it is missing; plain torch
    for CUDA tensors.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: "triton", or "extension" where it can't be loaded.
    """
    requested = requested_backend(backend)
    # LESA_BACKEND=triton speaks to the operations that have a Triton kernel; this one has none.
    if requested == "auto" or (backend == "auto" and requested == "triton"):
        if storage.is_cuda:
            return "torch"
        reason = extension_error()
        if reason is None:
            return "extension"
        _warn_once(reason)
        return "torch"
    resolved = resolve_backend(requested, storage, ("extension", "torch"), "ring_push")
    if resolved == "extension":
        extension()
    return resolved


def check_rows(rows: torch.Tensor, batch: int) -> None:
    """Raises `ValueError` unless `rows` are distinct and in range; skipped on a GPU and in a traced graph."""
    if rows.is_cuda or torch.compiler.is_compiling() or rows.numel() == 0:
        return
    listed = rows.tolist()
    if min(listed) < 0 or max(listed) >= batch or len(set(listed)) < len(listed):
        must = f"be distinct and lie in [0, {batch})"
        raise argument_error("rows", must, Said(str(listed)), "Pass each row of the ring's batch at most once.")


def ring_push(
    storage: torch.Tensor,
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
    anchors of a row are always strictly decreasing in sigma. Features are converted as `Tensor.to` does; no gradient
    is recorded.

    Args:
        storage: `[capacity, B, T, D]` float32, float16 or bfloat16, contiguous.
        sigmas: `[capacity, B]` float32, contiguous: the sigma of each stored feature.
        cursor: `[B]` int32: the slot that the next append writes.
        count: `[B]` int32: how many anchors are valid.
        features: `[n, T, D]` float32, float16 or bfloat16, any strides, sharing no memory with the ring.
        sigma: `[n]` float32.
        rows: `[n]` int64, distinct: the ring's row of each sample. None: sample i goes to row i, and n = B.
            Its values are not checked on a GPU.
        backend: "auto" (the compiled extension for CPU tensors, plain torch for CUDA tensors), "extension" or "torch".

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: an argument has another shape or device, is not contiguous, or `rows` repeat or are out of range.
        RuntimeError: the backend can't run here.

    Equivalent to `ring_push_ref`.
    """
    capacity, batch, tokens, dim = check_tensor(
        "storage", storage, ("capacity", "batch", "tokens", "dim"), STORAGE_DTYPES
    ).shape
    device = storage.device
    check_tensor("sigmas", sigmas, (capacity, batch), (torch.float32,), device)
    check_tensor("cursor", cursor, (batch,), (torch.int32,), device)
    check_tensor("count", count, (batch,), (torch.int32,), device)
    for name, buffer in (("storage", storage), ("sigmas", sigmas), ("cursor", cursor), ("count", count)):
        if not buffer.is_contiguous():
            remedy = "Allocate the ring with `FeatureRing`."
            raise argument_error(name, "be contiguous", Said(f"strides {list(buffer.stride())}"), remedy)
    samples = batch
    if rows is not None:
        samples = check_tensor("rows", rows, ("n",), (torch.int64,), device).shape[0]
    check_tensor("features", features, (samples, tokens, dim), STORAGE_DTYPES, device)
    check_tensor("sigma", sigma, (samples,), (torch.float32,), device)
    if rows is not None:
        check_rows(rows, batch)
    if ring_backend(backend, storage) == "extension":
        torch.ops.lesa_kernels.ring_push(storage, sigmas, cursor, count, features.detach(), sigma.detach(), rows)
    else:
        ring_push_ref(storage, sigmas, cursor, count, features, sigma, rows)
