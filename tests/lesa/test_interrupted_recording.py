"""Recordings that are killed, that find no place on the disk, or that two processes make at the same time."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import interrupted_recordings as trials
from lesa import Trajectories, artifacts, record
from lesa.training import recording, shards

SUPPORT = Path(trials.__file__).parent
POINTS = 20


@pytest.fixture(scope="module")
def pipe():
    return trials.CASE.build()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    record(pipe, trials.inputs(), folder, **trials.OPTIONS)
    return folder


# Killed


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing_and_mixes_nothing(tmp_path):
    """At random moments, at each operation on a file, and with a limit on the size of a file, which a full disk is."""
    command = [sys.executable, trials.__file__, str(tmp_path), str(POINTS), "1"]
    paths = os.pathsep.join([*sys.path, str(SUPPORT)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    by_kind = {kind: [trial for trial in made if trial["trial"].startswith(kind)] for kind in ("event", "file", "full")}
    assert [len(trials) for trials in by_kind.values()] == [POINTS, trials.MOST_OPERATIONS, 5]
    for trial in made:
        assert trial["kept"], f"{trial['trial']}: a file that had its name was not whole"
        assert "error" not in trial["again"], trial
        assert trial["same"], f"{trial['trial']}: other bytes than those of a recording that was left alone"
    assert all(trial["said"] is None for trial in by_kind["event"]), "all of them were killed"
    *killed, finished = by_kind["file"]
    assert all(trial["said"] is None for trial in killed) and finished["said"]["samples"] == trials.SAMPLES
    finished_before = [trial["again"]["kept"] for trial in by_kind["event"] + killed]
    assert {*finished_before} == {0, 1, 2}
    assert {len(trial["left"]) for trial in by_kind["event"]} >= {0, 1}, "some before the manifest"
    for trial in by_kind["full"]:
        assert not any(name.endswith(".tmp") or name == artifacts.LOCK for name in trial["left"])
        if trial["said"].get("error"):
            assert trial["said"]["error"] == "OSError" and str(tmp_path) in trial["said"]["message"]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# A full disk

WRITES = [
    (shards, "save_file", 5),
    (Path, "write_text", 1),
    (os, "fsync", 6),
    (os, "replace", 6),
    (os, "write", 1),
]


def failing(function, number):
    """The function, which finds no space left at its `number`-th call. A tensor file is half written then."""

    def fails(*args, **options):
        fails.calls += 1
        if fails.calls == number + 1:
            if function is shards.save_file:
                args[1].write_bytes(b"half")
                raise shards.SafetensorError("I/O error: No space left on device (os error 28)")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **options)

    fails.calls = 0
    return fails


@pytest.mark.slow
@pytest.mark.parametrize("owner, name, count", WRITES, ids=[name for _, name, _ in WRITES])
def test_a_full_disk_at_any_write_is_named_and_made_good(pipe, whole, tmp_path, monkeypatch, owner, name, count):
    for number in range(count + 1):
        folder, fails = tmp_path / str(number), failing(getattr(owner, name), number)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            if number == count:
                record(pipe, trials.inputs(), folder, **trials.OPTIONS)
                assert fails.calls == count
                continue
            with pytest.raises(OSError, match="No space left on device") as error:
                record(pipe, trials.inputs(), folder, **trials.OPTIONS)
        named = {str(folder / file) for file in [*contents(whole), artifacts.LOCK]}
        assert any(path in str(error.value) for path in named)
        left = contents(folder)
        assert left.items() <= contents(whole).items(), "whole files only, and no temporary ones"
        record(pipe, trials.inputs(), folder, **trials.OPTIONS)
        assert contents(folder) == contents(whole)


def test_a_file_is_synchronised_before_it_gets_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave an empty file under the final name."""
    done = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, f=function, name=name: (done.append(name), f(*args))[1])
    artifacts.write_text(tmp_path / "a", "text")
    assert done == ["fsync", "replace"]


# Two at the same time


@pytest.fixture
def other_process():
    """`other_process(folder)` -> the number of a process that works in the folder until it is killed."""
    started = []

    def start(folder):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:  # only files, no tensors
            with artifacts.owned(folder, "recording"):
                os.write(writing, b"!")
                time.sleep(600)
        os.read(reading, 1)
        started.append(child)
        return child

    yield start
    for child in started:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_process_is_refused_and_named_and_a_dead_one_is_followed(tmp_path, other_process):
    child = other_process(tmp_path)
    lock = (tmp_path / artifacts.LOCK).read_bytes()
    words = rf"`out_dir` must be .*process {child} on .*, recording since \d.* works\. Wait"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words), artifacts.owned(tmp_path, "training"):
            pytest.fail("it is not free")
    assert (tmp_path / artifacts.LOCK).read_bytes() == lock
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / artifacts.LOCK).exists()
    with artifacts.owned(tmp_path, "training"):
        assert json.loads((tmp_path / artifacts.LOCK).read_text())["pid"] == os.getpid()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_two_recordings_in_one_folder(pipe, whole, tmp_path, other_process):
    """A finished one can be read and asked for again meanwhile."""
    child = other_process(tmp_path)
    with pytest.raises(RuntimeError, match=f"process {child} on"):
        record(pipe, trials.inputs(), tmp_path, **trials.OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == [artifacts.LOCK]
    finished = other_process(whole)
    assert len(record(pipe, trials.inputs(), whole, **trials.OPTIONS)) == len(Trajectories(whole)) == 4
    os.kill(finished, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, finished, os.WEXITED | os.WNOWAIT)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    record(pipe, trials.inputs(), tmp_path, **trials.OPTIONS)
    record(pipe, trials.inputs(), whole, **trials.OPTIONS)
    assert contents(tmp_path) == contents(whole) and artifacts.LOCK not in contents(whole)


@pytest.mark.slow
def test_of_many_processes_one_at_a_time_works_in_a_folder(tmp_path):
    """Though each of them removes the file that the others try to lock."""

    def work(number):
        done, end = 0, time.monotonic() + 30
        while done < 60 and time.monotonic() < end:
            try:
                with artifacts.owned(tmp_path, "recording"):
                    os.close(os.open(tmp_path / "alone", os.O_CREAT | os.O_EXCL))  # raises if another one is here
                    os.unlink(tmp_path / "alone")
                    done += 1
            except RuntimeError:
                time.sleep(0.0001 * number)
        return done == 60

    children = []
    for number in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                os._exit(0 if work(number) else 2)
            except BaseException:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_two_recordings_in_one_process(pipe, whole, tmp_path, monkeypatch):
    run, refused = recording.run_pipeline, []

    def inside(*args):
        words = rf"process {os.getpid()} \(this one\) on .*, recording since"
        with pytest.raises(RuntimeError, match=words), artifacts.owned(tmp_path, "recording"):
            pytest.fail("it is not free")
        refused.append(True)
        return run(*args)

    monkeypatch.setattr(recording, "run_pipeline", inside)
    record(pipe, trials.inputs(), tmp_path, **trials.OPTIONS)
    assert len(refused) == 2 and contents(tmp_path) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_no_lock_stays_behind(pipe, whole, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(recording, "run_pipeline", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            record(pipe, trials.inputs(), tmp_path, **trials.OPTIONS)
    assert [*tmp_path.iterdir()] == []
    record(pipe, trials.inputs(), tmp_path, **trials.OPTIONS)
    assert contents(tmp_path) == contents(whole)


def noted(folder, **changed):
    owner = {"pid": 2**22 + 1, "host": artifacts.socket.gethostname(), "since": "2026-01-01", "work": "recording"}
    (folder / artifacts.LOCK).write_text(json.dumps({**owner, **changed}))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\x00" * 9])
def test_a_lock_that_was_half_written_is_taken_over(tmp_path, text):
    noted(tmp_path) if text == "[]" else (tmp_path / artifacts.LOCK).write_text(text)
    if text == '{"pid": "x"}':
        noted(tmp_path, pid="x")
    with artifacts.owned(tmp_path, "recording"):
        pass
    assert [*tmp_path.iterdir()] == []


def test_a_lock_of_another_machine_is_refused(tmp_path):
    """Whether that process still runs cannot be known here, and not all network file systems share locks."""
    noted(tmp_path, host="elsewhere", pid=7)
    words = "process 7 on elsewhere, recording since 2026-01-01 works. If that process has ended, delete .*lesa-lock"
    with pytest.raises(RuntimeError, match=words), artifacts.owned(tmp_path, "recording"):
        pytest.fail("it is not free")
    (tmp_path / artifacts.LOCK).unlink()
    with artifacts.owned(tmp_path, "recording"):
        pass
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, boot, is_free",
    [
        ("ext4", "this", True),
        ("overlay", "this", True),
        ("tmpfs", "this", True),
        ("ext4", "another", False),  # another machine, or a start of this one that is over
        ("ext4", None, False),  # of an older version
        *((kind, "this", False) for kind in ("nfs4", "lustre", "cifs", "fuse.sshfs", "9p", "virtiofs", "ceph")),
    ],
)
def test_the_lock_of_a_container_that_started_again_is_taken_over(tmp_path, monkeypatch, kind, boot, is_free):
    """It has another host name on the same machine. The file system must be one that no other machine has."""
    read, boots = Path.read_text, artifacts._boot()
    mounts = f"root / {'nfs4' if is_free else 'ext4'} rw 0 0\nx {tmp_path} nfs rw 0 0\nx {tmp_path} {kind} rw 0 0\n"

    def text(path, *args, **options):
        return mounts if str(path) == "/proc/self/mounts" else read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", text)
    noted(tmp_path, host="container-1", pid=7, **({} if boot is None else {"boot": boots if boot == "this" else boot}))
    if is_free:
        again = artifacts.owned(tmp_path, "recording")
        with artifacts.owned(tmp_path, "recording"), pytest.raises(RuntimeError, match="this one"), again:
            pytest.fail("it is not free")
        assert [*tmp_path.iterdir()] == []
    else:
        with pytest.raises(RuntimeError, match="process 7 on container-1"), artifacts.owned(tmp_path, "recording"):
            pytest.fail("it is not free")


@pytest.mark.slow
def test_the_lock_of_another_container_that_still_works_is_refused(tmp_path, monkeypatch):
    with artifacts.owned(tmp_path, "recording"):
        monkeypatch.setattr(artifacts.socket, "gethostname", lambda: "container-2")
        with pytest.raises(RuntimeError, match="Wait until it has ended"), artifacts.owned(tmp_path, "recording"):
            pytest.fail("it is not free")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_the_process_number_decides(tmp_path, monkeypatch, number):
    def no_locks(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(artifacts.fcntl, "flock", no_locks)
    words, again = r"this one.*delete", artifacts.owned(tmp_path, "recording")
    with artifacts.owned(tmp_path, "recording"), pytest.raises(RuntimeError, match=words), again:
        pytest.fail("it is not free")
    noted(tmp_path, pid=os.getppid())
    with pytest.raises(RuntimeError, match=f"process {os.getppid()} on"), artifacts.owned(tmp_path, "recording"):
        pytest.fail("it is not free")
    noted(tmp_path)  # of a process that has ended
    with artifacts.owned(tmp_path, "recording"):
        pass
    (tmp_path / artifacts.LOCK).write_text("")  # of one that has just begun
    with pytest.raises(RuntimeError, match="another process works"), artifacts.owned(tmp_path, "recording"):
        pytest.fail("it is not free")


def test_an_error_of_locking_is_no_free_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"), artifacts.owned(tmp_path, "recording"):
        pytest.fail("it is not free")
