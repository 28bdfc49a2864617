"""Kernels that forecast the features of a diffusion transformer, so that most denoising steps need not be computed.

Public names are imported on first use. So `import lesa_kernels` works without torch, Triton, the compiled extension and
a GPU. A function that can't run here says why when it is called.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lesa_kernels.bspline_kan import BSplineKAN, bspline_basis, bspline_evaluate
    from lesa_kernels.feature_ring import FeatureRing, TieredRing, make_ring, ring_gather, ring_push
    from lesa_kernels.predictor import (
        FusedKANPredictor,
        PredictorConfig,
        dense_predict,
        newton_coefficients,
        newton_predict,
        newton_velocity,
    )
    from lesa_kernels.stream import (
        HeadSums,
        LowRank,
        OutputHead,
        StoredFeatures,
        Weights,
        head_sums,
        output_head,
        stream_forecast,
        stream_velocity,
    )

# None of these is the name of a submodule: an imported submodule would replace it. So the function `bspline_kan` is
# imported from the package of the same name.
_SOURCES = {
    "BSplineKAN": "lesa_kernels.bspline_kan",
    "bspline_basis": "lesa_kernels.bspline_kan",
    "bspline_evaluate": "lesa_kernels.bspline_kan",
    "FeatureRing": "lesa_kernels.feature_ring",
    "TieredRing": "lesa_kernels.feature_ring",
    "make_ring": "lesa_kernels.feature_ring",
    "ring_gather": "lesa_kernels.feature_ring",
    "ring_push": "lesa_kernels.feature_ring",
    "FusedKANPredictor": "lesa_kernels.predictor",
    "HeadSums": "lesa_kernels.stream",
    "LowRank": "lesa_kernels.stream",
    "OutputHead": "lesa_kernels.stream",
    "PredictorConfig": "lesa_kernels.predictor",
    "StoredFeatures": "lesa_kernels.stream",
    "Weights": "lesa_kernels.stream",
    "dense_predict": "lesa_kernels.predictor",
    "head_sums": "lesa_kernels.stream",
    "newton_coefficients": "lesa_kernels.predictor",
    "newton_predict": "lesa_kernels.predictor",
    "newton_velocity": "lesa_kernels.predictor",
    "output_head": "lesa_kernels.stream",
    "stream_forecast": "lesa_kernels.stream",
    "stream_velocity": "lesa_kernels.stream",
}

__version__ = "0.1.0"
__all__ = [  # written out, since type checkers read it; the same names as in _SOURCES
    "BSplineKAN",
    "FeatureRing",
    "FusedKANPredictor",
    "HeadSums",
    "LowRank",
    "OutputHead",
    "PredictorConfig",
    "StoredFeatures",
    "TieredRing",
    "Weights",
    "bspline_basis",
    "bspline_evaluate",
    "dense_predict",
    "head_sums",
    "make_ring",
    "newton_coefficients",
    "newton_predict",
    "newton_velocity",
    "output_head",
    "ring_gather",
    "ring_push",
    "stream_forecast",
    "stream_velocity",
]


def __getattr__(name: str) -> object:
    if name not in _SOURCES:
        raise AttributeError(f"module 'lesa_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(_SOURCES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_SOURCES])
