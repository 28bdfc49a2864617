"""How the packages are built: imports go one way, and files and functions stay short."""

import ast
import textwrap
from pathlib import Path

import pytest

import lesa
from imports import PACKAGES, cycles, modules_of

ROOT = Path(__file__).resolve().parents[1]
MODULES = modules_of(ROOT)
# From the highest to the lowest. What is in one line may import each other, as long as there is no cycle.
ROOMS = (
    ("cli", "demo", "__main__"),
    ("fitting",),
    ("evaluation",),
    ("contenders",),
    ("training",),
    ("cache", "estimation"),
    ("models",),
    ("processes",),
    ("schedule", "inputs", "pipelines", "artifacts", "conditions", "provenance", "videos"),
    ("spread",),
    ("messages",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
MOST_LINES = {"lesa": 420, "lesa_kernels": 560}
MOST_LINES_OF_A_FUNCTION = 70  # without its docstring


def package_of(name):
    return name.partition(".")[0]


def room_of(name):
    return name.split(".")[1]


def test_every_room_has_a_rank():
    rooms = {room_of(name) for name in MODULES if name.startswith("lesa.")}
    assert rooms == set(RANK)


def test_no_modules_import_each_other():
    assert cycles(MODULES) == []


def test_the_kernels_know_nothing_above_them():
    own = [module for module in MODULES.values() if package_of(module.name) == "lesa_kernels"]
    assert [module.name for module in own if any(package_of(name) == "lesa" for name in module.imports)] == []
    above = {"diffusers", "transformers", "accelerate"}
    assert [module.name for module in own if above & set(map(package_of, module.others))] == []


def test_the_packages_know_nothing_of_benchmarks_and_tests():
    above = {path.stem for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")}
    above |= {"benchmarks", "tests"}
    assert [module.name for module in MODULES.values() if above & set(map(package_of, module.others))] == []


def test_imports_are_absolute():
    """Relative ones are not followed here."""
    assert [module.name for module in MODULES.values() if any(name[0] == "." for name in module.others)] == []


def test_rooms_import_from_lower_rooms_only():
    upwards = [
        f"{module.name} -> {name}"
        for module in MODULES.values()
        for name in module.imports
        if module.name.startswith("lesa.") and name.startswith("lesa.")
        if RANK[room_of(name)] < RANK[room_of(module.name)]
    ]
    assert upwards == []


def test_only_the_highest_rooms_use_the_public_names():
    """`import lesa` gives access to every room, so that it would hide where an import goes."""
    users = {room_of(module.name) for module in MODULES.values() if "lesa" in module.imports}
    assert users <= set(ROOMS[0])


def test_private_names_stay_in_their_folder():
    assert [name for module in MODULES.values() for name in module.private] == []


def test_files_are_short():
    long = {name: module.lines for name, module in MODULES.items() if module.lines > MOST_LINES[package_of(name)]}
    assert long == {}


def test_functions_are_short():
    """Triton kernels and the functions that launch them may be longer."""
    long = {
        f"{name}.{function}": lines
        for name, module in MODULES.items()
        if "kernels" not in name.split(".")[1:]
        for function, lines in module.functions.items()
        if lines > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_the_public_names_are_the_same_for_python_and_for_type_checkers():
    tree = ast.parse((ROOT / PACKAGES["lesa"] / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    checked = {alias.name: node.module for node in block.body for alias in node.names}
    assert checked == {name: f"lesa.{module}" for name, module in lesa._SOURCES.items()}
    assert {*checked, "__version__"} == set(lesa.__all__)
    assert all(alias.asname is None for node in block.body for alias in node.names)


@pytest.fixture
def tree(tmp_path):
    """A checkout with one fault of each kind."""
    files = {
        "lesa_kernels/__init__.py": "",
        "python/lesa/__init__.py": "",
        "python/lesa/a.py": "from lesa.room import b",
        "python/lesa/room/b.py": """
            from . import d
            from .d import C

            def f():
                import lesa.c, torch, diffusers.hooks
            """,
        "python/lesa/c.py": 'import importlib\n\nimportlib.import_module("lesa.a")\nfrom lesa.room.d import _hidden',
        "python/lesa/room/d.py": """
            from typing import TYPE_CHECKING
            from lesa.room.b import _of_the_same_folder

            if TYPE_CHECKING:
                import lesa.e

            class C:
                def f(self):
                    '''Text

                    that does not count.
                    '''
                    return (
                        1
                    )
            """,
        "python/lesa/e.py": "import lesa.room.d",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    return modules_of(tmp_path)


def test_faults_are_found(tree):
    assert cycles(tree) == [["lesa.a", "lesa.c", "lesa.room.b", "lesa.room.d"]]
    assert {name: module.private for name, module in tree.items() if module.private} == {
        "lesa.c": ["lesa.room.d._hidden"]
    }
    assert tree["lesa.room.b"].others == {"diffusers.hooks", ".", ".d", "torch"}
    assert tree["lesa.room.d"].functions == {"C.f": 4}
    assert tree["lesa.e"].lines == 0 and tree["lesa.room.b"].lines == 6
