"""`lesa generate`."""

import time
from pathlib import Path

import lesa
from lesa.cli import UsageError, arguments

OPTIONS = {
    "predictor": "--predictor",
    "schedule": "--schedule",
    "inputs": "--inputs",
    "file": "--inputs",
    "folder_or_id": "--predictor",
    "tolerance": "--tolerance",
    "ErrorControl": "--tolerance",
    "pipe": "--model",
}


def add_arguments(parser) -> None:
    """The options of the command."""
    arguments.add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    arguments.add_inputs(source, required=False)
    source.add_argument("--prompt", help="what to draw")
    arguments.add_run(parser)
    parser.add_argument("--predictor", required=True, help="folder or hub id of a predictor")
    which = parser.add_mutually_exclusive_group()
    text = f"{arguments.SCHEDULE} (default: those that the predictor was trained for)"
    which.add_argument("--schedule", type=arguments.schedule, help=text)
    text = (
        "choose the computed steps by the errors of the forecasts; 1 computes about as many steps as the predictor was "
        "trained for, a smaller X computes more"
    )
    which.add_argument("--tolerance", type=arguments.above_zero, metavar="X", help=text)
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="file for the picture; if there are several, they get numbers",
    )
    parser.add_argument("--height", type=arguments.positive, help="height in pixels")
    parser.add_argument("--width", type=arguments.positive, help="width in pixels")


def run(options) -> None:
    """Runs the command."""
    import torch
    from PIL import Image

    from lesa.cli.loading import check_prompts, inputs_of, pipeline_of
    from lesa_kernels import FusedKANPredictor

    if options.output.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"argument --output: {options.output} must end in the suffix of an image format. Use .png.")
    if isinstance(options.schedule, list) and options.schedule[-1] >= options.steps:
        last = options.schedule[-1]
        raise UsageError(f"argument --schedule: each step must be below --steps ({options.steps}), but got {last}")
    predictor = FusedKANPredictor.from_pretrained(options.predictor)
    pipe = pipeline_of(options)
    inputs = inputs_of(options, pipe) if options.inputs else check_prompts(pipe, [{"prompt": options.prompt}])
    size = {name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None}
    predictor.to(pipe.transformer.device)
    schedule = options.schedule if options.tolerance is None else lesa.ErrorControl(options.tolerance)
    with lesa.enable_cache(pipe, predictor, schedule) as handle:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        for number, given in enumerate(inputs):
            generator = torch.Generator("cpu").manual_seed(options.seed + number)
            start = time.perf_counter()
            image = pipe(**{**given, **size}, num_inference_steps=options.steps, generator=generator).images[0]
            seconds = time.perf_counter() - start
            output = options.output
            if len(inputs) > 1:
                output = output.with_name(f"{output.stem}-{number:05d}{output.suffix}")
            image.save(output)
            print(f"Wrote {output}: {handle.stats.computed_steps} of {options.steps} steps computed, {seconds:.2f} s")
    print(handle.stats.summary())
