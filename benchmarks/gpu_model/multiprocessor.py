"""Runs warps, instruction by instruction, on one of the four schedulers of a multiprocessor.

All multiprocessors and schedulers are taken to do the same, so one of them gets its share of what is common: a quarter
of the multiprocessor's shared memory and load units, and one of `4 * multiprocessors` parts of the second-level cache
and the memory. A warp executes in order. It waits as its instructions say: for the stall of the one before, and for the
barriers of loads, products and other work of unknown length. The scheduler issues one instruction per clock, that of
the warp that can go first. Each kind of instruction keeps its unit busy for some cycles.

The memory has its latency here but no limit of its bandwidth; `prediction` adds that. What is left out: misses of the
instruction cache, conflicts of the banks of registers and shared memory, and differences between multiprocessors.
"""

import heapq
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .devices import Device
from .machine_code import NO_BARRIER, Instruction, MachineCode

# Cycles that one instruction of a warp keeps a unit of a scheduler busy: 32 lanes over the results per clock of [C],
# of which a scheduler has a quarter.
_HALF_RATE = {
    *("IADD3", "VIADD", "LEA", "IABS", "SGXT", "POPC", "FLO", "BMSK", "BREV"),
    *("LOP3", "PLOP3", "SHF", "PRMT", "SEL", "FSEL", "VOTE", "P2R", "R2P"),
    *("ISETP", "FSETP", "FMNMX", "IMNMX", "VIMNMX", "VIADDMNMX", "F2FP"),
}
_HEAVY = {"IMAD", "HFMA2", "HADD2", "HMUL2"}
_SIXTEENTHS = {"MUFU", "F2I", "I2F", "F2F", "FRND", "I2I"}

# Cycles until the result of an instruction of unknown length is there, without what it waits for in a unit. [L]
_LATENCY = {
    "LDS": 29,
    "LDSM": 33,
    "SHFL": 24,
    "MUFU": 23,
    "HMMA": 33,
    "S2R": 30,
    "S2UR": 30,
    "LDC": 40,
    "R2UR": 15,
    "LDL": 40,
}
_OTHER_LATENCY = 20  # [A] of conversions and votes, as for MUFU
# Most instructions are none of these, and calls of Python take long.
_WAITING = {"DEPBAR", "WARPGROUP", "SYNCS", "MEMBAR"}  # for more than barriers, in `_awaited`
_NOTED = {"LDG", "LDGSTS", "UTMALDG", "SYNCS", "STG", "ATOMG", "MEMBAR", "LDGDEPBAR", "HGMMA"}  # in `_execute`
_PROGRAM_BARRIER = 20  # [A] cycles until all warps are released


@dataclass
class Traffic:
    """Where the loads of a kernel go.

    Args:
        streamed: of an instruction's position, whether its data comes from memory and is read once; else it comes from
            the second-level cache.
        first: positions before this one are executed before any of the loops. The programs that run first get their
            data there from memory; later ones find it in the second-level cache.
        first_bytes: different bytes that a program reads there. Warps that read the same find it in the first-level
            cache.
        copy_bytes: that one UTMALDG brings.
        once: whether a program reads what is not streamed once, wherever that stands: then it is in memory too.
    """

    streamed: Callable[[int], bool]
    first: int
    first_bytes: int = 0
    copy_bytes: int = 0
    once: bool = False

    def is_first(self, position: int) -> bool:
        """Whether the programs that run first get the data of a load from memory."""
        return position < self.first or (self.once and not self.streamed(position))


@dataclass
class Unit:
    """Something that serves one request after the other."""

    free: float = 0.0
    busy: float = 0.0

    def take(self, at: float, cycles: float) -> float:
        """When a request is done that comes at this time and takes so many cycles."""
        self.free = max(self.free, at) + cycles
        self.busy += cycles
        return self.free


@dataclass
class Warp:
    """A warp on its way."""

    program: "Program"
    ready: float
    step: int = 0
    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: deque = field(default_factory=deque)  # groups of asynchronous copies: when each is there
    open_copy: float = 0.0
    products: deque = field(default_factory=deque)  # groups of asynchronous products
    tiles_awaited: int = 0
    loads: float = 0.0  # when all loads are there
    stores: float = 0.0


@dataclass
class Program:
    """A program's warps on this scheduler, and what they share."""

    warps: int
    cold: bool  # whether it is among the first, and what all programs read is still in memory
    waiting: list[tuple[float, int, Warp]] = field(default_factory=list)
    tiles: list[float] = field(default_factory=list)  # of UTMALDG: when each is there
    ended: int = 0


@dataclass(frozen=True)
class Run:
    """What came of it.

    Args:
        cycles: until the last warp ended.
        issued: instructions.
        first_data, last_data: cycles until the first and the last streamed data were there.
        l2_bytes: that this scheduler moved.
        busy: unit -> cycles that it worked.
    """

    cycles: float
    issued: int
    first_data: float
    last_data: float
    l2_bytes: float
    busy: dict[str, float]


class DoesNotFit(ValueError):
    """A launch that the device refuses, or that the model does not know."""


class Scheduler:
    """A scheduler with its units.

    Args:
        device: it is part of.
        code: that its warps execute.
        traffic: where loads go.
        alone: whether this multiprocessor has the second-level cache for itself, up to what its own link carries.
        memory_latency: cycles; the device's if None.
    """

    def __init__(
        self,
        device: Device,
        code: MachineCode,
        traffic: Traffic,
        alone: bool = False,
        memory_latency: float | None = None,
    ):
        self.device, self.code, self.traffic = device, code, traffic
        per_multiprocessor = device.link_per_clock if alone else device.l2_per_clock / device.multiprocessors
        self.l2_per_cycle = per_multiprocessor / device.schedulers
        self.memory_latency = device.memory_latency if memory_latency is None else memory_latency
        self.units = {name: Unit() for name in ("issue", "half", "heavy", "special", "shared", "products", "l2")}
        self.l2_bytes = 0.0
        self.first_share = 1.0
        self.first_data: float | None = None
        self.last_data = 0.0
        self.end = 0.0
        self._kinds = [self._kind(each) for each in code.instructions]
        self._waits = [each.name in _WAITING for each in code.instructions]
        self._notes = [
            each.name in _NOTED or each.sets != NO_BARRIER or each.frees != NO_BARRIER for each in code.instructions
        ]

    def _kind(self, each: Instruction) -> tuple[str | None, float]:
        """The unit of an instruction, and the cycles that it keeps it busy."""
        if each.name in _HALF_RATE:
            return "half", 2
        if each.name in _HEAVY:
            return "heavy", 2
        if each.name in _SIXTEENTHS:
            return "special", 8
        if each.name in ("LDS", "STS"):
            return "shared", each.lane_bytes  # 128 bytes per clock for four schedulers
        if each.name in ("LDSM", "STSM"):
            return "shared", 16 if "4" in each.forms else 8
        if each.name in ("LDG", "STG", "LDGSTS", "LDL", "STL", "SHFL", "ATOMG"):
            return "shared", max(each.lane_bytes, 4) if each.name != "SHFL" else 4
        if each.name == "HMMA":
            shape = int(re.search(r"\d{4,}", ".".join(each.forms))[0])  # 16816: 16 x 8 x 16
            flops = 2 * 16 * 8 * (shape % 100 if shape > 9999 else shape % 10)
            return "products", flops / self.device.mma_per_clock * (2 if "TF32" in each.forms else 1)
        if each.name == "HGMMA":
            _, columns, depth = map(int, each.forms[0].split("x"))
            flops = 2 * 16 * columns * depth  # a quarter of the 64 rows
            return "products", flops / self.device.wgmma_per_clock * (2 if "TF32" in each.forms else 1)
        return None, 1

    def run(self, route: list[int], resident: int, programs: int, warps: float) -> Run:
        """Executes `programs` programs, of which `resident` run at the same time.

        Args:
            route: what each warp executes.
            resident: programs at a time.
            programs: in all.
            warps: of a program on this scheduler; less than one if it has none of some programs.
        """
        count = max(round(warps), 1)
        read_first = sum(
            32 * self.code.instructions[i].lane_bytes
            for i in route
            if self.code.instructions[i].name in ("LDG", "LDGSTS")
            if self.traffic.is_first(i) and not self.traffic.streamed(i)
        )
        if read_first and self.traffic.first_bytes:
            self.first_share = min(self.traffic.first_bytes / (read_first * self.code.warps), 1.0)
        heap: list[tuple[float, int, Warp]] = []
        number = 0
        left = programs

        def start(at: float):
            nonlocal number, left
            left -= 1
            program = Program(count, at == 0)
            for _ in range(count):
                heapq.heappush(heap, (at, number, Warp(program, at)))
                number += 1

        for _ in range(min(resident, programs)):
            start(0.0)
        instructions, kinds, units = self.code.instructions, self._kinds, self.units
        waits, notes = self._waits, self._notes
        issue = units["issue"]
        while heap:
            ready, order, warp = heapq.heappop(heap)
            position = route[warp.step]
            each = instructions[position]
            unit, busy = kinds[position]
            at = max(ready, issue.free)
            for barrier in each.waits:
                at = max(at, warp.barriers[barrier])
            if waits[position]:
                at = self._awaited(each, warp, at)
            if unit is not None:
                at = max(at, units[unit].free - busy)  # a unit takes one instruction more while it is busy
            if heap and at > heap[0][0] and at > ready:
                heapq.heappush(heap, (at, order, warp))  # another warp may go first
                continue
            issue.take(at, 1)
            done = at + 1 if unit is None else units[unit].take(at, busy)
            if notes[position]:
                self._execute(each, position, warp, at, done)
            warp.step += 1
            after = at + each.stall
            if warp.step == len(route):
                self.end = max(self.end, after, warp.stores)
                warp.program.ended += 1
                if warp.program.ended == count and left:
                    start(after + self.device.cycles(self.device.replace_seconds))
            elif each.name == "BAR" and "ARV" not in each.forms:
                waiting = warp.program.waiting
                waiting.append((after, order, warp))
                if len(waiting) == count:
                    released = max(time for time, _, _ in waiting) + _PROGRAM_BARRIER
                    for _, other_order, other in waiting:
                        heapq.heappush(heap, (released, other_order, other))
                    waiting.clear()
            else:
                heapq.heappush(heap, (after, order, warp))
        return Run(
            self.end,
            int(issue.busy),
            self.first_data or 0.0,
            self.last_data,
            self.l2_bytes,
            {name: each.busy for name, each in units.items()},
        )

    def _awaited(self, each: Instruction, warp: Warp, at: float) -> float:
        """When an instruction may go that waits for copies, products or all of a warp's accesses."""
        if each.name == "DEPBAR":
            allowed = int(each.operands.split(",")[1], 0)
            while len(warp.copies) > allowed:
                at = max(at, warp.copies.popleft())
        elif each.name == "WARPGROUP" and "DEPBAR" in each.forms:
            allowed = int(each.operands.split(",")[1], 0)
            while len(warp.products) > allowed:
                at = max(at, warp.products.popleft())
        elif each.name == "SYNCS" and "PHASECHK" in each.forms:
            if warp.tiles_awaited < len(warp.program.tiles):
                at = max(at, warp.program.tiles[warp.tiles_awaited])
            warp.tiles_awaited += 1
        elif each.name == "MEMBAR" and "CTA" not in each.forms:
            # [A] A fence for the device waits until the warp's own accesses are done.
            at = max(at, warp.loads, warp.stores)
        return at

    def _execute(self, each: Instruction, position: int, warp: Warp, at: float, done: float):
        """Notes when the result of an instruction is there."""
        name, result = each.name, done + _LATENCY.get(each.name, _OTHER_LATENCY)
        if name in ("LDG", "LDGSTS"):
            result = self._load(each, position, warp, at, 32 * each.lane_bytes)
            warp.loads = max(warp.loads, result)
            if name == "LDGSTS":
                warp.open_copy = max(warp.open_copy, result)
        elif name == "UTMALDG":
            moved = self.traffic.copy_bytes / self.device.schedulers / warp.program.warps
            result = self._load(each, position, warp, at, moved)
            warp.open_copy = max(warp.open_copy, result)
        elif name == "SYNCS" and "ARRIVE" in each.forms:
            warp.program.tiles.append(0.0)
        elif name == "STG":
            warp.stores = max(warp.stores, self._store(each, at))
        elif name == "ATOMG":
            result = at + self.device.far_latency
        elif name == "MEMBAR" and "CTA" not in each.forms:
            result = at + self.device.far_latency  # [A] one way to the other half of the cache and back
        elif name == "LDGDEPBAR":
            warp.copies.append(warp.open_copy)
            warp.open_copy = 0.0
        elif name == "HGMMA" and "gsb0" in each.operands:
            warp.products.append(result)
        if name == "UTMALDG" and warp.program.tiles:
            warp.program.tiles[-1] = max(warp.program.tiles[-1], result)
        if each.sets != NO_BARRIER:
            warp.barriers[each.sets] = max(warp.barriers[each.sets], result)
        if each.frees != NO_BARRIER:
            warp.barriers[each.frees] = max(warp.barriers[each.frees], done)

    def _load(self, each: Instruction, position: int, warp: Warp, at: float, moved: float) -> float:
        """When the data of a load is there."""
        first, streamed = self.traffic.is_first(position), self.traffic.streamed(position)
        moved *= self.first_share if first and not streamed else 1.0
        self.l2_bytes += moved
        from_memory = streamed or (first and warp.program.cold)
        latency = self.memory_latency if from_memory else self.device.l2_latency
        if "STRONG" in each.forms:  # what another program wrote
            latency = self.device.far_latency
        there = self.units["l2"].take(at, moved / self.l2_per_cycle) + latency
        if streamed:
            self.first_data = there if self.first_data is None else min(self.first_data, there)
            self.last_data = max(self.last_data, there)
        return there

    def _store(self, each: Instruction, at: float) -> float:
        """When the second-level cache has what is stored."""
        moved = 32 * each.lane_bytes
        self.l2_bytes += moved
        return self.units["l2"].take(at, moved / self.l2_per_cycle) + self.device.l2_latency
