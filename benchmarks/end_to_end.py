"""How much of the saved work becomes saved time: `python benchmarks/end_to_end.py`.

A FLUX transformer of about 100 M parameters with random weights makes 1024 image tokens in 50 steps through
`diffusers.FluxPipeline`: in full, with a newton predictor, and with diffusers' TaylorSeer lite. Random weights draw
nothing, but they cost the same time as trained ones. Each run's time speed-up is set against its computed-step
speed-up: 1 would mean that a predicted step is free.
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from shapes import FLUX_100M, FLUX_TINY
from tqdm import tqdm

import lesa
from lesa.contenders.taylorseer import TaylorSeer
from lesa.demo.digits import build_pipeline
from lesa.demo.run import SCHEDULES
from lesa.models import adapter_for
from lesa.schedule import Schedule
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.env_report import env_report

NUM_STEPS = 50
TAYLORSEER = TaylorSeer(interval=7, order=1, lite=True)
REFERENCE = "full"


def build(model, device: str, dtype: torch.dtype):
    """The pipeline with random weights, and its arguments but for the number of steps."""
    torch.manual_seed(0)
    pipe = build_pipeline(FluxTransformer2DModel(**model.transformer_config()).to(device, dtype).eval())
    # The latents have 16 channels, which the 1-channel autoencoder never sees: the pipeline returns them as they are.
    pipe.set_progress_bar_config(disable=True)
    side = round(model.image_tokens**0.5) * 2 * pipe.vae_scale_factor
    arguments = {
        "prompt_embeds": torch.randn(1, model.text_tokens, model.text_dim).to(device, dtype),
        "pooled_prompt_embeds": torch.randn(1, model.text_dim).to(device, dtype),
        "height": side,
        "width": side,
        "output_type": "latent",
    }
    return pipe, arguments


@contextmanager
def taylorseer(pipe):
    """diffusers' own cache, switched on for a while."""
    pipe.transformer.enable_cache(TAYLORSEER.config(pipe.transformer.dtype))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def counted(pipe):
    """Counts in a list how often the blocks really run."""
    calls = []
    hook = adapter_for(pipe).counted_module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def timed_run(pipe, arguments: dict, steps: int) -> tuple[float, int]:
    """Seconds of one pipeline call, and how many of its steps were computed."""
    with counted(pipe) as calls:
        _synchronise(pipe)
        start = time.perf_counter()
        images = pipe(**arguments, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0)).images
        _synchronise(pipe)
        seconds = time.perf_counter() - start
    if not torch.isfinite(images).all():
        raise RuntimeError("The pipeline returned values that are not finite, so its time means nothing.")
    return seconds, len(calls)


def measure(pipe, arguments: dict, schedule: Schedule, repeats: int) -> dict[str, dict]:
    """Seconds of each repeat and the number of computed steps, by run. Every repeat begins with another run."""
    steps = schedule.num_inference_steps
    predictor = FusedKANPredictor(PredictorConfig(pipe.transformer.inner_dim, rank=32))
    predictor.to(pipe.transformer.device)
    contenders = {
        REFERENCE: nullcontext,
        f"newton-{len(schedule)}": lambda: lesa.enable_cache(pipe, predictor, schedule),
        str(TAYLORSEER): lambda: taylorseer(pipe),
    }
    results = {name: {"seconds": []} for name in contenders}
    timed_run(pipe, arguments, 2)  # the first call is always slow
    names = list(results)
    with tqdm(total=len(names) * repeats, unit="run") as bar:
        for repeat in range(repeats):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                bar.set_description(name)
                with contenders[name]():
                    seconds, computed = timed_run(pipe, arguments, steps)
                results[name]["seconds"].append(seconds)
                results[name]["computed_steps"] = computed
                bar.update()
    return results


def add_ratios(results: dict[str, dict], steps: int) -> None:
    """Adds each run's speed-ups, repeat by repeat against the full run of the same repeat."""
    for name, run in results.items():
        run["num_inference_steps"] = steps
        if name == REFERENCE:
            continue
        speedups = [full / own for full, own in zip(results[REFERENCE]["seconds"], run["seconds"])]
        run["step_speedup"] = steps / run["computed_steps"]
        run["time_speedup"] = _spread(speedups)
        run["time_over_step_speedup"] = _spread([s / run["step_speedup"] for s in speedups])


def print_table(results: dict[str, dict]) -> None:
    """One line per run."""
    width = max(map(len, results))
    print(f"{'run':<{width}}  computed  seconds  time speed-up  over step speed-up: median (min to max)")
    for name, run in results.items():
        line = f"{name:<{width}}  {run['computed_steps']:>8}  {statistics.median(run['seconds']):>7.2f}"
        if name != REFERENCE:
            ratio = run["time_over_step_speedup"]
            line += f"  {run['time_speedup']['median']:>12.2f}x"
            line += f"  {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
        print(line)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="how often each run is timed, in turns (default: 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 20 steps, to see that the script works")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, but got {options.repeats}")

    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    model = FLUX_TINY if options.quick else FLUX_100M
    schedule = Schedule.spread(4, 20) if options.quick else Schedule(SCHEDULES[9], NUM_STEPS)
    pipe, arguments = build(model, options.device, dtype)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    print(f"{model}: {parameters / 1e6:.1f} M parameters, {model.image_tokens} image tokens, {options.device}, {dtype}")
    results = measure(pipe, arguments, schedule, options.repeats)
    add_ratios(results, schedule.num_inference_steps)
    print_table(results)
    if options.out is not None:
        report = {
            "model": {"name": str(model), "parameters": parameters, "image_tokens": model.image_tokens},
            "device": options.device,
            "dtype": str(dtype).removeprefix("torch."),
            "schedule": list(schedule.steps),
            "repeats": options.repeats,
            "runs": [{"name": name, **run} for name, run in results.items()],
            "environment": env_report(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {options.out}")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _synchronise(pipe) -> None:
    if pipe.transformer.device.type != "cpu":
        torch.accelerator.synchronize(pipe.transformer.device)


if __name__ == "__main__":
    main()
