"""One file per model family: where its output head begins, what the head needs, and what the model costs."""

from typing import Any

from lesa.models.adapter import Adapter
from lesa.models.cogvideox import CogVideoXAdapter
from lesa.models.cogview import CogView3PlusAdapter, CogView4Adapter
from lesa.models.cosmos import CosmosAdapter
from lesa.models.flux import FluxAdapter
from lesa.models.hunyuan_video import HunyuanVideoAdapter
from lesa.models.kandinsky5 import Kandinsky5Adapter
from lesa.models.ltx import LTXVideoAdapter
from lesa.models.mochi import MochiAdapter
from lesa.models.qwen_image import QwenImageAdapter
from lesa.models.sana import SanaAdapter, SanaVideoAdapter
from lesa.models.sd3 import SD3Adapter
from lesa_kernels.checks import Said, argument_error

ADAPTERS: tuple[type[Adapter], ...] = (
    FluxAdapter,
    QwenImageAdapter,
    HunyuanVideoAdapter,
    SD3Adapter,
    LTXVideoAdapter,
    CogVideoXAdapter,
    SanaAdapter,
    SanaVideoAdapter,
    MochiAdapter,
    CogView4Adapter,
    CogView3PlusAdapter,
    Kandinsky5Adapter,
    CosmosAdapter,
)
"""The adapters of all supported families."""


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of the pipeline's transformer.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: the pipeline has no transformer of a supported family.
    """
    transformer = getattr(pipe, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)  # from `torch.compile(transformer)`
    for adapter in ADAPTERS:
        if adapter.handles(transformer):
            return adapter(transformer)
    families = ", ".join(a.family for a in ADAPTERS)
    got = Said(f"{type(pipe).__name__} with a {type(transformer).__name__}")
    raise argument_error(
        "pipe", f"have a transformer of a supported family ({families})", got, "Use such a pipeline.", TypeError
    )
