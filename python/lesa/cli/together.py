"""What a command does where several processes run it, as under `torchrun`: each message is printed once."""

import contextlib
import os
import warnings
from collections.abc import Iterator

ERROR = "print an error"
PATIENCE_S = 60
"""How long a process waits for the message of another one that failed: that may run the pipeline to explain it."""


def are_several() -> bool:
    """Whether the environment says that this is one of several processes, and where they meet.

    Some clusters set RANK and WORLD_SIZE alone, in each container. Such a process works by itself.
    """
    has_place = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}
    return has_place and int(os.environ.get("WORLD_SIZE") or 1) > 1


def is_first() -> bool:
    """Whether this is the only process, or the first one."""
    return not are_several() or int(os.environ["RANK"]) == 0


def work_alone() -> None:
    """From now on, this process does not know of the others. They must have nothing to do with the command."""
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def may_print(error: BaseException | None) -> bool:
    """Whether this process prints why the command ends: no other one has done so.

    Args:
        error: why. If it is only that another process has ended, that one has some time to say why.
    """
    if not are_several():
        return True
    from lesa.processes import OthersEndedError, await_other, is_first_to

    if isinstance(error, OthersEndedError):
        await_other(ERROR, PATIENCE_S)
    return is_first_to(ERROR)


@contextlib.contextmanager
def printing_once() -> Iterator[None]:
    """A context in which only the first process prints to stdout, and one process prints a warning that many have."""
    if not are_several():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(warnings.catch_warnings())
        show = warnings.showwarning

        def show_once(message, category, filename, lineno, file=None, line=None) -> None:
            from lesa.processes import is_first_to

            if is_first_to(f"warn {category.__name__}: {message}"):
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_once
        yield
