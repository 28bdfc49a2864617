"""Whether a kernel may compute an output head from its weights, instead of its modules."""

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormContinuous


def why_not_plain(norm: Any, projection: Any, own_hook: int, device: torch.device) -> str | None:
    """Why the head can't be computed from its weights alone, or None if it can.

    Adapters such as LoRA, quantised weights, hooks, offloading, layerwise casting, context parallelism, compiled
    modules and autocast all change what a module does with its weights.

    Args:
        norm: the last AdaLN.
        projection: the projection after it.
        own_hook: id of the forward pre-hook on `norm` that records features. It changes nothing.
        device: of the features. Weights on another device are moved there only when their module runs.
    """
    kinds: dict[str, tuple[Any, type]] = {
        "norm_out": (norm, AdaLayerNormContinuous),
        "norm_out.linear": (getattr(norm, "linear", None), torch.nn.Linear),
        "norm_out.silu": (getattr(norm, "silu", None), torch.nn.SiLU),
        "norm_out.norm": (getattr(norm, "norm", None), torch.nn.LayerNorm),
        "proj_out": (projection, torch.nn.Linear),
    }
    for name, (module, kind) in kinds.items():
        actual = type(module)
        if actual is not kind:
            return f"{name} is a {actual.__name__}"
        hooks = {*module._forward_hooks, *module._forward_pre_hooks} - {own_hook}
        wrapped = "forward" in vars(module) or hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook")
        if hooks or wrapped or module._compiled_call_impl is not None:
            return f"{name} has a hook or another forward"
        for weight in module.parameters(recurse=False):
            if type(weight) is not torch.nn.Parameter or not weight.is_floating_point() or weight.is_meta:
                return f"{name} has no plain weights"
            if weight.device != device:
                return f"{name} is on {weight.device}, not on {device}"
    if norm.norm.elementwise_affine:
        return "norm_out.norm has weights of its own"
    if torch.is_autocast_enabled(projection.weight.device.type):
        return "autocast is on"
    return None
