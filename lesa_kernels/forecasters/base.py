"""What a forecaster is: who makes the weights of the stored features, from noise levels and times.

A class is a kind of forecaster, and one instance of it is registered under its name, which `PredictorConfig.mixer`
holds. It keeps no state: parameters are in the `FusedKANPredictor`, and settings in its configuration. Ring, stream
kernels, cache, training, search and evaluation know no forecaster by name. They ask what is defined here.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from lesa_kernels import work
from lesa_kernels.feature_ring.reference import newest_slots
from lesa_kernels.stages import of_stage, stage_index
from lesa_kernels.stream.arguments import NO_RESIDUAL, LowRank, OutputHead, StoredFeatures, Weights
from lesa_kernels.stream.extension import has_fused_head
from lesa_kernels.stream.fused import stream_backend, stream_velocity_is_fused
from lesa_kernels.stream.op import output_head, stream_forecast, stream_velocity
from lesa_kernels.stream.reference import compute_dtype

if TYPE_CHECKING:
    from lesa_kernels.predictor.arguments import RingState
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor

USUAL_STEPS = 50
"""Steps of a run that nobody describes: outside of a run, for a predictor that was trained without a step count."""


class Option(NamedTuple):
    """One entry of `PredictorConfig.options`.

    Args:
        default: the value if none is given. Its type, int or float, is that of the option.
        minimum, maximum: the smallest and the largest value.
    """

    default: int | float
    minimum: int | float
    maximum: int | float


class Steps(NamedTuple):
    """What is known of P steps that are to be forecast, for B samples.

    Args:
        levels: `[P, B, K]`, for each step the noise levels of the newest features in the history, newest first. K is
            the longest history that the predictor reads. Beyond `count` they may be anything, also NaN.
        count: `[P, B]` int32, how many features the history has.
        sigma: `[P, B]`, the noise levels to forecast.
        times: `[S + 1]`, the falling noise levels of all steps of the run, and 0 at the end. Empty for a forecaster
            whose `reads_times` is False. Where the level rises in a run, a new history begins: then they are those of
            the part of the run over which it falls.
        stream: the name of the stream of calls that they belong to, such as "cond"; None if it is not known, or not
            read.
    """

    levels: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # replaces tuple.count, which is not used
    sigma: torch.Tensor
    times: torch.Tensor
    stream: str | None = None

    def positions(self, levels: torch.Tensor) -> torch.Tensor:
        """The steps of the run at which it has these noise levels: float64, of the shape of `levels`.

        They are whole numbers at the run's own levels, and linear between two of them. Beyond the first and the last
        one they go on as in the first and the last gap. Of steps with the same level, it is the last one.
        """
        times = self.times.double()
        levels = levels.double().contiguous()
        after = torch.searchsorted(-times, -levels, right=True)  # how many levels of the run are not below
        step = (after - 1).clamp(0, len(times) - 2)
        gap = times[step] - times[step + 1]
        return step + (times[step] - levels) / torch.where(gap > 0, gap, 1.0)


class RecordedRun(NamedTuple):
    """A recorded run of one sample, from which a forecaster is fitted.

    Args:
        features: `[S, T, D]` float32, of all steps.
        sigmas: `[S]`, the falling noise levels of the steps.
    """

    features: torch.Tensor
    sigmas: torch.Tensor


class Forecaster(ABC):
    """A kind of forecaster. docs/adding-a-forecaster.md has a complete example.

    Attributes:
        name: lower-case words with hyphens, such as "taylor": the predictor's `config.mixer`.
        title: for people, in tables and pictures.
        label: a shorter title, where there is little room. Default: the title.
        history: what the ring holds: "anchors" (computed steps only) or "steps" (every step, also the forecasts).
        stage_bounds: the noise levels between the stages, by default.
        options: what `config.options` may hold, by name.
        variants: the options that `lesa.evaluate` tries if it searches the best ones, where nothing is trained. By
            default it tries the defaults only.
        knows_width: whether it has parameters for features of one width, so that `config.feature_dim` is needed.
        hidden: number of spline units of its KAN, by default; None if it has none.
        has_residual: whether it has a low-rank residual, so that `config.rank` has a meaning.
        is_trained: whether it has something to train.
        is_fitted: whether `summarise` and `fit_steps` train it, in closed form, where others need an optimiser. Its
            history has computed steps only.
        reads_times: whether its weights depend on the times of the run, and not on noise levels alone.
        reads_stream: whether its weights depend on the stream of calls, such as that without a prompt.
        reads_one_sigma: whether `forecast` takes one noise level for all samples as a tensor without dimensions.
        plans: whether its forecasts are `weights`, which can be made for all steps of a run at once.
        can_find_stages: whether `lesa.find_stages` can find its noise stages.
        learning_rate, head_aware: the defaults of `lesa.train`.
        guided_part: by default, `lesa.train` has one guided epoch for so many epochs in closed loop. None: all epochs
            are guided, on the steps that the schedule predicts, and `lesa.refine` closes the loop.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    label: ClassVar[str]
    history: ClassVar[str] = "anchors"
    stage_bounds: ClassVar[tuple[float, ...]] = ()
    options: ClassVar[Mapping[str, Option]] = {}
    variants: ClassVar[tuple[Mapping[str, int | float], ...]] = ({},)
    knows_width: ClassVar[bool] = False
    hidden: ClassVar[int | None] = None
    has_residual: ClassVar[bool] = False
    is_trained: ClassVar[bool] = False
    is_fitted: ClassVar[bool] = False
    reads_times: ClassVar[bool] = True
    reads_stream: ClassVar[bool] = False
    reads_one_sigma: ClassVar[bool] = False
    plans: ClassVar[bool] = True
    can_find_stages: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-3
    head_aware: ClassVar[bool] = True
    guided_part: ClassVar[int | None] = 6

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        cls.label = vars(cls).get("label", getattr(cls, "title", ""))

    def describe(self, config: "PredictorConfig") -> str:
        """What a reader of a table must know about a predictor, such as "taylor, order 2"."""
        return ", ".join([self.name, *(f"{name} {value:g}" for name, value in (config.options or {}).items())])

    def default_bounds(self, config: "PredictorConfig") -> tuple[float, ...]:
        """`stage_bounds`, where they depend on `config.options`, which are complete when this is called."""
        return self.stage_bounds

    def check_streams(self, config: "PredictorConfig", streams: Set[str | None]) -> None:  # noqa: B027
        """Raises `ValueError` if it cannot be trained on a recording with these streams of calls.

        Only a forecaster with `reads_stream` is asked. The name of the first stream of each sample is None.
        """

    def check_run(self, config: "PredictorConfig", num_steps: int) -> None:  # noqa: B027
        """Raises `ValueError` if it cannot forecast steps of a run that executes this number of steps.

        It is asked when such a run begins. Where the noise level rises in a run, the parts over which it falls count
        like runs.
        """

    @abstractmethod
    def history_length(self, config: "PredictorConfig") -> int | tuple[int, ...]:
        """K, how many features are read, by default: for all stages, or one for each of `config.num_stages`.

        `config.options` and `config.stage_bounds` are complete when this is called.
        """

    def build(self, predictor: "FusedKANPredictor", config: "PredictorConfig") -> None:  # noqa: B027
        """Gives the predictor its parameters, float32, as attributes of its own, and not in modules inside of it.

        By default there are none, and `reset` has nothing to do.
        """

    def reset(self, predictor: "FusedKANPredictor", generator: torch.Generator | None) -> None:  # noqa: B027
        """Initialises the parameters. Gradients are off."""

    def summarise(self, predictor: "FusedKANPredictor", runs: Iterable[RecordedRun]) -> Any:
        """What `fit_steps` must know of recorded runs, if `is_fitted`. It is needed once for all schedules.

        Each run is read once, so that memory does not grow.

        Raises:
            ValueError: the runs do not fit each other, or the predictor.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no closed form.")

    def fit_steps(
        self, predictor: "FusedKANPredictor", summary: Any, history: Sequence[int], targets: Sequence[int]
    ) -> None:
        """Sets the parameters for some steps of a run in closed form, if `is_fitted`.

        A search for schedules does this for each gap that it considers, so it must be cheap. The parameters for other
        steps stay as they are.

        Args:
            predictor: whose parameters.
            summary: what `summarise` gave.
            history: the steps that are computed before these, rising from 0 or a later step. It has at least as many as
                the predictor reads, or all that there are.
            targets: the steps to forecast from this history.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no closed form.")

    @torch.no_grad()
    def fit(self, predictor: "FusedKANPredictor", runs: Iterable[RecordedRun], computed: Collection[int]) -> None:
        """Sets all parameters in closed form, if `is_fitted`.

        Args:
            predictor: made for runs of as many steps as were recorded, or of any number.
            runs: the recorded runs. Each is read once.
            computed: the steps that the schedule computes.

        Raises:
            ValueError: the runs do not fit each other, or the predictor.
        """
        recorded = 0

        def counted() -> Iterator[RecordedRun]:
            nonlocal recorded
            for run in runs:
                recorded = max(recorded, len(run.sigmas))
                yield run

        summary = self.summarise(predictor, counted())
        self.reset(predictor, None)
        for step in range(1, recorded):
            self.fit_steps(predictor, summary, sorted(c for c in computed if c < step), [step])

    @abstractmethod
    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        """The weights of the stored features for P steps at once, each with a leading dimension P.

        `anchors` is `[P, B, K]`, or `[P, B, K, D]` for one weight of each channel. It must be differentiable with
        respect to the parameters, and must not wait for the device. A forecaster without parameters computes in
        float64. `steps` is where the parameters are, or on the CPU if there are none and the noise levels are known to
        the host.
        """

    def low_rank(self, predictor: "FusedKANPredictor", dtype: torch.dtype) -> LowRank:
        """The residual for features of `dtype`; none by default."""
        return NO_RESIDUAL

    def experts(self, predictor: "FusedKANPredictor") -> tuple:
        """The parameters as an operation of its own takes them; none by default."""
        return ()

    # What differs only for a forecaster that has operations of its own

    def forecast(
        self,
        predictor: "FusedKANPredictor",
        state: "RingState",
        times: torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        """The forecast of one step from the buffers of a ring: `[B, T, D]`."""
        weights = self.step_weights(predictor, state, times, stream)
        return stream_forecast(
            _stored(state), weights, self.low_rank(predictor, state.storage.dtype), predictor.backend
        )

    def velocity(
        self,
        predictor: "FusedKANPredictor",
        state: "RingState",
        head: OutputHead,
        times: torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        """The forecast of one step, and the output head applied to it: `[B, T, O]`."""
        if not self.plans:
            return output_head(predictor.forecast(*state, **predictor.extra(times, stream)), head)
        weights = self.step_weights(predictor, state, times, stream)
        low_rank = self.low_rank(predictor, state.storage.dtype)
        return stream_velocity(_stored(state), weights, head, low_rank, backend=predictor.backend)

    def fuses(self, predictor: "FusedKANPredictor", state: "RingState", head: OutputHead | None) -> bool:
        """Whether `stream_velocity` with `weights` does not write the forecast to memory.

        If the head is None, the answer is for one that the kernel supports.
        """
        if not self.plans:
            return False
        chosen = self.velocity_backend(predictor, state)
        if chosen == "extension":
            return has_fused_head(_stored(state))
        return chosen == "triton" and (head is None or self.fuses_on_triton(predictor, state, head))

    def velocity_backend(self, predictor: "FusedKANPredictor", state: "RingState") -> str:
        """Which backend `stream_velocity` with `weights` takes."""
        weights, low_rank = _like_weights(predictor, state), self.low_rank(predictor, state.storage.dtype)
        return stream_backend(_stored(state), weights, low_rank, None, predictor.backend, "stream_velocity")

    def fuses_on_triton(self, predictor: "FusedKANPredictor", state: "RingState", head: OutputHead) -> bool:
        """Whether Triton's kernel supports this head."""
        weights, low_rank = _like_weights(predictor, state), self.low_rank(predictor, state.storage.dtype)
        return stream_velocity_is_fused(_stored(state), weights, head, low_rank)

    def work(
        self,
        config: "PredictorConfig",
        sizes: tuple[int, int, int, torch.dtype],
        out_channels: int,
        history: int,
    ) -> dict[str, int]:
        """Bytes and FLOPs of a predicted step, with the output head.

        Args:
            config: of the predictor.
            sizes: batch, tokens, width and dtype of the features.
            out_channels: of the head.
            history: how many features are read.
        """
        return work.stream_velocity(*sizes, out_channels, history)

    # What the methods above share

    def read(self, config: "PredictorConfig", steps: Steps) -> torch.Tensor:
        """How many features are read for each step: at most those that there are, and that its stage reads."""
        stage = stage_index(steps.sigma.float(), config.stage_bounds)
        return torch.minimum(steps.count, of_stage(stage, config.lengths)).to(torch.int32)

    def step_weights(
        self,
        predictor: "FusedKANPredictor",
        state: "RingState",
        times: torch.Tensor | None,
        stream: str | None,
    ) -> Weights:
        """`weights` of one step from the buffers of a ring, in the dtype in which the forecast is computed."""
        shape = predictor.shape()
        state.check()
        shape.check(len(state.storage))
        slots = newest_slots(state.cursor, state.count, len(state.storage))[: shape.longest]
        levels = state.sigmas.gather(0, slots.long()).T[None]
        if times is None:
            times = default_times(predictor.config, state.device) if self.reads_times else levels.new_empty(0)
        steps = Steps(levels, state.count[None], state.sigma[None], times, stream)
        made = self.weights_in(predictor, steps, compute_dtype(state.storage))
        parts: list[Any] = [None if part is None else part[0] for part in made]
        return Weights(*parts)

    def weights_in(self, predictor: "FusedKANPredictor", steps: Steps, dtype: torch.dtype) -> Weights:
        """`weights`, made outside of autocast, in `dtype`. What counts something stays int32."""
        kind = steps.sigma.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # which meta does not know
            made = self.weights(predictor, steps)
        parts: list[Any] = [None if part is None else _in_dtype(part, dtype) for part in made]
        return Weights(*parts)


def default_times(config: "PredictorConfig", device: torch.device | str) -> torch.Tensor:
    """The times of a run that nobody describes: from 1 to 0 in equal steps."""
    steps = config.num_inference_steps or USUAL_STEPS
    return torch.linspace(1, 0, steps + 1, dtype=torch.float32, device=device)


def _like_weights(predictor: "FusedKANPredictor", state: "RingState") -> Weights:
    """Scalar weights without values, to ask what is done with such."""
    shape = (state.storage.shape[1], predictor.config.max_history)
    return Weights(torch.empty(shape, device="meta"), state.count, None, None, None)


def _stored(state: "RingState") -> StoredFeatures:
    return StoredFeatures(state.storage, state.scales, state.cursor, state.count)


def _in_dtype(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in `dtype`; what counts something stays int32."""
    return part.to(dtype) if part.is_floating_point() else part
