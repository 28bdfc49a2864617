"""Compares all forecasters on a bundled model: `python benchmarks/studies/forecasters.py --model digits --out DIR`.

The trained ones (newton, LESA as released, L2P) are made first, for 10, 9, 8 and 7 of 50 steps. Each of them is trained
on several schedules: the one that `lesa.find_schedule` finds for it; `Schedule.spread`, and one with an early second
step (newton, L2P); that of LESA's code (LESA, L2P); and that of the newton predictor (L2P). A training with a quarter
of the epochs tells which schedule is best, on 16 samples of other seeds. With that one, the predictor is trained and
refined, except for L2P, which is fitted in closed form. For 9 and 8 steps, the newton predictors of the digits are the
bundled ones.

The coefficients of "universal" are those that `--coefficients FILE` names: for a judgement on a model that they have
not seen, those of `train_universal.py --leave-out MODEL`.

Then `lesa.evaluate` compares them, the forecasters without training, the caches of others and fewer steps, with batch
size 1. What is finished in DIR is kept. `python benchmarks/studies/targets.py DIR/evaluation` makes tables of it.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import lesa
from lesa import Schedule
from lesa.demo import digits
from lesa.demo.run import DEMOS, labels
from lesa.evaluation.quality import psnr
from lesa.inputs import collate
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import universal

STEPS, BUDGETS = 50, (10, 9, 8, 7)
VALIDATION_SEED, VALIDATION_SAMPLES = 30_000, 16
SEED = 40_000
BRIEF = 4
"""A schedule is chosen after this part of the epochs."""
KINDS = {
    "newton": ("found", "spread", "early"),
    "lesa": ("found", "lesa"),
    "l2p": ("found", "spread", "early", "lesa", "newton"),
}
"""The schedules that each forecaster is trained on."""
SAMPLES = {"digits": 32, "photos": 16}
TRAINED = ("newton", "lesa", "l2p")
LESA_LEARNING_RATE = 3e-3
"""LESA's own 1e-4 is for more steps of the optimiser than there are here: docs/lesa.md."""
TOKENS, ROUNDS = 32, 2
"""Of each trajectory in a step of the optimiser, and of refining, as for the bundled predictors."""
LESA_PART = 2
"""LESA is trained for a half of newton's epochs, before it is refined: on the digits with 10 computed steps and its own
schedule, all epochs gave 38.24 dB, and 41.26 dB after refining. On the schedules that are found, it gained 0.2 to 0.5
dB from a quarter of the halved epochs to all of them."""
BUNDLED = {"digits": {9: "newton-9", 8: "newton-8"}, "photos": {}}
EARLY = {
    10: (0, 1, 4, 8, 14, 20, 27, 34, 41, 47),
    9: (0, 1, 5, 10, 18, 26, 34, 41, 47),
    8: (0, 1, 5, 11, 19, 29, 38, 46),
    7: (0, 1, 6, 14, 23, 33, 43),
}
"""Schedules with an early second step, set by hand."""
AGAINST = (
    "universal",
    "linear",
    "taylor",
    "chebyshev",
    "taylorseer",
    "mag-cache",
    "first-block-cache",
    "cache-dit",
    "steps",
)


class Workshop:
    """Makes the predictors of a bundled model.

    Args:
        name: of the model.
        folder: where everything is kept.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.demo = name, folder, DEMOS[name]
        self.pipe = self.demo.model.load_pipeline()
        self.inputs = self.demo.model.inputs_for(labels(self.demo.training_samples))
        self.trajectories = lesa.record(self.pipe, self.inputs, folder / "trajectories", batch_size=16)
        self._full: torch.Tensor | None = None

    def predictor(self, mixer: str, budget: int) -> FusedKANPredictor:
        """The best one that is known, refined."""
        if mixer == "newton" and budget in BUNDLED[self.name]:
            return FusedKANPredictor.from_pretrained(digits.WEIGHTS / BUNDLED[self.name][budget])
        folder = self.folder / f"{mixer}-{budget}"
        if not (folder / "config.json").exists():
            self._chosen(mixer, budget).save_pretrained(folder)
        return FusedKANPredictor.from_pretrained(folder)

    def _chosen(self, mixer: str, budget: int) -> FusedKANPredictor:
        config = PredictorConfig(self.trajectories.feature_dim, mixer=mixer)
        rate = LESA_LEARNING_RATE if mixer == "lesa" else None
        epochs, refining = self.demo.epochs // (LESA_PART if mixer == "lesa" else 1), self.demo.refining_epochs
        more = {"learning_rate": rate, "tokens_per_batch": TOKENS, "progress": False}
        found: list[tuple[float, Schedule]] = []
        for kind, schedule in self._schedules(config, budget).items():
            brief = lesa.train(self.trajectories, config, schedule, epochs=epochs // BRIEF, **more)
            found.append((self._noted(mixer, budget, kind, brief), schedule))
        _, schedule = max(found, key=lambda entry: entry[0])
        best = lesa.train(self.trajectories, config, schedule, epochs=epochs, **more)
        self._noted(mixer, budget, "trained", best)
        if mixer != "l2p":
            more |= {"samples_per_call": 16, "rounds": ROUNDS}
            best = lesa.refine(best, self.trajectories, self.pipe, self.inputs, epochs=refining, **more)
            self._noted(mixer, budget, "refined", best)
        return best

    def _schedules(self, config: PredictorConfig, budget: int) -> dict[str, Schedule]:
        """The schedules to train on, without repeats."""
        levels = self.trajectories[0].sigmas.tolist()
        made = {
            "found": lambda: lesa.find_schedule(self.trajectories, budget, config),
            "spread": lambda: Schedule.spread(budget, STEPS, levels),
            "early": lambda: Schedule(EARLY[budget], STEPS),
            "lesa": lambda: next(
                s for n in range(2, STEPS) if len(s := Schedule.interval(n, STEPS, first=4)) == budget
            ),
            "newton": lambda: Schedule(tuple(self.predictor("newton", budget).config.schedule or ()), STEPS),
        }
        different = {schedule.steps: (kind, schedule) for kind in KINDS[config.mixer] if (schedule := made[kind]())}
        return dict(different.values())

    def _noted(self, mixer: str, budget: int, what: str, predictor: FusedKANPredictor) -> float:
        """The score of a predictor, which is kept."""
        score = self.score(predictor)
        steps = list(predictor.config.schedule or ())
        row = {"mixer": mixer, "budget": budget, "what": what, "steps": steps, "psnr": round(score, 2)}
        tqdm.write(json.dumps(row))
        with (self.folder / "training.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return score

    def score(self, predictor: FusedKANPredictor) -> float:
        """Mean PSNR of the latents in dB, for a peak of 2, on the validation samples."""
        if self._full is None:
            self._full = self._run(nullcontext())
        made = self._run(lesa.enable_cache(self.pipe, predictor))
        pairs = zip(made.numpy(), self._full.numpy())
        return sum(psnr(own, full, 2.0) for own, full in pairs) / VALIDATION_SAMPLES

    def _run(self, cache) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(VALIDATION_SEED + n) for n in range(VALIDATION_SAMPLES)]
        arguments = collate(self.demo.model.inputs_for(labels(VALIDATION_SAMPLES)))
        options = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        with cache:
            return self.pipe(**arguments, **options, generator=generators)[0].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(DEMOS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder; what is finished there is kept")
    parser.add_argument("--coefficients", type=Path, help="other ones for universal")
    parser.add_argument("--only", choices=TRAINED, action="append", help="make predictors of this kind, and stop")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="numbers of computed steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(options.model, options.out)
    predictors = {
        f"{mixer}-{budget}": workshop.predictor(mixer, budget)
        for mixer in options.only or TRAINED
        for budget in options.budgets
    }
    if options.only is None:
        stored = load_file(options.coefficients or universal.COEFFICIENTS)
        numbers = [stored[name].double() for name in ("in_weight", "in_bias", "spline", "out_weight", "out_bias")]
        inputs = workshop.demo.model.inputs_for(labels(SAMPLES[options.model]))
        more = {"seed": SEED, "batch_size": 1, "out_dir": options.out / "evaluation"}
        with patch.object(universal, "coefficients", lambda device: numbers):
            lesa.evaluate(workshop.pipe, inputs, predictors, AGAINST, **more)


if __name__ == "__main__":
    main()
