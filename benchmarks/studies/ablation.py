"""What noise stages and spline units are worth: `python benchmarks/studies/ablation.py --model digits --out ablation`.

Trains predictors for a bundled model, with one and with three noise stages, and with spline units (KAN) or plain SiLU
units (MLP). There are two kinds of predictors: the dense variant, trained as in the LESA paper and at a higher learning
rate, and the newton predictor of this project. All other settings are the same. Each predictor then leaves out 41 of 50
steps in the pipeline, for samples that no training used. The result is compared with the run of all steps.
"""

import argparse
import itertools
import json
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from tqdm import tqdm

import lesa
from lesa.demo.run import DEMOS, OF_50_STEPS, SEED, labels
from lesa.evaluation.quality import psnr
from lesa.inputs import collate
from lesa.models import adapter_for
from lesa.training import training_run as training
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.env_report import env_report
from lesa_kernels.predictor import reference
from lesa_kernels.predictor.arguments import RingState

BOUNDS = {1: (), 3: (0.67, 0.33)}
# One stage has the middle one of the windows of three.
WINDOWS = {"newton": {1: 4, 3: 4}, "dense": {1: 6, 3: (4, 6, 8)}}
RATES = {"newton": 3e-3, "dense": 1e-4}
# Nine computed steps of 50. Those of the dense variant are 0, 1, 2 and then every seventh.
NEWTON_SCHEDULES = {"digits": (0, 2, 7, 13, 19, 26, 34, 41, 47), "photos": (0, 2, 5, 9, 16, 23, 30, 39, 46)}
DENSE_INTERVAL = 7


class MLPPredictor(FusedKANPredictor):
    """A predictor with `silu(in_weight @ inputs + in_bias)` instead of each spline unit; in plain torch only."""

    def __init__(self, config: PredictorConfig):
        super().__init__(config, "torch")
        self.spline = nn.Parameter(self.spline.new_zeros(config.num_stages, config.hidden, 0))

    def forecast(self, *state):
        newton = self.config.mixer == "newton"
        predict = reference.newton_predict_ref if newton else reference.dense_predict_ref
        with patch.object(reference, "kan_hidden", _silu_units):
            return predict(RingState(*state), self.experts(), self.shape())

    def predict_velocity(self, ring, sigma, head):
        return reference.output_head_ref(self(ring, sigma), head)


UNITS = {"KAN": FusedKANPredictor, "MLP": MLPPredictor}


def _silu_units(inputs, in_weight, in_bias, spline, grid_size, spline_order):
    return nn.functional.silu(nn.functional.linear(inputs, in_weight, in_bias))


class Samples:
    """Test samples of a pipeline, and what all steps make of them.

    Args:
        pipe: the pipeline.
        inputs: of the samples, which share one call.
        num_inference_steps: of the full run.
    """

    def __init__(self, pipe, inputs, num_inference_steps):
        self.pipe, self.arguments, self.count = pipe, collate(inputs), len(inputs)
        self.steps = num_inference_steps
        self.wanted = self.made_with(nullcontext())

    def made_with(self, cache) -> list[tuple]:
        """Latents and image of each sample, with `cache` on."""
        generators = [torch.Generator().manual_seed(SEED + number) for number in range(self.count)]
        options = {"num_inference_steps": self.steps, "output_type": "latent", "return_dict": False}
        with cache:
            latents = self.pipe(**self.arguments, **options, generator=generators)[0]
        size = self.arguments["height"], self.arguments["width"]
        images = adapter_for(self.pipe).decode(self.pipe, latents, *size)
        return list(zip(latents.float().numpy(), images))

    def score(self, predictor) -> dict[str, float]:
        """PSNR in dB of latents, for a peak of 2, and of images, against all steps: means over the samples."""
        made = self.made_with(lesa.enable_cache(self.pipe, predictor))
        peaks = {"latent_psnr": 2.0, "image_psnr": 1.0}
        return {
            name: sum(psnr(own[part], full[part], peak) for own, full in zip(made, self.wanted)) / self.count
            for part, (name, peak) in enumerate(peaks.items())
        }


def variants() -> list[dict]:
    """The settings of each predictor, those of equal mixer side by side."""
    return [
        {"mixer": mixer, "learning_rate": rate, "stages": stages, "units": units}
        for mixer, rate in RATES.items()
        for stages, units in itertools.product(BOUNDS, UNITS)
    ]


def measure(variant: dict, trajectories, schedule, samples: Samples, options: dict) -> dict:
    """Trains one variant and scores it."""
    mixer, stages = variant["mixer"], variant["stages"]
    windows = WINDOWS[mixer][stages]
    config = PredictorConfig(trajectories.feature_dim, mixer=mixer, history_length=windows, stage_bounds=BOUNDS[stages])
    start = time.process_time()
    with patch.object(training, "FusedKANPredictor", UNITS[variant["units"]]):
        rate = variant["learning_rate"]
        predictor = lesa.train(trajectories, config, schedule, learning_rate=rate, progress=False, **options)
    seconds = time.process_time() - start
    return {
        **variant,
        "parameters": sum(p.numel() for p in predictor.parameters()),
        "computed_steps": len(predictor.config.schedule),
        **samples.score(predictor),
        "training_cpu_seconds": round(seconds, 1),
    }


def table(results: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| predictor | learning rate | stages | units | parameters | PSNR of images | of latents | training, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        size, psnrs = f"{r['parameters'] / 1e3:.0f} k", f"{r['image_psnr']:.2f} | {r['latent_psnr']:.2f}"
        settings = f"{r['mixer']} | {r['learning_rate']:g} | {r['stages']} | {r['units']}"
        lines.append(f"| {settings} | {size} | {psnrs} | {r['training_cpu_seconds']:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=OF_50_STEPS, default="digits", help="bundled model (default: digits)")
    parser.add_argument("--trajectories", type=Path, help="folder of its recording, made if missing (default: in OUT)")
    parser.add_argument("--samples", type=int, help="how many to record (default: as for the bundled predictors)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, where it is recorded (default: 50)")
    parser.add_argument("--test-samples", type=int, default=32, help="to compare with all steps (default: 32)")
    parser.add_argument("--epochs", type=int, default=60, help="of each training's second part (default: 60)")
    parser.add_argument("--tokens", type=int, default=32, help="of each trajectory per step of training (default: 32)")
    parser.add_argument("--mixer", choices=tuple(RATES), help="train predictors of this kind only")
    parser.add_argument("--out", type=Path, required=True, help="folder; what is finished there is kept")
    options = parser.parse_args(argv)

    demo = DEMOS[options.model]
    pipe = demo.model.load_pipeline()
    folder = options.trajectories or options.out / "trajectories"
    if (folder / "manifest.json").exists():
        trajectories = lesa.Trajectories(folder)
    else:
        inputs = demo.model.inputs_for(labels(options.samples or demo.training_samples))
        trajectories = lesa.record(pipe, inputs, folder, num_inference_steps=options.steps, batch_size=16)
    total = trajectories.num_inference_steps
    newton = NEWTON_SCHEDULES[options.model] if total == 50 else None
    schedules = {"newton": newton, "dense": DENSE_INTERVAL}
    training_options = {"epochs": options.epochs, "tokens_per_batch": options.tokens}

    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / f"{options.model}.jsonl"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    conditions = {"trajectories": len(trajectories), "test_samples": options.test_samples, **training_options}
    results = [r for r in results if conditions.items() <= r.items()]  # those under other ones are not comparable
    finished = [{name: r[name] for name in variants()[0]} for r in results]
    samples = Samples(pipe, demo.model.inputs_for(labels(options.test_samples)), total)
    wanted = [v for v in variants() if options.mixer in (None, v["mixer"]) and v not in finished]
    for variant in tqdm(wanted, desc=options.model, unit="predictor"):
        found = measure(variant, trajectories, schedules[variant["mixer"]], samples, training_options)
        results.append({**found, **conditions})
        with lines.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    order = variants()
    results.sort(key=lambda r: order.index({name: r[name] for name in order[0]}))
    print(table(results))
    report = {
        "model": options.model,
        "num_inference_steps": total,
        **conditions,
        "threads": torch.get_num_threads(),
        "predictors": results,
        "environment": env_report(),
    }
    file = options.out / f"ablation-{options.model}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
