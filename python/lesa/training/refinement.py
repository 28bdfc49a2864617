"""`refine`: trains a predictor on what its own forecasts lead to, with the model in the loop.

In a run with forecasts, the sample drifts away from where all steps would have led it. Later steps are computed for the
drifted sample. A predictor that was trained on true histories has never seen such features. Here the predictor is
rolled out through the pipeline. Then it is trained to lead the sample back, on the features that the model gave along
the roll-out. This is DAgger (Ross et al., AISTATS 2011, arXiv 1011.0686), where the expert is the run of all steps.

A predictor that uses its own forecasts as history is trained as in the second stage of LESA: its forecasts along the
roll-out are compared with the recorded features of the same steps. LESA runs the model anew before each step of the
optimiser. Here it runs once in a round. The forecasts between its computed steps are made anew each time.
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lesa.artifacts import (
    check_same_settings,
    digest,
    files_in,
    fingerprint,
    predictor_identity,
    read_json,
    remove_partial,
    write_text,
)
from lesa.inputs import check_inputs
from lesa.models import adapter_for, features_device
from lesa.processes import Processes, processes_for
from lesa.provenance import of_manifest
from lesa.training.batches import Batch, Plan, RollOut, check_is_predictor, check_whole, passes, roll_out
from lesa.training.losses import feature_loss, head_aware_loss, roll_out_loss
from lesa.training.recording import Recording, check_same_conditions
from lesa.training.settings import REFINING_UPDATES, ROUNDS, TOKENS_PER_BATCH, TrainingSettings, usable_device
from lesa.training.training_run import Training, is_finished
from lesa.training.trajectories import Trajectories, as_trajectories, check_plain, latents_of
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error, check_int
from lesa_kernels.torch_modes import default_modes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_LEARNING_RATE = 1e-3

ROLL_OUTS, PREDICTOR, SETTINGS_NAME = "roll-outs", "predictor", "refinement.json"


def refine(
    predictor: FusedKANPredictor,
    trajectories: Trajectories | str | os.PathLike,
    pipe: "DiffusionPipeline",
    inputs: list[str] | list[dict],
    *,
    out_dir: str | os.PathLike | None = None,
    rounds: int = ROUNDS,
    epochs: int | None = None,
    batch_size: int = 8,
    tokens_per_batch: int | None = TOKENS_PER_BATCH,
    learning_rate: float | None = None,
    samples_per_call: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FusedKANPredictor:
    """Trains a predictor further, on its own roll-outs.

    In each round the pipeline runs on the recorded inputs with the predictor on. Then the predictor is trained on these
    roll-outs and those of earlier rounds. If its history has computed steps only, it is trained on the recorded
    trajectories too. For each input, a round costs the computed steps of the schedule.

    Where several processes were started together, as by `torchrun`, all must call this with the same arguments. They
    share the roll-outs. The first one trains, and all return the predictor.

    Args:
        predictor: what `train` made on these trajectories. It is not changed.
        trajectories: what `lesa.record` made of plain runs, or its folder.
        pipe: the pipeline that was recorded.
        inputs: the inputs that were recorded.
        out_dir: folder for the predictor, `losses.json` and `losses.png`, and for the roll-outs while it runs. A
            refinement that was interrupted continues there. None: the roll-outs are in a temporary folder, and nothing
            is kept.
        rounds: how often to make roll-outs and train on them.
        epochs: passes over the trajectories in each round. Default: as many as give about 200 steps of the optimiser.
        batch_size, tokens_per_batch, learning_rate: see `train`; they apply to each round. The default learning rate is
            that of `train`, but at most 1e-3.
        samples_per_call: how many samples share a call of the pipeline.
        seed: seed of the order, the tokens and the validation samples.
        device: where to train; the pipeline runs where it is.
        progress: whether to show progress bars.

    Returns:
        The predictor of the last round, on the CPU.

    Raises:
        TypeError, ValueError: the predictor has nothing to train, has no schedule or was trained for something else, an
            argument is out of range, a file of the recording is damaged or has NaN or Inf, the noise level rises in a
            recorded run, or the pipeline, the inputs or `out_dir` are not those of the recording. The message names it.
        RuntimeError: another process works in `out_dir`, or see `lesa.record` and `train`.

    Source: DAgger, arXiv 1011.0686. For a history of computed steps, the loss measures the drift at the end of each
    gap. This is the drift at the start of the gap, plus what the velocities of the gap add to it in Euler steps.
    Flow-matching schedulers make such steps. For a history with forecasts, it is the loss of `train`, as in LESA, arXiv
    2602.20497.
    """
    trajectories = as_trajectories(trajectories)
    _check_predictor(predictor, trajectories)
    check_plain(trajectories)
    latents_of(trajectories[0])
    inputs = check_inputs(inputs)
    _check_recorded(trajectories, pipe, inputs)
    rounds = check_int("rounds", rounds)
    forecaster = predictor.config.forecaster
    settings = TrainingSettings(
        epochs=0,
        batch_size=batch_size,
        tokens_per_batch=tokens_per_batch,
        learning_rate=min(MOST_LEARNING_RATE, forecaster.learning_rate) if learning_rate is None else learning_rate,
        head_aware=forecaster.head_aware,
        seed=seed,
    )
    of_a_round = passes(trajectories, REFINING_UPDATES, settings) if epochs is None else check_int("epochs", epochs)
    settings = replace(settings, epochs=of_a_round)
    samples_per_call, device = check_int("samples_per_call", samples_per_call), usable_device(device)
    processes = processes_for(pipe)
    everything = _all_settings(predictor, trajectories, rounds, settings)
    processes.begin("lesa.refine", {**everything, "samples_per_call": samples_per_call, "out_dir": out_dir is None})
    processes.by_first(lambda: check_whole(trajectories))
    with _working_folder(out_dir, everything, processes) as folder:
        roll_outs: list[RollOuts] = []
        for number in range(1, rounds + 1):
            bar = f"round {number} of {rounds}" if progress and processes.is_first else None
            rolled, trained = (folder / f"round-{number}" / name for name in (ROLL_OUTS, PREDICTOR))
            roll_outs.append(RollOuts(trajectories, predictor, pipe, inputs, rolled, samples_per_call, bar))
            training_bar = bar and f"{bar}, train"
            training = partial(refined, predictor, trajectories, roll_outs, settings, trained, device, training_bar)
            predictor = processes.by_first(training)
        if out_dir is not None:
            processes.by_first(lambda: [shutil.copy(file, folder) for file in trained.iterdir()])
    return predictor


def refined(
    predictor: FusedKANPredictor,
    trajectories: Trajectories,
    roll_outs: Sequence["RolledOut"],
    settings: TrainingSettings,
    out_dir: Path,
    device: torch.device,
    bar: str | None = None,
) -> FusedKANPredictor:
    """Trains a predictor for one round. A round that is finished is read from its folder.

    Args:
        predictor: of the round before. It is not changed.
        trajectories: the plain runs.
        roll_outs: those of this round and of earlier ones.
        settings: how to train.
        out_dir: folder of the round. A training that was interrupted continues there.
        device: where to train.
        bar: what the progress bar is called, or None for no bar.
    """
    if is_finished(out_dir):
        return FusedKANPredictor.from_pretrained(out_dir)
    with default_modes():  # the pipeline runs in those of the caller
        config = replace(predictor.config, more_step_counts=None)  # it is refined for those of the trajectories
        run = _Refinement(trajectories, config, settings, out_dir=out_dir, device=device, bar=bar)
        run.start_from(predictor, roll_outs)
        run.fit()
        return run.finish()


def _check_predictor(predictor: FusedKANPredictor, trajectories: Trajectories) -> None:
    """Raises `ValueError` unless the predictor was trained on trajectories like these, and can be refined."""
    check_is_predictor(predictor)
    config = predictor.config
    if not config.forecaster.is_trained:
        remedy = "Use it as it is."
        raise argument_error("predictor.config.mixer", "be one that has something to train", config.mixer, remedy)
    for field in ("feature_dim", "family", "num_inference_steps"):
        wanted = getattr(trajectories, field)
        fits_any = field == "feature_dim" and config.feature_dim is None
        if getattr(config, field) != wanted and not fits_any:
            remedy = "Train it on these trajectories first."
            raise argument_error(f"predictor.config.{field}", f"be {wanted!r}", getattr(config, field), remedy)
    if config.schedule is None:
        remedy = "Give the predictor a configuration with `schedule` and `schedule_sigmas`, or train it first."
        raise argument_error("predictor.config.schedule", "be the steps to compute", None, remedy)
    if config.told_levels is not None:
        remedy = "Refine before `lesa.train_end_to_end` learns levels, or remove them with `dataclasses.replace`."
        raise argument_error("predictor.config.told_levels", "be None to refine", config.told_levels, remedy)


def _check_recorded(trajectories: Trajectories, pipe: "DiffusionPipeline", inputs: list[dict]) -> None:
    """Raises `ValueError` unless the trajectories were recorded with this model and these inputs."""
    for name, key, value in (
        ("inputs", "inputs_digest", digest(inputs)),
        ("pipe.transformer", "transformer", fingerprint(adapter_for(pipe).transformer)),
    ):
        if value != trajectories.manifest.get(key):
            remedy = "Pass what was recorded, or record again."
            raise argument_error(name, "be what the trajectories were recorded with", Said("something else"), remedy)
    check_same_conditions(trajectories, pipe)


def _all_settings(
    predictor: FusedKANPredictor, trajectories: Trajectories, rounds: int, settings: TrainingSettings
) -> dict[str, Any]:
    """All that must be the same for a refinement to continue, by name."""
    training = settings.to_dict()
    names = ("epochs", "batch_size", "tokens_per_batch", "learning_rate", "seed")
    return {
        "predictor": predictor_identity(predictor),
        "trajectories": trajectories.manifest,
        "rounds": rounds,
        **{name: training[name] for name in names},
    }


@contextlib.contextmanager
def _working_folder(
    out_dir: str | os.PathLike | None, settings: dict[str, Any], processes: Processes
) -> Iterator[Path]:
    """A folder for the rounds. It is cleaned up after the last round. Until then, the work can continue there."""
    with processes.working_folder(out_dir, "refining") as folder:
        file = folder / SETTINGS_NAME
        processes.by_first(lambda: _check_folder(file, settings))
        yield folder
        if out_dir is not None:
            processes.by_first(lambda: _clean_up(file, settings["rounds"]))


def _clean_up(file: Path, rounds: int) -> None:
    """Removes what only the work needed."""
    file.unlink()  # first: rounds that are left behind do no harm
    for number in range(rounds):
        shutil.rmtree(file.parent / f"round-{number + 1}")


def _check_folder(file: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a refinement. Raises `ValueError` if its folder has files, and not one with the same."""
    folder = file.parent
    remove_partial(file)
    if file.exists():
        check_same_settings(f"the unfinished refinement in {folder}", _read_settings(file), settings)
    elif files_in(folder):
        must = "be empty or hold an unfinished refinement"
        raise argument_error("out_dir", must, Said(f"files in {folder}"), "Choose another folder.")
    else:
        write_text(file, json.dumps(settings) + "\n")


def _read_settings(file: Path) -> dict[str, Any]:
    settings = read_json(file)
    if isinstance(settings, dict):
        return settings
    got = Said(f"{file}, which is damaged")
    raise argument_error("out_dir", "hold a refinement that can be read", got, "Choose another folder.")


class RolledOut(Protocol):
    """Roll-outs of a predictor beside trajectories, as a training uses them.

    Attributes:
        predictor: what distinguishes the predictor from others.
    """

    predictor: dict[str, Any]

    def of(self, number: int) -> RollOut:
        """The roll-out beside the trajectory of this number."""


class RollOuts:
    """Roll-outs of a predictor, beside the plain runs of the same samples.

    Args:
        trajectories: the plain runs.
        predictor: whose roll-outs.
        pipe, inputs, samples_per_call: see `refine`.
        folder: of their recording.
        bar: what the progress bar is called, or None for no bar.

    Attributes:
        recorded: the recording, of computed steps only.
        predictor: what distinguishes the predictor from others.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        predictor: FusedKANPredictor,
        pipe: Any,
        inputs: list[dict],
        folder: Path,
        samples_per_call: int,
        bar: str | None = None,
    ):
        manifest = trajectories.manifest
        recording = Recording(
            pipe,
            inputs,
            num_inference_steps=manifest["requested_num_inference_steps"],
            tokens_per_sample=manifest["tokens_per_sample"],
            seed=manifest["seed"],
            batch_size=samples_per_call,
            predictor=copy.deepcopy(predictor).to(features_device(pipe, adapter_for(pipe))),
        )
        self.recorded = recording.write(folder, bar and f"{bar}, roll out")
        if self.recorded.names != trajectories.names:
            got = Said(f"{len(self.recorded)} streams of calls instead of {len(trajectories)}")
            raise argument_error("pipe", "call its transformer as it did in the recording", got, "Record again.")
        self.predictor = self.recorded.manifest["predictor"]
        self._plain = trajectories

    @cached_property
    def drifts(self) -> list[torch.Tensor]:
        """Of each roll-out, `[C, T, O]`: by how much the latents are off before each computed step.

        They are in the direction of the velocity. Where guidance combines several streams of calls, they share it.
        """
        found = []
        for plain, rolled in zip(self._plain, self.recorded):
            computed = torch.isin(plain.sigmas, rolled.sigmas)
            found.append(latents_of(plain)[computed].float() - latents_of(rolled).float())  # sigma falls
        return found

    def of(self, number: int) -> RollOut:
        """The roll-out beside the trajectory of this number."""
        return RollOut(self.recorded[number].features, self.drifts[number])


class _Refinement(Training):
    """The training of one round: on trajectories and roll-outs."""

    validation_name = "validation with roll-outs"  # another quantity than the validation loss of `train`
    roll_outs: Sequence[RolledOut] = ()

    def start_from(self, predictor: FusedKANPredictor, roll_outs: Sequence[RolledOut]) -> None:
        """Takes the weights of the round before, and the roll-outs to train on."""
        self.predictor.load_state_dict(predictor.state_dict())
        self.predictor.provenance = {**(predictor.provenance or {}), **of_manifest(self.trajectories.manifest)}
        self.roll_outs = roll_outs

    def depends_on(self) -> dict[str, Any]:
        return {"roll_outs": [rolled.predictor for rolled in self.roll_outs]}

    def is_fitted(self) -> bool:
        return False  # there is no closed form for roll-outs

    def roll_outs_of(self, number: int) -> list[RollOut]:
        return [rolled.of(number) for rolled in self.roll_outs]

    def loss_of(self, batch: Batch, guided: bool) -> torch.Tensor:
        every_step = self.config.history == "steps"
        computed = sorted(self.computed_in(batch.sigmas.tolist()))
        plan = Plan(computed, len(batch.sigmas), self.config.max_history, every_step, self.device)
        steps = torch.tensor(computed, device=self.device)
        if every_step:
            loss_of = head_aware_loss if self.settings.head_aware else feature_loss
            forecasts = [
                roll_out(self.predictor, batch, plan, each.features, steps, detach=True) for each in batch.roll_outs
            ]
            return torch.stack([loss_of(batch, plan, forecast) for forecast in forecasts]).mean()
        loss = super().loss_of(batch, guided)
        for each in batch.roll_outs:
            loss = loss + roll_out_loss(self.predictor, batch, plan, steps, each)
        return loss
