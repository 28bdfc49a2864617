"""`evaluate`: predictors, other caches and plain runs of fewer steps, on the same inputs and seeds."""

import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from tqdm import tqdm

from lesa.artifacts import digest, fingerprint
from lesa.cache import enable_cache
from lesa.cache.error_control import ErrorControl
from lesa.cache.placement import check_uncached
from lesa.conditions import conditions_of
from lesa.contenders import AGAINST, Opponent, Ours, Peer, Plain, Reference, budget_of, opponents, ours_with
from lesa.evaluation.contest import Contest
from lesa.evaluation.earlier import Earlier, earlier_in, is_replaced, merged, merged_facts
from lesa.evaluation.forecaster_search import ForecasterSearch, SearchRecording
from lesa.evaluation.result import Evaluation
from lesa.evaluation.search import NotAvailableError, PeerSearch
from lesa.evaluation.shown import MP4
from lesa.evaluation.store import Store, facts_of
from lesa.inputs import check_inputs, steps_of
from lesa.messages import is_message
from lesa.models import adapter_for
from lesa.pipelines import check_decodes, quiet_progress
from lesa.processes import processes_for
from lesa.schedule import ScheduleLike, Spread, as_schedule
from lesa.videos import why_no_mp4
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error, check_int, usage_error

Contestant = FusedKANPredictor | tuple[FusedKANPredictor, ScheduleLike | Spread | ErrorControl | None]
"""A predictor, alone or with a schedule."""


def evaluate(
    pipe: DiffusionPipeline,
    inputs: Sequence[str | dict],
    predictors: Mapping[str, Contestant] | Sequence[Contestant],
    against: Sequence[str | Peer | Plain] = AGAINST,
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
    search_samples: int = 4,
) -> Evaluation:
    """Compares predictors with the full run, with fewer steps, and with other caches.

    Every contender runs in the pipeline itself, with the same inputs. Input i starts from noise of seed `seed + i`.

    For each other cache, the best setting of a grid is searched; and so are the options and the schedule of each
    forecaster that needs no training. `facts["searched"]` describes the grid. For a forecaster, schedules that
    `lesa.find_schedule` finds on a recording of the same inputs are in it. The search uses the first few inputs. Then,
    for each budget, the setting within the budget that has the best PSNR is run on all inputs. An adaptive setting can
    need more than the budget on all inputs. Then the next best setting is run. Caches
    that run a block in every step have two kinds of budget: step equivalents and whole steps. An adaptive cache decides
    once for all samples of a pipeline call; with `batch_size=1` it decides for each sample separately.

    Where several processes were started together, as by `torchrun`, all must call this with the same arguments. They
    share the calls of the pipeline, and each of them returns the whole evaluation.

    Args:
        pipe: a diffusers pipeline of a supported family.
        inputs: prompts, or dicts of pipeline arguments.
        predictors: on the pipeline's device; by folder or another name, or in a list. Give a predictor alone, to
            compute the steps that it was trained for, or in a tuple with what `lesa.enable_cache` takes as `schedule`,
            such as a `lesa.ErrorControl`. A run's field `predictor` has the name. Where runs have the same mixer and
            number of computed steps, "@" and the last part of it follow, as in "newton-9@mine". A predictor in a list
            is known by the first digits of its digest.
        against: names from `lesa.contenders.against_names()`: "steps" for plain runs of as many steps as the predictors
            compute, and the names of caches and of forecasters that need no training, such as "mag-cache" or "linear",
            for each of these at the predictors' budgets. "steps-N" or "linear-N" sets a budget of N, which is needed
            if there are no predictors. Or a setting of another cache from `lesa.contenders`, which is run without a
            search. Predictors that must be trained are given in `predictors`.
        num_inference_steps: number of steps of the reference run.
        seed: seed of the first input.
        batch_size: inputs per pipeline call. None: all in one. Inputs that cannot share a call, such as images of two
            sizes, get separate calls.
        out_dir: gets `summary.json`, `runs.csv`, `images/` and `comparison.png`; of videos `comparison.gif` too, and
            `comparison.mp4` where imageio-ffmpeg is installed; and `runs/` with the finished runs. The same call
            continues from there after an interruption. Another call adds its runs to those of earlier ones, if inputs,
            model and settings are the same; a run of the same predictor or setting is replaced. The reference is timed
            again in each call that runs something. None: nothing is written.
        progress: whether to show a progress bar.
        search_samples: how many inputs the search uses.

    Raises:
        TypeError, ValueError: an argument is not as above, a predictor does not fit the pipeline, or `out_dir` has an
            evaluation that this one cannot be added to; the message names what differs.
        ImportError: a contender is not installed.
        RuntimeError: a cache is on already; another process evaluates into `out_dir`; the transformer's blocks can't be
            counted, as in a compiled graph; or the reference gives other samples than the one that is kept in
            `out_dir`.
    """
    adapter = adapter_for(pipe)
    check_uncached(pipe)
    check_decodes(pipe)
    check_int("num_inference_steps", num_inference_steps)
    inputs = check_inputs(inputs)
    _check_arguments(pipe, inputs)
    check_own_steps(inputs, num_inference_steps)
    size = len(inputs) if batch_size is None else check_int("batch_size", batch_size)
    settings, named = _opponents(against, num_inference_steps)
    check_int("search_samples", search_samples)
    contestants = _contestants(predictors, num_inference_steps)
    without_budget = next((kind.name for kind, budgets in named.items() if None in budgets), None)
    if not contestants and without_budget is not None:
        sentence = f"`against` has '{without_budget}' without a budget, and `predictors` is empty, so it has none."
        raise usage_error(sentence, f"Write '{without_budget}-{min(9, num_inference_steps)}', or pass a predictor.")
    _check_fits(pipe, contestants.values(), settings)
    seed = check_int("seed", seed, minimum=0)
    store = Store(out_dir, pipe, adapter, inputs, seed, size, num_inference_steps)
    kinds = {contender.name for contender in (*contestants.values(), *settings, *named)}
    processes = processes_for(pipe)
    opponents_said = [str(opponent) for opponent in against]
    identities = {label: ours.identity() for label, ours in contestants.items()}
    given = {"inputs": inputs, "predictors": identities, "against": opponents_said, "seed": seed, "batch_size": size}
    given |= {"num_inference_steps": num_inference_steps, "search_samples": search_samples, "out_dir": out_dir is None}
    if processes.count > 1:  # the fingerprints read all weights
        same = {name: value for name, value in conditions_of(pipe).items() if name != "unset"}
        given |= {"transformer": fingerprint(adapter.transformer), **same}
    processes.begin("lesa.evaluate", given)
    progress = progress and processes.is_first
    with store.owned(processes):
        earlier = processes.by_first(lambda: earlier_in(out_dir, store, contestants, kinds))
        processes.by_first(store.open)
        with (
            quiet_progress(pipe),
            tqdm(desc="evaluate", unit="run", disable=not progress, total=1 + len(contestants)) as bar,
        ):
            if progress:
                _tell(earlier, contestants, out_dir)
            contest = Contest(pipe, adapter, inputs, seed, size, num_inference_steps, store, bar, processes)
            searched, not_available = _run_all(contest, contestants, settings, named, search_samples)
        facts = {
            **facts_of(pipe, inputs, seed, size),
            "num_inference_steps": num_inference_steps,
            "sigmas": contest.sigmas,
            "stage_bounds": next((list(ours.predictor.config.stage_bounds) for ours in contestants.values()), []),
            "not_available": {**contest.not_available, **not_available},
            "searched": searched,
        }
        return processes.by_first(lambda: _finished(earlier, contest, facts, out_dir))


def _check_fits(
    pipe: Any,
    contestants: Iterable[Ours],
    settings: Iterable[Peer | Plain],
) -> None:
    """Raises `TypeError` or `ValueError` if a predictor or a setting does not fit the pipeline."""
    for ours in contestants:
        enable_cache(pipe, ours.predictor, ours.schedule).disable()
    for peer in (type(setting) for setting in settings if isinstance(setting, Peer)):
        if (why := peer.why_not_on(pipe)) is not None:
            must, got = "hold settings for this pipeline", Said(f"{peer.title}: {why}")
            raise argument_error("against", must, got, "Leave it out.")


def _finished(
    earlier: Earlier, contest: Contest, facts: dict[str, Any], out_dir: str | os.PathLike | None
) -> Evaluation:
    """The runs and facts of this evaluation, with what is kept of the earlier one. They are written to the folder."""
    every = merged(earlier, contest.entries)
    names = {id(entry.run): run.name for entry, run in zip(contest.entries, every.runs)}
    for row in (row for search in facts["searched"].values() for row in search["budgets"]):
        row["run"] = None if row["run"] is None else names[id(row["run"])]
    facts = merged_facts(earlier.facts, facts, every.renamed)
    images = {name: shown.images for name, shown in every.shown.items()}
    clips = {name: shown.clips for name, shown in every.shown.items() if shown.clips is not None}
    facts["not_available"].pop(MP4, None)
    if clips and (why := why_no_mp4()) is not None:
        facts["not_available"][MP4] = why
    evaluation = Evaluation(tuple(every.runs), images, facts, every.notes, clips)
    if out_dir is not None:
        evaluation.save(out_dir)
    return evaluation


def _tell(earlier: Earlier, contestants: Mapping[str, Ours], out_dir: Any) -> None:
    """Shows what is in the folder already."""
    if not earlier.entries:
        return
    tqdm.write(f"{out_dir} has runs of earlier commands, which are kept: {', '.join(earlier.entries)}", file=sys.stderr)
    for name, entry in earlier.entries.items():
        ours = contestants.get(entry.run.predictor or "")
        if ours is not None and is_replaced(entry, digest(ours.identity())):
            where = entry.run.predictor
            tqdm.write(
                f"{where} has another predictor or another schedule than before: {name} is replaced", file=sys.stderr
            )


def _check_arguments(pipe: DiffusionPipeline, inputs: Sequence[dict]) -> None:
    """Raises `ValueError` if an input has an argument that the pipeline does not know."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for number, item in enumerate(inputs):
        for name in item:
            if name not in parameters:
                must = f"have arguments of {type(pipe).__name__} only"
                raise argument_error(f"inputs[{number}]", must, Said(repr(name)), "Remove it.")


def check_own_steps(inputs: Sequence[dict], num_inference_steps: int, names: Sequence[str] | None = None) -> None:
    """Raises `ValueError` if an input sets another number of steps than the reference has.

    Args:
        inputs: dicts of pipeline arguments.
        num_inference_steps: of the reference.
        names: what the errors call each input. Default: "inputs[0]" and so on.
    """
    for number, item in enumerate(inputs):
        if (steps := steps_of(item, num_inference_steps)) != num_inference_steps:
            name = f"inputs[{number}]" if names is None else names[number]
            must = f"have as many noise levels as `num_inference_steps`, {num_inference_steps}"
            raise argument_error(name, must, Said(str(steps)), f"Pass {steps} as `num_inference_steps`.")


def _run_all(
    contest: Contest,
    contestants: Mapping[str, Ours],
    settings: Sequence[Peer | Plain],
    named: Mapping[Opponent, set[int | None]],
    search_samples: int,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs the reference, the predictors, and everything that they are compared with.

    Returns:
        By contender, what was searched; and why a contender is not available.
    """
    contest.run(Reference())
    for label, ours in contestants.items():
        contest.run_ours(label, ours)
    counts = {round(run.step_equivalents) for run in contest.results[1:]}
    for setting in settings:
        _run_setting(contest, setting)
    with SearchRecording(contest, contest.inputs[:search_samples]) as recording:
        return _run_named(contest, named, counts, recording)


def _run_named(
    contest: Contest, named: Mapping[Opponent, set[int | None]], counts: set[int], recording: SearchRecording
) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs what `against` names, with the budgets there, or else with those in `counts`. See `_run_all`."""
    searched, not_available = {}, {}
    kinds = sorted((kind for kind in opponents() if kind in named), key=lambda kind: issubclass(kind, Plain))
    for kind in kinds:
        budgets = {budget for asked in named[kind] for budget in (counts if asked is None else {asked})}
        if issubclass(kind, Plain):
            plain = [kind.at(budget) for budget in sorted(budgets, reverse=True)]
            if any(_changes_steps(setting, contest) for setting in plain):
                not_available[kind.name] = "the inputs set the steps themselves"
                continue
            for setting in plain:
                contest.run(setting)
            continue
        try:
            if issubclass(kind, Ours):
                searched[kind.name] = ForecasterSearch(contest, recording, kind, budgets).run()
                continue
            if (why := kind.why_not_on(contest.pipe)) is not None:
                raise NotAvailableError(why)
            searched[kind.name] = PeerSearch(contest, recording.inputs, kind, budgets).run()
        except NotAvailableError as error:
            not_available[kind.name] = str(error)
    return searched, not_available


def _changes_steps(setting: Peer | Plain, contest: Contest) -> bool:
    """Whether the setting needs another number of steps, and the inputs do not allow that."""
    steps = setting.steps_of(contest.num_inference_steps)
    return any(steps_of(item, steps) != steps for item in contest.inputs)


def _run_setting(contest: Contest, setting: Peer | Plain) -> None:
    """Runs a setting. A failure of a cache's own code names the setting."""
    if _changes_steps(setting, contest):
        sentence = f"`against` has the setting {setting}, but the inputs set the steps themselves."
        raise usage_error(sentence, "Leave it out.")
    try:
        contest.run(setting)
    except Exception as error:
        if is_message(error):
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        sentence = f"`against` has the setting {setting}, which fails on this pipeline: {why}"
        raise usage_error(sentence, "Leave it out.", RuntimeError) from error


def _contestants(
    predictors: Mapping[str, Contestant] | Sequence[Contestant], num_inference_steps: int
) -> dict[str, Ours]:
    """The predictors with their schedules, by label. Of those without a label it is a part of their digest."""
    if not isinstance(predictors, (Mapping, list, tuple)):
        must = "be a dict of predictors by name, or a list of them"
        raise argument_error("predictors", must, predictors, "Put it in a list.", TypeError)
    if not isinstance(predictors, Mapping):
        unnamed = [_with_schedule(value, num_inference_steps) for value in predictors]
        return {digest(ours.identity())[:8]: ours for ours in unnamed}
    labels = [str(label) for label in predictors]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise argument_error(
            "predictors", "have different names", Said(f"{twice[0]!r} twice"), "Change one of the names."
        )
    return {str(label): _with_schedule(value, num_inference_steps) for label, value in predictors.items()}


def _with_schedule(contestant: Contestant, num_inference_steps: int) -> Ours:
    pair = contestant if isinstance(contestant, tuple) else (contestant, None)
    if len(pair) != 2 or not isinstance(pair[0], FusedKANPredictor):
        raise argument_error(
            "predictors",
            "have predictors, or pairs of a predictor and a schedule",
            contestant,
            "Pass predictors, or `(predictor, schedule)`. `FusedKANPredictor.from_pretrained` loads a folder.",
        )
    predictor, schedule = pair
    if schedule is None or isinstance(schedule, (ErrorControl, Spread)):
        return ours_with(predictor, schedule)
    return ours_with(predictor, as_schedule(schedule, num_inference_steps))


def _opponents(
    against: Sequence[str | Peer | Plain], num_inference_steps: int
) -> tuple[list[Peer | Plain], dict[Opponent, set[int | None]]]:
    """The settings, and the budgets of each kind of contender, None for those of the predictors."""
    if not isinstance(against, (list, tuple)):
        raise argument_error("against", "be a list of names and settings", against, "Put it in a list.", TypeError)
    settings: list[Peer | Plain] = []
    named: dict[Opponent, set[int | None]] = {}
    for opponent in against:
        if isinstance(opponent, (Peer, Plain)):
            settings.append(opponent)
            kind: Opponent = type(opponent)
            _check_number(str(opponent), opponent.steps_of(num_inference_steps), num_inference_steps)
        else:
            kind, budget = budget_within(opponent, num_inference_steps)
            named.setdefault(kind, set()).add(budget)
        if issubclass(kind, Peer):
            kind.check_available()
    return settings, named


def budget_within(name: object, num_inference_steps: int) -> tuple[Opponent, int | None]:
    """The contender and the budget that a name in `against` has.

    Args:
        name: such as "steps" or "taylorseer-9".
        num_inference_steps: of the reference.

    Raises:
        ValueError: there is no such contender, or its budget is more than the steps of the reference.
    """
    kind, budget = budget_of(name)
    if budget is not None:
        _check_number(repr(name), budget, num_inference_steps)
    return kind, budget


def _check_number(opponent: str, number: int, num_inference_steps: int) -> None:
    if not 1 <= number <= num_inference_steps:
        sentence = f"`against` has {opponent}, but the run has {num_inference_steps} steps (`num_inference_steps`)."
        raise usage_error(sentence, "Choose a number of at least 1 and at most that.")
