"""Calls every kernel at small odd sizes, for `compute-sanitizer`: `compute-sanitizer python benchmarks/sanitize.py`.

Tokens, widths and rows are no multiples of a block, samples of one batch are in different stages and have histories of
different lengths. The results are only looked at for values that are not finite: the tests compare them.
"""

import argparse
import copy
from collections.abc import Callable

import torch

from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig
from lesa_kernels.bspline_kan import bspline_kan

BATCH, TOKENS, DIM = 3, 37, 72
SIGMA = [0.8, 0.5, 0.2]  # one sample in each stage
STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
FLOATS = STORED[:3]


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


def finite(value: torch.Tensor) -> None:
    """Raises unless all of `value` is finite."""
    if not torch.isfinite(value).all():
        raise RuntimeError("a kernel wrote values that are not finite, or left some unwritten")


RUNS: list[tuple[Callable, tuple[torch.dtype, ...]]] = [
    (forecasts, STORED),
    (forecast_gradients, FLOATS),
    (layers, FLOATS),
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cuda", help="default: cuda; cpu with TRITON_INTERPRET=1 runs the interpreter"
    )
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    for run, dtypes in RUNS:
        for dtype in dtypes:
            run(dtype, options.device)
            if options.device != "cpu":
                torch.cuda.synchronize()
            print(f"{run.__name__} {str(dtype).removeprefix('torch.')}", flush=True)


if __name__ == "__main__":
    main()
