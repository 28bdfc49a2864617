"""What recording costs: `python benchmarks/recording.py`.

The FLUX transformer of `end_to_end.py` makes samples through `diffusers.FluxPipeline`, without lesa and while
`lesa.record` keeps what it computes. The two are timed in turns, and each ratio is of one pair. On a machine whose
speed varies, the ratios vary by more than recording costs. So there are two other figures. One is the ratio of the
processor's time, which includes the thread that writes and on a GPU means nothing. The other is the time of each part
of a recording: what is kept of each computed step, what is done once, and how long the pipeline waits for the thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from end_to_end import NUM_STEPS, build
from floors import synchronise
from shapes import FLUX_100M, FLUX_TINY
from tqdm import tqdm

import lesa
from lesa.pipelines import run_pipeline
from lesa.training import recording
from lesa.training.recorder import Recorder
from lesa.training.recording import Recording
from lesa.training.writing import BackgroundWriter
from lesa_kernels.env_report import env_report

PARTS = {
    "what is kept of the steps": (Recorder, "keep"),
    "wait for the last copies": (Recorder, "finish"),
    "wait for the file before": (BackgroundWriter, "write"),
    "wait for the last file": (BackgroundWriter, "__exit__"),
    "manifest before the first sample": (Recording, "_manifest"),
    "manifest and head, written": (recording, "_begin"),
    "look at the files at the end": (recording, "Trajectories"),
    "digests and files, in the thread": (recording, "save_sample"),
}
"""What is timed of a recording. The thread works while the pipeline runs."""


@contextmanager
def timed_parts():
    """The seconds of each part, by name."""
    seconds: dict[str, float] = defaultdict(float)

    def timing(name, function):
        def timed(*args, **options):
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[name] += time.perf_counter() - start

        return timed

    with ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, attribute, timing(name, getattr(owner, attribute))))
        yield seconds


def measure(pipe, arguments: dict, samples: int, steps: int, tokens: int | None, repeats: int) -> dict:
    """Seconds of runs without and with recording, which take turns in being first, and of the parts of a recording."""
    arguments = {name: value for name, value in arguments.items() if name != "output_type"}
    device = pipe.transformer.device

    def plain():
        for seed in range(samples):
            run_pipeline(pipe, dict(arguments), [torch.Generator("cpu").manual_seed(seed)], steps)

    def recorded():
        with tempfile.TemporaryDirectory(dir=".") as folder, timed_parts() as parts:
            lesa.record(pipe, [arguments] * samples, folder, steps, tokens, progress=False)
        found["parts"].append({name: parts[name] for name in PARTS})

    found: dict[str, list] = {name: [] for name in ("plain", "recorded", "plain_cpu", "recorded_cpu", "parts")}
    run_pipeline(pipe, dict(arguments), [torch.Generator("cpu")], 1)  # the first call is always slow
    for repeat in tqdm(range(repeats), unit="pair"):
        pair = [("plain", plain), ("recorded", recorded)]
        for name, run in pair if repeat % 2 == 0 else pair[::-1]:
            synchronise(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            synchronise(device)
            found[name].append(time.perf_counter() - start)
            found[f"{name}_cpu"].append(time.process_time() - start_cpu)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="number of pairs of runs (default: 3)")
    parser.add_argument("--samples", type=int, default=2, help="number of samples in each run (default: 2)")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"of each sample (default: {NUM_STEPS})")
    parser.add_argument("--tokens", type=int, help="how many tokens of each sample are kept (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that the script works")
    options = parser.parse_args(argv)

    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    model = FLUX_TINY if options.quick else FLUX_100M
    pipe, arguments = build(model, options.device, dtype)
    found = measure(pipe, arguments, options.samples, options.steps, options.tokens, options.repeats)
    ratios = {of: [a / b for a, b in zip(found[f"recorded{of}"], found[f"plain{of}"])] for of in ("", "_cpu")}
    kept = options.tokens or model.image_tokens
    print(f"{model}, {options.samples} samples of {options.steps} steps, {kept} tokens kept, {options.device}, {dtype}")
    for what, each in zip(("time", "processor time"), ratios.values()):
        print(f"{what}, recorded over plain: {statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})")
    for name in PARTS:
        seconds = statistics.median(parts[name] for parts in found["parts"])
        print(f"{name:<33} {seconds:8.4f} s, {seconds / statistics.median(found['plain']):.2%} of a plain run")
    if options.out is not None:
        report = {"model": str(model), "ratios": ratios[""], **found, "environment": env_report()}
        report |= {name: getattr(options, name) for name in ("samples", "steps", "tokens", "device")}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
