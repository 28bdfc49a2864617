"""The conditioning of the output head, for all steps of a run at once."""

from dataclasses import replace

import torch

from lesa.cache.planning import Plan
from lesa.cache.run import Run, version_of
from lesa.models import Adapter
from lesa_kernels import OutputHead
from lesa_kernels.stream import NO_SUMS, HeadSums, head_sums

_MOST_PLANS = 2
"""If the inputs change more often in a run, they are taken to change at every step. Then plans would be of no use."""

_MOST_BYTES = 2**25
"""The sums for the fused heads of many steps, and what is needed for a moment to compute them, take about so much. So
do the inputs of the conditioning of many steps."""


class Conditioner:
    """Gives the conditioning of the output head, in one run and one stream of calls.

    The conditioning depends on the timestep, and on inputs that stay the same in a run. So the first step that asks for
    it plans it: it computes its own conditioning and that of all later steps in one batch. If the inputs are large,
    such as embedded text, it does so for a few steps at a time. Each step computes its own if that is not certain: when
    timesteps are not passed as the scheduler has them, when inputs change from step to step, or when adapters such as
    LoRA are on the head.

    Args:
        adapter: the transformer's adapter.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self._inputs: tuple | None = None  # what the plan was made from
        self._given: dict[str, torch.Tensor | None] = {}
        self._plans = 0
        self._conditioning: tuple[torch.Tensor, ...] = ()
        self._heads: tuple[OutputHead, ...] = ()
        self._made_from: list[tuple] = []  # the weights in the heads, which they hold, and so in the sums
        self._summed: Plan | None = None  # the plan for whose steps there are sums
        self._sums: dict[int, HeadSums] = {}
        self._begin = 0

    def conditioning(self, run: Run, arguments: dict, dtype: torch.dtype, is_passed: bool) -> torch.Tensor:
        """The conditioning of the run's current step.

        Args:
            run: the current run.
            arguments: the arguments of the transformer's forward by name.
            dtype: the dtype of the features.
            is_passed: whether the timestep is the one that was passed to the transformer. What wraps the forward may
                have made another one.
        """
        if not (is_passed and self._is_planned(run, arguments, dtype)):
            return self.adapter.conditioning(arguments, dtype)
        return self._conditioning[run.index - self._begin]

    def head(
        self, run: Run, arguments: dict, dtype: torch.dtype, is_passed: bool, plan: Plan | None
    ) -> tuple[OutputHead, HeadSums]:
        """The plain output head as tensors, modulated for the run's current step, and its sums for a fused head.

        Args:
            run, arguments, dtype, is_passed: as in `conditioning`.
            plan: of the forecasts. If it is None, because the kernel reads no sums, or if the current step is not
                conditioned in advance, there are no sums.
        """
        if not (is_passed and self._is_planned(run, arguments, dtype)):
            return self.adapter.output_head(self.adapter.conditioning(arguments, dtype)), NO_SUMS
        if (weights := _state_of(self.adapter.projection)) != self._made_from:
            self._heads, self._summed, self._made_from = (), None, weights
        if not self._heads:
            head, batch = self.adapter.output_head(torch.cat(self._conditioning)), len(self._conditioning[0])
            shifts = [None] * len(self._conditioning) if head.shift is None else head.shift.split(batch)
            parts = zip(head.scale.split(batch), shifts)
            self._heads = tuple(replace(head, scale=scale, shift=shift) for scale, shift in parts)
        head = self._heads[run.index - self._begin]
        if plan is None:
            return head, NO_SUMS
        if plan is not self._summed or (run.step in plan.weights and run.step not in self._sums):
            self._sums, self._summed = self._sums_of(plan, run.step, self._begin - (run.begin or 0), dtype), plan
        return head, self._sums.get(run.step, NO_SUMS)

    def _sums_of(self, plan: Plan, now: int, begin: int, dtype: torch.dtype) -> dict[int, HeadSums]:
        """By step, the sums of the heads of a plan's next steps, from `now` on, as many as the memory allows.

        `begin` is the step of the first head.
        """
        batch, width = self._heads[0].scale.shape
        rows = len(self._heads[0].weight) + plan.low_rank.rank
        group = [step for step in plan.weights if step >= now][: max(1, _MOST_BYTES // (4 * batch * width * rows))]
        heads, stages = [self._heads[step - begin] for step in group], [plan.weights[s].stage for s in group]
        scale, shift = torch.cat([head.scale for head in heads]), _joined([head.shift for head in heads])
        made = head_sums(replace(heads[0], scale=scale, shift=shift), plan.low_rank, _joined(stages), dtype)
        parts = [[None] * len(group) if part is None else part.split(batch) for part in made]
        return dict(zip(group, map(HeadSums, *parts)))

    def _is_planned(self, run: Run, arguments: dict, dtype: torch.dtype) -> bool:
        """Makes a plan if there is none yet. Says whether the current step is planned."""
        if not run.exact or torch.is_grad_enabled() or self.adapter.has_adapters:
            return False
        timestep = arguments[self.adapter.timestep_argument]
        given = {name: arguments[name] for name in self.adapter.conditioned_on}
        scale, shape = self.adapter.lora_scale(arguments), self.adapter.shape(arguments)
        tensors = tuple((id(t), version_of(t)) for t in given.values())
        inputs = (tensors, scale, dtype, timestep.dtype, timestep.device, timestep.ndim, shape)
        if inputs == self._inputs:
            return bool(self._conditioning)
        self._inputs, self._given = inputs, given  # while they are held, no other tensor gets their ids
        self._conditioning = self._heads = ()
        self._summed = None
        self._plans += 1
        if self._plans > _MOST_PLANS or self.adapter.modulates_tokens(arguments):  # of each token, it would be large
            return False
        self._begin = run.index
        passed = run.identity[run.index :].to(timestep.device, timestep.dtype, non_blocking=True)
        passed = run.passes(passed)
        batch = shape[0]
        size = batch * sum(value[:1].nbytes for value in given.values() if value is not None)
        for some in passed.split(max(1, _MOST_BYTES // max(1, size))):
            repeated = {name: _repeated(value, batch, len(some)) for name, value in given.items()}
            timesteps = some.repeat_interleave(batch)
            rows = self.adapter.scaled(arguments, self.adapter.condition, timesteps, repeated, dtype)
            self._conditioning += rows.split(batch)
        return True


def _state_of(module: torch.nn.Module) -> list[tuple]:
    """What changes when a parameter of a module is changed, replaced or moved."""
    return [(id(p), p.data_ptr(), version_of(p)) for p in module._parameters.values() if p is not None]


def _repeated(value: torch.Tensor | None, batch: int, steps: int) -> torch.Tensor | None:
    """The rows of one call, `steps` times. A single row is first repeated for each sample of the batch."""
    if value is None:
        return None
    rows = batch if len(value) == 1 else len(value)
    return value.expand(rows, *value.shape[1:]).repeat(steps, *[1] * (value.ndim - 1))


def _joined(parts: list) -> torch.Tensor | None:
    """The rows of all tensors, or None if there are none."""
    return None if parts[0] is None else torch.cat(parts)
