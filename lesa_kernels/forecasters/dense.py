"""The dense variant: a linear map of the concatenated history, scaled by a KAN of the time offsets."""

from typing import TYPE_CHECKING, Any, cast

import torch

from lesa_kernels import work
from lesa_kernels.checks import argument_error
from lesa_kernels.forecasters.base import Forecaster, Steps
from lesa_kernels.forecasters.units import build_units, parameter, reset_units
from lesa_kernels.predictor.arguments import DenseExperts, RingState
from lesa_kernels.predictor.ops.dense import run_dense_predict
from lesa_kernels.stream.arguments import Weights

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor

_WINDOWS = (4, 6, 8)  # high, middle and low noise; the LESA paper gives the first and the last


class Dense(Forecaster):
    """See `dense_predict`. Before training it repeats the newest feature.

    Its forecast has a product with a matrix for each stored feature, so it has no weights, and no plan of a run.
    """

    name = "dense"
    title = "dense variant"
    label = "dense"
    history = "steps"
    stage_bounds = (0.67, 0.33)
    knows_width = True
    hidden = 256
    is_trained = True
    reads_times = False
    plans = False
    learning_rate = 1e-4  # as in the LESA paper, like the loss of features only
    head_aware = False
    guided_part = 3

    def history_length(self, config: "PredictorConfig") -> int | tuple[int, ...]:
        return _WINDOWS if config.num_stages == len(_WINDOWS) else 4

    def build(self, predictor: "FusedKANPredictor", config: "PredictorConfig") -> None:
        stages, width, hidden = config.num_stages, cast(int, config.feature_dim), cast(int, config.hidden)
        p: Any = predictor
        build_units(p, config, config.max_history)
        p.out_weight = parameter(stages, hidden)
        p.out_bias = parameter(stages)
        p.mix_weight = parameter(sum(config.lengths), width, width)
        p.mix_bias = parameter(stages, width)

    def reset(self, predictor: "FusedKANPredictor", generator: torch.Generator | None) -> None:
        p: Any = predictor
        reset_units(p, generator)
        p.out_weight.zero_()
        p.out_bias.fill_(1.0)
        p.mix_weight.zero_()
        p.mix_bias.zero_()

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        remedy = "Call the predictor itself."
        raise argument_error("config.mixer", "be a forecaster of weights for a plan", self.name, remedy, RuntimeError)

    def experts(self, predictor: "FusedKANPredictor") -> DenseExperts:
        p: Any = predictor
        return DenseExperts(p.in_weight, p.in_bias, p.spline, p.out_weight, p.out_bias, p.mix_weight, p.mix_bias)

    def forecast(
        self,
        predictor: "FusedKANPredictor",
        state: RingState,
        times: torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        return run_dense_predict(state, self.experts(predictor), predictor.shape(), predictor.backend)

    def work(
        self,
        config: "PredictorConfig",
        sizes: tuple[int, int, int, torch.dtype],
        out_channels: int,
        history: int,
    ) -> dict[str, int]:
        return work.both(work.dense_predict(*sizes, history), work.output_head(*sizes, out_channels))
