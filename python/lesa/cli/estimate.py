"""`lesa estimate`."""

import json
from pathlib import Path

import lesa
from lesa.cli import arguments

OPTIONS = {
    "num_inference_steps": "--steps",
    "flops_rate": "--tflops",
    "step_seconds": "--step-seconds",
    "batch": "--batch-size",
    "text_tokens": "--text-tokens",
    "images_per_day": "--images-per-day",
    **{name: f"--{name}" for name in ("model", "schedule", "predictor", "device", "bandwidth", "efficiency", "price")},
}


def add_arguments(parser) -> None:
    """The options of the command."""
    text = "a well-known model such as flux-1024, the folder of a pipeline, or a hub id in the local cache"
    parser.add_argument("--model", required=True, help=text)
    for name in ("height", "width", "frames"):
        text = "of a sample" + (", in pixels" if name != "frames" else "")
        parser.add_argument(f"--{name}", type=arguments.positive, help=text)
    parser.add_argument("--steps", type=arguments.positive, default=50, help="denoising steps (default: 50)")
    text = f"{arguments.SCHEDULE} (default: nine spread steps)"
    parser.add_argument("--schedule", type=arguments.schedule, help=text)
    text = "folder of a predictor (default: what `lesa train` makes)"
    parser.add_argument("--predictor", type=Path, help=text)
    text = (
        "A100, H100, H200, B200 or RTX4090 by its datasheet; give --bandwidth and --tflops for others (default: H100)"
    )
    parser.add_argument("--device", default="H100", help=text)
    parser.add_argument("--bandwidth", type=float, help="memory bandwidth of another device, in GB/s")
    parser.add_argument("--tflops", type=float, help="TFLOP/s of another device's dense products")
    parser.add_argument("--efficiency", type=float, default=0.5, help="part of --tflops that is reached (default: 0.5)")
    parser.add_argument("--step-seconds", type=float, help="what a computed step takes, if it was measured")
    parser.add_argument("--batch-size", type=arguments.positive, default=1, help="samples per call (default: 1)")
    types = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=types, default="bfloat16", help="of the features (default: bfloat16)")
    text = "per sample (default: as many as the model's pipeline makes)"
    parser.add_argument("--text-tokens", type=arguments.natural, help=text)
    text = "transformer calls per step (default: what is usual for the model)"
    parser.add_argument("--streams", type=arguments.positive, help=text)
    parser.add_argument("--images-per-day", type=float, help="samples a day, for the GPU-hours that are saved")
    parser.add_argument("--price", type=float, help="of a GPU-hour, for the money that is saved")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options) -> None:
    """Runs the command."""
    found = lesa.estimate(
        options.model,
        options.height,
        options.width,
        options.frames,
        num_inference_steps=options.steps,
        schedule=options.schedule,
        predictor=options.predictor,
        device=options.device,
        bandwidth=None if options.bandwidth is None else options.bandwidth * 1e9,
        flops_rate=None if options.tflops is None else options.tflops * 1e12,
        efficiency=options.efficiency,
        step_seconds=options.step_seconds,
        batch=options.batch_size,
        dtype=options.dtype,
        text_tokens=options.text_tokens,
        streams=options.streams,
        images_per_day=options.images_per_day,
        price=options.price,
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
