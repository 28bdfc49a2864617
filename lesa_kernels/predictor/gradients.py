"""Gradients of the part of a forecast that depends on noise levels only: the KAN and its output weights.

The kernels compute what depends on the features, and sum it over the tokens. The rest has no token dimension, so it is
plain torch, for a whole batch, whose samples may be in different stages. Sums over the samples of a stage are matrix
products with one-hot rows, which always add in the same order. The host never waits for the device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lesa_kernels.bspline_kan.reference import bspline_basis
from lesa_kernels.feature_ring.reference import newest_slots
from lesa_kernels.predictor.arguments import Experts, RingState, Shape
from lesa_kernels.predictor.reference import OFFSET_SCALE, of_stage, stage_index


@dataclass(frozen=True)
class History:
    """The anchors that each sample reads.

    Args:
        stage: `[B]` int64, the stage of each sample.
        count: `[B]` int64, how many anchors it reads.
        slots: `[K, B]` int64, their slots, newest first; beyond `count` the last one is repeated.
        levels: `[K, B]` float32, their noise levels.
        target: `[B]` float32, the noise level to forecast.
    """

    stage: torch.Tensor
    count: torch.Tensor
    slots: torch.Tensor
    levels: torch.Tensor
    target: torch.Tensor

    def one_hot(self, stages: int) -> torch.Tensor:
        """`[S, B]` float32: one if the sample is in the stage, else zero."""
        return (torch.arange(stages, device=self.stage.device)[:, None] == self.stage).float()


def read_history(ring: RingState, shape: Shape) -> History:
    """The anchors of each sample, from the buffers of a ring."""
    target = ring.sigma.float()
    stage = stage_index(target, shape.stage_bounds)
    slots = newest_slots(ring.cursor, ring.count, len(ring.sigmas))[: shape.longest].long()
    count = torch.minimum(ring.count.long(), of_stage(stage, shape.history_length))
    return History(stage, count, slots, ring.sigmas.gather(0, slots), target)


class HiddenUnits:
    """The KAN's hidden units of each sample in float32, and their backward.

    Args:
        history: the anchors of the samples.
        experts: the parameters. If the KAN has one input more than there are anchors, that input is the noise level.
        shape: stages and splines.

    Attributes:
        values: `[B, M]`.
    """

    def __init__(self, history: History, experts: Experts, shape: Shape):
        self._history, self._stages = history, shape.stages
        self._grid = (shape.grid_size, shape.spline_order, (-1.0, 1.0))
        anchors = len(history.levels)
        missing = torch.arange(anchors, device=history.count.device)[:, None] >= history.count
        inputs = ((history.target - history.levels) * OFFSET_SCALE).masked_fill(missing, 0.0).T
        if experts.in_weight.shape[2] > anchors:
            inputs = torch.cat([inputs, (2 * history.target - 1)[:, None]], dim=1)
        self._inputs = inputs  # [B, I]
        weight, bias = experts.in_weight[history.stage].float(), experts.in_bias[history.stage].float()
        self._u = torch.tanh((weight @ inputs[:, :, None]).squeeze(2) + bias)
        self._coefficients = experts.spline[history.stage].float()
        self._bases = bspline_basis(self._u, *self._grid)  # [B, M, G + p]
        self.values = (self._bases * self._coefficients).sum(-1) + F.silu(self._u)

    def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of `in_weight`, `in_bias` and `spline`, from the gradient of `values`, `[B, M]`."""
        grid_size, order, (lo, hi) = self._grid
        # The slope of a basis of degree p is the basis of degree p - 1 at the same knot, minus the next one, over the
        # width of an interval.
        lower = bspline_basis(self._u, grid_size, order - 1, (lo, hi))
        slopes = (F.pad(lower, (1, 0)) - F.pad(lower, (0, 1))) * (grid_size / (hi - lo))
        sigmoid = torch.sigmoid(self._u)
        slope = (slopes * self._coefficients).sum(-1) + sigmoid * (1 + self._u * (1 - sigmoid))
        grad_pre = grad * slope * (1 - self._u * self._u)
        rows = self._history.one_hot(self._stages)
        return (
            torch.einsum("sb,bm,bi->smi", rows, grad_pre, self._inputs),
            torch.einsum("sb,bm->sm", rows, grad_pre),
            torch.einsum("sb,bm,bmg->smg", rows, grad, self._bases),
        )


def coefficients_backward(
    history: History, hidden: HiddenUnits, out_weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward of `out_weight[stage] @ hidden + out_bias[stage]`.

    Args:
        history, hidden: the anchors and hidden units of the samples.
        out_weight: `[S, X, M]`.
        grad: `[B, X]` float32, of the coefficients.

    Returns:
        The gradients of `hidden.values` `[B, M]`, of `out_weight` and of `out_bias` `[S, X]`.
    """
    rows = history.one_hot(len(out_weight))
    of_all_stages = grad @ out_weight.float()  # [S, B, M]
    samples = torch.arange(len(grad), device=grad.device)
    grad_hidden = of_all_stages[history.stage, samples]
    grad_weight = grad.T @ (rows[:, :, None] * hidden.values)  # [S, X, M]
    return grad_hidden, grad_weight, rows @ grad
