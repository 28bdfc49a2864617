"""How many samples, steps of the optimiser and rounds of refining a predictor needs.

`python benchmarks/studies/training_amounts.py --work amounts` trains newton predictors of 9 computed steps for both
bundled models, with different amounts of everything, and measures each one on samples that no training used: PSNR of
the pictures against the run of all 50 steps, beside the bundled predictor on the same samples. Each result is one line
of the table, written at once. What the table has already is not measured again, so the study can be interrupted.
`--plot FILE` draws the table instead, and prints it. The whole takes about two hours of one core.
"""

import argparse
import copy
import csv
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from unittest.mock import patch

import matplotlib
import torch
from tqdm import tqdm

import lesa
from lesa.demo import digits
from lesa.demo.run import DEMOS, OF_50_STEPS, labels
from lesa.evaluation.quality import psnr
from lesa.inputs import collate
from lesa.models import adapter_for
from lesa.training.batches import split
from lesa.training.training_run import Training
from lesa_kernels import FusedKANPredictor

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of a backend)

BATCH = 8
BUNDLED = {"digits": "newton-9", "photos": "photos-newton-9"}
TEST_SEED, TEST_BATCH, TEST_BATCHES = 70_000, 16, 2
COLUMNS = ("rounds", "computed", "psnr", "lead", "lead_error", "search_s", "train_s", "refine_s")

SECONDS = "seconds.json"
SHOWN = ("8", "96")
"""The numbers of samples in the panels for something else."""


@dataclass(frozen=True)
class Chain:
    """One training and the rounds of refining after it.

    Args:
        model: "digits" or "photos".
        samples: how many are recorded.
        training_steps: of the optimiser, a seventh of them in the guided phase.
        refining_steps: of the optimiser, in each round.
        most_rounds: how many rounds there are.
        tokens: of each trajectory per step of the optimiser.
        schedule: "bundled" or "searched".
    """

    model: str
    samples: int
    training_steps: int = 600
    refining_steps: int = 200
    most_rounds: int = 2
    tokens: int = 16
    schedule: str = "bundled"


USUAL = Chain("", 0)
"""What the panels of the picture have in common is as here, apart from model and samples."""


def chains() -> list[Chain]:
    """All that is measured, the most informative first."""
    both = OF_50_STEPS
    return [
        *(Chain(model, 96, most_rounds=3) for model in both),
        *(Chain(model, 8) for model in both),
        *(Chain(model, samples) for samples, model in itertools.product((32, 16), both)),
        *(Chain(model, 160, most_rounds=3) for model in both),
        *(Chain(model, 96, 1200, 400) for model in both),
        *(Chain(model, 96, 300, most_rounds=0) for model in both),
        *(Chain(model, 96, refining_steps=100, most_rounds=3) for model in both),
        *(Chain(model, samples) for samples, model in itertools.product((2, 4), both)),
        *(Chain(model, 8, tokens=32) for model in both),
        *(Chain(model, samples, schedule="searched") for samples, model in itertools.product((96, 32, 8), both)),
        *(Chain(model, samples, 2400, most_rounds=0) for samples, model in itertools.product((96, 8), both)),
        *(Chain(model, 8, 150, most_rounds=0) for model in both),
        *(Chain(model, 96, tokens=32) for model in both),
    ]


class Samples:
    """Test samples of a bundled model, and what all steps make of them."""

    def __init__(self, model: str):
        self.demo = DEMOS[model]
        self.pipe = self.demo.model.load_pipeline()
        self.arguments = collate(self.demo.model.inputs_for(labels(TEST_BATCH)))
        self.wanted = self._drawn(nullcontext)
        bundled = FusedKANPredictor.from_pretrained(digits.WEIGHTS / BUNDLED[model])
        self.schedule = list(bundled.config.schedule)
        self.of_bundled = self.psnrs(bundled)

    def psnrs(self, predictor: FusedKANPredictor) -> list[float]:
        """PSNR in dB of each picture against all steps."""
        made = self._drawn(lambda: lesa.enable_cache(self.pipe, predictor))
        return [psnr(own, full, 1.0) for own, full in zip(made, self.wanted)]

    def _drawn(self, cache) -> list:
        size, pictures = (self.arguments["height"], self.arguments["width"]), []
        for first in range(TEST_SEED, TEST_SEED + TEST_BATCH * TEST_BATCHES, TEST_BATCH):
            generators = [torch.Generator().manual_seed(first + number) for number in range(TEST_BATCH)]
            options = {"num_inference_steps": 50, "output_type": "latent", "return_dict": False}
            with cache():
                latents = self.pipe(**self.arguments, **options, generator=generators)[0]
            pictures.extend(adapter_for(self.pipe).decode(self.pipe, latents, *size))
        return pictures


def epochs_of(steps: int, trajectories: lesa.Trajectories) -> int:
    """In how many passes over the trajectories the optimiser takes about so many steps."""
    return max(1, round(steps / math.ceil(len(split(trajectories, 0.1, 0).training) / BATCH)))


def trained(chain: Chain, samples: Samples, trajectories: lesa.Trajectories, folder: Path) -> FusedKANPredictor:
    """The predictor before refining; it is kept in a folder, since several chains begin with it."""
    if (folder / SECONDS).exists():
        return FusedKANPredictor.from_pretrained(folder)
    start = time.process_time()
    schedule = samples.schedule
    if chain.schedule == "searched":
        schedule = list(lesa.find_schedule(trajectories, len(schedule), progress=False).steps)
    seconds = {"search_s": time.process_time() - start}
    start, guided = time.process_time(), chain.training_steps // 7
    predictor = lesa.train(
        trajectories,
        schedule=schedule,
        guided_epochs=epochs_of(guided, trajectories),
        epochs=epochs_of(chain.training_steps - guided, trajectories),
        batch_size=BATCH,
        tokens_per_batch=chain.tokens,
        progress=False,
    )
    seconds["train_s"] = time.process_time() - start
    predictor.save_pretrained(folder)
    (folder / SECONDS).write_text(json.dumps(seconds))
    return predictor


def measured(chain: Chain, samples: Samples, work: Path) -> Iterator[dict[str, str]]:
    """The lines of a chain: before refining, and after each round."""
    inputs = samples.demo.model.inputs_for(labels(chain.samples))
    trajectories = lesa.record(
        samples.pipe, inputs, work / f"{chain.model}-{chain.samples}", batch_size=16, progress=False
    )
    of_training = (chain.model, chain.samples, chain.training_steps, chain.tokens, chain.schedule)
    folder = work / "-".join(map(str, ("trained", *of_training)))
    predictor = trained(chain, samples, trajectories, folder)
    seconds = json.loads((folder / SECONDS).read_text())
    yield line_of(predictor, samples, 0, {**seconds, "refine_s": 0.0})
    if not chain.most_rounds:
        return
    refined, start, finish = [], time.process_time(), Training.finish

    def noted(run: Training) -> FusedKANPredictor:
        predictor = finish(run)
        refined.append((copy.deepcopy(predictor), time.process_time() - start))
        return predictor

    with patch.object(Training, "finish", noted):
        lesa.refine(
            predictor,
            trajectories,
            samples.pipe,
            inputs,
            rounds=chain.most_rounds,
            epochs=epochs_of(chain.refining_steps, trajectories),
            batch_size=BATCH,
            tokens_per_batch=chain.tokens,
            samples_per_call=16,
            progress=False,
        )
    for rounds, (predictor, refine_s) in enumerate(refined, 1):
        yield line_of(predictor, samples, rounds, {**seconds, "refine_s": refine_s})


def line_of(predictor: FusedKANPredictor, samples: Samples, rounds: int, seconds: dict[str, float]) -> dict[str, str]:
    """What the table says of a predictor: its quality, and what it cost in seconds of one core."""
    psnrs = samples.psnrs(predictor)
    leads = [own - other for own, other in zip(psnrs, samples.of_bundled)]
    return {
        "rounds": str(rounds),
        "computed": " ".join(map(str, predictor.config.schedule or ())),
        "psnr": f"{statistics.fmean(psnrs):.2f}",
        "lead": f"{statistics.fmean(leads):.2f}",
        "lead_error": f"{statistics.stdev(leads) / len(leads) ** 0.5:.2f}",
        **{name: f"{value:.1f}" for name, value in seconds.items()},
    }


def read(table: Path) -> list[dict[str, str]]:
    """The lines of the table; none if there is no table."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return [*csv.DictReader(file)]


def markdown(lines: list[dict[str, str]]) -> str:
    """The table with one line for each chain, and its PSNR after each number of rounds."""
    head = ("model", "schedule", "samples", "tokens", "training steps", "steps a round", "before refining")
    rows = [[*head, "after 1 round", "2 rounds", "3 rounds", "against the bundled one"], ["---"] * (len(head) + 4)]
    chain_of = ("model", "schedule", "samples", "tokens", "training_steps", "refining_steps")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in chain_of), []).append(line)
    for key in sorted(groups, key=lambda key: (*key[:2], *map(int, key[2:]))):
        psnrs = {line["rounds"]: line["psnr"] for line in groups[key]}
        last = groups[key][-1]
        lead = f"{float(last['lead']):+.2f} ± {last['lead_error']}"
        steps = key[-1] if len(psnrs) > 1 else ""
        rows.append([*key[:-1], steps, *(psnrs.get(str(rounds), "") for rounds in range(4)), lead])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(lines: list[dict[str, str]], picture: Path) -> None:
    """Draws the lead over the bundled predictor: over the samples, over the optimiser's steps, and over the rounds."""
    usual = {name: str(getattr(USUAL, name)) for name in ("training_steps", "refining_steps", "tokens", "schedule")}
    panels = {"samples": "recorded samples", "training_steps": "steps of the optimiser in training", "rounds": "rounds"}
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.2), sharey="row", constrained_layout=True)
    for row, model in zip(axes, OF_50_STEPS):
        for axis, (name, label) in zip(row, panels.items()):
            curves: dict[str, dict[int, float]] = {}
            varied = {name} if name == "samples" else {name, "refining_steps"}
            for line in lines:
                alike = all(line[key] == value for key, value in usual.items() if key not in varied)
                if line["model"] != model or not alike or (name != "samples" and line["samples"] not in SHOWN):
                    continue
                of_samples = f"{line['samples']} samples, {line['refining_steps']} steps a round"
                of_rounds = f"{line['rounds']} rounds" if name == "samples" else f"{line['samples']} samples"
                curve = of_samples if name == "rounds" else of_rounds
                if name != "training_steps" or line["rounds"] == "0":
                    curves.setdefault(curve, {})[int(line[name])] = float(line["lead"])
            for curve, points in curves.items():
                axis.plot(*zip(*sorted(points.items())), marker="o", label=curve)
            axis.axhline(0, color="gray", linewidth=1)
            axis.set_xlabel(label)
            ticks = sorted({x for points in curves.values() for x in points})
            if name != "rounds":
                axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, map(str, ticks))
            if curves:
                axis.legend(fontsize=8)
        row[0].set_ylabel(f"{model}: dB above the bundled one")
    figure.savefig(picture, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = Path(__file__).parents[1] / "results" / "cpu" / "training-amounts.csv"
    parser.add_argument("--table", type=Path, default=table, help="the table to continue")
    parser.add_argument("--model", choices=OF_50_STEPS, help="measure this model only")
    parser.add_argument(
        "--work", type=Path, default=Path("amounts"), help="folder for recordings, which are kept there"
    )
    parser.add_argument("--plot", type=Path, help="draw the table to this file, and measure nothing")
    options = parser.parse_args(argv)
    if options.plot:
        plot(read(options.table), options.plot)
        print(markdown(read(options.table)))
        return
    names = [field.name for field in fields(Chain) if field.name != "most_rounds"]
    samples: dict[str, Samples] = {}
    wanted = [chain for chain in chains() if options.model in (None, chain.model)]
    for chain in tqdm(wanted, unit="chain"):
        key = {name: str(getattr(chain, name)) for name in names}
        found = [line for line in read(options.table) if key.items() <= line.items()]
        if len(found) > chain.most_rounds:
            continue
        if chain.model not in samples:
            samples[chain.model] = Samples(chain.model)
        for line in measured(chain, samples[chain.model], options.work):
            if any(line["rounds"] == other["rounds"] for other in found):
                continue
            is_new = not options.table.exists()
            with options.table.open("a", newline="") as file:
                writer = csv.DictWriter(file, (*names, *COLUMNS), lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow({**key, **line})


if __name__ == "__main__":
    main()
