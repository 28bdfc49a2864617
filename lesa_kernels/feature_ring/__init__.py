"""The ring of computed features, from which predictors forecast."""

from lesa_kernels.feature_ring.op import ring_gather, ring_push
from lesa_kernels.feature_ring.reference import ring_gather_ref, ring_push_ref
from lesa_kernels.feature_ring.ring import FeatureRing, RingSnapshot, ring_nbytes
from lesa_kernels.feature_ring.tiered import TieredRing, make_ring, shared_budget

__all__ = [
    "FeatureRing",
    "RingSnapshot",
    "TieredRing",
    "make_ring",
    "ring_gather",
    "ring_gather_ref",
    "ring_nbytes",
    "ring_push",
    "ring_push_ref",
    "shared_budget",
]
