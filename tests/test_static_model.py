"""The model that predicts times on a GPU: its parts, its committed figures, and that no kernel gets slower by it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_model import machine_code
from gpu_model.arrivals import Meeting, simulate
from gpu_model.devices import PRESETS
from gpu_model.machine_code import NO_BARRIER, Instruction, MachineCode
from gpu_model.multiprocessor import DoesNotFit, Scheduler, Traffic
from gpu_model.page import BEFORE, page
from gpu_model.prediction import Launch, loaded_latency, predict, resident_programs

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "predicted" / "h200.json"
COMMITTED = json.loads(FIGURES.read_text())
WORSE = 1.10  # a ratio to the floor may grow by less than this factor
H200 = PRESETS["H200"]
# The GPU that gpu-stream was measured on.
GH200 = replace(H200, bandwidth=4.02e12, clock=1.98e9)


def instruction(name, predicate=None, operands="", stall=1, sets=NO_BARRIER, waits=()):
    name, *forms = name.split(".")
    return Instruction(name, tuple(forms), predicate, operands, stall, sets, NO_BARRIER, waits)


def loads(each):
    return each.name in ("LDG", "STG")


def streaming(warps, loads_at_a_time):
    """A kernel that loops over loads of 16 bytes, as many stores being a quarter of them."""
    body = [instruction("LDG.E.128", sets=0) for _ in range(loads_at_a_time)]
    body += [instruction("STG.E.128", waits=(0,)) for _ in range(loads_at_a_time // 4)]
    code = [instruction("MOV"), *body, instruction("BRA", "P0", stall=5), instruction("EXIT")]
    return MachineCode("stream", code, {len(code) - 2: 1}, 32, 0, warps)


def launch_of(code, rounds, programs, **options):
    (loop,) = code.loops
    read = programs * rounds * code.warps * 512 * sum(each.name == "LDG" for each in code.instructions)
    return Launch(code, programs, 0, rounds, read, read // 4, {}, loads, **options)


def test_a_stream_takes_its_bytes_over_the_bandwidth_and_a_start():
    launch = launch_of(streaming(warps=8, loads_at_a_time=8), rounds=200, programs=264)
    found = predict(H200, launch)
    memory = (launch.read + launch.written) / H200.reached_bandwidth(1 / 5)
    assert found.in_flight > 60 << 10
    assert memory < found.seconds < H200.launch_seconds + H200.seconds(H200.memory_latency) + 1.05 * memory


def test_a_stream_with_little_on_its_way_is_slower():
    """By Little's law: one load of each of four warps at a time is 2 KB, and at most a tenth of what is needed."""
    found = predict(H200, launch_of(streaming(warps=4, loads_at_a_time=4), rounds=200, programs=132))
    assert found.in_flight < 9 << 10
    assert found.seconds > 1.5 * found.memory


@pytest.mark.parametrize("threads, measured", [(512, 935), (1024, 1715), (2048, 2775)])
def test_reads_reach_what_gpu_stream_measured(threads, measured):
    """Blocks that read 8 bytes for each thread and end, two of them at a time on each multiprocessor, in GB/s."""
    warps, waves = threads // 64, 200
    code = [instruction("LDG.E.64", sets=0), instruction("FADD", waits=(0,)), instruction("EXIT")]
    kernel = MachineCode("read", code, {}, 16, 113 << 10, warps)
    programs = 2 * waves * GH200.multiprocessors
    launch = Launch(kernel, programs, None, 1, programs * warps * 256, 0, {}, loads)
    found = predict(GH200, launch)
    assert found.resident == 2
    assert launch.read / found.seconds / 1e9 == pytest.approx(measured, rel=0.1)


MEETING = Meeting(
    groups=5,
    members=24,
    tiles=52,
    start=5e-6,
    tile_bytes=20e3,
    bandwidth=4.4e12,
    tile_seconds=1.8e-6,
    busy_seconds=1.2e-6,
    finish_seconds=12e-6,
)


def test_one_walking_order_and_many_tiles_make_a_convoy():
    found = simulate(MEETING)
    assert found.most_finished == MEETING.tiles
    assert found.seconds > MEETING.tiles * (MEETING.finish_seconds + MEETING.busy_seconds) * 0.95


def test_there_is_no_convoy_where_each_program_arrives_once():
    once = replace(MEETING, groups=33, members=4, tiles=1, tile_bytes=1e6, tile_seconds=20e-6)
    found = simulate(once)
    assert found.most_finished == 1
    bound = max(once.groups * once.members * once.tile_bytes / once.bandwidth, once.tile_seconds)
    assert found.seconds < 1.1 * (once.start + bound + once.finish_seconds)


def test_programs_that_begin_at_different_tiles_share_the_work():
    found, convoy = simulate(replace(MEETING, rotated=True)), simulate(MEETING)
    assert found.most_finished <= 6  # a fair share is 2.2
    assert found.seconds < convoy.seconds / 4


def test_programs_share_the_bandwidth():
    """None finishes, so the time is that of all bytes."""
    meeting = replace(MEETING, finish_seconds=0.0, tile_seconds=0.0, tile_bytes=200e3)
    moved = meeting.groups * meeting.members * meeting.tiles * meeting.tile_bytes
    assert simulate(meeting).seconds == pytest.approx(meeting.start + moved / meeting.bandwidth, rel=0.1)


@pytest.mark.parametrize(
    "changed, expected",
    [({}, 2), ({"registers": 64}, 4), ({"shared": 200 << 10}, 1), ({"warps": 16}, 1), ({"shared": 70 << 10}, 2)],
)
def test_resident_programs(changed, expected):
    code = replace(MachineCode("kernel", [], {}, registers=128, shared=48 << 10, warps=8), **changed)
    assert resident_programs(H200, code) == expected


def test_a_launch_that_does_not_fit_is_refused_by_name():
    code = MachineCode("kernel", [instruction("EXIT")], {}, 32, shared=237_568, warps=8)
    with pytest.raises(DoesNotFit, match="kernel needs 237568 bytes of shared memory, and H200 SXM allows 232448"):
        predict(H200, Launch(code, 132, None, 1, 1 << 20, 0, {}, loads))


LISTING = """\
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;              /* 0x0000000000007919 */
                                                                   /* 0x000e220000002100 */
.L_x_1:
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;     /* 0x0000000402047981 */
                                                                   /* 0x001ea8000c1e1d00 */
        /*0020*/               @P0 BRA `(.L_x_1) ;                 /* 0xfffffffc00f00947 */
                                                                   /* 0x004fea000383ffff */
        /*0030*/                   ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR8][R6.64], R5 ;   /* 0x0 */
                                                                   /* 0x000fc800000001ff */
        /*0040*/               @P2 BRA `(.L_x_2) ;                 /* 0x0000000000000947 */
                                                                   /* 0x000fea0003800000 */
        /*0050*/                   FADD R1, R1, R2 ;               /* 0x0000000000000947 */
                                                                   /* 0x000fea0003800000 */
.L_x_2:
        /*0060*/                   EXIT ;                          /* 0x000000000000794d */
                                                                   /* 0x000fea0003800000 */
.L_x_3:
        /*0070*/                   BRA `(.L_x_3) ;                 /* 0xfffffffc00fc7947 */
                                                                   /* 0x000fc0000383ffff */
        /*0080*/                   NOP;                            /* 0x0000000000007918 */
                                                                   /* 0x000fc00000000000 */
"""


def test_reads_what_was_compiled():
    code = MachineCode("kernel", *machine_code.parse(LISTING), registers=16, shared=0, warps=4)
    names = ["S2R", "LDG", "BRA", "ATOMG", "BRA", "FADD", "EXIT", "BRA"]
    assert [each.name for each in code.instructions] == names
    load = code.instructions[1]
    assert (load.forms, load.predicate, load.lane_bytes) == (("E", "128"), "!P1", 16)
    assert (load.stall, load.sets, load.waits) == (4, 2, (0,))
    assert [(loop.start, loop.end) for loop in code.loops] == [(1, 2)]
    assert code.arrival == 3 and code.finish == (5, 6)


def test_a_route_goes_round_loops_and_finishes_only_if_it_has_to():
    code = MachineCode("kernel", *machine_code.parse(LISTING), registers=16, shared=0, warps=4)
    assert code.route({0: 3}, finishes=True) == [0, 1, 2, 1, 2, 1, 2, 3, 4, 5, 6]
    assert code.route({0: 1}, finishes=False) == [0, 1, 2, 3, 4, 6]


def test_a_route_goes_round_loops_in_loops():
    code = [instruction(name) for name in ("MOV", "FADD", "LDG.E.128")]
    code += [instruction("BRA", "P0"), instruction("BRA", "P1"), instruction("EXIT")]
    kernel = MachineCode("nested", code, {3: 2, 4: 1}, 16, 0, 4)
    inner = [2, 3] * 3
    assert kernel.route({0: 2, 1: 3}, finishes=False) == [0, 1, *inner, 4, 1, *inner, 4, 5]


def test_a_route_leaves_out_what_only_the_first_round_does():
    code = [instruction("MOV"), instruction("BRA", "P0"), instruction("SHFL"), instruction("BRA", "P1")]
    kernel = MachineCode("first", [*code, instruction("EXIT")], {1: 3, 3: 1}, 16, 0, 4)
    found = kernel.route({0: 3}, finishes=False, leaves_out=lambda begin, part, times: times > 0)
    assert found == [0, 1, 2, 3, 1, 3, 1, 3, 4]


@pytest.mark.parametrize("use, measured", [(0.24, 1.04), (0.44, 1.19), (0.71, 1.63), (0.94, 4.3)])
def test_the_latency_rises_with_use_as_gpu_stream_measured(use, measured):
    assert loaded_latency(use) == pytest.approx(measured, rel=0.06)


def test_later_programs_find_in_the_cache_what_all_of_them_read():
    code = [instruction("LDG.E.128", sets=0), instruction("FADD", waits=(0,)), instruction("EXIT")]
    traffic = Traffic(lambda position: False, first=len(code))
    kernel = MachineCode("parameters", code, {}, 16, 0, 4)
    first, second = (
        Scheduler(H200, kernel, traffic).run([0, 1, 2], resident=1, programs=programs, warps=1).cycles
        for programs in (1, 2)
    )
    assert first == pytest.approx(H200.memory_latency, rel=0.15)
    between = H200.cycles(H200.replace_seconds)
    assert second - first == pytest.approx(between + H200.l2_latency, rel=0.15)


def test_what_is_under_way_comes_while_a_program_stops():
    """A stop that is shorter than the data on its way takes, before the loop, costs no time."""
    copies = [instruction("LDGSTS.E.128") for _ in range(24)] + [instruction("LDGDEPBAR")]
    loop = [instruction("DEPBAR.LE", operands="SB0, 0x2"), *copies, instruction("BRA", "P0", stall=5)]
    launches = []
    for stop in (1, 12):
        begin = [*copies, *copies, *[instruction("MOV", stall=15)] * (15 * stop)]
        code = [*begin, *loop, instruction("EXIT")]
        kernel = MachineCode("stop", code, {len(code) - 2: len(begin)}, 32, 0, 8)
        read = 264 * 40 * 8 * 512 * 24
        launches.append(Launch(kernel, 264, 0, 40, read, 0, {}, lambda each: each.name == "LDGSTS"))
    short, long = (predict(H200, launch).seconds for launch in launches)
    assert long < short + 0.2e-6


def test_the_committed_page_is_that_of_the_committed_figures():
    assert (ROOT / "docs" / "roofline.md").read_text() == page("H200", COMMITTED, "roofline.png")


def test_the_page_says_that_nothing_was_measured():
    assert "**No time on this page is a measurement.**" in page("H100", COMMITTED, "roofline.png")
    # Four anchors and a forecast of 4096 x 3072 bfloat16, and 3 x 3072 x 65 float32: 128.2 MB over 3.35 TB/s.
    assert "| flux-1024px | newton predict, rank 0 | 128.2 | 0.10 | 0.8 | 38.3 | bandwidth |" in page(
        "H100", COMMITTED, "roofline.png"
    )


def test_the_script_refuses_the_interpreter(monkeypatch, capsys):
    import static_model

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exited:
        static_model.main([])
    assert exited.value.code == 2 and "unset TRITON_INTERPRET" in capsys.readouterr().err


LAUNCHES = [each for shapes in COMMITTED.values() for found in shapes.values() for each in found.get("launches", ())]


def test_no_program_finishes_more_than_twice_its_share():
    meeting = [each for each in LAUNCHES if "most_finished" in each]
    assert meeting and all(each["most_finished"] <= 2 * each["fair"] for each in meeting)
    before = [found["launches"][0] for found in BEFORE["newton predict, rank 32"].values()]
    assert all(each["most_finished"] > 20 * each["fair"] for each in before)


def test_scratch_memory_fits_into_32_mib():
    assert max(each["scratch_mb"] for each in LAUNCHES) * 1e6 <= 32 << 20


@pytest.fixture(scope="module")
def figures(tmp_path_factory, triton_cache):
    """What the model says of the code as it is. Most of its kernels are those of `test_ahead_of_time.py`."""
    pytest.importorskip("triton", reason="there is nothing to compile with")
    file = tmp_path_factory.mktemp("static_model") / "figures.json"
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LESA_TUNED")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment["TRITON_CACHE_DIR"] = str(triton_cache)
    command = [sys.executable, ROOT / "benchmarks" / "static_model.py", "--json", file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_same_operations_are_predicted(figures):
    assert {name: set(shapes) for name, shapes in figures.items()} == {
        name: set(shapes) for name, shapes in COMMITTED.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [(name, shape) for name, shapes in COMMITTED.items() for shape in shapes])
def test_no_kernel_gets_slower_by_the_model(figures, name, shape):
    found, committed = figures[name][shape], COMMITTED[name][shape]
    if "nvcc" in found.get("refused", ""):
        pytest.skip(f"{name}: {found['refused']}")
    assert found["floor_us"] == committed["floor_us"]
    assert found["ratio"] < WORSE * committed["ratio"], (found, committed)
