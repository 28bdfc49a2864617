"""Calls every kernel at small odd sizes; with `--tool`, under that tool of `compute-sanitizer`.

Tokens, widths and rows are no multiples of a block, samples of one batch are in different stages and have histories of
different lengths. Triton's results are only looked at for values that are not finite: the tests compare them. What the
ring holds is compared with plain torch.

initcheck has to follow the kernels of torch too: with a filter it would miss what they write, and take all that our
kernels read of it for uninitialised. So it runs without one, and `--judge` tells whose reports its log has. Memory that
torch keeps for later would hide what goes beyond a tensor, and what nobody has written; so it keeps none.
"""

import argparse
import copy
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig
from lesa_kernels.bspline_kan import bspline_kan

BATCH, TOKENS, DIM = 3, 37, 72
SIGMA = [0.8, 0.5, 0.2]  # one sample in each stage
STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
FLOATS = STORED[:3]

# Tokens, width, and how many elements the ring begins after 16 bytes. A warp keeps a token up to a width of 3072.
RINGS = {
    "aligned": (37, 64, 0),
    "odd": (5, 33, 0),
    "ahead": (9, 64, 1),
    "long": (3, 3104, 0),
    "long and odd": (2, 3073, 1),
}
LAYOUTS = {
    "contiguous": torch.clone,
    "slice of tokens": lambda features: F.pad(features, (0, 0, 2, 0))[:, 2:],
    "slice of the width": lambda features: F.pad(features, (3, 0))[..., 3:],
    "tokens last": lambda features: features.mT.contiguous().mT,
}
# The kernels of csrc/ and those of Triton, in a line that says where a report comes from.
OURS = re.compile(r"^=+\s+at (?:0x[0-9a-f]+ in )?(?:void )?(?:lesa::|_\w+_kernel\b)")
SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) error")


def filled_ring(predictor: FusedKANPredictor, dtype: torch.dtype, device: str) -> FeatureRing:
    """Its rows have one, two and as many anchors as there is room for."""
    ring = predictor.make_ring(BATCH, TOKENS, dtype, device)
    for i in range(ring.capacity + 1):
        rows = [row for row, pushes in enumerate((1, 2, ring.capacity + 1)) if i < pushes]
        levels = torch.tensor([SIGMA[row] + 0.02 * (ring.capacity + 1 - i) for row in rows], device=device)
        ring.push(torch.randn(len(rows), TOKENS, DIM, device=device), levels, rows=rows)
    return ring


def forecasts(dtype: torch.dtype, device: str) -> None:
    """The forecasts of newton and dense, and newton's through an output head."""
    sigma = torch.tensor(SIGMA, device=device)
    for mixer, rank in (("newton", 0), ("newton", 5), ("dense", 0)):
        predictor = FusedKANPredictor(PredictorConfig(DIM, mixer, rank=rank, hidden=20), backend="triton").to(device)
        ring = filled_ring(predictor, dtype, device)
        predictors = [predictor]
        if mixer == "dense" and dtype.itemsize > 1:
            predictors.append(copy.deepcopy(predictor).to(dtype))
        for each in predictors:
            with torch.no_grad():
                finite(each(ring, sigma))
                if mixer == "newton":
                    weight, scale, shift = (torch.randn(n, DIM, device=device) for n in (9, BATCH, BATCH))
                    finite(each.predict_velocity(ring, sigma, OutputHead(weight, weight[:, 0], scale, shift)))


def forecast_gradients(dtype: torch.dtype, device: str) -> None:
    """The gradients of the forecasts."""
    sigma = torch.tensor(SIGMA, device=device)
    for mixer, rank in (("newton", 0), ("newton", 5), ("dense", 0)):
        predictor = FusedKANPredictor(PredictorConfig(DIM, mixer, rank=rank, hidden=20), backend="triton").to(device)
        ring = filled_ring(predictor, dtype, device)
        ring.storage.requires_grad_()
        output = predictor(ring, sigma)
        for grad in torch.autograd.grad(output, [ring.storage, *predictor.parameters()], torch.randn_like(output)):
            finite(grad)


def layers(dtype: torch.dtype, device: str) -> None:
    """The KAN layer in both of its forms, and its gradients."""
    for n_in, n_out, grid_size in ((20, 33, 5), (3, 5, 100)):
        x = torch.randn(41, n_in, device=device).to(dtype).requires_grad_()
        weights = [torch.randn(n_out, n_in, *rest, device=device) for rest in ((), (grid_size + 3,))]
        weights = [weight.to(dtype).requires_grad_() for weight in weights]
        y = bspline_kan(x, *weights, None, grid_size, 3, backend="triton")
        for value in (y, *torch.autograd.grad(y, [x, *weights], torch.randn_like(y))):
            finite(value)


def ring(stored: torch.dtype, device: str) -> None:
    """Pushes into a ring, from each dtype and layout, and reads from it, against plain torch on the CPU."""
    for dtype, (tokens, dim, ahead) in itertools.product(FLOATS, RINGS.values()):
        tested = FeatureRing(3, BATCH, tokens, dim, stored, device, "extension")
        plain = FeatureRing(3, BATCH, tokens, dim, stored, "cpu", "torch")
        memory = torch.zeros(ahead + tested.storage.numel(), dtype=stored, device=device)
        tested.storage = memory[ahead:].view(tested.storage.shape)
        if not tested.gather().isnan().all():
            raise RuntimeError(f"a ring of {stored} without any anchor must be read as NaN")
        sigma = torch.tensor(SIGMA)
        for i, layout in enumerate(LAYOUTS.values()):
            features, levels = torch.randn(BATCH, tokens, dim).to(dtype), sigma - 0.01 * i
            tested.push(layout(features.to(device)), levels.to(device))
            plain.push(features, levels)
        rows = torch.tensor([2, 0])
        tested.push(layout(features[:2].to(device)), 0.15, rows.to(device))
        plain.push(features[:2], 0.15, rows)
        for name, expected in vars(plain.snapshot()).items():
            same(f"{name} after pushes of {dtype} into {stored}", getattr(tested, name), expected)
        for age in range(tested.capacity):
            same(f"gather({age}) of {stored}", tested.gather(age), plain.gather(age))


def same(what: str, actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Raises unless the bytes are equal."""
    if expected is not None and not torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8)):
        raise RuntimeError(f"{what} is not that of plain torch")


def finite(value: torch.Tensor) -> None:
    """Raises unless all of `value` is finite."""
    if not torch.isfinite(value).all():
        raise RuntimeError("a kernel wrote values that are not finite, or left some unwritten")


RUNS: list[tuple[Callable, tuple[torch.dtype, ...]]] = [
    (forecasts, STORED),
    (forecast_gradients, FLOATS),
    (layers, FLOATS),
    (ring, STORED),
]


def judge(log: str) -> None:
    """Exits unless the log of a tool is complete and has no report of a kernel of ours."""
    lines = log.splitlines()
    ours = [line for line in lines if OURS.match(line)]
    errors = [int(found[1]) for found in map(SUMMARY.match, lines) if found]
    if not errors:
        sys.exit("the log has no summary: the tool was stopped")
    print(f"{len(ours)} of {sum(errors)} reports are of kernels of lesa_kernels", *sorted(set(ours)), sep="\n")
    sys.exit(len(ours) > 0)


TOOLS = {  # name: options
    "memcheck": ["--error-exitcode", "1"],
    "racecheck": ["--error-exitcode", "1"],
    "initcheck": ["--print-limit", "0", "--show-backtrace", "no"],
}
TRIAL = "import torch; torch.ones(1, device='cuda'); torch.cuda.synchronize()"
SKIPPED = 77  # exit status


def run_under(tool: str, log: Path) -> None:
    """Runs this file under a tool and exits: 0, or 1 if there are reports, or 77 if the tool can't run on this GPU."""
    checked = ["compute-sanitizer", "--tool", tool]
    trial = subprocess.run([*checked, sys.executable, "-c", TRIAL], capture_output=True, text=True)
    if trial.returncode or "not supported" in trial.stdout:
        print(trial.stdout, trial.stderr)
        print(f"compute-sanitizer --tool {tool} can't check a program on this GPU that only makes a tensor")
        sys.exit(SKIPPED)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*checked, *TOOLS[tool], "--log-file", str(log), sys.executable, __file__]
    failed = subprocess.run(command, env=environment).returncode != 0
    print(*log.read_text().splitlines()[-40:], sep="\n")
    if tool == "initcheck" and not failed:
        judge(log.read_text())
    sys.exit(failed)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device",
        default="cuda",
        help="default: cuda; cpu, with TRITON_INTERPRET=1, runs the interpreter and the extension's part for the CPU",
    )
    parser.add_argument("--judge", type=Path, metavar="LOG", help="run nothing, but see whose reports a log has")
    parser.add_argument("--tool", choices=TOOLS, help="run under this tool of compute-sanitizer")
    parser.add_argument("--log", type=Path, help="file for the reports of the tool")
    options = parser.parse_args(argv)
    if options.tool is not None:
        if options.log is None:
            parser.error("--tool needs --log")
        run_under(options.tool, options.log)
    if options.judge is not None:
        judge(options.judge.read_text())
    torch.manual_seed(0)
    for run, dtypes in RUNS:
        for dtype in dtypes:
            run(dtype, options.device)
            if options.device != "cpu":
                torch.cuda.synchronize()
            print(f"{run.__name__} {str(dtype).removeprefix('torch.')}", flush=True)


if __name__ == "__main__":
    main()
