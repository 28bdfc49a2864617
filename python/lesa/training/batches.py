"""Recorded tokens side by side, and what the output head makes of them: for training and for searching schedules."""

import torch
import torch.nn.functional as F


class Head:
    """The output projection that was recorded with the trajectories."""

    def __init__(self, trajectories, device):
        self.eps = trajectories.head_eps
        self.weight = trajectories.head_weight.to(device, torch.float32)
        bias = trajectories.head_bias
        self.bias = None if bias is None else bias.to(device, torch.float32)


class Batch:
    """Some trajectories of equal noise levels, their tokens side by side.

    Args:
        trajectories: of equal noise levels.
        head: of their model.
        generator: of the choice of tokens.
        tokens: how many to take of each trajectory, at random; None for all.
        device: to put them on.
        roll_outs: of each trajectory, `[C, T, ...]` tensors whose chosen tokens are wanted too.

    Attributes:
        features: `[S, N, D]`, N tokens of all trajectories.
        roll_outs: the tensors `[C, N, ...]` of the arguments, their tokens side by side.
        velocities: `[S, N, O]`, the head's output for them.
        sigmas: `[S]`.
        widths: `[S]`, how far each step goes down in sigma.
    """

    def __init__(self, trajectories, head, generator, tokens, device, roll_outs=()):
        def chosen(trajectory):
            total = trajectory.features.shape[1]
            if tokens is None or tokens >= total:
                return slice(None)
            return torch.randperm(total, generator=generator)[:tokens]

        indices = [chosen(t) for t in trajectories]
        parts = [(t, t.features[:, index].to(device, torch.float32)) for t, index in zip(trajectories, indices)]
        self.roll_outs = [
            torch.cat([value[:, index].to(device, torch.float32) for value, index in zip(values, indices)], 1)
            for values in zip(*roll_outs)
        ]
        self.sigmas = trajectories[0].sigmas.to(device)
        self.widths = -torch.diff(self.sigmas, append=self.sigmas.new_zeros(1))
        self.features = torch.cat([features for _, features in parts], 1)

        def modulation(name):
            spread = [getattr(t, name)[:, None].float().expand(-1, f.shape[1], -1) for t, f in parts]
            return torch.cat(spread, 1).to(device)

        self.head = head
        self.scale, self.shift = modulation("scale"), modulation("shift")
        self.velocities = self.velocity(self.features, slice(None))

    def velocity(self, features, steps):
        """The head's output `[P, N, O]` for features `[P, N, D]` of these steps."""
        normed = F.layer_norm(features, features.shape[-1:], eps=self.head.eps)
        modulated = normed * (1 + self.scale[steps]) + self.shift[steps]
        return F.linear(modulated, self.head.weight, self.head.bias)


class Plan:
    """For one schedule: which steps are predicted, from which history.

    Args:
        computed: the schedule's steps.
        total: number of steps of the run.
        length: of the history that the predictor reads, K.
        every_step: whether the history has all earlier steps, in the place of the computed ones.
        steps: what is predicted. None: all steps that are not computed.
        device: of the tensors.

    Attributes:
        steps: the predicted steps, P of them.
        history: `[P, K]` steps that the ring holds, newest first, the oldest repeated where there are fewer.
        count: `[P]`, how many of them are there.
        gaps: `[P]`, number of the gap between computed steps that each predicted step is in.
    """

    def __init__(self, computed, total, length, every_step=False, device="cpu", steps=None):
        computed = set(computed)
        self.steps = [i for i in range(1, total) if i not in computed] if steps is None else steps
        history = [[j for j in range(i - 1, -1, -1) if every_step or j in computed][:length] for i in self.steps]
        padded = [h + [h[-1]] * (length - len(h)) for h in history]
        self.count = torch.tensor([len(h) for h in history], dtype=torch.int32, device=device)
        self.history = torch.tensor(padded, device=device)
        self.gaps = torch.tensor([sum(c < i for c in computed) - 1 for i in self.steps], device=device)


def predict(predictor, batch, plan, features, steps=None):
    """Forecasts `[P, N, D]` for the steps of the plan from a given history: a ring with one row per step.

    Args:
        predictor, batch, plan: what forecasts what.
        features: `[S, N, D]` of all steps, or of those in `steps` only.
        steps: a tensor of rising steps.
    """
    history = plan.history.T.flip(0).contiguous()  # oldest first, as in a full ring that begins at slot 0
    sigmas = batch.sigmas
    rows = history if steps is None else torch.searchsorted(steps, history)
    cursor = torch.zeros_like(plan.count)
    return predictor.forecast(features[rows], None, sigmas[history], cursor, plan.count, sigmas[plan.steps])


def roll_out(predictor, batch, plan):
    """Forecasts `[P, N, D]` one after the other, each from a history that holds the ones before it."""
    features, sigmas = batch.features, batch.sigmas
    length = predictor.config.max_history
    seen, forecasts = [features[:1]], []
    cursor, predicted = torch.zeros(1, dtype=torch.int32, device=features.device), set(plan.steps)
    for step in range(1, len(features)):
        if step in predicted:
            count = min(step, length)
            newest = [seen[max(step - k, 0)] for k in range(length, 0, -1)]
            at = torch.arange(step - length, step).clamp(min=0)
            n = torch.full_like(cursor, count)
            seen.append(
                predictor.forecast(torch.stack(newest), None, sigmas[at][:, None], cursor, n, sigmas[step : step + 1])
            )
            forecasts.append(seen[-1])
        else:
            seen.append(features[step : step + 1])
    return torch.cat(forecasts)
