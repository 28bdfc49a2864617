"""`python -m lesa_kernels.tune --out FILE`: finds launch configurations for the current GPU.

Each operation runs at the benchmarks' sizes. The search starts from the present configuration and tries one setting
after the other. The best value of a setting is kept for the settings that follow. A configuration whose result differs
from that of the first one by more than rounding is discarded.
The file is written after each operation, so the search can be stopped at any time. Started again, it does the rest.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lesa_kernels import FusedKANPredictor, PredictorConfig, newton_coefficients
from lesa_kernels.bspline_kan import bspline_kan

FEATURES = (1, 4096, 3072)  # FLUX at 1024 x 1024: batch, tokens, width
TARGET = 0.45

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
STORED = (*FLOATS, torch.float8_e4m3fn)
PRODUCT = {"BLOCK_K": (32, 64, 128), "GROUP": (4, 8, 16), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
SWEEP = {"BLOCK_T": (16, 32, 64), "PROGRAMS": (1, 2, 4, 8), "num_warps": (4, 8), "NUM_STAGES": (1, 2, 3)}
LAYER = {"BLOCK_N": (32, 64, 128), "BLOCK_O": (32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)}


@dataclass(frozen=True)
class Operation:
    """What is tuned.

    Args:
        prepare: takes a dtype and a device, returns the call to time; the call returns tensors.
        choices: the values to try of each setting; settings that the configuration does not have are skipped.
        dtypes: a configuration is found for each.
    """

    prepare: Callable[[torch.dtype, torch.device], Callable[[], tuple[torch.Tensor, ...]]]
    choices: dict[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...] = FLOATS


def forecast(mixer: str, rank: int = 0, backward: str = "", as_stored: bool = False):
    """Prepares a forecast, or the gradient of a forecast.

    `backward` is empty, or says what the gradient is taken with respect to: "storage" or "weight". With `as_stored`,
    the parameters have the dtype of the features, unless that is float8, so that nothing is cast in the kernel.
    """

    def prepare(dtype, device):
        batch, tokens, width = FEATURES
        predictor = FusedKANPredictor(PredictorConfig(width, mixer, rank=rank), backend="triton").to(device)
        for parameter in predictor.parameters():
            parameter.data.normal_(std=0.1 / math.sqrt(parameter.shape[-1]))
        if as_stored and dtype.itemsize > 1:
            predictor.to(dtype)
        predictor.requires_grad_(backward == "weight")
        ring = predictor.make_ring(batch, tokens, dtype, device)
        for i in range(ring.capacity):
            ring.push(torch.randn(batch, tokens, width, device=device), 0.95 - 0.05 * i)
        ring.storage.requires_grad_(backward == "storage")
        sigma = torch.full((batch,), TARGET, device=device)
        if not backward:
            return lambda: (predictor(ring, sigma),)
        wanted = [ring.storage] if backward == "storage" else list(predictor.parameters())
        output = predictor(ring, sigma)
        grad = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)

    return prepare


def coefficients(dtype: torch.dtype, device: torch.device):
    """Prepares the weights of the 40 predicted steps of a run."""
    steps, (batch, _, width) = 40, FEATURES
    predictor = FusedKANPredictor(PredictorConfig(width, rank=32), backend="triton").to(device).requires_grad_(False)
    sigma = torch.linspace(0.9, 0.05, steps, device=device)[:, None].expand(steps, batch).contiguous()
    levels = sigma[..., None] + torch.linspace(0.02, 0.1, predictor.config.max_history, device=device)
    count = torch.full(sigma.shape, predictor.config.max_history, dtype=torch.int32, device=device)
    arguments = (levels, count, sigma, *predictor.experts(), *predictor.shape(), "triton")
    return lambda: tuple(weight for weight in newton_coefficients(*arguments) if weight is not None)


def layer(rows: int, features: tuple[int, int], grid_size: int, backward: str = ""):
    """Prepares a KAN layer of cubic splines, or its gradient with respect to "x" or "weight"."""

    def prepare(dtype, device):
        n_in, n_out = features

        def randn(*shape):
            return torch.randn(shape, device=device, dtype=dtype)

        x = randn(rows, n_in).requires_grad_(backward == "x")
        weights = [randn(n_out, n_in), randn(n_out, n_in, grid_size + 3)]
        for weight in weights:
            weight.requires_grad_(backward == "weight")
        if not backward:
            return lambda: (bspline_kan(x, *weights, None, grid_size, 3, backend="triton"),)
        y = bspline_kan(x, *weights, None, grid_size, 3, backend="triton")
        grad, wanted = torch.randn_like(y), [x] if backward == "x" else weights
        return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)

    return prepare


WIDE, NARROW = (65536, (256, 256), 8), (65536, (8, 8), 100)
_NEWTON = {"BLOCK_D": (32, 64, 128, 256, 512), **SWEEP}
_DENSE = {"BLOCK_R": (64, 128, 256), "BLOCK_C": (64, 128, 256), **PRODUCT}
_LAYER = {"BLOCK_I": (16, 32, 64), **LAYER}
OPERATIONS = {
    "newton_predict": Operation(forecast("newton"), _NEWTON, STORED),
    "newton_predict_bwd": Operation(forecast("newton", 32, backward="weight"), _NEWTON),
    "newton_coefficients": Operation(
        coefficients, {"BLOCK_D": (16, 32, 64, 128), "BLOCK_M": (32, 64), "num_warps": (2, 4, 8)}, (torch.float32,)
    ),
    "dense_predict": Operation(forecast("dense", as_stored=True), _DENSE),
    "dense_predict_cast": Operation(forecast("dense"), _DENSE, (torch.bfloat16, torch.float16, torch.float8_e4m3fn)),
    "dense_predict_bwd_alpha": Operation(forecast("dense", backward="weight", as_stored=True), _DENSE),
    "dense_predict_bwd_mix_weight": Operation(forecast("dense", backward="weight", as_stored=True), _DENSE),
    "dense_predict_bwd_storage": Operation(forecast("dense", backward="storage", as_stored=True), _DENSE),
    "bspline_kan_fwd": Operation(layer(*WIDE), _LAYER),
    "bspline_kan_fwd_unrolled": Operation(layer(*WIDE), _LAYER),
    "bspline_kan_fwd_gather": Operation(layer(*NARROW), LAYER),
    "bspline_kan_bwd_x": Operation(layer(*WIDE, backward="x"), _LAYER),
    "bspline_kan_bwd_x_wide": Operation(layer(8192, (1024, 1024), 8, backward="x"), _LAYER),
    "bspline_kan_bwd_x_gather": Operation(layer(*NARROW, backward="x"), LAYER),
    "bspline_kan_bwd_weight": Operation(layer(*WIDE, backward="weight"), {"BLOCK_M": (2, 4, 8), **_LAYER}),
}


def device_seconds(function: Callable, repeats: int = 50, dirty: bool = False) -> list[float]:
    """How long calls of `function` take on the current GPU, each alone and with cold caches.

    Before each call the GPU is made to wait for twice the time that the host needs for a call, and for a millisecond at
    least. So the whole call is enqueued before the measurement begins, and the host's work is not measured, unless the
    call itself waits for the device. Each time includes what the GPU needs to begin and to end a call that stands
    alone, some microseconds; `graph_seconds` leaves it out.

    Args:
        function: what is timed.
        repeats: how many calls.
        dirty: whether the L2 cache is full of values that the GPU has yet to write to memory, as after a kernel with a
            large output. By default it is full of values that were only read: nothing is written back meanwhile.
    """
    function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    host = time.perf_counter() - began
    beyond_caches = torch.zeros(32 << 20, dtype=torch.int64, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        if dirty:
            beyond_caches.zero_()
        else:
            beyond_caches.sum()
        torch.cuda._sleep(int(2e9 * max(1e-3, 2 * host)))  # cycles, of about half a nanosecond
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def graph_seconds(function: Callable, calls: int = 20, repeats: int = 10) -> list[float]:
    """How long one of many calls of `function` takes on the current GPU that follow each other in a CUDA graph.

    The caches are as the call before leaves them. So data that fits into them is read from there.

    Args:
        function: what is timed; it must not wait for the device.
        calls: how many calls the graph has.
        repeats: how often the graph is replayed; each replay gives one time.

    Raises:
        RuntimeError: the call can't be captured in a graph.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what the first call on a stream does must not be in the graph
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(calls):
            function()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        torch.cuda._sleep(int(2e6))  # a millisecond, in which the host enqueues the replay
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 / calls for start, end in events]


def best_config(start: dict[str, int], choices: dict[str, tuple[int, ...]], measure: Callable) -> dict[str, int]:
    """The fastest configuration, found one setting after the other. A gain of less than 1 % does not count.

    Args:
        start: the configuration to begin with; it has every setting.
        choices: the values to try of each setting.
        measure: takes a configuration and returns the seconds of a call; infinite if it can't or must not be used.
    """
    best, seconds = dict(start), measure(start)
    for name in choices:
        for value in choices[name] if name in start else ():
            candidate = {**best, name: value}
            if candidate != best and (taken := measure(candidate)) < 0.99 * seconds:
                best, seconds = candidate, taken
    return best


class Timer:
    """Times an operation on the GPU: `timer(config)` is its seconds in a configuration, infinite if it is wrong."""

    def __init__(self, operation: str, dtype: torch.dtype, device: torch.device, folder: str):
        self.operation, self.dtype, self.folder = operation, dtype, Path(folder)
        self.call = OPERATIONS[operation].prepare(dtype, device)
        self.expected = [t.double() for t in self.call()]
        self.numbers = itertools.count()

    def __call__(self, config: dict[str, int]) -> float:
        from triton.errors import TritonError

        # Each configuration gets a file of its own, since a file is read only once.
        file = self.folder / f"{self.operation}-{self.dtype}-{next(self.numbers)}.json"
        file.write_text(json.dumps({self.operation: {str(self.dtype).removeprefix("torch."): config}}))
        before = os.environ.get("LESA_TUNED")
        os.environ["LESA_TUNED"] = str(file)
        try:
            if not self._is_right(self.call()):
                return math.inf
            return statistics.median(device_seconds(self.call))
        except TritonError:  # too much shared memory
            return math.inf
        except RuntimeError as error:  # a size that does not compile
            torch.cuda.synchronize()  # raises if the device is broken: then nothing more can be measured
            tqdm.write(f"{self.operation} {config}: {error}")
            return math.inf
        finally:
            os.environ.pop("LESA_TUNED")
            if before is not None:
                os.environ["LESA_TUNED"] = before

    def _is_right(self, results: tuple[torch.Tensor, ...]) -> bool:
        for result, expected in zip(results, self.expected):
            # Sums of tens of thousands of numbers differ by more than the last bit if their order differs.
            allowed = 16 * torch.finfo(result.dtype).eps * expected.norm()
            if not (result.double() - expected).norm() <= allowed:  # NaN is wrong too
                return False
        return True


def tune(out: Path, device: torch.device, timer: Callable = Timer) -> None:
    """Tunes every operation and dtype that `out` does not have yet, and writes `out` after each of them."""
    from lesa_kernels.launch import launch_config

    found = json.loads(out.read_text()) if out.exists() else {}
    todo = [(name, dtype) for name, operation in OPERATIONS.items() for dtype in operation.dtypes]
    with tempfile.TemporaryDirectory() as folder, tqdm(todo, unit="configuration") as bar:
        for name, dtype in bar:
            key = str(dtype).removeprefix("torch.")
            bar.set_description(f"{name} {key}")
            if key in found.get(name, {}):
                continue
            start = launch_config(name, dtype, device)
            best = best_config(start, OPERATIONS[name].choices, timer(name, dtype, device, folder))
            found.setdefault(name, {})[key] = best
            unfinished = out.with_name(out.name + ".new")
            unfinished.write_text(json.dumps(found, indent=2) + "\n")
            unfinished.replace(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lesa_kernels.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or to continue")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed to time the kernels, but torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tune(options.out, device)

    from lesa_kernels.launch import TUNED_FOLDER, tuned_name

    print(f"wrote {options.out}; to use it, set LESA_TUNED to its path, or copy it to")
    print(TUNED_FOLDER / f"{tuned_name(device)}.json")


if __name__ == "__main__":
    main()
