"""Small recordings, refinements and evaluations in several processes that share one folder.

`python several_processes.py FOLDER KILLS SEED` prints one JSON line per check. The process imports everything once and
starts copies of itself with the environment that `torchrun` gives. Nothing runs on other threads, so that it can be
copied.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

import small_pipelines as small
from interrupted_recordings import Events, at_file_operation, files_in, killed
from lesa import evaluate, processes, record, refine, train

CASE = small.ALL["flux"]
SAMPLES = 5
STEPS = 5
TIME_LIMIT_S = 60
OPERATIONS = (17, 6)
"""On files, in a recording by two processes: of the first, which writes three samples, and of the second."""
OPTIONS = {"num_inference_steps": STEPS, "tokens_per_sample": 5, "progress": False}
TRAINING = {"epochs": 2, "batch_size": 2, "progress": False}


def inputs(count=SAMPLES):
    generator, made = torch.Generator().manual_seed(5), []
    for _ in range(count):
        item = CASE.inputs(1)
        made.append({**item, **{n: torch.randn(item[n].shape, generator=generator) for n in item if "embeds" in n}})
    return made


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Copies:
    """Copies of this process that do the same work.

    Args:
        count: how many.
        work: `work(rank)` gives what each of them says.
    """

    def __init__(self, count, work):
        self.count, port = count, free_port()
        self.readers, self.numbers = [], []
        for rank in range(count):
            reading, writing = os.pipe()
            number = os.fork()
            if number == 0:
                os.close(reading)
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
                if count > 1:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
                try:
                    said = work(rank)
                except BaseException as error:
                    facts = {"error": type(error).__name__, "message": str(error)}
                    said = {**facts, "trace": traceback.format_exc()[-2000:]}
                os.write(writing, json.dumps(said).encode())
                os.close(writing)
                os._exit(0)
            os.close(writing)
            self.readers.append(os.fdopen(reading, "rb"))
            self.numbers.append(number)

    def said(self, stop_after=TIME_LIMIT_S):
        """What each of them said; None of one that was killed.

        Args:
            stop_after: seconds after which those that still run are killed, from when the first was.
        """
        left, until = {*range(self.count)}, time.monotonic() + TIME_LIMIT_S
        while left:
            for rank in [*left]:
                number, status = os.waitpid(self.numbers[rank], os.WNOHANG)
                if number:
                    left.remove(rank)
                    if os.WIFSIGNALED(status):
                        until = min(until, time.monotonic() + stop_after)
            if time.monotonic() > until:
                for rank in left:
                    os.kill(self.numbers[rank], signal.SIGTERM)
                    os.waitpid(self.numbers[rank], 0)
                left.clear()
            time.sleep(0.005)
        texts = [reader.read() for reader in self.readers]
        return [json.loads(text) if text else None for text in texts]


def recorded(pipe, folder, batch_size=1, prepare=lambda rank: None, finish=lambda: None):
    def work(rank):
        prepare(rank)
        made = record(pipe, inputs(), folder, batch_size=batch_size, **OPTIONS)
        facts = made.recorded
        return {"samples": len(made), "kept": len(facts.kept), "new": len(facts.new), "events": finish()}

    return work


def everything(pipe, folder):
    """Records, trains, refines and evaluates, as each of the processes does it."""

    def work(rank):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            trajectories = record(pipe, inputs(), folder / "recording", batch_size=2, **OPTIONS)
            trained = train(trajectories, schedule=[0, 1, 3], out_dir=folder / "trained", **TRAINING)
            options = {"out_dir": folder / "refined", "rounds": 2, "samples_per_call": 2}
            refined = refine(trained, trajectories, pipe, inputs(), **options, **TRAINING)
            against = ["steps", "linear", "mag-cache-3"]
            more = {"num_inference_steps": STEPS, "batch_size": 2, "search_samples": 2, "progress": False}
            made = evaluate(pipe, inputs(), {"ours": refined}, against, out_dir=folder / "evaluation", **more)
        weights = {name: value.double().sum().item() for name, value in refined.state_dict().items()}
        messages = [str(one.message) for one in warned if str(one.message).startswith("lesa: ")]
        return {"weights": weights, "summary": made.summary(), "warnings": messages}

    return work


def failing(pipe, folder, count):
    """The last of the processes cannot run its samples."""

    def work(rank):
        if rank == count - 1:

            def fail(*_):
                raise ValueError("this process cannot go on")

            pipe.transformer.register_forward_pre_hook(fail)
        record(pipe, inputs(), folder, **OPTIONS)

    return work


def different(pipe, folder):
    """Each of the processes has a seed of its own."""
    return lambda rank: record(pipe, inputs(), folder, seed=rank, **OPTIONS) and None


def unlike(pipe, folder):
    """By what differs in the second process, work that all must refuse."""
    options = {"num_inference_steps": STEPS, "batch_size": 1, "progress": False}

    def evaluated(**more):
        evaluate(pipe, inputs(2), [], ["steps-3"], **options, **more)

    def weights(rank):
        if rank == 1:
            pipe.transformer.proj_out.weight.data.mul_(1.3)
        evaluated()

    def trained(rank):
        trajectories = record(pipe, inputs(2), folder / "recording", **OPTIONS)
        place = folder / "trained" if rank == 0 else None
        train(trajectories, schedule=[0, 1, 3], out_dir=place, **TRAINING)

    def refined(rank):
        trajectories = record(pipe, inputs(2), folder / "recording", **OPTIONS)
        predictor = train(trajectories, schedule=[0, 1, 3], **TRAINING)
        place = folder / "refined" if rank == 0 else None
        refine(predictor, trajectories, pipe, inputs(2), out_dir=place, rounds=1, **TRAINING)

    def stages(rank):
        trajectories = record(pipe, inputs(2), folder / "recording", **OPTIONS)
        train(trajectories, schedule=[0, 1, 3], find_stages=rank == 1, **TRAINING)

    return {
        "transformer": weights,
        "out_dir of evaluate": lambda rank: evaluated(out_dir=folder / "evaluated" if rank == 0 else None),
        "out_dir of train": trained,
        "out_dir of refine": refined,
        "find_stages": stages,
        "function": lambda rank: evaluated() if rank else record(pipe, inputs(2), folder / "recording", **OPTIONS),
    }


def late(pipe, folder):
    """The second process begins too late."""

    def work(rank):
        processes.LATE_S = 0.2
        if rank == 1:
            time.sleep(0.6)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            record(pipe, inputs(1), folder, **OPTIONS)
        return [str(one.message) for one in warned if str(one.message).startswith("lesa: ")]

    return work


def kills(pipe, folder, whole, count, seed):
    """One of two processes is killed somewhere; then one or three go on."""
    events, chosen = Events(), random.Random(seed)
    counting = recorded(
        pipe, folder / "counted", prepare=lambda rank: sys.setprofile(events), finish=lambda: events.count
    )
    total = Copies(1, counting).said()[0]["events"]
    for number in range(count):
        victim, is_at_file = number % 2, number % 3 < 2
        point = chosen.randrange(OPERATIONS[victim]) if is_at_file else chosen.randrange(total // 2)
        place = folder / f"killed-{number}"

        def prepare(rank, point=point, victim=victim, is_at_file=is_at_file):
            if rank == victim and is_at_file:
                at_file_operation(point, killed)
            elif rank == victim:
                sys.setprofile(Events(point))

        # Where the processes have met, the other one notices it by itself. `torchrun` would not wait for that.
        said = Copies(2, recorded(pipe, place, prepare=prepare)).said(stop_after=10 if is_at_file else 0)
        left = files_in(place)
        kept = all(left[file] == whole[file] for file in left if file in whole)
        again = Copies(1 + number % 2 * 2, recorded(pipe, place)).said()
        facts = {"check": "kill", "victim": victim, "at": "file" if is_at_file else "event", "kept": kept}
        yield {**facts, "said": said, "left": sorted(left), "again": again, "same": files_in(place) == whole}


def main(folder, count, seed):
    torch.set_num_threads(1)
    pipe, folder = CASE.build(), Path(folder)
    for number in (1, 2):
        said = Copies(number, everything(pipe, folder / f"of-{number}")).said()
        print(json.dumps({"check": "everything", "count": number, "said": said}), flush=True)
    said = Copies(3, failing(pipe, folder / "failing", 3)).said()
    print(json.dumps({"check": "failing", "said": said}), flush=True)
    print(
        json.dumps({"check": "different", "said": Copies(2, different(pipe, folder / "different")).said()}), flush=True
    )
    for name, work in unlike(pipe, folder / "unlike").items():
        print(json.dumps({"check": "unlike", "name": name, "said": Copies(2, work).said()}), flush=True)
    print(json.dumps({"check": "late", "said": Copies(2, late(pipe, folder / "late")).said()}), flush=True)
    Copies(1, recorded(pipe, folder / "whole")).said()
    for facts in kills(pipe, folder, files_in(folder / "whole"), count, seed):
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
