"""Fixtures of the benchmarks: the device, the measured floors, the synchronised timing, and the table of ratios."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from lesa_kernels.env_report import env_report

sys.path.insert(0, str(Path(__file__).parent))  # the suites import shapes.py
import shapes  # noqa: E402

RATIOS = pytest.StashKey[list]()  # of (test name, extra_info)
WARM_UP_CALLS = 3


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), help="where to run; default: cuda where there is a GPU")


def pytest_configure(config):
    config.stash[RATIOS] = []


def _device(config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    tables = {"shape": shapes.FEATURES, "layer": shapes.LAYERS, "model": shapes.MODELS}
    for name in set(tables) & set(metafunc.fixturenames):
        metafunc.parametrize(name, tables[name][_device(metafunc.config)], ids=str)


def pytest_benchmark_generate_commit_info():
    # pytest-benchmark asks the working directory, which need not be in the checkout.
    started_in = Path.cwd()
    os.chdir(Path(__file__).parent)
    try:
        return get_commit_info()
    finally:
        os.chdir(started_in)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # the machine's name is nobody's business
    machine_info["environment"] = env_report()
    machine_info["device"] = _device(config)
    machine_info["threads"] = torch.get_num_threads()
    if _device(config) == "cuda":
        machine_info["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine_info["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where the benchmarks run."""
    return torch.device(_device(request.config))


@pytest.fixture
def timed(benchmark, device):
    """`timed(function)`: benchmarks `function` after a warm-up, each call synchronised with the device."""

    def run(function: Callable, group: str, rounds: int | None = None):
        def synchronised():
            function()
            _synchronise(device)

        benchmark.group = group
        for _ in range(WARM_UP_CALLS):
            synchronised()
        if rounds is None:
            benchmark(synchronised)
        else:
            benchmark.pedantic(synchronised, rounds=rounds)

    return run


class Floors:
    """What this machine can do at best, measured when first asked for: rates no benchmark is expected to beat.

    A working set that fits into the caches can beat the copy bandwidth, which is that of the memory.
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
        best = float("inf")
        for _ in range(rounds + 1):
            start = time.perf_counter()
            function()
            _synchronise(self.device)
            best = min(best, time.perf_counter() - start)
        return best


@pytest.fixture(scope="session")
def floors(device) -> Floors:
    """The measured floors of this machine."""
    return Floors(device)


@pytest.fixture
def against_floor(floors, request):
    """`against_floor(benchmark, bytes=, flops=, dtype=)`: compares a finished benchmark with its floor.

    The floor is the longer of two times: the bytes that must move over the copy bandwidth, and the FLOPs that must be
    done over the rate of a matrix product in `dtype`. It goes with the ratio into `benchmark.extra_info`.
    """

    def compare(benchmark, bytes: int = 0, flops: int = 0, dtype: torch.dtype = torch.float32) -> None:
        if benchmark.stats is None:  # --benchmark-disable
            return
        floor, bound = bytes / floors.copy_bandwidth(), "copy"
        if flops and (product := flops / floors.matmul_rate(dtype)) > floor:
            floor, bound = product, "matmul"
        times = benchmark.stats.stats.sorted_data
        median = statistics.median(times)
        p20, *_, p80 = statistics.quantiles(times, n=5)
        figures = {"median_s": median, "p20_s": p20, "p80_s": p80, "floor_s": floor, "floor": bound}
        benchmark.extra_info.update(figures, bytes=bytes, flops=flops, ratio_to_floor=median / floor)
        request.config.stash[RATIOS].append((request.node.name, benchmark.extra_info))

    return compare


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[RATIOS]
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    terminalreporter.section("time over floor")
    terminalreporter.write_line(f"{'benchmark':<{width}}  {'median':>11}  {'floor':>11}  {'of':<6}  {'ratio':>7}")
    for name, info in rows:
        times = f"{info['median_s'] * 1e6:>8.1f} us  {info['floor_s'] * 1e6:>8.1f} us"
        line = f"{name:<{width}}  {times}  {info['floor']:<6}  {info['ratio_to_floor']:>7.2f}"
        if "over_computed_step" in info:
            line += f"  = {info['over_computed_step']:.4f} of a computed step"
        terminalreporter.write_line(line)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
