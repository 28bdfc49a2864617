"""One training of a predictor through whole runs, and its checkpoint."""

import copy
import functools
import io
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lesa.artifacts import check_same_settings, digest, fingerprint, predictor_identity, whole_file, write_text
from lesa.cache.told import check_can_be_told
from lesa.models import adapter_for, features_device
from lesa.pipelines import check_decodes
from lesa.provenance import of_manifest
from lesa.schedule import Schedule, schedule_of
from lesa.training.batches import check_is_predictor
from lesa.training.curves import plot_losses
from lesa.training.differentiable_runs import DifferentiableRuns, GradientRun, frozen
from lesa.training.end_to_end_settings import EndToEndSettings
from lesa.training.gradient_checks import TrainingFailedError, check_differentiable
from lesa.training.learned_levels import RATE, LearnedLevels
from lesa.training.run_references import References, calls_of
from lesa.training.training_run import (
    CHECKPOINT_NAME,
    CURVE_NAME,
    GRADIENT_CLIP,
    LOSSES_NAME,
    WEIGHT_DECAY,
    check_folder,
    load_optimizer,
    read_checkpoint,
)
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.torch_modes import default_modes

BETAS, WARM_UP = (0.9, 0.99), 20
"""Of AdamW; and after how many updates it has its learning rate."""

MOST_CHECKPOINTS = 50
"""Of a training."""

FLOOR = 1e-9
"""What is added to a mean square error before its logarithm is taken."""

REFERENCES = "references"

Loss = str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What compares the end of a run: "latents", "pixels", or a function of images and those of the run of all steps."""


class EndToEndRun:
    """One training through whole runs: `resume`, make the references, then `fit`. See `trained_end_to_end`.

    Attributes:
        all_references: the runs of all steps, by the number of steps that is passed to the pipeline.
        references: those for the number of steps of the latest update.
    """

    def __init__(
        self,
        predictor: FusedKANPredictor,
        pipe: Any,
        inputs: list[dict],
        settings: EndToEndSettings,
        folder: Path,
        references: Path | None,
        loss: Loss,
        schedule_for: Callable[[int], Schedule] | None,
    ):
        check_trainable(predictor, pipe, loss, settings.learn_levels)
        self.loss, self.compares_images = loss, loss != "latents"
        self.pipe, self.inputs, self.settings, self.folder = pipe, inputs, settings, folder
        if schedule_for is not None:
            self.schedules = [schedule_for(update) for update in range(settings.updates)]
        elif (own := schedule_of(predictor.config)) is not None:
            self.schedules = [own] * settings.updates
        else:
            remedy = "Train it with a schedule, or pass `schedule_for`."
            raise argument_error("predictor.config.schedule", "be the steps to compute", None, remedy)
        if len(settings.counts) > 1 and predictor.config.num_inference_steps is None:
            must, remedy = "be the number of steps of `schedule`", "Set it, or pass one number of steps."
            raise argument_error("predictor.config.num_inference_steps", must, None, remedy)
        self.device = features_device(pipe, adapter_for(pipe))
        self.begin = predictor_identity(predictor)
        with default_modes():
            self.predictor = copy.deepcopy(predictor).to(self.device, torch.float32).requires_grad_(True)
        self.predictor.backend = "auto"  # which has gradients
        self.predictor.config = replace(predictor.config, schedule_errors=None)  # they are those of other weights
        self.levels = LearnedLevels(predictor.config) if settings.learn_levels else None
        self._owns_references = references is None
        self._references_folder = folder / REFERENCES if references is None else references
        self.all_references = {
            count: References(
                pipe,
                inputs,
                settings.seed,
                count,
                settings.samples_per_call,
                self._references_folder / f"steps-{count}" if len(settings.counts) > 1 else self._references_folder,
                self.compares_images,
            )
            for count in settings.counts
        }
        self.references = self.all_references[settings.counts[0]]
        self.step_counts = settings.count_of_each_update()
        self.losses: list[float] = []
        self._executed_before: dict[int, int] = {}  # in the checkpoint, as the references are removed before it

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [*self.predictor.parameters()]}]
        if self.levels is not None:
            groups.append({"params": [self.levels.offsets], "weight_decay": 0.0, "rate": RATE})
        groups = [group for group in groups if group["params"]]  # an untrained forecaster has levels only
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)

    @default_modes()
    def resume(self) -> int:
        """Loads the checkpoint, or writes the first one. Returns how many updates are done.

        Raises:
            ValueError: the folder holds something else than an unfinished training with the same settings.
        """
        check_folder(self.folder)
        checkpoint = read_checkpoint(self.folder)
        if checkpoint is None:
            self._save_checkpoint()
            return 0
        work = f"the unfinished training in {self.folder}"
        check_same_settings(work, checkpoint["settings"], self._all_settings())
        self.predictor.load_state_dict(checkpoint["predictor"])
        if self.levels is not None:
            self.levels.load_state_dict(checkpoint["levels"])
        load_optimizer(self.optimizer, checkpoint["optimizer"], work)
        self.losses = checkpoint["losses"]
        self._executed_before = checkpoint.get("executed", {})
        return len(self.losses)

    def fit(self, bar: str | None) -> FusedKANPredictor:
        """Trains from the checkpoint on, and writes what belongs into the folder."""
        total, done = self.settings.updates, len(self.losses)
        facts = of_manifest({"num_inference_steps": self._own_count, **self.references.facts})
        self.predictor.provenance = {"samples": len(self.inputs), **(self.predictor.provenance or {}), **facts}
        every = math.ceil(total / MOST_CHECKPOINTS)
        batches = itertools.islice(_batches(len(self.inputs), self.settings), done, total)
        shown = tqdm(batches, desc=bar, initial=done, total=total, disable=bar is None, unit="update")
        runs = DifferentiableRuns(self.pipe, self.predictor, self.levels)
        extra = [self.loss] if isinstance(self.loss, torch.nn.Module) else []
        with runs.on(), frozen(extra):
            for update, samples in enumerate(shown, done):
                loss = self._update(runs, update, samples)
                self.losses.append(loss)
                shown.set_postfix({"loss": f"{loss:.4f}"})
                if (update + 1) % every == 0 or update + 1 == total:
                    self._save_checkpoint()
        return self._finish()

    def _update(self, runs: DifferentiableRuns, update: int, samples: list[int]) -> float:
        """One step of the optimiser. Returns the loss before it."""
        settings, optimizer, steps = self.settings, self.optimizer, self.step_counts[update]
        self.references = self.all_references[steps]
        for group in optimizer.param_groups:
            warm = min(1.0, (update + 1) / WARM_UP)
            rate = settings.learning_rate * group.get("rate", 1.0)
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * update / settings.updates))
        optimizer.zero_grad()
        total = 0.0
        for alike in calls_of(self.inputs, samples, settings.samples_per_call):
            run = runs.run(
                [self.inputs[sample] for sample in alike],
                [settings.seed + sample for sample in alike],
                steps,
                self.schedules[update],
                "pt" if self.compares_images else "latent",
            )
            with torch.inference_mode(False), torch.enable_grad():
                loss = len(alike) / len(samples) * self._loss_of(run, alike)
                self._check_finite("loss", "stay finite", loss.item(), update)
                loss.backward()
            total += loss.item()
        with default_modes():
            norm = torch.nn.utils.clip_grad_norm_([*self.predictor.parameters()], GRADIENT_CLIP)
            self._check_finite("pipe", "give finite gradients", norm.item(), update)
            self._clip_levels(update)
            optimizer.step()
            if self.levels is not None:
                self.levels.keep_in_range()
        return total

    def _clip_levels(self, update: int) -> None:
        """Clips the gradients of the levels, and sees that the model gives some."""
        if self.levels is None:
            return
        if self.levels.offsets.grad is None:
            remedy = "Pass `learn_levels=False`."
            raise argument_error("pipe", "give gradients of its timesteps, to learn levels", Said("none"), remedy)
        norm = torch.nn.utils.clip_grad_norm_([self.levels.offsets], GRADIENT_CLIP)
        self._check_finite("pipe", "give finite gradients of its timesteps", norm.item(), update)

    def _loss_of(self, run: GradientRun, samples: list[int]) -> torch.Tensor:
        """The mean of the losses at the end and before the computed steps, over some samples."""
        if self.compares_images:
            end = self._loss_of_images(run.made.float(), self.references.images(samples, run.made.device))
        else:
            end = self._off(run, samples, run.last)
        # Before the first forecast, nothing depends on the predictor.
        between = [
            self._off(run, samples, step - 1) for step in run.computed[1:] if run.latents[step - 1].requires_grad
        ]
        return (end + torch.stack(between).mean()) / 2 if between else end

    def _off(self, run: GradientRun, samples: list[int], step: int) -> torch.Tensor:
        """How far the latents are off after a step."""
        latents = run.latents[step].float()
        return _log_rms(latents, self.references.latents(samples, step, latents.device))

    def _loss_of_images(self, images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if self.loss == "pixels":
            return _log_rms(images, wanted)
        frames, wanted_frames = (each.reshape(-1, *each.shape[-3:]) for each in (images, wanted))
        function: Any = self.loss
        distance = function(frames, wanted_frames)
        if not isinstance(distance, torch.Tensor) or not distance.requires_grad or distance.min() < 0:
            remedy = "Return a tensor of distances, made from the first argument."
            raise argument_error("loss", "give distances of 0 or more, with a gradient", distance, remedy)
        return (distance.float() + FLOOR).log().mean()

    def _check_finite(self, name: str, must: str, value: float, update: int) -> None:
        if not math.isfinite(value):
            remedy = f"Lower `learning_rate`, which is {self.settings.learning_rate:g}."
            if update == 0:  # no step of the optimiser was taken
                remedy = "Check the inputs, the predictor and the loss. In float16, use bfloat16 or float32."
            raise argument_error(name, must, Said(f"{value} in update {update + 1}"), remedy, TrainingFailedError)

    def check_steps(self) -> None:
        """Raises `ValueError` if the pipeline executes other numbers of steps than that of the predictor's schedule.

        Of several numbers, one must be that. There is a run of each number.
        """
        wanted, executed = self.predictor.config.num_inference_steps, self._executed
        if wanted in executed.values() or (wanted is None and len(executed) == 1):
            return
        must = f"make the pipeline execute {wanted} steps, for which the predictor was trained"
        if len(executed) > 1:
            must = f"have one that makes the pipeline execute the {wanted} steps of the predictor's schedule"
        got = Said("; ".join(f"{given}, with which it executes {steps}" for given, steps in executed.items()))
        raise argument_error("num_inference_steps", must, got, "Pass another number, or train a predictor for it.")

    @property
    def _executed(self) -> dict[int, int]:
        """How many steps a run executes, for those numbers of steps of which there is or was a run."""
        return {
            **self._executed_before,
            **{count: each.steps for count, each in self.all_references.items() if each.has_begun},
        }

    @property
    def _own_count(self) -> int:
        """The number of steps that is passed to the pipeline for the predictor's schedule."""
        own = (count for count, steps in self._executed.items() if steps == self.predictor.config.num_inference_steps)
        return next(own, self.settings.counts[0])

    def _all_settings(self) -> dict[str, Any]:
        """All that must be the same for a training to continue, by name."""
        steps = [list(schedule.steps) for schedule in self.schedules]
        return {
            "config": self.predictor.config.to_dict(),
            "predictor": self.begin,
            **asdict(self.settings),
            "learn_levels": self.settings.learn_levels or None,  # as in a training of an earlier release
            "loss": name_of(self.loss),
            "schedules": steps[:1] if steps == steps[:1] * len(steps) else steps,
            **self.references.facts,
            "inputs_digest": digest(self.inputs),
        }

    def _save_checkpoint(self) -> None:
        checkpoint = {
            "settings": self._all_settings(),
            "predictor": self.predictor.state_dict(),
            "levels": None if self.levels is None else self.levels.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": None,  # the order follows from the seed
            "losses": self.losses,
            "executed": self._executed,
            "epoch": len(self.losses),
        }
        contents = io.BytesIO()  # torch's own writer has no `OSError` for a full disk
        torch.save(checkpoint, contents)
        with whole_file(self.folder / CHECKPOINT_NAME) as temporary:
            temporary.write_bytes(contents.getbuffer())

    def _finish(self) -> FusedKANPredictor:
        """Writes what belongs into the folder. Returns the predictor, on the CPU."""
        if self.levels is not None:
            self.predictor.config = replace(self.predictor.config, told_levels=self.levels.values())
        config, executed = self.predictor.config, {*self._executed.values()}
        more = tuple(sorted(executed - {config.num_inference_steps})) if len(self.all_references) > 1 else ()
        self.predictor.config = replace(config, more_step_counts=more or None)
        self.predictor.save_pretrained(self.folder)
        losses = {"training": self.losses}
        write_text(self.folder / LOSSES_NAME, json.dumps(losses) + "\n")
        plot_losses(losses, None, self.folder / CURVE_NAME, "update")
        if self._owns_references:
            shutil.rmtree(self._references_folder, ignore_errors=True)
        (self.folder / CHECKPOINT_NAME).unlink()
        self.optimizer.zero_grad(set_to_none=True)
        return self.predictor.cpu().eval()


def _batches(count: int, settings: EndToEndSettings) -> Iterator[list[int]]:
    """The numbers of the samples of each update.

    Passes over the samples follow one another, each in a new random order. If the number of samples is no multiple of
    `batch_size`, a pass leaves out the rest, which is another one in each pass.
    """
    generator, size = torch.Generator("cpu").manual_seed(settings.seed), min(settings.batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator, device="cpu").tolist()
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def _log_rms(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The logarithm of the root mean square error of each sample; the mean over the samples."""
    return ((values - wanted).square().flatten(1).mean(1) + FLOOR).log().mean() / 2


def name_of(loss: Loss) -> str:
    """What distinguishes a loss from others, as far as is known."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, functools.partial):
        return f"{name_of(loss.func)} {digest((loss.args, loss.keywords))}"
    kind = loss if hasattr(loss, "__qualname__") else type(loss)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} {fingerprint(loss, with_buffers=True)}" if isinstance(loss, torch.nn.Module) else name


def check_loss(loss: Any) -> None:
    """Raises `ValueError` unless it is a loss."""
    if loss not in ("latents", "pixels") and (isinstance(loss, str) or not callable(loss)):
        remedy = "Pass one of them, such as `lpips.LPIPS()` with its option `normalize=True`."
        raise argument_error("loss", "be 'latents', 'pixels' or a function of two batches of images", loss, remedy)


def check_trainable(predictor: FusedKANPredictor, pipe: Any, loss: Any, learns_levels: bool = False) -> None:
    """Raises an error unless the predictor can be trained through runs of the pipeline, with this loss.

    With `learns_levels`, the predictor itself may have nothing to train.

    Raises:
        TypeError, ValueError: it cannot. The message names why.
        RuntimeError: a cache is on.
    """
    check_is_for(predictor, pipe, learns_levels)
    check_differentiable(pipe, predictor)
    if learns_levels or predictor.config.told_levels is not None:
        check_can_be_told(pipe, adapter_for(pipe), learns_levels)
    check_loss(loss)
    if loss != "latents":
        check_decodes(pipe)


def check_is_for(predictor: FusedKANPredictor, pipe: Any, learns_levels: bool = False) -> None:
    """Raises `TypeError` or `ValueError` unless the predictor is for this pipeline, and there is something to train."""
    check_is_predictor(predictor)
    config, adapter = predictor.config, adapter_for(pipe)
    if not config.forecaster.is_trained and not learns_levels:
        raise argument_error(
            "predictor.config.mixer", "be one that has something to train", config.mixer, "Use it as it is."
        )
    for field, wanted in (("family", adapter.family), ("feature_dim", adapter.feature_dim)):
        if getattr(config, field) not in (None, wanted):
            remedy = "Use a predictor that was trained for this model."
            raise argument_error(f"predictor.config.{field}", f"be {wanted!r}", getattr(config, field), remedy)
