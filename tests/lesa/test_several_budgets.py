"""Predictors for several budgets in one folder: which of them is used."""

import pytest

import lesa
from lesa.cli import UsageError, main
from lesa.cli.loading import predictor_of
from lesa.demo import digits
from lesa.inputs import write_inputs
from lesa_kernels import FusedKANPredictor, PredictorConfig

SCHEDULES = {4: (0, 3, 6, 9), 5: (0, 2, 5, 8, 10), 7: (0, 1, 3, 5, 7, 9, 11)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "predictors"
    for budget, steps in SCHEDULES.items():
        shape = {"rank": 1, "hidden": 2, "num_inference_steps": 12}
        config = PredictorConfig(128, **shape, schedule=steps, schedule_sigmas=tuple(1 - s / 12 for s in steps))
        FusedKANPredictor(config).save_pretrained(folder / f"budget-{budget}")
    return folder


@pytest.mark.parametrize(
    "which, budget",
    [
        ({}, 5),
        ({"quality": "fast"}, 4),
        ({"quality": "balanced"}, 5),
        ({"quality": "high"}, 7),
        ({"steps": 7}, 7),
        ({"schedule": lesa.schedule.Spread(quality="fast")}, 4),
        ({"schedule": lesa.ErrorControl(1.0)}, None),
    ],
    ids=str,
)
def test_steps_and_quality_choose_the_predictor(pipe, folder, generate, which, budget):
    if budget is None:  # it was not trained for that, which is said as of any predictor
        with pytest.raises(ValueError, match="ErrorControl"):
            lesa.enable_cache(pipe, folder, **which)
        return
    with lesa.enable_cache(pipe, folder, **which) as handle:
        generate(pipe)
    assert all(tuple(stream.computed) == SCHEDULES[budget] for stream in handle.stats.streams.values())
    assert handle.stats.notes[0] == f"the predictor is the one for {budget} computed steps, of those for 4, 5, 7"
    assert not any("every quality" in note for note in handle.stats.notes)


@pytest.mark.parametrize("steps, budget", [([0, 4, 8], 4), ([0, 2, 4, 6, 8, 10], 7), (range(12), 7), (3, 5)])
def test_the_nearest_predictor_forecasts_on_a_schedule_of_the_users_own(pipe, folder, generate, steps, budget):
    with lesa.enable_cache(pipe, folder, steps) as handle:
        generate(pipe)
    assert handle.stats.notes[0].startswith(f"the predictor is the one for {budget} computed steps")
    if not isinstance(steps, int):
        assert all(stream.computed == [*steps] for stream in handle.stats.streams.values())


def test_of_two_budgets_the_larger_one_is_balanced(pipe, folder, tmp_path, generate):
    for budget in (4, 7):
        FusedKANPredictor.from_pretrained(folder, budget=budget).save_pretrained(tmp_path / f"budget-{budget}")
    with lesa.enable_cache(pipe, tmp_path) as handle:
        generate(pipe)
    assert handle.stats.notes[0] == "the predictor is the one for 7 computed steps, of those for 4, 7"


def test_another_number_of_steps_is_refused(pipe, folder):
    with pytest.raises(ValueError, match="`steps` must be one of 4, 5, 7, for which .* has predictors, but got 6"):
        lesa.enable_cache(pipe, folder, steps=6)


@pytest.fixture
def command(tmp_path, folder, settings_of_the_command):
    """The arguments of `lesa generate` and `lesa evaluate`, with these predictors."""
    write_inputs(tmp_path / "inputs.safetensors", digits.inputs_for((3,)))
    model = ["--model", str(digits.PIPELINE_DIR), "--inputs", str(tmp_path / "inputs.safetensors"), "--steps", "12"]
    return [*model, "--predictor", str(folder)]


def test_generate_chooses_too(command, tmp_path, capsys):
    main(["generate", *command, "--quality", "fast", "--output", str(tmp_path / "x.png")])
    said = capsys.readouterr().out
    assert "4 of 12 steps computed" in said
    assert "the predictor is the one for 4 computed steps, of those for 4, 5, 7" in said
    with pytest.raises(SystemExit):
        main(["generate", *command, "--computed", "6", "--output", str(tmp_path / "y.png")])
    assert "`--computed` must be one of 4, 5, 7, for which" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_compares_all(command, folder, tmp_path, capsys):
    main(["evaluate", *command, "--against", "steps-4", "--out", str(tmp_path / "out")])
    assert {"newton-4", "newton-5", "newton-7", "fewer-steps-4"} <= {*capsys.readouterr().out.split()}
    with pytest.raises(SystemExit):
        again = ["--predictor", str(folder / "budget-5"), "--out", str(tmp_path / "other")]
        main(["evaluate", *command, *again])
    assert f"{folder / 'budget-5'} is given twice" in capsys.readouterr().err


def test_a_command_for_one_predictor_names_those_present(folder, settings_of_the_command):
    with pytest.raises(UsageError, match="has predictors for several budgets: 4, 5, 7. Give the folder of one of them"):
        predictor_of(str(folder))
