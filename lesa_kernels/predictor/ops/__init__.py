"""The public functions of the predictors, and the operators that torch knows them by."""

from lesa_kernels.predictor.ops.coefficients import newton_coefficients
from lesa_kernels.predictor.ops.dense import dense_predict
from lesa_kernels.predictor.ops.newton import newton_predict
from lesa_kernels.predictor.ops.velocity import newton_velocity

__all__ = ["dense_predict", "newton_coefficients", "newton_predict", "newton_velocity"]
