"""Distinguishes errors in a user's inputs from bugs, by asking the pipeline itself."""

import contextlib
import inspect
import logging
import traceback
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lesa.artifacts import digest
from lesa.cli import UsageError
from lesa.inputs import Sample
from lesa.messages import is_message
from lesa.pipelines import run_pipeline


class _Reached(Exception):
    """The pipeline came as far as it was asked to."""


def check_by_pipeline(pipe: Any, samples: Iterable[Sample], num_inference_steps: int) -> list[str]:
    """Runs only the pipeline's `check_inputs` on each sample. Does nothing if the pipeline has none.

    Returns:
        What diffusers warns of, each text once.

    Raises:
        UsageError: the pipeline refuses a sample. The message has its place.
    """
    run = inspect.unwrap(type(pipe).__call__)
    if "check_inputs" not in run.__code__.co_names:  # it has no check of its own, and would run to its end
        return []
    check = pipe.check_inputs

    def check_and_stop(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        raise _Reached

    vars(pipe)["check_inputs"] = check_and_stop
    warned: dict[str, None] = {}
    try:
        with _warnings_of_diffusers(warned), torch.no_grad():
            for sample in samples:
                try:
                    run(pipe, **sample.arguments, num_inference_steps=num_inference_steps)
                except _Reached:
                    pass
                except Exception as error:  # of the pipeline's own lines before its check, or of the check
                    raise _refused(sample, f"{type(pipe).__name__} refuses it", error) from None
    finally:
        del vars(pipe)["check_inputs"]
    return [*warned]


@contextlib.contextmanager
def explained(pipe: Any, samples: Iterable[Sample], num_inference_steps: int) -> Iterator[None]:
    """Raises `UsageError` for an error inside, if the pipeline alone fails on one of the samples too.

    Only after an error in a call of the pipeline, it runs without a cache on the samples of that call, for one step if
    the error came from a step. If it can do that, the error is a bug and is raised as it is.

    Args:
        pipe: the pipeline, whose cache is off after the context.
        samples: what it was to run on. Where the library itself calls the pipeline, those of the call are found.
        num_inference_steps: of the runs.
    """
    try:
        yield
    except Exception as error:
        if is_message(error):
            raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        body = inspect.unwrap(type(pipe).__call__).__code__
        start = next((number for number, frame in enumerate(frames) if frame.f_code is body), None)
        if start is None:  # it is not an error of the pipeline
            raise
        names = [frame.f_globals.get("__name__", "") for frame in frames[start:]]
        one_step = any(name.startswith("lesa.") for name in names)  # it failed in a step
        for sample in _in_call(samples, frames[:start]):
            failure = _failure(pipe, sample.arguments, num_inference_steps, one_step)
            if failure is not None:
                raise _refused(sample, f"{type(pipe).__name__} fails on it, also without lesa", failure) from None
        raise


def _in_call(samples: Iterable[Sample], frames: Iterable[types.FrameType]) -> list[Sample]:
    """The samples whose arguments were joined for the call that is under way in these frames; all if it has none."""
    joined = next((frame.f_locals["arguments"] for frame in frames if frame.f_code is run_pipeline.__code__), None)
    if joined is None:
        return [*samples]
    return [s for s in samples if all(_holds(joined.get(name), value) for name, value in s.arguments.items())]


def _holds(joined: Any, value: Any) -> bool:
    """Whether the value of one sample is in the joined one."""
    if isinstance(value, torch.Tensor) and value.ndim > 0:
        rows = joined if isinstance(joined, torch.Tensor) and joined.shape[1:] == value.shape[1:] else ()
        return any(torch.equal(row, value[0]) for row in rows)
    if isinstance(joined, list) and not isinstance(value, list):
        return any(part is value or digest(part) == digest(value) for part in joined)
    return joined is value or digest(joined) == digest(value)


def _failure(pipe: Any, arguments: dict[str, Any], num_inference_steps: int, one_step: bool) -> Exception | None:
    """The error of the pipeline in its first step, or in the whole run, or None."""

    def stop(*_: Any) -> dict[str, Any]:
        if one_step:
            raise _Reached
        return {}

    call = {**arguments, "num_inference_steps": num_inference_steps}
    call["generator"] = torch.Generator("cpu").manual_seed(0)
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        call["callback_on_step_end"] = stop
    try:
        pipe(**call)
    except _Reached:
        return None
    except Exception as error:
        return error
    return None


def _refused(sample: Sample, text: str, error: Exception) -> UsageError:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    reason = " ".join(str(error).split())
    if len(reason) > 300:  # some print a whole tensor
        reason = f"{reason[:300]}..."
    return UsageError(f"{sample.place}: {text}: {kind}{reason}")


@contextlib.contextmanager
def _warnings_of_diffusers(found: dict[str, None]) -> Iterator[None]:
    """Collects the texts of what diffusers warns of, instead of printing them."""
    logger = logging.getLogger("diffusers")
    handlers, level = logger.handlers, logger.level

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found[record.getMessage()] = None

    logger.handlers = [Collect(logging.WARNING)]
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
