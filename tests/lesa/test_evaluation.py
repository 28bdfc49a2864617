import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import lesa
from lesa.demo import digits
from lesa.evaluation import EvaluatedRun, Evaluation, TaylorSeer, taylorseer_grid
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 12
SCHEDULE = (0, 1, 4, 8)


def predictor(pipe, schedule=SCHEDULE, **config):
    """An untrained one, which says that it was trained on `schedule`."""
    pipe(**digits.inputs_for([0])[0], num_inference_steps=STEPS, output_type="latent")
    sigmas = pipe.scheduler.sigmas.tolist()
    config = {"feature_dim": 128, "family": "flux", "num_inference_steps": STEPS, "schedule": schedule, **config}
    return FusedKANPredictor(PredictorConfig(**config, schedule_sigmas=[sigmas[step] for step in schedule]))


@pytest.fixture(scope="module")
def inputs():
    return digits.inputs_for([3, 8, 1])


@pytest.fixture(scope="module")
def evaluated(_digits_pipeline, inputs, tmp_path_factory):
    """An evaluation with every kind of contender, and its folder."""
    pipe, folder = _digits_pipeline, tmp_path_factory.mktemp("evaluation")
    predictors = {"mine": predictor(pipe), "other": predictor(pipe), "whole": predictor(pipe, tuple(range(STEPS)))}
    predictors["paper"] = predictor(pipe, mixer="dense")
    against = ("steps-4", TaylorSeer(5), TaylorSeer(5, order=3, lite=True))
    return lesa.evaluate(pipe, inputs, predictors, against, STEPS, seed=7, out_dir=folder, progress=False), folder


def test_runs_are_named_by_what_they_are_and_counted(evaluated):
    evaluation, _ = evaluated
    counted = {run.name: run.steps for run in evaluation.runs}
    taylor = (0, 1, 2, 4, 9)
    assert counted == {
        "reference": tuple(range(STEPS)),
        "newton-4": SCHEDULE,
        "newton-4-other": SCHEDULE,
        "newton-12": tuple(range(STEPS)),
        "dense-4": SCHEDULE,
        "taylorseer-full-order1-interval5": taylor,
        "taylorseer-lite-order3-interval5": taylor,
        "fewer-steps-4": (0, 1, 2, 3),
    }
    assert evaluation["fewer-steps-4"].num_inference_steps == 4


def test_figures_are_against_the_same_seeds_and_by_definition(evaluated, _digits_pipeline, generate):
    evaluation, _ = evaluated
    few, full = (generate(_digits_pipeline, steps, (3, 8, 1), seed=7) for steps in (4, STEPS))
    fewer = evaluation["fewer-steps-4"]
    errors = (few - full).square().mean((1, 2))
    assert fewer.latent_psnr == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), abs=1e-3)
    pixels = [(latents.clamp(-1, 1) + 1) / 2 for latents in (few, full)]
    errors = (pixels[0] - pixels[1]).square().mean((1, 2))
    assert fewer.psnr == pytest.approx((10 * torch.log10(1 / errors)).mean().item(), abs=0.05)


def test_whole_runs_equal_the_reference_and_predicted_ones_do_not(evaluated):
    evaluation, _ = evaluated
    for name in ("reference", "newton-12"):
        assert evaluation[name].psnr == evaluation[name].latent_psnr == math.inf
        assert evaluation[name].ssim == 1.0
    assert evaluation["newton-4"].psnr == evaluation["newton-4-other"].psnr
    for name in ("newton-4", "dense-4", "fewer-steps-4"):
        assert 15 < evaluation[name].psnr < 60
        assert 0.5 < evaluation[name].ssim < 1
    assert all(run.speedup == evaluation["reference"].seconds / run.seconds for run in evaluation.runs)


def test_summary_holds_all_runs_and_no_infinity(evaluated):
    evaluation, folder = evaluated
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [run["name"] for run in summary["runs"]] == [run.name for run in evaluation.runs]
    assert summary["runs"][0]["psnr"] is None
    assert summary["counted"] == "attention of the first block"
    newton = summary["runs"][1]
    assert (newton["computed_steps"], newton["num_inference_steps"], newton["steps"]) == (4, STEPS, list(SCHEDULE))
    assert newton["psnr"] == evaluation["newton-4"].psnr
    assert (summary["samples"], summary["seed"], summary["dtype"]) == (3, 7, "float32")
    assert summary["versions"]["torch"] == torch.__version__


def test_table_shows_the_best_taylorseer_at_each_number_of_steps(evaluated):
    evaluation, _ = evaluated
    best = max((run for run in evaluation.runs if run.name.startswith("taylorseer")), key=lambda run: run.psnr)
    table = evaluation.table()
    assert [line.split()[0] for line in table.splitlines() if line.startswith("taylorseer-")] == [best.name]
    row = next(line for line in table.splitlines() if line.startswith("newton-4 "))
    newton = evaluation["newton-4"]
    expected = f"4 of 12 {newton.seconds:.2f} {newton.speedup:.2f}x {newton.psnr:.2f} {newton.ssim:.4f}"
    assert row.split()[1:] == expected.split()
    assert "TaylorSeer: the best setting at each number of computed steps; tried were 2 at 5." in table.splitlines()


def evaluated_run(name, computed=10, psnr=20.0):
    return EvaluatedRun(name, tuple(range(computed)), 50, 1.0, 1.0, psnr, 0.9, psnr)


def test_table_counts_the_settings_at_each_number_of_steps():
    names = [f"taylorseer-{mode}-order{order}-interval7" for mode in ("full", "lite") for order in (1, 2)]
    runs = [evaluated_run("reference", 50), *(evaluated_run(name) for name in names[:3]), evaluated_run(names[3], 8)]
    lines = Evaluation(tuple(runs), {}, {}).table().splitlines()
    assert "TaylorSeer: the best setting at each number of computed steps; tried were 3 at 10, 1 at 8." in lines
    assert "TaylorSeer's full mode computes the attentions in so many steps, and all else in every step." in lines
    plain = Evaluation(tuple(runs[:1] + runs[-1:]), {}, {}).table()
    assert "tried" not in plain and "attentions" not in plain


@pytest.mark.parametrize("turned", [False, True])
def test_not_a_number_is_never_the_best(turned):
    contenders = [evaluated_run("taylorseer-a", psnr=math.nan), evaluated_run("taylorseer-b", psnr=3.0)]
    evaluation = Evaluation((evaluated_run("reference", 50), *contenders[:: -1 if turned else 1]), {}, {})
    assert [run.name for run in evaluation.shown] == ["reference", "taylorseer-b"]
    written = {
        run["name"]: run["psnr"] for run in json.loads(json.dumps(evaluation.summary(), allow_nan=False))["runs"]
    }
    assert written == {"reference": 20.0, "taylorseer-a": None, "taylorseer-b": 3.0}


def test_picture_has_a_row_per_shown_run(evaluated):
    evaluation, folder = evaluated
    pixels = np.asarray(Image.open(folder / "comparison.png").convert("L"))
    height, width = pixels.shape
    content = (pixels < 200).any(axis=1)
    # The middle of each row of images is not white.
    dpi = 150
    rows = [round((0.75 + i * 0.72 + 0.31) * dpi) for i in range(len(evaluation.shown))]
    assert rows[-1] < height <= rows[-1] + dpi
    assert content[rows].all()
    assert width > 600


def test_decoded_latents_are_the_images_of_the_pipeline(pipe, generate):
    latents = generate(pipe, steps=3)
    images = generate(pipe, steps=3, output_type="np")
    assert np.array_equal(adapter_for(pipe).decode(pipe, latents, digits.SIDE, digits.SIDE), images)


def test_figures_do_not_depend_on_the_batch_size(pipe, inputs):
    evaluations = [
        lesa.evaluate(pipe, inputs, [predictor(pipe)], (), STEPS, batch_size=size, progress=False) for size in (None, 2)
    ]
    whole, split = (evaluation["newton-4"] for evaluation in evaluations)
    assert whole.steps == split.steps == SCHEDULE
    assert split.psnr == pytest.approx(whole.psnr, abs=1e-2)
    assert split.ssim == pytest.approx(whole.ssim, abs=1e-4)


def test_taylorseer_grid_gives_the_budgets():
    grid = taylorseer_grid(50, [10, 8])
    assert {(s.interval, s.computed_in(50)) for s in grid} == {(7, 10), (10, 8), (11, 8)}
    assert {(s.order, s.lite) for s in grid if s.interval == 7} == {(o, lite) for o in (1, 2, 3) for lite in (0, 1)}
    assert len(grid) == 18


def test_taylorseer_grid_takes_the_next_larger_count_where_no_interval_gives_one():
    assert {s.computed_in(50) for s in taylorseer_grid(50, [14])} == {15}
    assert {s.computed_in(4) for s in taylorseer_grid(4, [2])} == {3}


def test_against_names_follow_the_predictors(pipe, inputs):
    evaluation = lesa.evaluate(pipe, inputs[:1], [predictor(pipe)], ("steps", "taylorseer"), STEPS, progress=False)
    rest = [run for run in evaluation.runs if not run.name.startswith("taylorseer")]
    taylor = [run for run in evaluation.runs if run.name.startswith("taylorseer")]
    assert [run.name for run in rest] == ["reference", "newton-4", "fewer-steps-4"]
    assert {run.computed_steps for run in taylor} == {4}
    assert len({run.name for run in taylor}) == len(taylor) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": ["teacache"]}, "`against` must hold 'steps'"),
        ({"against": ["steps-x"]}, "`against` must hold 'steps'"),
        ({"against": ["steps-0"]}, "`against` must hold 'steps'"),
        ({"against": ["steps-²"]}, "`against` must hold 'steps'"),
        ({"inputs": [{"prompt": "a", "callback_on_step_end": print}]}, "must leave 'callback_on_step_end' out"),
        ({"inputs": []}, "`inputs` must"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"predictors": [FusedKANPredictor(PredictorConfig(64))]}, "`predictor.config.feature_dim` must be"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(pipe, inputs, monkeypatch, change, message):
    monkeypatch.setattr(type(pipe), "__call__", lambda *a, **k: pytest.fail("the pipeline ran"))
    arguments = {"inputs": inputs, "predictors": [], "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        lesa.evaluate(pipe, **arguments)
    assert "forward" not in pipe.transformer.__dict__


def test_a_pipeline_with_a_cache_on_is_refused(pipe, inputs):
    pipe.transformer.enable_cache(TaylorSeer(5).config(torch.float32))
    with pytest.raises(RuntimeError, match="TaylorSeerCacheConfig. Call `pipe.transformer.disable_cache"):
        lesa.evaluate(pipe, inputs, [], ("steps-3",), STEPS, progress=False)
    pipe.transformer.disable_cache()
    with lesa.enable_cache(pipe, predictor(pipe)), pytest.raises(RuntimeError, match="lesa on already"):
        lesa.evaluate(pipe, inputs, [], ("steps-3",), STEPS, progress=False)


def test_a_failing_run_leaves_the_pipeline_as_it_was(fresh_pipe, inputs, generate, monkeypatch):
    pipe, before = fresh_pipe, generate(fresh_pipe, steps=5)
    pipe.set_progress_bar_config(disable=True, desc="mine")
    calls = 0

    def fail_in_the_cache(*args):
        nonlocal calls
        calls += 1
        raise RuntimeError("out of luck")

    monkeypatch.setattr(TaylorSeer, "config", fail_in_the_cache)
    with pytest.raises(RuntimeError, match="out of luck"):
        lesa.evaluate(pipe, inputs, [predictor(pipe)], [TaylorSeer(5)], STEPS, progress=False)
    assert calls == 1
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert not adapter_for(pipe).counted_module._forward_hooks
    assert torch.equal(generate(pipe, steps=5), before)
