"""Types of option values, and groups of options that several commands share. Nothing here needs torch."""

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEDULE = "computed steps such as 0,2,6,12, or an interval such as 7"
RUN_OPTIONS = {
    "num_inference_steps": "--steps",
    "seed": "--seed",
    "inputs": "--inputs",
    "file": "--inputs",
    "pipe": "--model",
    "device": "--device",
}
"""The options of commands that run a pipeline, by the names that the library has for them."""
CONDITION_OPTIONS = {
    "pipeline": "--model (pipeline)",
    "dtypes": "--dtype",
    **{name: f"--model ({name})" for name in ("scheduler", "pipeline_config", "configs", "weights")},
    **{name: f"--model ({name})" for name in ("adapters", "fused_loras", "quantisation", "autocast")},
}
"""The options that decide what a recording or a fit was begun with, by the names that it has for them."""
DTYPES = ("float32", "bfloat16", "float16")
QUALITIES = ("high", "balanced", "fast")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1, 2**31 - 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0, 2**31 - 1)


def seed(text: str) -> int:
    """An integer of at least 0, as random generators take it."""
    return _integer(text, 0, 2**62)


def _integer(text: str, minimum: int, maximum: int) -> int:
    must = f"must be an integer of at least {minimum}"
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value > maximum:
        must += f" and at most {maximum}"
    if not minimum <= value <= maximum:
        raise argparse.ArgumentTypeError(f"{must}, but got {text!r}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, but got {text!r}")
    return value


def frame_rate(text: str) -> float:
    """Frames per second."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 240:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1 and at most 240, but got {text!r}")
    return value


def mixer(text: str) -> str:
    """The name of a forecaster that can be trained."""
    from lesa_kernels.forecasters import FORECASTERS  # not at the top: the help needs no torch

    trained = [name for name, forecaster in FORECASTERS.items() if forecaster.is_trained]
    if text not in trained:
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(map(repr, trained))})")
    return text


def option(text: str) -> tuple[str, int | float]:
    """The name and the value of an option of a forecaster."""
    name, sign, number = text.partition("=")
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if name and sign:
                return name, kind(number)
    raise argparse.ArgumentTypeError(f"must be a name and a number such as streams=2, but got {text!r}")


def schedule(text: str) -> int | list[int]:
    """An interval, or the list of computed steps."""
    steps = _numbers(int, "an interval such as 7, or computed steps such as 0,2,6,12")(text)
    if len(steps) == 1 and steps[0] < 1:
        raise argparse.ArgumentTypeError(f"must be an interval of at least 1, but got {text!r}")
    if len(steps) > 1 and (steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:]))):
        raise argparse.ArgumentTypeError(f"must be rising steps that start with 0, but got {text!r}")
    return steps[0] if len(steps) == 1 else list(steps)


def budget(text: str) -> int | list[int]:
    """One number of computed steps, or several."""
    numbers = [positive(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def lengths(text: str) -> int | tuple[int, ...]:
    """One history length, or one for each stage."""
    values = _numbers(int, "an integer, or one for each stage such as 4,6,8")(text)
    return values[0] if len(values) == 1 else values


def stage_bounds(text: str) -> str | tuple[float, ...]:
    """Falling noise levels, or "auto"."""
    return text if text == "auto" else _numbers(_finite, "falling noise levels such as 0.67,0.33, or auto")(text)


def folder(text: str) -> Path:
    """A folder to write to: not the name of a file that exists."""
    path = Path(_filled(text))
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, but {text} is a file")
    return path


def existing(text: str) -> Path:
    """A file or folder to read."""
    return Path(_filled(text))


def model(text: str) -> str:
    """A folder or a hub id."""
    return _filled(text)


def _filled(text: str) -> str:
    if not text:  # it would be the current folder
        raise argparse.ArgumentTypeError("must be a name, but got an empty text")
    return text


def page(text: str) -> Path:
    """A file to write: not the name of a folder that exists."""
    path = Path(_filled(text))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, but {text} is a folder")
    return path


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def _numbers(kind: Callable[[str], Any], name: str) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {name}, but got {text!r}") from None

    return parse


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda if there is a GPU)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, and where and in which dtype it runs."""
    parser.add_argument("--model", required=True, type=model, help="folder or hub id of a diffusers pipeline")
    add_device(parser)
    text = (
        "auto: divide the transformer among all GPUs, the memory of the CPU and temporary files, in this order, for a "
        "model that is larger than one GPU; in one process, and without --device"
    )
    parser.add_argument("--device-map", choices=("auto",), help=text)
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: float32 on a CPU, else bfloat16)")


def add_inputs(parser, required: bool = True, default: str = "") -> None:
    """`--inputs`. `default` is what is taken without it."""
    text = "prompts in a .jsonl file, or pipeline arguments in a .safetensors file" + (default and f" ({default})")
    parser.add_argument("--inputs", required=required, type=existing, metavar="FILE", help=text)


def add_run(parser: argparse.ArgumentParser) -> None:
    """`--steps` and `--seed` of a run of the pipeline."""
    parser.add_argument("--steps", type=positive, default=50, help="number of denoising steps (default: 50)")
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of sample 0; sample i gets this seed + i (default: 0)"
    )
