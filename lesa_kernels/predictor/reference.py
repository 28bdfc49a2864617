"""Plain torch definitions of the predictors. Every kernel is tested against them.

The forecasts read the buffers of a `FeatureRing`. All functions compute in float32 (in float64 for float64 features),
also under autocast. They return the dtype of the features, or bfloat16 for float8 features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lesa_kernels.bspline_kan.reference import bspline_evaluate
from lesa_kernels.feature_ring.reference import dequantise_float8, newest_slots
from lesa_kernels.predictor.arguments import DenseExperts, Experts, NewtonExperts, RingState, Shape
from lesa_kernels.stages import of_stage, stage_index
from lesa_kernels.stream.arguments import OutputHead, StoredFeatures, Weights
from lesa_kernels.stream.reference import (
    compute_dtype,
    forecast_dtype,
    output_head_ref,
    stream_forecast_ref,
    without_autocast,
)

# Offsets between noise levels are multiplied by five for the KAN, so that usual gaps use most of the grid.
OFFSET_SCALE = 5.0


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
    dtype = compute_dtype(storage)
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


def newton_coefficients_ref(
    sigmas: torch.Tensor,
    count: torch.Tensor,
    sigma: torch.Tensor,
    experts: NewtonExperts,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Plain torch form of `newton_coefficients`; see there. It computes in `dtype`."""
    with torch.autocast(sigmas.device.type, enabled=False):
        steps, history = sigma.shape, sigmas.shape[-1]
        target, levels = sigma.flatten().float(), sigmas.flatten(0, -2).to(dtype)  # [N], [N, K] with N = P B
        stage = stage_index(target, shape.stage_bounds)
        target = target.to(dtype)
        there = torch.minimum(count.flatten(), of_stage(stage, shape.history_length))
        order = torch.arange(history, device=levels.device)
        offsets = ((target[:, None] - levels) * OFFSET_SCALE).masked_fill(order >= there[:, None], 0.0)
        inputs = torch.cat([offsets, 2 * target[:, None] - 1], 1)
        taps = newton_weights(levels.T, there, target)  # [N, K - 1, K]
        anchors = (order == 0).to(dtype)[:, None].expand(len(target), history, experts.out_bias.shape[2])
        for number in range(shape.stages):  # all of them: to find out which occur would wait for the device
            hidden = _hidden(inputs, experts, shape, number)
            weight, bias = experts.out_weight[number].to(dtype), experts.out_bias[number].to(dtype)
            coefficients = torch.einsum("nm,jdm->njd", hidden, weight) + bias
            here = (stage == number)[:, None, None]
            anchors = anchors + torch.einsum("njd,njk->nkd", coefficients, taps).masked_fill(~here, 0.0)
        has_residual = experts.rank > 0
        constant = None if experts.up_bias is None else experts.up_bias.to(dtype)[stage].unflatten(0, steps)
        return Weights(
            anchors.unflatten(0, steps),
            there.to(torch.int32).unflatten(0, steps),
            constant,
            taps.unflatten(0, steps) if has_residual else None,
            stage.to(torch.int32).unflatten(0, steps) if has_residual else None,
        )


@without_autocast
def newton_predict_ref(
    ring: RingState,
    experts: NewtonExperts,
    shape: Shape,
) -> torch.Tensor:
    """Plain torch form of `newton_predict`; see there."""
    storage, scales, sigmas, cursor, count, sigma = ring.with_sigma_of_each()
    slots = newest_slots(cursor, count, storage.shape[0])[: shape.longest]
    levels = sigmas.gather(0, slots.long()).T[None]  # [1, B, K]
    dtype = compute_dtype(storage)
    weights = newton_coefficients_ref(levels, count[None], sigma[None], experts, shape, dtype)
    rest = [None if value is None else value[0] for value in weights[2:]]
    step = Weights(weights.anchors[0], weights.count[0], *rest)
    return stream_forecast_ref(StoredFeatures(storage, scales, cursor, count), step, experts.low_rank)


@without_autocast
def dense_predict_ref(
    ring: RingState,
    experts: DenseExperts,
    shape: Shape,
) -> torch.Tensor:
    """Plain torch form of `dense_predict`; see there."""
    dtype = compute_dtype(ring.storage)
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


def newton_velocity_ref(
    ring: RingState,
    experts: NewtonExperts,
    head: OutputHead,
    shape: Shape,
) -> torch.Tensor:
    """Plain torch form of `newton_velocity`; see there."""
    return output_head_ref(newton_predict_ref(ring, experts, shape), head)
