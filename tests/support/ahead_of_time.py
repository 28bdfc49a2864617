"""Compiles every kernel for GPUs that are not there, as the public calls would launch it, and reads what came out.

`PYTHONPATH=benchmarks python tests/support/ahead_of_time.py --out report.json` calls each case of `CASES` for each of
its architectures, in each of its dtypes and at each of its sizes, but not in all combinations (see `ELSEWHERE`). The
tensors are on the CPU and are never touched. Triton is told of a GPU, and each launch compiles and is recorded instead.
Unset `TRITON_INTERPRET`, which makes kernels that can't be compiled.

To add a kernel, add a `Case`. The tests in `test_ahead_of_time.py` then hold for it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from shapes import FLUX, HUNYUAN_VIDEO, QWEN_IMAGE, FeatureShape, LayerShape

from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig
from lesa_kernels.bspline_kan import bspline_kan
from lesa_kernels.stream import HeadSums, LowRank, StoredFeatures, Weights, stream_forecast, stream_velocity

# Multiprocessors of an A100, an RTX 3090, an RTX 4090, an H100 or H200, a B200, and an RTX 5090: grids depend on it.
ARCHITECTURES = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
SHARED_MEMORY_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
DATA_CENTRE = (80, 90, 100)
# Sizes, dtypes and architectures hardly interact: a dtype changes the loads of a kernel, an architecture its matrix
# products and its shared memory, and a size the grid. So not each is compiled with each of the others. For Hopper, all
# dtypes are compiled, and all sizes in bfloat16. Elsewhere it is bfloat16, float8 where a kernel decodes its bits, and
# float32 where shared memory is smallest; in these and in the other dtypes on Hopper, a case takes one size, in turn.
ELSEWHERE = {torch.bfloat16: tuple(ARCHITECTURES), torch.float8_e4m3fn: (80,), torch.float32: (86,)}
WORKERS = 2

# What is counted in a kernel's PTX.
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "cp_async": r"\bcp\.async\.c[ag]",
    "cp_async_16_bytes": r"\bcp\.async\.c[ag]\.[^;]*, (?:0x10|16)\b",
    "tma": r"\bcp\.async\.bulk",
    "load": r"\bld\.global",
    "load_16_bytes": r"\bld\.global\S*\.(?:v4\.[bfsu]32|v2\.[bfsu]64|v8\.[bfsu]32|v4\.[bfsu]64|b128)",
}


@dataclass(frozen=True)
class Case:
    """One public call.

    Args:
        name: of the call, for the tests' ids.
        call: takes a size, whose dtype is that of the stored features or of the layer, makes the arguments and calls.
        sizes: where it is called.
        dtypes: in which of the dtypes.
        launches: kernels that one call may launch; any number if None.
        products: "large" if its matrix products must run on what the architecture has for large ones (mma, wgmma,
            tcgen05), "small" if any tensor-core instruction will do, None if it has none.
        vectorised: whether it must read global memory 16 bytes at a time.
        may_spill: dtypes in which it is run too seldom for its registers to matter.
        float32_products: whether it must use tensor cores in float32 too.
        most_selects: for each architecture, how many comparisons and selections of integers (ISETP, SEL) the innermost
            loop of its matrix products may have in dtypes of 16 bits.
        kernels: how many different kernels all its launches may be; any number if None.
        architectures: for which it is compiled.
        kernel: how the name of its kernel begins; that of the call if it is None.
    """

    name: str
    call: Callable[[FeatureShape | LayerShape], object]
    sizes: tuple[FeatureShape | LayerShape, ...] = (FLUX, QWEN_IMAGE, HUNYUAN_VIDEO)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
    launches: int | None = 1
    products: str | None = None
    vectorised: bool = False
    may_spill: tuple[torch.dtype, ...] = ()
    float32_products: bool = False
    most_selects: tuple[tuple[int, int], ...] = ()
    kernels: int | None = None
    architectures: tuple[int, ...] = DATA_CENTRE
    kernel: str | None = None


def empty_ring(predictor: FusedKANPredictor, size: FeatureShape) -> FeatureRing:
    """A ring on the CPU whose memory is only reserved."""
    ring = predictor.make_ring(size.batch, size.tokens, size.dtype, "meta")
    for name, buffer in vars(ring).items():
        if isinstance(buffer, torch.Tensor):
            setattr(ring, name, torch.empty_like(buffer, device="cpu"))
    ring.device = torch.device("cpu")
    return ring


def empty_predictor(size: FeatureShape, mixer: str, cast: bool = False, **options) -> FusedKANPredictor:
    """A predictor on the CPU whose memory is only reserved: float32, or the features' dtype if it is cast to that."""
    with torch.device("meta"):
        predictor = FusedKANPredictor(PredictorConfig(size.dim, mixer, **options), backend="triton")
    if cast and size.dtype.itemsize > 1:
        predictor.to(size.dtype)
    return predictor.to_empty(device="cpu").requires_grad_(False)


def predict(mixer: str = "newton", **options) -> Callable[[FeatureShape], object]:
    """A call of a predictor."""

    def call(size):
        predictor = empty_predictor(size, mixer, **options)
        return predictor(empty_ring(predictor, size), 0.5)

    return call


def predict_backward(mixer: str = "newton", **options) -> Callable[[FeatureShape], object]:
    """A call of a predictor, and the gradients by its parameters and the features."""

    def call(size):
        predictor = empty_predictor(size, mixer, **options).requires_grad_()
        ring = empty_ring(predictor, size)
        ring.storage.requires_grad_()
        output = predictor(ring, 0.5)
        torch.autograd.grad(output, [ring.storage, *predictor.parameters()], torch.empty_like(output))

    return call


def velocity(rank: int, **options) -> Callable[[FeatureShape], object]:
    """A call of newton and the output head together."""

    def call(size):
        predictor = empty_predictor(size, "newton", rank=rank, **options)
        dtype = torch.bfloat16 if size.dtype.itemsize == 1 else size.dtype
        weight = torch.empty(64, size.dim, dtype=dtype)
        scale, shift = torch.empty(2, size.batch, size.dim, dtype=dtype)
        head = OutputHead(weight, torch.empty(64, dtype=dtype), scale, shift)
        return predictor.predict_velocity(empty_ring(predictor, size), 0.5, head)

    return call


def stream(
    rank: int = 0,
    outputs: int = 0,
    history: int = 4,
    scalars: bool = False,
    norm: str | None = "layer",
    per_token: torch.dtype | None = None,
) -> Callable[[FeatureShape], object]:
    """A call of the weighted sum of features, with a head if there are outputs, as in a run: all sums are made.

    With `scalars`, there is one weight for each feature instead of one for each channel, and one constant. The head has
    that `norm`, and a modulation for each token if `per_token` gives its dtype.
    """

    def call(size):
        dtype, stages = torch.bfloat16 if size.dtype.itemsize == 1 else size.dtype, 3
        shape, number = (history, size.batch, size.tokens), torch.empty(size.batch, dtype=torch.int32)
        scales = torch.empty(shape) if size.dtype.itemsize == 1 else None
        features = StoredFeatures(torch.empty(*shape, size.dim, dtype=size.dtype), scales, number, number)
        anchors, added = torch.empty(size.batch, history, size.dim), torch.empty(size.batch, size.dim)
        weights, low_rank = Weights(anchors, number, None, None, None), LowRank()
        if scalars:
            weights = Weights(torch.empty(size.batch, history), number, torch.empty(size.batch), None, None)
        through = None
        if rank:
            weights = Weights(anchors, number, added, torch.empty(size.batch, history - 1, history), number)
            maps = (
                torch.empty(stages, rank, history - 1, size.dim, dtype=dtype),
                torch.empty(stages, size.dim, rank, dtype=dtype),
            )
            low_rank = LowRank(*maps, torch.empty(stages, rank, rank), torch.empty(stages, rank))
            through = torch.empty(size.batch, rank, outputs)
        if not outputs:
            return stream_forecast(features, weights, low_rank, backend="triton")
        of_tokens = (size.tokens,) if per_token else ()
        scale, shift = torch.empty(2, size.batch, *of_tokens, size.dim, dtype=per_token or dtype)
        weight, bias = torch.empty(outputs, size.dim, dtype=dtype), torch.empty(outputs, dtype=dtype)
        head = OutputHead(weight, bias, scale, shift, norm=norm)
        if per_token:
            return stream_velocity(features, weights, head, low_rank, backend="triton")
        rows = torch.empty(size.batch, outputs + rank, size.dim, dtype=dtype)
        sums = HeadSums(torch.empty(size.batch, outputs), torch.empty(size.batch, outputs), through, rows)
        return stream_velocity(features, weights, head, low_rank, sums, backend="triton")

    return call


def plan(**options) -> Callable[[FeatureShape], object]:
    """The weights of three steps of a run."""

    def call(size):
        predictor = empty_predictor(size, "newton", **options)
        return predictor.plan([[0.9], [0.9, 0.8], [0.7, 0.8, 0.9]], [0.85, 0.75, 0.65], size.batch)

    return call


def ten_predictors(
    call: Callable[..., Callable[[FeatureShape], object]], **options
) -> Callable[[FeatureShape], object]:
    """What `call` makes for a predictor, for ten that differ in what they were trained to: stages, bounds, lengths."""
    lengths = [(4, 4, 4), (2, 4, 3), (1, 2, 4), (4, 1), (4, 3, 2, 1), (2, 4), (4,)]
    bounds = [(0.67, 0.33), (0.9, 0.5), (0.5, 0.0625), (0.25,), (0.75, 0.5, 0.25), (0.3,), ()]
    numbers = [*zip(bounds, lengths), ((0.6, 0.3), (4, 3, 4)), ((0.8, 0.16), (3, 4, 4)), ((0.64, 0.32), (4, 4, 1))]

    def calls(size):
        return [call(stage_bounds=b, history_length=k, **options)(size) for b, k in numbers]

    return calls


def layer(grid_size: int, spline_order: int, backward: bool = False) -> Callable[[LayerShape], object]:
    """A call of the KAN layer, and of its gradients if need be."""

    def call(size):
        x = torch.empty(size.rows, size.in_features, dtype=size.dtype, requires_grad=backward)
        shape = (size.out_features, size.in_features)
        base_weight = torch.empty(shape, dtype=size.dtype, requires_grad=backward)
        spline_weight = torch.empty(*shape, grid_size + spline_order, dtype=size.dtype, requires_grad=backward)
        y = bspline_kan(x, base_weight, spline_weight, None, grid_size, spline_order, backend="triton")
        if backward:
            torch.autograd.grad(y, [x, base_weight, spline_weight], torch.empty_like(y))

    return call


TRAINING = FeatureShape("training", 1, 256, 3072, torch.bfloat16)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDE = LayerShape("kan-256", 65536, 256, 256, torch.bfloat16)
WIDER = LayerShape("kan-1024", 8192, 1024, 1024, torch.bfloat16)
NARROW = LayerShape("kan-8", 65536, 8, 8, torch.bfloat16)


def ten(name: str, call: Callable, kernels: int, dtype: torch.dtype = torch.bfloat16, **options) -> Case:
    """A case of ten predictors of one size, which must share their compiled kernels."""
    calls = ten_predictors(call, **options)
    return Case(name, calls, (TRAINING,), (dtype,), None, may_spill=(dtype,), kernels=kernels, architectures=(90,))


def gradient(name: str, call: Callable, *sizes: FeatureShape | LayerShape, products: str | None = None) -> Case:
    """A case with a backward: any number of kernels, and float32, which is slow to train in anyway, may spill."""
    return Case(name, call, sizes, FLOATS, None, products, may_spill=(torch.float32,))


def stream_cases() -> list[Case]:
    """Bfloat16 on all architectures, other dtypes on one or two; the largest ranks and heads on the smallest GPUs."""
    every, smallest, bf16 = tuple(ARCHITECTURES), (86, 89, 120), (torch.bfloat16,)
    float32, others = (torch.float32,), (torch.float16, torch.float32, torch.float8_e4m3fn)
    sums, large = {"kernel": "stream_sums", "vectorised": True, "products": "small"}, (FLUX,)
    return [
        Case("stream_forecast", stream(), (FLUX, HUNYUAN_VIDEO), bf16, vectorised=True, architectures=every),
        Case("stream_forecast-others", stream(), large, others, vectorised=True, architectures=(80, 90)),
        Case("stream_forecast-16-anchors", stream(history=16), large, bf16, vectorised=True, architectures=(90,)),
        Case("stream_forecast-scalars", stream(0, 0, 10, True), large, bf16, vectorised=True, architectures=(90,)),
        Case("stream_forecast-rank32", stream(32), large, bf16, architectures=(90, 120), **sums),
        *(
            Case(f"stream_forecast-rank{rank}", stream(rank), large, bf16, may_spill=bf16, architectures=each, **sums)
            for rank, each in ((64, (86, 100)), (128, (89, 90)), (256, (80, 120)))
        ),
        Case(
            "stream_forecast-rank32-float32",
            stream(32),
            large,
            float32,
            may_spill=float32,
            architectures=(86, 90),
            **sums,
        ),
        Case("stream_velocity-rank0", stream(0, 64), large, bf16, architectures=(80, 89, 90, 100, 120), **sums),
        Case("stream_velocity-rank0-others", stream(0, 64), large, others, architectures=(90,), **sums),
        Case("stream_velocity-scalars", stream(0, 64, 10, True), large, bf16, architectures=(80, 90), **sums),
        Case("stream_velocity-rank32", stream(32, 64), large, bf16, architectures=(90,), **sums),
        Case(
            "stream_velocity-rank32-mma", stream(32, 64), large, bf16, may_spill=bf16, architectures=(80, 120), **sums
        ),
        Case("stream_velocity-rms", stream(0, 64, norm="rms"), large, bf16, architectures=(90,), **sums),
        Case("stream_velocity-no-norm", stream(0, 64, norm=None), large, bf16, architectures=(90,), **sums),
        Case("stream_velocity-tokens", stream(0, 64, per_token=bf16[0]), large, bf16, **sums),
        *(
            Case(
                f"stream_velocity-tokens-{name}",
                stream(0, outputs, 4, False, norm, torch.float32),
                large,
                dtypes,
                may_spill=(torch.float16, torch.float32),
                architectures=(90,),
                **sums | {"vectorised": torch.float16 not in dtypes},
            )
            for name, outputs, norm, dtypes in (
                ("192-outputs", 192, "layer", bf16),
                ("rms", 64, "rms", bf16),
                ("no-norm", 64, None, bf16),
                ("others", 64, "layer", (torch.float32, torch.float8_e4m3fn)),
                ("float16", 64, "layer", (torch.float16,)),
            )
        ),
        *(
            # Each rank on each kind of architecture, with another number of outputs. Such sizes may spill. GPUs with
            # the smallest shared memory get the same block sizes and take turns; the largest rank is on all of them.
            Case(
                f"stream_velocity-rank{rank}-{outputs}-outputs",
                stream(rank, outputs),
                large,
                bf16,
                may_spill=bf16,
                architectures=kind,
                **sums,
            )
            for r, rank in enumerate((0, 32, 64, 128, 256))
            for k, kind in enumerate((smallest if rank == 256 else smallest[r % 3 :][:1], (80,), (90,), (100,)))
            for outputs in ((16, 64, 128, 256, 512)[(k + r) % 5],)
        ),
    ]


CASES = [
    Case("newton_predict-rank0", predict("newton", rank=0), vectorised=True),
    Case(
        "newton_predict-rank32",
        predict("newton", rank=32),
        launches=2,
        products="small",
        vectorised=True,
        may_spill=(torch.float32,),
    ),
    Case("newton_coefficients", plan(rank=32), dtypes=(torch.bfloat16,), vectorised=True),
    # The next two launch the kernel of the stream operation.
    Case(
        "newton_velocity-rank0",
        velocity(0),
        dtypes=(torch.bfloat16, torch.float8_e4m3fn),  # `stream_velocity-rank0` has the others
        launches=2,
        products="small",
        vectorised=True,
        may_spill=(torch.float8_e4m3fn,),
    ),
    Case(
        "newton_velocity-rank32",
        velocity(32),
        launches=2,
        products="small",
        vectorised=True,
        may_spill=(*FLOATS, torch.float8_e4m3fn),
    ),
    *stream_cases(),
    Case(
        "dense_predict",
        predict("dense", cast=True),
        products="large",
        vectorised=True,
        may_spill=(torch.float8_e4m3fn,),
    ),
    Case("dense_predict-cast", predict("dense"), dtypes=(torch.bfloat16,), products="large", vectorised=True),
    gradient("newton_predict-rank0-backward", predict_backward("newton", rank=0), TRAINING),
    gradient("newton_predict-rank32-backward", predict_backward("newton", rank=32), TRAINING, products="small"),
    gradient("dense_predict-backward", predict_backward("dense", cast=True), TRAINING, products="large"),
    ten("newton_predict-ten-rank0", predict, 1, rank=0),
    ten("newton_predict-ten-backward", predict_backward, 4, rank=32),
    ten("newton_velocity-ten", velocity, 2, rank=32),
    ten("newton_coefficients-ten", plan, 1, rank=32),
    ten("dense_predict-ten", predict, 1, mixer="dense", cast=True),
    # With a comparison and a selection for each basis of each input, they were 115 in a quarter of such a loop.
    Case(
        "bspline_kan",
        layer(8, 3),
        (WIDE,),
        FLOATS,
        products="large",
        float32_products=True,
        most_selects=((80, 55), (90, 90), (100, 55)),
    ),
    gradient("bspline_kan-backward", layer(8, 3, backward=True), WIDE, WIDER, products="large"),
    gradient("bspline_kan-narrow", layer(100, 3, backward=True), NARROW),
]


def sizes_of(architecture: int, case: str, dtype: torch.dtype) -> tuple[FeatureShape | LayerShape, ...]:
    """The sizes of a unit: all of the case's for Hopper in its first dtype, one of them elsewhere."""
    (found,) = [each for each in CASES if each.name == case]
    turn = found.architectures.index(architecture) + found.dtypes.index(dtype)
    if len(units_of(found)) == 1 or (architecture == 90 and dtype == found.dtypes[0]):
        return found.sizes
    return (found.sizes[turn % len(found.sizes)],)


def units_of(case: Case) -> list[tuple[int, str, torch.dtype]]:
    """What is compiled of a case: its architectures and dtypes as `ELSEWHERE` has them."""
    return [
        (architecture, case.name, dtype)
        for dtype, architecture in itertools.product(case.dtypes, case.architectures)
        if architecture in (90, *ELSEWHERE.get(dtype, ()))
    ]


def units(only: str = "") -> list[tuple[int, str, torch.dtype]]:
    """What is compiled in one go: architecture, case and dtype, those whose `id_of` contains `only`."""
    found = [unit for case in CASES for unit in units_of(case)]
    return [unit for unit in found if only in id_of(*unit)]


def id_of(architecture: int, case: str, dtype: torch.dtype) -> str:
    """The name of a unit, such as "sm_90-newton_predict-bfloat16"."""
    return f"sm_{architecture}-{case}-{str(dtype).removeprefix('torch.')}"


def compile_unit(architecture: int, case: str, dtype: torch.dtype) -> dict:
    """Calls a case at its sizes for one architecture and dtype.

    Returns:
        `id`, `seconds`, `launches`: the keys of the kernels that each size launches, in order; `kernels`: what is
        known of each; `error`: the traceback of what went wrong, or None.
    """
    started = time.perf_counter()
    (found,) = [each for each in CASES if each.name == case]
    launches, kernels, error = {}, {}, None
    try:
        launched = pretend(architecture)
        for size in sizes_of(architecture, case, dtype):
            launched.clear()
            found.call(replace(size, dtype=dtype))
            launches[str(size)] = [kernel.hash for kernel in launched]
            kernels.update({k.hash: resources(k) for k in launched if k.hash not in kernels})
            if found.most_selects and dtype.itemsize == 2:
                for kernel in launched:
                    kernels[kernel.hash]["loop"] = loop_of_products(kernel.asm["cubin"])
    except Exception:
        error = traceback.format_exc()
    return {
        "id": id_of(architecture, case, dtype),
        "seconds": time.perf_counter() - started,
        "launches": launches,
        "kernels": kernels,
        "error": error,
    }


def pretend(architecture: int) -> list:
    """Makes Triton compile for `architecture`, and returns the list that gets every kernel that is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    launched = _recorded()
    driver.set_active(_Driver(GPUTarget("cuda", architecture, 32)))
    import lesa_kernels.launch as shared

    # Before the launchers are imported: they take it from there.
    shared.multiprocessors = lambda device: ARCHITECTURES[driver.active.get_current_target().arch]
    return launched


class _Driver:
    """A driver of one GPU that nobody may launch on."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@cache
def _recorded() -> list:
    """Every launch from now on compiles only, and appends its kernel here. Triton may be named as backend on a CPU."""
    from triton.runtime.jit import JITFunction

    import lesa_kernels.dispatch as dispatch

    run, launched = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        for each in args:  # such as the stages of the samples: plain torch may read what the kernel has not written
            if isinstance(each, torch.Tensor) and each.dtype == torch.int32 and each.numel() <= 64:
                each.zero_()
        return launched[-1]

    JITFunction.run = compile_only
    dispatch._interprets = lambda: True
    return launched


def resources(kernel) -> dict:
    """What a compiled kernel takes: registers, bytes of stack, local and shared memory, and counts of instructions."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "name": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "shared": max(kernel.metadata.shared, numbers["SHARED"]),
        "instructions": {name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()},
    }


def loop_of_products(cubin: bytes) -> dict[str, int]:
    """The machine instructions of the innermost loop that has matrix products, counted by name, such as "SEL"."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?(\w+)(.*)", line):
            names.append(instruction[1])
            target = re.search(r"\.L_\w+", instruction[2]) if instruction[1] == "BRA" else None
            if target and target[0] in labels:  # a jump back
                loops.append(names[labels[target[0]] :])
    products = {"HMMA", "HGMMA", "UTCHMMA"}
    return dict(Counter(min((loop for loop in loops if products & set(loop)), key=len)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write; printed as a table too")
    parser.add_argument("--only", default="", help="a part of the ids to compile, such as sm_90-newton")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels can't be compiled")
    rows = []
    # Fresh interpreters: torch has started threads here.
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compile_unit, *unit) for unit in units(options.only)]):
            rows.append(done.result())
            print(_lines(rows[-1]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["error"] for row in rows):
        sys.exit(1)


def _lines(row: dict) -> str:
    lines = [f"{row['id']}  {row['seconds']:.1f} s"]
    for kernel in row["kernels"].values():
        counts = " ".join(f"{name}:{count}" for name, count in kernel["instructions"].items() if count)
        memory = f"{kernel['stack']} stack, {kernel['local']} local, {kernel['shared']} shared"
        lines.append(f"    {kernel['name']}: {kernel['registers']} registers, {memory}; {counts}")
    return "\n".join(lines + ([row["error"]] if row["error"] else []))


if __name__ == "__main__":
    main()
