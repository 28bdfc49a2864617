"""The modes of torch that a thread can be in, and how to leave them for a while."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """A context, also usable as a decorator, in which the thread has the modes that torch starts with.

    Gradients are enabled, also inside `torch.inference_mode()`. New tensors are on the CPU, and autocast is off. At the
    end, also after an error, every mode is as it was before. The default dtype belongs to all threads, so it is not
    changed: where a dtype matters, it is given.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
