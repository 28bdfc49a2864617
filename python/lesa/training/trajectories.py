"""The format of recorded trajectories: reading and writing.

A trajectory folder holds

- `manifest.json`: what was recorded, and with which settings;
- `head.safetensors`: `weight` `[O, D]` and, if there is one, `bias` `[O]` of the output projection; of a pipeline with
  two transformers also those of the second one, as `transformer_2.weight` and `transformer_2.bias`;
- `sample-00000.safetensors`, one per input: `features` `[S, T, D]`, `latents` `[S, T, O]`, `scale` and `shift` `[S, D]`
  in the model's dtype, `sigmas` `[S]` float32 and `token_index` `[T]` int64, over S computed steps and T kept tokens.
  Where the transformer is called more than once a step, as for true classifier-free guidance, the other streams of
  calls are in `sample-00000-<stream>.safetensors`. A stream of one of two transformers has only the steps of that one.

The metadata of `head.safetensors` repeats the entries of the manifest that no other file confirms. Other files in the
folder are ignored, unless they have the name of a sample that the recording does not have.
"""

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lesa.artifacts import digest
from lesa.models import FIRST
from lesa.training.shards import (
    MISSING,
    DamagedError,
    identity_of,
    load_sample,
    metadata_of,
    save_tensors,
    survey,
)
from lesa_kernels import OutputHead
from lesa_kernels.checks import Said, argument_error

FORMAT_VERSION, LATER_FORMAT = 1, 2
"""Of recordings of one transformer whose head has a layer norm, and of others, which older releases would misread."""
MANIFEST = "manifest.json"
HEAD = "head.safetensors"

_FACTS = {"samples": int, "family": str, "feature_dim": int, "num_inference_steps": int, "head_eps": float}
"""The entries that a manifest must have to be read."""
_CONFIRMED = ("family", "num_inference_steps", "head_eps")
"""Entries that the file of the head has too, so that a damaged manifest is noticed."""
_MORE_FACTS: dict[str, Any] = {
    "seed": int,
    "requested_num_inference_steps": int,
    "tokens_per_sample": (int, type(None)),
    "predictor": (dict, type(None)),
    "dtype": str,
    "transformers": list,
    "head_norm": str,
}
"""Entries that have these types if they are there."""
NORMS: dict[str, str | None] = {"layer": "layer", "rms": "rms", "none": None}
"""What a manifest calls the norms of output heads. It leaves a layer norm out."""
_CONDITIONS = (
    "arguments",
    "scheduler",
    "pipeline_config",
    "configs",
    "dtypes",
    "adapters",
    "quantisation",
    "buffers",
    "replaced",
    "tokenizers",
    "weights",
    "autocast",
)
"""Entries that are objects if they are there."""


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


@dataclass(frozen=True)
class Recorded:
    """Which samples a call of `lesa.record` made, by number.

    Args:
        kept: they were there already.
        new: they were recorded.
        again: they were there, but damaged, and were recorded again.
    """

    kept: tuple[int, ...]
    new: tuple[int, ...]
    again: tuple[int, ...]


class Trajectories:
    """A finished recording, read from its folder one trajectory at a time.

    `len(trajectories)` is their number, `trajectories[i]` reads one, and a loop over it reads all, one after the other.

    Args:
        folder: where `lesa.record` wrote.

    Attributes:
        family: the family of the model, such as "flux".
        feature_dim: D, the width of the features.
        num_inference_steps: S, the executed steps of every trajectory.
        head_weight: `[O, D]` of the output projection, of the first transformer if there are two.
        head_bias: `[O]`, or None.
        head_eps: of the output head's norm.
        head_norm: "layer", "rms", or None for a head without a norm.
        projections: by transformer, weight and bias of the output projection.
        manifest: the manifest as a dict.
        names: for each trajectory, the name of its file without the suffix.
        samples: for each trajectory, the number of its input. The streams of one input have the same number.
        recorded: which samples the call of `lesa.record` made that returned this. If it was read from a folder, none.

    Raises:
        FileNotFoundError: there is no such folder, or no manifest in it.
        ValueError: the format has another version, the manifest lacks an entry, the recording is not finished, or a
            file is damaged or belongs to another recording. The message names the file.
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
        head = read_head(self.folder, manifest)
        self.projections = _projections(head, manifest)
        found = survey(self.folder, manifest, len(head["weight"]))
        for path, why in found.damaged.items():
            raise DamagedError(path, why)
        if len(found.whole) < manifest["samples"]:
            raise argument_error(
                "folder",
                "be a finished recording",
                Said(f"{folder} with {len(found.whole)} of {manifest['samples']} samples"),
                "Run `lesa.record` again with the same arguments: it continues where it stopped.",
            )
        self.manifest = manifest
        self.family: str = manifest["family"]
        self.feature_dim: int = manifest["feature_dim"]
        self.num_inference_steps: int = manifest["num_inference_steps"]
        self.head_eps: float = manifest["head_eps"]
        self.head_norm: str | None = NORMS[manifest.get("head_norm", "layer")]
        self.head_weight: torch.Tensor = head["weight"]
        self.head_bias: torch.Tensor | None = head.get("bias")
        self._files = [path for paths in found.whole.values() for path in paths]
        self._verified: set[Path] = set()
        self._sigmas: dict[int, list[float]] = {}
        self.recorded = Recorded(tuple(found.whole), (), ())
        self.names = [path.stem for path in self._files]
        self.samples = [number for number, paths in found.whole.items() for _ in paths]

    @property
    def streams(self) -> list[str | None]:
        """For each trajectory, the name of its stream of calls; None for the first stream of a sample."""
        parts = (name.split("-", 2) for name in self.names)  # "sample", the number, and the name
        return [part[2] if len(part) > 2 else None for part in parts]

    @property
    def transformers(self) -> list[str]:
        """For each trajectory, which component of the pipeline its transformer is."""
        first, *others = self.projections
        names = ([other for other in others if (stream or "").startswith(f"{other}-")] for stream in self.streams)
        return [name[0] if name else first for name in names]

    @cached_property
    def run_sigmas(self) -> list[float]:
        """The noise levels of the run of the first sample, with all transformers."""
        return [sigma for part in self._parts(0) for sigma in part]

    @property
    def switch(self) -> int | None:
        """The step at which a second transformer begins; None if there is one transformer."""
        return None if len(self.projections) == 1 else len(self._parts(0)[0])

    def end_of(self, number: int) -> float:
        """The noise level after the last step of a trajectory: that at which another transformer goes on, or 0."""
        if len(self.projections) == 1:
            return 0.0
        last = self.sigmas_of(number)[-1]
        return max((part[0] for part in self._parts(self.samples[number]) if part[0] < last), default=0.0)

    def _parts(self, sample: int) -> list[list[float]]:
        """The noise levels of a sample's run, one list for each transformer."""
        one_of_each = {self.transformers[number]: number for number in self.by_sample[sample]}
        return sorted(map(self.sigmas_of, one_of_each.values()), reverse=True)

    def sigmas_of(self, number: int) -> list[float]:
        """The noise levels of the trajectory of this number, without reading the rest of it."""
        if number not in self._sigmas:
            with safe_open(self._files[number], "pt") as file:
                self._sigmas[number] = file.get_tensor("sigmas").tolist()
        return self._sigmas[number]

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
        path = self._files[operator.index(index)]
        tensors = load_sample(path, verify=path not in self._verified)
        self._verified.add(path)
        return Trajectory(**tensors)

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"Trajectories({str(self.folder)!r}: {len(self)} of {self.family}, {self.num_inference_steps} steps, "
            f"width {self.feature_dim})"
        )


def as_trajectories(trajectories: Trajectories | str | os.PathLike) -> Trajectories:
    """Returns the trajectories, which are read if a folder is given. Raises `TypeError` if it is neither."""
    if isinstance(trajectories, Trajectories):
        return trajectories
    if not isinstance(trajectories, (str, os.PathLike)):
        must = "be the folder of a recording, or what `lesa.record` returned"
        raise argument_error("trajectories", must, trajectories, "Pass one of these.", TypeError)
    return Trajectories(trajectories)


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


def save_heads(folder: Path, heads: Mapping[str, OutputHead], manifest: Mapping[str, Any]) -> None:
    """Writes the output projections, and with them those entries of the manifest that no sample's file confirms.

    Args:
        folder: of the recording.
        heads: by transformer, the first one first.
        manifest: of the recording.
    """
    prefixes = ["", *(f"{name}." for name in [*heads][1:])]
    parts = {
        f"{prefix}{name}": tensor
        for prefix, head in zip(prefixes, heads.values())
        for name, tensor in (("weight", head.weight), ("bias", head.bias))
    }
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items() if tensor is not None}
    facts = {name: manifest[name] for name in (*_CONFIRMED, "head_norm") if name in manifest}
    save_tensors(folder / HEAD, on_cpu, {"recording": identity_of(manifest), "facts": facts})


def read_head(folder: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The output projection: `weight`, and `bias` if it has one; with two transformers, also those of the second.

    Raises:
        ValueError: the file is damaged, or the manifest has other entries than it had when the head was written.
    """
    path = folder / HEAD
    try:
        head = load_file(path)
    except FileNotFoundError:
        raise DamagedError(path, MISSING) from None
    except (SafetensorError, OSError) as error:
        raise DamagedError(path, f"is no whole safetensors file ({error})") from None
    shapes = {name: list(tensor.shape) for name, tensor in head.items()}
    outputs, width = (*shapes.get("weight", ()), 0, 0)[:2]
    one = {"weight": [outputs, manifest["feature_dim"]], "bias": [outputs]}
    prefixes = ["", *(f"{name}." for name in manifest.get("transformers", ())[1:])]
    wanted = {f"{prefix}{name}": shape for prefix in prefixes for name, shape in one.items()}
    if width == 0 or not shapes.items() <= wanted.items():
        raise DamagedError(path, f"has {shapes} instead of a weight [O, {manifest['feature_dim']}] and a bias [O]")
    said, recording = metadata_of(path), identity_of(manifest)
    if None not in (recording, said.get("recording")) and said["recording"] != recording:
        raise DamagedError(path, "belongs to another recording")
    if said.get("tensors") not in (None, digest(head)):
        raise DamagedError(path, "has other tensors than were written to it")
    if not all(tensor.float().isfinite().all() for tensor in head.values()):
        raise DamagedError(path, "has NaN or Inf")
    facts = said.get("facts")
    for name, written in facts.items() if isinstance(facts, dict) else ():
        if manifest.get(name) != written:
            must, got = f"be {written!r}, as the file of the head says", Said(f"{manifest.get(name)!r}")
            remedy = "Restore the file, or record into another folder."
            raise argument_error(f"{name} in {folder / MANIFEST}", must, got, remedy)
    return head


def _projections(
    head: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """By transformer, weight and bias of the output projection, from what `read_head` gives."""
    first, *others = manifest.get("transformers", [FIRST])
    prefixes = {first: "", **{name: f"{name}." for name in others}}
    return {name: (head[f"{prefix}weight"], head.get(f"{prefix}bias")) for name, prefix in prefixes.items()}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a trajectory folder, or None; raises `ValueError` unless it has this version of the format."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        got = Said(f"{path}, which is no manifest of a recording ({type(error).__name__}: {error})")
        remedy = "Restore the file, or choose another folder."
        raise argument_error("folder", "be a trajectory folder", got, remedy) from None
    if version not in (FORMAT_VERSION, LATER_FORMAT):
        raise argument_error(
            f"format_version in {path}",
            f"be {FORMAT_VERSION} or {LATER_FORMAT}",
            version,
            "Record again with this version of lesa, or read it with the version that wrote it.",
        )
    lacking = [name for name, kind in _FACTS.items() if not _is_a(manifest.get(name), kind)]
    lacking += [name for name in ("samples", "feature_dim", "num_inference_steps") if manifest.get(name) == 0]
    lacking += [name for name, kind in _MORE_FACTS.items() if name in manifest and not _is_a(manifest[name], kind)]
    lacking += ["head_norm"] if manifest.get("head_norm", "layer") not in NORMS else []
    lacking += [name for name in _CONDITIONS if not isinstance(manifest.get(name, {}), dict)]
    if lacking:
        raise argument_error(
            f"{path}",
            f"have {', '.join(_FACTS)}",
            Said(f"no value, or a value of another type, for {', '.join(lacking)}"),
            "Restore the file, or record into another folder.",
        )
    return manifest


def _is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether the value has that type, and, if it is a number, is finite and not negative."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return not isinstance(value, (int, float)) or (math.isfinite(value) and value >= 0)
