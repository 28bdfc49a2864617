"""The parts of a day on a GPU that measure something: `python benchmarks/gpu_parts.py PART --results FILE`.

`gpu_day.py` starts them. Each case of a part appends a line of JSON to the file at once: its error against float64
beside that of plain torch, its times, and their ratio to the floor, whose rates this process has measured. A case that
fails is a line too, and the next one follows: in a new process, if the case has hung or has broken the device for this
one. The exit status is 1 if any of them failed or had a wrong result.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from floors import Floors, synchronise
from gpu_cases import SCALES, SHAPES, Case, Named, cases_of, random_features
from lines import append

from lesa_kernels.env_report import env_report
from lesa_kernels.extension import extension, extension_error
from lesa_kernels.tune import device_seconds, graph_seconds

REPEATS = {"cuda": 200, "cpu": 3}
COMPILED = ("flux", "tiles", "hunyuan", "dense", "kan")
COMPILERS = {"cuda": 12, "cpu": 2}
CASE_SECONDS = {"cuda": 20, "cpu": 200}  # after which a case counts as hung


def tensors(result) -> list[torch.Tensor]:
    """The tensors of a result: one, or some of a tuple."""
    return [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]


def relative_error(actual, expected) -> float:
    """The largest over the tensors of a result, by norm; infinite if a value is not finite or a shape differs."""
    largest = 0.0
    for value, wanted in zip(tensors(actual), tensors(expected), strict=True):
        if value.shape != wanted.shape or not torch.isfinite(value).all():
            return math.inf
        scale = wanted.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
        largest = max(largest, float((value.double() - wanted).norm() / scale))
    return largest


def poisoned(function: Callable):
    """The result of `function`, with NaN in all memory that it takes and does not write."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return function()
    finally:
        torch.use_deterministic_algorithms(before)


def host_seconds(function: Callable, device: torch.device, calls: int = 20) -> list[float]:
    """What calls take the host. On a CPU their work is in it."""
    synchronise(device)
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    synchronise(device)
    return times


def measure(case: Case, floors: Floors) -> dict:
    """What the line of a case says."""
    result, exact = poisoned(case.result or case.call), tensors(case.exact())
    line: dict = {"error": relative_error(result, tuple(exact))}
    if case.plain is not None:
        line["plain_error"] = relative_error(case.plain(), tuple(exact))
        # At most twice the error of plain torch; where that is none, rounding in float32.
        line["ok"] = line["error"] <= 2 * line["plain_error"] + 2 * torch.finfo(torch.float32).eps
    line = {name: None if value == math.inf else value for name, value in line.items()}  # which JSON does not have
    del result, exact
    floor = max(case.least["bytes"] / floors.copy_bandwidth(), case.least["flops"] / floors.matmul_rate(case.dtype))
    line |= {**case.least, "floor_us": 1e6 * floor}
    line["host_us"] = 1e6 * statistics.median(host_seconds(case.call, floors.device, 20 if on_gpu(floors) else 2))
    if not on_gpu(floors):
        return line | {"ratio": 1e-6 * line["host_us"] / floor}
    cold = device_seconds(case.call, 30)
    line["cold_p20_us"], line["cold_us"], line["cold_p80_us"] = (1e6 * each for each in percentiles(cold))
    line["cold_ratio"] = 1e-6 * line["cold_us"] / floor
    try:
        line["graph_us"] = 1e6 * statistics.median(graph_seconds(case.call))
        line["graph_ratio"] = 1e-6 * line["graph_us"] / floor
    except RuntimeError as error:
        line["no_graph"] = str(error).partition("\n")[0]
        if case.plain is not None:
            line["ok"] = False  # only a peer may wait for the device
    return line


def percentiles(values: list[float]) -> tuple[float, float, float]:
    low, *_, high = statistics.quantiles(values, n=5)
    return low, statistics.median(values), high


def on_gpu(floors: Floors) -> bool:
    return floors.device.type == "cuda"


class Lines:
    """The results of a part, on disk line by line.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.failed = options, options.after is not None

    def add(self, **fields) -> None:
        """Writes a line; one with `ok=False` or an `exception` fails the part."""
        self.failed |= fields.get("ok") is False or "exception" in fields
        line = {"kind": "result", "part": self.options.part, **fields}
        print(json.dumps(line), flush=True)
        if self.options.results is not None:
            try:
                append(self.options.results, line)
            except OSError as error:  # the line is in the log, and the next case follows
                self.failed = True
                print(f"could not be written: {error}", flush=True)

    def attempt(self, name: str, function: Callable[[], dict]) -> dict | None:
        """Adds what `function` returns, or the exception that it raises."""
        try:
            fields = function()
        except pytest.skip.Exception as skipped:  # a peer that can't be imported
            self.add(case=name, skipped=str(skipped))
            return None
        except Exception as error:
            traceback.print_exc()
            self.add(case=name, exception=f"{type(error).__name__}: {error}"[:500])
            return None
        self.add(case=name, **fields)
        return fields

    def attempt_each(self, cases: list[Named], function: Callable[[Case], dict]) -> dict[str, dict]:
        """What `function` returns for each of the cases that it does not fail for; all of it is added."""
        names, found = [case.name for case in cases], {}
        begin = 0 if self.options.after is None else names.index(self.options.after) + 1
        for case in cases[begin:]:
            watch = threading.Timer(CASE_SECONDS[self.options.device], self._give_up, [case.name])
            watch.daemon = True
            watch.start()
            fields = self.attempt(case.name, lambda c=case: function(c.make()))
            watch.cancel()
            if fields is not None:
                found[case.name] = fields
            elif is_broken(self.options.device):
                self._go_on_after(case.name)
        return found

    def _give_up(self, name: str) -> None:
        self.add(case=name, exception=f"no result after {CASE_SECONDS[self.options.device]} s")
        self._go_on_after(name)

    def _go_on_after(self, name: str) -> None:
        """Becomes a new process, which begins after the case of that name."""
        sys.stdout.flush()
        command = [sys.executable, __file__, self.options.part, "--device", self.options.device, "--after", name]
        for option in ("results", "share"):
            if (value := getattr(self.options, option)) is not None:
                command += [f"--{option}", str(value)]
        os.execv(sys.executable, command)


def is_broken(device: str) -> bool:
    """Whether this process can't use the device any more, as after an illegal access to memory."""
    try:
        synchronise(torch.device(device))
    except RuntimeError:
        return True
    return False


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    return dict(zip(fields, (value.strip() for value in said.splitlines()[0].split(",")), strict=True))


def part_machine(lines: Lines, floors: Floors) -> None:
    fields = ("name", "compute_cap", "driver_version", "memory.total", "power.limit", "temperature.gpu")
    clocks = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
    lines.attempt("nvidia-smi", lambda: smi(*fields, *clocks))
    lines.attempt("versions", env_report)
    if on_gpu(floors):
        properties = torch.cuda.get_device_properties(floors.device)
        lines.add(case="device", multiprocessors=properties.multi_processor_count, l2_bytes=properties.L2_cache_size)


def part_roofs(lines: Lines, floors: Floors) -> None:
    device, shape = floors.device, SHAPES[floors.device.type]["flux"]
    lines.add(case="extension", extension=extension_error() or extension().build_info())
    lines.add(case="copy", bytes_per_s=floors.copy_bandwidth())
    for dtype in (torch.bfloat16, torch.float32):
        rate = lines.attempt(f"product, {dtype}", lambda d=dtype: {"flops_per_s": floors.matmul_rate(d)})
        if rate is not None and on_gpu(floors):
            lines.attempt(f"clocks after {dtype}", lambda: smi("clocks.sm", "clocks.mem", "power.draw"))
    if not on_gpu(floors):
        return
    source = random_features(shape, device)
    target = torch.empty_like(source)
    for dirty in (False, True):
        seconds = statistics.median(device_seconds(lambda: target.copy_(source), dirty=dirty))
        name = f"copy of a feature, L2 {'dirty' if dirty else 'clean'}"
        lines.add(case=name, cold_us=1e6 * seconds, bytes_per_s=2 * source.nbytes / seconds)
    one = torch.zeros(1, device=device)
    times = device_seconds(one.zero_), graph_seconds(one.zero_)
    alone, in_graph = (1e6 * statistics.median(each) for each in times)
    lines.add(case="empty kernel", cold_us=alone, graph_us=in_graph)


def part_cases(lines: Lines, floors: Floors) -> None:
    lines.attempt_each(cases_of(lines.options.part, floors.device), lambda case: measure(case, floors))


def part_tiles(lines: Lines, floors: Floors) -> None:
    """The cases, and how much each further token costs beside its floor: 1 is ideal, a convoy gives several."""
    found = lines.attempt_each(cases_of("tiles", floors.device), lambda case: measure(case, floors))
    points: dict[str, list[tuple[float, float]]] = {}
    for name, line in found.items():
        taken = line.get("graph_us", line["host_us"])
        points.setdefault(name.rpartition(" x ")[0], []).append((taken, line["floor_us"]))
    for name, each in points.items():
        if len(each) == len(SCALES):
            (first, first_floor), (last, last_floor) = each[0], each[-1]
            lines.add(case=f"{name}, slope", slope_ratio=(last - first) / (last_floor - first_floor))


def part_repeat(lines: Lines, floors: Floors) -> None:
    """The same result each time: one after the other, on two streams at once, and from a graph."""
    cases = [each for part in ("flux", "dense", "kan") for each in cases_of(part, floors.device) if each.compiles]
    lines.attempt_each(cases, lambda case: repeated(case, floors.device))


def repeated(case: Case, device: torch.device) -> dict:
    expected = [each.clone() for each in tensors(case.call())]

    def differs(result) -> bool:
        return not all(torch.equal(*pair) for pair in zip(tensors(result), expected, strict=True))

    calls = REPEATS[device.type]
    line = {"calls": calls, "different": sum(differs(case.call()) for _ in range(calls))}
    if device.type == "cuda":
        line["different_on_two_streams"] = differ_on_streams(case, differs)
        line["different_in_a_graph"] = differ_in_graph(case, differs)
    return line | {"ok": not any(value for name, value in line.items() if name.startswith("different"))}


def differ_on_streams(case: Case, differs: Callable) -> int:
    """How many of 20 results differ when two streams call at the same time."""
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # until the calls of both are enqueued
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(case.call())
    torch.cuda.synchronize()
    return sum(map(differs, results))


def differ_in_graph(case: Case, differs: Callable) -> int:
    """How many of 20 replays differ, each of which begins with NaN in the result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.call()
    different = 0
    for _ in range(20):
        for each in tensors(result):
            each.fill_(float("nan"))
        graph.replay()
        different += differs(result)
    return different


def part_compile(lines: Lines, floors: Floors) -> None:
    """Calls every case once, in several processes, so that the parts that measure find the kernels compiled."""
    if lines.options.share is not None:
        lines.attempt_each(share_of(floors.device, lines.options.share), lambda case: called_once(case, floors.device))
        return
    count = COMPILERS[floors.device.type]
    command = [sys.executable, __file__, "compile", "--device", floors.device.type]
    if lines.options.results is not None:
        command += ["--results", str(lines.options.results)]
    workers = [subprocess.Popen([*command, "--share", f"{share}/{count}"]) for share in range(count)]
    statuses = [worker.wait() for worker in workers]
    lines.add(case="all processes", ok=not any(statuses), statuses=statuses)


def share_of(device: torch.device, share: str) -> list[Named]:
    """The cases that one of these processes calls; `share` is such as "3/12"."""
    own, count = map(int, share.split("/"))
    cases = [(part, case) for part in COMPILED for case in cases_of(part, device) if case.compiles]
    return [replace(case, name=f"{part}: {case.name}") for part, case in cases[own::count]]


def called_once(case: Case, device: torch.device) -> dict:
    begin = time.perf_counter()
    case.call()
    synchronise(device)
    return {"seconds": time.perf_counter() - begin}


PARTS = {
    "machine": part_machine,
    "compile": part_compile,
    "roofs": part_roofs,
    "flux": part_cases,
    "tiles": part_tiles,
    "repeat": part_repeat,
    "hunyuan": part_cases,
    "dense": part_cases,
    "kan": part_cases,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path, help="file to append the lines to; default: they are printed only")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, to try the script")
    parser.add_argument(
        "--share", help="which cases of `compile` this process takes, such as 3/12; default: it starts 12"
    )
    parser.add_argument("--after", metavar="CASE", help="begin after this case, at which the part has failed")
    options = parser.parse_args(argv)
    lines = Lines(options)
    PARTS[options.part](lines, Floors(torch.device(options.device)))
    return int(lines.failed)


if __name__ == "__main__":
    sys.exit(main())
