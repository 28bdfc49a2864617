"""The definition of the stream operations in plain torch. Every kernel is tested against it.

All functions compute in float32, or in float64 for float64 features, also under autocast.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lesa_kernels.feature_ring.reference import dequantise_float8, newest_slots
from lesa_kernels.stream.arguments import HeadSums, LowRank, OutputHead, StoredFeatures, Weights


def forecast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a forecast of features stored in `dtype`: the same, but bfloat16 for float8."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


def compute_dtype(storage: torch.Tensor) -> torch.dtype:
    """The dtype in which forecasts of these features are computed: float32, or float64 for float64."""
    return torch.promote_types(forecast_dtype(storage.dtype), torch.float32)


def without_autocast(function: Callable) -> Callable:
    """Switches autocast off in `function`, whose first argument has a device."""

    @functools.wraps(function)
    def wrapper(first: Any, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return wrapper


def read_anchors(features: StoredFeatures, count: torch.Tensor, history: int) -> list[torch.Tensor]:
    """The `history` newest features, each `[B, T, D]` in `compute_dtype`. Of a row, only `count` features are read.

    Beyond these, the last one is repeated.
    """
    storage, scales, cursor, _ = features
    slots = newest_slots(cursor, count, storage.shape[0])[:history]
    rows = torch.arange(storage.shape[1], device=storage.device)
    anchors = []
    for slot in slots:
        feature = storage[slot, rows]
        anchors.append(feature if scales is None else dequantise_float8(feature, scales[slot, rows]))
    return [anchor.to(compute_dtype(storage)) for anchor in anchors]


@without_autocast
def stream_forecast_ref(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> torch.Tensor:
    """Plain torch form of `stream_forecast`; see there."""
    dtype = compute_dtype(features.storage)
    there = torch.where(weights.count > features.count, 0, weights.count).clamp_min(0)
    anchors = read_anchors(features, there, weights.anchors.shape[1])
    exist = torch.arange(len(anchors), device=features.device) < there[:, None]  # [B, K]
    per_channel = weights.anchors.ndim == 3
    scaled = weights.anchors.to(dtype).masked_fill(~(exist[..., None] if per_channel else exist), 0.0)
    forecast = torch.zeros((), dtype=dtype, device=features.device)
    for weight, anchor in zip(scaled.unbind(1), anchors):
        forecast = torch.addcmul(forecast, weight[:, None] if per_channel else weight[:, None, None], anchor)
    if weights.constant is not None:
        constant = weights.constant.to(dtype)
        forecast = forecast + (constant[:, None] if constant.ndim == 2 else constant[:, None, None])
    if low_rank.rank and low_rank.down is not None and low_rank.up is not None and weights.taps is not None:
        stage = _index(weights.stage)
        taps = weights.taps.to(dtype).masked_fill(~exist[:, None], 0.0).tril(1)
        # The residual's input is linear in the anchors too: one small matrix per anchor, none per tap.
        maps = torch.einsum("brjd,bjk->kbdr", low_rank.down.to(dtype)[stage], taps)
        read = sum(
            (anchor @ each for anchor, each in zip(anchors, maps)), torch.zeros((), dtype=dtype, device=features.device)
        )
        forecast = forecast + read @ low_rank.up.to(dtype)[stage].mT
    forecast = forecast.masked_fill((there == 0)[:, None, None], float("nan"))
    return forecast.to(forecast_dtype(features.storage.dtype))


def _index(stage: torch.Tensor | None) -> torch.Tensor:
    if stage is None:
        raise TypeError("a residual needs the stage of each sample")
    return stage.long()


@without_autocast
def output_head_ref(features: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Plain torch form of `output_head`; see there."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    modulated = _normed(features.to(dtype), head) * (1 + _per_token(head.scale, dtype))
    if head.shift is not None:
        modulated = modulated + _per_token(head.shift, dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    return F.linear(modulated, head.weight.to(dtype), bias).to(features.dtype)


def _normed(features: torch.Tensor, head: OutputHead) -> torch.Tensor:
    if head.norm is None:
        return features
    norm = F.layer_norm if head.norm == "layer" else F.rms_norm
    return norm(features, features.shape[-1:], eps=head.eps)


def _per_token(modulation: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (modulation if modulation.ndim == 3 else modulation[:, None]).to(dtype)


def stream_velocity_ref(
    features: StoredFeatures, weights: Weights, head: OutputHead, low_rank: LowRank
) -> torch.Tensor:
    """Plain torch form of `stream_velocity`; see there."""
    return output_head_ref(stream_forecast_ref(features, weights, low_rank), head)


def head_sums_ref(
    head: OutputHead, low_rank: LowRank, stage: torch.Tensor | None, dtype: torch.dtype | None = None
) -> HeadSums:
    """Plain torch form of `head_sums`; see there."""
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    with torch.autocast(head.weight.device.type, enabled=False):
        plain, scaled = head.weight.to(wide), 1 + head.scale.to(wide)
        rows = (plain * scaled[:, None]).to(dtype or head.weight.dtype)  # [B, O, D]
        # The others are sums of the rounded rows, so that what should cancel does.
        rounded = rows.to(wide)
        ones = rounded.sum(2)
        constant = torch.zeros_like(ones) if head.shift is None else head.shift.to(wide) @ plain.T
        if head.bias is not None:
            constant = constant + head.bias.to(wide)
        through = None
        if low_rank.rank and low_rank.up is not None:
            up = low_rank.up[_index(stage)].to(rows.dtype)  # [B, D, R]
            through = up.to(wide).mT @ rounded.mT
            rows = torch.cat((rows, up.mT), 1)
    return HeadSums(ones, constant, through, rows)
