"""What a pipeline's samples depend on beside its arguments and the weights of its transformer.

A recording stores it in its manifest, and an evaluation in its settings, so that neither continues under other
conditions.
"""

import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.hooks import layer_skip

from lesa.artifacts import digest, fingerprint, sum_of_bits
from lesa.pipelines import blocks_of
from lesa.spread import class_of, local_part, reshard, values_elsewhere

_PACKAGES = {"torch", "diffusers", "transformers", "accelerate", "peft", "torchao", "bitsandbytes", "optimum", "lesa"}
"""Packages whose functions around a model make no other samples, or are seen by the other conditions."""


def conditions_of(pipe: Any) -> dict[str, Any]:
    """The conditions of a pipeline by name, in types that JSON has.

    Args:
        pipe: a diffusers pipeline, modular or not.

    Returns:
        `scheduler`: its class and configuration. `pipeline_config`: the pipeline's own options, the components that
        have a configuration and no weights, such as a guider, and the blocks of a modular pipeline. `dtypes`: of the
        weights of each component. `adapters`: by component, the scale of each active adapter. `fused_loras`: their
        names. `quantisation`: by component, how its weights are packed. `configs` and `weights`: by component, its
        configuration, and a fingerprint where it is not the transformer. `buffers`: by component, a digest of those
        that are saved with the weights. `autocast`: its dtype by kind of device. `tokenizers`: by component, its size
        and options. `replaced`: by component and path, the functions of other packages that wrap or replace a forward,
        and attention processors of other packages.
        `unset`: by the path of a configuration, the options in it that have their defaults. A manifest leaves it out.
    """
    components = _components(pipe)
    modules = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    for module in modules.values():
        reshard(module)
    configured = {name: part for name, part in components.items() if isinstance(part, ConfigMixin)}
    others = {name: part for name, part in configured.items() if name not in modules and part is not pipe.scheduler}
    models = {name: part for name, part in configured.items() if name in modules}
    own = {name: value for name, value in _options(pipe).items() if name not in components}
    blocks = {path: _class_of(block) for path, block in blocks_of(pipe).items()}
    configurations = {"scheduler": pipe.scheduler, "pipeline_config": pipe}
    configurations |= {f"pipeline_config.{name}": part for name, part in others.items()}
    configurations |= {f"configs.{name}": part for name, part in models.items()}
    return {
        "scheduler": _options(pipe.scheduler),
        "pipeline_config": {
            **own,
            **_with_lists(pipe, {name: _options(part) for name, part in others.items()}),
            "blocks": blocks,
        },
        "configs": {name: _options(model) for name, model in models.items()},
        "dtypes": {name: _dtypes(module) for name, module in modules.items()},
        "adapters": {name: scales for name, module in modules.items() if (scales := _adapters(module))},
        "fused_loras": sorted(getattr(pipe, "fused_loras", ())),
        "quantisation": {name: packed for name, module in modules.items() if (packed := _quantisation(module))},
        "tokenizers": {name: _tokenizer(part) for name, part in components.items() if hasattr(part, "all_special_ids")},
        "weights": {name: fingerprint(module) for name, module in modules.items() if name != "transformer"},
        "buffers": {name: made for name, module in modules.items() if (made := _buffers(module)) is not None},
        "replaced": {name: functions for name, module in modules.items() if (functions := _replaced(module))},
        "autocast": _autocast(),
        "unset": {path: _unset(part) for path, part in configurations.items()},
    }


def model_conditions_of(pipe: Any, models: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """Those of `conditions_of` that tell of these components and of the scheduler. They read no plain weights.

    Args:
        pipe: a diffusers pipeline, modular or not.
        models: components by name.

    Returns:
        `dtypes`, `adapters`, `fused_loras`, `quantisation`, `unset`; and `scheduler`, if that has a configuration.
    """
    scheduler = getattr(pipe, "scheduler", None)
    of_scheduler: dict[str, Any] = {"unset": {}}
    if isinstance(scheduler, ConfigMixin):
        of_scheduler = {"scheduler": _options(scheduler), "unset": {"scheduler": _unset(scheduler)}}
    return {
        "dtypes": {name: _dtypes(module) for name, module in models.items()},
        "adapters": {name: scales for name, module in models.items() if (scales := _adapters(module))},
        "fused_loras": sorted(getattr(pipe, "fused_loras", ())),
        "quantisation": {name: packed for name, module in models.items() if (packed := _quantisation(module))},
        **of_scheduler,
    }


def common_conditions(kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions `given` that `kept` knows too, to be compared.

    Entries that an older version of lesa did not write are unknown. So are options that an older version of diffusers
    did not have, unless they were changed from the default. A component that only one pipeline has is not compared. A
    pipeline without a text encoder gets embeddings, which are compared as arguments.
    """
    common = {name: value for name, value in given.items() if name in kept and name != "unset"}
    for name in {"buffers", "configs", "dtypes", "tokenizers", "weights"} & {*common}:
        common[name] = {part: value for part, value in {**kept[name], **common[name]}.items() if part in kept[name]}
    shared = {*kept.get("dtypes", given["dtypes"])} & {*given["dtypes"]}
    for name in {"quantisation", "replaced"} & {*common}:
        others = {part: value for part, value in kept[name].items() if part not in shared}
        common[name] = others | {part: value for part, value in common[name].items() if part in shared}
    return _without_new(common, kept, given.get("unset", {}), "")


def _without_new(given: Mapping[str, Any], kept: Mapping[str, Any], unset: Mapping[str, Any], path: str) -> dict:
    """The nested values without the options that `kept` lacks and that have their defaults."""
    left = {name: value for name, value in given.items() if name in kept or name not in unset.get(path, ())}
    for name, value in left.items():
        if isinstance(value, Mapping) and isinstance(kept.get(name), Mapping):
            left[name] = _without_new(value, kept[name], unset, f"{path}.{name}" if path else name)
    return left


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


def _buffers(module: torch.nn.Module) -> str | None:
    """A digest of the sums of the buffers that a model saves with its weights; None if it has none."""
    weights = {name for name, _ in module.named_parameters()}
    saved = {name: value for name, value in module.state_dict().items() if name not in weights}
    tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    elsewhere = values_elsewhere(module) if tensors else {}
    tensors = {name: elsewhere[name]() if name in elsewhere else value for name, value in tensors.items()}
    facts = {name: [str(t.dtype), list(t.shape), sum_of_bits(t.detach())] for name, t in tensors.items()}
    return digest(facts) if facts else None


def _components(pipe: Any) -> dict[str, Any]:
    """The components by name, None where there is none."""
    if isinstance(pipe, ModularPipeline):
        parts = pipe.components
    else:  # `pipe.components` would raise if an option was registered that is no argument of the pipeline's class
        parts = {name: vars(pipe)[name] for name in pipe.config if name in vars(pipe) and not name.startswith("_")}
    return {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}  # from `torch.compile(part)`


def _options(thing: Any) -> dict[str, Any]:
    """The class, the configuration and the public options of something that has a configuration."""
    config = {name: value for name, value in thing.config.items() if not name.startswith("_")}
    options = {name: _plain(value) for name, value in {**config, **_attributes(thing)}.items()}
    return {"class": _class_of(thing), **options}


def _with_lists(pipe: Any, options: Any) -> Any:
    """Options of guiders, with the list of blocks that `fqn="auto"` stands for.

    A guider writes it into its options when it begins, so options from before and after a run would differ. Diffusers
    chooses it from a set, so it may be another one in another process.
    """
    if isinstance(options, list):
        return [_with_lists(pipe, part) for part in options]
    if not isinstance(options, Mapping):
        return options
    named = {name: _with_lists(pipe, part) for name, part in options.items()}
    if named.get("fqn") == "auto":
        lists = getattr(layer_skip, "_ALL_TRANSFORMER_BLOCK_IDENTIFIERS", ())
        named["fqn"] = next((name for name in lists if hasattr(pipe.transformer, name)), "auto")
    return named


def _unset(thing: Any) -> list[str]:
    """The options that have the default values of the class, and those that are no part of the configuration."""
    defaults = {name: given.default for name, given in inspect.signature(type(thing).__init__).parameters.items()}
    config = {name: _plain(value) for name, value in thing.config.items() if name in defaults}
    same = {name for name, value in config.items() if value == _plain(defaults[name])}
    return sorted(same.union(name for name in _attributes(thing) if name not in thing.config))


def _attributes(thing: Any) -> dict[str, Any]:
    """Public attributes that hold options."""
    if hasattr(thing, "timesteps"):  # a scheduler; its other attributes change from run to run
        has_own = hasattr(type(thing), "shift") or "shift" in vars(thing)  # else it is in the configuration, if at all
        return {"shift": thing.shift} if has_own else {}
    if isinstance(thing, torch.nn.Module):  # its configuration says everything
        return {}
    kinds = (bool, int, float, str, list, tuple, set, dict)
    return {name: value for name, value in vars(thing).items() if not name.startswith("_") and isinstance(value, kinds)}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    names = ("model_max_length", "padding_side", "truncation_side", "chat_template")
    options = {name: _plain(getattr(tokenizer, name, None)) for name in names}
    return {"size": len(tokenizer), "special": sorted({*tokenizer.all_special_ids}, key=str), **options}


def _replaced(module: torch.nn.Module) -> dict[str, list[str]]:
    """By the path of a part, the functions of other packages that wrap or replace its forward or process attention."""
    found: dict[str, list[str]] = {}
    for path, part in module.named_modules():
        # The second is what hooks of accelerate call. Other hooks are left out: many of them only watch a run.
        functions = [getattr(part, name, None) for name in ("forward", "_old_forward", "processor")]
        names = [name for function in functions for name in _other_functions(function)]
        if names:
            found[path or "itself"] = names
    return found


def _other_functions(function: Any) -> Iterator[str]:
    """The names of a function and of those that it wraps, without those of the packages that pipelines consist of.

    Autocast counts, because it changes what a forward computes.
    """
    while function is not None:
        while isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)  # its own, also if it has the name of what it wraps
        module = type(function).__module__ if code is None else function.__globals__.get("__name__", "")
        if module.partition(".")[0] not in _PACKAGES or module.startswith("torch.amp"):
            yield f"{module}.{type(function).__qualname__ if code is None else code.co_name}"
        function = getattr(function, "__wrapped__", None)


def _class_of(thing: Any) -> str:
    return class_of(thing).__qualname__


def _autocast() -> dict[str, str]:
    """The dtype of autocast by kind of device, where it is on."""
    return {
        kind: str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    }


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
    if dataclasses.is_dataclass(value):  # such as the layers that a guider skips
        fields = (field.name for field in dataclasses.fields(value) if not field.name.startswith("_"))
        return {name: _plain(getattr(value, name)) for name in fields}
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
    plain = (torch.Tensor, torch.nn.Parameter)
    named = {name: local_part(weight) for name, weight in sorted(module.named_parameters())}
    weights = {name: weight for name, weight in named.items() if type(weight) not in plain}
    weights |= {name: weight for name, weight in named.items() if type(weight.data) is not torch.Tensor}
    if weights:
        packed["types"] = sorted({type(weight.data).__qualname__ for weight in weights.values()})
        packed["weights"] = digest({name: _parts_of(weight.data) for name, weight in weights.items()})
    return packed


def _parts_of(weight: torch.Tensor) -> Any:
    """What distinguishes a packed weight from others, from the plain tensors of which it consists."""
    if type(weight) is torch.Tensor or not hasattr(weight, "__tensor_flatten__"):
        return str(weight.dtype), list(weight.shape), sum_of_bits(weight)
    names, facts = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    return repr(facts), {name: _parts_of(part) for name, part in parts.items() if isinstance(part, torch.Tensor)}
