"""Calls of the compiled `ring_push` with addresses alone, for the build that runs the CUDA kernels on the CPU.

`python raw_ring.py NAME` runs one of the checks below and prints its name; those that are to end the process do not
come that far. Without torch: each buffer is memory of its own, and a process starts in a fraction of a second.
"""

import ctypes
import itertools
import sys

from lesa_kernels import _C

EMULATION = ctypes.CDLL(_C.__file__)
CAPACITY, BATCH, TOKENS, DIM = 3, 2, 4, 100
FEATURE = TOKENS * DIM


def emulated(name: str) -> ctypes.c_int:
    """A variable of cuda_runtime.h."""
    return ctypes.c_int.in_dll(EMULATION, f"cuda_on_cpu_{name}")


class Ring:
    """A ring of float32 and what is pushed into it, two samples by default."""

    def __init__(self, missing: int = 0):
        self.storage = (ctypes.c_float * (CAPACITY * BATCH * FEATURE - missing))()
        self.sigmas = (ctypes.c_float * (CAPACITY * BATCH))()
        self.cursor = (ctypes.c_int32 * BATCH)()
        self.count = (ctypes.c_int32 * BATCH)()
        self.features = (ctypes.c_float * (BATCH * FEATURE))(*range(BATCH * FEATURE))
        self.sigma = (ctypes.c_float * BATCH)(0.5, 0.5)

    def push(self, rows: list[int] | None = None, device: int = 0, **changes) -> None:
        listed = None if rows is None else (ctypes.c_int64 * len(rows))(*rows)
        arguments = dict(
            storage=ctypes.addressof(self.storage),
            storage_dtype="float32",
            storage_sizes=(CAPACITY, BATCH, TOKENS, DIM),
            scales=0,
            sigmas=ctypes.addressof(self.sigmas),
            cursor=ctypes.addressof(self.cursor),
            count=ctypes.addressof(self.count),
            features=ctypes.addressof(self.features),
            features_dtype="float32",
            features_strides=(FEATURE, DIM, 1),
            sigma=ctypes.addressof(self.sigma),
            level=0.0,
            rows=0 if rows is None else ctypes.addressof(listed),
            samples=BATCH if rows is None else len(rows),
            device=device,
            stream=0,
            threads=1,
        )
        _C.ring_push(**arguments | changes)

    def gather(self, age: int, device: int = 0) -> list[float]:
        output = (ctypes.c_float * (BATCH * FEATURE))()
        state = [ctypes.addressof(buffer) for buffer in (self.cursor, self.count)]
        storage = ctypes.addressof(self.storage), "float32", (CAPACITY, BATCH, TOKENS, DIM)
        _C.ring_gather(*storage, 0, *state, age, ctypes.addressof(output), device, 0, 1)
        return output[:]

    def slot(self, slot: int, row: int) -> list[float]:
        begin = (slot * BATCH + row) * FEATURE
        return self.storage[begin : begin + FEATURE]


def refusal(call, kind: type[Exception] = RuntimeError) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was refused")


def good_calls():
    """On the CPU and on both devices; the current device stays what it was."""
    for current, device in itertools.product((0, 1), (-1, 0, 1)):
        emulated("device").value = current
        emulated("launch_device").value = -1
        ring = Ring()
        ring.push(device=device)
        assert emulated("launch_device").value == device
        assert emulated("device").value == current
        assert [ring.slot(0, row) for row in range(BATCH)] == [
            ring.features[row * FEATURE : (row + 1) * FEATURE] for row in range(BATCH)
        ]
        assert ring.count[:] == ring.cursor[:] == [1, 1] and ring.sigmas[:BATCH] == [0.5, 0.5]
        emulated("launch_device").value = -1
        assert ring.gather(CAPACITY - 1, device) == ring.features[:]
        assert emulated("launch_device").value == device
        assert emulated("device").value == current


def launch_errors():
    """Name the operation, the device and CUDA's error, change nothing, and leave none behind for the next call."""
    for current in (0, 1):
        emulated("device").value = current
        ring = Ring()
        for device in (0, 1):
            message = refusal(lambda: ring.push(device=device, stream=0xBAD))  # noqa: B023
            start = f"lesa_kernels.ring_push on CUDA device {device} failed: "
            assert message.startswith(start + "invalid resource handle (cudaErrorInvalidResourceHandle). "), message
            assert emulated("device").value == current
            ring.push(rows=[], device=device)
        message = refusal(lambda: ring.push(device=7))  # noqa: B023
        start = "lesa_kernels.ring_push on CUDA device 7 failed: invalid device ordinal (cudaErrorInvalidDevice). "
        assert message.startswith(start), message
        assert emulated("device").value == current
        assert not any(ring.storage) and not any(ring.count)
        ring.push()
        assert ring.count[:] == [1, 1]


def cuda_problem():
    for current in (0, 1):
        emulated("device").value = current
        assert [_C.cuda_problem(device) for device in (0, 1)] == ["", ""]
        assert _C.cuda_problem(7) == "invalid device ordinal (cudaErrorInvalidDevice)"
        assert emulated("device").value == current
        Ring().push()


def all_kernels_are_loaded():
    """By the question whether they can run. A kernel that is not loaded may fail to be captured into a graph."""
    ring = Ring()
    memory = [(ctypes.c_double * 4096)() for _ in range(4)]
    storage, scales, features, output = map(ctypes.addressof, memory)

    def launches(device: int) -> tuple[int, int]:
        """How many launches, and how many of them of a kernel that was not loaded."""
        before, count = emulated("launches_of_not_loaded").value, 0
        halves = ("float32", "float16", "bfloat16")
        for stored, dim in itertools.product((*halves, "float8_e4m3fn"), (96, DIM - 1)):
            buffers = dict(storage=storage, storage_dtype=stored, storage_sizes=(CAPACITY, BATCH, TOKENS, dim))
            buffers |= dict(scales=scales if stored.startswith("float8") else 0)
            for dtype in halves:
                strides = (TOKENS * dim, dim, 1)
                ring.push(device=device, features=features, features_dtype=dtype, features_strides=strides, **buffers)
            state = [ctypes.addressof(buffer) for buffer in (ring.cursor, ring.count)]
            _C.ring_gather(*buffers.values(), *state, 0, output, device, 0, 1)
            count += 4
        return count, emulated("launches_of_not_loaded").value - before

    for device in (0, 1):
        assert launches(device) == (32, 32)
        assert _C.cuda_problem(device) == ""
        assert launches(device) == (32, 0)
        assert emulated("kernels_loaded").value == 19 * (device + 1)


def refusals():
    """What is seen before a launch: nothing on the device would see it."""
    ring = Ring()
    ring.push()
    before = bytes(ring.storage), bytes(ring.count)
    emulated("launch_device").value = -1
    message = refusal(lambda: ring.push(rows=[0, 1, 0]), ValueError)
    assert message.startswith("`samples` must be at most `batch`, but got 3 for a batch of 2. "), message
    message = refusal(lambda: ring.push(features=ctypes.addressof(ring.storage)), ValueError)
    assert message.startswith("`features` must share no memory with the ring, "), message
    assert before == (bytes(ring.storage), bytes(ring.count)) and emulated("launch_device").value == -1


def same_call_again():
    """What a captured graph does: the host repeats one call, and only the levels in memory differ."""
    ring = Ring()
    walk = [
        # sigma of both samples, then the slot, cursor and count of both rows
        ((0.9, 0.9), (0, 0), (1, 1), (1, 1)),
        ((0.8, 0.9), (1, 0), (2, 1), (2, 1)),  # smaller; equal
        ((0.7, 0.5), (2, 1), (0, 2), (3, 2)),
        ((0.6, 0.4), (0, 2), (1, 0), (3, 3)),  # over the oldest
        ((0.6, 0.8), (0, 0), (1, 1), (3, 1)),  # equal; greater
        ((float("nan"), 0.7), (1, 1), (2, 2), (1, 2)),
        ((0.5, 0.6), (2, 2), (0, 0), (1, 3)),
    ]
    for step, (sigma, slots, cursor, count) in enumerate(walk):
        ring.sigma[:] = sigma
        ring.features[:] = [step * 1000 + i for i in range(BATCH * FEATURE)]
        ring.push()
        for row in range(BATCH):
            assert ring.slot(slots[row], row) == ring.features[row * FEATURE : (row + 1) * FEATURE], (step, row)
            stored = ring.sigmas[slots[row] * BATCH + row]
            assert stored == ring.sigma[row] or (stored != stored and sigma[row] != sigma[row]), (step, row)
        assert (tuple(ring.cursor), tuple(ring.count)) == (cursor, count), step


def storage_too_short_for_a_cpu_push():
    ring = Ring(missing=1)
    ring.cursor[:] = [2, 2]
    ring.push(device=-1)


def storage_too_short_for_a_kernel():
    ring = Ring(missing=1)
    ring.cursor[:] = [2, 2]
    ring.push()


def storage_at_the_end_of_all_addresses():
    ring = Ring()
    ring.cursor[:] = [2, 2]
    ring.push(device=-1, storage=2**64 - 16)


def row_out_of_range():
    Ring().push(rows=[1, BATCH])


def row_negative():
    Ring().push(rows=[-1])


def row_twice():
    Ring().push(rows=[1, 1])


def blocks_left_over_in_a_count():
    ring = Ring()
    ring.count[1] = 0x10001
    ring.push()


def large_push(blocks_left_over: int) -> int:
    """A second push into a row whose sample several blocks share; how many they were."""
    sizes, feature = (CAPACITY, 1, 256, 256), 256 * 256
    storage, features = (ctypes.c_float * (CAPACITY * feature))(), (ctypes.c_float * feature)()
    ring = Ring()
    ring.sigmas[0], ring.cursor[0], ring.count[0] = 0.9, 1, blocks_left_over << 16 | 1
    pointers = dict(storage=ctypes.addressof(storage), features=ctypes.addressof(features))
    ring.push(samples=1, storage_sizes=sizes, features_strides=(feature, 256, 1), **pointers)
    assert (ring.cursor[0], ring.count[0], ring.sigmas[1]) == (2, 2, 0.5)
    return emulated("launch_blocks").value


def a_sample_that_blocks_share():
    assert large_push(0) > 2


def blocks_left_over_in_a_count_of_many():
    large_push(1)


def negative_count():
    ring = Ring()
    ring.count[1] = -65535
    ring.push()


def broken_cursor():
    ring = Ring()
    ring.cursor[1] = CAPACITY
    ring.push()


def broken_count():
    ring = Ring()
    ring.count[1] = CAPACITY + 1
    ring.push()


def broken_count_in_a_gather():
    ring = Ring()
    ring.count[1] = CAPACITY + 1
    ring.gather(0)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(sys.argv[1])
