"""Loads the compiled module `lesa_kernels._C` once. If that fails, the reason is kept."""

import importlib
from types import ModuleType

try:
    _module: ModuleType | None = importlib.import_module("lesa_kernels._C")
    _error: str | None = None
except ImportError as error:
    _module, _error = None, str(error)


def extension() -> ModuleType:
    """Returns the compiled module.

    Raises:
        RuntimeError: it could not be loaded. The message says why and what to do.
    """
    if _module is None:
        raise RuntimeError(
            f"The compiled extension lesa_kernels._C is not available ({_error}). Build it with `pip install .` in a "
            'checkout of lesa-kernels (needs a C++17 compiler), or choose backend="torch".'
        )
    return _module


def extension_error() -> str | None:
    """Why the compiled module couldn't be loaded, or None if it is loaded."""
    return _error
