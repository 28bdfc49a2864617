"""Pipeline arguments of many samples: reading and writing them, and joining samples for one call."""

import codecs
import json
import math
import numbers
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lesa_kernels.checks import Said, argument_error, describe

SUFFIXES = (".jsonl", ".safetensors")

_RESERVED = {
    "callback_on_step_end": "Leave it out: lesa runs the pipeline unchanged.",
    "generator": "Pass `seed` instead: sample i uses seed + i.",
    "num_inference_steps": "Pass `num_inference_steps` instead.",
    "num_images_per_prompt": "Repeat the input: each input makes one sample.",
    "output_type": "Leave it out: lesa sets it.",
    "return_dict": "Leave it out.",
}

_SIZES = ("height", "width", "num_frames", "layers", "max_sequence_length")
"""Arguments for which a pipeline takes its default, or fails late, if they are 0."""

_DIMENSIONS = {"prompt_embeds_llama3": 1, "negative_prompt_embeds_llama3": 1}
"""Of the tensors whose dimension of samples is not the leading one, such as those of HiDream with all layers."""

_NOISE_LEVELS = ("sigmas", "timesteps")
"""Arguments that set the steps of a run, instead of their number."""


@dataclass(frozen=True)
class Sample:
    """The input of one sample, as a file holds it.

    Args:
        place: where it is, such as "prompts.jsonl, line 3".
        arguments: the pipeline arguments.
    """

    place: str
    arguments: dict


def read_inputs(file: str | os.PathLike) -> list[dict]:
    """Reads the inputs of many samples: one dict of pipeline arguments for each.

    Args:
        file: `.jsonl`, where each line is a JSON string (a prompt) or a JSON object of pipeline arguments; or
            `.safetensors`, whose tensors are pipeline arguments with a leading dimension N, one row per sample. Its
            metadata may hold other arguments, which are the same for every sample, as JSON values by name.

    Returns:
        One dict per sample; tensors keep a leading dimension of 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is another one, or the contents are not inputs. The message names the line or row, and
            the argument.
    """
    return [sample.arguments for sample in read_samples(file)]


def read_samples(file: str | os.PathLike) -> list[Sample]:
    """What `read_inputs` reads, with the place of each sample in the file."""
    path = _check_suffix(file)
    if not path.is_file():
        got = Said(f"{path}, which is a folder" if path.is_dir() else str(path))
        raise argument_error("file", "be an existing file", got, "Check the path.", FileNotFoundError)
    samples = _read_lines(path) if path.suffix.lower() == ".jsonl" else _read_tensors(path)
    if not samples:
        raise argument_error("file", "hold at least one input", Said(f"none in {path}"), "Write inputs to the file.")
    return samples


def write_inputs(file: str | os.PathLike, inputs: list[dict]) -> None:
    """Writes what `read_inputs` reads.

    Args:
        file: ends in `.jsonl` or `.safetensors`.
        inputs: one dict of pipeline arguments per sample. Its tensors have a leading dimension of 1. A `.jsonl` file
            cannot hold tensors. A `.safetensors` file can hold other arguments only if all samples share them.

    Raises:
        TypeError, ValueError: this kind of file can't hold the inputs. The message names the argument.
    """
    path = _check_suffix(file)
    if not inputs:
        raise argument_error("inputs", "hold at least one input", inputs, "Pass some.")
    if path.suffix.lower() == ".jsonl":
        values = [item["prompt"] if [*item] == ["prompt"] else item for item in inputs]
        lines = [_to_json(f"inputs[{i}]", value, 'a ".safetensors" file') + "\n" for i, value in enumerate(values)]
        path.write_text("".join(lines), encoding="utf-8")
        return
    for number, item in enumerate(inputs):
        for name, value in item.items():
            if isinstance(value, str) and value != inputs[0].get(name):
                raise argument_error(
                    f"inputs[{number}][{name!r}]",
                    "be the same for every input in a .safetensors file",
                    value,
                    'Write prompts to a ".jsonl" file, or pass their embeddings.',
                )
    tensors = {name: value for name, value in collate(inputs).items() if _is_stack(value)}
    if not tensors:
        raise argument_error(
            "inputs",
            "hold tensors to be written to a .safetensors file",
            Said(f"only {', '.join(inputs[0])}"),
            'Write them to a ".jsonl" file.',
        )
    others = {name: value for name, value in inputs[0].items() if name not in tensors}
    metadata = {name: _to_json(f"inputs[0][{name!r}]", value, "tensors") for name, value in others.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def collate(inputs: list[dict]) -> dict:
    """Joins the arguments of several samples into those of one pipeline call.

    Tensors are concatenated along their dimension of samples, which is 1. Prompts become lists, and so do several
    images. Lists of one embedded prompt are joined. Anything else must be the same for all samples.

    Args:
        inputs: one dict of pipeline arguments per sample.

    Raises:
        ValueError: the inputs differ in an argument that one call can't mix. The message names it.
    """
    for number, item in enumerate(inputs):
        name = _difference(inputs[0], item)
        if name is not None:
            first, other = (describe(i[name]) if name in i else "nothing" for i in (inputs[0], item))
            raise argument_error(
                "inputs",
                f"have the same {name!r} to share a call",
                Said(f"{first} in input 0 and {other} in input {number}"),
                "Group the inputs by this argument, or use a batch size of 1.",
            )
        for name, value in item.items():
            counted = value.shape[_DIMENSIONS.get(name, 0)] if _is_stack(value) else 1
            if (len(value) if isinstance(value, list) and _is_per_sample(name, value) else counted) != 1:
                raise argument_error(
                    f"inputs[{number}][{name!r}]",
                    "have a leading dimension of 1, for one sample",
                    value,
                    "Split it into one input per sample.",
                )
    return {name: _join(name, [item[name] for item in inputs]) for name in inputs[0]}


def can_share_a_call(first: dict, other: dict) -> bool:
    """Whether `collate` can join the two inputs."""
    return _difference(first, other) is None


def _check_suffix(file) -> Path:
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise argument_error("file", f"end in {' or '.join(SUFFIXES)}", Said(str(path)), "Use one of these formats.")
    return path


def _read_lines(path: Path) -> list[Sample]:
    text = _text_of(path)
    must, remedy = "be a JSON string or a JSON object", 'Write a prompt in double quotes: "a cat".'
    if _is_one_value(text):  # a list, or one object over several lines
        remedy = "Write each sample on a line of its own, as a prompt or an object, without a list around them."
    samples = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        value = _parse(place, must, line, remedy)
        if not isinstance(value, (str, dict)):
            raise argument_error(place, must, value, remedy)
        arguments = {"prompt": value} if isinstance(value, str) else value
        for name, part in arguments.items():
            _check_value(f"{place}, {name!r}", part)
        samples.append(Sample(place, arguments))
    return samples


def _text_of(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark."""
    data = path.read_bytes()
    remedy = "Save the file in UTF-8."
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise argument_error("file", "be text in UTF-8", Said(f"{path}, which looks like UTF-16 or UTF-32"), remedy)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = Said(f"{path}, where byte {error.start}, in line {line}, is not UTF-8")
        raise argument_error("file", "be text in UTF-8", got, remedy) from None


def _is_one_value(text: str) -> bool:
    """Whether the text as a whole is a list or an object of JSON."""
    try:
        return isinstance(json.loads(text), (list, dict))
    except (ValueError, RecursionError):
        return False


def _parse(name: str, must: str, text: str, remedy: str) -> Any:
    """The value of a JSON text. The errors name `name`, and say what it must be and how to mend it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in {key for key in keys if keys.count(key) > 1}:
            must = f"have {key!r} once"
            raise argument_error(name, must, Said(f"it {keys.count(key)} times"), "Remove all but one of them.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        if hasattr(error, "lesa_message"):
            raise
        reason = str(error).partition(";")[0]  # an integer of thousands of digits
    raise argument_error(name, must, Said(f"{text[:60]!r}: {reason}"), remedy)


def _check_value(name: str, value: Any) -> None:
    """Raises `ValueError` if a JSON value, or a part of it, can be neither a number nor a text of a pipeline."""
    remedy = "Correct this value in the file."
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            got = Said(f"half a surrogate pair, {value[error.start]!r}, at character {error.start}")
            raise argument_error(name, "be text that UTF-8 can hold", got, remedy) from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise argument_error(name, "be a finite number", value, remedy)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise argument_error(name, "be an integer of at most 64 bits", value, remedy)
    elif isinstance(value, (list, dict)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_value(name, part)


def _read_tensors(path: Path) -> list[Sample]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file is no mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        got = Said(f"{path}: {error}")
        raise argument_error("file", "be a safetensors file", got, "Write the file again.") from None
    sizes = {name: t.shape[_DIMENSIONS.get(name, 0)] if t.ndim else None for name, t in tensors.items()}
    if None in sizes.values() or len(set(sizes.values())) != 1:
        raise argument_error(
            "file",
            "hold tensors with the same leading dimension, one row for each sample",
            Said(f"{sizes} in {path}"),
            "Stack every argument over the same samples.",
        )
    others = {}
    for name, text in metadata.items():
        if name == "format":  # many writers of safetensors set it to "pt"
            continue
        place = f"{path.name}, metadata {name!r}"
        others[name] = _parse(place, "be a JSON value", text, "Encode it with `json.dumps`.")
        _check_value(place, others[name])
    samples = []
    for i in range(next(iter(sizes.values())) or 0):
        row = {name: tensor.narrow(_DIMENSIONS.get(name, 0), i, 1) for name, tensor in tensors.items()}
        samples.append(Sample(f"{path.name}, row {i}", {**row, **others}))
    for sample in samples:
        for name in tensors:
            _check_finite(f"{sample.place}, {name!r}", name, sample.arguments[name])
    return samples


def _check_finite(place: str, key: str, value: torch.Tensor) -> None:
    """Raises `ValueError` if a tensor has NaN, or embeddings, latents or an image have Inf, which a mask may have."""
    if value.is_floating_point():
        found = value.float() if value.element_size() == 1 else value  # torch cannot ask 8-bit numbers
        if found.isnan().any():
            raise argument_error(place, "hold no NaN", value, "Compute the tensor again.")
        if key.endswith(("_embeds", "latents", "image")) and found.isinf().any():
            raise argument_error(place, "hold finite numbers", value, "Compute the tensor again.")


def _to_json(name, value, alternative) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError) as error:
        remedy = f"Use {alternative} for values that JSON can't hold."
        raise argument_error(name, "hold JSON values only", Said(str(error)), remedy, TypeError) from None


def _is_stack(value) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _is_per_sample(name, value) -> bool:
    if isinstance(value, list) and value and "prompt" in name:  # one embedded prompt, or its parts, for each sample
        return isinstance(value[0], (torch.Tensor, list))
    return isinstance(value, Image) or (isinstance(value, str) and "prompt" in name)


def _join(name, values):
    first = values[0]
    if _is_stack(first):
        return torch.cat(values, _DIMENSIONS.get(name, 0))
    if not _is_per_sample(name, first) or (len(values) == 1 and isinstance(first, Image)):
        return first  # some pipelines take one image, and no list
    return sum(values, []) if isinstance(first, list) else values


def _difference(first: dict, other: dict) -> str | None:
    """Name of an argument that prevents two inputs from sharing a call, or None."""
    for name in {**first, **other}:
        if name not in first or name not in other or not _joinable(name, first[name], other[name]):
            return name
    return None


def _joinable(name, a, b) -> bool:
    if _is_stack(a) and _is_stack(b):
        return (a.shape[1:], a.dtype, a.device) == (b.shape[1:], b.dtype, b.device)
    if _is_per_sample(name, a) and _is_per_sample(name, b):
        return True
    if a is b:
        return True
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # lists of tensors and arrays have no single truth value
        return False


def check_inputs(inputs: Any, names: Sequence[str] | None = None) -> list[dict]:
    """The inputs as dicts of pipeline arguments.

    Args:
        inputs: a list of prompts, or of dicts of pipeline arguments.
        names: what the errors call each input. Default: "inputs[0]" and so on.

    Raises:
        TypeError, ValueError: it is not a list of prompts or dicts, or an input has an argument that lesa sets itself,
            asks for several samples, has a size below 1, or has an empty list of noise levels.
    """
    must = "be a list of prompts, or of dicts of pipeline arguments"
    if not isinstance(inputs, (list, tuple)):
        raise argument_error("inputs", must, inputs, "Put it in a list.", TypeError)
    if not inputs:
        raise argument_error("inputs", must, inputs, "Pass at least one.")
    for number, item in enumerate(inputs):
        name = f"inputs[{number}]" if names is None else names[number]
        if not isinstance(item, (str, dict)):
            raise argument_error(name, "be a prompt or a dict", item, "Pass one of these.", TypeError)
        if isinstance(item, dict):
            for key in (key for key in _RESERVED if key in item):
                raise argument_error(name, f"leave {key!r} out", item[key], _RESERVED[key])
            for key, must, remedy in (*_several_samples(item), *_unusable_values(item)):
                part = f"{name}[{key!r}]" if names is None else f"{name}, {key!r}"
                raise argument_error(part, must, item[key], remedy)
    return [{"prompt": item} if isinstance(item, str) else item for item in inputs]


def _several_samples(item: dict) -> Iterator[tuple[str, str, str]]:
    """Yields the arguments that ask for more than one sample, what they must be, and the remedy."""
    remedy = "Make an input of its own for each sample."
    for key, value in item.items():
        is_list = "prompt" in key and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        if is_list and len(value) != 1:
            yield key, "be one prompt", remedy
        if key == "num_videos_per_prompt" and value not in (None, 1):
            yield key, "be 1", remedy


def _unusable_values(item: dict) -> Iterator[tuple[str, str, str]]:
    """Yields the arguments with which a pipeline makes nothing of use, what they must be, and the remedy."""
    for key, value in item.items():
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if key in _SIZES and is_number and value < 1:
            yield key, "be at least 1", "Leave it out to use the default."
        if key in _NOISE_LEVELS and _count(value) == 0:
            yield key, "have at least one noise level", "Leave it out to use the scheduler's."


def steps_of(arguments: dict, num_inference_steps: int) -> int:
    """How many noise levels the arguments of a call set. `num_inference_steps` if they set none."""
    counts = [count for key in _NOISE_LEVELS if (count := _count(arguments.get(key))) is not None]
    return counts[0] if counts else num_inference_steps


def _count(value: Any) -> int | None:
    """The number of values in a list, an array or a tensor; None for anything else."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return int(np.prod(value.shape))
    return len(value) if isinstance(value, (list, tuple)) else None


def batches_of(inputs: list[dict], batch_size: int) -> Iterator[list[int]]:
    """Yields lists of consecutive inputs that share a call of the pipeline, as numbers; at most `batch_size` each."""
    batch: list[int] = []
    for number, item in enumerate(inputs):
        if batch and (len(batch) == batch_size or not can_share_a_call(inputs[batch[0]], item)):
            yield batch
            batch = []
        batch.append(number)
    yield batch
