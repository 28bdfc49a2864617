"""Which module imports which: `python tests/support/imports.py [CHECKOUT]` prints levels, cycles and sizes.

Imports inside functions count, and those by `importlib.import_module("a name")`. Imports for type checkers only, under
`if TYPE_CHECKING:`, do not count.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = {"lesa_kernels": Path("lesa_kernels"), "lesa": Path("python/lesa")}


@dataclass
class Module:
    """One file of a package.

    Attributes:
        name: dotted; that of the package for an `__init__.py`.
        lines: of the file.
        functions: lines of each function without its docstring, by its qualified name.
        imports: names of the modules of the packages that it imports.
        others: names of all other modules that it imports; those of relative imports begin with a dot.
        private: names with a leading underscore that it imports from another folder, as "module.name".
    """

    name: str
    file: Path
    lines: int = 0
    functions: dict[str, int] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    private: list[str] = field(default_factory=list)


def modules_of(root: Path) -> dict[str, Module]:
    """The modules of both packages below `root`, by name."""
    modules = {}
    for package, folder in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(name, file)
    for module in modules.values():
        _read(module, modules)
    return modules


def cycles(modules: dict[str, Module]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reached = {name: _reached(name, modules) for name in modules}
    groups = {tuple(sorted({name} | {other for other in reached[name] if name in reached[other]})) for name in modules}
    return sorted([*group] for group in groups if len(group) > 1)


def levels(modules: dict[str, Module]) -> dict[str, int]:
    """How many imports follow each other below a module, at most. Modules of one cycle share a level."""
    group = {name: tuple([name]) for name in modules}
    for names in cycles(modules):
        group |= {name: tuple(names) for name in names}
    known: dict[tuple[str, ...], int] = {}

    def level(names: tuple[str, ...]) -> int:
        if names not in known:
            below = {group[other] for name in names for other in modules[name].imports} - {names}
            known[names] = 1 + max(map(level, below), default=-1)
        return known[names]

    return {name: level(group[name]) for name in modules}


def _reached(name: str, modules: dict[str, Module]) -> set[str]:
    found: set[str] = set()
    waiting = [*modules[name].imports]
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += modules[other].imports
    return found


def _read(module: Module, modules: dict[str, Module]) -> None:
    text = module.file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    module.lines = text.count("\n")
    module.functions = dict(_functions(tree, ""))
    for node in _imports(tree):
        if isinstance(node, ast.Import):
            _add(module, {alias.name for alias in node.names}, modules)
            continue
        if isinstance(node, ast.Call):
            _add(module, {node.args[0].value}, modules)
            continue
        if node.level or node.module.partition(".")[0] not in PACKAGES:
            module.others.add("." * node.level + (node.module or ""))
            continue
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            source = inner if inner in modules else node.module
            if source not in modules:
                continue
            if source != module.name:
                module.imports.add(source)
            folder = modules[source].file.parent
            if alias.name.startswith("_") and not alias.name.startswith("__") and folder != module.file.parent:
                module.private.append(inner)


def _add(module: Module, names: set[str], modules: dict[str, Module]) -> None:
    module.imports |= names & set(modules)
    module.others |= names - set(modules)


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom | ast.Call]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from [node] if isinstance(node.args[0], ast.Constant) else []
        yield from _imports(node)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = child.end_lineno - child.lineno + 1
            if ast.get_docstring(child) is not None:
                lines -= child.body[0].end_lineno - child.body[0].lineno + 1
            yield prefix + child.name, lines
        name = f"{prefix}{child.name}." if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else prefix
        yield from _functions(child, name)


def main(root: Path) -> None:
    """Prints the levels from the highest to the lowest, the cycles, and the largest files and functions."""
    modules = modules_of(root)
    by_level: dict[int, list[str]] = {}
    for name, level in levels(modules).items():
        by_level.setdefault(level, []).append(name)
    for level in sorted(by_level, reverse=True):
        print(f"{level:2}  {'  '.join(sorted(by_level[level]))}")
    print(f"\nmodules: {len(modules)}, imports: {sum(len(module.imports) for module in modules.values())}")
    for group in cycles(modules) or ["none"]:
        print("cycle:", group if isinstance(group, str) else ", ".join(group))
    for package in PACKAGES:
        own = [module for module in modules.values() if module.name.split(".")[0] == package]
        files = sorted(own, key=lambda module: -module.lines)[:3]
        print(f"largest files of {package}:", ", ".join(f"{m.name} {m.lines}" for m in files))
        functions = sorted(((n, f"{m.name}.{f}") for m in own for f, n in m.functions.items()), reverse=True)[:4]
        print(f"longest functions of {package}:", ", ".join(f"{name} {lines}" for lines, name in functions))
    print("private names across folders:", ", ".join(n for m in modules.values() for n in m.private) or "none")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
