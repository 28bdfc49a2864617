"""`find_schedule_in_runs`: the search for a schedule by runs of the pipeline, as a function of its own."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lesa.artifacts import files_in, predictor_identity, read_json, remove_partial, write_text
from lesa.cache.placement import check_uncached
from lesa.fitting.amounts import END_TO_END
from lesa.fitting.comparing import LatentRuns
from lesa.fitting.folder import check_same, settings_of
from lesa.fitting.probing import probed
from lesa.fitting.schedule_family import Steps
from lesa.fitting.schedule_in_runs import SearchInRuns, schedule_at
from lesa.inputs import check_inputs
from lesa.processes import Processes, processes_for
from lesa.schedule import Schedule, ScheduleLike, as_schedule
from lesa.training.batches import check_is_predictor
from lesa.training.end_to_end_run import check_is_for
from lesa.training.gradient_checks import check_differentiable
from lesa.training.settings import check_seed
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error, check_int

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STATE, WORK, FOUND = "search.json", "work", "schedules.json"


def find_schedule_in_runs(
    predictor: FusedKANPredictor,
    pipe: "DiffusionPipeline",
    inputs: list[str] | list[dict],
    count: int,
    *,
    candidates: Iterable[ScheduleLike] = (),
    updates: int = END_TO_END.schedule_updates,
    moves: int = END_TO_END.moves,
    samples: int = END_TO_END.trial_samples,
    batch_size: int = END_TO_END.batch_size,
    samples_per_call: int | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Schedule:
    """Chooses which steps to compute, by runs of the pipeline with a predictor that was trained on many schedules.

    `find_schedule` looks at errors of forecasts on recorded runs. It does not see what a training through whole runs
    repairs. Here a predictor is trained through whole runs first, as by `train_end_to_end`, with another schedule in
    each step of the optimiser. So it favours none of them. Then the pipeline runs with it and with each schedule, and
    the mean PSNR of the latents against those of all steps decides.

    First a family of simple schedules is tried. Of n computed steps, gap j has the relative length `x^p (1 - x)^q` with
    `x = (j + 1/2) / n`, for each p in 0.3, 0.5, 0.7, 0.9, 1.2 and each q in 0, 0.2, 0.4, 0.6. Lengths are measured in
    noise levels, and also in the mean of steps and noise levels, as `Schedule.spread` does. This one is tried too, and
    so are the candidates. Then other schedules are tried, each of which is one of the four best ones so far with one or
    two steps moved. The best of all is returned. So it is at least as good as each of the family and of the candidates,
    on these samples and with this predictor.

    The predictor of the search is not returned. Train one for the schedule, with `train` or `train_end_to_end`.

    Where several processes were started together, as by `torchrun`, all must call this with the same arguments. They
    share the runs without gradients, and the first one trains.

    Args:
        predictor: where the training on many schedules begins: what `train` or `refine` made for this model. Its noise
            stages are kept, and so is the predictor itself.
        pipe: a diffusers pipeline of a supported family with one transformer.
        inputs: prompts, or dicts of pipeline arguments whose tensors have a leading dimension of 1. Sample i starts
            from noise of seed `seed + i`.
        count: how many steps are computed, at least 2 and fewer than a run has.
        candidates: schedules that are tried beside those of the family, such as one that `find_schedule` found. Each
            has `count` steps.
        updates: steps of the optimiser on many schedules.
        moves: how many schedules are tried beside the family and the candidates.
        samples: with how many of the inputs, the first ones, schedules are compared. At most all.
        batch_size: samples for each step of the optimiser.
        samples_per_call: how many samples share a call of the pipeline. Fewer need less memory. Default: `batch_size`.
        num_inference_steps: passed to the pipeline. Default: that of the predictor.
        seed: of sample 0, of the training and of the search.
        out_dir: folder for `schedules.json`, which has the PSNR with each schedule that was tried, and for the
            unfinished work. After an interruption, the same call continues there. None: nothing is kept.
        progress: whether to show progress bars.

    Returns:
        The schedule, with the noise levels of its steps.

    Raises:
        TypeError, ValueError: an argument is out of range, the predictor is for another model or number of steps,
            gradients can't pass through the pipeline, for example because it has two transformers, or `out_dir` holds
            something else than unfinished work of this call. The message names it.
        RuntimeError: a cache is on, another process works in `out_dir`, or there is NaN in all runs. See also
            `train_end_to_end`.
    """
    check_is_predictor(predictor)
    inputs, seed = check_inputs(inputs), check_seed(seed)
    check_uncached(pipe)
    check_differentiable(pipe, predictor)
    check_is_for(predictor, pipe)
    if num_inference_steps is None and (num_inference_steps := predictor.config.num_inference_steps) is None:
        raise argument_error("num_inference_steps", "be given for a predictor without it", None, "Pass it.")
    asked = check_int("num_inference_steps", num_inference_steps, minimum=3)
    given: dict[str, Any] = {"updates": updates, "samples": samples, "batch_size": batch_size}
    amounts = {name: check_int(name, value) for name, value in given.items()}
    amounts["samples_per_call"] = check_int(
        "samples_per_call", batch_size if samples_per_call is None else samples_per_call
    )
    amounts["moves"] = check_int("moves", moves, minimum=0)
    count, levels = check_int("count", count, minimum=2, maximum=asked - 1), probed(pipe, inputs, asked).sigmas
    if predictor.config.num_inference_steps not in (None, len(levels)):
        must, got = f"be for the {len(levels)} steps of the runs", predictor.config.num_inference_steps
        raise argument_error("predictor.config.num_inference_steps", must, got, "Train a predictor for them.")
    if count >= len(levels):
        must = f"be below the {len(levels)} steps that a run of these inputs executes"
        raise argument_error("count", must, count, "Compute fewer steps.")
    chosen = _checked(candidates, count, len(levels))
    processes = processes_for(pipe)
    settings = settings_of(
        pipe,
        inputs,
        predictor=predictor_identity(predictor),
        count=count,
        candidates=[[*steps] for steps in chosen],
        **amounts,
        num_inference_steps=asked,
        seed=seed,
    )
    processes.begin("lesa.find_schedule_in_runs", {**settings, "out_dir": out_dir is None})
    with _own_folder(out_dir, settings, processes) as folder:
        kept = processes.by_first(lambda: read_json(folder / FOUND))
        if kept is not None:  # an earlier call was interrupted while it removed what only the work needed
            return schedule_at(kept["schedule"], levels)
        size, work = amounts["samples_per_call"], folder / WORK
        runs = LatentRuns(pipe, inputs[: amounts["samples"]], seed, asked, size, work / "trial-runs", processes)
        search = SearchInRuns(pipe, inputs, asked, levels, count, chosen, runs, size, seed, work, processes)
        shown = progress and processes.is_first
        name = "train on many schedules" if progress else None
        learned = search.learned(
            predictor, amounts["updates"], amounts["batch_size"], work / "references", "latents", name
        )
        total = len(search.schedules) + amounts["moves"]
        with tqdm(desc="try schedules", total=total, unit="schedule", disable=not shown) as bar:
            found = search.best(learned, amounts["moves"], bar)
        psnr = {name: figure if math.isfinite(figure) else None for name, figure in search.tried().items()}
        text = json.dumps({"schedule": [*found.steps], "num_inference_steps": len(levels), "psnr": psnr})
        processes.by_first(lambda: write_text(folder / FOUND, text + "\n"))
    return found


def _checked(candidates: Any, count: int, total: int) -> list[Steps]:
    """The steps of all candidates; raises `TypeError` or `ValueError` unless each has `count` of a run."""
    if isinstance(candidates, (str, Schedule)) or not isinstance(candidates, Iterable):
        raise argument_error("candidates", "be a list of schedules", candidates, "Pass a list.", TypeError)
    must, chosen = f"have {count} computed steps of {total} each", []
    for candidate in candidates:
        try:
            schedule = as_schedule(candidate, total)
        except (TypeError, ValueError) as error:
            raise argument_error("candidates", must, candidate, "Pass each as a list of steps.", type(error)) from error
        is_for_others = schedule.num_inference_steps not in (None, total)
        if len(schedule) != count or schedule.steps[-1] >= total or is_for_others:
            raise argument_error("candidates", must, schedule, "Leave the others out.")
        chosen.append(schedule.steps)
    return chosen


@contextlib.contextmanager
def _own_folder(out_dir: str | os.PathLike | None, settings: Mapping[str, Any], processes: Processes) -> Iterator[Path]:
    """A folder in which no other call works meanwhile. What only the work needed is removed at the end."""
    with processes.working_folder(out_dir, "searching") as folder:
        processes.by_first(lambda: _begin(folder, settings))
        yield folder
        processes.by_first(lambda: _clean_up(folder))


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a search. Raises `ValueError` if the folder has files, and no search with the same."""
    file = folder / STATE
    remove_partial(file)
    kept = read_json(file)
    if isinstance(kept, dict):
        check_same(f"the unfinished search in {folder}", kept, settings)
    elif files_in(folder):
        must = "be empty or hold an unfinished search"
        raise argument_error("out_dir", must, Said(f"files in {folder}"), "Choose another folder.")
    else:
        write_text(file, json.dumps(settings) + "\n")


def _clean_up(folder: Path) -> None:
    """Removes what only the work needed."""
    if (folder / WORK).is_dir():
        shutil.rmtree(folder / WORK)
    (folder / STATE).unlink()  # last: with it and `FOUND`, the same call knows that nothing is left to do
