"""Bridges setuptools to CMake, which builds `csrc/` into `lesa_kernels._C`. Neither torch nor a GPU is needed.

Environment variables; an empty one is as good as unset:
    LESA_CUDA: "auto" (the default: with CUDA when CMake finds a working nvcc), "1" (with CUDA or fail), "0" (without).
    LESA_CUDA_ARCHS: GPU architectures as CMake writes them, separated by semicolons, e.g. "80-real;90".
        CMake's own variable CUDAARCHS is respected where this one is unset.
    MAX_JOBS: how many compilers run at once; ninja decides if unset.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
PROJECT = "https://github.com/lesa-kernels/lesa-kernels"


def description() -> str:
    """The README as the package index shows it: links to files are absolute, and pictures come from where files are."""
    link = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")
    return link.sub(
        lambda found: f"{found[1]}[{found[2]}]({PROJECT}/{'raw' if found[1] else 'blob'}/main/{found[3]})",
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )


def find_tool(name: str) -> str:
    """Path of a build tool: on PATH, where an isolated build has its own first, or beside this interpreter.

    The latter serves a virtual environment that is used without being activated.
    """
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise SetupError(f"{name} was not found. Install it with `pip install {name}`, or build with build isolation.")
    return path


def max_jobs() -> list[str]:
    jobs = os.environ.get("MAX_JOBS", "")
    if not jobs:
        return []
    if not jobs.isdecimal() or int(jobs) < 1:
        raise SetupError(f"`MAX_JOBS` must be a positive integer, but got {jobs!r}. Set it to a number, or unset it.")
    return ["--parallel", jobs]


class CMakeBuild(build_ext):
    """Builds every extension of this project with CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise SetupError(
                "pybind11 was not found. Install it with `pip install pybind11`, or build with build isolation."
            ) from error

        cmake = find_tool("cmake")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        # CMake caches the paths of its tools, and those of an isolated build environment are gone by the next build.
        shutil.rmtree(build_dir, ignore_errors=True)
        build_dir.mkdir(parents=True)

        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLESA_VERSION={self.distribution.get_version()}",
            f"-DLESA_CUDA={os.environ.get('LESA_CUDA', '') or 'auto'}",
            f"-DLESA_CUDA_ARCHS={os.environ.get('LESA_CUDA_ARCHS', '')}",
            f"-DLESA_JOBS={(max_jobs() or ['0'])[-1]}",
        ]
        build = [cmake, "--build", str(build_dir), *max_jobs()]
        for command in (configure, build):
            if subprocess.run(command).returncode != 0:
                raise CompileError(f"{ext.name} was not built: CMake says why above.")


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["lesa_kernels", "lesa_kernels.*"]) + find_packages("python"),
    ext_modules=[Extension("lesa_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
