"""Newton's divided differences over the noise levels, scaled channel by channel by a KAN, with a low-rank residual."""

from typing import TYPE_CHECKING, Any, cast

import torch

from lesa_kernels import work
from lesa_kernels.forecasters.base import Forecaster, Steps
from lesa_kernels.forecasters.units import build_units, parameter, reset_units
from lesa_kernels.predictor.arguments import NewtonExperts, RingState
from lesa_kernels.predictor.ops.coefficients import run_newton_coefficients
from lesa_kernels.predictor.ops.newton import newton_backend, run_newton_predict
from lesa_kernels.predictor.ops.velocity import newton_velocity_is_fused, run_newton_velocity
from lesa_kernels.stream.arguments import NO_RESIDUAL, LowRank, OutputHead, Weights
from lesa_kernels.stream.reference import forecast_dtype

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor


class Newton(Forecaster):
    """See `newton_predict`. Before training it extrapolates linearly from the two newest anchors."""

    name = "newton"
    title = "newton"
    stage_bounds = (0.67, 0.33)
    knows_width = True
    hidden = 64
    has_residual = True
    is_trained = True
    reads_times = False
    reads_one_sigma = True
    can_find_stages = True

    def describe(self, config: "PredictorConfig") -> str:
        return f"newton, rank {config.rank}"

    def history_length(self, config: "PredictorConfig") -> int:
        return 4

    def build(self, predictor: "FusedKANPredictor", config: "PredictorConfig") -> None:
        stages, width, hidden = config.num_stages, cast(int, config.feature_dim), cast(int, config.hidden)
        taps, p = config.max_history - 1, cast(Any, predictor)
        build_units(p, config, taps + 2)  # the noise level itself is an input too
        p.out_weight = parameter(stages, taps, width, hidden)
        p.out_bias = parameter(stages, taps, width)
        if config.rank:
            p.down = parameter(stages, config.rank, taps, width)
            p.up = parameter(stages, width, config.rank)
            p.up_bias = parameter(stages, width)
        else:
            p.down = p.up = p.up_bias = None

    def reset(self, predictor: "FusedKANPredictor", generator: torch.Generator | None) -> None:
        p: Any = predictor
        reset_units(p, generator)
        p.out_weight.zero_()
        p.out_bias.zero_()
        p.out_bias[:, :1] = 1.0
        if p.down is not None:
            p.down.uniform_(-1, 1, generator=generator).div_((p.down.shape[2] * p.down.shape[3]) ** 0.5)
        for value in (p.up, p.up_bias):
            if value is not None:
                value.zero_()

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        experts, shape = self.experts(predictor), predictor.shape()
        return run_newton_coefficients(steps.levels, steps.count, steps.sigma, experts, shape, predictor.backend)

    def low_rank(self, predictor: "FusedKANPredictor", dtype: torch.dtype) -> LowRank:
        experts = self.experts(predictor)
        if experts.residual is None or not experts.rank:
            return NO_RESIDUAL
        down, up, _ = experts.residual
        with torch.autocast(up.device.type, enabled=False):
            wide, dtype = up.float(), forecast_dtype(dtype)
            return LowRank(down.to(dtype), up.to(dtype), wide.mT @ wide, wide.sum(1))

    def experts(self, predictor: "FusedKANPredictor") -> NewtonExperts:
        p: Any = predictor
        return NewtonExperts(p.in_weight, p.in_bias, p.spline, p.out_weight, p.out_bias, p.down, p.up, p.up_bias)

    def forecast(
        self,
        predictor: "FusedKANPredictor",
        state: RingState,
        times: torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        return run_newton_predict(state, self.experts(predictor), predictor.shape(), predictor.backend)

    def velocity(
        self,
        predictor: "FusedKANPredictor",
        state: RingState,
        head: OutputHead,
        times: torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        return run_newton_velocity(state, self.experts(predictor), head, predictor.shape(), predictor.backend)

    def velocity_backend(self, predictor: "FusedKANPredictor", state: RingState) -> str:
        experts, shape = self.experts(predictor), predictor.shape()
        return newton_backend(state, experts, shape, predictor.backend, "newton_velocity")

    def fuses_on_triton(self, predictor: "FusedKANPredictor", state: RingState, head: OutputHead) -> bool:
        return newton_velocity_is_fused(state, self.experts(predictor), head)

    def work(
        self,
        config: "PredictorConfig",
        sizes: tuple[int, int, int, torch.dtype],
        out_channels: int,
        history: int,
    ) -> dict[str, int]:
        return work.predict_velocity(*sizes, out_channels, history, config.rank, cast(int, config.hidden))
