"""What a newton predictor loses at other step counts, guidance scales and sizes, and whether one can serve all.

`python benchmarks/studies/other_conditions.py --part steps --model digits --out DIR` trains the predictors that are
missing in DIR and measures all on samples that no training used: PSNR of the pictures against the run of all steps, of
the same step count, guidance and size. The parts are "steps", "guidance" (photographs only) and "sizes". What is
finished in DIR is kept, so the study can be interrupted. `--table FILE` writes the results in DIR to a CSV file, and
the PSNR of each sample to another one, FILE with "-samples" in its name.

The computed steps are those that the bundled predictor of nine steps computes, which are nearest in noise level to its
schedule. The predictors are:

- "bundled": the bundled predictor, which was trained for 50 steps, one size and one guidance scale.
- "own N": the bundled predictor after N more steps of the optimiser through whole runs of this setting alone.
- "own, whole recipe": made like the bundled predictor, for the digits with 28 steps.
- "mixed N": like "own N", with all settings of the part in turn. N is of all settings together.
- "universal" and "linear" need no training. The coefficients of "universal" were trained on both bundled models.
- "fewer steps": a run that has as many steps as the others compute.
"""

import argparse
import copy
import csv
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lesa
from lesa.artifacts import output_folder, write_text
from lesa.demo import digits
from lesa.demo.make_weights import END_TO_END_SAMPLES, newton_predictor
from lesa.demo.make_weights import END_TO_END_SEED as TRAINING_SEED
from lesa.demo.run import DEMOS, labels
from lesa.evaluation.quality import paired_lead, psnr
from lesa.fitting.schedule_in_runs import config_for, schedule_at
from lesa.inputs import collate
from lesa.processes import Processes
from lesa.schedule import schedule_of
from lesa.training.end_to_end import trained_end_to_end
from lesa.training.end_to_end_settings import EndToEndSettings
from lesa_kernels import FusedKANPredictor, PredictorConfig

SEED, SAMPLES, BATCH = 40_000, {"digits": 32, "photos": 16}, 8
BUNDLED = {"digits": "newton-9", "photos": "photos-newton-9"}
TRAINING_SAMPLES = {"digits": 256, "photos": 48}
"""Of the runs to train on. Their seeds are those of the first samples of the bundled predictors' training."""
RATE = 1.5e-3
"""Of the trainings, as for the bundled predictors."""

STEPS, GUIDANCE, SIDES = (20, 28, 50), (1.5, 2.5, 4.0), {"digits": (16, 24), "photos": (32, 48)}
UPDATES = {("digits", "steps"): (60, 60), ("photos", "guidance"): (25,)}
"""Steps of the optimiser for each setting. A second number is for "mixed" only, whose training goes on with it."""

COLUMNS = ("model", "steps", "side", "guidance", "predictor", "computed", "psnr", "own", "lead", "low", "high")


@dataclass(frozen=True)
class Setting:
    """Under which pictures are drawn.

    Args:
        steps: of a run.
        side: height and width of a picture in pixels.
        guidance: the scale of true guidance; None for the digits, which have none.
    """

    steps: int
    side: int
    guidance: float | None

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.side} pixels" + ("" if self.guidance is None else f", scale {self.guidance}")


class Study:
    """The predictors and the pictures of a bundled model.

    Args:
        model: "digits" or "photos".
        folder: where everything is kept.
    """

    def __init__(self, model: str, folder: Path):
        self.model, self.folder, self.demo = model, folder / model, DEMOS[model]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipe = self.demo.model.load_pipeline()
        self.bundled = FusedKANPredictor.from_pretrained(digits.WEIGHTS / BUNDLED[model])
        self.usual = Setting(50, self.demo.model.SIDE, getattr(self.demo.model, "GUIDANCE", None))
        self._results = self.folder / "results.json"

    def settings(self, part: str) -> list[Setting]:
        """Those that are compared in a part of the study."""
        if part == "guidance":
            return [replace(self.usual, guidance=scale) for scale in GUIDANCE]
        if part == "sizes":
            return [replace(self.usual, side=side) for side in SIDES[self.model]]
        return [replace(self.usual, steps=steps) for steps in STEPS]

    def inputs(self, count: int, setting: Setting) -> list[dict]:
        """The inputs of `count` samples."""
        change: dict[str, Any] = {"height": setting.side, "width": setting.side}
        if setting.guidance is not None:
            change["true_cfg_scale"] = setting.guidance
        return [{**each, **change} for each in self.demo.model.inputs_for(labels(count))]

    def schedule(self, setting: Setting) -> list[int]:
        """The steps that the bundled predictor's schedule computes in runs of this setting."""
        schedule: Any = schedule_of(self.bundled.config)
        return sorted(schedule.computed_in(levels_of(setting.steps)))

    def trained(
        self, label: str, settings: Sequence[Setting], updates: int, begin: FusedKANPredictor
    ) -> FusedKANPredictor:
        """A predictor after a training through whole runs of some settings. It is kept.

        Args:
            label: of its folder.
            settings: which differ in the number of steps, or in the input. Updates have them in turn.
            updates: steps of the optimiser.
            begin: where it begins.
        """
        folder = output_folder(self.folder / label)
        counts = sorted(each.steps for each in settings)
        kinds = [*dict.fromkeys(replace(each, steps=self.usual.steps) for each in settings)]
        inputs = [self.inputs(TRAINING_SAMPLES[self.model], each) for each in kinds]
        inputs = [inputs[number % len(kinds)][number] for number in range(len(inputs[0]))]
        plain = self.folder / ("plain " + ", ".join(f"{each.side} pixels {each.guidance}" for each in kinds))
        if len({*counts}) == 1:
            plain /= f"steps-{counts[0]}"
        predictor = copy.deepcopy(begin)
        if predictor.config.num_inference_steps not in counts:
            schedule = schedule_at(self.schedule(settings[0]), levels_of(counts[0]))
            predictor.config = config_for(predictor, schedule)
        given = EndToEndSettings(counts, updates, BATCH, BATCH, RATE, TRAINING_SEED)
        return trained_end_to_end(predictor, self.pipe, inputs, given, folder, Processes(), references=plain, bar=label)

    def by_whole_recipe(self, setting: Setting) -> FusedKANPredictor:
        """A predictor that is made like the bundled one, for runs of another number of steps. It is kept."""
        folder = self.folder / f"whole recipe {setting.steps}"
        if not (folder / "config.json").exists():
            inputs, more = (self.inputs(count, setting) for count in (self.demo.training_samples, END_TO_END_SAMPLES))
            recording, steps = self.folder / f"recording {setting.steps}", setting.steps
            recorded = lesa.record(self.pipe, inputs, recording, num_inference_steps=steps, batch_size=16)
            chosen = tuple(self.schedule(setting))
            newton_predictor(recorded, self.pipe, inputs, more, chosen, self.demo.updates).save_pretrained(folder)
        return FusedKANPredictor.from_pretrained(folder)

    def measure_in_all(self, label: str, predictor: FusedKANPredictor, settings: Sequence[Setting]) -> None:
        """Adds the results of a predictor in all settings."""
        for setting in settings:
            self.measure_predictor(label, predictor, setting)

    def measure_predictor(self, label: str, predictor: FusedKANPredictor, setting: Setting) -> None:
        """Adds the results of a predictor with the computed steps of the bundled one, or those nearest to them."""
        steps = self.schedule(setting)
        self.measure(label, setting, setting.steps, lambda: lesa.enable_cache(self.pipe, predictor, steps))

    def measure_untrained(self, setting: Setting) -> None:
        """Adds the results of what needs no training."""
        for mixer in ("universal", "linear"):
            self.measure_predictor(mixer, FusedKANPredictor(PredictorConfig(mixer=mixer)), setting)
        self.measure("fewer steps", setting, len(self.schedule(setting)))

    def measure(self, label: str, setting: Setting, steps: int, cache: Callable[[], Any] = nullcontext) -> None:
        """Adds the PSNR of each picture to the results, unless they have it."""
        name = f"{setting}: {label}"
        if name in self.results:
            return
        file = self.folder / f"pictures {setting}.pt"
        if not file.exists():
            torch.save(self._pictures(setting, setting.steps), file)
        pairs = zip(self._pictures(setting, steps, cache).numpy(), torch.load(file).numpy())
        figures = [psnr(own, full, 1.0) for own, full in pairs]
        row = {**asdict(setting), "predictor": label, "computed": len(self.schedule(setting)), "psnr": figures}
        write_text(self._results, json.dumps({**self.results, name: row}) + "\n")
        print(f"{name}: {sum(figures) / len(figures):.2f} dB", flush=True)

    @property
    def results(self) -> dict[str, dict]:
        """By setting and predictor."""
        return json.loads(self._results.read_text()) if self._results.exists() else {}

    def _pictures(self, setting: Setting, steps: int, cache: Callable[[], Any] = nullcontext) -> torch.Tensor:
        """What runs of `steps` steps draw: images `[N, C, H, W]` in [0, 1]."""
        inputs, made = self.inputs(SAMPLES[self.model], setting), []
        for first in range(0, len(inputs), BATCH):
            generators = [torch.Generator().manual_seed(SEED + first + number) for number in range(BATCH)]
            options = {"num_inference_steps": steps, "output_type": "pt", "return_dict": False}
            with cache():
                images = self.pipe(**collate(inputs[first : first + BATCH]), generator=generators, **options)[0]
            made.append(images.float())
        return torch.cat(made)


def levels_of(steps: int) -> list[float]:
    """The noise levels of a run of the bundled models."""
    return [1 - step / steps for step in range(steps)]


def write_table(folder: Path, file: Path) -> None:
    """Writes the mean PSNR of all predictors, and their paired leads over the best one for the setting alone.

    The PSNR of each sample goes to another file, whose name has "-samples" too.
    """
    write_samples(folder, file.with_stem(f"{file.stem}-samples"))
    with open(file, "w", newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow(COLUMNS)
        for path in sorted(folder.glob("*/results.json")):
            rows = list(json.loads(path.read_text()).values())
            of_setting = {
                key: [row for row in rows if _setting(row) == key] for key in dict.fromkeys(map(_setting, rows))
            }
            for key, own_rows in sorted(of_setting.items(), key=str):
                trained = [row for row in own_rows if row["predictor"].startswith(("own ", "own,"))]
                own = max(trained, key=lambda row: sum(row["psnr"]), default=None)
                for row in own_rows:
                    lead = ["", "", "", ""]
                    if own is not None and row is not own:
                        lead = [own["predictor"], *(f"{value:.2f}" for value in paired_lead(row["psnr"], own["psnr"]))]
                    mean = sum(row["psnr"]) / len(row["psnr"])
                    table.writerow([path.parent.name, *key, row["predictor"], row["computed"], f"{mean:.2f}", *lead])


def write_samples(folder: Path, file: Path) -> None:
    """Writes the PSNR of each sample."""
    with open(file, "w", newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow(["model", "steps", "side", "guidance", "predictor", "seed", "psnr"])
        for path in sorted(folder.glob("*/results.json")):
            for row in json.loads(path.read_text()).values():
                for seed, value in enumerate(row["psnr"], SEED):
                    table.writerow([path.parent.name, *_setting(row), row["predictor"], seed, f"{value:.2f}"])


def _setting(row: dict) -> tuple:
    return row["steps"], row["side"], row["guidance"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(BUNDLED), default="digits")
    parser.add_argument("--part", choices=("steps", "guidance", "sizes"), default="steps")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--table", type=Path, help="CSV file to write the results of the folder to; samples beside it")
    arguments = parser.parse_args()
    if arguments.table:
        write_table(arguments.out, arguments.table)
        return
    if arguments.part == "guidance" and arguments.model != "photos":
        parser.error("--part guidance needs --model photos")
    study, part = Study(arguments.model, arguments.out), arguments.part
    settings = study.settings(part)
    for setting in settings:
        study.measure_predictor("bundled", study.bundled, setting)
        study.measure_untrained(setting)
    groups = [*(("own", [setting]) for setting in reversed(settings)), ("mixed", settings)]
    for name, group in groups:
        predictor, total = study.bundled, 0
        for more in UPDATES.get((arguments.model, part), ())[: 1 if name == "own" else None]:
            total += more * len(group)
            where = part if name == "mixed" else str(group[0])
            predictor = study.trained(f"{name} {total} {where}", group, more * len(group), predictor)
            study.measure_in_all(f"{name} {total}", predictor, group)
    if (arguments.model, part) == ("digits", "steps"):
        label = "mixed 360, then 60 of which half at 50 steps"
        study.measure_in_all(label, study.trained(label, [*settings, settings[-1]], 60, predictor), settings)
        label = "mixed 750, at once"  # for each number of steps as many as in the whole recipe
        study.measure_in_all(label, study.trained(f"{label} {part}", settings, 750, study.bundled), settings)
        study.measure_predictor("own, whole recipe", study.by_whole_recipe(settings[1]), settings[1])


if __name__ == "__main__":
    main()
