"""Several processes that record, train, refine and evaluate together, on the CPU."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import several_processes as several
import two_hosts
from interrupted_recordings import files_in
from lesa import cli, processes, record
from lesa.inputs import read_samples, write_inputs
from lesa.pipelines import load_pipeline
from lesa.processes import OthersEndedError, Processes, processes_for
from lesa.training.shards import DamagedError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "many-gpus.md").read_text()
KILLS = 6
TIMES = ("seconds", "denoise_seconds", "speedup", "reference_seconds")
TIME_LIMIT_S = 120
KILLED_IN_A_STEP = """
if os.environ["RANK"] == "1":
    pipe.transformer.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), 9))
"""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


PLACE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def one_of_two(monkeypatch):
    """`one_of_two(rank)` sets what `torchrun` sets, but nobody else is there."""

    def begin(rank, **more):
        values = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), **more}
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    processes._store.cache_clear()
    yield begin
    processes._store.cache_clear()


# Who does what


def test_one_process_does_everything_itself(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    alone = processes_for()
    assert alone == Processes() and alone.is_first and alone.width == 1
    assert alone.share_of("abc") == [*"abc"] and alone.each("abc", str.upper) == [*"ABC"]
    assert alone.by_first(lambda: 3) == alone.in_all(lambda: 3) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_hold_each_item_once_and_the_first_process_has_the_first(count):
    shares = [Processes(rank, count).share_of(range(5)) for rank in range(count)]
    assert sorted(sum(shares, [])) == [*range(5)] and shares[0][0] == 0
    together = [Processes(rank, count, is_divided=False) for rank in range(count)]
    assert all(each.share_of(range(5)) == [*range(5)] and each.width == 1 for each in together)


def test_variables_that_lead_to_nobody_are_refused(one_of_two):
    one_of_two(1)
    with pytest.raises(
        ValueError, match="has RANK and WORLD_SIZE for 2 processes, but no MASTER_ADDR. Start them with"
    ):
        processes_for()


def test_a_model_that_is_spread_is_run_together(monkeypatch):
    """Whichever part of the pipeline it is."""
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    encoder = torch.nn.Linear(2, 2)
    pipe = SimpleNamespace(transformer=torch.nn.Linear(2, 2), text_encoder_2=encoder)
    assert processes_for(pipe).is_divided
    encoder._parallel_config = object()
    assert not processes_for(pipe).is_divided


def test_the_variables_of_slurm_are_not_read(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert processes_for() == Processes()


def test_errors_keep_their_class_on_their_way():
    damaged = DamagedError(Path("a/b"), "is missing")
    travelled = processes._Failure.of(damaged).error()
    assert type(travelled) is DamagedError and str(travelled) == str(damaged)
    assert (travelled.path, travelled.why) == (Path("a/b"), "is missing")
    full = processes._Failure.of(OSError(28, "No space left on device", "x")).error()
    assert (full.errno, full.filename) == (28, "x")

    class OfThisTestError(Exception):
        pass

    other = processes._Failure.of(OfThisTestError("hm")).error()
    assert type(other) is RuntimeError and str(other) == "OfThisTestError: hm"
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff".decode()
    assert "can't decode byte 0xff" in str(processes._Failure.of(caught.value).error())


def test_what_cannot_travel_is_not_taken_for_the_end_of_another_process(monkeypatch):
    class Stays:
        def __reduce__(self):
            raise RuntimeError("cannot be packed")

    monkeypatch.setattr(Processes, "_met", lambda self: pytest.fail("the processes met"))
    for give in (Processes(0, 2)._exchange, lambda thing: Processes(0, 2).by_first(lambda: thing)):
        with pytest.raises(RuntimeError, match="cannot be packed") as caught:
            give(Stays())
        assert not isinstance(caught.value, OthersEndedError)


def test_only_the_first_process_prints(one_of_two, capsys):
    for rank, printed in ((0, 1), (1, 0)):
        one_of_two(rank, **PLACE)
        with pytest.raises(SystemExit):
            cli.main(["--version"])
        assert capsys.readouterr().out.count("lesa ") == printed


def test_a_command_that_is_not_shared_runs_in_the_first_process_alone(one_of_two, capsys, settings_of_the_command):
    for rank, printed in ((1, False), (0, True)):
        one_of_two(rank, **PLACE)
        cli.main(["env"])
        assert ("torch" in capsys.readouterr().out) == printed
    assert "RANK" not in os.environ and processes_for() == Processes()


# Two processes that are copies of one


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """What `several_processes.py` found, by the kind of check, and where its files are."""
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, several.__file__, str(folder), str(KILLS), "1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=10 * TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            facts = json.loads(line)
            found.setdefault(facts["check"], []).append(facts)
    return folder, found


def environment():
    paths = os.pathsep.join([*filter(None, sys.path), str(Path(several.__file__).parent)])
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [*map(without_times, value)] if isinstance(value, list) else value


@pytest.mark.slow
def test_two_processes_make_what_one_makes(checks):
    folder, found = checks
    alone, two = found["everything"]
    (expected,) = alone["said"]
    assert "error" not in expected, expected
    for name in ("recording", "trained", "refined"):
        files = files_in(folder / "of-1" / name)
        assert files and files_in(folder / "of-2" / name) == files
    names = [{path.name for path in (folder / f"of-{count}" / "evaluation" / "runs").iterdir()} for count in (1, 2)]
    assert names[0] == names[1]
    assert len(expected["summary"]["runs"]) == 5 and set(expected["summary"]["searched"]) == {"linear", "mag-cache"}
    for said in two["said"]:
        assert said["weights"] == expected["weights"]
        assert without_times(said["summary"]) == without_times(expected["summary"])
        assert said["warnings"] == []
        assert all(run["seconds"] > 0 for run in said["summary"]["runs"])
    assert two["said"][0]["summary"] == two["said"][1]["summary"], "the same seconds too"


@pytest.mark.slow
def test_an_error_of_one_process_is_the_error_of_all(checks):
    _, found = checks
    for facts in found["failing"]:
        assert {(said["error"], said["message"]) for said in facts["said"]} == {
            ("ValueError", "this process cannot go on")
        }
    for said in found["different"][0]["said"]:
        assert said["message"].startswith(
            "`seed` must be the same in all 2 processes, but got another value in process 1"
        )


@pytest.mark.slow
def test_processes_with_another_model_or_folder_are_refused(checks):
    """They would wait for each other, or mix figures of two models."""
    _, found = checks
    for facts in found["unlike"]:
        name, messages = facts["name"], {said["message"] for said in facts["said"]}
        wanted = f"`{name.split()[0]}` must be the same in all 2 processes"
        if name == "function":
            wanted = "Process 1 calls `lesa.evaluate`, and the first process calls `lesa.record`."
        assert len(messages) == 1 and messages.pop().startswith(wanted), facts
    assert len(found["unlike"]) == 6


@pytest.mark.slow
def test_a_process_that_comes_late_is_waited_for_with_a_warning(checks):
    first, second = checks[1]["late"][0]["said"]
    assert len(first) == 1 and "process 0 waits for the others. All 2 processes must call `lesa.record`" in first[0]
    assert second == []


@pytest.mark.slow
def test_a_process_that_is_killed_loses_nothing_and_mixes_nothing(checks):
    """The next start has one or three processes."""
    killed = checks[1]["kill"]
    assert len(killed) == KILLS
    for trial in killed:
        facts = {name: trial[name] for name in ("victim", "at", "left")}
        assert trial["said"][trial["victim"]] is None, facts
        assert trial["kept"], f"a file that had its name was not whole: {facts}"
        assert trial["same"], f"other bytes than those of one process that was left alone: {facts}"
        assert len({json.dumps(said) for said in trial["again"]}) == 1
        other = trial["said"][1 - trial["victim"]]
        assert other is None or other["error"] == OthersEndedError.__name__, other
        assert trial["at"] == "event" or other is not None, f"it waited for the killed one: {facts}"
    assert {len(trial["again"]) for trial in killed} == {1, 3}
    assert len({trial["again"][0]["kept"] for trial in killed}) > 1, "some after the first sample was written"


# The commands of the page


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands(beginning):
    found = [line for block in blocks("bash") for line in block.splitlines() if line.startswith(beginning)]
    assert found
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the model and the inputs of the page, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("workplace")
    pipe = several.CASE.build()
    pipe.save_pretrained(folder / "MODEL")
    write_inputs(folder / "inputs.safetensors", several.inputs(3))
    return folder


def started(command, folder, **options):
    program, *words = command
    place = Path(sys.executable).with_name(program)
    command = [str(place) if place.exists() else program, *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def test_the_page_has_the_commands_that_are_run():
    lines = sum((block.splitlines() for block in blocks("bash")), [])
    assert len(lines) == 4 and len(commands("torchrun --nnodes")) == 2
    assert len(commands("accelerate launch -m lesa fit")) == len(commands("torchrun --nproc-per-node 8 script.py")) == 1


@pytest.mark.slow
@pytest.mark.skipif("fit" not in cli.COMMANDS, reason="there is no `lesa fit`")
def test_accelerate_fits_in_two_processes(workplace):
    (line,) = commands("accelerate launch")
    words = shlex.split(line)
    here = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]  # `accelerate` would count GPUs
    running = started([*words[:2], *here, *words[2:], "--steps", "12"], workplace)
    output, _ = running.communicate(timeout=TIME_LIMIT_S)
    assert running.returncode == 0, output[-3000:]
    assert (workplace / "predictor" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_hosts_record_into_a_shared_folder(workplace):
    if (why := two_hosts.why_not()) is not None:
        pytest.skip(why)
    lines = [
        line.replace("host-0", two_hosts.ADDRESSES[0])
        .replace("--nproc-per-node 8", "--nproc-per-node 1")
        .replace("/shared", str(workplace))
        for line in commands("torchrun --nnodes")
    ]
    with two_hosts.two_hosts() as hosts:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        words = [[*host, torchrun, *shlex.split(line)[1:], "--steps", "4"] for host, line in zip(hosts, lines)]
        running = [started(each, workplace) for each in words]
        outputs = [each.communicate(timeout=TIME_LIMIT_S)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0], "\n".join(output[-2000:] for output in outputs)
    assert [output.count("Wrote 3 trajectories of 4 steps") for output in outputs] == [1, 0]
    alone, inputs = workplace / "alone", read_samples(workplace / "inputs.safetensors")
    pipe = load_pipeline(workplace / "MODEL")
    record(pipe, [sample.arguments for sample in inputs], alone, 4, progress=False)
    samples = {name: data for name, data in files_in(workplace / "trajectories").items() if name.startswith("sample")}
    assert len(samples) == 3
    assert samples == {name: data for name, data in files_in(alone).items() if name.startswith("sample")}


@pytest.mark.slow
def test_a_script_whose_process_is_killed_ends(workplace, tmp_path):
    """The script of the page. Its last process is killed in the first step of its sample."""
    (script,) = blocks("python")
    before, after = script.split("inputs = ")
    after = after.replace('"inputs.', f'"{workplace}/inputs.')
    (tmp_path / "script.py").write_text(f"{before}{KILLED_IN_A_STEP}inputs = {after}")
    (tmp_path / "MODEL").symlink_to(workplace / "MODEL")
    (line,) = commands("torchrun --nproc-per-node 8")
    running = started(shlex.split(line.replace("8", "2")), tmp_path)
    begun = time.monotonic()
    output, _ = running.communicate(timeout=TIME_LIMIT_S)
    assert running.returncode != 0 and "Signal 9 (SIGKILL)" in output, output[-3000:]
    assert time.monotonic() - begun < TIME_LIMIT_S / 2
    assert not [*(tmp_path / "trajectories").glob("sample-*.safetensors.tmp")]
