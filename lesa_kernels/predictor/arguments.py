"""The arguments of the predictors' operations as named tuples, and their checks.

The fields are the arguments of the public functions, in the same order. `lesa_kernels/register.py` makes the schemas of
the operators from the fields and their types, and is the only place where the tuples are flattened.
"""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from lesa_kernels.bspline_kan.op import TRITON_ORDERS
from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import Said, argument_error, check_int, check_tensor
from lesa_kernels.dispatch import needs_gradient
from lesa_kernels.stream.arguments import NO_RESIDUAL, STORED_DTYPES, LowRank


class RingState(NamedTuple):
    """The buffers of a `FeatureRing`, and the noise level of the forecast.

    Args:
        storage: `[C, B, T, D]`, the stored features.
        scales: `[C, B, T]` float32 for float8, else None.
        sigmas: `[C, B]` float32.
        cursor: `[B]` int32.
        count: `[B]` int32.
        sigma: `[B]` float32 or float64, the noise level to forecast. For newton also a tensor without dimensions on
            the CPU: one number for all samples, which a kernel takes as it is.
    """

    storage: torch.Tensor
    scales: torch.Tensor | None
    sigmas: torch.Tensor
    cursor: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # replaces tuple.count, which is not used
    sigma: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the ring is."""
        return self.storage.device

    @property
    def has_one_sigma(self) -> bool:
        """Whether `sigma` is one number for all samples, which the host knows."""
        return self.sigma.ndim == 0 and self.sigma.is_cpu

    def with_sigma_of_each(self) -> "RingState":
        """The same, with a `sigma` for each sample."""
        if not self.has_one_sigma:
            return self
        batch = (self.storage.shape[1],)
        if self.device.type == "cpu":
            return self._replace(sigma=self.sigma.expand(batch).contiguous())
        return self._replace(sigma=torch.full(batch, self.sigma.item(), dtype=self.sigma.dtype, device=self.device))

    def check(self, allows_one_sigma: bool = False) -> None:
        """Raises `TypeError` or `ValueError` unless the buffers fit together."""
        check_tensor("storage", self.storage, ("capacity", "B", "T", "D"), STORED_DTYPES)
        capacity, batch, tokens, _ = self.storage.shape
        if self.storage.dtype == torch.float8_e4m3fn:
            remedy = "Pass the `scales` of the ring."
            check_tensor("scales", self.scales, (capacity, batch, tokens), (torch.float32,), self.device, remedy)
        elif self.scales is not None:
            remedy = "Scales belong to a ring of float8_e4m3fn."
            raise argument_error("scales", "be None for this dtype of `storage`", self.scales, remedy)
        check_tensor("sigmas", self.sigmas, (capacity, batch), (torch.float32,), self.device)
        check_tensor("cursor", self.cursor, (batch,), (torch.int32,), self.device)
        check_tensor("count", self.count, (batch,), (torch.int32,), self.device)
        one = allows_one_sigma and self.has_one_sigma
        device = self.sigma.device if one else self.device
        check_tensor("sigma", self.sigma, () if one else (batch,), (torch.float32, torch.float64), device)

    def check_channels(self) -> None:
        """Raises `ValueError` unless the channels of a token are adjacent in memory, as compiled code reads them."""
        if self.storage.stride(3) != 1 and self.storage.shape[3] > 1:
            got = Said(f"strides {list(self.storage.stride())}")
            raise argument_error("storage", "have a last stride of 1", got, "Pass `storage.contiguous()`.")


class Shape(NamedTuple):
    """The stages and the splines of a predictor.

    Args:
        stage_bounds: S - 1 falling noise levels.
        history_length: how many anchors are read in each stage, S ints.
        grid_size: intervals of the splines' grid on [-1, 1].
        spline_order: degree of the splines.
    """

    stage_bounds: tuple[float, ...]
    history_length: tuple[int, ...]
    grid_size: int
    spline_order: int

    @property
    def stages(self) -> int:
        """S, the number of stages."""
        return len(self.stage_bounds) + 1

    @property
    def longest(self) -> int:
        """K, the most anchors that any stage reads."""
        return max(self.history_length)

    def check(self, capacity: int) -> None:
        """Raises `TypeError` or `ValueError` unless the stages are sound and fit into a ring of that capacity."""
        if any(not a > b for a, b in zip(self.stage_bounds, self.stage_bounds[1:])):
            must = "fall strictly, from high to low noise"
            raise argument_error("stage_bounds", must, self.stage_bounds, "Sort and deduplicate them.")
        if len(self.history_length) != self.stages:
            raise argument_error(
                "history_length",
                f"have one entry per stage, {self.stages}",
                self.history_length,
                "Pass one entry more than `stage_bounds` has.",
            )
        for length in self.history_length:
            check_int("history_length", length)
        if self.longest > capacity:
            raise argument_error(
                "history_length",
                f"be at most the ring's capacity, {capacity}",
                self.history_length,
                "Make the ring as large as the longest history.",
            )


class Residual(NamedTuple):
    """The low-rank residual of `NewtonExperts`: `[S, R, K - 1, D]`, `[S, D, R]` and `[S, D]`."""

    down: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor


class NewtonExperts(NamedTuple):
    """The parameters of `newton_predict`, of all S stages.

    Args:
        in_weight, in_bias: `[S, M, K + 1]`, `[S, M]`.
        spline: `[S, M, grid_size + spline_order]`.
        out_weight, out_bias: `[S, K - 1, D, M]`, `[S, K - 1, D]`.
        down, up, up_bias: `[S, R, K - 1, D]`, `[S, D, R]`, `[S, D]`, the low-rank residual, or None.
    """

    in_weight: torch.Tensor
    in_bias: torch.Tensor
    spline: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    down: torch.Tensor | None
    up: torch.Tensor | None
    up_bias: torch.Tensor | None

    @property
    def residual(self) -> Residual | None:
        """The last three parameters, or None."""
        if self.down is None or self.up is None or self.up_bias is None:
            return None
        return Residual(self.down, self.up, self.up_bias)

    @property
    def rank(self) -> int:
        """R, the rank of the residual; zero if there is none, or if there are no taps for it to read."""
        return 0 if self.down is None or self.down.shape[2] == 0 else self.down.shape[1]

    @property
    def low_rank(self) -> LowRank:
        """The residual as the stream operations take it."""
        return LowRank(self.down, self.up) if self.rank else NO_RESIDUAL

    def check(self, ring: RingState, shape: Shape) -> None:
        """Raises `TypeError` or `ValueError` unless the parameters fit the ring and the shape, which are checked."""
        self.check_sizes(ring.storage.shape[3], ring.device, shape)

    def check_sizes(self, width: int, device: torch.device, shape: Shape) -> None:
        """Raises `TypeError` or `ValueError` unless the parameters are for features of a width, and on a device."""
        stages, taps = shape.stages, shape.longest - 1
        sizes: dict[str, tuple[int | str, ...]] = {
            "in_weight": (stages, "M", taps + 2),
            "in_bias": (stages, "M"),
            "spline": (stages, "M", shape.grid_size + shape.spline_order),
            "out_weight": (stages, taps, width, "M"),
            "out_bias": (stages, taps, width),
        }
        if self.down is not None:
            sizes |= {"down": (stages, "R", taps, width), "up": (stages, width, "R"), "up_bias": (stages, width)}
        _check_sizes(self, sizes, device)


class DenseExperts(NamedTuple):
    """The parameters of `dense_predict`, of all S stages.

    Args:
        in_weight, in_bias: `[S, M, K]`, `[S, M]`.
        spline: `[S, M, grid_size + spline_order]`.
        out_weight, out_bias: `[S, M]`, `[S]`.
        mix_weight: `[sum(history_length), D, D]`.
        mix_bias: `[S, D]`.
    """

    in_weight: torch.Tensor
    in_bias: torch.Tensor
    spline: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    mix_weight: torch.Tensor
    mix_bias: torch.Tensor

    def check(self, ring: RingState, shape: Shape) -> None:
        """Raises `TypeError` or `ValueError` unless the parameters fit the ring and the shape, which are checked."""
        stages, width = shape.stages, ring.storage.shape[3]
        sizes: dict[str, tuple[int | str, ...]] = {
            "in_weight": (stages, "M", shape.longest),
            "in_bias": (stages, "M"),
            "spline": (stages, "M", shape.grid_size + shape.spline_order),
            "out_weight": (stages, "M"),
            "out_bias": (stages,),
            "mix_weight": (sum(shape.history_length), width, width),
            "mix_bias": (stages, width),
        }
        _check_sizes(self, sizes, ring.device)


Experts = NewtonExperts | DenseExperts

_OPTIONAL = ("scales", "down", "up", "up_bias")


def check_tensors(arguments: RingState | Experts) -> None:
    """Raises `TypeError` unless the fields are tensors, or None where that is allowed."""
    for name, value in zip(arguments._fields, arguments):
        if not isinstance(value, torch.Tensor) and not (value is None and name in _OPTIONAL):
            check_tensor(name, value)


def check_all(ring: RingState, experts: Experts, shape: Shape) -> None:
    """Raises `TypeError` or `ValueError` unless all arguments of a forecast fit together."""
    if isinstance(experts, NewtonExperts) and _newton_fits(ring, experts, shape):
        return
    ring.check(allows_one_sigma=isinstance(experts, NewtonExperts))
    shape.check(ring.storage.shape[0])
    experts.check(ring, shape)


def _check_sizes(experts: Experts, sizes: dict[str, tuple[int | str, ...]], device: torch.device) -> None:
    known: dict[int | str, int] = {}  # the sizes that have a name; its first appearance decides
    for name, wanted in sizes.items():
        value, wanted = getattr(experts, name), tuple(known.get(size, size) for size in wanted)
        check_tensor(name, value, device=device, remedy="Move the predictor to the ring's device.")
        check_tensor(name, value, wanted, FLOAT_DTYPES)
        known.update((size, n) for size, n in zip(wanted, value.shape) if isinstance(size, str))


_STATE_DTYPES = (torch.float32, torch.int32, torch.int32, torch.float32)  # of sigmas, cursor, count, sigma


def _newton_fits(ring: RingState, experts: NewtonExperts, shape: Shape) -> bool:
    """Whether `check_all` would surely find nothing wrong. Takes a fraction of its time."""
    storage, in_weight, down = ring.storage, experts.in_weight, experts.down
    if torch.compiler.is_compiling() or ring.scales is not None or storage.ndim != 4 or in_weight.ndim != 3:
        return False
    capacity, batch, _, width = storage.shape
    state = (ring.sigmas, ring.cursor, ring.count, ring.sigma)
    parameters = [parameter for parameter in experts if parameter is not None]
    each = ring.count if ring.has_one_sigma else ring.sigma  # both have one entry for each sample
    tensors, device = (*state[:3], each, *parameters), storage.device
    rank = None if down is None else down.shape[1]
    return (
        tuple([tensor.shape for tensor in tensors])
        == _newton_sizes(shape, capacity, batch, width, in_weight.shape[1], rank)
        and all([tensor.device == device for tensor in tensors])
        and tuple([tensor.dtype for tensor in state]) == _STATE_DTYPES
        and all([parameter.dtype in FLOAT_DTYPES for parameter in parameters])
        and storage.dtype in FLOAT_DTYPES
        and {*map(type, shape.history_length)} == {int}  # to the cache, 2.0 and 2 are the same
    )


@functools.lru_cache(maxsize=64)
def _newton_sizes(
    shape: Shape, capacity: int, batch: int, width: int, hidden: int, rank: int | None
) -> tuple[tuple[int, ...], ...] | None:
    """The sizes of all tensors of a newton forecast after `storage`; None if no sizes would be right."""
    bounds, lengths, stages, taps = shape.stage_bounds, shape.history_length, shape.stages, shape.longest - 1
    falls = all(a > b for a, b in zip(bounds, bounds[1:]))
    if not falls or len(lengths) != stages or not 1 <= min(lengths) <= taps + 1 <= capacity:
        return None
    coefficients = shape.grid_size + shape.spline_order
    sizes: list[tuple[int, ...]] = [(capacity, batch), (batch,), (batch,), (batch,)]
    sizes += [(stages, hidden, taps + 2), (stages, hidden), (stages, hidden, coefficients)]
    sizes += [(stages, taps, width, hidden), (stages, taps, width)]
    if rank is not None:
        sizes += [(stages, rank, taps, width), (stages, width, rank), (stages, width)]
    return tuple(sizes)


def has_kernels_for(experts: Experts, shape: Shape) -> bool:
    """Whether Triton has kernels for such parameters: it has none for float64 and high degrees."""
    return (
        all([parameter is None or parameter.dtype != torch.float64 for parameter in experts])
        and TRITON_ORDERS[0] <= shape.spline_order <= TRITON_ORDERS[1]
    )


def has_kernels(ring: RingState, experts: Experts, shape: Shape) -> bool:
    """Whether Triton has kernels for such arguments; it has none for gradients of sigmas."""
    storage = ring.storage
    return (
        storage.dtype != torch.float64
        and has_kernels_for(experts, shape)
        and (storage.stride(3) == 1 or storage.shape[3] == 1)
        and not needs_gradient(ring.sigmas, ring.sigma)
    )


def check_times(
    times: Sequence[float] | torch.Tensor, device: torch.device | str | None = None
) -> Sequence[float] | torch.Tensor:
    """Returns the times of a run; raises `ValueError` or `TypeError` unless they are as `FusedKANPredictor` says.

    Of a tensor on a GPU, or while a graph is compiled, the shape is checked and the values are not read.

    Args:
        times: to check.
        device: where a tensor must be. None: anywhere.
    """
    must = "be at least 2 finite noise levels in one dimension, which fall and never rise"
    remedy = "Pass the noise levels of all steps of the run, and 0 at the end."
    if not isinstance(times, (torch.Tensor, Sequence)) or isinstance(times, str):
        raise argument_error("times", must, times, remedy, TypeError)
    values = times
    if isinstance(times, torch.Tensor):
        if times.ndim != 1 or len(times) < 2 or not times.is_floating_point():
            raise argument_error("times", must, times, remedy)
        if device is not None and times.device != torch.device(device):
            on, move = Said(f"a tensor on {times.device}"), f"Move it with `times.to('{device}')`, or pass a list."
            raise argument_error("times", f"be on {device}", on, move)
        if times.device.type != "cpu" or torch.compiler.is_compiling():
            return times
        values = times.tolist()
    if not all(isinstance(value, numbers.Real) for value in values):
        raise argument_error("times", must, times, remedy, TypeError)
    are_finite = all(math.isfinite(value) for value in values)
    rises = any(before < after for before, after in zip(values, values[1:]))
    if len(values) < 2 or not are_finite or rises or values[0] == values[-1]:
        raise argument_error("times", must, Said(f"{list(values)}"), remedy)
    return times


_Tensors = TypeVar("_Tensors", RingState, NewtonExperts, DenseExperts)


def contiguous(arguments: _Tensors) -> _Tensors:
    """The same tensors, contiguous. Only `storage`, which may be large, is not changed."""
    made: Any = [
        tensor if tensor is None or name == "storage" else tensor.contiguous()
        for name, tensor in zip(arguments._fields, arguments)
    ]
    return type(arguments)(*made)
