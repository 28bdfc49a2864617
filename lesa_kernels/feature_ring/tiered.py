"""`TieredRing`: a feature ring that is larger than the device memory it may use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from lesa_kernels.checks import argument_error, check_choice, check_float, check_int, check_tensor
from lesa_kernels.dispatch import BACKENDS
from lesa_kernels.feature_ring.op import STORAGE_DTYPES, check_apart, check_push, check_rows, ring_backend, ring_gather
from lesa_kernels.feature_ring.reference import RingBuffers
from lesa_kernels.feature_ring.ring import (
    FeatureRing,
    RingSnapshot,
    check_snapshot,
    is_capturing,
    ring_nbytes,
    rows_tensor,
    to_device,
    token_nbytes,
)

FEWEST_PIECES = 8  # of the tokens, so that a piece is computed while the next one is copied
MOST_PIECES = 64


@dataclass
class _Anchor:
    """Where a stored feature is."""

    sigma: float  # a float32 value
    slot: int
    near: bool  # on the device, not in host memory


def _least_nbytes(capacity: int, batch: int, tokens: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes on the device of the smallest `TieredRing` of these sizes: one slot, and two of the smallest pieces."""
    pieces = 2 * capacity * batch * token_nbytes(dim, dtype) * -(-tokens // MOST_PIECES)
    return ring_nbytes(capacity, batch, 0, dim, dtype) + ring_nbytes(1, batch, tokens, dim, dtype) + pieces


def make_ring(
    capacity: int,
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    max_device_bytes: int | None = None,
) -> "FeatureRing | TieredRing":
    """A `FeatureRing`, or a `TieredRing` where that would take more than `max_device_bytes` on the device.

    Args:
        capacity, batch, tokens, dim, dtype, device, backend: as in `FeatureRing`.
        max_device_bytes: the budget; no limit if None.

    Raises:
        TypeError, ValueError: an argument is not as described, or the budget is less than a ring needs.
    """
    sizes = (capacity, batch, tokens, dim, dtype, device, backend)
    if max_device_bytes is None:
        return FeatureRing(*sizes)
    check_int("max_device_bytes", max_device_bytes, minimum=0)
    needed = ring_nbytes(*sizes[:5])
    if needed <= max_device_bytes:
        return FeatureRing(*sizes)
    if needed <= _least_nbytes(*sizes[:5]):  # such as a ring of one slot, or of very few tokens
        must = f"be at least {needed}, because for these sizes a ring with a part in host memory needs no less"
        raise argument_error("max_device_bytes", must, max_device_bytes, "Raise it, or store in a smaller dtype.")
    return TieredRing(*sizes, max_device_bytes)


def shared_budget(max_device_bytes: int, rings: Sequence[tuple[int, int, int, int, torch.dtype]]) -> list[int]:
    """Divides a budget among rings that share it. Each gets the least that it needs, and a part of the rest.

    Args:
        max_device_bytes: the budget.
        rings: for each ring, capacity, batch, tokens, dim and dtype, as in `FeatureRing`.

    Returns:
        The budget of each ring, for `make_ring`. It is the ring's whole size if all of them fit.

    Raises:
        TypeError, ValueError: the budget is less than the rings need together.
    """
    budget = check_int("max_device_bytes", max_device_bytes, minimum=0)
    whole = [ring_nbytes(*sizes) for sizes in rings]
    least = [min(needed, _least_nbytes(*sizes)) for needed, sizes in zip(whole, rings)]
    if budget < sum(least):
        must = f"be at least {sum(least)}, for {len(least)} rings that share it"
        raise argument_error("max_device_bytes", must, budget, "Raise it, or store in a smaller dtype.")
    spare, wanted = budget - sum(least), sum(whole) - sum(least)
    if spare >= wanted:
        return whole
    return [few + spare * (needed - few) // wanted for few, needed in zip(least, whole)]


class TieredRing:
    """A `FeatureRing` whose oldest features are in host memory, which is pinned if the device is a GPU.

    A read is divided into pieces of the tokens, `pieces()`. Each piece is copied to the device on a separate CUDA
    stream, while the caller works on the piece before. The copies of the first pieces start when a push or the last
    read has ended. Predictors read it like a `FeatureRing`, and give the same forecasts.

    The host keeps track of where each feature is, so it needs the noise levels of a push: pass floats or CPU tensors,
    because the host waits for a tensor on a GPU. A TieredRing can't be captured into a CUDA graph.

    Args:
        capacity, batch, tokens, dim, dtype, device, backend: as in `FeatureRing`.
        max_device_bytes: how much memory all buffers of the ring may use on the device.

    Attributes:
        resident: how many of the newest features of each sample stay on the device.
        piece_tokens: the largest number of tokens in a piece.
        sigmas: `[capacity, B]` float32; the newest is in the last row.
        cursor: `[B]` int32, zeros.
        count: `[B]` int32, the valid anchors of each row.

    Raises:
        TypeError, ValueError: an argument is not as described, or `max_device_bytes` is less than such a ring needs;
            the message says how much that is.
    """

    @torch.inference_mode(False)  # the buffers are changed in place later, also outside of an inference mode
    def __init__(
        self,
        capacity: int,
        batch: int,
        tokens: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str,
        max_device_bytes: int,
    ):
        self.capacity = check_int("capacity", capacity, minimum=2)
        self.batch = check_int("batch", batch)
        self.tokens = check_int("tokens", tokens)
        self.dim = check_int("dim", dim)
        self.dtype = check_choice("dtype", dtype, STORAGE_DTYPES)
        self.backend = check_choice("backend", backend, BACKENDS)
        self.resident, self.piece_tokens = self._divide(check_int("max_device_bytes", max_device_bytes))
        self._near = FeatureRing(self.resident, batch, tokens, dim, dtype, device, backend)
        self.device = self._near.device
        on_gpu = self.device.type == "cuda"
        self._far = self._empty(self.capacity - self.resident, self.tokens, "cpu", pin_memory=on_gpu)
        self._staged = [self._empty(self.capacity, self.piece_tokens, self.device) for _ in range(2)]
        self._sigmas = torch.zeros(self.capacity, batch, dtype=torch.float32, device=self.device)
        self.cursor = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._count = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._copies = _CopyStream(self.device)
        for features, scales in (*self._staged, (self._near.storage, self._near.scales)):
            self._copies.uses(features, scales)
        self._fetched: list[int | None] = [None, None]  # the piece that each staging buffer holds or is about to hold
        self._uses = 0  # counts changes and reads, so that a read notices if another one begins before its end
        self._anchors: list[list[_Anchor]] = [[] for _ in range(batch)]  # of each row, the newest first
        self._near_cursor, self._far_cursor = [0] * batch, [0] * batch
        self._unfinished: set[int] = set()  # the rows of a change that was not finished

    def _divide(self, budget: int) -> tuple[int, int]:
        """How many features stay on the device, and how many tokens a piece has."""
        capacity, batch, tokens = self.capacity, self.batch, self.tokens
        sizes = (batch, tokens, self.dim, self.dtype)
        least = _least_nbytes(capacity, *sizes)
        if budget < least:
            remedy = "Raise it, or store in a smaller dtype."
            raise argument_error("max_device_bytes", f"be at least {least}", budget, remedy)
        feature = ring_nbytes(2, *sizes) - ring_nbytes(1, *sizes)  # one more slot
        of_token = 2 * capacity * batch * token_nbytes(self.dim, self.dtype)
        least_tokens, most_tokens = -(-tokens // MOST_PIECES), -(-tokens // FEWEST_PIECES)
        more = min((budget - least) // feature, capacity - 2)
        left = budget - least - more * feature
        return 1 + more, min(least_tokens + left // of_token, most_tokens)

    def _empty(self, slots, tokens, device, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (slots, self.batch, tokens)
        scales = None
        if self.dtype == torch.float8_e4m3fn:
            scales = torch.ones(shape, dtype=torch.float32, device=device, **options)
        return torch.zeros(*shape, self.dim, dtype=self.dtype, device=device, **options), scales

    @property
    def device_nbytes(self) -> int:
        """Bytes of the buffers on the device."""
        staged = [buffer for pair in self._staged for buffer in pair]
        buffers = (*staged, self._sigmas, self.cursor, self._count)
        return self._near.nbytes + sum(buffer.nbytes for buffer in buffers if buffer is not None)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the buffers in host memory. PyTorch may pin up to twice as much, since it rounds up."""
        return sum(buffer.nbytes for buffer in self._far if buffer is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.device_nbytes + self.host_nbytes

    @property
    def sigmas(self) -> torch.Tensor:
        """The noise levels, as the class describes them."""
        self._finish()
        return self._sigmas

    @property
    def count(self) -> torch.Tensor:
        """The valid anchors of each row."""
        self._finish()
        return self._count

    @property
    def state(self) -> RingBuffers:
        """`(storage, scales, sigmas, cursor, count)` of the first piece. `pieces()` fills in the stored values."""
        return *self._views(0), self.sigmas, self.cursor, self.count

    def push(
        self,
        features: torch.Tensor,
        sigma: float | torch.Tensor,
        rows: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Like `FeatureRing.push`, but the host waits for a `sigma` or `rows` on a GPU.

        If the push fails after the checks, for example because memory is exhausted, its rows are empty afterwards.
        """
        self._begin_use()
        listed = self._listed(rows)
        if isinstance(sigma, torch.Tensor):
            levels = check_tensor("sigma", sigma, (len(listed),), (torch.float32,)).tolist()
        else:
            levels = [float(np.float32(check_float("sigma", sigma)))] * len(listed)
        on_device = [
            to_device(torch.tensor(values, dtype=dtype, device="cpu"), self.device)
            for values, dtype in ((levels, torch.float32), (listed, torch.int64))
        ]
        check_push(*self._near.state, features, *on_device)  # before anything moves
        check_apart(features, self._near.storage)
        ring_backend(self.backend, self._near.storage, "ring_push")
        with self._changing(listed):
            self._copies.begin()
            for row, level in zip(listed, levels):
                anchors = self._anchors[row]
                if len(anchors) >= self.resident and level < anchors[0].sigma:
                    self._evict(row)
            self._copies.end()
            self._near.push(features, *on_device)
            for row, level in zip(listed, levels):
                self._note_push(row, level)

    @contextmanager
    def _changing(self, rows: Iterable[int]) -> Iterator[None]:
        """Marks the rows while a `with` block changes them, until the device has the new state as well.

        If a change fails, or Ctrl-C interrupts it, its rows are in an unknown state, and cleaning up may fail for the
        same reason. So they stay marked, and the next use empties them.
        """
        self._uses += 1
        self._unfinished.update(rows)
        yield
        self._moved()
        self._unfinished.clear()

    def _finish(self) -> None:
        """Empties the rows of a change that was not finished."""
        if self._unfinished:
            self._empty_rows(sorted(self._unfinished))

    def _empty_rows(self, rows: list[int]) -> None:
        with self._changing(rows):
            for row in rows:
                self._anchors[row] = []
                self._near_cursor[row] = self._far_cursor[row] = 0
            self._near.reset(rows)

    def _begin_use(self) -> None:
        if is_capturing(self.device):
            raise RuntimeError(
                "A TieredRing can't be captured into a CUDA graph, since it moves features to and from host memory. "
                "Capture with a FeatureRing, which has all of them on the device."
            )
        self._finish()

    def _listed(self, rows: Sequence[int] | torch.Tensor | None) -> list[int]:
        if rows is None:
            return list(range(self.batch))
        rows = check_tensor("rows", rows_tensor(rows, self.batch), ("n",), (torch.int64,)).cpu()
        check_rows(rows, self.batch)
        return rows.tolist()

    def _evict(self, row: int) -> None:
        """Copies the oldest feature on the device to host memory, over the oldest feature there."""
        anchor = self._anchors[row][self.resident - 1]
        slot = self._far_cursor[row]
        for far, near in zip(self._far, (self._near.storage, self._near.scales)):
            if far is not None and near is not None:
                self._copies.copy(far[slot, row], near[anchor.slot, row])
        self._far_cursor[row] = (slot + 1) % (self.capacity - self.resident)
        anchor.slot, anchor.near = slot, False

    def _note_push(self, row: int, level: float) -> None:
        """Records on the host what a push into a row did to the ring on the device."""
        anchors = self._anchors[row]
        if anchors and level == anchors[0].sigma:
            return
        if not (anchors and level < anchors[0].sigma):
            anchors.clear()
        anchors.insert(0, _Anchor(level, self._near_cursor[row], True))
        del anchors[self.capacity :]
        self._near_cursor[row] = (self._near_cursor[row] + 1) % self.resident

    def _moved(self) -> None:
        """Updates the state on the device, and fetches the first pieces again."""
        levels = torch.zeros(self.capacity, self.batch, dtype=torch.float32, device="cpu")
        for row, anchors in enumerate(self._anchors):
            for age, anchor in enumerate(anchors):
                levels[self.capacity - 1 - age, row] = anchor.sigma
        counts = torch.tensor([len(anchors) for anchors in self._anchors], dtype=torch.int32, device="cpu")
        for target, source in ((self._sigmas, levels), (self._count, counts)):
            target.copy_(to_device(source, self.device))
        self._fetched = [None, None]
        self._fetch_ahead()

    def pieces(self) -> Iterator[tuple[slice, RingBuffers]]:
        """The stored features of all anchors, in pieces of the tokens.

        Yields:
            The tokens of a piece, and its `(storage, scales, sigmas, cursor, count)` as `ring_push` has them, with
            storage `[capacity, B, n, D]`. They are valid on the current stream, until the next piece is requested.

        Raises:
            RuntimeError: since the last piece the ring was changed, or another read began; or a CUDA graph is captured.
        """
        self._begin_use()
        self._uses += 1
        use = self._uses
        count = -(-self.tokens // self.piece_tokens)
        self._fetch_ahead()
        for piece in range(count):
            place = piece % 2
            self._copies.wait_for(place)
            try:
                tokens = self._tokens(piece)
                state = (*self._views(piece), self._sigmas, self.cursor, self._count)
                yield slice(tokens.start, tokens.stop), state
            finally:
                self._fetched[place] = None
            if self._uses != use:
                raise RuntimeError(
                    "A TieredRing was changed, or another read began, while its pieces were being read. "
                    "Read all pieces before that."
                )
            if piece + 2 < count:
                self._copies.begin()
                self._fetch(piece + 2)
        self._fetch_ahead()

    def _tokens(self, piece: int) -> range:
        begin = piece * self.piece_tokens
        return range(begin, min(begin + self.piece_tokens, self.tokens))

    def _views(self, piece: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The staging buffers of a piece as contiguous tensors, even if the piece is shorter than the others."""
        shape = (self.capacity, self.batch, len(self._tokens(piece)))
        features, scales = self._staged[piece % 2]
        features = features.view(-1)[: int(np.prod(shape)) * self.dim].view(*shape, self.dim)
        return features, None if scales is None else scales.view(-1)[: int(np.prod(shape))].view(shape)

    def _fetch_ahead(self) -> None:
        """Fetches the first two pieces, unless they are there already."""
        self._copies.begin()
        for piece in range(min(2, -(-self.tokens // self.piece_tokens))):
            if self._fetched[piece] != piece:
                self._fetch(piece)

    def _fetch(self, piece: int) -> None:
        """Copies a piece of all anchors into its staging buffer."""
        tokens = self._tokens(piece)
        staged = self._views(piece)
        stores = {True: (self._near.storage, self._near.scales), False: self._far}
        for row, anchors in enumerate(self._anchors):
            for age, anchor in enumerate(anchors):
                for target, source in zip(staged, stores[anchor.near]):
                    if target is not None and source is not None:
                        part = source[anchor.slot, row, tokens.start : tokens.stop]
                        self._copies.copy(target[self.capacity - 1 - age, row], part)
        self._copies.end(piece % 2)
        self._fetched[piece % 2] = piece

    def gather(self, age: int = 0) -> torch.Tensor:
        """Like `FeatureRing.gather`."""
        age = check_int("age", age, minimum=0, maximum=self.capacity - 1)

        def gather(storage, scales, sigmas, cursor, count):
            return ring_gather(storage, scales, cursor, count, age, self.backend)

        return self.by_pieces(gather)

    def by_pieces(self, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        """`function(*state)` of each piece's state, `[B, n, O]`, joined to `[B, T, O]`."""
        pieces = self.pieces()
        tokens, state = next(pieces)  # there is at least one
        first = function(*state)
        result = first.new_empty(self.batch, self.tokens, first.shape[-1])
        result[:, tokens] = first
        for tokens, state in pieces:
            result[:, tokens] = function(*state)
        return result

    def newest_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Like `FeatureRing.newest_first`. The result is on the device, even if it is larger than the budget."""
        features = torch.stack([self.gather(age) for age in range(self.capacity)])
        order = (torch.arange(self.capacity, device=self.device)[:, None]).minimum((self.count - 1).clamp(min=0))
        sigmas = self.sigmas.flip(0).gather(0, order).masked_fill_(self.count == 0, float("nan"))
        return features, sigmas, self.count.clone()

    def reset(self, rows: Sequence[int] | torch.Tensor | None = None) -> None:
        """Like `FeatureRing.reset`."""
        self._begin_use()
        self._empty_rows(self._listed(rows))

    def snapshot(self) -> RingSnapshot:
        """A copy of the whole state, for `restore`. Its features are in host memory."""
        storage, scales = self._empty(self.capacity, self.tokens, "cpu")
        for tokens, (features, piece_scales, *_) in self.pieces():
            storage[:, :, tokens].copy_(features)
            if scales is not None and piece_scales is not None:
                scales[:, :, tokens].copy_(piece_scales)
        return RingSnapshot(storage, scales, self.sigmas.clone(), self.cursor.clone(), self.count.clone())

    def restore(self, snapshot: RingSnapshot) -> None:
        """Restores a snapshot of this ring, or of one with the same sizes and dtype.

        If that fails after the checks, all rows are empty afterwards.

        Raises:
            TypeError, ValueError: `snapshot` is not a snapshot, or not one of such a ring.
        """
        check_snapshot(snapshot, (self.capacity, self.batch, self.tokens, self.dim), self.dtype)
        self.reset()
        self._copies.synchronise()  # copies between host tensors are made at once, and must not overtake these
        cursor, count = snapshot.cursor.tolist(), snapshot.count.tolist()
        sigmas = snapshot.sigmas.tolist()
        near = self._near
        with self._changing(range(self.batch)):
            self._copies.begin()
            for row in range(self.batch):
                newest = min(self.resident, count[row])
                for age in range(count[row]):
                    source = (cursor[row] - 1 - age) % self.capacity
                    slot = newest - 1 - age if age < newest else count[row] - 1 - age
                    stores = (near.storage, near.scales) if age < newest else self._far
                    for target, stored in zip(stores, (snapshot.storage, snapshot.scales)):
                        if target is not None and stored is not None:
                            self._copies.copy(target[slot, row], stored[source, row])
                    self._anchors[row].append(_Anchor(sigmas[source][row], slot, age < newest))
                self._near_cursor[row] = newest % self.resident
                self._far_cursor[row] = (count[row] - newest) % (self.capacity - self.resident)
            self._copies.end()
            # The ring on the device gets the newest of these anchors.
            cursors = torch.tensor(self._near_cursor, dtype=torch.int32, device="cpu")
            counts = torch.tensor([min(self.resident, n) for n in count], dtype=torch.int32, device="cpu")
            levels = torch.zeros(self.resident, self.batch, dtype=torch.float32, device="cpu")
            for row, anchors in enumerate(self._anchors):
                for anchor in anchors[: self.resident]:
                    levels[anchor.slot, row] = anchor.sigma
            for target, source in ((near.cursor, cursors), (near.count, counts), (near.sigmas, levels)):
                target.copy_(to_device(source, self.device))

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"TieredRing(capacity={self.capacity}, batch={self.batch}, tokens={self.tokens}, dim={self.dim}, "
            f"dtype={dtype}, device='{self.device}', backend='{self.backend}', resident={self.resident}, "
            f"{self.device_nbytes / 2**20:.1f} MiB and {self.host_nbytes / 2**20:.1f} MiB in host memory, "
            f"count={self.count.tolist()})"
        )


class _CopyStream:
    """A stream for copies that run while a GPU computes. On a CPU, copies are made at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: dict[int, torch.cuda.Event] = {}

    def uses(self, *buffers: torch.Tensor | None) -> None:
        """Keeps the allocator from reusing the memory of these buffers before the copies have ended."""
        for buffer in buffers:
            if self.stream is not None and buffer is not None:
                buffer.record_stream(self.stream)

    def begin(self) -> None:
        """Later copies wait for all work that the current stream has so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def end(self, place: int | None = None) -> None:
        """Later work of the current stream waits for the copies: with a `place`, only work after `wait_for(place)`."""
        if self.stream is None:
            return
        if place is None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        else:
            self.ready[place] = self.stream.record_event()

    def wait_for(self, place: int) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[place])

    def synchronise(self) -> None:
        """Waits until all copies have been made."""
        if self.stream is not None:
            self.stream.synchronize()
