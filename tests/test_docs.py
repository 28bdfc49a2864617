"""What the documents show exists: names, options, commands and files."""

import ast
import importlib.util
import inspect
import itertools
import re
import shlex
from pathlib import Path

import pytest

from lesa.cache import reasons
from lesa.cli import parse, parser_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = (README, *((ROOT / "docs" / name).read_text() for name in ("training.md", "using-the-cache.md")))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "python/lesa/demo/weights/README.md"]
PAGES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text=README):
    """Every `lesa ...` in a block of commands, or between backticks."""
    lines = "\n".join(blocks("bash", text)).splitlines() + re.findall(r"`(lesa [^`]+)`", text)
    return sorted({part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("lesa ")})


def called(node):
    """The `lesa` or `lesa_kernels` callable of a call, or None."""
    match node.func:
        case ast.Attribute(value=ast.Name(id="lesa"), attr=name):
            return getattr(importlib.import_module("lesa"), name)
        case ast.Attribute(value=ast.Name(id="FusedKANPredictor"), attr=name):
            return getattr(importlib.import_module("lesa_kernels").FusedKANPredictor, name)
    return None


@pytest.mark.parametrize("example", [block for page in EXAMPLES for block in blocks("python", page)])
def test_examples_use_names_and_arguments_that_exist(example):
    checked = 0
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), ast.unparse(node)
        elif isinstance(node, ast.Call) and (function := called(node)) is not None:
            arguments = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(function).bind(*node.args, **arguments)
            checked += 1
    assert checked >= 1


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
    diffusers_example, cpu_example = ([line for line in block.splitlines() if line] for block in blocks("python"))
    assert len(diffusers_example) == 3
    assert len(cpu_example) <= 10


def test_the_two_commands_are_there():
    assert "pip install . && lesa demo\n" in blocks("bash")[0]
    assert blocks("bash")[1] == 'pip install ".[test]" && pytest\n'


@pytest.mark.parametrize("command", [c for c in commands() if len(c.split()) > 2])
def test_commands_parse(command):
    _, name, *_ = words = shlex.split(command)
    assert parse(words[1:]).command == name


def test_every_command_is_shown():
    shown = {command.split()[1] for command in commands()}
    assert shown == {"demo", "fit", "record", "train", "refine", "generate", "evaluate", "report", "estimate", "env"}


@pytest.mark.parametrize("document", DOCUMENTS + PAGES)
def test_links_to_files_lead_somewhere(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if not leads_somewhere(ROOT / document, *link.split("#"))]
    assert not missing


def leads_somewhere(document, path, heading=None):
    target = document.parent / path if path else document
    if heading is None:
        return target.exists()
    headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
    return heading in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}


@pytest.mark.parametrize("package", ["lesa", "lesa_kernels"])
def test_the_reference_has_every_public_name(package):
    text = (ROOT / f"docs/reference-{package.replace('_', '-')}.md").read_text()
    names = re.findall(rf"^::: {package}\.(\w+)$", text, re.MULTILINE)
    public = {name for name in importlib.import_module(package).__all__ if name != "__version__"}
    assert len(names) == len({*names}) and {*names} == public


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1].split("markdown_extensions:")[0]
    assert sorted(re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE)) == [Path(page).name for page in PAGES]


def test_the_address_of_the_project_is_the_same_everywhere():
    files = ("pyproject.toml", "setup.py", "mkdocs.yml", "CITATION.cff")
    found = [re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", (ROOT / name).read_text()) for name in files]
    assert all(found) and len({address for addresses in found for address in addresses}) == 1


def test_every_page_can_be_reached():
    """From the README, by links."""
    reached, ahead = set(), ["README.md"]
    while ahead:
        document = ROOT / ahead.pop()
        links = re.findall(r"\]\(([^)#]+\.md)\)", document.read_text())
        found = {str((document.parent / link).resolve().relative_to(ROOT)) for link in links if "://" not in link}
        ahead += found - reached
        reached |= found
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages_parse(page):
    text = re.sub(r"^\| `.*?` \|", "", (ROOT / page).read_text(), flags=re.MULTILINE)  # messages are no commands
    for command in commands(text):
        if "..." not in command:
            name, *options = shlex.split(command)[1:]
            known = {option for action in _subparser(name)._actions for option in action.option_strings}
            assert {option for option in options if option.startswith("-")} <= known, command


def _subparser(name):
    return next(action.choices for action in parser_of(name)._actions if isinstance(action.choices, dict))[name]


def text_of(node):
    """The text of a string literal, what is filled in shown as `...`; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def said():
    """All that the packages can say: string literals of more than one word that are no docstrings."""
    for path in [*(ROOT / "python").rglob("*.py"), *(ROOT / "lesa_kernels").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = text_of(node)
            if text is not None and id(node) not in docstrings:
                yield text


def reasons_and_notes():
    """What the cache gives as reasons, in warnings and in the notes of its stats."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "python/lesa/cache").glob("*.py")]
    for node in itertools.chain.from_iterable(map(ast.walk, trees)):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") in ("_fall_back", "note", "_note")
            and node.args
        ):
            yield text_of(node.args[0])
        elif isinstance(node, ast.FunctionDef) and node.name == "_why_not":
            for returned in (n.value for n in ast.walk(node) if isinstance(n, ast.Return)):
                if isinstance(returned, ast.Tuple):
                    yield text_of(returned.elts[0])
    for name, pair in vars(reasons).items():
        if name.isupper():
            yield pair if isinstance(pair, str) else pair[0]


def keys_of_the_table():
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def test_the_messages_in_the_troubleshooting_table_exist():
    everything = [text for text in said() if " " in text]
    argument = {"max_device_bytes", "predictor.config.family"}  # named as the first word of a message
    assert [key for key in keys_of_the_table() if key not in argument and not any(key in t for t in everything)] == []
    assert argument <= {*said()}


def test_every_reason_and_note_is_in_the_troubleshooting_table():
    texts = [text for text in reasons_and_notes() if text]
    assert len(texts) >= 10
    assert [text for text in texts if not any(key in text for key in keys_of_the_table())] == []


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "README.md"])
def test_make_targets_exist(document):
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / document).read_text()
    named = [word for line in re.findall(r"(?:`|^)make ([\w -]+?)(?:`|\s*#|$)", text, re.M) for word in line.split()]
    assert named and rules.issuperset(named)


def test_build_variables_are_those_that_are_read():
    named = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/building.md").read_text(), re.MULTILINE)
    read = re.findall(r"os\.environ\.get\(.([A-Z_]+).,", (ROOT / "setup.py").read_text())
    assert named and sorted(named) == sorted({*read})
