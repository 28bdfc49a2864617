"""Writes samples in a thread, while the pipeline makes the next ones."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """A context in which one thread writes what it is given, in that order.

    At most one task is not finished at a time, so at most two batches of samples are in memory: one that is written and
    one that is made. At the end of the context, also after an error or Ctrl-C, the last task is finished.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "lesa-writer")
        self._last: Future[None] | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.check()

    def write(self, task: Callable[[], None]) -> None:
        """Waits until the task before is finished, and begins this one. Raises what the one before raised."""
        self.finish()
        self._last = self._thread.submit(task)

    def finish(self) -> None:
        """Waits until the last task is finished. Raises what it raised."""
        if self._last is not None:
            self._last.result()

    def check(self) -> None:
        """Raises what the last task raised, if it has failed already. It does not wait."""
        if self._last is not None and self._last.done():
            self._last.result()
