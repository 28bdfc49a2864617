"""Single numbers that are copied from a device to the host, while the host continues its work."""

from collections import deque
from collections.abc import Callable

import torch

Receiver = Callable[[float], None]


def copy_to_host(value: torch.Tensor) -> tuple[torch.Tensor, "torch.cuda.Event | None"]:
    """Starts a copy of a tensor of one element to the host.

    Args:
        value: the tensor, on any device.

    Returns:
        The copy, and the event after which it holds the value. The event is None if the copy holds it already.
    """
    if not value.is_cuda:
        return value.detach().reshape(1), None
    copy = torch.empty(1, dtype=torch.float32, device="cpu", pin_memory=True)
    copy.copy_(value.detach().reshape(1), non_blocking=True)
    event = torch.cuda.Event()
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
        self._pending: deque[tuple[Receiver, torch.Tensor, torch.cuda.Event]] = deque()

    def ask(self, value: torch.Tensor, receive: Receiver) -> None:
        """Asks for a value.

        Args:
            value: a tensor of one element.
            receive: is called with the value, now or by `read`.
        """
        copy, event = copy_to_host(value)
        if event is None:
            receive(copy.item())
        elif self.waits:
            event.synchronize()
            receive(copy.item())
        else:
            self._pending.append((receive, copy, event))

    def read(self, wait: bool = False) -> None:
        """Hands the values that have arrived to their receivers, in the order in which they were asked for.

        Args:
            wait: whether to wait for the values that have not arrived, too.
        """
        while self._pending:
            receive, copy, event = self._pending[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            self._pending.popleft()
            receive(copy.item())

    def clear(self) -> None:
        """Drops the values that have not been received."""
        self._pending.clear()
