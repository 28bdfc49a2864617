"""Losses of the training."""

import torch

# In the head-aware loss, beside the displacement at 1. Chosen on samples that neither training nor the demo uses.
FEATURE_WEIGHT, VELOCITY_WEIGHT = 0.1, 0.3


def feature_loss(batch, plan, forecast):
    """L1 of the features, as in the LESA paper, over their mean size."""
    truth = batch.features[plan.steps]
    return (forecast - truth).abs().mean() / truth.abs().mean()


def head_aware_loss(batch, plan, forecast):
    """Errors of the features, of the velocities, and of the displacement they add up to over each gap; all relative.

    The displacement is what a gap's forecasts do to the sample: errors that cancel within it cost nothing at its end.
    """
    velocity = batch.velocities[plan.steps]
    error = batch.velocity(forecast, plan.steps) - velocity

    def displacement(velocities):
        return over_gaps(batch, plan, velocities)

    velocity_loss = relative(error, velocity)
    displacement_loss = relative(displacement(error), displacement(velocity))
    return FEATURE_WEIGHT * feature_loss(batch, plan, forecast) + VELOCITY_WEIGHT * velocity_loss + displacement_loss


def over_gaps(batch, plan, velocities):
    """How far velocities `[P, N, O]` of the predicted steps lead over each gap `[G, N, O]`."""
    gaps = velocities.new_zeros(int(plan.gaps.max()) + 1, *velocities.shape[1:])
    return gaps.index_add(0, plan.gaps, velocities * batch.widths[plan.steps][:, None, None])


def relative(error, truth):
    """The size of an error as a part of the truth's."""
    return torch.linalg.vector_norm(error) / torch.linalg.vector_norm(truth).clamp(min=1e-12)
