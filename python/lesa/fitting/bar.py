"""One progress bar over everything that `fit` does."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

from lesa.training.searching import Search


class Bar:
    """Counts calls of the transformers, steps of optimisers and parts of searches. Each is one step of the bar.

    The work is divided into parts. How many steps each has was estimated before. A part that needs fewer steps, such as
    one that an earlier call has finished, fills its share of the bar at its end.

    Args:
        is_shown: whether there is a bar.
    """

    def __init__(self, is_shown: bool):
        self._bar = tqdm(desc="fit", unit="step", disable=not is_shown, dynamic_ncols=True)
        self._done = self._within = self._expected = 0
        self._thread = threading.get_ident()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar, and a text above it is seen."""
        return not self._bar.disable

    @property
    def done(self) -> int:
        """How many steps all parts that have ended had."""
        return self._done

    def say(self, text: str) -> None:
        """Shows a text above the bar."""
        if self.is_shown:
            tqdm.write(text, file=sys.stderr)

    def plan(self, steps: int) -> None:
        """Sets how many steps there are after those that are done."""
        self._bar.total = self._done + steps
        self._bar.refresh()

    @contextlib.contextmanager
    def counting(self, transformers: Iterable[torch.nn.Module]) -> Iterator[None]:
        """A context in which the bar moves with these transformers and with the optimisers of this thread."""
        hooks: list[Any] = [each.register_forward_hook(lambda *_: self.step()) for each in transformers]
        hooks.append(register_optimizer_step_post_hook(lambda *_: self.step()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def part(self, name: str, steps: int) -> Iterator[None]:
        """A context for a part of the work, which has about so many steps."""
        self._bar.set_description(name)
        self._within, self._expected = 0, steps
        yield
        self.skip(0)
        self._done, self._expected = self._done + steps, 0
        self._show(self._done)

    def skip(self, steps: int) -> None:
        """Leaves out work that is not needed."""
        self._done += steps
        self._show(self._done)

    def step(self) -> None:
        """Called after each step. Those beyond what was expected of the part do not move the bar."""
        if threading.get_ident() == self._thread and self._within < self._expected:
            self._within += 1
            self._show(self._done + self._within)

    def _show(self, done: int) -> None:
        self._bar.update(done - self._bar.n)


class CountedSearch(Search):
    """A search that moves a bar after each part. For the arguments, see `Search`."""

    on_part: Callable[[], None] = staticmethod(lambda: None)

    def part(self, name: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        """See `Search`."""
        found = super().part(name, compute, *arguments)
        self.on_part()
        return found
