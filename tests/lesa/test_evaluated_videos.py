"""What an evaluation measures, keeps and shows of videos."""

import csv
import importlib.util
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import lesa
import small_pipelines as small
from lesa.cli.evaluate import show
from lesa.evaluation import Evaluation, moving, quality, shown
from lesa.evaluation.shown import GIF, MP4, Shown

STEPS, SAMPLES = 3, 2
SIZE = (small.FRAMES, small.VIDEO_HEIGHT, small.VIDEO_WIDTH, 3)


def video(frames=6, side=4, seed=0):
    return 0.3 + 0.4 * np.random.default_rng(seed).random((frames, side, side, 3), np.float32)


def pattern(error, side=4):
    """Errors of this size with both signs in a frame."""
    signs = np.where(np.indices((side, side)).sum(0) % 2, 1, -1)
    return (error * signs[None, :, :, None]).astype(np.float32)


def test_equal_videos_differ_in_nothing():
    wanted = video()
    assert quality.frame_psnr(wanted, wanted) == quality.temporal_psnr(wanted, wanted) == math.inf


def test_an_error_in_one_frame():
    wanted, error = video(6), 0.1
    made = wanted.copy()
    made[2] += error
    assert quality.psnr(made, wanted, 1.0) == pytest.approx(20 + 10 * math.log10(6), abs=1e-4)
    assert quality.frame_psnr(made, wanted) == pytest.approx((20 + 5 * 100) / 6, abs=1e-4)
    # Two of the five differences are wrong by 0.1, of a range of 2.
    assert quality.temporal_psnr(made, wanted) == pytest.approx(20 + 10 * math.log10(4 * 5 / 2), abs=1e-4)


def test_a_flicker_is_worse_than_a_blur_of_the_same_size():
    wanted, error = video(8), pattern(0.02)
    flicker = wanted + error * np.array([1, -1] * 4, np.float32)[:, None, None, None]
    blur = wanted + error
    for made in (flicker, blur):
        assert quality.psnr(made, wanted, 1.0) == pytest.approx(20 * math.log10(50), abs=1e-3)
        assert quality.frame_psnr(made, wanted) == pytest.approx(20 * math.log10(50), abs=1e-3)
    assert quality.temporal_psnr(flicker, wanted) == pytest.approx(20 * math.log10(50), abs=1e-3)
    assert quality.temporal_psnr(blur, wanted) > 120  # rounding


def test_the_temporal_figure_is_never_far_below_that_of_the_whole_video():
    wanted, worst = video(2), pattern(0.05)
    made = wanted + worst * np.array([1, -1], np.float32)[:, None, None, None]
    below = quality.psnr(made, wanted, 1.0) - quality.temporal_psnr(made, wanted)
    assert below == pytest.approx(0, abs=1e-3)
    made = np.stack([wanted[0], wanted[1] + worst[0], wanted[0]])
    wanted = np.stack([*wanted, wanted[0]])
    below = quality.psnr(made, wanted, 1.0) - quality.temporal_psnr(made, wanted)
    assert below == pytest.approx(10 * math.log10(3 / 4), abs=1e-3) and below < 10 * math.log10(3 / 2)


def test_a_single_frame_has_no_changes():
    assert math.isnan(quality.temporal_psnr(video(1), video(1, seed=1)))
    assert quality.frame_psnr(video(1), video(1, seed=1)) == quality.psnr(video(1), video(1, seed=1), 1.0)


def test_what_is_kept_of_large_videos_is_bounded():
    long = np.zeros((200, 8, 600, 3), np.float32)
    long[:, :, :, 0] = np.linspace(0, 1, 200)[:, None, None]
    kept = Shown.of([long] * 6)
    assert kept.clips.shape == (4, 50, 3, 256, 3) and kept.clips.dtype == np.uint8
    assert np.array_equal(kept.clips[0, :, 0, 0, 0], (np.linspace(0, 1, 200)[::4] * 255).round())
    assert kept.images.shape == (6, 8, 600, 3) and kept.images[0, 0, 0, 0] == long[100, 0, 0, 0]
    large = np.zeros((16, 300, 256, 3), np.float32)
    assert len(Shown.of([large] * 4).clips) == shown.MOST_BYTES // (large.size) == 3
    assert Shown.of([large[0]] * 3).clips is None


def test_frames_are_shown_larger_or_smaller():
    assert moving._cell(16, 12, 100) == (96, 72)
    assert moving._cell(100, 60, 100) == (100, 60)
    width, height = moving._cell(256, 144, 4 * 8 * 64)
    assert width * height * 4 * 8 * 64 == pytest.approx(moving.MOST_PIXELS, rel=0.02)


@pytest.fixture(scope="module")
def pipe():
    return small.ALL["hunyuan"].build()


def evaluate(pipe, folder, against=("steps-2",)):
    inputs = [small.ALL["hunyuan"].inputs(number + 1) for number in range(SAMPLES)]
    inputs = [{name: value[-1:] if hasattr(value, "shape") else value for name, value in i.items()} for i in inputs]
    return lesa.evaluate(pipe, inputs, [], against, STEPS, out_dir=folder, progress=False)


@pytest.fixture(scope="module")
def evaluated(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return evaluate(pipe, folder), folder


def test_the_moving_picture_has_all_frames_rows_and_columns(evaluated):
    evaluation, folder = evaluated
    assert {name: clips.shape for name, clips in evaluation.clips.items()} == {
        "reference": (SAMPLES, *SIZE),
        "fewer-steps-2": (SAMPLES, *SIZE),
    }
    width, height = (2 * side for side in (small.VIDEO_WIDTH, small.VIDEO_HEIGHT))  # 48 is less than 96
    with Image.open(folder / GIF) as gif:
        assert gif.n_frames == small.FRAMES and gif.info["duration"] == 1000 / moving.FPS
        assert gif.height == 2 * (height + moving.GAP) + moving.GAP
        left = gif.width - SAMPLES * (width + moving.GAP)
        for frame in (0, 5):
            gif.seek(frame)
            pixels = np.asarray(gif.convert("RGB")).astype(int)
            for row, name in enumerate(("reference", "fewer-steps-2")):
                for column in range(SAMPLES):
                    top, begin = moving.GAP + row * (height + moving.GAP), left + column * (width + moving.GAP)
                    cell = pixels[top : top + height : 2, begin : begin + width : 2]
                    assert np.abs(cell - evaluation.clips[name][column, frame]).mean() < 12  # 256 colours


def test_figures_of_videos_are_in_all_that_is_written(evaluated, capsys):
    evaluation, folder = evaluated
    run = evaluation["fewer-steps-2"]
    assert run.temporal_psnr == pytest.approx(np.mean(run.per_sample["temporal_psnr"]))
    assert run.frame_psnr == pytest.approx(np.mean(run.per_sample["frame_psnr"])) and run.frame_psnr > run.psnr - 1e-6
    summary = json.loads((folder / "summary.json").read_text())
    written = {run["name"]: run for run in summary["runs"]}["fewer-steps-2"]
    assert (written["frame_psnr"], written["temporal_psnr"]) == (run.frame_psnr, run.temporal_psnr)
    assert written["per_sample"]["temporal_psnr"] == [*run.per_sample["temporal_psnr"]]
    assert summary["moving_picture"] == GIF
    with (folder / "runs.csv").open(newline="") as file:
        assert [*csv.DictReader(file)][1]["temporal_psnr"] == str(run.temporal_psnr)
    show(evaluation, folder)
    text = capsys.readouterr().out
    head, _, reference, line = text.splitlines()[1:5]
    figures = f"{run.psnr:.2f} {run.frame_psnr:.2f} {run.temporal_psnr:.2f}"
    assert "PSNR dB  frame dB  temporal dB    SSIM" in head and figures in " ".join(line.split())
    assert reference.split()[-5:] == ["-"] * 5
    assert f"{folder / 'comparison.png'}, {folder / GIF}" in text


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_with_what_is_kept(pipe, evaluated, tmp_path):
    evaluation, folder = evaluated
    shutil.copytree(folder / "runs", tmp_path / "runs")  # nothing else was written
    again = evaluate(pipe, tmp_path)
    assert again.clips.keys() == evaluation.clips.keys()
    assert all(np.array_equal(again.clips[name], clips) for name, clips in evaluation.clips.items())
    assert (tmp_path / GIF).read_bytes() == (folder / GIF).read_bytes()


@pytest.mark.slow
def test_of_an_older_release_the_reference_alone_has_a_row(pipe, evaluated, tmp_path):
    shutil.copytree(evaluated[1], tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "runs").glob("*.npz"):
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored if name != "clips"}
        np.savez(file, **arrays)
    for file in [*(tmp_path / "runs").glob("*.json"), tmp_path / "summary.json"]:
        contents = json.loads(file.read_text())
        for run in contents.get("runs", [contents.get("run", {})]):
            run.pop("frame_psnr", None), run.pop("temporal_psnr", None)
        file.write_text(json.dumps(contents))
    again = evaluate(pipe, tmp_path, ("steps-1",))
    assert [run.name for run in again.runs] == ["reference", "fewer-steps-1", "fewer-steps-2"]
    assert {*again.clips} == {"reference", "fewer-steps-1"} and again["fewer-steps-2"].temporal_psnr is None
    old = next(line for line in again.table().splitlines() if line.startswith("fewer-steps-2"))
    assert old.split()[-4:-1] == ["-", "-", f"{again['fewer-steps-2'].ssim:.4f}"]


@pytest.mark.slow
def test_without_ffmpeg_the_table_says_once_that_there_is_no_mp4(pipe, evaluated, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name))
    (tmp_path / MP4).write_bytes(b"of an earlier evaluation")
    shutil.copytree(evaluated[1] / "runs", tmp_path / "runs")
    evaluation = evaluate(pipe, tmp_path)
    assert evaluation.table().count(f"{MP4} is not available: it needs imageio-ffmpeg, which is not installed.") == 1
    assert (tmp_path / GIF).exists() and not (tmp_path / MP4).exists()
    monkeypatch.undo()
    assert MP4 not in evaluate(pipe, tmp_path).table()


@pytest.mark.slow
def test_the_mp4_has_all_frames(evaluated):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra video")
    _, folder = evaluated
    frames, seconds = ffmpeg.count_frames_and_secs(str(folder / MP4))
    assert (frames, seconds) == (small.FRAMES, pytest.approx(small.FRAMES / moving.FPS, abs=0.01))


def test_the_report_shows_the_videos(evaluated, tmp_path, monkeypatch):
    _, folder = evaluated
    html = lesa.report(folder, tmp_path / "a.html").read_text()
    assert html.count("data:image/gif;base64,") == 1 and "temporal PSNR, dB" in html and "PSNR per frame, dB" in html
    monkeypatch.setattr("lesa.evaluation.report_pictures.LARGEST_MOVING_PICTURE", 100)
    html = lesa.report(folder, tmp_path / "b.html").read_text()
    assert "data:image/gif" not in html and f"{GIF}, beside this page" in " ".join(html.split())


def test_a_failure_of_ffmpeg_loses_nothing(evaluated, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("broken pipe")

    monkeypatch.setattr(moving, "why_no_mp4", lambda: None)
    monkeypatch.setattr(moving, "write_mp4", fail)
    evaluation, folder = evaluated
    with pytest.raises(OSError, match="broken pipe"):
        evaluation.save(tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()
    assert (tmp_path / GIF).exists() and not (tmp_path / MP4).exists()


def test_where_no_shown_run_has_clips_there_is_no_moving_picture(evaluated, tmp_path, capsys):
    evaluation = replace(evaluated[0], clips={"another": next(iter(evaluated[0].clips.values()))})
    (tmp_path / GIF).write_bytes(b"of an earlier evaluation")
    assert evaluation.save(tmp_path) == [tmp_path / "comparison.png", tmp_path / "summary.json"]
    assert not (tmp_path / GIF).exists()
    assert "moving_picture" not in json.loads((tmp_path / "summary.json").read_text())
    show(evaluation, tmp_path)
    assert GIF not in capsys.readouterr().out


def test_images_have_none_of_it(evaluated, tmp_path):
    evaluation, _ = evaluated
    runs = [replace(run, frame_psnr=None, temporal_psnr=None) for run in evaluation.runs]
    images = Evaluation(tuple(runs), evaluation.images, {})
    assert "frame dB" not in images.table() and "neighbouring" not in images.table()
    assert "moving_picture" not in images.summary()
    images.save(tmp_path)
    assert not (tmp_path / GIF).exists() and not (tmp_path / MP4).exists()
