"""Which implementation runs: `backend="auto" | "triton" | "extension" | "torch"`.

`auto` takes Triton for CUDA tensors and plain torch for CPU tensors. The environment variable `LESA_BACKEND` overrides
`auto`; it is read at every call. A backend that was asked for and can't run is an error that says why.
"""

import os

import torch

from lesa_kernels._checks import argument_error, check_choice

BACKENDS = ("auto", "triton", "extension", "torch")


def requested_backend(backend: str) -> str:
    """Returns `backend`, or what `LESA_BACKEND` says where it is "auto".

    Raises:
        ValueError: the argument or the variable names no backend.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return check_choice("LESA_BACKEND", os.environ.get("LESA_BACKEND", "auto"), BACKENDS)
    return backend


def resolve_backend(backend: str, tensor: torch.Tensor, implemented: tuple[str, ...], operation: str) -> str:
    """The backend that runs `operation` on `tensor`.

    Args:
        backend: what the caller asked for, one of `BACKENDS`.
        tensor: the tensor whose device decides for "auto".
        implemented: the backends this operation has.
        operation: its name, for the message.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: a backend was asked for by name and this operation can't run on it.
    """
    backend = requested_backend(backend)
    if backend == "auto":
        return "triton" if tensor.is_cuda and "triton" in implemented else "torch"
    if backend not in implemented:
        raise argument_error(
            "backend",
            f"be one that {operation} is implemented for ({', '.join(implemented)})",
            backend,
            'Pass backend="auto" to let the tensor\'s device decide.',
            RuntimeError,
        )
    return backend
