"""Runs all programs of a launch whose programs meet: in what order they arrive, who finishes, and when the last ends.

The programs of a group all work on the same tiles, one after the other. They count their arrivals at each tile, and the
last one finishes the tile before it goes on. All programs that wait for data share the memory's bandwidth equally. What
a program does takes a few per cent more or less each time; nothing else makes two programs differ.
"""

import heapq
import random
from dataclasses import dataclass

JITTER = 0.05  # [A] the share by which each duration varies at most; 0.02 to 0.1 give the same order


@dataclass(frozen=True)
class Meeting:
    """A launch whose programs meet. Times are seconds.

    Args:
        groups: of programs that meet.
        members: of a group.
        tiles: that a group works on, each of them by all of its members.
        start: from the beginning of the launch to the first request for data.
        tile_bytes: that a program moves between the memory and itself for a tile.
        bandwidth: of the memory, bytes per second.
        tile_seconds: that a tile takes at least, if there is no other program.
        busy_seconds: that a tile takes at least if its data is there already.
        finish_seconds: that finishing a tile takes.
        rotated: whether each member begins at another tile.
    """

    groups: int
    members: int
    tiles: int
    start: float
    tile_bytes: float
    bandwidth: float
    tile_seconds: float
    busy_seconds: float
    finish_seconds: float
    rotated: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it: when the last program ended, and how many tiles that program finished which finished most."""

    seconds: float
    most_finished: int


def simulate(meeting: Meeting, seed: int = 0) -> Outcome:
    """Runs the launch once."""
    chance = random.Random(seed)

    def varied(duration: float) -> float:
        return duration * (1 + chance.uniform(-JITTER, JITTER))

    programs = meeting.groups * meeting.members
    step, finished = [0] * programs, [0] * programs
    counts = [[0] * meeting.tiles for _ in range(meeting.groups)]
    earliest = [0.0] * programs  # when the tile under way can be done
    served, now, end = 0.0, 0.0, 0.0  # bytes that each program has got that asked all the time
    asking: list[tuple[float, int]] = []  # until how many bytes, and who
    timed: list[tuple[float, int, str]] = [(varied(meeting.start), program, "ask") for program in range(programs)]
    heapq.heapify(timed)
    while asking or timed:
        rate = meeting.bandwidth / max(len(asking), 1)
        next_served = now + (asking[0][0] - served) / rate if asking else float("inf")
        if timed and timed[0][0] <= next_served:
            time, program, what = heapq.heappop(timed)
        else:
            time, program, what = next_served, heapq.heappop(asking)[1], "served"
        served += (time - now) * rate if asking or what == "served" else 0.0
        now = time
        if what == "ask":
            earliest[program] = now + varied(meeting.tile_seconds)
            heapq.heappush(asking, (served + varied(meeting.tile_bytes), program))
            continue
        if what == "served" and now < earliest[program]:
            heapq.heappush(timed, (earliest[program], program, "tile"))
            continue
        if what != "finish":
            group, member = divmod(program, meeting.members)
            first = member * meeting.tiles // meeting.members if meeting.rotated else 0
            tile = (step[program] + first) % meeting.tiles
            counts[group][tile] += 1
            if counts[group][tile] == meeting.members:
                finished[program] += 1
                heapq.heappush(timed, (now + varied(meeting.finish_seconds), program, "finish"))
                continue
        step[program] += 1
        if step[program] == meeting.tiles:
            end = max(end, now)
        elif what == "finish":  # the next tile's data came while this one was finished
            heapq.heappush(timed, (now + varied(meeting.busy_seconds), program, "tile"))
        else:
            heapq.heappush(timed, (now, program, "ask"))
    return Outcome(end, max(finished))
