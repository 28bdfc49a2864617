"""Numbers that go from the device to the host without anybody waiting for them."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class Mailbox:
    """Takes single numbers on a device, and gives those that have arrived on the host.

    A number of a CPU tensor is there at once. One on a GPU is copied into pinned memory, behind the work that makes it,
    and is there when the GPU has come to it.
    """

    def __init__(self):
        self._on_the_way: deque[tuple[Any, torch.Tensor, torch.cuda.Event | None]] = deque()

    def post(self, note: Any, value: torch.Tensor) -> None:
        """Sends for `value`, a tensor of one element; `note` comes back with it."""
        if value.is_cuda:
            letter = torch.empty(1, dtype=torch.float32, pin_memory=True)
            letter.copy_(value.detach().reshape(1), non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(value.device))
        else:
            letter, event = value.detach().reshape(1), None
        self._on_the_way.append((note, letter, event))

    def collect(self, wait: bool = False) -> Iterator[tuple[Any, float]]:
        """The notes and numbers that have arrived, in the order in which they were sent; with `wait`, all of them."""
        while self._on_the_way:
            note, letter, event = self._on_the_way[0]
            if wait and event is not None:
                event.synchronize()
            elif not self._arrived(event):
                return
            self._on_the_way.popleft()
            yield note, letter.item()

    def clear(self) -> None:
        """Gives up what is on the way."""
        self._on_the_way.clear()

    @staticmethod
    def _arrived(event: torch.cuda.Event | None) -> bool:
        return event is None or event.query()
