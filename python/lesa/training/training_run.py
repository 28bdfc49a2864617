"""One training of a predictor, in two phases, and its checkpoint.

Guided phase: the history is true. A predictor whose history has computed steps only sees schedules near its own. One
whose history has every step, such as the dense variant, sees the steps before. If there are guided epochs only, these
forecast the steps that the schedule predicts, and otherwise all steps but the first.
Closed loop: the history is as at inference. It has the computed steps of the schedule itself, or also the forecasts of
the predictor.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from lesa.artifacts import check_same_settings, files_in, output_folder, remove_partial, whole_file, write_text
from lesa.schedule import Schedule, schedule_of
from lesa.training.batches import Batch, Head, Plan, RollOut, Split, part_of, predict, roll_out, split
from lesa.training.curves import plot_losses
from lesa.training.guided_schedules import moved_steps, stretched_steps
from lesa.training.losses import feature_loss, head_aware_loss
from lesa.training.searching import SEARCH_NAME, discard_search
from lesa.training.settings import TrainingSettings, config_settings
from lesa.training.trajectories import Trajectories
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.forecasters import RecordedRun
from lesa_kernels.predictor.files import WEIGHTS_NAME

CHECKPOINT_NAME = "checkpoint.pt"
LOSSES_NAME = "losses.json"
CURVE_NAME = "losses.png"

WEIGHT_DECAY = 1e-4
GRADIENT_CLIP = 1.0
MOST_CHECKPOINTS = 200  # of a training. With few trajectories there are many epochs, and each of them is short

MOST_TOKENS = 256
"""How many tokens of a trajectory are used where the errors of a trained predictor are measured, at most."""


class Training:
    """One training of a predictor: `fit`, then `finish`.

    A subclass may replace `depends_on`, `is_fitted`, `roll_outs_of`, `loss_of` and `validation_name`.

    Args:
        trajectories: to train on.
        config: of the predictor, from `complete_config`.
        settings: how it is fitted.
        numbers: of the trajectories to train on and to validate with. Default: what `split` chooses.
        out_dir: folder for what the training writes, or None.
        device: where to train.
        bar: what the progress bar is called, or None for no bar.

    Attributes:
        predictor: what is trained.
        losses: mean loss of each epoch, in training and in validation.
        generator: of all that is random after the initialisation.
        head, heads: the output projection of the first transformer, and those of all transformers by name.
        schedule: the computed steps, with their noise levels.
    """

    validation_name = "validation"
    """What the progress bar calls the validation loss."""

    def __init__(
        self,
        trajectories: Trajectories,
        config: PredictorConfig,
        settings: TrainingSettings,
        *,
        numbers: Split | None = None,
        out_dir: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        bar: str | None = None,
    ):
        if config.forecaster.reads_stream:
            config.forecaster.check_streams(config, set(trajectories.streams))
        self.trajectories, self.config, self.settings = trajectories, config, settings
        self.schedule = cast(Schedule, schedule_of(config))  # a complete configuration has one
        chosen = numbers or split(trajectories, settings.validation_fraction, settings.seed)
        self.numbers = Split(*([number for number in part if self._is_to_predict(number)] for part in chosen))
        self.epochs_per_checkpoint = max(1, math.ceil((settings.guided_epochs + settings.epochs) / MOST_CHECKPOINTS))
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.device, self.bar = torch.device(device), bar
        with torch.device("meta"):  # without random numbers of the default generator, which all threads share
            predictor = FusedKANPredictor(config)
        self.predictor = predictor.to_empty(device="cpu")
        self.predictor.reset_parameters(torch.Generator().manual_seed(settings.seed))
        self.predictor.to(self.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: dict[str, list[float]] = {"training": [], "validation": []}
        self.heads = {name: Head(trajectories, self.device, name) for name in trajectories.projections}
        self.head = next(iter(self.heads.values()))

    # What a subclass may replace

    def depends_on(self) -> dict[str, Any]:
        """What the training depends on beside configuration, trajectories and settings. A checkpoint holds it."""
        return {}

    def is_fitted(self) -> bool:
        """Whether the training is the closed form of the forecaster, without epochs."""
        return self.config.forecaster.is_fitted

    def roll_outs_of(self, number: int) -> list[RollOut]:
        """Roll-outs that batches have beside the trajectory of this number."""
        return []

    def loss_of(self, batch: Batch, guided: bool) -> torch.Tensor:
        """The loss of the forecasts in a batch, in the guided phase or in closed loop."""
        config, every_step = self.config, self.config.history == "steps"
        total = len(batch.sigmas)
        computed: Set[int]
        if not guided or config.forecaster.guided_part is None:
            computed = self.computed_in(batch.sigmas.tolist())
        elif every_step:
            computed = {0}
        elif self.settings.controlled:
            computed = stretched_steps(self.schedule, batch.sigmas.tolist(), self.generator)
        else:
            steps = self.schedule.steps if len(self.heads) == 1 else sorted(self.computed_in(batch.sigmas.tolist()))
            computed = moved_steps(steps, total, self.generator, self.settings.reach)
        plan = Plan(computed, total, config.max_history, every_step, self.device)
        if every_step and not guided:
            forecast = roll_out(self.predictor, batch, plan)
        else:
            forecast = predict(self.predictor, batch, plan, batch.features)
        loss = head_aware_loss if self.settings.head_aware else feature_loss
        return loss(batch, plan, forecast)

    def computed_in(self, sigmas: list[float]) -> Set[int]:
        """The steps that the schedule computes, of a trajectory with these noise levels."""
        is_whole = self.trajectories.switch is None
        return (self.schedule if is_whole else part_of(self.schedule, sigmas)).computed_in(sigmas)

    def _is_to_predict(self, number: int) -> bool:
        """Whether the schedule leaves out steps of a trajectory. Of one of two transformers, it may compute all."""
        if self.trajectories.switch is None:
            return True
        sigmas = self.trajectories.sigmas_of(number)
        return len(self.computed_in(sigmas)) < len(sigmas)

    # What a training does

    def fit(self) -> None:
        """Trains the predictor, from the checkpoint on if there is one, and writes checkpoints after epochs.

        Raises:
            ValueError: the folder holds something else than an unfinished training with the same settings.
        """
        settings = self.settings
        if self.is_fitted():
            self._resume(None)
            self._fit_at_once()
            return
        optimizer = torch.optim.AdamW(self.predictor.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
        total = settings.guided_epochs + settings.epochs
        first = self._resume(optimizer)
        epochs = tqdm(
            range(first, total),
            desc=self._phase_name(first),
            initial=first,
            total=total,
            disable=self.bar is None,
            unit="epoch",
        )
        for epoch in epochs:
            if epoch == settings.guided_epochs:
                epochs.set_description(self._phase_name(epoch))
            self.losses["training"].append(self._train_epoch(optimizer, epoch, total))
            if self.numbers.validation:
                with torch.no_grad():
                    loss = self.mean_loss(self.numbers.validation, settings.tokens_per_batch, guided=False).item()
                self.losses["validation"].append(loss)
                epochs.set_postfix({self.validation_name: f"{loss:.4f}"})
            if (epoch + 1) % self.epochs_per_checkpoint == 0 or epoch + 1 == total:
                self._save_checkpoint(optimizer, epoch + 1)

    def finish(self) -> FusedKANPredictor:
        """Measures the typical errors of the trained predictor, and writes what belongs into the folder.

        Returns:
            The predictor, on the CPU.
        """
        if self.config.history == "anchors" and len(self.heads) == 1:
            errors = self._typical_errors(self.numbers.validation or self.numbers.training)
            self.predictor.config = replace(self.config, schedule_errors=errors)
        if self.out_dir is not None:
            guided_epochs = self.settings.guided_epochs
            self.predictor.save_pretrained(self.out_dir)
            losses = json.dumps({"guided_epochs": guided_epochs, **self.losses})
            write_text(self.out_dir / LOSSES_NAME, losses + "\n")
            if not self.is_fitted():  # a fit has no losses over epochs
                begin = guided_epochs if self.settings.epochs else None
                plot_losses(self.losses, begin, self.out_dir / CURVE_NAME)
            (self.out_dir / CHECKPOINT_NAME).unlink()
        return self.predictor.cpu().eval()

    def mean_loss(self, numbers: Sequence[int], tokens: int | None, guided: bool) -> torch.Tensor:
        """Mean loss over trajectories. Those of equal noise levels share one batch.

        For a forecaster that reads the stream of calls, those of a batch are also of the same stream.

        Args:
            numbers: of the trajectories.
            tokens: random tokens taken of each; None for all.
            guided: whether as in the guided phase or in closed loop.
        """
        groups: dict[tuple, list[int]] = {}
        streams = self.trajectories.streams if self.config.forecaster.reads_stream else None
        transformers = self.trajectories.transformers
        read = {number: self.trajectories[number] for number in numbers}
        for number, trajectory in read.items():
            stream = None if streams is None else streams[number]
            groups.setdefault((stream, transformers[number], *trajectory.sigmas.tolist()), []).append(number)
        mean = torch.zeros((), dtype=torch.float32, device=self.device)
        for (stream, transformer, *_), group in groups.items():
            roll_outs = [self.roll_outs_of(number) for number in group]
            alike, head = [read[number] for number in group], self.heads[transformer]
            end = self.trajectories.end_of(group[0])
            batch = Batch(alike, head, self.generator, tokens, self.device, roll_outs, stream, end)
            mean = mean + len(group) / len(numbers) * self.loss_of(batch, guided)
        return mean

    def _fit_at_once(self) -> None:
        """The closed form, from all tokens. The losses are those after it."""
        numbers = self.numbers.training
        computed = self.schedule.computed_in(self.trajectories[numbers[0]].sigmas.tolist())
        self.config.forecaster.fit(self.predictor, recorded_runs(self.trajectories, numbers, self.device), computed)
        tokens = self.settings.tokens_per_batch
        with torch.no_grad():
            for name, numbers in self.numbers._asdict().items():
                size = self.settings.batch_size  # so that memory does not grow with the recording
                parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
                total = sum(len(part) * self.mean_loss(part, tokens, guided=False).item() for part in parts)
                self.losses[name] = [total / len(numbers)] if numbers else []

    def _phase_name(self, epoch: int) -> str:
        """What the progress bar is called in the phase of this epoch."""
        settings = self.settings
        if not (settings.guided_epochs and settings.epochs):
            return f"{self.bar}"
        phase = "1 of 2, guided" if epoch < settings.guided_epochs else "2 of 2, closed loop"
        return f"{self.bar}, phase {phase}"

    def _train_epoch(self, optimizer: torch.optim.Optimizer, epoch: int, total: int) -> float:
        """Trains for one epoch of `total`; returns the mean loss of its batches."""
        settings, training = self.settings, self.numbers.training
        size, batches = settings.batch_size, math.ceil(len(training) / settings.batch_size)
        shuffled = [training[i] for i in torch.randperm(len(training), generator=self.generator).tolist()]
        losses = []
        for number in range(batches):
            done = (epoch * batches + number) / (total * batches)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            chosen = shuffled[number * size : (number + 1) * size]
            loss = self.mean_loss(chosen, settings.tokens_per_batch, epoch < settings.guided_epochs)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                got = Said(f"{losses[-1]} in epoch {epoch + 1}")
                remedy = f"Lower `learning_rate`, which is {settings.learning_rate:g}."
                raise argument_error("loss", "stay finite", got, remedy, RuntimeError)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), GRADIENT_CLIP)
            optimizer.step()
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _typical_errors(self, numbers: Sequence[int]) -> tuple[float, ...]:
        """For each computed step, how far its forecast velocity would be off, relative: the median over the samples.

        Of the streams of one sample the worst counts, as in a run under `ErrorControl`.
        """
        config, generator = self.config, torch.Generator().manual_seed(self.settings.seed)
        wanted = [-sigma for sigma in (config.schedule_sigmas or ())[1:]]
        if not wanted:
            return (0.0,)
        found: dict[int, np.ndarray] = {}
        for number in numbers:
            alike, stream = [self.trajectories[number]], self.trajectories.streams[number]
            batch = Batch(alike, self.head, generator, MOST_TOKENS, self.device, stream=stream)
            computed = sorted(self.schedule.computed_in(batch.sigmas.tolist()))
            plan = Plan(computed, len(batch.sigmas), config.max_history, device=self.device, steps=computed[1:])
            truth = batch.velocities[plan.steps].flatten(1)
            error = batch.velocity(predict(self.predictor, batch, plan, batch.features), plan.steps).flatten(1) - truth
            relative_error = (error.norm(dim=1) / truth.norm(dim=1).clamp(min=1e-12)).cpu()
            levels = -batch.sigmas[plan.steps].cpu()  # a sample of another size has other noise levels
            at = np.interp(wanted, levels, relative_error)
            sample = self.trajectories.samples[number]
            found[sample] = np.maximum(found.get(sample, 0.0), at)
        return (0.0, *np.median([*found.values()], axis=0).tolist())

    # The checkpoint

    def _all_settings(self) -> dict[str, Any]:
        """All that must be the same for a training to continue, by name."""
        return {
            "trajectories": self.trajectories.manifest,
            "config": config_settings(self.config),
            **self.settings.to_dict(),
            **self.depends_on(),
        }

    def _resume(self, optimizer: torch.optim.Optimizer | None) -> int:
        """Loads the checkpoint if there is one; returns the epoch to continue with.

        A fit has no optimizer. Its checkpoint only says that it is not finished, and with which settings it began.
        """
        if self.out_dir is None:
            return 0
        check_folder(self.out_dir)
        checkpoint = read_checkpoint(self.out_dir)
        if checkpoint is None:
            self._save_checkpoint(optimizer, 0)
        else:
            work = f"the unfinished training in {self.out_dir}"
            check_same_settings(work, checkpoint["settings"], self._all_settings())
            self.predictor.load_state_dict(checkpoint["predictor"])
            if optimizer is not None:
                load_optimizer(optimizer, checkpoint["optimizer"], work)
            self.generator.set_state(checkpoint["generator"].cpu())
            self.losses = checkpoint["losses"]
        discard_search(self.out_dir)  # the checkpoint says what it found
        return 0 if checkpoint is None else checkpoint["epoch"]

    def _save_checkpoint(self, optimizer: torch.optim.Optimizer | None, epoch: int) -> None:
        if self.out_dir is None:
            return
        checkpoint = {
            "settings": self._all_settings(),
            "predictor": self.predictor.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
            "epoch": epoch,
        }
        contents = io.BytesIO()  # torch's own writer has no `OSError` for a full disk
        torch.save(checkpoint, contents)
        with whole_file(self.out_dir / CHECKPOINT_NAME) as temporary:
            temporary.write_bytes(contents.getbuffer())


def recorded_runs(
    trajectories: Trajectories, numbers: Iterable[int], device: torch.device | str
) -> Iterator[RecordedRun]:
    """The trajectories of these numbers, one by one, as a forecaster is fitted from them."""
    for number in numbers:
        trajectory = trajectories[number]
        yield RecordedRun(trajectory.features.to(device, torch.float32), trajectory.sigmas)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, work: str) -> None:
    """Loads the state; raises `ValueError` if it is that of another optimiser, as an earlier version had it."""
    try:
        optimizer.load_state_dict(state or {"state": {}, "param_groups": []})
    except ValueError as error:
        must, got = "hold an optimizer with the same parameters", Said(work + ", made by another version")
        raise argument_error("out_dir", must, got, "Start again in another folder.") from error


def check_folder(out_dir: str | os.PathLike) -> Path:
    """Makes the folder; raises `ValueError` unless it is empty or holds an unfinished training or search."""
    folder = output_folder(out_dir)
    file = folder / CHECKPOINT_NAME
    remove_partial(file)
    file.with_name(f"{file.name}.new").unlink(missing_ok=True)  # the same, of earlier versions
    if not file.exists() and any(path.name != SEARCH_NAME for path in files_in(folder)):
        got = Said(f"a predictor in {folder}" if is_finished(folder) else f"files in {folder}")
        raise argument_error("out_dir", "be empty or hold an unfinished training", got, "Choose another folder.")
    return folder


def unfinished_config(out_dir: Path) -> dict[str, Any] | None:
    """The predictor's configuration in the checkpoint of an unfinished training, or None if there is none."""
    checkpoint = read_checkpoint(out_dir)
    return None if checkpoint is None else checkpoint["settings"]["config"]


def read_checkpoint(out_dir: Path) -> dict[str, Any] | None:
    """The checkpoint in the folder, on the CPU, or None if there is none.

    Raises:
        ValueError: it is damaged.
        OSError, MemoryError, RuntimeError: it cannot be read, or memory is too small for it.
    """
    file = out_dir / CHECKPOINT_NAME
    if not file.exists():
        return None
    parts = {"settings", "predictor", "optimizer", "generator", "losses", "epoch"}
    contents = io.BytesIO(file.read_bytes())
    try:
        with zipfile.ZipFile(contents) as archive:  # torch does not compare the checksums
            is_whole = archive.testzip() is None
        contents.seek(0)
        checkpoint = torch.load(contents, map_location="cpu", weights_only=True)
        if is_whole and parts <= checkpoint.keys() and "config" in checkpoint["settings"]:
            return checkpoint
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged bytes lead to many kinds of errors
        if "DefaultCPUAllocator: " in str(error):  # torch has no type for it
            raise
    must, got = "hold a checkpoint that can be read", Said(f"{file}, which is damaged or of another version")
    raise argument_error("out_dir", must, got, "Delete it to train from the start.")


def is_finished(out_dir: Path) -> bool:
    """Whether the folder holds a predictor whose training is finished."""
    return (out_dir / WEIGHTS_NAME).exists() and not (out_dir / CHECKPOINT_NAME).exists()
