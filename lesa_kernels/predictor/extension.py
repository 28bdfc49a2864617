"""`newton_predict` and `newton_coefficients` on the CPU, in the compiled extension."""

from typing import Any

import torch

from lesa_kernels.extension import extension
from lesa_kernels.predictor.arguments import NewtonExperts, RingState, Shape
from lesa_kernels.stream.arguments import Weights
from lesa_kernels.stream.extension import NAMES


def newton_predict_extension(ring: RingState, experts: NewtonExperts, shape: Shape) -> torch.Tensor:
    """`newton_predict` for CPU tensors, without gradients; see there.

    The storage is float32, float16 or bfloat16. Its last dimension is contiguous; its other strides are arbitrary.
    `scales` is None. Memory that holds no anchor is not read. The bytes are the same for any number of threads.
    """
    # The extension reads contiguous tensors. Those that are contiguous already are not copied. An address does not keep
    # a tensor alive, so these lists do until the call has returned.
    storage = ring.storage
    state = [tensor.contiguous() for tensor in (ring.sigmas, ring.cursor, ring.count, ring.sigma.to(torch.float32))]
    parameters = _readable(experts)
    output = torch.empty(storage.shape[1:], dtype=storage.dtype, device=storage.device)
    extension().newton_predict(
        storage.data_ptr(),
        NAMES[storage.dtype],
        storage.shape[:3],
        storage.stride()[:3],
        *[tensor.data_ptr() for tensor in state],
        *_described(parameters, shape),
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def newton_coefficients_extension(
    sigmas: torch.Tensor, count: torch.Tensor, sigma: torch.Tensor, experts: NewtonExperts, shape: Shape
) -> Weights:
    """`newton_coefficients` for CPU tensors, without gradients; see there."""
    steps, longest, width = sigma.shape, shape.longest, experts.out_bias.shape[2]
    state = [tensor.contiguous() for tensor in (sigmas, count, sigma)]
    parameters = _readable(experts)
    residual = experts.rank > 0
    made = Weights(
        anchors=sigma.new_empty(*steps, longest, width),
        count=torch.empty_like(state[1]),
        constant=None if experts.up_bias is None else sigma.new_empty(*steps, width),
        taps=sigma.new_empty(*steps, longest - 1, longest) if residual else None,
        stage=torch.empty_like(state[1]) if residual else None,
    )
    extension().newton_coefficients(
        *[tensor.data_ptr() for tensor in state],
        sigma.numel(),
        *_described(parameters, shape),
        *[0 if part is None else part.data_ptr() for part in made],
        torch.get_num_threads(),
    )
    return made


def _readable(experts: NewtonExperts) -> NewtonExperts:
    """The parameters as the extension reads them: float32 and contiguous."""
    made: Any = [None if part is None else part.to(torch.float32).contiguous() for part in experts]
    return NewtonExperts(*made)


def _described(experts: NewtonExperts, shape: Shape) -> tuple:
    """Addresses and sizes, in the order of the extension's arguments."""
    rank = 0 if experts.down is None else experts.down.shape[1]
    width, hidden = experts.out_bias.shape[2], experts.in_weight.shape[1]
    return (
        [0 if part is None else part.data_ptr() for part in experts],
        (width, hidden, rank, shape.grid_size, shape.spline_order),
        shape.stage_bounds,
        shape.history_length,
    )
