"""Several processes that work on one task, as `accelerate launch` and `torchrun` start them.

What they tell each other travels as objects over gloo, whatever backend the models use. All of them must call the same
functions in the same order. An error in one of them is raised in all.
"""

import atexit
import contextlib
import itertools
import os
import pickle
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lesa.artifacts import LOCK, digest, output_folder, owned
from lesa.spread import is_spread
from lesa_kernels.checks import Said, argument_error, usage_error

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(days=30)
"""How long a process waits for the others: one of them may train for hours."""

LATE_S = 60
"""After how many seconds a warning says that others have not begun, and how long a file of another host may need."""

_tasks = itertools.count()
"""Numbers of the calls of `each`. They are the same in all processes."""


class OthersEndedError(RuntimeError):
    """Another process ended before the common work was done."""

    lesa_message = True


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

    @property
    def width(self) -> int:
        """How many items are worked on at the same time."""
        return self.count if self.is_divided else 1

    def begin(self, work: str, settings: Mapping[str, Any]) -> None:
        """Waits until all processes begin the same work. If that takes long, a warning says so.

        Args:
            work: the function that all must call, such as "lesa.record".
            settings: its arguments by name, which must be the same in all processes.

        Raises:
            ValueError: an argument is not. The message names it.
            RuntimeError: another process calls another function.
        """
        if self.count == 1:
            return
        sentence = f"lesa: process {self.rank} waits for the others. All {self.count} processes must call `{work}`."
        late = threading.Timer(LATE_S, warnings.warn, (sentence, RuntimeWarning))
        late.daemon = True
        late.start()
        try:
            every = self._exchange((work, {name: digest(value) for name, value in settings.items()}))
        finally:
            late.cancel()
        first_work, first = every[0]
        for rank, (their_work, theirs) in enumerate(every):
            if their_work != first_work:
                sentence = f"Process {rank} calls `{their_work}`, and the first process calls `{first_work}`."
                raise usage_error(sentence, "All processes must make the same calls.", RuntimeError)
            for name, value in first.items():
                if theirs.get(name) != value:
                    got = Said(f"another value in process {rank} than in the first")
                    remedy = "Pass the same to all, or start the processes without RANK and WORLD_SIZE."
                    raise argument_error(name, f"be the same in all {self.count} processes", got, remedy)

    def share_of(self, items: Sequence[T]) -> list[T]:
        """Those of the items that this process works on. If there are any, the first process has one."""
        return [*items[self.rank :: self.width]] if self.is_divided else [*items]

    def together(self, own: Sequence[T]) -> list[T]:
        """What all processes made of their shares, in the order of the items. Every process must call it."""
        return self._joined(own, None)

    def each(self, items: Sequence[T], do: Callable[[T], R]) -> list[R]:
        """What `do` makes of the items, in their order. Each process works on its share.

        If `do` fails in a process, the others stop after the items that they work on. Then all raise the same error.
        """
        if self.width == 1:
            return [do(item) for item in items]
        made, error, task = [], None, f"failed in {next(_tasks)}"
        try:
            for item in self.share_of(items):
                if _is_done(task):
                    break
                made.append(do(item))
        except Exception as caught:
            error = caught
            is_first_to(task)
        return self._joined(made, error)

    def by_first(self, do: Callable[[], T]) -> T:
        """What `do` gives in the first process. All processes get it, or its error."""
        if self.count == 1:
            return do()
        result: list[Any] = [None, None]
        packed, error = [b""], None
        if self.is_first:
            try:
                result[0] = do()
            except Exception as caught:
                error, result[1] = caught, _Failure.of(caught)
            packed[0] = pickle.dumps(result)
        with self._met() as group:
            dist.broadcast_object_list(packed, src=0, group=group)
        if not self.is_first:
            result = pickle.loads(packed[0])
        self._raise_first(result[1:], error)
        return result[0]

    def in_all(self, do: Callable[[], T]) -> T:
        """What `do` gives in this process. All processes do it, and if it fails in one, all raise its error."""
        if self.count == 1:
            return do()
        made, error = [], None
        try:
            made.append(do())
        except Exception as caught:
            error = caught
        self._raise_first(self._exchange(error and _Failure.of(error)), error)
        return made[0]

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            with self._met():
                pass

    @contextlib.contextmanager
    def owned(self, folder: Path, work: str) -> Iterator[None]:
        """`lesa.artifacts.owned` for all processes: the first one has the lock until all are done.

        Args:
            folder: of this process; on another host it may have another path.
            work: see there.

        Raises:
            RuntimeError: see there.
            ValueError: it is another folder than the one of the first process.
        """
        if self.count == 1:
            with owned(folder, work):
                yield
            return
        with contextlib.ExitStack() as held:

            def hold() -> bytes:
                held.enter_context(owned(folder, work))
                return (folder / LOCK).read_bytes()

            mark = self.by_first(hold)
            self.in_all(lambda: _check_shared(folder, mark))
            yield
            self.wait()

    @contextlib.contextmanager
    def working_folder(self, out_dir: str | os.PathLike | None, work: str) -> Iterator[Path]:
        """A folder that these processes own: `out_dir`, which is made, or else a temporary one.

        Args:
            out_dir: the folder; None for a temporary one.
            work: see `owned`.
        """
        with contextlib.ExitStack() as stack:
            if out_dir is None:
                folder = Path(self.by_first(lambda: stack.enter_context(tempfile.TemporaryDirectory())))
            else:
                folder = self.in_all(lambda: output_folder(out_dir))
            stack.enter_context(self.owned(folder, work))
            yield folder

    def _joined(self, own: Sequence[T], error: Exception | None) -> list[T]:
        """What all have made, in the order of the items. The errors of all are exchanged."""
        if self.width == 1:
            return [*own]
        every = self._exchange(([*own], error and _Failure.of(error)))
        self._raise_first([failure for _, failure in every], error)
        total = sum(len(part) for part, _ in every)
        return [every[number % self.count][0][number // self.count] for number in range(total)]

    def _exchange(self, own: Any) -> list[Any]:
        """What each of the processes gives, by rank."""
        packed = pickle.dumps(own)  # here: if it fails, no other process has ended
        every: list[Any] = [None] * self.count
        with self._met() as group:
            dist.all_gather_object(every, packed, group=group)
        return [pickle.loads(each) for each in every]

    @contextlib.contextmanager
    def _met(self) -> Iterator[Any]:
        """A context that is entered when all processes are here. It gives their group.

        Raises:
            OthersEndedError: another process has ended.
        """
        try:
            group = _group()
            met, pause = dist.barrier(group=group, async_op=True), 0.001
            while not met.is_completed():  # so that an interrupt from the keyboard is seen
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            met.wait()
            yield group
        except RuntimeError as error:  # of gloo, or of the store
            sentence = "Another process has ended before the common work was done."
            remedy = "Its own message says why. The same command continues where it stopped."
            raise usage_error(sentence, remedy, OthersEndedError) from error

    def _raise_first(self, failures: Sequence["_Failure | None"], own: Exception | None) -> None:
        """Raises the error of the first process that failed."""
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise own if own is not None and rank == self.rank else failure.error()


@dataclass(frozen=True)
class _Failure:
    """An error on its way to another process. Its class may have arguments of its own, so it is not made anew."""

    kind: type[Exception]
    arguments: tuple[Any, ...]
    facts: dict[str, Any]

    @staticmethod
    def of(error: Exception) -> "_Failure":
        # Of an OSError, `args` lack the file.
        failure = _Failure(type(error), error.__reduce__()[1], vars(error))  # type: ignore[arg-type]
        with contextlib.suppress(Exception):  # it may hold something that cannot travel
            if str(pickle.loads(pickle.dumps(failure)).error()) == str(error):
                return failure
        facts = {"lesa_message": True} if hasattr(error, "lesa_message") else {}
        return _Failure(RuntimeError, (f"{type(error).__name__}: {error}",), facts)

    def error(self) -> Exception:
        error = self.kind.__new__(self.kind, *self.arguments)
        vars(error).update(self.facts)
        return error


def processes_for(pipe: Any = None) -> Processes:
    """The processes that were started together with this one.

    They are those of the process group of `torch.distributed` if there is one. Else they are those that the variables
    RANK and WORLD_SIZE of the environment name, as `torchrun` and `accelerate launch` set them.

    Args:
        pipe: the pipeline that they run. If a model of it is spread over them, they run it together.

    Raises:
        ValueError: there are several processes, and the environment does not say where to find the others.
    """
    if not dist.is_available():
        return Processes()
    if dist.is_initialized():
        rank, count = dist.get_rank(), dist.get_world_size()
    elif "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if lacking:
            sentence = f"The environment has RANK and WORLD_SIZE for {count} processes, but no {lacking[0]}."
            remedy = "Start them with `torchrun` or `accelerate launch`, or unset RANK to work in one process."
            raise usage_error(sentence, remedy)
    else:
        return Processes()
    is_shared = any(map(is_spread, vars(pipe).values())) if pipe is not None else False
    return Processes(rank, count, not is_shared)


def is_first_to(what: str) -> bool:
    """Whether no other process has called this with the same text before. True if there is no way to know it."""
    store = _store()
    if store is not None:
        with contextlib.suppress(RuntimeError):
            return store.add(what, 1) == 1
    return True


def await_other(what: str, seconds: float) -> None:
    """Waits until a process has called `is_first_to` with this text, but not for ever."""
    until = time.monotonic() + seconds
    while not _is_done(what) and time.monotonic() < until:
        time.sleep(0.05)


def _is_done(what: str) -> bool:
    """Whether a process has called `is_first_to` with this text. False if there is no way to know it."""
    store = _store()
    if store is not None:
        with contextlib.suppress(RuntimeError):
            return store.check([what])
    return False


@cache
def _store() -> Any:
    """A connection to the store through which the processes found each other; None if they did it in another way."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return None
    try:
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    except RuntimeError:
        return None
    return dist.PrefixStore(f"lesa {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _group() -> Any:
    """A group of all processes for objects on the CPU, whatever backend the models use."""
    if not dist.is_initialized():
        # The default group, which accelerate would take over, can do all that it could without us.
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=PATIENCE)
        atexit.register(_leave, dist.group.WORLD)
    return _objects_group(dist.group.WORLD)


@lru_cache(maxsize=1)
def _objects_group(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _leave(world: Any) -> None:
    """Ends the group that was made here. torch warns at the exit of a process with NCCL that does not do so."""
    if dist.is_initialized() and dist.group.WORLD is world:
        dist.destroy_process_group()


def _check_shared(folder: Path, mark: bytes) -> None:
    """Raises `ValueError` unless the folder holds the lock of the first process. A network may need some time."""
    until, lock = time.monotonic() + LATE_S, folder / LOCK
    while not (lock.exists() and lock.read_bytes() == mark):
        if time.monotonic() > until:
            got = Said(f"{folder}, which is another folder for the first process")
            raise argument_error("out_dir", "be a folder that all processes share", got, "Choose one that they share.")
        time.sleep(0.1)
