"""The noise levels that a predictor tells the model, as parameters of a training through whole runs."""

import torch

from lesa_kernels import PredictorConfig
from lesa_kernels.checks import argument_error

RATE = 20.0
"""The learning rate of the offsets is that of the predictor, times this: they are few, and of the size of 0.1."""


class LearnedLevels(torch.nn.Module):
    """One offset for each computed step. In the beginning, the model is told what the configuration says.

    The unit of an offset is the shorter of the two gaps beside the step, from computed step to computed step.

    Args:
        config: of the predictor, with a schedule and its noise levels.

    Attributes:
        offsets: `[n]` float64 on the CPU.

    Raises:
        ValueError: the configuration has no noise levels above 0.
    """

    def __init__(self, config: PredictorConfig):
        super().__init__()
        levels = [*(config.schedule_sigmas or ()), 0.0]
        if levels[0] <= 0 or levels[-2] <= 0:
            must, got = "be noise levels above 0, to learn others from", config.schedule_sigmas
            remedy = "Give the predictor a configuration with `schedule` and `schedule_sigmas`."
            raise argument_error("predictor.config.schedule_sigmas", must, got, remedy)
        gaps = [a - b for a, b in zip(levels, levels[1:])]
        units = [min(gaps[max(step - 1, 0)], gaps[step]) for step in range(len(gaps))]
        self._levels = torch.tensor(levels[:-1], dtype=torch.float64, device="cpu")
        self._units = torch.tensor(units, dtype=torch.float64, device="cpu")
        told = torch.tensor(config.told_levels or levels[:-1], dtype=torch.float64, device="cpu")
        self.offsets = torch.nn.Parameter((told - self._levels) / self._units)

    def forward(self) -> torch.Tensor:
        """The levels that are told, `[n]` float64 on the CPU."""
        return self._levels + self._units * self.offsets

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Moves offsets back whose levels have left [0, 1]."""
        self.offsets.copy_((self().clamp(0.0, 1.0) - self._levels) / self._units)

    @torch.no_grad()
    def values(self) -> tuple[float, ...]:
        """The levels for a configuration."""
        return tuple(self().clamp(0.0, 1.0).tolist())
