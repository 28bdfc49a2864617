"""The inputs of a fit: those that are given, or prompts that are part of the package."""

import inspect
import re
from typing import Any

from diffusers import ModularPipeline

from lesa.fitting.prompts import CLIPS, PICTURES
from lesa.inputs import check_inputs
from lesa.pipelines import embeddings_instead, needed_encoders
from lesa_kernels.checks import usage_error

_GIVEN = ("image", "images", "cond_image", "control_image", "video", "control_video", "audio")
_MASKS = ("mask_image", "control_mask", "mask_video")
"""Arguments with what a pipeline works on. Many pipelines cannot do without them, although their default is None."""

_WORKS_ON_GIVEN = re.compile(
    r"Img2Img|[^T]I2[IV]|(Image|Video|Audio)To|(Image|Video)2(Video|World)"
    r"|Inpaint|Edit|Kontext|Control|Fill|Layered|Refiner"
)
"""In the name of a pipeline's class: it works on what is given."""
_FILLS_IN = re.compile("Inpaint|Fill")
"""In the name of a pipeline's class: it also needs a mask."""

_SET_BY_LESA = ("num_inference_steps", "latents", "timesteps")
"""Arguments that a modular pipeline may require, and that lesa or the scheduler sets."""

_FRAMES = ("num_frames", "frames")


def chosen_inputs(pipe: Any, inputs: Any) -> list[dict]:
    """The inputs that are given, checked, or prompts that are part of the package.

    The prompts are for pipelines that need nothing but a prompt. A pipeline that can do without an image is given none,
    unless the name of its class says that it works on one.

    Args:
        pipe: a diffusers pipeline, modular or not.
        inputs: prompts, or dicts of pipeline arguments. None: the prompts.

    Raises:
        TypeError: `inputs` is something else.
        ValueError: an input cannot be used, or there is none, and the pipeline needs more than a prompt. The message
            has the names of the missing arguments.
    """
    if inputs is not None:
        return check_inputs(inputs)
    kind, known = type(pipe).__name__, _arguments(pipe)
    needed = _needed(pipe, known)
    encoders = needed_encoders(pipe) if "prompt" in known else []
    if encoders:
        embeddings = embeddings_instead(known, "prompt")
        why = f"it has no text encoder ({', '.join(encoders)}), so that it needs {_and([*embeddings, *needed])}"
        remedy = "Pass a .safetensors file that holds them for each sample, or in Python a list of dicts."
    elif needed:
        why = f"it needs {_and(needed)}"
        remedy = _how_to_give(needed)
    else:
        makes_videos = any(name in known for name in _FRAMES)
        half = len(CLIPS) // 2  # the first ones are to train on; the last ones are for the test and for choices
        texts = (*CLIPS[:half], *PICTURES, *CLIPS[half:]) if makes_videos else PICTURES
        return [{"prompt": text} for text in texts]
    sentence = f"`inputs` are required for this {kind}: {why}. The built-in prompts have none of this."
    raise usage_error(sentence, remedy)


def _arguments(pipe: Any) -> dict[str, bool]:
    """The arguments of a call of the pipeline by name, and whether each of them is required."""
    if isinstance(pipe, ModularPipeline):
        return {given.name: given.required for given in pipe._blocks.inputs if given.name}
    parameters = [*inspect.signature(type(pipe).__call__).parameters.values()][1:]  # without self
    named = (p for p in parameters if p.kind is not p.VAR_KEYWORD)
    return {parameter.name: parameter.default is parameter.empty for parameter in named}


def _needed(pipe: Any, known: dict[str, bool]) -> list[str]:
    """The arguments beside the prompt that each call needs."""
    kind = type(pipe).__name__
    needed = [name for name, is_required in known.items() if is_required and name not in ("prompt", *_SET_BY_LESA)]
    if _WORKS_ON_GIVEN.search(kind):
        given = [name for name in _GIVEN if name in known and name not in needed]
        if {"image", "video"} <= {*given}:  # each of them is enough
            given = [name for name in given if name != "video"]
        masks = [name for name in _MASKS if name in known and name not in needed] if _FILLS_IN.search(kind) else []
        needed += [*given, *masks]
    return needed


def _and(names: list[str]) -> str:
    return " and ".join(([", ".join(names[:-1])] if len(names) > 1 else []) + names[-1:])


def _how_to_give(needed: list[str]) -> str:
    if not all("image" in name or "mask" in name for name in needed):
        return "Pass them for each sample, in Python as a list of dicts."
    parts = ['"prompt": "a red fox"', *(f'"{name}": "{name}-1.png"' for name in needed)]
    line = f"{{{', '.join(parts)}}}"
    return f"Pass a .jsonl file with a line for each sample, such as {line}, or in Python a list of dicts."
