"""The transformers of a pipeline that a hook is on: usually one, of Wan 2.2 the two experts."""

import functools
from collections.abc import Iterable
from typing import Any

import torch

from lesa.cache.placement import Placement
from lesa.cache.run import Run
from lesa.models import FIRST, Adapter


class Site:
    """One transformer of a pipeline, and what a hook has put on it.

    Args:
        hook: the hook. Its `enter` gets the transformer's calls, its `on_head_entry` the calls of the output heads.
        name: of the pipeline's component, such as "transformer_2".
        adapter: of the transformer.

    Attributes:
        placement: what is on the transformer.
        prefix: how the names of its streams of calls begin, if it is not the pipeline's first transformer.
    """

    def __init__(self, hook: Any, name: str, adapter: Adapter):
        self.hook, self.name, self.adapter = hook, name, adapter
        self.placement = Placement(self)
        self.prefix = "" if name == FIRST else f"{name}-"

    @property
    def component(self) -> Any:
        """What the pipeline has under this name now; None if there is nothing."""
        return getattr(self.hook.pipe, self.name, None)

    def is_swapped(self, is_unused: bool) -> bool:
        """Whether the pipeline has another transformer now, so that the hook does not get its calls.

        Args:
            is_unused: whether a run has ended in which the hook got no call. Then the transformer must be the
                pipeline's own; otherwise a module around it will do.
        """
        module, own = self.component, self.adapter.transformer
        if not self.placement.is_on or getattr(module, "_orig_mod", module) is own:
            return False
        is_module = isinstance(module, torch.nn.Module)
        may_call = not is_module or any(part is own for part in module.modules())  # another object may hold it
        return is_unused or not may_call

    def gate(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the transformer. It is not compiled; what it runs may be."""
        return self.hook.enter(self, args, kwargs)

    @torch.compiler.disable(recursive=False)  # else graphs would begin here, and not fit a transformer without a cache
    def compute(self, stream: str | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Computes a call of a stream, with all that wraps the transformer; None if the stream is not known."""
        call = self.placement.call
        if not self.adapter.runs_around or stream is None or self.placement.is_compiled:
            return call(*args, **kwargs)
        with self.adapter.own_forward.exchanged(functools.partial(self.adapter.compute, stream)):
            return call(*args, **kwargs)

    def on_head_entry(self, head: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A call of the output head with this number."""
        self.hook.on_head_entry(self, head, *self.adapter.branches[head].head_form.entered(args, kwargs))


def switch_step(pipe: Any, run: Run) -> int | None:
    """The executed step at which a pipeline goes over to its second transformer; None if it does not, or is not known.

    Args:
        pipe: the pipeline. Those of Wan 2.2 have a `boundary_ratio`, the part of the timesteps below which they do so.
        run: the run, at its first step.
    """
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if ratio is None:
        return None
    bound = ratio * run.scheduler.config.num_train_timesteps
    executed = run.timesteps[run.begin :]
    return next((step for step, timestep in enumerate(executed) if timestep < bound), None) or None


def adapters_on(pipe: Any, sites: Iterable[Site]) -> list[str]:
    """The names of the adapters, such as LoRA, that are on in the transformers or fused into their weights."""
    names = dict.fromkeys(getattr(pipe, "fused_loras", ()))  # what is fused stays when it is unloaded
    for transformer in (site.adapter.transformer for site in sites):
        for layer in transformer.modules() if getattr(transformer, "_hf_peft_config_loaded", False) else ():
            if getattr(layer, "disable_adapters", None) is False:  # a layer with adapters, and they are on
                names |= dict.fromkeys(layer.active_adapters)
    return [*names]
