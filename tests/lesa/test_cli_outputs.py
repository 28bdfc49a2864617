"""What `lesa generate` writes: pictures, layers and videos, in every format that can be written."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import lesa.cli.loading
import small_pipelines as small
from lesa import cli
from lesa.cli import UsageError
from lesa.cli.outputs import can_be_written, check_files, check_output, write
from lesa.inputs import Sample, write_inputs
from lesa_kernels import FusedKANPredictor, PredictorConfig

pytestmark = pytest.mark.usefixtures("settings_of_the_command")

FRAMES = small.FRAMES


def picture(value=0, height=33, width=47, mode="RGB"):
    return Image.new(mode, (width, height), (value,) * len(mode))


def video(count=9, **size):
    return [picture(20 * number, **size) for number in range(count)]


def frames_of(file):
    with imageio.get_reader(file) as reader:
        return reader.get_meta_data(), [np.asarray(frame) for frame in reader]


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (32, 47), (1, 1)])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.slow
def test_an_mp4_has_every_frame_in_even_sizes(tmp_path, size, count):
    """Compressed, the pictures change a little; beside an odd edge, the last row and column are there twice."""
    height, width = size
    files = write(SimpleNamespace(frames=[video(count, height=height, width=width)]), tmp_path / "v.mp4", None)
    assert files == [tmp_path / "v.mp4"]
    about, frames = frames_of(files[0])
    assert (about["fps"], about["codec"], len(frames)) == (24, "h264", count)
    for number, frame in enumerate(frames):
        assert frame.shape == (height + height % 2, width + width % 2, 3)
        assert np.abs(frame.astype(int) - 20 * number).max() < 12


@pytest.mark.parametrize("fps", [24, 15, 50, 23.976, 1])
def test_a_gif_has_every_frame_and_lasts_as_long_as_it_must(tmp_path, fps):
    write(SimpleNamespace(frames=[video()]), tmp_path / "v.GIF", fps)
    file = Image.open(tmp_path / "v.GIF")
    assert (file.format, file.n_frames, file.size) == ("GIF", 9, (47, 33))
    durations = []
    for number in range(9):
        file.seek(number)
        durations.append(file.info["duration"])
        assert np.abs(np.asarray(file.convert("RGB")).astype(int) - 20 * number).max() < 3
    assert sum(durations) == pytest.approx(9000 / fps, abs=5)
    assert max(durations) - min(durations) <= 10


def test_frames_and_layers_get_numbers(tmp_path):
    videos = [video(2), video(1)]
    assert write(SimpleNamespace(frames=videos), tmp_path / "a" / "v.png", None) == [
        tmp_path / "a" / f"v-000{number}.png" for number in range(3)
    ]
    layers = [[picture(mode="RGBA"), picture(9, mode="RGBA")]]
    (first, second) = write(SimpleNamespace(images=layers), tmp_path / "l.webp", None)
    assert (first.name, second.name) == ("l-0000.webp", "l-0001.webp")
    assert write(SimpleNamespace(images=[picture()]), tmp_path / "one.tiff", None) == [tmp_path / "one.tiff"]
    assert write(SimpleNamespace(frames=[video(1)] * 2), tmp_path / "v.gif", 9)[1] == tmp_path / "v-0001.gif"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", sorted(Image.registered_extensions()))
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_what_can_be_written_is_written_and_all_else_is_refused(tmp_path, suffix, mode):
    file = tmp_path / f"x{suffix.upper()}"
    call = FakeLayers.__call__ if mode == "RGBA" else FakeImages.__call__
    if can_be_written(suffix, mode):
        check_output(file, call)
        write(SimpleNamespace(images=[picture(7, 300, 270, mode)]), file, None)
        assert file.stat().st_size > 0
    else:
        with pytest.raises(UsageError, match=rf"--output: .*'{suffix}' cannot be written.*\.png"):
            check_output(file, call)


class FakeImages:
    def __call__(self, prompt=None): ...


class FakeLayers:
    def __call__(self, prompt=None, layers=4): ...


class FakeVideos:
    def __call__(self, prompt=None, num_frames=9): ...


@pytest.mark.parametrize(
    ("name", "call", "fps", "message"),
    [
        ("x", None, None, "it has no suffix"),
        (".png", None, None, "it has no suffix"),
        ("x.psd", None, None, "'.psd' cannot be written"),
        ("x.jpg", FakeLayers, None, "'.jpg' cannot be written"),
        ("x.ico", FakeImages, None, "'.ico' cannot be written"),
        ("x.webm", FakeVideos, None, "'.webm' cannot be written"),
        ("x.mp4", FakeImages, None, "an .mp4 file holds a video, and this model makes pictures"),
        ("x.gif", FakeImages, 12, "--fps: it is for videos"),
        ("x.png", FakeVideos, 12, "--fps: .*x.png holds single pictures"),
        ("x.gif", FakeVideos, 51, "--fps: a .gif file has at most 50, but got 51"),
        ("folder.png", None, None, "is a folder"),
        ("file/x.png", None, None, "is a file, so that"),
        ("file/a/b/x.png", None, None, "is a file, so that"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path, name, call, fps, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=message):
        check_output(tmp_path / name, call and call.__call__, fps)


@pytest.mark.parametrize("name", ["x.PNG", "new/folder/x.jpeg", "x.gif", "ü µ.webp", "x.tar.png"])
def test_an_output_that_can_be_written_is_let_through(tmp_path, name):
    check_output(tmp_path / name, FakeImages.__call__)
    check_output(tmp_path / name, FakeVideos.__call__)
    assert list(tmp_path.iterdir()) == []


def test_a_protected_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "x.png")
    with pytest.raises(UsageError, match="x.png exists and is write-protected"):
        check_output(tmp_path / "x.png", None)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match="nothing can be written to the folder"):
        check_output(tmp_path / "new" / "x.png", None)


@pytest.mark.parametrize(
    ("taken", "name", "call", "arguments"),
    [
        ("x-00002.png", "x.png", None, [{}, {}, {}]),
        ("x-00001.png", "x.png", FakeImages, [{}, {}]),
        ("x-0008.png", "x.png", FakeVideos, [{}]),
        ("x-0019.png", "x.png", FakeVideos, [{"num_frames": 20}]),
        ("x-00001-0003.png", "x.png", FakeLayers, [{}, {}]),
        ("x-00001.mp4", "x.mp4", FakeVideos, [{}, {}]),
    ],
)
def test_every_numbered_file_is_checked(tmp_path, taken, name, call, arguments):
    samples = [Sample("x.jsonl", values) for values in arguments]
    check_files(tmp_path / name, samples, call and call.__call__)
    (tmp_path / taken).mkdir()
    with pytest.raises(UsageError, match=f"argument --output: .*{taken} is a folder"):
        check_files(tmp_path / name, samples, call and call.__call__)


@pytest.mark.parametrize(
    ("free", "name", "call"),
    [("x-00002.png", "x.png", FakeImages), ("x-0009.png", "x.png", FakeVideos), ("x-0000.gif", "x.gif", FakeVideos)],
)
def test_files_that_are_not_written_may_be_folders(tmp_path, free, name, call):
    (tmp_path / free).mkdir()
    check_files(tmp_path / name, [Sample("x.jsonl", {})] * 2, call.__call__)
    check_files(tmp_path / name, [Sample("x.jsonl", {})], call.__call__)


def test_without_the_extra_a_video_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name))
    monkeypatch.setattr(lesa.cli.loading, "load_pipeline", None)
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", "--model", "nowhere", "--predictor", "nowhere", "--prompt", "a", "--output", "v.mp4"])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install lesa-kernels[video]" in line


def test_without_a_program_that_encodes_a_video_is_refused(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    with pytest.raises(UsageError, match=r"needs ffmpeg: No ffmpeg exe could be found.*\.gif"):
        check_output(tmp_path / "v.mp4", FakeVideos.__call__)


# The command with small models


def saved(name, folder, batch=2):
    """A small pipeline, a predictor for it, and inputs in the order of their seeds, in a folder."""
    case = small.ALL[name]
    pipe = case.build()
    pipe.save_pretrained(folder / "model")
    config = PredictorConfig(small.DIM, rank=2, hidden=4, history_length=2)
    FusedKANPredictor(config).save_pretrained(folder / "p")
    one = case.inputs(1)
    tensors = {key: value for key, value in one.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in one.items() if isinstance(value, (int, float))}
    write_inputs(folder / "one.safetensors", [{**tensors, **others}])
    write_inputs(folder / "two.safetensors", [{**tensors, **others}] * batch)
    return folder


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    return saved("hunyuan", tmp_path_factory.mktemp("hunyuan"))


def generate(folder, inputs, output, *more):
    words = f"generate --model {folder}/model --predictor {folder}/p --schedule 0,2 --steps 4 --device cpu"
    cli.main([*words.split(), "--inputs", str(folder / inputs), "--output", str(output), *more])


@pytest.mark.slow
def test_a_video_from_the_command_line(hunyuan, tmp_path, capsys):
    size = (small.VIDEO_WIDTH, small.VIDEO_HEIGHT)
    generate(hunyuan, "one.safetensors", tmp_path / "v.mp4")
    about, frames = frames_of(tmp_path / "v.mp4")
    assert (about["size"], about["fps"], len(frames)) == (size, 24, FRAMES)
    generate(hunyuan, "one.safetensors", tmp_path / "v.gif", "--fps", "10")
    gif = Image.open(tmp_path / "v.gif")
    assert (gif.size, gif.n_frames, gif.info["duration"]) == (size, FRAMES, 100)
    generate(hunyuan, "two.safetensors", tmp_path / "frames" / "v.png")
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [f"v-{sample:05d}-{frame:04d}.png" for sample in range(2) for frame in range(FRAMES)]
    pixels = [np.asarray(Image.open(tmp_path / "frames" / f"v-00000-{frame:04d}.png")) for frame in range(FRAMES)]
    assert all(frame.shape == (size[1], size[0], 3) for frame in pixels)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(pixels, frames)) < 16  # the same video
    out = capsys.readouterr().out
    assert f"Wrote {tmp_path}/v.mp4: 2 of 4 steps computed" in out
    assert f"Wrote {tmp_path}/frames/v-00001-0000.png to v-00001-0008.png: 2 of 4 steps computed" in out


@pytest.mark.slow
def test_a_size_that_a_video_model_refuses_is_named(hunyuan, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        generate(hunyuan, "one.safetensors", tmp_path / "v.gif", "--height", "33")
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and not [*tmp_path.iterdir()]
    assert "one.safetensors, row 0 with --height 33: HunyuanVideoPipeline refuses it: `height` and `width`" in line


@pytest.mark.slow
def test_every_layer_of_a_picture_is_written(tmp_path, monkeypatch, capsys):
    case = small.ALL["qwen layered"]
    monkeypatch.setattr(lesa.cli.loading, "load_pipeline", lambda *_, **__: case.build())
    FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4, history_length=2)).save_pretrained(tmp_path / "p")
    (tmp_path / "model").mkdir()
    small.image(1, mode="RGBA").save(tmp_path / "in.png")
    inputs = case.inputs(1)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    others = {"prompt": "words", "image": "in.png", "layers": 2, "true_cfg_scale": 1.0}
    write_inputs(tmp_path / "one.safetensors", [{**tensors, **others}])
    with pytest.raises(SystemExit):
        generate(tmp_path, "one.safetensors", tmp_path / "x.jpg")
    assert "'.jpg' cannot be written" in capsys.readouterr().err
    with small.small_areas():
        generate(tmp_path, "one.safetensors", tmp_path / "x.png")
    names = sorted(path.name for path in tmp_path.glob("x*"))
    assert names == ["x-0000.png", "x-0001.png"]
    assert all(Image.open(tmp_path / name).mode == "RGBA" for name in names)
