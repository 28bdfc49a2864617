"""Runs of a pipeline in which a predictor forecasts steps, and through which gradients pass.

The pipelines of diffusers switch gradients off around their `__call__`. Here the function inside runs. The cache is the
usual one, so it computes and forecasts the same steps. It keeps the features as tensors with gradients, and not in a
ring. Each call of the transformer is checkpointed, computed or predicted: the backward pass runs it again. So a run
keeps the samples and features of the computed steps, and nothing of the inside of the model. While the model is run
again, its blocks are checkpointed too.
"""

import contextlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lesa.inputs import collate
from lesa.models import adapters_for
from lesa.pipelines import quiet_progress, run_pipeline
from lesa.schedule import Schedule
from lesa.training.gradient_checks import models_of, refusal, without_no_grad
from lesa.training.gradient_hook import GradientHook, checkpointed_module
from lesa.training.learned_levels import LearnedLevels
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error


@dataclass(frozen=True)
class GradientRun:
    """What one run gave, with gradients.

    Args:
        latents: by step, the latents after it: after the last step, and after each one that comes before a computed
            one. The samples are in the order of the inputs.
        computed: the steps that were computed, rising from 0.
        last: the last step.
        made: what the pipeline returned: the latents, or images `[B, C, H, W]` or videos `[B, F, C, H, W]` in [0, 1].
    """

    latents: dict[int, torch.Tensor]
    computed: list[int]
    last: int
    made: Any


class DifferentiableRuns:
    """Runs of a pipeline in which a predictor forecasts steps, and through which gradients pass.

    Args:
        pipe: the pipeline.
        predictor: what is trained. It is on the device of the features, in float32.
        levels: the noise levels that the model is told, if they are trained too.
    """

    def __init__(self, pipe: Any, predictor: FusedKANPredictor, levels: LearnedLevels | None = None):
        self.pipe = pipe
        self._hook = GradientHook(pipe, adapters_for(pipe), predictor, levels)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """A context for runs and their backward passes.

        In it, the weights of the pipeline's models are frozen, and they are in eval mode. At the end, also after an
        error, everything is as before.

        Raises:
            RuntimeError: a cache is on.
        """
        with frozen(models_of(self.pipe)), _with_gradients(self.pipe), _restored(self.pipe.scheduler):
            self._hook.compare()
            self._hook.install()
            try:
                yield
            finally:
                self._hook.uninstall()

    def run(
        self,
        inputs: Sequence[dict],
        seeds: Sequence[int],
        num_inference_steps: int,
        schedule: Schedule,
        output_type: str = "latent",
    ) -> GradientRun:
        """Runs the pipeline, in the context `on`.

        Args:
            inputs: of samples that can share a call.
            seeds: of their noise.
            num_inference_steps: passed to the pipeline.
            schedule: the computed steps.
            output_type: passed to the pipeline: "latent", or "pt" for images.

        Raises:
            TypeError, ValueError, RuntimeError: a step can't be forecast, the scheduler makes another number of steps
                than it has noise levels, or no gradient passes through the pipeline.
        """
        hook, generators = self._hook, [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        latents: dict[int, torch.Tensor] = {}
        counts: list[int] = []  # the samples of each step

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            counts.append(len(tensors["latents"]))
            if step + 1 in hook.chosen or step + 1 == hook.total:
                latents[step] = tensors["latents"].clone()  # some pipelines write into them
            return {}

        hook.schedule = schedule
        with torch.inference_mode(False), torch.enable_grad(), quiet_progress(self.pipe):
            arguments = tree_map_only(torch.Tensor, _usable, collate([*inputs]))
            made = run_pipeline(self.pipe, arguments, generators, num_inference_steps, keep, output_type)
        if counts != [len(seeds)] * hook.total:
            got = Said(f"{len(counts)} steps of a scheduler with {hook.total} noise levels, for {len(seeds)} samples")
            must = "make one step for each of its scheduler's noise levels, for all samples"
            raise argument_error("pipe", must, got, "Use a scheduler with one call per step, or `lesa.refine`.")
        if len(hook.chosen) == hook.total:
            must, remedy = "leave steps to forecast", "Compute fewer of them, or leave this number of steps out."
            raise argument_error("schedule", must, Said(f"one that computes all {hook.total} steps"), remedy)
        if not latents[hook.total - 1].requires_grad:
            raise refusal("keep gradients from step to step", f"a {type(self.pipe).__name__}, which stops them")
        return GradientRun(latents, hook.chosen, hook.total - 1, made)


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its graph, for which gradients may be saved: a copy if it was made in an inference mode."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


@contextlib.contextmanager
def _with_gradients(pipe: Any) -> Iterator[None]:
    """A context in which the pipeline has a class whose `__call__` does not switch gradients off."""
    cls = type(pipe)
    members: dict[str, Any] = {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    members["__call__"] = without_no_grad(cls)
    pipe.__class__ = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(members))
    try:
        yield
    finally:
        pipe.__class__ = cls


@contextlib.contextmanager
def _restored(scheduler: Any) -> Iterator[None]:
    """A context at whose end a scheduler has the attributes that it had: some keep the latest outputs and samples."""
    before = dict(vars(scheduler))
    try:
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)


@contextlib.contextmanager
def frozen(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """A context in which models are frozen and in eval mode. Those of diffusers checkpoint their blocks."""
    trained = [weight for model in models for weight in model.parameters() if weight.requires_grad]
    training = [module for model in models for module in model.modules() if module.training]
    blocks = [module for model in models for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: vars(block)[name] for name in names if name in vars(block)} for block in blocks]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        for module in training:
            module.training = False
        checkpointing: list[Any] = [each for each in models if getattr(each, "_supports_gradient_checkpointing", False)]
        for model in checkpointing:
            model.enable_gradient_checkpointing(checkpointed_module)
        yield
    finally:
        for block, values in zip(blocks, before):
            for name in names:
                vars(block).pop(name, None)
            vars(block).update(values)
        for module in training:
            module.training = True
        for weight in trained:
            weight.requires_grad_(True)
