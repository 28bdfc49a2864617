"""Fixtures of the benchmarks: the device, the measured floors, the synchronised timing, and the table of ratios."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import shapes
import torch
from floors import Floors, synchronise
from pytest_benchmark.utils import get_commit_info

from lesa_kernels.env_report import env_report
from lesa_kernels.tune import device_seconds, graph_seconds

RATIOS = pytest.StashKey[list]()  # of (test name, extra_info)
LAUNCHES = pytest.StashKey[list]()  # the same
WARM_UP_CALLS = 3
MAX_SECONDS = 0.5  # of rounds for each benchmark, unless --benchmark-max-time says another number
HOST_TIMES = pytest.StashKey[list]()  # the same
CALLS, ROUNDS = 50, 200  # of a call that is not waited for; the queue of a GPU has room for a thousand kernels


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), help="where to run; default: cuda where there is a GPU")


def pytest_configure(config):
    if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "iqr"]  # all of them need a terminal of 250 columns
    if not any(argument.startswith("--benchmark-max-time") for argument in config.invocation_params.args):
        config.option.benchmark_max_time = MAX_SECONDS
    config.stash[RATIOS] = []
    config.stash[LAUNCHES] = []
    config.stash[HOST_TIMES] = []


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
    """`timed(function)`: benchmarks `function` after a warm-up, each call synchronised with the device.

    On a GPU its time there is measured as well, for `benchmark.extra_info`: alone between events, with cold caches, and
    as one of many calls in a CUDA graph.
    """

    def run(function: Callable, group: str, rounds: int | None = None):
        def synchronised():
            function()
            synchronise(device)

        benchmark.group = group
        for _ in range(WARM_UP_CALLS):
            synchronised()
        if rounds is None:
            benchmark(synchronised)
        else:
            benchmark.pedantic(synchronised, rounds=rounds)
        if rounds is None and device.type == "cuda" and benchmark.stats is not None:
            seconds = device_seconds(function)
            p20, *_, p80 = statistics.quantiles(seconds, n=5)
            median = statistics.median(seconds)
            benchmark.extra_info.update(device_median_s=median, device_p20_s=p20, device_p80_s=p80)
            try:
                benchmark.extra_info["graph_median_s"] = statistics.median(graph_seconds(function))
            except RuntimeError as error:  # peers that wait for the device can't be captured
                benchmark.extra_info["no_graph"] = str(error).partition("\n")[0]

    return run


@pytest.fixture
def launched(benchmark, device, request):
    """`launched(function, group)`: benchmarks what a call of `function` takes the host, which does not wait for it.

    A round is as many calls as a GPU's queue has room for, and begins with an empty one, so that no call has to wait.
    The time of one call goes into `benchmark.extra_info`. On a CPU the call's work is in it. It has no floor.
    """

    def run(function: Callable, group: str):
        def calls():
            for _ in range(CALLS):
                function()

        benchmark.group = f"{group}, {CALLS} calls"
        calls()
        benchmark.pedantic(calls, setup=lambda: synchronise(device), rounds=ROUNDS)
        synchronise(device)
        if benchmark.stats is None:  # --benchmark-disable
            return
        p20, *_, p80 = (each / CALLS for each in statistics.quantiles(benchmark.stats.stats.sorted_data, n=5))
        median = statistics.median(benchmark.stats.stats.sorted_data) / CALLS
        benchmark.extra_info.update(call_median_s=median, call_p20_s=p20, call_p80_s=p80, calls=CALLS)
        request.config.stash[LAUNCHES].append((request.node.name, benchmark.extra_info))

    return run


@pytest.fixture
def host_time(request):
    """`host_time(benchmark, step, prepare, part)`: benchmarks what a call of `step` takes the host, without `part`.

    `prepare` is called before each. `part`, or None, is something that `step` does, and that is not to count; its
    median goes off. The result goes into `benchmark.extra_info`. It has no floor.
    """

    def run(benchmark, step: Callable, prepare: Callable, part: Callable | None):
        def seconds(function):
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin

        benchmark.group = "host time of a predicted step"
        for _ in range(CALLS):
            prepare()
            step()
        benchmark.pedantic(step, setup=prepare, rounds=2 * ROUNDS)
        if benchmark.stats is None:  # --benchmark-disable
            return
        of_part = 0.0 if part is None else statistics.median([seconds(part) for _ in range(2 * ROUNDS)])
        p20, *_, p80 = (each - of_part for each in statistics.quantiles(benchmark.stats.stats.sorted_data, n=5))
        median = statistics.median(benchmark.stats.stats.sorted_data) - of_part
        benchmark.extra_info.update(host_median_s=median, host_p20_s=p20, host_p80_s=p80, part_s=of_part)
        request.config.stash[HOST_TIMES].append((request.node.name, benchmark.extra_info))

    return run


@pytest.fixture(scope="session")
def floors(device) -> Floors:
    """The measured floors of this machine."""
    return Floors(device)


@pytest.fixture
def against_floor(floors, request):
    """`against_floor(benchmark, bytes=, flops=, dtype=)`: compares a finished benchmark with its floor.

    The floor is the longer of two times: the bytes that must move over the copy bandwidth, and the FLOPs that must be
    done over the rate of a matrix product in `dtype`. It goes with the ratio into `benchmark.extra_info`. The ratio is
    that of the time on the device, where `timed` has measured it.
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
        taken = benchmark.extra_info.get("device_median_s", median)
        benchmark.extra_info.update(figures, bytes=bytes, flops=flops, ratio_to_floor=taken / floor)
        request.config.stash[RATIOS].append((request.node.name, benchmark.extra_info))

    return compare


def pytest_terminal_summary(terminalreporter, config):
    _summarise_floors(terminalreporter, config.stash[RATIOS])
    _summarise_launches(terminalreporter, config.stash[LAUNCHES])
    _summarise_host_times(terminalreporter, config.stash[HOST_TIMES])


def _summarise_floors(terminalreporter, rows):
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    terminalreporter.section("time over floor")
    head = f"{'benchmark':<{width}}  {'median':>11}  {'floor':>11}  {'of':<6}  {'ratio':>7}"
    graphs = any("graph_median_s" in info for _, info in rows)
    terminalreporter.write_line(head + (f"  {'in a graph':>11}" if graphs else ""))
    for name, info in rows:
        taken = info.get("device_median_s", info["median_s"])
        times = f"{taken * 1e6:>8.1f} us  {info['floor_s'] * 1e6:>8.1f} us"
        line = f"{name:<{width}}  {times}  {info['floor']:<6}  {info['ratio_to_floor']:>7.2f}"
        terminalreporter.write_line(line + _in_a_graph(info))
        if "over_computed_step" in info:
            terminalreporter.write_line(f"{'':<{width}}  = {info['over_computed_step']:.4f} of a computed step")


def _in_a_graph(info: dict) -> str:
    return f"  {info['graph_median_s'] * 1e6:>8.1f} us" if "graph_median_s" in info else ""


def _summarise_launches(terminalreporter, rows):
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    terminalreporter.section("time of the host for a call that is not waited for")
    for name, info in rows:
        terminalreporter.write_line(f"{name:<{width}}  {info['call_median_s'] * 1e6:>8.2f} us")


def _summarise_host_times(terminalreporter, rows):
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    terminalreporter.section("time of the host, without the model's own head modules")
    for name, info in rows:
        low, median, high = (info[f"host_{key}_s"] * 1e6 for key in ("p20", "median", "p80"))
        spread = f"20th to 80th percentile {low:.0f} to {high:.0f}"
        terminalreporter.write_line(f"{name:<{width}}  {median:>8.1f} us  ({spread})")
