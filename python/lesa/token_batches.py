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
