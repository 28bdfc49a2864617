"""`FeatureRing`: the last computed features of every sample, with their noise levels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lesa_kernels.checks import argument_error, check_choice, check_int, check_tensor
from lesa_kernels.dispatch import BACKENDS, extension_problem
from lesa_kernels.feature_ring.op import STORAGE_DTYPES, check_rows, ring_gather, ring_push
from lesa_kernels.feature_ring.reference import RingBuffers, dequantise_float8, newest_slots


@dataclass(frozen=True)
class RingSnapshot:
    """A copy of a ring's state, made by `FeatureRing.snapshot`; it shares no memory with the ring."""

    storage: torch.Tensor
    scales: torch.Tensor | None
    sigmas: torch.Tensor
    cursor: torch.Tensor
    count: torch.Tensor


def token_nbytes(dim: int, dtype: torch.dtype) -> int:
    """Bytes of a stored token, with its scale."""
    return dim * dtype.itemsize + (4 if dtype == torch.float8_e4m3fn else 0)


def ring_nbytes(capacity: int, batch: int, tokens: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of a `FeatureRing` of these sizes: tokens and noise levels of all slots, cursors and counts of all rows."""
    return capacity * batch * (tokens * token_nbytes(dim, dtype) + 4) + 8 * batch


def rows_tensor(rows: Sequence[int] | torch.Tensor, batch: int) -> torch.Tensor:
    """`rows` as a tensor. A list becomes a checked tensor on the CPU; a tensor is returned unchanged and unchecked."""
    if isinstance(rows, torch.Tensor):
        return rows
    listed = [check_int("rows", row, minimum=0, maximum=batch - 1) for row in rows]
    tensor = torch.tensor(listed, dtype=torch.int64, device="cpu")
    check_rows(tensor, batch)
    return tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` of a small CPU tensor, made without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a GPU is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_snapshot(
    snapshot: RingSnapshot, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Raises unless `snapshot` is of a ring of these sizes and dtype, and on `device` if one is given."""
    if not isinstance(snapshot, RingSnapshot):
        remedy = "Pass what `snapshot()` returned."
        raise argument_error("snapshot", "be a RingSnapshot", snapshot, remedy, TypeError)
    remedy = "Restore a snapshot into a ring of the sizes, dtype and device it was taken from."
    check_tensor("snapshot.storage", snapshot.storage, tuple(shape), (dtype,), device, remedy)


class FeatureRing:
    """The last `capacity` features of each sample of a batch, with their sigmas.

    Each sample has its own history. The whole state of the ring is on the device, so a push or a read never waits for
    the host. An anchor is a stored feature with its sigma. The sigmas of a row's anchors decrease strictly.

    Args:
        capacity: anchors kept per sample, at least 1.
        batch: samples B, at least 1.
        tokens: tokens T per sample; may be 0.
        dim: width D of a token's feature, at least 1.
        dtype: of the stored features: float32, float16, bfloat16, or float8_e4m3fn with a scale for each token.
        device: of the ring.
        backend: "auto" (the compiled extension, plain torch where it can't run), "extension" or "torch".

    Attributes:
        storage: `[capacity, B, T, D]` of `dtype`.
        scales: `[capacity, B, T]` float32 for float8, else None: the factor of a token's stored values.
        sigmas: `[capacity, B]` float32.
        cursor: `[B]` int32, the slot that the next append writes.
        count: `[B]` int32, the valid anchors of each row.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    @torch.inference_mode(False)  # the buffers are changed in place later, also outside of an inference mode
    def __init__(
        self,
        capacity: int,
        batch: int,
        tokens: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ):
        self.capacity = check_int("capacity", capacity)
        self.batch = check_int("batch", batch)
        self.tokens = check_int("tokens", tokens, minimum=0)
        self.dim = check_int("dim", dim)
        self.dtype = check_choice("dtype", dtype, STORAGE_DTYPES)
        self.backend = check_choice("backend", backend, BACKENDS)
        self.storage = torch.zeros(self.capacity, self.batch, self.tokens, self.dim, dtype=dtype, device=device)
        self.device = self.storage.device
        float8 = dtype == torch.float8_e4m3fn
        self.scales = torch.ones(self.storage.shape[:3], dtype=torch.float32, device=self.device) if float8 else None
        self.sigmas = torch.zeros(self.capacity, self.batch, dtype=torch.float32, device=self.device)
        self.cursor = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        self.count = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        if backend != "torch" and self.device.type == "cuda":
            extension_problem(self.device)  # loads the kernels now; during the capture of a graph it may not be allowed

    @property
    def state(self) -> RingBuffers:
        """`(storage, scales, sigmas, cursor, count)`, the order of all operations on rings."""
        return self.storage, self.scales, self.sigmas, self.cursor, self.count

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, as `ring_nbytes` says."""
        return sum(buffer.nbytes for buffer in self._buffers().values())

    @property
    def device_nbytes(self) -> int:
        """Bytes of the buffers on the device: all of them."""
        return self.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of the buffers in host memory, apart from the device: none."""
        return 0

    def push(
        self,
        features: torch.Tensor,
        sigma: float | torch.Tensor,
        rows: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Stores a copy of one feature per sample. `features` may be overwritten afterwards.

        For each sample, its sigma is compared with the sigma of the newest anchor of its row. If it is smaller, the
        feature is appended, over the oldest anchor when the ring is full. If it is equal, the feature replaces the
        newest one. Otherwise (greater, or NaN) a new history starts.

        Args:
            features: `[B, T, D]` float32, float16 or bfloat16, any strides, not a view of the ring's `storage`;
                `[n, T, D]` with `rows`.
            sigma: the noise level, one float for all samples or float32 `[B]`; `[n]` with `rows`.
            rows: the n distinct rows of the batch to push into; all if None. Rows on a GPU are checked by the device
                only, as `ring_push` says.

        Raises:
            TypeError, ValueError: an argument is not as described.
            RuntimeError: the backend can't run here, or `rows` is a list while a CUDA graph is captured.
        """
        if rows is not None:
            rows = self._rows(rows)
        ring_push(*self.state, features, sigma, rows, self.backend)

    def newest_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The anchors of each row from the newest to the oldest, as copies.

        Returns:
            features `[capacity, B, T, D]` of the ring's dtype (float32 for float8), sigmas `[capacity, B]` float32 and
            count `[B]` int32. Beyond `count` the row's oldest anchor is repeated; a row without any anchor is NaN.
        """
        slots = newest_slots(self.cursor, self.count, self.capacity)
        rows = torch.arange(self.batch, device=self.device)
        empty = self.count == 0
        features = self.storage[slots, rows]
        if self.scales is not None:
            features = dequantise_float8(features, self.scales[slots, rows])
        features = features.masked_fill_(empty[:, None, None], float("nan"))
        sigmas = self.sigmas[slots, rows].masked_fill_(empty, float("nan"))
        return features, sigmas, self.count.clone()

    def gather(self, age: int = 0) -> torch.Tensor:
        """A copy of one feature of each row, made in one pass.

        Args:
            age: which feature, from 0 for the newest to `capacity - 1`. Beyond a row's count its oldest is read.

        Returns:
            `[B, T, D]` of the ring's dtype (float32 for float8). A row without any anchor is NaN.

        Raises:
            TypeError, ValueError: `age` is not an integer in range.
            RuntimeError: the backend can't run here.
        """
        return ring_gather(self.storage, self.scales, self.cursor, self.count, age, self.backend)

    def reset(self, rows: Sequence[int] | torch.Tensor | None = None) -> None:
        """Forgets the anchors of `rows`, or of all rows; the memory is kept.

        Raises:
            TypeError, ValueError: `rows` are not distinct rows of the batch.
        """
        if rows is not None:
            chosen = check_tensor("rows", self._rows(rows), ("n",), (torch.int64,), self.device)
            check_rows(chosen, self.batch)
        for buffer in (self.cursor, self.count):
            buffer.zero_() if rows is None else buffer.index_fill_(0, chosen, 0)  # neither waits for the host

    def snapshot(self) -> RingSnapshot:
        """A copy of the whole state, for `restore`."""
        storage, scales, sigmas, cursor, count = self.state
        copied = None if scales is None else scales.clone()
        return RingSnapshot(storage.clone(), copied, sigmas.clone(), cursor.clone(), count.clone())

    def restore(self, snapshot: RingSnapshot) -> None:
        """Restores a snapshot of this ring, or of one with the same sizes, dtype and device; the bytes are equal.

        Raises:
            TypeError, ValueError: `snapshot` is not a snapshot, or not one of such a ring.
        """
        check_snapshot(snapshot, self.storage.shape, self.dtype, self.device)
        for name, buffer in self._buffers().items():
            buffer.copy_(getattr(snapshot, name))

    def _buffers(self) -> dict[str, torch.Tensor]:
        """The tensors that hold the state, by name."""
        names = ("storage", "scales", "sigmas", "cursor", "count")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _rows(self, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """`rows` as a tensor; a list becomes a tensor on the device."""
        if isinstance(rows, torch.Tensor):
            return rows
        tensor = rows_tensor(rows, self.batch)
        if is_capturing(self.device):  # each replay would read memory that has been freed since
            must, remedy = "be a tensor on the GPU in a CUDA graph", "Make it before the capture and keep it."
            raise argument_error("rows", must, rows, remedy, RuntimeError)
        return to_device(tensor, self.device)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"FeatureRing(capacity={self.capacity}, batch={self.batch}, tokens={self.tokens}, dim={self.dim}, "
            f"dtype={dtype}, device='{self.device}', backend='{self.backend}', "
            f"{self.nbytes / 2**20:.1f} MiB, count={self.count.tolist()})"
        )
