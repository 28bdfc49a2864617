"""L2P: for each step of a run, one scalar for each earlier computed step, found by least squares."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lesa_kernels.checks import Said, argument_error
from lesa_kernels.forecasters.base import USUAL_STEPS, Forecaster, RecordedRun, Steps
from lesa_kernels.forecasters.lines import line_weights
from lesa_kernels.stream.arguments import Weights

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor

LONGEST = 8
TOLERANCE = 1e-5
"""Noise levels that differ by less are the same one, in the rounding of schedulers."""
ROWS = 1 << 16
"""Rows of one decomposition. They limit the memory of a fit."""


class Summary(NamedTuple):
    """What the fit of any history needs of recorded runs.

    Args:
        triangle: `[S, S]` float64, R of a QR decomposition of all features `[N, S]`. Least squares with columns of R
            have the same solution as with those of the features.
        levels: `[S]` float32, the noise levels.
    """

    triangle: torch.Tensor
    levels: torch.Tensor


class L2P(Forecaster):
    """The weighted sum of the newest K computed features, with weights of its own for each step of the run.

        h_hat_i = sum_k w_ik g_k

    The scalars w_i minimise the squared error of the features over all tokens and channels of the recorded samples. So
    all tokens, channels and streams of guidance share them, and each step is fitted alone, in closed form. If the data
    do not determine the scalars, they are those of least norm.

    The weights of a step belong to its noise level and to those of its history, which are stored beside them. A step
    for which none were fitted gets a straight line over the noise level, through the two newest features. So does each
    step before the fit, and each step of a run with another schedule, another number of steps or another shift.

    As in the paper: one learned row of scalars for each step, the same for all tokens and channels; the squared error;
    true values as history where the weights are learned. The released code weighs the outputs of the model instead of
    the features before its head. Its history has all earlier steps, also the forecasts. 201 steps of Adam, which begin
    with the identity, approximate the fit. Here, the history has the newest K computed steps only, so that no error
    comes back, and the fit is exact.

    Source: L2P, arXiv 2604.26365, and github.com/Aredstone/L2P-Cache.
    """

    name = "l2p"
    title = "L2P"
    is_trained = True
    is_fitted = True
    reads_times = False
    head_aware = False
    guided_part = None

    def history_length(self, config: "PredictorConfig") -> int:
        return LONGEST

    def build(self, predictor: "FusedKANPredictor", config: "PredictorConfig") -> None:
        if config.history != "anchors":
            remedy = "Leave it out: weights are fitted for histories of computed steps."
            raise argument_error("config.history", "be 'anchors' for l2p", config.history, remedy)
        p: Any = predictor
        total, longest = config.num_inference_steps or USUAL_STEPS, config.max_history
        p.rows = nn.Parameter(torch.zeros(total, longest, dtype=torch.float64))
        # The bits of float32 numbers, which no conversion of the predictor rounds.
        predictor.register_buffer("level_bits", torch.zeros(total, longest + 1, dtype=torch.int32))

    def reset(self, predictor: "FusedKANPredictor", generator: torch.Generator | None) -> None:
        p: Any = predictor
        p.rows.zero_()
        p.level_bits.fill_(0)  # the noise level 0 is never one that is forecast

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        p: Any = predictor
        count = self.read(predictor.config, steps)
        known = p.level_bits.view(torch.float32).double()  # [S, 1 + K]: of a step, and of its history
        sigma = steps.sigma.double()
        row = (known[:, 0] - sigma[..., None]).abs().argmin(-1)  # [P, B]
        order = torch.arange(steps.levels.shape[-1], device=count.device)
        there = order < count[..., None]
        levels = steps.levels.double().masked_fill(~there, 0.0)
        found = torch.cat([sigma[..., None], levels], -1)
        fits = ((found - known[row]).abs() < TOLERANCE).all(-1, keepdim=True)
        line = line_weights(levels, sigma, count)
        return Weights(torch.where(fits, p.rows.double()[row], line), count, None, None, None)

    @torch.no_grad()
    def summarise(self, predictor: "FusedKANPredictor", runs: Iterable[RecordedRun]) -> Summary:
        levels, triangle = None, None
        for run in runs:
            if levels is None:
                levels = run.sigmas
            elif not torch.equal(levels, run.sigmas):
                must = "have the same noise levels in each sample"
                raise argument_error("trajectories", must, Said("others"), "Record samples of one size.")
            columns = run.features.flatten(1)  # [S, N]
            for part in columns.split(ROWS, 1):
                part = part.double().T  # [N, S]
                stacked = part if triangle is None else torch.cat([triangle, part])
                triangle = torch.linalg.qr(stacked, mode="r").R
        if levels is None or triangle is None:
            raise argument_error("trajectories", "hold at least one sample", Said("none"), "Record some.")
        total = predictor.config.num_inference_steps
        if total not in (None, len(levels)):
            remedy = "Set `num_inference_steps` of the predictor's config to the steps of the recording."
            raise argument_error("trajectories", f"have {total} steps", Said(f"{len(levels)}"), remedy)
        most = total or USUAL_STEPS
        if len(levels) > most:
            remedy = "Set `num_inference_steps` of the predictor's config."
            raise argument_error("trajectories", f"have at most {most} steps", Said(f"{len(levels)}"), remedy)
        return Summary(triangle.cpu(), levels.float().cpu())

    @torch.no_grad()
    def fit_steps(
        self, predictor: "FusedKANPredictor", summary: Summary, history: Sequence[int], targets: Sequence[int]
    ) -> None:
        p: Any = predictor
        newest, steps = torch.tensor([*history][::-1]), torch.tensor([*targets])
        known = p.level_bits.view(torch.float32)  # the same memory
        for read, alike in self._by_length(predictor, summary.levels[steps], len(newest), steps):
            seen = newest[:read]
            table, wanted = summary.triangle[:, seen], summary.triangle[:, alike]
            rows = torch.zeros(len(alike), p.rows.shape[1], dtype=torch.float64)
            rows[:, :read] = torch.linalg.lstsq(table, wanted, driver="gelsd").solution.T
            levels = torch.zeros(len(alike), known.shape[1])
            levels[:, 0], levels[:, 1 : read + 1] = summary.levels[alike], summary.levels[seen]
            p.rows[alike], known[alike] = rows.to(p.rows), levels.to(known)

    def _by_length(
        self, predictor: "FusedKANPredictor", levels: torch.Tensor, count: int, steps: torch.Tensor
    ) -> list[tuple[int, torch.Tensor]]:
        """How many features are read, and the steps for which so many are."""
        counts = torch.full((len(levels), 1), count, dtype=torch.int32)
        nothing = torch.empty(0)  # only the stage matters
        read = self.read(predictor.config, Steps(nothing, counts, levels[:, None], nothing))[:, 0]
        return [(length, steps[read == length]) for length in sorted({*read.tolist()})]
