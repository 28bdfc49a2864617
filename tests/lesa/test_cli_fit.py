"""`lesa fit` as a whole, on a small pipeline that lies in a folder."""

import json
import re

import pytest

from interrupted_fits import CASE, STEPS, files_in, inputs, make_quick
from lesa import cli
from lesa.fitting import whole
from lesa.inputs import write_inputs
from lesa_kernels import FusedKANPredictor

FILES = ["README.md", "comparison.png", "config.json", "evaluation.json", "model.safetensors", "provenance.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a pipeline and its inputs."""
    folder = tmp_path_factory.mktemp("model")
    CASE.build().save_pretrained(folder / "pipeline")
    write_inputs(folder / "inputs.safetensors", inputs())
    return folder


@pytest.fixture
def fit(model, monkeypatch, capsys, settings_of_the_command):
    """`fit(budget, out)` -> what the command prints, and what it says on the way."""
    make_quick(monkeypatch.setattr)

    def run(budget, out):
        words = (
            f"--model {model}/pipeline --inputs {model}/inputs.safetensors --steps {STEPS} --batch-size 2 --device cpu"
        )
        capsys.readouterr()
        cli.main(["fit", *words.split(), "--budget", budget, "--out", str(out)])
        return capsys.readouterr()

    return run


def test_one_command_makes_a_predictor_and_says_what_it_costs_and_how_good_it_is(fit, model, tmp_path, capsys):
    out = tmp_path / "out"
    printed, said = fit("3", out)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert len(FusedKANPredictor.from_pretrained(out).config.schedule) == 3
    cost = re.search(
        r"The first sample took .*\nPredicted for all after it: about (.*\n)+?Predicted for the files .*\n", said
    )
    assert cost and said.index("record the first sample") < cost.start()
    assert f"Predicted for a sample with 3 of {STEPS} steps computed" in said
    runs = json.loads((out / "evaluation.json").read_text())["runs"]
    assert "PSNR of pictures" not in said  # the table is enough
    rows = [line for line in printed.splitlines() if re.search(r" 3 of \d ", line)]
    names = ["this predictor", "without training", "fewer steps"]
    assert "Mean of 2 samples (other seeds, same inputs), against all 6 steps and the same seed:" in printed
    assert [row.split("  ")[0] for row in rows] == names
    for row, run in zip(rows, runs[1:], strict=True):
        assert row.endswith(f"  {run['psnr']:.2f}  {run['ssim']:.4f}")
    assert f"Wrote {', '.join(FILES)} to {out}" in printed
    before = files_in(out)
    with pytest.raises(SystemExit):
        fit("3", out)  # nothing is made again
    assert f"`--out` must be empty or hold an unfinished fit, but got a predictor in {out}" in capsys.readouterr().err
    assert files_in(out) == before


@pytest.mark.slow
def test_several_budgets_make_a_folder_each(fit, tmp_path):
    printed, _ = fit("4,2", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["budget-2", "budget-4"]
    for budget in (2, 4):
        place = tmp_path / "out" / f"budget-{budget}"
        assert len(FusedKANPredictor.from_pretrained(place).config.schedule) == budget
        assert f"Wrote {', '.join(FILES)} to {place}" in printed
    assert printed.index("budget-4") < printed.index("budget-2")  # as they were given


def test_another_command_does_not_go_on_with_unfinished_work(fit, model, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole.Fit, "_fitted", stop)
        with pytest.raises(SystemExit) as exit:
            fit("3", tmp_path / "out")
    assert exit.value.code == 130
    assert "lesa: interrupted; the same command continues where it stopped" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit("2", tmp_path / "out")
    assert re.search(r"`--budget` must be .*3.*, as in the unfinished fit in .*", capsys.readouterr().err)
