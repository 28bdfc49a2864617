"""One file per model family: where its output head begins, what the head needs, and what the model costs."""

from typing import Any

import torch

from lesa.models.adapter import Adapter
from lesa.models.flux import FluxAdapter
from lesa.models.hunyuan_video import HunyuanVideoAdapter
from lesa.models.probe import Probe
from lesa.models.qwen_image import QwenImageAdapter
from lesa.models.sd3 import SD3Adapter
from lesa.models.wan import WanAdapter
from lesa_kernels.checks import Said, argument_error

ADAPTERS: tuple[type[Adapter], ...] = (FluxAdapter, QwenImageAdapter, HunyuanVideoAdapter, SD3Adapter, WanAdapter)
"""The adapters of all supported families."""


FIRST, SECOND = "transformer", "transformer_2"
"""The components of a pipeline that lesa caches. Pipelines of Wan 2.2 have an expert for low noise as the second."""


def transformers_of(pipe: Any) -> dict[str, Any]:
    """The transformers of a pipeline by the names of the components, without what `torch.compile` put around them."""
    found: dict[str, Any] = {}
    for name in (FIRST, SECOND):
        module = getattr(pipe, name, None)
        module = getattr(module, "_orig_mod", module)  # from `torch.compile(transformer)`
        if module is not None and not any(module is other for other in found.values()):
            found[name] = module
    return found


def adapters_for(pipe: Any, probes: bool = False) -> dict[str, Adapter]:
    """The adapters of the pipeline's transformers, by the names of the components.

    Args:
        pipe: a diffusers pipeline.
        probes: whether a probe takes the place of an adapter where there is none.

    Raises:
        TypeError: the pipeline has no transformer, or one of no supported family. With `probes`, one that cannot be
            watched.
    """
    found = transformers_of(pipe) or {FIRST: None}
    return {name: _adapter_of(pipe, transformer, probes) for name, transformer in found.items()}


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of the pipeline's transformer, of the first one if there are two.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: the pipeline has no transformer of a supported family.
    """
    return next(iter(adapters_for(pipe).values()))


def _adapter_of(pipe: Any, transformer: Any, probes: bool) -> Adapter:
    for adapter in ADAPTERS:
        if adapter.handles(transformer):
            return adapter(transformer)
    if probes and isinstance(transformer, torch.nn.Module):
        return Probe(pipe, transformer)
    families = ", ".join(a.family for a in ADAPTERS)
    got = Said(f"{type(pipe).__name__} with a {type(transformer).__name__}")
    must, remedy = f"have a transformer of a supported family ({families})", "Use such a pipeline."
    if isinstance(transformer, torch.nn.Module):
        remedy += " For others, only `lesa.enable_cache` works."
    raise argument_error("pipe", must, got, remedy, TypeError)
