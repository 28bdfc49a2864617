"""Builds of the extension on machines with and without a CUDA toolkit."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

for module in ("pybind11", "setuptools"):
    pytest.importorskip(module, reason=f"the build needs {module}")
SCRIPTS = sysconfig.get_path("scripts")
for tool in ("cmake", "ninja", "c++"):
    if shutil.which(tool, path=os.pathsep.join([SCRIPTS, os.environ["PATH"]])) is None:
        pytest.skip(f"the build needs {tool}", allow_module_level=True)

CUDA_VARIABLES = ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "CUDA_ROOT", "CUDAToolkit_ROOT")


@pytest.fixture(scope="module")
def path_without_nvcc(tmp_path_factory):
    """PATH in which every folder that holds nvcc is replaced by links to all else that is in it."""
    folders = []
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        if (folder / "nvcc").exists():
            links = tmp_path_factory.mktemp("bin")
            for program in folder.iterdir():
                if program.name != "nvcc":
                    (links / program.name).symlink_to(program)
            folder = links
        folders.append(str(folder))
    return os.pathsep.join(folders)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What the build reads, in a folder with a space in its name."""
    copy = tmp_path_factory.mktemp("with space") / "lesa kernels"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "csrc"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    for package in ("lesa_kernels", "python/lesa"):
        (copy / package).mkdir(parents=True)
        shutil.copy(ROOT / package / "__init__.py", copy / package)
    return copy


def build(checkout, path, out, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in CUDA_VARIABLES}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(out), "--build-temp", str(out / "temp")],
        cwd=checkout,
        env=environment | {"PATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def build_info(out):
    (library,) = out.glob(f"lesa_kernels/_C*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    program = (
        "import importlib.util, json\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(library)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(json.dumps(module.build_info()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(result.stdout)


def test_without_nvcc_the_cpu_part_is_built_and_says_so(checkout, path_without_nvcc, tmp_path):
    result = build(checkout, path_without_nvcc, tmp_path, LESA_CUDA="auto", MAX_JOBS="2")
    assert result.returncode == 0, result.stdout
    assert "LESA_CUDA=auto: no working nvcc was found, so lesa_kernels._C is built for the CPU only." in result.stdout
    info = build_info(tmp_path)
    assert info["cuda_version"] is None and info["cuda_archs"] is None
    assert info["version"] in (ROOT / "lesa_kernels" / "__init__.py").read_text()


@pytest.mark.parametrize("nvcc", ["missing", "broken"])
def test_forced_cuda_without_a_working_nvcc_is_an_error_with_the_remedy(checkout, path_without_nvcc, tmp_path, nvcc):
    path = path_without_nvcc
    if nvcc == "broken":
        program = tmp_path / "bin" / "nvcc"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
        path = os.pathsep.join([str(program.parent), path])
    result = build(checkout, path, tmp_path, LESA_CUDA="1")
    assert result.returncode != 0
    said = " ".join(result.stdout.split())
    assert "LESA_CUDA=1 asks for a build with CUDA, but CMake found no working nvcc." in said
    assert "Install the CUDA toolkit and put nvcc on PATH" in said and "LESA_CUDA=0" in said


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LESA_CUDA": "yes"}, "`LESA_CUDA` must be one of auto, 0, 1, but got 'yes'. Unset it"),
        ({"LESA_CUDA": "0", "MAX_JOBS": "many"}, "`MAX_JOBS` must be a positive integer, but got 'many'."),
    ],
)
def test_a_bad_setting_is_an_error_with_the_remedy(checkout, path_without_nvcc, tmp_path, variables, message):
    result = build(checkout, path_without_nvcc, tmp_path, **variables)
    assert result.returncode != 0
    assert message in " ".join(result.stdout.split())


def test_the_architectures_asked_for_are_built(checkout, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, and none is on PATH")
    result = build(checkout, os.environ["PATH"], tmp_path, LESA_CUDA="1", LESA_CUDA_ARCHS="80-real;90")
    assert result.returncode == 0, result.stdout
    info = build_info(tmp_path)
    assert info["cuda_archs"] == "800,900"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert f"release {info['cuda_version']}," in version
