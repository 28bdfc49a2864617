"""One file per model family: where its output head begins, what the head needs, and what the model costs."""

from typing import Any

import torch

from lesa.models.adapter import Adapter
from lesa.models.aura_flow import AuraFlowAdapter
from lesa.models.bria import BriaAdapter, BriaFiboAdapter
from lesa.models.chroma import ChromaAdapter
from lesa.models.chronoedit import ChronoEditAdapter
from lesa.models.cogvideox import CogVideoXAdapter
from lesa.models.cogview import CogView3PlusAdapter, CogView4Adapter
from lesa.models.cosmos import CosmosAdapter
from lesa.models.ernie_image import ErnieImageAdapter
from lesa.models.flux import FluxAdapter
from lesa.models.flux2 import Flux2Adapter
from lesa.models.glm_image import GlmImageAdapter
from lesa.models.helios import HeliosAdapter
from lesa.models.hidream import HiDreamAdapter
from lesa.models.hunyuan_dit import HunyuanDiTAdapter
from lesa.models.hunyuan_image import HunyuanImageAdapter
from lesa.models.hunyuan_video import HunyuanVideoAdapter
from lesa.models.hunyuan_video15 import HunyuanVideo15Adapter
from lesa.models.ideogram import Ideogram4Adapter
from lesa.models.kandinsky5 import Kandinsky5Adapter
from lesa.models.krea import Krea2Adapter
from lesa.models.longcat_image import LongCatImageAdapter
from lesa.models.ltx import LTXVideoAdapter
from lesa.models.ltx2 import LTX2Adapter
from lesa.models.lumina import Lumina2Adapter, LuminaNextAdapter
from lesa.models.mochi import MochiAdapter
from lesa.models.motif_video import MotifVideoAdapter
from lesa.models.ovis_image import OvisImageAdapter
from lesa.models.probe import Probe
from lesa.models.qwen_image import QwenImageAdapter
from lesa.models.qwen_image_21 import QwenImage21Adapter
from lesa.models.sana import SanaAdapter, SanaVideoAdapter
from lesa.models.sd3 import SD3Adapter
from lesa.models.skyreels_v2 import SkyReelsV2Adapter
from lesa.models.wan import WanAdapter
from lesa.models.z_image import ZImageAdapter
from lesa.spread import execution_device, inside_of
from lesa_kernels.checks import Said, argument_error

ADAPTERS: tuple[type[Adapter], ...] = (
    FluxAdapter,
    QwenImageAdapter,
    HunyuanVideoAdapter,
    SD3Adapter,
    AuraFlowAdapter,
    BriaAdapter,
    BriaFiboAdapter,
    ChromaAdapter,
    ChronoEditAdapter,
    CogVideoXAdapter,
    CogView3PlusAdapter,
    CogView4Adapter,
    CosmosAdapter,
    ErnieImageAdapter,
    Flux2Adapter,
    GlmImageAdapter,
    HeliosAdapter,
    HiDreamAdapter,
    HunyuanDiTAdapter,
    HunyuanImageAdapter,
    HunyuanVideo15Adapter,
    Ideogram4Adapter,
    Kandinsky5Adapter,
    Krea2Adapter,
    LongCatImageAdapter,
    LTXVideoAdapter,
    LTX2Adapter,
    Lumina2Adapter,
    LuminaNextAdapter,
    MochiAdapter,
    MotifVideoAdapter,
    OvisImageAdapter,
    QwenImage21Adapter,
    SanaAdapter,
    SanaVideoAdapter,
    SkyReelsV2Adapter,
    WanAdapter,
    ZImageAdapter,
)
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


def adapters_for(pipe: Any) -> dict[str, Adapter]:
    """The adapters of the pipeline's transformers, by the names of the components.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: the pipeline has no transformer, or one of no supported family.
    """
    return {name: _adapter_of(pipe, found, probes=False) for name, found in _found(pipe).items()}


def adapters_or_probes(pipe: Any) -> dict[str, Adapter]:
    """Like `adapters_for`, with probes for the transformers that no adapter is for.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: the pipeline has no transformer, or one that no probe can watch.
    """
    return {name: _adapter_of(pipe, found, probes=True) for name, found in _found(pipe).items()}


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of the pipeline's transformer, of the first one if there are two.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: the pipeline has no transformer of a supported family.
    """
    return next(iter(adapters_for(pipe).values()))


def features_device(pipe: Any, adapter: Adapter) -> torch.device:
    """The device on which the blocks of one of the pipeline's transformers give the features.

    If the transformer is divided among devices, it is that of the last block. Offloaded weights are on another one.
    """
    own = adapter.transformer.device
    return hooked_device(adapter) or (pipe._execution_device if own.type in ("cpu", "meta") else own)


def hooked_device(adapter: Adapter) -> torch.device | None:
    """The device to which hooks of accelerate bring the last block; None if there are no such hooks on it."""
    return execution_device(torch.nn.ModuleList(adapter.blocks[-1:]))


def _found(pipe: Any) -> dict[str, Any]:
    return transformers_of(pipe) or {FIRST: None}


def _adapter_of(pipe: Any, transformer: Any, probes: bool) -> Adapter:
    for adapter in ADAPTERS:
        if adapter.handles(transformer):
            return adapter(transformer)
    if (inside := inside_of(transformer)) is not None:
        outer = Said(f"a {type(transformer).__name__} around it")
        remedy = f"Use the {type(inside).__name__} inside. To shard it, call `torch.distributed.fsdp.fully_shard`."
        raise argument_error("pipe", "have the model itself as transformer", outer, remedy, TypeError)
    is_module = isinstance(transformer, torch.nn.Module)
    if is_module and probes:
        return Probe(pipe, transformer)
    families = ", ".join(a.family for a in ADAPTERS)
    got = Said(f"{type(pipe).__name__} with a {type(transformer).__name__}")
    must, remedy = f"have a transformer of a supported family ({families})", "Use such a pipeline."
    if is_module:
        remedy += " For others, only `lesa.enable_cache` works."
    raise argument_error("pipe", must, got, remedy, TypeError)
