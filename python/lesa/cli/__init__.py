"""The `lesa` command."""

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from lesa_kernels import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise _fail(f"{message} (see `{self.prog} --help`)")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; leaves with `SystemExit`, code 2 and one line on stderr if it can't.

    Args:
        arguments: those of the command line. Default: `sys.argv[1:]`.
    """
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # diffusers imports parts of it that report what they lack
    try:
        options.command(options)
    except KeyboardInterrupt:
        resume = "; the same command continues where it stopped" if options.resumes else ""
        raise SystemExit(_say(f"lesa: interrupted{resume}", 130)) from None
    except Exception as error:
        if not _is_message(error):
            raise
        raise _fail(str(error)) from None


def _is_message(error: Exception) -> bool:
    """Whether the error is meant for the user: a failing file or network, or what a check raised. A bug is neither."""
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or hasattr(error, "lesa_message"):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_code.co_name == "check_inputs"  # where pipelines check arguments


def _fail(message: str) -> SystemExit:
    return SystemExit(_say(f"lesa: error: {' '.join(message.split())}", 2))


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _demo(options) -> None:
    from lesa.demo.run import export, run_demo

    _quiet_diffusers()
    if options.export is not None:
        commands = export(options.export, options.model)
        print(f"Wrote the model and its inputs to {options.export}. The whole path by hand:\n")
        print("\n".join(f"  {command}" for command in commands))
        return
    said = "50 steps, then fewer computed ones. About a minute on two cores."
    print(f"The bundled {options.model} model: {said}", flush=True)
    start = time.perf_counter()
    _report(run_demo(options.out, model=options.model), options.out)
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


def _record(options) -> None:
    from lesa.recording import record

    pipe = _load_pipeline(options)
    trajectories = record(
        pipe,
        _read_inputs(pipe, options),
        options.out,
        num_inference_steps=options.steps,
        tokens_per_sample=options.tokens_per_sample,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    print(f"Wrote {len(trajectories)} trajectories of {trajectories.num_inference_steps} steps to {options.out}")


def _train(options) -> None:
    from lesa.recording import Trajectories
    from lesa.training import train
    from lesa_kernels import PredictorConfig

    trajectories = Trajectories(options.trajectories)
    names = ("mixer", "rank", "hidden", "history_length", "stage_bounds")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    found = given.get("stage_bounds") == "auto"
    if found:
        del given["stage_bounds"]
    config = PredictorConfig(trajectories.feature_dim, **given) if given else None
    more = {name: getattr(options, name) for name in ("epochs", "budget") if getattr(options, name) is not None}
    more |= {"controlled": True} if options.controlled else {}
    more |= {"find_stages": True} if found else {}
    device = _device(options)
    predictor = train(
        trajectories, config, options.schedule, out_dir=options.out, seed=options.seed, device=device, **more
    )
    config = predictor.config
    if found:
        bounds = ", ".join(f"{bound:.3g}" for bound in config.stage_bounds)
        print(f"Found {config.num_stages} noise stages, with bounds at {bounds}" if bounds else "Found 1 noise stage")
    steps = ",".join(map(str, config.schedule))
    print(f"Wrote the predictor, which computes the steps {steps}, to {options.out}")


def _refine(options) -> None:
    from lesa.refinement import refine
    from lesa_kernels import FusedKANPredictor

    predictor = FusedKANPredictor.from_pretrained(options.predictor)
    pipe = _load_pipeline(options)
    refine(
        predictor,
        options.trajectories,
        pipe,
        _read_inputs(pipe, options),
        out_dir=options.out,
        rounds=options.rounds,
        epochs=options.epochs,
        samples_per_call=options.batch_size,
        seed=options.seed,
        device=_device(options),
    )
    print(f"Wrote the refined predictor to {options.out}")


def _generate(options) -> None:
    import torch
    from PIL import Image

    from lesa.cache import enable_cache
    from lesa.schedule import ErrorControl
    from lesa_kernels import FusedKANPredictor

    if options.output.suffix.lower() not in Image.registered_extensions():
        raise _fail(f"argument --output: {options.output} must end in the suffix of an image format. Use .png.")
    if isinstance(options.schedule, list) and options.schedule[-1] >= options.steps:
        raise _fail(f"argument --schedule: must be below the {options.steps} --steps, but got {options.schedule[-1]}")
    predictor = FusedKANPredictor.from_pretrained(options.predictor)
    pipe = _load_pipeline(options)
    inputs = _read_inputs(pipe, options) if options.inputs else _prompts(pipe, [{"prompt": options.prompt}])
    size = {name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None}
    predictor.to(pipe.transformer.device)
    schedule = options.schedule if options.tolerance is None else ErrorControl(options.tolerance)
    with enable_cache(pipe, predictor, schedule) as handle:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        for number, arguments in enumerate(inputs):
            generator = torch.Generator("cpu").manual_seed(options.seed + number)
            start = time.perf_counter()
            image = pipe(**{**arguments, **size}, num_inference_steps=options.steps, generator=generator).images[0]
            seconds = time.perf_counter() - start
            output = options.output
            if len(inputs) > 1:
                output = output.with_name(f"{output.stem}-{number:05d}{output.suffix}")
            image.save(output)
            print(f"Wrote {output}: {handle.stats.computed_steps} of {options.steps} steps computed, {seconds:.2f} s")
    print(handle.stats.summary())


def _evaluate(options) -> None:
    from lesa.evaluation import evaluate
    from lesa_kernels import FusedKANPredictor

    predictors = {}
    for source in options.predictor:
        label = Path(source).name if Path(source).name not in predictors else source
        predictors[label] = FusedKANPredictor.from_pretrained(source)
    pipe = _load_pipeline(options)
    evaluation = evaluate(
        pipe,
        _read_inputs(pipe, options),
        {label: predictor.to(pipe.transformer.device) for label, predictor in predictors.items()},
        against=options.against,
        num_inference_steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        out_dir=options.out,
        search_samples=options.search_samples,
    )
    _report(evaluation, options.out)


def _report_page(options) -> None:
    from lesa.reporting import report

    print(f"Wrote {report(options.evaluation, options.out)}")


def _estimate(options) -> None:
    from lesa.estimation import estimate

    found = estimate(
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


def _env(options) -> None:
    from lesa_kernels.env_report import main as report

    report()


def _report(evaluation, folder: Path) -> None:
    print(f"\n{evaluation.table()}\n\nWrote {folder / 'comparison.png'} and {folder / 'summary.json'}")


def _quiet_diffusers() -> None:
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _device(options) -> str:
    import torch

    if options.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:  # torch's own words for what is wrong with it, on their first line
        raise _fail(f"argument --device: torch can't use {options.device!r}: {str(error).splitlines()[0]}") from None
    return options.device


def _load_pipeline(options):
    import torch

    from lesa.models import adapter_for
    from lesa.pipelines import load_pipeline

    _quiet_diffusers()
    model = options.model
    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise _fail(f"argument --model: there is no folder {model!r}, and a hub id has the form 'user/name'.")
    device = _device(options)
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases call it `dtype`; all know the older name
        try:
            pipe = load_pipeline(model, torch_dtype=getattr(torch, dtype))
        except OSError as error:
            if Path(model).is_dir():
                raise
            raise _fail(f"argument --model: there is no folder {model!r}, and of the hub: {error}") from None
    adapter_for(pipe)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _read_inputs(pipe, options) -> list[dict]:
    """The file's inputs, with tensors where the pipeline is and floating ones in its dtype."""
    import inspect

    import torch

    from lesa.inputs import check_inputs, read_inputs

    inputs = _prompts(pipe, check_inputs(read_inputs(options.inputs)))
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted({name for arguments in inputs for name in arguments} - set(known))
    if unknown:
        raise _fail(f"argument --inputs: {type(pipe).__name__} knows no {', '.join(unknown)}. Remove it from the file.")
    device, dtype = pipe.transformer.device, pipe.transformer.dtype

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return [{name: placed(value) for name, value in arguments.items()} for arguments in inputs]


def _prompts(pipe, inputs: list[dict]) -> list[dict]:
    """The inputs; refuses prompts that the pipeline has no encoder for."""
    absent = [name for name, part in pipe.components.items() if name.startswith("text_encoder") and part is None]
    if absent and any(arguments.get("prompt") is not None for arguments in inputs):
        raise _fail(
            f"this model has no text encoder ({', '.join(absent)}) for prompts. Pass their embeddings by --inputs, a "
            "safetensors file with prompt_embeds and pooled_prompt_embeds."
        )
    return inputs


def _numbers(kind, name):
    def parse(text: str):
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {name}, but got {text!r}") from None

    return parse


def _schedule(text: str):
    steps = _numbers(int, "an interval such as 7, or computed steps such as 0,2,6,12")(text)
    if len(steps) == 1 and steps[0] < 1:
        raise argparse.ArgumentTypeError(f"must be an interval of at least 1, but got {text!r}")
    if len(steps) > 1 and (steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:]))):
        raise argparse.ArgumentTypeError(f"must be rising steps that start with 0, but got {text!r}")
    return steps[0] if len(steps) == 1 else list(steps)


def _lengths(text: str):
    lengths = _numbers(int, "an integer, or one per stage such as 4,6,8")(text)
    return lengths[0] if len(lengths) == 1 else lengths


def _stage_bounds(text: str):
    parse = _numbers(float, "falling noise levels such as 0.67,0.33, or auto")
    return text if text == "auto" else parse(text)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, but got {text!r}")
    return value


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, but got {text!r}")
    return value


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, but got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lesa", description="Learned feature forecasting for diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"lesa {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name, function, text, resumes=False):
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=function, resumes=resumes)
        return sub

    def placed(sub):
        sub.add_argument("--device", help="such as cuda or cpu (default: cuda if there is one)")

    def model(sub, inputs_required=True, as_recorded=False):
        sub.add_argument("--model", required=True, help="folder or hub id of a diffusers pipeline")
        target = sub if inputs_required else sub.add_mutually_exclusive_group(required=True)
        text = "prompts in a .jsonl file, or pipeline arguments in a .safetensors file"
        target.add_argument("--inputs", required=inputs_required, type=Path, metavar="FILE", help=text)
        if not as_recorded:
            sub.add_argument("--steps", type=_positive, default=50, help="denoising steps (default: 50)")
            sub.add_argument("--seed", type=_natural, default=0, help="sample i has this + i (default: 0)")
        placed(sub)
        dtypes = ("float32", "bfloat16", "float16")
        sub.add_argument("--dtype", choices=dtypes, help="of the model (default: float32 on a CPU, else bfloat16)")
        return target

    sub = command("demo", _demo, "draw with a bundled model and its predictors, and compare")
    models = "digits: a FLUX model (default); photos: a Qwen-Image model with guidance"
    sub.add_argument("--model", choices=("digits", "photos"), default="digits", help=models)
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results (default: demo-out)")
    choice.add_argument("--export", type=Path, metavar="DIR", help="instead, write the model and its inputs to DIR")

    sub = command("record", _record, "record what a model computes, to train a predictor on", resumes=True)
    model(sub)
    sub.add_argument("--out", required=True, type=Path, help="folder for the trajectories")
    sub.add_argument("--tokens-per-sample", type=_positive, help="keep a random subset of the image tokens")
    sub.add_argument("--batch-size", type=_positive, default=1, help="samples per pipeline call (default: 1)")

    sub = command("train", _train, "train a predictor on recorded trajectories", resumes=True)
    sub.add_argument("--trajectories", required=True, type=Path, help="folder that `lesa record` wrote")
    sub.add_argument("--out", required=True, type=Path, help="folder for the predictor")
    text = "computed steps such as 0,2,6,12, or an interval such as 7 (default: nine spread steps)"
    sub.add_argument("--schedule", type=_schedule, help=text)
    text = "how many steps to compute; which ones is searched, in the place of --schedule"
    sub.add_argument("--budget", type=_positive, help=text)
    sub.add_argument("--mixer", choices=("newton", "dense"), help="kind of predictor (default: newton)")
    sub.add_argument("--rank", type=_natural, help="of newton's linear residual, 0 for none (default: 32)")
    sub.add_argument("--hidden", type=_positive, help="spline units (default: 64 for newton, 256 for dense)")
    text = "features that are looked back on, one number or one per stage (default: 4; for dense 4,6,8)"
    sub.add_argument("--history-length", type=_lengths, help=text)
    text = "noise levels between the stages, or auto to have them found (default: 0.67,0.33)"
    sub.add_argument("--stage-bounds", type=_stage_bounds, help=text)
    sub.add_argument("--epochs", type=_positive, help="passes over the trajectories (default: 60)")
    sub.add_argument("--controlled", action="store_true", help="train for `lesa generate --tolerance`")
    sub.add_argument("--seed", type=_natural, default=0, help="of the training (default: 0)")
    placed(sub)

    sub = command("refine", _refine, "train a predictor further on where its own forecasts lead", resumes=True)
    model(sub, as_recorded=True)
    sub.add_argument("--predictor", required=True, help="folder that `lesa train` wrote")
    sub.add_argument("--trajectories", required=True, type=Path, help="folder that `lesa record` wrote of this model")
    sub.add_argument("--out", required=True, type=Path, help="folder for the refined predictor")
    sub.add_argument("--rounds", type=_positive, default=2, help="how often to roll out and train (default: 2)")
    sub.add_argument("--epochs", type=_positive, default=20, help="passes over the trajectories a round (default: 20)")
    sub.add_argument("--batch-size", type=_positive, default=1, help="samples per pipeline call (default: 1)")
    sub.add_argument("--seed", type=_natural, default=0, help="of the training (default: 0)")

    sub = command("generate", _generate, "generate pictures with most steps predicted")
    source = model(sub, inputs_required=False)
    source.add_argument("--prompt", help="what to draw")
    sub.add_argument("--predictor", required=True, help="folder or hub id of a predictor")
    text = "computed steps such as 0,2,6,12, or an interval such as 7 (default: as the predictor was trained)"
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--schedule", type=_schedule, help=text)
    text = "choose the steps by their errors: which part of the trained schedule's is aimed at, such as 1"
    which.add_argument("--tolerance", type=_above_zero, metavar="X", help=text)
    sub.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture; several are numbered")
    sub.add_argument("--height", type=_positive, help="in pixels")
    sub.add_argument("--width", type=_positive, help="in pixels")

    text = "compare predictors with the full run, fewer steps and other caches"
    sub = command("evaluate", _evaluate, text, resumes=True)
    model(sub)
    text = "folder or hub id of a predictor; may be given several times"
    sub.add_argument("--predictor", required=True, action="append", help=text)
    text = (
        "steps, taylorseer, first-block-cache, mag-cache and cache-dit, joined by commas; each also as NAME-N, for a "
        "budget of N computed steps (default: steps,taylorseer)"
    )
    sub.add_argument("--against", type=lambda value: value.split(","), default=["steps", "taylorseer"], help=text)
    sub.add_argument("--batch-size", type=_positive, help="samples per pipeline call (default: all)")
    text = "samples with which the best settings of other caches are searched (default: 4)"
    sub.add_argument("--search-samples", type=_positive, default=4, help=text)
    sub.add_argument("--out", required=True, type=Path, help="folder for the results")

    sub = command("report", _report_page, "make one HTML page of what `lesa evaluate` wrote")
    sub.add_argument("--evaluation", required=True, type=Path, metavar="DIR", help="folder that `lesa evaluate` wrote")
    sub.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in that folder)")

    sub = command("estimate", _estimate, "say what predicting most steps would save, without running anything")
    text = "flux-1024, qwen-image-1328, hunyuan-video-480p, hunyuan-video-720p, sd3-1024, a folder, or a cached hub id"
    sub.add_argument("--model", required=True, help=text)
    for name in ("height", "width", "frames"):
        sub.add_argument(f"--{name}", type=_positive, help="of a sample" + (", in pixels" if name != "frames" else ""))
    sub.add_argument("--steps", type=_positive, default=50, help="denoising steps (default: 50)")
    text = "computed steps such as 0,2,6,12, or an interval such as 7 (default: nine spread steps)"
    sub.add_argument("--schedule", type=_schedule, help=text)
    sub.add_argument("--predictor", type=Path, help="folder of a predictor (default: as `lesa train` makes them)")
    sub.add_argument("--device", default="H100", help="A100, H100, H200, B200 or RTX4090, by datasheet (default: H100)")
    sub.add_argument("--bandwidth", type=float, help="of another device's memory, GB/s")
    sub.add_argument("--tflops", type=float, help="of another device's dense products")
    sub.add_argument("--efficiency", type=float, default=0.5, help="part of these that is reached (default: 0.5)")
    sub.add_argument("--step-seconds", type=float, help="what a computed step takes, if it was measured")
    sub.add_argument("--batch-size", type=_positive, default=1, help="samples per call (default: 1)")
    types = ("bfloat16", "float16", "float32")
    sub.add_argument("--dtype", choices=types, default="bfloat16", help="of the features (default: bfloat16)")
    sub.add_argument("--text-tokens", type=_natural, help="per sample (default: as the model's pipeline pads them)")
    sub.add_argument("--streams", type=_positive, help="transformer calls per step (default: as the model is used)")
    sub.add_argument("--images-per-day", type=float, help="samples a day, to say how many GPU-hours are saved")
    sub.add_argument("--price", type=float, help="of a GPU-hour, to say how much money is saved")
    sub.add_argument("--json", action="store_true", help="print JSON")

    command("env", _env, "print the versions and devices to put into a bug report")
    return parser
