"""Watches a call of a transformer: what its blocks return, and what the modules after them get."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Gate = Callable[[Callable, tuple, dict[str, Any]], Any]

_MOST_PLACES = 4
"""So many places are looked at after the last block. The features are nearly always in the first one."""


@contextlib.contextmanager
def gated(gates: Mapping[torch.nn.Module, Gate]) -> Iterator[None]:
    """While it is entered, `gate(run, args, kwargs)` stands in place of each call of a module.

    A gate comes before everything that is on the module: hooks, offloading, a compiled forward.
    """
    put = []
    try:
        for module, gate in gates.items():
            attributes = vars(module)
            had = attributes.get("_compiled_call_impl")
            attributes["_compiled_call_impl"] = mine = functools.partial(_pass, gate, had or module._call_impl)
            put.append((attributes, had, mine))
        yield
    finally:
        for attributes, had, mine in put:
            if attributes.get("_compiled_call_impl") is mine:
                del attributes["_compiled_call_impl"]
                if had is not None:
                    attributes["_compiled_call_impl"] = had


def _pass(gate: Gate, run: Callable, *args: Any, **kwargs: Any) -> Any:
    return gate(run, args, kwargs)


def block_lists(transformer: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
    """By path, the lists of blocks of a transformer: those of modules that have modules inside.

    Lists inside of blocks are not among them.
    """
    found: dict[str, list[torch.nn.Module]] = {}

    def search(module: torch.nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if not isinstance(child, torch.nn.ModuleList):
                search(child, f"{path}{name}.")
            elif len(child) and all(any(True for _ in block.children()) for block in child):
                found[path + name] = [*child]

    search(transformer, "")
    return found


def outside(transformer: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """The modules of a transformer that are in none of its blocks. The first one is the transformer itself."""
    inside = {part for block in blocks for part in block.modules()}
    return [part for part in transformer.modules() if part not in inside]


@dataclass(frozen=True)
class Made:
    """A tensor that a block made."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Made":
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def stand_in(self, value: float) -> torch.Tensor:
        """A tensor like it, full of `value`."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).fill_(value)


@dataclass(frozen=True)
class Given:
    """An argument of a block that it returned as it was, by its place among all of them."""

    place: int


@dataclass
class Result:
    """What a call of a block returned.

    Args:
        leaves: of the structure: None, `Made` or `Given`.
        structure: how they are put together.
    """

    leaves: list[Made | Given | None]
    structure: Any

    @property
    def made(self) -> list[Made]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Made)]

    def stand_in(self, args: tuple, kwargs: dict[str, Any], pool: dict[Made, torch.Tensor], value: float) -> Any:
        """A result with the same structure whose tensors are full of `value`. Equal ones are one tensor."""
        given = tree_leaves((args, kwargs)) if any(isinstance(leaf, Given) for leaf in self.leaves) else []
        leaves: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, Made):
                if leaf not in pool:
                    pool[leaf] = leaf.stand_in(value)
                leaves.append(pool[leaf])
            elif isinstance(leaf, Given):
                leaves.append(given[leaf.place] if leaf.place < len(given) else None)
            else:
                leaves.append(None)
        return tree_unflatten(leaves, self.structure)


def result_of(output: Any, args: tuple, kwargs: dict[str, Any]) -> Result | str:
    """What a block returned; or a str that says that some of it is none of the tensors that went in, or like one."""
    given = tree_leaves((args, kwargs))
    places = {id(value): place for place, value in enumerate(given) if isinstance(value, torch.Tensor)}
    shapes = {value.shape for value in given if isinstance(value, torch.Tensor)}
    leaves: list[Made | Given | None] = []
    values, structure = tree_flatten(output)
    for value in values:
        if value is None:
            leaves.append(None)
        elif not isinstance(value, torch.Tensor):
            return f"returns a {type(value).__name__}"
        elif id(value) in places:
            leaves.append(Given(places[id(value)]))
        elif value.is_floating_point() and value.shape in shapes:
            leaves.append(Made.of(value))
        else:
            return f"returns a tensor {[*value.shape]}, and none of its arguments has this shape"
    return Result(leaves, structure)


@dataclass
class Place:
    """A place after the blocks at which a module gets a tensor.

    Args:
        module: the module.
        number: which of its calls it is.
        leaf: which of the call's arguments it is, among all of them.
        tensor: what it got.
    """

    module: torch.nn.Module
    number: int
    leaf: int
    tensor: torch.Tensor


@dataclass
class Watch:
    """What is seen in one call of a transformer.

    Args:
        transformer: the transformer.
        lists: its lists of blocks, by path.

    Attributes:
        results: for each block, what each of its calls returned. A str says why the block cannot be passed over.
        places: where modules get tensors after the last block, the largest first.
        last: what the last block made.
    """

    transformer: torch.nn.Module
    lists: Mapping[str, Sequence[torch.nn.Module]]
    results: dict[torch.nn.Module, list[Result | str]] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    last: list[Made] = field(default_factory=list)
    _calls: dict[torch.nn.Module, int] = field(default_factory=dict)
    _is_in_block: bool = False

    def run(self, forward: Callable[[], Any]) -> Any:
        """Runs the transformer's forward, and watches it."""
        blocks = [block for blocks in self.lists.values() for block in blocks]
        gates: dict[torch.nn.Module, Gate] = {block: functools.partial(self._on_block, block) for block in blocks}
        for other in outside(self.transformer, blocks)[1:]:
            gates[other] = functools.partial(self._on_other, other)
        with gated(gates):
            output = forward()
        self.places.sort(key=lambda place: -place.tensor.numel())
        return output

    def _on_block(self, block: torch.nn.Module, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._is_in_block:
            return run(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._is_in_block, before = True, [*map(_content, given)]
        try:
            output = run(*args, **kwargs)
        finally:
            self._is_in_block = False
        is_kept = all(map(_is_content, given, before))
        result = result_of(output, args, kwargs) if is_kept else "changes an argument in place"
        self.results.setdefault(block, []).append(result)
        if isinstance(result, str):  # what follows the blocks may be a list, too
            self._note_places(block, args, kwargs)
        elif result.made:
            self.last, self.places = result.made, []
        return output

    def _on_other(self, module: torch.nn.Module, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self._is_in_block:
            self._note_places(module, args, kwargs)
        return run(*args, **kwargs)

    def _note_places(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keeps the tensors that a module gets after a block, if they have the width of what the block made."""
        number = self._calls[module] = self._calls.get(module, -1) + 1
        widths = {made.shape[-1] for made in self.last if made.shape}
        for leaf, tensor in enumerate(tree_leaves((args, kwargs))):
            if len(self.places) == _MOST_PLACES:
                return
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
                continue
            if tensor.shape[-1] in widths and not any(_is_same(tensor, place.tensor) for place in self.places):
                self.places.append(Place(module, number, leaf, tensor.detach().clone()))


def _content(tensor: torch.Tensor) -> torch.Tensor | int:
    """What shows a change in place: the version of a tensor, or a copy if it has none."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _is_content(tensor: torch.Tensor, before: torch.Tensor | int) -> bool:
    """Whether a tensor is as it was."""
    return torch.equal(tensor, before) if isinstance(before, torch.Tensor) else tensor._version == before


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
