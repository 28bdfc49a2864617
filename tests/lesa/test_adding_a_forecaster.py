"""A forecaster is one class: the example of the page runs, and nothing in `lesa` knows a forecaster by name."""

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import lesa
from forecasts import TRANSCRIPTIONS
from lesa import cli, contenders
from lesa.contenders.ours import COLORS, ours_of
from lesa.training.batches import Batch, Head, Plan, predict
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import FORECASTERS, Forecaster, register
from made_recordings import write_recording

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-a-forecaster.md"
TEMPORARY = "damped"


def test_the_example_of_the_page_works(registry, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 30  # with imports, and with what uses it
    module = types.ModuleType("damped")
    monkeypatch.setitem(sys.modules, "damped", module)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "damped.py", "exec"), vars(module))
    assert module.cache.stats.predicted_steps == 8 and module.image.size == (16, 16)
    run, searched = [run for run in module.evaluation.runs if run.contender == TEMPORARY]
    assert re.fullmatch("damped-4@[0-9a-f]{8}", run.name) and run.predictor and searched.predictor is None
    assert (run.is_ours, run.whole_steps, searched.is_ours, searched.whole_steps) == (True, 4, True, 4)
    assert module.evaluation.facts["searched"][TEMPORARY]["budgets"][0]["run"] == searched.name
    assert run.setting.startswith("damped, damping 0.8, steps 0,") and 15 < run.psnr < 100
    assert len(module.found.steps) == 4
    table, html = capsys.readouterr().out, (tmp_path / "evaluation/report.html").read_text()
    assert "\ndamped-4@" in table and "damped line" in html and "--c-damped: #" in html
    # What the words of the page say of the formula.
    ring = module.predictor.make_ring(1, 2, feature_dim=3)
    features = torch.randn(2, 1, 2, 3)
    for feature, level in zip(features, (1.0, 0.8)):
        ring.push(feature, level)
    expected = features[1] + 0.8 * 0.5 * (features[1] - features[0])
    torch.testing.assert_close(module.predictor(ring, 0.7), expected)
    module.predictor.save_pretrained(tmp_path / "saved")
    assert FusedKANPredictor.from_pretrained(tmp_path / "saved").config == module.predictor.config


def test_the_page_names_what_a_class_can_say():
    named = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    public = {name for name in vars(Forecaster) if not name.startswith("_")}
    public |= {name for name in Forecaster.__annotations__ if not name.startswith("_")}
    with_arguments = {"read", "weights"}
    assert public - {"step_weights", "weights_in"} - with_arguments <= named


def test_each_forecaster_is_a_contender_with_a_colour_of_its_own(registry):
    for number in range(2 * len(COLORS)):
        text = {"name": f"made-up{number}x", "title": f"made up {number}", "__abstractmethods__": frozenset()}
        kind = type(f"MadeUp{number}", (Forecaster,), {**text, "history_length": None, "weights": None})
        FORECASTERS[kind.name] = kind()
    ours = [ours_of(forecaster) for forecaster in FORECASTERS.values()]
    assert len({kind.color for kind in ours}) == len(ours) > 20
    last = contenders.every_contender()[-1]
    assert last is ours[-1] and contenders.kind_of(last.name) is last
    assert contenders.order_of(last.name) == len(contenders.every_contender()) - 2


def made_up(name, title):
    """An instance of a class `MadeUp`, each time of another one, as in a notebook whose cell runs again."""
    parts = {"name": name, "title": title, "history_length": lambda self, config: 1, "weights": None}
    return register(type("MadeUp", (Forecaster,), parts)())


def imported_again():
    """The module `lesa.contenders` as it would be if it were imported now for the first time."""
    found = importlib.util.spec_from_file_location("contenders_again", contenders.__file__)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("name", "title", "message"),
    [
        ("steps", "mine", r"`MadeUp\.name` must differ from that of the contender FewerSteps, but got 'steps'"),
        (
            "mine",
            "TaylorSeer",
            r"`MadeUp\.title` must differ from that of the contender TaylorSeer, but got 'TaylorSeer'",
        ),
    ],
)
def test_a_forecaster_with_the_texts_of_another_contender_is_refused(registry, name, title, message, is_first):
    """By its name, whether it was registered before the contenders are imported or after that."""
    if is_first:
        made_up(name, title)
    module = imported_again()
    if not is_first:
        made_up(name, title)
    predictor = FusedKANPredictor(PredictorConfig(mixer=name))
    for call in (module.every_contender, lambda: module.ours_with(predictor, None), lambda: module.kind_of("newton")):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_forecaster_that_is_defined_again_has_its_new_title(registry, is_first):
    if is_first:
        made_up("mine", "old")
    module = imported_again()
    assert [kind.name for kind in module.CONTENDERS] == [kind.name for kind in contenders.CONTENDERS]
    if not is_first:
        made_up("mine", "old")
    assert module.kind_of("mine").title == "old"
    made_up("mine", "new")
    ours = module.ours_with(FusedKANPredictor(PredictorConfig(mixer="mine")), None)
    assert module.kind_of("mine").title == ours.title == "new"


# Nobody knows a forecaster by name

KNOWING = {
    "contenders/__init__.py": {"Newton", "Dense"},  # which files of users import
    "demo/run.py": {"newton", "dense"},  # the bundled predictors
    "demo/make_weights.py": {"newton"},
    "cli/train.py": {"newton", "l2p"},  # a help, which needs no torch; see the test of it
    "models/aura_flow.py": {"linear"},  # the layer
    "models/final_layer.py": {"linear"},
    "models/heads.py": {"linear"},
    "cli/__init__.py": {"lesa"},  # the command
    "conditions.py": {"lesa"},  # the package
    "cache/placement.py": {"lesa"},  # the hook
    "training/shards.py": {"lesa"},  # the metadata
}
WORDS = {"dense", "linear", "universal", "lesa"}  # these names are words that mean something else too


def names_in(file):
    """Names of mixers and of their classes in a file, without its docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts, identifiers = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            texts.append(node.value)
        elif isinstance(node, ast.Name):
            identifiers.add(node.id)
        elif isinstance(node, (ast.ClassDef, ast.alias)):
            identifiers.add(node.name)
    found = {type(forecaster).__name__ for forecaster in FORECASTERS.values()} & identifiers
    for name in FORECASTERS:
        said = rf"\b{name}(?= predictor| variant| mixer|'s\b|-\d)" if name in WORDS else rf"\b{name}\b"
        if any(re.search(said, text) or text == name for text in texts) or name in identifiers - WORDS:
            found.add(name)
    return found


FILES = sorted((ROOT / "python/lesa").rglob("*.py"))


def test_nobody_knows_a_forecaster_by_name():
    found = {str(file.relative_to(ROOT / "python/lesa")): names for file in FILES if (names := names_in(file))}
    assert found == KNOWING


@pytest.mark.parametrize("name", [*FORECASTERS])
def test_a_comparison_with_a_name_is_found(tmp_path, name):
    file = tmp_path / "some.py"
    file.write_text(f"if mixer == {name!r}:\n    pass\n")
    assert names_in(file) == {name}


def test_the_help_of_train_names_the_mixers_that_can_be_trained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    (said,) = re.findall(r"kind of predictor: (.*?) \(default: (\w+)\)", " ".join(capsys.readouterr().out.split()))
    trained = [name for name, forecaster in FORECASTERS.items() if forecaster.is_trained]
    assert re.split(", | or ", said[0]) == trained and said[1] == PredictorConfig(8).mixer


def test_the_predictor_knows_no_forecaster_by_name():
    for file in ("predictor/module.py", "predictor/config.py", "predictor/uploads.py", "forecasters/base.py"):
        # The default of `PredictorConfig.mixer`, and what format version 1 knows.
        known = {"newton", "dense"} if file == "predictor/config.py" else {"newton"}
        assert names_in(ROOT / "lesa_kernels" / file) <= known, file
    assert names_in(ROOT / "lesa_kernels/predictor/module.py") == set()
    assert {"newton", "Newton"} <= names_in(ROOT / "lesa_kernels/forecasters/newton.py")


# Training and search


@pytest.fixture
def trajectories(tmp_path):
    return write_recording(tmp_path / "recording", samples=3, shifts=(3.0,))


def test_what_has_nothing_to_train_says_so(trajectories):
    config = PredictorConfig(trajectories.feature_dim, "taylor")
    with pytest.raises(ValueError, match=r"`config\.mixer` must be one that has something to train, but got 'taylor'"):
        lesa.train(trajectories, config, 4)
    with pytest.raises(ValueError, match=r"`predictor\.config\.mixer` must be one that has something to train"):
        lesa.refine(FusedKANPredictor(config), trajectories, None, ["a"])
    with pytest.raises(ValueError, match=r"`config\.mixer` must be 'newton' for stages to be found, but got 'taylor'"):
        lesa.find_stages(trajectories, 4, config)


def test_forecasts_of_recorded_steps_are_from_the_times_of_the_recording(trajectories):
    batch = Batch([trajectories[0]], Head(trajectories, "cpu"), None, None, "cpu")
    total = len(batch.sigmas)
    predictor = FusedKANPredictor(PredictorConfig(mixer="taylor", options={"order": 2}))
    plan = Plan([0, 2, 3], total, predictor.config.max_history)
    forecasts = predict(predictor, batch, plan, batch.features)
    for step, forecast in zip(plan.steps, forecasts, strict=True):
        before = [c for c in (3, 2, 0) if c < step]
        weights = TRANSCRIPTIONS["taylor"]({"order": 2}, [], None, before, step, total)
        expected = sum(weight * batch.features[c] for weight, c in zip(weights, before))
        torch.testing.assert_close(forecast.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_a_schedule_is_searched_without_training(trajectories):
    predictor = FusedKANPredictor(PredictorConfig(mixer="chebyshev"))
    searched = lesa.search_schedule(trajectories, predictor, 4, progress=False)
    found = lesa.find_schedule(trajectories, 4, predictor.config, progress=False)
    assert len(found.steps) == 4 and found == searched
