"""One run of a pipeline, and one call of its transformer."""

from dataclasses import dataclass

import torch


class Run:
    """One call of a pipeline: its noise levels, and how far it is.

    Args:
        scheduler: the pipeline's, its timesteps set for this run.
        timestep_scale: by which its timesteps are divided before the transformer gets them.

    Attributes:
        timesteps: the scheduler's.
        sigmas: float32 noise level of each of the scheduler's steps.
        begin: index of the first step that was executed, or None before it.
        index: index of the current step.
        exact: whether all samples are known to get the timesteps that `passed` gives, but for the last bit of float32.
    """

    def __init__(self, scheduler, timestep_scale: float):
        self.scheduler, self.timestep_scale = scheduler, timestep_scale
        self.identity = scheduler.timesteps  # a new tensor every run; kept, so that its address can't be reused
        self.timesteps = scheduler.timesteps.tolist()
        sigmas = getattr(scheduler, "sigmas", None)
        known = isinstance(sigmas, torch.Tensor) and len(sigmas) >= len(self.timesteps)
        train_steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        self.sigmas = sigmas.tolist() if known else [t / train_steps for t in self.timesteps]
        self.begin: int | None = None
        self.index = -1
        self.exact = False
        self._passed: dict[torch.dtype, list[float]] = {}

    def covers(self, scheduler) -> bool:
        """Whether the scheduler is still in this run: a new run sets new timesteps."""
        return self.scheduler is scheduler and self.identity is scheduler.timesteps

    @property
    def executed_sigmas(self) -> list[float]:
        """Noise levels of the steps that this run executes."""
        return self.sigmas[self.begin : len(self.timesteps)]

    @property
    def position(self) -> int | None:
        """The index at which the scheduler says that it is, or None where it does not say."""
        index = getattr(self.scheduler, "step_index", None)
        return getattr(self.scheduler, "begin_index", None) if index is None else index

    def passed(self, dtype: torch.dtype) -> list[float]:
        """The timesteps as a pipeline passes them to the transformer in `dtype`: rounded, and then divided."""
        if dtype not in self._passed:
            timesteps = torch.tensor(self.timesteps).to(dtype)
            self._passed[dtype] = (timesteps / self.timestep_scale if self.timestep_scale != 1 else timesteps).tolist()
        return self._passed[dtype]

    def is_near(self, index: int, value: float, dtype: torch.dtype) -> bool:
        """Whether the passed `value` is the timestep of a step, as far as the precision of `dtype` tells."""
        value *= self.timestep_scale
        tolerance = max(torch.finfo(dtype).eps, 1e-6) * abs(value) + 1e-3
        return 0 <= index < len(self.timesteps) and abs(self.timesteps[index] - value) <= tolerance

    def locate(self, value: float, dtype: torch.dtype) -> int | None:
        """The index of the scheduler's timestep that the transformer was given, or None.

        The value has the latents' precision, where neighbours can merge. Of the candidates the scheduler's own position
        decides. Without a position, as in a loop that does not use `scheduler.step`, it is the nearest that does not go
        back. Another scheduler drives this call, and the answer is None, where the position is no candidate, where a
        step would be left out without a position, and where this scheduler's timesteps were never set.
        """
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            return None
        position = self.position
        if position is not None:
            return position if self.is_near(position, value, dtype) else None
        end = len(self.timesteps) if self.begin is None else self.index + 2
        near = [index for index in range(end) if self.is_near(index, value, dtype)]
        value *= self.timestep_scale
        return min(near, key=lambda i: (i < self.index, abs(self.timesteps[i] - value)), default=None)


@dataclass
class Call:
    """One call of the transformer.

    Args:
        step: index among the executed steps of the run.
        stream: name of the stream of calls, such as "cond".
        sigma: the step's noise level.
        arguments: the transformer's, by name, as the caller passed them.
    """

    step: int
    stream: str
    sigma: float
    arguments: dict


def version_of(tensor: torch.Tensor | None) -> int | None:
    """How often a tensor was changed in place, as far as that is known."""
    return None if tensor is None or tensor.is_inference() else tensor._version
