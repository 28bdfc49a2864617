"""Searches the best settings of a forecaster that needs no training: its options, and which steps are computed."""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from lesa.cache import enable_cache
from lesa.contenders import Ours
from lesa.contenders.schedules import SCHEDULES, schedules_within
from lesa.evaluation.contest import Contest
from lesa.evaluation.result import sortable
from lesa.evaluation.search import NotAvailableError, SettingSearch
from lesa.models import features_device
from lesa.schedule import Schedule, Spread
from lesa.training.recording import record
from lesa.training.schedule_search import TOKENS_PER_SAMPLE, find_schedule
from lesa.training.trajectories import Trajectories
from lesa_kernels import FusedKANPredictor

SEARCHED = ".searched"
"""The folder of the recording in `runs/`, where several processes make it."""

FOUND_FOR = 2
"""For how many of the options a schedule is searched for a budget: for those that are best with the other schedules."""


class SearchRecording:
    """A recording of the inputs of the search, in a temporary folder. It is made where it is needed first.

    Args:
        contest: has the pipeline.
        inputs: of the search.
    """

    def __init__(self, contest: Contest, inputs: list[dict]):
        self.contest, self.inputs = contest, inputs
        self._folder: Path | None = None
        self._trajectories: Trajectories | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "SearchRecording":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None and self.contest.processes.is_first:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def trajectories(self) -> Trajectories:
        """What is recorded, with as many tokens as the search for a schedule uses; a failure is raised each time."""
        if self._error is not None:
            raise self._error
        if self._trajectories is None:
            contest = self.contest
            settings = (contest.num_inference_steps, TOKENS_PER_SAMPLE, contest.seed, contest.size)
            try:
                self._folder = contest.processes.by_first(self._new_folder)
                self._trajectories = record(contest.pipe, self.inputs, self._folder, *settings, progress=False)
            except Exception as error:
                self._error = error
                raise
        return self._trajectories

    def _new_folder(self) -> Path:
        """An empty folder. Several processes need one that all of them see."""
        shared = self.contest.store.folder
        if self.contest.processes.count == 1 or shared is None:
            return Path(mkdtemp(prefix="lesa-"))
        folder = shared / SEARCHED
        shutil.rmtree(folder, ignore_errors=True)  # of a command that was killed
        folder.mkdir()
        return folder


class ForecasterSearch(SettingSearch):
    """The search for a forecaster that needs no training.

    Args:
        contest, kind, budgets: as of `SettingSearch`.
        recording: of the inputs of the search.
    """

    kind: type[Ours]

    def __init__(self, contest: Contest, recording: SearchRecording, kind: type[Ours], budgets: Iterable[int]):
        super().__init__(contest, recording.inputs, kind, budgets)
        self._recording = recording

    def _try_all(self) -> str:
        predictors = self._attempt(self._variants)
        total = self.contest.executed_steps
        why: dict[str, list[int]] = {}  # by the reason, the budgets for which no schedule is found
        for budget in self.budgets:
            schedules = schedules_within(budget, total)
            best = [max(self._psnr(predictor, schedule) for schedule in schedules) for predictor in predictors]
            ranked = sorted(range(len(predictors)), key=lambda number: -best[number])
            for number in ranked[:FOUND_FOR] if 2 <= budget < total else ():
                if best[number] == -math.inf:
                    continue
                try:
                    self._psnr(predictors[number], self._found(predictors[number], budget))
                except NotAvailableError as error:
                    why.setdefault(str(error), []).append(budget)
        return _grid_text(predictors, why)

    def _variants(self) -> list[FusedKANPredictor]:
        """The predictors with the options to try. Each of them can be switched on."""
        pipe = self.contest.pipe
        device = features_device(pipe, self.contest.adapter)
        made = [predictor.to(device) for predictor in self.kind.variants(self.contest.adapter.feature_dim)]
        for predictor in made:
            enable_cache(pipe, predictor, Spread()).disable()
            self.kind(predictor, Spread()).identity()
        return made

    def _psnr(self, predictor: FusedKANPredictor, schedule: Schedule | Spread) -> float:
        """With this schedule; minus infinity if the setting fails."""
        return sortable(self._figures_of(self.kind(predictor, schedule))["psnr"])

    def _found(self, predictor: FusedKANPredictor, budget: int) -> Schedule:
        """The schedule that `find_schedule` finds."""

        def find() -> dict[str, list]:
            trajectories = self._recording.trajectories
            search = partial(find_schedule, trajectories, budget, predictor.config, progress=False)
            found = self.contest.processes.by_first(search)
            return {"steps": [*found.steps], "sigmas": [*(found.sigmas or ())]}

        words = f"{self.kind.detail(predictor.config)}, which {budget} steps to compute"
        found = self._once(f"{budget} steps for {predictor.config!r}", find, words)
        return Schedule(tuple(found["steps"]), self.contest.executed_steps, tuple(found["sigmas"]))


def _grid_text(predictors: Sequence[FusedKANPredictor], why: Mapping[str, Sequence[int]]) -> str:
    """What is tried, in words.

    Args:
        predictors: one for each of the options.
        why: by the reason, the budgets for which no schedule is found.
    """
    options = [", ".join(f"{n} {v:g}" for n, v in (p.config.options or {}).items()) for p in predictors]
    of_best = f" for the {FOUND_FOR} best options" if len(predictors) > FOUND_FOR else ""
    parts = [" or ".join(options)] if any(options) else []
    parts += [f"steps {SCHEDULES}", f"those that lesa.find_schedule finds{of_best} at each budget"]
    for reason, budgets in why.items():
        parts.append(f"it finds none for {', '.join(map(str, dict.fromkeys(budgets)))}: {reason}")
    return "; ".join(parts)
