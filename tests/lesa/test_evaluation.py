import csv
import importlib.util
import json
import math
import sys
import types
from dataclasses import replace

import diffusers
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from skimage.metrics import structural_similarity

import lesa
from lesa import contenders
from lesa.contenders import CacheDiT, FirstBlockCache, MagCache, TaylorSeer, taylorseer_grid
from lesa.demo import digits
from lesa.evaluation import EvaluatedRun, Evaluation, quality
from lesa.evaluation.contest import Contest
from lesa.evaluation.picture import ERROR_SCALE, draw_comparison
from lesa.evaluation.search import bisected
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
    predictors["dense"] = predictor(pipe, mixer="dense")
    against = ("steps-4", TaylorSeer(5), TaylorSeer(5, order=3, lite=True))
    return lesa.evaluate(pipe, inputs, predictors, against, STEPS, seed=7, out_dir=folder, progress=False), folder


@pytest.mark.slow
def test_a_compiled_transformer_whose_blocks_can_not_be_counted_is_refused(fresh_pipe, inputs):
    torch._dynamo.reset()
    fresh_pipe.transformer.compile(backend="eager")
    fresh_pipe(**inputs[0], num_inference_steps=1, output_type="latent")  # compiled without what counts
    with pytest.raises(RuntimeError, match="`pipe` has a transformer whose blocks were seen .* in only 0 of 2 calls"):
        lesa.evaluate(fresh_pipe, inputs[:1], [], (), STEPS, progress=False)


def test_runs_are_named_by_what_they_are_and_counted(evaluated):
    evaluation, _ = evaluated
    counted = {run.name: run.steps for run in evaluation.runs}
    taylor = (0, 1, 2, 4, 9)
    assert counted == {
        "reference": tuple(range(STEPS)),
        "newton-4@mine": SCHEDULE,
        "newton-4@other": SCHEDULE,
        "newton-12": tuple(range(STEPS)),
        "dense-4": SCHEDULE,
        "taylorseer-full-order1-interval5": taylor,
        "taylorseer-lite-order3-interval5": taylor,
        "fewer-steps-4": (0, 1, 2, 3),
    }
    assert evaluation["fewer-steps-4"].num_inference_steps == 4


def test_a_predictor_can_come_with_a_schedule(pipe, inputs, tmp_path):
    """Each has a run of its own, also among what is kept of an interrupted evaluation."""
    mine = predictor(pipe, schedule_errors=(0.0, 0.5, 0.5, 0.5))
    hard, easy = lesa.ErrorControl(1e-6), lesa.ErrorControl(1e6)
    contestants = {"as trained": mine, "list": (mine, [0, 1, 5, 9]), "hard": (mine, hard), "easy": (mine, easy)}
    contestants |= {"interval": (mine, 4), "none": (mine, None)}
    arguments = {"num_inference_steps": STEPS, "batch_size": 1, "out_dir": tmp_path, "progress": False}
    evaluated = lesa.evaluate(pipe, inputs[:2], contestants, (), **arguments)
    runs = evaluated.runs[1:]
    assert [run.name for run in runs[:2]] == ["newton-4@as trained", "newton-4@list"]
    assert runs[0].steps == runs[5].steps == SCHEDULE and runs[1].steps == (0, 1, 5, 9)
    assert runs[2].computed_steps > 4 >= runs[3].computed_steps
    assert runs[4].steps == (0, 1, 2, 6, 10)
    assert [run.setting.partition(", ")[2].partition(", ")[2] for run in runs] == [
        "", "steps 0,1,5,9", "error control at 1e-06", "error control at 1e+06", "steps 0,1,2,6,10", ""
    ]  # fmt: skip
    assert len({run.name for run in runs}) == len(runs)
    assert [run.predictor for run in runs] == [*contestants]
    contestants["hard"] = (mine, easy)  # the same label, with another schedule
    again = lesa.evaluate(pipe, inputs[:2], contestants, (), **arguments)
    assert again.runs[4].steps == runs[3].steps and len(again.runs) == 7
    assert again.runs[3].per_sample == runs[3].per_sample != runs[2].per_sample
    assert [*again.notes] == ["Replaced newton-6: hard now has another predictor or another schedule than before."]


@pytest.mark.parametrize("more", [(), (None, None)])
def test_a_tuple_that_is_no_pair_is_refused(pipe, inputs, more):
    with pytest.raises(
        ValueError, match="`predictors` must have predictors, or pairs of a predictor and a schedule, but got"
    ):
        lesa.evaluate(pipe, inputs[:1], {"mine": (predictor(pipe), *more)}, (), STEPS, progress=False)


def test_figures_are_against_the_same_seeds_and_by_definition(evaluated, _digits_pipeline, generate):
    evaluation, _ = evaluated
    few, full = (generate(_digits_pipeline, steps, (3, 8, 1), seed=7) for steps in (4, STEPS))
    fewer = evaluation["fewer-steps-4"]
    errors = (few - full).square().mean((1, 2))
    assert fewer.latent_psnr == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), abs=1e-3)
    pixels = [(latents.clamp(-1, 1) + 1) / 2 for latents in (few, full)]
    errors = (pixels[0] - pixels[1]).square().mean((1, 2))
    assert fewer.psnr == pytest.approx((10 * torch.log10(1 / errors)).mean().item(), abs=0.05)
    assert fewer.frame_psnr is None and fewer.temporal_psnr is None and evaluation.clips == {}


def test_whole_runs_equal_the_reference_and_predicted_ones_do_not(evaluated):
    evaluation, _ = evaluated
    for name in ("reference", "newton-12"):
        assert evaluation[name].psnr == evaluation[name].latent_psnr == math.inf
        assert evaluation[name].ssim == 1.0
    assert evaluation["newton-4@mine"].psnr == evaluation["newton-4@other"].psnr
    for name in ("newton-4@mine", "dense-4", "fewer-steps-4"):
        assert 15 < evaluation[name].psnr < 60
        assert 0.5 < evaluation[name].ssim < 1
    assert all(run.speedup == evaluation["reference"].seconds / run.seconds for run in evaluation.runs)
    assert all(0 < run.denoise_seconds < run.seconds for run in evaluation.runs)
    assert {run.peak_memory_bytes for run in evaluation.runs} == {None}


def test_latents_are_followed_along_the_trajectory(evaluated):
    evaluation, _ = evaluated
    assert evaluation["reference"].step_errors == [0.0] * STEPS
    newton = evaluation["newton-4@mine"]
    assert newton.step_errors[:2] == [0.0, 0.0]  # both computed
    assert all(0 < error < 0.5 for error in newton.step_errors[2:])
    assert newton.step_errors[-1] == pytest.approx(newton.latent_error)
    assert evaluation["fewer-steps-4"].step_errors == [None] * STEPS


def test_summary_holds_all_runs_and_no_infinity(evaluated):
    evaluation, folder = evaluated
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert [run["name"] for run in summary["runs"]] == [run.name for run in evaluation.runs]
    assert summary["runs"][0]["psnr"] is None
    assert summary["counted"] == "attention of every block"
    assert summary["format_version"] == 1
    assert summary["num_inference_steps"] == STEPS == len(summary["sigmas"])
    assert summary["sigmas"] == sorted(summary["sigmas"], reverse=True) and summary["sigmas"][0] == 1.0
    assert summary["stage_bounds"] == [0.67, 0.33]
    assert set(summary["not_available"]) == {"lpips", "clip_score", "image_reward"}
    newton = summary["runs"][1]
    assert (newton["computed_steps"], newton["num_inference_steps"], newton["steps"]) == (4, STEPS, list(SCHEDULE))
    assert newton["psnr"] == evaluation["newton-4@mine"].psnr
    assert (newton["predictor"], newton["reference_seconds"]) == ("mine", summary["runs"][0]["seconds"])
    assert (summary["samples"], summary["seed"], summary["dtype"]) == (3, 7, "float32")
    assert summary["versions"]["torch"] == torch.__version__


def test_table_shows_the_best_taylorseer_at_each_number_of_steps(evaluated):
    evaluation, _ = evaluated
    best = max((run for run in evaluation.runs if run.name.startswith("taylorseer")), key=lambda run: run.psnr)
    table = evaluation.table()
    assert [line.split()[0] for line in table.splitlines() if line.startswith("taylorseer-")] == [best.name]
    row = next(line for line in table.splitlines() if line.startswith("newton-4@mine "))
    newton = evaluation["newton-4@mine"]
    expected = f"4 of 12 4.00 {newton.seconds:.2f} {newton.speedup:.2f}x {newton.psnr:.2f} {newton.ssim:.4f} -"
    assert row.split()[1:] == expected.split()
    row = next(line for line in table.splitlines() if line.startswith("fewer-steps-4 "))
    lead = evaluation.against_ours(evaluation["fewer-steps-4"])
    assert row.endswith("{psnr_difference:.2f} ({low:.2f} to {high:.2f})".format(**lead))


def evaluated_run(name, computed=10, psnr=20.0, equivalents=None, per_sample=()):
    kinds = ("reference", "newton", "taylorseer", "cache-dit", "fewer-steps")
    kind = next(k for k in kinds if name.startswith(k)).replace("fewer-steps", "steps")
    steps = tuple(range(computed))
    cost = float(computed if equivalents is None else equivalents)
    samples = {"psnr": list(per_sample)}
    return EvaluatedRun(name, steps, 50, float(computed), cost, 1.0, 1.0, psnr, 0.9, psnr, kind, per_sample=samples)


def test_table_shows_the_best_of_a_contender_at_each_number_of_step_equivalents():
    names = [f"taylorseer-{mode}-order{order}-interval7" for mode in ("full", "lite") for order in (1, 2)]
    runs = [evaluated_run("reference", 50), *(evaluated_run(name, psnr=i) for i, name in enumerate(names[:3]))]
    runs += [evaluated_run(names[3], 8), evaluated_run("cache-dit-a", 9, equivalents=15.8)]
    evaluation = Evaluation(tuple(runs), {}, {})
    assert [run.name for run in evaluation.shown] == ["reference", names[2], names[3], "cache-dit-a"]
    assert "predicts attentions only" not in evaluation.table()
    assert "predicts attentions only" in Evaluation(tuple(runs[:2]), {}, {}).table()


def test_a_run_is_compared_with_the_nearest_of_ours_that_costs_no_more():
    runs = [
        evaluated_run("newton-9", 9, per_sample=[30.0, 32.0]),
        evaluated_run("newton-8", 8, per_sample=[29.0, 29.0]),
        evaluated_run("cache-dit-a", 9, equivalents=15.8, per_sample=[28.0, 29.0]),
        evaluated_run("taylorseer-a", 8, equivalents=8.5, per_sample=[20.0, 22.0]),
        evaluated_run("fewer-steps-7", 7, per_sample=[20.0, 22.0]),
        evaluated_run("fewer-steps-10", 10, per_sample=[math.inf, 22.0]),
    ]
    evaluation = Evaluation(tuple(runs), {}, {})
    lead = evaluation.against_ours(evaluation["cache-dit-a"])
    assert (lead["ours"], lead["psnr_difference"], lead["low"], lead["high"]) == ("newton-9", 2.5, 2.0, 3.0)
    assert evaluation.against_ours(evaluation["taylorseer-a"])["ours"] == "newton-8"
    eight = replace(evaluation["cache-dit-a"], whole_steps=7.8)
    by_whole_steps = evaluation.against_ours(eight, by="whole_steps")
    assert (by_whole_steps["ours"], by_whole_steps["psnr_difference"]) == ("newton-8", 0.5)
    assert evaluation.against_ours(evaluation["fewer-steps-7"]) is None
    assert evaluation.against_ours(evaluation["newton-9"]) is None
    written = {run["name"]: run for run in evaluation.summary()["runs"]}
    assert written["fewer-steps-10"]["against_ours"] == {
        "ours": "newton-9",
        "psnr_difference": None,
        "low": None,
        "high": None,
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "mean", "low", "high"),
    [
        # Samples in opposing orders: -10 and 10. Both draws are the same one in a quarter of the resamples each.
        ([10.0, 20.0], [20.0, 10.0], 0.0, -10.0, 10.0),
        # As large a spread, and always 1 ahead.
        ([10.0, 30.0, 50.0], [9.0, 29.0, 49.0], 1.0, 1.0, 1.0),
        # 0, 0 and 9: three times the same one in 1 of 27 resamples, more than 2.5 %.
        ([10.0, 20.0, 39.0], [10.0, 20.0, 30.0], 3.0, 0.0, 9.0),
        ([39.0, 10.0, 20.0], [30.0, 10.0, 20.0], 3.0, 0.0, 9.0),
        # Behind: ours less theirs.
        ([10.0, 20.0, 30.0], [10.0, 20.0, 39.0], -3.0, -9.0, 0.0),
    ],
)
def test_our_lead_is_of_pairs_of_samples(tmp_path, ours, theirs, mean, low, high):
    runs = [
        evaluated_run("reference", 50),
        evaluated_run("newton-9", 9, psnr=np.mean(ours), per_sample=ours),
        evaluated_run("fewer-steps-9", 9, psnr=np.mean(theirs), per_sample=theirs),
    ]
    evaluation = Evaluation(tuple(runs), {run.name: np.zeros((1, 8, 8, 3)) for run in runs}, {})
    lead = {"ours": "newton-9", "psnr_difference": mean, "low": low, "high": high}
    assert evaluation.against_ours(runs[2]) == lead
    assert evaluation.table().splitlines()[4].endswith(f"{mean:.2f} ({low:.2f} to {high:.2f})")
    evaluation.save(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [run["against_ours"] for run in summary["runs"]] == [None, None, lead]
    assert summary["runs"][2]["against_ours_by_whole_steps"] == lead
    with (tmp_path / "runs.csv").open(newline="") as file:
        row = [*csv.DictReader(file)][2]
    assert [row[name] for name in lead] == ["newton-9", str(mean), str(low), str(high)]


def test_of_several_of_ours_at_the_same_cost_the_best_is_compared():
    runs = [
        evaluated_run("newton-9-a", 9, psnr=30.0, per_sample=[30.0]),
        evaluated_run("newton-9-b", 9, psnr=33.0, per_sample=[33.0]),
        evaluated_run("newton-9-c", 9, psnr=31.0, per_sample=[31.0]),
        evaluated_run("newton-7", 7, psnr=40.0, per_sample=[40.0]),
        evaluated_run("taylorseer-a", 9, per_sample=[25.0]),
    ]
    lead = Evaluation(tuple(runs), {}, {}).against_ours(runs[-1])
    assert (lead["ours"], lead["psnr_difference"]) == ("newton-9-b", 8.0)


def test_ours_are_of_one_contender_and_the_other_forecasters_are_held_against_it():
    figures = {"newton": 30.0, "lesa": 40.0, "universal": 28.0, "taylor": 25.0}
    runs = [
        replace(evaluated_run("newton-9", 9, psnr=psnr, per_sample=[psnr] * 2), name=f"{kind}-9", contender=kind)
        for kind, psnr in figures.items()
    ]
    runs.append(replace(runs[-1], name="taylor-9@other", psnr=24.0))
    evaluation = Evaluation(tuple(runs), {}, {})
    leads = [evaluation.against_ours(run) for run in evaluation.runs]
    assert leads[0] is None and {lead["ours"] for lead in leads[1:]} == {"newton-9"}
    assert [lead["psnr_difference"] for lead in leads[1:]] == [-10.0, 2.0, 5.0, 5.0]
    assert [run.name for run in evaluation.shown] == ["newton-9", "lesa-9", "universal-9", "taylor-9"]  # the best
    assert "to the most expensive run of newton that" in " ".join(evaluation.table().split())
    assert Evaluation(tuple(runs[2:]), {}, {}).against_ours(runs[3])["ours"] == "universal-9"


def test_the_picture_has_each_runs_own_figures_and_images(tmp_path, monkeypatch):
    names = ["reference", "fewer-steps-9", "newton-9", "cache-dit-a", "taylorseer-lite-order2-interval7"]
    runs = [evaluated_run(name, 50 if name == "reference" else 9, psnr=20.0 + i) for i, name in enumerate(names)]
    runs = [replace(run, seconds=8.0 - i, speedup=8 / (8.0 - i)) for i, run in enumerate(runs)]
    images = {name: np.full((2, 8, 8, 3), i / 100) for i, name in enumerate(names)}
    texts, shown = [], []
    write, show = Figure.text, Axes.imshow
    monkeypatch.setattr(
        Figure, "text", lambda self, x, y, text, **k: texts.append((y, text)) or write(self, x, y, text)
    )
    monkeypatch.setattr(Axes, "imshow", lambda self, data, **k: shown.append(np.array(data)) or show(self, data, **k))
    Evaluation(tuple(runs), images, {}).save(tmp_path)
    texts = [text for _, text in sorted(texts, key=lambda found: -found[0])]
    assert sorted(texts[:2]) == ["error against the reference", "samples"]
    assert texts[2:] == [
        "reference", "50 steps computed, 8.00 s",
        "newton 9", "9 of 50 steps, speed-up 1.3x, 22.0 dB",
        "TaylorSeer lite order 2", "9 of 50 steps, speed-up 2.0x, 24.0 dB",
        "cache-dit", "9 of 50 steps, speed-up 1.6x, 23.0 dB",
        "fewer steps 9", "9 of 50 steps, speed-up 1.1x, 21.0 dB",
    ]  # fmt: skip
    images_of, errors_of = shown[0], shown[1]
    assert images_of[0, 0, 0] == 0.0 and errors_of.shape == (1, 256)  # the reference, and the scale of the colours
    rest = [(strip[0, 0, 0], error[0, 0]) for strip, error in zip(shown[2::2], shown[3::2])]
    assert np.allclose(rest, [(value, value) for value in (0.02, 0.04, 0.03, 0.01)])


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


def test_error_maps_show_errors_of_colours_that_have_opposite_signs(tmp_path):
    grey, file = np.full((1, 16, 16, 3), 0.5, np.float32), tmp_path / "comparison.png"
    tinted = grey + np.array([0.09, -0.09, 0.0], np.float32)
    runs = [evaluated_run("reference", 50), evaluated_run("taylorseer-a")]
    draw_comparison(runs, {"reference": grey, "taylorseer-a": tinted}, file)
    color = np.array(matplotlib.colormaps["magma"](0.06 / ERROR_SCALE)[:3]) * 255
    pixels = np.asarray(Image.open(file).convert("RGB"), np.float32)
    assert (np.abs(pixels - color).max(-1) < 2).sum() > 3000  # the bar of the scale has fewer


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


def test_taylorseer_grid_keeps_to_the_budgets():
    grid = taylorseer_grid(50, [10, 8])
    usual = [s for s in grid if s.warm_up == 3]
    assert {(s.interval, s.computed_in(50)) for s in usual} == {(7, 10), (10, 8), (11, 8)}
    assert {(s.order, s.lite) for s in usual if s.interval == 7} == {(o, lite) for o in (1, 2, 3) for lite in (0, 1)}
    assert {s.warm_up for s in grid} == {1, 2, 3, 5}
    assert max(s.computed_in(50) for s in taylorseer_grid(50, [9])) == 9
    assert {s.computed_in(4) for s in taylorseer_grid(4, [2])} == {2}


def test_against_names_follow_the_predictors(pipe, inputs):
    evaluation = lesa.evaluate(pipe, inputs[:1], [predictor(pipe)], ("steps", "taylorseer"), STEPS, progress=False)
    reference, newton, taylor, fewer = evaluation.runs
    assert [reference.name, newton.name, fewer.name] == ["reference", "newton-4", "fewer-steps-4"]
    assert taylor.contender == "taylorseer" and taylor.whole_steps <= 4
    searched = evaluation.facts["searched"]["taylorseer"]
    assert searched["samples"] == 1 and searched["tried"] == len(taylorseer_grid(STEPS, [4]))
    assert searched["budgets"] == [{"budget": 4, "by": "step_equivalents", "run": taylor.name, "why": None}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": ["teacache"]}, "`against` must hold 'steps'"),
        ({"against": ["steps-x"]}, "`against` must hold 'steps'"),
        ({"against": ["steps-0"]}, "`against` must hold 'steps'"),
        ({"against": ["steps-²"]}, "`against` must hold 'steps'"),
        ({"against": ["mag-cache-9.5"]}, "'mag-cache', 'cache-dit'.*, these with a budget such as"),
        ({"search_samples": 0}, "`search_samples` must be"),
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


def test_a_pipeline_with_a_cache_on_is_refused(fresh_pipe, inputs):
    pipe = fresh_pipe  # diffusers leaves hooks of its caches on a transformer
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


SETTINGS = {
    "taylorseer": TaylorSeer(5),
    "taylorseer lite": TaylorSeer(4, order=2, lite=True, warm_up=2),
    "first-block-cache": FirstBlockCache(0.5),
    "mag-cache": MagCache(0.5, 3, 2, (1.0,) * 6 + (0.95,) * 6),
    "cache-dit": CacheDiT(0.5, order=1, warm_up=2),
    "cache-dit without a calibrator": CacheDiT(0.5, order=0, warm_up=2),
}


def test_no_peer_is_left_out_of_the_settings():
    peers = {kind for kind in contenders.CONTENDERS if issubclass(kind, contenders.Peer)}
    assert {type(setting) for setting in SETTINGS.values()} == peers


@pytest.fixture(params=SETTINGS)
def setting(request):
    setting = SETTINGS[request.param]
    try:
        setting.check_available()
    except ImportError as absent:
        pytest.skip(str(absent))
    return setting


def test_steps_are_counted_as_attention_itself_is_called(pipe, inputs, setting, monkeypatch):
    calls, per_forward, measured = [0], [], []
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    attend, outcome = torch.nn.functional.scaled_dot_product_attention, Contest.outcome

    def counting(*args, **kwargs):
        calls[0] += 1
        return attend(*args, **kwargs)

    def recording(*args, **kwargs):
        calls[0] = 0
        per_forward.clear()
        made = outcome(*args, **kwargs)
        measured.append((calls[0] / blocks, sum(count == blocks for count in per_forward)))
        return made

    def before(*args):
        per_forward.append(-calls[0])

    def after(*args):
        per_forward[-1] += calls[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    monkeypatch.setattr(Contest, "outcome", recording)
    hooks = [pipe.transformer.register_forward_pre_hook(before), pipe.transformer.register_forward_hook(after)]
    result = lesa.evaluate(pipe, inputs, [predictor(pipe)], ("steps", setting), STEPS, progress=False)
    for hook in hooks:
        hook.remove()
    counted = [(run.step_equivalents, run.whole_steps) for run in result.runs[1:]]
    assert np.allclose(counted, measured[1:])
    assert result["newton-4"].block_passes == result["newton-4"].step_equivalents == 4
    peer = next(run for run in result.runs if run.contender == setting.contender)
    assert len(peer.steps) == peer.whole_steps < STEPS
    attentions_only = "attentions only" in (setting.note([str(setting)]) or "")
    assert peer.block_passes == (STEPS if attentions_only else pytest.approx(peer.step_equivalents))
    if setting.contender in ("first-block-cache", "cache-dit"):  # the first block runs in every step
        assert peer.step_equivalents == pytest.approx(peer.whole_steps + (STEPS - peer.whole_steps) / blocks)


@pytest.mark.parametrize(
    "setting, failing",
    [
        pytest.param(name, failing, marks=[pytest.mark.slow] if (number + failing) % 2 else [])
        for number, name in enumerate(SETTINGS)
        for failing in (False, True)
    ],
    indirect=["setting"],
)
def test_peers_leave_the_pipeline_as_it_was(fresh_pipe, generate, setting, failing):
    pipe, before = fresh_pipe, generate(fresh_pipe)
    things, order = [pipe, *pipe.transformer.modules()], [*pipe.transformer.state_dict()]
    attributes = [dict(vars(thing)) for thing in things]
    of_class = dict(vars(type(pipe)))
    try:
        with setting.on(pipe, STEPS):
            during = generate(pipe)
            assert not torch.equal(during, before)
            if failing:
                raise RuntimeError("out of luck")
    except RuntimeError as error:
        assert failing and str(error) == "out of luck"
    assert vars(type(pipe)) == of_class
    assert [*pipe.transformer.state_dict()] == order
    for thing, values in zip(things, attributes):
        assert vars(thing).keys() == values.keys()
        assert all(value is values[name] for name, value in vars(thing).items())
    assert torch.equal(generate(pipe), before)
    with lesa.enable_cache(pipe, predictor(pipe)) as cache:
        generate(pipe)
    assert cache.stats.computed_steps == 4


def test_cache_dit_that_is_missing_is_an_error_with_the_remedy(pipe, inputs, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for against in ("cache-dit", "cache-dit-9", CacheDiT(0.1)):
        with pytest.raises(ImportError, match="cache-dit, which is not. Install it with `pip install cache-dit`"):
            lesa.evaluate(pipe, inputs, [], [against], STEPS, progress=False)


def test_magcache_is_calibrated_with_its_own_calibration(pipe, inputs, monkeypatch):
    def smaller(cls, *args):
        grid = whole(*args)
        return replace(grid, axes=grid.axes[3:5])

    whole = MagCache.grid
    monkeypatch.setattr(MagCache, "grid", classmethod(smaller))
    result = lesa.evaluate(pipe, inputs, [], ["mag-cache-6"], STEPS, progress=False, search_samples=1)
    searched = result.facts["searched"]["mag-cache"]
    ratios = searched["mag_ratios"]
    assert len(ratios) == STEPS and ratios[0] == 1.0 and all(0.5 < ratio < 2 for ratio in ratios)
    assert len(set(ratios)) > 6
    best = result[searched["budgets"][0]["run"]]
    assert best.contender == "mag-cache" and best.whole_steps == best.step_equivalents <= 6
    assert "ratios calibrated" in best.setting


def test_a_budget_that_no_setting_keeps_to_is_said(pipe, inputs):
    result = lesa.evaluate(pipe, inputs[:1], [], ["first-block-cache-5"], STEPS, progress=False)
    equivalents, whole = result.facts["searched"]["first-block-cache"]["budgets"]
    least = 1 + 11 / 3  # the first one of three blocks runs in every step
    assert (equivalents["by"], whole["by"]) == ("step_equivalents", "whole_steps")
    assert result[equivalents["run"]].step_equivalents == pytest.approx(least)
    assert result[whole["run"]].whole_steps <= 5 < result[whole["run"]].step_equivalents
    result = lesa.evaluate(pipe, inputs[:1], [], ["first-block-cache-4"], STEPS, progress=False)
    equivalents, whole = result.facts["searched"]["first-block-cache"]["budgets"]
    assert equivalents["run"] is None and whole["run"] is not None
    assert equivalents["why"] == "no setting has at most 4 step equivalents; the least is 4.67"
    assert "first-block-cache: no setting has at most 4 step equivalents" in result.table()


def test_a_setting_that_goes_above_its_budget_on_all_inputs_gives_way(pipe, inputs, monkeypatch):
    def more(self, *args, **kwargs):
        made = outcome(self, *args, **kwargs)
        costs = {0.2: (4.0, 7.0), 0.3: (4.0, 4.0)}
        if self.now in costs:
            made.counts = (made.counts[0], costs[self.now][kwargs.get("keep", False)], made.counts[2])
        return made

    outcome = Contest.outcome
    monkeypatch.setattr(Contest, "now", None, raising=False)
    monkeypatch.setattr(Contest, "outcome", more)
    on = FirstBlockCache.on

    def noted(self, pipe, steps):
        Contest.now = self.threshold
        return on(self, pipe, steps)

    monkeypatch.setattr(FirstBlockCache, "on", noted)
    grid = contenders.Grid("two", settings=[FirstBlockCache(0.2), FirstBlockCache(0.3)])
    monkeypatch.setattr(FirstBlockCache, "grid", classmethod(lambda cls, *args: grid))
    monkeypatch.setattr(Contest, "run", noting(Contest.run))
    result = lesa.evaluate(pipe, inputs[:1], [], ["first-block-cache-5"], STEPS, progress=False)
    row = result.facts["searched"]["first-block-cache"]["budgets"][0]
    assert (row["budget"], row["by"]) == (5, "step_equivalents")
    assert row["run"] == "first-block-cache-threshold0.3"


def noting(run):
    """So that the counts that are made up are those of the setting that runs."""

    def noted(self, setting):
        type(self).now = getattr(setting, "threshold", None)  # the reference has none
        return run(self, setting)

    return noted


def test_a_peer_that_fails_on_a_model_is_reported_not_dropped(pipe, inputs, generate, monkeypatch):
    def on(self, *args):
        raise ValueError("Model class X not registered.")

    before = generate(pipe)
    monkeypatch.setattr(FirstBlockCache, "on", on)
    result = lesa.evaluate(pipe, inputs, [], ["first-block-cache-4", "steps-4"], STEPS, progress=False)
    why = "it fails on this model: ValueError: Model class X not registered."
    assert result.facts["not_available"]["first-block-cache"] == why
    assert f"first-block-cache is not available: {why}" in result.table()
    assert [run.name for run in result.runs] == ["reference", "fewer-steps-4"]
    assert torch.equal(generate(pipe), before)


def test_bisection_finds_the_smallest_threshold_within_the_budget():
    def count(setting):
        return 50 / (1 + 10 * setting.threshold)

    tried = list(bisected(FirstBlockCache(0.0), count, 10, probes=16))
    within = min(setting.threshold for setting in tried if count(setting) <= 10)
    assert within == pytest.approx(0.4, rel=1e-3)
    assert len(tried) == 16
    assert list(bisected(FirstBlockCache(0.0), lambda s: 9.2, 9)) == [FirstBlockCache(contenders.THRESHOLDS[1])]


@pytest.mark.parametrize("peer", [kind for kind in contenders.CONTENDERS if issubclass(kind, contenders.Peer)])
def test_every_peer_has_a_grid_that_is_stated(peer):
    grid = peer.grid(50, [9, 8], (1.0,) * 50)
    assert grid.text and (grid.settings or grid.axes)
    settings = [*grid.settings, *grid.axes]
    assert {setting.contender for setting in settings} == {peer.name}
    assert len({str(setting) for setting in settings}) == len(settings)
    assert all(str(setting).startswith(f"{peer.name}-") and setting.describe() for setting in settings)


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = quality.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert quality.bootstrap_interval(values) == (low, high)
    assert quality.bootstrap_interval([1.5] * 8) == (1.5, 1.5)
    skewed = quality.bootstrap_interval([0.0] * 9 + [10.0])
    assert skewed == (0.0, 3.0)  # of ten draws the large value comes up 0 to 3 times
    for broken in ([], [1.0, math.nan], [math.inf, 1.0]):
        assert all(map(math.isnan, quality.bootstrap_interval(broken)))


def test_relative_error_and_psnr_by_hand():
    wanted, values = np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]])
    assert quality.relative_error(values, wanted) == pytest.approx(0.1)
    assert quality.psnr(values, wanted, 1.0) == pytest.approx(10 * math.log10(8))
    assert math.isnan(quality.relative_error(values, wanted * 0))


def test_qualities_whose_networks_are_not_here_say_why(monkeypatch, tmp_path):
    device, large = torch.device("cpu"), (64, 64, 3)
    monkeypatch.setattr(quality, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    found, reasons = quality.learned_qualities(device, ["a cat"], large)
    assert found == {}
    assert reasons["lpips"] == "the package lpips is not installed"
    assert "is in the hub's cache" in reasons["clip_score"]
    assert reasons["image_reward"] == "the package image-reward is not installed"
    for without_text in ([None], ["a cat", None], [None, "a cat"]):
        _, reasons = quality.learned_qualities(device, without_text, large)
        assert reasons["clip_score"] == reasons["image_reward"] == "the inputs have no text"
    _, reasons = quality.learned_qualities(device, ["a cat"], (16, 16, 3))
    assert "16 x 16 pixels are too small" in reasons["lpips"]
    _, reasons = quality.learned_qualities(device, ["a cat"], (9, 64, 64, 3))
    assert set(reasons.values()) == {"it is for images, and these are videos"}


def test_lpips_is_measured_where_its_weights_are(monkeypatch, tmp_path):
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, a, b):
            assert a.shape == (1, 3, 64, 64) and a.min() >= -1
            return (a - b).abs().mean()

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    _, reasons = quality.learned_qualities(torch.device("cpu"), [None], (64, 64, 3))
    assert reasons["lpips"] == f"there are no weights of AlexNet in {tmp_path}/checkpoints"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt.pth").touch()
    found, _ = quality.learned_qualities(torch.device("cpu"), [None], (64, 64, 3))
    assert found["lpips"](np.zeros((64, 64, 3)), np.full((64, 64, 3), 0.25), None) == pytest.approx(0.5)


def test_csv_and_images_hold_what_the_summary_holds(evaluated):
    evaluation, folder = evaluated
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary["runs"])
    for row, run in zip(rows, summary["runs"]):
        run = {**run, **(run["against_ours"] or {})}
        for name, text in row.items():
            value = run.get(name)
            assert text == "" if value is None else text == str(value), (name, text, value)
    assert {"newton-4@mine", "reference", "dense-4", "newton-4@other"} < summary["images"].keys()
    worse = [run["name"] for run in summary["runs"] if run["contender"] == "taylorseer" and not run["is_best"]]
    assert len(worse) == 1 and worse[0] not in summary["images"]
    for name, files in summary["images"].items():
        assert len(files) == 3
        stored = np.stack([np.asarray(Image.open(folder / file)) for file in files])
        assert np.abs(stored / 255 - evaluation.images[name]).max() < 0.5 / 255 + 1e-6


def same(first, second):
    """The runs without what depends on the time they took."""
    untimed = {"seconds": 1, "denoise_seconds": 1, "speedup": 1, "reference_seconds": 1}
    runs = [[replace(run, **untimed) for run in e.runs] for e in (first, second)]
    return runs[0] == runs[1] and all(np.array_equal(first.images[n], second.images[n]) for n in first.images)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(pipe, inputs, tmp_path, monkeypatch):
    call, made = type(pipe).__call__, []
    arguments = (pipe, inputs, {"a": predictor(pipe)}, ("steps", "steps-3", "first-block-cache-5"), STEPS)
    options = {"out_dir": tmp_path, "progress": False, "search_samples": 1}

    def counted(self, *args, **kwargs):
        made.append(1)
        if len(made) == stop:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", counted)
    stop = None
    whole = lesa.evaluate(*arguments, **{**options, "out_dir": None})
    needed = len(made)
    made.clear()
    stop = 6
    with pytest.raises(KeyboardInterrupt):
        lesa.evaluate(*arguments, **options)
    made.clear()
    stop = None
    resumed = lesa.evaluate(*arguments, **options)
    assert len(made) == needed - 5 + 2  # the reference is timed again, after its warm-up
    assert same(resumed, whole)
    made.clear()
    again = lesa.evaluate(*arguments, **options)
    assert not made
    assert again.summary() == resumed.summary() == json.loads((tmp_path / "summary.json").read_text())
    assert "forward" not in pipe.transformer.__dict__


# Batches of other sizes


UNEVEN = FirstBlockCache(0.55)
"""Of the four inputs, it computes another number of steps for the first three together than for the last."""


def directly(pipe, inputs, seed, config=None):
    """Images `[N, height, width, 3]`, latents, and the numbers of whole steps and of blocks' runs of one call.

    As a user of diffusers makes them.
    """
    transformer = pipe.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    ran, steps = [], []
    hooks = [transformer.register_forward_pre_hook(lambda *args: ran.append(0))]
    hooks += [block.attn.to_q.register_forward_hook(lambda *args: ran.append(ran.pop() + 1)) for block in blocks]
    arguments = {name: torch.cat([item[name] for item in inputs]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    arguments |= {"height": digits.SIDE, "width": digits.SIDE, "num_inference_steps": STEPS, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(inputs))]

    def after_step(pipe, step, timestep, tensors):
        steps.append(tensors["latents"].numpy().copy())
        return {}

    if config is not None:
        transformer.enable_cache(config)
    images = pipe(**arguments, generator=generators, callback_on_step_end=after_step).images
    if config is not None:
        transformer.disable_cache()
    for hook in hooks:
        hook.remove()
    return images, steps, sum(count == len(blocks) for count in ran), sum(ran) / len(blocks)


def decibels(values, wanted, peak=1.0):
    error = np.mean((values.astype(np.float64) - wanted.astype(np.float64)) ** 2)
    return float(10 * np.log10(peak**2 / error))


def distance(values, wanted):
    values, wanted = values.astype(np.float64), wanted.astype(np.float64)
    return float(np.sqrt(((values - wanted) ** 2).sum() / (wanted**2).sum()))


@pytest.fixture(scope="module")
def four():
    return digits.inputs_for([3, 8, 1, 5])


@pytest.fixture(scope="module")
def uneven(whole_pipeline, four, tmp_path_factory):
    """Four inputs in calls of three and one; and the folder."""
    folder = tmp_path_factory.mktemp("uneven")
    options = {"seed": 7, "batch_size": 3, "out_dir": folder, "progress": False}
    return lesa.evaluate(whole_pipeline, four, [], (UNEVEN, "steps-4"), STEPS, **options), folder


@pytest.fixture(scope="module")
def by_hand(four):
    """Of the same calls, what diffusers gives by itself: with its cache, and without."""
    config = diffusers.FirstBlockCacheConfig(threshold=UNEVEN.threshold)
    calls, pipe = ((four[:3], 7), (four[3:], 10)), digits.load_pipeline()
    plain = [directly(pipe, *call) for call in calls]
    return [directly(pipe, *call, config) for call in calls], plain


def test_counts_of_uneven_calls_are_weighted_by_their_samples(uneven, by_hand):
    run = uneven[0][str(UNEVEN)]
    (_, _, many, many_blocks), (_, _, few, few_blocks) = by_hand[0]
    assert many != few
    assert run.whole_steps == pytest.approx((3 * many + few) / 4)
    assert run.step_equivalents == pytest.approx((3 * many_blocks + few_blocks) / 4)
    assert run.block_passes == pytest.approx(run.step_equivalents)
    assert len(run.steps) == many  # of the first call
    assert uneven[0]["reference"].whole_steps == STEPS and uneven[0]["fewer-steps-4"].whole_steps == 4


def test_figures_of_uneven_calls_are_means_over_samples(uneven, by_hand):
    run = uneven[0][str(UNEVEN)]
    images, wanted = (np.concatenate([call[0] for call in calls]) for calls in by_hand)
    steps, full = (np.concatenate([call[1] for call in calls], axis=1) for calls in by_hand)
    pairs, latents = [*zip(images, wanted)], [*zip(steps[-1], full[-1])]
    expected = {
        "psnr": [decibels(*pair) for pair in pairs],
        "ssim": [structural_similarity(*pair, channel_axis=-1, data_range=1.0) for pair in pairs],
        "latent_error": [distance(*pair) for pair in latents],
    }
    assert run.per_sample.keys() == expected.keys()
    for name, values in expected.items():
        assert run.per_sample[name] == pytest.approx(values, rel=1e-5), name
        assert getattr(run, name) == pytest.approx(np.mean(values), rel=1e-5), name
        assert len({*np.round(values, 6)}) == 4, name  # so that no other order or weight gives the same
    assert run.latent_psnr == pytest.approx(np.mean([decibels(*pair, peak=2.0) for pair in latents]), rel=1e-5)
    errors = [np.mean([distance(*pair) for pair in zip(ours, theirs)]) for ours, theirs in zip(steps, full)]
    assert run.step_errors == pytest.approx(errors, rel=1e-4, abs=1e-7)
    assert np.array_equal(uneven[0].images[str(UNEVEN)], images)
    assert np.array_equal(uneven[0].images["reference"], wanted)


def test_errors_along_the_way_are_of_the_first_sixteen_samples(pipe):
    inputs = digits.inputs_for([number % 10 for number in range(18)])
    setting = TaylorSeer(2, warm_up=1)
    run = lesa.evaluate(pipe, inputs, [], [setting], 3, batch_size=10, progress=False)[str(setting)]
    errors = run.per_sample["latent_error"]
    assert len(errors) == 18 and run.latent_error == pytest.approx(np.mean(errors))
    assert run.step_errors[-1] == pytest.approx(np.mean(errors[:16]), rel=1e-5)
    assert run.step_errors[-1] != pytest.approx(np.mean(errors), rel=1e-4)


# Going on


def test_speedups_refer_to_the_reference_of_their_own_command(pipe, inputs, tmp_path):
    options = {"seed": 7, "batch_size": 1, "out_dir": tmp_path, "progress": False}
    mine = {"a": predictor(pipe)}
    first = lesa.evaluate(pipe, inputs[:2], mine, ["steps-4"], STEPS, **options)
    second = lesa.evaluate(pipe, inputs[:2], mine, ["steps-4", TaylorSeer(5)], STEPS, **options)
    before, now = first["reference"].seconds, second["reference"].seconds
    assert before != now
    for run in second.runs:
        of_reference = before if run.name in ("newton-4", "fewer-steps-4") else now
        assert run.reference_seconds == of_reference and run.speedup == of_reference / run.seconds
    assert [run.name for run in second.timed_apart] == ["newton-4", "fewer-steps-4"]
    table = " ".join(second.table().split())
    assert table.endswith("to the reference as it was timed there: newton-4, fewer-steps-4.")
    assert not first.timed_apart and "timed there" not in first.table()
    written = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert {r["name"]: (r["speedup"], r["reference_seconds"]) for r in written} == {
        r.name: (r.speedup, r.reference_seconds) for r in second.runs
    }


def test_a_new_contender_is_compared_with_the_kept_reference(whole_pipeline, four, uneven, tmp_path):
    """The reference is kept in two calls of three samples and of one."""
    options = {"seed": 7, "batch_size": 3, "out_dir": tmp_path, "progress": False}
    before = lesa.evaluate(whole_pipeline, four, [], (), STEPS, **options)
    after = lesa.evaluate(whole_pipeline, four, [], (UNEVEN, "steps-4"), STEPS, **options)
    assert after["reference"].seconds != before["reference"].seconds  # timed again
    assert same(after, uneven[0])
    assert after.facts == uneven[0].facts
    assert all(run.speedup == after["reference"].seconds / run.seconds for run in after.runs)


TWINS = {  # of equal text and different values: the ratios, or digits that the text leaves out
    "mag-cache": [MagCache(4.0, 9, 1, (1.0,) * 12), MagCache(4.0, 9, 1, (1.0,) + (0.5,) * 11)],
    "first-block-cache": [FirstBlockCache(0.44001), FirstBlockCache(0.44004)],
}


@pytest.mark.parametrize("kind", TWINS)
def test_settings_of_equal_text_are_not_mixed(pipe, inputs, tmp_path, monkeypatch, kind):
    twins = TWINS[kind]
    assert str(twins[0]) == str(twins[1]) and twins[0].describe() == twins[1].describe()
    enable, received = type(pipe.transformer).enable_cache, []
    options = {"num_inference_steps": STEPS, "progress": False}
    alone = [lesa.evaluate(pipe, inputs[:1], [], [twin], **options).runs[1] for twin in twins]
    monkeypatch.setattr(
        type(pipe.transformer), "enable_cache", lambda self, config: received.append(config) or enable(self, config)
    )
    lesa.evaluate(pipe, inputs[:1], [], twins[:1], out_dir=tmp_path, **options)
    kept = lesa.evaluate(pipe, inputs[:1], [], twins[1:], out_dir=tmp_path, **options).runs[1]
    assert len(received) == 2  # the second was not taken for the first
    assert (kept.steps, kept.per_sample) == (alone[1].steps, alone[1].per_sample)
    for _ in range(2):
        result = lesa.evaluate(pipe, inputs[:1], [], twins, out_dir=tmp_path / "both", **options)
        both = result.runs[1:]
        assert len(both) == 2 and both[0].name != both[1].name
        for one, run in zip(alone, both):
            assert (run.steps, run.per_sample) == (one.steps, one.per_sample)
            image = result.images[run.name][0]
            assert decibels(image, result.images["reference"][0]) == pytest.approx(run.psnr, rel=1e-5)
    assert len(received) == 4  # the last time both were kept


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (lesa.ErrorControl(1e-6), lesa.ErrorControl(1e-6 * (1 + 1e-9))),
        ([0, 1, 4, 8], [0, 1, 5, 8]),
        (None, [0, 1, 4, 8]),
    ],
    ids=["tolerance", "steps", "trained"],
)
def test_predictors_of_equal_label_and_another_schedule_are_not_mixed(pipe, inputs, tmp_path, first, other):
    mine = predictor(pipe, schedule_errors=(0.0, 0.5, 0.5, 0.5))
    options = {"num_inference_steps": STEPS, "out_dir": tmp_path, "progress": False}
    runs = [
        lesa.evaluate(pipe, inputs[:1], {"mine": (mine, schedule)}, (), **options).runs[1]
        for schedule in (first, other)
    ]
    assert runs[0].seconds != runs[1].seconds
    if isinstance(other, list):
        assert runs[1].steps == tuple(other)


def test_a_predictor_with_other_weights_is_run_again(pipe, inputs, tmp_path):
    mine = predictor(pipe)
    options = {"num_inference_steps": STEPS, "out_dir": tmp_path, "progress": False}
    first = lesa.evaluate(pipe, inputs[:1], {"a": mine}, (), **options)
    with torch.no_grad():
        next(parameter for parameter in mine.parameters() if parameter.any()).mul_(1.5)
    second = lesa.evaluate(pipe, inputs[:1], {"a": mine}, (), **options)
    assert [run.name for run in second.runs] == ["reference", "newton-4"]
    assert first.runs[1].seconds != second.runs[1].seconds
    assert "Replaced newton-4: a now has another predictor or another schedule" in second.table()


def test_a_search_with_other_samples_is_not_taken(pipe, inputs, tmp_path):
    searched = [
        lesa.evaluate(
            pipe, inputs, [], ["first-block-cache-6"], STEPS, out_dir=tmp_path, progress=False, search_samples=samples
        ).facts["searched"]["first-block-cache"]
        for samples in (1, 3)
    ]
    assert [search["samples"] for search in searched] == [1, 3]
    kept = json.loads(next((tmp_path / "runs").glob("search*.json")).read_text())
    assert len(kept["figures"]) == searched[1]["tried"]  # none of the first search
