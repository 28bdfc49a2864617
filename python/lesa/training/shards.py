"""The files of single samples in a recording: their names, how they are written, and what a whole one is like.

`sample-00000.safetensors` has the first stream of calls of sample 0, and `sample-00000-<stream>.safetensors` another
one. The metadata of each file says which recording, sample and stream it belongs to, and has a digest of its tensors.
The first file also lists the other streams. Files that older versions wrote have no metadata. These facts are then
unknown and are not checked.
"""

import contextlib
import filecmp
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lesa.artifacts import digest, whole_file
from lesa_kernels.checks import Said, argument_error

_NAME = re.compile(r"sample-(\d{5,})(?:-(.+))?\.safetensors")
_OLD_STREAM = re.compile(r"\w+(-\w+)*")
"""Streams of files without metadata. Names such as "uncond (1)" are those of copies."""
_USUAL_STREAM = re.compile(r"(main|(pred_)?(un)?cond)(-\d+)?(-with-prompt)?")
"""Streams that pipelines of diffusers have."""
_METADATA, _BAD_METADATA = "lesa", "has metadata that are damaged"
_AXES = {
    "features": ("steps", "tokens", "width"),
    "latents": ("steps", "tokens", "outputs"),
    "sigmas": ("steps",),
    "scale": ("steps", "width"),
    "shift": ("steps", "width"),
    "token_index": ("tokens",),
}
_DTYPES = {"sigmas": "F32", "token_index": "I64"}
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_IDENTITY = ("seed", "inputs_digest", "transformer", "requested_num_inference_steps", "tokens_per_sample", "predictor")
"""The entries of the manifest that distinguish a recording from others. Every release wrote them."""

MISSING = "is missing"
REMEDY = "Run `lesa.record` again with the same arguments: it records damaged samples again."


class DamagedError(ValueError):
    """A file of a recording is damaged.

    Args:
        path: the file.
        why: what is wrong with it, as in "is missing".
    """

    lesa_message = True

    def __init__(self, path: Path, why: str):
        super().__init__(f"`{path}` {why if why == MISSING else f'is damaged: it {why}'}. {REMEDY}")
        self.path, self.why = path, why


@dataclass
class Survey:
    """What the folder of a recording holds.

    Args:
        whole: the files of each sample that is whole, the first stream first, by the number of the sample.
        damaged: by path, what is wrong with a file.
        hurt: the samples to which the damaged files belong.
    """

    whole: dict[int, list[Path]] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)
    hurt: set[int] = field(default_factory=set)


def sample_file(folder: Path, number: int, stream: str | None = None) -> Path:
    """The path of a sample's file; `stream` is None for the first one."""
    return folder / f"sample-{number:05d}{'' if stream is None else f'-{stream}'}.safetensors"


def sample_files(folder: Path) -> dict[int, dict[str | None, Path]]:
    """The files of samples by number and stream. Other files, such as copies and temporary ones, are left out."""
    found: dict[int, dict[str | None, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and match[1] == f"{int(match[1]):05d}":
            found.setdefault(int(match[1]), {})[match[2]] = path
    return dict(sorted(found.items()))


def save_sample(
    folder: Path, number: int, streams: Mapping[str, dict[str, torch.Tensor]], recording: str | None
) -> None:
    """Writes the trajectories of one sample, by stream. The first is written last: its file says that all are there.

    Args:
        folder: of the recording.
        number: of the sample.
        streams: by stream, the tensors of the trajectory.
        recording: the identity of the recording, from `identity_of`.
    """
    first, *others = streams
    for name in [*others, first]:
        stream = None if name == first else name
        said: dict[str, Any] = {"recording": recording, "sample": number, "stream": stream}
        if stream is None:
            said["other_streams"] = others
        save_tensors(sample_file(folder, number, stream), streams[name], said)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], said: Mapping[str, Any]) -> None:
    """Writes a whole file of tensors, with a digest of them.

    Args:
        path: the file.
        tensors: on the CPU.
        said: what its metadata says beside the digest.

    Raises:
        OSError: the file cannot be written. The message names it.
    """
    metadata = {_METADATA: json.dumps({**said, "tensors": digest(tensors)})}
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def identity_of(manifest: Mapping[str, Any]) -> str | None:
    """What distinguishes a recording from others, or None if the manifest does not say it."""
    if not all(name in manifest for name in _IDENTITY):
        return None
    return digest([manifest[name] for name in _IDENTITY])


def survey(folder: Path, manifest: Mapping[str, Any], outputs: int | None) -> Survey:
    """Looks at the names and headers of all samples' files, without reading their tensors.

    Args:
        folder: of the recording.
        manifest: of the recording.
        outputs: O, the width of the head's output; None if it is not known.

    Raises:
        ValueError: a file belongs to another recording, or is a copy of one. The message names it.
    """
    found, older, files_of_older = Survey(), object(), {}
    for number, files in sample_files(folder).items():
        if number >= manifest["samples"]:
            path = next(iter(files.values()))
            raise _foreign(path, f"a recording of {manifest['samples']} samples, which are counted from 0")
        first = files.get(None)
        if first is None:
            continue  # it was interrupted before all streams were written
        streams = None
        with contextlib.suppress(DamagedError):
            streams = metadata_of(first).get("other_streams", older)
        if streams is older:
            files_of_older[number] = files
        if not isinstance(streams, list):  # of an older version, or damaged
            streams = [name for name in files if name is not None and _OLD_STREAM.fullmatch(name)]
        paths = {name: sample_file(folder, number, name) for name in [None, *sorted(map(str, streams))]}
        checked = {path: why_damaged(path, manifest, number, name, outputs) for name, path in paths.items()}
        wrong = {path: why for path, why in checked.items() if why is not None}
        if wrong:
            found.damaged.update(wrong)
            found.hurt.add(number)
        else:
            found.whole[number] = [*paths.values()]
    _check_no_copies(files_of_older)
    return found


def _check_no_copies(samples: Mapping[int, Mapping[str | None, Path]]) -> None:
    """Raises `ValueError` if a file is probably a copy, and not a stream that an older version recorded.

    A stream with a name that diffusers does not use is one if all samples have it, and if its bytes are its own.

    Args:
        samples: the files without metadata, by sample and stream.
    """
    for files in samples.values():
        for stream, path in files.items():
            if stream is None or _USUAL_STREAM.fullmatch(stream) or not _OLD_STREAM.fullmatch(stream):
                continue
            others = [other for other in files.values() if other != path and other.is_file() and path.is_file()]
            same = [other.name for other in others if filecmp.cmp(path, other, shallow=False)]
            if same or not all(stream in streams for streams in samples.values()):
                why = f"the bytes of {same[0]}" if same else f"a stream {stream!r} that not all samples have"
                must, got = "be a stream of the recording", Said(f"a file with {why}, so it is probably a copy")
                raise argument_error(f"{path}", must, got, "Move it away.")


def check_tensors(found: Survey, sound: set[Path]) -> None:
    """Reads the tensors of whole samples. Samples with other tensors than were written become damaged ones.

    Args:
        found: what `survey` found. It is changed.
        sound: files that need not be read. Those that were read and are not damaged are added.
    """
    for number, paths in [*found.whole.items()]:
        for path in paths:
            if path in sound:
                continue
            try:
                load_sample(path, verify=True)
                sound.add(path)
            except DamagedError as error:
                found.damaged[path] = error.why
                found.hurt.add(number)
                found.whole.pop(number, None)


def metadata_of(path: Path) -> dict[str, Any]:
    """What the metadata of a file says: nothing in files of older versions; raises `ValueError` if it is damaged."""
    try:
        return _opened(path)[1]
    except (SafetensorError, OSError, ValueError):
        raise DamagedError(path, _BAD_METADATA) from None


def why_damaged(
    path: Path, manifest: Mapping[str, Any], number: int, stream: str | None, outputs: int | None
) -> str | None:
    """What is wrong with a sample's file, by its size and header; None if nothing is.

    Args:
        path: the file.
        manifest: of the recording.
        number, stream: whose file it should be.
        outputs: see `survey`.

    Raises:
        ValueError: it belongs to another recording. The message names it.
    """
    sizes = {"width": manifest["feature_dim"]}
    sizes |= {} if outputs is None else {"outputs": outputs}
    if manifest.get("predictor") is None and "transformers" not in manifest:  # else a file has a part of the steps
        sizes["steps"] = manifest["num_inference_steps"]
    if manifest.get("tokens_per_sample") is not None:
        sizes["tokens"] = manifest["tokens_per_sample"]
    try:
        header, said = _opened(path)
    except FileNotFoundError:
        return MISSING
    except IsADirectoryError:
        return "is a folder"
    except (SafetensorError, OSError) as error:
        return f"is no whole safetensors file ({error})"
    except ValueError:
        return _BAD_METADATA
    wrong = _why_other_tensors(header, sizes, manifest.get("dtype"))
    if wrong is not None:
        return wrong
    recording = identity_of(manifest)
    if None not in (recording, said.get("recording")) and said["recording"] != recording:
        raise _foreign(path, "this recording; it has samples of another one")
    is_of = said.get("sample", number), said.get("stream", stream)
    return None if is_of == (number, stream) else f"has the tensors of sample {is_of[0]}, stream {is_of[1] or 'first'}"


def load_sample(path: Path, verify: bool) -> dict[str, torch.Tensor]:
    """Reads the tensors of a sample's file.

    Args:
        path: the file.
        verify: whether to compare the tensors with the digest in the file, and to look for NaN and Inf.

    Raises:
        ValueError: it is damaged. The message names it.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(path, f"is no whole safetensors file ({error})") from None
    if verify:
        written = metadata_of(path).get("tensors")
        if written is not None and written != digest(tensors):
            raise DamagedError(path, "has other tensors than were written to it")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise DamagedError(path, f"has NaN or Inf in {name!r}")
    return tensors


def _opened(path: Path) -> tuple[dict[str, tuple[str, list[int]]], dict[str, Any]]:
    """Dtype and shape of each tensor, and what the metadata says: nothing in files of older versions.

    Opening checks that the file has exactly the bytes that its header promises.

    Raises:
        SafetensorError, OSError: it is no whole file of tensors.
        ValueError: the metadata is none that a release of lesa wrote.
    """
    if path.is_dir():
        raise IsADirectoryError(path)
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (a file is no mapping)
        header = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        metadata = dict(file.metadata() or {})
    text = metadata.pop(_METADATA, None)
    said = {} if text is None else json.loads(text)
    if not {*metadata} <= {"format"} or not isinstance(said, dict) or (text and "tensors" not in said):
        raise ValueError(metadata)
    return header, said


def _why_other_tensors(
    header: Mapping[str, tuple[str, list[int]]], sizes: dict[str, int], dtype: str | None
) -> str | None:
    """How the tensors differ from those of a trajectory; None if they do not."""
    lacking = {*_AXES} - {*header} - {"latents"}
    if lacking or not {*header} <= {*_AXES}:
        return f"has the tensors {', '.join(sorted(header)) or 'of nothing'} instead of {', '.join(sorted(_AXES))}"
    for name, (kind, shape) in header.items():
        axes = _AXES[name]
        if len(shape) != len(axes):
            return f"has {name!r} of shape {shape} instead of [{', '.join(axes)}]"
        for axis, size in zip(axes, shape):
            if sizes.setdefault(axis, size) != size:
                return f"has {name!r} of shape {shape}, where {axis} should be {sizes[axis]}"
        wanted = _DTYPES.get(name)
        if (wanted and kind != wanted) or (not wanted and kind not in _FLOATS):
            return f"has {name!r} of dtype {kind}"
    if dtype is not None and _FLOATS[header["features"][0]] != dtype:
        return f"has features in {_FLOATS[header['features'][0]]} instead of {dtype}"
    return None


def _foreign(path: Path, of: str) -> Exception:
    return argument_error(
        f"{path}",
        "belong to the recording in its folder",
        Said(f"a file that does not belong to {of}"),
        "Move it away.",
    )
