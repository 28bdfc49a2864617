"""The output head applied to features: the public function and its checks."""

import torch

from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import check_tensor
from lesa_kernels.dispatch import resolve_backend
from lesa_kernels.predictor.reference import OutputHead, output_head_ref


def output_head(features: torch.Tensor, head: OutputHead, backend: str = "auto") -> torch.Tensor:
    """Applies a transformer's output head to features: AdaLN, then the projection.

    Args:
        features: `[B, T, D]`.
        head: the weights, and the modulation of this step.
        backend: "auto" or "torch".

    Returns:
        `[B, T, O]` in the dtype of `features`. It is computed in float32.

    Raises:
        ValueError, TypeError: a tensor has the wrong shape, device or dtype; the message names it.
        RuntimeError: the backend can't run here.

    Equivalent to::

        normed = F.layer_norm(features, features.shape[-1:], eps=head.eps)
        velocity = F.linear(normed * (1 + head.scale[:, None]) + head.shift[:, None], head.weight, head.bias)
    """
    check_tensor("features", features, ("B", "T", "D"), FLOAT_DTYPES)
    resolve_backend(backend, features, ("torch",), "output_head")
    check_head(features, head)
    return output_head_ref(features, head)


def check_head(features: torch.Tensor, head: OutputHead) -> None:
    """Raises `TypeError` or `ValueError` unless the head fits features `[..., B, T, D]`."""
    batch, _, width = features.shape[-3:]
    device = features.device
    check_tensor("head.weight", head.weight, ("O", width), FLOAT_DTYPES, device)
    check_tensor("head.scale", head.scale, (batch, width), FLOAT_DTYPES, device)
    check_tensor("head.shift", head.shift, (batch, width), FLOAT_DTYPES, device)
    if head.bias is not None:
        check_tensor("head.bias", head.bias, (head.weight.shape[0],), FLOAT_DTYPES, device)
