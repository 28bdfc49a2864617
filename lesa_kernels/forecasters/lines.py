"""Straight lines through the two newest features."""

import torch


def line_weights(at: torch.Tensor, target: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The weights of the line through the two newest features, in any measure of time; one feature is repeated.

    Args:
        at: `[..., K]`, when the features are, newest first. Beyond `count` they may be anything.
        target: `[...]`, when the forecast is.
        count: `[...]`, how many features there are.

    Returns:
        `[..., K]`.
    """
    order = torch.arange(at.shape[-1], device=at.device)
    has_two = (count > 1)[..., None]
    gap = at[..., :1] - at[..., 1:2] if at.shape[-1] > 1 else torch.ones_like(at)
    slope = (target[..., None] - at[..., :1]) / torch.where(has_two, gap, 1.0)
    slope = torch.where(has_two, slope, 0.0)
    return (1 + slope) * (order == 0) - slope * (order == 1)
