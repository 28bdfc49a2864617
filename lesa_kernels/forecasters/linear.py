"""A straight line through the two newest features, over the noise level."""

from typing import TYPE_CHECKING

from lesa_kernels.forecasters.base import Forecaster, Steps
from lesa_kernels.forecasters.lines import line_weights
from lesa_kernels.stream.arguments import Weights

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor


class Linear(Forecaster):
    """Linear extrapolation in the noise level s, from the newest features g_0 at s_0 and g_1 at s_1:

        h_hat = g_0 + (s - s_0) / (s_0 - s_1) * (g_0 - g_1)

    With one stored feature it repeats that feature. It equals a newton predictor before training.

    Source: Newton's divided differences, of first order.
    """

    name = "linear"
    title = "linear extrapolation"
    label = "linear"
    reads_times = False

    def history_length(self, config: "PredictorConfig") -> int:
        return 2

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        count = self.read(predictor.config, steps)
        anchors = line_weights(steps.levels.double(), steps.sigma.double(), count)
        return Weights(anchors, count, None, None, None)
