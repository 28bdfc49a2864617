"""The spline units of a KAN with one hidden layer and one expert for each noise stage: `kan_hidden` has the formula."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig


def parameter(*shape: int) -> nn.Parameter:
    """A float32 parameter, zero until it is reset."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def build_units(predictor: Any, config: "PredictorConfig", inputs: int) -> None:
    """Gives the predictor the parameters of units with so many inputs."""
    stages, hidden = config.num_stages, cast(int, config.hidden)  # the configuration replaces None
    predictor.in_weight = parameter(stages, hidden, inputs)
    predictor.in_bias = parameter(stages, hidden)
    predictor.spline = parameter(stages, hidden, config.grid_size + config.spline_order)


def reset_units(predictor: Any, generator: torch.Generator | None) -> None:
    """Makes the units random."""
    predictor.in_weight.normal_(std=predictor.in_weight.shape[2] ** -0.5, generator=generator)
    predictor.in_bias.normal_(std=0.5, generator=generator)
    predictor.spline.normal_(std=0.3, generator=generator)
