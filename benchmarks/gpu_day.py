"""What to run on a GPU, part by part: `make gpu-quick` takes four minutes at most, `make gpu` runs everything.

Each part is a process with a time limit. Whatever becomes of it, the next one follows. All results are appended to one
file of JSON lines as they come, and after each part an archive of this file and of all logs is written anew. So what
was measured is on the disk at any time. The exit status is 1 if a part failed or was stopped. See gpu-day.md.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from lines import append

SKIPPED = 77  # exit status of a part that can't run here; its last line says why
OUTCOMES = {0: "passed", SKIPPED: "skipped"}
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends
ROOT = Path(__file__).resolve().parents[1]
PARTS_SCRIPT = Path(__file__).with_name("gpu_parts.py")
QUICK_SECONDS = 240
RATIOS = ("slope_ratio", "graph_ratio", "cold_ratio", "ratio")  # the first that a line has
RATES = {"bytes_per_s": "TB/s", "flops_per_s": "TFLOP/s"}
# Runs an installed module: `python -m` would import what is in the working directory first.
MODULE = (
    "import runpy, sys; sys.path = [p for p in sys.path if p]; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)


@dataclass(frozen=True)
class Part:
    """A process.

    Args:
        name: of the part.
        command: what is run, in the checkout.
        expected: seconds that it should take; it is skipped if less is left.
        limit: seconds after which it is killed with all processes that it has started.
        module, program: what must be there; without it the part is skipped. Empty: nothing.
        beside: whether it starts together with the part before it.
        environment: variables that it gets.
    """

    name: str
    command: list[str]
    expected: float
    limit: float
    module: str = ""
    program: str = ""
    beside: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def _libc() -> ctypes.CDLL | None:
    """The C library on Linux, and None elsewhere. It is loaded before the part is forked."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _begin(libc: ctypes.CDLL | None, parent: int) -> None:
    """Runs in a part before its program: a group of its own, and on Linux it is killed when the parent ends."""
    os.setpgrp()  # to kill it with its children
    if libc is not None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has ended before that
            os.kill(os.getpid(), signal.SIGKILL)


class Running:
    """A part that has been started.

    Args:
        part: what is run.
        log: file for all that it prints.
        limit: seconds that it has.
    """

    def __init__(self, part: Part, log: Path, limit: float):
        self.part, self.limit, self.began = part, limit, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(_begin, _libc(), os.getpid()),
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        """Whether its time is over."""
        return self.seconds >= self.limit

    def kill(self) -> None:
        """Kills it and all processes of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Day:
    """Runs parts, and keeps their results.

    Args:
        name: of the files.
        out: folder of the results: `NAME.jsonl` and `NAME.tar.gz`.
        work: folder of the logs and of all that need not be kept.
        budget: seconds for everything; None is as long as it takes.
    """

    def __init__(self, name: str, out: Path, work: Path, budget: float | None = None):
        self.began, self.budget = time.monotonic(), budget
        self.lines, self.archive, self.logs = out / f"{name}.jsonl", out / f"{name}.tar.gz", work / "logs"
        self.statuses: dict[str, str] = {}
        self.signal: int | None = None  # that has asked this process to stop
        shutil.rmtree(self.logs, ignore_errors=True)
        self.is_complete = True  # whether everything that was to be kept is on the disk
        for folder in (out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.lines.touch()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.began)

    def add(self, kind: str, **fields) -> None:
        """Appends a line to the results, and waits until it is on the disk. What can't be written is printed."""
        line = {"kind": kind, "after_s": round(time.monotonic() - self.began, 2), **fields}
        try:
            append(self.lines, line)
        except OSError as error:
            self._on_unwritten(error)
            print(json.dumps(line), flush=True)

    def _on_unwritten(self, error: OSError) -> None:
        self.is_complete = False
        print(f"could not be written: {error}", flush=True)

    def run(self, parts: list[Part]) -> int:
        """Runs the parts, one after the other unless one is `beside` another. Returns the exit status."""
        groups: list[list[Part]] = []
        for part in parts:
            if part.beside and groups:
                groups[-1].append(part)
            else:
                groups.append([part])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        for group in groups:
            self._run_together(group)
            self.pack()
        return self._summarise()

    def _on_signal(self, number: int, frame) -> None:
        self.signal = number

    def _run_together(self, parts: list[Part]) -> None:
        running = []
        for part in parts:
            if reason := self._reason_to_skip(part):
                self._finish(part, "skipped", reason=reason)
            else:
                print(f"{part.name} ...", flush=True)
                running.append(Running(part, self.logs / f"{part.name}.txt", min(part.limit, self.left)))
        while running:
            time.sleep(0.05)
            for each in list(running):
                ended, stopped = each.process.poll() is not None, self.signal is not None
                if ended or stopped or each.is_over:
                    running.remove(each)
                    each.kill()  # a part that has ended may have left processes
                    status = each.process.wait()
                    fields = {"seconds": round(each.seconds, 1), "exit": status if ended else None}
                    self._finish(each.part, OUTCOMES.get(status, "failed") if ended else "stopped", **fields)

    def _reason_to_skip(self, part: Part) -> str | None:
        if self.signal is not None:
            return f"stopped by {signal.Signals(self.signal).name}"
        if self.left < part.expected:
            return f"takes about {part.expected:.0f} s, and {max(self.left, 0):.0f} s are left"
        if part.module and not is_installed(part.module):
            return f"{part.module} is not installed"
        if part.program and shutil.which(part.program) is None:
            return f"{part.program} is not on PATH"
        return None

    def _finish(self, part: Part, status: str, **fields) -> None:
        self.statuses[part.name] = status
        log = self.logs / f"{part.name}.txt"
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        tail = said[-20:] if status in ("failed", "stopped") else said[-1:]
        self.add("part", part=part.name, status=status, **fields, tail=[line[:300] for line in tail])
        print(f"{part.name}: {status}", *(f"{name} {value}" for name, value in fields.items()), sep="  ", flush=True)
        if status in ("failed", "stopped"):
            print(*(f"    {line}" for line in tail), sep="\n", flush=True)

    def pack(self) -> None:
        """Writes the archive of the results and logs, in the place of an older one."""
        unfinished = self.archive.with_name(self.archive.name + ".new")
        try:
            with tarfile.open(unfinished, "w:gz") as archive:
                archive.add(self.lines, self.lines.name)
                archive.add(self.logs, "logs")
            unfinished.replace(self.archive)
        except OSError as error:
            self._on_unwritten(error)

    def _summarise(self) -> int:
        bad = [name for name, status in self.statuses.items() if status in ("failed", "stopped")]
        skipped = [name for name, status in self.statuses.items() if status == "skipped"]
        self.add("summary", parts=self.statuses)
        self.pack()
        if self.lines.exists():
            show(self.lines)
        if self.signal is not None:
            return 128 + self.signal
        print(f"{len(self.statuses) - len(bad) - len(skipped)} of {len(self.statuses)} parts passed")
        for text, names in (("failed", bad), ("skipped", skipped)):
            if names:
                print(f"{text}: {', '.join(names)}")
        print(f"results: {self.lines}\nwith logs: {self.archive}")
        return int(bool(bad) or not self.is_complete)


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def show(lines: Path) -> None:
    """Prints the measured cases, and all that is wrong, as a table."""
    print(f"{'part':<8} {'case':<62} {'error':>8} {'alone us':>9} {'graph us':>9} {'floor us':>9} {'ratio':>7}")
    for line in map(json.loads, lines.read_text().splitlines()):
        if line["kind"] != "result":
            continue
        ratio = next((line[name] for name in RATIOS if name in line), None)
        times = [line.get(f"{name}_us") for name in ("cold", "graph", "floor")]
        figures = [(line.get("error"), 8, ".1e"), *((each, 9, ".1f") for each in times), (ratio, 7, ".2f")]
        said = [format("" if each is None else format(each, spec), f">{width}") for each, width, spec in figures]
        said += [f" {line[name] * 1e-12:.3f} {unit}" for name, unit in RATES.items() if name in line]
        wrong = line.get("ok") is False or "exception" in line
        if wrong or any(map(str.strip, said)):
            print(f"{line['part']:<8} {line['case']:<62}", *said, *[" WRONG"] * wrong)


def measured(name: str, expected: float, limit: float, lines: Path, device: str, **options) -> Part:
    """A part of `gpu_parts.py`."""
    command = [sys.executable, str(PARTS_SCRIPT), name, "--device", device, "--results", str(lines)]
    return Part(name, command, expected, limit, **options)


def pytest_part(name: str, arguments: list[str], expected: float, limit: float, **options) -> Part:
    """Tests or benchmarks, of the packages in PYTHONPATH."""
    command = [sys.executable, "-c", MODULE, "pytest", "-p", "no:cacheprovider", "-m", "", *arguments]
    return Part(name, command, expected, limit, **options)


def build(work: Path, capability: str, device: str) -> Part:
    """The extension for the GPU of this machine alone, into the copy of the packages in `work`."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(work / "site")]
    command += ["--build-temp", str(work / "build")]
    cuda = {"LESA_CUDA": "1", "LESA_CUDA_ARCHS": capability.replace(".", "") + "-real"}
    return Part("build", command, 60, 150, environment=cuda if device == "cuda" else {"LESA_CUDA": "0"})


def quick_parts(lines: Path, work: Path, capability: str, device: str) -> list[Part]:
    """What matters most, in order."""
    workers = str(min(8, os.cpu_count() or 1))
    return [
        measured("machine", 5, 40, lines, device),
        build(work, capability, device),
        measured("compile", 60, 100, lines, device, beside=True),
        measured("roofs", 8, 25, lines, device),
        measured("flux", 20, 45, lines, device),
        measured("tiles", 25, 45, lines, device),
        measured("repeat", 15, 30, lines, device),
        measured("hunyuan", 20, 45, lines, device),
        measured("dense", 8, 25, lines, device),
        measured("kan", 15, 35, lines, device),
        pytest_part("tests", ["-v", "-n", workers, "tests/test_gpu.py"], 20, 120),
    ]


def all_parts(lines: Path, work: Path, capability: str, device: str) -> list[Part]:
    """Everything: what is quick, the benchmarks, all tests that need a GPU, and compute-sanitizer."""
    *parts, tests = quick_parts(lines, work, capability, device)
    workers = str(min(12, os.cpu_count() or 1))
    logs = work / "logs"
    suites = {"predictor": "", "ring": "", "kan": "", "step": "diffusers", "overhead": "diffusers"}
    for suite, module in suites.items():
        arguments = [f"benchmarks/bench_{suite}.py", "--benchmark-only", "--device", device, "-v"]
        arguments += ["--benchmark-max-time", "0.3", "--benchmark-json", str(logs / f"bench-{suite}.json")]
        parts.append(pytest_part(f"bench-{suite}", arguments, 30, 240, module=module))
    end_to_end = ["benchmarks/end_to_end.py", "--device", device, "--out", str(logs / "end_to_end.json")]
    parts.append(Part("end-to-end", [sys.executable, *end_to_end], 60, 240, module="diffusers"))
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/lesa_kernels").glob("test_*_kernels.py"))
    parts += [
        tests,
        pytest_part("tests-kernels", ["-v", "-n", workers, *kernels], 60, 400),
        pytest_part("tests-marked", ["-v", "-m", "gpu", "tests/lesa_kernels"], 20, 200),
        pytest_part("tests-training", ["-v", "-m", "gpu", "tests/lesa"], 20, 200, module="diffusers"),
    ]
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = ["benchmarks/sanitize.py", "--tool", tool, "--log", str(logs / f"{tool}-reports.txt")]
        parts.append(Part(tool, [sys.executable, *command], 60, 300, program="compute-sanitizer"))
    return parts


SETS = {"quick": quick_parts, "all": all_parts}


def first_gpu() -> tuple[str, str]:
    """Name and compute capability of the first GPU, from nvidia-smi or else from torch; exits if there is none.

    Some containers have a GPU, but no nvidia-smi that works.
    """
    query = "import torch; one = torch.cuda.get_device_properties(0); print(f'{one.name}, {one.major}.{one.minor}')"
    commands = (["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"], [sys.executable, "-c", query])
    for command in commands:
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        name, _, capability = said.stdout.partition("\n")[0].rpartition(", ")
        if not said.returncode and re.fullmatch(r"\d+\.\d+", capability.strip()):
            return name.strip(), capability.strip()
    sys.exit("This needs an NVIDIA GPU, and nvidia-smi and torch find none here. Use `make test bench` on a CPU.")


def copy_packages(site: Path, builds: bool) -> None:
    """Copies the packages, and the extension if the checkout has it; what an earlier call has built stays."""
    kept = {} if builds else {file.name: file.read_bytes() for file in site.glob("lesa_kernels/*.so")}
    shutil.rmtree(site, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lesa_kernels", site / "lesa_kernels", ignore=leave)
    shutil.copytree(ROOT / "python" / "lesa", site / "lesa", ignore=leave)
    for name, content in kept.items():
        (site / "lesa_kernels" / name).write_bytes(content)


def commit() -> str:
    """The commit, with a plus if the checkout has changes."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS, help=f"quick: at most {QUICK_SECONDS} s; all: everything")
    parser.add_argument("only", nargs="*", metavar="PART", help="run these parts only; default: all of the set")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results/NAME OF THE GPU")
    parser.add_argument("--work", type=Path, help="folder of builds and logs; default: build/gpu-day")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for everything; default: 240 for quick, else none"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with small sizes")
    options = parser.parse_intermixed_args(argv)  # names of parts may come last

    name, capability = first_gpu()
    folder = name.replace(" ", "-").replace("/", "-")
    out = (options.out or ROOT / "benchmarks" / "results" / folder).resolve()
    work = (options.work or ROOT / "build" / "gpu-day").resolve()
    budget = options.budget or (QUICK_SECONDS if options.set == "quick" else None)
    known = [part.name for part in SETS[options.set](out, work, capability, options.device)]
    if unknown := set(options.only) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    try:
        day = Day(f"{options.set}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}", out, work, budget)
    except OSError as error:
        parser.error(f"the results can't be written: {error}. Choose other folders with --out and --work.")
    parts = SETS[options.set](day.lines, work, capability, options.device)
    chosen = [part for part in parts if not options.only or part.name in options.only]
    copy_packages(work / "site", builds="build" in (part.name for part in chosen))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(work / "site"), os.environ.get("PYTHONPATH"))))
    if options.device == "cpu":
        chosen = [replace(part, limit=10 * part.limit) for part in chosen]
        os.environ |= {"TRITON_INTERPRET": "1", "LESA_BACKEND": "triton"}
    day.add("begin", set=options.set, commit=commit(), gpu=name, device=options.device, budget_s=budget)
    return day.run(chosen)


if __name__ == "__main__":
    sys.exit(main())
