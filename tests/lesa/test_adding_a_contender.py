"""A contender is one file and one entry: what must be in the file, and that nothing else knows contenders by name."""

import ast
import contextlib
import json
import re
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lesa
from lesa import cli, contenders
from lesa.contenders import UNKNOWN_COLOR, Color, Contender, Grid, Ours, Peer, Plain
from lesa.demo import digits
from lesa.evaluation import EvaluatedRun, Evaluation
from made_evaluations import make_evaluation

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def parts_of_a_peer():
    """What a class of a peer must have."""
    return {
        "name": "made-up",
        "title": "Made Up",
        "color": Color("#7f0037", "#ff99c2"),
        "counted_in": ("step_equivalents",),
        "__str__": lambda self: "made-up-a",
        "describe": lambda self: "a",
        "on": lambda self, pipe, num_inference_steps: contextlib.nullcontext(),
        "grid": classmethod(lambda cls, *args: Grid("one", settings=[cls()])),
    }


def make(parts, base=Peer):
    return types.new_class("MadeUp", (base,), exec_body=lambda namespace: namespace.update(parts))


def test_a_complete_class_can_be_made():
    kind = make(parts_of_a_peer())
    assert (kind.label, kind().contender, kind.heading("made-up-a"), kind.note(["made-up-a"])) == (
        "Made Up", "made-up", "Made Up", None
    )  # fmt: skip


@pytest.mark.parametrize("part", parts_of_a_peer())
def test_what_is_missing_is_an_error_at_import(part):
    parts = parts_of_a_peer()
    del parts[part]
    with pytest.raises(TypeError, match=rf"`MadeUp\.{part}` must be .*See docs/adding-a-contender.md"):
        make(parts)


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("title", "", TypeError),
        ("name", "Made Up", ValueError),
        ("name", "made-9", ValueError),  # it would be a budget in `against`
        ("color", "#7f0037", TypeError),
        ("color", Color("#7f0037", "pink"), TypeError),
        ("counted_in", "whole_steps", TypeError),
        ("counted_in", (), TypeError),
        ("counted_in", ("seconds",), TypeError),
    ],
)
def test_what_has_the_wrong_form_is_an_error_at_import(part, value, error):
    with pytest.raises(error, match=rf"`MadeUp\.{part}` must be"):
        make({**parts_of_a_peer(), part: value})


def test_a_calibration_needs_a_name_and_a_measurement():
    for parts in ({"calibration": "ratios"}, {"calibrate": classmethod(lambda cls, *args: ())}):
        with pytest.raises(TypeError, match=r"`MadeUp\.calibrate` must be defined exactly if `calibration` has a name"):
            make({**parts_of_a_peer(), **parts})


@pytest.mark.parametrize(("base", "method"), [(Plain, "at"), (Ours, "detail")])
def test_the_other_kinds_are_checked_too(base, method):
    with pytest.raises(TypeError, match=rf"`MadeUp\.{method}` must be defined"):
        make(parts_of_a_peer(), base)


def test_contenders_that_can_not_be_registered_together_are_refused():
    registered = contenders.CONTENDERS
    with pytest.raises(TypeError, match="`MadeUp` must be a frozen dataclass"):
        contenders.check_contenders([*registered, make(parts_of_a_peer())])
    for part in ("name", "title", "color"):
        same = make({**parts_of_a_peer(), part: getattr(contenders.MagCache, part)})
        with pytest.raises(ValueError, match=f"`CONTENDERS` must differ in `{part}`, but got .* twice"):
            contenders.check_contenders([*registered, dataclass(frozen=True)(same)])


@dataclass(frozen=True)
class Coarse(Peer):
    """Fewer steps of the scheduler in the form of a cache, so that a test can say what its figures must be."""

    threshold: float
    learned: tuple[float, ...] = ()

    name = "coarse"
    title = "Coarse & Fast"
    label = "Coarse"
    color = Color("#d000a0", "#ff66dd")
    counted_in = ("step_equivalents", "whole_steps")
    calibration = "coarse_numbers"

    def __str__(self):
        return f"coarse-{self.threshold:.4g}"

    def describe(self):
        return f"a threshold of {self.threshold:.4g}"

    def on(self, pipe, num_inference_steps):
        return contextlib.nullcontext()

    def steps_of(self, num_inference_steps):
        return max(2, round(num_inference_steps / (1 + self.threshold)))

    @classmethod
    def grid(cls, num_inference_steps, budgets, calibration):
        return Grid("any coarseness", axes=[cls(0.5, calibration)])

    @classmethod
    def calibrate(cls, pipe, run, num_inference_steps):
        run()
        return (float(num_inference_steps), 0.5)

    @classmethod
    def heading(cls, run):
        return "the coarse one"

    @classmethod
    def note(cls, runs):
        return f"Coarse & Fast has {len(runs)} runs here."


@pytest.fixture
def registered(monkeypatch):
    """Its entry."""
    every = (*contenders.CONTENDERS, Coarse)
    contenders.check_contenders(every)
    monkeypatch.setattr(contenders, "CONTENDERS", every)


def evaluated(pipe, against, folder):
    inputs = digits.inputs_for([3, 8])
    return lesa.evaluate(pipe, inputs, [], against, STEPS, out_dir=folder, progress=False, search_samples=1)


def has_color(file, color):
    """Whether a picture has at least ten pixels of a colour."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.asarray(Image.open(file).convert("RGB")) == wanted).all(-1).sum() >= 10


def test_a_made_up_contender_goes_all_the_way(registered, pipe, tmp_path, capsys):
    evaluation = evaluated(pipe, ["coarse-6", "steps-6"], tmp_path)
    searched = evaluation.facts["searched"]["coarse"]
    assert (searched["grid"], searched["coarse_numbers"]) == ("any coarseness", [STEPS, 0.5])
    assert [(row["budget"], row["by"]) for row in searched["budgets"]] == [(6, "step_equivalents"), (6, "whole_steps")]
    run = evaluation[searched["budgets"][0]["run"]]
    assert (run.contender, run.whole_steps, run.is_peer, run.is_ours) == ("coarse", 6, True, False)
    assert run.setting == f"a threshold of {run.name.removeprefix('coarse-')}"
    assert run.per_sample == evaluation["fewer-steps-6"].per_sample
    table = evaluation.table()
    assert f"\n{run.name} " in table and "\nCoarse & Fast has 1 runs here." in table
    assert f"coarse: the best of {searched['tried']} settings, searched with 1 samples." in table
    assert has_color(tmp_path / "comparison.png", Coarse.color.light)
    html = lesa.report(tmp_path).read_text()
    assert "--c-coarse: #d000a0;" in html and "--c-coarse: #ff66dd;" in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    drawn = data["contenders"]["coarse"]
    assert (drawn["label"], drawn["color"], drawn["shape"]) == (
        "Coarse & Fast",
        "--c-coarse",
        len(contenders.CONTENDERS) - 2,
    )
    assert {shown["short"] for shown in data["runs"] if shown["contender"] == "coarse"} == {"Coarse"}
    assert "Coarse &amp; Fast: 1 settings tried" in html
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    help_text = "".join(capsys.readouterr().out.split())
    assert "steps,taylorseer,first-block-cache," in help_text and ",coarse," in help_text


def test_a_setting_that_is_not_registered_can_be_compared_too(pipe, tmp_path):
    evaluation = evaluated(pipe, [Coarse(1.0)], tmp_path)
    assert evaluation["coarse-1"].is_peer and "\ncoarse-1 " in evaluation.table()
    assert has_color(tmp_path / "comparison.png", UNKNOWN_COLOR.light)
    with pytest.raises(ValueError, match="`against` must hold 'steps'"):
        evaluated(pipe, ["coarse"], tmp_path)


def test_a_contender_that_nobody_knows_is_still_shown(tmp_path):
    make_evaluation(tmp_path, budgets=(9,), rename={"cache-dit": "of-old"})
    html = lesa.report(tmp_path).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    shape = len(contenders.CONTENDERS) - 1  # the reference has none
    assert data["contenders"]["of-old"] == {"label": "of-old", "color": "--other", "shape": shape, "ours": False}
    assert "of-old: 3 settings tried" in html and f"--other: {UNKNOWN_COLOR.light};" in html
    assert data["budgets"][0]["absent"][-1] == "of-old"  # its cheapest run needs 9.7 step equivalents


def test_what_is_not_installed_is_refused_by_its_own_check(registered, pipe, tmp_path, monkeypatch):
    def absent(cls):
        raise ImportError("coarse is not installed")

    monkeypatch.setattr(Coarse, "check_available", classmethod(absent))
    for against in ("coarse", "coarse-6", Coarse(1.0)):
        with pytest.raises(ImportError, match="coarse is not installed"):
            evaluated(pipe, [against], tmp_path)


def test_the_example_of_the_page_works(pipe, generate, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "adding-a-contender.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    module = types.ModuleType("pab")
    monkeypatch.setitem(sys.modules, "pab", module)  # dataclasses look there
    exec(compile(example, "pab.py", "exec"), vars(module))
    kind = module.PyramidAttentionBroadcast
    # The example may have been added, or another contender may have been given its title or colour.
    fields = ("name", "title", "color")
    taken = [other for other in contenders.CONTENDERS if any(getattr(other, f) == getattr(kind, f) for f in fields)]
    every = (*(other for other in contenders.CONTENDERS if other not in taken), kind)
    contenders.check_contenders(every)
    monkeypatch.setattr(contenders, "CONTENDERS", every)
    before = generate(pipe)
    evaluation = evaluated(pipe, ["pab-4", kind(6)], tmp_path)
    assert torch.equal(generate(pipe), before)
    counts = {run.name: (run.step_equivalents, run.block_passes) for run in evaluation.runs[1:]}
    assert counts == {"pab-interval6": (2.0, STEPS), "pab-interval3": (4.0, STEPS)}
    assert 10 < evaluation["pab-interval6"].psnr < evaluation["pab-interval3"].psnr < 100
    assert "Pyramid Attention Broadcast skips attentions only." in evaluation.table()
    assert "Pyramid Attention Broadcast" in lesa.report(tmp_path).read_text()


def test_the_page_names_what_a_class_has():
    page = (ROOT / "docs" / "adding-a-contender.md").read_text()
    answers = re.findall(r"^\| .*\? \| (.*?) \|", page, re.MULTILINE)
    named = {name for answer in answers for name in re.findall(r"`(\w+)`", answer)} - {"threshold", "ImportError"}
    public = {name for kind in (Contender, Peer) for name in vars(kind) if not name.startswith("_")}
    annotated = {name for kind in (Contender, Peer) for name in kind.__annotations__ if not name.startswith("_")}
    # Peers leave these as they are.
    others = {"contender", "steps_of", "identity", "with_threshold", "each_call", "is_trained"}
    assert named == (public | annotated | {"__str__"}) - others


def code_of(file):
    """The texts and names in a file of Python, without docstrings and comments; all of another file."""
    if file.suffix != ".py":
        return file.read_text()
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) in docstrings:
            node.value = ""
    return ast.unparse(tree)


def peers_in(file):
    """Names of peers in a file, in any case."""
    code = code_of(file).lower()
    peers = [kind for kind in contenders.CONTENDERS if issubclass(kind, Peer)]
    return {name for kind in peers for name in (kind.name, kind.__name__, kind.title) if name.lower() in code}


GENERAL = [
    *(path for path in (ROOT / "python/lesa/evaluation").iterdir() if path.suffix in (".py", ".html")),
    *(ROOT / "python/lesa/cli").glob("*.py"),
    ROOT / "benchmarks/studies/targets.py",
]


@pytest.mark.parametrize("file", [f for f in GENERAL if f.name != "__init__.py"], ids=lambda file: file.name)
def test_nobody_else_knows_a_peer_by_name(file):
    assert peers_in(file) == set()


def test_a_name_in_a_file_is_found():
    assert peers_in(ROOT / "python/lesa/contenders/mag_cache.py") == {"MagCache", "mag-cache"}
    assert peers_in(ROOT / "python/lesa/contenders/ours.py") == set()
    assert len(GENERAL) > 15


@pytest.mark.parametrize("kind", contenders.CONTENDERS, ids=lambda kind: kind.name)
def test_colors_are_clear_on_a_light_and_on_a_dark_page(kind):
    page = (ROOT / "python/lesa/evaluation/page/page.css").read_text()
    cards = re.findall(r"--card: (#[0-9a-f]{6});", page)
    assert len(cards) == 2

    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    for color, card in zip(kind.color, cards):
        low, high = sorted((luminance(color), luminance(card)))
        assert (high + 0.05) / (low + 0.05) >= 3, (color, card)


def test_names_are_those_that_files_and_scripts_rely_on():
    assert [kind.name for kind in contenders.CONTENDERS][:8] == [
        "reference", "newton", "dense", "taylorseer", "steps", "first-block-cache", "mag-cache", "cache-dit"
    ]  # fmt: skip
    assert contenders.Dense.title == "dense variant"
    assert contenders.against_names()[:5] == ["steps", "taylorseer", "first-block-cache", "mag-cache", "cache-dit"]


def made(name, contender, **figures):
    values = {field.name: 1.0 for field in fields(EvaluatedRun) if field.type is float}
    values |= {"per_sample": {"psnr": [30.0, 31.0]}, "num_inference_steps": 50, "steps": (0,)}
    return EvaluatedRun(**{**values, "name": name, "contender": contender, **figures})


def test_tables_are_at_most_120_columns_wide():
    label = "newton-9-a-folder-of-a-user/with/a-long-name/of-a-predictor-that-was-trained-twice"
    runs = [
        made("reference", "reference"),
        made("newton-9", "newton"),
        made(label, "newton"),
        made("taylorseer-lite-order1-interval7-warmup5", "taylorseer", seconds=12345.67, psnr=-12.34),
    ]
    why = "it fails on this model: " + "RuntimeError: a message that goes on and on, " * 8
    table = Evaluation(tuple(runs), {}, {"not_available": {"mag-cache": why}}).table().splitlines()
    assert max(map(len, table)) <= 120
    assert label in table  # alone in its line, with its figures below
    row = table[table.index(label) + 1]
    assert row.startswith(" " * 9) and row.split()[:3] == ["1", "of", "50"]
    assert len({len(line) for line in table if " of 50 " in line}) == 1
    assert " ".join(line.strip() for line in table).endswith(why.strip())
