"""A recording copies and writes while the pipeline goes on: what arrives late is right, and an error is not lost."""

import errno
import functools
import os
import threading
import time

import pytest
import torch

import interrupted_recordings as trials
from lesa import record
from lesa.artifacts import LOCK
from lesa.training import recorder, recording, shards
from lesa.training.host_copies import ON_THEIR_WAY, HostCopies
from lesa.training.writing import BackgroundWriter

NUM_STEPS, SAMPLES, WAIT = 5, 3, 60
CALLS = 2 * NUM_STEPS  # of the transformer in one sample: with the prompt and without
OPTIONS = {"num_inference_steps": NUM_STEPS, "tokens_per_sample": 7, "progress": False}


class LateCopies(HostCopies):
    """Every tensor is copied as if it were on a GPU. The copy has wrong values until somebody waits for it."""

    most = 0

    def is_copied_aside(self, tensor):
        return True

    def started(self, tensor, is_fresh):
        clone = tensor if is_fresh else tensor.clone()
        with torch.inference_mode(False):  # on a GPU, the host writes nothing when it waits
            copy = torch.empty_like(tensor)
        copy.fill_(0 if copy.dtype == torch.bool else float("nan"))

        class Event:
            def synchronize(self):
                copy.copy_(clone)

        return copy, Event()

    def give(self, tensors, receive, fresh=frozenset()):
        super().give(tensors, receive, fresh)
        LateCopies.most = max(LateCopies.most, len(self._pending))


@pytest.fixture(scope="module")
def pipe():
    return trials.CASE.build()


@pytest.fixture(scope="module")
def inputs():
    made = trials.inputs()
    return [*made, made[0]]


@pytest.fixture(scope="module")
def whole(pipe, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    record(pipe, inputs, folder, **OPTIONS)
    return contents(folder)


@pytest.fixture
def steps(pipe):
    """Tells how many times the transformer has been called."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    yield lambda: len(seen)
    hook.remove()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sample_files(folder):
    return [path.name for path in sorted(folder.glob("sample*"))]


def writers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("lesa-writer")]


# Copies that arrive late


def test_what_is_overwritten_afterwards_was_copied_before():
    copies, received = LateCopies(), []
    values = torch.zeros(3)
    for step in range(5):
        values.fill_(step)
        copies.give([values, values[:1]], lambda tensors: received.append([each.tolist() for each in tensors]))
        assert len(received) == max(0, step + 1 - ON_THEIR_WAY)
    copies.finish()
    assert received == [[[step] * 3, [step]] for step in map(float, range(5))]


@pytest.mark.parametrize("kept, fresh", [(7, {0, 1, 2}), (None, {0})])
def test_only_tensors_of_its_own_are_not_cloned(pipe, inputs, tmp_path, monkeypatch, kept, fresh):
    """What the model gave may be overwritten as soon as it has been kept."""
    keep, given, options = recorder.Recorder.keep, set(), {**OPTIONS, "tokens_per_sample": kept}

    def overwriting(self, call, features, conditioning):
        keep(self, call, clone := features.clone(), conditioning)
        clone.fill_(float("nan"))

    class Noted(LateCopies):
        def give(self, tensors, receive, fresh=frozenset()):
            given.add(frozenset(fresh))
            super().give(tensors, receive, fresh)

    record(pipe, inputs[:1], tmp_path / "plain", **options)
    monkeypatch.setattr(recorder, "HostCopies", Noted)
    monkeypatch.setattr(recorder.Recorder, "keep", overwriting)
    record(pipe, inputs[:1], tmp_path / "overwritten", **options)
    assert contents(tmp_path / "overwritten") == contents(tmp_path / "plain")
    assert given == {frozenset(fresh)}


def test_tensors_on_the_cpu_are_received_at_once_and_not_copied():
    values, received = torch.zeros(3), []
    HostCopies().give([values], received.extend)
    assert received[0] is values


@pytest.mark.parametrize("batch_size", [1, 2])
def test_late_copies_make_the_same_files(pipe, inputs, tmp_path, monkeypatch, batch_size):
    record(pipe, inputs, tmp_path / "at once", **OPTIONS, batch_size=batch_size)
    monkeypatch.setattr(recorder, "HostCopies", LateCopies)
    monkeypatch.setattr(LateCopies, "most", 0)
    record(pipe, inputs, tmp_path / "late", **OPTIONS, batch_size=batch_size)
    assert contents(tmp_path / "late") == contents(tmp_path / "at once")
    assert LateCopies.most == ON_THEIR_WAY


def test_the_mode_in_which_the_pipeline_was_called_may_end_before_a_copy_arrives(
    pipe, inputs, whole, tmp_path, monkeypatch
):
    call = type(pipe).__call__
    monkeypatch.setattr(recorder, "HostCopies", LateCopies)
    monkeypatch.setattr(type(pipe), "__call__", functools.wraps(call)(torch.inference_mode()(call)))
    record(pipe, inputs, tmp_path, **OPTIONS)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("last", [False, True])
def test_nan_that_is_seen_late_names_its_step_and_is_not_written(pipe, inputs, tmp_path, monkeypatch, steps, last):
    """Also if the run fails because of it, and at the last step, which nothing follows."""
    step, bad = pipe.scheduler.step, NUM_STEPS - 1 if last else 1

    def breaking(*args, **options):
        (latents,) = step(*args, **options)
        if pipe.scheduler.step_index == bad and steps() > CALLS:
            latents[:] = float("nan")
        if pipe.scheduler.step_index == bad + 1 and latents.isnan().any() and not last:
            raise RuntimeError("something else fails")
        return (latents,)

    monkeypatch.setattr(recorder, "HostCopies", LateCopies)
    monkeypatch.setattr(pipe.scheduler, "step", breaking)
    with pytest.raises(RuntimeError, match=f"NaN or Inf in sample 1 at step {bad}"):
        record(pipe, inputs, tmp_path, **OPTIONS)
    assert sample_files(tmp_path) == ["sample-00000-uncond.safetensors", "sample-00000.safetensors"]


# Files that a thread writes


def test_the_next_sample_runs_while_one_is_written(pipe, inputs, whole, tmp_path, monkeypatch, steps):
    save, calls = recording.save_sample, []

    def waiting(folder, number, *args):
        if number < SAMPLES - 1:
            of_next = threading.Event()
            with pipe.transformer.register_forward_pre_hook(lambda *_: of_next.set()):
                assert of_next.wait(WAIT)
        calls.append((number, steps()))
        save(folder, number, *args)

    monkeypatch.setattr(recording, "save_sample", waiting)
    record(pipe, inputs, tmp_path, **OPTIONS)
    assert contents(tmp_path) == whole and not writers()
    for number, seen in calls:
        assert seen <= CALLS * (number + 2), "only one sample waits to be written"


def test_one_task_at_a_time_is_unfinished():
    done, goes_on = [], threading.Event()
    with BackgroundWriter() as writer:
        writer.write(lambda: (goes_on.wait(WAIT), done.append(1)))
        writer.check()
        other = threading.Timer(0.05, goes_on.set)
        other.start()
        writer.write(lambda: done.append(2))
        assert done[0] == 1
    assert done == [1, 2]


def no_space(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [0, SAMPLES - 1], ids=["first", "last"])
def test_a_disk_that_is_full_stops_the_run_with_the_name_of_the_file(
    pipe, inputs, whole, tmp_path, monkeypatch, steps, number
):
    """At the next step, or at the end if nothing follows."""
    save, failed = shards.save_file, threading.Event()

    def failing(tensors, path, metadata):
        if path.name.startswith(f"sample-{number:05d}"):
            failed.set()
            no_space()
        save(tensors, path, metadata)

    def patient(*_):
        if steps() > CALLS * (number + 1):
            assert failed.wait(WAIT)
            time.sleep(0.02)  # until the thread has said so

    monkeypatch.setattr(shards, "save_file", failing)
    words = f"No space left on device.*sample-{number:05d}"
    with pipe.transformer.register_forward_pre_hook(patient), pytest.raises(OSError, match=words):
        record(pipe, inputs, tmp_path, **OPTIONS)
    assert steps() < CALLS * min(number + 2, SAMPLES + 1) and not writers()
    left = contents(tmp_path)
    assert left.items() <= whole.items() and LOCK not in left
    monkeypatch.setattr(shards, "save_file", save)
    assert record(pipe, inputs, tmp_path, **OPTIONS).recorded.kept == tuple(range(number))
    assert contents(tmp_path) == whole


def test_ctrl_c_finishes_the_sample_that_is_being_written(pipe, inputs, whole, tmp_path, monkeypatch, steps):
    save, interrupted = recording.save_sample, threading.Event()

    def waiting(*args):
        assert interrupted.wait(WAIT)
        save(*args)

    def interrupt(*_):
        if steps() > CALLS:
            interrupted.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(recording, "save_sample", waiting)
    with pipe.transformer.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        record(pipe, inputs, tmp_path, **OPTIONS)
    assert sample_files(tmp_path) == ["sample-00000-uncond.safetensors", "sample-00000.safetensors"]
    assert contents(tmp_path).items() <= whole.items() and not writers()
    assert record(pipe, inputs, tmp_path, **OPTIONS).recorded.kept == (0,)
    assert contents(tmp_path) == whole
