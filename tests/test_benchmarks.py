"""The benchmarks run and say what they should: one cheap case of every suite, and the end-to-end script."""

import importlib
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lesa.demo import digits
from lesa_kernels import OutputHead, PredictorConfig, work
from lesa_kernels.extension import extension
from lesa_kernels.feature_ring import op

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
STUDIES = BENCHMARKS / "studies"

CASES = {
    "bench_kan.py::test_forward[kan-256-lesa]": {"floor", "ratio_to_floor", "bytes", "flops"},
    "bench_predictor.py::test_predict[flux-1024px-quarter-newton-rank0-lesa]": {"floor", "ratio_to_floor", "bytes"},
    "bench_predictor.py::test_dense_concatenated[digits-64]": {"floor", "ratio_to_floor", "bytes", "flops"},
    "bench_predictor.py::test_velocity[digits-64-0-fused]": {"floor", "ratio_to_floor", "bytes", "flops"},
    "bench_predictor.py::test_polynomial[digits-64]": {"floor", "ratio_to_floor", "bytes"},
    "bench_ring.py::test_push[digits-64-torch-kept]": {"floor", "ratio_to_floor", "bytes"},
    "bench_ring.py::test_push[digits-64-extension-to-float8]": {"floor", "ratio_to_floor", "bytes"},
    "bench_ring.py::test_copy[digits-64-to-float8]": {"floor", "ratio_to_floor", "bytes"},
    "bench_ring.py::test_gather[digits-64-extension-float8]": {"floor", "ratio_to_floor", "bytes"},
    "bench_ring.py::test_clone[digits-64-float8]": {"floor", "ratio_to_floor", "bytes"},
    "bench_step.py::test_computed_step[flux-13M]": {"floor", "ratio_to_floor", "flops"},
    "bench_step.py::test_predicted_step[flux-13M-0]": {"floor", "ratio_to_floor", "over_computed_step"},
}
HOST_TIMES = ("bench_overhead.py::test_predicted_step[6-blocks-0]",)
LAUNCHES = ("bench_ring.py::test_push_launch[extension-float]", "bench_ring.py::test_copy_launch")


def run(folder, *arguments):
    # In another folder, so that not the checkout but the installed package is imported.
    command = [sys.executable, *map(str, arguments)]
    # Benchmarks refuse to run in a worker of pytest-xdist, and this process may be one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def load(file):
    return runpy.run_path(str(BENCHMARKS / file))  # as a str: `inspect`, which torch asks when it registers, needs one


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """What the benchmarks printed and the JSON that they wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    nodes = [f"{BENCHMARKS}/{case}" for case in (*CASES, *LAUNCHES, *HOST_TIMES)]
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "--device", "cpu", "--benchmark-only"]
    few = ["--benchmark-max-time", "0.01", "--benchmark-min-rounds", "5", "--benchmark-json", "out.json"]
    printed = run(folder, "-m", "pytest", "-p", "no:cacheprovider", *options, *few, *nodes)
    return printed, json.loads((folder / "out.json").read_text())


def test_every_suite_has_a_case_here():
    tested = {case.partition("::")[0] for case in (*CASES, *HOST_TIMES)}
    assert {path.name for path in BENCHMARKS.glob("bench_*.py")} == tested


@pytest.mark.slow
def test_each_benchmark_says_its_floor(suites):
    printed, report = suites
    measured = {Path(b["fullname"]).name: b for b in report["benchmarks"]}
    assert set(measured) == {*CASES, *LAUNCHES, *HOST_TIMES}
    for case, fields in CASES.items():
        info = measured[case]["extra_info"]
        assert fields <= set(info), case
        assert info["floor_s"] > 0 and info["ratio_to_floor"] == pytest.approx(info["median_s"] / info["floor_s"])
        assert info["p20_s"] <= info["median_s"] <= info["p80_s"]
        assert measured[case]["group"]
    table = printed.partition("time over floor")[2]
    assert all(case.partition("::")[2] in table for case in CASES) and "of a computed step" in table


@pytest.mark.slow
def test_tables_fit_into_a_terminal(suites):
    printed, _ = suites
    tables = [line for line in printed.splitlines() if line.startswith(("test_", "Name (time", "-----", "benchmark "))]
    assert len(tables) > 3 * len(CASES) and max(map(len, tables)) <= 120


@pytest.mark.slow
def test_a_launch_says_what_one_call_takes(suites):
    printed, report = suites
    table = printed.partition("time of the host for a call")[2]
    for case in LAUNCHES:
        (measured,) = [b for b in report["benchmarks"] if b["fullname"].endswith(case)]
        info = measured["extra_info"]
        assert info["call_median_s"] == pytest.approx(measured["stats"]["median"] / info["calls"])
        assert 0 < info["call_p20_s"] <= info["call_median_s"] <= info["call_p80_s"] < 1e-3
        assert case.partition("::")[2] in table and "ratio_to_floor" not in info


@pytest.mark.slow
def test_a_predicted_step_says_what_the_host_takes(suites):
    printed, report = suites
    table = printed.partition("without the model's own head modules")[2]
    for case in HOST_TIMES:
        (measured,) = [b for b in report["benchmarks"] if b["fullname"].endswith(case)]
        info = measured["extra_info"]
        assert info["host_median_s"] == pytest.approx(measured["stats"]["median"] - info["part_s"])
        assert 0 < info["host_p20_s"] <= info["host_median_s"] <= info["host_p80_s"] and info["part_s"] > 0
        assert case.partition("::")[2] in table and "ratio_to_floor" not in info


def test_work_of_the_ring_counts_scales():
    half, float8 = torch.bfloat16, torch.float8_e4m3fn
    assert work.ring_push(2, 3, 5, half) == {"bytes": 2 * 3 * 5 * 4, "flops": 0}
    assert work.ring_push(2, 3, 5, half, float8) == {"bytes": 2 * 3 * (5 * 2 + 5 + 4), "flops": 0}
    assert work.ring_gather(2, 3, 5, half) == {"bytes": 2 * 3 * 5 * 4, "flops": 0}
    assert work.ring_gather(2, 3, 5, float8) == {"bytes": 2 * 3 * (5 + 4 + 5 * 4), "flops": 0}


@pytest.mark.slow
def test_a_predicted_step_costs_less_than_a_computed_one(suites):
    (step,) = [b for b in suites[1]["benchmarks"] if "bench_step.py::test_predicted_step" in b["fullname"]]
    assert 0 < step["extra_info"]["over_computed_step"] < 0.5


@pytest.mark.slow
def test_the_record_says_what_it_was_measured_on(suites):
    info = suites[1]["machine_info"]
    assert info["device"] == "cpu" and info["threads"] >= 1
    assert {"torch", "triton", "torch_cuda"} <= set(info["environment"])
    assert "node" not in info
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert suites[1]["commit_info"]["id"] == head.stdout.strip()


@pytest.mark.slow
def test_end_to_end_runs_and_reports(tmp_path):
    out = tmp_path / "results" / "end_to_end.json"
    printed = run(tmp_path, BENCHMARKS / "end_to_end.py", "--quick", "--repeats", "1", "--device", "cpu", "--out", out)
    report = json.loads(out.read_text())
    assert report["model"]["parameters"] > 1e5 and report["model"]["image_tokens"] == 64
    computed = {r["name"]: r["computed_steps"] for r in report["runs"]}
    assert computed == {"full": 20, "newton-4": 4, "taylorseer-lite-order1-interval7": 6}  # 0, 1, 2, 4, 11, 18
    full, *others = report["runs"]
    for each in others:
        assert each["num_inference_steps"] == 20 and len(each["seconds"]) == 1
        assert each["step_speedup"] == 20 / each["computed_steps"]
        speedup = full["seconds"][0] / each["seconds"][0]
        assert each["time_speedup"]["median"] == pytest.approx(speedup)
        assert each["time_over_step_speedup"]["max"] == pytest.approx(speedup / each["step_speedup"])
        assert each["name"] in printed


@pytest.mark.slow
def test_ablation_trains_each_variant_once(tmp_path, capsys):
    out = tmp_path / "out"
    sizes = {"samples": 2, "steps": 12, "test-samples": 2, "epochs": 3, "tokens": 8, "out": out}
    arguments = [str(part) for name, size in sizes.items() for part in (f"--{name}", size)]
    printed = run(tmp_path, STUDIES / "ablation.py", *arguments, "--mixer", "newton")
    load("studies/ablation.py")["main"](arguments)  # in this process, which has imported all already
    printed += capsys.readouterr().out
    lines = (out / "digits.jsonl").read_text().splitlines()
    report = json.loads((out / "ablation-digits.json").read_text())
    results = report["predictors"]
    assert sorted(map(json.loads, lines), key=str) == sorted(results, key=str) and len(results) == 8
    assert report["trajectories"] == report["test_samples"] == 2 and report["num_inference_steps"] == 12
    for kan, mlp in zip(results[::2], results[1::2]):
        assert (kan["units"], mlp["units"]) == ("KAN", "MLP") and kan["stages"] == mlp["stages"]
        assert kan["computed_steps"] == mlp["computed_steps"] == (9 if kan["mixer"] == "newton" else 4)
        splines = kan["stages"] * {"newton": 64, "dense": 256}[kan["mixer"]] * 11  # eight intervals, order three
        assert kan["parameters"] - mlp["parameters"] == splines
        assert kan["latent_psnr"] != mlp["latent_psnr"] and min(kan["image_psnr"], mlp["image_psnr"]) > 10
    assert printed.count("| newton | 0.003 | 3 | MLP | 126 k |") == 2


@pytest.mark.slow
def test_the_study_of_amounts_writes_each_line_once(tmp_path, monkeypatch, capsys):
    main = load("studies/training_amounts.py")["main"]
    study = main.__globals__
    monkeypatch.setitem(study, "chains", lambda: [study["Chain"]("digits", 2, 2, 1, most_rounds=1, schedule="bundled")])
    monkeypatch.setitem(study, "TEST_BATCHES", 1)
    monkeypatch.setitem(study, "TEST_BATCH", 2)
    arguments = ["--work", str(tmp_path / "work"), "--table", str(tmp_path / "table.csv")]
    main(arguments)
    first, before, after = (tmp_path / "table.csv").read_text().splitlines()
    assert first.startswith("model,samples,training_steps,refining_steps,tokens,schedule,rounds,computed,psnr,")
    assert before.startswith("digits,2,2,1,16,bundled,0,0 2 7 13 19 26 34 41 47,")
    assert after.startswith("digits,2,2,1,16,bundled,1,")
    main(arguments)
    assert (tmp_path / "table.csv").read_text().splitlines() == [first, before, after]
    main([*arguments, "--plot", str(tmp_path / "lead.png")])
    assert (tmp_path / "lead.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("| digits | bundled | 2 | 16 | 2 | 1 |") == 1


@pytest.mark.slow
def test_error_control_is_drawn_beside_fixed_steps(tmp_path):
    out, predictor = tmp_path / "out", digits.WEIGHTS / "newton-9"
    fewest = ["--tolerances", "1.0", "--stretches", "1.0", "--samples", "1", "--out", out]
    printed = run(tmp_path, STUDIES / "error_control.py", "--controlled", predictor, "--fixed", *fewest)
    assert (out / "error-control.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "error-control.json").read_text())
    assert " 9.00 steps (9 to 9)" in printed and "controlled" in printed


def test_ablation_has_plain_units_in_the_place_of_splines():
    mlp = load("studies/ablation.py")["MLPPredictor"](PredictorConfig(2, mixer="dense", history_length=2, hidden=3))
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    ring = mlp.make_ring(1, 4)
    older, newer = torch.randn(2, 1, 4, 2)
    ring.push(older, 1.0)
    ring.push(newer, 0.9)
    units = torch.nn.functional.silu(mlp.in_weight[1] @ torch.tensor([-1.5, -2.0]) + mlp.in_bias[1])
    mixed = newer @ mlp.mix_weight[2].T + older @ mlp.mix_weight[3].T + mlp.mix_bias[1]
    expected = newer + (mlp.out_weight[1] @ units + mlp.out_bias[1]) * mixed
    assert torch.allclose(mlp(ring, 0.6), expected, atol=1e-4)
    head = OutputHead(torch.eye(2), None, torch.zeros(1, 2), torch.zeros(1, 2))
    normed = torch.nn.functional.layer_norm(expected, (2,), eps=1e-6)
    assert torch.allclose(mlp.predict_velocity(ring, 0.6, head), normed, atol=1e-3)


def test_end_to_end_has_the_size_it_says():
    model = load("shapes.py")["FLUX_100M"]
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**model.transformer_config())
    assert 95e6 < sum(p.numel() for p in transformer.parameters()) < 105e6
    assert model.image_tokens == 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "calls, dtype", [("layers", torch.float32), ("forecasts", torch.bfloat16), ("forecast_gradients", torch.float32)]
)
def test_sanitizer_calls_the_kernels(calls, dtype, monkeypatch):
    """In the interpreter here; on a GPU `make gpu` runs it."""
    pytest.importorskip("triton")
    kind = type(importlib.import_module("lesa_kernels.predictor.kernels.newton")._newton_predict_fwd_kernel)
    launch, launches = kind.__getitem__, []
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: launches.append(kernel) or launch(kernel, grid))
    load("sanitize.py")[calls](dtype, "cuda" if torch.cuda.is_available() else "cpu")
    assert len(launches) > 3


def test_sanitizer_calls_the_ring_and_compares_it(monkeypatch):
    sanitize = load("sanitize.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled, pushed, gathered = extension(), set(), set()

    class Spy:
        @staticmethod
        def ring_push(*arguments):
            pushed.add((arguments[8], arguments[1]))
            compiled.ring_push(*arguments)

        @staticmethod
        def ring_gather(*arguments):
            gathered.add(arguments[1])
            compiled.ring_gather(*arguments)

    monkeypatch.setattr(op, "extension", lambda: Spy)
    for stored in sanitize["STORED"]:
        sanitize["ring"](stored, device)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in sanitize["STORED"]]
    assert pushed == set(itertools.product(dtypes[:3], dtypes)) and gathered == set(dtypes)
    assert (sanitize["ring"], sanitize["STORED"]) in sanitize["RUNS"]
    Spy.ring_push = staticmethod(lambda *arguments: None)
    with pytest.raises(RuntimeError, match="storage after pushes of .* is not that of plain torch"):
        sanitize["ring"](torch.bfloat16, device)


THEIRS = "========= at void at::native::vectorized_elementwise_kernel<(int)4, FillFunctor<float>>(int, T2)+0x150"
OURS = {
    "csrc": "========= at void lesa::<unnamed>::ring_push_kernel<lesa::Float32>(lesa::RingPush, lesa::Work)+0x4d0",
    "csrc, older": "========= at 0x150 in void lesa::_GLOBAL__N__5c_cu::ring_gather_kernel<lesa::Float16>(lesa::Work)",
    "csrc, no template": "========= at lesa::<unnamed>::ring_gather_float8_kernel(lesa::RingGather, lesa::Work)+0x10",
    "Triton": "========= at _newton_predict_fwd_kernel+0x1a0 in newton.py:120",
}


@pytest.mark.parametrize("report", [None, *OURS])
def test_sanitizer_tells_our_reports_from_those_of_torch(report, tmp_path, capsys):
    reports = [THEIRS] if report is None else [THEIRS, OURS[report]]
    lines = [line for at in reports for line in ("========= Uninitialized __global__ memory read of size 4 bytes", at)]
    log = tmp_path / "initcheck.txt"
    lines.append(f"========= ERROR SUMMARY: {len(reports)} error{'s' * (len(reports) > 1)}")
    log.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as exited:
        load("sanitize.py")["main"](["--judge", str(log)])
    assert exited.value.code == len(reports) - 1
    first, *named = capsys.readouterr().out.splitlines()
    assert first == f"{len(reports) - 1} of {len(reports)} reports are of kernels of lesa_kernels"
    assert named == reports[1:]


TOOLS = {  # what the tool does, by whether it is asked to check this package; the exit status that follows
    "refuses the GPU": ("echo 'Device not supported'; exit 1", 77),
    "says so and goes on": ("echo '========= Error: Device not supported'", 77),
    "finds nothing": ('test -z "$log" || echo "========= ERROR SUMMARY: 0 errors" > "$log"', 0),
    "finds something": ('test -z "$log" && exit 0; echo "========= Invalid write" > "$log"; exit 1', 1),
}


@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
@pytest.mark.parametrize("case", TOOLS)
def test_sanitizer_tells_a_tool_that_is_refused_from_one_that_finds_errors(case, tool, tmp_path, monkeypatch, capsys):
    does, status = TOOLS[case]
    program, log = tmp_path / "compute-sanitizer", tmp_path / "log.txt"
    find_log = 'while [ $# -gt 0 ]; do test "$1" = --log-file && log=$2; shift; done'
    program.write_text(f"#!/bin/sh\n{find_log}\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SystemExit) as exited:
        load("sanitize.py")["main"](["--tool", tool, "--log", str(log)])
    assert exited.value.code == status
    assert (f"--tool {tool} can't check" in capsys.readouterr().out) == (status == 77)


def test_sanitizer_takes_no_log_that_breaks_off(tmp_path):
    log = tmp_path / "initcheck.txt"
    log.write_text("========= COMPUTE-SANITIZER\n========= Error: process didn't terminate successfully\n")
    with pytest.raises(SystemExit, match="no summary"):
        load("sanitize.py")["judge"](log.read_text())
