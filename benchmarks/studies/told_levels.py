"""Noise levels that the model is told in computed steps, learned or not: `python benchmarks/studies/told_levels.py`.

    python benchmarks/studies/told_levels.py --out DIR --work DIR [--only digits-9-linear ...] [--parts]

Each setting is a bundled model, a number of computed steps of 50, and a forecaster. A forecaster without training is
measured as it is ("as it is") and after so many updates of `lesa.train_end_to_end(learn_levels=True)`, which train one
number for each computed step ("levels"). A newton predictor is measured as it is, after so many updates without levels
("predictor"), and after as many with them ("both"). It is the bundled one. All of a setting start from the same weights
and see the same samples.

Writes `told-levels.csv`, with the PSNR of the latents of each sample for a peak of 2, and `told-levels-learned.csv`,
with the levels. What these files have is not measured again. Then it prints the table. `--parts` measures forecasters
without training, whose levels have been learned, with only the first of these levels, only the last one, and both; and
with the middle of the first gap in place of the first level ("middle").
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

import lesa
import lesa.training.gradient_hook as gradient_hook
from lesa.cache.reasons import UNTOLD
from lesa.demo.digits import WEIGHTS
from lesa.demo.run import DEMOS, labels
from lesa.evaluation.quality import paired_lead, psnr
from lesa.inputs import batches_of, check_inputs, collate
from lesa.pipelines import run_pipeline
from lesa.processes import Processes
from lesa.training.end_to_end import trained_end_to_end
from lesa.training.end_to_end_settings import EndToEndSettings
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, TRAINING_SEED, BATCH_SIZE = 50, 100_000, 8
TRAINING_SAMPLES = {"digits": 256, "photos": 96}
SEEDS, SAMPLES = (30_000, 40_000), 32
"""The seeds of the samples that choices may look at, and of the final ones."""
BEST = {  # schedules that are the best for linear extrapolation on seeds from 30 000 on; see docs/research.md
    ("digits", 9): (0, 3, 9, 16, 23, 30, 37, 43, 47),
    ("digits", 7): (0, 7, 16, 25, 33, 41, 47),
    ("photos", 9): (0, 2, 5, 9, 15, 22, 29, 36, 44),
}


class Setting(NamedTuple):
    """What is measured: a bundled model, how many steps are computed, and the forecaster."""

    model: str
    computed: int
    mixer: str
    updates: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.computed}-{self.mixer}"


SETTINGS = (
    Setting("digits", 9, "linear", 60),
    Setting("digits", 7, "linear", 60),
    Setting("digits", 9, "newton", 60),
    Setting("photos", 9, "linear", 40),
)

VARIANTS = {False: ("as it is", "levels"), True: ("as it is", "predictor", "both")}
"""By whether the forecaster is trained."""


def predictor_of(setting: Setting) -> FusedKANPredictor:
    """The predictor that a setting starts from: a bundled one, or a forecaster without training and its schedule."""
    prefix = "photos-" if setting.model == "photos" else ""
    if setting.mixer == "newton":
        return FusedKANPredictor.from_pretrained(WEIGHTS / f"{prefix}newton-{setting.computed}")
    like = FusedKANPredictor.from_pretrained(WEIGHTS / f"{prefix}newton-9").config
    steps = BEST[setting.model, setting.computed]
    sigmas = tuple(1 - step / STEPS for step in steps)
    known: dict[str, Any] = {"schedule": steps, "schedule_sigmas": sigmas, "num_inference_steps": STEPS}
    return FusedKANPredictor(PredictorConfig(like.feature_dim, setting.mixer, family=like.family, **known))


def latents_of(pipe: Any, inputs: list[dict], seed: int) -> torch.Tensor:
    """The latents of runs of samples with seeds from `seed` on."""
    made = {}
    for numbers in batches_of(inputs, 16):
        generators = [torch.Generator("cpu").manual_seed(seed + number) for number in numbers]
        some = run_pipeline(pipe, collate([inputs[number] for number in numbers]), generators, STEPS)
        made.update(zip(numbers, some))
    return torch.stack([made[number] for number in range(len(inputs))])


def wanted_in(work: Path, model: str, pipe: Any, seed: int) -> torch.Tensor:
    """The latents of the runs with all steps, which are kept in a file."""
    file = work / f"{model}-{seed}-{SAMPLES}.pt"
    if not file.exists():
        torch.save(latents_of(pipe, inputs_of(model, SAMPLES), seed), file)
    return torch.load(file)


def inputs_of(model: str, count: int) -> list[dict]:
    return check_inputs(DEMOS[model].model.inputs_for(labels(count)))


def trained(setting: Setting, variant: str, pipe: Any, work: Path) -> FusedKANPredictor:
    """The predictor of a variant."""
    predictor, inputs = predictor_of(setting), inputs_of(setting.model, TRAINING_SAMPLES[setting.model])
    if variant == "as it is":
        return predictor
    learns = variant in ("levels", "both")
    settings = EndToEndSettings(STEPS, setting.updates, BATCH_SIZE, BATCH_SIZE, 1e-3, TRAINING_SEED, learns)
    folder, references = work / f"{setting.name}-{variant}", work / f"all-steps-{setting.model}"
    for each in (folder, references):
        each.mkdir(parents=True, exist_ok=True)
    bar = f"{setting.name}, {variant}"
    return trained_end_to_end(predictor, pipe, inputs, settings, folder, Processes(), references=references, bar=bar)


def figures_of(setting: Setting, predictor: FusedKANPredictor, pipe: Any, work: Path) -> dict[int, list[float]]:
    """By first seed, the PSNR of each sample."""
    found = {}
    for seed in SEEDS:
        wanted = wanted_in(work, setting.model, pipe, seed)
        with lesa.enable_cache(pipe, predictor) as cache:
            latents = latents_of(pipe, inputs_of(setting.model, SAMPLES), seed)
            if UNTOLD in cache.stats.notes:
                raise RuntimeError(f"the learned levels were not used: {cache.stats.notes}")
        pairs = zip(latents.double().numpy(), wanted.double().numpy())
        found[seed] = [psnr(own, full, 2.0) for own, full in pairs]
    return found


def rows_in(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def append(file: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    is_new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, [*rows[0]], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def rows_of(setting: Setting, variant: str, found: dict[int, list[float]]) -> list[dict[str, Any]]:
    about = {"setting": setting.name, "updates": setting.updates, "variant": variant}
    return [
        {**about, "seed": seed + number, "psnr": f"{value:.4f}"}
        for seed, values in found.items()
        for number, value in enumerate(values)
    ]


def measure(setting: Setting, out: Path, work: Path) -> None:
    """Measures a setting, unless the files have it."""
    file, pipe = out / "told-levels.csv", DEMOS[setting.model].model.load_pipeline()
    known = {row["variant"] for row in rows_in(file) if row["setting"] == setting.name}
    for variant in VARIANTS[setting.mixer == "newton"]:
        if variant in known:
            continue
        predictor = trained(setting, variant, pipe, work)
        append(file, rows_of(setting, variant, figures_of(setting, predictor, pipe, work)))
        config = predictor.config
        about = {"setting": setting.name, "updates": setting.updates, "variant": variant}
        learned = zip(config.schedule, config.schedule_sigmas, config.told_levels or ())
        append(
            out / "told-levels-learned.csv",
            [{**about, "step": step, "level": f"{level:.4f}", "told": f"{told:.4f}"} for step, level, told in learned],
        )


def measure_parts(setting: Setting, out: Path, work: Path) -> None:
    """Measures a forecaster without training with some of the levels that it has learned, unless the file has that."""
    file, pipe = out / "told-levels.csv", DEMOS[setting.model].model.load_pipeline()
    known = {row["variant"] for row in rows_in(file) if row["setting"] == setting.name}
    rows = [row for row in rows_in(out / "told-levels-learned.csv") if row["setting"] == setting.name]
    told, config = [float(row["told"]) for row in rows], predictor_of(setting).config
    own = config.schedule_sigmas
    parts = {
        "first": (told[0], *own[1:]),
        "last": (*own[:-1], told[-1]),
        "both ends": (told[0], *own[1:-1], told[-1]),
        "middle": ((own[0] + own[1]) / 2, *own[1:]),
    }
    for variant, levels in parts.items():
        if variant not in known:
            predictor = FusedKANPredictor(replace(config, told_levels=levels))
            append(file, rows_of(setting, variant, figures_of(setting, predictor, pipe, work)))


def table(file: Path) -> Iterator[str]:
    """The lines of the table: the mean PSNR on the final samples, and the lead of the levels over what has none."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows_in(file):
        found[row["setting"]][row["variant"]][int(row["seed"])] = float(row["psnr"])
    yield "| setting | seeds | as it is | without levels | with levels | lead of the levels, dB (95 %) |"
    yield "|---|---|---|---|---|---|"
    for name, variants in found.items():
        other = "predictor" if "predictor" in variants else "as it is"
        for first, ours in product(SEEDS, [kind for kind in variants if kind not in ("as it is", "predictor")]):
            seeds = range(first, first + SAMPLES)
            start, without, with_ = ([variants[kind][seed] for seed in seeds] for kind in ("as it is", other, ours))
            mean, low, high = paired_lead(with_, without)
            means = f"{fmean(start):.2f} | {fmean(without):.2f} | {fmean(with_):.2f}"
            yield f"| {name}, {ours} | {first} | {means} | {mean:+.2f} ({low:+.2f} to {high:+.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the CSV files are")
    parser.add_argument("--work", type=Path, required=True, help="for runs with all steps and unfinished trainings")
    parser.add_argument("--only", nargs="*", choices=[setting.name for setting in SETTINGS], help="these settings")
    parser.add_argument("--parts", action="store_true", help="measure with some of the learned levels only")
    arguments = parser.parse_args()
    # The small models need no checkpoints. The gradients are the same without them, in half the time.
    gradient_hook.checkpointed = lambda function, *args, **kwargs: function(*args, **kwargs)
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    for setting in SETTINGS:
        if arguments.only is None or setting.name in arguments.only:
            measure(setting, arguments.out, arguments.work)
            if arguments.parts and setting.mixer != "newton":
                measure_parts(setting, arguments.out, arguments.work)
            print(*table(arguments.out / "told-levels.csv"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
