"""The predictor as a module: parameters, saving and loading."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import Said, argument_error, check_choice, check_float, check_tensor
from lesa_kernels.dispatch import BACKENDS
from lesa_kernels.feature_ring import FeatureRing, TieredRing, make_ring
from lesa_kernels.feature_ring.reference import RingBuffers
from lesa_kernels.predictor.arguments import DenseExperts, Experts, NewtonExperts, RingState, Shape
from lesa_kernels.predictor.config import PredictorConfig
from lesa_kernels.predictor.files import CONFIG_NAME, WEIGHTS_NAME, find_files
from lesa_kernels.predictor.ops.coefficients import run_newton_coefficients
from lesa_kernels.predictor.ops.dense import run_dense_predict
from lesa_kernels.predictor.ops.newton import newton_backend, run_newton_predict
from lesa_kernels.predictor.ops.velocity import newton_velocity_is_fused, run_newton_velocity
from lesa_kernels.stream.arguments import NO_RESIDUAL, NO_SUMS, HeadSums, LowRank, OutputHead, StoredFeatures, Weights
from lesa_kernels.stream.extension import has_fused_head
from lesa_kernels.stream.op import output_head, stream_forecast, stream_velocity
from lesa_kernels.stream.reference import forecast_dtype
from lesa_kernels.torch_modes import default_modes


class FusedKANPredictor(nn.Module):
    """Forecasts the features of a skipped denoising step from those of a `FeatureRing`.

    There is one expert for each noise stage; the stage of a sample follows from its sigma. Before training, a newton
    predictor extrapolates linearly from the two newest anchors, and a dense one repeats the newest feature.

    Args:
        config: the predictor to build.
        backend: "auto", or the backend that must run.

    Raises:
        TypeError: `config` is not a `PredictorConfig`.

    Source: `newton_predict` and `dense_predict` give the formulas; both build on LESA, arXiv 2602.20497.
    """

    down: nn.Parameter | None
    up: nn.Parameter | None
    up_bias: nn.Parameter | None

    @torch.inference_mode(False)  # parameters that are made in an inference mode could never be trained
    def __init__(self, config: PredictorConfig, backend: str = "auto"):
        super().__init__()
        if not isinstance(config, PredictorConfig):
            raise argument_error(
                "config", "be a PredictorConfig", config, "Build one, or use `from_pretrained`.", TypeError
            )
        self.config = config
        self.backend = check_choice("backend", backend, BACKENDS)
        stages, width = config.num_stages, config.feature_dim
        hidden = cast(int, config.hidden)  # the configuration replaces None
        taps = config.max_history - 1
        newton = config.mixer == "newton"
        inputs = config.max_history + newton  # newton's KAN sees the noise level itself too

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32))

        self.in_weight = parameter(stages, hidden, inputs)
        self.in_bias = parameter(stages, hidden)
        self.spline = parameter(stages, hidden, config.grid_size + config.spline_order)
        if newton:
            self.out_weight = parameter(stages, taps, width, hidden)
            self.out_bias = parameter(stages, taps, width)
            if config.rank:
                self.down = parameter(stages, config.rank, taps, width)
                self.up = parameter(stages, width, config.rank)
                self.up_bias = parameter(stages, width)
            else:
                self.down = self.up = self.up_bias = None
        else:
            self.out_weight = parameter(stages, hidden)
            self.out_bias = parameter(stages)
            self.mix_weight = parameter(sum(config.lengths), width, width)
            self.mix_bias = parameter(stages, width)
        self.reset_parameters()

    # In an inference mode, copies and moves would give parameters that can be used in inference modes only.

    @torch.inference_mode(False)
    def _apply(self, *args: Any, **kwargs: Any) -> "FusedKANPredictor":
        return super()._apply(*args, **kwargs)  # of `to`, `cuda`, `float`, ...

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of `copy.deepcopy`, `pickle` and `torch.load`
        for name, value in self.named_parameters():
            if value.is_inference():
                setattr(self, name, nn.Parameter(value.detach().clone(), value.requires_grad))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises the parameters again: random spline units with output weights of zero.

        So the forecast is exactly the baseline that the class describes.

        Args:
            generator: of the random numbers, on the device of the parameters. None: the default one of that device.
        """
        self.in_weight.normal_(std=self.in_weight.shape[2] ** -0.5, generator=generator)
        self.in_bias.normal_(std=0.5, generator=generator)
        self.spline.normal_(std=0.3, generator=generator)
        self.out_weight.zero_()
        self.out_bias.zero_()
        if self.config.mixer == "newton":
            self.out_bias[:, :1] = 1.0
            if self.down is not None:
                self.down.uniform_(-1, 1, generator=generator).div_((self.down.shape[2] * self.down.shape[3]) ** 0.5)
            for parameter in (self.up, self.up_bias):
                if parameter is not None:
                    parameter.zero_()
        else:
            self.out_bias.fill_(1.0)
            self.mix_weight.zero_()
            self.mix_bias.zero_()

    def make_ring(
        self,
        batch: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_device_bytes: int | None = None,
    ) -> FeatureRing | TieredRing:
        """A ring for this predictor: it can hold the longest history, of `[batch, tokens, feature_dim]` features.

        If it would need more than `max_device_bytes`, its oldest features are in host memory, as `TieredRing` says.
        """
        sizes = (self.config.max_history, batch, tokens, self.config.feature_dim)
        return make_ring(*sizes, dtype, device, max_device_bytes=max_device_bytes)

    def forward(self, ring: FeatureRing | TieredRing, sigma: float | torch.Tensor) -> torch.Tensor:
        """Forecasts the features at `sigma`.

        Args:
            ring: history of `[B, T, D]` features, D the predictor's `feature_dim`.
            sigma: the target's noise level, a float or `[B]`.

        Returns:
            `[B, T, D]` in the ring's dtype, bfloat16 for a float8 ring. Rows without any anchor are NaN.

        Raises:
            ValueError, TypeError: the ring's width is not `feature_dim`, the ring is too small, or `sigma` does not
                fit.
        """
        target = self._target(ring, sigma)

        def forecast(*state):
            return self.forecast(*state, target)

        return self._over(ring, forecast)

    def forecast(
        self,
        storage: torch.Tensor,
        scales: torch.Tensor | None,
        sigmas: torch.Tensor,
        cursor: torch.Tensor,
        count: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` for the buffers of a ring; see `newton_predict` and `dense_predict` for their contents."""
        state, experts = RingState(storage, scales, sigmas, cursor, count, sigma), self.experts()
        if isinstance(experts, NewtonExperts):
            return run_newton_predict(state, experts, self.shape(), self.backend)
        return run_dense_predict(state, experts, self.shape(), self.backend)

    def predict_velocity(
        self, ring: FeatureRing | TieredRing, sigma: float | torch.Tensor, head: OutputHead
    ) -> torch.Tensor:
        """Forecasts the features at `sigma` and applies the output head to them.

        For a newton predictor on Triton the forecast is not written to memory; see `newton_velocity`.

        Args:
            ring, sigma: as in `forward`.
            head: the weights of the head, and the modulation of this step.

        Returns:
            `[B, T, O]` in the ring's dtype, bfloat16 for a float8 ring.

        Raises:
            ValueError, TypeError: as in `forward`, or a tensor of `head` does not fit.
        """
        if _has_pieces_apart(ring, head):
            return output_head(self(ring, sigma), head)
        target = self._target(ring, sigma)
        experts, shape = self.experts(), self.shape()

        def velocity(*state):
            if isinstance(experts, DenseExperts):
                return output_head(self.forecast(*state, target), head)
            return run_newton_velocity(RingState(*state, target), experts, head, shape, self.backend)

        return self._over(ring, velocity)

    def fuses_velocity(self, ring: FeatureRing | TieredRing, head: OutputHead | None = None) -> bool:
        """Whether `velocity_with` from this ring does not write the forecast to memory.

        On Triton, this also holds for `predict_velocity`. On a CPU, `predict_velocity` always writes the forecast.

        Args:
            ring: as in `forward`.
            head: the head. If None, the answer is for a head that the kernel supports.
        """
        experts = self.experts()
        if isinstance(experts, DenseExperts):
            return False
        state = RingState(*self._state(ring), ring.sigmas[0])
        chosen = newton_backend(state, experts, self.shape(), self.backend, "newton_velocity")
        if chosen == "extension":
            return has_fused_head(StoredFeatures(state.storage, state.scales, state.cursor, state.count))
        return chosen == "triton" and (head is None or newton_velocity_is_fused(state, experts, head))

    def reads_sums(self, ring: FeatureRing | TieredRing) -> bool:
        """Whether `velocity_with` from this ring reads the sums that `head_sums` makes: on Triton only."""
        state = RingState(*self._state(ring), ring.sigmas[0])
        experts = self.experts()
        return not isinstance(experts, DenseExperts) and (
            newton_backend(state, experts, self.shape(), self.backend, "newton_velocity") == "triton"
        )

    def plan(self, levels: Sequence[Sequence[float]], sigmas: Sequence[float], batch: int) -> list[Weights]:
        """The weights of the forecasts of several steps of a run, for `forecast_with` and `velocity_with`.

        They depend on noise levels only. So they can be computed in one launch when a run begins.

        Args:
            levels: for each step, the noise levels of the computed steps before it, newest first. Only the newest
                `config.max_history` are used.
            sigmas: for each step, its noise level.
            batch: samples of the run, which all have the same noise levels.

        Returns:
            One `Weights` for each step, on the device of the parameters. The host does not wait for the device.

        Raises:
            ValueError: `levels` and `sigmas` have different lengths.
            RuntimeError: the predictor is a dense one, which has no such weights; or `backend` can't run here, such as
                Triton where a gradient is recorded.
        """
        experts, shape = self.experts(), self.shape()
        if isinstance(experts, DenseExperts):
            raise argument_error(
                "config.mixer", 'be "newton" for a plan', self.config.mixer, "Call the predictor itself.", RuntimeError
            )
        steps, longest = len(sigmas), shape.longest
        if len(levels) != steps:
            must = f"have one entry for each of the {steps} steps in `sigmas`"
            raise argument_error("levels", must, Said(f"{len(levels)}"), "Pass the computed steps before each of them.")
        if not steps:
            return []
        numbers: list[float] = []
        for each in levels:
            numbers += each[:longest]
            numbers += [0.0] * (longest - len(each))  # not read
        numbers += sigmas
        values = self._uploaded(numbers, [min(len(each), longest) for each in levels])
        near, target, count = values.split([steps * longest, steps, steps])
        weights = run_newton_coefficients(
            near.view(steps, 1, longest),
            count.view(torch.int32).view(steps, 1),
            target.view(steps, 1),
            experts,
            shape,
            self.backend,
        )
        each_step = [
            [None] * steps if value is None else value.expand(-1, batch, *value.shape[2:]).unbind() for value in weights
        ]
        return [Weights(*step) for step in zip(*each_step)]

    def _uploaded(self, numbers: Sequence[float], counts: Sequence[int]) -> torch.Tensor:
        """The numbers as float32, then the bits of the counts as int32, in one copy to the device of the parameters."""
        device = self.in_weight.device
        host = torch.empty(
            len(numbers) + len(counts), dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda"
        )
        host[: len(numbers)] = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        host[len(numbers) :].view(torch.int32).copy_(torch.tensor(counts, dtype=torch.int32, device="cpu"))
        return host.to(device, non_blocking=True)

    def low_rank(self, dtype: torch.dtype) -> LowRank:
        """The residual for `forecast_with` and `velocity_with`, from features of `dtype`: prepared once for a run."""
        experts = self.experts()
        if isinstance(experts, DenseExperts) or experts.residual is None or not experts.rank:
            return NO_RESIDUAL
        down, up, _ = experts.residual
        with torch.autocast(up.device.type, enabled=False):
            wide, dtype = up.float(), forecast_dtype(dtype)
            return LowRank(down.to(dtype), up.to(dtype), wide.mT @ wide, wide.sum(1))

    def forecast_with(
        self, ring: FeatureRing | TieredRing, weights: Weights, low_rank: LowRank = NO_RESIDUAL
    ) -> torch.Tensor:
        """`forward` with weights from `plan`, and the residual from `low_rank`."""

        def forecast(storage, scales, sigmas, cursor, count):
            return stream_forecast(StoredFeatures(storage, scales, cursor, count), weights, low_rank, self.backend)

        return self._over(ring, forecast)

    def velocity_with(
        self,
        ring: FeatureRing | TieredRing,
        weights: Weights,
        head: OutputHead,
        low_rank: LowRank = NO_RESIDUAL,
        sums: HeadSums = NO_SUMS,
    ) -> torch.Tensor:
        """`predict_velocity` with weights from `plan`, the residual from `low_rank` and sums from `head_sums`."""
        if _has_pieces_apart(ring, head):
            return output_head(self.forecast_with(ring, weights, low_rank), head)

        def velocity(storage, scales, sigmas, cursor, count):
            features = StoredFeatures(storage, scales, cursor, count)
            return stream_velocity(features, weights, head, low_rank, sums, self.backend)

        return self._over(ring, velocity)

    def _over(self, ring: FeatureRing | TieredRing, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        """`function` of the ring's state, piece by piece if a part of it is in host memory."""
        state = self._state(ring)
        return ring.by_pieces(function) if isinstance(ring, TieredRing) else function(*state)

    def _state(self, ring: FeatureRing | TieredRing) -> RingBuffers:
        if ring.dim != self.config.feature_dim:
            raise argument_error(
                "ring.dim",
                f"be the predictor's feature_dim, {self.config.feature_dim}",
                ring.dim,
                "Use a predictor that was trained for this model.",
            )
        return ring.state

    def _target(self, ring: FeatureRing | TieredRing, sigma: float | torch.Tensor) -> torch.Tensor:
        if isinstance(sigma, torch.Tensor):
            return sigma.to(torch.float32).expand(ring.batch) if sigma.ndim == 0 else sigma
        number = check_float("sigma", sigma)
        if self.config.mixer == "newton" and not torch.compiler.is_compiling():
            return torch.tensor(number, dtype=torch.float32, device="cpu")  # a kernel takes it as it is
        return torch.full((ring.batch,), number, dtype=torch.float32, device=ring.device)

    def experts(self) -> Experts:
        """The parameters of all stages, as `newton_predict` or `dense_predict` takes them."""
        units = (self.in_weight, self.in_bias, self.spline, self.out_weight, self.out_bias)
        if self.config.mixer == "newton":
            return NewtonExperts(*units, self.down, self.up, self.up_bias)
        return DenseExperts(*units, self.mix_weight, self.mix_bias)

    def shape(self) -> Shape:
        """The stages and splines of the configuration, as `newton_predict` and `dense_predict` take them."""
        config = self.config
        return Shape(config.stage_bounds, config.lengths, config.grid_size, config.spline_order)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`. A failure leaves no half-written file."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        new_config, new_weights = folder / (CONFIG_NAME + ".new"), folder / (WEIGHTS_NAME + ".new")
        try:
            new_config.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            save_file(weights, new_weights)
            new_config.replace(folder / CONFIG_NAME)
            new_weights.replace(folder / WEIGHTS_NAME)
        finally:
            new_config.unlink(missing_ok=True)
            new_weights.unlink(missing_ok=True)

    @classmethod
    @default_modes()
    def from_pretrained(cls, folder_or_id: str | os.PathLike, backend: str = "auto", **hub: Any) -> "FusedKANPredictor":
        """Loads what `save_pretrained` wrote: the same bits, in the same dtype.

        Args:
            folder_or_id: a folder, or the id of a repository on the Hugging Face hub.
            backend: as in the constructor.
            hub: passed to `huggingface_hub.hf_hub_download`, such as `revision` or `token`. A folder needs none of
                them; only `subfolder` has a meaning there.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError, TypeError: a keyword is unknown, a file can't be read, the format version is another one, or a
                field or weight does not fit; the message names it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config_file, weights_file = find_files(folder_or_id, hub)
        try:
            file = CONFIG_NAME
            config = PredictorConfig.from_dict(json.loads(config_file.read_text()))
            file = WEIGHTS_NAME
            weights = load_file(weights_file)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise argument_error(
                "folder_or_id", f"hold a readable {file}", Said(str(error)), "Save or download it again."
            ) from error
        with torch.device("meta"):  # all weights are replaced, so no memory and no random numbers are taken for them
            predictor = cls(config, backend)
        expected = predictor.state_dict()
        for name in sorted({*weights, *expected}):
            wanted, found = (
                Said("nothing") if name not in t else Said(f"shape {list(t[name].shape)}") for t in (expected, weights)
            )
            if wanted.text != found.text:
                raise argument_error(
                    f"{WEIGHTS_NAME}: {name}",
                    f"match its config, which says {wanted.text}",
                    found,
                    f"{CONFIG_NAME} and {WEIGHTS_NAME} are from different predictors: save or download both again.",
                )
        for name, value in weights.items():
            check_tensor(f"{WEIGHTS_NAME}: {name}", value, dtypes=FLOAT_DTYPES)
        predictor.load_state_dict(weights, assign=True)
        return predictor

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the predictor to the Hugging Face hub and returns its address. Creates the repository if needed."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a lesa-kernels predictor")
        return str(url)


def _has_pieces_apart(ring: FeatureRing | TieredRing, head: OutputHead) -> bool:
    """Whether the forecast is made piece by piece and then needs a head whose modulation is one for each token."""
    return isinstance(ring, TieredRing) and isinstance(head.scale, torch.Tensor) and head.scale.ndim == 3
