"""Compares all forecasters on a bundled model: `python benchmarks/studies/forecasters.py --model digits --out DIR`.

Runs have 50 steps, of which 10, 9, 8, 7 or, of the pictures, 5 are computed. For each number, every forecaster but
newton gets the best of these schedules: a family of simple ones (`lesa.fitting.schedule_family`), one with an early
second step, that of LESA's code, that of the newton predictor, and those that `lesa.find_schedule` finds for it and for
linear, L2P and LESA. Runs on 16 samples of other seeds decide, of the videos on 8. The forecasters:

- L2P is fitted for each of the schedules.
- The first phase of LESA forecasts every step from recorded ones, so one training serves for all schedules. Runs with
  it choose the schedule, and it is refined with that one.
- Of the forecasters without training, each set of options is tried with all schedules. The coefficients of "universal"
  are those that `--coefficients FILE` names: for a judgement on a model that they have not seen, those of
  `train_universal.py --leave-out MODEL`. Those of the package have not seen the videos. DIR belongs to the coefficients
  with which it began.
- The newton predictor is trained for its own schedule: see `Workshop.newton`.

Then `lesa.evaluate` compares them with batch size 1: each with its best schedule ("l2p-9@best"), and with that of the
newton predictor ("l2p-9@newton") where it is another. Each has the options that are best with its schedule. It compares
the caches of others and fewer steps too. What is finished in DIR is kept. `python benchmarks/studies/targets.py
DIR/evaluation` makes tables of it.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import lesa
from lesa import Schedule
from lesa.artifacts import digest, write_text
from lesa.demo import digits
from lesa.demo.make_weights import END_TO_END_SAMPLES, newton_predictor
from lesa.demo.run import DEMOS, Demo, labels
from lesa.evaluation.quality import psnr
from lesa.fitting.schedule_family import family
from lesa.inputs import collate
from lesa.training.training_run import recorded_runs
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import FORECASTERS, universal

STEPS, BUDGETS = 50, (10, 9, 8, 7, 5)
VALIDATION_SEED, VALIDATION_SAMPLES = 30_000, {"digits": 16, "photos": 16, "video": 8}
SEED = 40_000
SAMPLES = {"digits": 32, "photos": 16, "video": 16}
OTHERS = ("l2p", "lesa", "linear", "taylor", "chebyshev", "universal")
LESA_EPOCHS = {"digits": (30, 20), "photos": (24, 12), "video": (50, 33)}
"""In the first phase, and in each round of refining. On the digits with 10 computed steps and its own schedule, twice
the epochs in the first phase gave no more than these after refining."""
LESA_TRAINING: dict[str, Any] = {"learning_rate": 3e-3, "tokens_per_batch": 32, "progress": False}
"""LESA's own learning rate, 1e-4, is for more steps of the optimiser than there are here: docs/lesa.md."""
ROUNDS = 2
"""Of refining, as for the bundled predictors."""
BUNDLED = {
    "digits": {9: "newton-9", 8: "newton-8"},
    "photos": {9: "photos-newton-9", 8: "photos-newton-8"},
    "video": {9: "video-newton-9", 8: "video-newton-8"},
}
LONGER = {("digits", 7): 300, ("photos", 7): 500, ("photos", 5): 500}
"""Steps of the optimiser through whole runs, where there are more than usual."""
_EARLY_OF_IMAGES = {
    10: (0, 1, 4, 8, 14, 20, 27, 34, 41, 47),
    9: (0, 1, 5, 10, 18, 26, 34, 41, 47),
    8: (0, 1, 5, 11, 19, 29, 38, 46),
    7: (0, 1, 6, 14, 23, 33, 43),
    5: (0, 1, 9, 21, 36),
}
_EARLY_OF_VIDEOS = {  # their noise levels fall late
    10: (0, 1, 6, 12, 18, 25, 32, 38, 43, 47),
    9: (0, 1, 7, 14, 21, 28, 35, 41, 46),
    8: (0, 1, 8, 16, 24, 32, 39, 45),
    7: (0, 1, 9, 19, 29, 37, 45),
}
EARLY = {"digits": _EARLY_OF_IMAGES, "photos": _EARLY_OF_IMAGES, "video": _EARLY_OF_VIDEOS}
"""Schedules with an early second step, set by hand."""
FOUND_FOR = ("linear", "l2p", "lesa")
"""Their found schedules are tried with all forecasters."""
AGAINST = ("taylorseer", "mag-cache", "first-block-cache", "cache-dit", "steps")


class Choice(NamedTuple):
    """A forecaster with options, and the steps that it computes."""

    config: PredictorConfig
    steps: tuple[int, ...]


class Workshop:
    """Makes the predictors of a bundled model.

    Args:
        name: of the model.
        folder: where everything is kept.
        demo: the model. None: the one of this name in `DEMOS`.
    """

    def __init__(self, name: str, folder: Path, demo: Demo | None = None):
        self.name, self.folder, self.demo = name, folder, demo or DEMOS[name]
        self.pipe, steps = self.load(), self.demo.num_inference_steps
        self.inputs = self.demo.model.inputs_for(labels(self.demo.training_samples))
        self.trajectories = lesa.record(self.pipe, self.inputs, folder / "trajectories", steps, batch_size=16)
        self.levels = self.trajectories[0].sigmas.tolist()
        self._notes = folder / "notes.json"
        self._known: dict[str, Any] = json.loads(self._notes.read_text()) if self._notes.exists() else {}

    def load(self) -> Any:
        """The pipeline."""
        return self.demo.model.load_pipeline()

    def predictors(self, budget: int) -> dict[str, tuple[FusedKANPredictor, Schedule]]:
        """Those to evaluate, by label."""
        newton = self.newton(budget)
        ours = tuple(newton.config.schedule or ())
        steps = self.demo.num_inference_steps
        made = {f"newton-{budget}": (newton, Schedule(ours, steps))}
        for mixer in OTHERS:
            chosen = {"newton": self.best(mixer, budget, ours), "best": self.best(mixer, budget)}
            if chosen["best"].steps == ours:
                del chosen["newton"]
            for where, choice in chosen.items():
                made[f"{mixer}-{budget}/{where}"] = self.made(choice), Schedule(choice.steps, steps)
        return made

    def newton(self, budget: int) -> FusedKANPredictor:
        """The newton predictor: the bundled one, or one that is made like it for its schedule, and kept."""
        if budget in BUNDLED.get(self.name, {}):
            return FusedKANPredictor.from_pretrained(digits.WEIGHTS / BUNDLED[self.name][budget])
        schedule = self.newton_schedule(budget)
        folder = self.folder / "-".join(("newton", *map(str, schedule)))
        if not (folder / "config.json").exists():
            more = self.demo.model.inputs_for(labels(END_TO_END_SAMPLES))
            updates = LONGER.get((self.name, budget), self.demo.updates)
            made = newton_predictor(self.trajectories, self.pipe, self.inputs, more, schedule, updates)
            made.save_pretrained(folder)
        return FusedKANPredictor.from_pretrained(folder)

    def newton_schedule(self, budget: int) -> tuple[int, ...]:
        """The steps that a newton predictor computes."""
        return tuple(self.demo.schedules[budget])

    def best(self, mixer: str, budget: int, steps: tuple[int, ...] | None = None) -> Choice:
        """The options and the schedule with which the runs of a forecaster are best.

        Args:
            mixer: the forecaster.
            budget: how many steps it computes.
            steps: the schedule, if it is given. Then only the options are chosen.
        """
        choices = []
        for config in self.configs(mixer):
            schedules = [steps] if steps else self.schedules(config, budget)
            choices += [Choice(config, each) for each in dict.fromkeys(schedules)]
        return max(tqdm(choices, desc=f"{mixer}, {budget} steps"), key=self.score)

    def configs(self, mixer: str) -> list[PredictorConfig]:
        """With each set of options that is tried."""
        forecaster = FORECASTERS[mixer]
        width = self.trajectories.feature_dim if forecaster.is_trained else None
        return [PredictorConfig(width, mixer=mixer, options=dict(options)) for options in forecaster.variants]

    def schedules(self, config: PredictorConfig, budget: int) -> list[tuple[int, ...]]:
        """The schedules that are tried with a forecaster."""
        return [*self.candidates(budget), self.found(config, budget)]

    def candidates(self, budget: int) -> list[tuple[int, ...]]:
        """The schedules that are tried with all forecasters."""
        made = [*family(budget, self.levels), EARLY[self.name][budget]]
        made.append(next(s.steps for n in range(2, STEPS) if len(s := Schedule.interval(n, STEPS, 4)) == budget))
        made.append(tuple(self.newton(budget).config.schedule or ()))
        return made + [self.found(config, budget) for mixer in FOUND_FOR for config in self.configs(mixer)]

    def found(self, config: PredictorConfig, budget: int) -> tuple[int, ...]:
        """The schedule that `lesa.find_schedule` finds."""

        def search() -> list[int]:
            return [*lesa.find_schedule(self.trajectories, budget, config, progress=False).steps]

        return tuple(self._once(f"{named(config)}, {budget} steps, found", search))

    def score(self, choice: Choice) -> float:
        """The PSNR of `psnr_of`, before LESA is refined."""

        def measure() -> float:
            predictor = self.first_phase if choice.config.mixer == "lesa" else self.made(choice)
            return self.psnr_of(predictor, choice.steps)

        return self._once(f"{named(choice.config)}, {','.join(map(str, choice.steps))}, PSNR", measure)

    def psnr_of(self, predictor: FusedKANPredictor, steps: tuple[int, ...]) -> float:
        """Mean PSNR of the latents in dB, for a peak of 2, on the validation samples."""
        made = self._run(lesa.enable_cache(self.pipe, predictor, steps))
        pairs = zip(made.numpy(), self._full.numpy())
        return sum(psnr(own, full, 2.0) for own, full in pairs) / self.validation_samples

    def made(self, choice: Choice) -> FusedKANPredictor:
        """The predictor, trained for its steps if it can be."""
        if choice.config.mixer == "l2p":
            return self._fitted(choice)
        return self._refined(choice) if choice.config.mixer == "lesa" else FusedKANPredictor(choice.config)

    def _fitted(self, choice: Choice) -> FusedKANPredictor:
        """As `lesa.train` does, which reads the recording anew for each schedule."""
        predictor = FusedKANPredictor(replace(choice.config, num_inference_steps=self.demo.num_inference_steps))
        for step in range(1, self.demo.num_inference_steps):
            computed = [earlier for earlier in choice.steps if earlier < step]
            predictor.forecaster.fit_steps(predictor, self._summary, computed, [step])
        return predictor

    def _refined(self, choice: Choice) -> FusedKANPredictor:
        """LESA after its second phase, or before it if that is better."""
        folder = self.folder / "-".join(("lesa", *map(str, choice.steps)))
        if not (folder / "config.json").exists():
            levels = tuple(self.levels[step] for step in choice.steps)
            start = self.first_phase
            start.config = replace(start.config, schedule=choice.steps, schedule_sigmas=levels)
            more: dict[str, Any] = {"rounds": ROUNDS, "samples_per_call": 16, "epochs": self.lesa_epochs[1]}
            refined = lesa.refine(start, self.trajectories, self.pipe, self.inputs, **more, **LESA_TRAINING)
            better = max((start, refined), key=lambda predictor: self.psnr_of(predictor, choice.steps))
            better.save_pretrained(folder)
        return FusedKANPredictor.from_pretrained(folder)

    @property
    def validation_samples(self) -> int:
        """How many runs choose."""
        return VALIDATION_SAMPLES[self.name]

    @property
    def lesa_epochs(self) -> tuple[int, int]:
        """Of LESA's first phase, and of each round of refining."""
        return LESA_EPOCHS[self.name]

    @property
    def first_phase(self) -> FusedKANPredictor:
        """LESA after its first phase."""
        folder = self.folder / "lesa-first-phase"
        if not (folder / "config.json").exists():
            (config,) = self.configs("lesa")
            epochs = self.lesa_epochs[0]
            lesa.train(self.trajectories, config, [0], epochs=epochs, **LESA_TRAINING).save_pretrained(folder)
        return FusedKANPredictor.from_pretrained(folder)

    @cached_property
    def _summary(self) -> Any:
        """What the fits of L2P need of the recording."""
        predictor = FusedKANPredictor(PredictorConfig(self.trajectories.feature_dim, mixer="l2p"))
        runs = recorded_runs(self.trajectories, range(len(self.trajectories)), "cpu")
        return predictor.forecaster.summarise(predictor, runs)

    @cached_property
    def _full(self) -> torch.Tensor:
        return self._run(nullcontext())

    def _run(self, cache) -> torch.Tensor:
        count = self.validation_samples
        generators = [torch.Generator().manual_seed(VALIDATION_SEED + n) for n in range(count)]
        arguments = collate(self.demo.model.inputs_for(labels(count)))
        options = {"num_inference_steps": self.demo.num_inference_steps, "output_type": "latent", "return_dict": False}
        with cache:
            return self.pipe(**arguments, **options, generator=generators)[0].float()

    def is_of(self, what: str, given: str) -> bool:
        """Whether the folder began with this value, or begins with it now."""
        return self._once(what, lambda: given) == given

    def _once(self, what: str, make: Callable[[], Any]) -> Any:
        """A result that is kept."""
        if what not in self._known:
            self._known[what] = make()
            write_text(self._notes, json.dumps(self._known, indent=0) + "\n")
        return self._known[what]


def named(config: PredictorConfig) -> str:
    """The forecaster and its options."""
    return ", ".join([config.mixer, *(f"{name} {value:g}" for name, value in (config.options or {}).items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SAMPLES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder; what is finished there is kept")
    parser.add_argument("--coefficients", type=Path, help="other ones for universal")
    parser.add_argument("--budgets", type=int, nargs="+", choices=BUDGETS, help="default: all of the model")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stored = load_file(options.coefficients or universal.COEFFICIENTS)
    numbers = [stored[name].double() for name in ("in_weight", "in_bias", "spline", "out_weight", "out_bias")]
    with patch.object(universal, "coefficients", lambda device: numbers):
        workshop = Workshop(options.model, options.out)
        if not workshop.is_of("coefficients", digest(numbers)):
            parser.error("--coefficients must be those with which --out began. Choose another folder for others.")
        predictors: dict[str, Any] = {}
        for budget in options.budgets or workshop.demo.schedules:
            predictors |= workshop.predictors(budget)
        inputs = workshop.demo.model.inputs_for(labels(SAMPLES[options.model]))
        more = {"seed": SEED, "batch_size": 1, "out_dir": options.out / "evaluation"}
        lesa.evaluate(workshop.pipe, inputs, predictors, AGAINST, **more)


if __name__ == "__main__":
    main()
