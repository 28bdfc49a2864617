"""`refine`: trains a predictor on what its own forecasts lead to, with the model in the loop.

In a run the sample drifts away from where all steps would have led it, and what is computed next is computed there. A
predictor that was trained on true histories knows nothing of this. Here it is rolled out through the pipeline, and
learns from the features that the model gave along the way to lead the sample back: DAgger (Ross et al., AISTATS 2011,
arXiv 1011.0686), where the expert is the run of all steps.
"""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lesa.artifacts import digest, fingerprint, predictor_identity, whole_file
from lesa.inputs import check_inputs
from lesa.models import adapter_for
from lesa.training.batches import Batch, Plan, predict
from lesa.training.losses import over_gaps, relative
from lesa.training.recording import record
from lesa.training.training_run import CHECKPOINT_NAME, Training
from lesa.training.trajectories import Trajectories, check_latents, check_plain
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error, check_float, check_int
from lesa_kernels.predictor.module import WEIGHTS_NAME

ROLL_OUTS, PREDICTOR, SETTINGS_NAME = "roll-outs", "predictor", "refinement.json"


VALIDATION_FRACTION = 0.1


VELOCITY_WEIGHT = 0.3
"""In the loss on a roll-out, beside the drift at 1. With a third of it, and no recorded runs, training diverged."""


def refine(
    predictor: FusedKANPredictor,
    trajectories: Trajectories | str | os.PathLike,
    pipe,
    inputs,
    *,
    out_dir: str | os.PathLike | None = None,
    rounds: int = 2,
    epochs: int = 20,
    batch_size: int = 8,
    tokens_per_batch: int | None = 32,
    learning_rate: float = 1e-3,
    samples_per_call: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FusedKANPredictor:
    """Trains a predictor further on roll-outs of its own.

    In each round the pipeline runs on the recorded inputs with the predictor on; the predictor is trained on that and
    on the roll-outs of the rounds before, together with the recorded trajectories. A round costs as many computed steps
    as the schedule has for each input.

    Args:
        predictor: a newton predictor that `train` made on these trajectories. It stays as it is.
        trajectories: what `lesa.record` made of plain runs, or its folder.
        pipe: the pipeline that was recorded.
        inputs: the inputs that were recorded.
        out_dir: folder for the predictor, `losses.json` and `losses.png`, and meanwhile for the roll-outs. What was
            stopped goes on there. None: a temporary folder has the roll-outs, and nothing stays.
        rounds: how often to roll out and train.
        epochs: passes over the trajectories in each round.
        batch_size, tokens_per_batch, learning_rate: as of `train`, in each round.
        samples_per_call: how many samples share a call of the pipeline.
        seed: of order and tokens.
        device: where to train; the pipeline runs where it is.
        progress: whether to show progress bars.

    Returns:
        The predictor of the last round, on the CPU.

    Raises:
        TypeError, ValueError: the predictor feeds on its own forecasts or was trained for something else, an argument
            is out of range, or the pipeline, the inputs or `out_dir` are not those of the recording; named.
        RuntimeError: what `lesa.record` raises.

    Source: DAgger, arXiv 1011.0686. The drift that it minimises is what remains of that before a gap, and what the
    velocities of the gap add to it in Euler steps, as flow-matching schedulers take them.
    """
    if not isinstance(trajectories, Trajectories):
        trajectories = Trajectories(trajectories)
    config = predictor.config
    if config.history != "anchors":
        remedy = "Use a newton predictor. A dense one sees its own forecasts in `train` already."
        raise argument_error("predictor", "forecast from computed steps only", config.history, remedy)
    for field in ("feature_dim", "family", "num_inference_steps"):
        wanted = getattr(trajectories, field)
        if getattr(config, field) != wanted:
            remedy = "Train it on these trajectories first."
            raise argument_error(f"predictor.config.{field}", f"be {wanted!r}", getattr(config, field), remedy)
    check_plain(trajectories)
    check_latents(trajectories[0])
    inputs = check_inputs(inputs)
    transformer = adapter_for(pipe).transformer
    for name, key, value in (
        ("inputs", "inputs_digest", digest(inputs)),
        ("pipe.transformer", "transformer", fingerprint(transformer)),
    ):
        if value != trajectories.manifest.get(key):
            remedy = "Pass what was recorded, or record again."
            raise argument_error(name, "be what the trajectories were recorded with", Said("something else"), remedy)
    settings = {
        "predictor": predictor_identity(predictor),
        "trajectories": trajectories.manifest,
        "rounds": check_int("rounds", rounds),
        "epochs": check_int("epochs", epochs),
        "batch_size": check_int("batch_size", batch_size),
        "tokens_per_batch": None if tokens_per_batch is None else check_int("tokens_per_batch", tokens_per_batch),
        "learning_rate": check_float("learning_rate", learning_rate, minimum=1e-8),
        "seed": check_int("seed", seed, minimum=0),
    }
    check_int("samples_per_call", samples_per_call)
    roll_outs: list[_RollOuts] = []
    with _working_folder(out_dir, settings) as folder:
        for number in range(1, rounds + 1):
            rolled, trained = folder / f"round-{number}" / ROLL_OUTS, folder / f"round-{number}" / PREDICTOR
            roll_outs.append(_RollOuts(trajectories, predictor, pipe, inputs, rolled, samples_per_call, progress))
            if (trained / WEIGHTS_NAME).exists() and not (trained / CHECKPOINT_NAME).exists():
                predictor = FusedKANPredictor.from_pretrained(trained)
                continue
            run = _Refinement(predictor, trajectories, roll_outs, trained, device, seed)
            run.fit(
                guided_epochs=0,
                epochs=epochs,
                batch_size=batch_size,
                tokens=tokens_per_batch,
                learning_rate=learning_rate,
                head_aware=True,
                validation_fraction=VALIDATION_FRACTION,
                progress=progress,
                finds_typical_errors=True,
            )
            predictor = run.predictor.cpu().eval()
        if out_dir is not None:
            for file in trained.iterdir():
                shutil.copy(file, folder)
    return predictor


@contextlib.contextmanager
def _working_folder(out_dir, settings: dict) -> Iterator[Path]:
    """A folder for the rounds. What belongs to them is removed when they are all over; until then it can be resumed."""
    if out_dir is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS_NAME
    if file.exists():
        for name, value in json.loads(file.read_text()).items():
            if settings[name] != value:
                raise argument_error(
                    name,
                    f"be what the unfinished refinement in {folder} has, {value!r}",
                    settings[name],
                    "Go on with the same arguments, or choose another `out_dir`.",
                )
    elif any(folder.iterdir()):
        raise argument_error(
            "out_dir", "be empty or hold an unfinished refinement", Said(f"files in {folder}"), "Choose another."
        )
    else:
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(settings) + "\n")
    yield folder
    file.unlink()  # first: rounds that are left behind do no harm
    for number in range(settings["rounds"]):
        shutil.rmtree(folder / f"round-{number + 1}")


class _RollOuts:
    """Roll-outs of a predictor, beside the plain runs of the same samples.

    Args:
        trajectories: the plain runs.
        predictor: whose roll-outs.
        pipe, inputs, samples_per_call, progress: as of `refine`.
        folder: of their recording.

    Attributes:
        recorded: the recording, of computed steps only.
        drifts: of each, `[C, T, O]`: by how much the latents are off before each computed step, in the direction of the
            velocity. Where guidance combines several streams of calls, they share it.
    """

    def __init__(self, trajectories, predictor, pipe, inputs, folder, samples_per_call, progress):
        manifest = trajectories.manifest
        self.recorded = record(
            pipe,
            inputs,
            folder,
            num_inference_steps=manifest["requested_num_inference_steps"],
            tokens_per_sample=manifest["tokens_per_sample"],
            seed=manifest["seed"],
            batch_size=samples_per_call,
            progress=progress,
            predictor=copy.deepcopy(predictor).to(pipe._execution_device),
        )
        if self.recorded.names != trajectories.names:
            got = Said(f"{len(self.recorded)} streams of calls in the place of {len(trajectories)}")
            raise argument_error("pipe", "call its transformer as when it was recorded", got, "Record again.")
        self.drifts = []
        for plain, rolled in zip(trajectories, self.recorded):
            computed = torch.isin(plain.sigmas, rolled.sigmas)
            self.drifts.append(plain.latents[computed].float() - rolled.latents.float())  # sigma falls

    def of(self, number: int) -> list[torch.Tensor]:
        """Features and drift of one of them."""
        return [self.recorded[number].features, self.drifts[number]]


class _Refinement(Training):
    """One round of training, on trajectories and roll-outs."""

    def __init__(self, predictor, trajectories, roll_outs: list[_RollOuts], out_dir, device, seed):
        super().__init__(trajectories, predictor.config, out_dir, device, seed)
        self.predictor.load_state_dict(predictor.state_dict())
        self.roll_outs = roll_outs
        self.origin = {"roll_outs": [r.recorded.manifest["predictor"] for r in roll_outs]}

    def roll_outs_of(self, number):
        return [tensor for roll_outs in self.roll_outs for tensor in roll_outs.of(number)]

    def _loss(self, batch, guided):
        loss = super()._loss(batch, guided)
        computed = sorted(self.schedule.computed_in(batch.sigmas.tolist()))
        plan = Plan(computed, len(batch.sigmas), self.config.max_history, device=self.device)
        steps = torch.tensor(computed, device=self.device)
        for features, drift in zip(batch.roll_outs[::2], batch.roll_outs[1::2]):
            loss = loss + _roll_out_loss(self.predictor, batch, plan, steps, features, drift)
        return loss


def _roll_out_loss(predictor, batch: Batch, plan: Plan, steps, features, drift) -> torch.Tensor:
    """How far off the latents are at the end of each gap, and the errors of the velocities; both relative.

    Args:
        predictor, batch, plan: what forecasts what.
        steps: the computed steps, C of them.
        features: `[C, N, D]`, what was computed along the roll-out.
        drift: `[C, N, O]`, how far off the latents were before each of them.
    """
    off, error = _off_after_gaps(predictor, batch, plan, steps, features, drift)
    truth = batch.velocities[plan.steps]
    return relative(off, over_gaps(batch, plan, truth)) + VELOCITY_WEIGHT * relative(error, truth)


def _off_after_gaps(predictor, batch: Batch, plan: Plan, steps, features, drift) -> tuple[torch.Tensor, torch.Tensor]:
    """How far off the latents are at the end of each gap `[G, N, O]`, and each predicted velocity `[P, N, O]`."""
    error = batch.velocity(predict(predictor, batch, plan, features, steps), plan.steps) - batch.velocities[plan.steps]
    computed = (batch.velocity(features, steps) - batch.velocities[steps]) * batch.widths[steps, None, None]
    gaps = over_gaps(batch, plan, error)
    return (drift + computed)[: len(gaps)] + gaps, error
