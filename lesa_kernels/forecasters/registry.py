"""The forecasters by name. Those of this package are registered when `lesa_kernels.forecasters` is imported."""

import re

from lesa_kernels.checks import argument_error, check_choice
from lesa_kernels.forecasters.base import Forecaster, Option

FORECASTERS: dict[str, Forecaster] = {}
"""The registered forecasters, in the order of their registration."""


def register(forecaster: Forecaster) -> Forecaster:
    """Makes a forecaster known under its name, so that `PredictorConfig(mixer=name)` uses it. Returns it.

    Args:
        forecaster: an instance of a class that has everything that `Forecaster` asks for.

    Raises:
        TypeError: it is no forecaster, or something is missing.
        ValueError: something has the wrong form, or another class has the name or the title. If the same class is
            defined again, as in a notebook, it replaces the one before.
    """
    if not isinstance(forecaster, Forecaster):
        raise argument_error("forecaster", "be a Forecaster", forecaster, "Pass an instance of your class.", TypeError)
    kind = type(forecaster)
    for text in ("name", "title", "label"):
        value = getattr(kind, text, None)
        if not isinstance(value, str) or not value:
            raise _error(kind, text, "be a text", value, TypeError)
    if not re.fullmatch("[a-z][a-z0-9]*(-[a-z][a-z0-9]*)*", kind.name):
        raise _error(kind, "name", "be lower-case words with hyphens between them", kind.name)
    if kind.history not in ("anchors", "steps"):
        raise _error(kind, "history", "be 'anchors' or 'steps'", kind.history)
    for name, option in kind.options.items():
        if not isinstance(option, Option) or not option.minimum <= option.default <= option.maximum:
            raise _error(kind, f"options[{name!r}]", "be an Option whose default is in its range", option)
    for known in FORECASTERS.values():
        for text in ("name", "title"):
            if _place(type(known)) != _place(kind) and getattr(known, text) == getattr(kind, text):
                raise _error(kind, text, f"differ from that of {type(known).__name__}", getattr(kind, text))
    FORECASTERS[kind.name] = forecaster
    return forecaster


def forecaster_of(mixer: str) -> Forecaster:
    """The forecaster that is registered under a name.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    found = FORECASTERS.get(mixer) if isinstance(mixer, str) else None
    return FORECASTERS[check_choice("mixer", mixer, tuple(FORECASTERS))] if found is None else found


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _error(kind: type, what: str, must: str, got: object, error: type[Exception] = ValueError) -> Exception:
    return argument_error(f"{kind.__qualname__}.{what}", must, got, "See docs/adding-a-forecaster.md.", error)
