"""`benchmarks/studies/forecasters.py`, without its trainings and runs."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lesa.demo.run import DEMOS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "studies" / "forecasters.py"
OURS, OTHER = (0, 1, 5, 10, 18, 26, 34, 41, 47), (0, 3, 9, 14, 20, 26, 32, 38, 44)


@pytest.fixture(scope="module")
def study():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def workshop(study, tmp_path):
    """One that has no pipeline and no recording."""
    made = study["Workshop"].__new__(study["Workshop"])
    made.name, made.folder, made.demo = "digits", tmp_path, DEMOS["digits"]
    made._notes, made._known = tmp_path / "notes.json", {}
    return made


def test_each_schedule_has_the_options_that_are_best_with_it(study, workshop, monkeypatch):
    """The first option is best with our schedule, and the last one with another schedule, where it is better still."""
    kind = study["Workshop"]

    def score(self, choice):
        options = self.configs(choice.config.mixer)
        best = options[0] if choice.steps == OURS else options[-1]
        return (choice.config == best) + (choice.steps == OTHER)

    monkeypatch.setattr(kind, "newton", lambda self, budget: SimpleNamespace(config=SimpleNamespace(schedule=OURS)))
    monkeypatch.setattr(kind, "candidates", lambda self, budget: [OURS, OTHER])
    monkeypatch.setattr(kind, "found", lambda self, config, budget: OURS)
    monkeypatch.setattr(kind, "made", lambda self, choice: choice)
    monkeypatch.setattr(kind, "score", score)
    workshop.trajectories = SimpleNamespace(feature_dim=4)
    made, options = workshop.predictors(9), workshop.configs("taylor")
    assert len(options) > 1
    assert (made["taylor-9/newton"][0].config, made["taylor-9/newton"][1].steps) == (options[0], OURS)
    assert (made["taylor-9/best"][0].config, made["taylor-9/best"][1].steps) == (options[-1], OTHER)
    monkeypatch.setattr(kind, "candidates", lambda self, budget: [OURS])
    assert {label for label in workshop.predictors(9) if label.startswith("taylor")} == {"taylor-9/best"}


def test_bundled_predictors_are_not_copied_and_others_are_kept_by_their_schedule(study, workshop, monkeypatch):
    made = []

    def train(trajectories, pipe, inputs, more, schedule, *_):
        made.append(schedule)
        return workshop.newton(9)

    monkeypatch.setitem(study["Workshop"].newton.__globals__, "newton_predictor", train)
    workshop.trajectories = workshop.pipe = workshop.inputs = None
    assert workshop.newton(9).config.schedule == tuple(workshop.demo.schedules[9]) and made == []
    assert [*workshop.folder.iterdir()] == []
    for _ in range(2):
        workshop.newton(7)
    assert made == [tuple(workshop.demo.schedules[7])]
    workshop.demo = replace(workshop.demo, schedules={7: (0, 1, 2, 3, 4, 5, 6)})
    workshop.newton(7)
    assert made[1:] == [(0, 1, 2, 3, 4, 5, 6)]


def test_every_table_has_every_model(study):
    tables = ("VALIDATION_SAMPLES", "SAMPLES", "LESA_EPOCHS", "BUNDLED", "EARLY")
    assert [set(study[table]) for table in tables] == [set(study["SAMPLES"])] * len(tables)
    assert set(study["SAMPLES"]) <= set(DEMOS)
    for name, of_model in study["EARLY"].items():
        assert {budget: len(steps) for budget, steps in of_model.items()} == {n: n for n in DEMOS[name].schedules}
        assert set(study["BUNDLED"][name].values()) <= set(DEMOS[name].predictors)


def test_a_folder_belongs_to_the_coefficients_with_which_it_began(workshop):
    assert workshop.is_of("coefficients", "a") and workshop.is_of("coefficients", "a")
    assert not workshop.is_of("coefficients", "b")
    assert json.loads((workshop.folder / "notes.json").read_text()) == {"coefficients": "a"}
