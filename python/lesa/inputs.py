"""Pipeline arguments of many samples: reading and writing them, and joining samples for one call."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    "output_type": "Leave it out: lesa needs the latents.",
    "return_dict": "Leave it out.",
}


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
        ValueError: the suffix is another one, or the contents are not inputs. The message names the line or argument.
    """
    path = _check_suffix(file)
    if not path.is_file():
        raise argument_error("file", "exist", Said(str(path)), "Check the path.", FileNotFoundError)
    inputs = _read_lines(path) if path.suffix == ".jsonl" else _read_tensors(path)
    if not inputs:
        raise argument_error("file", "hold at least one input", Said(f"none in {path}"), "Write inputs to the file.")
    return inputs


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
    if path.suffix == ".jsonl":
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

    Tensors are concatenated along their leading dimension, which is 1. Prompts and images become lists. Anything else
    must be the same for all samples.

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
            if _is_stack(value) and len(value) != 1:
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
    if path.suffix not in SUFFIXES:
        raise argument_error("file", f"end in {' or '.join(SUFFIXES)}", Said(str(path)), "Use one of these formats.")
    return path


def _read_lines(path):
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        got = Said(f"{path}, where byte {error.start} is not UTF-8")
        raise argument_error("file", "be text in UTF-8", got, "Save the file in UTF-8.") from None
    inputs = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, must = f"{path.name}, line {number}", "be a JSON string or a JSON object"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            got = Said(f"{line[:60]!r}: {error.msg} at column {error.colno}")
            raise argument_error(name, must, got, 'Write a prompt in double quotes: "a cat".') from None
        if not isinstance(value, (str, dict)):
            raise argument_error(name, must, value, "Write a prompt or an object of arguments.")
        inputs.append({"prompt": value} if isinstance(value, str) else value)
    return inputs


def _read_tensors(path):
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file is no mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise argument_error(
            "file", "be a safetensors file", Said(f"{path}: {error}"), "Write the file again."
        ) from None
    sizes = {name: len(tensor) if tensor.ndim else None for name, tensor in tensors.items()}
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
        try:
            others[name] = json.loads(text)
        except json.JSONDecodeError:
            raise argument_error(
                f"{path.name}, metadata {name!r}", "be a JSON value", text, "Encode it with `json.dumps`."
            ) from None
    count = next(iter(sizes.values()))
    return [{**{name: t[i : i + 1] for name, t in tensors.items()}, **others} for i in range(count)]


def _to_json(name, value, alternative) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        remedy = f"Use {alternative} for values that JSON can't hold."
        raise argument_error(name, "hold JSON values only", Said(str(error)), remedy, TypeError) from None


def _is_stack(value) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _is_per_sample(name, value) -> bool:
    return isinstance(value, Image) or (isinstance(value, str) and "prompt" in name)


def _join(name, values):
    if _is_stack(values[0]):
        return torch.cat(values)
    return values if _is_per_sample(name, values[0]) else values[0]


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


def check_inputs(inputs: Any) -> list[dict]:
    """The inputs as dicts of pipeline arguments.

    Raises:
        TypeError, ValueError: it is not a list of prompts or dicts, or an input has an argument that lesa sets itself.
    """
    must = "be a list of prompts, or of dicts of pipeline arguments"
    if not isinstance(inputs, (list, tuple)):
        raise argument_error("inputs", must, inputs, "Put it in a list.", TypeError)
    if not inputs:
        raise argument_error("inputs", must, inputs, "Pass at least one.")
    for number, item in enumerate(inputs):
        if not isinstance(item, (str, dict)):
            raise argument_error(f"inputs[{number}]", "be a prompt or a dict", item, "Pass one of these.", TypeError)
        if isinstance(item, dict):
            for name in (name for name in _RESERVED if name in item):
                raise argument_error(f"inputs[{number}]", f"leave {name!r} out", item[name], _RESERVED[name])
    return [{"prompt": item} if isinstance(item, str) else item for item in inputs]


def batches_of(inputs: list[dict], batch_size: int) -> Iterator[list[int]]:
    """Yields lists of consecutive inputs that share a call of the pipeline, as numbers; at most `batch_size` each."""
    batch: list[int] = []
    for number, item in enumerate(inputs):
        if batch and (len(batch) == batch_size or not can_share_a_call(inputs[batch[0]], item)):
            yield batch
            batch = []
        batch.append(number)
    yield batch
