"""`train`: fits a predictor to recorded trajectories.

Two stages. Guided: the history is true; a newton predictor sees schedules near its own, a dense one the step before.
Closed loop: as at inference; a newton predictor trains on the schedule itself, a dense one on a history that holds its
own forecasts. The head-aware loss compares what the frozen output head makes of a forecast with what it makes of the
truth.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lesa.cache.error_control import ControlledSteps, ErrorControl
from lesa.schedule import Schedule, as_schedule
from lesa.training.batches import Batch, Head, Plan, predict, roll_out
from lesa.training.losses import feature_loss, head_aware_loss
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.checks import Said, argument_error, check_int

CHECKPOINT_NAME = "checkpoint.pt"


LOSSES_NAME = "losses.json"


CURVE_NAME = "losses.png"


WEIGHT_DECAY = 1e-4


GRADIENT_CLIP = 1.0


DEFAULT_COMPUTED_STEPS = 9


MOST_TOKENS = 256
"""Of a trajectory that is looked at as a whole."""


STRETCHES, STRETCH_SPREAD = (0.5, 1.4), 0.3
"""In training for error control: the range of the gaps over the schedule's, and how far one is off its neighbours."""


def _shaken(computed, total, generator, reach):
    """The schedule with each step but the first moved by at most `reach`."""
    moves = torch.randint(-reach, reach + 1, (len(computed),), generator=generator).tolist()
    return {0} | {min(max(step + move, 1), total - 1) for step, move in zip(computed[1:], moves)}


def _stretched(schedule, sigmas, generator):
    """A schedule such as error control chooses: gaps of a random length, around one that is random too."""
    steps = ControlledSteps(ErrorControl(longest=len(sigmas)), schedule, (), sigmas)

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    middle = uniform(*map(math.log, STRETCHES))
    while max(steps.chosen) < len(sigmas):
        steps.add(math.exp(middle + uniform(-STRETCH_SPREAD, STRETCH_SPREAD)))
    chosen = steps.chosen - {len(sigmas)}
    return chosen if len(chosen) < len(sigmas) else chosen - {len(sigmas) - 1}  # something is left to predict


def unfinished_config(out_dir) -> dict | None:
    """What the checkpoint in `out_dir` was configured with, or None."""
    file = None if out_dir is None else Path(out_dir) / CHECKPOINT_NAME
    if file is None or not file.exists():
        return None
    return torch.load(file, map_location="cpu", weights_only=True)["settings"]["config"]


def complete_config(trajectories, config, schedule) -> PredictorConfig:
    """The predictor's config with what the trajectories and the schedule say, both checked against it."""
    total, width, family = trajectories.num_inference_steps, trajectories.feature_dim, trajectories.family
    if config is None:
        config = PredictorConfig(width)
    for field, wanted in (("feature_dim", width), ("family", family), ("num_inference_steps", total)):
        given = getattr(config, field)
        if given not in (None, wanted):
            raise argument_error(
                f"config.{field}", f"be that of the trajectories, {wanted!r}", given, "Record or configure another."
            )
    if schedule is None:
        schedule = config.schedule or Schedule.spread(min(DEFAULT_COMPUTED_STEPS, total), total)
    schedule = as_schedule(schedule, total)
    if schedule.steps[-1] >= total or schedule.num_inference_steps not in (None, total):
        raise argument_error(
            "schedule",
            f"be made for the {total} steps of the trajectories",
            schedule,
            "Choose steps below that, or record with as many steps as the schedule has.",
        )
    if len(schedule) == total:
        raise argument_error("schedule", "leave steps to predict", schedule, "Compute fewer steps.")
    sigmas = trajectories[0].sigmas.tolist()
    return replace(
        config,
        family=family,
        num_inference_steps=total,
        schedule=schedule.steps,
        schedule_sigmas=tuple(sigmas[s] for s in schedule.steps),
        schedule_errors=None,
    )


class Training:
    """One training run, and its checkpoint.

    Args:
        trajectories: to train on.
        config: of the predictor, complete.
        out_dir: folder for what it writes, or None.
        device: where to train.
        seed: of all that is random.
        reach: by how many steps the guided stage moves the computed ones at most.
        controlled: whether the guided stage has schedules as of error control, in the place of those.
    """

    def __init__(self, trajectories, config, out_dir, device, seed, reach=1, controlled=False):
        self.reach, self.controlled = reach, controlled
        self.trajectories, self.config, self.device, self.seed = trajectories, config, torch.device(device), seed
        self.out_dir = None if out_dir is None else Path(out_dir)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(check_int("seed", seed, minimum=0))
            self.predictor = FusedKANPredictor(config).to(self.device)
        self.generator = torch.Generator().manual_seed(seed)
        self.losses = {"training": [], "validation": []}
        self.origin = {}  # what else the training depends on, for the checkpoint
        self.loss = head_aware_loss
        self.head = Head(trajectories, self.device)
        self.schedule = Schedule(config.schedule, config.num_inference_steps, config.schedule_sigmas)

    def fit(
        self,
        guided_epochs,
        epochs,
        batch_size,
        tokens,
        learning_rate,
        head_aware,
        validation_fraction,
        progress,
        finds_typical_errors=False,
    ):
        self.loss = head_aware_loss if head_aware else feature_loss
        settings = {
            "config": self.config.to_dict(),
            "trajectories": self.trajectories.manifest,
            "guided_epochs": guided_epochs,
            "epochs": epochs,
            "batch_size": batch_size,
            "tokens_per_batch": tokens,
            "learning_rate": learning_rate,
            "head_aware": head_aware,
            "validation_fraction": validation_fraction,
            "seed": self.seed,
            "reach": self.reach,
            "controlled": self.controlled,
            **self.origin,
        }
        training, validation = self._split(validation_fraction)
        optimizer = torch.optim.AdamW(self.predictor.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
        batches = math.ceil(len(training) / batch_size)
        total = guided_epochs + epochs
        first = self._resume(settings, optimizer)
        bar = tqdm(range(first, total), initial=first, total=total, desc="train", disable=not progress, unit="epoch")
        for epoch in bar:
            shuffled = [training[i] for i in torch.randperm(len(training), generator=self.generator).tolist()]
            losses = []
            for number in range(batches):
                done = (epoch * batches + number) / (total * batches)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * done))
                chosen = shuffled[number * batch_size : (number + 1) * batch_size]
                loss = self._batch_loss(chosen, tokens, epoch < guided_epochs)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), GRADIENT_CLIP)
                optimizer.step()
                losses.append(loss.item())
            self.losses["training"].append(sum(losses) / len(losses))
            if validation:
                with torch.no_grad():
                    self.losses["validation"].append(self._batch_loss(validation, tokens, guided=False).item())
                bar.set_postfix(validation=f"{self.losses['validation'][-1]:.4f}")
            self._save_checkpoint(settings, optimizer, epoch + 1)
        if finds_typical_errors and self.config.history == "anchors":
            errors = self._typical_errors(validation or training)
            self.predictor.config = replace(self.config, schedule_errors=errors)
        self._finish(guided_epochs)

    @torch.no_grad()
    def _typical_errors(self, numbers) -> tuple[float, ...]:
        """Of each computed step, the median over the samples of the velocity's error if it were forecast, relative.

        Of the streams of one sample the worst counts, as in a run under `ErrorControl`.
        """
        config, found, generator = self.config, {}, torch.Generator().manual_seed(self.seed)
        if len(config.schedule) < 2:
            return (0.0,)
        for number in numbers:
            batch = Batch([self.trajectories[number]], self.head, generator, MOST_TOKENS, self.device)
            computed = sorted(self.schedule.computed_in(batch.sigmas.tolist()))
            plan = Plan(computed, len(batch.sigmas), config.max_history, device=self.device, steps=computed[1:])
            truth = batch.velocities[plan.steps].flatten(1)
            error = batch.velocity(predict(self.predictor, batch, plan, batch.features), plan.steps).flatten(1) - truth
            relative_error = (error.norm(dim=1) / truth.norm(dim=1).clamp(min=1e-12)).cpu()
            levels = -batch.sigmas[plan.steps].cpu()  # of another size's noise levels, other steps are nearest
            at = np.interp([-s for s in config.schedule_sigmas[1:]], levels, relative_error)
            sample = self.trajectories.samples[number]
            found[sample] = np.maximum(found.get(sample, 0.0), at)
        return (0.0, *np.median([*found.values()], axis=0).tolist())

    def _split(self, validation_fraction) -> tuple[list[int], list[int]]:
        """Numbers of the trajectories to train on and to validate with; those of one sample stay together."""
        by_sample = self.trajectories.by_sample
        order = torch.randperm(len(by_sample), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = min(len(order) - 1, max(1, round(validation_fraction * len(order)))) if validation_fraction else 0
        samples = [by_sample[i] for i in order]
        return sum(samples[held_out:], []), sum(samples[:held_out], [])

    def _batch_loss(self, numbers, tokens, guided) -> torch.Tensor:
        """Mean loss over these trajectories; those of equal noise levels share one pass."""
        groups = {}
        for number in numbers:
            trajectory = self.trajectories[number]
            groups.setdefault(tuple(trajectory.sigmas.tolist()), {})[number] = trajectory
        loss = 0.0
        for group in groups.values():
            roll_outs = [self.roll_outs_of(number) for number in group]
            batch = Batch([*group.values()], self.head, self.generator, tokens, self.device, roll_outs)
            loss = loss + len(group) / len(numbers) * self._loss(batch, guided)
        return loss

    def roll_outs_of(self, number) -> list[torch.Tensor]:
        """Tensors `[C, T, ...]` that batches have beside the trajectory of this number."""
        return []

    def _loss(self, batch, guided) -> torch.Tensor:
        config, every_step = self.config, self.config.history == "steps"
        if not guided:
            computed = self.schedule.computed_in(batch.sigmas.tolist())
        elif every_step:
            computed = {0}
        elif self.controlled:
            computed = _stretched(self.schedule, batch.sigmas.tolist(), self.generator)
        else:
            computed = _shaken(self.schedule.steps, config.num_inference_steps, self.generator, self.reach)
        plan = Plan(computed, config.num_inference_steps, config.max_history, every_step, self.device)
        if every_step and not guided:
            forecast = roll_out(self.predictor, batch, plan)
        else:
            forecast = predict(self.predictor, batch, plan, batch.features)
        return self.loss(batch, plan, forecast)

    def _resume(self, settings, optimizer) -> int:
        """Loads the checkpoint if there is one; returns the epoch to go on with."""
        if self.out_dir is None:
            return 0
        self.out_dir.mkdir(parents=True, exist_ok=True)
        file = self.out_dir / CHECKPOINT_NAME
        file.with_name(file.name + ".new").unlink(missing_ok=True)  # of a save that was cut off
        if not file.exists():
            if any(self.out_dir.iterdir()):
                raise argument_error(
                    "out_dir",
                    "be empty or hold an unfinished training",
                    Said(f"files in {self.out_dir}"),
                    "Choose another.",
                )
            return 0
        checkpoint = torch.load(file, map_location=self.device, weights_only=True)
        for name, value in settings.items():
            if checkpoint["settings"].get(name) != value:
                raise argument_error(
                    name,
                    f"be what the unfinished training in {self.out_dir} has, {checkpoint['settings'].get(name)!r}",
                    value,
                    "Go on with the same arguments, or choose another `out_dir`.",
                )
        self.predictor.load_state_dict(checkpoint["predictor"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        self.generator.set_state(checkpoint["generator"].cpu())
        self.losses = checkpoint["losses"]
        return checkpoint["epoch"]

    def _save_checkpoint(self, settings, optimizer, epoch) -> None:
        if self.out_dir is None:
            return
        new = self.out_dir / (CHECKPOINT_NAME + ".new")
        checkpoint = {
            "settings": settings,
            "predictor": self.predictor.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
            "epoch": epoch,
        }
        torch.save(checkpoint, new)
        new.replace(self.out_dir / CHECKPOINT_NAME)

    def _finish(self, guided_epochs) -> None:
        """Writes the predictor, its losses and their curve; the checkpoint has served."""
        if self.out_dir is None:
            return
        self.predictor.save_pretrained(self.out_dir)
        (self.out_dir / LOSSES_NAME).write_text(json.dumps({"guided_epochs": guided_epochs, **self.losses}) + "\n")
        _plot_losses(self.losses, guided_epochs, self.out_dir / CURVE_NAME)
        (self.out_dir / CHECKPOINT_NAME).unlink()


def _plot_losses(losses, guided_epochs, file) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    if guided_epochs:
        axes.axvline(guided_epochs + 0.5, color="grey", linestyle=":", label="closed loop begins")
    axes.set(xlabel="epoch", ylabel="loss", yscale="log", title="Training of the predictor")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
