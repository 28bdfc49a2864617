"""`lesa.fit` with training through whole runs: what it chooses, what it says, and how it goes on."""

import contextlib
import io
import json
import math
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fitting_processes
import lesa
import small_pipelines as small
from interrupted_fits import BUDGET, CASE, FEW, FEW_END_TO_END, OPTIONS, STEPS, files_in, inputs, make_quick
from lesa import cli
from lesa.cli import fit as command_of_fit
from lesa.fitting import LOSSES, whole
from lesa.fitting.amounts import EndToEndAmounts
from lesa.fitting.bar import Bar
from lesa.fitting.end_to_end import EndToEndBudget, ThroughRuns
from lesa.fitting.planning import Work
from lesa.processes import OthersEndedError, Processes
from lesa.schedule import Schedule
from lesa.training.end_to_end_run import EndToEndRun
from lesa.training.gradient_checks import NoGradientError, TrainingFailedError
from lesa.training.shards import DamagedError
from lesa_kernels import FusedKANPredictor
from small_wan import EXPERTS

LEVELS = tuple(1 - step / STEPS for step in range(STEPS))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    make_quick(monkeypatch.setattr)


# Which predictor is chosen


def named(name, steps=(0, 1, 3)):
    return SimpleNamespace(name=name, config=SimpleNamespace(schedule=steps, schedule_errors=()))


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """`chosen(figures, found)` -> what is fitted where predictors have these figures and runs find this schedule.

    The second result has the names of the predictors that were validated, and where each training began.
    """
    seen = []

    def begin(name, start):
        seen.append(f"{name} from {start.name}")
        return named(name, start.config.schedule)

    def run(figures, found=(0, 2, 4), fails=None):
        def quality(self, name, predictor):
            stage, _, _ = name.partition(" from ")  # it may begin from several stages
            seen.append(stage)
            return figures[stage]

        def fail(self, *arguments):
            raise next(iter(fails.values()))

        fakes = {
            "_trained": lambda self: named("0"),
            "_refined": lambda self, number, before: named(str(number)),
            "_quality": quality,
            "_joined": lambda self, count: SimpleNamespace(),
            "_search": lambda self, plain: SimpleNamespace(tried=lambda: {"0,2,4": 30.0, "0,1,3": 29.0}),
            "_learned": lambda self, search, plain: (named("learned", found), Schedule(found, STEPS)),
            "_trained_on": lambda self, trajectories, schedule, out_dir: named("trained again", schedule.steps),
            "_refined_on": lambda self, trajectories, folder, number, before: begin("refined again", before[-1]),
            "_through_whole_runs": lambda self, start: begin("end to end", start.predictor),
        }
        for name, fake in {**fakes, **dict.fromkeys(fails or {}, fail)}.items():
            monkeypatch.setattr(EndToEndBudget, name, fake)
        pipe = SimpleNamespace(_execution_device="cpu")
        samples = SimpleNamespace(pipe=pipe, seed=0, tokens=1, num_inference_steps=STEPS, batch_size=1)
        amounts = replace(FEW, rounds=1)
        given = ThroughRuns(FEW_END_TO_END, "latents", [{}] * 4, LEVELS, SimpleNamespace(), tmp_path)
        work = Work(amounts, STEPS, 1, 1, 1, FEW_END_TO_END, LEVELS)
        options = (BUDGET, samples, SimpleNamespace(), tmp_path, amounts, work, Bar(False), Processes())
        budget = EndToEndBudget(*options, through_runs=given)
        fitted = budget.fit()
        assert not fails or budget.bar.done > 0
        return fitted, seen

    return run


PLAIN = {"0": 30.0, "1": 31.0}


@pytest.mark.parametrize(
    ("later", "stage", "rounds", "start"),
    [
        ((32.0, 33.0, 34.0, 36.0), "end to end", 1, "refined again"),
        ((35.0, 33.0, 34.0, 36.0), "end to end", 1, "learned"),
        ((32.0, 33.0, 32.5, 36.0), "end to end", 0, "trained again"),
        ((32.0, 33.0, 34.0, 33.9), "refined again", 1, "refined again"),
        ((32.0, 33.0, 30.0, 20.0), "trained again", 0, "trained again"),
        ((36.0, 33.0, 34.0, 35.0), "schedules", 1, "learned"),
        ((30.0, 29.0, 30.5, 30.9), "rounds", 1, "refined again"),
        ((31.0, 31.0, 31.0, 31.0), "rounds", 1, "learned"),
        ((math.nan, 29.0, math.nan, math.nan), "rounds", 1, "trained again"),
        ((math.nan, math.nan, math.nan, 40.0), "end to end", 1, "learned"),
    ],
)
def test_the_best_predictor_of_all_is_chosen(chosen, later, stage, rounds, start):
    names = ("schedules", "trained again", "refined again", "end to end")
    fitted, seen = chosen({**PLAIN, **dict(zip(names, later))})
    made = fitted.made
    assert (made["stage"], made["rounds"]) == (stage, rounds)
    assert fitted.predictor.name == {"rounds": "1", "schedules": "learned"}.get(stage, stage)
    assert f"end to end from {start}" in seen and "refined again from trained again" in seen
    figures = {"rounds": 31.0, **dict(zip(names, later))}
    assert made["validation_by_stage"] == {k: None if math.isnan(v) else v for k, v in figures.items()}
    assert figures[stage] == max(each for each in figures.values() if not math.isnan(each)) >= max(PLAIN.values())
    assert made["validation_psnr"] == [30.0, 31.0] and made.get("schedules_tried") == (None if stage == "rounds" else 2)


@pytest.mark.parametrize(("learned", "start"), [(30.0, "1"), (31.0, "learned"), (32.0, "learned")])
def test_for_the_schedule_that_was_there_before_nothing_is_trained_again(chosen, learned, start):
    fitted, seen = chosen({**PLAIN, "schedules": learned, "end to end": 33.0}, found=(0, 1, 3))
    assert seen == ["0", "1", "schedules", f"end to end from {start}", "end to end"]
    assert fitted.made["stage"] == "end to end" and [*fitted.made["validation_by_stage"]][0] == "rounds"


ALL = {**PLAIN, "schedules": 32.0, "trained again": 33.0, "refined again": 34.0, "end to end": 36.0}


@pytest.mark.parametrize(
    ("failing", "stage", "made_of", "began_from"),
    [
        (["_learned"], "end to end", ["rounds", "end to end"], "rounds"),
        (["_search"], "end to end", ["rounds", "end to end"], "rounds"),
        (["_trained_on"], "end to end", ["rounds", "schedules", "end to end"], "schedules"),
        (["_through_whole_runs"], "refined again", ["rounds", "schedules", "trained again", "refined again"], None),
        (["_learned", "_through_whole_runs"], "rounds", ["rounds"], None),
    ],
)
@pytest.mark.parametrize("kind", [TrainingFailedError, NoGradientError])
def test_where_a_part_fails_the_best_of_the_other_predictors_is_chosen(
    chosen, failing, stage, made_of, began_from, kind
):
    with pytest.warns(RuntimeWarning, match=f"for `budget` {BUDGET}, `lesa.fit` goes on without .*: it is not") as seen:
        fitted, _ = chosen(ALL, fails=dict.fromkeys(failing, kind("it is not finite")))
    assert len(seen) == len(failing)
    made = fitted.made
    assert made["stage"] == stage and [*made["validation_by_stage"]] == made_of
    assert made.get("began_from") == began_from
    assert ("schedules_tried" in made) == ("schedules" in made_of and stage != "rounds")
    assert ("updates_end_to_end" in made) == (stage == "end to end")


def test_errors_that_the_same_call_can_mend_are_raised(chosen):
    errors = OthersEndedError("process 1 has ended"), DamagedError(Path("a/b"), "is missing"), OSError("full")
    for error in (*errors, torch.OutOfMemoryError("too large"), ValueError("the checkpoint is damaged")):
        with pytest.raises(type(error)):
            chosen(ALL, fails={"_learned": error})


def test_each_predictor_has_the_facts_that_led_to_it(chosen):
    through = {"schedules_tried", "updates_on_schedules", "samples_end_to_end", "samples_per_update"}
    for stage, samples, rounds, more in (
        ("rounds", 2, 1, set()),
        ("schedules", 2, 1, {*through, "began_from"}),
        ("trained again", 2, 0, through),
        ("refined again", 2, 1, through),
        ("end to end", 2, 1, {*through, "began_from", "updates_end_to_end"}),
    ):
        made = chosen({**ALL, **({"1": 50.0} if stage == "rounds" else {stage: 50.0})})[0].made
        assert (made["stage"], made["samples"], made["rounds"]) == (stage, samples, rounds)
        known = {*through, "began_from", "updates_end_to_end"}
        assert known & {*made} == more


# How much is done


@pytest.mark.parametrize(
    ("flops", "on_cpu", "wanted"),
    [
        (1.5e10, True, EndToEndAmounts()),
        (2e10, True, EndToEndAmounts()),
        (3e14, False, EndToEndAmounts()),
        (6e14, False, EndToEndAmounts(50, 100, 4, 30, 16)),
        (5e15, False, EndToEndAmounts(32, 48, 2, 12, 4)),
        (1e12, True, EndToEndAmounts(32, 48, 2, 12, 4)),
    ],
)
def test_less_is_done_for_large_models(flops, on_cpu, wanted):
    assert EndToEndAmounts(100, 200, 8, 60, 32).for_model(flops, on_cpu) == wanted
    assert FEW_END_TO_END.for_model(flops, on_cpu) == FEW_END_TO_END


# Refusals


def test_a_pipeline_that_gradients_cannot_pass_is_refused_before_anything_is_recorded(tmp_path):
    case = EXPERTS["wan 2.2 cfg"]
    options = {**OPTIONS, "num_inference_steps": 12, "out_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="`pipe` must have one transformer.* transformer and transformer_2"):
        lesa.fit(case.build(), [case.inputs(1)], budget=4, end_to_end=True, **options)
    assert not (tmp_path / "out").exists()


def test_losses_that_cannot_be_computed_are_refused(tmp_path):
    pipe, options = CASE.build(), {"budget": BUDGET, "out_dir": tmp_path / "out", **OPTIONS}
    with pytest.raises(ValueError, match="`loss` is that of a training through whole runs. Set `end_to_end`"):
        lesa.fit(pipe, inputs(), loss="pixels", **options)
    for given in ("no", 1, None):
        with pytest.raises(TypeError, match="`end_to_end` must be True or False"):
            lesa.fit(pipe, inputs(), end_to_end=given, **options)
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer of at least 3"):
        lesa.fit(pipe, inputs(), **{**options, "num_inference_steps": 2})
    with pytest.raises(ValueError, match="`loss` must be"):
        lesa.fit(pipe, inputs(), loss="lpips", end_to_end=True, **options)
    pipe.vae = None
    with pytest.raises(TypeError, match="`pipe` must have a VAE, so that pictures can be compared"):
        lesa.fit(pipe, inputs(), loss="pixels", end_to_end=True, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_has_the_same_losses_and_refuses_them_before_it_loads_the_model(tmp_path, capsys):
    assert command_of_fit.LOSSES == LOSSES
    command = ["fit", "--model", str(tmp_path / "none"), "--budget", "3", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main([*command, "--loss", "pixels"])
    wanted = "`--loss` is that of a training through whole runs. Set `--end-to-end`, or leave it out."
    assert wanted in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("before", "after"), [({}, {"end_to_end": True}), ({"end_to_end": True}, {})])
def test_unfinished_work_goes_on_with_the_same_choice_only(tmp_path, monkeypatch, before, after):
    def stop(*_):
        raise KeyboardInterrupt

    pipe, call = CASE.build(), {"budget": BUDGET, "out_dir": tmp_path, **OPTIONS}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(whole.Fit, "_fitted", stop)
        lesa.fit(pipe, inputs(), **call, **before)
    wanted, got = (bool(options) for options in (before, after))
    with pytest.raises(ValueError, match=f"`end_to_end` must be {wanted}, as in the unfinished fit in .* got {got}"):
        lesa.fit(pipe, inputs(), **call, **after)


def test_a_fit_that_an_earlier_version_has_begun_goes_on(tmp_path, monkeypatch):
    pipe, call, begun = CASE.build(), {"budget": BUDGET, "out_dir": tmp_path, **OPTIONS}, []

    def stop(*_):
        begun.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(whole.Fit, "_fitted", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            lesa.fit(pipe, inputs(), **call)
        state = json.loads((tmp_path / "work" / "state.json").read_text())
        for name in ("end_to_end", "loss", "amounts_end_to_end"):
            state["settings"].pop(name, None)  # which it did not have
        (tmp_path / "work" / "state.json").write_text(json.dumps(state))
    assert len(begun) == 2


# The whole


THROUGH_RUNS = ("train on many schedules", "train end to end")


class Interrupted(BaseException):
    pass


@pytest.fixture
def moved(monkeypatch):
    """By the name of each part of the bar: how many steps were done, and how many were expected."""
    found, names, part, step = {}, [], Bar.part, Bar.step

    @contextlib.contextmanager
    def watched(self, name, steps):
        with part(self, name, steps):
            names.append(name)
            found[name] = [0, steps]
            yield

    def counted(self):  # `step` stops where no more are expected
        if threading.get_ident() == self._thread:
            found[names[-1]][0] += 1
        step(self)

    monkeypatch.setattr(Bar, "part", watched)
    monkeypatch.setattr(Bar, "step", counted)
    return found


@pytest.mark.slow
def test_a_fit_through_whole_runs_is_never_worse_and_goes_on_after_interruptions(tmp_path, monkeypatch, moved):
    """Each call after the first gets a random number of files written, until one comes to its end."""
    monkeypatch.setattr(whole.defaults, "AMOUNTS", replace(FEW, rounds=1, updates=2, round_updates=2))
    pipe = CASE.build()
    lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path / "plain", **OPTIONS)
    plain = json.loads((tmp_path / "plain" / "evaluation.json").read_text())["made"]["validation_psnr"]
    call = {"budget": BUDGET, "end_to_end": True, **OPTIONS}
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        predictor = lesa.fit(pipe, inputs(), out_dir=tmp_path / "whole", **{**call, "progress": True})
    assert "schedules" in shown.getvalue() and "training through whole runs" in shown.getvalue()
    for name in THROUGH_RUNS:
        done, expected = moved[f"3 steps, {name}"]
        assert done == expected > 0
    made = json.loads((tmp_path / "whole" / "evaluation.json").read_text())["made"]
    figures = made["validation_by_stage"]
    assert made["validation_psnr"] == plain and figures["rounds"] == max(plain)  # the predictor without it is there too
    assert figures[made["stage"]] == max(figures.values()) >= max(plain)
    assert len(predictor.config.schedule) == len(predictor.config.schedule_errors) == BUDGET
    wanted, chosen, replaced, interruptions = files_in(tmp_path / "whole"), random.Random(3), os.replace, 0
    while interruptions < 30:
        left = iter(range(chosen.randint(25, 60), -1, -1))

        def counted(*arguments, left=left, **options):
            if next(left) == 0:
                raise Interrupted
            return replaced(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            try:
                lesa.fit(pipe, inputs(), out_dir=tmp_path / "out", **call)
                break
            except Interrupted:
                interruptions += 1
    assert interruptions >= 2
    assert files_in(tmp_path / "out") == wanted
    assert "--end-to-end --loss latents" in wanted["README.md"].decode()


@pytest.mark.slow
def test_where_training_through_whole_runs_fails_the_predictor_of_the_rounds_is_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(whole.defaults, "AMOUNTS", replace(FEW, rounds=0, updates=2, round_updates=2))
    monkeypatch.setattr(EndToEndRun, "_loss_of", lambda self, run, samples: run.latents[run.last].sum() * math.nan)
    options = {"budget": BUDGET, "end_to_end": True, "out_dir": tmp_path, **OPTIONS}
    with pytest.warns(RuntimeWarning, match="goes on without .*`loss` must stay finite, but got nan") as seen:
        predictor = lesa.fit(CASE.build(), inputs(), **options)
    assert sum("goes on without" in str(each.message) for each in seen) == 2
    made = json.loads((tmp_path / "evaluation.json").read_text())["made"]
    assert made["validation_by_stage"] == {"rounds": made["validation_psnr"][0]} and made["stage"] == "rounds"
    assert predictor.config.schedule_errors is not None
    assert "- this predictor was not trained through whole runs\n" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_two_processes_share_the_runs_and_make_what_one_makes(tmp_path):
    paths = os.pathsep.join([*filter(None, sys.path), str(Path(fitting_processes.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, fitting_processes.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (alone,), two = (json.loads(line)["said"] for line in done.stdout.splitlines() if line.startswith("{"))
    assert "error" not in alone, alone
    assert [said["schedule"] for said in two] == [alone["schedule"]] * 2
    assert [said["runs"] for said in two] == [alone["runs"] / 2] * 2  # without gradients
    assert files_in(tmp_path / "of-2") == files_in(tmp_path / "of-1") != {}


@pytest.mark.slow
def test_pixels_and_two_streams(tmp_path, monkeypatch, moved):
    monkeypatch.setattr(whole.defaults, "AMOUNTS", replace(FEW, rounds=0, updates=2, round_updates=2))
    monkeypatch.setattr(whole.defaults, "END_TO_END", EndToEndAmounts(1, 1, 2, 0, 1))
    case, options = small.ALL["qwen cfg"], {**OPTIONS, "end_to_end": True, "loss": "pixels", "out_dir": tmp_path}
    made = lesa.fit(case.build(), inputs(case), budget=2, **options)
    assert len(made.config.schedule) == 2 and "--loss pixels" in (tmp_path / "README.md").read_text()
    assert all(moved[f"2 steps, {name}"] == [2 * STEPS + 1] * 2 for name in THROUGH_RUNS)
    same = FusedKANPredictor.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), made.parameters(), strict=True))
