"""Finished parts of an evaluation on disk, to resume from."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import diffusers
import numpy as np
import torch

import lesa_kernels
from lesa.artifacts import digest, fingerprint
from lesa.evaluation.result import REFERENCE, EvaluatedRun, Outcome, file_name


class Store:
    """What is finished, in `runs/` of the output folder; each file says what it was made from."""

    def __init__(self, out_dir, pipe, adapter, inputs, seed, batch_size, num_inference_steps):
        self.folder = None if out_dir is None else Path(out_dir) / "runs"
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        transformer = adapter.transformer
        facts = {**facts_of(pipe, inputs, seed, batch_size), "steps": num_inference_steps}
        self._key = digest(
            [facts, fingerprint(transformer), digest(inputs), dict(pipe.scheduler.config), type(pipe).__name__]
        )

    def read(self, name: str, more: str, with_outcome: bool):
        """The run, its images, the noise levels, and the outcome if it is needed; or None."""
        file, arrays = self._files(name)
        if file is None or not file.exists() or not arrays.exists():
            return None
        contents = json.loads(file.read_text())
        if contents["key"] != digest([self._key, more]):
            return None
        values = contents["run"]
        run = EvaluatedRun(**{**values, "steps": tuple(values["steps"])})
        with np.load(arrays) as stored:
            images, outcome = stored["pictured"], None
            if with_outcome:
                batches = range(contents["batches"])
                outcome = Outcome(
                    [stored[f"latents-{i}"] for i in batches],
                    [stored[f"images-{i}"] for i in batches],
                    [list(stored[f"trajectory-{i}"]) for i in batches],
                    run.steps,
                    (run.whole_steps, run.step_equivalents, run.block_passes),
                    run.seconds,
                    run.denoise_seconds,
                    run.peak_memory_bytes,
                )
        return run, images, contents["sigmas"], outcome

    def write(self, name: str, more: str, run: EvaluatedRun, images: np.ndarray, sigmas, outcome: Outcome) -> None:
        """Keeps a run; of the reference all that others are compared with."""
        file, arrays = self._files(name)
        if file is None:
            return
        values = {"pictured": images}
        if run.contender == REFERENCE:
            for number in range(len(outcome.latents)):
                values[f"latents-{number}"] = outcome.latents[number]
                values[f"images-{number}"] = outcome.images[number]
                values[f"trajectory-{number}"] = np.array(outcome.trajectories[number])
        part = arrays.with_suffix(".part.npz")
        np.savez(part, **values)
        part.replace(arrays)
        contents = {"key": digest([self._key, more]), "batches": len(outcome.latents), "sigmas": sigmas}
        write_whole(file, json.dumps({**contents, "run": asdict(run)}))  # Python's JSON knows Infinity and NaN

    def read_search(self, peer: str, samples: int) -> dict:
        """By setting, the figures of the search with so many samples."""
        file, _ = self._files(f"search {peer}")
        if file is None or not file.exists():
            return {}
        contents = json.loads(file.read_text())
        return contents["figures"] if contents["key"] == digest([self._key, samples]) else {}

    def write_search(self, peer: str, samples: int, figures: dict) -> None:
        """Keeps the figures of the search so far."""
        file, _ = self._files(f"search {peer}")
        if file is not None:
            write_whole(file, json.dumps({"key": digest([self._key, samples]), "figures": figures}))

    def _files(self, name: str):
        if self.folder is None:
            return None, None
        name = file_name(name)
        return self.folder / f"{name}.json", self.folder / f"{name}.npz"


def write_whole(file: Path, text: str) -> None:
    """So that an interruption leaves the old file or the new one."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def facts_of(pipe, inputs, seed, batch_size) -> dict:
    transformer = pipe.transformer
    device = transformer.device
    parameters = sum(p.numel() for p in transformer.parameters())
    return {
        "model": f"{type(pipe).__name__}, {type(transformer).__name__}, {parameters / 1e6:.1f} M parameters",
        "samples": len(inputs),
        "seed": seed,
        "batch_size": batch_size,
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "device": platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "lesa_kernels": lesa_kernels.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
