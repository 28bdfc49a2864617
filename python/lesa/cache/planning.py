"""The weights of all forecasts of a run, made at once before the first of them."""

import ctypes
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch

from lesa_kernels import FeatureRing, FusedKANPredictor, TieredRing
from lesa_kernels.stream import LowRank, Weights

_FORECASTS = ("forward", "forecast", "predict_velocity")
"""The methods that a plan is used instead of."""


def can_plan(predictor: FusedKANPredictor) -> bool:
    """Whether a predictor forecasts by weights that depend on noise levels only.

    The dense variant has no such weights. What another class, an exchanged method or a hook computes is not known, nor
    when modules inside of the predictor, such as parametrizations, change its parameters.
    """
    if predictor._forward_hooks or predictor._forward_pre_hooks or predictor._modules:
        return False
    methods = (getattr(getattr(predictor, name), "__func__", None) for name in _FORECASTS)
    are_own = all(method is getattr(FusedKANPredictor, name) for method, name in zip(methods, _FORECASTS))
    return are_own and predictor.forecaster.plans


class Plan(NamedTuple):
    """The weights of several steps of a run.

    Args:
        levels: by step, the noise levels of the ring from which it is forecast, newest first.
        weights: by step.
        low_rank: the residual of all stages.
    """

    levels: dict[int, tuple[float, ...]]
    weights: dict[int, Weights]
    low_rank: LowRank


class Planner:
    """Gives the weights of the forecasts of one stream of calls in one run.

    They depend on parameters, and on noise levels that are known when a run begins. So the first step that is predicted
    makes those of all later ones too, in one launch. The host follows which noise levels the ring holds. If they are
    not those that a step was planned for, or if a parameter or buffer has changed, the rest of the run is planned
    again. A plan ends where the noise level rises, because a new history begins there.

    Args:
        predictor: makes the weights; `can_plan` is true for it.
        ring: the stream's history, still empty. It is not kept.
        stream: the name of the stream.
    """

    def __init__(self, predictor: FusedKANPredictor, ring: FeatureRing | TieredRing, stream: str | None = None):
        self.predictor, self._stream = predictor, stream
        self._capacity, self._batch, self._dtype = ring.capacity, ring.batch, ring.dtype
        self._device = ring.device
        self._keeps_forecasts = predictor.config.history == "steps"
        self._levels: tuple[float, ...] = ()  # in the ring, newest first
        self._plan = Plan({}, {}, LowRank())
        self._made_from: tuple = ()  # the state of the parameters and buffers
        self._held: list[torch.Tensor] = []  # so that no other memory gets the address of one of them

    def push(self, sigma: float) -> None:
        """Follows a push into the ring."""
        self._levels = pushed(self._levels, sigma, self._capacity)

    def plan(self, step: int, sigmas: Sequence[float], computed: Set[int], measures: bool = False) -> Plan:
        """A plan with the weights of a step.

        Args:
            step: which step is forecast.
            sigmas: the noise levels of the steps of the run.
            computed: the steps that will be computed.
            measures: whether the computed steps are forecast too, and those after the last of them are not known yet.
        """
        if self._plan.levels.get(step) != self._levels or self._state() != self._made_from:
            self._make(step, sigmas, computed, measures)
        return self._plan

    def _make(self, step: int, sigmas: Sequence[float], computed: Set[int], measures: bool) -> None:
        levels, planned = self._levels, {}
        end = falling(sigmas, step).stop
        end = min(max(step, *computed) + 1, end) if measures else end
        for later in range(step, end):
            if later == step or measures or later not in computed:
                planned[later] = levels
            if later in computed or self._keeps_forecasts:
                levels = pushed(levels, sigmas[later], self._capacity)
        targets, more = [sigmas[later] for later in planned], self._more(sigmas, step)
        weights = self.predictor.plan([*planned.values()], targets, self._batch, **more)
        self._plan = Plan(planned, dict(zip(planned, weights)), self.predictor.low_rank(self._dtype))
        self._made_from = self._state()
        self._held = [tensor.detach() for tensor in self._tensors()]

    def _more(self, sigmas: Sequence[float], step: int) -> dict[str, Any]:
        """What some forecasters need in addition. Others do not get it: a subclass may replace `plan`."""
        more = self.predictor.extra(times_at(sigmas, step), self._stream)
        if any(parameter.dtype == torch.float64 for parameter in self.predictor.parameters()):
            more["dtype"] = torch.float32  # in which the features of every ring are added up
        if self.predictor.device is None:
            more["device"] = self._device
        return more

    def _state(self) -> tuple:
        """What changes when a parameter or a buffer is changed, replaced or moved."""
        tensors = self._tensors()
        return [t.data_ptr() for t in tensors], [0 if t.is_inference() else t._version for t in tensors]

    def _tensors(self) -> list[torch.Tensor]:
        """The parameters and buffers of the predictor, which has no modules inside of it."""
        predictor = self.predictor
        return [t for t in (*predictor._parameters.values(), *predictor._buffers.values()) if t is not None]


def falling(sigmas: Sequence[float], step: int) -> range:
    """The steps around a step over which the noise level does not rise. Where it rises, a new history begins."""
    rises = [later for later in range(1, len(sigmas)) if sigmas[later] > sigmas[later - 1]]
    begin = max((rise for rise in rises if rise <= step), default=0)
    return range(begin, min((rise for rise in rises if rise > step), default=len(sigmas)))


def making_room(chosen: frozenset[int], begins: frozenset[int]) -> frozenset[int]:
    """The chosen steps that are left, so that with `begins` there are as many as before if that can be.

    For each step of `begins` that was not chosen, the nearest other one is left out.
    """
    left = chosen
    for begin in sorted(begins - chosen):
        left -= {*sorted(left - begins, key=lambda step: abs(step - begin))[:1]}
    return left


def times_at(sigmas: Sequence[float], step: int) -> list[float]:
    """The times for the forecast of a step: the noise levels of `falling`, and 0."""
    return [*(sigmas[near] for near in falling(sigmas, step)), 0.0]


def pushed(levels: tuple[float, ...], sigma: float, capacity: int) -> tuple[float, ...]:
    """The noise levels of a ring that held `levels` after a push; see `FeatureRing.push`."""
    level = ctypes.c_float(sigma).value  # as the ring stores it
    if levels and level == levels[0]:
        return levels
    return (level, *levels[: capacity - 1]) if levels and level < levels[0] else (level,)
