"""Fits a small pipeline again and again, and kills it at random moments; as a program.

`python interrupted_fits.py FOLDER KILLS SEED` prints one JSON line. The process imports everything once and starts a
copy of itself for each call of `lesa.fit`. Nothing runs on other threads, so that it can be copied.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import lesa
import small_pipelines as small
from lesa.fitting import whole
from lesa.fitting.amounts import Amounts, EndToEndAmounts
from lesa.training import schedule_search

CASE, STEPS, BUDGET = small.ALL["flux"], 6, 3
FEW = Amounts(
    samples=2,
    first_samples=2,
    most_samples=4,
    updates=6,
    round_updates=4,
    rounds=2,
    gain=-1e9,
    validation_samples=2,
    test_samples=2,
)
FEW_END_TO_END = EndToEndAmounts(schedule_updates=2, updates=2, batch_size=2, moves=2, trial_samples=2)
OPTIONS = {"num_inference_steps": STEPS, "batch_size": 2, "progress": False}


def make_quick(set_attribute):
    """Lets fits record and train little."""
    set_attribute(whole.defaults, "AMOUNTS", FEW)
    set_attribute(whole.defaults, "END_TO_END", FEW_END_TO_END)
    set_attribute(schedule_search, "BRIEF_UPDATES", 6)


def inputs(case=CASE, count=3):
    generator, made = torch.Generator().manual_seed(5), []
    for _ in range(count):
        item = case.inputs(1)
        embeddings = {name: torch.randn(item[name].shape, generator=generator) for name in item if "embeds" in name}
        made.append({**item, **embeddings})
    return made


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def started(pipe, folder):
    """The number of a process that fits into the folder."""
    child = os.fork()
    if child == 0:
        try:
            lesa.fit(pipe, inputs(), budget=BUDGET, out_dir=folder, **OPTIONS)
            os._exit(0)
        except BaseException as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            os._exit(1)
    return child


def ended(child, seconds):
    """Kills the process after so many seconds; returns whether it had ended by itself before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return not os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(folder, kills, seed):
    torch.set_num_threads(1)
    make_quick(setattr)
    pipe, folder, chosen = CASE.build(), Path(folder), random.Random(seed)
    start = time.monotonic()
    os.waitpid(started(pipe, folder / "whole"), 0)
    seconds, wanted = time.monotonic() - start, files_in(folder / "whole")
    killed, same, calls = 0, [], 0
    while killed < kills:
        place = folder / f"killed-{len(same)}"
        while True:  # the time grows, so that some call comes to its end on a busy machine too
            calls += 1
            if ended(started(pipe, place), chosen.uniform(0, seconds * (0.15 + calls / 100))):
                break
            killed += 1
        same.append(files_in(place) == wanted)
    print(json.dumps({"killed": killed, "same": same, "files": sorted(wanted), "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
