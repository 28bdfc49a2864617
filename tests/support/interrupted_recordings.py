"""Records small samples again and again, and is killed while it does so; as a program, for one process at a time.

`python interrupted_recordings.py FOLDER POINTS SEED` prints one JSON line per trial. The process imports everything
once and starts a copy of itself for each trial. It has no other threads, so that it can be copied. The copies write in
a thread, so how many calls they make varies a little.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch

import small_pipelines as small
from lesa import record
from lesa.training import shards

CASE = small.ALL["flux cfg"]
SAMPLES = 2
MOST_OPERATIONS = 21
"""On files, in one recording: locking, six files written, synchronised and renamed, and the lock removed."""
OPTIONS = {"num_inference_steps": 2, "tokens_per_sample": 7, "progress": False}


def inputs():
    generator, made = torch.Generator().manual_seed(5), []
    for _ in range(SAMPLES):
        item = CASE.inputs(1)
        embeddings = {name: torch.randn(item[name].shape, generator=generator) for name in item if "embeds" in name}
        made.append({**item, **embeddings})
    return made


def files_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


class Events:
    """Counts the calls of Python and C functions in all threads; kills the process at one of them."""

    def __init__(self, last=None):
        self.count, self.last = 0, last

    def __call__(self, frame, event, argument):
        if event in ("call", "c_call"):
            if self.count == self.last:
                killed()
            self.count += 1

    def watch(self):
        threading.setprofile(self)
        sys.setprofile(self)


def at_file_operation(number, act):
    """Calls `act` before the `number`-th operation on a file. A file that is being written is half written then."""
    done = iter(range(10**6))

    def before(owner, name, is_writing):
        function = getattr(owner, name)

        def operation(*args, **options):
            if next(done) == number:
                if is_writing:
                    function(*args, **options)
                    path = Path(args[1] if owner is shards else args[0])
                    os.truncate(path, path.stat().st_size // 2)
                act()
            return function(*args, **options)

        setattr(owner, name, operation)

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "ftruncate"), (Path, "unlink")):
        before(owner, name, is_writing=False)
    for owner, name in ((shards, "save_file"), (Path, "write_text")):
        before(owner, name, is_writing=True)


def in_a_copy(work):
    """Runs `work` in a copy of this process; returns what it says, or None if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            said = work()
        except BaseException as error:
            said = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()[-1500:]}
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


def recorded(pipe, folder, prepare=lambda: None, finish=lambda: None):
    def work():
        prepare()
        made = record(pipe, inputs(), folder, **OPTIONS)
        return {"samples": len(made.by_sample), "kept": len(made.recorded.kept), "events": finish()}

    return work


def limited(size):
    """Lets each write beyond this size of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def main(folder, points, seed):
    torch.set_num_threads(1)
    pipe, folder = CASE.build(), Path(folder)
    events = Events()
    counted = recorded(pipe, folder / "counted", events.watch, lambda: events.count)
    total = in_a_copy(counted)["events"]
    in_a_copy(recorded(pipe, folder / "whole"))
    whole = files_in(folder / "whole")

    trials = {}
    for number, point in enumerate(sorted(random.Random(seed).sample(range(round(0.97 * total)), points))):
        trials[f"event {number}"] = Events(point).watch
    for number in range(MOST_OPERATIONS):
        trials[f"file {number}"] = lambda number=number: at_file_operation(number, killed)
    for size in (0, 60, 2000, 4000, 5000):
        trials[f"full {size}"] = lambda size=size: limited(size)

    for name, prepare in trials.items():
        place = folder / name.replace(" ", "-")
        said = in_a_copy(recorded(pipe, place, prepare))
        left = files_in(place)
        again = in_a_copy(recorded(pipe, place))
        kept = all(left[file] == whole[file] for file in left if file in whole)
        facts = {"trial": name, "said": said, "left": sorted(left), "kept": kept, "again": again}
        print(json.dumps({**facts, "same": files_in(place) == whole}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
