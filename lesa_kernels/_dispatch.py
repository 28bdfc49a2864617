"""Which implementation runs: `backend="auto" | "triton" | "extension" | "torch"`.

`auto` takes Triton for CUDA tensors and the compiled extension for CPU tensors, each where the operation has it, else
plain torch. A backend that is named in an argument and can't run is an error that says why.

The environment variable `LESA_BACKEND` replaces `auto`; it is read at every call. It speaks to all operations at once,
so it leaves those alone that have no such implementation: they do what `auto` does.
"""

import functools
import os
import warnings

import torch

from lesa_kernels._checks import argument_error, check_choice
from lesa_kernels._extension import extension, extension_error

BACKENDS = ("auto", "triton", "extension", "torch")


def resolve_backend(backend: str, tensor: torch.Tensor, implemented: tuple[str, ...], operation: str) -> str:
    """The backend that runs `operation` on `tensor`, one of `implemented`.

    Args:
        backend: what the caller asked for, one of `BACKENDS`.
        tensor: the tensor whose device decides for "auto".
        implemented: the backends this operation has for tensors on that device.
        operation: its name, for messages.

    Raises:
        ValueError: the argument or `LESA_BACKEND` names no backend.
        RuntimeError: the argument names a backend that this operation doesn't have here, or the extension is asked for
            and can't be loaded.

    Warns:
        RuntimeWarning: once, if "auto" takes plain torch because the extension can't be loaded.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        override = check_choice("LESA_BACKEND", os.environ.get("LESA_BACKEND") or "auto", BACKENDS)
        chosen = override if override in implemented else _automatic(tensor, implemented, operation)
    elif backend in implemented:
        chosen = backend
    else:
        raise argument_error(
            "backend",
            f"be one that {operation} has for {tensor.device.type} tensors ({', '.join(implemented)})",
            backend,
            'Pass backend="auto" to let the tensor\'s device decide.',
            RuntimeError,
        )
    if chosen == "extension":
        extension()  # says why, if it can't be loaded
    return chosen


def _automatic(tensor: torch.Tensor, implemented: tuple[str, ...], operation: str) -> str:
    preferred = "triton" if tensor.is_cuda else "extension"
    if preferred not in implemented:
        return "torch"
    if preferred == "extension" and (reason := extension_error()) is not None:
        _warn_once(operation, reason)
        return "torch"
    return preferred


@functools.cache
def _warn_once(operation: str, reason: str) -> None:
    warnings.warn(
        f"{operation} runs in plain torch, because the compiled extension is not available ({reason}). Build it with "
        "`pip install .` in a checkout of lesa-kernels; LESA_BACKEND=torch chooses plain torch without a warning.",
        RuntimeWarning,
        stacklevel=6,
    )
