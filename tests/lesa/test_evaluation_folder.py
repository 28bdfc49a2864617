"""Several evaluations into one folder: nothing is mixed or replaced in silence, and interruptions cost nothing.

The figures of a contender never depend on what else the folder has.
"""

import contextlib
import errno
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lesa
import small_pipelines as small
from lesa.artifacts import digest, owned
from lesa.contenders import FewerSteps, FirstBlockCache, TaylorSeer
from lesa.evaluation import store as store_module
from lesa.evaluation.contest import Contest
from lesa.evaluation.naming import unique_names
from lesa.evaluation.result import Evaluation
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 6
SIGMAS = (1.0, 0.8, 0.6)


@pytest.fixture(scope="module")
def shared():
    return small.ALL["flux"].build()


@pytest.fixture
def pipe(shared):
    """One for all tests; those that change it take a new one."""
    yield shared
    lesa.disable_cache(shared)


@pytest.fixture
def no_picture(monkeypatch):
    """Without `comparison.png`, which takes most of the time."""
    monkeypatch.setattr("lesa.evaluation.result.draw_comparison", lambda runs, images, file: file.touch())


def predictor(seed=0, **options):
    """One whose forecasts depend on the seed."""
    known = {"num_inference_steps": STEPS, "schedule": (0, 1, 2), "schedule_sigmas": SIGMAS}
    torch.manual_seed(seed)
    made = FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4, family="flux", **{**known, **options}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


INPUTS = [small.ALL["flux"].inputs(1)]
A, B, OTHER_A = predictor(1), predictor(2), predictor(3)


def evaluate(pipe, folder, predictors, against=(), **options):
    arguments = {"inputs": INPUTS, "num_inference_steps": STEPS, "progress": False, **options}
    return lesa.evaluate(pipe, arguments.pop("inputs"), predictors, against, out_dir=folder, **arguments)


UNTIMED = {"seconds": 1, "denoise_seconds": 1, "speedup": 1, "reference_seconds": 1}


def untimed(evaluation):
    """By name, the figures that do not depend on time, and the pictures."""
    return {run.name: (repr(replace(run, **UNTIMED)), evaluation.images[run.name].tobytes()) for run in evaluation.runs}


def unnamed(evaluation):
    """The same by contender, predictor and setting, without names, which tell what else there is."""
    return {
        (run.contender, run.predictor, run.setting): (
            repr(replace(run, **UNTIMED, name="")),
            evaluation.images[run.name].tobytes(),
        )
        for run in evaluation.runs
    }


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


# Names


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([("newton-9", "/x/a")], ["newton-9"]),
        ([("newton-9", "/x/a"), ("newton-8", "/x/b")], ["newton-9", "newton-8"]),
        ([("newton-9", "/x/a"), ("newton-9", "/x/b")], ["newton-9@a", "newton-9@b"]),
        ([("newton-9", "/x/p"), ("newton-9", "/y/p")], ["newton-9@x/p", "newton-9@y/p"]),
        ([("newton-9", "/1/x/p"), ("newton-9", "/2/x/p"), ("newton-9", "/q")],
         ["newton-9@1/x/p", "newton-9@2/x/p", "newton-9@q"]),
        ([("newton-9", "p"), ("newton-9", "x/p")], ["newton-9@p", "newton-9@x/p"]),
        ([("newton-9", None), ("newton-9", "/x/p")], ["newton-9", "newton-9@p"]),
        ([("dense-9", "/x/p"), ("newton-9", "/x/p")], ["dense-9", "newton-9"]),
        ([("newton-9", "user/p"), ("newton-9", "/home/user/p")], ["newton-9@user/p", "newton-9@home/user/p"]),
        ([("newton-9", "."), ("newton-9", "")], ["newton-9@.", "newton-9@"]),
    ],
)  # fmt: skip
def test_a_shared_name_is_followed_by_as_much_of_the_folder_as_is_needed(runs, names):
    assert unique_names(runs) == names
    assert unique_names(runs[::-1]) == names[::-1]


@pytest.mark.slow
def test_names_do_not_depend_on_the_order_or_on_the_number_of_commands(pipe, tmp_path, no_picture):
    a, b = {"/runs/1/p": A}, {"/runs/2/p": B}
    wanted = {"reference", "newton-3@1/p", "newton-3@2/p"}
    at_once = [evaluate(pipe, tmp_path / name, p) for name, p in (("ab", {**a, **b}), ("ba", {**b, **a}))]
    one_by_one = []
    for name, first, second in (("a b", a, b), ("b a", b, a)):
        alone = evaluate(pipe, tmp_path / name, first)
        assert [run.name for run in alone.runs] == ["reference", "newton-3"]
        one_by_one.append(evaluate(pipe, tmp_path / name, second))
    for evaluation in (*at_once, *one_by_one):
        assert {run.name for run in evaluation.runs} == wanted
        assert untimed(evaluation) == untimed(at_once[0])
    for name in ("ab", "ba", "a b", "b a"):
        summary = summary_of(tmp_path / name)
        assert {run["name"] for run in summary["runs"]} == wanted == summary["images"].keys()
        by_name = {run["name"]: run["predictor"] for run in summary["runs"]}
        assert by_name == {"reference": None, "newton-3@1/p": "/runs/1/p", "newton-3@2/p": "/runs/2/p"}


@pytest.mark.slow
def test_predictors_of_a_list_are_named_by_their_weights(pipe, tmp_path):
    forward, backward = (evaluate(pipe, None, predictors) for predictors in ([A, B], [B, A, B]))
    assert untimed(forward) == untimed(backward)
    assert all(re.fullmatch("newton-3@[0-9a-f]{8}", run.name) for run in forward.runs[1:])
    assert evaluate(pipe, None, [A]).runs[1].name == "newton-3"
    with pytest.raises(ValueError, match="`predictors` must have different names, but got '1' twice"):
        evaluate(pipe, None, {1: A, "1": B})


# Another command into the same folder


@pytest.mark.slow
def test_another_predictor_is_added_and_the_earlier_families_stay(pipe, tmp_path, capsys):
    evaluate(pipe, tmp_path, {"a": A}, [TaylorSeer(3), "steps-3", "first-block-cache-4"], search_samples=1)
    before = summary_of(tmp_path)
    second = evaluate(pipe, tmp_path, {"b": B}, progress=True)
    assert f"{tmp_path} has runs of earlier commands, which are kept: newton-3, " in capsys.readouterr().err
    after = summary_of(tmp_path)
    names = [run["name"] for run in after["runs"]]
    assert names[:3] == ["reference", "newton-3@b", "newton-3@a"]
    assert {*names[3:]} == {run["name"] for run in before["runs"]} - {"reference", "newton-3"}
    assert after["searched"] == before["searched"] and after["searched"]["first-block-cache"]["budgets"][0]["run"]
    old, new = ({run["name"].partition("@a")[0]: run for run in s["runs"][1:]} for s in (before, after))
    own = ("seconds", "speedup", "reference_seconds", "psnr", "per_sample", "predictor")
    assert all(old[name][key] == new[name][key] for name in old for key in own)
    assert new["newton-3@b"]["reference_seconds"] == after["runs"][0]["seconds"] != old["newton-3"]["reference_seconds"]
    # The table, the summary and the page agree.
    assert [run.name for run in second.runs] == names
    table = second.table()
    assert "Kept from earlier commands: newton-3@a, " in table and "their speed-ups refer" in " ".join(table.split())
    shown = {run.name for run in second.shown}
    assert shown == {line.split("  ")[0] for line in table.splitlines() if line.split("  ")[0] in names}
    page = lesa.report(tmp_path).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [run["name"] for run in data["runs"]] == names[1:]
    assert {run["name"]: run["speedup"] for run in data["runs"]} == {r.name: r.speedup for r in second.runs[1:]}
    assert {*after["images"]} >= {"newton-3@a", "newton-3@b"}
    for name, files in after["images"].items():
        pixels = np.stack([np.asarray(small_image(tmp_path / file)) for file in files])
        assert np.abs(pixels / 255 - second.images[name]).max() < 0.5 / 255 + 1e-6, name
    # A third command, which has nothing to run, says the same.
    third = evaluate(pipe, tmp_path, {"b": B})
    assert third.summary() == second.summary()


def small_image(file):
    from PIL import Image

    return Image.open(file)


@pytest.mark.slow
def test_a_predictor_trained_again_replaces_its_own_run_only(pipe, tmp_path, capsys):
    first = evaluate(pipe, tmp_path, {"a": A, "b": B})
    again = evaluate(pipe, tmp_path, {"a": OTHER_A}, progress=True)
    said = "a has another predictor or another schedule than before: newton-3@a is replaced"
    assert said in capsys.readouterr().err
    assert "Replaced newton-3@a: a now has another predictor or another schedule than before." in again.table()
    assert unnamed(again) == unnamed(evaluate(pipe, None, {"a": OTHER_A, "b": B}))
    assert not np.array_equal(first.images["newton-3@a"], again.images["newton-3@a"])
    stored = np.asarray(small_image(tmp_path / summary_of(tmp_path)["images"]["newton-3@a"][0]))
    assert np.abs(stored / 255 - again.images["newton-3@a"][0]).max() < 0.5 / 255 + 1e-6
    back = evaluate(pipe, tmp_path, {"a": A})
    assert unnamed(back) == unnamed(first)


@pytest.mark.slow
def test_a_predictor_of_another_kind_in_the_same_folder_replaces_the_one_before(pipe, tmp_path, no_picture):
    evaluate(pipe, tmp_path, {"a": A})
    dense = evaluate(pipe, tmp_path, {"a": predictor(4, mixer="dense")})
    assert [run.name for run in dense.runs] == ["reference", "dense-3"]
    assert "Replaced newton-3: a now" in dense.table()


@pytest.mark.slow
def test_searches_with_other_budgets_are_both_in_the_summary(pipe, tmp_path, no_picture):
    for budget in (5, 3):
        found = evaluate(pipe, tmp_path, {}, [f"first-block-cache-{budget}"], search_samples=1)
    rows = found.facts["searched"]["first-block-cache"]["budgets"]
    assert [(row["budget"], row["by"][:4]) for row in rows] == [(3, "step"), (3, "whol"), (5, "step"), (5, "whol")]
    assert all(getattr(found[row["run"]], row["by"]) <= row["budget"] for row in rows if row["run"])
    assert sum(row["run"] is not None for row in rows) >= 3


@pytest.mark.slow
def test_settings_of_equal_text_in_two_commands_have_names_of_their_own(pipe, tmp_path, no_picture):
    twins = [FirstBlockCache(0.44001), FirstBlockCache(0.44004)]
    alone = evaluate(pipe, tmp_path, {}, twins[:1])
    both = evaluate(pipe, tmp_path, {}, twins[1:])
    assert alone.runs[1].name == "first-block-cache-threshold0.44"
    assert {run.name for run in both.runs[1:]} == {
        f"first-block-cache-threshold0.44@{digest(twin.identity())[:8]}" for twin in twins
    }
    assert {run.name for run in evaluate(pipe, None, {}, twins[::-1]).runs} == {run.name for run in both.runs}


@pytest.mark.slow
def test_a_change_that_is_not_compared_is_seen_at_the_reference(tmp_path, no_picture):
    """Here a hook, as most hooks only watch a run."""
    pipe = small.ALL["flux"].build()
    evaluate(pipe, tmp_path, {"a": A})
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    hook = pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(RuntimeError, match="The reference gives other samples than those .* PSNR between them is"):
        evaluate(pipe, tmp_path, {"b": B})
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files
    hook.remove()
    evaluate(pipe, tmp_path, {"b": B})


@pytest.mark.slow
def test_the_scale_of_an_adapter_is_compared(tmp_path, no_picture):
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = small.ALL["flux"].build()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    evaluate(pipe, tmp_path, {})
    pipe.transformer.set_adapters(["one"], [0.5])
    with pytest.raises(ValueError, match="`adapters.transformer.one` must be"):
        evaluate(pipe, tmp_path, {})


@pytest.mark.slow
def test_the_order_of_a_schedulers_default_settings_changes_nothing(tmp_path, no_picture, monkeypatch):
    """Python gives them in another order in every process."""
    pipe = small.ALL["flux"].build()
    names = pipe.scheduler.config["_use_default_values"]
    assert len(names) > 1
    evaluate(pipe, tmp_path, {"a": A})
    pipe.scheduler._internal_dict = type(pipe.scheduler.config)(
        {**pipe.scheduler.config, "_use_default_values": names[::-1]}
    )
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **options: pytest.fail("the pipeline ran"))
    evaluate(pipe, tmp_path, {"a": A})


@pytest.mark.slow
def test_a_second_evaluation_at_the_same_time_is_refused(pipe, tmp_path, no_picture):
    with (
        owned(tmp_path, "evaluating"),
        pytest.raises(RuntimeError, match="`out_dir` must be a folder that no other process"),
    ):
        evaluate(pipe, tmp_path, {"a": A})
    evaluate(pipe, tmp_path, {"a": A})


# Interruptions and damage


class Stop(BaseException):
    """An interrupt, or the end of the process."""


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device")


def stopping(monkeypatch, place):
    """Stops at the place once."""
    state = {"done": False}

    def once(function, when):
        def called(*args, **options):
            if not state["done"] and when(*args, **options):
                state["done"] = True
                raise Stop
            return function(*args, **options)

        return called

    owner, name, when = place
    monkeypatch.setattr(owner, name, once(getattr(owner, name), when))
    return state


def in_search(self, batches, contender, keep=False, warm=True):
    return not warm and contender.threshold < 1


PLACES = {
    "before the reference": (Contest, "outcome", lambda self, batches, contender, **o: contender.name == "reference"),
    "within the reference": (Contest, "_decoded", lambda self, latents, arguments: len(latents) == 1),
    "in the search": (Contest, "outcome", in_search),
    "within a predictor": (Contest, "_judged", lambda self, contender, *rest: contender.name == "newton"),
    "in the writing of a run": (store_module.Store, "write_figures", lambda self, name, *rest: name != "reference"),
    "in the writing of the summary": (Evaluation, "summary", lambda self: True),
}
COMMAND = ({"a": A, "b": B}, ["first-block-cache-4", "steps-2"])


@pytest.fixture(scope="module")
def whole(shared):
    """What a command gives that nothing interrupts."""
    return untimed(evaluate(shared, None, *COMMAND, search_samples=1))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_evaluation_continues_with_the_same_figures(pipe, whole, tmp_path, no_picture, place):
    with pytest.MonkeyPatch.context() as patch:
        state = stopping(patch, PLACES[place])
        with pytest.raises(Stop):
            evaluate(pipe, tmp_path, *COMMAND, search_samples=1)
        assert state["done"] and not (tmp_path / "summary.json").exists()
        assert not [*tmp_path.rglob("*.tmp")] and not (tmp_path / ".lesa-lock").exists()
    resumed = evaluate(pipe, tmp_path, *COMMAND, search_samples=1)
    assert untimed(resumed) == whole
    assert [run["name"] for run in summary_of(tmp_path)["runs"]] == [run.name for run in resumed.runs]


@pytest.mark.slow
@pytest.mark.parametrize("when", range(4))
def test_a_disk_that_is_full_at_any_file_costs_nothing(pipe, whole, tmp_path, no_picture, monkeypatch, when):
    replaced, count = store_module.os.replace, [0]

    def full(source, target):
        count[0] += 1
        if count[0] == 1 + 4 * when:
            raise full_disk()
        return replaced(source, target)

    monkeypatch.setattr("lesa.artifacts.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(pipe, tmp_path, *COMMAND, search_samples=1)
    monkeypatch.undo()
    monkeypatch.setattr("lesa.evaluation.result.draw_comparison", lambda runs, images, file: file.touch())
    assert untimed(evaluate(pipe, tmp_path, *COMMAND, search_samples=1)) == whole


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "noise": lambda file: file.write_bytes(b"\x00\xff" * 200),
    "a list": lambda file: file.write_text("[]"),
    "null": lambda file: file.write_text("null"),
    "an empty object": lambda file: file.write_text("{}"),
}


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    """A folder with a finished evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    evaluate(shared, folder, *COMMAND, search_samples=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_made_again(pipe, whole, finished, tmp_path, no_picture, damage):
    folder = shutil.copytree(finished, tmp_path / "e")
    for pattern in ("reference*.npz", "newton_a*.json", "newton_b*.npz", "search*.json"):
        (file,) = (folder / "runs").glob(pattern)
        DAMAGES[damage](file)
    assert untimed(evaluate(pipe, folder, *COMMAND, search_samples=1)) == whole
    DAMAGES[damage](folder / "runs" / "reference.json")
    assert untimed(evaluate(pipe, folder, *COMMAND, search_samples=1)) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "suffix"), [*zip(DAMAGES, 4 * ["npz", "json"])])
def test_a_damaged_run_that_this_command_does_not_make_is_named(pipe, finished, tmp_path, no_picture, damage, suffix):
    folder = shutil.copytree(finished, tmp_path / "e")
    (file,) = (folder / "runs").glob(f"newton_b*.{suffix}")
    DAMAGES[damage](file)
    written = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="where the files of newton-3@b in runs/ are missing or damaged. Evaluate"):
        evaluate(pipe, folder, {"a": A})
    assert (folder / "summary.json").read_bytes() == written
    restored = evaluate(pipe, folder, {"b": B})
    assert unnamed(restored).keys() == unnamed(evaluate(pipe, folder, {"a": A})).keys()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "gone"])
@pytest.mark.parametrize("file", ["summary.json", "runs/settings.json"])
def test_a_damaged_description_is_named(pipe, finished, tmp_path, damage, file, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "e")
    DAMAGES[damage](folder / file)
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **options: pytest.fail("the pipeline ran"))
    with pytest.raises(ValueError, match=f"in .*{file}|{file}, which is damaged|have a {file}"):
        evaluate(pipe, folder, {"a": A})


@pytest.mark.slow
def test_strange_and_edited_files_are_not_taken_for_runs(pipe, whole, finished, tmp_path, no_picture):
    folder = shutil.copytree(finished, tmp_path / "e")
    (file,) = (folder / "runs").glob("newton_b*.json")
    shutil.copy(file, folder / "runs" / "newton_b (1).json")
    (folder / "runs" / "notes.json").write_text('{"run": {"name": "newton-3@b", "contender": "newton"}}')
    (folder / "runs" / "folder.json").mkdir()
    (folder / "images" / "stray.png").write_text("no picture")
    assert untimed(evaluate(pipe, folder, *COMMAND, search_samples=1)) == whole
    # Of another run: its images are of another key.
    (a,) = (folder / "runs").glob("newton_a*.npz")
    shutil.copy(a, file.with_suffix(".npz"))
    assert untimed(evaluate(pipe, folder, *COMMAND, search_samples=1)) == whole


@pytest.mark.slow
def test_edited_figures_are_named(pipe, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "e")
    summary = summary_of(folder)
    next(run for run in summary["runs"] if run["name"] == "newton-3@b")["psnr"] = 99.0
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="where the files of newton-3@b in runs/ are missing or damaged"):
        evaluate(pipe, folder, {"a": A})


# Evaluations of older releases


def as_older(folder, key):
    """Writes a folder as a release did that knew neither predictors' folders nor several commands."""
    (folder / "runs" / "settings.json").unlink()
    summary = summary_of(folder)
    for run in summary["runs"]:
        del run["predictor"], run["reference_seconds"]
    (folder / "summary.json").write_text(json.dumps(summary))
    for file in (folder / "runs").glob("*.json"):
        contents = json.loads(file.read_text())
        if "run" not in contents:
            continue
        del contents["identity"], contents["run"]["predictor"], contents["run"]["reference_seconds"]
        contents["key"] = key(contents["run"])
        file.write_text(json.dumps(contents))
        with np.load(file.with_suffix(".npz")) as arrays:
            values = {name: arrays[name] for name in arrays if name != "key"}
        np.savez(file.with_suffix(".npz"), **values)


@pytest.fixture
def older(tmp_path, monkeypatch):
    """An evaluation of an older release, and its pipeline."""
    pipe, keys = small.ALL["flux"].build(), []
    made = store_module.Store.__init__

    def noted(self, *args):
        made(self, *args)
        keys.append(self._key)

    monkeypatch.setattr(store_module.Store, "__init__", noted)
    evaluate(pipe, tmp_path, {"a": A}, [TaylorSeer(3), "steps-2"])
    contenders = {
        "reference": "Reference()",
        "taylorseer": TaylorSeer(3).identity(),
        "steps": FewerSteps(2).identity(),
        "newton": "of another form",
    }
    as_older(tmp_path, lambda run: digest([keys[-1], contenders[run["contender"]]]))
    for suffix in ("json", "npz"):
        (file,) = (tmp_path / "runs").glob(f"newton_a*.{suffix}")
        file.rename(tmp_path / "runs" / f"newton-6.{suffix}")
        for name in ("taylorseer-full-order1-interval3", "fewer-steps-2"):
            (file,) = (tmp_path / "runs").glob(f"{name}_*.{suffix}")
            file.rename(tmp_path / "runs" / f"{name}.{suffix}")
    return pipe, tmp_path


@pytest.mark.slow
def test_an_evaluation_of_an_older_release_gives_the_same_page(older):
    _, folder = older
    page = lesa.report(folder).read_text()
    assert "newton-3" in page and "Predictor" not in page and "Reference, seconds" not in page


@pytest.mark.slow
def test_an_evaluation_of_an_older_release_is_continued(older, no_picture):
    pipe, folder = older
    before = {run["name"]: run for run in summary_of(folder)["runs"]}
    added = evaluate(pipe, folder, {"b": B})
    assert {run.name for run in added.runs} == {*before, "newton-3@b"}  # the older one's predictor is not known
    for run in added.runs[2:]:
        old = before[run.name]
        assert (run.psnr, run.seconds, run.speedup) == (old["psnr"], old["seconds"], old["speedup"])
        assert run.predictor is None and run.reference_seconds is None
    same = evaluate(pipe, folder, {"a": A}, [TaylorSeer(3), "steps-2"])
    assert {run.name for run in same.runs} == {*before} - {"newton-3"} | {"newton-3@a", "newton-3@b"}


@pytest.mark.slow
@pytest.mark.parametrize("change", ["inputs", "model", "seed"])
def test_an_evaluation_of_an_older_release_of_something_else_is_refused(older, change):
    pipe, folder = older
    options, named = {}, "out_dir` must hold an evaluation of the same inputs, model and scheduler"
    if change == "inputs":
        options = {"inputs": [{**INPUTS[0], "prompt_embeds": INPUTS[0]["prompt_embeds"] + 1}]}
    elif change == "model":
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.01)
    else:
        options, named = {"seed": 3}, "seed` must be 0, as in the evaluation in"
    with pytest.raises(ValueError, match=named):
        evaluate(pipe, folder, {"b": B}, **options)


# Every history of a folder

COMMANDS = {
    "a": ({"a": A}, ()),
    "b": ({"b": B}, ()),
    "a b": ({"a": A, "b": B}, ()),
    "b a": ({"b": B, "a": A}, ["steps-2"]),
    "a again": ({"a": OTHER_A}, ()),
    "taylorseer": ({}, [TaylorSeer(2), "steps-3"]),
    "search": ({}, ["first-block-cache-3"]),
    "a with a search": ({"a": A}, ["first-block-cache"]),
    "listed": ([B], ()),
}
EVENTS = st.one_of(
    st.tuples(st.just("run"), st.sampled_from(sorted(COMMANDS))),
    st.tuples(st.just("interrupt"), st.sampled_from(sorted(COMMANDS)), st.integers(1, 9)),
    st.tuples(st.just("other settings"), st.sampled_from(["seed", "steps", "inputs"])),
    st.tuples(st.just("remove"), st.integers(0, 99)),
    st.tuples(st.just("cut"), st.integers(0, 99)),
)


def fresh_figures(pipe, command, cache):
    if command not in cache:
        cache[command] = unnamed(evaluate(pipe, None, *COMMANDS[command], search_samples=1))
    return cache[command]


@contextlib.contextmanager
def interrupted_at(pipe, number):
    """Stops the run at that call of the pipeline."""
    calls, call = [0], type(pipe).__call__

    def counted(self, *args, **options):
        calls[0] += 1
        if calls[0] == number:
            raise Stop
        return call(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "__call__", counted)
        yield


@pytest.mark.slow
def test_every_figure_of_every_history_is_that_of_a_fresh_evaluation(pipe, tmp_path, no_picture):
    cache, known, number = {}, {}, [0]
    for command in COMMANDS:
        for key, value in fresh_figures(pipe, command, cache).items():
            known.setdefault(key, []).append(value)

    @settings(
        max_examples=15,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(st.lists(EVENTS, min_size=2, max_size=7))
    def walk(events):
        number[0] += 1
        folder = tmp_path / str(number[0])
        for event in (*events, ("run", "a b")):
            happen(pipe, folder, event, known, cache)

    walk()


def happen(pipe, folder, event, known, cache):
    """One event in the life of a folder. A refusal changes nothing; what is written is right."""
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.exists() else []
    kind, what, *more = event
    if kind in ("remove", "cut"):
        if files:
            file = files[what % len(files)]
            DAMAGES["gone" if kind == "remove" else "cut"](file)
        return
    before = (folder / "summary.json").read_bytes() if (folder / "summary.json").exists() else None
    changed = {"seed": {"seed": 5}, "steps": {"num_inference_steps": 5}, "inputs": {"inputs": INPUTS * 2}}
    options = changed[what] if kind == "other settings" else {}
    command = COMMANDS["a" if kind == "other settings" else what]
    try:
        with interrupted_at(pipe, more[0]) if kind == "interrupt" else contextlib.nullcontext():
            if kind == "other settings" and before is None:
                return
            made = evaluate(pipe, folder, *command, search_samples=1, **options)
    except (ValueError, Stop) as error:
        if isinstance(error, ValueError):
            assert hasattr(error, "lesa_message"), error
        now = (folder / "summary.json").read_bytes() if (folder / "summary.json").exists() else None
        assert now == before
        return
    assert kind != "other settings"
    figures = unnamed(made)
    fresh = fresh_figures(pipe, what, cache)
    assert figures.items() >= fresh.items()
    assert all(value in known[key] for key, value in figures.items())
    written = summary_of(folder)
    assert [run["name"] for run in written["runs"]] == [run.name for run in made.runs]
    assert len({run.name for run in made.runs}) == len(made.runs)
    for run in made.runs:
        assert run.speedup == run.reference_seconds / run.seconds
    if before is not None:
        with contextlib.suppress(ValueError):
            names = {(run["contender"], run["predictor"], run["setting"]) for run in json.loads(before)["runs"]}
            assert names <= figures.keys() or "Left out" in made.table() or "Replaced" in made.table()
