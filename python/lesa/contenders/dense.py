"""The dense variant of this project's predictors."""

from lesa.contenders.base import Color, Ours
from lesa_kernels import PredictorConfig


class Dense(Ours):
    """A predictor that mixes the stored features with dense weights, with its schedule."""

    name = "dense"
    title = "dense variant"
    label = "dense"
    color = Color("#2f66a8", "#82b5ec")

    @classmethod
    def detail(cls, config: PredictorConfig) -> str:
        """What a reader must know about a predictor."""
        return "dense"
