"""LESA as its authors released it: scalar weights of the newest steps, scaled by a KAN of all times of the run."""

import math
from collections.abc import Set
from typing import TYPE_CHECKING, Any, cast

import torch

from lesa_kernels.bspline_kan.knots import uniform_knots
from lesa_kernels.bspline_kan.op import bspline_kan
from lesa_kernels.bspline_kan.reference import bspline_basis
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.forecasters.base import USUAL_STEPS, Forecaster, Option, Steps
from lesa_kernels.forecasters.units import parameter
from lesa_kernels.stages import of_stage, stage_index
from lesa_kernels.stream.arguments import Weights

if TYPE_CHECKING:
    from lesa_kernels.predictor.config import PredictorConfig
    from lesa_kernels.predictor.module import FusedKANPredictor

LAYERS = 3
GRID_SIZE, SPLINE_ORDER, GRID_RANGE = 5, 3, (-3.0, 3.0)
BOUNDS = {1: (0.9, 0.5), 2: (0.9, 0.4)}
"""The bounds of the stages in the released code, by the number of streams."""

_SHORT, _LONG = 4, 8  # features that the first stage reads, and the others
_FIRST_STREAM, _SECOND_STREAM = "cond", "uncond"


class Lesa(Forecaster):
    """The newest feature, and a weighted sum of the newest K whose size depends on the times of the run.

        forecast = h_1 + alpha (sum_{k=1..K} w_k h_k + b),    alpha = KAN([t - t_0, ..., t - t_S])

    Here h_1 is the newest feature, of a computed or a predicted step, and t is the noise level to forecast. t_0 to t_S
    are the noise levels of all steps of the run, and 0. Each stage has K scalars w, one scalar b, and a KAN: three
    B-spline layers of widths S + 1, `hidden`, `hidden` and 1, with cubic splines on a grid of 5 intervals over [-3, 3].
    So a predictor is for runs of S steps only. S is `config.num_inference_steps`, or 50 if there is none. `grid_size`
    and `spline_order` of the configuration are ignored.

    With `options["streams"] = 2`, the stream of calls named "cond" has the first experts, and that named "uncond" has
    the second ones. A stream with another name is refused; one without a name has the first experts. This is how the
    authors train Qwen-Image, with 0.9 and 0.4 as bounds of the stages.

    Where fewer than K features exist, the oldest one is repeated. The released code has no rule for this case. It
    computes the steps 0 to 3, and stage 0 reads 4 features. But the later stages read 8, and it fails if one of them
    begins before step 8, as in a run whose noise levels are equally spaced.

    The released code computes in bfloat16, with knots that are rounded to it. Here the dtype is that of the parameters,
    float32 unless they are converted, and the knots are exact. The initialisation is that of the authors: weights are
    uniform, and splines begin as noise that is small at the knots.

    Source: LESA, arXiv 2602.20497, and github.com/caipeiliang2004/LESA.
    """

    name = "lesa"
    title = "LESA"
    history = "steps"
    options = {"streams": Option(1, 1, 2)}
    hidden = 256
    is_trained = True
    reads_stream = True
    learning_rate = 1e-4  # of the released code, like the loss of features only
    head_aware = False
    guided_part = None

    def default_bounds(self, config: "PredictorConfig") -> tuple[float, ...]:
        return BOUNDS[_streams(config)]

    def check_streams(self, config: "PredictorConfig", streams: Set[str | None]) -> None:
        if _streams(config) == 2 and streams != {None, _SECOND_STREAM}:
            others = ", ".join(map(repr, sorted(filter(None, streams))))
            got = Said(f"a first stream and then {others}" if others else "a single stream")
            must = f"have the stream {_FIRST_STREAM!r} first and {_SECOND_STREAM!r} second, for options['streams'] = 2"
            remedy = (
                f"Record a pipeline that calls its transformer in `cache_context({_FIRST_STREAM!r})` first, and then "
                f"in `cache_context({_SECOND_STREAM!r})`, or train a predictor for one stream."
            )
            raise argument_error("trajectories", must, got, remedy)

    def check_run(self, config: "PredictorConfig", num_steps: int) -> None:
        if num_steps != _total(config):
            remedy = (
                "Choose `num_inference_steps` so that the run executes that number of steps (with a `strength` below 1 "
                "it executes fewer), or train another predictor for this number."
            )
            must = f"be of a run that executes {_total(config)} steps, as the predictor's config says"
            raise argument_error("times", must, Said(f"those of {num_steps} executed steps"), remedy)

    def history_length(self, config: "PredictorConfig") -> int | tuple[int, ...]:
        return (_SHORT, *(_LONG,) * (config.num_stages - 1))

    def build(self, predictor: "FusedKANPredictor", config: "PredictorConfig") -> None:
        p: Any = predictor
        experts = (_streams(config), config.num_stages)
        p.latent_weight = parameter(*experts, config.max_history)
        p.latent_bias = parameter(*experts)
        hidden = cast(int, config.hidden)
        widths = (_total(config) + 1, *(hidden,) * (LAYERS - 1), 1)
        for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            for name, more in (
                ("base_weight", ()),
                ("spline_weight", (GRID_SIZE + SPLINE_ORDER,)),
                ("spline_scaler", ()),
            ):
                setattr(p, f"{name}_{layer}", parameter(*experts, outputs, inputs, *more))

    def reset(self, predictor: "FusedKANPredictor", generator: torch.Generator | None) -> None:
        p: Any = predictor
        p.latent_weight.zero_()
        for stage, length in enumerate(p.config.lengths):
            for values in (p.latent_weight[:, stage, :length], p.latent_bias[:, stage]):
                values.uniform_(-(length**-0.5), length**-0.5, generator=generator)
        # Splines of least coefficients through noise at the knots.
        at_knots = uniform_knots(GRID_SIZE, 0, GRID_RANGE)
        bases = bspline_basis(at_knots, GRID_SIZE, SPLINE_ORDER, GRID_RANGE)
        through = torch.linalg.pinv(bases).to(p.latent_weight)  # [G + p, G + 1]
        for layer in range(LAYERS):
            base, spline, scaler = _layer(p, layer)
            inputs = base.shape[-1]
            base.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            noise = torch.empty_like(spline[..., : GRID_SIZE + 1])
            noise.uniform_(-0.01 / GRID_SIZE, 0.01 / GRID_SIZE, generator=generator)
            spline.copy_(noise @ through.T)
            scaler.uniform_(-math.sqrt(5 / inputs), math.sqrt(5 / inputs), generator=generator)

    def weights(self, predictor: "FusedKANPredictor", steps: Steps) -> Weights:
        p: Any = predictor
        config = predictor.config
        self.check_run(config, len(steps.times) - 1)
        expert = _expert(config, steps.stream)
        stage = stage_index(steps.sigma.float(), config.stage_bounds)  # [P, B]
        alpha = _alpha(predictor, steps, expert).gather(-1, stage[..., None])  # [P, B, 1]
        wide = torch.promote_types(alpha.dtype, torch.float32)
        alpha = alpha.to(wide)
        order = torch.arange(config.max_history, device=alpha.device)
        beyond = order >= of_stage(stage, config.lengths)[..., None]  # a stage may read less than the longest one
        scaled = alpha * p.latent_weight[expert].to(wide)[stage].masked_fill(beyond, 0.0)  # [P, B, K]
        read = self.read(config, steps)
        repeated = torch.minimum(order, (read - 1).clamp(min=0)[..., None])  # the feature that each weight is of
        anchors = (scaled[..., None] * (repeated[..., None] == order)).sum(-2) + (order == 0)
        return Weights(anchors, read, alpha[..., 0] * p.latent_bias[expert].to(wide)[stage], None, None)


def _streams(config: "PredictorConfig") -> int:
    return int((config.options or {})["streams"])


def _expert(config: "PredictorConfig", stream: str | None) -> int:
    """Which experts forecast a stream of calls."""
    if _streams(config) == 1:
        return 0
    if stream not in (None, _FIRST_STREAM, _SECOND_STREAM):
        must = f"be {_FIRST_STREAM!r}, {_SECOND_STREAM!r} or None for a predictor with options['streams'] = 2"
        remedy = (
            f"Call the transformer in `cache_context({_FIRST_STREAM!r})` and in `cache_context({_SECOND_STREAM!r})`, "
            "or use a predictor for one stream."
        )
        raise argument_error("stream", must, stream, remedy)
    return int(stream == _SECOND_STREAM)


def _total(config: "PredictorConfig") -> int:
    return config.num_inference_steps or USUAL_STEPS


def _layer(predictor: Any, layer: int) -> list[torch.Tensor]:
    return [getattr(predictor, f"{name}_{layer}") for name in ("base_weight", "spline_weight", "spline_scaler")]


def _alpha(predictor: "FusedKANPredictor", steps: Steps, expert: int) -> torch.Tensor:
    """alpha of every stage, `[P, B, stages]`: each layer of each stage is one call for all steps and samples."""
    layers = [_layer(predictor, layer) for layer in range(LAYERS)]
    dtype = layers[0][0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    offsets = (steps.sigma.to(wide)[..., None] - steps.times.to(wide)).to(dtype)  # [P, B, S + 1]
    backend = predictor.backend if predictor.backend in ("triton", "torch") else "auto"  # of those that a KAN layer has
    alpha = []
    for stage in range(predictor.config.num_stages):
        values = offsets
        for layer in layers:
            base, spline, scaler = (part[expert, stage] for part in layer)
            values = bspline_kan(values, base, spline, scaler, GRID_SIZE, SPLINE_ORDER, GRID_RANGE, backend)
        alpha.append(values)
    return torch.cat(alpha, -1)
