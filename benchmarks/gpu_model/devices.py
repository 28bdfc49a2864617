"""The devices, and the constants of the model with their sources.

Sources, by the letters that the fields name:

[D] NVIDIA's datasheets and architecture whitepapers: rates, multiprocessors, caches. The clock is the one at which
    the datasheet's rate of products follows from 4096 FLOPs (A100: 2048) per clock and multiprocessor.
[G] Dominik Ernst, gpu-benches (github.com/RRZE-HPC/gpu-benches, results in the repository): measured on a GH200 with
    132 multiprocessors at 1.98 GHz and 4.02 TB/s: gpu-latency, gpu-stream, gpu-l2-cache and gpu-small-kernels; the
    A100, L40 and H100 PCIe files of the same benchmarks for the other devices.
[V] Voltage Park, vpbenchmarking: copies within the memory of an H100 SXM reach 2903 of 3350 GB/s.
[C] CUDA C++ Programming Guide, "Arithmetic Instructions" (results per clock and multiprocessor) and "Compute
    Capabilities" (registers, shared memory, warps, blocks).
[L] W. Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level Analysis"
    (2025), and R. Fan et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking"
    (2024): latencies of shared memory, shuffles and products; mma.sync reaches 63 % of wgmma's rate.
[J] Z. Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (2018): how each instruction
    holds the cycles that its warp stalls and the barriers that it sets and waits for. Later architectures keep this.
[A] An assumption, with its reason beside it.
"""

from dataclasses import dataclass

from lesa_kernels.work import DATASHEETS


@dataclass(frozen=True)
class Device:
    """One GPU.

    Args:
        name: of the device.
        architecture: as `10 * major + minor`.
        bandwidth, flops: of the datasheet: bytes per second, and dense bfloat16 products.
        multiprocessors: how many there are. [D]
        clock: cycles per second. [D]
        l2_bytes: capacity of the second-level cache. [D]
        l2_per_clock: bytes per clock that all multiprocessors together read from it. [G]
        link_per_clock: bytes per clock that one multiprocessor reads from it at most. [D]
        memory_latency: cycles from a load to its data, if memory is idle. [G]
        l2_latency: the same for data in the cache. [G]
        far_latency: the same for data that another multiprocessor wrote, which may be in the other half. [G]
        shared_bytes: of a multiprocessor; one program can have 1 KB less. [C]
        warps, programs: that a multiprocessor holds at most. [C]
        mma_per_clock: FLOPs of bfloat16 that one scheduler's tensor core does per clock by mma.sync. [D] [L]
        wgmma_per_clock: by wgmma; 0 if there is none. [D]
        reached: shares of the datasheet's bandwidth that are reached: pairs of the share of the bytes that is written,
            and what is reached then. In between it is interpolated.
    """

    name: str
    architecture: int
    bandwidth: float
    flops: float
    multiprocessors: int
    clock: float
    l2_bytes: int
    l2_per_clock: float
    memory_latency: int
    l2_latency: int
    far_latency: int
    shared_bytes: int
    warps: int = 64
    programs: int = 32
    link_per_clock: float = 64.0
    mma_per_clock: float = 1024 * 0.63
    wgmma_per_clock: float = 1024
    # [G] reads alone reach 3.89 of 4.02 TB/s, two reads and a write 3.78. [V] a read and a write: 0.867.
    reached: tuple[tuple[float, float], ...] = ((0.0, 0.967), (1 / 3, 0.941), (1 / 2, 0.867))

    registers = 65536  # of a multiprocessor, 32 bits each [C]
    reserved_shared = 1024  # bytes that the system takes for each program [C]
    schedulers = 4  # of a multiprocessor; each issues one instruction per clock [C]

    # [G] A kernel that moves almost nothing takes 1.3 µs when it is one of many in a graph, of which 0.55 µs are the
    # load and the store that it waits for. The rest is the time between kernels.
    launch_seconds = 0.75e-6
    # [G] One warp for each multiprocessor, which writes 8 bytes for each thread and ends: a program takes the place of
    # another one every 220 ns.
    replace_seconds = 0.22e-6

    def reached_bandwidth(self, written: float) -> float:
        """Bytes per second of the memory, if a share `written` of them is written; 1/2 is a copy."""
        share = self.reached[-1][1]
        for (low, at_low), (high, at_high) in zip(self.reached, self.reached[1:]):
            if low <= written <= high:
                share = at_low + (at_high - at_low) * (written - low) / (high - low)
        return self.bandwidth * share

    def seconds(self, cycles: float) -> float:
        return cycles / self.clock

    def cycles(self, seconds: float) -> float:
        return seconds * self.clock

    def floor(self, bytes: int, flops: int) -> float:
        """Seconds below which nothing that moves these bytes and does these FLOPs can be, by the datasheet."""
        return max(bytes / self.bandwidth, flops / self.flops)


def _device(key: str, architecture: int, **constants) -> Device:
    name, bandwidth, flops = DATASHEETS[key]
    return Device(name, architecture, bandwidth, flops, **constants)


_HOPPER = {  # [G] 9.7 TB/s from the cache at 1.98 GHz are 4900 bytes per clock
    "l2_per_clock": 4900,
    "memory_latency": 680,
    "l2_latency": 280,
    "far_latency": 503,
    "shared_bytes": 228 << 10,
}
_AMPERE = {  # [G] of an A100 80 GB
    "l2_per_clock": 3830,
    "memory_latency": 552,
    "l2_latency": 206,
    "far_latency": 391,
    "mma_per_clock": 512,
    "wgmma_per_clock": 0,
    "shared_bytes": 164 << 10,
    "reached": ((0.0, 0.917), (1 / 3, 0.880), (1 / 2, 0.852)),
}
_ADA = {  # [G] of an L40, which has the same multiprocessors
    "l2_per_clock": 2100,
    "memory_latency": 624,
    "l2_latency": 274,
    "far_latency": 280,
    "mma_per_clock": 128,
    "wgmma_per_clock": 0,
    "shared_bytes": 100 << 10,
    "warps": 48,
    "programs": 24,
    "reached": ((0.0, 0.978), (1 / 3, 0.961), (1 / 2, 0.900)),
}

PRESETS = {
    "H200": _device("H200", 90, multiprocessors=132, clock=1.83e9, l2_bytes=50 << 20, **_HOPPER),
    "H100": _device("H100", 90, multiprocessors=132, clock=1.83e9, l2_bytes=50 << 20, **_HOPPER),
    "A100": _device("A100", 80, multiprocessors=108, clock=1.41e9, l2_bytes=40 << 20, **_AMPERE),
    "RTX4090": _device("RTX4090", 89, multiprocessors=128, clock=2.52e9, l2_bytes=72 << 20, **_ADA),
    # For the floors only: the model does not read its machine code.
    "B200": _device("B200", 100, multiprocessors=148, clock=1.86e9, l2_bytes=126 << 20, **_HOPPER),
}
