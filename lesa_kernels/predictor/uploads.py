"""Small numbers that the host knows, brought to a device in one copy, and the weights of a plan step by step."""

from collections.abc import Sequence
from typing import Any

import torch

from lesa_kernels.stream.arguments import Weights

_ALIGNED = 4  # numbers of 4 bytes: Triton compiles a kernel again for pointers that are not aligned to 16 bytes


def uploaded(numbers: Sequence[float], counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """The numbers as float32, then the bits of the counts as int32, in one copy to the device."""
    host = _buffer(len(numbers) + len(counts), device)
    host[: len(numbers)] = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    host[len(numbers) :].view(torch.int32).copy_(torch.tensor(counts, dtype=torch.int32, device="cpu"))
    return host.to(device, non_blocking=True)


def by_step(weights: Weights, batch: int, device: torch.device) -> list[Weights]:
    """Weights of P steps, made on the CPU for one sample, for each step on the device: in one copy.

    Args:
        weights: with the leading dimensions P and 1.
        batch: samples that share them.
        device: where to.
    """
    sizes = [0 if part is None else -(-part[0].numel() // _ALIGNED) * _ALIGNED for part in weights]
    steps = len(weights.count)
    host = _buffer(steps * sum(sizes), device)
    for rows, part in zip(_split(host, sizes, steps), weights):
        if part is not None:
            kept = rows if part.is_floating_point() else rows.view(torch.int32)
            kept[:, : part[0].numel()] = part.reshape(steps, -1)
    there = host.to(device, non_blocking=True)

    parts = zip(_split(there, sizes, steps), weights)
    made: list[Any] = [None if part is None else _as_kept(rows, part) for rows, part in parts]
    return unbound(Weights(*made), batch)


def _as_kept(rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """What the rows of a buffer hold, in the shape of what was written into them."""
    rows = rows if part.is_floating_point() else rows.view(torch.int32)
    return rows[:, : part[0].numel()].view(part.shape)


def unbound(weights: Weights, batch: int) -> list[Weights]:
    """Weights of P steps, which `batch` samples share, for each step."""
    steps = len(weights.count)
    each_step = [
        [None] * steps if value is None else value.expand(-1, batch, *value.shape[2:]).unbind() for value in weights
    ]
    return [Weights(*step) for step in zip(*each_step)]


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")


def _split(buffer: torch.Tensor, sizes: Sequence[int], steps: int) -> list[torch.Tensor]:
    """For each size, `[steps, size]` of the buffer, one after the other."""
    return [part.view(steps, size) for part, size in zip(buffer.split([steps * size for size in sizes]), sizes)]
