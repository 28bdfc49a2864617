"""`benchmarks/studies/few_steps.py`, without its trainings and runs."""

import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lesa.demo.run import DEMOS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "studies" / "few_steps.py"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("steps, budget", [(8, 6), (8, 5), (4, 3)])
def test_all_schedules_are_tried(study, monkeypatch, steps, budget):
    student = study["Student"].__new__(study["Student"])
    student.demo = replace(DEMOS["few-step"], num_inference_steps=steps)
    every = student.candidates(budget)
    assert len({*every}) == math.comb(steps - 1, budget - 1)
    assert all(schedule[0] == 0 and len(schedule) == budget and schedule[-1] < steps for schedule in every)
    monkeypatch.setattr(student, "configs", lambda mixer: [mixer])
    monkeypatch.setattr(study["Student"], "score", lambda self, choice: sum(choice.steps) * (1, -1)[choice[0] == "l2p"])
    likely = student.likely(budget)
    assert {min(every, key=sum), max(every, key=sum)} <= {*likely} and len(likely) <= 6


def test_the_models_without_training_are_those_of_pictures(study):
    assert {*study["UNTRAINED_MODELS"]} == {*DEMOS} - {"video"}


def test_a_line_of_a_table(study):
    full = [torch.zeros(1, 2, 2)] * 3
    close, far = [picture + 0.1 for picture in full], [picture + 1 for picture in full]
    own, plain = study["compared"](close, full), study["compared"](far, full)
    assert own == pytest.approx([20.0] * 3) and plain == [0.0] * 3
    line = study["row"]("m", 8, 6, "linear", own, plain, (own, plain))
    assert [line[name] for name in ("psnr", "psnr_to_50_steps", "lead")] == ["20.00", "0.00", "20.00"]
