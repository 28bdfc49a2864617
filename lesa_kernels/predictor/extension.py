"""`newton_predict` on the CPU, in one pass of the compiled extension."""

import torch

from lesa_kernels.extension import extension

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_ADDRESSES = ("sigmas", "cursor", "count", "sigma", "in_weight", "in_bias", "spline", "out_weight", "out_bias")
_ADDRESSES += ("down", "up", "up_bias")


def newton_predict_extension(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    sigma: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    spline: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    stage_bounds: tuple[float, ...],
    history_length: tuple[int, ...],
    grid_size: int,
    spline_order: int,
) -> torch.Tensor:
    """`newton_predict` for CPU tensors, without gradients; see there.

    `storage` is float32, float16 or bfloat16, its last dimension contiguous and its other strides free; `scales` is
    None. Only anchors that are there are read. Gives the same bytes on any number of threads.
    """
    # The state and the experts as the extension reads them; what is so already is not copied. Held in names, since an
    # address keeps nothing alive.
    state = [tensor.contiguous() for tensor in (sigmas, cursor, count, sigma.to(torch.float32))]
    experts = [in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias]
    experts = [None if tensor is None else tensor.to(torch.float32).contiguous() for tensor in experts]
    output = torch.empty(storage.shape[1:], dtype=storage.dtype, device=storage.device)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*state, *experts)]
    extension().newton_predict(
        storage=storage.data_ptr(),
        storage_dtype=_NAMES[storage.dtype],
        storage_sizes=tuple(storage.shape),
        storage_strides=storage.stride()[:3],
        **dict(zip(_ADDRESSES, addresses)),
        hidden=in_weight.shape[1],
        rank=0 if down is None else down.shape[1],
        stage_bounds=stage_bounds,
        history_length=history_length,
        grid_size=grid_size,
        spline_order=spline_order,
        output=output.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return output
