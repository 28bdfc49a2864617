"""What type checkers and readers see of the public API of lesa."""

import importlib
import inspect

import pytest

import lesa

DOCUMENTED = [  # beside the names in `lesa.__all__`
    ("lesa.models.adapter", "Adapter"),
    ("lesa.models", "adapter_for"),
    ("lesa.models.costs", "Costs"),
    ("lesa.inputs", "read_inputs"),
    ("lesa.inputs", "write_inputs"),
    ("lesa.inputs", "check_inputs"),
    ("lesa.pipelines", "load_pipeline"),
    ("lesa.contenders", "TaylorSeer"),
    ("lesa.contenders.base", "Contender"),
    ("lesa.contenders.base", "Peer"),
    ("lesa.demo.digits", "inputs_for"),
    ("lesa.demo.photos", "inputs_for"),
    ("lesa.demo.video", "inputs_for"),
]
PUBLIC = [("lesa", name) for name in lesa.__all__ if name != "__version__"] + DOCUMENTED


def functions_of(value):
    """The public functions that a name stands for: itself, or the methods that its class defines."""
    for name, member in vars(value).items() if inspect.isclass(value) else [(value.__name__, value)]:
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            yield name, function


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda value: value)
def test_a_public_signature_is_annotated_in_full(module, name):
    missing = []
    for method, function in functions_of(getattr(importlib.import_module(module), name)):
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        missing += [f"{method}: {p.name}" for p in parameters if p.annotation is p.empty]
        if method != "__init__" and signature.return_annotation is signature.empty:
            missing.append(f"{method}: what it returns")
    assert missing == []
