"""The weight of the KAN layer as its Triton kernels read it, and where a layer keeps it between calls."""

from typing import NamedTuple

import torch


def pack_weight(
    base_weight: torch.Tensor, spline_weight: torch.Tensor, spline_scaler: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`[1 + G + p, in, out]` contiguous in `dtype`: the base weights, then those of each basis; see `bspline_kan`."""
    if spline_scaler is not None:
        spline_weight = spline_weight * spline_scaler.unsqueeze(-1)
    # The kernels read adjacent outputs.
    return torch.cat([base_weight.to(dtype).T.unsqueeze(0), spline_weight.to(dtype).permute(2, 1, 0)]).contiguous()


class _Kept(NamedTuple):
    """A packed weight, and what it was made of.

    `sources` share the memory of the parameters, so that no other tensor can get the same address.
    """

    key: tuple
    sources: list[torch.Tensor]
    weight: torch.Tensor


class PackedWeight:
    """The packed weight of one layer, kept from one call to the next as long as its parameters stay the same.

    Nothing is kept where it would be wrong or could become wrong without notice: if gradients of the parameters are
    wanted, while torch compiles the layer or captures a CUDA graph, and for inference tensors, which do not count their
    changes. A copy or a pickle of this object is empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def clear(self) -> None:
        """Forgets the packed weight and frees its memory."""
        self._kept = None

    def get(
        self,
        base_weight: torch.Tensor,
        spline_weight: torch.Tensor,
        spline_scaler: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """What `pack_weight` returns for these tensors, from an earlier call if it still holds."""
        tensors = [tensor for tensor in (base_weight, spline_weight, spline_scaler) if tensor is not None]
        if not _may_be_kept(tensors):
            return pack_weight(base_weight, spline_weight, spline_scaler, dtype)
        try:
            key = (dtype, _stream(base_weight.device), *map(_state, tensors))
        except RuntimeError:  # tensors without memory of their own, such as those of torch.func
            return pack_weight(base_weight, spline_weight, spline_scaler, dtype)
        kept = self._kept
        if kept is not None and kept.key == key:
            return kept.weight
        with torch.inference_mode(False), torch.no_grad():  # a result that autograd takes too, later
            weight = pack_weight(base_weight, spline_weight, spline_scaler, dtype)
            sources = [tensor.detach() for tensor in tensors]
        if type(weight) is torch.Tensor:  # not that of a mode or a subclass, which ends some time
            self._kept = _Kept(key, sources, weight)
        return weight

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        return PackedWeight()

    def __reduce__(self) -> tuple:
        return PackedWeight, ()


def _may_be_kept(tensors: list[torch.Tensor]) -> bool:
    if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    # A graph packs the weight itself: at a replay the parameters may have changed, or a kept weight may be gone.
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _stream(device: torch.device) -> int:
    # Another stream would read the weight without waiting until it is made.
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _state(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device, tensor.shape, tensor.stride()
