"""What long work leaves on disk.

Files are whole or absent. One process at a time works in a folder. Work that was interrupted continues with the same
settings, or there is a clear error. A digest identifies what was used.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from lesa.spread import check_not_packed, is_sharded, local_part, reshard, sum_over_processes, values_elsewhere
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lesa-lock"
"""The file that says who works in a folder."""

CONTINUE = "Continue with the same arguments and model, or choose another folder."
"""The remedy if unfinished work was begun with other settings."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
"""What the system says of a file system without locks, such as Lustre by default."""

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs"}
"""File systems of one machine."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, beside `path`. The file gets its own name when it is complete.

    After an interruption, a full disk or a power cut, `path` is absent or has its earlier contents.

    Raises:
        OSError: the file cannot be written. The message names it.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())  # or a power cut could leave an empty file under the final name
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def output_folder(out_dir: str | os.PathLike, to_write: bool = True) -> Path:
    """The folder, which is made if it is missing.

    Args:
        out_dir: its path.
        to_write: whether something will certainly be written there.

    Raises:
        TypeError, ValueError: it is no path, or an empty one; or it, or a folder above it, is a file.
        OSError: nothing can be written there.
    """
    if not isinstance(out_dir, (str, os.PathLike)) or not (name := os.fspath(out_dir)) or "\0" in os.fsdecode(name):
        kind = ValueError if isinstance(out_dir, str) else TypeError
        raise argument_error("out_dir", "be a path", out_dir, "Pass the path of a folder.", kind)
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if to_write:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except (FileExistsError, NotADirectoryError):
        got = Said(f"{folder}, where there is a file")
        raise argument_error("out_dir", "be a folder", got, "Choose another folder.") from None
    except OSError as error:
        must, got = "be a folder to write to", Said(f"{folder} ({error.strerror})")
        raise argument_error("out_dir", must, got, "Choose another folder.", type(error)) from None
    return folder


def files_in(folder: Path) -> list[Path]:
    """What a folder holds, without files whose names begin with a dot, such as a lock or `.DS_Store`."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@contextlib.contextmanager
def owned(folder: Path, work: str) -> Iterator[None]:
    """A context in which no other process works in the folder, and no other call of this process.

    The operating system frees the lock of a process that was killed, and the next one takes it over. Where the file
    system has no locks, the process number in the file decides. A lock that was left by another machine is not taken
    over, because this machine cannot know whether that process still runs. A container that is restarted has another
    host name on the same machine: its lock is taken over on a local file system.

    Args:
        folder: an existing folder. It holds the file `.lesa-lock` during the context.
        work: what is done in it, for the message of others: "recording".

    Raises:
        RuntimeError: another call works there. The message says which process it is.
    """
    path = folder / LOCK
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "boot": _boot(),
    }
    lock = _locked(path)
    try:
        try:
            os.ftruncate(lock, 0)
            os.write(lock, json.dumps({**owner, "work": work}).encode())
        except OSError as error:
            error.filename = str(path)
            raise
        yield
    finally:
        if os.getpid() == owner["pid"]:  # not in a process that was forked meanwhile
            path.unlink(missing_ok=True)
        os.close(lock)


def remove_stale_lock(folder: Path) -> None:
    """Removes what a process left that was killed when its work was done."""
    if (folder / LOCK).exists():
        with contextlib.suppress(OSError, RuntimeError), owned(folder, "looking"):
            pass


def _locked(path: Path) -> int:
    """Opens and locks the file; returns its descriptor."""
    while True:
        try:
            file, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                file, is_new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # its owner removed it just now
                continue
        try:
            _check_free(path, file, is_new)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its owner removed it before it was locked here


def _check_free(path: Path, file: int, is_new: bool) -> None:
    """Locks the open file, or raises `RuntimeError` if another call has it."""
    has_locks = fcntl is not None
    try:
        if has_locks:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, _owner(path), "Wait until it has ended, or choose another folder.") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        has_locks = False
    owner = _owner(path)
    is_elsewhere = bool(owner) and owner.get("host") != socket.gethostname()
    if is_elsewhere and has_locks and _boot() is not None and owner.get("boot") == _boot():
        is_elsewhere = not _is_local(path)  # the lock was granted, so no process of this machine has it
    if is_elsewhere or not (has_locks or is_new or _has_ended(owner)):
        raise _in_use(path, owner, f"If that process has ended, delete {path}.")


def _boot() -> str | None:
    """What distinguishes this start of this machine from others; None if the system does not say it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def _is_local(path: Path) -> bool:
    """Whether the path is known to be on a file system of this machine alone."""
    kinds = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
            _, place, kind, *_ = line.split(" ")
            kinds[place.replace("\\040", " ")] = kind  # of several in one place, the last one is seen
    above = [str(place) for place in path.resolve().parents]
    return next((kinds[place] for place in above if place in kinds), None) in _LOCAL


def _owner(path: Path) -> dict[str, Any]:
    """Who wrote the lock; empty if nobody finished writing it."""
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _has_ended(owner: Mapping[str, Any]) -> bool:
    """Whether no process has the owner's number any more. Only for a process of this machine."""
    if fcntl is None:  # Windows, where `os.kill` would interrupt it
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except (KeyError, ValueError, TypeError, PermissionError):  # not known, or of another user
        return False
    except ProcessLookupError:
        return True
    return False


def _in_use(path: Path, owner: Mapping[str, Any], remedy: str) -> Exception:
    who = "another process"
    if owner:
        this = " (this one)" if owner.get("pid") == os.getpid() and owner.get("host") == socket.gethostname() else ""
        who = f"process {owner.get('pid')}{this} on {owner.get('host')}, {owner.get('work')} since {owner.get('since')}"
    got = Said(f"{path.parent}, in which {who} works")
    return argument_error("out_dir", "be a folder that no other process is using", got, remedy, RuntimeError)


def remove_partial(path: Path) -> None:
    """Removes what an interrupted `whole_file` left beside `path`."""
    path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, in UTF-8. Of a file's name that is no text, it writes the bytes."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is no such file, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def check_same_settings(work: str, kept: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless unfinished work can continue with the settings that were given.

    Args:
        work: what continues and where, such as "the unfinished training in runs/a".
        kept: its settings, by name.
        given: the settings of this call, by name. All of them are compared. The message names the first one that
            differs, and of a nested setting its first entry that differs, as "config.rank".
    """
    for name, value in given.items():
        before = kept.get(name)
        if before == value:
            continue
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            keys = {**value, **before}
            nested = {f"{name}.{key}": value.get(key) for key in keys}
            check_same_settings(work, {f"{name}.{key}": before.get(key) for key in keys}, nested)
        raise argument_error(name, f"be {before!r}, as in {work}", value, CONTINUE)


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a nested value: of all its names, values, shapes and dtypes.

    Args:
        value: dicts, lists, tuples, sets, dataclasses, tensors, arrays, images, random generators, dtypes, devices,
            enums, paths, bytes, strings, numbers and None, nested in any way. Of anything else, such as a function, the
            qualified name is used.
    """
    running = hashlib.sha256()
    _update(running, value)
    return running.hexdigest()


def fingerprint(module: torch.nn.Module, with_buffers: bool = False) -> str:
    """SHA-256 of the names, shapes and sums of a module's parameters, and of the names of its active adapters.

    A sum adds up the bits of the values as integers. It is exact: it does not matter on which devices the values are,
    whether they are offloaded, and over how many processes they are sharded. Of a parameter whose values are packed or
    cannot be found, name and shape are used. If a parameter is sharded, all processes must call this.

    Args:
        module: the module.
        with_buffers: whether its buffers count like parameters.

    Raises:
        TypeError: its weights are packed by `FullyShardedDataParallel`.
    """
    model: Any = module  # a model of diffusers, where it has adapters
    adapters = model.active_adapters() if getattr(model, "_hf_peft_config_loaded", False) else []
    running = hashlib.sha256(f"{adapters}\n".encode())
    check_not_packed(module)
    reshard(module)
    elsewhere = values_elsewhere(module)
    buffers = module.named_buffers() if with_buffers else ()
    for name, tensor in sorted([*module.named_parameters(), *buffers]):
        values = tensor.detach() if name not in elsewhere else elsewhere[name]().to(tensor.dtype)
        running.update(f"{name} {values.dtype} {list(values.shape)} {sum_of_bits(values)}\n".encode())
    return running.hexdigest()


def sum_of_bits(values: torch.Tensor) -> int | None:
    """The sum of the bits of the values as integers; None if they are packed or not there.

    If the tensor is sharded, it is the sum of all processes, and all of them must call this.
    """
    if is_sharded(values):
        own = sum_of_bits(local_part(values))
        return None if own is None else sum_over_processes(own, values)
    if type(values) is not torch.Tensor or values.is_meta:
        return None
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    values = values.contiguous() if values.element_size() > 8 else values  # complex numbers of two parts
    bits = values.view(integers.get(values.element_size(), torch.int64))
    if bits.device.type == "cpu":  # twelve times as fast as the sum of torch
        return int(bits.numpy().sum(dtype=np.int64))
    return int(bits.sum(dtype=torch.int64))


def predictor_identity(predictor: FusedKANPredictor) -> dict[str, Any]:
    """What distinguishes a predictor from others: its weights and its configuration. Only types that JSON has."""
    return json.loads(
        json.dumps({"weights": fingerprint(predictor, with_buffers=True), "config": predictor.config.to_dict()})
    )


def _update(running: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Image):
        value = np.asarray(value)
    parts: Sequence[Any] = ()
    if isinstance(value, Mapping):
        keys = sorted(value, key=None if all(isinstance(key, str) for key in value) else digest)
        head, parts = f"dict {len(value)}", [part for key in keys for part in (key, value[key])]
    elif isinstance(value, (set, frozenset)):
        head, parts = f"set {len(value)}", sorted(map(digest, value))
    elif isinstance(value, Enum):  # before numbers and strings: some are both
        head = f"{type(value).__qualname__} {value.name}"
    elif isinstance(value, torch.Generator):
        head, parts = "generator", [str(value.device), value.get_state()]
    elif isinstance(value, (torch.dtype, torch.device, PurePath, complex, bytes, bytearray)):
        head = f"{type(value).__name__} {value!r}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        head, parts = type(value).__qualname__, [named]
    elif isinstance(value, (list, tuple)):
        head, parts = f"list {len(value)}", value
    elif isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        head = f"tensor {value.dtype} {list(value.shape)} {hashlib.sha256(raw.data).hexdigest()}"
    elif isinstance(value, np.ndarray):
        head = f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif value is None or isinstance(value, (bool, int, float, str)):
        head = f"{type(value).__name__} {value!r}"
    elif isinstance(value, np.generic):
        head = f"{type(value).__name__} {value.item()!r}"
    else:
        head = getattr(value, "__qualname__", type(value).__qualname__)
    running.update(f"{head}\n".encode())
    for part in parts:
        _update(running, part)
