"""Schedules and forecasters without training: `python benchmarks/studies/training_free.py --out DIR`.

Runs the bundled models with part of their steps, for each forecaster and schedule below, and compares with all steps.
The coefficients of "universal" are those that `--coefficients MODEL=FILE` names: for a judgement on a model that they
have not seen, those of `train_universal.py --leave-out MODEL`. What is finished in DIR is kept.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tqdm import tqdm
from train_universal import inputs_for

import lesa
from lesa import Schedule
from lesa.demo.run import DEMOS, OF_50_STEPS
from lesa.evaluation.quality import psnr
from lesa.inputs import collate
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.env_report import env_report
from lesa_kernels.forecasters import universal

SEED = 30_000
FORECASTERS = {
    "linear": ("linear", None),
    "universal": ("universal", None),
    "taylor, order 2": ("taylor", {"order": 2}),
    "chebyshev": ("chebyshev", None),
}
BY_HAND = {
    7: (0, 2, 7, 14, 22, 31, 41),
    8: (0, 2, 6, 12, 19, 27, 35, 43),
    9: (0, 2, 6, 12, 18, 25, 32, 39, 46),
    10: (0, 2, 6, 11, 17, 23, 29, 35, 41, 46),
}
KEY = ("model", "steps", "shift", "guidance", "forecaster", "schedule", "computed")
"""What tells two results apart."""


class Setting(NamedTuple):
    """Steps and shift of a run, and whether guidance is on where the demo has none, and off where it has some."""

    steps: int
    shift: float
    other_guidance: bool = False


USUAL = Setting(50, 1.0)
BUDGETS = {
    USUAL: (7, 8, 9, 10, 12, 16, 20),
    Setting(50, 2.0): (9,),
    Setting(50, 3.0): (9, 12, 16),
    Setting(28, 1.0): (6, 8, 10, 14),
    Setting(28, 3.0): (6, 8, 10, 14),
    Setting(50, 1.0, other_guidance=True): (9, 12, 16),
    Setting(28, 1.0, other_guidance=True): (8,),
}
"""Of "linear" and "universal" with `Schedule.spread`."""
COMPARED = {USUAL: (7, 8, 9, 10, 12, 16), Setting(50, 3.0): (9,), Setting(28, 1.0): (8,), Setting(28, 3.0): (8,)}
"""Of the other schedules and forecasters."""


def even(count: int, total: int) -> tuple[int, ...]:
    """The default schedule before this study: 0 and 4 % of the run, then equal gaps."""
    start = min(max(1, round(0.04 * total)), total - count + 1)
    gap = (total - start) / (count - 1)
    return (0, *(start + round(i * gap) for i in range(count - 1)))


def interval(count: int, total: int) -> tuple[int, ...] | None:
    """The steps of diffusers' TaylorSeer that are as many: 0, 1, 2, 4 and then every N-th; None if no N gives them."""
    found = (tuple(i for i in range(total) if i < 3 or (i - 4) % n == 0) for n in range(2, total))
    return next((steps for steps in found if len(steps) == count), None)


def schedules(setting: Setting, levels: list[float], count: int) -> dict[str, tuple[int, ...]]:
    """All schedules of so many computed steps, by name."""
    found = {"spread": Schedule.spread(count, setting.steps, levels).steps, "even": even(count, setting.steps)}
    if setting == USUAL:
        found["by hand"], found["interval"] = BY_HAND.get(count), interval(count, setting.steps)
    return {name: steps for name, steps in found.items() if steps}


class Model:
    """A bundled model and its samples."""

    def __init__(self, name: str, count: int):
        self.pipe, self.count = DEMOS[name].model.load_pipeline(), count
        self.arguments = {other: collate(inputs_for(name, other, count)[0]) for other in (False, True)}
        self.wanted: dict[Setting, torch.Tensor] = {}

    def run(self, setting: Setting, cache) -> torch.Tensor:
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=setting.shift)
        options = {"num_inference_steps": setting.steps, "output_type": "latent", "return_dict": False}
        generators = [torch.Generator().manual_seed(SEED + number) for number in range(self.count)]
        with cache:
            return self.pipe(**self.arguments[setting.other_guidance], **options, generator=generators)[0].float()

    def score(self, setting: Setting, forecaster: str, steps: tuple[int, ...]) -> float:
        """Mean PSNR of the latents against all steps, in dB, for a peak of 2."""
        if setting not in self.wanted:
            self.wanted[setting] = self.run(setting, nullcontext())
        mixer, options = FORECASTERS[forecaster]
        predictor = FusedKANPredictor(PredictorConfig(mixer=mixer, options=options))
        made = self.run(setting, lesa.enable_cache(self.pipe, predictor, steps))
        pairs = zip(made.numpy(), self.wanted[setting].numpy())
        return float(sum(psnr(own, full, 2.0) for own, full in pairs) / self.count)


def levels_of(setting: Setting) -> list[float]:
    shares = [1 - i / setting.steps for i in range(setting.steps)]
    return [setting.shift * s / (1 + (setting.shift - 1) * s) for s in shares]


def compared(setting: Setting, count: int, forecaster: str, schedule: str) -> bool:
    """Whether this is run."""
    if schedule == "spread" and forecaster in ("linear", "universal"):
        return True
    others = schedule == "spread" or forecaster == "linear" or (schedule, forecaster) == ("by hand", "universal")
    return others and count in COMPARED.get(setting, ())


def cases(models: list[str]) -> list[tuple]:
    """Model, setting, budget, forecaster, name of the schedule, and steps."""
    return [
        (model, setting, count, forecaster, name, steps)
        for model in models
        for setting, counts in BUDGETS.items()
        for count in counts
        for name, steps in schedules(setting, levels_of(setting), count).items()
        for forecaster in FORECASTERS
        if compared(setting, count, forecaster, name)
    ]


def table(results: list[dict]) -> str:
    """The results in Markdown: one row per model, setting and budget."""
    columns = list(dict.fromkeys((r["schedule"], r["forecaster"]) for r in results))
    lines = ["| model | steps, shift | guidance | computed | " + " | ".join(f"{s}: {f}" for s, f in columns) + " |"]
    lines.append("|---" * (len(columns) + 4) + "|")
    found: dict[tuple, dict] = {}
    for r in results:
        key = r["model"], r["steps"], r["shift"], r["guidance"], r["computed"]
        found.setdefault(key, {})[r["schedule"], r["forecaster"]] = r
    for (model, steps, shift, guidance, count), row in found.items():
        cells = [f"{row[c]['psnr']:.1f}" if c in row else "" for c in columns]
        lines.append(f"| {model} | {steps}, {shift:g} | {guidance} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder; what is finished there is kept")
    parser.add_argument("--models", nargs="+", choices=OF_50_STEPS, default=list(OF_50_STEPS))
    parser.add_argument("--samples", type=int, default=16, help="of each model (default: 16)")
    parser.add_argument(
        "--coefficients", action="append", default=[], metavar="MODEL=FILE", help="other ones for universal"
    )
    options = parser.parse_args()
    files = dict(entry.split("=", 1) for entry in options.coefficients)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "results.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    finished = {tuple(r[part] for part in KEY) for r in results}
    names = ("in_weight", "in_bias", "spline", "out_weight", "out_bias")
    models: dict[str, Model] = {}
    for model, setting, count, forecaster, schedule, steps in tqdm(cases(options.models), unit="run"):
        guidance = (model == "photos") != setting.other_guidance
        found = {"model": model, "steps": setting.steps, "shift": setting.shift, "guidance": ("off", "on")[guidance]}
        found |= {"forecaster": forecaster, "schedule": schedule, "computed": count, "computed_steps": steps}
        if tuple(found[part] for part in KEY) in finished:
            continue
        if model not in models:
            models = {model: Model(model, options.samples)}
        numbers = load_file(files[model]) if model in files else None
        own = [numbers[name].double() for name in names] if numbers else None
        with patch.object(universal, "coefficients", lambda device, own=own: own) if own else nullcontext():
            quality = models[model].score(setting, forecaster, steps)
        results.append(found | {"psnr": round(quality, 3), "coefficients": "left out" if own else "shipped"})
        with kept.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    print(table(results))
    report = {"samples": options.samples, "seed": SEED, "runs": results, "environment": env_report()}
    (options.out / "training-free.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
