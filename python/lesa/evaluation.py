"""`evaluate`: predictors, diffusers' TaylorSeer and plain runs of fewer steps, on the same inputs and seeds."""

import json
import math
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import TaylorSeerCacheConfig
from skimage.metrics import structural_similarity
from tqdm import tqdm

import lesa_kernels
from lesa.cache import enable_cache
from lesa.comparison import draw_comparison
from lesa.hook import check_uncached
from lesa.inputs import batches_of, check_inputs, collate
from lesa.models import adapter_for
from lesa.pipelines import quiet_progress
from lesa_kernels import FusedKANPredictor
from lesa_kernels._checks import argument_error, check_int

REFERENCE = "reference"
COUNTED = "attention of the first block"
"""What runs in a computed step of every contender."""
WARM_UP_STEPS = 12
"""Enough for a cache to predict some of them; runs of fewer than 10 steps are computed whole."""


@dataclass(frozen=True)
class TaylorSeer:
    """A setting of diffusers' `TaylorSeerCacheConfig`, with 3 warm-up steps.

    Args:
        interval: `cache_interval`.
        order: `max_order`.
        lite: `use_lite_mode`: forecast the model's output only, instead of every attention's.
    """

    interval: int
    order: int = 1
    lite: bool = False

    def __str__(self) -> str:
        return f"taylorseer-{'lite' if self.lite else 'full'}-order{self.order}-interval{self.interval}"

    def computed_in(self, num_inference_steps: int) -> int:
        """Number of steps that it computes: 0, 1, 2, 4 and then every `interval`-th."""
        return sum(i < 3 or (i - 4) % self.interval == 0 for i in range(num_inference_steps))

    def config(self, dtype: torch.dtype) -> TaylorSeerCacheConfig:
        """The configuration for a model of that dtype: the factors are kept in the model's own precision."""
        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=3,
            max_order=self.order,
            use_lite_mode=self.lite,
            taylor_factors_dtype=dtype,
        )


def taylorseer_grid(num_inference_steps: int, budgets: Iterable[int]) -> list[TaylorSeer]:
    """The TaylorSeer settings to try for given numbers of computed steps.

    Args:
        num_inference_steps: steps of a run.
        budgets: numbers of computed steps. One that no interval gives is replaced by the next larger one that is.

    Returns:
        Orders 1 to 3, full and lite, at the smallest and the largest interval that gives each number: at 50 steps,
        interval 7 for 10 computed steps, and intervals 10 and 11 for 8.
    """
    intervals = range(1, num_inference_steps + 1)
    counts = {n: TaylorSeer(n).computed_in(num_inference_steps) for n in intervals}
    chosen = set()
    for budget in budgets:
        count = min((c for c in counts.values() if c >= budget), default=num_inference_steps)
        giving = [n for n in intervals if counts[n] == count]
        chosen |= {giving[0], giving[-1]}
    return [TaylorSeer(n, order, lite) for n in sorted(chosen) for order in (1, 2, 3) for lite in (False, True)]


@dataclass(frozen=True)
class EvaluatedRun:
    """One contender's figures. Qualities are means over samples, against the reference run.

    Args:
        name: "reference", "newton-N", "dense-N", "taylorseer-...", or "fewer-steps-N"; N is `computed_steps`.
        steps: the steps at which the attention of the transformer's first block was computed, counted while it ran. For
            all contenders but one, the whole transformer ran in these steps and nothing but its output head in the
            others. TaylorSeer's full mode forecasts attentions only: the rest of every block runs in all steps.
        num_inference_steps: steps of the run.
        seconds: wall clock of the pipeline calls without decoding, after a warm-up.
        speedup: the reference's seconds over these.
        psnr: of the decoded images in [0, 1], in dB; infinite if any image equals the reference's, NaN if any is NaN.
        ssim: structural similarity of the decoded images.
        latent_psnr: of the latents for a peak of 2, in dB. The latents of the bundled digits are the pixels before they
            are clipped to [-1, 1].
    """

    name: str
    steps: tuple[int, ...]
    num_inference_steps: int
    seconds: float
    speedup: float
    psnr: float
    ssim: float
    latent_psnr: float

    @property
    def computed_steps(self) -> int:
        """Number of `steps`."""
        return len(self.steps)

    def to_dict(self) -> dict:
        """A dict for JSON, where a figure that is infinite or NaN is None."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {"name": values.pop("name"), "computed_steps": self.computed_steps, **values}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Args:
        runs: the contenders, the reference first.
        images: by run, the first few images of one size, `[n, height, width, 3]` in [0, 1]; of a video the middle one.
        facts: what was measured on: model, samples, seed, device, threads, versions.
    """

    runs: tuple[EvaluatedRun, ...]
    images: Mapping[str, np.ndarray]
    facts: Mapping

    def __getitem__(self, name: str) -> EvaluatedRun:
        return next(run for run in self.runs if run.name == name)

    @property
    def shown(self) -> list[EvaluatedRun]:
        """The runs for people: of TaylorSeer only the best by PSNR at each number of computed steps."""
        best: dict[int, EvaluatedRun] = {}
        for run in self._taylorseer:
            best[run.computed_steps] = max(best.get(run.computed_steps, run), run, key=_rank)
        return [run for run in self.runs if run not in self._taylorseer or run in best.values()]

    @property
    def _taylorseer(self) -> list[EvaluatedRun]:
        return [run for run in self.runs if run.name.startswith("taylorseer")]

    def table(self) -> str:
        """Computed steps, seconds, time speed-up, PSNR and SSIM of the runs in `shown`, as aligned text."""
        rows = [("run", "computed", "seconds", "speed-up", "PSNR dB", "SSIM")]
        for run in self.shown:
            quality = ("-", "-") if run.name == REFERENCE else (f"{run.psnr:.2f}", f"{run.ssim:.4f}")
            computed = f"{run.computed_steps} of {run.num_inference_steps}"
            rows.append((run.name, computed, f"{run.seconds:.2f}", f"{run.speedup:.2f}x", *quality))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        tried = Counter(run.computed_steps for run in self._taylorseer)
        if max(tried.values(), default=1) > 1:
            each = ", ".join(f"{count} at {steps}" for steps, count in sorted(tried.items(), reverse=True))
            lines.append(f"TaylorSeer: the best setting at each number of computed steps; tried were {each}.")
        if any(run.name.startswith("taylorseer-full") for run in self.shown):
            lines.append("TaylorSeer's full mode computes the attentions in so many steps, and all else in every step.")
        return "\n".join(lines)

    def summary(self) -> dict:
        """All runs and what they were measured on, for JSON."""
        return {"counted": COUNTED, "runs": [run.to_dict() for run in self.runs], **self.facts}

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Writes `summary.json` and `comparison.png` into `folder`; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        picture, summary = folder / "comparison.png", folder / "summary.json"
        draw_comparison(self.shown, self.images, picture)
        summary.write_text(json.dumps(self.summary(), indent=2, allow_nan=False) + "\n")
        return [picture, summary]


def evaluate(
    pipe,
    inputs: Sequence[str | dict],
    predictors: Mapping[str, FusedKANPredictor] | Sequence[FusedKANPredictor],
    against: Sequence[str | TaylorSeer] = ("steps", "taylorseer"),
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compares predictors with the full run, with fewer steps, and with diffusers' TaylorSeer.

    Every contender goes through the pipeline itself with the same inputs. Input i starts from noise of seed `seed + i`.

    Args:
        pipe: a diffusers pipeline of a supported family.
        inputs: prompts, or dicts of pipeline arguments.
        predictors: on the pipeline's device; by name, or in order. The names tell runs apart that have the same mixer
            and number of computed steps.
        against: "steps" for plain runs of as many steps as the predictors compute, "taylorseer" for the settings of
            `taylorseer_grid` at these numbers of steps; "steps-N" and "taylorseer-N" for N computed steps; or a
            `TaylorSeer`.
        num_inference_steps: steps of the reference.
        seed: of the first input.
        batch_size: inputs per pipeline call. None: all in one. Inputs that can't share a call, such as two sizes of
            images, never do.
        out_dir: where `summary.json` and `comparison.png` are written. None: nowhere.
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError: an argument is not as above, or a predictor does not fit the pipeline.
        RuntimeError: a cache is on already.
    """
    adapter = adapter_for(pipe)
    check_uncached(pipe.transformer)
    check_int("num_inference_steps", num_inference_steps)
    inputs = check_inputs(inputs)
    size = len(inputs) if batch_size is None else check_int("batch_size", batch_size)
    for contender in against:
        _check_contender(contender)
    if not isinstance(predictors, Mapping):
        predictors = {str(number): predictor for number, predictor in enumerate(predictors, start=1)}

    for predictor in predictors.values():
        enable_cache(pipe, predictor).disable()  # one that does not fit is refused before anything runs

    contest = _Contest(pipe, adapter, inputs, check_int("seed", seed, minimum=0), size)
    with (
        quiet_progress(pipe),
        tqdm(total=1 + len(predictors), desc="evaluate", unit="run", disable=not progress) as bar,
    ):
        contest.run(REFERENCE, num_inference_steps, nullcontext())
        bar.update()
        for label, predictor in predictors.items():
            cache = enable_cache(pipe, predictor)
            contest.run(f"{predictor.config.mixer}-{{computed}}", num_inference_steps, cache, suffix=f"-{label}")
            bar.update()
        counts = {run.computed_steps for run in contest.results[1:]}
        fewer, settings = _opponents(against, counts, num_inference_steps)
        bar.total += len(fewer) + len(settings)
        for setting in settings:
            contest.run(str(setting), num_inference_steps, _taylorseer(pipe.transformer, setting))
            bar.update()
        for count in fewer:
            contest.run("fewer-steps-{computed}", count, nullcontext())
            bar.update()

    evaluation = Evaluation(tuple(contest.results), contest.pictured, _facts(pipe, inputs, seed, size))
    if out_dir is not None:
        evaluation.save(out_dir)
    return evaluation


class _Contest:
    """Runs contenders one after the other and compares them with the first."""

    pictured_samples = 8

    def __init__(self, pipe, adapter, inputs, seed, batch_size):
        self.pipe, self.adapter = pipe, adapter
        self.batches = [
            (collate([inputs[number] for number in numbers]), [seed + number for number in numbers])
            for numbers in batches_of(inputs, batch_size)
        ]
        self.results: list[EvaluatedRun] = []
        self.pictured: dict[str, np.ndarray] = {}
        self._reference: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self, name: str, steps: int, cache: AbstractContextManager, suffix: str = "") -> None:
        """Runs one contender.

        Args:
            name: of the run; "{computed}" in it is replaced by the number of computed steps.
            steps: of the run.
            cache: on while it is entered.
            suffix: added to the name if another run has it already.
        """
        device = self.pipe.transformer.device
        on_cpu = device.type == "cpu"
        computed: set[int] = set()
        seconds, outputs = 0.0, []
        with cache:
            if not on_cpu or not self.results:  # on an accelerator each contender has kernels to load and to tune
                self._call(*self.batches[0], min(steps, 2 if on_cpu else WARM_UP_STEPS))
            for arguments, seeds in self.batches:
                with self._counted(computed) as on_step_end:
                    _synchronise(device)
                    start = time.perf_counter()
                    latents = self._call(arguments, seeds, steps, callback_on_step_end=on_step_end)
                    _synchronise(device)
                    seconds += time.perf_counter() - start
                outputs.append((latents, arguments))
        outputs = [
            (latents.float().cpu().numpy(), self.adapter.decode(self.pipe, latents, a.get("height"), a.get("width")))
            for latents, a in outputs
        ]
        if not self.results:
            self._reference = outputs
        name = name.format(computed=len(computed))
        name += suffix if name in self.pictured else ""
        self._add(name, computed, steps, seconds, outputs)

    def _call(self, arguments, seeds, steps, **options):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = {**arguments, "generator": generators, "num_inference_steps": steps, "output_type": "latent"}
        latents = self.pipe(**call, **options, return_dict=False)[0]
        return latents[-1] if isinstance(latents, list) else latents  # FramePack: after each section

    @contextmanager
    def _counted(self, computed: set[int]):
        """Collects in `computed` the steps at which the counted module runs; gives the pipeline's callback for that."""
        ran = False

        def on_counted(module, args, output):
            nonlocal ran
            ran = True

        def on_step_end(pipe, step, timestep, tensors):
            nonlocal ran
            if ran:
                computed.add(step)
            ran = False
            return {}

        hook = self.adapter.counted_module.register_forward_hook(on_counted)
        try:
            yield on_step_end
        finally:
            hook.remove()

    def _add(self, name, computed, steps, seconds, outputs) -> None:
        pairs = [
            (pair, reference)
            for (batch, wanted) in zip(outputs, self._reference)
            for pair, reference in zip(zip(*batch), zip(*wanted))
        ]
        latent_psnrs = [_psnr(latents, wanted, peak=2.0) for (latents, _), (wanted, _) in pairs]
        psnrs = [_psnr(image, wanted, peak=1.0) for (_, image), (_, wanted) in pairs]
        ssims = [_ssim(image, wanted) for (_, image), (_, wanted) in pairs]
        reference_seconds = self.results[0].seconds if self.results else seconds
        figures = [float(np.mean(values)) for values in (psnrs, ssims, latent_psnrs)]
        self.results.append(
            EvaluatedRun(name, tuple(sorted(computed)), steps, seconds, reference_seconds / seconds, *figures)
        )
        shape = pairs[0][0][1].shape
        images = [image for (_, image), _ in pairs if image.shape == shape]
        if len(shape) == 4:
            images = [video[len(video) // 2] for video in images]
        self.pictured[name] = np.stack(images[: self.pictured_samples])


def _check_contender(contender) -> None:
    if isinstance(contender, TaylorSeer):
        return
    if not re.fullmatch("(steps|taylorseer)(-[1-9][0-9]*)?", str(contender)):
        raise argument_error(
            "against",
            "hold 'steps', 'taylorseer', 'steps-N', 'taylorseer-N' or a TaylorSeer",
            contender,
            "Choose among these, with N the number of computed steps, at least 1.",
        )


def _opponents(against, counts: set[int], num_inference_steps: int) -> tuple[list[int], list[TaylorSeer]]:
    """The numbers of steps of plain runs, and the TaylorSeer settings, that `against` asks for."""
    budgets: dict[str, set[int]] = {"steps": set(), "taylorseer": set()}
    settings = []
    for contender in against:
        if isinstance(contender, TaylorSeer):
            settings.append(contender)
            continue
        kind, _, count = contender.partition("-")
        budgets[kind] |= {int(count)} if count else counts
    settings += taylorseer_grid(num_inference_steps, budgets["taylorseer"])
    return sorted(budgets["steps"], reverse=True), list(dict.fromkeys(settings))


@contextmanager
def _taylorseer(transformer, setting: TaylorSeer):
    transformer.enable_cache(setting.config(transformer.dtype))
    try:
        yield
    finally:
        transformer.disable_cache()


def _rank(run: EvaluatedRun) -> float:
    """Larger is better; NaN is worst."""
    return -math.inf if math.isnan(run.psnr) else run.psnr


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _psnr(values: np.ndarray, wanted: np.ndarray, peak: float) -> float:
    error = float(np.mean(np.square(values - wanted, dtype=np.float64)))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _ssim(image: np.ndarray, wanted: np.ndarray) -> float:
    """Of an image `[H, W, 3]`, or the mean over the frames of a video."""
    if image.ndim == 4:
        return float(np.mean([_ssim(*frames) for frames in zip(image, wanted)]))
    side = min(7, *image.shape[:2])  # the usual window is 7 pixels wide; it must be odd and fit
    return structural_similarity(image, wanted, win_size=side - (side % 2 == 0), channel_axis=-1, data_range=1.0)


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
