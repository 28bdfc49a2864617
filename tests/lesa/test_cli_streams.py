"""Where the commands print: streams of any encoding, closed ones, and nothing of other libraries."""

import io
import logging
import os
import subprocess
import sys

import pytest

import lesa
from lesa import cli
from lesa.cli.quiet import quiet_imports
from lesa.demo import digits
from lesa.inputs import write_inputs
from lesa_kernels import FusedKANPredictor, PredictorConfig

ESTIMATE = ["estimate", "--model", "flux-1024"]


def printed(monkeypatch, encoding, words=ESTIMATE, errors="strict"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        cli.main(words)
        assert stream.errors == errors, "as it was"
    return stream.buffer.getvalue().decode(encoding)


def test_every_encoding_prints_the_estimate(monkeypatch):
    table = lesa.estimate("flux-1024").table() + "\n"
    assert "µs" in table
    for encoding in ("utf-8", "utf-16", "latin-1", "cp1252", "iso8859-15"):
        assert printed(monkeypatch, encoding) == table
    assert printed(monkeypatch, "ascii") == table.replace("µ", "u")
    assert printed(monkeypatch, "koi8-r", errors="replace") == table.replace("µ", "u")


def test_other_characters_are_printed_as_in_a_string(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        printed(monkeypatch, "ascii", [*ESTIMATE, "--schedule", "é"])
    monkeypatch.setattr(sys, "stderr", stream := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    for name in ("größe", "猫", "\udcff"):
        with pytest.raises(SystemExit) as exit:
            cli.main(["report", "--evaluation", str(tmp_path / name)])
        assert exit.value.code == 2
    stream.flush()
    lines = stream.buffer.getvalue().decode().splitlines()
    assert len(lines) == 3 and all("lesa: error: `--evaluation` must" in line for line in lines)
    assert r"gr\xf6\xdfe" in lines[0] and r"\u732b" in lines[1] and r"\udcff" in lines[2]


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["none", "without encoding"])
def test_a_stream_without_an_encoding_is_printed_to(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    cli.main(ESTIMATE)
    assert stream is None or "Speed-up" in stream.getvalue()


def test_a_prompt_of_broken_bytes_is_refused(capsys):
    words = f"generate --model {digits.PIPELINE_DIR} --predictor {digits.WEIGHTS}/newton-9 --output x.png --device cpu"
    with pytest.raises(SystemExit) as exit:
        cli.main([*words.split(), "--prompt", "caf\udce9"])
    assert exit.value.code == 2
    assert "argument --prompt: it has bytes that are not text" in capsys.readouterr().err


def test_only_messages_about_how_torchao_is_built_are_hidden():
    quiet_imports()
    quiet_imports()
    texts = {
        "torchao": ["Failed to load x.so: no", "your weights are damaged"],
        "torch.utils._pytree": ["%s is an Enum subclass and is now", "something else"],
        "diffusers.quantizers.torchao.torchao_quantizer": ["Unable to import `torchao` Tensor objects. This", "other"],
    }
    for name, (hidden, shown) in texts.items():
        logger = logging.getLogger(name)
        assert sum(type(known).__module__ == "lesa.cli.quiet" for known in logger.filters) == 1
        for text, passes in ((hidden, False), (shown, True)):
            record = logger.makeRecord(name, logging.WARNING, "file", 1, text, (), None)
            assert bool(logger.filter(record)) is passes


SCRIPT = r"""
import os, sys
from lesa.cli import main

folder, model = sys.argv[1:]
assert sys.getfilesystemencoding() == "ascii" and sys.stdout.encoding == "ascii"


def command(words):
    main([word.format(f=folder, m=model) for word in words.split()])


main(["estimate", "--model", "flux-1024"])
command("record --model {m} --inputs {f}/i.safetensors --steps 12 --tokens-per-sample 4 --out {f}/r --device cpu")
command("train --trajectories {f}/r --schedule 4 --epochs 1 --rank 1 --hidden 2 --out {f}/trained --device cpu")
run = "--model {m} --predictor {f}/trained --inputs {f}/i.safetensors --steps 12 --device cpu"
command(f"generate {run} --output {{f}}/x.png")
command(f"evaluate {run} --against steps --out {{f}}/results")
command("report --evaluation {f}/results")
command("env")


def exit_code(words, stream):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        os.dup2(stream, 1)
        try:
            main(words)
        except SystemExit as exit:
            os._exit(exit.code)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


reader, writer = os.pipe()
os.close(reader)
assert exit_code(["estimate", "--model", "flux-1024"], writer) == 141  # as in `lesa estimate | head -0`
assert exit_code(["--help"], writer) == 141
assert exit_code(["env"], writer) == 141
print("refused", exit_code(["estimate", "--model", "flux-1024"], os.open("/dev/full", os.O_WRONLY)))
print("done")
"""


@pytest.mark.slow
def test_every_command_in_an_ascii_locale_and_without_messages_of_others(tmp_path):
    folder = tmp_path / "größe_µ"
    folder.mkdir()
    write_inputs(folder / "i.safetensors", digits.inputs_for([3, 8]))
    FusedKANPredictor(PredictorConfig(128, rank=1, hidden=2)).save_pretrained(folder / "p")
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    left_out = ("TRANSFORMERS_VERBOSITY", "TRITON_INTERPRET", "PYTHONUNBUFFERED")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    words = [sys.executable, "-c", SCRIPT, str(folder), str(digits.PIPELINE_DIR)]
    # Not in the checkout, whose package would come before the installed one.
    result = subprocess.run(words, capture_output=True, cwd=tmp_path, env={**environment, **locale}, timeout=300)
    assert result.returncode == 0, result.stderr.decode()
    out = result.stdout.decode("ascii")
    assert "us." in out and r"gr\udcc3\udcb6" in out  # such a locale knows no letters in the names of files
    assert out.splitlines()[-2:] == ["refused 2", "done"]
    assert (folder / "x-00001.png").is_file() and (folder / "results" / "report.html").is_file()
    shown = [line for line in result.stderr.decode("ascii").replace("\r", "\n").splitlines() if line.strip()]
    bars = ("record:", "train:", "evaluate:", "guided:", "closed loop:")
    others = [line for line in shown if not line.startswith(bars)]
    assert [line for line in others if "No space left" not in line] == []
