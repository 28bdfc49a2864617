"""Whether a kernel may compute an output head from its weights, instead of its modules."""

from collections.abc import Mapping
from typing import Any

import torch


def why_not_plain(parts: Mapping[str, tuple[Any, type | str]], own_hook: int, device: torch.device) -> str | None:
    """Why the head can't be computed from its weights alone, or None if it can.

    Adapters such as LoRA, quantised weights, hooks, offloading, layerwise casting, context parallelism, compiled
    modules and autocast all change what a module does with its weights.

    Args:
        parts: by name, the head's modules, and the type that each must have; a str is the full name of a type.
        own_hook: id of the forward pre-hook that records features. It changes nothing.
        device: of the features. Weights on another device are moved there only when their module runs.
    """
    for name, (module, kind) in parts.items():
        actual = type(module)
        if actual is not kind and f"{actual.__module__}.{actual.__qualname__}" != kind:
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
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return None
