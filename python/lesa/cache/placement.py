"""What a cache puts on transformers and their pipeline, and how it takes that away again."""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference

from lesa.models import transformers_of
from lesa.models.own_forward import class_forward
from lesa_kernels.checks import Said, argument_error, usage_error

HOOK_NAME = "lesa"

_LAYER_CACHES = ("fbc", "faster_cache", "mag_cache", "pyramid_attention", "taylorseer", "sea_cache")
"""The names of the hooks of diffusers' caches begin with these."""


def installed_hook(transformer: Any) -> Any:
    """The hook of lesa that is on `transformer`, or None."""
    registry = getattr(transformer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(HOOK_NAME)


def hook_of(pipe: Any) -> Any:
    """The hook of lesa that is on the pipeline, also if a transformer was replaced in the meantime; or None."""
    watching = getattr(type(pipe), "_lesa_hook", None)
    if watching is not None and watching.pipe is pipe:
        return watching
    hooks = map(installed_hook, transformers_of(pipe).values())
    return next((hook for hook in hooks if hook is not None), None)


def check_uncached(pipe: Any) -> None:
    """Raises `RuntimeError` if lesa or a cache of diffusers is on for the pipeline or its transformer."""
    if hook_of(pipe) is not None:
        raise argument_error(
            "pipe",
            "have no cache on",
            Said("one with lesa on already"),
            "Call `lesa.disable_cache(pipe)` first, or wait until the recording has ended.",
            RuntimeError,
        )
    for name, transformer in transformers_of(pipe).items():
        check_no_other_cache(name, transformer)
        check_no_layer_cache(transformer)


def check_no_other_cache(name: str, transformer: Any) -> None:
    """Raises `RuntimeError` if a cache of diffusers was enabled for the pipeline's component of this name."""
    if getattr(transformer, "is_cache_enabled", False):
        raise argument_error(
            "pipe",
            "have no other cache on",
            Said(f"one with a {type(transformer._cache_config).__name__}"),
            f"Call `pipe.{name}.disable_cache()` first.",
            RuntimeError,
        )


def check_no_layer_cache(transformer: torch.nn.Module) -> None:
    """Raises `RuntimeError` if a cache of diffusers has hooks on the layers of `transformer`."""
    for module in transformer.modules():
        for name in getattr(vars(module).get("_diffusers_hook"), "hooks", ()):
            if name.startswith(_LAYER_CACHES):
                remedy = "Make the pipeline again without it."
                got = Said(f"one with the hook {name!r} on a layer")
                raise argument_error("pipe", "have no other cache on", got, remedy, RuntimeError)


def refusal_to_copy() -> Exception:
    """The error for those who copy or pickle what has a cache on."""
    sentence = "`transformer` cannot be copied while a cache of lesa is on."
    return usage_error(sentence, "Call `lesa.disable_cache(pipe)` first.", RuntimeError)


class Placement:
    """Puts a hook on one transformer, and takes it away.

    The hook replaces `_compiled_call_impl`, which torch calls first, whether the transformer is compiled or not. It is
    told of contexts and resets as a hook in diffusers' registry.

    The transformer gets its class's forward as an attribute. By the identity of this method, lesa can see whether
    someone has set the class's forward since then. If the transformer is compiled, it is the method of a copy of the
    function, so torch does not use a graph that was compiled without the hook.

    Args:
        site: where to put it. Its `gate` gets the transformer's calls, its `on_head_entry` those of the heads.

    Attributes:
        compiled: what `torch.compile` made of the transformer's calls, or None.
        captures: the handles of the forward pre-hooks on the output heads.
    """

    def __init__(self, site: Any):
        self._site, self._adapter = site, site.adapter
        self._transformer: torch.nn.Module = site.adapter.transformer
        self.is_on = False

    def put(self) -> None:
        """Puts the hook on."""
        site, transformer = self._site, self._transformer
        self._had_registry = "_diffusers_hook" in vars(transformer)
        # A module that `torch.compile` returned is called instead of the transformer.
        self._called_module = site.component
        attributes = vars(self._called_module)
        self.compiled: Callable | None = attributes.get("_compiled_call_impl")
        self._gate, self._own_compile = site.gate, self._compile
        self.captures: list[Any] = []
        self._known: list[Any] = []  # bound forwards that belong to wrappers, which set them when they are removed
        self._forward: types.MethodType | None = None
        self._seen: Any = None  # the wrapper whose forwards are known
        self.is_on = True  # from here on, `remove` takes away what is on
        _join(HookRegistry.check_if_exists_or_initialize(transformer), site.hook)
        attributes.update(_compiled_call_impl=self._gate, compile=self._own_compile)
        for head, branch in enumerate(self._adapter.branches):
            self.captures.append(branch.on_entry(functools.partial(site.on_head_entry, head)))
        self._remember_forwards()
        self.look_at_forward()

    def remove(self) -> None:
        """Takes the hook away. Does nothing if it is off already. What others have put on in the meantime stays."""
        if not self.is_on:
            return
        self.is_on = False
        for capture in self.captures:
            capture.remove()
        attributes = vars(self._called_module)
        if attributes.get("compile") is self._own_compile:
            del attributes["compile"]
        if attributes.get("_compiled_call_impl") is self._gate:
            del attributes["_compiled_call_impl"]
            if self.compiled is not None:
                attributes["_compiled_call_impl"] = self.compiled
        attributes = vars(self._transformer)
        if self._forward is not None:
            if attributes.get("forward") is self._forward:
                del attributes["forward"]
            function = class_forward(type(self._transformer))
            if isinstance(function, types.FunctionType):  # gives others the class's own, where they have kept the copy
                plain = types.MethodType(function, self._transformer)
                self._adapter.own_forward.replace(self._forward, plain)
        registry = attributes.get("_diffusers_hook")
        if registry is not None and registry.get_hook(HOOK_NAME) is self._site.hook:
            _leave(registry)
            if not registry.hooks and not self._had_registry:
                del attributes["_diffusers_hook"]

    @property
    def is_compiled(self) -> bool:
        """Whether the transformer is compiled as a whole."""
        return self.compiled is not None or self._site.component is not self._transformer

    @property
    def call(self) -> Callable:
        """What a call of the transformer runs without the hook."""
        return self.compiled or self._called_module._call_impl

    def look_at_forward(self) -> None:
        """Sets the class's forward as an attribute, unless another one is there. Remembers what wraps it now."""
        attributes, function = vars(self._transformer), class_forward(type(self._transformer))
        present = attributes.get("forward")
        if present is None or present is self._forward:
            if not isinstance(function, types.FunctionType):  # a descriptor makes the forward at each access
                attributes.pop("forward", None)
                return
            function = _copy_of(function) if self.is_compiled else function
            if present is None or present.__func__ is not function:
                attributes["forward"] = self._forward = types.MethodType(function, self._transformer)
                self._known.append(self._forward)
        elif present is not self._seen and not self._is_plain(present):
            self._seen = present
            self._remember_forwards()

    def _remember_forwards(self) -> None:
        held = self._adapter.own_forward.held()
        self._known += [forward for forward in held if not any(forward is known for known in self._known)]

    def is_forward_replaced(self) -> bool:
        """Whether someone has set the transformer's forward to that of its class since the hook was put on."""
        forward = vars(self._transformer).get("forward")
        return self._is_plain(forward) and not any(forward is known for known in self._known)

    def _is_plain(self, forward: Any) -> bool:
        """Whether `forward` is what the transformer has if nobody sets it."""
        is_method = isinstance(forward, types.MethodType) and forward.__self__ is self._transformer
        return is_method and forward.__func__ is class_forward(type(self._transformer))

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the module's own `compile`: what is compiled is behind the gate."""
        self.compiled = torch.compile(self._called_module._call_impl, *args, **kwargs)


class Watch:
    """Tells a hook when its pipeline runs. A subclass of the pipeline's class, which has the same name, replaces it.

    Args:
        hook: the hook. Its `pipeline_run` is a context that is entered while the pipeline runs.
    """

    def __init__(self, hook: Any):
        self._hook = hook
        self._watching_class: type | None = None

    def remove(self) -> None:
        """Gives the pipeline its class back."""
        if type(self._hook.pipe) is self._watching_class:
            self._hook.pipe.__class__ = self._pipe_class

    def put(self) -> None:
        """Replaces the pipeline's class."""
        pipe, hook = self._hook.pipe, self._hook
        cls = self._pipe_class = type(pipe)
        self._watching_class = None
        if not callable(pipe):  # a loop of the user's own calls the transformer
            return

        @functools.wraps(cls.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with hook.pipeline_run():
                return cls.__call__(self, *args, **kwargs)

        def new(_: type, *args: Any, **kwargs: Any) -> Any:
            return cls(*args, **kwargs)  # only this pipeline has the subclass

        def copy(self: Any) -> Any:
            other: Any = object.__new__(cls)
            vars(other).update(vars(self))
            return other

        def refuse(self: Any, protocol: Any) -> Any:
            raise refusal_to_copy()

        members = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__, "_lesa_hook": hook}
        members |= {"__new__": new, "__call__": call, "__copy__": copy, "__reduce_ex__": refuse, "__doc__": cls.__doc__}
        self._watching_class = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(members))
        pipe.__class__ = self._watching_class


_copies: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()  # of functions


def _copy_of(function: Any) -> Any:
    """The same function as another object with its own code, by which torch.compile distinguishes functions.

    It is always the same copy, so that what was compiled with it can be used again.
    """
    if not isinstance(function, types.FunctionType):
        return function
    if function not in _copies:
        code, names, closure = function.__code__.replace(), function.__globals__, function.__closure__
        copy = types.FunctionType(code, names, function.__name__, function.__defaults__, closure)
        copy.__kwdefaults__ = function.__kwdefaults__
        for name in functools.WRAPPER_ASSIGNMENTS:
            setattr(copy, name, getattr(function, name))
        vars(copy).update(vars(function))
        _copies[function] = copy
    return _copies[function]


def _join(registry: HookRegistry, hook: ModelHook) -> None:
    """Lets the hook hear of contexts and resets, without wrapping `forward`.

    It comes first in the order, where the removal of another hook never looks for the wrapper of a neighbour.
    """
    registry.hooks[HOOK_NAME] = hook
    registry._hook_order.insert(0, HOOK_NAME)
    registry._fn_refs.insert(0, HookFunctionReference())


def _leave(registry: HookRegistry) -> None:
    index = registry._hook_order.index(HOOK_NAME)
    del registry.hooks[HOOK_NAME], registry._hook_order[index], registry._fn_refs[index]
