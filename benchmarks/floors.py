"""How fast this machine can copy and multiply: the rates that benchmarks are compared with."""

import time
from collections.abc import Callable
from functools import cache

import torch

from lesa_kernels.tune import device_seconds


class Floors:
    """The best rates of this machine, measured at first use. No benchmark is expected to beat them.

    The copy bandwidth is that of the memory. A working set that fits into the caches can be faster.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copy_bandwidth = cache(self._copy_bandwidth)
        self.matmul_rate = cache(self._matmul_rate)

    def _copy_bandwidth(self) -> float:
        """Bytes read and written per second by `Tensor.copy_` on buffers beyond the caches."""
        nbytes = 1 << 30 if self.device.type == "cuda" else 1 << 27
        source = torch.ones(nbytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best_seconds(lambda: target.copy_(source))

    def _matmul_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of a large square `torch.mm` in `dtype`."""
        side = 8192 if self.device.type == "cuda" else 1024
        a = torch.randn(side, side, device=self.device).to(dtype)
        out = torch.empty_like(a)
        return 2 * side**3 / self._best_seconds(lambda: torch.mm(a, a, out=out))

    def _best_seconds(self, function: Callable, rounds: int = 10) -> float:
        if self.device.type == "cuda":  # as the operations are timed
            function()
            return min(device_seconds(function, rounds))
        best = float("inf")
        for _ in range(rounds + 1):
            start = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - start)
        return best


def synchronise(device: torch.device) -> None:
    """Waits until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
