"""How the stream kernels are launched: block sizes, shares of the work, and what does not fit. Plain Python.

A multiprocessor must have many bytes under way to use its share of the memory's bandwidth, about 100 KB on an H200. So
a configuration is chosen by the bytes that its programs load ahead, within the shared memory and the registers of the
device. The tokens are divided so that all programs move the same number of bytes and fill the device evenly.
"""

import functools
from dataclasses import dataclass

KIB = 1 << 10

# Shared memory of a multiprocessor in KiB, by compute capability. A program may use 1 KiB less, and each program
# occupies 1 KiB more than it uses. (CUDA C++ Programming Guide, table of technical specifications per capability.)
_SHARED_KIB = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228, 120: 100, 121: 100}

MOST_SCRATCH_BYTES = 32 << 20
ENOUGH_BYTES = 96 * KIB  # that are loaded ahead on a multiprocessor; more bring little
MOST_SUMS = 144  # float32 sums that a thread keeps in registers
MOST_FEATURES = 128  # widened features that a thread keeps in registers

# What costs time besides moving bytes, as the number of bytes that a program moves meanwhile: the start of a program
# until its first features are there, the start of a tile, and the meeting of the programs of a group.
_START_BYTES, _TILE_BYTES, _MEETING_BYTES = 24 * KIB, 8 * KIB, 24 * KIB
_FINISH_BYTES = 1.4  # for each element of a forecast, to add its residual


@dataclass(frozen=True)
class Device:
    """What a launch depends on.

    Args:
        architecture: compute capability as `10 * major + minor`; 0 is Triton's interpreter.
        multiprocessors: how many share the work.
    """

    architecture: int
    multiprocessors: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a multiprocessor; that of the smallest GPUs if the architecture is not known."""
        return _SHARED_KIB.get(self.architecture, 100) * KIB

    @property
    def has_wide_products(self) -> bool:
        """Whether the tensor cores take their operands from shared memory, and 64 rows of the first one at least."""
        return 90 <= self.architecture < 120


@dataclass(frozen=True)
class Problem:
    """What is to be computed.

    Args:
        batch, tokens, width: B, T and D of the features.
        history: K, the number of anchors.
        stored_bytes: of a stored element.
        outputs: O of the head, or 0 without one.
        rank: R of the residual, or 0.
        modulations: bytes of an element of the scale, and of the shift, that each token has; empty if it has none.
        products: how many matrix products with the head's weight there are for each token.
        least_operand_bytes: of an element of a matrix product's operand, at least.
    """

    batch: int
    tokens: int
    width: int
    history: int
    stored_bytes: int
    outputs: int = 0
    rank: int = 0
    modulations: tuple[int, ...] = ()
    products: int = 1
    least_operand_bytes: int = 2

    @property
    def operand_bytes(self) -> int:
        """Of an element of a matrix product's operand: float8 becomes bfloat16."""
        return max(self.stored_bytes, self.least_operand_bytes)

    @property
    def channel_bytes(self) -> int:
        """The bytes that are read for a channel of a token: of its features, and of its modulation."""
        return self.history * self.stored_bytes + sum(self.modulations)

    @property
    def tiles(self) -> int:
        """How many values are read for a channel of a token."""
        return self.history + len(self.modulations)


def power_of_2(n: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least `n` and `minimum`, itself a power of two."""
    return max(1 << max(n - 1, 0).bit_length(), minimum)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class ForecastLaunch:
    """How a weighted sum without a residual is launched.

    Args:
        programs: how many.
        groups: into how many ranges the tokens of a sample are divided.
        block_t, block_d: tokens and channels of a tile.
        stages: of the loop over the tiles; `stages - 1` tiles are loaded ahead.
        warps: of a program.
        resident: programs that a multiprocessor holds at once.
    """

    programs: int
    groups: int
    block_t: int
    block_d: int
    stages: int
    warps: int
    resident: int


@functools.lru_cache(maxsize=256)
def forecast_launch(device: Device, problem: Problem) -> ForecastLaunch:
    """The launch for a problem; there always is one."""
    resident, history, stored = 2, problem.history, problem.stored_bytes
    block_d = min(512 // stored if stored > 1 else 256, power_of_2(problem.width, 16))
    if device.architecture == 0:
        block_d = min(block_d, 32)
    stage = (32 if device.shared_bytes > 150 * KIB else 16) * KIB
    warps = 8 if history <= 6 else 4
    block_t = stage // (history * block_d * stored)
    # The weights of all anchors stay in registers: not more than eight channels of each for a thread.
    block_t = max(min(block_t, 4 if device.architecture == 0 else 64), 1)
    block_t = 1 << (block_t.bit_length() - 1)
    blocks = _ceil(problem.width, block_d)
    places, units = resident * device.multiprocessors, problem.batch * blocks
    share = history * block_d * stored

    def cost(groups: int) -> int:
        waves = _ceil(units * groups, places)
        return waves * (_START_BYTES + _ceil(problem.tokens, groups) * share)

    groups = min(_group_choices(places, units, problem.tokens), key=cost)
    return ForecastLaunch(units * groups, groups, block_t, block_d, 3, warps, resident)


def _group_choices(places: int, units: int, tokens: int) -> list[int]:
    """Numbers of groups with which the programs, `units` for each group, fill a few waves as well as they can."""
    units = max(units, 1)  # an empty batch has none
    return sorted({min(max(waves * places // units, 1), max(tokens, 1)) for waves in (1, 2, 3, 4, 6, 8)})


@dataclass(frozen=True)
class Tiling:
    """Block sizes of the kernel that makes sums.

    Args:
        block_t, block_d: tokens and channels of a tile.
        block_o, block_r: outputs and ranks, rounded up; zero if there are none.
        stages: of the loop over the channels; `stages - 1` tiles are loaded ahead.
        warps: of a program.
        shared: bytes of shared memory that a program needs at most.
        resident: programs that a multiprocessor holds at once.
        chunk: outputs and ranks that the end of a program takes at a time.
        products: with the head's weight, for each token.
    """

    block_t: int
    block_d: int
    block_o: int
    block_r: int
    stages: int
    warps: int
    shared: int
    resident: int
    chunk: int
    products: int = 1

    @property
    def part(self) -> int:
        """Number of floats that a program leaves for a tile."""
        if not self.block_o:
            return self.block_t * self.block_r
        return self.block_t * (2 + self.products * self.block_o + self.block_r)

    @property
    def by_rank(self) -> int:
        """Where the sums of the residual begin among them."""
        return self.block_t * (2 + self.block_o) if self.block_o else 0

    def finished_channels(self, device: Device, operand_bytes: int) -> int:
        """How many channels of a tile get their residual at a time; up to four times as many are copied ahead."""
        room = device.shared_bytes // (4 * (self.block_r + self.block_t) * operand_bytes)
        return max(16, min(4 * self.block_d, power_of_2(room + 1) // 2))


def _shared_bytes(problem: Problem, t: int, d: int, o: int, r: int, stages: int) -> int:
    """Shared memory of the loop over the channels: about what Triton allocates for it.

    Features and weights of the anchors are copied to registers, so they need `stages - 1` buffers. Operands of products
    stay where they are and need one more. The sum and the taps take turns in one buffer. Float32 operands are split
    into two, which need buffers of their own.
    """
    operand, history, products = problem.operand_bytes, problem.history, problem.products
    maps = o + r * (history - 1)
    ahead = t * d * problem.channel_bytes + (history + 2) * 4 * d
    total = (stages - 1) * ahead + stages * maps * d * operand + products * t * d * operand
    if operand == 4:
        total += 2 * (max(o, r) + products * t) * d * operand
    return total


def _has_registers(device: Device, problem: Problem, sums: int, t: int, d: int, warps: int) -> bool:
    """Whether the threads of a program have enough registers for the sums and the widened features of a tile."""
    threads = 32 * warps
    features = d * t * problem.tiles // threads
    if not problem.modulations:
        return d == 16 or features <= (MOST_FEATURES // 2 if problem.rank else MOST_FEATURES)
    # There are more sums, and more tiles are loaded ahead. With up to 32 tokens, two programs often fit. Float32 is
    # split into two. Rows of 16 channels are short, so they are for the last tile.
    most = 56 if problem.operand_bytes == 4 else 144 if device.has_wide_products else 100
    is_long = d > 16 or problem.width <= 16 or (t, warps) == (16, 8)
    return t <= 32 and is_long and features <= MOST_FEATURES // 2 and sums * t // threads + features <= most


@functools.lru_cache(maxsize=256)
def tiling(device: Device, problem: Problem) -> Tiling | str:
    """The block sizes for a problem, or why there are none: a sentence that names what is too large."""
    rows = 64 if device.has_wide_products else 16
    o = power_of_2(problem.outputs + problem.rank, rows) if problem.outputs else 0
    r = power_of_2(problem.rank, 16) if problem.rank else 0
    if device.architecture == 0:
        d = min(16, power_of_2(problem.width, 16))
        return Tiling(16, d, o, r, 2, 4, 0, 2, 32, problem.products)
    sums = problem.products * o + r
    chunk = (64 if r <= 32 else 32) if device.has_wide_products else (32 if r else 16)
    if problem.modulations:
        chunk = 16  # of which the end needs up to three sums
    for t, warps in ((64, 4), (64, 8), (32, 4), (32, 8), (16, 4), (16, 8)):
        if sums * t // (32 * warps) > MOST_SUMS:
            continue
        fitting = []
        for d in (64, 32, 16):
            if d > power_of_2(problem.width, 16) or not _has_registers(device, problem, sums, t, d, warps):
                continue
            for stages in (5, 4, 3, 2):
                shared = _shared_bytes(problem, t, d, o, r, stages)
                most = 2 if warps == 4 else 1
                resident = min(device.shared_bytes // (shared + KIB), most)
                if resident:
                    ahead = resident * (stages - 1) * t * d * problem.channel_bytes
                    fitting.append(
                        (
                            min(ahead, ENOUGH_BYTES),
                            resident,
                            d,
                            -stages,
                            Tiling(t, d, o, r, stages, warps, shared, resident, chunk, problem.products),
                        )
                    )
        if fitting:
            return max(fitting, key=lambda each: each[:4])[4]
    return (
        f"{problem.outputs} outputs with a residual of rank {problem.rank} need more shared memory or registers than "
        f"sm_{device.architecture} has"
    )


@dataclass(frozen=True)
class SumsLaunch:
    """How a forecast with residual, or a whole predicted step, is launched.

    Args:
        tiling: the block sizes.
        programs: how many.
        groups: into how many ranges the tokens of a sample are divided.
        splits: how many programs share the channels of a group.
        rounds, together: the tiles of a group are `rounds * together`; after `together` of them, its programs meet.
            More than one round is only possible for a program that meets nobody.
        scratch: number of floats of scratch memory.
    """

    tiling: Tiling
    programs: int
    groups: int
    splits: int
    rounds: int
    together: int
    scratch: int


@functools.lru_cache(maxsize=256)
def sums_launch(device: Device, problem: Problem) -> SumsLaunch | str:
    """The launch for a problem, or why it does not fit: a sentence that names what is too large."""
    chosen = tiling(device, problem)
    if isinstance(chosen, str):
        return chosen
    places = chosen.resident * device.multiprocessors
    blocks = _ceil(problem.width, chosen.block_d)
    best: tuple[float, SumsLaunch] | None = None
    for splits in (1, 2, 4, 8):
        if splits > blocks:
            break
        units = problem.batch * splits
        for groups in _group_choices(places, units, problem.tokens):
            rows = _ceil(problem.tokens, groups)
            tiles = _ceil(rows, chosen.block_t)
            rounds, together = (tiles, 1) if splits == 1 else (1, tiles)
            scratch = units * groups * together * chosen.part
            if 4 * scratch > MOST_SCRATCH_BYTES and not (splits == 1 and best is None):
                continue
            # The last rows of a tile take their time even if there are no tokens for them.
            token_bytes = problem.width * problem.channel_bytes
            moved = tiles * chosen.block_t * token_bytes * _ceil(blocks, splits) / blocks
            cost = _ceil(units * groups, places) * (_START_BYTES + tiles * _TILE_BYTES + moved)
            if not problem.outputs:  # one program adds the residual to all channels of a group
                cost += _ceil(units * groups, places) * tiles * chosen.block_t * problem.width * _FINISH_BYTES
            if splits > 1:
                cost += _MEETING_BYTES + splits * tiles * chosen.part * 2
            launch = SumsLaunch(chosen, units * groups, groups, splits, rounds, together, scratch)
            if best is None or cost < best[0]:
                best = cost, launch
    if best is None or 4 * best[1].scratch > MOST_SCRATCH_BYTES:
        return f"the batch of {problem.batch} needs more than {MOST_SCRATCH_BYTES >> 20} MiB of scratch memory"
    return best[1]
