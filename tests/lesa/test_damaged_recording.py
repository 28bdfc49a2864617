"""Damaged, stray and foreign files in the folder of a recording: named, ignored, or recorded again."""

import json
import os
import shutil
import tempfile
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import interrupted_recordings as trials
import lesa
from lesa import Trajectories, artifacts, record
from lesa.cli import main
from lesa.training.shards import survey
from lesa_kernels import FusedKANPredictor, PredictorConfig
from made_recordings import write_recording

INPUTS = trials.inputs()
FIRST, OTHER, HEAD = "sample-00001.safetensors", "sample-00001-uncond.safetensors", "head.safetensors"


@pytest.fixture(scope="module")
def pipe():
    return trials.CASE.build()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    record(pipe, INPUTS, folder, **trials.OPTIONS)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "recording")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def read_all(folder):
    return [trajectory.features for trajectory in Trajectories(folder)]


def rewritten(path, change, metadata=True):
    tensors = load_file(path)
    kept = metadata_of(path) if metadata else None
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, kept)


def part(name, cut):
    def change(tensors):
        tensors[name] = cut(tensors[name])

    return change


def of_tensors(change):
    return lambda path: rewritten(path, change)


def cut_to(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def bytes_at(start, value):
    def change(path):
        old = path.read_bytes()
        path.write_bytes((old[:start] + value + old[start + len(value) :])[: max(len(old), 1)])

    return change


DAMAGES = {
    "empty": cut_to(0),
    "of 7 bytes": cut_to(7),
    "cut in the header": cut_to(100),
    "cut at 1000": cut_to(1000),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a long header": bytes_at(0, b"\xff" * 8),
    "garbage in the header": bytes_at(20, b"\xfe\x00\x7f"),
    "text": lambda path: path.write_text("<html>404</html>"),
    "another name for a tensor": of_tensors(lambda t: t.update(other=t.pop(min(t)))),
    "one tensor more": of_tensors(lambda t: t.update(other=torch.zeros(1))),
    "missing": lambda path: path.unlink(),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to(path.with_name("nothing"))),
}
OF_SAMPLES = {
    "without features": of_tensors(lambda t: t.pop("features")),
    "without token_index": of_tensors(lambda t: t.pop("token_index")),
    "fewer steps": of_tensors(lambda t: t.update({n: v[:1].clone() for n, v in t.items() if n != "token_index"})),
    "fewer steps in one": of_tensors(part("scale", lambda v: v[:1])),
    "another width": of_tensors(part("features", lambda v: v[..., :8])),
    "fewer tokens": of_tensors(lambda t: t.update(features=t["features"][:, :3], token_index=t["token_index"][:3])),
    "fewer outputs": of_tensors(part("latents", lambda v: v[..., :3])),
    "one axis more": of_tensors(part("shift", lambda v: v[None])),
    "no axis": of_tensors(part("sigmas", lambda v: v[0])),
    "half features": of_tensors(part("features", lambda v: v.half())),
    "double sigmas": of_tensors(part("sigmas", lambda v: v.double())),
    "short indices": of_tensors(part("token_index", lambda v: v.int())),
    "whole numbers": of_tensors(part("scale", lambda v: v.long())),
    "of the other stream": lambda path: shutil.copy(
        path.with_name(OTHER if path.name == FIRST else FIRST), path.with_name(path.name)
    ),
    "of the other sample": lambda path: shutil.copy(path.with_name(path.name.replace("00001", "00000")), path),
}
METADATA = {
    "not JSON": {"lesa": "{"},
    "a list": {"lesa": "[]"},
    "without a digest": {"lesa": "{}"},
    "another name": {"lexa": "{}"},
}
OF_ALL = {
    **DAMAGES,
    **{
        f"metadata, {k}": lambda path, said=said: save_file(load_file(path), path, said) for k, said in METADATA.items()
    },
}
OF_HEADS = {
    "another width": of_tensors(part("weight", lambda v: v[:, :8])),
    "a longer bias": of_tensors(part("bias", lambda v: torch.cat([v, v]))),
    "without weight": of_tensors(lambda t: t.pop("weight")),
    "NaN": of_tensors(lambda t: t["weight"].view(-1)[3:4].fill_(float("nan"))),
    "another number": of_tensors(lambda t: t["weight"].view(-1)[3:4].add_(1)),
}
CASES = [
    *((name, kind, damage) for kind, damage in {**OF_ALL, **OF_SAMPLES}.items() for name in (FIRST, OTHER)),
    *((HEAD, kind, damage) for kind, damage in {**OF_ALL, **OF_HEADS}.items()),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, damage", [(n, d) for n, _, d in CASES], ids=[f"{k}, {n[:-12]}" for n, k, _ in CASES])
def test_a_damaged_file_is_named_and_recorded_again(pipe, whole, folder, name, damage):
    damage(folder / name)
    unfinished = name == FIRST and not os.path.lexists(folder / name)  # as if it had been interrupted
    words = "1 of 2 samples" if unfinished else f"{name}` is (missing|damaged: .*)\\. Run `lesa.record` again"
    with pytest.raises(ValueError, match=words):
        read_all(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = record(pipe, INPUTS, folder, **trials.OPTIONS)
    assert contents(folder) == contents(whole)
    assert any(name in str(warning.message) for warning in said) == (not unfinished)
    if name != HEAD:
        assert made.recorded.kept == (0,) and (made.recorded.again, made.recorded.new)[unfinished] == (1,)
    read_all(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, OTHER])
@pytest.mark.parametrize(
    "change, why",
    [
        (lambda t: t["features"].view(-1)[5:6].fill_(float("nan")), "has other tensors"),
        (lambda t: t["features"].view(-1)[-9:].zero_(), "has other tensors"),
        (lambda t: t["sigmas"].add_(2**-20), "has other tensors"),
        (lambda t: t["token_index"].add_(1), "has other tensors"),
    ],
)
def test_other_numbers_are_found_when_they_are_read(pipe, whole, folder, name, change, why):
    """And `record` reads them too: it records this sample again, also if no other sample is left to record."""
    rewritten(folder / name, change)
    for read in (read_all, lambda folder: lesa.train(folder, schedule=[0], epochs=1, progress=False)):
        with pytest.raises(ValueError, match=f"{name}` is damaged: it {why}.* Run `lesa.record` again"):
            read(folder)
    with pytest.warns(UserWarning, match=f"{name} {why}.* It is recorded again"):
        made = record(pipe, INPUTS, folder, **trials.OPTIONS)
    assert (made.recorded.kept, made.recorded.again) == ((0,), (1,)) and contents(folder) == contents(whole)


def without_metadata(folder):
    """The recording as older versions wrote it."""
    for path in folder.glob("*.safetensors"):
        rewritten(path, lambda tensors: None, metadata=False)
    kept = ("format_version", "family", "pipeline", "feature_dim", "requested_num_inference_steps", "seed")
    kept += ("tokens_per_sample", "samples", "inputs_digest", "transformer", "predictor", "num_inference_steps")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {name: manifest[name] for name in [*kept, "dtype", "head_eps"]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.slow
def test_recordings_of_older_versions_are_read_and_continued(pipe, whole, folder):
    without_metadata(folder)
    before = read_all(whole)
    assert all(map(torch.equal, read_all(folder), before))
    old = contents(folder)
    (folder / FIRST).unlink()
    record(pipe, INPUTS, folder, **trials.OPTIONS)
    assert all(map(torch.equal, read_all(folder), before))
    assert contents(folder)["sample-00000.safetensors"] == old["sample-00000.safetensors"]
    with pytest.raises(ValueError, match="`seed` must be 0"):
        record(pipe, INPUTS, folder, **{**trials.OPTIONS, "seed": 1})
    record(pipe.__class__(**{**pipe.components, "scheduler": other_scheduler(pipe)}), INPUTS, folder, **trials.OPTIONS)
    rewritten(folder / "sample-00000.safetensors", lambda t: t["latents"].view(-1)[:1].fill_(float("inf")))
    with pytest.raises(ValueError, match=r"sample-00000.safetensors` is damaged: .*NaN or Inf in 'latents'"):
        read_all(folder)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["copy", "Kopie", "uncond-copy", "old", "backup"])
@pytest.mark.parametrize("source", [FIRST, OTHER])
@pytest.mark.parametrize("samples", [(1,), (0, 1)])
def test_copies_in_old_recordings_are_named(pipe, folder, stream, source, samples):
    """Else they would be trained on like streams."""
    without_metadata(folder)
    old = read_all(folder)
    for number in samples:
        path = folder / source.replace("00001", f"0000{number}")
        shutil.copy(path, folder / f"sample-0000{number}-{stream}.safetensors")
    before = contents(folder)
    words = rf"-{stream}.safetensors` must be a stream of the recording, but got .* probably a copy.* Move it away"
    for use in (Trajectories, lambda folder: record(pipe, INPUTS, folder, **trials.OPTIONS)):
        with pytest.raises(ValueError, match=words):
            use(folder)
    assert contents(folder) == before
    for path in folder.glob(f"sample-*-{stream}.safetensors"):
        path.unlink()
    assert all(map(torch.equal, read_all(folder), old))


@pytest.mark.slow
def test_a_changed_copy_in_an_old_recording_is_named(folder):
    without_metadata(folder)
    shutil.copy(folder / FIRST, folder / "sample-00001-copy.safetensors")
    rewritten(folder / "sample-00001-copy.safetensors", lambda t: t["latents"].add_(1), metadata=False)
    with pytest.raises(ValueError, match="a stream 'copy' that not all samples have"):
        Trajectories(folder)


@pytest.mark.slow
def test_old_recordings_with_streams_of_their_own_are_read(folder):
    """Some samples may have no guidance. A pipeline may have other names for its streams."""
    without_metadata(folder)
    for number in range(2):
        (folder / f"sample-0000{number}-uncond.safetensors").rename(folder / f"sample-0000{number}-mine.safetensors")
    assert Trajectories(folder).names[1::2] == ["sample-00000-mine", "sample-00001-mine"]
    for number in range(2):
        (folder / f"sample-0000{number}-mine.safetensors").rename(folder / f"sample-0000{number}-uncond.safetensors")
    (folder / OTHER).unlink()
    assert Trajectories(folder).samples == [0, 0, 1]


def other_scheduler(pipe):
    return type(pipe.scheduler).from_config(pipe.scheduler.config, shift=5.0)


# Strays

STRAYS = [
    "sample-00001 (1).safetensors",
    "sample-00001 copy.safetensors",
    "sample-00001-copy.safetensors",
    "sample-00001-uncond (1).safetensors",
    "sample-00001-uncond-2.safetensors",
    "sample-00001.safetensors.bak",
    "sample-00001.safetensors~",
    "sample-00001.safetensors.tmp",
    "sample-00001.safetensors.part",
    "#sample-00001.safetensors#",
    ".sample-00001.safetensors.swp",
    "._sample-00001.safetensors",
    "Sample-00001.safetensors",
    "SAMPLE-00001.SAFETENSORS",
    "sample-1.safetensors",
    "sample-000001.safetensors",
    "sample-0000١.safetensors",
    "sample--0001.safetensors",
    "sample-00001.5.safetensors",
    "sample-.safetensors",
    "sample-abc.safetensors",
    "sample-00001-.safetensors",
    "sample-00001.pt",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".nfs000000000001",
    "manifest (1).json",
    "head.safetensors.tmp",
    "notes.txt",
]


def copy_stray(folder, name):
    shutil.copy(folder / "sample-00000.safetensors", folder / name)


def test_stray_files_are_ignored(whole, folder):
    """In old recordings and in new ones. `record` leaves them where they are."""
    wanted = Trajectories(whole).names
    for name in STRAYS:
        copy_stray(folder, name)
    (folder / "sample-00000-folder.safetensors").mkdir()
    (folder / "samples").mkdir()
    read = Trajectories(folder)
    assert read.names == wanted and read.samples == [0, 0, 1, 1]
    assert all(torch.equal(one.features, other.features) for one, other in zip(read, Trajectories(whole), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRAYS)
def test_a_recording_goes_on_beside_a_stray_file(pipe, whole, folder, name):
    copy_stray(folder, name)
    stray = (folder / name).read_bytes()
    (folder / FIRST).unlink()
    with pytest.raises(ValueError, match="1 of 2 samples"):
        Trajectories(folder)
    record(pipe, INPUTS, folder, **trials.OPTIONS)
    left = contents(folder)
    if not name.endswith(".safetensors.tmp"):  # the name of an unfinished file of our own
        assert left.pop(name) == stray
    left.pop(name, None)
    assert left == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample-00002", "sample-00007", "sample-00002-uncond", "sample-100000"])
def test_a_sample_beyond_the_manifest_is_named(pipe, folder, name):
    """An error, because its neighbours may come from the same other recording."""
    copy_stray(folder, f"{name}.safetensors")
    before = contents(folder)
    words = rf"{name}.safetensors` must belong to the recording.*recording of 2 samples.* Move it away"
    for use in (Trajectories, lambda folder: record(pipe, INPUTS, folder, **trials.OPTIONS)):
        with pytest.raises(ValueError, match=words):
            use(folder)
    assert contents(folder) == before


@pytest.mark.slow
def test_a_sample_of_another_recording_is_named(pipe, whole, folder, tmp_path):
    record(pipe, INPUTS, tmp_path / "other", **{**trials.OPTIONS, "seed": 9})
    shutil.copy(tmp_path / "other" / OTHER, folder / OTHER)
    words = f"{OTHER}` must belong to the recording in its folder.*samples of another one. Move it away"
    for use in (Trajectories, lambda folder: record(pipe, INPUTS, folder, **trials.OPTIONS)):
        with pytest.raises(ValueError, match=words):
            use(folder)
    (folder / OTHER).unlink()
    shutil.copy(tmp_path / "other" / HEAD, folder / HEAD)
    with pytest.raises(ValueError, match=f"{HEAD}` is damaged: it belongs to another recording"):
        Trajectories(folder)
    with pytest.warns(UserWarning, match="uncond.safetensors is missing. It is recorded again"):
        record(pipe, INPUTS, folder, **trials.OPTIONS)
    assert contents(folder) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, OTHER, HEAD, "manifest.json"])
def test_a_folder_in_the_place_of_a_file_is_named(pipe, folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    for use in (Trajectories, lambda folder: record(pipe, INPUTS, folder, **trials.OPTIONS)):
        with pytest.raises(ValueError, match=name):
            use(folder)


# The manifest

MANIFESTS = {
    "empty": "",
    "cut": '{"format_version": 1, "fam',
    "bytes": "\udcff\udcfe",
    "a list": "[1, 2]",
    "a number": "3",
    "deep": "[" * 100_000,
    "null": "null",
    "zeros": "\0" * 100,
}


def broken_manifests(manifest):
    """Manifests with one entry of a wrong type or value."""
    wrong = ("3", None, [], {}, -1, 1.5, True, float("nan"), 10**30)
    for name in ("samples", "feature_dim", "num_inference_steps", "head_eps", "seed", "requested_num_inference_steps"):
        for value in wrong:
            if not (name == "head_eps" and value == 1.5) and not (value == 10**30 and name != "head_eps"):
                yield {**manifest, name: value}
    yield from ({**manifest, name: 0} for name in ("samples", "feature_dim", "num_inference_steps"))
    for name in ("family", "dtype"):
        yield from ({**manifest, name: value} for value in (3, None, [], {}))
    for name in ("scheduler", "pipeline_config", "configs", "dtypes", "adapters", "weights", "arguments", "predictor"):
        yield from ({**manifest, name: value} for value in (3, "x", [1]))
    yield from ({**manifest, "tokens_per_sample": value} for value in ("7", [7], -7, 1.5))
    yield from ({**manifest, "format_version": value} for value in ("1", None, 3, [1], 0))


@pytest.mark.slow
def test_a_manifest_that_cannot_be_read_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    texts = [*MANIFESTS.values(), *map(json.dumps, broken_manifests(manifest))]
    assert len(texts) > 80
    for text in texts:
        (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"manifest\.json") as error:
            Trajectories(folder)
        assert any(word in str(error.value) for word in ("Restore the file", "Record again")), text[:80]


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("head_eps", 1e-2), ("family", "fluy"), ("head_eps", 0.0)])
def test_an_entry_that_no_sample_confirms_is_compared_with_the_head(pipe, folder, name, value):
    """Another one would train another predictor."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: value}))
    (folder / FIRST).unlink()
    before = contents(folder)
    with pytest.raises(
        ValueError, match=rf"`{name} in .*manifest.json` must be .*, as the file of the head says, but got"
    ):
        Trajectories(folder)
    with pytest.raises(ValueError, match=f"`{name}"):
        record(pipe, INPUTS, folder, **trials.OPTIONS)
    assert contents(folder) == before
    rewritten(folder / HEAD, lambda tensors: None, metadata=False)  # as older versions wrote it
    with pytest.raises(ValueError, match="1 of 2 samples"):
        Trajectories(folder)


# Folders that hold something else


def a_predictor(folder):
    FusedKANPredictor(PredictorConfig(8)).save_pretrained(folder)


FOREIGN = {
    "a predictor": a_predictor,
    "a text": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a folder": lambda folder: (folder / "runs").mkdir(),
}


@pytest.mark.slow
@pytest.mark.parametrize("fill", FOREIGN.values(), ids=FOREIGN)
def test_no_recording_begins_in_a_folder_of_something_else(pipe, tmp_path, fill):
    fill(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="`out_dir` must be empty or hold a recording, but got .*Choose another"):
        record(pipe, INPUTS, tmp_path, **trials.OPTIONS)
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name, error", [("", ValueError), ("a\0b", ValueError), (None, TypeError), (3, TypeError)])
def test_what_is_no_path_is_refused(pipe, tmp_path, monkeypatch, name, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match="`out_dir` must be a path"):
        record(pipe, INPUTS, name, **trials.OPTIONS)
    if name is not None:
        with pytest.raises(error, match="`out_dir` must be a path"):
            lesa.train(write_recording(tmp_path / "t"), schedule=[0, 2], out_dir=name, progress=False)


@pytest.mark.slow
def test_a_file_is_no_folder_for_a_recording(pipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="`out_dir` must be a folder"):
            record(pipe, INPUTS, out, **trials.OPTIONS)


@pytest.mark.slow
def test_a_finished_recording_need_not_be_writable(pipe, folder, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    for owner, name in ((tempfile, "TemporaryFile"), (artifacts, "_locked"), (artifacts, "whole_file")):
        monkeypatch.setattr(owner, name, refuse)
    assert record(pipe, INPUTS, folder, **trials.OPTIONS).recorded.kept == (0, 1)
    (folder / FIRST).unlink()
    with pytest.raises(PermissionError):
        record(pipe, INPUTS, folder, **trials.OPTIONS)


@pytest.mark.slow
def test_hidden_files_and_remnants_do_not_hinder_a_recording(pipe, whole, tmp_path):
    for name in (".DS_Store", "manifest.json.tmp", HEAD):
        (tmp_path / name).write_bytes(b"half")
    record(pipe, INPUTS, tmp_path, **trials.OPTIONS)
    left = contents(tmp_path)
    assert left.pop(".DS_Store") == b"half" and left.pop("manifest.json.tmp", b"half") == b"half"
    assert left == contents(whole)


def test_a_manifest_of_many_samples_takes_no_time(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "samples": 10**15}))
    with pytest.raises(ValueError, match="with 2 of 1000000000000000 samples"):
        Trajectories(folder)


# What `lesa record` prints


@pytest.mark.slow
def test_the_command_says_what_it_did(tmp_path, capsys):
    main(["demo", "--export", str(tmp_path / "demo")])
    inputs = tmp_path / "demo" / "prompts.safetensors"
    command = ["record", "--model", str(tmp_path / "demo" / "model"), "--inputs", str(inputs)]
    command += ["--steps", "1", "--batch-size", "32", "--out", str(tmp_path / "out")]
    main(command)
    count = len(Trajectories(tmp_path / "out"))
    end = f"trajectories of 1 steps to {tmp_path / 'out'}"
    assert capsys.readouterr().out.endswith(f"Wrote {count} {end}\n")
    main(command)
    assert capsys.readouterr().out.endswith(f"Wrote 0 {end}; samples that were there already: {count}\n")
    cut_to(1000)(tmp_path / "out" / FIRST)
    (tmp_path / "out" / "sample-00004.safetensors").unlink()
    with pytest.raises(SystemExit) as exited:
        main(["train", "--trajectories", str(tmp_path / "out"), "--schedule", "3", "--out", str(tmp_path / "trained")])
    said = capsys.readouterr().err
    assert exited.value.code == 2 and said.count("\n") == 1 and f"{FIRST}` is damaged: " in said
    with pytest.warns(UserWarning, match=f"{FIRST} is no whole safetensors file"):
        main(command)
    said = f"Wrote 2 {end}; samples that were there already: {count - 2}; damaged samples that were recorded again: 1\n"
    assert capsys.readouterr().out.endswith(said)


# A fuzz of the reader


@pytest.mark.slow
@seed(20)
@settings(max_examples=400, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_the_files_the_data_are_right_or_the_file_is_named(whole, tmp_path_factory, data):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "recording")
    names = sorted(contents(folder))
    changed = set()
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        name = data.draw(st.sampled_from(names), label="file")
        path, old = folder / name, (folder / name).read_bytes()
        kind = data.draw(st.sampled_from(["cut", "flip", "swap", "insert", "zero", "grow"]), label="kind")
        at = data.draw(st.one_of(st.integers(0, 1200), st.integers(0, max(len(old) - 1, 0))), label="at")
        at = min(at, max(len(old) - 1, 0))
        if kind == "cut":
            path.write_bytes(old[:at])
        elif kind == "flip" and old:
            bit = 1 << data.draw(st.integers(0, 7), label="bit")
            path.write_bytes(old[:at] + bytes([old[at] ^ bit]) + old[at + 1 :])
        elif kind == "swap":
            other = folder / data.draw(st.sampled_from(names), label="other")
            path.write_bytes(other.read_bytes())
            other.write_bytes(old)
            changed.add(other.name)
        elif kind == "insert":
            path.write_bytes(old[:at] + data.draw(st.binary(min_size=1, max_size=8), label="bytes") + old[at:])
        elif kind == "zero":
            size = data.draw(st.integers(1, 64), label="size")
            path.write_bytes((old[:at] + bytes(size) + old[at + size :])[: len(old)])
        else:
            path.write_bytes(old + bytes(data.draw(st.integers(1, 9), label="more")))
        changed.add(name)
    try:
        read = Trajectories(folder)
        got = [*read]
    except (ValueError, FileNotFoundError) as error:
        assert any(name.removesuffix(".safetensors") in str(error) for name in changed) or "samples" in str(error)
        return
    wanted = Trajectories(whole)
    assert read.names == wanted.names
    for one, other in zip(got, wanted, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(other))
    assert torch.equal(read.head_weight, wanted.head_weight) and torch.equal(read.head_bias, wanted.head_bias)
    for name in ("head_eps", "family", "num_inference_steps", "feature_dim", "samples"):
        assert getattr(read, name) == getattr(wanted, name)
    assert survey(folder, read.manifest, None).damaged == {}
