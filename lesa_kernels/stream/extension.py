"""The stream operations on the CPU, in one pass of the compiled extension."""

from collections.abc import Callable

import torch

from lesa_kernels.extension import extension
from lesa_kernels.stream.arguments import LowRank, OutputHead, StoredFeatures, Weights

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def has_extension(features: StoredFeatures) -> bool:
    """Whether the extension has a forecast from these features, which are checked: on a CPU, and not float8."""
    storage = features.storage
    strided = storage.stride(3) == 1 or storage.shape[3] == 1
    return storage.dtype in NAMES and storage.device.type == "cpu" and strided


def has_fused_head(features: StoredFeatures) -> bool:
    """Whether the extension has one pass for a forecast from these features and the output head: in float32 only."""
    return features.storage.dtype == torch.float32 and features.storage.shape[3] > 0 and has_extension(features)


def stream_forecast_extension(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> torch.Tensor:
    """`stream_forecast` for CPU tensors, without gradients; see there.

    The storage is float32, float16 or bfloat16. Its last dimension is contiguous; its other strides are arbitrary.
    Memory that holds no feature to be read is not read. The bytes are the same for any number of threads.
    """
    output = features.storage.new_empty(features.storage.shape[1:])
    _call(extension().stream_forecast, (), features, weights, low_rank, output)
    return output


def stream_velocity_extension(
    features: StoredFeatures, weights: Weights, low_rank: LowRank, head: OutputHead
) -> torch.Tensor:
    """`stream_velocity` for CPU tensors, without gradients; see there. The storage is as `has_fused_head` says.

    The forecast of a few tokens at a time stays in the caches. The bytes are the same for any number of threads.
    """
    weight = head.weight.to(torch.float32).contiguous()
    bias, scale, shift = (_float32(part) for part in (head.bias, head.scale, head.shift))
    outputs, parts = weight.shape[0], (weight, bias, scale, shift)  # an address does not keep a tensor alive
    output = features.storage.new_empty((*features.storage.shape[1:3], outputs))
    addresses = [0 if part is None else part.data_ptr() for part in parts]
    first = (outputs, addresses, [*_apart(scale), *_apart(shift)], head.eps, head.norm or "none")
    _call(extension().stream_velocity, first, features, weights, low_rank, output)
    return output


def _float32(part: torch.Tensor | None) -> torch.Tensor | None:
    """A part of a head in float32, with adjacent channels."""
    if part is None:
        return None
    part = part.to(torch.float32)
    return part if part.stride(-1) == 1 else part.contiguous()


def _apart(modulation: torch.Tensor | None) -> tuple[int, int]:
    """The strides of a modulation between samples and between tokens."""
    if modulation is None:
        return 0, 0
    return modulation.stride(0), modulation.stride(1) if modulation.dim() == 3 else 0


def _call(
    function: Callable,
    first: tuple,
    features: StoredFeatures,
    weights: Weights,
    low_rank: LowRank,
    output: torch.Tensor,
) -> None:
    """Calls a compiled function with the arguments `first`, and then those of all stream operations."""
    storage, _, cursor, count = features
    parts = [_readable(part) for part in weights]  # an address does not keep a tensor alive; this list does
    residual, (stages, rank) = _residual(low_rank)
    cursor, count = cursor.contiguous(), count.contiguous()
    anchors, constant = weights.anchors, weights.constant
    function(
        *first,
        storage.data_ptr(),
        NAMES[storage.dtype],
        storage.shape,
        storage.stride()[:3],
        cursor.data_ptr(),
        count.data_ptr(),
        anchors.shape[1],
        [0 if part is None else part.data_ptr() for part in parts],
        [0 if part is None else part.stride(0) for part in parts],
        anchors.dim() == 3,
        constant is not None and constant.dim() == 2,
        stages,
        rank,
        *[part.data_ptr() for part in residual] or (0, 0),
        NAMES[residual[0].dtype] if residual else "float32",
        output.data_ptr(),
        torch.get_num_threads(),
    )


def _residual(low_rank: LowRank) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """The maps as the extension reads them, in one dtype, and their numbers of stages and rank."""
    down, up = low_rank.down, low_rank.up
    if down is None or up is None or not low_rank.rank:
        return [], (0, 0)
    if down.dtype not in NAMES or down.dtype != up.dtype:
        down, up = down.to(torch.float32), up.to(torch.float32)
    return [down.contiguous(), up.contiguous()], (down.shape[0], down.shape[1])


def _readable(part: torch.Tensor | None) -> torch.Tensor | None:
    """Weights as the extension reads them: float32 or int32, and contiguous but for the samples."""
    if part is None:
        return None
    if part.dtype == torch.float64:
        part = part.to(torch.float32)
    return part if part.is_contiguous() or _sample(part).is_contiguous() else part.contiguous()


def _sample(part: torch.Tensor) -> torch.Tensor:
    return part[0] if part.shape[0] else part
