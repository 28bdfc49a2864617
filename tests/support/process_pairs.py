"""Two processes on the CPU, in the places of two GPUs that share a model."""

import os
import subprocess
import sys
import time

import pytest
import torch

RANKS = 2
TIME_LIMIT_S = 200  # all cases of a file take about 20 s, much of it imports


def join(rank, folder):
    """Called in each of the processes: makes their process group."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: RANKS  # diffusers numbers the ranks' accelerators; there is none
    torch._C._get_accelerator = lambda *_: torch.device("cpu")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)


def leave(rank, folder, results):
    """Called at the end of each of them: saves what it has made."""
    torch.save(results, f"{folder}/results-{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_in_two(program, folder):
    """Runs `python program RANK FOLDER` twice. Returns what each of the processes saved."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    logs = [folder / f"log-{rank}" for rank in range(RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, program, str(rank), str(folder)]
            processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
    until = time.monotonic() + TIME_LIMIT_S
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    states = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    if states != [0] * RANKS:
        ends = "\n".join(f"--- process {rank}:\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
        pytest.fail(f"exit codes {states} after {TIME_LIMIT_S} s or less (None: was still running)\n{ends}")
    return [torch.load(folder / f"results-{rank}", weights_only=False) for rank in range(RANKS)]


class LateEvent:
    """Stands for the event of a GPU that has not come to its place when it is asked, but does so when waited for."""

    def __init__(self):
        self.waited = False

    def query(self):
        return self.waited

    def synchronize(self):
        self.waited = True


def copied_late(value, slots):
    """Stands for `copy_to_host`: the value is never there unless it is waited for."""
    return value.detach().reshape(1), LateEvent()
