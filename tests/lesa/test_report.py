"""The page of an evaluation: what it says, and how it behaves in a real browser."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lesa
from lesa import cli
from lesa.demo import digits
from lesa.evaluation import budgets, report_pictures, rivals
from lesa_kernels import FusedKANPredictor, PredictorConfig
from made_evaluations import PEERS, STEPS, make_evaluation

ODD = "<img src=x onerror=alert(1)>&\"'</script>"
"""As a name, it must be shown as it is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    make_evaluation(folder)
    lesa.report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def data_of(html: str) -> dict:
    """What the page's script is given."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


def image_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def changed(folder, target, change) -> Path:
    """A copy of an evaluation whose summary `change` has edited."""
    shutil.copytree(folder, target)
    summary = json.loads((target / "summary.json").read_text())
    change(summary)
    (target / "summary.json").write_text(json.dumps(summary))
    return target


def test_the_page_is_where_it_was_asked_for(folder, tmp_path, page, capsys):
    out = tmp_path / "new" / "page.html"
    assert lesa.report(folder, out) == out
    assert out.read_text() == page
    cli.main(["report", "--evaluation", str(folder), "--out", str(out.with_name("again.html"))])
    assert capsys.readouterr().out == f"Wrote {tmp_path}/new/again.html\n"
    assert out.with_name("again.html").read_text() == page


def test_the_page_names_nothing_outside_itself(page):
    assert "default-src 'none'" in page
    markup = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", markup) == ["data:,", "#quality"]
    assert "url(" not in markup and "@import" not in markup


def test_the_headline_has_the_main_figures(page):
    headline = re.search("<h1>(.*?)</h1>", page)[1]
    assert headline == (
        "9 of 50 steps computed, 4.7 times as fast, and 49.3 dB PSNR to the full run: "
        "6.7 dB above the best of the others with at most 9 step equivalents."
    )
    assert "By this count, the best of the others is cache-dit with 8.7 step equivalents, 42.6 dB." in page
    assert "By whole steps" not in page  # it is the same run


def test_the_headline_hides_no_defeat(folder, tmp_path):
    def defeat(summary):
        run = next(run for run in summary["runs"] if run["name"] == "cache-dit-8.7")
        run["psnr"] = 60.0

    html = lesa.report(changed(folder, tmp_path / "e", defeat)).read_text()
    assert "10.7 dB below the best of the others with at most 9 step equivalents." in html
    assert "\N{MINUS SIGN}10.7 dB" in html


def runs_of(summary) -> dict:
    return {run["name"]: run for run in summary["runs"]}


def headline_of(folder, target, change) -> tuple[str, str, dict]:
    """The sentence at the top, the one below it, and the figures by what they mean."""
    html = lesa.report(changed(folder, target, change)).read_text()
    tiles = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html.partition('class="tiles"')[2].partition("</dl>")[0])
    return re.search("<h1>(.*?)</h1>", html)[1], re.search('</h1>\\s*<p class="soft">(.*?)</p>', html)[1], dict(tiles)


PAIR = {"ours": "newton-9", "psnr_difference": 2.0, "low": 1.25, "high": 2.75}


def test_the_headline_is_of_the_chosen_budget_and_of_the_best_it_can_be_compared_with(folder, tmp_path):
    """No more steps, rounded; not ours, not without a figure; and the interval of just that pair."""

    def change(summary):
        runs = runs_of(summary)
        runs["newton-9"] |= {"psnr": 41.26, "speedup": 4.44, "step_equivalents": 9.04}
        runs["newton-8"]["psnr"] = runs["newton-10"]["psnr"] = 90.0  # ours
        runs["fewer-steps-7"] |= {"psnr": 39.26, "against_ours": PAIR, "step_equivalents": 9.43}
        runs["mag-cache-10"] |= {"psnr": 40.5, "step_equivalents": 9.6, "whole_steps": 9.2}
        runs["dense-9"]["psnr"] = None
        for name, run in runs.items():
            if name not in ("reference", "fewer-steps-7", "mag-cache-10") and run["contender"] != "newton":
                run["psnr"] = run["psnr"] and 30.0

    headline, below, tiles = headline_of(folder, tmp_path / "e", change)
    assert headline == (
        "9.04 of 50 steps computed, 4.4 times as fast, and 41.3 dB PSNR to the full run: "
        "2.0 dB above the best of the others with at most 9 step equivalents."
    )
    assert below == (
        "By this count, the best of the others is fewer steps with 9.43 step equivalents, 39.3 dB. "
        "By whole steps, the best of the others is MagCache with 9.2 whole steps, 40.5 dB. "
        "Mean over 3 samples. Each is compared with the one of the same seed, computed in all 50 steps. "
        "The 95 % interval of the difference is 1.2 to 2.8 dB."
    )
    assert tiles == {
        "as fast, end to end": "4.4\N{MULTIPLICATION SIGN}",
        "steps computed": "9.04 of 50",
        "PSNR against the full run": "41.3 dB",
        "to fewer steps": "+2.0 dB",
    }


@pytest.mark.parametrize("pair", [None, {**PAIR, "ours": "newton-8"}, {**PAIR, "low": None}])
def test_the_headline_has_no_interval_of_another_pair(folder, tmp_path, pair):
    def change(summary):
        runs_of(summary)["cache-dit-8.7"]["against_ours"] = pair

    _, below, _ = headline_of(folder, tmp_path / "e", change)
    assert "is cache-dit with 8.7 step equivalents" in below and "interval" not in below


def test_the_headline_of_equal_pictures_and_of_none_to_compare_with(folder, tmp_path):
    def equal(summary):
        runs_of(summary)["newton-9"]["psnr"] = None

    headline, below, tiles = headline_of(folder, tmp_path / "e", equal)
    assert headline == "9 of 50 steps computed, 4.7 times as fast, and the same pictures."
    assert len(tiles) == 2 and below.startswith("Mean over 3 samples")

    def alone(summary):
        summary["runs"] = [run for run in summary["runs"] if run["contender"] in ("reference", "newton")]

    headline, _, tiles = headline_of(folder, tmp_path / "f", alone)
    assert headline.endswith("49.3 dB PSNR to the full run.") and len(tiles) == 3


def test_a_page_of_other_steps_opens_at_its_own_budget(folder, tmp_path):
    """9 of 50 steps are 5.04 of 28."""
    html = lesa.report(changed(folder, tmp_path / "e", lambda s: s.update(num_inference_steps=28))).read_text()
    data = data_of(html)
    assert data["budgets"][data["chosen"]]["ours"] == "newton-5"
    assert re.search("<h1>(.*?)</h1>", html)[1].startswith("5 of 28 steps computed")


def test_budgets_are_of_the_best_runs_from_most_to_least_steps(folder, tmp_path):
    def change(summary):
        summary["runs"][1:] = summary["runs"][:0:-1]
        runs_of(summary)["newton-7"]["is_best"] = False
        runs_of(summary)["mag-cache-8"]["is_best"] = False

    data = data_of(lesa.report(changed(folder, tmp_path / "e", change)).read_text())
    assert [budget["ours"] for budget in data["budgets"]] == [f"newton-{n}" for n in (10, 9, 8, 5)]
    beside = data["budgets"][2]["peers"]  # one of each, in the order in which they are listed everywhere
    assert beside == [
        "dense-8",
        "taylorseer-lite-order1-interval8",
        "fewer-steps-8",
        "first-block-cache-8.3",
        "mag-cache-8",
        "cache-dit-7.7",
    ]
    assert list(data["contenders"]) == [
        "newton", "dense", "taylorseer", "steps", "first-block-cache", "mag-cache", "cache-dit"
    ]  # fmt: skip
    assert [name for name, contender in data["contenders"].items() if contender["ours"]] == ["newton"]


def test_every_run_of_the_page_has_its_own_figures(folder, page):
    summary = json.loads((folder / "summary.json").read_text())
    data = data_of(page)
    assert len(data["runs"]) == len(summary["runs"]) - 1
    for shown, run in zip(data["runs"], summary["runs"][1:]):
        same = ("name", "contender", "step_equivalents", "seconds", "speedup", "num_inference_steps", "setting")
        same += ("is_best", "steps", "step_errors", "psnr", "ssim", "latent_error")
        assert {name: shown[name] for name in same} == {name: run[name] for name in same}
        assert shown["per_sample_psnr"] == run["per_sample"]["psnr"]
    assert [(metric["key"], metric["log"]) for metric in data["metrics"]] == [
        ("psnr", False), ("ssim", False), ("latent_error", True)
    ]  # fmt: skip
    assert (data["sigmas"], data["stage_bounds"]) == (summary["sigmas"], summary["stage_bounds"])


def test_the_page_tells_predictors_and_commands_apart(folder, tmp_path, page):
    def change(summary):
        for run in summary["runs"]:
            run["reference_seconds"] = 7.9
        runs = runs_of(summary)
        runs["newton-9"] |= {"name": "newton-9@mine", "predictor": "/a/mine"}
        summary["images"]["newton-9@mine"] = summary["images"].pop("newton-9")
        runs["fewer-steps-9"] |= {"reference_seconds": 15.8, "seconds": 4.0, "speedup": 3.95}

    html = lesa.report(changed(folder, tmp_path / "e", change)).read_text()
    runs = {run["name"]: run for run in data_of(html)["runs"]}
    assert runs["newton-9@mine"]["label"] == "newton 9@mine" and runs["newton-8"]["label"] == "newton 8"
    assert "/a/mine" in html and "Reference, seconds" in html and "timed in earlier commands" in html
    assert data_of(html)["timed_apart"] and not data_of(page)["timed_apart"]
    # Half as long as it took, because the reference took half as long the last time.
    assert (runs["fewer-steps-9"]["seconds"], runs["fewer-steps-9"]["pace"]) == (4.0, 2.0)
    assert all(run["pace"] == run["seconds"] for name, run in runs.items() if name != "fewer-steps-9")
    assert "Reference, seconds" not in page and "timed in earlier commands" not in page and "Predictor" not in page


def test_every_picture_of_the_page_is_its_runs_and_its_samples(folder, page):
    files, data = json.loads((folder / "summary.json").read_text())["images"], data_of(page)
    shown = {name for budget in data["budgets"] for name in (budget["ours"], *budget["peers"])}
    assert set(data["pictured"]) == data["pictures"].keys() == shown and data["samples"] == 3
    full = [np.asarray(Image.open(folder / file)).astype(float) for file in files["reference"]]
    for uri, pixels in zip(data["reference_pictures"], full):
        assert np.array_equal(np.asarray(image_of(uri).convert("RGB")), pixels)
    for name, pictures in data["pictures"].items():
        for picture, file, wanted in zip(pictures, files[name], full, strict=True):
            pixels = np.asarray(Image.open(folder / file))
            assert np.array_equal(np.asarray(image_of(picture["picture"]).convert("RGB")), pixels), name
            assert picture["mean"] == pytest.approx(np.abs(pixels - wanted).mean() / 255, rel=1e-5)


def test_every_row_of_the_table_has_its_own_figures(folder, tmp_path):
    def change(summary):
        for number, run in enumerate(summary["runs"]):
            run |= {"peak_memory_bytes": 2_500_000_000 + number * 10**7, "whole_steps": number + 0.25}
            run |= {"latent_psnr": 20.0 + number, "denoise_seconds": 0.5 + number, "lpips": number / 100}
        runs_of(summary)["cache-dit-9.7"]["against_ours"] = {**PAIR, "low": -0.5}
        runs_of(summary)["dense-9"]["against_ours"] = {**PAIR, "psnr_difference": -2.0, "low": None}

    target = changed(folder, tmp_path / "e", change)
    html = lesa.report(target).read_text().partition('<table id="figures">')[2].partition("</table>")[0]
    titles = re.findall('<th scope="col".*?<button type="button">(.*?)</button>', html)
    rows = re.findall("<tr class=.*?</tr>", html, re.DOTALL)
    runs = json.loads((target / "summary.json").read_text())["runs"]
    assert len(rows) == len(runs)
    for row, run in zip(rows, runs):
        cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<t[hd] .*?</t[hd]>", row, re.DOTALL)]
        shown = dict(zip(titles, cells, strict=True))
        psnr = run["psnr"]
        assert shown["Run"] == run["name"]
        assert shown["Step equivalents"] == f"{run['step_equivalents']:.2f}"
        assert shown["Whole steps"] == f"{run['whole_steps']:.2f}"
        assert shown["Seconds"] == f"{run['seconds']:.2f}"
        assert shown["Denoising"] == f"{run['denoise_seconds']:.2f}"
        assert shown["Speed-up"] == f"{run['speedup']:.2f}"
        assert shown["Memory, GB"] == f"{run['peak_memory_bytes'] / 1e9:.2f}"
        assert shown["PSNR, dB"] == ("\N{EN DASH}" if psnr is None else f"{psnr:.2f}")
        assert shown["SSIM"] == f"{run['ssim']:.4f}"
        assert shown["LPIPS"] == f"{run['lpips']:.4f}"
        assert shown["Latent PSNR, dB"] == f"{run['latent_psnr']:.2f}"
        assert shown["Setting"] == (run["setting"] or "\N{EN DASH}")
        assert ("data-other" in row) == (not run["is_best"])
        assert ('class="ours"' in row) == (run["contender"] == "newton")
        assert f"var(--c-{run['contender']})" in row or run["contender"] == "reference"
    by_name = {run["name"]: row for run, row in zip(runs, rows)}
    assert "+2.00 [-0.50, +2.75]" in by_name["cache-dit-9.7"]
    assert ">-2.00<" in by_name["dense-9"]
    assert "CLIP score" not in titles and "ImageReward" not in titles  # nobody has one


def test_the_facts_and_what_was_tried_are_those_of_the_summary(folder, page):
    summary = json.loads((folder / "summary.json").read_text())
    tail = page.partition("</table>")[2]
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", tail))
    assert facts == {
        "Model": summary["model"],
        "Samples": "3, of the seeds 10000 to 10002",
        "Steps of the reference": "50",
        "Batch size": "3",
        "Dtype": "float32",
        "Device": "x86_64",
        "CPU threads": "2",
        "Versions": "lesa_kernels 0.1.0, torch 2.13.0, diffusers 0.42.1, python 3.11.2",
        "Not available: lpips": "its weights are not on this machine",
    }
    tried = re.findall("<details><summary>(.*?): ([0-9]+) settings tried</summary>(.*?)</details>", tail, re.DOTALL)
    labels = [label for label, _, _ in tried]
    assert labels == [
        "newton", "dense variant", "TaylorSeer", "fewer steps", "First Block Cache", "MagCache", "cache-dit"
    ]  # fmt: skip
    kinds = ("newton", "dense", "taylorseer", "steps", "first-block-cache", "mag-cache", "cache-dit")
    for kind, (_, count, lines) in zip(kinds, tried, strict=True):
        runs = [run for run in summary["runs"] if run["contender"] == kind]
        assert int(count) == len(runs)
        expected = [
            f"{run['name']}: "
            + (f"{run['setting']}: " if run["setting"] else "")
            + f"{run['step_equivalents']:.4g} step equivalents, {run['psnr']:.2f} dB"
            for run in runs
        ]
        assert re.findall("<li>(.*?)</li>", lines) == expected


def test_the_headline_names_the_best_by_whole_steps_where_it_is_another(folder, tmp_path):
    def late(summary):
        for run in summary["runs"]:
            if run["contender"] in ("cache-dit", "first-block-cache"):
                run["step_equivalents"] += 5

    html = lesa.report(changed(folder, tmp_path / "e", late)).read_text()
    assert "the best of the others is TaylorSeer with 9 step equivalents, 41.3 dB." in html
    assert "By whole steps, the best of the others is cache-dit with 9 whole steps, 42.6 dB." in html


def test_the_headline_says_that_nobody_needs_as_few(folder, tmp_path):
    def dear(summary):
        for run in summary["runs"]:
            run["step_equivalents"] += 0 if run["contender"] in ("newton", "reference") else 20

    html = lesa.report(changed(folder, tmp_path / "e", dear)).read_text()
    assert "dB PSNR to the full run. No other contender needs as few as 9 step equivalents.</h1>" in html


def test_each_budget_stands_beside_the_best_of_each_contender_within_it(page):
    found = data_of(page)["budgets"]
    assert [budget["ours"] for budget in found] == [f"newton-{n}" for n in (10, 9, 8, 7, 5)]
    assert data_of(page)["chosen"] == 1
    assert found[1]["peers"] == [
        "dense-9", "taylorseer-lite-order1-interval9", "fewer-steps-9", "first-block-cache-9.3", "mag-cache-9",
        "cache-dit-8.7",
    ]  # fmt: skip
    assert [budget["absent"] for budget in found] == [*([[]] * 4), ["TaylorSeer", "cache-dit"]]


def made_run(contender, equivalents, psnr, whole=None):
    name = f"{contender}-{equivalents:g}"
    whole = equivalents if whole is None else whole
    counts = {"step_equivalents": equivalents, "whole_steps": whole}
    return {"name": name, "contender": contender, "psnr": psnr, **counts}


RUNS = [
    made_run("newton", 8, 40.0),
    made_run("taylorseer", 9, 35.0),
    made_run("taylorseer", 7, 36.0),  # the best within the budget, and not the nearest
    made_run("taylorseer", 9.1, 39.0),
    made_run("cache-dit", 15.25, 33.0, whole=8),
    made_run("cache-dit", 17.5, 34.0, whole=11),
    made_run("steps", 9, None),
]


def test_a_budget_takes_the_best_setting_that_keeps_to_it():
    (budget,) = budgets.budgets_of(RUNS, "newton")
    assert budget == {
        "ours": "newton-8", "text": "8", "peers": ["taylorseer-7"], "absent": ["fewer steps", "cache-dit"]
    }  # fmt: skip
    half = [made_run("newton", 8.5, 40.0), made_run("taylorseer", 9.49, 35.0), made_run("taylorseer", 9.5, 36.0)]
    assert budgets.budgets_of(half, "newton")[0]["peers"] == ["taylorseer-9.49"]


def rows_of(group: dict, table: int = 0) -> dict[str, list]:
    """By contender, what its cells say."""
    cells = {row["title"]: row["cells"] for row in group["tables"][table]["rows"]}
    return {title: [cell.get("why") or tuple(cell.values()) for cell in found] for title, found in cells.items()}


def test_every_contender_is_shown_at_its_best_or_as_out_of_reach():
    (group,) = rivals.rivals(RUNS, "newton", RUNS[:1])  # newton alone is no group
    assert (group["title"], group["own"], group["is_inside"]) == ("Without training", "newton", False)
    assert group["tables"][0]["heads"] == ["at most 8 step equivalents", "at most 8 whole steps"]
    assert rows_of(group) == {
        "TaylorSeer": [("taylorseer-7", "36.00", "7", "+4.00, no interval")] * 2,
        "fewer steps": ["cannot reach this budget; the least is 9"] * 2,
        "cache-dit": [
            "cannot reach this budget; the least is 15.2", ("cache-dit-15.25", "33.00", "8", "+7.00, no interval")
        ],
    }  # fmt: skip
    without = [{key: value for key, value in run.items() if key != "whole_steps"} for run in RUNS]
    (group,) = rivals.rivals(without, "newton", without[:1])
    assert group["tables"][0]["heads"] == ["at most 8 step equivalents"]


def test_trained_contenders_and_those_without_training_are_compared_apart():
    made = {
        ("newton", 9): [50.0, 52.0, 54.0],
        ("lesa", 9): [46.0, 50.0, 50.0],
        ("l2p", 10): [60.0, 60.0, 60.0],  # needs more than ours
        ("l2p", 8): [40.0, 41.0, 42.0],
        ("universal", 8): [40.0, 44.0, 45.0],
        ("universal", 7): [39.0, 43.0, 44.0],
        ("chebyshev", 9.4): [41.0, 43.0, 45.5],
        ("cache-dit", 9): [43.0, 46.0, 47.0],
        ("a<b", 6): [43.0, None, 46.0],  # a contender that nobody registered
    }
    runs = []
    for (contender, count), values in made.items():
        mean = None if None in values else float(np.mean(values))
        runs.append({**made_run(contender, count, mean), "per_sample": {"psnr": values}})
    trained, untrained = rivals.rivals(runs, "newton", runs[:1])
    assert [(g["title"], g["own"], g["is_inside"]) for g in (trained, untrained)] == [
        ("Trained for this model", "newton", True),
        ("Without training", "universal coefficients", True),
    ]
    assert list(rows_of(trained).items()) == [
        ("newton", [("newton-9", "52.00", "9", "\N{EN DASH}")]),
        ("LESA", [("lesa-9", "48.67", "9", "+3.33 (+2.00 to +4.00)")]),
        ("L2P", [("l2p-8", "41.00", "8", "+11.00 (+10.00 to +12.00)")]),
    ]
    assert trained["tables"][0]["lead"] == "lead of newton, dB"
    minus = "\N{MINUS SIGN}"
    assert list(rows_of(untrained).values()) == [
        [("cache-dit-9", "45.33", "9", f"{minus}2.33 ({minus}3.00 to {minus}2.00)")],
        [("chebyshev-9.4", "43.17", "9.4", f"{minus}0.17 ({minus}1.00 to +1.00), not certain")],
        [("universal-8", "43.00", "8", "\N{EN DASH}")],
        [("a<b-6", "no difference", "6", "\N{EN DASH}")],
    ]
    assert [row["ours"] for row in untrained["tables"][0]["rows"]] == [False, False, True, False]
    assert untrained["tables"][0]["lead"] == "lead of universal, dB"


def test_ours_is_the_first_that_was_trained_and_else_the_default_forecaster():
    assert budgets.ours_among({"universal", "lesa", "newton", "taylorseer"}) == "newton"
    assert budgets.ours_among({"universal", "lesa", "taylor"}) == "lesa"
    assert budgets.ours_among({"universal", "taylor", "linear", "chebyshev"}) == "universal"
    assert budgets.ours_among({"taylor", "mag-cache"}) == "taylor"
    assert budgets.ours_among({"mag-cache", "unknown"}) is None
    assert budgets.ours_among({"universal", "taylor", "linear"}, {"linear", "lesa"}) == "linear"
    assert budgets.ours_among({"universal", "taylor"}, {"newton"}) == "universal"


def test_the_page_shows_them_for_each_budget(folder, tmp_path, page):
    assert page.count('<table class="rivals"') == 2 * 5
    assert page.count("The leads are those of newton, which was trained for this model.") == 1

    def late(summary):
        for run in summary["runs"]:
            run["step_equivalents"] += 7 * (run["contender"] == "cache-dit")
        summary["runs"] = [run for run in summary["runs"] if run["contender"] != "dense"]

    html = lesa.report(changed(folder, tmp_path / "e", late)).read_text()
    (chosen,) = re.findall(r'data-budget="1".*?</table>', html, re.DOTALL)
    assert "cannot reach this budget; the least is 12.7" in chosen and "at most 9 whole steps" in chosen
    assert data_of(html)["budgets"][1]["absent"] == ["cache-dit"]


def test_error_maps_are_of_the_pictures(folder, page):
    pictures = data_of(page)["pictures"]["dense-9"]
    files = [folder / "images" / name / "1.png" for name in ("dense-9", "reference")]
    ours, full = (np.asarray(Image.open(file)).astype(float) for file in files)
    assert pictures[1]["mean"] == pytest.approx(np.abs(ours - full).mean() / 255, rel=1e-5)
    embedded, error = (image_of(pictures[1][kind]) for kind in ("picture", "error"))
    assert np.array_equal(np.asarray(embedded.convert("RGB")), np.asarray(Image.open(files[0])))
    scale = next(s for s in report_pictures.ERROR_SCALES if f"{s:.0%} of the range or more" in page)
    assert np.allclose(
        np.asarray(error) / 255 * scale, np.minimum(np.abs(ours - full).mean(-1) / 255, scale), atol=1e-3
    )


@pytest.mark.slow
def test_large_pictures_are_scaled_down_and_the_page_says_so(tmp_path):
    make_evaluation(tmp_path, samples=1, side=1000, budgets=(9,))
    html = lesa.report(tmp_path).read_text()
    assert "Pictures are scaled down to 768 pixels here, figures are not." in html
    assert data_of(html)["pictures"]["newton-9"][0]["picture"].startswith("data:image/webp")


def test_a_page_without_ours_without_pictures_without_curves(tmp_path, folder):
    def strip(summary):
        summary["images"] = {}
        summary["sigmas"] = summary["stage_bounds"] = []
        summary["runs"] = [run for run in summary["runs"] if run["contender"] in ("reference", "steps")]
        for run in summary["runs"]:
            run["step_errors"], run["per_sample"] = [None] * STEPS, None

    html = lesa.report(changed(folder, tmp_path / "e", strip)).read_text()
    assert "<h1>What fewer than 50 steps give</h1>" in html
    assert (
        "fewer-steps-9" in html
        and 'id="compare"' not in html
        and 'id="schedule"' not in html
        and 'id="errors"' not in html
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format_version=2), "`format_version` must be 1 in .*summary.json, but got 2"),
        (lambda s: s.pop("seed"), "`seed` must be given in .*summary.json"),
        (lambda s: s["runs"][3].pop("psnr"), "`psnr` must be given in .*summary.json, run 3"),
        (lambda s: s.update(runs=s["runs"][1:]), "`runs` must begin with the reference"),
        (lambda s: s["images"].update({"newton-9": ["../x.png"] * 3}), "`images` must be in the evaluation's"),
    ],
)
def test_summaries_of_another_form_are_refused_by_field(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        lesa.report(changed(folder, tmp_path / "e", change))


def test_missing_files_are_named(folder, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="must hold a summary.json"):
        lesa.report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="summary.json with valid JSON"):
        lesa.report(tmp_path)
    gone = changed(folder, tmp_path / "e", lambda summary: None)
    (gone / "images" / "newton-9" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="newton-9/1.png"):
        lesa.report(gone)
    with pytest.raises(SystemExit):
        cli.main(["report", "--evaluation", str(tmp_path / "nowhere")])
    assert capsys.readouterr().err.startswith("lesa: error: `--evaluation` must hold a summary.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, _digits_pipeline):
    """The page of a real evaluation."""
    folder, pipe = tmp_path_factory.mktemp("real"), _digits_pipeline
    pipe(**digits.inputs_for([0])[0], num_inference_steps=12, output_type="latent")
    sigmas, steps = pipe.scheduler.sigmas.tolist(), (0, 1, 4, 8)
    trained = {"num_inference_steps": 12, "schedule": steps, "schedule_sigmas": [sigmas[step] for step in steps]}
    predictor = FusedKANPredictor(PredictorConfig(128, family="flux", **trained))
    inputs = digits.inputs_for([3, 8])
    lesa.evaluate(pipe, inputs, [predictor], ("steps-4",), 12, seed=7, out_dir=folder, progress=False)
    if "format_version" not in json.loads((folder / "summary.json").read_text()):
        pytest.skip("this `lesa.evaluate` does not write the summary.json that `lesa report` reads yet")
    return lesa.report(folder)


def test_a_real_evaluation_makes_a_page(tiny):
    page = data_of(tiny.read_text())
    assert [budget["ours"] for budget in page["budgets"]] == ["newton-4"]
    assert page["budgets"][0]["peers"] == ["fewer-steps-4"]
    assert page["samples"] == 2 and len(page["sigmas"]) == 12


# In a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that keeps what its console and its network say."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip(f"no {'chromium' if binary is None else 'chromedriver'} on this machine")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for option in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "force-prefers-reduced-motion",
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


def opened(browser, file: Path, width: int = 1280, height: int = 900):
    """The page in a window of that size; what was logged before is forgotten."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(file.as_uri())
    return browser


def requested(browser) -> list[str]:
    """Addresses that were asked for since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def press(browser, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def tab_to(browser, condition: str, most: int = 80) -> None:
    """Presses the Tab key until the focused element `e` is such a one."""
    for _ in range(most):
        press(browser, "\ue004")
        if browser.execute_script(f"const e = document.activeElement; return {condition}"):
            return
    pytest.fail(f"the Tab key comes to nothing with {condition}")


CHARTS = ("over-steps", "over-seconds", "errors", "schedule")


@pytest.mark.parametrize("width", [1280, 360])
def test_it_renders_alone_and_fits(browser, folder, width):
    opened(browser, folder / "report.html", width)
    for chart in CHARTS:
        box = browser.execute_script(
            "const s = document.querySelector(`#${arguments[0]} svg`), b = s.getBoundingClientRect();"
            "return [b.width, b.height, s.querySelectorAll('path').length]",
            chart,
        )
        assert box[0] > 250 and box[1] > 150 and box[2] > 10, chart
    inner, scroll = browser.execute_script("return [innerWidth, document.scrollingElement.scrollWidth]")
    assert inner == width
    assert scroll <= inner
    sizes = browser.execute_script("return [...document.images].map((i) => [i.complete, i.naturalWidth])")
    assert len(sizes) > 8 and all(complete and width == 16 for complete, width in sizes)
    assert browser.get_log("browser") == []
    assert {url.partition(":")[0] for url in requested(browser)} <= {"file", "data"}
    assert requested(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(browser, folder, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    opened(browser, folder / "report.html")
    colors = browser.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(arguments[0].map((n) => [n, s.getPropertyValue('--' + n).trim()]))",
        ["paper", "card", "band", "ink", "soft", "ours", "ours-soft", *(f"c-{name}" for name in PEERS)],
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    def contrast(one, other):
        low, high = sorted(luminance(colors[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "soft", "ours"):
        for ground in ("paper", "card", "band"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("ours", "ours-soft") >= 4.5
    assert all(contrast(f"c-{name}", "card") >= 3 for name in PEERS)
    assert (luminance(colors["paper"]) > 0.5) == (scheme == "light")


def test_the_keyboard_moves_the_slider_and_sorts_the_table(browser, folder):
    opened(browser, folder / "report.html")
    tab_to(browser, "e.type === 'range'")
    press(browser, "\ue014", "\ue014", "\ue014")  # to the right
    split = "return getComputedStyle(document.querySelector('#compare')).getPropertyValue('--split').trim()"
    assert browser.execute_script(split) == "53%"
    assert browser.execute_script("return document.activeElement.getAttribute('aria-valuetext')") == "53 % reference"
    tab_to(browser, "e.closest('th') && e.textContent === 'PSNR, dB'")
    column = browser.execute_script("return document.activeElement.closest('th').cellIndex")
    values = f"return [...document.querySelectorAll('#figures tbody tr')].map((r) => r.cells[{column}].dataset.value)"
    head = "return document.activeElement.closest('th').getAttribute('aria-sort')"
    for order in ("ascending", "descending"):
        press(browser, "\ue007")
        shown = browser.execute_script(values)
        figures = [float(value) for value in shown if value]
        assert figures == sorted(figures, reverse=order == "descending") and len(figures) > 30
        assert shown[-1] == ""  # the reference has none
        assert browser.execute_script(head) == order


def test_the_keyboard_walks_a_chart_and_chooses_contender_sample_and_budget(browser, folder):
    opened(browser, folder / "report.html")
    tip = "return document.querySelector('#over-steps .tip').textContent"
    chosen = "return document.querySelector('#compare .tag.right').textContent"
    tab_to(browser, "e.name === 'budget'")
    press(browser, "\ue014")
    assert browser.execute_script(chosen) == "newton 8"
    before = browser.execute_script("return document.querySelector('#compare .under').src")
    tab_to(browser, "e.name === 'sample'")
    press(browser, "\ue014")
    assert browser.execute_script("return document.querySelector('#compare .under').src") != before
    tab_to(browser, "e.closest('#strip') && e.textContent.startsWith('TaylorSeer')")
    press(browser, "\ue007")
    assert browser.execute_script(chosen) == "TaylorSeer 8"
    assert browser.execute_script("return document.activeElement.getAttribute('aria-pressed')") == "true"
    tab_to(browser, "e.closest('#over-steps')")
    press(browser, "\ue014")
    assert browser.execute_script(tip).startswith("newton 7PSNR, dB 45.90")
    press(browser, "\ue015")  # down, to the next contender
    assert "newton" not in browser.execute_script(tip)
    press(browser, "\ue00c")
    assert browser.execute_script(tip) == ""


def test_the_pointer_pulls_the_handle_and_finds_values(browser, folder):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    opened(browser, folder / "report.html")
    compare = browser.find_element(By.CSS_SELECTOR, "#compare")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", compare)
    quarter = round(compare.size["width"] / 4)
    ActionChains(browser).move_to_element(compare).click_and_hold().move_by_offset(quarter, 0).release().perform()
    value = browser.execute_script("return +document.querySelector('#compare input').value")
    assert value == pytest.approx(75, abs=1)
    chart = browser.find_element(By.CSS_SELECTOR, "#schedule svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    x, y = browser.execute_script(
        "const s = document.querySelector('#schedule svg'), b = s.getBoundingClientRect();"
        "const p = s.querySelector('path[stroke-width=\"4\"]').getBoundingClientRect();"
        "return [Math.round(p.x - b.x - b.width / 2), Math.round(p.y + 8 - b.y - b.height / 2)]"
    )
    ActionChains(browser).move_to_element_with_offset(chart, x, y).perform()
    tip = browser.execute_script("return document.querySelector('#schedule .tip').textContent")
    assert tip == "newton 9step 0, sigma 1.000"


def test_names_are_text_and_not_markup(browser, tmp_path):
    make_evaluation(tmp_path, budgets=(9,), rename={"cache-dit": ODD, "newton": "newton"})
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["model"] = summary["device"] = ODD
    for run in summary["runs"]:
        run["setting"] = ODD
    summary["not_available"] = {ODD: ODD}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    opened(browser, lesa.report(tmp_path))
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelectorAll('[onerror]').length") == 0
    assert browser.execute_script("return document.querySelector('.kicker').textContent") == ODD
    legend = browser.execute_script("return [...document.querySelectorAll('#legend button')].map((b) => b.textContent)")
    assert ODD in legend
    tab_to(browser, "e.closest('#over-steps')")
    assert ODD in browser.execute_script("return document.querySelector('#over-steps .tip').textContent")


def test_the_page_of_a_real_evaluation_renders(browser, tiny):
    opened(browser, tiny, 360)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.scrollingElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return document.querySelectorAll('.chart svg path').length") > 20


def test_a_chart_of_as_many_steps_as_the_reference(page):
    """So that the made-up evaluation is one of the agreed form."""
    data = data_of(page)
    assert len(data["sigmas"]) == STEPS
    assert all(len(run["step_errors"]) == STEPS for run in data["runs"])
