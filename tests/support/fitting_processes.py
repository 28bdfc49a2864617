"""Fits a small pipeline with training through whole runs, by one process and by two; as a program.

`python fitting_processes.py FOLDER` prints one JSON line for each number of processes. The process imports everything
once and starts copies of itself. Nothing runs on other threads, so that it can be copied.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import lesa
from interrupted_fits import CASE, FEW, OPTIONS, inputs, make_quick
from lesa.fitting import whole
from lesa.fitting.comparing import LatentRuns
from several_processes import Copies


def main(folder):
    torch.set_num_threads(1)
    make_quick(setattr)
    whole.defaults.AMOUNTS = replace(FEW, rounds=0, updates=2)
    pipe, call = CASE.build(), LatentRuns._call
    for count in (1, 2):

        def work(rank, count=count):
            called = []
            LatentRuns._call = lambda self, samples, steps: called.append(samples) or call(self, samples, steps)
            options = {**OPTIONS, "batch_size": 1, "end_to_end": True, "out_dir": folder / f"of-{count}"}
            made = lesa.fit(pipe, inputs(), budget=2, **options)
            return {"schedule": made.config.schedule, "runs": len(called)}

        print(json.dumps({"count": count, "said": Copies(count, work).said()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
