"""The stream operations on Triton: when there is a kernel, and the operators of torch that launch it."""

import torch

from lesa_kernels.checks import argument_error
from lesa_kernels.dispatch import needs_gradient, resolve_backend, triton_error
from lesa_kernels.register import refuse_gradient, register
from lesa_kernels.stream.arguments import (
    NO_RESIDUAL,
    HeadSums,
    LowRank,
    OutputHead,
    StoredFeatures,
    Weights,
)
from lesa_kernels.stream.extension import has_extension
from lesa_kernels.stream.reference import forecast_dtype, head_sums_ref, output_head_ref, stream_forecast_ref


def stream_backend(
    features: StoredFeatures,
    weights: Weights,
    low_rank: LowRank,
    head: OutputHead | None,
    backend: str,
    operation: str,
) -> str:
    """The backend on which `stream_forecast`, or with a head `stream_velocity`, runs; see `resolve_backend`."""
    parts = () if head is None else (head.weight, head.bias, head.scale, head.shift)
    names: tuple[str, ...] = ("torch",)
    if needs_gradient(features.storage, features.scales, *weights, *low_rank, *parts):
        if backend == "triton":
            must = f'not be "triton" where a gradient is wanted, which {operation} does not have there'
            remedy = 'Pass backend="auto" or "torch", or call it under `torch.no_grad()`.'
            raise argument_error("backend", must, backend, remedy, RuntimeError)
    else:
        if has_extension(features):
            names = ("extension", *names)
        if _has_kernels(features, weights, low_rank):
            names = ("triton", *names)
    chosen = resolve_backend(backend, features.storage, names, operation)
    if backend == "triton" and (reason := why_no_residual(features, weights, low_rank)) is not None:
        remedy = 'Pass backend="auto" or "torch".'
        raise argument_error("backend", f'not be "triton" here: {reason}', backend, remedy, RuntimeError)
    return chosen


def why_no_residual(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> str | None:
    """Why Triton's kernels can't add the residual on this GPU, or None if they can."""
    if not low_rank.rank:
        return None
    from lesa_kernels.stream.kernels.sums import sums_launch

    launch = sums_launch(features, weights, None, low_rank.rank)
    return launch if isinstance(launch, str) else None


def _has_kernels(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> bool:
    """Whether Triton has kernels for such arguments: it has none for float64, and for channels that are apart."""
    storage = features.storage
    floats = (storage, weights.anchors, weights.constant, weights.taps, *low_rank)
    return all([part is None or part.dtype != torch.float64 for part in floats]) and _adjacent(storage)


def _adjacent(part: torch.Tensor) -> bool:
    """Whether the channels of a token are adjacent in memory."""
    return part.stride(-1) == 1 or part.shape[-1] == 1


def why_not_fused(
    features: StoredFeatures, weights: Weights, head: OutputHead, low_rank: LowRank = NO_RESIDUAL
) -> str | None:
    """Why the operator `stream_velocity` is not one kernel for these arguments, or None if it is.

    Args:
        features, weights, head, low_rank: as in `stream_velocity`.
    """
    if (reason := triton_error(features.device)) is not None:
        return reason
    if not _has_kernels(features, weights, low_rank):
        return "there are no kernels for float64, or for features whose channels are apart"
    if any(
        [part is not None and part.dtype == torch.float64 for part in (head.weight, head.bias, head.scale, head.shift)]
    ):
        return "there are no kernels for a head in float64"
    if head.per_token and low_rank.rank:
        return "the head has a modulation for each token, and the forecast has a residual"
    if head.per_token and not all([part is None or _adjacent(part) for part in (head.scale, head.shift)]):
        return "the head has a modulation for each token, whose channels are apart"
    from lesa_kernels.stream.kernels.sums import sums_launch

    launch = sums_launch(features, weights, head, low_rank.rank)
    return launch if isinstance(launch, str) else None


def stream_velocity_is_fused(
    features: StoredFeatures, weights: Weights, head: OutputHead, low_rank: LowRank = NO_RESIDUAL
) -> bool:
    """Whether `stream_velocity` on Triton is one kernel for these arguments, which are as there.

    It is, unless the head has a modulation for each token and the forecast has a residual, the head and the residual
    need more shared memory or registers than the GPU has, or the batch needs more than 32 MiB of scratch memory.
    """
    return why_not_fused(features, weights, head, low_rank) is None


def _stream_forecast(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> torch.Tensor:
    # The checks are here too, since the operator can be called without `stream_forecast`.
    features.check()
    features.check_channels()
    weights.check(features)
    low_rank.check(features, weights)
    if why_no_residual(features, weights, low_rank) is not None:
        return stream_forecast_ref(features, weights, low_rank)
    from lesa_kernels.stream.kernels.sums import stream_forecast_fwd

    out_dtype = forecast_dtype(features.storage.dtype)
    maps = _readable_maps(low_rank, out_dtype)
    return stream_forecast_fwd(_readable_features(features), _readable_weights(weights), maps, out_dtype)


def _stream_velocity(
    features: StoredFeatures, weights: Weights, low_rank: LowRank, head: OutputHead, sums: HeadSums
) -> torch.Tensor:
    features.check()
    features.check_channels()
    weights.check(features)
    low_rank.check(features, weights)
    head.check(features.storage)
    if why_not_fused(features, weights, head, low_rank) is not None:
        return output_head_ref(_stream_forecast(features, weights, low_rank), head)
    from lesa_kernels.stream.kernels.sums import stream_velocity_fwd

    out_dtype = forecast_dtype(features.storage.dtype)
    if head.per_token:
        sums = _plain_weights(head)
    else:
        sums.check(head, low_rank)
        if sums.ones is None or sums.weight is None or sums.weight.dtype != out_dtype:
            sums = head_sums_ref(head, low_rank, weights.stage, out_dtype)
        sums = HeadSums(*(None if part is None else part.contiguous() for part in sums))
    maps = _with_sums(_readable_maps(low_rank, out_dtype), low_rank)
    return stream_velocity_fwd(_readable_features(features), _readable_weights(weights), maps, head, sums, out_dtype)


def _plain_weights(head: OutputHead) -> HeadSums:
    """What a kernel that makes the sums of each token reads in their place: the weight and bias for each sample."""
    batch, (outputs, width) = head.scale.shape[0], head.weight.shape
    bias = None if head.bias is None else head.bias.contiguous().expand(batch, outputs)
    return HeadSums(None, bias, None, head.weight.contiguous().expand(batch, outputs, width))


def _readable_features(features: StoredFeatures) -> StoredFeatures:
    """The features as a kernel reads them. Only `storage`, which may be large, stays as it is."""
    storage, scales, cursor, count = features
    return StoredFeatures(
        storage, None if scales is None else scales.contiguous(), cursor.contiguous(), count.contiguous()
    )


def _readable_weights(weights: Weights) -> Weights:
    """The weights as a kernel reads them: those of each sample contiguous; the samples may be anywhere."""

    def readable(part):
        return part if part is None or len(part) == 0 or part[0].is_contiguous() else part.contiguous()

    return Weights(*map(readable, weights))


def _readable_maps(low_rank: LowRank, dtype: torch.dtype) -> LowRank:
    """The maps in the dtype of matrix products, contiguous."""
    if not low_rank.rank or low_rank.down is None or low_rank.up is None:
        return NO_RESIDUAL
    square, total = low_rank.square, low_rank.total
    return LowRank(
        low_rank.down.to(dtype).contiguous(),
        low_rank.up.to(dtype).contiguous(),
        None if square is None else square.contiguous(),
        None if total is None else total.contiguous(),
    )


def _with_sums(maps: LowRank, low_rank: LowRank) -> LowRank:
    """The maps with the sums that a fused head needs, of V as it is in the products."""
    if not maps.rank or maps.up is None or (maps.square is not None and maps.total is not None):
        return maps
    up = maps.up.float()
    return LowRank(maps.down, maps.up, up.mT @ up, up.sum(1))


def _fake_forecast(features: StoredFeatures, *_) -> torch.Tensor:
    storage = features.storage
    return storage.new_empty(storage.shape[1:], dtype=forecast_dtype(storage.dtype))


def _fake_velocity(
    features: StoredFeatures, weights: Weights, low_rank: LowRank, head: OutputHead, sums: HeadSums
) -> torch.Tensor:
    _, batch, tokens, _ = features.storage.shape
    return features.storage.new_empty(
        (batch, tokens, head.weight.shape[0]), dtype=forecast_dtype(features.storage.dtype)
    )


triton_forecast = register("stream_forecast", _stream_forecast, _fake_forecast)
triton_velocity = register("stream_velocity", _stream_velocity, _fake_velocity)
for _name in ("stream_forecast", "stream_velocity"):
    refuse_gradient(_name, "has no gradients")
