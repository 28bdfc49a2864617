"""Counts which blocks of the transformers run."""

import functools
import time
from collections import Counter as Counted
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lesa.contenders.base import Pipeline
from lesa.models import FIRST, SECOND, features_device
from lesa.models.adapter import Adapter


class Counter:
    """Counts which blocks run in one call of the pipeline, and keeps the latents after each step.

    Args:
        pipe: the pipeline.
        adapters: of its transformers.
        keep_latents: samples whose latents are kept.
    """

    def __init__(self, pipe: Pipeline, adapters: Collection[Adapter], keep_latents: int = 0):
        self.steps: list[int] = []
        self.latents: list[torch.Tensor] = []
        self.first_call: float | None = None
        self._pipe, self._keep_latents = pipe, keep_latents
        self._adapters = [*adapters]
        self._blocks = [len(adapter.blocks) for adapter in adapters]
        self._device = features_device(pipe, self._adapters[0])
        self._calls = self._whole_calls = 0
        self._attention_runs: Counted = Counted()  # by transformer
        self._body_runs: Counted = Counted()
        self._seen: set[int] = set()
        self._ran: set[int] = set()
        self._whole = False

    @contextmanager
    def on(self) -> Iterator["Counter"]:
        """The context in which it counts."""
        hooks = []
        for which, adapter in enumerate(self._adapters):
            transformer = self._called(adapter.transformer)
            hooks.append(transformer.register_forward_pre_hook(self._begin))
            hooks.append(transformer.register_forward_hook(functools.partial(self._end, which)))
            for number, (attention, block) in enumerate(zip(adapter.counted_modules, adapter.blocks)):
                body = next(block.children())
                hooks.append(attention.register_forward_hook(functools.partial(self._attention_ran, which, number)))
                hooks.append(body.register_forward_hook(functools.partial(self._body_ran, which)))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def on_step_end(self, pipe: Pipeline, step: int, timestep: Any, tensors: dict) -> dict:
        """The pipeline's callback."""
        if self._whole and step not in self.steps:
            self.steps.append(step)
        self._whole = False
        self._seen.add(step)
        if self._keep_latents:
            self.latents.append(tensors["latents"][: self._keep_latents].detach().clone())
        return {}

    def seen(self) -> tuple[int, int]:
        """Calls of the transformer in which every block was seen to run, and all its calls."""
        return self._whole_calls, self._calls

    def counts(self) -> tuple[float, float, float]:
        """Whole steps, step equivalents and block passes. A pipeline that repeats its steps counts as if it did not."""
        scale = len(self._seen) / max(self._calls, 1)
        runs = (self._attention_runs, self._body_runs)
        equivalents, passes = (sum(ran[which] / blocks for which, blocks in enumerate(self._blocks)) for ran in runs)
        return self._whole_calls * scale, equivalents * scale, passes * scale

    def _called(self, transformer: torch.nn.Module) -> torch.nn.Module:
        """What the pipeline calls: the transformer, or what `torch.compile` put around it."""
        components = (getattr(self._pipe, name, None) for name in (FIRST, SECOND))
        return next(c for c in components if c is not None and getattr(c, "_orig_mod", c) is transformer)

    def _begin(self, module: torch.nn.Module, args: tuple) -> None:
        if self.first_call is None:
            synchronise(self._device)
            self.first_call = time.perf_counter()
        self._calls += 1
        self._ran.clear()

    def _end(self, which: int, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if len(self._ran) == self._blocks[which]:
            self._whole_calls += 1
            self._whole = True

    def _attention_ran(self, which: int, number: int, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._attention_runs[which] += 1
        self._ran.add(number)

    def _body_ran(self, which: int, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._body_runs[which] += 1


def synchronise(device: torch.device) -> None:
    """Waits for the device; a CPU needs no waiting."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
