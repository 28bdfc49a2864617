"""Controls what the commands print: hides messages of other libraries, and works in any encoding."""

import codecs
import contextlib
import logging
import os
import sys
from collections.abc import Iterator

_OF_IMPORTS = {
    "torchao": "Failed to load ",  # its kernels for GPUs and versions of Python that are not here
    "torch.utils._pytree": "%s is an Enum subclass",  # about how torchao registers its types
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
"""Beginnings of messages, by the names of their loggers. They concern how these libraries are built, not the run."""


def quiet_imports() -> None:
    """Hides the messages that importing torchao causes, where it is installed. Other messages are shown."""
    for name, beginning in _OF_IMPORTS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginning))


class _Without(logging.Filter):
    """Stops messages with a certain beginning."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


@contextlib.contextmanager
def printing_everything() -> Iterator[None]:
    """While it is entered, what the encoding of stdout and stderr lacks is printed in another form.

    "µ" is printed as "u", other characters as in a Python string, such as "\\xe9".
    """
    codecs.register_error(_REPLACED, _replace)
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_REPLACED)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before):
            stream.reconfigure(errors=errors)


def discard_output() -> None:
    """Sends what stdout and stderr still hold, and what follows, to nowhere: they can't be written to."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


_REPLACED = "lesa-replaced"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeEncodeError) and error.object[error.start] == "µ":
        return "u", error.start + 1
    text, end = codecs.backslashreplace_errors(error)
    return str(text), end
