"""What commands load before they start: the device, the inputs, the pipeline and predictors."""

import atexit
import contextlib
import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers.utils import logging

from lesa.cli import UsageError
from lesa.cli.matching import check_widths, matched
from lesa.cli.together import are_several, is_first
from lesa.cli.trying import check_by_pipeline
from lesa.inputs import Sample, check_inputs, read_samples
from lesa.messages import is_message
from lesa.models import adapter_for
from lesa.pipelines import absent_encoders, embeddings_instead, load_divided, load_pipeline, needed_encoders
from lesa.training.settings import usable_device
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error, check_folder_or_id
from lesa_kernels.predictor.files import budgets_in


def quiet_libraries() -> None:
    """Only errors of diffusers and of the hub are shown, and no bars but those of downloads."""
    logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # it announces each retry
    logging.disable_progress_bar()
    shows_downloads = not huggingface_hub.utils.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()  # also those of downloads
    if shows_downloads and is_first():
        huggingface_hub.utils.enable_progress_bars()


def device_of(options) -> str:
    """The device that was asked for, or the default one. Each process of a host has a GPU of its own by default.

    Raises:
        UsageError: there are several processes and GPUs, and nothing says which GPU is for this process.
        ValueError: torch cannot compute on it.
    """
    if options.device is not None:
        usable_device(options.device)
        return options.device
    if not torch.cuda.is_available():
        return "cpu"
    count = torch.cuda.device_count()
    if not are_several():
        return "cuda"
    if count > 1 and "LOCAL_RANK" not in os.environ:
        sentence = f"the environment has RANK but no LOCAL_RANK, so it is not known which of {count} GPUs to use."
        remedy = "Start the processes with `torchrun`, set LOCAL_RANK to the number of the process on its host"
        raise UsageError(f"argument --device: {sentence} {remedy}, or give each process its --device.")
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}"


def check_model(options) -> type | None:
    """The class of the pipeline of `--model`, if it can be known without loading it.

    Raises:
        FileNotFoundError: `--model` is a path, and there is no such folder.
        UsageError, ValueError: there is no such device, or the model cannot be divided as `--device-map` says.
    """
    check_folder_or_id("--model", options.model)
    _check_device_map(options)
    device_of(options)
    try:
        name = json.loads((Path(options.model) / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):  # on the hub, or damaged, which loading it reports
        return None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline) else None


def _check_device_map(options) -> None:
    """Raises `UsageError` where `--device-map` would make each process take all GPUs, or where a device is named."""
    if options.device_map is None:
        return
    if are_several():
        sentence = "it is for one process, which takes all GPUs, but several processes were started."
        remedy = "Start the command without `torchrun` and `accelerate launch`, or leave --device-map out."
        raise UsageError(f"argument --device-map: {sentence} {remedy}")
    if options.device not in (None, "cuda"):
        sentence = f"it takes all GPUs, so it cannot be used with --device {options.device}."
        remedy = "Leave out one of the two. CUDA_VISIBLE_DEVICES chooses the GPUs that are taken."
        raise UsageError(f"argument --device-map: {sentence} {remedy}")


def pipeline_of(options) -> Any:
    """The pipeline of `--model`, on its device and in its dtype."""
    quiet_libraries()
    model, device = options.model, device_of(options)
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases call it `dtype`; all know the older name
        try:
            pipe = _loaded(model, device, options.device_map is not None, torch_dtype=getattr(torch, dtype))
        except Exception as error:
            if isinstance(error, OSError) and not Path(model).is_dir():
                raise UsageError(f"argument --model: there is no folder {model!r}. The hub says: {error}") from None
            reason = str(error) if is_message(error) else f"{type(error).__name__}: {error}"  # of a file in the folder
            raise UsageError(f"argument --model: diffusers can't load {model!r}: {reason}") from None
    adapter_for(pipe)
    if (place := torch.device(device)).type == "cuda" and place.index is not None:
        torch.cuda.set_device(device)  # what some kernels and libraries use
    if options.device_map is None:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _loaded(model: str, device: str, is_divided: bool, **options: Any) -> Any:
    if not is_divided:
        return load_pipeline(model, **options)
    folder = tempfile.mkdtemp(prefix="lesa-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return load_divided(model, device, folder, **options)


def predictor_of(source: str, budget: int | None = None) -> FusedKANPredictor:
    """The predictor of `--predictor`, on the CPU.

    Args:
        source: the option.
        budget: which one to take, if there are several.

    Raises:
        UsageError: there are several, and `budget` is None; or it cannot be loaded.
    """
    if budget is None and (budgets := budgets_of(source)):
        listed = ", ".join(map(str, budgets))
        remedy = f"Give the folder of one of them, such as {source}/budget-{budgets[0]}."
        raise UsageError(f"argument --predictor: {source} has predictors for several budgets: {listed}. {remedy}")
    with _explained(source):
        return FusedKANPredictor.from_pretrained(source, budget=budget)


def budgets_of(source: str) -> list[int]:
    """The budgets for which `--predictor` has predictors; empty if it is one predictor."""
    with _explained(source):
        check_folder_or_id("folder_or_id", source)
        return budgets_in(source)


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Names the option where an error is raised that does not."""
    try:
        yield
    except Exception as error:
        if not is_message(error) or "`folder_or_id`" in str(error):
            raise
        raise UsageError(f"argument --predictor: {source} can't be used: {error}") from None


def check_schedules(predictors: Mapping[str, FusedKANPredictor], pipe: Any) -> None:
    """Raises `UsageError` if a predictor that fits the pipeline can be trained, and has no schedule.

    For commands without `--schedule`. A predictor that does not fit has another error.
    """
    adapter = adapter_for(pipe)
    for source, predictor in predictors.items():
        config = predictor.config
        fits = config.feature_dim in (None, adapter.feature_dim) and config.family in (None, adapter.family)
        if fits and config.schedule is None and config.forecaster.is_trained:
            remedy = "Train one with `lesa train`."
            raise UsageError(f"argument --predictor: {source} was trained without a schedule. {remedy}")


def read(options, kind: type | None) -> list[Sample]:
    """The inputs in `--inputs`, or the prompt. They fit the pipeline, if its class is known.

    Args:
        options: of the command.
        kind: what `check_model` returned.
    """
    prompt = getattr(options, "prompt", None)
    if prompt is not None:
        if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UsageError("argument --prompt: it has bytes that are not text. Check the terminal's encoding.")
        return [Sample("argument --prompt", {"prompt": prompt})]
    samples = read_samples(options.inputs)
    check_inputs([sample.arguments for sample in samples], [sample.place for sample in samples])
    return samples if kind is None else _fitted(options, samples, kind)


def prepare(options, pipe: Any, samples: list[Sample], num_inference_steps: int) -> list[Sample]:
    """The samples as the pipeline takes them: checked, with tensors on its device, floating ones in its dtype.

    Prints what diffusers warns of, such as a size that it rounds.

    Raises:
        TypeError, ValueError, UsageError: the pipeline refuses one of them. The message has its place.
    """
    if options.inputs is not None:  # else it is a prompt
        samples = _fitted(options, samples, type(pipe))
    _check_prompts(pipe, samples)
    check_widths(samples, pipe.transformer.config)
    device, dtype = pipe._execution_device, pipe.transformer.dtype

    def placed(place: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value.to(device) if isinstance(value, torch.Tensor) else value
        exact = value.double()  # 8-bit numbers cannot be asked
        converted = exact.to(dtype)
        if "mask" not in place and not torch.equal(converted.isinf(), exact.isinf()):  # a mask may be -inf
            limit = f"be at most {torch.finfo(dtype).max:g}, the largest {str(dtype).removeprefix('torch.')} number"
            got = Said(f"{exact.abs().max().item():g}")
            raise argument_error(place, limit, got, "Use another --dtype.")
        return converted.to(device)

    for text in check_by_pipeline(pipe, samples, num_inference_steps):
        print(f"Note: {' '.join(text.split())}", flush=True)
    return [
        replace(s, arguments={key: placed(f"{s.place}, {key!r}", value) for key, value in s.arguments.items()})
        for s in samples
    ]


def _fitted(options, samples: list[Sample], kind: type) -> list[Sample]:
    return matched(samples, kind.__name__, kind.__call__, options.inputs.absolute().parent)


def _check_prompts(pipe: Any, samples: list[Sample]) -> None:
    """Raises `UsageError` if there is a text for which the pipeline lacks the text encoder."""
    absent, needed = absent_encoders(pipe), needed_encoders(pipe)
    for sample in samples:
        for key, value in sample.arguments.items():
            if "prompt" not in key or not _has_text(value):
                continue
            own = [name for name in absent if key[-1].isdigit() and name == f"text_encoder_{key[-1]}"]
            lacking = own or needed
            if lacking:
                place = sample.place if key == "prompt" else f"{sample.place}, {key!r}"
                sentence = f"{place}: this model has no text encoder ({', '.join(lacking)}) for prompts."
                raise UsageError(f"{sentence} {_remedy_for_prompts(type(pipe).__call__, key, needed)}")


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(part, str) for part in value))


def _remedy_for_prompts(call: Callable, key: str, needed: list[str]) -> str:
    """What to pass instead of the text in the argument `key`."""
    if not needed:
        return "Leave it out."
    names = embeddings_instead(inspect.signature(call).parameters, key)
    return f"Pass embeddings with --inputs, a safetensors file that holds {' and '.join(names)}."
