"""Predictors that forecast the features of a predicted step from stored ones, with one KAN expert for each stage."""

from lesa_kernels.predictor.config import PredictorConfig
from lesa_kernels.predictor.module import FusedKANPredictor
from lesa_kernels.predictor.ops import dense_predict, newton_coefficients, newton_predict, newton_velocity

__all__ = [
    "FusedKANPredictor",
    "PredictorConfig",
    "dense_predict",
    "newton_coefficients",
    "newton_predict",
    "newton_velocity",
]
