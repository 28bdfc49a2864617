"""`lesa demo`: compares a bundled model's predictors with what needs no training, or writes the model out."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lesa.contenders import FewerSteps, TaylorSeer
from lesa.demo import digits, few_step, photos, video
from lesa.evaluation import Evaluation, evaluate
from lesa.evaluation.evaluator import Contestant
from lesa.inputs import write_inputs
from lesa.schedule import Spread
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import Said, argument_error, check_choice, check_int
from lesa_kernels.forecasters import UNTRAINED

SEED = 10_000
"""Of the first sample of the demo. Training samples have seeds from 0 on."""

BUDGET = 9
"""How many steps are computed in the commands that `export` gives, and without a trained predictor in the demo."""

Predictors = Mapping[str, tuple[str, tuple[int, ...] | int]]
"""Mixer and schedule of predictors, by the names of their folders."""

# Runs with a predictor that was trained on many schedules chose these schedules; docs/research.md says how.
SCHEDULES = {
    10: (0, 2, 6, 11, 17, 23, 30, 37, 43, 47),
    9: (0, 2, 7, 13, 19, 26, 34, 41, 47),
    8: (0, 2, 7, 13, 21, 29, 37, 45),
    7: (0, 4, 11, 19, 28, 37, 45),
    5: (0, 9, 21, 32, 43),
}
PREDICTORS: Predictors = {
    "newton-9": ("newton", SCHEDULES[9]),
    "newton-8": ("newton", SCHEDULES[8]),
    "dense-9": ("dense", 7),
}
TRAINING_SAMPLES = 160
TEST_SAMPLES = 64

# At 10 and at 8 of 50 steps TaylorSeer is best with order 1 and these intervals. `lesa evaluate --against
# taylorseer-10,taylorseer-8` repeats the search.
TAYLORSEER = tuple(TaylorSeer(interval, order=1, lite=lite) for interval in (7, 10) for lite in (False, True))

PHOTOS_SCHEDULES = {
    10: (0, 2, 5, 8, 13, 19, 26, 34, 41, 47),
    9: (0, 2, 5, 9, 15, 22, 31, 40, 46),
    8: (0, 2, 5, 10, 18, 27, 37, 46),
    7: (0, 2, 6, 13, 22, 33, 44),
    5: (0, 4, 12, 25, 40),
}
PHOTOS_PREDICTORS: Predictors = {
    "photos-newton-9": ("newton", PHOTOS_SCHEDULES[9]),
    "photos-newton-8": ("newton", PHOTOS_SCHEDULES[8]),
}
# At 10 and at 9 of 50 steps TaylorSeer is best with order 1 in lite mode and these intervals, in the same search.
PHOTOS_TAYLORSEER = tuple(TaylorSeer(interval, order=1, lite=lite) for interval in (7, 8) for lite in (False, True))

VIDEO_SCHEDULES = {
    10: (0, 7, 16, 24, 31, 38, 42, 46, 48, 49),
    9: (0, 8, 18, 26, 33, 40, 43, 47, 49),
    8: (0, 13, 26, 35, 41, 45, 47, 49),
    7: (0, 13, 27, 37, 43, 47, 49),
}
VIDEO_PREDICTORS: Predictors = {
    "video-newton-9": ("newton", VIDEO_SCHEDULES[9]),
    "video-newton-8": ("newton", VIDEO_SCHEDULES[8]),
}
# The best at 8 and at 7 of 50 steps in the search of `lesa evaluate`.
VIDEO_TAYLORSEER = tuple(TaylorSeer(9, order=3, lite=True, warm_up=warm_up) for warm_up in (2, 1))

# Of 8 steps. Runs on other samples chose these among all schedules: benchmarks/studies/few_steps.py.
FEW_STEP_SCHEDULES = {6: (0, 1, 2, 3, 5, 7), 5: (0, 1, 2, 4, 6)}
FEW_STEP_PREDICTORS: Predictors = {
    "few-step-newton-6": ("newton", FEW_STEP_SCHEDULES[6]),
    "few-step-newton-5": ("newton", FEW_STEP_SCHEDULES[5]),
}
# Each computes 5 steps.
FEW_STEP_TAYLORSEER = tuple(TaylorSeer(2, lite=lite) for lite in (False, True))


@dataclass(frozen=True)
class Demo:
    """A bundled model and what the demo shows.

    Args:
        model: the module that loads it.
        predictors: mixer and schedule of the bundled predictors, by the names of their folders.
        schedules: of newton predictors, by the number of computed steps. The one of `budget` steps is that of the
            commands that `export` gives.
        taylorseer: settings to compare with.
        training_samples: how many samples are recorded to train predictors.
        test_samples: how many samples the demo draws.
        num_inference_steps: steps of a run.
        updates: steps of the optimiser when predictors are trained end to end.
        output: the file that `lesa generate` writes in the commands that `export` gives.
    """

    model: ModuleType
    predictors: Predictors
    schedules: Mapping[int, tuple[int, ...]]
    taylorseer: tuple[TaylorSeer, ...]
    training_samples: int
    test_samples: int = TEST_SAMPLES
    num_inference_steps: int = 50
    updates: int = 250
    output: str = "digit.png"

    @property
    def budget(self) -> int:
        """How many steps are computed where nothing else says so."""
        return min(BUDGET, max(self.schedules))


DEMOS = {
    "digits": Demo(digits, PREDICTORS, SCHEDULES, TAYLORSEER, TRAINING_SAMPLES),
    "photos": Demo(photos, PHOTOS_PREDICTORS, PHOTOS_SCHEDULES, PHOTOS_TAYLORSEER, 320, output="photo.png"),
    "video": Demo(
        video,
        VIDEO_PREDICTORS,
        VIDEO_SCHEDULES,
        VIDEO_TAYLORSEER,
        training_samples=96,
        test_samples=32,
        updates=120,
        output="video.gif",
    ),
    "few-step": Demo(
        few_step,
        FEW_STEP_PREDICTORS,
        FEW_STEP_SCHEDULES,
        FEW_STEP_TAYLORSEER,
        training_samples=160,
        num_inference_steps=8,
        updates=64,
    ),
}


def labels(count: int) -> list[int]:
    """The classes of `count` samples: 0 to 9, again and again. Each model has ten."""
    return [number % digits.NUM_CLASSES for number in range(count)]


def run_demo(
    out_dir: str | os.PathLike, num_samples: int | None = None, progress: bool = True, model: str = "digits"
) -> Evaluation:
    """Compares a bundled model's predictors with all steps, a cache without a predictor, TaylorSeer and fewer steps.

    The cache without a predictor is `lesa.enable_cache(pipe, steps=9)`, of the model for 8 steps `steps=6`.

    Args:
        out_dir: gets `summary.json` and `comparison.png`; of videos `comparison.gif` too, and `comparison.mp4` where
            imageio-ffmpeg is installed.
        num_samples: number of pictures or videos to draw. None of them was used in training. None: as many as are
            enough for the model.
        progress: whether to show a progress bar.
        model: "digits", "photos", "video" or "few-step".

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    demo = DEMOS[check_choice("model", model, tuple(DEMOS))]
    count = demo.test_samples if num_samples is None else check_int("num_samples", num_samples)
    trained = {name: FusedKANPredictor.from_pretrained(digits.WEIGHTS / name) for name in demo.predictors}
    untrained = FusedKANPredictor(PredictorConfig(mixer=UNTRAINED)), Spread(demo.budget)
    predictors: dict[str, Contestant] = {**trained, f"{UNTRAINED}-{demo.budget}": untrained}
    return evaluate(
        demo.model.load_pipeline(),
        demo.model.inputs_for(labels(count)),
        predictors,
        against=(FewerSteps.name, *demo.taylorseer),
        num_inference_steps=demo.num_inference_steps,
        seed=SEED,
        out_dir=out_dir,
        progress=progress,
    )


def export(out_dir: str | os.PathLike, model: str = "digits") -> list[str]:
    """Writes a bundled model and inputs, to make a predictor from the command line and to use it.

    Args:
        out_dir: gets `model`, a diffusers pipeline; `inputs.safetensors`, inputs to record: 320 of the photographs, 96
            of the videos and 160 of the others; `prompts.safetensors`, one per class to generate from; and
            `test-inputs.safetensors`, the inputs of the demo.
        model: "digits", "photos", "video" or "few-step".

    Returns:
        The commands: `lesa fit`, which does all at once, and then those of the single steps, in order.

    Raises:
        ValueError: `out_dir` has files in it already, or there is no such model.
    """
    folder = Path(out_dir)
    demo = DEMOS[check_choice("model", model, tuple(DEMOS))]
    if folder.exists() and any(folder.iterdir()):
        raise argument_error("out_dir", "be empty or absent", Said(f"files in {folder}"), "Choose another folder.")
    demo.model.load_pipeline().save_pretrained(folder / "model")
    files = {"inputs": demo.training_samples, "prompts": demo.model.NUM_CLASSES, "test-inputs": demo.test_samples}
    for name, count in files.items():
        write_inputs(folder / f"{name}.safetensors", demo.model.inputs_for(labels(count)))

    def at(name: str) -> str:
        return shlex.quote(str(folder / name))

    steps = ",".join(map(str, demo.schedules[demo.budget]))
    record = f"--model {at('model')} --inputs {at('inputs.safetensors')} --batch-size 16"
    run = "" if demo.num_inference_steps == 50 else f" --steps {demo.num_inference_steps}"
    recorded = f"--trajectories {at('trajectories')}"
    fresh = f"--model {at('model')} --predictor {at('predictor')} --seed {SEED}{run}"
    return [
        f"lesa fit {record}{run} --budget {demo.budget} --out {at('fitted')}",
        f"lesa record {record}{run} --out {at('trajectories')}",
        f"lesa train {recorded} --schedule {steps} --out {at('trained')}",
        f"lesa refine {record} {recorded} --predictor {at('trained')} --out {at('predictor')}",
        f"lesa generate {fresh} --inputs {at('prompts.safetensors')} --output {at(demo.output)}",
        f"lesa evaluate {fresh} --inputs {at('test-inputs.safetensors')} --out {at('evaluation')}",
    ]
