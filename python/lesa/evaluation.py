"""`evaluate`: predictors, other caches and plain runs of fewer steps, on the same inputs and seeds."""

import csv
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import lesa_kernels
from lesa.cache import enable_cache
from lesa.comparison import draw_comparison
from lesa.contenders import (
    PEERS,
    Setting,
    TaylorSeer,
    bisected,
    calibrate_mag_cache,
    check_cache_dit,
    grid_of,
    taylorseer_grid,
)
from lesa.hook import check_uncached
from lesa.inputs import batches_of, check_inputs, collate, inputs_digest
from lesa.models import adapter_for
from lesa.pipelines import quiet_progress
from lesa.quality import LEARNED, bootstrap_interval, learned_qualities, psnr, relative_error, ssim
from lesa.recording import fingerprint
from lesa.schedule import ErrorControl, Schedule, ScheduleLike, as_schedule
from lesa_kernels import FusedKANPredictor
from lesa_kernels._checks import Said, argument_error, check_choice, check_int

__all__ = ["EvaluatedRun", "Evaluation", "TaylorSeer", "evaluate", "taylorseer_grid"]

Contestant = FusedKANPredictor | tuple[FusedKANPredictor, ScheduleLike | ErrorControl | None]

FORMAT_VERSION = 1
REFERENCE = "reference"
OURS = ("newton", "dense")
COUNTED = "attention of every block"
"""What decides whether a block ran."""
WARM_UP_STEPS = 12
"""Enough for a cache to predict some of them; runs of fewer than 10 steps are computed whole."""
_CALIBRATION_SAMPLES = 2
_TRAJECTORY_SAMPLES = 16
_ATTEMPTS = 4
_SCALARS = (
    "num_inference_steps", "whole_steps", "step_equivalents", "block_passes", "seconds", "denoise_seconds", "speedup",
    "peak_memory_bytes", "psnr", "ssim", "latent_error", "latent_psnr", *LEARNED,
)  # fmt: skip


@dataclass(frozen=True)
class EvaluatedRun:
    """One contender's figures. Qualities are means over samples, against the reference run.

    A block counts as run in a call of the transformer if its attention was computed, seen by a hook inside it. For all
    contenders but one, that is when anything of the block runs. TaylorSeer's full mode forecasts attentions only: the
    rest of every block runs in every step, which `block_passes` counts too. A step has one call of the transformer, or
    as many as there are streams, such as two for true classifier-free guidance: figures are means over the streams, and
    over the calls of the pipeline.

    Args:
        name: "reference", "newton-N", "dense-N", "fewer-steps-N", with N the whole steps, or of a peer's setting.
        steps: the steps of the first call of the pipeline in which every block ran.
        num_inference_steps: steps of the run.
        whole_steps: number of steps in which every block ran.
        step_equivalents: how often blocks ran, over the number of blocks.
        seconds: wall clock of the pipeline calls with decoding, after a warm-up.
        speedup: the reference's seconds over these.
        psnr: of the decoded images in [0, 1], in dB; infinite if any image equals the reference's, NaN if any is NaN.
        ssim: structural similarity of the decoded images.
        latent_psnr: of the latents for a peak of 2, in dB. The latents of the bundled digits are the pixels before they
            are clipped to [-1, 1].
        contender: kind of the run: "reference", "newton", "dense", "steps", or a peer's.
        setting: in words.
        block_passes: like `step_equivalents`, but a block whose attention alone was skipped counts as run.
        denoise_seconds: from the first call of the transformer on, without decoding.
        peak_memory_bytes: the most that was allocated on a CUDA device, or None. It includes the latents of every step,
            which are kept for `step_errors`, for every contender alike.
        latent_error: L2 norm of the final latents' difference over the norm of the reference's.
        lpips, clip_score, image_reward: None where their weights are not on the machine.
        per_sample: lists of "psnr", "ssim" and "latent_error".
        step_errors: like `latent_error`, after each step, over the first 16 samples; None where steps don't correspond.
    """

    name: str
    steps: tuple[int, ...]
    num_inference_steps: int
    whole_steps: float
    step_equivalents: float
    seconds: float
    speedup: float
    psnr: float
    ssim: float
    latent_psnr: float
    contender: str
    setting: str = ""
    block_passes: float = math.nan
    denoise_seconds: float = math.nan
    peak_memory_bytes: int | None = None
    latent_error: float = math.nan
    lpips: float | None = None
    clip_score: float | None = None
    image_reward: float | None = None
    per_sample: Mapping[str, Sequence[float]] = field(default_factory=dict)
    step_errors: Sequence[float | None] = ()

    @property
    def computed_steps(self) -> int:
        """Number of `steps`."""
        return len(self.steps)

    @property
    def is_ours(self) -> bool:
        """Whether a predictor of lesa made it."""
        return self.contender in OURS

    def to_dict(self) -> dict:
        """A dict for JSON, where a figure that is infinite or NaN is None."""
        return _finite({"name": self.name, "computed_steps": self.computed_steps, **asdict(self)})


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Args:
        runs: the contenders, the reference first.
        images: by run, the first few images of one size, `[n, height, width, 3]` in [0, 1]; of a video the middle one.
        facts: what was measured on, what was searched and what was not available; see `evaluate`.
    """

    runs: tuple[EvaluatedRun, ...]
    images: Mapping[str, np.ndarray]
    facts: Mapping

    def __getitem__(self, name: str) -> EvaluatedRun:
        return next(run for run in self.runs if run.name == name)

    def is_best(self, run: EvaluatedRun) -> bool:
        """Whether no other run of its contender has a better PSNR at its rounded step equivalents."""
        key = run.contender, round(run.step_equivalents)
        return run is max((r for r in self.runs if (r.contender, round(r.step_equivalents)) == key), key=_rank)

    @property
    def shown(self) -> list[EvaluatedRun]:
        """The runs for people: of each peer only the best at each rounded number of step equivalents."""
        return [run for run in self.runs if run.contender not in PEERS or self.is_best(run)]

    def against_ours(self, run: EvaluatedRun, by: str = "step_equivalents") -> dict | None:
        """How far ours is ahead of a run in PSNR.

        Args:
            run: any of `runs`.
            by: what ours may have no more of than `run`: "step_equivalents", or "whole_steps", rounded.

        Returns:
            `ours`, the name of the run of ours with the most of these (of several the best); `psnr_difference` in dB,
            the mean over samples of ours less the other; `low` and `high`, the ends of its 95 % bootstrap interval.
            None for our own runs, for the reference, and where we have no such run.
        """
        check_choice("by", by, ("step_equivalents", "whole_steps"))
        most = run.step_equivalents + 1e-6 if by == "step_equivalents" else round(run.whole_steps)
        ours = [r for r in self.runs if r.is_ours and getattr(r, by) <= most]
        if run.is_ours or run.contender == REFERENCE or not ours:
            return None
        nearest = max(ours, key=lambda r: (getattr(r, by), _rank(r)))
        pairs = np.array([nearest.per_sample.get("psnr", ()), run.per_sample.get("psnr", ())], dtype=np.float64)
        with np.errstate(invalid="ignore"):
            differences = pairs[0] - pairs[1]
        low, high = bootstrap_interval(differences)
        mean = float(differences.mean()) if len(differences) else math.nan
        return {"ours": nearest.name, "psnr_difference": mean, "low": low, "high": high}

    def table(self) -> str:
        """Steps, seconds, speed-up, PSNR, SSIM and our lead of the runs in `shown`, as aligned text."""
        rows = [("run", "whole steps", "step eq.", "seconds", "speed-up", "PSNR dB", "SSIM", "ours ahead by, dB")]
        for run in self.shown:
            quality = ("-", "-") if run.name == REFERENCE else (f"{run.psnr:.2f}", f"{run.ssim:.4f}")
            whole = f"{run.whole_steps:.4g} of {run.num_inference_steps}"
            equivalents = f"{run.step_equivalents:.2f}"
            lead = _finite(self.against_ours(run) or {})
            if lead.get("low") is not None:
                ahead = "{psnr_difference:.2f} ({low:.2f} to {high:.2f})".format(**lead)
            else:
                ahead = "-"
            speed = f"{run.seconds:.2f}", f"{run.speedup:.2f}x"
            rows.append((run.name, whole, equivalents, *speed, *quality, ahead))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines += self._notes()
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        notes = ["Step eq.: how often a block ran, over the number of blocks. Ours is at most at as many, and paired."]
        if any(run.name.startswith("taylorseer-full") for run in self.shown):
            notes.append("TaylorSeer's full mode computes the attentions in so many steps, and all else in every step.")
        for contender, search in self.facts.get("searched", {}).items():
            notes.append(
                f"{contender}: the best of {search['tried']} settings, searched with {search['samples']} samples."
            )
            notes += [f"{contender}: {row['why']}" for row in search["budgets"] if row["run"] is None and row["why"]]
        peers = {name: why for name, why in self.facts.get("not_available", {}).items() if name in PEERS}
        return notes + [f"{name} is not available: {why}" for name, why in peers.items()]

    def summary(self) -> dict:
        """All runs and what they were measured on, for JSON."""
        runs = [
            {
                **run.to_dict(),
                "is_best": self.is_best(run),
                "against_ours": _finite(self.against_ours(run)),
                "against_ours_by_whole_steps": _finite(self.against_ours(run, "whole_steps")),
            }
            for run in self.runs
        ]
        head = {"format_version": FORMAT_VERSION, "counted": COUNTED}
        return {**head, **_finite(dict(self.facts)), "runs": runs, "images": self._files()}

    def _files(self) -> dict[str, list[str]]:
        """By run, the files of its images. Names that a file can't have are numbered."""
        shown = [run.name for run in self.runs if run.contender == REFERENCE or run.is_ours or self.is_best(run)]
        return {
            name: [f"images/{_file_name(name)}/{number}.png" for number in range(len(self.images[name]))]
            for name in shown
            if name in self.images
        }

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Writes `summary.json`, `runs.csv`, `images/` and `comparison.png` into `folder`.

        Returns:
            The paths of `comparison.png` and `summary.json`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        picture, summary = folder / "comparison.png", folder / "summary.json"
        draw_comparison(self.shown, self.images, picture)
        contents = self.summary()
        for name, files in contents["images"].items():
            for file, image in zip(files, self.images[name]):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)).save(folder / file)
        with (folder / "runs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            lead = ("ours", "psnr_difference", "low", "high")
            writer.writerow(["name", "contender", "setting", "is_best", *_SCALARS, *lead])
            for run in contents["runs"]:
                ahead = run["against_ours"] or {}
                first = [run["name"], run["contender"], run["setting"], run["is_best"]]
                writer.writerow([*first, *(run[name] for name in _SCALARS), *(ahead.get(name) for name in lead)])
        summary.write_text(json.dumps(contents, indent=2, allow_nan=False) + "\n")
        return [picture, summary]


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
        store = _Store(out_dir, pipe, adapter, inputs, seed, size, num_inference_steps)
        contest = _Contest(pipe, adapter, inputs, seed, size, num_inference_steps, store, bar)
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
            search = _Search(contest, inputs[:search_samples], peer, budgets[peer])
            try:
                searched[peer] = search.run()
            except _NotAvailableError as error:
                not_available[peer] = str(error)
        for count in sorted(budgets.get("steps", ()), reverse=True):
            contest.run("fewer-steps-{whole}", "steps", f"{count} steps of the scheduler", steps=count)

    bounds = next((list(p.config.stage_bounds) for p, _ in contestants.values()), [])
    facts = {
        **_facts(pipe, inputs, seed, size),
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


class _NotAvailableError(Exception):
    """A contender can't run on this model; the message says why."""


class _Counter:
    """Counts over one call of the pipeline what runs of the transformer, and keeps the latents after each step."""

    def __init__(self, pipe, adapter, keep_latents: int = 0):
        self.steps: list[int] = []
        self.latents: list[torch.Tensor] = []
        self.first_call: float | None = None
        self._pipe, self._keep_latents = pipe, keep_latents
        self._attentions = adapter.counted_modules
        self._bodies = [next(block.children()) for block in adapter.blocks]
        self._device = pipe.transformer.device
        self._calls = self._whole_calls = self._attention_runs = self._body_runs = 0
        self._seen: set[int] = set()
        self._ran: set[int] = set()
        self._whole = False

    @contextmanager
    def on(self):
        transformer = self._pipe.transformer
        hooks = [transformer.register_forward_pre_hook(self._begin), transformer.register_forward_hook(self._end)]
        for number, (attention, body) in enumerate(zip(self._attentions, self._bodies)):
            hooks.append(attention.register_forward_hook(self._attention_ran(number)))
            hooks.append(body.register_forward_hook(self._body_ran))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def on_step_end(self, pipe, step, timestep, tensors):
        """The pipeline's callback."""
        if self._whole and step not in self.steps:
            self.steps.append(step)
        self._whole = False
        self._seen.add(step)
        if self._keep_latents:
            self.latents.append(tensors["latents"][: self._keep_latents].detach().clone())
        return {}

    def counts(self) -> tuple[float, float, float]:
        """Whole steps, step equivalents and block passes, of one time through the steps."""
        scale = len(self._seen) / max(self._calls, 1)
        blocks = len(self._attentions)
        runs = self._whole_calls, self._attention_runs / blocks, self._body_runs / blocks
        return tuple(count * scale for count in runs)

    def _begin(self, module, args):
        if self.first_call is None:
            _synchronise(self._device)
            self.first_call = time.perf_counter()
        self._calls += 1
        self._ran.clear()

    def _end(self, module, args, output):
        if len(self._ran) == len(self._attentions):
            self._whole_calls += 1
            self._whole = True

    def _attention_ran(self, number):
        def hook(module, args, output):
            self._attention_runs += 1
            self._ran.add(number)

        return hook

    def _body_ran(self, module, args, output):
        self._body_runs += 1


@dataclass
class _Outcome:
    """What one contender made of some batches."""

    latents: list[np.ndarray]  # per batch
    images: list[np.ndarray]
    trajectories: list[list[np.ndarray]]  # per batch, after each step, of the first samples
    steps: tuple[int, ...]
    counts: tuple[float, float, float]
    seconds: float
    denoise_seconds: float
    peak_memory_bytes: int | None


class _Contest:
    """Runs contenders one after the other and compares them with the first."""

    pictured_samples = 8

    def __init__(self, pipe, adapter, inputs, seed, batch_size, num_inference_steps, store, bar):
        self.pipe, self.adapter, self.seed, self.size = pipe, adapter, seed, batch_size
        self.num_inference_steps, self.store, self.bar = num_inference_steps, store, bar
        self.inputs = inputs
        self.batches = self.batches_of(inputs)
        self.prompts = [text if isinstance(text := i.get("prompt"), str) else None for i in inputs]
        self.results: list[EvaluatedRun] = []
        self.pictured: dict[str, np.ndarray] = {}
        self.sigmas: list[float] = []
        self.not_available: dict[str, str] = {}
        self._reference: _Outcome | None = None
        self._learned: Mapping[str, Callable] = {}
        self._settings: dict[Setting, EvaluatedRun] = {}

    def batches_of(self, inputs: list[dict]) -> list[tuple[dict, list[int]]]:
        """Arguments of the pipeline calls, and the samples' seeds."""
        return [
            (collate([inputs[number] for number in numbers]), [self.seed + number for number in numbers])
            for numbers in batches_of(inputs, self.size)
        ]

    def run_ours(self, label: str, predictor: FusedKANPredictor, schedule: Schedule | ErrorControl | None) -> None:
        """Runs a predictor on a schedule, None for the trained one."""
        state = {name: value.detach().cpu() for name, value in predictor.state_dict().items()}
        key = _digest([inputs_digest([state]), repr(predictor.config), repr(schedule), label, [*self.pictured]])
        config = predictor.config
        setting = f"{config.mixer}, rank {config.rank}" if config.mixer == "newton" else config.mixer
        if isinstance(schedule, ErrorControl):
            setting += f", error control at {schedule.tolerance:g}"
        elif schedule is not None:
            setting += f", steps {schedule}"
        self.run(
            f"{config.mixer}-{{whole}}",
            config.mixer,
            setting,
            cache=lambda: enable_cache(self.pipe, predictor, schedule),
            suffix=f"-{label}",
            more=key,
        )

    def run_setting(self, setting: Setting) -> EvaluatedRun:
        """Runs a peer's setting, if that was not done. Settings of equal text have numbered names."""
        if setting not in self._settings:
            self.bar.total += 1
            number = 1 + sum(str(other) == str(setting) for other in self._settings)
            self._settings[setting] = self.run(
                str(setting) if number == 1 else f"{setting}-{number}",
                setting.contender,
                setting.describe(),
                cache=lambda: setting.on(self.pipe, self.num_inference_steps),
                each_call=True,
                more=repr(setting),
            )
        return self._settings[setting]

    def run(
        self,
        name: str,
        contender: str,
        setting: str,
        steps: int | None = None,
        cache: Callable = nullcontext,
        each_call: bool = False,
        suffix: str = "",
        more: str = "",
    ) -> EvaluatedRun:
        """Runs one contender on all inputs, or reads what is kept of it.

        Args:
            name: of the run; "{whole}" in it is replaced by the number of whole steps.
            contender: its kind.
            setting: in words.
            steps: of the run. Default: as many as the reference's.
            cache: gives the context in which it runs.
            each_call: whether each call of the pipeline has a context of its own, so that no state is left of another.
            suffix: added to the name if another run has it already.
            more: what else tells this run from others.
        """
        steps = self.num_inference_steps if steps is None else steps
        file = name.replace("{whole}", str(steps)) + suffix
        self.bar.set_postfix_str(file)
        kept = self.store.read(file, more, with_outcome=not self.results)
        if kept is None:
            outcome = self.outcome(self.batches, steps, cache, each_call, keep=True)
            if not self.results:
                _check_seen(outcome, steps)
                sigmas = self.pipe.scheduler.sigmas[: len(self.pipe.scheduler.timesteps)]
                self._set_reference(outcome, sigmas.tolist())
            run, images = self._judged(name, contender, setting, steps, suffix, outcome)
            self.store.write(file, more, run, images, self.sigmas, outcome)
        else:
            run, images, sigmas, outcome = kept
            if outcome is not None:
                self._set_reference(outcome, sigmas)
            run = replace(run, speedup=self.results[0].seconds / run.seconds if self.results else 1.0)
        self.results.append(run)
        self.pictured[run.name] = images
        self.bar.update()
        return run

    def outcome(self, batches, steps: int, cache=nullcontext, each_call=False, keep=False, warm=True) -> _Outcome:
        """What a contender makes of `batches`."""
        device = self.pipe.transformer.device
        on_cpu = device.type == "cpu"
        seconds = denoise_seconds = 0.0
        latents, images, trajectories, counts, first_steps = [], [], [], [], ()
        with nullcontext() if each_call else cache():
            # On an accelerator each contender has kernels to load and to tune.
            if warm and (not on_cpu or self._reference is None):
                with cache() if each_call else nullcontext():
                    arguments, seeds = batches[0]
                    self._decoded(self._call(arguments, seeds, min(steps, 2 if on_cpu else WARM_UP_STEPS)), arguments)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            left = _TRAJECTORY_SAMPLES if keep and steps == self.num_inference_steps else 0
            for arguments, seeds in batches:
                counter = _Counter(self.pipe, self.adapter, min(left, len(seeds)))
                left -= min(left, len(seeds))
                with cache() if each_call else nullcontext(), counter.on():
                    _synchronise(device)
                    start = time.perf_counter()
                    made = self._call(arguments, seeds, steps, callback_on_step_end=counter.on_step_end)
                    _synchronise(device)
                    denoised = time.perf_counter()
                images.append(self._decoded(made, arguments))
                _synchronise(device)
                seconds += time.perf_counter() - start
                denoise_seconds += denoised - (counter.first_call or start)
                first_steps = first_steps or tuple(counter.steps)
                counts.append(counter.counts())
                latents.append(made.float().cpu().numpy())
                trajectories.append([step.float().cpu().numpy() for step in counter.latents])
        weights = [len(seeds) for _, seeds in batches]
        mean = tuple(float(np.average(values, weights=weights)) for values in zip(*counts))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return _Outcome(latents, images, trajectories, first_steps, mean, seconds, denoise_seconds, peak)

    def call_once(self, inputs: list[dict]) -> None:
        """Runs the pipeline on some inputs."""
        self._call(*self.batches_of(inputs)[0], self.num_inference_steps)

    def _call(self, arguments, seeds, steps, **options):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = {**arguments, "generator": generators, "num_inference_steps": steps, "output_type": "latent"}
        latents = self.pipe(**call, **options, return_dict=False)[0]
        return latents[-1] if isinstance(latents, list) else latents  # FramePack: after each section

    def _decoded(self, latents, arguments) -> np.ndarray:
        return self.adapter.decode(self.pipe, latents, arguments.get("height"), arguments.get("width"))

    def _set_reference(self, outcome: _Outcome, sigmas: list[float]) -> None:
        self._reference, self.sigmas = outcome, sigmas
        device, shape = self.pipe.transformer.device, outcome.images[0][0].shape
        self._learned, self.not_available = learned_qualities(device, self.prompts, shape)

    def _judged(self, name, contender, setting, steps, suffix, outcome) -> tuple[EvaluatedRun, np.ndarray]:
        latents = [*_samples(outcome.latents, self._reference.latents)]
        images = [*_samples(outcome.images, self._reference.images)]
        per_sample = {
            "psnr": [psnr(*pair, peak=1.0) for pair in images],
            "ssim": [ssim(*pair) for pair in images],
            "latent_error": [relative_error(*pair) for pair in latents],
        }
        figures = {key: float(np.mean(values)) for key, values in per_sample.items()}
        figures["latent_psnr"] = float(np.mean([psnr(*pair, peak=2.0) for pair in latents]))
        figures |= self._learned_figures(images)
        whole, equivalents, passes = outcome.counts
        name = name.format(whole=round(whole))
        name += suffix if name in self.pictured else ""
        run = EvaluatedRun(
            name=name,
            contender=contender,
            setting=setting,
            steps=outcome.steps,
            num_inference_steps=steps,
            whole_steps=whole,
            step_equivalents=equivalents,
            block_passes=passes,
            seconds=outcome.seconds,
            denoise_seconds=outcome.denoise_seconds,
            speedup=(self.results[0].seconds if self.results else outcome.seconds) / outcome.seconds,
            peak_memory_bytes=outcome.peak_memory_bytes,
            per_sample=per_sample,
            step_errors=self._step_errors(outcome),
            **figures,
        )
        shape = images[0][0].shape
        pictured = [image for image, _ in images if image.shape == shape]
        if len(shape) == 4:
            pictured = [video[len(video) // 2] for video in pictured]
        return run, np.stack(pictured[: self.pictured_samples])

    def _learned_figures(self, images) -> dict[str, float]:
        return {
            name: float(np.mean([measure(*pair, prompt) for pair, prompt in zip(images, self.prompts)]))
            for name, measure in self._learned.items()
        }

    def _step_errors(self, outcome) -> list[float | None]:
        """Of a pipeline that goes through its steps several times, the mean over these."""
        errors: list[list[float]] = [[] for _ in range(self.num_inference_steps)]
        for ours, theirs in zip(outcome.trajectories, self._reference.trajectories):
            if len(ours) == len(theirs):
                for step, pair in enumerate(zip(ours, theirs)):
                    errors[step % self.num_inference_steps] += [relative_error(*sample) for sample in zip(*pair)]
        return [float(np.mean(values)) if values else None for values in errors]


class _Search:
    """Finds a peer's best settings with a few inputs, and runs them on all."""

    def __init__(self, contest: _Contest, inputs: list[dict], peer: str, budgets: Iterable[int]):
        self.contest, self.inputs, self.peer, self.budgets = contest, inputs, peer, sorted(budgets, reverse=True)
        self._batches = contest.batches_of(inputs)
        self._tried: dict[Setting, tuple[float, float, float]] = {}  # PSNR, whole steps, step equivalents
        self._kept = contest.store.read_search(peer, len(inputs))

    def run(self) -> dict:
        """Searches, runs the best, and says what was searched."""
        contest = self.contest
        steps = contest.num_inference_steps
        ratios = ()
        if self.peer == "mag-cache":
            ratios = self._kept.get("mag_ratios") or self._attempt(self._calibrate)
            self._kept["mag_ratios"] = list(ratios)
        grid = grid_of(self.peer, steps, self.budgets, ratios)
        for setting in grid.settings:
            self._figures(setting)
        measures = (2,) if self.peer in ("taylorseer", "mag-cache") else (2, 1)  # others run a block in every step
        for axis in grid.axes:
            for measure in measures:
                for budget in self.budgets:
                    for setting in bisected(axis, lambda s: self._figures(s)[measure], budget + 1e-6):  # noqa: B023
                        self._figures(setting)
        budgets = [self._best(budget, measure) for measure in measures for budget in self.budgets]
        result = {"grid": grid.text, "samples": len(self.inputs), "tried": len(self._tried), "budgets": budgets}
        return {**result, "mag_ratios": list(ratios)} if ratios else result

    def _calibrate(self):
        contest = self.contest
        samples = self.inputs[:_CALIBRATION_SAMPLES]
        return calibrate_mag_cache(contest.pipe, lambda: contest.call_once(samples), contest.num_inference_steps)

    def _figures(self, setting: Setting) -> tuple[float, float, float]:
        """PSNR, whole steps and step equivalents of a setting on the inputs of the search."""
        if setting not in self._tried:
            key = repr(setting)
            if key not in self._kept:
                self.contest.bar.set_postfix_str(f"search: {setting}, {len(self._tried)} tried")
                self._kept[key] = self._attempt(lambda: self._measured(setting))
                self.contest.store.write_search(self.peer, len(self.inputs), self._kept)
            self._tried[setting] = tuple(self._kept[key])
        return self._tried[setting]

    def _measured(self, setting):
        contest = self.contest
        steps = contest.num_inference_steps
        made = contest.outcome(
            self._batches, steps, lambda: setting.on(contest.pipe, steps), each_call=True, warm=False
        )
        values = [psnr(*pair, peak=1.0) for pair in _samples(made.images, contest._reference.images)]
        return float(np.mean(values)), made.counts[0], made.counts[1]

    def _attempt(self, function):
        """Calls it; a failure of the peer's code on this model makes the peer not available."""
        try:
            return function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            raise _NotAvailableError(f"it fails on this model: {type(error).__name__}: {message}") from error

    def _best(self, budget: int, measure: int) -> dict:
        """Runs the best setting within a budget on all inputs."""
        by = "step_equivalents" if measure == 2 else "whole_steps"
        row = {"budget": budget, "by": by, "run": None, "why": None}
        if not self._tried:
            return {**row, "why": f"its grid has no setting of at most {budget} {by.replace('_', ' ')}"}
        within = [s for s, figures in self._tried.items() if figures[measure] <= budget + 1e-6]
        if not within:
            least = min(figures[measure] for figures in self._tried.values())
            return {**row, "why": f"no setting has at most {budget} {by.replace('_', ' ')}; the least is {least:.2f}"}
        ranked = sorted(within, key=lambda s: -_sortable(self._tried[s][0]))
        for setting in ranked[:_ATTEMPTS]:
            run = self.contest.run_setting(setting)
            if getattr(run, by) <= budget + 1e-6:
                return {**row, "run": run.name}
        return {**row, "why": f"the best settings go above {budget} {by.replace('_', ' ')} on all inputs"}


class _Store:
    """What is finished, in `runs/` of the output folder; each file says what it was made from."""

    def __init__(self, out_dir, pipe, adapter, inputs, seed, batch_size, num_inference_steps):
        self.folder = None if out_dir is None else Path(out_dir) / "runs"
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        transformer = adapter.transformer
        facts = {**_facts(pipe, inputs, seed, batch_size), "steps": num_inference_steps}
        self._key = _digest(
            [facts, fingerprint(transformer), inputs_digest(inputs), dict(pipe.scheduler.config), type(pipe).__name__]
        )

    def read(self, name: str, more: str, with_outcome: bool):
        """The run, its images, the noise levels, and the outcome if it is needed; or None."""
        file, arrays = self._files(name)
        if file is None or not file.exists() or not arrays.exists():
            return None
        contents = json.loads(file.read_text())
        if contents["key"] != _digest([self._key, more]):
            return None
        values = contents["run"]
        run = EvaluatedRun(**{**values, "steps": tuple(values["steps"])})
        with np.load(arrays) as stored:
            images, outcome = stored["pictured"], None
            if with_outcome:
                batches = range(contents["batches"])
                outcome = _Outcome(
                    [stored[f"latents-{i}"] for i in batches],
                    [stored[f"images-{i}"] for i in batches],
                    [list(stored[f"trajectory-{i}"]) for i in batches],
                    run.steps,
                    (run.whole_steps, run.step_equivalents, run.block_passes),
                    run.seconds,
                    run.denoise_seconds,
                    run.peak_memory_bytes,
                )
        return run, images, contents["sigmas"], outcome

    def write(self, name: str, more: str, run: EvaluatedRun, images: np.ndarray, sigmas, outcome: _Outcome) -> None:
        """Keeps a run; of the reference all that others are compared with."""
        file, arrays = self._files(name)
        if file is None:
            return
        values = {"pictured": images}
        if run.contender == REFERENCE:
            for number in range(len(outcome.latents)):
                values[f"latents-{number}"] = outcome.latents[number]
                values[f"images-{number}"] = outcome.images[number]
                values[f"trajectory-{number}"] = np.array(outcome.trajectories[number])
        part = arrays.with_suffix(".part.npz")
        np.savez(part, **values)
        part.replace(arrays)
        contents = {"key": _digest([self._key, more]), "batches": len(outcome.latents), "sigmas": sigmas}
        _write_whole(file, json.dumps({**contents, "run": asdict(run)}))  # Python's JSON knows Infinity and NaN

    def read_search(self, peer: str, samples: int) -> dict:
        """By setting, the figures of the search with so many samples."""
        file, _ = self._files(f"search {peer}")
        if file is None or not file.exists():
            return {}
        contents = json.loads(file.read_text())
        return contents["figures"] if contents["key"] == _digest([self._key, samples]) else {}

    def write_search(self, peer: str, samples: int, figures: dict) -> None:
        """Keeps the figures of the search so far."""
        file, _ = self._files(f"search {peer}")
        if file is not None:
            _write_whole(file, json.dumps({"key": _digest([self._key, samples]), "figures": figures}))

    def _files(self, name: str):
        if self.folder is None:
            return None, None
        name = _file_name(name)
        return self.folder / f"{name}.json", self.folder / f"{name}.npz"


def _write_whole(file: Path, text: str) -> None:
    """So that an interruption leaves the old file or the new one."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def _file_name(name: str) -> str:
    """The name, with what a file's name can't hold replaced and told apart by a digest."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "run"
    return safe if safe == name else f"{safe[:80]}-{_digest(name)[:8]}"


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _check_seen(reference: _Outcome, steps: int) -> None:
    """Raises `RuntimeError` unless every block was seen to run in every step of the reference."""
    whole = reference.counts[0]
    if round(whole, 6) != steps:
        raise argument_error(
            "pipe",
            "have a transformer whose blocks are seen to run in every step",
            Said(f"one in which they are seen in {whole:g} of {steps}"),
            "Compiled graphs hide them: evaluate before `compile`, or with the blocks compiled one by one. Disable "
            "other caches.",
            RuntimeError,
        )


def _samples(batches, wanted):
    """Pairs of single samples of two lists of batches; the second may hold more samples."""
    ours = (sample for batch in batches for sample in batch)
    return zip(ours, (sample for batch in wanted for sample in batch))


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


def _finite(value):
    """The value for JSON, with None for what is infinite or NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sortable(value: float) -> float:
    """Larger is better; NaN is worst."""
    return -math.inf if math.isnan(value) else value


def _rank(run: EvaluatedRun) -> float:
    return _sortable(run.psnr)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _facts(pipe, inputs, seed, batch_size) -> dict:
    transformer = pipe.transformer
    device = transformer.device
    parameters = sum(p.numel() for p in transformer.parameters())
    return {
        "model": f"{type(pipe).__name__}, {type(transformer).__name__}, {parameters / 1e6:.1f} M parameters",
        "samples": len(inputs),
        "seed": seed,
        "batch_size": batch_size,
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "device": platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "lesa_kernels": lesa_kernels.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
