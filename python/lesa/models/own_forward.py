"""Finds the forward method in the source of a transformer's class, below everything that wraps it.

Others wrap or replace `forward`: autocast decorators, `Accelerator.prepare`, the hooks of accelerate and diffusers,
patches of the class, subclasses. A predicted step must run inside all of them, because each may change the dtype, the
inputs or the output. During such a step, lesa replaces the class's forward wherever it is stored, and restores it
afterwards.
"""

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import HookFunctionReference

Replacement = Callable[[Callable, tuple, dict[str, Any]], Any]

_DECORATORS = "diffusers.utils.peft_utils"
"""The module of the decorator that diffusers puts on the forward of its models. It belongs to the forward."""

_OURS = ("forward", "compile", "_compiled_call_impl")
"""Attributes of a transformer that are not searched for what others have kept."""

_MOST_HOLDERS = 1000
"""The search stops after this many objects."""

_exchanging = threading.RLock()  # held while a function is exchanged that several transformers may share


def class_forward(cls: type) -> Any:
    """What a class has as `forward`, itself or from its bases; not bound."""
    return next(vars(c)["forward"] for c in cls.__mro__ if "forward" in vars(c))


class OwnForward:
    """The forward of a transformer's class.

    Args:
        transformer: the transformer.
        classes: the classes of its family; it is an instance of one of them.

    """

    def __init__(self, transformer: torch.nn.Module, classes: tuple[type, ...]):
        self.transformer = transformer
        family = next((c for c in type(transformer).__mro__ if c in classes), type(transformer))
        self._owner = next(c for c in family.__mro__ if "forward" in vars(c))
        place = next(_search([_Place.attribute(self._owner, "forward")], self._is_written), None)
        written = None if place is None else place.contents
        self._code = None if written is None else written.__code__
        parameters = [*inspect.signature(written or type(transformer).forward).parameters.values()][1:]
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._latest: tuple[Callable, Replacement, Callable] | None = None  # a forward, its replacement and the gate

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, with defaults. Unknown ones stay, and the forward refuses them."""
        return {**self._defaults, **dict(zip(self._names, args)), **kwargs}

    def with_argument(self, name: str, value: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call with another value for the one of this name, passed in the same way as before."""
        if name in kwargs:
            return args, {**kwargs, name: value}
        place = self._names.index(name)
        return (*args[:place], value, *args[place + 1 :]), kwargs

    def _is_written(self, value: Any) -> bool:
        """Whether `value` is the function in the source of the class.

        Decorators copy `__name__`, but not the code object and its globals.
        """
        if not isinstance(value, types.FunctionType) or value.__code__.co_name != "forward":
            return False
        qualified = getattr(value.__code__, "co_qualname", None)  # Python 3.11 and newer
        if qualified is not None and qualified != f"{self._owner.__qualname__}.forward":
            return False
        return value.__globals__.get("__name__") == self._owner.__module__

    def _is_own(self, value: Any) -> bool:
        """Whether `value` is the class's forward: the written function, or that with the decorator of diffusers."""
        if not isinstance(value, types.FunctionType) or self._code is None:
            return False
        if value.__code__ is self._code or value.__code__ == self._code:  # to compare two of them takes long
            return True
        if value.__globals__.get("__name__") != _DECORATORS:
            return False
        inner = (f.__code__ for _, f in _cells(value) if isinstance(f, types.FunctionType))
        return any(code is self._code or code == self._code for code in inner)

    def _is_bound(self, value: Any) -> bool:
        return (
            isinstance(value, types.MethodType) and value.__self__ is self.transformer and self._is_own(value.__func__)
        )

    def _is_wanted(self, value: Any) -> bool:
        return self._is_own(value) or self._is_bound(value)

    def is_running(self) -> bool:
        """Whether this thread is inside the forward. A compiled forward is not seen."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code == self._code and frame.f_locals.get("self") is self.transformer:
                return True
            frame = frame.f_back
        return False

    def held(self) -> list[Any]:
        """What holds the forward now: bound methods and functions."""
        return [place.contents for place in self._places()]

    def replace(self, old: types.MethodType, new: types.MethodType) -> None:
        """Puts `new` where others hold `old`, which is the forward too."""
        for place in self._places():
            if place.contents is old:
                place.put(new)

    @contextlib.contextmanager
    def exchanged(self, replacement: Replacement) -> Iterator[bool]:
        """While it is entered, `replacement(forward, args, kwargs)` runs where the class's own forward would.

        Args:
            replacement: gets the forward, bound to the transformer, and what it was called with.

        Yields:
            Whether the forward was found. If not, nothing is exchanged.
        """
        attributes = vars(self.transformer)
        forward = attributes.get("forward")
        if self._is_bound(forward):  # nobody has wrapped it: the usual case, and the quickest
            attributes["forward"] = gate = self._gate_of(forward, replacement)
            try:
                yield True
            finally:
                if attributes.get("forward") is gate:
                    attributes["forward"] = forward
            return
        with contextlib.ExitStack() as shared:
            shared.enter_context(_exchanging)
            places = self._places()
            if not any(self._is_own(place.contents) for place in places):
                shared.close()  # all of them belong to this transformer
            gates = [(place, self._gate(place.contents, replacement)) for place in places]
            try:
                for place, gate in gates:
                    place.put(gate)
                yield bool(places)
            finally:
                for place, gate in gates:
                    if place.get() is gate:
                        place.put(place.contents)

    def _places(self) -> list["_Place"]:
        """Where the forward is held: by the transformer or its wrappers, or by the classes."""
        attributes, cls = vars(self.transformer), type(self.transformer)
        function = class_forward(cls)
        if self._is_bound(attributes.get("forward")):  # nobody has wrapped it
            return [_Place.entry(attributes, "forward")]
        if "forward" not in attributes and self._is_own(function):
            return [_Place.absent(attributes, "forward", types.MethodType(function, self.transformer))]
        called = [_Place.entry(attributes, "forward")] if "forward" in attributes else []
        places = [*_search(called, self._is_wanted)]
        kept = [n for n, v in attributes.items() if _may_hold(v) and not isinstance(v, (list, dict)) and n not in _OURS]
        places += _search([_Place.entry(attributes, name) for name in kept], self._is_wanted)
        if not places or not self._is_own(function):
            classes = [c for c in cls.__mro__ if "forward" in vars(c)]
            places += _search([_Place.attribute(c, "forward") for c in classes], self._is_wanted)
        return places

    def _gate_of(self, forward: Any, replacement: Replacement) -> Callable:
        """`_gate`, without making the same one again."""
        if self._latest is None or self._latest[0] is not forward or self._latest[1] != replacement:
            self._latest = forward, replacement, self._gate(forward, replacement)
        return self._latest[2]

    def _gate(self, forward: Callable, replacement: Replacement) -> Callable:
        if isinstance(forward, types.MethodType):

            @functools.wraps(forward)
            def gate(*args: Any, **kwargs: Any) -> Any:
                return replacement(forward, args, kwargs)
        else:

            @functools.wraps(forward)
            def gate(module: Any, /, *args: Any, **kwargs: Any) -> Any:
                if module is not self.transformer:  # another one, which shares the wrapper
                    return forward(module, *args, **kwargs)
                return replacement(types.MethodType(forward, module), args, kwargs)

        return gate


@dataclass(frozen=True)
class _Place:
    """A place that holds a callable.

    Args:
        contents: what it held when it was found.
        get, put: read and write it.
    """

    contents: Any
    get: Callable[[], Any]
    put: Callable[[Any], None]

    @classmethod
    def entry(cls, container: Any, key: Any) -> "_Place":
        """Of a dict or a list."""
        get = container.get if isinstance(container, dict) else container.__getitem__
        return cls(container[key], functools.partial(get, key), functools.partial(container.__setitem__, key))

    @classmethod
    def absent(cls, container: dict, key: str, contents: Any) -> "_Place":
        """Of a dict that does not have the key; `contents` stands for that."""

        def put(value: Any) -> None:
            if value is contents:
                del container[key]
            else:
                container[key] = value

        return cls(contents, functools.partial(container.get, key), put)

    @classmethod
    def attribute(cls, owner: Any, name: str) -> "_Place":
        """Of a class, a function or another object."""
        get = functools.partial(vars(owner).get, name) if isinstance(owner, type) else lambda: getattr(owner, name)
        return cls(get(), get, functools.partial(setattr, owner, name))

    @classmethod
    def item(cls, owner: Any, name: str, index: int) -> "_Place":
        """Of a tuple that is an attribute."""

        def put(value: Any) -> None:
            items = getattr(owner, name)
            setattr(owner, name, (*items[:index], value, *items[index + 1 :]))

        return cls(getattr(owner, name)[index], lambda: getattr(owner, name)[index], put)

    @classmethod
    def part(cls, partial: functools.partial, number: int) -> "_Place":
        """Of a `functools.partial`: its function is number -1, its positional arguments follow."""

        def get() -> Any:
            return partial.func if number < 0 else partial.args[number]

        def put(value: Any) -> None:
            function, args = partial.func, list(partial.args)
            if number < 0:
                function = value
            else:
                args[number] = value
            partial.__setstate__((function, tuple(args), partial.keywords, vars(partial)))  # type: ignore[attr-defined]

        return cls(get(), get, put)


def _search(places: list[_Place], wanted: Callable[[Any], bool]) -> Iterator[_Place]:
    """Searches `places` and everything inside them. On each path, it yields the first place with a wanted object."""
    seen: set[int] = set()
    waiting = places[::-1]
    while waiting and len(seen) < _MOST_HOLDERS:
        place = waiting.pop()
        if wanted(place.contents):
            yield place
        elif _may_hold(place.contents) and id(place.contents) not in seen:
            seen.add(id(place.contents))
            waiting += [*_places_in(place.contents)]


def _may_hold(value: Any) -> bool:
    """Whether `value` may be a wrapper of a forward, or part of one."""
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial, HookFunctionReference)):
        return True
    if isinstance(value, (list, dict)):
        return 0 < len(value) <= 16
    return callable(value) and hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module))


def _places_in(holder: Any) -> Iterator[_Place]:
    """The places in a callable or container that may hold what it calls."""
    if isinstance(holder, types.MethodType):
        yield from _places_in(holder.__func__)
        if not isinstance(holder.__self__, (type, torch.nn.Module)):
            yield from _attributes(holder.__self__)
    elif isinstance(holder, types.FunctionType):
        yield from (_Place.attribute(cell, "cell_contents") for cell, _ in _cells(holder))
        yield from (_Place.item(holder, "__defaults__", i) for i in range(len(holder.__defaults__ or ())))
        yield from (_Place.entry(holder.__kwdefaults__, name) for name in holder.__kwdefaults__ or ())
        uses_wrapped = "__wrapped__" in holder.__code__.co_names  # else it only says what was wrapped
        yield from (_Place.entry(vars(holder), n) for n in vars(holder) if n != "__wrapped__" or uses_wrapped)
        for name in holder.__code__.co_names:
            value = holder.__globals__.get(name)
            if isinstance(value, types.MethodType) or getattr(value, "__name__", None) == "forward":
                yield _Place.entry(holder.__globals__, name)
    elif isinstance(holder, functools.partial):
        yield from (_Place.part(holder, number) for number in range(-1, len(holder.args)))
        yield from (_Place.entry(holder.keywords, name) for name in holder.keywords)
    elif isinstance(holder, dict):
        yield from (_Place.entry(holder, key) for key in holder)
    elif isinstance(holder, list):
        yield from (_Place.entry(holder, index) for index in range(len(holder)))
    else:
        yield from _attributes(holder)


def _attributes(owner: Any) -> Iterator[_Place]:
    for name, value in getattr(owner, "__dict__", {}).items():
        if _may_hold(value):
            yield _Place.entry(vars(owner), name)
    for slots in (vars(c).get("__slots__", ()) for c in type(owner).__mro__):
        for name in [slots] if isinstance(slots, str) else slots:
            if name != "__dict__" and _may_hold(getattr(owner, name, None)):
                yield _Place.attribute(owner, name)


def _cells(function: types.FunctionType) -> Iterator[tuple[types.CellType, Any]]:
    """The cells of a function's closure that are not empty, with their contents."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell, cell.cell_contents
