"""Several processes that work on one task, as `accelerate launch` and `torchrun` start them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for the others: one of them may train for hours."""


@dataclass(frozen=True)
class Processes:
    """The processes that work on one task.

    Args:
        rank: which of them this is.
        count: how many there are.
        is_divided: whether each of them runs the pipeline on samples of its own. If not, all of them run it together
            on each sample, as under context parallelism.
    """

    rank: int = 0
    count: int = 1
    is_divided: bool = True

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have made."""
        return self.rank == 0

    def share_of(self, items: Sequence[T]) -> list[T]:
        """Those of the items that this process works on."""
        return [*items[self.rank :: self.count]] if self.is_divided else [*items]

    def together(self, own: Sequence[T]) -> list[T]:
        """What all processes made of their shares, in the order of the items. Every process must call it."""
        if self.count == 1 or not self.is_divided:
            return [*own]
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, [*own], group=_group())
        total = sum(map(len, parts))
        return [parts[number % self.count][number // self.count] for number in range(total)]

    def by_first(self, do: Callable[[], T]) -> T:
        """What `do` gives in the first process. All processes get it, or its exception."""
        if self.count == 1:
            return do()
        result: list[Any] = [None, None]
        if self.is_first:
            try:
                result[0] = do()
            except Exception as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, group=_group())
        if result[1] is not None:
            raise result[1]
        return result[0]

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            dist.barrier(group=_group())


def processes_for(pipe: Any = None) -> Processes:
    """The processes that were started together with this one.

    Args:
        pipe: the pipeline that they run. If its transformer is spread over them, they run it together.
    """
    if not (dist.is_available() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return Processes()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    transformer = getattr(pipe, "transformer", None)
    is_spread = getattr(transformer, "_parallel_config", None) is not None
    return Processes(rank, count, not is_spread)


@cache
def _group() -> Any:
    """A group of all processes for objects on the CPU, whatever backend the models use."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return dist.new_group(backend="gloo", timeout=PATIENCE)
