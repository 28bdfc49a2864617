"""Spectrum: Chebyshev polynomials in the step number, fitted to the stored features by ridge regression."""

from typing import TYPE_CHECKING

import torch

from lesa_kernels.forecasters.base import Forecaster, Option, Steps
from lesa_kernels.forecasters.lines import line_weights
from lesa_kernels.stream.arguments import Weights

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor


class Chebyshev(Forecaster):
    """A polynomial of the step number, fitted to the last computed steps.

    With the features g_k at the steps t_k and `tau(t) = (t - S/2) / (S/2)` in a run of S steps:

        x(t)  = [T_0(tau(t)), ..., T_M(tau(t))]              Chebyshev polynomials of the first kind
        X     = the rows x(t_k)
        h_hat = blend * x(t) (X^T X + ridge I)^-1 X^T G + (1 - blend) * (g_0 + (t - t_0) / (t_0 - t_1) * (g_0 - g_1))

    The ridge acts on all coefficients, also on that of T_0. The options are `degree` (M, 4), `ridge` (0.1) and `blend`
    (1, the polynomial alone). `history_length` is the window: the last 10 computed steps by default, or all that there
    are. With one feature, the second part of the blend repeats it.

    These are the formulas of the released code, which differs in three points. It takes 50 for S in each run. Its
    script keeps up to 100 steps instead of 10. It computes times and coefficients in bfloat16, and here weights are
    computed in float64. Its window schedule is not a part of the forecast: pass the steps as a schedule.

    Source: Spectrum, arXiv 2603.01623.
    """

    name = "chebyshev"
    title = "Chebyshev polynomials (Spectrum)"
    label = "Chebyshev"
    options = {"degree": Option(4, 0, 9), "ridge": Option(0.1, 1e-9, 1e9), "blend": Option(1.0, 0.0, 1.0)}
    variants = ({}, {"blend": 0.5}, {"blend": 0.25}, {"degree": 3, "blend": 0.5})

    def history_length(self, config: "PredictorConfig") -> int:
        return 10

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        options = predictor.config.options or {}
        degree, ridge, blend = int(options["degree"]), options["ridge"], options["blend"]
        count, half = self.read(predictor.config, steps), (len(steps.times) - 1) / 2
        missing = torch.arange(steps.levels.shape[-1], device=count.device) >= count[..., None]
        at = steps.positions(steps.levels.masked_fill(missing, 0.0))  # [P, B, K]
        target = steps.positions(steps.sigma)  # [P, B]
        rows = _polynomials(at / half - 1, degree).masked_fill(missing[..., None], 0.0)  # [P, B, K, M + 1]
        square = rows.mT @ rows + ridge * torch.eye(degree + 1, dtype=rows.dtype, device=rows.device)
        # With a ridge it is never singular, and the check of `solve` would wait for the device.
        solved, _ = torch.linalg.solve_ex(square, rows.mT)  # [P, B, M + 1, K]
        anchors = (_polynomials(target / half - 1, degree)[..., None, :] @ solved).squeeze(-2)
        if blend < 1:
            anchors = blend * anchors + (1 - blend) * line_weights(at, target, count)
        return Weights(anchors, count, None, None, None)


def _polynomials(tau: torch.Tensor, degree: int) -> torch.Tensor:
    """`T_0, ..., T_degree` at `tau`, in a new last dimension."""
    found = [torch.ones_like(tau), tau]
    while len(found) <= degree:
        found.append(2 * tau * found[-1] - found[-2])
    return torch.stack(found[: degree + 1], -1)
