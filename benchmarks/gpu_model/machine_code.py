"""What a compiled kernel consists of: instructions, loops and resources, as `nvdisasm` and `cuobjdump` show them."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_CODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)(?:;|\s+(.*?)\s*;)\s+/\* 0x[0-9a-f]+ \*/")
_CONTROL = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
NO_BARRIER = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp.

    Args:
        name: such as "LDG".
        forms: what follows the name, such as ("E", "128").
        predicate: that it is executed under, or None.
        operands: as they are written.
        stall: cycles after which the warp's next one may follow.
        sets, frees: the barriers, 0 to 5, that its result and its last use of a register release; else `NO_BARRIER`.
        waits: the barriers that it waits for.
    """

    name: str
    forms: tuple[str, ...]
    predicate: str | None
    operands: str
    stall: int
    sets: int
    frees: int
    waits: tuple[int, ...]

    @property
    def lane_bytes(self) -> int:
        """Bytes that a load or a store moves for each thread."""
        for form, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if form in self.forms:
                return size
        return 4


@dataclass(frozen=True)
class Loop:
    """Instructions `start` to `end`, both included, of which `end` branches back to `start`."""

    start: int
    end: int

    def __contains__(self, other) -> bool:
        if isinstance(other, Loop):
            return self.start <= other.start and other.end <= self.end and other != self
        return self.start <= other <= self.end


@dataclass
class MachineCode:
    """A compiled kernel.

    Args:
        name: of the kernel.
        instructions: in the order of memory.
        targets: branch -> where it goes to.
        registers: of a thread.
        shared: bytes of a program.
        warps: of a program.
        stack: bytes of a thread that did not fit into the registers.
    """

    name: str
    instructions: list[Instruction]
    targets: dict[int, int]
    registers: int
    shared: int
    warps: int
    stack: int = 0

    @cached_property
    def loops(self) -> list[Loop]:
        """In order; not those that only wait, nor the way back from code that lies behind the end."""
        found = {}
        for branch, target in self.targets.items():
            body = self.instructions[target : branch + 1]
            waits = len(body) < 4 and any(each.name == "SYNCS" for each in body)
            leaves = any(each.name == "EXIT" and each.predicate is None for each in body)
            if target < branch and not waits and not leaves:
                found[target] = max(branch, found.get(target, 0))
        return [Loop(start, end) for start, end in sorted(found.items())]

    @cached_property
    def arrival(self) -> int | None:
        """The atomic operation at which a program counts itself, if there is one."""
        found = [i for i, each in enumerate(self.instructions) if each.name == "ATOMG"]
        return found[0] if found else None

    @cached_property
    def finish(self) -> tuple[int, int] | None:
        """The part, begin and end, that only the last program that arrives executes: what the largest branch after the
        arrival leaves out."""
        if self.arrival is None:
            return None
        spans = [
            (target - branch, branch + 1, target)
            for branch, target in self.targets.items()
            if self.arrival < branch < target and self.instructions[branch].predicate
        ]
        if not spans:
            return None
        _, begin, end = max(spans)
        return begin, end

    def route(
        self,
        trips: dict[int, int],
        finishes: bool,
        leaves_out: Callable[[int, list[Instruction], int], bool] = lambda begin, part, times: False,
    ) -> list[int]:
        """The instructions that a warp executes, in order.

        Branches that leave a loop or code out are not taken, except as the arguments say.

        Args:
            trips: how often each loop is run: number of the loop in `loops` -> rounds.
            finishes: whether the warp's program executes `finish`, once each time that it arrives.
            leaves_out: whether a branch that leaves out a part of the code is taken: where the part begins, its
                instructions, and how often the warp has been there since it entered the innermost loop around it.
        """
        loops = {loop.start: (number, loop) for number, loop in enumerate(self.loops)}
        ends = {loop.end: number for number, loop in enumerate(self.loops)}
        left = {}
        taken: list[int] = []
        position, inside = 0, []
        nested_once = set()
        met: dict[int, int] = {}
        while position < len(self.instructions):
            if position in loops:
                number, loop = loops[position]
                if number not in left:
                    left[number] = trips.get(number, 1)
                    inside.append(loop)
                    met = {branch: times for branch, times in met.items() if branch not in loop}
            each = self.instructions[position]
            taken.append(position)
            target = self.targets.get(position)
            if each.name == "EXIT":
                if each.predicate is None:
                    break
                loop = inside[-1] if inside else None
                if loop is not None and left[self.loops.index(loop)] <= 1 and self._is_exit_of(position, loop):
                    break
                position += 1
                continue
            if target is not None and position in ends and target <= position:
                number = ends[position]
                left[number] = left.get(number, 1) - 1
                if left[number] > 0:
                    position = target
                    continue
                left.pop(number, None)
                inside = [loop for loop in inside if loop.end != position]
                position += 1
                continue
            if target is not None and target > position:
                if each.predicate is None:
                    position = target
                    continue
                if self.finish is not None and position + 1 == self.finish[0] and not finishes:
                    position = target
                    continue
                if self.finish is not None and self.finish[0] <= position < target <= self.finish[1]:
                    if position in nested_once:  # what the first arrival alone does
                        position = target
                        continue
                    nested_once.add(position)
                times = met.get(position, 0)
                met[position] = times + 1
                if leaves_out(position + 1, self.instructions[position + 1 : target], times):
                    position = target
                    continue
            position += 1
        return taken

    def _is_exit_of(self, position: int, loop: Loop) -> bool:
        return not any(other in loop and position in other for other in self.loops)


def _tool(name: str) -> str:
    from triton import knobs

    return getattr(knobs.nvidia, name).path


def read(cubin: bytes, warps: int, shared: int = 0, function: str | None = None) -> MachineCode:
    """A kernel from its compiled file.

    Args:
        cubin: the file's contents.
        warps: of a program.
        shared: bytes of shared memory that the launch asks for.
        function: a part of the kernel's name, if the file holds several.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run(_tool("cuobjdump"), "-res-usage", file)
        functions = re.findall(r"Function (\S+):\s*\n\s*(.*)", usage)
        chosen = [(name, text) for name, text in functions if function is None or function in name]
        if len(chosen) != 1:
            raise ValueError(f"one kernel must be named {function}, but the file has {[name for name, _ in functions]}")
        name, text = chosen[0]
        listing = _run(_tool("nvdisasm"), "-hex", "-c", file)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}
    instructions, targets = parse(_section(listing, name))
    return MachineCode(
        name, instructions, targets, numbers["REG"], max(shared, numbers["SHARED"]), warps, numbers["STACK"]
    )


def _run(*command) -> str:
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, check=True).stdout


def _section(listing: str, name: str) -> str:
    (found,) = [part for part in listing.split("//--------------------- ") if part.startswith(f".text.{name} ")]
    return found


def parse(listing: str) -> tuple[list[Instruction], dict[int, int]]:
    """The instructions of a listing by `nvdisasm -hex`, and the branches among them."""
    found: list[tuple] = []
    controls: list[int] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif code := _CODE.match(line):
            found.append(code.groups())
        elif (control := _CONTROL.match(line)) and len(controls) < len(found):
            controls.append(int(control[1], 16))
    while found and found[-1][1] == "NOP":
        found.pop()
    instructions = [Instruction(*_decoded(code, control)) for code, control in zip(found, controls)]
    targets = {}
    for position, (_, name, operands) in enumerate(found):
        target = _TARGET.search(operands or "")
        if name.startswith("BRA") and target and labels[target[1]] != position:
            targets[position] = labels[target[1]]
    return instructions, targets


def _decoded(code: tuple, control: int) -> Iterator:
    """The fields of an instruction, from its text and the upper half of its 128 bits."""
    predicate, name, operands = code
    name, *forms = name.split(".")
    waits = tuple(barrier for barrier in range(6) if control >> (52 + barrier) & 1)
    stall = max(control >> 41 & 15, 1)
    return iter((name, tuple(forms), predicate, operands or "", stall, control >> 46 & 7, control >> 49 & 7, waits))
