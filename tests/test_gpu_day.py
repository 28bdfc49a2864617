"""What runs on a borrowed GPU, tried without one: no failure stops the next part, and no result is lost."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_cases
import gpu_day
import gpu_parts
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
DRIVER = f"""
import json, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from gpu_day import Day, Part
parts, folder, budget = json.loads(sys.argv[1])
sys.exit(Day("day", Path(folder) / "out", Path(folder) / "work", budget).run([Part(**part) for part in parts]))
"""
FAKE_SMI = """#!/bin/sh
for argument in "$@"; do case $argument in --query-gpu=*) fields=${argument#--query-gpu=};; esac; done
IFS=,
for field in $fields; do
  case $field in name) value="NVIDIA Fake 1";; compute_cap) value=9.0;; *) value="1 unit";; esac
  line="${line:+$line, }$value"
done
echo "$line"
"""
FAKE_CMAKE = """#!/bin/sh
for argument in "$@"; do
  case $argument in
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) folder="${argument#*=}"; mkdir -p "$folder"; echo "$*" > "$folder/_C.so";;
  esac
done
"""


def part(name, code, expected=0.0, limit=60.0, **options):
    return {"name": name, "command": [sys.executable, "-c", code], "expected": expected, "limit": limit, **options}


def start(folder, parts, budget=None):
    command = [sys.executable, "-c", DRIVER, json.dumps([parts, str(folder), budget])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def statuses(folder):
    return {line["part"]: line["status"] for line in lines_of(folder / "out" / "day.jsonl") if line["kind"] == "part"}


def wait_for(file, seconds=30):
    end = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert file.exists()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hanging(pid_file):
    """A part that starts a process of its own, and waits for it for ever."""
    return (
        "import subprocess, pathlib; p = subprocess.Popen(['sleep', '600']); "
        f"pathlib.Path({str(pid_file)!r}).write_text(str(p.pid)); print('begins to wait', flush=True); p.wait()"
    )


@pytest.mark.slow
def test_no_part_stops_the_next(tmp_path):
    parts = [
        part("passes", "print('done')"),
        part("crashes", "import os, signal; print('before'); os.kill(os.getpid(), signal.SIGSEGV)"),
        part("fails", "print('the reason'); raise SystemExit(3)"),
        part("hangs", hanging(tmp_path / "pid"), limit=1.5),
        part("beside it", "print('at the same time')", beside=True),
        part("can't run", "print('refused here'); raise SystemExit(77)"),
        part("lacks a module", "", module="surely_not_installed"),
        part("lacks a program", "", program="surely-not-on-path"),
        part("last", "print('still here')"),
    ]
    process = start(tmp_path, parts)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert statuses(tmp_path) == {
        "passes": "passed",
        "crashes": "failed",
        "fails": "failed",
        "hangs": "stopped",
        "beside it": "passed",
        "can't run": "skipped",
        "lacks a module": "skipped",
        "lacks a program": "skipped",
        "last": "passed",
    }
    assert not is_running(int((tmp_path / "pid").read_text()))
    found = {line["part"]: line for line in lines_of(tmp_path / "out" / "day.jsonl") if line["kind"] == "part"}
    assert found["crashes"]["exit"] == -signal.SIGSEGV and found["fails"]["exit"] == 3
    assert 1.5 <= found["hangs"]["seconds"] < 10 and found["hangs"]["tail"] == ["begins to wait"]
    assert found["fails"]["tail"] == ["the reason"] and found["can't run"]["tail"] == ["refused here"]
    assert found["lacks a module"]["reason"] == "surely_not_installed is not installed"
    assert found["lacks a program"]["reason"] == "surely-not-on-path is not on PATH"
    assert "failed: crashes, fails, hangs" in printed and "the reason" in printed
    with tarfile.open(tmp_path / "out" / "day.tar.gz") as archive:
        assert {"day.jsonl", "logs/hangs.txt", "logs/last.txt"} <= set(archive.getnames())
        assert archive.extractfile("day.jsonl").read() == (tmp_path / "out" / "day.jsonl").read_bytes()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["day.jsonl", "day.tar.gz"]


def test_results_that_cannot_be_written_stop_no_part(tmp_path):
    """As where the disk is full. Then they are printed, and the exit status says that something is missing."""
    remove = f"import shutil; shutil.rmtree({str(tmp_path / 'out')!r})"
    process = start(
        tmp_path, [part("removes the folder", remove), part("last", f"open({str(tmp_path / 'ran')!r}, 'w')")]
    )
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and (tmp_path / "ran").exists()
    assert "could not be written" in printed and '"part": "last", "status": "passed"' in printed


def test_a_folder_that_cannot_be_written_is_refused_at_once(machine, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu_day.main(["quick", "machine", "--out", str(tmp_path / "file" / "out"), "--work", str(tmp_path / "work")])
    assert "Choose other folders with --out and --work" in capsys.readouterr().err


def test_a_case_whose_line_cannot_be_written_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_parts, "cases_of", lambda *_: [gpu_cases.Named(name, raises) for name in ("one", "two")])
    assert gpu_parts.main(["dense", "--device", "cpu", "--results", str(tmp_path / "missing" / "results.jsonl")]) == 1
    assert '"case": "two"' in capsys.readouterr().out


def test_all_parts_passed_or_were_skipped(tmp_path):
    process = start(tmp_path, [part("passes", ""), part("skipped", "", module="surely_not_installed")])
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.slow
def test_the_budget_is_kept(tmp_path):
    sleeps = "import time; time.sleep(30)"
    parts = [part("long", sleeps, expected=1), part("no time", sleeps, expected=5), part("short", "")]
    begin = time.monotonic()
    process = start(tmp_path, parts, budget=2.0)
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 10 and process.returncode == 1
    assert statuses(tmp_path) == {"long": "stopped", "no time": "skipped", "short": "skipped"}
    line = lines_of(tmp_path / "out" / "day.jsonl")[1]
    assert line["reason"] == "takes about 5 s, and 0 s are left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_measured_is_on_the_disk_when_all_is_killed(number, tmp_path):
    lines = tmp_path / "out" / "day.jsonl"
    append = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from lines import append; from pathlib import Path; "
    )
    append += f"append(Path({str(lines)!r}), dict(kind='result', part='two')); "
    process = start(tmp_path, [part("one", ""), part("two", append + hanging(tmp_path / "pid")), part("three", "")])
    wait_for(tmp_path / "pid")
    process.send_signal(number)
    process.communicate(timeout=30) if number == signal.SIGTERM else process.wait(timeout=30)
    lines = lines_of(lines)
    assert [(line["kind"], line["part"]) for line in lines[:2]] == [("part", "one"), ("result", "two")]
    with tarfile.open(tmp_path / "out" / "day.tar.gz") as archive:
        assert "logs/one.txt" in archive.getnames()
    child = int((tmp_path / "pid").read_text())
    if number == signal.SIGKILL:
        assert len(lines) == 2
        part_of_child = os.getpgid(child)
        end = time.monotonic() + 30
        while is_running(part_of_child) and time.monotonic() < end:
            time.sleep(0.02)
        ended = not is_running(part_of_child)
        os.killpg(part_of_child, signal.SIGKILL)
        assert ended or sys.platform != "linux"  # the part ends with the process that started it
    else:
        assert statuses(tmp_path) == {"one": "passed", "two": "stopped", "three": "skipped"}
        assert process.returncode == 128 + signal.SIGTERM and not is_running(child)


# The parts


@pytest.fixture
def dry(monkeypatch, tmp_path):
    """`dry(part)`: runs a part on the CPU, in Triton's interpreter; returns the exit status and the lines."""
    monkeypatch.setenv("LESA_BACKEND", "triton")

    def run(*arguments):
        file = tmp_path / "results.jsonl"
        file.unlink(missing_ok=True)
        status = gpu_parts.main([*arguments, "--device", "cpu", "--results", str(file)])
        return status, {line["case"]: line for line in lines_of(file)}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "tiles", "dense", "kan"])
def test_a_part_says_error_time_and_ratio_of_each_case(name, dry):
    status, lines = dry(name)
    cases = gpu_cases.cases_of(name, torch.device("cpu"))
    assert status == 0 and set(lines) >= {case.name for case in cases}
    for case in cases:
        line = lines[case.name]
        assert line["part"] == name and line["error"] < (0.05 if "float8" in case.name else 1e-5), line
        assert line["floor_us"] > 0
        assert line["ratio"] == pytest.approx(line["host_us"] / line["floor_us"])
        assert line.get("ok") is (None if case.name.endswith(("addmm", "epilogue", "cox-de-boor")) else True)
    assert sum("slope" in each for each in lines) == (6 if name == "tiles" else 0)


@pytest.mark.slow
def test_repeat_calls_every_case_again(dry):
    status, lines = dry("repeat")
    assert status == 0 and len(lines) == 13
    assert all(line["calls"] == 3 and line["different"] == 0 and line["ok"] for line in lines.values())


def test_processes_that_compile_share_all_cases():
    device = torch.device("cpu")
    cases = [case for part in gpu_parts.COMPILED for case in gpu_cases.cases_of(part, device) if case.compiles]
    shares = [gpu_parts.share_of(device, f"{own}/5") for own in range(5)]
    assert sum(map(len, shares)) == len(cases) > 40
    assert len({case.name for share in shares for case in share}) == len(cases)


def wrong(case):
    right = case.make()

    def call():
        return right.call() * 1.001

    return gpu_cases.Named(case.name, lambda: gpu_cases.Case(call, right.exact, right.plain, right.least, right.dtype))


def raises():
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["flux", "tiles"])
def test_a_wrong_case_and_one_that_raises_fail_the_part_and_not_the_next_case(part, dry, monkeypatch, capsys):
    first, second, third, *_ = gpu_cases.cases_of(part, torch.device("cpu"))
    broken = [wrong(first), gpu_cases.Named(second.name, raises), third]
    monkeypatch.setattr(gpu_parts, "cases_of", lambda *_: broken)
    monkeypatch.setenv("LESA_BACKEND", "torch")
    status, lines = dry(part)
    assert status == 1
    assert lines[first.name]["ok"] is False and lines[first.name]["error"] == pytest.approx(1e-3, rel=0.1)
    assert lines[second.name]["exception"] == "RuntimeError: out of resource: shared memory"
    assert lines[third.name]["ok"] is True


@pytest.mark.slow
@pytest.mark.parametrize("breaks", ["hangs", "breaks the device"])
def test_after_a_case_that_hangs_or_breaks_the_device_the_next_runs_in_a_new_process(breaks, tmp_path):
    file = tmp_path / "results.jsonl"
    program = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_cases, gpu_parts
first, second, *rest = gpu_parts.cases_of("dense", gpu_parts.torch.device("cpu"))

def right():
    gpu_parts.CASE_SECONDS["cpu"] = 1  # for the next
    return first.make()

def wrong():
    if {breaks == "hangs"}:
        time.sleep(600)
    raise RuntimeError("an illegal memory access was encountered")

gpu_parts.cases_of = lambda *_: [gpu_cases.Named(first.name, right), gpu_cases.Named(second.name, wrong), *rest]
gpu_parts.is_broken = lambda device: True
sys.exit(gpu_parts.main(["dense", "--device", "cpu", "--results", {str(file)!r}]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    lines = lines_of(file)
    names = [case.name for case in gpu_cases.cases_of("dense", torch.device("cpu"))]
    assert [line["case"] for line in lines] == names
    said = "no result after 1 s" if breaks == "hangs" else "RuntimeError: an illegal memory access was encountered"
    assert lines[1]["exception"] == said
    assert all("error" in line for line in (lines[0], lines[2]))


class OnGPU:
    """Floors of a GPU of one byte and one operation in a microsecond."""

    device = torch.device("cuda")

    def copy_bandwidth(self):
        return 1e6

    def matmul_rate(self, dtype):
        return 1e6


def test_on_a_gpu_a_case_has_its_time_alone_and_in_a_graph(monkeypatch):
    one = torch.ones(4)
    case = gpu_cases.Case(lambda: one, one.double, lambda: one, {"bytes": 8, "flops": 4}, torch.float32)
    monkeypatch.setattr(gpu_parts, "synchronise", lambda device: None)
    monkeypatch.setattr(gpu_parts, "device_seconds", lambda call, repeats: [1e-5 * i for i in range(1, 6)])
    monkeypatch.setattr(gpu_parts, "graph_seconds", lambda call: [1e-5, 2e-5, 2.4e-5])
    line = gpu_parts.measure(case, OnGPU())
    assert line["ok"] and line["floor_us"] == pytest.approx(8)
    assert line["cold_p20_us"] < line["cold_us"] < line["cold_p80_us"] and line["cold_us"] == pytest.approx(30)
    assert line["cold_ratio"] == pytest.approx(30 / 8) and line["graph_us"] == pytest.approx(20)
    assert line["graph_ratio"] == pytest.approx(20 / 8)

    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu_parts, "graph_seconds", refuse)
    line = gpu_parts.measure(case, OnGPU())
    assert line["ok"] is False and line["no_graph"] == "operation not permitted when stream is capturing"
    assert "ok" not in gpu_parts.measure(gpu_cases.Case(case.call, case.exact, None, case.least, case.dtype), OnGPU())


def test_an_error_that_is_no_number_is_wrong():
    good, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert gpu_parts.relative_error(nan, good.double()) == float("inf")
    assert gpu_parts.relative_error(torch.ones(2), good.double()) == float("inf")
    assert gpu_parts.relative_error((good, 2 * good), (good.double(), good.double())) == pytest.approx(1.0)


def test_repeat_finds_a_result_that_changes():
    turns = iter(range(10))
    case = gpu_cases.Case(lambda: torch.tensor([next(turns) // 3]), None, None, {}, torch.float32)
    line = gpu_parts.repeated(case, torch.device("cpu"))
    assert line == {"calls": 3, "different": 1, "ok": False}


def test_the_table_has_every_figure_and_all_that_is_wrong(tmp_path, capsys):
    lines = [
        {"kind": "begin"},
        {"kind": "result", "part": "roofs", "case": "copy", "bytes_per_s": 4.3e12},
        {
            "kind": "result",
            "part": "flux",
            "case": "good",
            "error": 1e-3,
            "ok": True,
            "graph_us": 30.0,
            "floor_us": 27.0,
        },
        {
            "kind": "result",
            "part": "flux",
            "case": "bad",
            "error": None,
            "ok": False,
            "cold_us": 31.04,
            "cold_ratio": 1.234,
        },
        {"kind": "result", "part": "compile", "case": "raises", "exception": "OutOfResources"},
        {"kind": "result", "part": "repeat", "case": "the same", "ok": True},
    ]
    file = tmp_path / "day.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    gpu_day.show(file)
    _, copy, good, bad, raised = capsys.readouterr().out.splitlines()
    assert "4.300 TB/s" in copy and "WRONG" not in copy + good
    assert "1.0e-03" in good and "30.0" in good and "27.0" in good
    assert "31.0" in bad and "1.23" in bad and bad.endswith("WRONG") and raised.endswith("WRONG")


# The whole


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """As on a machine that has nvidia-smi, and no diffusers. CMake is quick there, and compiles nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, content in {"nvidia-smi": FAKE_SMI, "cmake": FAKE_CMAKE}.items():
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    blocker = tmp_path / "blocked" / "sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'diffusers':\n"
        "            raise ModuleNotFoundError('no diffusers here', name=name)\n"
        "sys.meta_path.insert(0, Blocked)\n"
    )
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(blocker.parent), *([inherited] if inherited else [])]))


def make(target, *arguments):
    command = ["make", "-C", str(ROOT), target, f"PYTHON={sys.executable}", "ARGS=" + " ".join(map(str, arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_make_gpu_quick_runs_dry(machine, tmp_path):
    done = make(
        "gpu-quick",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path / "work",
        "machine",
        "build",
        "dense",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("quick-*.jsonl")
    lines = lines_of(file)
    begin, summary = lines[0], lines[-1]
    assert begin["set"] == "quick" and begin["gpu"] == "NVIDIA Fake 1" and begin["budget_s"] == 240
    assert summary["parts"] == {"machine": "passed", "build": "passed", "dense": "passed"}
    cases = {line["case"]: line for line in lines if line["kind"] == "result"}
    assert cases["versions"]["diffusers"] and cases["nvidia-smi"]["clocks.max.sm"] == "1 unit"
    assert cases["fused"]["ok"]
    assert "-DLESA_CUDA=0" in (tmp_path / "work" / "site" / "lesa_kernels" / "_C.so").read_text()
    assert "3 of 3 parts passed" in done.stdout


@pytest.mark.slow
def test_make_gpu_skips_by_name_what_is_not_there(machine, tmp_path):
    parts = ("machine", "bench-overhead", "bench-step", "end-to-end", "memcheck", "tests-training")
    done = make("gpu", "--device", "cpu", "--out", tmp_path / "out", "--work", tmp_path / "work", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("all-*.jsonl")
    reasons = {line["part"]: line.get("reason") for line in lines_of(file) if line["kind"] == "part"}
    assert reasons == {
        "machine": None,
        **dict.fromkeys(parts[1:], "diffusers is not installed"),
        "memcheck": "compute-sanitizer is not on PATH",
    }


@pytest.mark.parametrize("smi", [None, "exit 9", "echo 'NVIDIA Fake, [N/A]'", "echo 'NVIDIA-SMI has failed'"])
def test_torch_is_asked_where_nvidia_smi_does_not_work(smi, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, content in {"nvidia-smi": smi, "python": "echo 'NVIDIA H200, 9.0'"}.items():
        if content is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert gpu_day.first_gpu() == ("NVIDIA H200", "9.0")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        gpu_day.main(["quick"])


def test_a_part_that_does_not_exist_is_an_error(machine, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_day.main(["quick", "tests", "flus", "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    assert "no part flus; there are machine, build" in capsys.readouterr().err


def test_quick_fits_into_its_budget():
    parts = gpu_day.quick_parts(Path("lines"), Path("work"), "9.0", "cuda")
    assert sum(part.expected for part in parts if not part.beside) <= gpu_day.QUICK_SECONDS == 240
    assert all(part.expected < part.limit < gpu_day.QUICK_SECONDS for part in parts)
    names = [part.name for part in gpu_day.all_parts(Path("lines"), Path("work"), "9.0", "cuda")]
    assert set(names) > {part.name for part in parts} and len(set(names)) == len(names)
    last_benchmark = max(i for i, name in enumerate(names) if name.startswith("bench"))
    assert last_benchmark < names.index("end-to-end") < names.index("tests") < names.index("memcheck")
    build = next(part for part in parts if part.name == "build")
    assert build.environment == {"LESA_CUDA": "1", "LESA_CUDA_ARCHS": "90-real"}
