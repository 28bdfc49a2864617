"""What a run of a pipeline will be like: its steps and its tokens, seen in its first step."""

import contextlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from lesa.cache import observed
from lesa.cache.run import Call, Run
from lesa.inputs import batches_of, collate
from lesa.models import Adapter, adapter_for
from lesa.pipelines import quiet_progress, run_pipeline
from lesa_kernels.checks import Said, argument_error, usage_error


@dataclass(frozen=True)
class Probed:
    """What was seen.

    Args:
        sigmas: the noise levels of the steps that a run executes. With `strength`, they can be fewer than the pipeline
            was asked for.
        tokens: of the smallest sample.
        flops: of the run of a sample, with one call of the transformer in each step: two for each of its weights and
            each token. Attention is left out.
    """

    sigmas: tuple[float, ...]
    tokens: int
    flops: float

    @property
    def steps(self) -> int:
        """How many steps a run executes."""
        return len(self.sigmas)


class _SeenError(Exception):
    """Ends a run whose first step was seen."""


class _FirstStep:
    """Sees the first step of a run, and ends the run.

    Args:
        adapter: of the transformer.
    """

    sigmas: tuple[float, ...] = ()
    tokens = 0

    def __init__(self, adapter: Adapter):
        self.left = {*adapter.counted_modules}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """A context in which modules that run are removed from `left`."""
        hooks = [module.register_forward_hook(lambda ran, *_: self.left.discard(ran)) for module in self.left]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def on_run(self, run: Run, computed: Set[int]) -> None:
        self.sigmas = tuple(run.executed_sigmas)

    def keep(self, call: Call, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        self.tokens = features.shape[1]
        raise _SeenError


def steps_to_ask_for(pipe: Any, inputs: Sequence[dict], budget: int, num_inference_steps: int, executed: int) -> int:
    """The fewest steps that a pipeline must be asked for, so that it executes `budget` of them.

    They are more than `budget` only if a run with `strength` begins later. Then runs of some numbers of steps are
    begun, to see how many they execute.

    Args:
        pipe, inputs: see `probed`.
        budget: below `executed`.
        num_inference_steps: of a run of all steps.
        executed: how many of these it executes.
    """
    if executed == num_inference_steps:
        return budget
    asked = max(budget, round(budget * num_inference_steps / executed))
    while probed(pipe, inputs, asked).steps < budget:
        asked += 1
    while asked > budget and probed(pipe, inputs, asked - 1).steps >= budget:
        asked -= 1
    return asked


def probed(pipe: Any, inputs: Sequence[dict], num_inference_steps: int) -> Probed:
    """Runs one step for each kind of inputs: those that can share a call are of one kind.

    Args:
        pipe: a pipeline of a supported family.
        inputs: dicts of pipeline arguments.
        num_inference_steps: of a run.

    Raises:
        ValueError: the inputs leave no step to compute.
        RuntimeError: a compiled graph hides the blocks of the transformer, which the test must count.
        What the pipeline and `lesa.cache.observed` raise.
    """
    seen = []
    for numbers in batches_of([*inputs], len(inputs)):
        first = _FirstStep(adapter_for(pipe))
        generators = [torch.Generator("cpu").manual_seed(0)]
        with observed(pipe, first), first.counting(), quiet_progress(pipe):
            try:
                run_pipeline(pipe, collate([inputs[numbers[0]]]), generators, num_inference_steps)
            except _SeenError:
                seen.append(first)
    if any(each.left for each in seen):
        sentence = "`pipe` has a transformer whose blocks were not all seen to run, so they cannot be counted."
        raise usage_error(sentence, "Call this before `compile`, or compile the blocks one by one.", RuntimeError)
    if not seen:
        must, got = "make the pipeline call its transformer", Said("inputs of which it computes no step")
        raise argument_error("inputs", must, got, "Choose more steps, or a larger `strength`.")
    sigmas, tokens = min((each.sigmas for each in seen), key=len), min(each.tokens for each in seen)
    weights = sum(weight.numel() for weight in adapter_for(pipe).transformer.parameters())
    return Probed(sigmas, tokens, 2.0 * weights * len(sigmas) * max(each.tokens for each in seen))
