"""The losses of training and of refining."""

import torch

from lesa.training.batches import Batch, Plan, RollOut, predict
from lesa_kernels import FusedKANPredictor

FEATURE_WEIGHT, VELOCITY_WEIGHT = 0.1, 0.3
"""In the head-aware loss, where the displacement has the weight 1.

They were chosen on samples that neither training nor the demo uses.
"""

ROLL_OUT_VELOCITY_WEIGHT = 0.3
"""In the loss on a roll-out, where the drift has the weight 1.

With a third of this weight, and without recorded runs, training diverged.
"""


def feature_loss(batch: Batch, plan: Plan, forecast: torch.Tensor) -> torch.Tensor:
    """The L1 error of the features, as in the LESA paper, divided by their mean size."""
    truth = batch.features[plan.steps]
    return (forecast - truth).abs().mean() / truth.abs().mean()


def head_aware_loss(batch: Batch, plan: Plan, forecast: torch.Tensor) -> torch.Tensor:
    """The sum of three relative errors: of the features, of the velocities, and of the displacement over each gap.

    The displacement is what the forecasts of a gap do to the sample. Errors that cancel within the gap cost nothing at
    its end.
    """
    velocity = batch.velocities[plan.steps]
    error = batch.velocity(forecast, plan.steps) - velocity
    velocity_loss = relative(error, velocity)
    displacement_loss = relative(over_gaps(batch, plan, error), over_gaps(batch, plan, velocity))
    return FEATURE_WEIGHT * feature_loss(batch, plan, forecast) + VELOCITY_WEIGHT * velocity_loss + displacement_loss


def roll_out_loss(
    predictor: FusedKANPredictor, batch: Batch, plan: Plan, computed: torch.Tensor, roll_out: RollOut
) -> torch.Tensor:
    """The relative error of the latents at the end of each gap, and that of the predicted velocities.

    Args:
        predictor, batch, plan: what forecasts what.
        computed: `[C]`, the computed steps.
        roll_out: what the model computed at these steps along the roll-out.
    """
    off, error = off_after_gaps(predictor, batch, plan, computed, roll_out)
    truth = batch.velocities[plan.steps]
    return relative(off, over_gaps(batch, plan, truth)) + ROLL_OUT_VELOCITY_WEIGHT * relative(error, truth)


def off_after_gaps(
    predictor: FusedKANPredictor, batch: Batch, plan: Plan, computed: torch.Tensor, roll_out: RollOut
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much the latents of a roll-out are off at the end of each gap, and the errors of the velocities.

    Args:
        predictor, batch, plan, computed, roll_out: see `roll_out_loss`.

    Returns:
        The differences of the latents `[G, N, O]`, and the errors of the predicted velocities `[P, N, O]`.
    """
    features, drift = roll_out
    forecast = predict(predictor, batch, plan, features, computed)
    error = batch.velocity(forecast, plan.steps) - batch.velocities[plan.steps]
    velocity_off = batch.velocity(features, computed) - batch.velocities[computed]
    gaps = over_gaps(batch, plan, error)
    return (drift + velocity_off * batch.widths[computed, None, None])[: len(gaps)] + gaps, error


def over_gaps(batch: Batch, plan: Plan, velocities: torch.Tensor) -> torch.Tensor:
    """How far velocities `[P, N, O]` of the predicted steps move the sample over each gap: `[G, N, O]`."""
    gaps = velocities.new_zeros(int(plan.gaps.max()) + 1, *velocities.shape[1:])
    return gaps.index_add(0, plan.gaps, velocities * batch.widths[plan.steps][:, None, None])


def relative(error: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The L2 norm of an error, divided by that of the truth."""
    return torch.linalg.vector_norm(error) / torch.linalg.vector_norm(truth).clamp(min=1e-12)
