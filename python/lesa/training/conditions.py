"""What a pipeline's samples depend on beside its arguments and the weights of its transformer.

A recording stores it in its manifest, so that it does not continue under other conditions.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin

from lesa.artifacts import digest, fingerprint
from lesa.pipelines import blocks_of


def conditions_of(pipe: Any) -> dict[str, Any]:
    """The conditions of a pipeline by name, in types that JSON has.

    Args:
        pipe: a diffusers pipeline, modular or not.

    Returns:
        `scheduler`: its class and configuration. `pipeline_config`: the pipeline's own options, the components that
        have a configuration and no weights, such as a guider, and the blocks of a modular pipeline. `dtypes`: of the
        weights of each component. `adapters`: by component, the scale of each active adapter. `fused_loras`: their
        names. `quantisation`: by component, how its weights are packed. `weights`: a fingerprint of each component
        but the transformer.
    """
    components = {name: part for name, part in pipe.components.items() if part is not None}
    modules = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    return {
        "scheduler": _options(pipe.scheduler),
        "pipeline_config": _pipeline_options(pipe, components),
        "dtypes": {name: _dtypes(module) for name, module in modules.items()},
        "adapters": {name: scales for name, module in modules.items() if (scales := _adapters(module))},
        "fused_loras": sorted(getattr(pipe, "fused_loras", ())),
        "quantisation": {name: packed for name, module in modules.items() if (packed := _quantisation(module))},
        "weights": {name: fingerprint(module) for name, module in modules.items() if name != "transformer"},
    }


def common_conditions(kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions `given` that `kept` knows too, to be compared.

    Entries that an older version did not write are unknown. A component that only one of the two pipelines has makes
    no samples: one without a text encoder gets embeddings, which are arguments.
    """
    common = {name: value for name, value in given.items() if name in kept}
    for name in {"dtypes", "weights"} & {*common}:
        if isinstance(kept[name], Mapping):
            common[name] = {part: value for part, value in {**kept[name], **common[name]}.items() if part in kept[name]}
    return common


def of_transformer(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Those conditions that change the fingerprint of the transformer too, by name, such as "dtypes.transformer"."""
    found = {name: conditions[name] for name in ("fused_loras",) if name in conditions}
    for name in ("dtypes", "adapters", "quantisation"):
        for aspect, value in _flat(name, conditions.get(name, {})).items():
            if aspect.startswith(f"{name}.transformer"):
                found[aspect] = value
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested values under one name each."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {path: leaf for key, part in value.items() for path, leaf in _flat(f"{name}.{key}", part).items()}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, or that only one of the two has."""
    names = sorted({**one, **other})
    return [name for name in names if name not in one or name not in other or one[name] != other[name]]


def _pipeline_options(pipe: Any, components: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in _options(pipe).items() if name not in components}
    for name, part in components.items():
        if isinstance(part, ConfigMixin) and not isinstance(part, torch.nn.Module) and part is not pipe.scheduler:
            options[name] = _options(part)
    blocks = {path: _class_of(block) for path, block in blocks_of(pipe).items()}
    return {**options, "blocks": blocks} if blocks else options


def _options(thing: Any) -> dict[str, Any]:
    """The class, the configuration and the public options of something that has a configuration."""
    config = {name: value for name, value in dict(thing.config).items() if not name.startswith("_")}
    attributes = {name: value for name, value in vars(thing).items() if not name.startswith("_") and _is_option(value)}
    if hasattr(thing, "timesteps"):  # a scheduler; its other attributes change from run to run
        attributes = {name: getattr(thing, name) for name in ("shift",) if hasattr(thing, name)}
    return {"class": _class_of(thing), **{name: _plain(value) for name, value in {**config, **attributes}.items()}}


def _class_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _is_option(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """The value in types that JSON has, so that equal values stay equal when they are written and read."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if not math.isnan(value) else "nan"
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return digest(value)


def _dtypes(module: torch.nn.Module) -> str:
    """The dtypes of a module's floating-point weights, such as "bfloat16"."""
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in module.parameters() if weight.is_floating_point()}
    return " and ".join(sorted(dtypes))


def _adapters(module: torch.nn.Module) -> dict[str, Any]:
    """The scale of each active adapter: a number, or a digest of the scales of the layers if they differ."""
    scales: dict[str, list[Any]] = {}
    for part in module.modules():
        scaling = getattr(part, "scaling", None)
        if isinstance(scaling, dict) and not getattr(part, "disable_adapters", False):  # a layer of peft
            for name in getattr(part, "active_adapters", ()):
                if name in scaling:
                    scales.setdefault(name, []).append(scaling[name])
        image_scale = getattr(getattr(part, "processor", None), "scale", None)
        if image_scale is not None:
            scales.setdefault("ip_adapter", []).append(image_scale)
    return {name: _one_of(map(_plain, values)) for name, values in scales.items()}


def _one_of(values: Iterable[Any]) -> Any:
    """The value that all have, or a digest of them."""
    first, *others = values
    return first if all(other == first for other in others) else f"by layer: {digest([first, *others])}"


def _quantisation(module: torch.nn.Module) -> dict[str, Any]:
    """How weights are packed: the quantiser's configuration, and a digest of the weights that are no plain tensors."""
    packed = {}
    quantiser = getattr(getattr(module, "config", None), "quantization_config", None)
    if quantiser is not None:
        as_dict = quantiser.to_dict() if hasattr(quantiser, "to_dict") else quantiser
        packed["config"] = json.loads(json.dumps(as_dict, default=str, sort_keys=True))
    weights = {name: weight for name, weight in module.named_parameters() if type(weight.data) is not torch.Tensor}
    if weights:
        packed["types"] = sorted({type(weight.data).__qualname__ for weight in weights.values()})
        packed["weights"] = digest([[name, _parts_of(weight.data)] for name, weight in sorted(weights.items())])
    return packed


def _parts_of(weight: torch.Tensor) -> Any:
    """The plain tensors of which a packed weight consists."""
    if not hasattr(weight, "__tensor_flatten__"):
        return str(weight.dtype), list(weight.shape)
    names, facts = weight.__tensor_flatten__()
    parts = [getattr(weight, name) for name in names]
    return repr(facts), [part if type(part) is torch.Tensor else _parts_of(part) for part in parts]
