"""Runs of few steps: `python benchmarks/studies/few_steps.py --steps 8 --out DIR`, the same with 4, and `--untrained`.

With `--steps`, it compares forecasters, the caches of others and fewer steps on the digits' student for 8 or 4 steps.
Of 8 steps 6 or 5 are computed, of 4 steps 3. There are so few schedules that all are tried with L2P, linear and
universal, by runs on 16 samples of other seeds. The others are tried with those that are best with these three. For
newton, a brief training comes before each of its runs. The forecasters are made as in `forecasters.py`, but LESA has
the first phase of its training only. Besides the PSNR to the student's run of all steps, there is the PSNR to the
teacher's picture of 50 steps from the same noise. Then `lesa.evaluate` compares newton with the caches of others, with
batch size 1.

With `--untrained`, it compares forecasts without training with fewer steps, in runs of 12 and 8 steps of the models
that are made for 50 steps, and of the student for 8.

What is finished in DIR is kept, except tables. Each table is a CSV file there: `few-steps-8.csv` or `few-steps-4.csv`,
or one for each first seed, `few-steps-untrained-30000.csv` and `few-steps-untrained-40000.csv`. The comparison with the
caches of others is `evaluation/runs.csv`.
"""

import argparse
import csv
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forecasters import AGAINST, OTHERS, VALIDATION_SEED, Choice, Workshop

import lesa
from lesa import Schedule
from lesa.demo import digits, few_step
from lesa.demo.make_weights import END_TO_END_SAMPLES, newton_predictor
from lesa.demo.run import DEMOS, labels
from lesa.evaluation.quality import paired_lead, psnr
from lesa.inputs import collate
from lesa.schedule import Spread
from lesa_kernels import FusedKANPredictor, PredictorConfig

BUDGETS = {8: (6, 5), 4: (3,)}
"""How many steps are computed, by the steps of the student."""
BUNDLED = {(8, 6): "few-step-newton-6", (8, 5): "few-step-newton-5"}
SEED, SAMPLES, BATCH = 40_000, 32, 16
LIKELY, OF_EACH = ("l2p", "linear", "universal"), 3
"""The best schedules of these forecasters, so many of each, are tried with the others."""
UNTRAINED = {12: (3, 6, 9, 10), 8: (5, 6)}
"""Without training: how many steps are computed, by the steps of the run."""
UNTRAINED_MODELS = ("digits", "photos", "few-step")
COLUMNS = ("model", "steps", "computed", "run", "psnr", "psnr_to_50_steps", "lead", "low", "high")


class Student(Workshop):
    """Makes the predictors of a student.

    Args:
        steps: of the student.
        folder: where everything is kept.
    """

    validation_samples, lesa_epochs = 16, (20, 0)

    def __init__(self, steps: int, folder: Path):
        super().__init__(f"few-step-{steps}", folder, replace(DEMOS["few-step"], num_inference_steps=steps))

    def load(self) -> Any:
        return few_step.load_pipeline(steps=self.demo.num_inference_steps)

    def predictors(self, budget: int) -> dict[str, tuple[FusedKANPredictor, Schedule]]:
        """Those to evaluate, by label, each with its best schedule."""
        steps, newton = self.demo.num_inference_steps, self.newton(budget)
        made = {f"newton-{budget}": (newton, Schedule(tuple(newton.config.schedule or ()), steps))}
        for mixer in OTHERS:
            choice = self.best(mixer, budget)
            made[f"{mixer}-{budget}/best"] = self.made(choice), Schedule(choice.steps, steps)
        return made

    def configs(self, mixer: str) -> list[PredictorConfig]:
        """With at most two sets of options."""
        return super().configs(mixer)[-2:]

    def schedules(self, config: PredictorConfig, budget: int) -> list[tuple[int, ...]]:
        return self.candidates(budget) if config.mixer in LIKELY else self.likely(budget)

    def made(self, choice: Choice) -> FusedKANPredictor:
        """As there, but LESA has the first phase of its training only."""
        return self.first_phase if choice.config.mixer == "lesa" else super().made(choice)

    def candidates(self, budget: int) -> list[tuple[int, ...]]:
        """All schedules that compute so many steps."""
        later = range(1, self.demo.num_inference_steps)
        return [(0, *steps) for steps in itertools.combinations(later, budget - 1)]

    def likely(self, budget: int) -> list[tuple[int, ...]]:
        """The best schedules of some forecasters."""
        found: dict[tuple[int, ...], None] = {}
        for mixer in LIKELY:
            (config,) = self.configs(mixer)
            scores = {steps: self.score(Choice(config, steps)) for steps in self.candidates(budget)}
            found |= dict.fromkeys(sorted(scores, key=scores.__getitem__)[-OF_EACH:])
        return [*found]

    def newton(self, budget: int) -> FusedKANPredictor:
        if (name := BUNDLED.get((self.demo.num_inference_steps, budget))) is not None:
            return FusedKANPredictor.from_pretrained(digits.WEIGHTS / name)
        folder = self.folder / f"newton-{budget}"
        if not (folder / "config.json").exists():
            more = self.demo.model.inputs_for(labels(END_TO_END_SAMPLES))
            schedule = self.newton_schedule(budget)
            made = newton_predictor(self.trajectories, self.pipe, self.inputs, more, schedule, self.demo.updates)
            made.save_pretrained(folder)
        return FusedKANPredictor.from_pretrained(folder)

    def newton_schedule(self, budget: int) -> tuple[int, ...]:
        """The steps with which runs are best after a brief training."""
        return max(self.likely(budget), key=self._after_brief_training)

    def _after_brief_training(self, steps: tuple[int, ...]) -> float:
        def measure() -> float:
            trained = lesa.train(self.trajectories, schedule=steps, epochs=10, progress=False)
            return self.psnr_of(trained, steps)

        return self._once(f"newton, {','.join(map(str, steps))}, PSNR after a brief training", measure)


class Runs:
    """Latents of plain and cached runs of a pipeline, from the noise of the seeds from `seed` on.

    Args:
        pipe: the pipeline.
        inputs: of all samples.
        seed: of the first sample.
    """

    def __init__(self, pipe: Any, inputs: list[dict], seed: int):
        self.pipe, self.inputs, self.seed = pipe, inputs, seed

    def run(self, steps: int, predictor: Any = None, schedule: Any = None) -> list[torch.Tensor]:
        """Pictures in [0, 1], one for each sample, of a run of so many steps."""
        made: list[torch.Tensor] = []
        for first in range(0, len(self.inputs), BATCH):
            part = self.inputs[first : first + BATCH]
            generators = [torch.Generator().manual_seed(self.seed + first + n) for n in range(len(part))]
            options = {"num_inference_steps": steps, "output_type": "pt", "return_dict": False}
            with nullcontext() if predictor is None else lesa.enable_cache(self.pipe, predictor, schedule):
                made += self.pipe(**collate(part), **options, generator=generators)[0].float()
        return made


def compared(made: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[float]:
    """The PSNR of each picture in dB."""
    return [psnr(own.numpy(), full.numpy(), 1.0) for own, full in zip(made, wanted)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def row(
    model: str, steps: int, computed: int, run: str, own: Sequence[float], far: Sequence[float], pair: Any = None
) -> dict[str, Any]:
    """A line of a table. `pair` is two lists of PSNR: that of the run which leads, and that of the other."""
    lead = ("", "", "") if pair is None else tuple(f"{value:.2f}" for value in paired_lead(*pair))
    figures = [f"{mean(values):.2f}" for values in (own, far)]
    return dict(zip(COLUMNS, (model, steps, computed, run, *figures, *lead), strict=True))


def untrained(seed: int) -> Iterator[dict]:
    """The lines of the table without training."""
    for name in UNTRAINED_MODELS:
        demo = DEMOS[name]
        runs = Runs(demo.model.load_pipeline(), demo.model.inputs_for(labels(BATCH)), seed)
        far = (teacher_runs(BATCH, seed) if name == "few-step" else runs).run(50)
        for steps, budgets in UNTRAINED.items():
            full = runs.run(steps)
            yield row(name, steps, steps, "all", [float("inf")], compared(full, far))
            for budget in budgets:
                plain = runs.run(budget)
                base = compared(plain, full)
                yield row(name, steps, budget, "fewer steps", base, compared(plain, far))
                for mixer in ("universal", "linear"):
                    made = runs.run(steps, FusedKANPredictor(PredictorConfig(mixer=mixer)), Spread(budget))
                    own = compared(made, full)
                    yield row(name, steps, budget, mixer, own, compared(made, far), (own, base))


def teacher_runs(count: int, seed: int) -> Runs:
    """Of the model that the students learned from."""
    return Runs(digits.load_pipeline(), digits.inputs_for(labels(count)), seed)


def of_student(workshop: Student, predictors: dict[str, tuple[FusedKANPredictor, Schedule]]) -> Iterator[dict]:
    """The lines of the table of a student. The lead is that of newton over the run."""
    steps = workshop.demo.num_inference_steps
    runs = Runs(workshop.pipe, workshop.demo.model.inputs_for(labels(SAMPLES)), SEED)
    full, far = runs.run(steps), teacher_runs(SAMPLES, SEED).run(50)
    same = teacher_runs(SAMPLES, SEED).run(steps)
    yield row(workshop.name, steps, steps, "teacher", compared(same, full), compared(same, far))
    yield row(workshop.name, steps, steps, "all", [float("inf")], compared(full, far))
    plain = {count: runs.run(count) for count in range(steps - 1, min(BUDGETS[steps]) - 1, -1)}
    for count in BUDGETS[steps]:
        best: list[float] = []
        for label, (predictor, schedule) in predictors.items():
            if len(schedule) == count:
                made = runs.run(steps, predictor, schedule)
                own = compared(made, full)
                best = best or own  # newton comes first
                yield row(workshop.name, steps, count, label, own, compared(made, far), (best, own))
        for fewer, made in plain.items():
            own = compared(made, full)
            label = f"{fewer} steps"
            yield row(workshop.name, steps, count, label, own, compared(made, far), (best, own))


def write(file: Path, rows: Iterator[dict]) -> None:
    """Writes lines as they come, and prints them."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for line in rows:
            writer.writerow(line)
            stream.flush()
            print(*line.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder; what is finished there is kept")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--steps", type=int, choices=tuple(BUDGETS), help="of the student")
    what.add_argument("--untrained", action="store_true", help="runs of few steps without training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.untrained:
        for seed in (VALIDATION_SEED, SEED):
            write(options.out / f"few-steps-untrained-{seed}.csv", untrained(seed))
        return
    workshop = Student(options.steps, options.out)
    predictors: dict[str, Any] = {}
    for budget in BUDGETS[options.steps]:
        predictors |= workshop.predictors(budget)
    write(options.out / f"few-steps-{options.steps}.csv", of_student(workshop, predictors))
    inputs = workshop.demo.model.inputs_for(labels(SAMPLES))
    more = {"seed": SEED, "batch_size": 1, "search_samples": 2, "out_dir": options.out / "evaluation"}
    newton = {label: made for label, made in predictors.items() if label.startswith("newton")}
    lesa.evaluate(workshop.pipe, inputs, newton, AGAINST, options.steps, **more)


if __name__ == "__main__":
    main()
