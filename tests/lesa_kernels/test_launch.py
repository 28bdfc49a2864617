"""What the Triton launchers share. Streams, captures and the memory of a GPU are played by stand-ins."""

import contextlib
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the launchers need it")

from lesa_kernels import launch

GPUS = [torch.device("cuda", index) for index in (0, 1)]


@pytest.fixture
def gpu(monkeypatch):
    """Its current stream and whether that is captured; which tensors were made, and by which thread."""
    state = SimpleNamespace(stream=7, capturing=False, made=[], synchronised=0)
    zeros = torch.zeros

    def made(size, *, dtype, device):
        # Of a capture, or of `torch.compile` before it: what the thread allocates is the graph's own.
        state.made.append((size, device, threading.current_thread() is threading.main_thread()))
        if device.type == "cpu":
            return zeros(size, dtype=dtype, device=device)
        memory = zeros(size + 32, dtype=dtype, device="cpu")  # a GPU's begins at a line
        first = -memory.data_ptr() // 4 % 32
        return memory[first : first + size]

    def synchronise():
        state.synchronised += 1

    monkeypatch.setattr(torch, "zeros", made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=state.stream, synchronize=synchronise)
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_CLEARED", {})
    monkeypatch.setattr(launch, "_OF_STREAM", {})
    return state


def counters(gpu, count, stream=7, device=GPUS[0], capturing=False):
    gpu.stream, gpu.capturing = stream, capturing
    taken = launch.arrival_counters(device, count)
    assert taken.dtype == torch.int32 and taken.numel() >= count and not taken.any()
    assert taken.data_ptr() % 16 == 0  # Triton compiles another kernel for other addresses
    return taken


def lines(taken):
    """The lines of the cache that counters lie on."""
    first, last = taken.data_ptr() // 128, (taken.data_ptr() + taken.nbytes - 1) // 128
    return set(range(first, last + 1))


def test_launches_of_a_stream_share_counters_and_no_others_do(gpu):
    owners = [counters(gpu, 264, stream, device) for stream, device in itertools.product(range(40), GPUS)]
    owners += [counters(gpu, count, stream, capturing=True) for count, stream in ((1, 0), (33, 0), (33, 1), (264, 1))]
    for one, other in itertools.combinations(owners, 2):
        assert not lines(one) & lines(other)
    again = [counters(gpu, 264, stream, device) for stream, device in itertools.product(range(40), GPUS)]
    assert [taken.data_ptr() for taken in again] == [taken.data_ptr() for taken in owners[: len(again)]]


def test_counters_are_cleared_once_by_a_thread_of_their_own(gpu):
    for count in (1, 264, launch.COUNTERS_OF_STREAM, 264):
        counters(gpu, count)
    for _ in range(100):
        counters(gpu, 264, capturing=True)
    assert gpu.made == [(launch.COUNTERS_OF_DEVICE, GPUS[0], False)] and gpu.synchronised == 1


def test_a_stream_gets_more_counters_when_it_needs_more(gpu):
    few = counters(gpu, 100)
    many = counters(gpu, 5000)
    assert not lines(few) & lines(many)
    assert counters(gpu, 100).data_ptr() == many.data_ptr()
    more = counters(gpu, 3 * launch.COUNTERS_OF_DEVICE)  # than are cleared at a time
    assert not lines(many) & lines(more) and gpu.synchronised == 2


def test_a_graph_clears_its_own_counters_where_none_are_left(gpu):
    counters(gpu, 300, capturing=True)  # before any other launch
    assert gpu.made == [(300, GPUS[0], True)] and gpu.synchronised == 0
    counters(gpu, 300)
    del gpu.made[:]
    taken = [counters(gpu, 3000, capturing=True) for _ in range(100)]
    assert gpu.made == [(3000, GPUS[0], True)] * (100 - 86)  # 2^18 - 2^10 are 86 times 3008, and some
    assert gpu.synchronised == 1
    for one, other in itertools.combinations(taken, 2):
        assert not lines(one) & lines(other)
    counters(gpu, 300, stream=8)
    counters(gpu, 3000, stream=9)  # as many as are not left: new ones are cleared
    counters(gpu, 3000, capturing=True)
    assert gpu.synchronised == 2 and len(gpu.made) == 15


def test_threads_never_get_the_same_counters(gpu):
    counters(gpu, 1)
    gpu.capturing, owners = True, []
    begin = threading.Barrier(8)

    def launches():
        begin.wait()
        owners.extend(launch.arrival_counters(GPUS[0], 40) for _ in range(100))

    threads = [threading.Thread(target=launches) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({line for taken in owners for line in lines(taken)}) == 800 * 2


def test_on_a_cpu_each_launch_has_its_own(gpu):
    cpu = torch.device("cpu")
    assert [launch.arrival_counters(cpu, 5).tolist() for _ in range(2)] == [[0] * 5] * 2
    assert gpu.made == [(5, cpu, True)] * 2
