"""`lesa demo`: the bundled model and predictors against TaylorSeer and fewer steps; and the same path by hand."""

import os
import shlex
import shutil
from pathlib import Path

from lesa.demo import digits
from lesa.evaluation import Evaluation, TaylorSeer, evaluate
from lesa.inputs import write_inputs
from lesa_kernels import FusedKANPredictor
from lesa_kernels._checks import check_int

SEED = 10_000
"""Of the first sample of the demo. Training samples have seeds from 0 on."""

# The bundled predictors: mixer and schedule. That of newton-9 was searched with samples of seeds from 20 000 on.
SCHEDULE_9 = (0, 2, 7, 13, 19, 24, 33, 41, 47)
SCHEDULE_8 = (0, 2, 6, 12, 19, 27, 35, 43)
PREDICTORS = {"newton-9": ("newton", SCHEDULE_9), "newton-8": ("newton", SCHEDULE_8), "dense-9": ("dense", 7)}
TRAINING_SAMPLES = 160
TEST_SAMPLES = 64

# At 10 and at 8 of 50 steps TaylorSeer is best with order 1 and these intervals. Measured over `taylorseer_grid`, which
# `lesa evaluate --against taylorseer-10,taylorseer-8` tries again.
TAYLORSEER = tuple(TaylorSeer(interval, order=1, lite=lite) for interval in (7, 10) for lite in (False, True))


def labels(count: int) -> list[int]:
    """The digits that `count` samples ask for, in turn."""
    return [number % digits.NUM_CLASSES for number in range(count)]


def run_demo(out_dir: str | os.PathLike, num_samples: int = TEST_SAMPLES, progress: bool = True) -> Evaluation:
    """Runs the bundled predictors against the bundled model's 50 steps, TaylorSeer and fewer steps.

    Args:
        out_dir: where `summary.json` and `comparison.png` are written.
        num_samples: number of digits to draw; none of them was used in training.
        progress: whether to show a progress bar.
    """
    check_int("num_samples", num_samples)
    return evaluate(
        digits.load_pipeline(),
        digits.inputs_for(labels(num_samples)),
        {name: FusedKANPredictor.from_pretrained(digits.WEIGHTS / name) for name in PREDICTORS},
        against=("steps", *TAYLORSEER),
        seed=SEED,
        out_dir=out_dir,
        progress=progress,
    )


def export(out_dir: str | os.PathLike) -> list[str]:
    """Writes the bundled model and inputs, so that the whole path can be walked from the command line.

    Args:
        out_dir: gets `model`, a diffusers pipeline; `inputs.safetensors`, 160 inputs to record; `prompts.safetensors`,
            one per digit to generate from; and `test-inputs.safetensors`, the 64 inputs of the demo.

    Returns:
        The commands, in order.
    """
    folder = Path(out_dir)
    model = folder / "model"
    shutil.copytree(digits.PIPELINE_DIR, model, dirs_exist_ok=True)
    files = {"inputs": TRAINING_SAMPLES, "prompts": digits.NUM_CLASSES, "test-inputs": TEST_SAMPLES}
    for name, count in files.items():
        write_inputs(folder / f"{name}.safetensors", digits.inputs_for(labels(count)))

    def at(name: str) -> str:
        return shlex.quote(str(folder / name))

    steps = ",".join(map(str, SCHEDULE_9))
    record = f"--model {at('model')} --inputs {at('inputs.safetensors')} --batch-size 16"
    fresh = f"--model {at('model')} --predictor {at('predictor')} --seed {SEED}"
    return [
        f"lesa record {record} --out {at('trajectories')}",
        f"lesa train --trajectories {at('trajectories')} --schedule {steps} --out {at('predictor')}",
        f"lesa generate {fresh} --inputs {at('prompts.safetensors')} --output {at('digit.png')}",
        f"lesa evaluate {fresh} --inputs {at('test-inputs.safetensors')} --out {at('evaluation')}",
    ]
