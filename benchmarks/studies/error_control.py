"""Steps chosen by their errors against fixed ones, on the bundled digits, each sample by itself.

    python benchmarks/studies/error_control.py --controlled FOLDER --fixed FOLDER FOLDER --out results

`--controlled` is a predictor of `lesa train --controlled`. It runs under `lesa.ErrorControl` at each tolerance, and on
fixed schedules too: the gaps of its own, all longer or shorter by the same factor. `--fixed` are predictors that run on
the schedule that each was trained for. Writes `error-control.json` and `error-control.png`.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import lesa
from lesa.cache.error_control import ControlledSteps
from lesa.demo import digits
from lesa.schedule import Schedule
from lesa_kernels import FusedKANPredictor

STEPS = 50
FIRST_SEED = 30_000  # neither training, nor the search of schedules, nor the demo uses these
KINDS = {
    "trained": "fixed, a predictor trained for each",
    "stretched": "fixed, the controlled predictor",
    "controlled": "chosen by error control",
}


def draw(pipe, number: int) -> torch.Tensor:
    """The latents of one sample."""
    (inputs,) = digits.inputs_for([number % digits.NUM_CLASSES])
    generator = torch.Generator().manual_seed(FIRST_SEED + number)
    return pipe(**inputs, num_inference_steps=STEPS, generator=generator, output_type="latent").images


def stretched(predictor: FusedKANPredictor, stretch: float) -> list[int]:
    """The steps of the predictor's schedule with all its gaps but the first two so much longer."""
    config = predictor.config
    sigmas = [1 - step / STEPS for step in range(STEPS)]
    trained = Schedule(config.schedule, sigmas=config.schedule_sigmas)
    steps = ControlledSteps(lesa.ErrorControl(longest=STEPS), trained, (), sigmas)
    while max(steps.chosen) < STEPS:
        steps.add(stretch)
    return sorted(steps.chosen - {STEPS})


def measured(pipe, predictor, schedule, plain: list[torch.Tensor], bar) -> dict:
    """PSNR of the latents for a peak of 2, over the computed steps of each sample."""
    errors, counts = [], []
    with lesa.enable_cache(pipe, predictor, schedule) as cache:
        for number, wanted in enumerate(plain):
            errors.append((draw(pipe, number) - wanted).square().mean().item())
            counts.append(cache.stats.computed_steps)
            bar.update()
    psnr = [10 * math.log10(4 / error) for error in errors]
    return {
        "steps": sum(counts) / len(counts),
        "fewest": min(counts),
        "most": max(counts),
        "psnr": sum(psnr) / len(psnr),
        "psnr_of_mean_error": 10 * math.log10(4 * len(errors) / sum(errors)),
        "worst_psnr": min(psnr),
        "per_sample": {"steps": counts, "psnr": psnr},
    }


def plot(rows: list[dict], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"psnr": "mean PSNR, dB", "psnr_of_mean_error": "PSNR of the mean squared error, dB"}
    for axes, (key, label) in zip(figure.subplots(1, 2), panels.items()):
        for kind, words in KINDS.items():
            points = sorted((row["steps"], row[key]) for row in rows if row["kind"] == kind)
            if points:
                axes.plot(*zip(*points), marker="o", label=words)
        axes.set(xlabel="computed steps of 50, mean", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controlled", required=True, help="predictor that was trained for error control")
    bundled = [str(digits.WEIGHTS / name) for name in ("newton-9", "newton-8")]
    parser.add_argument("--fixed", nargs="*", default=bundled, help="predictors for their own schedules")
    parser.add_argument("--tolerances", nargs="*", type=float, default=[2.0, 1.4, 1.0, 0.6, 0.4, 0.25])
    parser.add_argument("--stretches", nargs="*", type=float, default=[1.2, 1.0, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("error-control"))
    options = parser.parse_args()
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    controlled = FusedKANPredictor.from_pretrained(options.controlled)
    fixed = [FusedKANPredictor.from_pretrained(folder) for folder in options.fixed]
    cases = [("trained", Path(folder).name, predictor, None) for folder, predictor in zip(options.fixed, fixed)]
    cases += [("stretched", s, controlled, stretched(controlled, s)) for s in options.stretches]
    cases += [("controlled", t, controlled, lesa.ErrorControl(t)) for t in options.tolerances]
    plain, rows = [], []
    with tqdm(desc="error control", total=options.samples * (1 + len(cases)), unit="sample") as bar:
        for number in range(options.samples):
            plain.append(draw(pipe, number))
            bar.update()
        for kind, setting, predictor, schedule in cases:
            rows.append({"kind": kind, "setting": setting, **measured(pipe, predictor, schedule, plain, bar)})
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"samples": options.samples, "first_seed": FIRST_SEED, "num_inference_steps": STEPS, "runs": rows}
    (options.out / "error-control.json").write_text(json.dumps(facts, indent=2) + "\n")
    plot(rows, options.out / "error-control.png")
    for row in rows:
        figures = (
            "{steps:5.2f} steps ({fewest} to {most}), {psnr:.2f} dB, of the mean error {psnr_of_mean_error:.2f} dB"
        )
        print(f"{row['kind']:>10} {row['setting']!s:>10}: {figures.format(**row)}, worst {row['worst_psnr']:.2f} dB")


if __name__ == "__main__":
    main()
