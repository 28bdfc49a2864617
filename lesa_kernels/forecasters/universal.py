"""Newton's divided differences, scaled by a KAN that knows no width: its numbers come with the package."""

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from lesa_kernels.forecasters.base import Forecaster, Steps
from lesa_kernels.predictor.reference import kan_hidden, newton_weights
from lesa_kernels.stages import stage_index
from lesa_kernels.stream.arguments import Weights
from lesa_kernels.torch_modes import default_modes

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor

COEFFICIENTS = Path(__file__).with_name("universal.safetensors")
BOUNDS = (0.67, 0.33)
"""The noise levels between its three stages."""
LONGEST = 4
GRID_SIZE, SPLINE_ORDER = 5, 3


class Universal(Forecaster):
    """A newton predictor with one number per tap instead of one per channel, trained once for all models.

    With the divided differences D_j and taps t_j of `newton_predict`, the newest features g_k at the noise levels s_k,
    the target s and the last gap `w = s_1 - s_0`:

        x = (s_0 - s) / w,   r_1 = (s_2 - s_1) / w,   r_2 = (s_3 - s_2) / w
        c = KAN_stage(log x, log r_1, log r_2, 2 s - 1, log(w) / 2 + 1.2)       three numbers
        h_hat = g_0 + c_1 t_1 + c_2 t_2 + c_3 t_3

    Logarithms are limited to [-4, 3] for x and [-3, 3] for r. A ratio that needs a missing feature is 1, and so is w.
    Taps of missing features are zero, so a single feature is repeated. Most inputs are ratios of noise levels, so that
    other numbers of steps and other shifts look alike. The coefficients were trained on the two bundled models; they
    are no parameters, and a saved predictor does not hold them.

    Source: this project; docs/research.md says how it was trained and what it is worth on models that it has not seen.
    The README of the demo's weights names the data.
    """

    name = "universal"
    title = "universal coefficients"
    label = "universal"
    reads_times = False

    def history_length(self, config: "PredictorConfig") -> int:
        return LONGEST

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        count = self.read(predictor.config, steps)
        longest = steps.levels.shape[-1]
        order = torch.arange(longest, device=count.device)
        levels = steps.levels.double().masked_fill(order >= count[..., None], 0.0)[..., :LONGEST].flatten(0, -2)
        levels = torch.nn.functional.pad(levels, (0, LONGEST - levels.shape[-1]))
        there, sigma = count.flatten().clamp(max=LONGEST), steps.sigma.double().flatten()
        scales = tap_scales(levels, there, sigma, coefficients(sigma.device))
        anchors = (scales[:, None] @ newton_weights(levels.T, there, sigma)).squeeze(1)  # [P * B, K]
        anchors[:, 0] += 1
        anchors = torch.nn.functional.pad(anchors, (0, longest - LONGEST))
        return Weights(anchors.unflatten(0, count.shape), count, None, None, None)


def tap_scales(
    levels: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, numbers: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The numbers c: `[N, 3]`.

    Args:
        levels: `[N, 4]`, the noise levels of the newest features, newest first; any finite number beyond `count`.
        count: `[N]`, how many there are.
        sigma: `[N]`, the noise level to forecast.
        numbers: of the KAN, as `coefficients` gives them.
    """
    gaps = levels.diff(dim=1)
    gaps = torch.where(count[:, None] > torch.arange(1, LONGEST, device=count.device), gaps, gaps.new_ones(()))
    last = gaps[:, 0]
    ahead = torch.where(count > 1, (levels[:, 0] - sigma) / last, 1.0)
    ratios = torch.stack([torch.where(count > k + 1, gaps[:, k] / last, 1.0) for k in (1, 2)])
    inputs = torch.stack(
        [
            ahead.clamp(math.exp(-4), math.exp(3)).log(),
            *ratios.log().clamp(-3, 3),
            2 * sigma - 1,
            last.clamp(min=1e-3).log() / 2 + 1.2,
        ],
        1,
    )
    stage, found = stage_index(sigma.float(), BOUNDS), inputs.new_zeros(len(inputs), LONGEST - 1)
    in_weight, in_bias, spline, out_weight, out_bias = numbers
    for number in range(len(BOUNDS) + 1):
        units = kan_hidden(inputs, in_weight[number], in_bias[number], spline[number], GRID_SIZE, SPLINE_ORDER)
        found = found + (stage == number)[:, None] * (units @ out_weight[number].T + out_bias[number])
    return found


@lru_cache(maxsize=8)
def coefficients(device: torch.device) -> tuple[torch.Tensor, ...]:
    """The numbers of the KAN in float64: weights and biases of the units, splines, output weights and biases."""
    with default_modes():
        stored = load_file(COEFFICIENTS)
        names = ("in_weight", "in_bias", "spline", "out_weight", "out_bias")
        return tuple(stored[name].double().to(device) for name in names)
