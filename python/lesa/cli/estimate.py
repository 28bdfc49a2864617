"""`lesa estimate`."""

import json
from collections.abc import Callable

import lesa
from lesa.cli import arguments

_NAMES = (
    *("model", "height", "width", "frames", "schedule", "predictor", "device", "bandwidth", "efficiency", "dtype"),
    *("step_seconds", "text_tokens", "images_per_day", "streams", "price"),
)
OPTIONS = {
    "num_inference_steps": "--steps",
    "flops_rate": "--tflops",
    "batch": "--batch-size",
    "steps": "--schedule",
    "config._class_name": "--model (_class_name)",
    **{name: f"--{name.replace('_', '-')}" for name in _NAMES},
}


def add_arguments(parser) -> None:
    """The options of the command. Each is stored under the name of the argument of `lesa.estimate`."""

    def add(option: str, text: str, **more) -> None:
        parser.add_argument(option, help=text, **more)

    text = "a well-known model such as flux-1024, the folder of a pipeline, or a hub id in the local cache"
    add("--model", text, required=True, type=arguments.model)
    add("--height", "height of a sample, in pixels", type=arguments.positive)
    add("--width", "width of a sample, in pixels", type=arguments.positive)
    add("--frames", "number of frames of a sample", type=arguments.positive)
    steps = {"dest": "num_inference_steps", "metavar": "STEPS", "type": arguments.positive, "default": 50}
    add("--steps", "number of denoising steps (default: 50)", **steps)
    add("--schedule", f"{arguments.SCHEDULE} (default: nine spread steps)", type=arguments.schedule)
    add("--predictor", "folder of a predictor (default: what `lesa train` makes)", type=arguments.existing)
    text = "A100, H100, H200, B200 or RTX4090 (default: H100); for another GPU, use --bandwidth and --tflops"
    add("--device", text, default="H100")
    add("--bandwidth", "memory bandwidth of another device, in GB/s", type=_times(1e9))
    text = "rate of another device for dense matrix products, in TFLOP/s"
    add("--tflops", text, type=_times(1e12), dest="flops_rate", metavar="TFLOPS")
    add(
        "--efficiency",
        "part of the FLOP rate that a computed step reaches (default: 0.5)",
        type=arguments.above_zero,
        default=0.5,
    )
    add("--step-seconds", "measured time of a computed step, in seconds", type=arguments.above_zero)
    add("--batch-size", "samples per call (default: 1)", type=arguments.positive, default=1, dest="batch")
    types = ("bfloat16", "float16", "float32")
    add("--dtype", "dtype of the features (default: bfloat16)", choices=types, default="bfloat16")
    add(
        "--text-tokens",
        "text tokens per sample (default: as many as the model's pipeline makes)",
        type=arguments.natural,
    )
    text = "transformer calls per step (default: as many as the model's usual guidance makes)"
    add("--streams", text, type=arguments.positive)
    add("--images-per-day", "samples per day, to compute the GPU-hours that are saved", type=arguments.above_zero)
    add("--price", "price of a GPU-hour, to compute the money that is saved", type=arguments.above_zero)
    add("--json", "print JSON instead of a table", action="store_true")


def _times(factor: float) -> Callable[[str], float]:
    return lambda text: arguments.above_zero(text) * factor


def run(options) -> None:
    """Runs the command."""
    given = {name: value for name, value in vars(options).items() if name not in ("command", "json")}
    found = lesa.estimate(**given)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
