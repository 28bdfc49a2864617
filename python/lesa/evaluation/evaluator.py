"""`evaluate`: predictors, other caches and plain runs of fewer steps, on the same inputs and seeds."""

import os
import re
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from lesa.cache import enable_cache
from lesa.cache.error_control import ErrorControl
from lesa.cache.hook import check_uncached
from lesa.contenders import PEERS, Setting
from lesa.contenders.cache_dit import check_cache_dit
from lesa.contenders.taylorseer import TaylorSeer, taylorseer_grid
from lesa.evaluation.contest import Contest
from lesa.evaluation.result import REFERENCE, EvaluatedRun, Evaluation
from lesa.evaluation.search import NotAvailableError, SettingSearch
from lesa.evaluation.store import Store, facts_of
from lesa.inputs import check_inputs
from lesa.models import adapter_for
from lesa.pipelines import quiet_progress
from lesa.schedule import ScheduleLike, as_schedule
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import argument_error, check_int

__all__ = ["EvaluatedRun", "Evaluation", "TaylorSeer", "evaluate", "taylorseer_grid"]


Contestant = FusedKANPredictor | tuple[FusedKANPredictor, ScheduleLike | ErrorControl | None]


def evaluate(
    pipe,
    inputs: Sequence[str | dict],
    predictors: Mapping[str, Contestant] | Sequence[Contestant],
    against: Sequence[str | Setting] = ("steps", "taylorseer"),
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
    search_samples: int = 4,
) -> Evaluation:
    """Compares predictors with the full run, with fewer steps, and with other caches.

    Every contender goes through the pipeline itself with the same inputs. Input i starts from noise of seed `seed + i`.

    Each peer is given its best setting over a grid, which `facts["searched"]` states. The grid is searched with the
    first few inputs; then, for each budget, the setting with the best PSNR among those at or below it is run on all. A
    setting that goes above its budget there, as adaptive ones may, gives way to the next one. Caches that run a block
    in every step have budgets of step equivalents and of whole steps. Adaptive caches decide once for all samples of a
    call of the pipeline: with `batch_size=1`, for each by itself.

    Args:
        pipe: a diffusers pipeline of a supported family.
        inputs: prompts, or dicts of pipeline arguments.
        predictors: on the pipeline's device; by name, or in order. Each by itself, to compute what it was trained for,
            or in a tuple with what `lesa.enable_cache` takes as `schedule`, such as a `lesa.ErrorControl`. The names
            tell runs apart that have the same mixer and number of computed steps.
        against: "steps" for plain runs of as many steps as the predictors compute, and "taylorseer",
            "first-block-cache", "mag-cache" and "cache-dit" for these caches at these budgets; "steps-N", "mag-cache-N"
            and so on for a budget of N; or a setting from `lesa.contenders`, such as `TaylorSeer`, which is run as it
            is.
        num_inference_steps: steps of the reference.
        seed: of the first input.
        batch_size: inputs per pipeline call. None: all in one. Inputs that can't share a call, such as two sizes of
            images, never do.
        out_dir: where `summary.json`, `runs.csv`, `images/` and `comparison.png` are written; and `runs/`, what is
            finished, from which the same call goes on after an interruption. None: nowhere.
        progress: whether to show a progress bar.
        search_samples: inputs for the search.

    Raises:
        TypeError, ValueError: an argument is not as above, or a predictor does not fit the pipeline.
        ImportError: a contender is not installed.
        RuntimeError: a cache is on already, or the transformer's blocks can't be counted, as in a compiled graph.
    """
    adapter = adapter_for(pipe)
    check_uncached(pipe.transformer)
    check_int("num_inference_steps", num_inference_steps)
    inputs = check_inputs(inputs)
    size = len(inputs) if batch_size is None else check_int("batch_size", batch_size)
    for contender in against:
        _check_contender(contender)
    check_int("search_samples", search_samples)
    if not isinstance(predictors, Mapping):
        predictors = {str(number): predictor for number, predictor in enumerate(predictors, start=1)}

    contestants = {label: _with_schedule(value, num_inference_steps) for label, value in predictors.items()}
    for predictor, schedule in contestants.values():
        enable_cache(pipe, predictor, schedule).disable()  # one that does not fit is refused before anything runs

    with (
        quiet_progress(pipe),
        tqdm(desc="evaluate", unit="run", disable=not progress, total=1 + len(contestants)) as bar,
    ):
        seed = check_int("seed", seed, minimum=0)
        store = Store(out_dir, pipe, adapter, inputs, seed, size, num_inference_steps)
        contest = Contest(pipe, adapter, inputs, seed, size, num_inference_steps, store, bar)
        contest.run(REFERENCE, REFERENCE, "all steps")
        for label, contestant in contestants.items():
            contest.run_ours(label, *contestant)
        counts = {round(run.step_equivalents) for run in contest.results[1:]}
        budgets, settings = _opponents(against, counts)
        bar.total += len(budgets.get("steps", ()))
        for setting in settings:
            contest.run_setting(setting)
        searched, not_available = {}, {}
        for peer in (kind for kind in PEERS if kind in budgets):
            search = SettingSearch(contest, inputs[:search_samples], peer, budgets[peer])
            try:
                searched[peer] = search.run()
            except NotAvailableError as error:
                not_available[peer] = str(error)
        for count in sorted(budgets.get("steps", ()), reverse=True):
            contest.run("fewer-steps-{whole}", "steps", f"{count} steps of the scheduler", steps=count)

    bounds = next((list(p.config.stage_bounds) for p, _ in contestants.values()), [])
    facts = {
        **facts_of(pipe, inputs, seed, size),
        "num_inference_steps": num_inference_steps,
        "sigmas": contest.sigmas,
        "stage_bounds": bounds,
        "not_available": {**contest.not_available, **not_available},
        "searched": searched,
    }
    evaluation = Evaluation(tuple(contest.results), contest.pictured, facts)
    if out_dir is not None:
        evaluation.save(out_dir)
    return evaluation


def _with_schedule(contestant: Contestant, num_inference_steps: int):
    """The predictor and its schedule, None for the trained one."""
    if not isinstance(contestant, tuple):
        return contestant, None
    if len(contestant) != 2:
        remedy = "Pass `(predictor, schedule)`."
        raise argument_error("predictors", "hold predictors, or pairs of one and a schedule", contestant, remedy)
    predictor, schedule = contestant
    if schedule is None or isinstance(schedule, ErrorControl):
        return predictor, schedule
    return predictor, as_schedule(schedule, num_inference_steps)


def _check_contender(contender) -> None:
    if isinstance(contender, Setting):
        kind = contender.contender
    else:
        match = re.fullmatch(f"(steps|{'|'.join(PEERS)})(-[1-9][0-9]*)?", str(contender))
        if match is None:
            names = ", ".join(map(repr, ("steps", *PEERS)))
            raise argument_error(
                "against",
                f"hold {names}, these with a budget such as 'steps-9', or settings from lesa.contenders",
                contender,
                "Choose among these, with a budget of at least 1.",
            )
        kind = match[1]
    if kind == "cache-dit":
        check_cache_dit()


def _opponents(against, counts: set[int]) -> tuple[dict[str, set[int]], list[Setting]]:
    """The budgets of each kind of contender, and the settings, that `against` asks for."""
    budgets: dict[str, set[int]] = {}
    settings = []
    for contender in against:
        if isinstance(contender, Setting):
            settings.append(contender)
            continue
        kind, count = re.fullmatch("(.*?)(?:-([0-9]+))?", contender).groups()
        budgets.setdefault(kind, set()).update({int(count)} if count else counts)
    return budgets, list(dict.fromkeys(settings))
