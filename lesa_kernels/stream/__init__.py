"""The weighted sum of stored features, alone or with the output head: one pass over the features for each step."""

from lesa_kernels.stream.arguments import (
    NO_RESIDUAL,
    NO_SUMS,
    HeadSums,
    LowRank,
    OutputHead,
    StoredFeatures,
    Weights,
)
from lesa_kernels.stream.fused import stream_velocity_is_fused
from lesa_kernels.stream.op import head_sums, output_head, stream_forecast, stream_velocity

__all__ = [
    "HeadSums",
    "LowRank",
    "NO_RESIDUAL",
    "NO_SUMS",
    "OutputHead",
    "StoredFeatures",
    "Weights",
    "head_sums",
    "output_head",
    "stream_forecast",
    "stream_velocity",
    "stream_velocity_is_fused",
]
