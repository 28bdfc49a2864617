"""Plain torch definitions of the predictors. Every kernel is tested against them.

The forecasts read the buffers of a `FeatureRing`. All functions compute in float32 (in float64 for float64 features),
also under autocast. They return the dtype of the features, or bfloat16 for float8 features.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lesa_kernels.bspline_kan.reference import bspline_evaluate
from lesa_kernels.feature_ring.reference import dequantise_float8, newest_slots
from lesa_kernels.predictor.arguments import DenseExperts, Experts, NewtonExperts, RingState, Shape

# Offsets between noise levels are multiplied by five for the KAN, so that usual gaps use most of the grid.
OFFSET_SCALE = 5.0


@dataclass(frozen=True)
class OutputHead:
    """A transformer's output head: an AdaLN without affine weights, then a linear projection.

    Args:
        weight: `[O, D]` of the projection.
        bias: `[O]` or None.
        scale: `[B, D]`; the modulation is `(1 + scale) * LN(h) + shift`.
        shift: `[B, D]`.
        eps: of the layer norm.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor
    shift: torch.Tensor
    eps: float = 1e-6


def stage_index(sigma: torch.Tensor, stage_bounds: tuple[float, ...]) -> torch.Tensor:
    """The stage of each sample: how many bounds are at or above its noise level. `[B]` -> `[B]`, int64."""
    stage = torch.zeros_like(sigma, dtype=torch.int64)
    for bound in stage_bounds:  # numbers: a tensor of bounds would have to be copied to the device
        stage += sigma <= bound
    return stage


def of_stage(stage: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """`values[stage]` without waiting for the device: `[B]` int64 -> `[B]` int64."""
    found = torch.zeros_like(stage)
    for number, value in enumerate(values):
        found += (stage == number) * value
    return found


def forecast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a forecast of features stored in `dtype`: the same, but bfloat16 for float8."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


def _compute_dtype(storage: torch.Tensor) -> torch.dtype:
    return torch.promote_types(forecast_dtype(storage.dtype), torch.float32)


def newton_weights(anchor_sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The weight of each anchor in each Newton tap: `tap_j = sum_k weights[b, j - 1, k] * g_k`.

    `tap_j = D_j * prod_{q<j} (sigma - s_q)` with the divided difference
    `D_j = sum_{k<=j} g_k / prod_{q<=j, q!=k} (s_k - s_q)`.

    Args:
        anchor_sigmas: `[K, B]`, newest first, strictly rising over the first `count` entries.
        count: `[B]`, number of anchors that exist; taps `j >= count` are zero.
        sigma: `[B]`, the target's noise level.

    Returns:
        `[B, K - 1, K]`.
    """
    s = anchor_sigmas.T  # [B, K]
    taps = s.shape[1]
    order = torch.arange(taps, device=s.device)
    missing = order >= count[:, None]  # [B, K]
    differences = s[:, :, None] - s[:, None, :]
    one = missing[:, :, None] | missing[:, None, :] | torch.eye(taps, dtype=torch.bool, device=s.device)
    denominator = differences.masked_fill(one, 1.0).cumprod(-1)[:, :, 1:]  # [B, k, j], product over q <= j
    numerator = (sigma[:, None] - s).cumprod(-1)[:, :-1]  # [B, j], product over q < j
    unused = missing[:, 1:, None] | (order[None, :] > order[1:, None])  # tap j reads the anchors 0 ... j
    return (numerator[:, None, :] / denominator).transpose(1, 2).masked_fill(unused, 0.0)


def kan_hidden(
    inputs: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    spline: torch.Tensor,
    grid_size: int,
    spline_order: int,
) -> torch.Tensor:
    """Values of the M learnable univariate functions: `phi_m(u) + silu(u)` at `u = tanh(in_weight @ inputs + in_bias)`.

    Args:
        inputs: `[B, I]`.
        in_weight, in_bias: `[M, I]`, `[M]`.
        spline: `[M, grid_size + spline_order]`, coefficients on a uniform grid over [-1, 1].

    Returns:
        `[B, M]`.
    """
    u = torch.tanh(F.linear(inputs, in_weight, in_bias))
    return bspline_evaluate(u, spline, grid_size, spline_order, (-1.0, 1.0)) + F.silu(u)


def _without_history(forecast, count):
    """The forecast, with NaN in rows without any history, for which the ring's memory was never written."""
    return forecast.masked_fill((count == 0)[:, None, None], float("nan"))


class _Stage(NamedTuple):
    """The samples of a batch that are in one stage.

    Args:
        number: of the stage.
        rows: of the samples in the batch; `slice(None)` if all are in this stage, which saves copies.
        features: `[K, B, T, D]`, newest first; K is the history length of the stage, B the number of samples.
        sigmas: `[K, B]`, the noise levels of the features.
        there: `[B]`, how many of the features exist.
        target: `[B]`, the noise level to forecast.
    """

    number: int
    rows: torch.Tensor | slice
    features: torch.Tensor
    sigmas: torch.Tensor
    there: torch.Tensor
    target: torch.Tensor


def _stages(ring: RingState, shape: Shape) -> Iterator[_Stage]:
    """Divides the batch by stage; yields each stage that occurs."""
    storage, scales, sigmas, cursor, count, sigma = ring
    dtype = _compute_dtype(storage)
    sigma = sigma.float()
    slots = newest_slots(cursor, count, storage.shape[0])  # [capacity, B]
    stage = stage_index(sigma, shape.stage_bounds)
    present = stage.unique().tolist()
    for number in present:
        here = (stage == number).nonzero().squeeze(1)
        rows = slice(None) if len(present) == 1 else here
        newest = slots[: shape.history_length[number], rows]
        features, levels = storage[newest, here], sigmas[newest, here].to(dtype)
        if scales is not None:
            features = dequantise_float8(features, scales[newest, here])
        features = features.to(dtype)
        yield _Stage(number, rows, features, levels, count[rows], sigma[rows].to(dtype))


def _without_autocast(function):
    """Switches autocast off in `function`, whose first argument has a device."""

    @functools.wraps(function)
    def wrapper(first, *args):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return wrapper


def _offsets(stage: _Stage, width: int) -> torch.Tensor:
    """The KAN's inputs `[B, width]`: scaled offsets of the target to its anchors; zero for a missing one and beyond.

    No anchor has the offset zero.
    """
    missing = torch.arange(len(stage.sigmas), device=stage.target.device)[:, None] >= stage.there
    inputs = stage.sigmas.new_zeros(len(stage.target), width)
    offsets = ((stage.target - stage.sigmas) * OFFSET_SCALE).masked_fill(missing, 0.0).T
    inputs[:, : len(stage.sigmas)] = offsets
    return inputs


def _hidden(inputs: torch.Tensor, experts: Experts, shape: Shape, stage: int) -> torch.Tensor:
    """`kan_hidden` of one stage's expert, in the dtype of `inputs`."""
    weight, bias = experts.in_weight[stage].to(inputs.dtype), experts.in_bias[stage].to(inputs.dtype)
    return kan_hidden(inputs, weight, bias, experts.spline[stage].to(inputs.dtype), shape.grid_size, shape.spline_order)


@_without_autocast
def newton_predict_ref(
    ring: RingState,
    experts: NewtonExperts,
    shape: Shape,
) -> torch.Tensor:
    """Plain torch form of `newton_predict`; see there."""
    dtype = _compute_dtype(ring.storage)
    output = torch.empty(ring.storage.shape[1:], dtype=dtype, device=ring.device)
    for stage in _stages(ring, shape):
        number, g, s = stage.number, stage.features, stage.sigmas
        inputs = _offsets(stage, experts.in_weight.shape[2])
        inputs[:, -1] = 2 * stage.target - 1
        hidden = _hidden(inputs, experts, shape, number)
        taps = len(s) - 1
        weight, bias = experts.out_weight[number, :taps].to(dtype), experts.out_bias[number, :taps].to(dtype)
        coefficients = torch.einsum("bm,jdm->bjd", hidden, weight) + bias  # [B, K-1, D]
        weights = newton_weights(s, stage.there, stage.target)  # [B, K-1, K]
        anchor_weights = torch.einsum("bjd,bjk->kbd", coefficients, weights)
        forecast = g[0]
        for anchor_weight, feature in zip(anchor_weights, g):
            forecast = torch.addcmul(forecast, anchor_weight[:, None], feature)
        if (residual := experts.residual) is not None:
            # The residual's input is linear in the anchors too: one small matrix per anchor, none per tap.
            projections = torch.einsum("rjd,bjk->kbdr", residual.down[number, :, :taps].to(dtype), weights)
            read = sum(feature @ projection for feature, projection in zip(g, projections))
            up, up_bias = residual.up[number].to(dtype), residual.up_bias[number].to(dtype)
            forecast = forecast + F.linear(read, up, up_bias)
        output[stage.rows] = _without_history(forecast, stage.there)
    return output.to(forecast_dtype(ring.storage.dtype))


@_without_autocast
def dense_predict_ref(
    ring: RingState,
    experts: DenseExperts,
    shape: Shape,
) -> torch.Tensor:
    """Plain torch form of `dense_predict`; see there."""
    dtype = _compute_dtype(ring.storage)
    output = torch.empty(ring.storage.shape[1:], dtype=dtype, device=ring.device)
    for stage in _stages(ring, shape):
        number, g = stage.number, stage.features
        hidden = _hidden(_offsets(stage, experts.in_weight.shape[2]), experts, shape, number)
        alpha = hidden @ experts.out_weight[number].to(dtype) + experts.out_bias[number].to(dtype)  # [B]
        first = sum(shape.history_length[:number])
        maps = experts.mix_weight[first : first + len(g)].to(dtype)
        # A missing entry repeats the oldest one.
        mixed = experts.mix_bias[number].to(dtype) + sum(F.linear(feature, weight) for feature, weight in zip(g, maps))
        output[stage.rows] = _without_history(g[0] + alpha[:, None, None] * mixed, stage.there)
    return output.to(forecast_dtype(ring.storage.dtype))


@_without_autocast
def output_head_ref(features: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Plain torch form of `output_head`; see there."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    normed = F.layer_norm(features.to(dtype), features.shape[-1:], eps=head.eps)
    modulated = normed * (1 + head.scale.to(dtype))[:, None] + head.shift.to(dtype)[:, None]
    bias = None if head.bias is None else head.bias.to(dtype)
    return F.linear(modulated, head.weight.to(dtype), bias).to(features.dtype)


def newton_velocity_ref(
    ring: RingState,
    experts: NewtonExperts,
    head: OutputHead,
    shape: Shape,
) -> torch.Tensor:
    """Plain torch form of `newton_velocity`; see there."""
    return output_head_ref(newton_predict_ref(ring, experts, shape), head)
