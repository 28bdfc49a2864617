"""The stream operations: public functions, checks, and the choice of the backend."""

import torch

from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import argument_error, check_tensor
from lesa_kernels.dispatch import resolve_backend
from lesa_kernels.register import refuse_gradient, register
from lesa_kernels.stream.arguments import (
    NO_RESIDUAL,
    NO_SUMS,
    HeadSums,
    LowRank,
    OutputHead,
    StoredFeatures,
    Weights,
    stream_fits,
)
from lesa_kernels.stream.extension import (
    has_extension,
    has_fused_head,
    stream_forecast_extension,
    stream_velocity_extension,
)
from lesa_kernels.stream.fused import stream_backend, triton_forecast, triton_velocity
from lesa_kernels.stream.reference import head_sums_ref, output_head_ref, stream_forecast_ref, stream_velocity_ref


def stream_forecast(
    features: StoredFeatures, weights: Weights, low_rank: LowRank = NO_RESIDUAL, backend: str = "auto"
) -> torch.Tensor:
    """Adds up stored features with given weights: the forecast of one step.

        h = sum_{k<n} A_k * g_k + constant (+ up[s] @ sum_j down[s, :, j] @ t_j,  t_j = sum_k w_jk g_k)

    Here g_k is the k-th newest feature of the sample, and A, n, the constant, w and s are in `weights`.

    Args:
        features: the buffers of a `FeatureRing`, with features `[B, T, D]`.
        weights: of this step.
        low_rank: the residual, or `NO_RESIDUAL`.
        backend: "auto", "triton", "extension" (on a CPU, without float8) or "torch". Only plain torch has gradients:
            "auto" takes it where one is wanted.

    Returns:
        `[B, T, D]` in the dtype of the stored features, bfloat16 for float8. It is computed in float32, but Triton
        rounds the operands of the residual's matrix products to the dtype of the features (bfloat16 for float8). Where
        a residual needs more shared memory or registers than the GPU has, "auto" takes plain torch, and "triton" is an
        error.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than above; the message names it.
        RuntimeError: the backend can't run here, or has no gradients and one is wanted.

    Equivalent to `stream_forecast_ref`.

    Source: this project. The published forecasters differ only in how they make the weights.
    """
    check_stream(features, weights, low_rank)
    chosen = stream_backend(features, weights, low_rank, None, backend, "stream_forecast")
    if chosen == "triton":
        return triton_forecast(features, weights, low_rank)
    if chosen == "extension":
        return _on_cpu(features, weights, low_rank)
    return stream_forecast_ref(features, weights, low_rank)


def _stream_forecast_cpu(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> torch.Tensor:
    # The checks are here too, since the operator can be called without `stream_forecast`.
    check_stream(features, weights, low_rank)
    if not has_extension(features):
        must = "be float32, float16 or bfloat16, with a last stride of 1"
        raise argument_error("storage", must, features.storage, 'Pass backend="torch" to `stream_forecast`.')
    return stream_forecast_extension(features, weights, low_rank)


def _fake_forecast(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> torch.Tensor:
    return features.storage.new_empty(features.storage.shape[1:])


_on_cpu = register("stream_forecast_cpu", _stream_forecast_cpu, _fake_forecast, devices=("CPU",))
refuse_gradient("stream_forecast_cpu", "has no gradients: `stream_forecast()` uses plain torch for them", "on the CPU")


def stream_velocity(
    features: StoredFeatures,
    weights: Weights,
    head: OutputHead,
    low_rank: LowRank = NO_RESIDUAL,
    sums: HeadSums = NO_SUMS,
    backend: str = "auto",
) -> torch.Tensor:
    """A whole predicted step: the forecast of `stream_forecast`, and the output head applied to it.

    On Triton this is one kernel, which reads each feature once and writes only the velocities, if
    `stream_velocity_is_fused`. On the CPU the extension does the same for float32 features. Else it is the forecast,
    and the head in plain torch.

    Args:
        features, weights, low_rank, backend: as in `stream_forecast`.
        head: the head's weights and this step's modulation.
        sums: what `head_sums` gives for this head, or `NO_SUMS`: then it is computed in this call, if it is needed.
            Only Triton reads it, and only for a head with one modulation for each sample.

    Returns:
        `[B, T, O]` in the dtype of the stored features, bfloat16 for float8. It is computed in float32, but Triton
        rounds the operands of matrix products to the dtype of the features (bfloat16 for float8).

    Raises:
        ValueError, TypeError, RuntimeError: as in `stream_forecast`.

    Equivalent to::

        velocity = output_head(stream_forecast(features, weights, low_rank), head)

    Source: this project; it rearranges the norm and the projection around a low-rank sum.
    """
    check_stream(features, weights, low_rank)
    head.check(features.storage)
    chosen = stream_backend(features, weights, low_rank, head, backend, "stream_velocity")
    if chosen == "triton":
        return triton_velocity(features, weights, low_rank, head, sums)
    if chosen == "extension" and has_fused_head(features):
        return _velocity_on_cpu(features, weights, low_rank, head)
    if chosen == "extension":
        return output_head_ref(_on_cpu(features, weights, low_rank), head)
    return stream_velocity_ref(features, weights, head, low_rank)


def _stream_velocity_cpu(
    features: StoredFeatures, weights: Weights, low_rank: LowRank, head: OutputHead
) -> torch.Tensor:
    check_stream(features, weights, low_rank)
    head.check(features.storage)
    if not has_fused_head(features):
        must = "be float32, with at least one channel and a last stride of 1"
        raise argument_error("storage", must, features.storage, 'Pass backend="torch" to `stream_velocity`.')
    return stream_velocity_extension(features, weights, low_rank, head)


def _fake_velocity(features: StoredFeatures, weights: Weights, low_rank: LowRank, head: OutputHead) -> torch.Tensor:
    return features.storage.new_empty((*features.storage.shape[1:3], head.weight.shape[0]))


_velocity_on_cpu = register("stream_velocity_cpu", _stream_velocity_cpu, _fake_velocity, devices=("CPU",))
refuse_gradient("stream_velocity_cpu", "has no gradients: `stream_velocity()` uses plain torch for them", "on the CPU")


def check_stream(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> None:
    """Raises `TypeError` or `ValueError` unless all arguments of a forecast fit together."""
    if stream_fits(features, weights, low_rank):
        return
    features.check()
    weights.check(features)
    low_rank.check(features, weights)


def head_sums(
    head: OutputHead,
    low_rank: LowRank = NO_RESIDUAL,
    stage: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> HeadSums:
    """What a fused head needs once for each sample of a step, so that `stream_velocity` need not compute it.

    It can be computed for all steps of a run at once: pass a head whose modulation has the rows of all steps.

    Args:
        head: its modulation is one for each sample, `[B, D]`. With one for each token there is nothing to compute once.
        low_rank: the residual, or `NO_RESIDUAL`.
        stage: `[B]`, the rows of the residual, as in `Weights`; None without a residual.
        dtype: of the result's `weight`: that of the features, bfloat16 for float8. None is that of `head.weight`.

    Returns:
        The parts of `HeadSums`. `weight` has `O + R` rows of D channels for each sample, so it is by far the largest.
        `NO_SUMS` for a head with a modulation for each token.
    """
    if head.per_token:
        return NO_SUMS
    check_tensor("head.scale", head.scale, ("B", "D"), FLOAT_DTYPES)
    return head_sums_ref(head, low_rank, stage, dtype)


def output_head(features: torch.Tensor, head: OutputHead, backend: str = "auto") -> torch.Tensor:
    """Applies a transformer's output head to features: norm, modulation, then the projection.

    Args:
        features: `[B, T, D]`.
        head: the weights, and the modulation of this step.
        backend: "auto" or "torch".

    Returns:
        `[B, T, O]` in the dtype of `features`. It is computed in float32.

    Raises:
        ValueError, TypeError: a tensor has the wrong shape, device or dtype; the message names it.
        RuntimeError: the backend can't run here.

    Equivalent to, for a layer norm and one modulation for each sample::

        normed = F.layer_norm(features, features.shape[-1:], eps=head.eps)
        velocity = F.linear(normed * (1 + head.scale[:, None]) + head.shift[:, None], head.weight, head.bias)
    """
    check_tensor("features", features, ("B", "T", "D"), FLOAT_DTYPES)
    resolve_backend(backend, features, ("torch",), "output_head")
    head.check(features)
    return output_head_ref(features, head)
