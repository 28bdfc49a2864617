"""Source distribution, wheel, and builds of the extension on machines with and without a CUDA toolkit."""

import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import hasty_compiler
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
SOURCES += ["examples", ".github", "CITATION.cff", "mkdocs.yml"]
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
SYSTEM_LIBRARIES = {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt"}
SYSTEM_LIBRARIES |= {"ld-linux-x86-64", "ld-linux-aarch64"}
NO_NETWORK = ["--no-index", "--no-build-isolation", "--no-deps"]

# Pushes 1, 2, 3, 4 into an empty ring, without torch.
PUSH = """
def push(device):
    import ctypes
    storage, sigmas, features = (ctypes.c_float * 4)(), (ctypes.c_float * 1)(), (ctypes.c_float * 4)(1, 2, 3, 4)
    cursor, count = (ctypes.c_int32 * 1)(), (ctypes.c_int32 * 1)()
    state = [ctypes.addressof(it) for it in (sigmas, cursor, count, features)]
    ring = [ctypes.addressof(storage), "float32", [1, 1, 1, 4], 0]
    try:
        extension.ring_push(*ring, *state, "float32", [4, 4, 1], 0, 0.5, 0, 1, device, 0, 1)
    except RuntimeError as error:
        return str(error)
    return [*storage, *sigmas, *cursor, *count]
"""
PUSHED = [1.0, 2.0, 3.0, 4.0, 0.5, 0, 1]


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


def find(name, path=os.environ["PATH"]):
    return shutil.which(name, path=os.pathsep.join([path, SCRIPTS]))


def path_with(folder, name, *script, path=os.environ["PATH"]):
    """`path` in which a shell script comes before all other programs of its name."""
    program = folder / "bin" / name
    program.parent.mkdir()
    program.write_text("\n".join(["#!/bin/sh", *script, ""]))
    program.chmod(0o755)
    return os.pathsep.join([str(program.parent), path])


def path_with_disguised(folder, name, question, *answers):
    """PATH in which a compiler says that it is of another version.

    CMake asks a compiler for its version by a program, `question`, that it has it compile.
    """
    disguise = "; ".join(f"s/DEC({macro})/DEC({number})/" for macro, number in answers)
    script = f"test -f {question} && sed -i '{disguise}' {question}"
    return path_with(folder, name, script, f'exec {shutil.which(name)} "$@"')


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
def hasty_cxx(tmp_path_factory):
    """A C++ compiler that never optimises and compiles the same text once, for builds whose speed is not looked at."""
    folder = tmp_path_factory.mktemp("hasty")
    words = [sys.executable, "-I", "-S", hasty_compiler.__file__, shutil.which("c++"), folder]
    path = path_with(folder, "c++", f'exec {shlex.join(map(str, words))} "$@"')
    return shutil.which("c++", path=path)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked into a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("with space")
    for path in filter(Path.exists, (ROOT / name for name in SOURCES)):
        copy = folder / "checkout" / path.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(path, copy, ignore=NOT_SOURCES) if path.is_dir() else shutil.copy(path, copy)
    made = run([sys.executable, "setup.py", "-q", "sdist", "-d", folder], folder / "checkout")
    assert made.returncode == 0, made.stdout
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, path_without_nvcc, hasty_cxx, tmp_path_factory):
    """What the build of a wheel without nvcc and network said, and the wheel unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", ".", "-v", *NO_NETWORK, "-w", folder]
    made = run(pip, sdist, path_without_nvcc, LESA_CUDA="", MAX_JOBS="2", CXX=hasty_cxx)
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
    found = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    tools = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find('ninja', path)}"]
    command = [find("cmake", path), "-S", ROOT, "-B", folder / "build", *tools, *found, *definitions]
    result = run(command, folder, path, **variables)
    return result.returncode, " ".join(result.stdout.split())


def library(out):
    (path,) = out.glob(f"lesa_kernels/_C*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    return path


def evaluate(out, expression, preparation=""):
    """The value of an expression of the `extension` that was built in `out`, from a process of its own."""
    program = (
        "import importlib.util, json\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(library(out))!r})\n"
        "extension = importlib.util.module_from_spec(spec); spec.loader.exec_module(extension)\n"
        f"{preparation}\n"
        f"print(json.dumps({expression}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def needed_libraries(path):
    """Names of the shared libraries that a library is linked to, without their versions."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf, and none is on PATH")
    said = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[([\w+-]+)\.so", said))


def bare_python(folder):
    """A Python without any packages."""
    made = run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    assert made.returncode == 0, made.stdout
    return folder / "venv" / "bin" / "python"


def other_pythons():
    """CPythons of other versions, with headers, by version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))  # its programs on PATH may be switched off
    candidates = [shutil.which(f"python3.{minor}") for minor in range(10, 20)]
    candidates += sorted(map(str, pyenv.glob("versions/3.*/bin/python3")))
    question = (
        "import os, sys, sysconfig\n"
        "assert sys.implementation.name == 'cpython' and sys.version_info >= (3, 10)\n"
        "assert os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h'))\n"
        "print(sys.version_info.minor)"
    )
    found = {}
    for python in filter(None, candidates):
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True, timeout=60)
        if answer.returncode == 0 and int(answer.stdout) != sys.version_info.minor:
            found.setdefault(int(answer.stdout), python)
    return found


def test_the_source_distribution_holds_what_is_tracked(sdist):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked - files_below(sdist) == {".gitignore"}


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_the_demo(wheel):
    files = files_below(wheel[1])
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("lesa_kernels/**/*.py")}
    sources |= {str(path.relative_to(ROOT / "python")) for path in ROOT.glob("python/lesa/**/*.py")}
    assert {"lesa_kernels/__init__.py", "lesa/cache/hook.py"} < sources <= files
    weights = {str(path.relative_to(ROOT / "python")) for path in ROOT.glob("python/lesa/demo/weights/**/*.*")}
    assert len(weights) > 5 and weights <= files
    extension = f"lesa_kernels/_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    others = {name for name in files - sources - weights if ".dist-info/" not in name}
    data = {
        "lesa_kernels/forecasters/universal.safetensors",
        "lesa_kernels/py.typed",
        "lesa_kernels/tuned/default.json",
        "lesa/py.typed",
        *(f"lesa/evaluation/page/{name}" for name in ("page.html", "page.css", "charts.js", "sections.js")),
    }
    assert others == {extension} | data


@pytest.mark.slow
def test_the_package_index_gets_a_description_without_relative_links(wheel):
    (metadata,) = wheel[1].glob("*.dist-info/METADATA")
    headers, description = metadata.read_text(encoding="utf-8").split("\n\n", 1)
    assert "Description-Content-Type: text/markdown" in headers.splitlines()
    assert {"Author", "Project-URL", "Keywords", "Classifier"} <= {line.split(":")[0] for line in headers.splitlines()}
    (repository,) = re.findall(r"^Project-URL: Repository, (.*)$", headers, re.MULTILINE)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", description)
    assert len(links) > 20 and all(link.startswith("https://") for _, link in links)
    files = {link: ROOT / link.split("/main/")[1].split("#")[0] for _, link in links if link.startswith(repository)}
    assert len(files) > 15 and all(path.exists() for path in files.values())
    assert [link.startswith(f"{repository}/raw/") for picture, link in links if picture] == [True]
    assert description.startswith("# lesa-kernels\n")


@pytest.mark.slow
def test_without_nvcc_the_cpu_part_is_built_and_says_so(wheel):
    said, unpacked = wheel
    assert "LESA_CUDA=auto: no working nvcc was found, so lesa_kernels._C is built for the CPU only." in said
    info = evaluate(unpacked, "extension.build_info()")
    assert info["cuda_version"] is None and info["cuda_archs"] is None
    assert info["version"] == lesa_kernels.__version__


@pytest.mark.slow
def test_the_wheel_links_to_nothing_that_must_be_installed(wheel):
    assert needed_libraries(library(wheel[1])) <= SYSTEM_LIBRARIES


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_is_installed(wheel, tmp_path):
    report = [bare_python(tmp_path), "-m", "lesa_kernels.env_report"]
    result = run(report, tmp_path, PYTHONPATH=str(wheel[1]))
    assert result.returncode == 0, result.stdout
    lines = dict(line.strip().split(": ", 1) for line in result.stdout.splitlines())
    assert lines["torch"] == "can't be imported: No module named 'torch'"
    assert lines["triton"] == "not installed"
    extension = lines["extension"].split(", ")
    assert f"version {lesa_kernels.__version__}" in extension
    streams = "stream_forecast stream_velocity"
    assert f"cpu_operations newton_coefficients newton_predict ring_gather ring_push {streams}" in extension
    assert "cuda_operations none" in extension and "cuda_version none" in extension


@pytest.mark.slow
def test_an_editable_install_without_network_is_imported_from_the_checkout(
    sdist, path_without_nvcc, hasty_cxx, tmp_path
):
    checkout = shutil.copytree(sdist, tmp_path / "check out")
    python = bare_python(tmp_path)
    here = os.pathsep.join(folder for folder in sys.path if folder.endswith("-packages"))
    pip = [python, "-m", "pip", "install", "--ignore-installed", *NO_NETWORK, "-e", "."]
    path = os.pathsep.join([path_without_nvcc, SCRIPTS])
    installed = run(pip, checkout, path, PYTHONPATH=here, CXX=hasty_cxx)
    assert installed.returncode == 0, installed.stdout
    program = "import lesa_kernels.extension as it; print(it.__file__, it.extension().__file__, sep='\\n')"
    said = run([python, "-c", program], tmp_path, PYTHONPATH="")
    assert said.returncode == 0, said.stdout
    files = [Path(line).relative_to(checkout / "lesa_kernels") for line in said.stdout.splitlines()]
    assert list(map(str, files)) == ["extension.py", f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"]


@pytest.mark.parametrize("nvcc", ["missing", "broken"])
def test_forced_cuda_without_a_working_nvcc_is_an_error_with_the_remedy(sdist, path_without_nvcc, tmp_path, nvcc):
    path = path_without_nvcc
    if nvcc == "broken":
        path = path_with(tmp_path, "nvcc", "exit 1", path=path)
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


@pytest.mark.slow
def test_the_tools_of_path_come_first(sdist, path_without_nvcc, tmp_path):
    path = path_with(tmp_path, "cmake", "echo the cmake of PATH", "exit 1", path=path_without_nvcc)
    result = build(sdist, path, tmp_path)
    assert result.returncode != 0
    assert "the cmake of PATH" in result.stdout


@pytest.mark.slow
def test_without_pythons_headers_the_remedy_is_said(tmp_path):
    status, said = configure(tmp_path, f"-DPython_INCLUDE_DIR={tmp_path}")
    assert status != 0
    assert "The headers of Python" in said and "`apt install python3-dev`" in said


@pytest.mark.slow
def test_an_old_compiler_is_an_error_with_the_remedy(tmp_path):
    answers = [("__GNUC__", 7), ("__clang_major__", 7)]
    path = path_with_disguised(tmp_path, "c++", "CMakeCXXCompilerId.cpp", *answers)
    program = shutil.which("c++", path=path)
    status, said = configure(tmp_path, "-DLESA_CUDA=0", path=path, CXX=program)
    assert status != 0
    assert re.search(
        rf"The C\+\+ compiler {re.escape(program)} is (GCC|Clang|AppleClang) 7[.\d]*, and lesa_kernels needs \d+ or "
        r"newer, for C\+\+17\. Install one, and name it in the environment variable CXX\.",
        said,
    ), said


@pytest.mark.parametrize("which", [min, max], ids=["oldest", "newest"])
@pytest.mark.slow
def test_another_python_has_its_own_build(tmp_path, hasty_cxx, which):
    pythons = other_pythons()
    if not pythons:
        pytest.skip("needs a second CPython, 3.10 or newer, with its headers")
    if which is max and len(pythons) == 1:
        pytest.skip("needs a third CPython, 3.10 or newer, with its headers")
    python = pythons[which(pythons)]
    package = shutil.copytree(ROOT / "lesa_kernels", tmp_path / "lesa_kernels", ignore=NOT_SOURCES)
    definitions = [f"-DPython_EXECUTABLE={python}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"]
    definitions += ["-DLESA_CUDA=0", f"-DLESA_VERSION={lesa_kernels.__version__}"]
    status, said = configure(tmp_path, *definitions, CXX=hasty_cxx)
    assert status == 0, said
    built = run([find("cmake"), "--build", tmp_path / "build"], tmp_path)
    assert built.returncode == 0, built.stdout
    program = (
        f"from lesa_kernels.extension import extension\nextension = extension()\n{PUSH}\n"
        "print(extension.build_info()['version'], push(-1))"
    )
    result = run([python, "-c", program], tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert result.stdout.strip() == f"{lesa_kernels.__version__} {PUSHED}"


def known_to_nvcc():
    said = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return said.split()


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """What CMake says with CUDAARCHS, and `again(up_to_90)`: what it says later without it, in the same folder.

    There CMake has tried its compilers already, which takes seconds. With `up_to_90`, nvcc knows no newer GPUs.
    """
    nvcc, folder = shutil.which("nvcc"), tmp_path_factory.mktemp("configured")
    up_to_90 = f'[ "$1" = --list-gpu-code ] && [ -n "$UP_TO_90" ] && {nvcc} "$@" | grep -x "sm_[0-9][0-9]" && exit'
    path = path_with(folder, "nvcc", up_to_90, f'exec {nvcc} "$@"')

    def again(up_to_90, **variables):
        status, said = configure(folder, "-DLESA_CUDA=1", path=path, UP_TO_90="1" if up_to_90 else "", **variables)
        assert status == 0, said
        return said

    return again(False, CUDAARCHS="80;90"), again


@needs_nvcc
@pytest.mark.slow
def test_cudaarchs_is_respected(configured):
    said, _ = configured
    assert "for the architectures 80;90." in said


@needs_nvcc
@pytest.mark.slow
def test_the_default_architectures_are_those_of_this_nvcc(configured):
    if not {"sm_110", "sm_120"} <= set(known_to_nvcc()):
        pytest.skip("needs an nvcc that knows sm_110 and sm_120")
    said = configured[1](up_to_90=False)
    assert "for the architectures 80-real;86-real;89-real;90-real;100-real;110-real;120-real;120-virtual." in said


@needs_nvcc
@pytest.mark.slow
def test_the_default_architectures_are_what_an_older_nvcc_knows(configured):
    said = configured[1](up_to_90=True)
    assert "for the architectures 80-real;86-real;89-real;90-real;90-virtual." in said


@needs_nvcc
@pytest.mark.slow
def test_an_old_nvcc_is_not_used(tmp_path):
    answers = [("__CUDACC_VER_MAJOR__", 11), ("__CUDACC_VER_MINOR__", 4)]
    path = path_with_disguised(tmp_path, "nvcc", "CMakeCUDACompilerId.cu", *answers)
    status, said = configure(tmp_path, "-DLESA_CUDA=auto", path=path)
    assert status == 0, said
    assert "LESA_CUDA=auto: nvcc 11.4" in said and "so lesa_kernels._C is built for the CPU only." in said
    status, said = configure(tmp_path, "-DLESA_CUDA=1", path=path)
    assert status != 0
    assert "asks for a build with CUDA, but nvcc 11.4" in said and "Install the CUDA toolkit, 12.0 or newer" in said


@pytest.fixture(scope="module")
def cuda_build(sdist, hasty_cxx, tmp_path_factory):
    """The architectures that were built, and the folder with the extension for them."""
    architectures = [80, 90, 100] if "sm_100" in known_to_nvcc() else [80, 90]
    asked = ";".join([*(f"{older}-real" for older in architectures[:-1]), str(architectures[-1])])
    out = tmp_path_factory.mktemp("cuda")
    variables = {"LESA_CUDA": "1", "LESA_CUDA_ARCHS": asked, "CUDAARCHS": "75", "CXX": hasty_cxx}
    result = build(sdist, os.environ["PATH"], out, **variables)
    assert result.returncode == 0, result.stdout
    return architectures, out


@dataclass
class Kernel:
    resources: dict[str, int]  # by cuobjdump's names
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, pattern):
        """How many of its instructions match."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))

    def bytes_moved(self, access):
        """By its instructions of that kind, each of them run once: those that move 16 bytes, and the others."""
        widths = {"U8": 1, "U16": 2, "64": 8, "128": 16}
        moved = Counter()
        for name, count in self.instructions.items():
            if re.match(access, name):
                width = next((widths[part] for part in name.split(".") if part in widths), 4)
                moved[width == 16] += width * count
        return moved[True], moved[False]


@pytest.fixture(scope="module")
def cuobjdump(cuda_build):
    """Runs cuobjdump on the extension and returns what it said."""
    triton = importlib.util.find_spec("triton")
    bundled = [Path(folder) / "backends/nvidia/bin" for folder in triton.submodule_search_locations] if triton else []
    path = os.pathsep.join([*map(str, bundled), os.environ["PATH"]])
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"needs {tool}, from Triton or from the CUDA toolkit")

    def read(option):
        result = run([shutil.which("cuobjdump", path=path), option, library(cuda_build[1])], cuda_build[1], path)
        assert result.returncode == 0, result.stdout
        return result.stdout

    return read


@pytest.fixture(scope="module")
def kernels(cuobjdump):
    """(architecture, mangled name) -> Kernel."""
    found = {}
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif line.startswith("  REG:"):
            resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found[architecture, name] = Kernel(resources)
    for line in cuobjdump("-sass").splitlines():
        if match := re.match(r"\s+code for sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s+Function : (\w+)", line):
            instructions = found[architecture, match[1]].instructions
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            instructions[match[1]] += 1
    return found


@needs_nvcc
@pytest.mark.slow
def test_the_architectures_asked_for_are_built(cuda_build):
    architectures, out = cuda_build
    info = evaluate(out, "extension.build_info()")
    assert info["cuda_archs"] == ",".join(f"{architecture}0" for architecture in architectures)
    assert info["cuda_operations"] == ["ring_gather", "ring_push"]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert f"release {info['cuda_version']}," in version


@needs_nvcc
@pytest.mark.slow
def test_code_for_gpus_to_come_is_there_for_the_last_architecture_only(cuda_build, cuobjdump):
    said = cuobjdump("-res-usage")
    assert {*re.findall(r"Fatbin elf code:\n=+\narch = sm_(\w+)", said)} == {*map(str, cuda_build[0])}
    assert {*re.findall(r"Fatbin ptx code:\n=+\narch = sm_(\w+)", said)} == {str(cuda_build[0][-1])}


@needs_nvcc
@pytest.mark.slow
def test_cuda_is_not_linked_to(cuda_build):
    assert needed_libraries(library(cuda_build[1])) <= SYSTEM_LIBRARIES


@needs_nvcc
@pytest.mark.slow
def test_the_cuda_build_works_on_the_cpu_too(cuda_build):
    assert evaluate(cuda_build[1], "push(-1)", PUSH) == PUSHED


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.slow
def test_without_a_gpu_the_cuda_build_says_so(cuda_build):
    problem, said = evaluate(cuda_build[1], "[extension.cuda_problem(0), push(0)]", PUSH)
    assert re.search(r"\(cudaError\w+\)$", problem)
    assert said.startswith(f"lesa_kernels.ring_push on CUDA device 0 failed: {problem}.")


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_is_there_for_every_architecture(cuda_build, kernels):
    found = Counter((arch, re.search(r"\d(ring_[a-z8_]+?_kernel)", name)[1]) for arch, name in kernels)
    # A push for each pair of dtypes, from and to float32, float16 and bfloat16, and two to float8 from each.
    each = {
        "ring_push_kernel": 9,
        "ring_push_float8_kernel": 3,
        "ring_push_any_float8_kernel": 3,
        "ring_gather_kernel": 3,
        "ring_gather_float8_kernel": 1,
    }
    assert found == {(arch, name): count for arch in cuda_build[0] for name, count in each.items()}


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills_registers(kernels):
    spilling = {}
    for key, kernel in kernels.items():
        assert kernel.resources["REG"] <= 255 and kernel.resources["SHARED"] < 48 << 10, (key, kernel.resources)
        local = {name for name in kernel.instructions if name.split(".")[0] in ("LDL", "STL")}
        if kernel.resources["STACK"] or kernel.resources["LOCAL"] or local:
            spilling[key] = kernel.resources, local
    assert not spilling


@needs_nvcc
@pytest.mark.slow
def test_kernels_move_16_bytes_at_a_time(kernels):
    # Each kernel has code for whole vectors and code for ragged ones, which goes element by element. As many bytes must
    # move in the first as in the second, but for a row's state, which is at most four numbers of 4 bytes.
    split = {}
    for key, kernel in kernels.items():
        if "ring_push_float8" in key[1]:
            continue
        loaded, loaded_singly = kernel.bytes_moved(r"LDG\..*CONSTANT")
        stored, stored_singly = kernel.bytes_moved(r"STG\.")
        if not loaded or not stored or loaded < loaded_singly or stored < stored_singly - 16:
            split[key] = loaded, loaded_singly, stored, stored_singly
    assert not split


@needs_nvcc
@pytest.mark.slow
def test_the_push_to_float8_reads_each_value_once_and_divides_in_a_few_instructions(kernels):
    checked = 0
    for (architecture, name), kernel in kernels.items():
        if "ring_push_float8" in name:
            checked += 1
            assert kernel.bytes_moved(r"LDG\..*CONSTANT") == (96, 0)  # all that a thread has of a token
            values = 24 if "Float32" in name else 48
            assert kernel.bytes_moved(r"STG\.") == (0, values + 16)  # and a scale and the row's state, 4 bytes each
            assert kernel.count(r"STG\..*64") == (0 if "Float32" in name else 6)
            # Two multiplications and two additions for each value, and a few for the scale; without a conversion in
            # hardware, an addition for each value more.
            arithmetic = kernel.count(r"(FFMA|FMUL|FADD)\b")
            assert arithmetic <= values * (5 if architecture < 89 else 4) + 40, (architecture, name, arithmetic)
            assert kernel.count(r"F2FP\..*E4M3") == (0 if architecture < 89 else values // 2)
    assert checked == 3 * len({architecture for architecture, _ in kernels})
