"""The stream operations on the CPU, in one pass of the compiled extension."""

import torch

from lesa_kernels.extension import extension
from lesa_kernels.stream.arguments import LowRank, StoredFeatures, Weights

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def has_extension(features: StoredFeatures) -> bool:
    """Whether the extension has a forecast from these features, which are checked: on a CPU, and not float8."""
    storage = features.storage
    strided = storage.stride(3) == 1 or storage.shape[3] == 1
    return storage.dtype in NAMES and storage.device.type == "cpu" and strided


def stream_forecast_extension(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> torch.Tensor:
    """`stream_forecast` for CPU tensors, without gradients; see there.

    The storage is float32, float16 or bfloat16. Its last dimension is contiguous; its other strides are arbitrary.
    Memory that holds no feature to be read is not read. The bytes are the same for any number of threads.
    """
    storage, _, cursor, count = features
    parts = [_readable(part) for part in weights]  # an address does not keep a tensor alive; this list does
    residual, (stages, rank) = _residual(low_rank)
    cursor, count = cursor.contiguous(), count.contiguous()
    output = torch.empty(storage.shape[1:], dtype=storage.dtype, device=storage.device)
    anchors, constant = weights.anchors, weights.constant
    extension().stream_forecast(
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
    return output


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
