"""What a predictor was made for: which model, and which noise levels. A predictor has it as its `provenance`."""

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lesa.artifacts import fingerprint
from lesa.conditions import common_conditions, differing, model_conditions_of
from lesa.spread import is_sharded
from lesa_kernels.checks import argument_error

FIRST = "transformer"
"""The component whose fingerprint a manifest has under its own name. Those of others are among its `weights`."""

MOST_OPTIONS = 3
"""How many options of a scheduler a line names."""


def of_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of a recording says of the model, of its noise levels and of how much was recorded.

    Args:
        manifest: of a recording; one of an earlier release has less.

    Returns:
        Of the manifest's entries, under the same names: `family`, `pipeline`, `num_inference_steps`, `samples`,
        `scheduler`, `fused_loras`; of the transformers only, `dtypes`, `adapters` and `quantisation`; `transformer` and
        `weights`, the fingerprints of the first transformer and of others; and `guider`, that of a modular pipeline.
    """
    names = manifest.get("transformers", [FIRST])
    alike = ("family", "pipeline", "num_inference_steps", "samples", "scheduler", "fused_loras")
    found = {name: manifest[name] for name in alike if name in manifest}
    for aspect in ("dtypes", "adapters", "quantisation"):
        if aspect in manifest:
            found[aspect] = {name: value for name, value in manifest[aspect].items() if name in names}
    if "transformer" in manifest:
        found["transformer"] = manifest["transformer"]
    if weights := {name: value for name, value in manifest.get("weights", {}).items() if name in names}:
        found["weights"] = weights
    if guider := manifest.get("pipeline_config", {}).get("guider"):
        found["guider"] = guider
    return found


def differences(provenance: Mapping[str, Any], pipe: Any, models: Mapping[str, torch.nn.Module]) -> list[str]:
    """In words, how a pipeline differs from the one that a predictor was made for.

    What the provenance does not say is not compared, and neither are weights that are elsewhere: offloaded or sharded.

    Args:
        provenance: of the predictor, from `of_manifest`.
        pipe: a diffusers pipeline.
        models: the transformers that the predictor forecasts for, by the names of the components.

    Raises:
        ValueError: an entry of the provenance is no dict, and should be one.
    """
    given = model_conditions_of(pipe, models)
    said = _of_loras(provenance, given)
    for name, model in models.items():
        found = _of_model(provenance, given, name)
        if not found and not said and _has_other_weights(provenance, pipe, name, model):
            found = [f"the weights of `{name}` are others"]
        said += found
    return said + _of_scheduler(provenance, given)


def in_words(provenance: Mapping[str, Any] | None) -> list[str]:
    """What a provenance says of the model, one fact in each string."""
    if not provenance:
        return ["unknown: the predictor does not say it"]
    facts = []
    for name in ("pipeline", "family"):
        if name in provenance:
            facts.append(f"{name}: `{provenance[name]}`")
    packings = _part(provenance, "quantisation")
    for name, dtype in _part(provenance, "dtypes").items():
        packing = f", quantised: {_packing(packings[name])}" if packings.get(name) else ""
        facts.append(f"dtype of `{name}`: {dtype}{packing}")
    fingerprints = {FIRST: provenance.get("transformer"), **_part(provenance, "weights")}
    for name, value in fingerprints.items():
        if value is not None:
            facts.append(f"fingerprint of the weights of `{name}`: `{value}`")
    if knows_adapters(provenance):
        scales = {name: scale for each in _part(provenance, "adapters").values() for name, scale in each.items()}
        facts.append("adapters: " + _listed(f"{name} with scale {scale}" for name, scale in scales.items()))
    if "fused_loras" in provenance:
        facts.append(f"fused LoRAs: {_listed(provenance['fused_loras'])}")
    scheduler = _part(provenance, "scheduler")
    if "class" in scheduler:
        shift = f", shift {scheduler['shift']}" if scheduler.get("shift") is not None else ""
        facts.append(f"scheduler: `{scheduler['class']}`{shift}")
    if "class" in _part(provenance, "guider"):
        facts.append(f"guider: `{provenance['guider']['class']}`")
    return facts


def knows_adapters(provenance: Mapping[str, Any] | None) -> bool:
    """Whether a provenance says which adapters, such as LoRA, were on."""
    return provenance is not None and "adapters" in provenance


def _part(provenance: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = provenance.get(name, {})
    if not isinstance(value, Mapping):
        raise argument_error(f"predictor.provenance[{name!r}]", "be a dict", value, "Restore it, or leave it out.")
    return value


def _of_loras(provenance: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The difference of the LoRAs that are fused into the weights."""
    if "fused_loras" not in provenance or provenance["fused_loras"] == given["fused_loras"]:
        return []
    then, now = (_listed(value) for value in (provenance["fused_loras"], given["fused_loras"]))
    return [f"the fused LoRAs were {then} and are {now}"]


def _of_model(provenance: Mapping[str, Any], given: Mapping[str, Any], name: str) -> list[str]:
    """The differences of one transformer that have names: its dtype, its quantisation and its adapters."""
    said = []
    then, now = _part(provenance, "dtypes").get(name), given["dtypes"].get(name)
    if then is not None and then != now:
        said.append(f"the dtype of `{name}` was {then} and is {now}")
    then, now = _part(provenance, "quantisation").get(name), given["quantisation"].get(name)
    if "quantisation" in provenance and then != now:
        was, is_now = _packing(then), _packing(now)
        other = f"the quantised weights of `{name}` are others"
        said.append(other if was == is_now else f"the quantisation of `{name}` was {was} and is {is_now}")
    if not knows_adapters(provenance):
        return said
    before, after = (scales.get(name) or {} for scales in (_part(provenance, "adapters"), given["adapters"]))
    for adapter in differing(before, after):
        if adapter not in before:
            said.append(f"the adapter {adapter} is on with scale {after[adapter]}, and was not")
        elif adapter not in after:
            said.append(f"the adapter {adapter} was on with scale {before[adapter]}, and is not")
        else:
            said.append(f"the scale of the adapter {adapter} was {before[adapter]} and is {after[adapter]}")
    return said


def _packing(quantisation: Mapping[str, Any] | None) -> str:
    """How weights are packed, in words."""
    if not quantisation:
        return "none"
    config = quantisation.get("config") or {}
    parts = [f"{key} {value}" for key, value in sorted(config.items()) if isinstance(value, (bool, int, str)) and value]
    return ", ".join(parts or quantisation.get("types", ())) or "another one"


def _of_scheduler(provenance: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The differences of the scheduler: its class, or else the first of its options."""
    then = _part(provenance, "scheduler")
    if not then or "scheduler" not in given:
        return []
    now = common_conditions({"scheduler": then}, given)["scheduler"]
    if then.get("class") != now.get("class"):
        return [f"the scheduler was {then.get('class')} and is {now.get('class')}"]
    names = differing(then, now)
    said = [f"scheduler.{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in names[:MOST_OPTIONS]]
    left = len(names) - len(said)
    return said + ([f"{left} more options of the scheduler differ"] if left else [])


def _has_other_weights(provenance: Mapping[str, Any], pipe: Any, name: str, model: torch.nn.Module) -> bool:
    """Whether the weights of a transformer are known to be others. Those of a model that is offloaded are not read."""
    kept = provenance.get("transformer") if name == FIRST else _part(provenance, "weights").get(name)
    if kept is None or _is_elsewhere(model) or _has_idle_adapters(model):
        return False
    device = pipe._execution_device
    if any(parameter.device != device for parameter in model.parameters()):
        return False
    return _fingerprint_of(model) != kept


_FINGERPRINTS: WeakKeyDictionary[torch.nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()
"""By transformer, the state in which its weights were read, and their fingerprint."""

PROBED = 8
"""How many values of each weight the state has."""


def _fingerprint_of(model: Any) -> str:
    """The fingerprint of a transformer. All its weights are read only if they have changed since the last time."""
    state = _state_of(model)
    if state is None:
        return fingerprint(model)
    known = _FINGERPRINTS.get(model)
    if known is None or known[0] != state:
        known = _FINGERPRINTS[model] = (state, fingerprint(model))
    return known[1]


@torch.no_grad()
def _state_of(model: Any) -> list[Any] | None:
    """What changes with the weights of a transformer and takes little time to read; None if it can't be told.

    Changes through `.data` do not count as a new version of a tensor. PEFT fuses adapters in this way. So there are a
    few values of each weight too.
    """
    weights = [*model.named_parameters()]
    if any(type(weight.data) is not torch.Tensor or weight.is_inference() for _, weight in weights):
        return None
    if not all(weight.is_contiguous() for _, weight in weights):
        return None
    adapters = model.active_adapters() if getattr(model, "_hf_peft_config_loaded", False) else []
    state: list[Any] = [adapters]
    probes = []
    for name, weight in weights:
        state.append((name, weight.data_ptr(), weight._version, weight.dtype, weight.shape))
        flat = weight.detach().flatten()
        probes.append(flat[:: max(1, len(flat) // PROBED)][:PROBED].float())
    return [*state, torch.cat(probes).cpu().numpy().tobytes()] if probes else state


def _is_elsewhere(model: torch.nn.Module) -> bool:
    """Whether weights are offloaded or shared among processes: to read them all would make enabling slow."""
    return any(weight.is_meta or is_sharded(weight) for weight in model.parameters())


def _has_idle_adapters(model: Any) -> bool:
    """Whether adapters are loaded that are off: they are among the parameters, and do not change the samples."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return False
    layers = [layer for layer in model.modules() if hasattr(layer, "disable_adapters")]
    on = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    return bool({*getattr(model, "peft_config", ())} - on)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
