"""Every kernel compiles for the architectures it is made for, without a GPU; its resources are as they should be."""

import json
import os
import subprocess
import sys

import pytest
import torch

import ahead_of_time

pytest.importorskip("triton", reason="there is nothing to compile with")

CASES = {case.name: case for case in ahead_of_time.CASES}
UNITS = {ahead_of_time.id_of(*unit): unit for unit in ahead_of_time.units()}
WITHOUT_PRODUCTS = ("_sum_kernel", "_newton_coefficients")
TENSOR_CORES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}


@pytest.fixture(scope="module")
def report(tmp_path_factory, triton_cache):
    """Id -> what `compile_unit` returned. Nothing may be taken from an earlier run, so the cache is this one's."""
    folder = tmp_path_factory.mktemp("ahead_of_time")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LESA_TUNED")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment["TRITON_CACHE_DIR"] = str(triton_cache)
    command = [sys.executable, ahead_of_time.__file__, "--out", folder / "report.json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert (folder / "report.json").is_file(), result.stdout + result.stderr
    assert result.returncode == any(unit["error"] for unit in json.loads((folder / "report.json").read_text()))
    return {unit["id"]: unit for unit in json.loads((folder / "report.json").read_text())}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) for name in UNITS])
def unit(request):
    return UNITS[request.param]


@pytest.fixture
def case(unit):
    return CASES[unit[1]]


@pytest.fixture
def found(report, unit):
    row = report[ahead_of_time.id_of(*unit)]
    assert row["error"] is None, row["error"]
    return row


def test_a_part_of_the_kernels_can_be_named():
    kind = "sm_90-newton_velocity-rank32-bfloat16"
    assert ahead_of_time.units(kind) == [UNITS[kind]] == [(90, "newton_velocity-rank32", torch.bfloat16)]


@pytest.mark.slow
def test_everything_was_compiled(report):
    assert set(report) == set(UNITS)


def test_launches_as_many_kernels_as_it_says(unit, case, found):
    assert set(found["launches"]) == {str(size) for size in ahead_of_time.sizes_of(*unit)}
    for size, launched in found["launches"].items():
        assert len(launched) == case.launches if case.launches is not None else launched, size
        if case.launches == 1:  # and it is its own: another one would leave the rest to torch
            name = found["kernels"][launched[0]]["name"]
            assert name.startswith(f"_{case.kernel or case.name.partition('-')[0]}_fwd"), (size, name)


def test_predictors_of_one_size_share_their_kernels(case, found):
    if case.kernels is None:
        pytest.skip("it is one predictor")
    names = sorted(kernel["name"] for kernel in found["kernels"].values())
    assert len(names) == case.kernels, names
    assert all(len(launched) % 10 == 0 for launched in found["launches"].values())


def test_shared_memory_is_within_the_limit(unit, found):
    for kernel in found["kernels"].values():
        assert kernel["shared"] <= ahead_of_time.SHARED_MEMORY_LIMITS[unit[0]], kernel


def test_spills_no_registers(unit, case, found):
    if unit[2] in case.may_spill:
        pytest.skip("it is seldom run in this dtype")
    for kernel in found["kernels"].values():
        assert kernel["stack"] == kernel["local"] == 0, kernel


def test_multiplies_on_tensor_cores(unit, case, found):
    architecture, _, dtype = unit
    if case.products is None:
        pytest.skip("it has no matrix products")
    if dtype == torch.float32 and not case.float32_products:
        pytest.skip("in float32 that is not demanded of it")
    large = case.products == "large"
    wanted = {TENSOR_CORES[architecture]} if large else {*TENSOR_CORES.values()}
    for kernel in found["kernels"].values():
        if not any(name in kernel["name"] for name in WITHOUT_PRODUCTS):
            assert any(kernel["instructions"][name] for name in wanted), kernel


def test_selects_little_in_the_loop_of_its_products(unit, case, found):
    architecture, _, dtype = unit
    if not case.most_selects or dtype.itemsize != 2:
        pytest.skip("it has no selections to speak of")
    for kernel in found["kernels"].values():
        loop = kernel["loop"]
        assert 0 < loop["ISETP"] + loop["SEL"] <= dict(case.most_selects)[architecture], loop


def test_reads_16_bytes_at_a_time(case, found):
    if not case.vectorised:
        pytest.skip("its time is not that of reading memory")
    for kernel in found["kernels"].values():
        counts = kernel["instructions"]
        # Parameters and noise levels are read one by one; features come in tiles of many loads of 16 bytes each.
        assert counts["load_16_bytes"] >= 8 or counts["cp_async_16_bytes"] >= 4 or counts["tma"], kernel


def test_the_script_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exited:
        ahead_of_time.main([])
    assert exited.value.code == 2 and "unset TRITON_INTERPRET" in capsys.readouterr().err
