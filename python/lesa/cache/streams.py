"""What a run keeps of each stream of calls, in order to forecast."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from lesa.cache.conditioning import Conditioner
from lesa.cache.error_control import ControlledSteps
from lesa.cache.planning import Plan, Planner
from lesa.cache.run import RunState
from lesa.cache.stats import StreamStats
from lesa.cache.told import Told
from lesa.models import Adapter
from lesa_kernels import FeatureRing, FusedKANPredictor, TieredRing


@dataclass
class Track:
    """What a run keeps of the features that enter one output head in one stream of calls.

    Args:
        branch: the adapter of the head.
        predictor: forecasts the features.
    """

    branch: Adapter
    predictor: FusedKANPredictor
    conditioner: Conditioner = field(init=False)
    ring: FeatureRing | TieredRing | None = None
    planner: Planner | None = None  # of forecasts from the ring; None if each is made on its own
    place: Any = None  # where the features that are the newest in the ring came from; see `Adapter.place`
    shape: tuple[int, int] | None = None  # batch and tokens of the call whose features are the newest in the ring
    fuses: bool = False  # whether the predictor has one kernel for forecast and output head
    reads_sums: bool = False  # whether that kernel reads the sums of `head_sums`
    known_fused: tuple[Plan, list, bool] | None = None  # for a plan and a kind of head, what `fuses_velocity` said

    def __post_init__(self):
        self.conditioner = Conditioner(self.branch)
        self.keeps_forecasts = self.predictor.config.history == "steps"

    def fits(self, features: torch.Tensor) -> bool:
        """Whether the ring is for features of this size."""
        ring = self.ring
        if ring is None or (ring.batch, ring.tokens, ring.dim) != features.shape:
            return False
        return (ring.dtype, ring.device) == (features.dtype, features.device)

    def push(self, features: torch.Tensor, sigma: float) -> None:
        """Pushes features into the ring, and lets the planner know it."""
        cast(FeatureRing, self.ring).push(features, sigma)
        if self.planner is not None:
            self.planner.push(sigma)


@dataclass
class Stream:
    """What a run keeps of one stream of calls."""

    name: str
    stats: StreamStats
    tracks: tuple[Track, ...]  # one for each output head of the transformer
    step: int = 0  # of the call whose features are the newest in the rings
    has_risen: bool = False  # whether the noise level has risen since that call
    is_other_text: bool = False  # whether the text has differed since that call
    has_moved: bool = False  # whether the features of the latest call came from another place than those before
    unclear: tuple[str, str] | None = None  # why a feature of another stream may be in the ring, and what helps

    @property
    def is_broken(self) -> bool:
        """Whether its next features belong to no history that it has."""
        return self.has_risen or self.is_other_text or self.has_moved or self.unclear is not None

    def take_up(self) -> None:
        """Called when the features of a call are in all rings: they belong together."""
        self.has_risen = self.is_other_text = self.has_moved = False
        self.unclear = None


@dataclass
class ForecastState(RunState):
    """What is kept in a run whose calls are forecast.

    Attributes:
        streams: by name.
        parts: for each executed step, the steps of `falling` around it.
        computed: the executed steps that are computed; with `controlled`, those that have been chosen so far.
        added: those of them that the schedule leaves out, and why they are computed.
        switch: the step at which the pipeline goes over to its second transformer, if that is known.
        controlled: chooses the computed steps, in a run under `lesa.ErrorControl`.
        forecasts_are_finite: whether no forecast of this run is known to hold NaN or Inf.
        was_predicting: whether the schedule of the run before left out steps.
        told: by the name of the transformer, what it is told in its computed steps.
    """

    streams: dict[str, Stream] = field(default_factory=dict)
    parts: Sequence[range] = ()
    computed: Set[int] = frozenset()
    added: Mapping[int, str] = field(default_factory=dict)
    switch: int | None = None
    controlled: ControlledSteps | None = None
    forecasts_are_finite: bool = True
    was_predicting: bool = False
    told: Mapping[str, Told] = field(default_factory=dict)

    @property
    def needs_values(self) -> bool:
        return self.controlled is not None and self.run.step > max(self.computed)

    def plan(self, track: Track, step: int) -> Plan | None:
        """A plan with the weights of a forecast, or None if they are computed with the forecast."""
        if track.planner is None or torch.is_grad_enabled():
            return None
        return track.planner.plan(step, self.run.executed_sigmas, self.computed, self.controlled is not None)

    def forget_others(self, prefix: str) -> None:
        """Frees what is kept of streams whose names begin otherwise: those of a transformer that has no more calls."""
        self.streams = {name: stream for name, stream in self.streams.items() if name.startswith(prefix)}

    def choose_next_step(self) -> None:
        """Adds the computed step after the last one, by the errors that were measured there."""
        if self.controlled is not None:
            self.controlled.choose_by_measured()
            self.computed = self.controlled.chosen

    def on_other_text(self, stream: str) -> None:
        if stream in self.streams:
            self.streams[stream].is_other_text = True

    def on_unclear(self, stream: str, reason: tuple[str, str]) -> None:
        if stream in self.streams:
            self.streams[stream].unclear = reason

    def release(self) -> None:
        super().release()
        self.streams = {}
