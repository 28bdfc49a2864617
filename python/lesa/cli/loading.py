"""What commands load before they start: the device, the pipeline and its inputs."""

import inspect
import warnings
from pathlib import Path

import torch
from diffusers.utils import logging

from lesa.cli import UsageError
from lesa.inputs import check_inputs, read_inputs
from lesa.models import adapter_for
from lesa.pipelines import load_pipeline


def quiet_diffusers() -> None:
    """Only errors of diffusers are shown, and none of its progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def device_of(options) -> str:
    """The device that was asked for, or the default one."""
    if options.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:  # the first line is torch's own explanation
        reason = str(error).splitlines()[0]
        raise UsageError(f"argument --device: torch can't use {options.device!r}: {reason}") from None
    return options.device


def pipeline_of(options):
    """The pipeline of `--model`, on its device and in its dtype."""
    quiet_diffusers()
    model = options.model
    is_folder = Path(model).is_dir()
    if not is_folder and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise UsageError(f"argument --model: there is no folder {model!r}, and a hub id has the form 'user/name'.")
    device = device_of(options)
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases call it `dtype`; all know the older name
        try:
            pipe = load_pipeline(model, torch_dtype=getattr(torch, dtype))
        except OSError as error:
            if is_folder:
                raise
            raise UsageError(f"argument --model: there is no folder {model!r}. The hub says: {error}") from None
    adapter_for(pipe)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(options, pipe) -> list[dict]:
    """The inputs in `--inputs`: tensors on the pipeline's device, floating ones in its dtype."""
    inputs = check_prompts(pipe, check_inputs(read_inputs(options.inputs)))
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted({name for arguments in inputs for name in arguments} - set(known))
    if unknown:
        names = ", ".join(unknown)
        raise UsageError(f"argument --inputs: {type(pipe).__name__} has no argument {names}. Remove it from the file.")
    device, dtype = pipe.transformer.device, pipe.transformer.dtype

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return [{name: placed(value) for name, value in arguments.items()} for arguments in inputs]


def check_prompts(pipe, inputs: list[dict]) -> list[dict]:
    """The inputs. Prompts are refused if the pipeline has no text encoder for them."""
    absent = [name for name, part in pipe.components.items() if name.startswith("text_encoder") and part is None]
    if absent and any(arguments.get("prompt") is not None for arguments in inputs):
        raise UsageError(
            f"this model has no text encoder ({', '.join(absent)}) for prompts. Pass their embeddings with --inputs, a "
            "safetensors file that holds prompt_embeds and pooled_prompt_embeds."
        )
    return inputs
