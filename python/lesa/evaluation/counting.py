"""Counts which blocks of the transformer run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lesa.contenders.base import Pipeline
from lesa.models.adapter import Adapter


class Counter:
    """Counts which blocks run in one call of the pipeline, and keeps the latents after each step.

    Args:
        pipe: the pipeline.
        adapter: of its transformer.
        keep_latents: samples whose latents are kept.
    """

    def __init__(self, pipe: Pipeline, adapter: Adapter, keep_latents: int = 0):
        self.steps: list[int] = []
        self.latents: list[torch.Tensor] = []
        self.first_call: float | None = None
        self._pipe, self._keep_latents = pipe, keep_latents
        self._attentions = adapter.counted_modules
        self._bodies = [next(block.children()) for block in adapter.blocks]
        self._device = pipe.transformer.device
        self._calls = self._whole_calls = self._attention_runs = self._body_runs = 0
        self._seen: set[int] = set()
        self._ran: set[int] = set()
        self._whole = False

    @contextmanager
    def on(self) -> Iterator["Counter"]:
        """The context in which it counts."""
        transformer = self._pipe.transformer
        hooks = [transformer.register_forward_pre_hook(self._begin), transformer.register_forward_hook(self._end)]
        for number, (attention, body) in enumerate(zip(self._attentions, self._bodies)):
            hooks.append(attention.register_forward_hook(self._attention_ran(number)))
            hooks.append(body.register_forward_hook(self._body_ran))
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
        blocks = len(self._attentions)
        return self._whole_calls * scale, self._attention_runs / blocks * scale, self._body_runs / blocks * scale

    def _begin(self, module: torch.nn.Module, args: tuple) -> None:
        if self.first_call is None:
            synchronise(self._device)
            self.first_call = time.perf_counter()
        self._calls += 1
        self._ran.clear()

    def _end(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if len(self._ran) == len(self._attentions):
            self._whole_calls += 1
            self._whole = True

    def _attention_ran(self, number: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
            self._attention_runs += 1
            self._ran.add(number)

        return hook

    def _body_ran(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._body_runs += 1


def synchronise(device: torch.device) -> None:
    """Waits for the device; a CPU needs no waiting."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
