"""Reads recorded trajectories."""

import json
import operator
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lesa_kernels.checks import Said, argument_error

FORMAT_VERSION = 1


_FACTS = {"samples": int, "family": str, "feature_dim": int, "num_inference_steps": int, "head_eps": float}
"""What reading needs of a manifest."""


MANIFEST = "manifest.json"


HEAD = "head.safetensors"


@dataclass(frozen=True)
class Trajectory:
    """What the transformer computed for one sample, step by step.

    Args:
        features: `[S, T, D]`, inputs of the output head at the S executed steps, in the model's dtype.
        sigmas: `[S]` float32, the noise levels.
        scale: `[S, D]`, of the head's modulation `(1 + scale) * LN(h) + shift`.
        shift: `[S, D]`.
        token_index: `[T]` int64, rising: which of the sample's tokens these are.
        latents: `[S, T, O]`, the sample before each step, laid out as what the head projects.
    """

    features: torch.Tensor
    sigmas: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    token_index: torch.Tensor
    latents: torch.Tensor | None = None  # recordings of before it was kept have none


def check_latents(trajectory: Trajectory) -> None:
    """Raises `ValueError` if it was recorded by a version that did not keep the latents."""
    if trajectory.latents is None:
        remedy = "Record again with this version."
        raise argument_error("trajectories", "hold the latents", Said("an older recording without"), remedy)


class Trajectories:
    """A finished recording, read from its folder one trajectory at a time.

    `len(trajectories)` counts them, `trajectories[i]` reads one, and iterating reads all in turn.

    Args:
        folder: where `lesa.record` wrote.

    Attributes:
        family: of the model, such as "flux".
        feature_dim: D, the width of the features.
        num_inference_steps: S, the executed steps of every trajectory.
        head_weight: `[O, D]` of the output projection.
        head_bias: `[O]`, or None.
        head_eps: of the output head's layer norm.
        manifest: the manifest as a dict.
        names: of each trajectory, its file's without the suffix.
        samples: of each trajectory, the number of its input; the streams of one input share it.

    Raises:
        FileNotFoundError: no such folder, or no manifest in it.
        ValueError: another format version, a manifest that lacks something, or an interrupted recording.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            remedy = "Check the path, or record trajectories with `lesa.record`."
            raise argument_error("folder", "be a folder", Said(f"{folder}, which is none"), remedy, FileNotFoundError)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise argument_error(
                "folder",
                f"be a trajectory folder with a {MANIFEST}",
                Said(f"{folder}, which has none"),
                "Pass the `out_dir` of `lesa.record`.",
                FileNotFoundError,
            )
        count = manifest["samples"]
        finished = sum(sample_file(self.folder, number).exists() for number in range(count))
        if finished < count:
            raise argument_error(
                "folder",
                "be a finished recording",
                Said(f"{folder} with {finished} of {count} samples"),
                "Run `lesa.record` again with the same arguments: it continues where it stopped.",
            )
        self.manifest = manifest
        self.family: str = manifest["family"]
        self.feature_dim: int = manifest["feature_dim"]
        self.num_inference_steps: int = manifest["num_inference_steps"]
        self.head_eps: float = manifest["head_eps"]
        head = load_file(self.folder / HEAD)
        self.head_weight, self.head_bias = head["weight"], head.get("bias")
        self._files = sample_files(self.folder)
        self.names = [path.stem for path in self._files]
        self.samples = [int(name.split("-")[1]) for name in self.names]

    @property
    def by_sample(self) -> list[list[int]]:
        """The numbers of the trajectories of each sample: one for each stream of calls."""
        numbers: dict[int, list[int]] = {}
        for number, sample in enumerate(self.samples):
            numbers.setdefault(sample, []).append(number)
        return [*numbers.values()]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Trajectory:
        return Trajectory(**load_file(self._files[operator.index(index)]))

    def __repr__(self) -> str:
        return (
            f"Trajectories({str(self.folder)!r}: {len(self)} of {self.family}, {self.num_inference_steps} steps, "
            f"width {self.feature_dim})"
        )


def sample_file(folder: Path, number: int) -> Path:
    return folder / f"sample-{number:05d}.safetensors"


def sample_files(folder: Path) -> list[Path]:
    """Every trajectory: by sample, the first stream before the others."""
    return sorted(folder.glob("sample-*.safetensors"), key=lambda path: path.stem)


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a trajectory folder, or None; raises `ValueError` unless it is one of this version."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
    except (ValueError, TypeError, KeyError):
        got = Said(f"{path}, which is no manifest of a recording")
        raise argument_error("folder", "be a trajectory folder", got, "Choose another folder.") from None
    if version != FORMAT_VERSION:
        raise argument_error(
            f"format_version in {path}",
            f"be {FORMAT_VERSION}",
            version,
            "Record again with this version of lesa, or read it with the one that wrote it.",
        )
    lacking = [name for name, kind in _FACTS.items() if not isinstance(manifest.get(name), kind)]
    if lacking:
        raise argument_error(
            f"{path}",
            f"have {', '.join(_FACTS)}",
            Said(f"none, or another kind of value, for {', '.join(lacking)}"),
            "Restore the file, or record into another folder.",
        )
    return manifest


def check_plain(trajectories: Trajectories) -> None:
    """Raises `ValueError` if they are roll-outs of a predictor."""
    if trajectories.manifest.get("predictor") is not None:
        remedy = "Pass those that were recorded without a predictor; `lesa.refine` makes roll-outs by itself."
        raise argument_error("trajectories", "be of plain runs", Said("roll-outs of a predictor"), remedy)
