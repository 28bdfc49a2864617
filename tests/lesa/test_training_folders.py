"""A folder is for one training at a time, and what it holds is not lost when something else goes wrong."""

import contextlib
import multiprocessing
import os
import resource
import signal
import zipfile

import pytest
import torch

import lesa
from lesa.artifacts import LOCK, owned
from lesa.processes import Processes
from lesa.training import refinement, training_run
from lesa.training.training_run import CHECKPOINT_NAME
from lesa_kernels import PredictorConfig
from made_recordings import WIDTH, write_recording

pytestmark = pytest.mark.slow

CONFIG = PredictorConfig(WIDTH, hidden=3, rank=1)
OPTIONS = {"config": CONFIG, "schedule": [0, 2, 5], "epochs": 2, "guided_epochs": 1, "progress": False}


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("recording") / "t")


@pytest.fixture(scope="module")
def whole(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    lesa.train(recording, out_dir=folder, **OPTIONS)
    return files(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def unfinished(recording, tmp_path, monkeypatch):
    """The folder of a training that was stopped after its first epoch."""
    out, fit = tmp_path / "out", training_run.Training._train_epoch

    def stopped(self, optimizer, epoch, total):
        if epoch == 1:
            raise KeyboardInterrupt
        return fit(self, optimizer, epoch, total)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(training_run.Training, "_train_epoch", stopped)
        lesa.train(recording, out_dir=out, **OPTIONS)
    assert {*files(out)} == {CHECKPOINT_NAME}
    return out


# One training at a time


@pytest.mark.parametrize("options", [{}, {"schedule": None, "budget": 4}, {"find_stages": True}])
def test_a_second_training_in_a_folder_is_refused(recording, unfinished, whole, options):
    """It touches nothing, also not the half-written file of the first one."""
    partial = unfinished / f"{CHECKPOINT_NAME}.tmp"
    with owned(unfinished, "training"):
        partial.write_bytes(b"half")
        before = files(unfinished)
        words = rf"be a folder that no other process is using, but got .*process {os.getpid()} .*, training since"
        with pytest.raises(RuntimeError, match=words):
            lesa.train(recording, out_dir=unfinished, **{**OPTIONS, **options})
        assert files(unfinished) == before
    lesa.train(recording, out_dir=unfinished, **OPTIONS)
    assert files(unfinished) == whole


def test_a_training_holds_its_folder_until_it_ends(recording, whole, tmp_path, monkeypatch):
    save, refused = training_run.Training._save_checkpoint, []

    def inside(self, *arguments):
        with pytest.raises(RuntimeError, match="no other process is using"):
            lesa.train(recording, out_dir=tmp_path / "out", **OPTIONS)
        refused.append(True)
        return save(self, *arguments)

    monkeypatch.setattr(training_run.Training, "_save_checkpoint", inside)
    lesa.train(recording, out_dir=tmp_path / "out", **OPTIONS)
    assert len(refused) == 4 and files(tmp_path / "out") == whole


def killed_while_it_trains(recording, out):
    torch.set_num_threads(1)  # a copy of a process has none of its threads
    training_run.Training._train_epoch = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    lesa.train(recording, out_dir=out, **OPTIONS)


def test_the_lock_of_a_killed_training_is_taken_over(recording, whole, tmp_path):
    out = tmp_path / "out"
    child = multiprocessing.get_context("fork").Process(target=killed_while_it_trains, args=(recording, out))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and {*files(out)} == {CHECKPOINT_NAME, LOCK}
    lesa.train(recording, out_dir=out, **OPTIONS)
    assert files(out) == whole


def test_a_second_refinement_in_a_folder_is_refused(tmp_path):
    settings = {"rounds": 1}
    with refinement._working_folder(tmp_path, settings, Processes()) as folder:
        before = files(folder)
        words, again = "no other process is using, but got .*, refining since", refinement._working_folder
        with pytest.raises(RuntimeError, match=words), again(tmp_path, settings, Processes()):
            pytest.fail("it is not free")
        assert files(folder) == before
        (folder / "round-1").mkdir()
    assert files(tmp_path) == {}


def test_a_refinement_begins_beside_hidden_files_only(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"")
    with refinement._working_folder(tmp_path, {"rounds": 1}, Processes()):
        (tmp_path / "round-1").mkdir()
    (tmp_path / "mine").write_bytes(b"")
    with (
        pytest.raises(ValueError, match="be empty or hold"),
        refinement._working_folder(tmp_path, {"rounds": 1}, Processes()),
    ):
        pytest.fail("it holds something else")


# A full disk


def train_with_files_of(size, recording, out, said):
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        lesa.train(recording, out_dir=out, **OPTIONS)
        said.send(None)
    except OSError as error:
        said.send((type(error).__name__, str(error)))
    except Exception as error:
        said.send((type(error).__name__, "no OSError"))


@pytest.mark.parametrize("size", [1000, 12000])
def test_a_full_disk_is_named(recording, whole, tmp_path, size):
    out, context = tmp_path / "out", multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=train_with_files_of, args=(size, recording, out, writing))
    child.start()
    kind, message = reading.recv()
    child.join()
    assert kind == "OSError" and "File too large" in message and str(out / CHECKPOINT_NAME) in message
    assert {*files(out)} == (set() if size == 1000 else {CHECKPOINT_NAME})
    lesa.train(recording, out_dir=out, **OPTIONS)
    assert files(out) == whole


# A good checkpoint


CPU_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 8 bytes")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), CPU_MEMORY])
def test_too_little_memory_is_no_damage(recording, unfinished, whole, monkeypatch, error):
    before = files(unfinished)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *arguments, **options: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)) as raised:
            lesa.train(recording, out_dir=unfinished, **OPTIONS)
    assert raised.value is error and files(unfinished) == before
    lesa.train(recording, out_dir=unfinished, **OPTIONS)
    assert files(unfinished) == whole


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(recording, unfinished, monkeypatch):
    error = PermissionError(13, "Permission denied", str(unfinished / CHECKPOINT_NAME))
    monkeypatch.setattr(type(unfinished), "read_bytes", lambda path: (_ for _ in ()).throw(error))
    with pytest.raises(PermissionError, match=f"Permission denied.*{CHECKPOINT_NAME}"):
        lesa.train(recording, out_dir=unfinished, **OPTIONS)


def test_a_checkpoint_is_read_to_the_cpu(recording, unfinished, whole, monkeypatch):
    load, places = torch.load, []

    def watched(*arguments, **options):
        places.append(str(options["map_location"]))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    lesa.train(recording, out_dir=unfinished, **OPTIONS)
    assert {*places} == {"cpu"} and files(unfinished) == whole


def test_a_flipped_bit_in_a_checkpoint_is_named(recording, unfinished):
    """In the weights and in the optimiser's numbers too, which can be read with any bits."""
    file = unfinished / CHECKPOINT_NAME
    with zipfile.ZipFile(file) as archive:
        parts = [part for part in archive.infolist() if "/data/" in part.filename]
    raw = file.read_bytes()
    assert len(parts) > 20
    for part in parts[::4]:
        at = raw.index(tensor_bytes(file, part), part.header_offset)
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        with pytest.raises(ValueError, match="checkpoint that can be read, but got .* damaged"):
            lesa.train(recording, out_dir=unfinished, **OPTIONS)
        file.write_bytes(raw)


def tensor_bytes(file, part):
    with zipfile.ZipFile(file) as archive:
        return archive.read(part)


def test_checkpoints_of_earlier_versions_continue(recording, unfinished, whole):
    """They were written by `torch.save` itself."""
    checkpoint = torch.load(unfinished / CHECKPOINT_NAME, weights_only=True)
    torch.save(checkpoint, unfinished / CHECKPOINT_NAME)
    lesa.train(recording, out_dir=unfinished, **OPTIONS)
    assert files(unfinished) == whole
