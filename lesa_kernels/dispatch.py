"""Which implementation runs: `backend="auto" | "triton" | "extension" | "torch"`.

`auto` takes the first backend that the operation has. The order is Triton, the compiled extension, plain torch for CUDA
tensors, and the compiled extension, plain torch for CPU tensors. If an argument names a backend that can't run, that is
an error which says why. For tests, Triton also runs on CPU tensors in its interpreter: when an argument names it and
the process was started with `TRITON_INTERPRET=1`.

The environment variable `LESA_BACKEND` replaces `auto`. It is read at every call. It applies to all operations. An
operation that does not have the named backend does what `auto` does.
"""

import functools
import importlib
import os
import sys
import warnings

import torch

from lesa_kernels.checks import argument_error, check_choice
from lesa_kernels.extension import extension, extension_error

BACKENDS = ("auto", "triton", "extension", "torch")


def resolve_backend(backend: str, tensor: torch.Tensor, implemented: tuple[str, ...], operation: str) -> str:
    """The backend that runs `operation` on `tensor`, one of `implemented`.

    Args:
        backend: what the caller asked for, one of `BACKENDS`.
        tensor: the tensor whose device decides for "auto".
        implemented: the backends that this operation has for tensors on that device. On a CPU, "triton" counts only in
            the interpreter.
        operation: its name, for messages.

    Raises:
        ValueError: the argument or `LESA_BACKEND` is not the name of a backend.
        RuntimeError: the argument names a backend that this operation doesn't have here, or the extension or Triton is
            asked for and can't be used.

    Warns:
        RuntimeWarning: once, if "auto" takes plain torch because the extension or Triton can't be used.
    """
    check_choice("backend", backend, BACKENDS)
    if "triton" in implemented and tensor.device.type == "cpu" and not _interprets():
        implemented = tuple(name for name in implemented if name != "triton")
    if backend == "auto":
        override = os.environ.get("LESA_BACKEND")
        if not override or check_choice("LESA_BACKEND", override, BACKENDS) not in implemented:
            return _automatic(tensor, implemented, operation)
        chosen = override
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
    if chosen == "extension" and (reason := extension_problem(tensor.device)) is not None:
        extension()  # says why, if it can't be loaded
        raise RuntimeError(
            f'{operation} can\'t run in the compiled extension on {tensor.device}: {reason}. Choose backend="torch".'
        )
    if chosen == "triton" and (reason := triton_error(tensor.device)) is not None:
        raise RuntimeError(f'{operation} can\'t run on Triton: {reason}. Choose backend="torch".')
    return chosen


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.compiler.assume_constant_result  # torch.compile can't trace imports, and the answer does not change
def triton_error(device: torch.device) -> str | None:
    """Why Triton's kernels can't run on tensors of `device`, or None if they can."""
    reason = _triton_import_error()
    if reason is None and torch.version.hip is not None:
        reason = "its kernels are made for NVIDIA GPUs"
    elif reason is None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            reason = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, and its kernels need sm_80 or newer"
    return reason


@functools.cache
def _triton_import_error() -> str | None:
    try:
        importlib.import_module("lesa_kernels.launch")
    except ImportError as error:
        return f"it can't be imported ({error})"
    return None


@torch.compiler.assume_constant_result
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and (
        _triton_import_error() is not None or importlib.import_module("lesa_kernels.launch").INTERPRETED
    )


@torch.compiler.assume_constant_result
def extension_problem(device: torch.device) -> str | None:
    """Why the compiled extension can't run on tensors of `device`, or None if it can."""
    if device.type != "cuda" or extension_error() is not None:
        return extension_error()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index in _RUNS_ON:
        return None
    problem = extension().cuda_problem(index) or None
    if problem is None:
        _RUNS_ON.add(index)  # only successes are kept: a problem such as a lack of memory may go away
    return problem


_RUNS_ON: set[int] = set()  # the CUDA devices that the extension is known to run on


def _automatic(tensor: torch.Tensor, implemented: tuple[str, ...], operation: str) -> str:
    preferred = "triton" if tensor.is_cuda and "triton" in implemented else "extension"
    if preferred not in implemented:
        return "torch"
    if preferred == "extension":
        reason = extension_problem(tensor.device)
        remedy = "Build it with `pip install .` in a checkout of lesa-kernels"
    else:
        reason = triton_error(tensor.device)
        remedy = "Install it with `pip install triton`"
    if reason is not None:
        _warn_once(operation, "the compiled extension" if preferred == "extension" else "Triton", reason, remedy)
        return "torch"
    return preferred


@functools.cache
def _warn_once(operation: str, missing: str, reason: str, remedy: str) -> None:
    warnings.warn(
        f"lesa: {operation} runs in plain torch, because {missing} is not available ({reason}). {remedy}; "
        "LESA_BACKEND=torch chooses plain torch without a warning.",
        RuntimeWarning,
        stacklevel=users_level(),
    )


def users_level() -> int:
    """The `stacklevel` with which a warning names the line that called lesa or lesa_kernels, at any depth."""
    frame, level, ours = sys._getframe(1), 1, ("lesa_kernels", "lesa", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    return level
