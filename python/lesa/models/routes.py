"""Finds the way of a call around the blocks of a transformer, and runs the forward on it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lesa.models.watching import Gate, Made, Place, Result, Watch, gated, outside, result_of

_MOST_LEFT = 0.2
"""The largest part of the parameters of all blocks that may be in lists which still run in predicted steps."""


class WentElsewhere(Exception):
    """A call of a forward whose blocks are passed over does not go the way of the call that was watched."""


@dataclass
class Route:
    """How a forward runs around its blocks.

    Args:
        results: for each block that is passed over, what each of its calls returns.
        module, number, leaf: where the features come in; see `Place`.
        shape, dtype: of the tensor there.
        narrow: the dtype in which the features are kept. It is that of the blocks if they are only converted.
        parts: the transformer and its modules outside of the blocks.
    """

    results: dict[torch.nn.Module, list[Result]]
    module: torch.nn.Module
    number: int
    leaf: int
    shape: torch.Size
    dtype: torch.dtype
    narrow: torch.dtype
    parts: list[torch.nn.Module]

    def __post_init__(self):
        self._children = self._list_children()

    def is_current(self) -> bool:
        """Whether the modules outside of the blocks have the parts that they had. LoRA, for example, replaces some."""
        return self._list_children() == self._children

    @property
    def place(self) -> tuple:
        """Where the features come in, and what the tensor is like."""
        return self.module, self.number, self.leaf, self.shape, self.dtype

    def _list_children(self) -> list[torch.nn.Module | None]:
        return [child for part in self.parts for child in part._modules.values()]

    def run_seen(self, forward: Callable[[], Any], see: Callable[[torch.Tensor], None]) -> tuple[Any, bool]:
        """Runs a forward with its blocks, and lets `see` get the features when they come in.

        Returns:
            The output, and whether the forward goes this way. If not, the features may not have been seen.
        """
        left = {block: results[::-1] for block, results in self.results.items()}
        differs: list[torch.nn.Module] = []

        def compare(block: torch.nn.Module, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            output = run(*args, **kwargs)
            if not left[block] or result_of(output, args, kwargs) != left[block].pop():
                differs.append(block)
            return output

        def look(tensor: torch.Tensor) -> torch.Tensor:
            if not differs and not any(left.values()) and _kind(tensor) == (self.shape, self.dtype):
                see(tensor)
            return tensor

        gates: dict[torch.nn.Module, Gate] = {block: functools.partial(compare, block) for block in left}
        with gated(gates), self._entered(look) as entries:
            output = forward()
        return output, self._is_gone(left, entries) and not differs

    def _is_gone(self, left: dict[torch.nn.Module, list[Result]], entries: list[torch.Tensor]) -> bool:
        """Whether the forward has gone this way to its end."""
        return [*map(_kind, entries)] == [(self.shape, self.dtype)] and not any(left.values())

    def run_around(self, forward: Callable[[], Any], features: torch.Tensor, value: float = 0.0) -> Any:
        """Runs a forward with its blocks passed over, and with the features in their place.

        Args:
            forward: runs the forward with its arguments.
            features: with as many elements as the tensor that was seen at their place.
            value: what the blocks seem to have made.

        Raises:
            WentElsewhere: the forward does not go this way.
        """
        pool: dict[Made, torch.Tensor] = {}
        left = {block: results[::-1] for block, results in self.results.items()}

        def pass_over(block: torch.nn.Module, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not left[block]:
                raise WentElsewhere
            return left[block].pop().stand_in(args, kwargs, pool, value)

        gates: dict[torch.nn.Module, Gate] = {block: functools.partial(pass_over, block) for block in left}
        with gated(gates), self._entered(lambda tensor: features.to(self.dtype).reshape(self.shape)) as entries:
            output = forward()
        if not self._is_gone(left, entries):
            raise WentElsewhere
        return output

    @contextlib.contextmanager
    def _entered(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """While it is entered, `change` gets the features where they come in, and gives what takes their place.

        Yields:
            A list to which the features are added when they come in.
        """
        calls, entries = iter(range(self.number + 1)), []

        def enter(run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            if next(calls, None) == self.number:
                leaves, structure = tree_flatten((args, kwargs))
                tensor = leaves[self.leaf] if self.leaf < len(leaves) else None
                if isinstance(tensor, torch.Tensor):
                    entries.append(tensor)
                    leaves[self.leaf] = change(tensor)
                    args, kwargs = tree_unflatten(leaves, structure)
            return run(*args, **kwargs)

        with gated({self.module: enter}):
            yield entries


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


class Unclear(Exception):
    """There is no way around the blocks; it says why."""


def find_route(watch: Watch, run: Callable[[], Any], output: Any) -> tuple[Route, torch.Tensor]:
    """The way around the blocks on which a call gives the output that it gave, and the features.

    For each tensor that a module gets after the last block, the forward runs again. Its blocks are passed over and seem
    to have made NaN, and this tensor is put back in its place. If the output is the same, nothing else in it comes from
    the blocks.

    Args:
        watch: of the call.
        run: runs the forward again.
        output: of the call.

    Raises:
        Unclear: there is no such tensor.
    """
    passed, sizes = _lists_to_pass_over(watch)
    if not watch.places:
        raise Unclear("no module after the last block gets what the blocks have made")
    wanted = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    if not wanted or not all(tensor.isfinite().all() for tensor in wanted):
        raise Unclear("the output of the first computed call was no finite tensor")
    parts = outside(watch.transformer, (block for blocks in watch.lists.values() for block in blocks))
    small = [name for name in passed if _MOST_LEFT * sum(sizes.values()) >= sizes[name]]  # such as those of embedders
    problems = []
    for place in watch.places:
        dtypes = _dtypes(watch, place)
        for left in dict.fromkeys([(), *((name,) for name in small), (*small,)]):
            results: dict[torch.nn.Module, Any] = {}
            for name in (name for name in passed if name not in left):
                results |= {block: watch.results[block] for block in watch.lists[name] if block in watch.results}
            route = Route(results, place.module, place.number, place.leaf, place.tensor.shape, *dtypes, parts)
            problem = _problem(route, place.tensor, run, wanted)
            if problem is None:
                return route, place.tensor
            problems.append(problem)
    raise Unclear(problems[0])


def _lists_to_pass_over(watch: Watch) -> tuple[list[str], dict[str, int]]:
    """The lists whose blocks ran and kept the shapes, and by path the parameters of each list that ran."""
    sizes, kept, changed = {}, [], []
    for name, blocks in watch.lists.items():
        ran = [block for block in blocks if block in watch.results]
        if not ran:
            continue
        sizes[name] = sum(parameter.numel() for block in ran for parameter in block.parameters())
        returned = [(block, result) for block in ran for result in watch.results[block]]
        other = next(((block, result) for block, result in returned if isinstance(result, str)), None)
        if other is None:
            kept.append(name)
        else:
            changed.append(f"a {type(other[0]).__name__} of `{name}` {other[1]}")
    if not sizes:
        raise Unclear("the forward does not call the blocks of the transformer")
    if sum(sizes[name] for name in kept) < (1 - _MOST_LEFT) * sum(sizes.values()):
        raise Unclear(f"the blocks cannot be passed over: {changed[0]}")
    return kept, sizes


def _dtypes(watch: Watch, place: Place) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of a tensor, and that in which it can be kept: that of the last block if it was only converted."""
    dtype = place.tensor.dtype
    for made in watch.last:
        if made.dtype.itemsize < dtype.itemsize and torch.equal(place.tensor.to(made.dtype).to(dtype), place.tensor):
            return dtype, made.dtype
    return dtype, dtype


def _problem(route: Route, features: torch.Tensor, run: Callable[[], Any], wanted: list[torch.Tensor]) -> str | None:
    """Why a call does not give the wanted output on this way, or None if it does."""
    devices = [features.device] if features.device.type != "cpu" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=features.device.type):
            output = route.run_around(run, features, value=float("nan"))
    except WentElsewhere:
        return "the forward goes another way without its blocks"
    except Exception as error:
        return f"the forward cannot run without its blocks: {type(error).__name__}: {error}"
    given = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in wanted]:
        return "the forward gives an output of another shape without its blocks"
    if not all(tensor.isfinite().all() for tensor in given):
        return "what the blocks make reaches the output in more than one way"
    if not all(map(_is_close, given, wanted)):
        return "the forward gives another output when it runs again"
    return None


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, but for the order in which a kernel has added."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    difference, size = (one.double() - other.double()).norm(), other.double().norm()
    return bool(difference <= 4 * torch.finfo(other.dtype).eps * size)
