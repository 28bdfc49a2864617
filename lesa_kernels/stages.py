"""The noise stages: which of them a sample is in, on the device."""

import torch


def stage_index(sigma: torch.Tensor, stage_bounds: tuple[float, ...]) -> torch.Tensor:
    """The stage of each sample: how many bounds are at or above its noise level; int64, of the shape of `sigma`."""
    stage = torch.zeros_like(sigma, dtype=torch.int64)
    for bound in stage_bounds:  # numbers: a tensor of bounds would have to be copied to the device
        stage += sigma <= bound
    return stage


def of_stage(stage: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """`values[stage]` without waiting for the device: int64, of the shape of `stage`."""
    found = torch.zeros_like(stage)
    for number, value in enumerate(values):
        found += (stage == number) * value
    return found
