"""Single numbers that are copied from a device to the host, while the host continues its work."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Receiver = Callable[[float], None]


Copied = tuple[torch.Tensor, "torch.cuda.Event | None"]
"""A number on the host, and the event after which it is there; None if it is there already."""

SLOTS = 64  # many more than the few values of a step


class PinnedSlots:
    """Places in pinned memory for single numbers, each with an event. A place that was given back is taken again.

    Pinning memory takes long. It is forbidden while a CUDA graph is captured, also on another stream. So memory for
    many numbers is pinned at a time, when the first is needed.
    """

    def __init__(self):
        self._free: dict[torch.device, list[tuple[torch.Tensor, torch.cuda.Event]]] = {}

    def take(self, device: torch.device) -> tuple[torch.Tensor, "torch.cuda.Event"]:
        """A place for a number of that GPU, and an event of that GPU."""
        free = self._free.setdefault(device, [])
        if not free:
            block = torch.empty(SLOTS, dtype=torch.float32, device="cpu", pin_memory=True)
            free += ((slot, torch.cuda.Event()) for slot in block.split(1))
        return free.pop()

    def give_back(self, device: torch.device, slot: torch.Tensor, event: "torch.cuda.Event") -> None:
        """Lets a place be taken again whose number has arrived and was read."""
        self._free.setdefault(device, []).append((slot, event))


def copy_to_host(value: torch.Tensor, slots: PinnedSlots) -> Copied:
    """Starts a copy of a tensor of one element to the host.

    Args:
        value: the tensor, on any device.
        slots: where the copy of a value on a GPU is put.
    """
    if not value.is_cuda:
        return value.detach().reshape(1), None
    copy, event = slots.take(value.device)
    copy.copy_(value.detach().reshape(1), non_blocking=True)
    event.record(torch.cuda.current_stream(value.device))
    return copy, event


class DeviceValues:
    """The values that one run has asked the device for.

    A value on the CPU is received at once. A value on a GPU is received by a later `read`, once its copy has arrived.
    Values of a run that is over are dropped together with this object, so nobody receives them.

    Args:
        waits: whether to wait for each value, and receive it at once on every device. Processes that share a
            transformer need this, because they must decide alike.
    """

    def __init__(self, waits: bool = False):
        self.waits = waits
        self._pending: deque[tuple[Receiver, torch.device, torch.Tensor, torch.cuda.Event]] = deque()
        self._slots = PinnedSlots()

    def ask(self, value: torch.Tensor, receive: Receiver) -> None:
        """Asks for a value.

        Args:
            value: a tensor of one element.
            receive: is called with the value, now or by `read`.
        """
        copy, event = copy_to_host(value, self._slots)
        if event is None:
            receive(copy.item())
        else:
            self._pending.append((receive, value.device, copy, event))
            if self.waits:
                self.read(wait=True)

    def read(self, wait: bool = False) -> None:
        """Hands the values that have arrived to their receivers, in the order in which they were asked for.

        Args:
            wait: whether to wait for the values that have not arrived, too.
        """
        while self._pending:
            receive, device, copy, event = self._pending[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            self._pending.popleft()
            number = copy.item()
            self._slots.give_back(device, copy, event)
            receive(number)

    def clear(self) -> None:
        """Drops the values that have not been received. Their places are not taken again: their copies may be late."""
        self._pending.clear()


def sum_of(output: Any) -> torch.Tensor:
    """The sum of all floating-point tensors of an output, however they are put together. It is finite if they are."""
    if type(output) is tuple and len(output) == 1 and isinstance(output[0], torch.Tensor):  # the usual case
        return output[0].sum(dtype=torch.float32)
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    return sums[0] if len(sums) == 1 else torch.stack(sums or [torch.zeros(())]).sum()
