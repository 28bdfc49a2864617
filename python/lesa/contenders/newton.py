"""The newton predictor of this project."""

from lesa.contenders.base import Color, Ours
from lesa_kernels import PredictorConfig


class Newton(Ours):
    """A predictor that corrects Newton's polynomial through the stored features, with its schedule."""

    name = "newton"
    title = "newton"
    color = Color("#0b6e4f", "#54d3a5")

    @classmethod
    def detail(cls, config: PredictorConfig) -> str:
        """What a reader must know about a predictor."""
        return f"newton, rank {config.rank}"
