"""`lesa.fit`: from a small pipeline to tested predictors."""

import contextlib
import copy
import importlib
import io
import json
import os
import random
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lesa
import small_pipelines as small
from interrupted_fits import BUDGET, CASE, FEW, OPTIONS, STEPS, files_in, inputs, make_quick
from lesa.fitting import samples, testing, whole
from lesa.fitting.amounts import Amounts
from lesa.fitting.bar import Bar
from lesa.fitting.comparing import LatentRuns, Made
from lesa.fitting.cost import _time
from lesa.fitting.one_budget import OneBudget
from lesa.fitting.probing import probed, steps_to_ask_for
from lesa.fitting.samples import TEST, VALIDATION, shares_of
from lesa.processes import processes_for
from lesa_kernels import FusedKANPredictor
from small_wan import EXPERTS

FILES = ["README.md", "comparison.png", "config.json", "evaluation.json", "model.safetensors", "provenance.json"]

HOST = "a-machine-of-this-name"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    make_quick(monkeypatch.setattr)


@pytest.fixture
def small_pipe():
    return CASE.build()


@dataclass
class Fitted:
    """A finished fit.

    Args:
        folder, predictor: what it made.
        seeds: of all samples in order, with the room that ran them.
        sizes: of the recordings that were trained on.
        moved: by part of the bar, how far it moved, and how far it was expected to move.
        bar: where it was at the end, and its total.
        said: what it showed.
    """

    folder: Path
    predictor: FusedKANPredictor | None = None
    seeds: list = field(default_factory=list)
    sizes: list = field(default_factory=list)
    moved: dict = field(default_factory=dict)
    bar: tuple = ()
    said: str = ""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    made = Fitted(tmp_path_factory.mktemp("fit") / "out")
    join, part = OneBudget._joined, Bar.part

    def joined(self, count):
        found = join(self, count)
        made.sizes.append(len(found))
        return found

    @contextlib.contextmanager
    def watched_part(self, name, steps):
        with part(self, name, steps):
            yield
            made.moved.setdefault(name, []).append((self._within, steps))

    def closed(self):
        made.bar = self._bar.n, self._bar.total

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as shown:
        make_quick(patch.setattr)
        patch.setattr(socket, "gethostname", lambda: HOST)
        for name in ("lesa.training.recording", "lesa.fitting.comparing", "lesa.evaluation.contest"):
            module = importlib.import_module(name)
            patch.setattr(module, "run_pipeline", watched(module.run_pipeline, name.split(".")[1], made.seeds))
        patch.setattr(OneBudget, "_joined", joined)
        patch.setattr(Bar, "part", watched_part)
        patch.setattr(Bar, "close", closed)
        options = {**OPTIONS, "progress": True}
        made.predictor = lesa.fit(CASE.build(), inputs(), budget=BUDGET, out_dir=made.folder, **options)
    made.said = shown.getvalue()
    return made


def watched(run, who, seeds):
    def noted(pipe, arguments, generators, *others):
        seeds.extend((who, generator.initial_seed()) for generator in generators)
        return run(pipe, arguments, generators, *others)

    return noted


def test_a_predictor_is_left_with_its_card_and_its_figures(fitted):
    folder, predictor = fitted.folder, fitted.predictor
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len(predictor.config.schedule) == BUDGET and predictor.config.num_inference_steps == STEPS
    loaded = FusedKANPredictor.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), predictor.parameters(), strict=True))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert [run["name"] for run in evaluation["runs"]] == ["reference", "newton-3", "universal-3", "fewer-steps-3"]
    assert [run["whole_steps"] for run in evaluation["runs"]] == [STEPS, BUDGET, BUDGET, BUDGET]
    assert evaluation["schedule"] == [*predictor.config.schedule] and evaluation["compared"] == "pictures"
    assert evaluation["inputs_are_new"] is False and evaluation["not_available"] == {}  # there are three inputs only
    assert "The inputs are not new: some of them served that too." in (folder / "README.md").read_text()
    assert "newton" in evaluation["runs"][1]["name"] and "Figures" in (folder / "README.md").read_text()


def test_no_file_says_when_or_where_it_was_made(fitted):
    folder = fitted.folder
    for name, contents in files_in(folder).items():
        for word in (str(folder), "seconds", "speed", str(time.localtime().tm_year), "host", HOST):
            word = word.encode()
            assert word not in contents, (name, word)


def test_the_test_of_a_predictor_is_that_of_evaluate(fitted, small_pipe):
    folder, predictor = fitted.folder, fitted.predictor
    evaluation = json.loads((folder / "evaluation.json").read_text())
    chosen = inputs()[-FEW.test_samples :]
    own = lesa.evaluate(small_pipe, chosen, [predictor], ["steps-3"], STEPS, TEST, batch_size=2, progress=False)
    by_name = {run["name"]: run for run in evaluation["runs"]}
    for run in own.runs[1:]:
        assert by_name[run.name.split("@")[0]]["psnr"] == run.psnr


def test_samples_for_choices_and_for_the_test_are_not_trained_on(fitted):
    seeds = fitted.seeds
    of = {who: {seed for one, seed in seeds if one == who} for who in ("training", "fitting", "evaluation")}
    assert of["training"] == set(range(4))
    assert of["fitting"] == {VALIDATION, VALIDATION + 1}
    assert of["evaluation"] == {TEST, TEST + 1}


def numbered(count):
    return [{"prompt": str(number)} for number in range(count)]


@pytest.mark.parametrize(
    "count, training, validation, test, is_new",
    [
        (160, range(144), range(144, 152), range(152, 160), True),
        (40, range(24), range(24, 32), range(32, 40), True),
        (24, range(8), range(8, 16), range(16, 24), True),
        (20, range(12), range(4, 12), range(12, 20), True),
        (15, range(15), range(7, 15), range(7, 15), False),
        (3, range(3), [0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 2, 0, 1], False),
    ],
)
def test_the_last_inputs_are_for_the_test_and_those_before_for_choices(count, training, validation, test, is_new):
    inputs = numbered(count)
    shares = shares_of(inputs, Amounts())
    for share, wanted in ((shares.training, training), (shares.validation, validation), (shares.test, test)):
        assert share == [inputs[number] for number in wanted]
    assert shares.test_is_new is is_new
    parts = samples.Samples(None, shares.training, Path(), STEPS, 1, 1, 0, Amounts(samples=160))
    assert parts.inputs_of(0, 160) == [inputs[training[number % len(training)]] for number in range(160)]


def test_inputs_of_the_test_that_equal_others_are_not_new():
    assert not shares_of([*numbered(20), *numbered(20)], Amounts()).test_is_new
    tensors = [{"prompt_embeds": torch.full((1, 2), float(number % 30))} for number in range(40)]
    assert not shares_of(tensors, Amounts()).test_is_new and shares_of(tensors[:30], Amounts()).test_is_new


def test_runs_say_what_they_computed_and_one_that_computes_more_than_its_schedule_has_no_psnr(
    fitted, small_pipe, tmp_path
):
    runs = LatentRuns(small_pipe, inputs(), 5, STEPS, 2, tmp_path, processes_for(small_pipe))
    runs.make_references()
    assert runs.references == Made(tuple(range(STEPS)), STEPS, STEPS)
    made = runs.errors(fitted.predictor)
    assert made.steps == fitted.predictor.config.schedule and made.whole_steps == made.step_equivalents == BUDGET
    assert len(made.psnr) == 3 and all(20 < psnr < 200 for psnr in made.psnr)
    broken = copy.deepcopy(fitted.predictor)
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(1e38)  # finite, but no forecast is
    with pytest.warns(RuntimeWarning, match="the forecast was not finite"):
        made = runs.errors(broken)
    assert made.whole_steps > BUDGET and all(psnr != psnr for psnr in made.psnr)


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_fewer_steps_are_as_many_as_are_executed_with_strength(budget):
    case = small.ALL["flux img2img"]
    pipe, chosen, total = case.build(), [{**inputs(case, 1)[0], "strength": 0.5}], 2 * STEPS
    assert probed(pipe, chosen, total).steps == STEPS
    asked = steps_to_ask_for(pipe, chosen, budget, total, STEPS)
    assert asked > budget and probed(pipe, chosen, asked).steps == budget
    assert probed(pipe, chosen, asked - 1).steps < budget
    assert steps_to_ask_for(pipe, chosen, budget, STEPS, STEPS) == budget


def test_it_is_said_if_inputs_do_not_allow_fewer_steps(fitted, monkeypatch, tmp_path):
    runs = SimpleNamespace(pipe=CASE.build(), inputs=[{"sigmas": [1.0, 0.5]}], steps=2, seed=0)
    monkeypatch.setattr(testing.Test, "_with_pictures", lambda self: {BUDGET: []})
    found = testing.Test(runs, {BUDGET: fitted.predictor}, tmp_path, 2, True).run()[BUDGET]
    assert found["not_available"] == {"steps": "the inputs set the steps themselves"}


def test_the_second_round_has_twice_the_samples(fitted):
    assert fitted.sizes == [2, 2, 4]


@pytest.mark.parametrize(
    "gain, psnrs, best",
    [
        (1e9, [30.0, 31.0], "1"),
        (0.1, [30.0, 30.05], "1"),
        (0.1, [30.0, 30.2, 30.25], "2"),
        (0.1, [30.0, 29.0], "first"),
        (0.1, [30.0, float("nan")], "first"),
        (-1e9, [30.0, 29.0, 31.0], "2"),
        (0.1, [float("nan"), 30.0], None),
    ],
)
def test_rounds_and_samples_end_where_they_gain_too_little(small_pipe, tmp_path, monkeypatch, gain, psnrs, best):
    kept, left = [], iter(psnrs)
    monkeypatch.setattr(whole.defaults, "AMOUNTS", replace(FEW, gain=gain))
    made = {"steps": (), "whole_steps": 3.0, "step_equivalents": 3.0}
    monkeypatch.setattr(LatentRuns, "errors", lambda self, *args, **options: Made(**made, psnr=[next(left)]))
    monkeypatch.setattr(OneBudget, "_trained", lambda self: self._joined(2) and "first")
    monkeypatch.setattr(OneBudget, "_refined", lambda self, number, before: self._joined(2 * number) and str(number))
    monkeypatch.setattr("lesa.fitting.one_budget.on_device", lambda predictor, device: predictor)
    monkeypatch.setattr(whole.Fit, "_test", lambda self, samples, fitted, bar: kept.append((fitted[BUDGET], samples)))
    monkeypatch.setattr(whole.FusedKANPredictor, "from_pretrained", lambda place: None)
    call = {"budget": BUDGET, "out_dir": tmp_path / "out", **OPTIONS}
    if best is None:
        with pytest.raises(RuntimeError, match=r"has no predictor for `budget` 3: .* it makes NaN.* another `seed`"):
            lesa.fit(small_pipe, inputs(), **call)
        assert kept == [] and not [*tmp_path.rglob("config.json")]
        return
    lesa.fit(small_pipe, inputs(), **call)
    ((found, parts),) = kept
    assert found.predictor == best and found.made["rounds"] == (0 if best == "first" else int(best))
    assert found.made["validation_psnr"] == [None if psnr != psnr else psnr for psnr in psnrs]
    assert len(parts._parts) == len(psnrs)  # one sample, the rest of the first ones, and twice as many in round 2


class Interrupted(BaseException):
    pass


def test_a_fit_that_is_interrupted_at_random_writes_goes_on(fitted, tmp_path, monkeypatch):
    """Each call gets a random number of files written, until one comes to its end."""
    pipe, chosen, replace = CASE.build(), random.Random(7), os.replace
    interruptions = 0
    while interruptions < 50:
        left = iter(range(chosen.randint(1, 40), -1, -1))

        def counted(*arguments, left=left, **options):
            if next(left) == 0:
                raise Interrupted
            return replace(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            try:
                lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=tmp_path / "out", **OPTIONS)
                break
            except Interrupted:
                interruptions += 1
    assert interruptions >= 5
    assert files_in(tmp_path / "out") == files_in(fitted.folder)


# Refusals


def test_a_finished_folder_is_refused(fitted, small_pipe):
    with pytest.raises(ValueError, match="`out_dir` must be empty or hold an unfinished fit, but got a predictor in"):
        lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=fitted.folder, **OPTIONS)


def test_a_folder_with_other_files_is_refused(small_pipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`out_dir` must be empty or hold an unfinished fit, but got files in"):
        lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("budget", [1, STEPS, [], [2, 2], "3", 2.5])
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_written(small_pipe, tmp_path, budget):
    with pytest.raises((ValueError, TypeError), match="budget"):
        lesa.fit(small_pipe, inputs(), budget=budget, out_dir=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_seed_is_refused_before_anything_is_written_if_the_test_has_no_seeds_after_it(small_pipe, tmp_path):
    with pytest.raises(ValueError, match="`seed` must be"):
        lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS, seed=2**64 - TEST - 7)
    assert [*tmp_path.iterdir()] == []
    assert torch.Generator().manual_seed(2**64 - 1)  # the last one of the largest seed


def test_predictors_for_several_budgets_are_refused_where_one_is_needed(fitted, small_pipe):
    with pytest.raises(ValueError, match=r"for 4, 2 computed steps\. Choose one .* as in `predictors\[4\]`"):
        lesa.enable_cache(small_pipe, {4: fitted.predictor, 2: fitted.predictor})


def test_a_budget_of_all_steps_that_a_run_executes_is_refused_before_anything_is_recorded(tmp_path):
    case = small.ALL["flux img2img"]
    steps = round(STEPS / case.strength)
    arguments = [{**item, "strength": case.strength} for item in inputs(case, 1)]
    with pytest.raises(ValueError, match=f"`budget` must be below the {STEPS} steps that a run of these inputs exec"):
        lesa.fit(case.build(), arguments, budget=STEPS, out_dir=tmp_path, **{**OPTIONS, "num_inference_steps": steps})
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def unfinished(small_pipe, tmp_path, monkeypatch):
    """The folder of a fit that ended after the first sample."""

    def ended(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(whole.Fit, "_fitted", ended)
        with pytest.raises(KeyboardInterrupt):
            lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    return tmp_path


def test_a_fit_goes_on_where_other_amounts_would_be_chosen(unfinished, small_pipe, monkeypatch, capsys):
    """So another kind of device can end it. It says the cost again, from the seconds of the first call."""
    before = json.loads((unfinished / "work" / "state.json").read_text())["facts"]
    seen = []

    def fitted(self, sample, work, bar):
        seen.append((self.amounts, work.amounts))
        raise KeyboardInterrupt

    monkeypatch.setattr(Amounts, "for_model", lambda self, flops, on_cpu: replace(self, samples=4))
    monkeypatch.setattr(whole.Fit, "_fitted", fitted)
    with pytest.raises(KeyboardInterrupt):
        lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=unfinished, **{**OPTIONS, "progress": True})
    assert seen == [(FEW, FEW)]
    assert json.loads((unfinished / "work" / "state.json").read_text())["facts"] == before
    said = capsys.readouterr().err
    assert f"The first sample took {_time(before['first_sample_seconds'])}." in said
    assert "An earlier call has done a part of it." in said


@pytest.mark.parametrize("contents", ["", "{", '{"settings": {}}'])
def test_a_damaged_state_is_named(unfinished, small_pipe, contents):
    (unfinished / "work" / "state.json").write_text(contents)
    with pytest.raises(ValueError, match=r"state\.json, which is damaged\. Delete .*work to begin again"):
        lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=unfinished, **OPTIONS)


def test_damaged_files_of_a_budget_are_made_again(small_pipe, tmp_path, monkeypatch):
    """They are only what the search and the validation have found."""

    def ended(self, samples, fitted, bar):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole.defaults, "AMOUNTS", replace(FEW, rounds=0))
    monkeypatch.setattr(whole.Fit, "_test", ended)
    found = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
        files = [tmp_path / "work" / f"budget-{BUDGET}" / name for name in ("schedule.json", "validation.json")]
        found.append([file.read_text() for file in files])
        for file, text in zip(files, found[-1]):
            file.write_text(text[: len(text) // 2])
    assert found[0] == found[1]


def other_weights(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] += 1
    return pipe


@pytest.mark.parametrize(
    "change, name",
    [
        ({"budget": 4}, "budget"),
        ({"budget": [BUDGET, 4]}, "budget"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 1}, "batch_size"),
        ({"num_inference_steps": 7}, "num_inference_steps"),
        ({"inputs": inputs(count=2)}, "inputs"),
        ({"pipe": other_weights}, "pipe.transformer"),
    ],
)
def test_unfinished_work_goes_on_with_the_same_arguments_only(unfinished, change, name):
    pipe = change.pop("pipe", lambda pipe: pipe)(CASE.build())
    arguments = {"inputs": inputs(), "budget": BUDGET, **OPTIONS, **change}
    before = files_in(unfinished)
    with pytest.raises(ValueError, match=rf"`{name}` must .* the unfinished fit in"):
        lesa.fit(pipe, out_dir=unfinished, **arguments)
    assert files_in(unfinished) == before


def test_blocks_that_cannot_be_counted_are_refused_before_anything_is_recorded(small_pipe, tmp_path, monkeypatch):
    adapter = type(whole.adapters_for(small_pipe)["transformer"])
    monkeypatch.setattr(adapter, "counted_modules", [torch.nn.Identity()])  # as in a graph, where no hook is called
    with pytest.raises(RuntimeError, match="whose blocks were not all seen to run"):
        lesa.fit(small_pipe, inputs(), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert [*tmp_path.iterdir()] == []


# Several budgets, other families, no pictures


@pytest.mark.slow
def test_several_budgets_are_made_from_one_recording(fitted, small_pipe, tmp_path, monkeypatch):
    """The predictor for a budget does not depend on the others."""
    folder, alone = fitted.folder, fitted.predictor
    recorded, record = [], samples.record
    monkeypatch.setattr(samples, "record", lambda *args, **options: recorded.append(1) or record(*args, **options))
    made = lesa.fit(small_pipe, inputs(), budget=[BUDGET, 2], out_dir=tmp_path, **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["budget-2", "budget-3"]
    assert [*made] == [BUDGET, 2] and [len(each.config.schedule) for each in made.values()] == [BUDGET, 2]
    assert len(recorded) == 3  # one sample, the rest of the first two, and two more
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "budget-3" / name).read_bytes() == (folder / name).read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(made[BUDGET].parameters(), alone.parameters(), strict=True))


def test_without_a_decoder_figures_are_of_latents(fitted, small_pipe, monkeypatch, tmp_path):
    small_pipe.vae = None
    monkeypatch.setattr(small_pipe, "vae_scale_factor", 8, raising=False)
    monkeypatch.setattr(whole.defaults, "AMOUNTS", replace(FEW, rounds=1))
    twelve = inputs(count=12)  # eight to train on, and two each for the choices and the test
    predictor = lesa.fit(small_pipe, twelve, budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES if name != "comparison.png"]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    pictured = json.loads((fitted.folder / "evaluation.json").read_text())
    assert [*evaluation] == [*pictured] and evaluation["inputs_are_new"] is True
    for run, other in zip(evaluation["runs"], pictured["runs"], strict=True):
        assert [*run] == [*other] and run["steps"] and run["step_equivalents"] == other["step_equivalents"]
    assert evaluation["compared"] == "latents"
    reference, ours_measured, untrained, fewer = evaluation["runs"]
    assert all(run["psnr"] is None and run["ssim"] is None for run in evaluation["runs"])
    with lesa.enable_cache(small_pipe, predictor):
        ours = [latents_of(small_pipe, twelve[10 + number], TEST + number) for number in range(FEW.test_samples)]
    wanted = [latents_of(small_pipe, twelve[10 + number], TEST + number) for number in range(FEW.test_samples)]
    psnr = [10 * (4 / (a - b).square().mean()).log10() for a, b in zip(ours, wanted)]
    assert ours_measured["latent_psnr"] == pytest.approx(float(torch.stack(psnr).mean()), abs=0.05)
    assert fewer["num_inference_steps"] == fewer["whole_steps"] == BUDGET


def latents_of(pipe, item, seed):
    arguments = {**item, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**arguments, generator=torch.Generator().manual_seed(seed), return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("has_decoder", [True, False])
def test_with_strength_fewer_steps_cost_as_much_as_the_predictor(monkeypatch, tmp_path, has_decoder):
    case = small.ALL["flux img2img"]
    pipe, total = case.build(), 2 * STEPS
    if not has_decoder:
        monkeypatch.setattr("lesa.fitting.testing.decodes", lambda pipe: False)
        monkeypatch.setattr(whole, "decodes", lambda pipe: False)
    monkeypatch.setattr(whole.defaults, "AMOUNTS", replace(FEW, rounds=1))
    arguments = [{**item, "strength": 0.5} for item in inputs(case, 2)]
    lesa.fit(pipe, arguments, budget=BUDGET, out_dir=tmp_path, **{**OPTIONS, "num_inference_steps": total})
    fewer = json.loads((tmp_path / "evaluation.json").read_text())["runs"][-1]
    asked = fewer["num_inference_steps"]
    assert asked > BUDGET and fewer["whole_steps"] == fewer["step_equivalents"] == BUDGET == len(fewer["steps"])
    assert (
        f"fewer steps, without a cache (the pipeline is asked for {asked}) | 3 |"
        in (tmp_path / "README.md").read_text()
    )


@pytest.mark.slow
def test_a_model_with_two_streams_of_calls_is_fitted(tmp_path):
    case = small.ALL["qwen cfg"]
    predictor = lesa.fit(case.build(), inputs(case), budget=BUDGET, out_dir=tmp_path, **OPTIONS)
    assert len(predictor.config.schedule) == BUDGET and sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.slow
def test_two_transformers_get_a_spread_schedule_with_the_switch_in_it(tmp_path):
    case = EXPERTS["wan 2.2 cfg"]  # the second transformer begins with step 6 of 12
    pipe = case.build()
    options = {**OPTIONS, "batch_size": 1, "num_inference_steps": 12}
    predictor = lesa.fit(pipe, [case.inputs(1)], budget=4, out_dir=tmp_path, **options)
    assert len(predictor.config.schedule) == 4 and {0, 6} < {*predictor.config.schedule}
    with lesa.enable_cache(pipe, predictor) as cache:
        case.run(pipe, steps=12)
    assert {step for stream in cache.stats.streams.values() for step in stream.computed} == {*predictor.config.schedule}


@pytest.mark.parametrize("budget", [BUDGET, np.int64(BUDGET)])
def test_nothing_is_kept_without_a_folder(small_pipe, monkeypatch, budget):
    places = []
    monkeypatch.setattr(whole.Fit, "run", lambda self, progress: places.append(self.folder.path) or {BUDGET: "made"})
    assert lesa.fit(small_pipe, inputs(), budget=budget, **OPTIONS) == "made"
    assert not places[0].exists()


def test_one_bar_moves_in_every_part_and_is_full_at_the_end(fitted):
    moved, said, (done, total) = fitted.moved, fitted.said, fitted.bar
    assert done == total
    assert {name for name, parts in moved.items() if any(within for within, _ in parts)} == {
        "record the first sample",
        "record",
        "validate",
        "test",
        *(f"3 steps, {name}" for name in ("search", "train", "validate", "round 1", "round 2")),
    }
    trained = [moved[f"3 steps, {name}"] for name in ("train", "round 1", "round 2")]
    assert all(within == steps for ((within, steps),) in trained)
    assert said.index("The first sample took") < said.index("PSNR of pictures against all steps: newton-3")


@pytest.mark.parametrize(
    "flops, on_cpu, first",
    [(1.5e10, True, 160), (5e15, False, 8), (5e13, False, 20), (5e13, True, 8)],
)
def test_more_samples_are_recorded_first_where_they_are_cheap(flops, on_cpu, first):
    amounts = Amounts().for_model(flops, on_cpu)
    assert amounts.samples == first
    assert amounts.ends[:2] == [1, first] and amounts.ends[-1] == amounts.most_samples
    assert all(amounts.samples_of(number) in amounts.ends for number in range(1, amounts.rounds + 1))
