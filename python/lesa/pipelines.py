"""Loading pipelines by name, and running pipelines of either kind."""

import contextlib
import importlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import hooks
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.modular_pipelines import PipelineState

from lesa_kernels.checks import Said, argument_error, check_folder_or_id, usage_error

_DECODER = "decode"
"""The name that diffusers gives to the last block of a modular pipeline, which makes pictures from the latents."""

_OPTIONAL_ENCODERS = ("text_encoder_3",)
"""Text encoders without which pipelines encode prompts: Stable Diffusion 3 then takes zeros."""
_DIVIDED = ("transformer", "transformer_2")
"""The components that `load_divided` divides."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def load_pipeline(folder_or_id: str | os.PathLike, **options: Any) -> DiffusionPipeline:
    """Loads a pipeline that may have been saved with some components empty, such as its text encoders.

    `DiffusionPipeline.from_pretrained` needs the names of the absent components. They are read from `model_index.json`.

    Args:
        folder_or_id: a folder, or a repository on the Hugging Face hub.
        options: passed to `DiffusionPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: it looks like a path, and there is no such folder. The hub is not asked.
        ValueError: it is a modular pipeline. It is saved without its blocks and its guider.
    """
    check_folder_or_id("folder_or_id", folder_or_id)
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    try:
        index = DiffusionPipeline.load_config(folder_or_id, **hub)
    except OSError:
        if not _is_modular(folder_or_id, hub):
            raise
        sentence = (
            f"`{os.fspath(folder_or_id)}` has a modular pipeline, which is saved without its blocks and its guider."
        )
        raise usage_error(sentence, "Put it together in Python, and pass it to lesa there.") from None
    absent = {name: None for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is None}
    return DiffusionPipeline.from_pretrained(folder_or_id, **{**absent, **options})


def absent_encoders(pipe: Any) -> list[str]:
    """The text encoders that a pipeline has a place for, but does not have."""
    return [name for name, part in pipe.components.items() if name.startswith("text_encoder") and part is None]


def needed_encoders(pipe: Any) -> list[str]:
    """Those of `absent_encoders` without which the pipeline cannot encode a prompt."""
    return [name for name in absent_encoders(pipe) if name not in _OPTIONAL_ENCODERS]


def embeddings_instead(arguments: Iterable[str], name: str) -> list[str]:
    """Those of a pipeline's arguments that hold embeddings, for the prompt in the argument `name`.

    Embeddings of negative prompts are for negative prompts.
    """
    is_negative = name.startswith("negative_")
    return [each for each in arguments if "prompt_embeds" in each and each.startswith("negative_") == is_negative]


def load_divided(folder_or_id: str | os.PathLike, device: str, offload_folder: str, **options: Any) -> Any:
    """Loads a pipeline whose transformers are divided among all GPUs, for a model that is larger than one.

    What does not fit on the GPUs stays in the memory of the CPU, and then in files. Hooks of accelerate bring it to a
    GPU when it is needed.

    Args:
        folder_or_id, options: as in `load_pipeline`.
        device: where the other components go.
        offload_folder: for these files.

    Raises:
        FileNotFoundError, ValueError: as `load_pipeline` does.
    """
    check_folder_or_id("folder_or_id", folder_or_id)
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    index = DiffusionPipeline.load_config(folder_or_id, **hub)
    kinds = {name: index[name] for name in _DIVIDED if isinstance(index.get(name), (list, tuple)) and index[name][0]}
    pipe = load_pipeline(folder_or_id, **dict.fromkeys(kinds), **options).to(device)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):  # by it diffusers knows where to make tensors
            hooks.add_hook_to_module(part, hooks.AlignDevicesHook(device, io_same_device=True))
    divided = {}
    for name, (library, kind) in kinds.items():  # last: by then the memory of the other components is taken
        load = getattr(importlib.import_module(library), kind).from_pretrained
        place = {"device_map": "auto", "offload_folder": offload_folder}
        divided[name] = load(folder_or_id, subfolder=name, **place, **options)
    # Anew, because a pipeline takes settings such as its default size from the transformer when it is made.
    return DiffusionPipeline.from_pretrained(folder_or_id, **{**pipe.components, **divided}, **hub)


def _is_modular(folder_or_id: str | os.PathLike, hub: dict[str, Any]) -> bool:
    """Whether a folder or repository has the index of a modular pipeline."""
    try:
        ModularPipeline.load_config(folder_or_id, **hub)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet_progress(pipe: Any) -> Iterator[None]:
    """A context in which the pipeline's own progress bar is off. Of a modular pipeline, those of its blocks are off."""
    blocks = blocks_of(pipe)
    owners = [block for block in (blocks.values() or [pipe]) if hasattr(block, "set_progress_bar_config")]
    before = [vars(owner).get("_progress_bar_config") for owner in owners]
    for owner, config in zip(owners, before):
        owner.set_progress_bar_config(**{**(config or {}), "disable": True})
    try:
        yield
    finally:
        for owner, config in zip(owners, before):
            if config is not None:
                owner._progress_bar_config = config
            else:
                del owner._progress_bar_config


def blocks_of(pipe: Any) -> dict[str, Any]:
    """All blocks of a modular pipeline by path, such as "denoise.denoiser"; empty for an ordinary pipeline."""

    def inside(path: str, block: Any) -> dict[str, Any]:
        found = {path: block}
        for name, part in getattr(block, "sub_blocks", {}).items():
            found |= inside(f"{path}.{name}" if path else name, part)
        return found

    return inside("", pipe._blocks) if isinstance(pipe, ModularPipeline) else {}


def run_pipeline(
    pipe: Any,
    arguments: dict[str, Any],
    generators: list[torch.Generator],
    num_inference_steps: int,
    on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
    output_type: str = "latent",
) -> Any:
    """Runs a pipeline, modular or not, and returns its latents as they are before the VAE.

    Args:
        pipe: the pipeline.
        arguments: of the call, without those below.
        generators: one for each sample.
        num_inference_steps: passed to the pipeline.
        on_step_end: called after each step, as diffusers calls `callback_on_step_end`. Modular pipelines and a few
            others have no such callback. There it is called with what the scheduler's step returns.
        output_type: passed to a pipeline that is not modular, in place of "latent".

    Returns:
        What the pipeline returns with that `output_type`; of a modular pipeline, the value `latents` of its state.

    Raises:
        ValueError: a modular pipeline has no input of that name. diffusers would ignore it with a warning.
    """
    call = {**arguments, "generator": generators, "num_inference_steps": num_inference_steps}
    if not isinstance(pipe, ModularPipeline):
        has_callback = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
        options = {"callback_on_step_end": on_step_end} if has_callback and on_step_end is not None else {}
        with _after_steps(pipe, None if has_callback else on_step_end):
            return pipe(**call, **options, output_type=output_type, return_dict=False)[0]
    with _without_decoding(pipe), _after_steps(pipe, on_step_end):
        known = {name for given in pipe._blocks.inputs for name in (given.name, given.kwargs_type) if name}
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise argument_error(
                "inputs",
                f"have arguments that the blocks of the {type(pipe).__name__} read ({', '.join(sorted(known))})",
                Said(f"{', '.join(map(repr, unknown))}"),
                "Leave it out. Guidance is an option of the pipeline's guider.",
            )
        return pipe(**call, output="latents")


def check_decodes(pipe: Any) -> None:
    """Raises `TypeError` if a pipeline has nothing to make pictures with: a VAE, and if it is modular, the block."""
    lacks = f"a last block {_DECODER!r}" if isinstance(pipe, ModularPipeline) and _decoder_of(pipe) is None else None
    if getattr(pipe, "vae", None) is None:
        lacks = "a VAE"
    if lacks is not None:
        raise argument_error(
            "pipe",
            f"have {lacks}, so that pictures can be compared",
            Said(f"a {type(pipe).__name__} without one"),
            f"Load the pipeline with its VAE; a modular pipeline needs its block `{_DECODER}` too.",
            TypeError,
        )


@torch.no_grad()
def decoded_by_blocks(pipe: ModularPipeline, latents: torch.Tensor, arguments: dict[str, Any]) -> np.ndarray:
    """What the block `decode` of a modular pipeline makes from latents, in [0, 1].

    Args:
        pipe: the pipeline; `check_decodes` lets it through.
        latents: what `run_pipeline` returned.
        arguments: those of that call.

    Returns:
        Images `[B, height, width, channels]`, or videos `[B, frames, height, width, channels]`.
    """
    block: Any = _decoder_of(pipe)
    known = {"latents": latents, "output_type": "np", "batch_size": len(latents), "dtype": latents.dtype}
    state = PipelineState()
    for given in block.inputs:
        value = known.get(given.name, arguments.get(given.name, given.default))
        if given.name is not None:
            state.set(given.name, value, given.kwargs_type)
    _, state = block(pipe, state)
    made: Any = next(value for name in ("images", "videos") if (value := state.get(name)) is not None)
    return np.stack([np.asarray(image) for image in made])


def _decoder_of(pipe: ModularPipeline) -> Any:
    """The last block of a modular pipeline if that one decodes the latents, or None."""
    blocks = getattr(pipe._blocks, "sub_blocks", {})
    return blocks[_DECODER] if next(reversed(blocks), None) == _DECODER else None


@contextlib.contextmanager
def _without_decoding(pipe: ModularPipeline) -> Iterator[None]:
    """A context in which a modular pipeline leaves out the block that decodes."""
    decoder, blocks = _decoder_of(pipe), getattr(pipe._blocks, "sub_blocks", {})
    if decoder is not None:
        del blocks[_DECODER]
    try:
        yield
    finally:
        if decoder is not None:
            blocks[_DECODER] = decoder


@contextlib.contextmanager
def _after_steps(pipe: Any, callback: Callable[[Any, int, Any, dict], dict] | None) -> Iterator[None]:
    """A context in which `callback` is called after each step of the pipeline's scheduler."""
    if callback is None:
        yield
        return
    scheduler, numbers = pipe.scheduler, itertools.count()
    before, step = vars(scheduler).get("step"), scheduler.step

    def noted(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **options: Any) -> Any:
        made = step(output, timestep, sample, *args, **options)
        callback(pipe, next(numbers), timestep, {"latents": made[0]})
        return made

    scheduler.step = noted
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before
