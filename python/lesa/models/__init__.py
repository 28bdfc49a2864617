"""One file per model family: where its output head begins, what the head needs, and what the model costs."""

from typing import Any

import torch

from lesa.models.adapter import Adapter
from lesa.models.flux import FluxAdapter
from lesa.models.hunyuan_video import HunyuanVideoAdapter
from lesa.models.probe import Probe
from lesa.models.qwen_image import QwenImageAdapter
from lesa.models.sd3 import SD3Adapter
from lesa_kernels.checks import Said, argument_error

ADAPTERS: tuple[type[Adapter], ...] = (FluxAdapter, QwenImageAdapter, HunyuanVideoAdapter, SD3Adapter)
"""The adapters of all supported families."""


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of the pipeline's transformer.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: the pipeline has no transformer of a supported family.
    """
    transformer = _transformer_of(pipe)
    for adapter in ADAPTERS:
        if adapter.handles(transformer):
            return adapter(transformer)
    families = ", ".join(a.family for a in ADAPTERS)
    got = Said(f"{type(pipe).__name__} with a {type(transformer).__name__}")
    must, remedy = f"have a transformer of a supported family ({families})", "Use such a pipeline."
    if isinstance(transformer, torch.nn.Module):
        remedy += " For others, only `lesa.enable_cache` works."
    raise argument_error("pipe", must, got, remedy, TypeError)


def adapter_or_probe(pipe: Any) -> Adapter:
    """The adapter of the pipeline's transformer, or a probe if none knows it.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: the pipeline has no transformer, or one that the probe cannot watch.
    """
    transformer = _transformer_of(pipe)
    known = any(adapter.handles(transformer) for adapter in ADAPTERS)
    return adapter_for(pipe) if known or not isinstance(transformer, torch.nn.Module) else Probe(pipe, transformer)


def _transformer_of(pipe: Any) -> Any:
    transformer = getattr(pipe, "transformer", None)
    return getattr(transformer, "_orig_mod", transformer)  # from `torch.compile(transformer)`
