"""Source distribution, wheel, and builds of the extension on machines with and without a CUDA toolkit."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lesa_kernels

ROOT = Path(__file__).resolve().parents[1]

pybind11 = pytest.importorskip("pybind11", reason="the build needs pybind11")
pytest.importorskip("setuptools", reason="the build needs setuptools")
SCRIPTS = sysconfig.get_path("scripts")
for tool in ("cmake", "ninja", "c++"):
    if shutil.which(tool, path=os.pathsep.join([SCRIPTS, os.environ["PATH"]])) is None:
        pytest.skip(f"the build needs {tool}", allow_module_level=True)

BUILD_VARIABLES = ["CUDACXX", "CUDA_PATH", "CUDA_HOME", "CUDA_ROOT", "CUDAToolkit_ROOT", "CUDAARCHS"]
BUILD_VARIABLES += ["LESA_CUDA", "LESA_CUDA_ARCHS", "MAX_JOBS"]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, and none is on PATH")
SOURCES = ["setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "Makefile", "LICENSE", "README.md"]
SOURCES += ["CHANGELOG.md", "CONTRIBUTING.md", ".ci", "csrc", "lesa_kernels", "python", "tests", "benchmarks", "docs"]


def run(command, folder, path=os.environ["PATH"], **variables):
    environment = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment | {"PATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


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
def sdist(tmp_path_factory):
    """The source distribution, unpacked into a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("with space")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for path in filter(Path.exists, (ROOT / name for name in SOURCES)):
        copy = folder / "checkout" / path.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(path, copy, ignore=ignored) if path.is_dir() else shutil.copy(path, copy)
    made = run([sys.executable, "setup.py", "-q", "sdist", "-d", folder], folder / "checkout")
    assert made.returncode == 0, made.stdout
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, path_without_nvcc, tmp_path_factory):
    """What the build of a wheel without nvcc said, and the wheel unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-build-isolation", "--no-deps", "-w", folder]
    made = run(pip, sdist, path_without_nvcc, LESA_CUDA="", MAX_JOBS="2")
    assert made.returncode == 0, made.stdout
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "unpacked")
    return made.stdout, folder / "unpacked"


def build(sdist, path, out, **variables):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", out, "--build-temp", out / "temp"]
    return run(command, sdist, path, **variables)


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def configure(folder, *definitions, path=os.environ["PATH"], **variables):
    """Runs CMake without building; returns its exit status and what it said."""
    cmake = shutil.which("cmake", path=os.pathsep.join([path, SCRIPTS]))
    ninja = shutil.which("ninja", path=os.pathsep.join([path, SCRIPTS]))
    found = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    tools = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    result = run([cmake, "-S", ROOT, "-B", folder / "build", *tools, *found, *definitions], folder, path, **variables)
    return result.returncode, " ".join(result.stdout.split())


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


def test_the_source_distribution_holds_what_is_tracked(sdist):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked - files_below(sdist) == {".gitignore"}


def test_the_wheel_holds_both_packages_and_the_demo(wheel):
    files = files_below(wheel[1])
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("lesa_kernels/**/*.py")}
    sources |= {str(path.relative_to(ROOT / "python")) for path in ROOT.glob("python/lesa/**/*.py")}
    assert {"lesa_kernels/__init__.py", "lesa/hook.py"} < sources <= files
    weights = {str(path.relative_to(ROOT / "python")) for path in ROOT.glob("python/lesa/demo/weights/**/*.*")}
    assert len(weights) > 5 and weights <= files
    extension = f"lesa_kernels/_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    others = {name for name in files - sources - weights if ".dist-info/" not in name}
    assert others == {extension, "lesa_kernels/tuned/default.json"}


def test_without_nvcc_the_cpu_part_is_built_and_says_so(wheel):
    said, unpacked = wheel
    assert "LESA_CUDA=auto: no working nvcc was found, so lesa_kernels._C is built for the CPU only." in said
    info = build_info(unpacked)
    assert info["cuda_version"] is None and info["cuda_archs"] is None
    assert info["version"] == lesa_kernels.__version__


@pytest.mark.parametrize("nvcc", ["missing", "broken"])
def test_forced_cuda_without_a_working_nvcc_is_an_error_with_the_remedy(sdist, path_without_nvcc, tmp_path, nvcc):
    path = path_without_nvcc
    if nvcc == "broken":
        program = tmp_path / "bin" / "nvcc"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
        path = os.pathsep.join([str(program.parent), path])
    result = build(sdist, path, tmp_path, LESA_CUDA="1")
    assert result.returncode != 0
    said = " ".join(result.stdout.split())
    assert "LESA_CUDA=1 asks for a build with CUDA, but no working nvcc was found." in said
    assert "Install the CUDA toolkit, 12.0 or newer, and put nvcc on PATH" in said and "LESA_CUDA=0" in said


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LESA_CUDA": "yes"}, "`LESA_CUDA` must be one of auto, 0, 1, but got 'yes'. Unset it"),
        ({"LESA_CUDA": "0", "MAX_JOBS": "many"}, "`MAX_JOBS` must be a positive integer, but got 'many'."),
    ],
)
def test_a_bad_setting_is_an_error_with_the_remedy(sdist, path_without_nvcc, tmp_path, variables, message):
    result = build(sdist, path_without_nvcc, tmp_path, **variables)
    assert result.returncode != 0
    assert message in " ".join(result.stdout.split())


def test_the_tools_of_path_come_first(sdist, path_without_nvcc, tmp_path):
    program = tmp_path / "bin" / "cmake"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho the cmake of PATH\nexit 1\n")
    program.chmod(0o755)
    result = build(sdist, os.pathsep.join([str(program.parent), path_without_nvcc]), tmp_path)
    assert result.returncode != 0
    assert "the cmake of PATH" in result.stdout


def test_without_pythons_headers_the_remedy_is_said(tmp_path):
    status, said = configure(tmp_path, f"-DPython_INCLUDE_DIR={tmp_path}")
    assert status != 0
    assert "The headers of Python" in said and "`apt install python3-dev`" in said


@needs_nvcc
def test_cudaarchs_is_respected(tmp_path):
    status, said = configure(tmp_path, "-DLESA_CUDA=1", CUDAARCHS="80;90")
    assert status == 0, said
    assert "for the architectures 80;90." in said


@needs_nvcc
def test_an_old_nvcc_is_not_used(tmp_path):
    # CMake asks a compiler for its version by a program that it has it compile.
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    old = "s/DEC(__CUDACC_VER_MAJOR__)/DEC(11)/; s/DEC(__CUDACC_VER_MINOR__)/DEC(4)/"
    disguise = f"question=CMakeCUDACompilerId.cu\ntest -f $question && sed -i '{old}' $question"
    program.write_text(f'#!/bin/sh\n{disguise}\nexec {shutil.which("nvcc")} "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    status, said = configure(tmp_path, "-DLESA_CUDA=auto", path=path)
    assert status == 0, said
    assert "LESA_CUDA=auto: nvcc 11.4" in said and "so lesa_kernels._C is built for the CPU only." in said
    status, said = configure(tmp_path, "-DLESA_CUDA=1", path=path)
    assert status != 0
    assert "asks for a build with CUDA, but nvcc 11.4" in said and "Install the CUDA toolkit, 12.0 or newer" in said


@needs_nvcc
def test_the_architectures_asked_for_are_built(sdist, tmp_path):
    variables = {"LESA_CUDA": "1", "LESA_CUDA_ARCHS": "80-real;90", "CUDAARCHS": "75"}
    result = build(sdist, os.environ["PATH"], tmp_path, **variables)
    assert result.returncode == 0, result.stdout
    info = build_info(tmp_path)
    assert info["cuda_archs"] == "800,900"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert f"release {info['cuda_version']}," in version
