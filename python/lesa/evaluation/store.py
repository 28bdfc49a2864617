"""Finished parts of an evaluation on disk, to resume from."""

import contextlib
import json
import os
import platform
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch

import lesa_kernels
from lesa.artifacts import check_same_settings, digest, fingerprint, whole_file, write_text
from lesa.conditions import common_conditions, conditions_of
from lesa.contenders import Reference
from lesa.contenders.base import Pipeline
from lesa.evaluation.result import EvaluatedRun, Outcome, file_name
from lesa.evaluation.shown import GIF, MP4, Shown
from lesa.models import adapter_for, features_device
from lesa.models.adapter import Adapter
from lesa.processes import Processes
from lesa.spread import class_of
from lesa_kernels.checks import Said, argument_error

SETTINGS_FILE = "settings.json"
"""In `runs/`: what all runs of the folder were made from."""

_DIGESTS = ("inputs", "transformer", "weights")
"""Settings that are digests; error messages do not show them."""

_FILES, _FOLDERS = ("summary.json", "runs.csv", "comparison.png", GIF, MP4), ("images", "runs")
_WRITTEN = {**dict.fromkeys(_FILES, False), **dict.fromkeys(_FOLDERS, True)}
"""What an evaluation writes into its folder, and whether it is a folder."""

REMEDY = "Choose another folder, or use the same inputs, model and settings."

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)
"""What reading a damaged file of a run raises."""


@dataclass(frozen=True)
class Kept:
    """A finished run as it is kept on disk.

    Args:
        run: its figures. Its name is the one before `lesa.evaluation.naming` makes it unique.
        shown: what is shown of it.
        sigmas: the noise levels of the reference.
        outcome: what the reference made. None where it was not asked for.
        identity: a digest of the contender's `identity()`. None if an older release wrote the file.
        key: of the settings and the contender.
    """

    run: EvaluatedRun
    shown: Shown
    sigmas: list[float]
    outcome: Outcome | None
    identity: str | None
    key: str


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
        self.settings: dict[str, Any] = {}
        self._key = ""
        if self.folder is None:
            return
        facts = facts_of(pipe, inputs, seed, batch_size)
        weights = fingerprint(adapter.transformer)
        # A list in it has another order in every process.
        scheduler = {name: value for name, value in pipe.scheduler.config.items() if name != "_use_default_values"}
        as_text = json.dumps(scheduler, sort_keys=True, default=repr)
        of_all = {**facts, "steps": num_inference_steps}
        self._key = digest([of_all, weights, digest(inputs), as_text, type(pipe).__name__])
        self.settings |= {
            "num_inference_steps": num_inference_steps,
            **facts,
            "inputs": [digest(item) for item in inputs],
            "transformer": weights,
            **conditions_of(pipe),
        }

    def check_settings(self) -> None:
        """Raises `ValueError` if the runs in the folder were made from something else. The message names it."""
        if self.folder is None or not (file := self.folder / SETTINGS_FILE).exists():
            return
        work = f"the evaluation in {self.folder.parent}"
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
            inputs, transformer, weights = list(before["inputs"]), before["transformer"], dict(before["weights"])
        except UNREADABLE as error:
            got = Said(f"{file}, which is damaged: {error}")
            raise argument_error("out_dir", "hold whole files", got, "Choose another folder, or remove it.") from None
        given = common_conditions(before, self.settings)
        check_same_settings(work, before, {n: v for n, v in given.items() if n not in _DIGESTS})
        for number, (old, new) in enumerate(zip(inputs, self.settings["inputs"])):
            if old != new:
                raise argument_error(f"inputs[{number}]", f"be as in {work}", Said("another one"), REMEDY)
        old, new = {**weights, "transformer": transformer}, {**given["weights"], "transformer": given["transformer"]}
        for name in new:
            if old[name] != new[name]:
                must = f"have the weights and adapters that it had in {work}"
                raise argument_error(f"pipe.{name}", must, Said("others"), REMEDY)

    def has_settings(self) -> bool:
        """Whether the folder says what its runs were made from."""
        return self.folder is not None and (self.folder / SETTINGS_FILE).exists()

    @contextlib.contextmanager
    def owned(self, processes: Processes) -> Iterator[None]:
        """A context in which nobody else evaluates into the output folder. The folder is made if it is absent.

        Args:
            processes: those that evaluate together.

        Raises:
            ValueError: it is a file, or something else has the name of a file or folder of an evaluation.
            RuntimeError: someone else does; the message says which process.
        """
        if self.folder is None:
            yield
            return
        processes.in_all(self._check_out_dir)
        with processes.owned(self.folder.parent, "evaluating"):
            yield

    def _check_out_dir(self) -> None:
        """Makes the output folder, or raises `ValueError` if that, or something in it, is no folder or file."""
        out_dir = cast(Path, self.folder).parent
        file = next((path for path in (out_dir, *out_dir.parents) if path.is_file()), None)
        if file is not None:
            raise argument_error("out_dir", "be a folder", Said(f"{file}, which is a file"), "Choose another path.")
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, is_folder in _WRITTEN.items():
            path = out_dir / name
            if path.exists() and path.is_dir() != is_folder:
                kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
                got = Said(f"{path}, which is {kinds[1]}")
                remedy = "Choose another folder, or remove it."
                raise argument_error("out_dir", f"have {kinds[0]} as {name}, or nothing", got, remedy)

    def open(self) -> None:
        """Writes what the runs in the folder are made from."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        file = self.folder / SETTINGS_FILE
        if not file.exists():
            write_text(file, json.dumps(self.settings, indent=2) + "\n")

    def has_other_reference(self) -> bool:
        """Whether the folder has a reference that is damaged, or was made from something else."""
        if self.folder is None or not _files(self.folder, Reference.name)[0].exists():
            return False
        return self.read([Reference.name], Reference().identity(), with_outcome=False) is None

    def read(self, names: Sequence[str], identity: str, with_outcome: bool) -> Kept | None:
        """What is kept of a contender's run; None if there is nothing.

        Args:
            names: where it may be.
            identity: the contender's.
            with_outcome: whether the outcome is needed.
        """
        if self.folder is None:
            return None
        # An older release wrote the second of these keys.
        keys = [self._key_of(digest(identity)), digest([self._key, identity])]
        for name in names:
            file, arrays = _files(self.folder, name)
            try:
                contents = json.loads(file.read_text(encoding="utf-8"))
                if contents["key"] in keys:
                    return read_run(file, arrays, with_outcome)
            except UNREADABLE:
                continue
        return None

    def write(
        self,
        name: str,
        identity: str,
        run: EvaluatedRun,
        shown: Shown,
        sigmas: list[float],
        outcome: Outcome,
    ) -> None:
        """Stores a run.

        For the reference, it also stores latents, images and trajectories, which the other runs are compared with.
        """
        if self.folder is None:
            return
        key = self._key_of(digest(identity))
        values: dict[str, np.ndarray] = {"pictured": shown.images, "key": np.array(key)}
        if shown.clips is not None:
            values["clips"] = shown.clips
        if run.contender == Reference.name:
            for number in range(len(outcome.latents)):
                values[f"latents-{number}"] = outcome.latents[number]
                values[f"images-{number}"] = outcome.images[number]
                values[f"trajectory-{number}"] = np.array(outcome.trajectories[number])
        with whole_file(_files(self.folder, name)[1]) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **values)  # type: ignore[arg-type]  # numpy declares its other keyword first
        self.write_figures(name, identity, run, sigmas, len(outcome.latents))

    def write_figures(self, name: str, identity: str, run: EvaluatedRun, sigmas: list[float], batches: int) -> None:
        """Keeps the figures of a run whose images are kept already."""
        if self.folder is None:
            return
        of_contender = digest(identity)
        contents = {"key": self._key_of(of_contender), "identity": of_contender, "batches": batches, "sigmas": sigmas}
        # Python's JSON knows Infinity and NaN.
        write_text(_files(self.folder, name)[0], json.dumps({**contents, "run": asdict(run)}))

    def made_from_other(self, kept: Kept) -> bool:
        """Whether a run is known to be made from other inputs, another model or other settings."""
        return kept.identity is not None and kept.key != self._key_of(kept.identity)

    def _key_of(self, identity: str) -> str:
        return digest([self._key, identity, "2"])

    def read_search(self, peer: str, samples: int) -> dict:
        """By setting, the figures of the search with this number of samples."""
        if self.folder is None:
            return {}
        file, _ = _files(self.folder, f"search {peer}")
        try:
            contents = json.loads(file.read_text(encoding="utf-8"))
            is_same = contents["key"] == digest([self._key, samples])
            return dict(contents["figures"]) if is_same else {}
        except UNREADABLE:
            return {}

    def write_search(self, peer: str, samples: int, figures: dict) -> None:
        """Keeps the figures of the search so far."""
        if self.folder is not None:
            file, _ = _files(self.folder, f"search {peer}")
            write_text(file, json.dumps({"key": digest([self._key, samples]), "figures": figures}))


def read_run(file: Path, arrays: Path, with_outcome: bool) -> Kept:
    """A kept run.

    Args:
        file, arrays: its figures and its images.
        with_outcome: whether the outcome is needed; only the reference's is kept.

    Raises:
        One of `UNREADABLE`: a file is missing or damaged, or both are not of the same run.
    """
    contents = json.loads(file.read_text(encoding="utf-8"))
    values = contents["run"]
    run = EvaluatedRun(**{**values, "steps": tuple(values["steps"])})
    with np.load(arrays) as stored:
        if "key" in stored and str(stored["key"]) != contents["key"]:
            raise ValueError(f"{arrays} is not of the run in {file}")
        shown, outcome = Shown(stored["pictured"], stored.get("clips")), None
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
            if shown.clips is None:  # an older release kept no clips
                shown = Shown.of([sample for batch in outcome.images for sample in batch])
    return Kept(run, shown, contents["sigmas"], outcome, contents.get("identity"), contents["key"])


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    name = file_name(name)
    return folder / f"{name}.json", folder / f"{name}.npz"


def facts_of(pipe: Pipeline, inputs: list[dict], seed: int, batch_size: int) -> dict[str, Any]:
    """What the figures depend on, for `summary.json`: model, samples, device and versions."""
    transformer = pipe.transformer
    device = features_device(pipe, adapter_for(pipe))
    parameters = sum(p.numel() for p in transformer.parameters())
    return {
        "model": f"{type(pipe).__name__}, {class_of(transformer).__name__}, {parameters / 1e6:.1f} M parameters",
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
