"""Random work with feature rings, and the CUDA kernels run on the CPU, both under the compiler's sanitizers."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

import lesa_kernels
import ring_fuzz
from lesa_kernels.extension import extension_error

HERE = Path(__file__).resolve().parent
PROGRAM = Path(ring_fuzz.__file__)
RAW = HERE / "cuda_on_cpu" / "raw_ring.py"

needs_extension = pytest.mark.skipif(extension_error() is not None, reason=f"no extension: {extension_error()}")


@needs_extension
@pytest.mark.parametrize("first, cases", [(0, 300), pytest.param(300, 1200, marks=pytest.mark.slow)])
def test_random_work_with_the_installed_extension(first, cases):
    assert ring_fuzz.run(seed=first, cases=cases) == cases


@needs_extension
def test_quotients_at_ties_in_the_installed_extension():
    assert ring_fuzz.run_ties(seed=0, cases=20) > 8_000_000


@needs_extension
def test_a_wrong_byte_fails_and_the_message_repeats_it(monkeypatch):
    right = ring_fuzz.op.ring_push_ref

    def wrong(storage, scales, sigmas, *rest):
        right(storage, scales, sigmas, *rest)
        sigmas[-1, -1] += 1

    monkeypatch.setattr(ring_fuzz.op, "ring_push_ref", wrong)
    with pytest.raises(AssertionError, match=r"ring_fuzz\.run\(\d+, 1\): FeatureRing\(.*: sigmas: ") as info:
        ring_fuzz.run(seed=0, cases=50)
    (seed,) = re.findall(r"run\((\d+), 1\)", str(info.value))
    with pytest.raises(AssertionError, match=rf"run\({seed}, 1\)"):
        ring_fuzz.run(int(seed), 1)
    monkeypatch.undo()
    assert ring_fuzz.run(int(seed), 1) == 1


@dataclass(frozen=True)
class Module:
    """The sanitized module, in a package of its own."""

    file: Path
    preloaded: str

    def start(self, program: Path, *arguments: object, **variables: str) -> subprocess.Popen:
        variables |= {"PYTHONPATH": str(self.file.parents[1]), "LD_PRELOAD": self.preloaded}
        variables |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": ""}  # Python itself leaves memory behind
        command = [sys.executable, str(program), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | variables, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def run(self, program: Path, *arguments: object, **variables: str) -> tuple[int, str]:
        """Exit status and output."""
        return finish(self.start(program, *arguments, **variables))


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def tool(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        pytest.skip(f"the build needs {name}")
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """`lesa_kernels._C` with AddressSanitizer and UndefinedBehaviorSanitizer, and the CUDA kernels on the CPU."""
    pybind11 = pytest.importorskip("pybind11", reason="the build needs pybind11")
    cmake, ninja, compiler = tool("cmake"), tool("ninja"), shlex.split(os.environ.get("CXX", "c++"))
    tool(compiler[0])
    for library in ("libasan.so", "libubsan.so"):
        found = subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True).stdout
        if not Path(found.strip()).is_absolute():
            pytest.skip(f"{' '.join(compiler)} has no {library}")
    folder = tmp_path_factory.mktemp("sanitized")
    configure = [cmake, "-S", HERE / "cuda_on_cpu", "-B", folder / "build", "-G", "Ninja", "-DLESA_SANITIZE=ON"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, [cmake, "--build", folder / "build"]):
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
        assert made.returncode == 0, made.stdout

    package = folder / "package" / "lesa_kernels"
    for path in Path(lesa_kernels.__file__).parent.rglob("*"):
        if path.suffix in (".py", ".json"):
            copy = package / path.relative_to(Path(lesa_kernels.__file__).parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    (built,) = (folder / "build").glob("_C*.so")
    needed = subprocess.run(["ldd", built], capture_output=True, text=True, check=True).stdout
    # AddressSanitizer has to come before all else, and looks for what throws exceptions as soon as it is there.
    preloaded = [re.search(rf"{library}\S* => (\S+)", needed)[1] for library in ("libasan", r"libstdc\+\+")]
    return Module(Path(shutil.copy(built, package)), " ".join(preloaded))


# The slow cases above and these are drawn alike; each dtype, layout and kind of push comes up many times in 400.
# Of the CPU's code, processors with vector instructions run one half, and others the other.
RUNS = {
    "CPU": (dict(cases=400, seed=1_000_000, ties=4), ["--large"], {}),
    "CPU, plain instructions": (dict(cases=400, seed=2_000_000, ties=2), [], {"LESA_PLAIN_INSTRUCTIONS": "1"}),
    "kernels": (dict(cases=400, seed=3_000_000, ties=6), ["--large", "--kernels"], {}),
}


@pytest.fixture(scope="module")
def fuzzed(sanitized):
    """Name of a run -> exit status and output. They run side by side."""
    started = {}
    try:
        for name, (numbers, flags, variables) in RUNS.items():
            arguments = [f"--{option}={number}" for option, number in numbers.items()]
            started[name] = sanitized.start(PROGRAM, *arguments, *flags, **variables)
        return {name: finish(process) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()


def counted(module, output, what):
    """How many of these a program compared in this module, by what it said at its end."""
    found = re.search(rf"^(\d+) {what} in \S+ s, {re.escape(str(module.file))}$", output, re.M)
    assert found, output
    return int(found[1])


runs = pytest.mark.parametrize("name", RUNS)


@pytest.mark.slow
@runs
def test_random_work_under_the_sanitizers(sanitized, fuzzed, name):
    status, output = fuzzed[name]
    assert counted(sanitized, output, "cases") == RUNS[name][0]["cases"]
    assert status == 0, output


@pytest.mark.slow
@runs
def test_quotients_at_ties(sanitized, fuzzed, name):
    assert counted(sanitized, fuzzed[name][1], "ties") > 400_000 * RUNS[name][0]["ties"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CPU", "kernels"])
def test_samples_that_many_blocks_or_threads_share(sanitized, fuzzed, name):
    assert counted(sanitized, fuzzed[name][1], "large pushes") >= 112


CALLS = ["good_calls", "launch_errors", "cuda_problem", "all_kernels_are_loaded", "same_call_again", "refusals"]
CALLS += ["a_sample_that_blocks_share"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_launched(sanitized, name):
    status, output = sanitized.run(RAW, name)
    assert (status, output.splitlines()[-1]) == (0, name), output


OVERFLOW, ABORT = r"AddressSanitizer: heap-buffer-overflow(.|\n)*", -signal.SIGABRT
BAD_ROW = r"Assertion .*lesa_kernels\.ring_push: the rows must lie in the ring's batch"
CHANGED = r"Assertion .*lesa_kernels\.ring_push: the ring's count must not change while a push is under way"
BAD_STATE = r"Assertion .*lesa_kernels\.%s: the ring's cursor and count must be in range"

# Name -> exit status, and what is said.
ENDS = {
    "storage_too_short_for_a_cpu_push": (1, OVERFLOW + "copy_run<.*ring_buffer_cpu"),
    "storage_too_short_for_a_kernel": (1, OVERFLOW + "ring_push_kernel<.*ring_buffer_cuda"),
    "storage_at_the_end_of_all_addresses": (1, r"ring_buffer_cpu\.cpp:.* runtime error: pointer index .* overflowed"),
    "row_out_of_range": (ABORT, BAD_ROW),
    "row_negative": (ABORT, BAD_ROW),
    "row_twice": (ABORT, r"Assertion .*lesa_kernels\.ring_push: the rows must be distinct"),
    "broken_cursor": (ABORT, BAD_STATE % "ring_push"),
    "broken_count": (ABORT, BAD_STATE % "ring_push"),
    "blocks_left_over_in_a_count": (ABORT, BAD_STATE % "ring_push"),
    "blocks_left_over_in_a_count_of_many": (ABORT, CHANGED),
    "negative_count": (ABORT, BAD_STATE % "ring_push"),
    "broken_count_in_a_gather": (ABORT, BAD_STATE % "ring_gather"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_what_must_not_be_ends_the_process(sanitized, name):
    status, output = sanitized.run(RAW, name, PYTHONMALLOC="malloc")
    assert status == ENDS[name][0] and re.search(ENDS[name][1], output), output
    assert name not in output.splitlines()
