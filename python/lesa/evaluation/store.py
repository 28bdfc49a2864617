"""Finished parts of an evaluation on disk, to resume from."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

import lesa_kernels
from lesa.artifacts import digest, fingerprint, whole_file, write_text
from lesa.contenders import Reference
from lesa.contenders.base import Pipeline
from lesa.evaluation.result import EvaluatedRun, Outcome, file_name
from lesa.models.adapter import Adapter


class Store:
    """Finished runs and searches, in `runs/` of the output folder. Each file says what it was made from.

    Args:
        out_dir: the output folder. None: nothing is kept.
        pipe: the pipeline.
        adapter: of its transformer.
        inputs: dicts of pipeline arguments.
        seed: of the first input.
        batch_size: inputs per pipeline call.
        num_inference_steps: steps of the reference.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike | None,
        pipe: Pipeline,
        adapter: Adapter,
        inputs: list[dict],
        seed: int,
        batch_size: int,
        num_inference_steps: int,
    ):
        self.folder = None if out_dir is None else Path(out_dir) / "runs"
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        transformer = adapter.transformer
        facts = {**facts_of(pipe, inputs, seed, batch_size), "steps": num_inference_steps}
        scheduler = json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=repr)
        self._key = digest([facts, fingerprint(transformer), digest(inputs), scheduler, type(pipe).__name__])

    def read(
        self, name: str, more: str, with_outcome: bool
    ) -> tuple[EvaluatedRun, np.ndarray, list[float], Outcome | None] | None:
        """The run, its images, the noise levels, and the outcome if it is needed. None if it is not kept."""
        if self.folder is None:
            return None
        file, arrays = _files(self.folder, name)
        if not file.exists() or not arrays.exists():
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

    def write(
        self, name: str, more: str, run: EvaluatedRun, images: np.ndarray, sigmas: list[float], outcome: Outcome
    ) -> None:
        """Keeps a run. Of the reference it keeps everything that others are compared with."""
        if self.folder is None:
            return
        file, arrays = _files(self.folder, name)
        values: dict[str, np.ndarray] = {"pictured": images}
        if run.contender == Reference.name:
            for number in range(len(outcome.latents)):
                values[f"latents-{number}"] = outcome.latents[number]
                values[f"images-{number}"] = outcome.images[number]
                values[f"trajectory-{number}"] = np.array(outcome.trajectories[number])
        with whole_file(arrays) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **values)  # type: ignore[arg-type]  # numpy declares its other keyword first
        contents = {"key": digest([self._key, more]), "batches": len(outcome.latents), "sigmas": sigmas}
        write_text(file, json.dumps({**contents, "run": asdict(run)}))  # Python's JSON knows Infinity and NaN

    def read_search(self, peer: str, samples: int) -> dict:
        """By setting, the figures of the search with this number of samples."""
        if self.folder is None:
            return {}
        file, _ = _files(self.folder, f"search {peer}")
        if not file.exists():
            return {}
        contents = json.loads(file.read_text())
        return contents["figures"] if contents["key"] == digest([self._key, samples]) else {}

    def write_search(self, peer: str, samples: int, figures: dict) -> None:
        """Keeps the figures of the search so far."""
        if self.folder is not None:
            file, _ = _files(self.folder, f"search {peer}")
            write_text(file, json.dumps({"key": digest([self._key, samples]), "figures": figures}))


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    name = file_name(name)
    return folder / f"{name}.json", folder / f"{name}.npz"


def facts_of(pipe: Pipeline, inputs: list[dict], seed: int, batch_size: int) -> dict[str, Any]:
    """What the figures depend on, for `summary.json`: model, samples, device and versions."""
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
