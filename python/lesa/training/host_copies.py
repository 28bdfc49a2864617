"""Copies tensors of a device to the CPU, while the device continues its work."""

from collections import deque
from collections.abc import Callable, Sequence, Set

import torch

Receiver = Callable[[Sequence[torch.Tensor]], None]

ON_THEIR_WAY = 2
"""How many groups of tensors may be on their way to the CPU. It bounds the pinned memory and how late one is received.
The device never waits for a group, and the host only for one that is this far behind."""


class HostCopies:
    """Hands tensors to receivers on the CPU, in the order in which they were given.

    Tensors on the CPU are received at once, as they are. Those on a GPU are cloned there, unless they are fresh, and
    copied into pinned memory on a stream of their own. They are received by a later call, once their copies have
    arrived.
    """

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pending: deque[tuple[list[tuple[torch.Tensor, torch.cuda.Event | None]], Receiver]] = deque()

    def give(self, tensors: Sequence[torch.Tensor], receive: Receiver, fresh: Set[int] = frozenset()) -> None:
        """Gives a group of tensors to a receiver. What is written to the tensors afterwards does not matter.

        Args:
            tensors: of any devices.
            receive: is called with their values on the CPU: in this call, in a later one or in `finish`.
            fresh: the positions of tensors that were made for this call, so that nobody writes to them afterwards.
        """
        if not any(map(self.is_copied_aside, tensors)):
            receive([tensor.cpu() for tensor in tensors])
            return
        copies = [self.started(tensor, position in fresh) for position, tensor in enumerate(tensors)]
        self._pending.append((copies, receive))
        self._receive(ON_THEIR_WAY)

    def finish(self) -> None:
        """Waits for all tensors that were given, and lets them be received."""
        self._receive(0)

    def _receive(self, left: int) -> None:
        while len(self._pending) > left:
            copies, receive = self._pending.popleft()
            for _, arrived in copies:
                if arrived is not None:
                    arrived.synchronize()
            receive([copy for copy, _ in copies])

    def is_copied_aside(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on a device that has streams and pinned memory to copy to."""
        return tensor.is_cuda

    def started(self, tensor: torch.Tensor, is_fresh: bool) -> "tuple[torch.Tensor, torch.cuda.Event | None]":
        """Starts a copy of a tensor. Returns it, and the event after which it has its values, or None if it has them.

        The clone is made on the stream on which the tensor was computed, before anything overwrites the tensor. Its
        memory is not used again before the copy has read it.
        """
        if not self.is_copied_aside(tensor):
            return tensor.to("cpu", copy=True), None
        device = tensor.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        aside = self._streams[device]
        clone = tensor.contiguous() if is_fresh else tensor.clone(memory_format=torch.contiguous_format)
        copy = torch.empty(clone.shape, dtype=clone.dtype, device="cpu", pin_memory=True)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            copy.copy_(clone, non_blocking=True)
            clone.record_stream(aside)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        return copy, arrived
