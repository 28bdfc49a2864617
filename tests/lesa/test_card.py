"""The model card of a fitted predictor."""

import copy

import pytest
import yaml

from lesa.fitting.card import STAGES, base_model_of, write_card
from lesa_kernels import FusedKANPredictor, PredictorConfig

CONFIG = PredictorConfig(
    8, rank=1, hidden=2, family="flux", num_inference_steps=12, schedule=(0, 3, 7), schedule_sigmas=(1.0, 0.7, 0.4)
)
MADE_FOR = {
    "pipeline": "FluxPipeline",
    "dtypes": {"transformer": "bfloat16"},
    "adapters": {"transformer": {"style": 0.8}},
    "fused_loras": [],
    "transformer": "ab" * 32,
    "scheduler": {"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
MADE = {"samples": 8, "rounds": 2, "updates": 700, "updates_per_round": 200, "seed": 5, "batch_size": 1, "inputs": None}


def run(name, contender, psnr, **more):
    return {"name": name, "contender": contender, "whole_steps": 3.0, "psnr": psnr, "ssim": 0.98765, **more}


EVALUATION = {
    "compared": "pictures",
    "samples": 16,
    "num_inference_steps": 12,
    "runs": [
        run("reference", "reference", None),
        run("newton-3", "newton", 48.126, seconds=1.25),
        run("universal-3", "universal", 42.6),
        run("fewer-steps-3", "steps", 35.8),
    ],
}


@pytest.fixture
def folder(tmp_path):
    predictor = FusedKANPredictor(CONFIG)
    predictor.provenance = MADE_FOR
    predictor.save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "comparison.png").write_bytes(b"a picture")
    return tmp_path / "p"


def card_of(folder, evaluation=EVALUATION, made=MADE):
    write_card(folder, evaluation, made)
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_has_what_the_hub_reads_and_what_a_user_needs(folder):
    head, body = card_of(folder, made={**MADE, "base_model": "someone/model"})
    assert head == {
        "library_name": "lesa-kernels",
        "base_model": "someone/model",
        "tags": ["lesa-kernels", "diffusers", "flux"],
    }
    for line in (
        "# A predictor of lesa-kernels: 3 of 12 steps are computed",
        "| run | computed steps | PSNR, dB | SSIM |",
        "| **this predictor** | 3 | 48.13 | 0.9877 |",
        "| without training (universal) | 3 | 42.60 | 0.9877 |",
        "| fewer steps, without a cache | 3 | 35.80 | 0.9877 |",
        "![Pictures of the runs side by side](comparison.png)",
        "- dtype of `transformer`: bfloat16",
        "- adapters: style with scale 0.8",
        "- scheduler: `FlowMatchEulerDiscreteScheduler`, shift 3.0",
        f"- fingerprint of the weights of `transformer`: `{'ab' * 32}`",
        "lesa fit --model someone/model --budget 3 --steps 12 --batch-size 1 --seed 5 --out FOLDER",
        "- inputs: the built-in prompts",
        "- rounds of refining: 2",
    ):
        assert line in body.splitlines()
    assert "Measured on 16 samples" in body and "The computed steps of a run of 12 steps are 0, 3, 7." in body
    assert "1.25" not in body  # seconds differ from run to run


def test_the_same_facts_give_the_same_bytes(folder):
    card_of(folder)
    first = (folder / "README.md").read_bytes()
    other = copy.deepcopy(EVALUATION)
    other["runs"][1]["seconds"] = 99.0
    card_of(folder, other)
    assert (folder / "README.md").read_bytes() == first


RUNS = {"schedules_tried": 83, "updates_on_schedules": 100, "samples_end_to_end": 16, "samples_per_update": 8}
OF_RUNS = {
    "- schedules that were compared by runs: 83",
    "- optimiser steps through whole runs on many schedules, before these were compared: 100",
    "- samples for the training through whole runs: 16",
    "- of these, for each optimiser step: 8",
}
NOT_THROUGH_RUNS = "- this predictor was not trained through whole runs"


@pytest.mark.parametrize(
    ("stage", "facts", "lines"),
    [
        ("rounds", {}, {NOT_THROUGH_RUNS}),
        (
            "schedules",
            {**RUNS, "began_from": "rounds"},
            {*OF_RUNS, f"- where its last training began: {STAGES['rounds']}"},
        ),
        ("trained again", RUNS, {*OF_RUNS, NOT_THROUGH_RUNS}),
        ("refined again", RUNS, {*OF_RUNS, NOT_THROUGH_RUNS}),
        (
            "end to end",
            {**RUNS, "updates_end_to_end": 200, "began_from": "refined again"},
            {
                *OF_RUNS,
                "- optimiser steps through whole runs in the end, on these computed steps: 200",
                f"- where its last training began: {STAGES['refined again']}",
            },
        ),
    ],
)
def test_a_card_says_which_predictor_of_a_fit_through_whole_runs_it_is_and_what_led_to_it(folder, stage, facts, lines):
    _, plain = card_of(folder)
    _, body = card_of(folder, made={**MADE, "end_to_end": True, "loss": "latents", "stage": stage, **facts})
    assert "--batch-size 1 --seed 5 --end-to-end --loss latents --out FOLDER" in body
    best = f"- the predictor that was best with the samples for comparisons: {STAGES[stage]}"
    added = {line for line in body.splitlines() if line.startswith("- ")} - {*plain.splitlines()}
    assert added == {best, *lines}
    assert "whole runs" not in plain


def test_figures_of_latents_and_no_picture(folder):
    (folder / "comparison.png").unlink()
    runs = [{**each, "latent_psnr": each["psnr"], "psnr": None, "ssim": None} for each in EVALUATION["runs"]]
    _, body = card_of(folder, {**EVALUATION, "compared": "latents", "runs": runs})
    assert "| **this predictor** | 3 | 48.13 |" in body.splitlines() and "PSNR of the latents, dB" in body
    assert "comparison.png" not in body and "SSIM" not in body


def test_a_card_of_little(folder):
    (folder / "provenance.json").unlink()
    head, body = card_of(folder, None, {})
    assert "base_model" not in head and "## Figures" not in body
    assert "- unknown: the predictor does not say it" in body.splitlines()
    assert "lesa fit --model MODEL --budget 3 --steps 12 --out FOLDER" in body


class Pipe:
    def __init__(self, name):
        self.name_or_path = name


def test_a_path_is_never_published(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    for path in (
        str(tmp_path / "model"),
        "private/model",
        "./model",
        "~/model",
        "../model",
        "a/b/c",
        "model",
        None,
        "",
    ):
        assert base_model_of(Pipe(path)) is None
        head, body = card_of(folder, made={**MADE, "base_model": path})
        assert "base_model" not in head and "--model MODEL" in body
    assert base_model_of(Pipe("someone/model-1.0_dev")) == "someone/model-1.0_dev"
    assert base_model_of(object()) is None
