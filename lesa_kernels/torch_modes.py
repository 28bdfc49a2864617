"""The modes of torch that a whole process or thread has, and how to leave them for a while."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """A context, also usable as a decorator, in which torch behaves as if nobody had changed its global modes.

    Gradients are enabled, also inside `torch.inference_mode()`. The default dtype is float32, the default device is the
    CPU, and autocast is off. At the end, also after an error, every mode is as it was before.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        # The default dtype belongs to all threads, so it is not touched where it is right already.
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
