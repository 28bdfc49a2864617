"""Loading predictors: which keywords there are, what is a path, and what survives pickling and copying."""

import copy
import inspect
import io
import json
import pickle
import shutil
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig, make_ring
from lesa_kernels.predictor.files import HUB_OPTIONS, budgets_in
from lesa_kernels.predictor.sharing import mark_of

WIDTH = 8
CONFIG = PredictorConfig(WIDTH, hidden=3, rank=2)


def filled(config=CONFIG):
    torch.manual_seed(0)
    predictor = FusedKANPredictor(config)
    with torch.no_grad():
        for value in predictor.parameters():
            value.normal_(std=0.1)
    return predictor


@pytest.fixture
def predictor():
    return filled()


@pytest.fixture
def saved(tmp_path, predictor):
    predictor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def hub(monkeypatch, saved):
    """The downloads that were asked for; each finds the saved predictor."""
    asked = []

    def download(repo, file, **options):
        asked.append((repo, options))
        if not (saved / file).exists():
            raise EntryNotFoundError(f"no {file} in {repo}")
        return str(saved / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.fixture
def no_hub(monkeypatch):
    """Fails the test if anything is asked of the hub."""
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: pytest.fail("asked the hub"))


def same(predictor, other):
    names = (predictor.state_dict(), other.state_dict())
    return predictor.config == other.config and all(torch.equal(names[0][name], names[1][name]) for name in names[0])


# Keywords

CONVERT, MOVE = r"Convert them afterwards with `\.to\(dtype\)`", r"Move them afterwards with `\.to\(device\)`"
REFUSED = {
    "torch_dtype": (torch.bfloat16, CONVERT),
    "dtype": (torch.float32, CONVERT),
    "device": ("cpu", MOVE),
    "device_map": ("auto", MOVE),
    "map_location": ("cpu", MOVE),
    "strict": (False, "Names and shapes of all weights are always checked"),
    "revison": ("main", "Did you mean `revision`?"),
    "local_file_only": (True, "Did you mean `local_files_only`?"),
    "cachedir": ("/tmp", "Did you mean `cache_dir`?"),
    "back_end": ("torch", "Did you mean `backend`?"),
    "use_auth_token": (True, ""),
    "dry_run": (True, ""),
    "filename": ("config.json", ""),
    "repo_id": ("a/b", ""),
    "rank": (3, "Leave it out"),
    "config": (CONFIG, ""),
    "trust_remote_code": (True, "Leave it out"),
    "low_cpu_mem_usage": (True, "Leave it out"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_unknown_keyword_is_refused_by_name(saved, hub, place, name):
    """The same for a folder and for the hub, and before anything is loaded."""
    value, remedy = REFUSED[name]
    with pytest.raises(TypeError, match=f"^`from_pretrained` has no argument `{name}`. .*{remedy}"):
        FusedKANPredictor.from_pretrained(saved if place == "folder" else "someone/mine", **{name: value})
    assert not hub


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HUB_OPTIONS if name != "subfolder"])
def test_options_of_a_download_are_passed_on_and_are_no_error_for_a_folder(saved, hub, predictor, name):
    assert same(FusedKANPredictor.from_pretrained("someone/mine", **{name: "value"}), predictor)
    assert hub == [("someone/mine", {name: "value"})] * 3
    assert same(FusedKANPredictor.from_pretrained(saved, **{name: "value"}), predictor)
    assert len(hub) == 3


def test_all_that_the_installed_hub_takes_is_an_option_or_has_no_meaning_here():
    taken = {*inspect.signature(huggingface_hub.hf_hub_download).parameters}
    assert taken - {*HUB_OPTIONS} <= {"repo_id", "filename", "dry_run"}


def test_a_subfolder_has_a_meaning_in_a_folder_too(saved, hub, predictor):
    assert same(FusedKANPredictor.from_pretrained(saved.parent, subfolder="saved"), predictor)
    with pytest.raises(FileNotFoundError, match="other, which has no config.json"):
        FusedKANPredictor.from_pretrained(saved.parent, subfolder="other")
    FusedKANPredictor.from_pretrained("someone/mine", subfolder="saved")
    assert [options for _, options in hub] == [{"subfolder": "saved"}] * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda p, folder: p.save_pretrained(folder, safe_serialization=True),
        lambda p, folder: p.push_to_hub("a/b", branch="main"),
        lambda p, folder: p.make_ring(1, 2, dim=3),
        lambda p, folder: make_ring(1, 2, 3, 4, layout="rows"),
        lambda p, folder: FeatureRing(1, 2, 3, 4, max_device_bytes=5),
        lambda p, folder: FusedKANPredictor(CONFIG, dtype=torch.bfloat16),
        lambda p, folder: PredictorConfig(WIDTH, depth=3),
    ],
)
def test_no_other_function_ignores_a_keyword(predictor, tmp_path, call):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        call(predictor, tmp_path)


# Paths and ids


@pytest.mark.parametrize(
    "name",
    [
        "predictor",
        "./predictor",
        "../predictor",
        "~/predictor",
        "a/b/c",
        "a/b/",
        "here/predictor",
        "/nowhere/x",
        ".a/b",
    ],
)
def test_a_path_without_a_folder_is_never_asked_of_the_hub(tmp_path, monkeypatch, no_hub, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for given_ in (name, Path(name)):
        if str(given_) == name or name != "a/b/":  # the path a/b is an id
            with pytest.raises(FileNotFoundError, match=f"there is no folder '{given_}'. Check the path"):
                FusedKANPredictor.from_pretrained(given_)


def test_an_id_is_asked_of_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    FusedKANPredictor.from_pretrained("someone/mine")
    assert [repo for repo, _ in hub] == ["someone/mine"] * 3


@pytest.mark.parametrize("name", ["us er/mine", "user/mi*ne", "user/mine--x", "-user/mine", "us\u00e9r/mine"])
def test_what_can_be_no_id_is_named(tmp_path, monkeypatch, name):
    """By the library of the hub, which needs no network for it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`folder_or_id` must be a folder or a hub id .*, which is neither"):
        FusedKANPredictor.from_pretrained(name, local_files_only=True)


@pytest.mark.parametrize("value", [None, 3, b"folder", CONFIG])
def test_what_is_no_path_at_all_is_named(value):
    with pytest.raises(TypeError, match="`folder_or_id` must be a folder or a hub id such as 'user/name', but got"):
        FusedKANPredictor.from_pretrained(value)


# What the predictor was made for

MADE_FOR = {"dtypes": {"transformer": "bfloat16"}, "shift": 3.0, "list": [1, None, True, "\u00e9"]}


def test_a_provenance_is_saved_beside_the_weights_and_an_older_one_is_removed(predictor, tmp_path):
    predictor.provenance = MADE_FOR
    predictor.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "provenance.json"]
    assert FusedKANPredictor.from_pretrained(tmp_path).provenance == MADE_FOR
    predictor.provenance = None
    predictor.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert FusedKANPredictor.from_pretrained(tmp_path).provenance is None


@pytest.mark.parametrize("value", [[1], "text", {"a": {1, 2}}, {"a": float("nan")}, {1: "a"}, {"a": (1, 2)}])
def test_what_json_does_not_have_is_no_provenance(saved, predictor, value):
    predictor.provenance = value
    before = {file: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises((TypeError, ValueError), match="`provenance` must be None, or a dict of values that JSON has"):
        predictor.save_pretrained(saved)
    assert before == {file: file.read_bytes() for file in saved.iterdir()}


@pytest.mark.parametrize("damage", [b"", b'{"a": ', b"[1]", b"\xff\xfe{}", b"null"])
def test_a_damaged_provenance_is_named(saved, damage):
    (saved / "provenance.json").write_bytes(damage)
    with pytest.raises(ValueError, match="`folder_or_id` must hold a readable provenance.json, but got .* delete it"):
        FusedKANPredictor.from_pretrained(saved)


def test_a_predictor_that_an_earlier_release_pickled_has_none(predictor):
    assert "provenance" not in vars(predictor)
    assert pickle.loads(pickle.dumps(predictor)).provenance is None


def test_a_provenance_is_loaded_from_the_hub(saved, hub):
    (saved / "provenance.json").write_text(json.dumps(MADE_FOR))
    assert FusedKANPredictor.from_pretrained("someone/mine").provenance == MADE_FOR


def failing(monkeypatch, saved, error):
    def download(repo, file, **options):
        if file == "provenance.json":
            raise error
        return str(saved / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_an_error_of_the_network_is_not_hidden(saved, monkeypatch):
    failing(monkeypatch, saved, ConnectionError("the hub does not answer"))
    with pytest.raises(ConnectionError, match="does not answer"):
        FusedKANPredictor.from_pretrained("someone/mine")
    failing(monkeypatch, saved, LocalEntryNotFoundError("cannot reach the hub"))
    text = "someone/mine was loaded without provenance.json, which the hub could not be asked for: cannot reach"
    with pytest.warns(RuntimeWarning, match=text):
        assert FusedKANPredictor.from_pretrained("someone/mine").provenance is None


def test_a_user_who_asks_for_local_files_gets_them(saved, monkeypatch):
    failing(monkeypatch, saved, LocalEntryNotFoundError("not there"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FusedKANPredictor.from_pretrained("someone/mine", local_files_only=True).provenance is None


# Several budgets


@pytest.fixture
def several(tmp_path):
    """A folder with predictors for three budgets, and other things."""
    for budget in (9, 12, 7):
        steps = {"schedule": tuple(range(budget)), "schedule_sigmas": tuple(1 - i / 20 for i in range(budget))}
        config = PredictorConfig(WIDTH, hidden=3, rank=2, num_inference_steps=20, **steps)
        FusedKANPredictor(config).save_pretrained(tmp_path / "several" / f"budget-{budget}")
    for name in ("budget-3", "budget-x", "budget-05"):
        (tmp_path / "several" / name).mkdir()
    (tmp_path / "several" / "budget-05" / "config.json").write_text("{}")
    return tmp_path / "several"


@pytest.fixture(params=["folder", "hub", "subfolder", "subfolder of the hub"])
def source(request, several, monkeypatch):
    """Positional and keyword arguments of `from_pretrained` for the three predictors."""
    root = several.parent if "subfolder" in request.param else several
    options = {"subfolder": "several"} if "subfolder" in request.param else {}
    if "hub" not in request.param:
        return (root,), options

    def download(repo, file, subfolder=None, **hub):
        assert (repo, hub) == ("someone/mine", {"revision": "v1"})
        path = root / (subfolder or "") / file
        if not path.exists():
            raise EntryNotFoundError(f"no {path}")
        return str(path)

    class Api:
        def __init__(self, endpoint=None, token=None):
            pass

        def list_repo_files(self, repo, revision=None):
            assert (repo, revision) == ("someone/mine", "v1")
            return [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return ("someone/mine",), {"revision": "v1", **options}


def test_a_budget_chooses_one_of_several_predictors(source):
    args, options = source
    for budget in (7, 9, 12):
        assert len(FusedKANPredictor.from_pretrained(*args, budget=budget, **options).config.schedule) == budget
    for budget in (None, 8, 3):
        with pytest.raises(ValueError, match=f"`budget` must be one of 7, 9, 12, for which .*, but got {budget}"):
            FusedKANPredictor.from_pretrained(*args, budget=budget, **options)


def test_a_budget_means_nothing_for_one_predictor(saved):
    with pytest.raises(ValueError, match="`budget` must be left out for .*, which has no folders such as budget-9"):
        FusedKANPredictor.from_pretrained(saved, budget=9)
    for wrong in ("9", 0, True):
        with pytest.raises((TypeError, ValueError), match="`budget` must be an integer of at least 1"):
            FusedKANPredictor.from_pretrained(saved, budget=wrong)


def test_a_hub_that_does_not_answer_is_no_question_of_budgets(monkeypatch):
    def download(*args, **options):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: pytest.fail("asked for the files"))
    with pytest.raises(LocalEntryNotFoundError, match="cannot reach"):
        FusedKANPredictor.from_pretrained("someone/mine", budget=9)


@pytest.fixture
def cached(several, tmp_path, monkeypatch):
    """The hub's cache, without a connection. It has two of the predictors of a repository, and its folder is given."""
    folder = tmp_path / "cache" / "models--someone--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    for budget in (7, 12):
        shutil.copytree(several / f"budget-{budget}", folder / "snapshots" / ("a" * 40) / f"budget-{budget}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_without_a_connection_the_budgets_are_those_that_were_downloaded(cached):
    options = {"cache_dir": cached}
    assert budgets_in("someone/mine", options) == [7, 12]
    assert len(FusedKANPredictor.from_pretrained("someone/mine", budget=7, **options).config.schedule) == 7
    with pytest.raises(ValueError, match="`budget` must be one of 7, 12, for which someone/mine has predictors"):
        FusedKANPredictor.from_pretrained("someone/mine", **options)
    with pytest.raises(LocalEntryNotFoundError):  # whether the repository has it is not known
        FusedKANPredictor.from_pretrained("someone/mine", budget=9, **options)
    with pytest.raises(LocalEntryNotFoundError):
        budgets_in("someone/else", options)


# Uploads


@pytest.fixture
def uploaded(monkeypatch, tmp_path):
    """By name, the files that were uploaded; `on_hub` is a folder of those that the repository has."""
    seen, on_hub = {}, tmp_path / "on-hub"
    on_hub.mkdir()

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return f"https://hub/{repo_id}"

        def file_exists(self, repo_id, filename):
            return (on_hub / filename).exists()

        def hf_hub_download(self, repo_id, filename):
            return str(on_hub / filename)

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            for name in delete_patterns or ():
                (on_hub / name).unlink(missing_ok=True)
            seen.clear()
            seen.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            for name, content in seen.items():
                (on_hub / name).write_bytes(content)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return seen, on_hub


def test_a_predictor_without_a_card_gets_a_minimal_one(predictor, uploaded):
    seen, on_hub = uploaded
    predictor.push_to_hub("someone/mine")
    head, text = seen["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head) == {"library_name": "lesa-kernels", "tags": ["lesa-kernels", "diffusers"]}
    assert 'lesa.enable_cache(pipe, "user/name")' in text
    for card in (seen["README.md"].decode(), "# Mine\n"):  # the same predictor, and a text of the user
        (on_hub / "README.md").write_text(card)
        predictor.push_to_hub("someone/mine")
        assert {*seen} == {"config.json", "model.safetensors"} and (on_hub / "README.md").read_text() == card


def test_the_card_of_the_folder_is_uploaded_with_the_pictures_that_it_shows(saved, uploaded):
    seen, on_hub = uploaded
    (on_hub / "README.md").write_text("# Before\n")
    (saved / "README.md").write_text("# Mine\n\n![the runs](comparison.png)\n")
    for name in ("comparison.png", "private.png", "notes.txt"):
        (saved / name).write_bytes(name.encode())
    FusedKANPredictor.from_pretrained(saved).push_to_hub("someone/mine")
    assert {*seen} == {"config.json", "model.safetensors", "README.md", "comparison.png"}
    assert seen["README.md"].startswith(b"# Mine") and seen["comparison.png"] == b"comparison.png"


def other_weights(predictor):
    with torch.no_grad():
        next(predictor.parameters()).add_(1)


def other_schedule(predictor):
    predictor.config = replace(predictor.config, num_inference_steps=12, schedule=(0, 4), schedule_sigmas=(1.0, 0.5))


@pytest.mark.parametrize("changed", [other_weights, other_schedule])
def test_figures_and_provenance_of_other_weights_are_not_uploaded_and_do_not_stay(saved, uploaded, changed):
    seen, on_hub = uploaded
    loaded = FusedKANPredictor.from_pretrained(saved)
    loaded.provenance = {"family": "flux"}
    loaded.save_pretrained(saved)
    card = f"{mark_of(saved)}\n\n48.1 dB ![the runs](comparison.png)\n"
    (saved / "README.md").write_text(card)
    (saved / "comparison.png").write_bytes(b"picture")
    (on_hub / "mine.txt").write_text("of the user")
    loaded = FusedKANPredictor.from_pretrained(saved)
    loaded.push_to_hub("someone/mine")
    assert seen["README.md"].decode() == card
    assert {file.name for file in on_hub.iterdir()} == {*seen, "mine.txt"} and len(seen) == 5
    changed(loaded)
    loaded.provenance = None
    loaded.push_to_hub("someone/mine")
    assert {file.name for file in on_hub.iterdir()} == {"config.json", "model.safetensors", "README.md", "mine.txt"}
    assert b"A predictor of lesa-kernels" in seen["README.md"] and b"48.1" not in seen["README.md"]


def test_the_card_of_a_folder_that_is_gone_is_no_obstacle(saved, uploaded):
    seen, _ = uploaded
    loaded = FusedKANPredictor.from_pretrained(saved)
    shutil.rmtree(saved)
    loaded.push_to_hub("someone/mine")
    assert b"A predictor of lesa-kernels" in seen["README.md"]


# Files of other kinds


DAMAGED = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[:-3],
    "header cut off": lambda whole: whole[:20],
    "length of the header": lambda whole: struct.pack("<Q", 2**60) + whole[8:],
    "longer": lambda whole: whole + b"x",
    "a zip": lambda whole: b"PK\x03\x04" + whole,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_weights_are_named(saved, kind):
    file = saved / "model.safetensors"
    file.write_bytes(DAMAGED[kind](file.read_bytes()))
    with pytest.raises(ValueError, match="`folder_or_id` must hold a readable model.safetensors"):
        FusedKANPredictor.from_pretrained(saved)


CHANGES = {
    "format_version": [2, "1", None, 1.5, True],
    "rank": ["2", 2.5, -1, None],
    "hidden": [0, "3"],
    "history_length": [0, [4, 4], "4", [4, 4, None]],
    "stage_bounds": [0.5, [0.3, 0.6], [None], "0.5", [float("nan")]],
    "schedule": [[1, 2], "0,1", 3, [0, 0]],
    "mixer": ["quadratic", None, 1, ["newton"]],
    "history": ["nothing", 1],
    "feature_dim": [None, 0, "8"],
    "num_inference_steps": [0, "12"],
    "family": [3, ["flux"]],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "field, value", [(name, value) for name, values in CHANGES.items() for value in values], ids=str
)
def test_a_wrong_field_is_named(saved, field, value):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises((ValueError, TypeError), match=f"`{field}` must ") as refused:
        FusedKANPredictor.from_pretrained(saved)
    assert refused.value.lesa_message  # and it is no bug


def test_a_field_of_a_newer_release_is_named(saved):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention": True, "depth": 3}))
    with pytest.raises(ValueError, match=r"unknown fields: attention, depth\. Remove them\. If a newer release"):
        FusedKANPredictor.from_pretrained(saved)


# Copies


def through_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v)), through_torch])
def test_predictors_rings_and_configurations_can_be_copied_while_they_are_used(predictor, copied):
    ring = predictor.make_ring(1, 4)
    for sigma in (0.9, 0.7):
        ring.push(torch.randn(1, 4, WIDTH), sigma)
    expected = predictor(ring, 0.5)
    assert torch.equal(copied(predictor)(copied(ring), 0.5), expected)
    assert copied(predictor.config) == predictor.config
    assert same(copied(predictor), predictor)
    expected.sum().backward()  # with gradients too
    assert torch.equal(copied(predictor)(copied(ring), 0.5), expected)


# Any configuration


def rising(values):
    return values.map(lambda found: tuple(sorted(found)))


@st.composite
def configurations(draw):
    bounds = draw(
        st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(lambda b: tuple(sorted(b, reverse=True)))
    )
    lengths = st.integers(1, 6)
    stages = len(bounds) + 1
    steps = draw(st.none() | rising(st.sets(st.integers(1, 11), max_size=5)).map(lambda s: (0, *s)))
    of_steps = {}
    if steps is not None:
        levels = st.lists(st.floats(0.0, 1.0), min_size=len(steps), max_size=len(steps), unique=True)
        errors = st.lists(st.floats(0.0, 2.0), min_size=len(steps), max_size=len(steps))
        of_steps = {
            "schedule": steps,
            "schedule_sigmas": tuple(sorted(draw(levels), reverse=True)),
            "schedule_errors": draw(st.none() | errors.map(tuple)),
        }
    return PredictorConfig(
        feature_dim=draw(st.integers(1, 5)),
        mixer=draw(st.sampled_from(["newton", "dense"])),
        history=draw(st.sampled_from([None, "anchors", "steps"])),
        history_length=draw(st.none() | lengths | st.tuples(*[lengths] * stages)),
        stage_bounds=bounds,
        rank=draw(st.integers(0, 3)),
        hidden=draw(st.none() | st.integers(1, 3)),
        grid_size=draw(st.integers(1, 9)),
        spline_order=draw(st.integers(1, 4)),
        family=draw(st.none() | st.sampled_from(["flux", "sd3"])),
        num_inference_steps=draw(st.none() | st.integers(12, 50)),
        **of_steps,
    )


@pytest.mark.slow
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(config=configurations())
def test_any_configuration_is_saved_and_loaded(tmp_path_factory, config):
    assert PredictorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(PredictorConfig.from_dict(config.to_dict()))
    folder, predictor = tmp_path_factory.mktemp("any"), filled(config)
    predictor.save_pretrained(folder)
    loaded = FusedKANPredictor.from_pretrained(folder)
    assert same(loaded, predictor)
    ring = loaded.make_ring(2, 3)
    for sigma in (1.0, 0.6):
        ring.push(torch.ones(2, 3, config.feature_dim), sigma)
    assert loaded(ring, 0.3).isfinite().all()
