"""The predictor as a module: parameters, saving and loading."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import Said, argument_error, check_choice, check_float, check_int, check_tensor
from lesa_kernels.dispatch import BACKENDS
from lesa_kernels.feature_ring import FeatureRing, TieredRing, make_ring
from lesa_kernels.feature_ring.reference import RingBuffers
from lesa_kernels.forecasters.base import Forecaster, Steps, default_times
from lesa_kernels.predictor.arguments import RingState, Shape, check_times
from lesa_kernels.predictor.config import PredictorConfig
from lesa_kernels.predictor.files import CONFIG_NAME, PROVENANCE_NAME, WEIGHTS_NAME, find_files, read_provenance
from lesa_kernels.predictor.sharing import add_card
from lesa_kernels.predictor.uploads import by_step, unbound, uploaded
from lesa_kernels.stream.arguments import NO_RESIDUAL, NO_SUMS, HeadSums, LowRank, OutputHead, StoredFeatures, Weights
from lesa_kernels.stream.op import output_head, stream_forecast, stream_velocity
from lesa_kernels.torch_modes import default_modes


class FusedKANPredictor(nn.Module):
    """Forecasts the features of a skipped denoising step from those of a `FeatureRing`.

    Who makes the weights of the stored features is one of `lesa_kernels.forecasters`, which `config.mixer` names.

    Args:
        config: the predictor to build.
        backend: "auto", or the backend that must run.

    Attributes:
        provenance: what the predictor was made for, in values that JSON has; None if that is unknown. It is saved and
            loaded with the predictor. `lesa.train` sets it, and `lesa.enable_cache` compares it with the pipeline.

    Raises:
        TypeError: `config` is not a `PredictorConfig`.

    Source: the forecasters name theirs. Those that are trained build on LESA, arXiv 2602.20497.
    """

    provenance: dict[str, Any] | None = None
    _loaded_from: Path | None = None  # the folder, which may have a model card

    @torch.inference_mode(False)  # parameters that are made in an inference mode could never be trained
    def __init__(self, config: PredictorConfig, backend: str = "auto"):
        super().__init__()
        if not isinstance(config, PredictorConfig):
            raise argument_error(
                "config", "be a PredictorConfig", config, "Build one, or use `from_pretrained`.", TypeError
            )
        self.config = config
        self.backend = check_choice("backend", backend, BACKENDS)
        self.forecaster.build(self, config)
        self.reset_parameters()

    @property
    def forecaster(self) -> Forecaster:
        """Who makes the weights: the forecaster that `config.mixer` names."""
        return self.config.forecaster

    @property
    def device(self) -> torch.device | None:
        """Where the parameters are; None if there are none. Then it forecasts on any device."""
        parameter = self._first_parameter()
        return None if parameter is None else parameter.device

    def _first_parameter(self) -> nn.Parameter | None:
        return next((parameter for parameter in self._parameters.values() if parameter is not None), None)

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
        for name, buffer in self.named_buffers():
            if buffer.is_inference():
                setattr(self, name, buffer.clone())

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises the parameters again, as the forecaster begins.

        Args:
            generator: of the random numbers, on the device of the parameters. None: the default one of that device.
        """
        self.forecaster.reset(self, generator)

    def make_ring(
        self,
        batch: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_device_bytes: int | None = None,
        feature_dim: int | None = None,
    ) -> FeatureRing | TieredRing:
        """A ring for this predictor: it can hold the longest history, of `[batch, tokens, feature_dim]` features.

        If it would need more than `max_device_bytes`, its oldest features are in host memory, as `TieredRing` says.
        `feature_dim` is that of the configuration; it is needed if the configuration has none.
        """
        known = self.config.feature_dim
        width = check_int("feature_dim", known if feature_dim is None else feature_dim)
        if known not in (None, width):
            remedy = "Leave it out."
            raise argument_error("feature_dim", f"be the predictor's feature_dim, {known}", feature_dim, remedy)
        sizes = (self.config.max_history, batch, tokens, width)
        return make_ring(*sizes, dtype, device, max_device_bytes=max_device_bytes)

    def forward(
        self,
        ring: FeatureRing | TieredRing,
        sigma: float | torch.Tensor,
        times: Sequence[float] | torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        """Forecasts the features at `sigma`.

        Args:
            ring: history of `[B, T, D]` features, D the predictor's `feature_dim` if it has one.
            sigma: the target's noise level, a float or `[B]`.
            times: the falling noise levels of all steps of the run, and 0 at the end; `[S + 1]`, a tensor on the ring's
                device. Two steps may have the same level. Where the level rises in a run, a new history begins: pass
                the part of the run around this step over which it falls. Only some forecasters read the times. None:
                from 1 to 0 in equal steps, as many as the predictor was trained for, else 50.
            stream: the name of the stream of calls that the features belong to, such as "uncond" for the calls without
                a prompt. Only some forecasters read it.

        Returns:
            `[B, T, D]` in the ring's dtype, bfloat16 for a float8 ring. Rows without any anchor are NaN.

        Raises:
            ValueError, TypeError: the ring's width is not `feature_dim`, the ring is too small, or `sigma` or `times`
                does not fit. Of a tensor on a GPU, the host checks the shape and does not read the values.
        """
        target, more = self._target(ring, sigma), self._more(ring, times, stream)

        def forecast(*state):
            return self.forecast(*state, target, **more)

        return self._over(ring, forecast)

    def forecast(
        self,
        storage: torch.Tensor,
        scales: torch.Tensor | None,
        sigmas: torch.Tensor,
        cursor: torch.Tensor,
        count: torch.Tensor,
        sigma: torch.Tensor,
        times: torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        """`forward` for the buffers of a ring; see `newton_predict` and `dense_predict` for their contents."""
        return self.forecaster.forecast(self, RingState(storage, scales, sigmas, cursor, count, sigma), times, stream)

    def predict_velocity(
        self,
        ring: FeatureRing | TieredRing,
        sigma: float | torch.Tensor,
        head: OutputHead,
        times: Sequence[float] | torch.Tensor | None = None,
        stream: str | None = None,
    ) -> torch.Tensor:
        """Forecasts the features at `sigma` and applies the output head to them.

        If the forecaster has weights (`plans`), the forecast is not written to memory on Triton; see `stream_velocity`.

        Args:
            ring, sigma, times, stream: as in `forward`.
            head: the weights of the head, and the modulation of this step.

        Returns:
            `[B, T, O]` in the ring's dtype, bfloat16 for a float8 ring.

        Raises:
            ValueError, TypeError: as in `forward`, or a tensor of `head` does not fit.
        """
        target, more = self._target(ring, sigma), self._more(ring, times, stream)
        if _has_pieces_apart(ring, head):
            return output_head(self(ring, sigma, **more), head)

        def velocity(*state):
            return self.forecaster.velocity(self, RingState(*state, target), head, **more)

        return self._over(ring, velocity)

    def fuses_velocity(self, ring: FeatureRing | TieredRing, head: OutputHead | None = None) -> bool:
        """Whether `velocity_with` from this ring does not write the forecast to memory.

        On Triton, this also holds for `predict_velocity`. On a CPU, `predict_velocity` of a newton
        predictor always writes the forecast.

        Args:
            ring: as in `forward`.
            head: the head. If None, the answer is for a head that the kernel supports.
        """
        return self.forecaster.fuses(self, RingState(*self._state(ring), ring.sigmas[0]), head)

    def reads_sums(self, ring: FeatureRing | TieredRing) -> bool:
        """Whether `velocity_with` from this ring reads the sums that `head_sums` makes: on Triton only."""
        state = RingState(*self._state(ring), ring.sigmas[0])
        return self.forecaster.plans and self.forecaster.velocity_backend(self, state) == "triton"

    def plan(
        self,
        levels: Sequence[Sequence[float]],
        sigmas: Sequence[float],
        batch: int,
        times: Sequence[float] | torch.Tensor | None = None,
        device: torch.device | str | None = None,
        stream: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Weights]:
        """The weights of the forecasts of several steps of a run, for `forecast_with` and `velocity_with`.

        They depend on noise levels only. So they can be computed at once when a run begins: in one launch, or on the
        CPU if there are no parameters. The numbers are copied to the device in one copy.

        Args:
            levels: for each step, the noise levels of the computed steps before it, newest first. Only the newest
                `config.max_history` are used.
            sigmas: for each step, its noise level.
            batch: samples of the run, which all have the same noise levels.
            times: the noise levels of the whole run, as in `forward`; a tensor must be on the CPU.
            device: where the weights are needed. Default: where the parameters are, else the CPU.
            stream: as in `forward`.
            dtype: of the weights. Kernels take float32 only. Default: float64 if the parameters are, else float32.

        Returns:
            One `Weights` for each step. The host does not wait for the device.

        Raises:
            ValueError: `levels` and `sigmas` have different lengths, or `times` does not fit.
            RuntimeError: the forecaster has no such weights, such as the dense variant; or `backend` can't run here,
                such as Triton where a gradient is recorded.
        """
        forecaster, longest, count = self.forecaster, self.config.max_history, len(sigmas)
        if not forecaster.plans:
            must, remedy = "be a forecaster of weights for a plan", "Call the predictor itself."
            raise argument_error("config.mixer", must, self.config.mixer, remedy, RuntimeError)
        if len(levels) != count:
            must = f"have one entry for each of the {count} steps in `sigmas`"
            raise argument_error("levels", must, Said(f"{len(levels)}"), "Pass the computed steps before each of them.")
        if not count:
            return []
        numbers: list[float] = []
        for each in levels:
            numbers += each[:longest]
            numbers += [0.0] * (longest - len(each))  # not read
        numbers += sigmas
        if forecaster.reads_times:
            numbers += default_times(self.config, "cpu").tolist() if times is None else check_times(times, "cpu")
        parameter = self._first_parameter()
        near_parameters = torch.device("cpu") if parameter is None else parameter.device
        values = uploaded(numbers, [min(len(each), longest) for each in levels], near_parameters)
        sizes = [count * longest, count, len(numbers) - count * (longest + 1), count]
        near, target, all_times, there = values.split(sizes)
        steps = Steps(
            near.view(count, 1, longest),
            there.view(torch.int32).view(count, 1),
            target.view(count, 1),
            all_times,
            stream,
        )
        if dtype is None:
            dtype = torch.float32 if parameter is None else torch.promote_types(parameter.dtype, torch.float32)
        weights = forecaster.weights_in(self, steps, dtype)
        if parameter is None:
            return by_step(weights, batch, torch.device("cpu" if device is None else device))
        return unbound(weights, batch)

    def low_rank(self, dtype: torch.dtype) -> LowRank:
        """The residual for `forecast_with` and `velocity_with`, from features of `dtype`: prepared once for a run."""
        return self.forecaster.low_rank(self, dtype)

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
        width = self.config.feature_dim
        if width != ring.dim and width is not None:
            raise argument_error(
                "ring.dim",
                f"be the predictor's feature_dim, {width}",
                ring.dim,
                "Use a predictor that was trained for this model.",
            )
        return ring.state

    def _target(self, ring: FeatureRing | TieredRing, sigma: float | torch.Tensor) -> torch.Tensor:
        if isinstance(sigma, torch.Tensor):
            return sigma.to(torch.float32).expand(ring.batch) if sigma.ndim == 0 else sigma
        number = check_float("sigma", sigma)
        if self.forecaster.reads_one_sigma and not torch.compiler.is_compiling():
            return torch.tensor(number, dtype=torch.float32, device="cpu")  # a kernel takes it as it is
        return torch.full((ring.batch,), number, dtype=torch.float32, device=ring.device)

    def _more(
        self, ring: FeatureRing | TieredRing, times: Sequence[float] | torch.Tensor | None, stream: str | None
    ) -> dict[str, Any]:
        """`extra` for checked times on the ring's device."""
        if times is not None:
            times = check_times(times, ring.device if self.forecaster.reads_times else None)
            if self.forecaster.reads_times and not isinstance(times, torch.Tensor):
                times = uploaded(times, (), ring.device)
        return self.extra(times, stream)

    def extra(self, times: Sequence[float] | torch.Tensor | None, stream: str | None) -> dict[str, Any]:
        """Those of the two that are given and that the forecaster reads, as arguments for the methods above.

        A subclass may replace a method by one without these arguments, for a forecaster that does not read them.
        """
        more: dict[str, Any] = {}
        if times is not None and self.forecaster.reads_times:
            more["times"] = times
        if stream is not None and self.forecaster.reads_stream:
            more["stream"] = stream
        return more

    def experts(self) -> tuple:
        """The parameters of all stages, as the forecaster's own operation takes them, such as `newton_predict`."""
        return self.forecaster.experts(self)

    def shape(self) -> Shape:
        """The stages and splines of the configuration, as `newton_predict` and `dense_predict` take them."""
        config = self.config
        return Shape(config.stage_bounds, config.lengths, config.grid_size, config.spline_order)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, and `provenance.json` if that is known.

        A failure leaves no half-written file.

        Raises:
            TypeError, ValueError: `provenance` is neither None nor a dict of values that JSON has.
        """
        from safetensors.torch import save_file

        texts = {CONFIG_NAME: json.dumps(self.config.to_dict(), indent=2) + "\n"}
        if self.provenance is not None:
            texts[PROVENANCE_NAME] = _provenance_text(self.provenance)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        new = {name: folder / f"{name}.new" for name in (CONFIG_NAME, WEIGHTS_NAME, PROVENANCE_NAME)}
        try:
            for name, text in texts.items():
                new[name].write_text(text, encoding="utf-8")
            save_file(weights, new[WEIGHTS_NAME])
            (folder / PROVENANCE_NAME).unlink(missing_ok=True)  # that of an earlier predictor, before its weights go
            for name in (CONFIG_NAME, WEIGHTS_NAME, *(texts.keys() - {CONFIG_NAME})):
                new[name].replace(folder / name)
        finally:
            for file in new.values():
                file.unlink(missing_ok=True)

    @classmethod
    @default_modes()
    def from_pretrained(
        cls, folder_or_id: str | os.PathLike, backend: str = "auto", *, budget: int | None = None, **hub: Any
    ) -> "FusedKANPredictor":
        """Loads what `save_pretrained` wrote: the same bits, in the same dtype.

        Args:
            folder_or_id: a folder, or the id of a repository on the Hugging Face hub.
            backend: as in the constructor.
            budget: which predictor to load from a folder or a repository that has one for each of several budgets, in
                folders such as `budget-9`. None: it has one predictor only.
            hub: passed to `huggingface_hub.hf_hub_download`, such as `revision` or `token`. A folder needs none of
                them; only `subfolder` has a meaning there.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError, TypeError: a keyword is unknown, there are predictors for other budgets, a file can't be read,
                the format version is another one, or a field or weight does not fit; the message names it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        files = find_files(folder_or_id, hub, budget)
        try:
            file = CONFIG_NAME
            config = PredictorConfig.from_dict(json.loads(files.config.read_text()))
            file = WEIGHTS_NAME
            weights = load_file(files.weights)
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
            kept = expected[name].dtype
            dtypes = FLOAT_DTYPES if kept.is_floating_point else (kept,)
            check_tensor(f"{WEIGHTS_NAME}: {name}", value, dtypes=dtypes)
        predictor.load_state_dict(weights, assign=True)
        if files.provenance is not None:
            predictor.provenance = read_provenance(files.provenance)
        predictor._loaded_from = files.config.parent
        return predictor

    @classmethod
    @default_modes()
    def from_lesa_checkpoint(
        cls,
        file: str | os.PathLike,
        feature_dim: int | None = None,
        family: str | None = None,
        backend: str = "auto",
    ) -> "FusedKANPredictor":
        """Loads a predictor that the released training code of LESA saved, for `mixer="lesa"`.

        Such a file is what `torch.save` makes of a dict. Only its state dict `model` is read; the state of the
        optimiser and others may be there. Nothing in the file is executed.

        Args:
            file: path of the checkpoint, such as "predictor_flux_N7_E3.pt".
            feature_dim: width D of the features of the model, which the file does not know. None: it fits any width.
            family: the model family for which it was trained, such as "flux"; the file does not know it either.
            backend: as in the constructor.

        Returns:
            A float32 predictor on the CPU, without a schedule. `Schedule.interval(N, steps, first=4)` is that of the
            released code. Its bounds of the stages are 0.9 and 0.5, or 0.9 and 0.4 if the file has experts for two
            streams of guidance.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError, TypeError: it cannot be read; it holds something else than tensors, numbers and the
                configuration of the released code; or a parameter is missing, unknown, has another shape or another
                grid of knots. The message names it.

        Source: github.com/caipeiliang2004/LESA.
        """
        from lesa_kernels.forecasters.lesa_checkpoint import read_lesa_checkpoint

        config, parameters = read_lesa_checkpoint(file, feature_dim, family)
        with torch.device("meta"):  # all parameters are replaced
            predictor = cls(config, backend)
        predictor.load_state_dict(parameters, assign=True)
        return predictor

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the predictor to the Hugging Face hub and returns its address. Creates the repository if needed.

        If it was loaded from a folder with a model card (`README.md`), that is uploaded too, with the pictures beside
        it that its text names. Otherwise a minimal card is made, unless the repository has one. A card that
        lesa-kernels made is used only for the weights and the schedule that it was made for; one of other weights is
        replaced, and its pictures are deleted in the repository. So is a `provenance.json` there, if the predictor has
        no provenance.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder)
            outdated = add_card(api, repo_id, self.config, self._loaded_from, folder)
            message = "Upload a lesa-kernels predictor"
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=outdated or None
            )
        return str(url)


def _provenance_text(provenance: Any) -> str:
    """The contents of `provenance.json`; raises `TypeError` or `ValueError` if they can't be JSON."""
    must, remedy = "be None, or a dict of values that JSON has", "Convert the values, or set it to None."
    if not isinstance(provenance, dict):
        raise argument_error("provenance", must, provenance, remedy, TypeError)
    try:
        text = json.dumps(provenance, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise argument_error(
            "provenance", must, Said(f"one with other values ({error})"), remedy, type(error)
        ) from None
    if json.loads(text) != provenance:  # such as keys that are numbers
        raise argument_error("provenance", must, Said("one that JSON changes"), remedy)
    return text


def _has_pieces_apart(ring: FeatureRing | TieredRing, head: OutputHead) -> bool:
    """Whether the forecast is made piece by piece and then needs a head whose modulation is one for each token."""
    return isinstance(ring, TieredRing) and isinstance(head.scale, torch.Tensor) and head.scale.ndim == 3
