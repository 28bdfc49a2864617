"""TaylorSeer: a Taylor series in the step number, from backward differences of the stored features."""

import math
from typing import TYPE_CHECKING

import torch

from lesa_kernels.forecasters.base import Forecaster, Option, Steps
from lesa_kernels.stream.arguments import Weights

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor


class Taylor(Forecaster):
    """A Taylor series whose derivatives are backward differences over the last computed steps.

    With the features g_0, g_1, ... at the steps t_0 > t_1 > ..., newest first, and the target step t:

        F_0(i)     = g_i
        F_{j+1}(i) = (F_j(i) - F_j(i + 1)) / (t_i - t_{i+1})
        h_hat      = sum_{j<=m} (t - t_0)^j / j! * F_j(0),   m = min(order, number of features - 1)

    The option `order` is 1, 2 or 3; order m reads m + 1 features.

    These are the factors of diffusers' `TaylorSeerCacheConfig(max_order=order)`, for any gaps between the computed
    steps: each update divides by the gap to the update before it, not by the distance that a divided difference of
    order j spans. So from order 2 on it is not the polynomial through the features, not even where all gaps are equal.
    It differs from diffusers in what is forecast: diffusers forecasts the output of each attention or, in lite mode, of
    the projection at the end, and rounds the factors to bfloat16 by default; here it is the input of the output head,
    from features as they are stored. Where a step repeats the noise level of the step before it, the two are one step.

    Source: TaylorSeer, arXiv 2503.06923.
    """

    name = "taylor"
    title = "Taylor series at the head (TaylorSeer's formula)"
    label = "Taylor"
    options = {"order": Option(1, 1, 3)}
    variants = ({"order": 1}, {"order": 2}, {"order": 3})

    def history_length(self, config: "PredictorConfig") -> int:
        return int((config.options or {})["order"]) + 1

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        config = predictor.config
        count = self.read(config, steps)
        history = steps.levels.shape[-1]
        order = torch.arange(history, device=count.device)
        missing = order >= count[..., None]
        at = steps.positions(steps.levels.masked_fill(missing, 0.0))
        gaps = torch.where(missing[..., 1:], 1.0, at[..., :-1] - at[..., 1:])
        ahead = steps.positions(steps.sigma) - at[..., 0]
        factors = torch.eye(history, dtype=torch.float64, device=count.device).expand(*count.shape, -1, -1)
        anchors = factors[..., 0, :]
        for j in range(1, min(int((config.options or {})["order"]), history - 1) + 1):
            factors = (factors[..., :-1, :] - factors[..., 1:, :]) / gaps[..., : history - j, None]
            term = (ahead**j / math.factorial(j))[..., None] * factors[..., 0, :]
            anchors = anchors + term.masked_fill(j >= count[..., None], 0.0)
        return Weights(anchors, count, None, None, None)
