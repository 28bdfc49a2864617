"""Which pipelines and predictors gradients can pass through."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModularPipeline

from lesa.cache.placement import check_uncached
from lesa.models import adapters_for
from lesa.spread import is_spread
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error

_MOVING_HOOKS = ("group_offloading", "layerwise_casting", "lazy_prefetch", "layer_execution_tracker")
"""The names of the hooks of diffusers that move or cast weights begin with these."""


def check_differentiable(pipe: Any, predictor: FusedKANPredictor) -> None:
    """Raises an error unless gradients can pass through runs of the pipeline with the predictor.

    Raises:
        TypeError, ValueError: they cannot. The message names why.
        RuntimeError: a cache is on.
    """
    name = type(pipe).__name__
    if isinstance(pipe, ModularPipeline):
        raise refusal("be no modular pipeline", f"a {name}", TypeError)
    adapters = adapters_for(pipe)
    check_uncached(pipe)
    if predictor.config.history == "steps":
        got = Said(f"{predictor.config.history!r}, that of the forecaster {predictor.config.mixer!r}")
        remedy = "Use a predictor whose history has computed steps only, or use `lesa.refine`."
        raise argument_error("predictor.config.history", "be 'anchors'", got, remedy)
    if not predictor.forecaster.plans:
        must, remedy = "be a forecaster whose weights depend on noise levels only", "Use another, or `lesa.refine`."
        raise argument_error("predictor.config.mixer", must, predictor.config.mixer, remedy)
    without_no_grad(type(pipe))
    if len(adapters) > 1:
        raise refusal("have one transformer", f"a {name} with {' and '.join(adapters)}")
    (adapter,) = adapters.values()
    if len(adapter.branches) > 1:
        raise refusal("have one output head", f"a {name}, whose transformer has {len(adapter.branches)}")
    if getattr(pipe, "controlnet", None) is not None:
        raise refusal("have no ControlNet", f"a {name} with one")
    _check_weights(pipe, adapter.transformer)


def without_no_grad(cls: type) -> Callable[..., Any]:
    """The `__call__` of a pipeline class without its outermost decorator, which must be `no_grad` of torch.

    Raises:
        TypeError: it is another one, or there is none.
    """
    call: Any = cls.__call__
    owners = [getattr(cell.cell_contents, "__self__", None) for cell in getattr(call, "__closure__", None) or ()]
    if not any(isinstance(owner, (torch.no_grad, torch.inference_mode)) for owner in owners):
        got = f"a {cls.__name__}, which has another decorator or none"
        raise refusal("have a `__call__` whose outermost decorator is `torch.no_grad`", got, TypeError)
    return call.__wrapped__


def _check_weights(pipe: Any, transformer: torch.nn.Module) -> None:
    """Raises `ValueError` if a backward pass would not find the weights, or could not use them."""
    name = type(transformer).__name__
    if transformer is not pipe.transformer or vars(transformer).get("_compiled_call_impl") is not None:
        must, remedy = "have a transformer that is not compiled as a whole", "Compile it after the training."
        raise argument_error("pipe", must, Said(f"a compiled {name}"), remedy)
    if is_spread(transformer):
        raise refusal("have a transformer that one process has as a whole", f"a {name} that several share")
    if any(map(_moves_weights, transformer.modules())) or any(part.is_meta for part in _tensors_of(transformer)):
        must = "have its weights in one place and one dtype"
        raise refusal(must, f"a {name} that is offloaded or cast layer by layer")
    for part in models_of(pipe):
        if any(tensor.is_inference() for tensor in _tensors_of(part)):
            got = Said(f"a {type(part).__name__} whose weights were made in `torch.inference_mode`")
            raise argument_error("pipe", "have weights that can take part in gradients", got, "Load it outside of it.")


class NoGradientError(ValueError):
    """No gradient passes through a pipeline."""


class TrainingFailedError(RuntimeError):
    """A training through whole runs, or a search with it, cannot go on: numbers are not finite."""


def refusal(must: str, got: str, kind: type[Exception] = NoGradientError) -> Exception:
    """The error for what gradients cannot pass through: what the pipeline must be, and what it is."""
    return argument_error("pipe", f"{must}, so that gradients pass through it", Said(got), "Use `lesa.refine`.", kind)


def _moves_weights(module: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers change where the weights of a module are, or their dtype."""
    hook: Any = vars(module).get("_hf_hook")
    if any(getattr(each, "offload", True) for each in getattr(hook, "hooks", () if hook is None else (hook,))):
        return True
    registry = vars(module).get("_diffusers_hook")
    return any(name.startswith(_MOVING_HOOKS) for name in getattr(registry, "hooks", ()))


def models_of(pipe: Any) -> list[torch.nn.Module]:
    """All models of a pipeline, also its text encoders and its VAE."""
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
