"""The format of recorded trajectories: reading and writing.

A trajectory folder holds

- `manifest.json`: what was recorded, and with which settings;
- `head.safetensors`: `weight` `[O, D]` and, if there is one, `bias` `[O]` of the output projection;
- `sample-00000.safetensors`, one per input: `features` `[S, T, D]`, `latents` `[S, T, O]`, `scale` and `shift` `[S, D]`
  in the model's dtype, `sigmas` `[S]` float32 and `token_index` `[T]` int64, over S computed steps and T kept tokens.
  Where the transformer is called more than once a step, as for true classifier-free guidance, the other streams of
  calls are in `sample-00000-<stream>.safetensors`.
"""

import json
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lesa.artifacts import whole_file
from lesa_kernels.checks import Said, argument_error

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"

_FACTS = {"samples": int, "family": str, "feature_dim": int, "num_inference_steps": int, "head_eps": float}
"""The entries that a manifest must have to be read."""


@dataclass(frozen=True)
class Trajectory:
    """What the transformer computed for one sample, step by step.

    Args:
        features: `[S, T, D]`, inputs of the output head at the S executed steps, in the model's dtype.
        sigmas: `[S]` float32, the noise levels.
        scale: `[S, D]`, of the head's modulation `(1 + scale) * LN(h) + shift`.
        shift: `[S, D]`.
        token_index: `[T]` int64, rising: which of the sample's tokens these are.
        latents: `[S, T, O]`, the sample before each step, arranged like the output of the head. None in recordings of
            versions that did not keep it.
    """

    features: torch.Tensor
    sigmas: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    token_index: torch.Tensor
    latents: torch.Tensor | None = None


class Trajectories:
    """A finished recording, read from its folder one trajectory at a time.

    `len(trajectories)` is their number, `trajectories[i]` reads one, and a loop over it reads all, one after the other.

    Args:
        folder: where `lesa.record` wrote.

    Attributes:
        family: the family of the model, such as "flux".
        feature_dim: D, the width of the features.
        num_inference_steps: S, the executed steps of every trajectory.
        head_weight: `[O, D]` of the output projection.
        head_bias: `[O]`, or None.
        head_eps: of the output head's layer norm.
        manifest: the manifest as a dict.
        names: for each trajectory, the name of its file without the suffix.
        samples: for each trajectory, the number of its input. The streams of one input have the same number.

    Raises:
        FileNotFoundError: there is no such folder, or no manifest in it.
        ValueError: the format has another version, the manifest lacks an entry, or the recording is not finished.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            remedy = "Check the path, or record trajectories with `lesa.record`."
            raise argument_error("folder", "be an existing folder", Said(f"{folder}"), remedy, FileNotFoundError)
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
        finished = sum(is_recorded(self.folder, number) for number in range(count))
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
        self.head_weight: torch.Tensor = head["weight"]
        self.head_bias: torch.Tensor | None = head.get("bias")
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

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"Trajectories({str(self.folder)!r}: {len(self)} of {self.family}, {self.num_inference_steps} steps, "
            f"width {self.feature_dim})"
        )


def as_trajectories(trajectories: Trajectories | str | os.PathLike) -> Trajectories:
    """Returns the trajectories, which are read if a folder is given."""
    return trajectories if isinstance(trajectories, Trajectories) else Trajectories(trajectories)


def latents_of(trajectory: Trajectory) -> torch.Tensor:
    """The latents `[S, T, O]`; raises `ValueError` if the version that recorded them did not keep them."""
    if trajectory.latents is None:
        remedy = "Record again with this version."
        raise argument_error("trajectories", "hold the latents", Said("an older recording without"), remedy)
    return trajectory.latents


def check_plain(trajectories: Trajectories) -> None:
    """Raises `ValueError` if the trajectories are roll-outs of a predictor."""
    if trajectories.manifest.get("predictor") is not None:
        remedy = "Pass those that were recorded without a predictor; `lesa.refine` makes roll-outs by itself."
        raise argument_error("trajectories", "be of plain runs", Said("roll-outs of a predictor"), remedy)


def is_recorded(folder: Path, number: int) -> bool:
    """Whether all streams of a sample are there."""
    return _sample_file(folder, number).exists()


def sample_files(folder: Path) -> list[Path]:
    """The file of every trajectory: sorted by sample, the first stream before the others."""
    return sorted(folder.glob("sample-*.safetensors"), key=lambda path: path.stem)


def save_sample(folder: Path, number: int, streams: Mapping[str, dict[str, torch.Tensor]]) -> None:
    """Writes the trajectories of one sample, by stream. The first is written last: its file says that all are there."""
    first, *others = streams
    path = _sample_file(folder, number)
    for name in others:
        _write_tensors(path.with_stem(f"{path.stem}-{name}"), streams[name])
    _write_tensors(path, streams[first])


def save_head(folder: Path, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Writes the output projection."""
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    _write_tensors(folder / HEAD, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a trajectory folder, or None; raises `ValueError` unless it has this version of the format."""
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
            "Record again with this version of lesa, or read it with the version that wrote it.",
        )
    lacking = [name for name, kind in _FACTS.items() if not isinstance(manifest.get(name), kind)]
    if lacking:
        raise argument_error(
            f"{path}",
            f"have {', '.join(_FACTS)}",
            Said(f"no value, or a value of another type, for {', '.join(lacking)}"),
            "Restore the file, or record into another folder.",
        )
    return manifest


def _sample_file(folder: Path, number: int) -> Path:
    return folder / f"sample-{number:05d}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
