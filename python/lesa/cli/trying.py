"""Distinguishes errors in a user's inputs from bugs, by asking the pipeline itself."""

import contextlib
import inspect
import logging
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lesa.cli import UsageError, is_message
from lesa.inputs import Sample


class _Reached(Exception):
    """The pipeline came as far as it was asked to."""


def check_by_pipeline(pipe: Any, samples: Iterable[Sample], num_inference_steps: int) -> list[str]:
    """Runs the pipeline's own check of its arguments on each sample, and nothing after it.

    Returns:
        What diffusers warns of, each text once.

    Raises:
        UsageError: the pipeline refuses a sample. The message has its place.
    """
    if not hasattr(pipe, "check_inputs"):
        return []
    run, check = inspect.unwrap(type(pipe).__call__), pipe.check_inputs

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

    Only after an error, the pipeline runs without a cache on each sample. If it can do that, the error is a bug and is
    raised as it is.

    Args:
        pipe: the pipeline, whose cache is off after the context.
        samples: what it was to run on.
        num_inference_steps: of the runs.
    """
    try:
        yield
    except Exception as error:
        if is_message(error):
            raise
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        one_step = any(name.startswith("lesa.cache") for name in frames)  # it failed in a call of the transformer
        for sample in samples:
            failure = _failure(pipe, sample.arguments, num_inference_steps, one_step)
            if failure is not None:
                raise _refused(sample, f"{type(pipe).__name__} fails on it, also without lesa", failure) from None
        raise


def _failure(pipe: Any, arguments: dict[str, Any], num_inference_steps: int, one_step: bool) -> Exception | None:
    """The error of the pipeline in its first step, or in the whole run, or None."""

    def stop(*_: Any) -> dict[str, Any]:
        if one_step:
            raise _Reached
        return {}

    generator = torch.Generator("cpu").manual_seed(0)
    try:
        pipe(**arguments, num_inference_steps=num_inference_steps, generator=generator, callback_on_step_end=stop)
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
