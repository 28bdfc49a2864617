"""Where the scale of LoRA is: the argument of the transformer's forward that its class scales LoRA by."""

import inspect

import diffusers
import pytest

from lesa.models import ADAPTERS

CLASSES = {name: adapter for adapter in ADAPTERS for name in adapter.transformer_classes}


@pytest.mark.parametrize("name", CLASSES)
def test_the_scale_of_lora_is_in_the_argument_that_the_forward_reads(name):
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    argument = inspect.getclosurevars(kind.forward).nonlocals.get("kwargs_name")  # of `apply_lora_scale`
    if argument is None and "scale_lora_layers" in kind.forward.__code__.co_names:  # it scales by itself
        argument = "attention_kwargs"
    assert CLASSES[name].attention_kwargs == argument


def test_there_are_forwards_of_both_kinds():
    assert len({adapter.attention_kwargs for adapter in ADAPTERS}) == 3
