"""A search that is interrupted continues, to the bytes of one that is not; and what is refused is refused before it."""

import contextlib
import itertools
import os
import re
import shutil
import tempfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lesa
from lesa.artifacts import LOCK
from lesa.cli import main
from lesa.training import refinement, schedule_search, searching, stages, training_run
from lesa.training.searching import PARTS_NAME, SEARCH_NAME
from lesa.training.training_run import CHECKPOINT_NAME
from lesa_kernels import FusedKANPredictor, PredictorConfig
from made_recordings import STEPS, TOKENS, WIDTH, write_recording

CONFIG = PredictorConfig(WIDTH, hidden=3, rank=1)
OPTIONS = {"config": CONFIG, "budget": 4, "find_stages": True, "epochs": 2, "seed": 3, "progress": False}

PLACES = {
    "a cost": (schedule_search.ScheduleErrors, "after"),
    "a step of the optimiser": (torch.optim.AdamW, "step"),
    "a training": (training_run.Training, "__init__"),
    "a loss of stages": (stages, "_loss_of"),
    "a file": (training_run, "whole_file"),
    "a part": (searching, "write_text"),
    "cleaning up": (shutil, "rmtree"),
    "the end": (training_run.Training, "finish"),
    "a rename": (os, "replace"),
    "a removal": (os, "unlink"),
}


@contextlib.contextmanager
def interrupted(place, number):
    """Within it, the call of this number raises `KeyboardInterrupt` before it does anything; yields the count."""
    owner, name = PLACES[place]
    function, counted = getattr(owner, name), []

    def call(*args, **kwargs):
        counted.append(1)
        if len(counted) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield counted


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def very_brief():
    """The trainings within a search have a few epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BRIEF", replace(stages.BRIEF, epochs=3))
        patch.setattr(schedule_search, "BRIEF_UPDATES", 4)
        yield


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("recording") / "t")


@pytest.fixture(scope="module")
def whole(recording, tmp_path_factory):
    """What a training writes that is not interrupted, and how often it calls what an interruption can come before."""
    folder, counts = tmp_path_factory.mktemp("whole") / "out", {}
    with contextlib.ExitStack() as stack:
        for place in PLACES:
            counts[place] = stack.enter_context(interrupted(place, None))
        lesa.train(recording, out_dir=folder, **OPTIONS)
    assert {*files(folder)} == {"config.json", "model.safetensors", "provenance.json", "losses.json", "losses.png"}
    return files(folder), {place: len(counted) for place, counted in counts.items()}


def points(total, count=3):
    """A few of the numbers from 1 to `total`, with both ends. The search that is stopped again and again has others."""
    return sorted({1 + round(n * (total - 1) / (count - 1)) for n in range(count)})


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("a rename", "a removal")])
def test_an_interrupted_search_continues_to_the_same_bytes(recording, whole, tmp_path, place):
    expected, counts = whole
    assert counts[place]
    for number in points(counts[place]):
        out = tmp_path / str(number)
        with interrupted(place, number), pytest.raises(KeyboardInterrupt):
            lesa.train(recording, out_dir=out, **OPTIONS)
        lesa.train(recording, out_dir=out, **OPTIONS)
        assert files(out) == expected
        assert not (out / SEARCH_NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a rename", "a removal"])
def test_a_training_is_interrupted_between_any_two_changes_of_its_folder(recording, tmp_path, place):
    options = {"config": CONFIG, "schedule": [0, 2, 5], "epochs": 1, "progress": False}
    with interrupted(place, None) as counted:
        lesa.train(recording, out_dir=tmp_path / "whole", **options)
    assert counted
    for number in range(1, len(counted) + 1):
        out = tmp_path / str(number)
        with interrupted(place, number), contextlib.suppress(KeyboardInterrupt):
            lesa.train(recording, out_dir=out, **options)
        if (out / CHECKPOINT_NAME).exists() or not (out / "config.json").exists():
            lesa.train(recording, out_dir=out, **options)
        left = files(out)
        left.pop(LOCK, None)  # it was interrupted before it removed its lock, which nobody holds
        assert left == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_search_that_is_interrupted_again_and_again(recording, whole, tmp_path):
    """It gets a little further each time, and does little twice."""
    expected, counts = whole
    out, steps, interruptions = tmp_path / "out", 0, 0
    while True:
        with interrupted("a step of the optimiser", 7) as counted, contextlib.suppress(KeyboardInterrupt):
            lesa.train(recording, out_dir=out, **OPTIONS)
        steps, interruptions = steps + len(counted), interruptions + 1
        if len(counted) < 7:
            break
    assert interruptions > 3
    assert files(out) == expected
    # An unfinished training for stages begins again; it has 3 epochs. Others continue after their last whole epoch.
    assert steps <= counts["a step of the optimiser"] + 4 * interruptions


@pytest.fixture
def unfinished(recording, whole, tmp_path):
    """The folder of a training that was stopped in the last search."""
    out = tmp_path / "out"
    with interrupted("a loss of stages", 2), pytest.raises(KeyboardInterrupt):
        lesa.train(recording, out_dir=out, **OPTIONS)
    assert {path.name for path in out.iterdir()} == {SEARCH_NAME}
    return out


@pytest.mark.slow
def test_a_search_is_not_continued_with_other_settings(recording, unfinished, tmp_path):
    before = files(unfinished)
    changes = [
        ("budget", 5),
        ("budget", None),
        ("find_stages", False),
        ("epochs", 3),
        ("seed", 4),
        ("batch_size", 4),
        ("tokens_per_batch", 3),
        ("learning_rate", 1e-2),
        ("validation_fraction", 0.4),
        ("head_aware", False),
        ("controlled", True),
        ("config.rank", PredictorConfig(WIDTH, hidden=3, rank=2)),
        ("config.stage_bounds", PredictorConfig(WIDTH, hidden=3, rank=1, stage_bounds=(0.5,))),
    ]
    for name, value in changes:
        field = name.partition(".")[0]
        with pytest.raises(ValueError, match=f"^`{re.escape(name)}` must be .*, as in the unfinished search in .*out"):
            lesa.train(recording, out_dir=unfinished, **{**OPTIONS, field: value})
    plain = {name: value for name, value in OPTIONS.items() if name not in ("budget", "find_stages")}
    with pytest.raises(ValueError, match="^`budget` must be 4, as in the unfinished search"):
        lesa.train(recording, out_dir=unfinished, schedule=[0, 2, 5], **plain)
    others = write_recording(tmp_path / "others", samples=5)
    with pytest.raises(ValueError, match=r"^`trajectories\.samples` must be 6, as in the unfinished search"):
        lesa.train(others, out_dir=unfinished, **OPTIONS)
    assert files(unfinished) == before


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"settings": 1, "parts": {}}', b"\xff\xfe"])
def test_a_damaged_search_is_named(recording, unfinished, content):
    file = unfinished / SEARCH_NAME / PARTS_NAME
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"`out_dir` must hold a search that can be read, but got {file}.* Delete"):
        lesa.train(recording, out_dir=unfinished, **OPTIONS)
    assert file.read_bytes() == content


@pytest.mark.slow
def test_what_an_interruption_leaves_half_written_is_no_obstacle(recording, unfinished, whole):
    for name in (f"{SEARCH_NAME}/{PARTS_NAME}.tmp", f"{CHECKPOINT_NAME}.tmp"):
        (unfinished / name).write_bytes(b"half")
    lesa.train(recording, out_dir=unfinished, **OPTIONS)
    assert files(unfinished) == whole[0]


@pytest.mark.slow
def test_the_same_command_continues(recording, whole, tmp_path, capsys):
    out = tmp_path / "out"
    command = f"train --trajectories {recording.folder} --out {out} --budget 4 --stage-bounds auto --epochs 2 --seed 3"
    command = [*command.split(), "--hidden", "3", "--rank", "1", "--device", "cpu"]
    for place in ("a cost", "a loss of stages"):
        with interrupted(place, 2), pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 130
        assert "interrupted; the same command continues where it stopped" in capsys.readouterr().err
    with interrupted("a cost", None) as counted:
        main(command)
    assert not counted  # the schedule was there already
    assert files(out) == whole[0]


# What is refused before anything is searched or trained


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if a search or a training begins."""

    def fail(*args, **kwargs):
        pytest.fail("work has begun")

    monkeypatch.setattr(schedule_search, "ScheduleErrors", fail)
    monkeypatch.setattr(torch.optim, "AdamW", fail)
    monkeypatch.setattr(stages, "_loss_of", fail)
    monkeypatch.setattr(refinement, "Recording", fail)


def occupied(kind, folder):
    """A path of this kind."""
    out = folder / "out"
    if kind == "files":
        out.mkdir()
        (out / "notes.txt").write_text("")
    elif kind == "predictor":
        FusedKANPredictor(CONFIG).save_pretrained(out)
    elif kind == "file":
        out.write_text("")
    elif kind == "below a file":
        out.write_text("")
        out = out / "deeper" / "still"
    return out


OCCUPIED = {
    "files": (ValueError, "`out_dir` must be empty or hold an unfinished training, but got files in .*Choose another"),
    "predictor": (ValueError, "`out_dir` must be empty or hold an unfinished training, but got a predictor in .*out"),
    "file": (ValueError, "`out_dir` must be a folder, but got .*out, where there is a file. Choose another"),
    "below a file": (ValueError, "`out_dir` must be a folder, but got .*still, where there is a file. Choose another"),
    "read only": (PermissionError, r"`out_dir` must be a folder to write to, but got .*out \(Permission denied\)"),
}
SEARCHES = {"budget": {"budget": 4}, "stages": {"find_stages": True}, "neither": {"schedule": [0, 2, 5]}}


@pytest.mark.parametrize("searched", SEARCHES)
@pytest.mark.parametrize("kind", OCCUPIED)
def test_a_folder_that_cannot_be_used_is_refused_before_the_work(
    recording, tmp_path, monkeypatch, no_work, kind, searched
):
    out, (error, message) = occupied(kind, tmp_path), OCCUPIED[kind]
    before = files(tmp_path)
    if kind == "read only":

        def refuse(**options):
            raise PermissionError(13, "Permission denied", str(out))

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(error, match=message):
        lesa.train(recording, CONFIG, out_dir=out, progress=False, **SEARCHES[searched])
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_missing_parent_is_made(recording, tmp_path):
    out = tmp_path / "a" / "b" / "c"
    lesa.train(recording, CONFIG, [0, 2, 5], out_dir=out, epochs=1, progress=False)
    assert FusedKANPredictor.from_pretrained(out).config.schedule == (0, 2, 5)


WRONG = [
    ({"budget": STEPS}, "`budget` must be an integer of at least 2 and at most 11"),
    ({"budget": 4, "config": PredictorConfig(WIDTH + 1)}, "`config.feature_dim` must be that of the trajectories"),
    ({"budget": 4, "config": PredictorConfig(WIDTH, family="sd3")}, "`config.family` must be that of the trajectories"),
    ({"budget": 4, "find_stages": True, "config": PredictorConfig(WIDTH, history_length=(2, 3, 4))}, "history_length"),
    ({"find_stages": True, "config": PredictorConfig(WIDTH, mixer="dense")}, "`config.mixer` must be 'newton'"),
    ({"budget": 4, "epochs": 0}, "`epochs` must be an integer of at least 1"),
    ({"budget": 4, "learning_rate": 0.0}, "`learning_rate` must be"),
    ({"budget": 4, "batch_size": 0}, "`batch_size` must be"),
    ({"budget": 4, "tokens_per_batch": 0}, "`tokens_per_batch` must be"),
    ({"budget": 4, "validation_fraction": 1.0}, "`validation_fraction` must be"),
    ({"budget": 4, "seed": -1}, "`seed` must be"),
    ({"budget": 4, "seed": 2**64}, "`seed` must be"),
    ({"find_stages": True, "seed": 2**64 - 1}, "`seed` must be"),  # the next seed is used too
    ({"budget": 4, "config": {"feature_dim": WIDTH}}, "`config` must be a PredictorConfig, but got"),
    ({"config": "newton"}, "`config` must be a PredictorConfig, but got 'newton'"),
    ({"schedule": [0, STEPS]}, "`schedule` must be made for the 12 steps"),
    ({"schedule": range(STEPS), "find_stages": True}, "`schedule` must leave steps to predict"),
    ({"out_dir": 3}, "`out_dir` must be a path, but got 3"),
    ({"out_dir": "a\0b"}, "`out_dir` must be a path, but got"),
    ({"budget": 4, "device": "gpu"}, "`device` must be one on which torch can compute, but got 'gpu'"),
    ({"budget": 4, "device": "meta"}, "`device` must be one on which torch can compute, but got 'meta'"),
    ({"budget": 4, "device": "cuda:99"}, "`device` must be one on which torch can compute, but got 'cuda:99'"),
    ({"budget": 4, "device": None}, "`device` must be one on which torch can compute, but got 'None'"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=lambda value: None if isinstance(value, dict) else value[:30])
def test_what_is_wrong_is_refused_before_the_work(recording, tmp_path, no_work, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as refused:
        lesa.train(recording, **{"out_dir": tmp_path / "out", "progress": False, **options})
    assert refused.value.lesa_message  # it is no bug
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part, value", [("features", torch.nan), ("latents", torch.inf), ("scale", -torch.inf)])
def test_trajectories_that_are_not_finite_are_named_before_the_work(tmp_path, no_work, part, value):
    trajectories = write_recording(tmp_path / "t")
    file = trajectories.folder / "sample-00004.safetensors"
    tensors = load_file(file)
    tensors[part].view(-1)[-1] = value
    save_file(tensors, file)
    message = f"sample-00004.safetensors` is damaged: it has NaN or Inf in '{part}'"
    for work in (
        lambda: lesa.train(trajectories, schedule=[0, 2, 5], progress=False),
        lambda: lesa.train(trajectories, budget=4, find_stages=True, out_dir=tmp_path / "out", progress=False),
        lambda: lesa.find_schedule(trajectories, 4, progress=False),
        lambda: lesa.find_stages(trajectories, progress=False),
        lambda: lesa.search_schedule(trajectories, FusedKANPredictor(CONFIG), 4, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            work()
    assert files(tmp_path / "out") == {}


def test_a_training_that_diverges_says_so(recording, tmp_path):
    with pytest.raises(RuntimeError, match="`loss` must stay finite, but got .* in epoch .*Lower `learning_rate`"):
        lesa.train(recording, CONFIG, [0, 2, 5], out_dir=tmp_path / "out", learning_rate=1e30, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["empty", "cut off", "another file", "a list", "without settings"])
def test_a_damaged_checkpoint_is_named(recording, tmp_path, content):
    out = tmp_path / "out"
    arguments = {"config": CONFIG, "schedule": [0, 2, 5], "epochs": 2, "out_dir": out, "progress": False}
    with interrupted("a step of the optimiser", 2), pytest.raises(KeyboardInterrupt):
        lesa.train(recording, **arguments)
    file = out / CHECKPOINT_NAME
    if content in ("a list", "without settings"):
        torch.save([1] if content == "a list" else {"epoch": 3}, file)
    else:
        whole = {"empty": b"", "cut off": file.read_bytes()[:-200], "another file": b"PK\x03\x04 and so on"}
        file.write_bytes(whole[content])
    before = files(out)
    with pytest.raises(
        ValueError, match="`out_dir` must hold a checkpoint that can be read, .*Delete it to train from"
    ):
        lesa.train(recording, **arguments)
    assert files(out) == before
    file.unlink()
    lesa.train(recording, **arguments)


# Any schedule and configuration


@st.composite
def trainings(draw):
    """Arguments of `lesa.train`, right or wrong in their schedule."""
    mixer = draw(st.sampled_from(["newton", "dense"]))
    bounds = draw(st.sampled_from([(), (0.5,), (0.67, 0.33), (0.9, 0.5, 0.1)]))
    lengths = st.integers(1, 14)
    config = PredictorConfig(
        WIDTH,
        mixer,
        history=draw(st.sampled_from([None, "anchors", "steps"])),
        history_length=draw(st.none() | lengths | st.tuples(*[lengths] * (len(bounds) + 1))),
        stage_bounds=bounds,
        rank=draw(st.integers(0, 2)),
        hidden=draw(st.integers(1, 3)),
    )
    step_lists = st.lists(st.integers(-1, STEPS + 1), max_size=6).map(lambda steps: [0, *sorted(steps)])
    return {
        "config": config,
        "schedule": draw(st.none() | st.integers(-1, STEPS + 3) | step_lists),
        "guided_epochs": draw(st.none() | st.integers(0, 1)),
        "batch_size": draw(st.integers(1, 9)),
        "tokens_per_batch": draw(st.none() | st.integers(1, 9)),
        "head_aware": draw(st.none() | st.booleans()),
        "validation_fraction": draw(st.floats(0.0, 0.9)),
        "controlled": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**64 - 2)),
    }


@pytest.mark.slow
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(arguments=trainings())
def test_any_training_ends_with_a_predictor_or_with_a_message(recording, arguments):
    try:
        predictor = lesa.train(recording, epochs=1, progress=False, **arguments)
    except (TypeError, ValueError) as error:
        assert re.match("^`(schedule|steps|controlled)` must ", str(error)) and error.lesa_message
        return
    given_schedule, config = arguments["schedule"], predictor.config
    assert isinstance(given_schedule, int | None) or config.schedule == tuple(given_schedule)
    assert config.schedule[0] == 0 and len(config.schedule) < STEPS
    assert config.lengths == arguments["config"].lengths
    assert all(torch.isfinite(value).all() for value in predictor.parameters())


# The smallest recordings


@pytest.mark.slow
@pytest.mark.parametrize(
    "samples, tokens, options",
    [
        (1, 1, {"batch_size": 8}),
        (1, TOKENS, {"batch_size": 100, "tokens_per_batch": 1000}),
        (2, 1, {"batch_size": 1, "validation_fraction": 0.9}),
        (1, 1, {"budget": 2}),
        (2, 1, {"budget": STEPS - 1, "find_stages": True}),
        (1, 2, {"config": PredictorConfig(WIDTH, mixer="dense", hidden=2), "validation_fraction": 0.0}),
        (2, 2, {"config": PredictorConfig(WIDTH, rank=0, hidden=1, history_length=1)}),
        (2, 2, {"config": PredictorConfig(WIDTH, hidden=1, history_length=STEPS + 3)}),
        (2, 2, {"controlled": True, "seed": 2**40}),
        (2, 2, {"schedule": [0]}),
    ],
    ids=str,
)
def test_small_recordings_and_large_batches(tmp_path, samples, tokens, options):
    trajectories = write_recording(tmp_path / "t", samples, tokens)
    predictor = lesa.train(trajectories, out_dir=tmp_path / "out", **{"epochs": 1, "progress": False, **options})
    assert all(torch.isfinite(value).all() for value in predictor.parameters())
    loaded = FusedKANPredictor.from_pretrained(tmp_path / "out")
    assert loaded.config == predictor.config
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(loaded.parameters(), predictor.parameters()))
