"""`newton_predict` on the CPU, in one pass of the compiled extension."""

import torch

from lesa_kernels.extension import extension
from lesa_kernels.predictor.arguments import NewtonExperts, RingState, Shape

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_ADDRESSES = ("sigmas", "cursor", "count", "sigma", *NewtonExperts._fields)


def newton_predict_extension(ring: RingState, experts: NewtonExperts, shape: Shape) -> torch.Tensor:
    """`newton_predict` for CPU tensors, without gradients; see there.

    The storage is float32, float16 or bfloat16. Its last dimension is contiguous; its other strides are arbitrary.
    `scales` is None. Memory that holds no anchor is not read. The bytes are the same for any number of threads.
    """
    # The extension reads contiguous tensors. Those that are contiguous already are not copied. An address does not keep
    # a tensor alive, so these lists do until the call has returned.
    storage = ring.storage
    state = [tensor.contiguous() for tensor in (ring.sigmas, ring.cursor, ring.count, ring.sigma.to(torch.float32))]
    parameters = [None if part is None else part.to(torch.float32).contiguous() for part in experts]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*state, *parameters)]
    output = torch.empty(storage.shape[1:], dtype=storage.dtype, device=storage.device)
    extension().newton_predict(
        storage=storage.data_ptr(),
        storage_dtype=_NAMES[storage.dtype],
        storage_sizes=tuple(storage.shape),
        storage_strides=storage.stride()[:3],
        **dict(zip(_ADDRESSES, addresses)),
        hidden=experts.in_weight.shape[1],
        rank=0 if experts.down is None else experts.down.shape[1],
        stage_bounds=shape.stage_bounds,
        history_length=shape.history_length,
        grid_size=shape.grid_size,
        spline_order=shape.spline_order,
        output=output.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return output
