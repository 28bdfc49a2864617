"""`lesa generate`."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lesa
from lesa.cli import UsageError, arguments

OPTIONS = {
    **arguments.RUN_OPTIONS,
    "predictor": "--predictor",
    "schedule": "--schedule",
    "quality": "--quality",
    "steps": "--computed",
    "folder_or_id": "--predictor",
    "tolerance": "--tolerance",
    "ErrorControl": "--tolerance",
}


def add_arguments(parser) -> None:
    """The options of the command."""
    arguments.add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    arguments.add_inputs(source, required=False)
    source.add_argument("--prompt", help="what to draw")
    arguments.add_run(parser)
    text = "folder or hub id of a predictor (default: a forecaster that fits every model, without training)"
    parser.add_argument("--predictor", type=arguments.model, help=text)
    which = parser.add_mutually_exclusive_group()
    text = f"{arguments.SCHEDULE} (default: those that the predictor was trained for, else as with --quality balanced)"
    which.add_argument("--schedule", type=arguments.schedule, help=text)
    which.add_argument("--computed", type=arguments.positive, metavar="N", help="how many of the steps are computed")
    text = "compute 16 (high), 12 (balanced) or 9 (fast) of 50 steps, and of other numbers of steps the same part"
    which.add_argument("--quality", choices=arguments.QUALITIES, help=text)
    text = (
        "choose the computed steps by the errors of the forecasts; 1 computes about as many steps as the predictor was "
        "trained for, a smaller X computes more"
    )
    which.add_argument("--tolerance", type=arguments.above_zero, metavar="X", help=text)
    parser.add_argument(
        "--output",
        required=True,
        type=arguments.existing,
        metavar="FILE",
        help="file for the picture or video; its suffix is the format, and several files get numbers",
    )
    text = "frames per second of a video in .mp4 or .gif (default: 24)"
    parser.add_argument("--fps", type=arguments.frame_rate, help=text)
    parser.add_argument("--height", type=arguments.positive, help="height in pixels")
    parser.add_argument("--width", type=arguments.positive, help="width in pixels")


def run(options) -> None:
    """Runs the command."""
    import torch

    from lesa.cli.loading import check_model, pipeline_of, prepare, read
    from lesa.cli.outputs import check_files, check_output, file_of, write
    from lesa.cli.trying import explained
    from lesa.models import adapter_for, features_device
    from lesa_kernels import FusedKANPredictor

    check_output(options.output, None, options.fps)
    kind = check_model(options)
    samples = read(options, kind)
    _check_schedule(options, samples)
    check_files(options.output, samples, kind and kind.__call__)
    which = {"schedule": options.schedule, "steps": options.computed, "quality": options.quality}
    if options.tolerance is not None:
        which["schedule"] = lesa.ErrorControl(options.tolerance)
    predictor = _predictor(options.predictor, which)
    pipe = pipeline_of(options)
    check_output(options.output, type(pipe).__call__, options.fps)
    check_files(options.output, samples, type(pipe).__call__)
    samples = prepare(options, pipe, _sized(options, samples), options.steps)
    if isinstance(predictor, FusedKANPredictor):
        predictor.to(features_device(pipe, adapter_for(pipe)))
    running: list = []  # the sample that is drawn
    with explained(pipe, running, options.steps), lesa.enable_cache(pipe, predictor, **which) as handle:
        for number, sample in enumerate(samples):
            running[:] = [sample]
            generator = torch.Generator("cpu").manual_seed(options.seed + number)
            start = time.perf_counter()
            result = pipe(**sample.arguments, num_inference_steps=options.steps, generator=generator)
            seconds = time.perf_counter() - start
            files = write(result, file_of(options.output, number, len(samples)), options.fps)
            names = f"{files[0]}" + (f" to {files[-1].name}" if len(files) > 1 else "")
            computed = handle.stats.computed_steps
            steps = computed + handle.stats.predicted_steps  # --steps, if nothing in the inputs changes their number
            print(f"Wrote {names}: {computed} of {steps} steps computed, {seconds:.2f} s")
    print(handle.stats.summary())


def _predictor(source: str | None, which: Mapping[str, Any]) -> Any:
    """The predictor, loaded; or its name, if it has several budgets, among which `enable_cache` chooses by `which`."""
    from lesa.cache import one_of
    from lesa.cache.choosing import budget_for
    from lesa.cli.loading import budgets_of, predictor_of

    if source is None:
        return None
    if not (budgets := budgets_of(source)):
        return predictor_of(source)
    predictor_of(source, budget_for(budgets, one_of(**which), source))  # an error is shown before the model is loaded
    return source


def _check_schedule(options, samples: list) -> None:
    """Raises `UsageError` if a sample has fewer steps than --schedule needs."""
    from lesa.inputs import steps_of

    if not isinstance(options.schedule, list):
        return
    last = options.schedule[-1]
    for sample in samples:
        if last >= (steps := steps_of(sample.arguments, options.steps)):
            bound = f"--steps ({steps})" if steps == options.steps else f"the {steps} steps of {sample.place}"
            raise UsageError(f"argument --schedule: each step must be below {bound}, but got {last}")


def _sized(options, samples: list) -> list:
    """The samples with the size of --height and --width, which is named with their place."""
    size = {name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None}
    given = " with" * bool(size) + "".join(f" --{name} {value}" for name, value in size.items())
    return [replace(s, place=s.place + given, arguments={**s.arguments, **size}) for s in samples]
