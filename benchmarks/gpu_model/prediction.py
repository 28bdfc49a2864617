"""How long one launch takes on a device, and what decides it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from .arrivals import Meeting, simulate
from .devices import Device
from .machine_code import Instruction, MachineCode
from .multiprocessor import DoesNotFit, Scheduler, Traffic

SEEDS = 3
ROUNDS = (4, 8)  # of the main loop that are run; the time of more of them is proportional
LOADED = (1, 2, 4, 8, 16)  # times the latency of an idle memory, at which they are run


def loaded_latency(use: float) -> float:
    """How many times longer a load takes if a share `use` of the memory's bandwidth is in use.

    The form fits gpu-stream's results [G], where 4, 8, 16 and 32 KB of reads under way on each multiprocessor of a
    GH200 use 0.24, 0.44, 0.71 and 0.94 of what is reached at most. With 0.22 µs between two programs, the loads took
    1.04, 1.19, 1.6 and 4.3 times as long as without load; the formula says 1.04, 1.16, 1.6 and 4.5.
    """
    return (1 - use**2) ** -0.7


@dataclass(frozen=True)
class Launch:
    """A launch of a compiled kernel.

    Args:
        code: of the kernel.
        programs: of the grid.
        main_loop: number, in `code.loops`, of the loop over tiles or steps; None if there is none.
        rounds: of the main loop, of the program that does most.
        trips: rounds of the other loops.
        read, written: bytes that the launch must move from and to the memory.
        scratch: bytes that its programs write for each other.
        streams: of an instruction in the main loop, whether it reads features from memory; all others read what the
            second-level cache holds.
        first_bytes: different bytes that a program reads before its loops.
        copy_bytes: that one UTMALDG brings.
        members: programs that meet at each tile; 1 if none do.
        meetings: how often each program meets others.
        leaves_out: as in `MachineCode.route`.
        once: as in `Traffic`.
    """

    code: MachineCode
    programs: int
    main_loop: int | None
    rounds: int
    read: int
    written: int
    trips: dict[int, int]
    streams: Callable[[Instruction], bool]
    scratch: int = 0
    first_bytes: int = 0
    copy_bytes: int = 0
    members: int = 1
    meetings: int = 1
    leaves_out: Callable[[int, list[Instruction], int], bool] = lambda begin, part, times: False
    once: bool = False


@dataclass(frozen=True)
class Prediction:
    """What the model says of a launch. Times are seconds, sizes are bytes.

    Args:
        seconds: from the end of the launch before it to its own end.
        programs, resident, waves: of the grid; of them on a multiprocessor at a time; and rounds until all have run.
        idle: multiprocessors without a program in the last round.
        in_flight: bytes of features that can be on their way to a multiprocessor at a time.
        instructions_per_byte: of threads, over bytes that the launch moves.
        issue: seconds in which a scheduler issues instructions, all in all.
        memory: seconds in which the memory moves its bytes.
        cache: seconds in which the second-level cache moves its bytes.
        first_data: seconds until the first features are there.
        per_round: seconds of a round of the main loop.
        finish: seconds of finishing a tile, for one program alone.
        most_finished, fair: tiles that one program finishes at most, and on average, at least 1.
        rotated: seconds of the launch if each program began at another tile; None if the programs do not meet.
    """

    seconds: float
    programs: int
    resident: int
    waves: int
    idle: int
    in_flight: float
    instructions_per_byte: float
    issue: float
    memory: float
    cache: float
    first_data: float
    per_round: float
    finish: float = 0.0
    most_finished: int = 0
    fair: float = 0.0
    rotated: float | None = None


def resident_programs(device: Device, code: MachineCode) -> int:
    """How many programs a multiprocessor holds at a time.

    Raises:
        DoesNotFit: not one.
    """
    allowed = device.shared_bytes - device.reserved_shared
    if code.shared > allowed:
        raise DoesNotFit(f"{code.name} needs {code.shared} bytes of shared memory, and {device.name} allows {allowed}")
    of_warp = ceil(code.registers * 32 / 256) * 256
    by_registers = device.registers // (of_warp * code.warps)
    if not by_registers:
        raise DoesNotFit(
            f"{code.name} needs {of_warp * code.warps} registers, and {device.name} has {device.registers}"
        )
    by_shared = device.shared_bytes // (code.shared + device.reserved_shared)
    return min(by_registers, by_shared, device.warps // code.warps, device.programs)


def predict(device: Device, launch: Launch) -> Prediction:
    """The time of a launch.

    The latency of the memory rises with its use, see `loaded_latency`, and the use depends on how long the work takes
    with that latency. The model finds where both agree.

    Raises:
        DoesNotFit: the device can't hold one program.
    """
    code = launch.code
    resident = resident_programs(device, code)
    most = ceil(launch.programs / device.multiprocessors)  # programs that one multiprocessor does
    resident = min(resident, most)
    beyond = max(launch.scratch - device.l2_bytes, 0)  # scratch that goes to memory, and comes back
    read, written = launch.read + beyond, launch.written + beyond
    memory = (read + written) / device.reached_bandwidth(written / (read + written))

    measured = _Measured(device, launch, resident, most)
    per_round = measured.loaded_round(memory / launch.rounds)
    work = measured.start + launch.rounds * per_round
    prediction = Prediction(
        seconds=device.launch_seconds + work,
        programs=launch.programs,
        resident=resident,
        waves=ceil(launch.programs / (resident * device.multiprocessors)),
        idle=(-launch.programs) % device.multiprocessors if most == 1 else 0,
        in_flight=measured.in_flight,
        instructions_per_byte=measured.instructions_per_byte,
        issue=measured.issue,
        memory=memory,
        cache=measured.cache,
        first_data=device.launch_seconds + measured.first_data,
        per_round=per_round,
    )
    if launch.members == 1:
        return prediction
    return _with_meetings(device, launch, prediction, measured, read + written)


def _with_meetings(
    device: Device, launch: Launch, prediction: Prediction, measured: "_Measured", moved: int
) -> Prediction:
    """The prediction of a launch whose programs meet."""
    groups = launch.programs // launch.members
    tiles = launch.meetings
    rounds = launch.rounds / tiles
    meeting = Meeting(
        groups=groups,
        members=launch.members,
        tiles=tiles,
        start=measured.start,
        tile_bytes=moved / launch.programs / tiles,
        bandwidth=moved / launch.rounds / prediction.per_round,
        tile_seconds=measured.per_round * rounds,
        busy_seconds=measured.busy_round * rounds,
        finish_seconds=measured.finish,
    )
    outcomes = [simulate(meeting, seed) for seed in range(SEEDS)]
    seconds = sum(each.seconds for each in outcomes) / SEEDS
    rotated = [simulate(replace(meeting, rotated=True), seed).seconds for seed in range(SEEDS)]
    return replace(
        prediction,
        seconds=max(device.launch_seconds + seconds, prediction.seconds),
        finish=measured.finish,
        most_finished=max(each.most_finished for each in outcomes),
        fair=max(tiles / launch.members, 1.0),
        rotated=max(device.launch_seconds + sum(rotated) / SEEDS, prediction.seconds),
    )


class _Measured:
    """What the model of a multiprocessor says: the times of a round, of the start and of finishing a tile."""

    def __init__(self, device: Device, launch: Launch, resident: int, most: int):
        code = launch.code
        self.device, self.launch, self.resident = device, launch, resident
        self.in_waves = most > resident
        loop = None if launch.main_loop is None else code.loops[launch.main_loop]
        first = loop.start if loop else 0
        finish = code.finish or (len(code.instructions), len(code.instructions))

        def streamed(position: int) -> bool:
            each = code.instructions[position]
            # What is copied before the loop, for its first rounds, are features too.
            inside = loop is None or position in loop or (position < first and each.name == "LDGSTS")
            return inside and not finish[0] <= position < finish[1] and launch.streams(each)

        self.traffic = Traffic(streamed, min(first, finish[0]), launch.first_bytes, launch.copy_bytes, launch.once)
        few, many = ROUNDS if launch.rounds > ROUNDS[1] else (max(launch.rounds // 2, 1), max(launch.rounds, 2))
        programs = most if self.in_waves else resident
        runs = [
            [self._run(rounds, programs, memory_latency=times * device.memory_latency) for rounds in (few, many)]
            for times in LOADED
        ]
        more = (launch.rounds - few) / (many - few)

        def extended(short: float, long: float) -> float:
            """What grows with the rounds, after all of them."""
            return short + more * (long - short)

        low, high = runs[0]
        totals = [extended(short.cycles, long.cycles) for short, long in runs]
        self.first_data, tail = device.seconds(low.first_data), device.seconds(high.cycles - high.last_data)
        outer = [number for number, other in enumerate(code.loops) if loop is not None and loop in other]
        if loop is None or self.in_waves or any(launch.trips.get(number, 1) > 1 for number in outer):
            # Other tiles or programs follow, so all but the first wait and the end is repeated.
            streams = [
                total - short.first_data - (high.cycles - high.last_data) for total, (short, _) in zip(totals, runs)
            ]
        else:
            streams = [launch.rounds * (long.cycles - short.cycles) / (many - few) for short, long in runs]
        # Seconds of a round, at each latency.
        self.rounds = [device.seconds(stream) / launch.rounds for stream in streams]
        self.per_round = self.rounds[0]
        features = launch.read / launch.programs / launch.rounds * programs  # of a round
        # Little's law, at a latency at which little else matters.
        self.in_flight = features / self.rounds[-1] * device.seconds(LOADED[-1] * device.memory_latency)
        # Between the first data and the first round a program may do other things. Meanwhile comes what is under way.
        stall = device.seconds(totals[0] - streams[0] - low.first_data) - tail
        under_way = self.in_flight * min(device.multiprocessors, launch.programs) / device.bandwidth
        self.start = self.first_data + max(stall - under_way, 0.0) + tail
        issued = extended(low.issued, high.issued)
        self.issue = device.seconds(issued)
        parts = device.schedulers * device.multiprocessors
        self.cache = extended(low.l2_bytes, high.l2_bytes) * parts / (device.l2_per_clock * device.clock)
        threads = issued * 32 * device.schedulers / programs * launch.programs
        self.instructions_per_byte = threads / (launch.read + launch.written)
        if launch.members > 1:
            short, long = (self._run(rounds, programs, memory_latency=0) for rounds in (few, many))
            self.busy_round = device.seconds(long.cycles - short.cycles) / (many - few)
            apart = self._run(few, 1, alone=True).cycles
            finishing = self._run(few, 1, alone=True, finishes=True).cycles
            self.finish = device.seconds(finishing - apart) / (
                few if launch.meetings == launch.rounds else launch.meetings
            )

    def loaded_round(self, memory: float) -> float:
        """Seconds of a round if all of its bytes take the memory `memory` seconds at least."""
        low, high = 0.0, 1.0
        for _ in range(50):
            use = (low + high) / 2
            if self._round_at(loaded_latency(use)) * use < memory:
                low = use
            else:
                high = use
        return max(self._round_at(loaded_latency(low)), memory)

    def _round_at(self, latency: float) -> float:
        """Seconds of a round at so many times the latency of an idle memory."""
        place = next((i for i, times in enumerate(LOADED) if latency <= times), len(LOADED) - 1)
        first, second = LOADED[max(place, 1) - 1], LOADED[max(place, 1)]
        below, above = self.rounds[max(place, 1) - 1], self.rounds[max(place, 1)]
        return below + (above - below) * (latency - first) / (second - first)

    def _run(self, rounds: int, programs: int, finishes: bool = False, alone: bool = False, memory_latency=None):
        launch = self.launch
        trips = dict(launch.trips)
        if launch.main_loop is not None:
            trips[launch.main_loop] = rounds
        scheduler = Scheduler(self.device, launch.code, self.traffic, alone, memory_latency)
        route = launch.code.route(trips, finishes, launch.leaves_out)
        return scheduler.run(route, min(self.resident, programs), programs, launch.code.warps / 4)
