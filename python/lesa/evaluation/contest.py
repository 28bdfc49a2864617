"""Runs contenders one after the other and compares them with the reference."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline
from tqdm import tqdm

from lesa.artifacts import digest
from lesa.cache.run import sigmas_of
from lesa.contenders import Contender, Ours, Reference
from lesa.contenders.base import Pipeline
from lesa.evaluation.counting import Counter, synchronise
from lesa.evaluation.earlier import Entry
from lesa.evaluation.naming import SEPARATOR
from lesa.evaluation.quality import frame_psnr, learned_qualities, psnr, relative_error, ssim, temporal_psnr
from lesa.evaluation.result import EvaluatedRun, Outcome
from lesa.evaluation.shown import Shown
from lesa.evaluation.store import Store
from lesa.inputs import batches_of, collate
from lesa.models import adapters_for, features_device
from lesa.models.adapter import Adapter
from lesa.pipelines import decoded_by_blocks, run_pipeline
from lesa.processes import Processes
from lesa_kernels.checks import usage_error

WARM_UP_STEPS = 12
"""Steps of the warm-up run.

With fewer than 8 steps, or fewer than 10 with a predictor for another number, a cache predicts none.
"""

TRAJECTORY_SAMPLES = 16
"""Samples whose latents are kept after each step."""

Batch = tuple[dict, list[int]]
"""Arguments of one pipeline call, and the seeds of its samples."""


@dataclass(frozen=True)
class _Call:
    """What a contender made in one call of the pipeline. See `Outcome`."""

    latents: np.ndarray
    images: np.ndarray
    trajectory: list[np.ndarray]
    steps: tuple[int, ...]
    counts: tuple[float, float, float]
    seconds: float
    denoise_seconds: float
    peak_memory_bytes: int


class Contest:
    """Runs contenders one after the other and compares them with the first, which is the reference.

    Args:
        pipe: the pipeline.
        adapter: of its transformer.
        inputs: dicts of pipeline arguments.
        seed: of the first input.
        batch_size: inputs per pipeline call.
        num_inference_steps: steps of the reference.
        store: where finished runs are kept.
        bar: shows the progress.
        processes: those that share the calls of the pipeline. Only the first one writes and judges.
    """

    def __init__(
        self,
        pipe: Pipeline,
        adapter: Adapter,
        inputs: list[dict],
        seed: int,
        batch_size: int,
        num_inference_steps: int,
        store: Store,
        bar: tqdm,
        processes: Processes,
    ):
        self.pipe, self.adapter, self.seed, self.size = pipe, adapter, seed, batch_size
        self._adapters = adapters_for(pipe).values()
        self.num_inference_steps, self.store, self.bar = num_inference_steps, store, bar
        self.inputs, self.processes = inputs, processes
        self.batches = self.batches_of(inputs)
        self.prompts = [text if isinstance(text := i.get("prompt"), str) else None for i in inputs]
        self.entries: list[Entry] = []
        self.sigmas: list[float] = []
        self.not_available: dict[str, str] = {}
        self._reference: Outcome | None = None
        self._learned: Mapping[str, Callable] = {}
        self._done: dict[str, EvaluatedRun] = {}  # by the identity of the setting
        self._timed = False

    @property
    def results(self) -> list[EvaluatedRun]:
        """The runs so far, the reference first. Several can have the same name."""
        return [entry.run for entry in self.entries]

    @property
    def executed_steps(self) -> int:
        """How many steps a run executes: fewer than `num_inference_steps` if, with `strength`, it begins later."""
        return len(self.results[0].steps)

    @property
    def reference(self) -> Outcome:
        """What the reference made."""
        if self._reference is None:
            raise RuntimeError("the reference must run first")
        return self._reference

    def batches_of(self, inputs: list[dict]) -> list[Batch]:
        """Arguments of the pipeline calls, and the samples' seeds."""
        return [
            (collate([inputs[number] for number in numbers]), [self.seed + number for number in numbers])
            for numbers in batches_of(inputs, self.size)
        ]

    def run_ours(self, label: str, ours: Ours) -> EvaluatedRun:
        """Runs a predictor, which is known by its label."""
        run = self._run(ours, [f"{ours.name}{SEPARATOR}{label}"], label)
        self._done.setdefault(ours.identity(), run)
        return run

    def run(self, contender: Contender) -> EvaluatedRun:
        """Runs a setting, if that was not done."""
        identity = contender.identity()
        if identity not in self._done:
            self.bar.total += bool(self.entries)  # the bar counts the reference already
            mark = digest(identity)[:8]  # different settings can have the same text
            files = [str(contender)]
            if isinstance(contender, Ours):
                files = [f"{contender.name}{SEPARATOR}{mark}"]
            elif not isinstance(contender, Reference):
                files = [f"{contender}{SEPARATOR}{mark}", *files]
            self._done[identity] = self._run(contender, files)
        return self._done[identity]

    def _run(self, contender: Contender, files: Sequence[str], label: str | None = None) -> EvaluatedRun:
        """Runs a contender on all inputs, or reads what is kept of its run.

        Args:
            contender: the setting.
            files: where its run may be kept; it is written to the first. Older releases used the others.
            label: of a predictor.
        """
        steps, identity, is_first = contender.steps_of(self.num_inference_steps), contender.identity(), not self.entries
        self.bar.set_postfix_str(str(contender).replace("{whole}", str(steps)))
        kept = self.processes.by_first(lambda: self.store.read(files, identity, with_outcome=is_first))
        if kept is not None:
            run, shown = kept.run, kept.shown
            if kept.outcome is not None:
                self._set_reference(kept.outcome, kept.sigmas)
        else:
            self.check_reference()
            outcome = self.outcome(self.batches, contender, keep=True)
            if is_first:
                self._timed = True
                self._set_reference(outcome, self.processes.by_first(self._run_sigmas))

            def judged() -> tuple[EvaluatedRun, Shown]:
                run, shown = self._judged(contender, steps, label, outcome)
                self.store.write(files[0], identity, run, shown, self.sigmas, outcome)
                return run, shown

            run, shown = self.processes.by_first(judged)
        self.entries.append(Entry(run, shown, digest(identity)))
        self.bar.update()
        return run

    def check_reference(self) -> None:
        """Runs a reference that is kept from an earlier command once more, before anything is compared with it.

        Its seconds are those that the runs of this command are compared with.

        Raises:
            RuntimeError: its samples are other ones now.
        """
        if self._timed or not self.entries:
            return
        self.bar.set_postfix_str("reference, timed again")
        contender, (kept, *_) = Reference(), self.entries
        made = self.outcome(self.batches, contender, keep=True)
        run = self.processes.by_first(lambda: self._timed_again(kept.run, made))
        self._timed = True
        self.entries[0] = replace(kept, run=run)
        self._done[contender.identity()] = run

    def _timed_again(self, kept: EvaluatedRun, made: Outcome) -> EvaluatedRun:
        """The kept run of the reference with the seconds of another run, which must have made the same."""
        pairs = zip((*made.latents, *made.images), (*self.reference.latents, *self.reference.images))
        if not all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
            difference = np.mean([psnr(*pair, peak=1.0) for pair in sample_pairs(made.images, self.reference.images)])
            raise usage_error(
                f"The reference gives other samples than those that are kept in {self.store.folder}; the PSNR between "
                f"them is {difference:.1f} dB. Something that lesa does not compare has changed, such as a replaced "
                "forward or an attention backend.",
                "Choose another folder.",
                RuntimeError,
            )
        run = replace(
            kept,
            seconds=made.seconds,
            denoise_seconds=made.denoise_seconds,
            reference_seconds=made.seconds,
            peak_memory_bytes=made.peak_memory_bytes,
        )
        contender = Reference()
        self.store.write_figures(contender.name, contender.identity(), run, self.sigmas, len(made.latents))
        return run

    def outcome(self, batches: Sequence[Batch], contender: Contender, keep: bool = False, warm: bool = True) -> Outcome:
        """What a contender makes of `batches`. The processes share them, and all get everything.

        Args:
            batches: arguments and seeds of the pipeline calls.
            contender: the setting.
            keep: whether to keep the latents after each step.
            warm: whether a short run goes before the timed one, where it is needed.
        """
        steps = contender.steps_of(self.num_inference_steps)
        device, processes = features_device(self.pipe, self.adapter), self.processes
        on_cpu = device.type == "cpu"
        left = TRAJECTORY_SAMPLES if keep and steps == self.num_inference_steps else 0
        calls: list[tuple[Batch, int]] = []
        for arguments, seeds in batches:
            calls.append(((arguments, seeds), min(left, len(seeds))))
            left -= calls[-1][1]
        for_all, for_each = (nullcontext, self._on) if contender.each_call else (self._on, nullcontext)

        def warm_up() -> None:
            with for_each(contender):
                self._warm_up(contender, batches[0], min(steps, 2 if on_cpu else WARM_UP_STEPS))

        def call(batch_and_kept: tuple[Batch, int]) -> _Call:
            return self._timed_call(*batch_and_kept, steps, for_each(contender))

        with ExitStack() as stack:
            processes.in_all(lambda: stack.enter_context(for_all(contender)))
            # On an accelerator each contender has kernels to load and to tune.
            if warm and (not on_cpu or isinstance(contender, Reference)):
                processes.in_all(warm_up)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            made = processes.each(calls, call)
        weights = [len(seeds) for _, seeds in batches]
        whole, equivalents, passes = (
            float(np.average(values, weights=weights)) for values in zip(*(each.counts for each in made))
        )
        return Outcome(
            [each.latents for each in made],
            [each.images for each in made],
            [each.trajectory for each in made],
            next((each.steps for each in made if each.steps), ()),
            (whole, equivalents, passes),
            sum(each.seconds for each in made),
            sum(each.denoise_seconds for each in made),
            max(each.peak_memory_bytes for each in made) if device.type == "cuda" else None,
        )

    def _timed_call(self, batch: Batch, kept: int, steps: int, switched_on: AbstractContextManager[Any]) -> "_Call":
        """One call of the pipeline, and the pictures of its samples.

        Args:
            batch: arguments and seeds.
            kept: of how many samples to keep the latents after each step.
            steps: of the call.
            switched_on: the context of the call, without the decoding.
        """
        (arguments, seeds), device = batch, features_device(self.pipe, self.adapter)
        counter = Counter(self.pipe, self._adapters, kept)
        with switched_on, counter.on():
            synchronise(device)
            start = time.perf_counter()
            made = self._call(arguments, seeds, steps, counter.on_step_end)
            synchronise(device)
            denoised = time.perf_counter()
        images = self._decoded(made, arguments)
        synchronise(device)
        return _Call(
            made.float().cpu().numpy(),
            images,
            [step.float().cpu().numpy() for step in counter.latents],
            tuple(counter.steps),
            counter.counts(),
            time.perf_counter() - start,
            denoised - (counter.first_call or start),
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )

    def _warm_up(self, contender: Contender, batch: Batch, steps: int) -> None:
        arguments, seeds = batch
        counter = Counter(self.pipe, self._adapters)
        with counter.on():
            made = self._call(arguments, seeds, steps, counter.on_step_end)
        if isinstance(contender, Reference):
            _check_seen(*counter.seen())
        self._decoded(made, arguments)

    def call_once(self, inputs: list[dict]) -> None:
        """Runs the pipeline on some inputs."""
        self._call(*self.batches_of(inputs)[0], self.num_inference_steps)

    def _run_sigmas(self) -> list[float]:
        """The noise levels of the last run in this process."""
        timesteps = self.pipe.scheduler.timesteps.tolist()
        return sigmas_of(self.pipe.scheduler, timesteps)[: len(timesteps)]

    def _on(self, contender: Contender) -> AbstractContextManager[Any]:
        return contender.on(self.pipe, self.num_inference_steps)

    def _call(self, arguments, seeds, steps, on_step_end=None):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        latents = run_pipeline(self.pipe, arguments, generators, steps, on_step_end)
        return latents[-1] if isinstance(latents, list) else latents  # FramePack: after each section

    def _decoded(self, latents, arguments) -> np.ndarray:
        if isinstance(self.pipe, ModularPipeline):
            return decoded_by_blocks(self.pipe, latents, arguments)
        return self.adapter.decode(self.pipe, latents, arguments.get("height"), arguments.get("width"))

    def _set_reference(self, outcome: Outcome, sigmas: list[float]) -> None:
        self._reference, self.sigmas = outcome, sigmas
        device, shape = features_device(self.pipe, self.adapter), outcome.images[0][0].shape
        if self.processes.is_first:
            self._learned, self.not_available = learned_qualities(device, self.prompts, shape)

    def _judged(
        self, contender: Contender, steps: int, label: str | None, outcome: Outcome
    ) -> tuple[EvaluatedRun, Shown]:
        latents = [*sample_pairs(outcome.latents, self.reference.latents)]
        images = [*sample_pairs(outcome.images, self.reference.images)]
        per_sample = {
            "psnr": [psnr(*pair, peak=1.0) for pair in images],
            "ssim": [ssim(*pair) for pair in images],
            "latent_error": [relative_error(*pair) for pair in latents],
        }
        if images[0][0].ndim == 4:
            per_sample |= {
                "frame_psnr": [frame_psnr(*pair) for pair in images],
                "temporal_psnr": [temporal_psnr(*pair) for pair in images],
            }
        figures = {key: float(np.mean(values)) for key, values in per_sample.items()}
        figures["latent_psnr"] = float(np.mean([psnr(*pair, peak=2.0) for pair in latents]))
        figures |= self._learned_figures(images)
        whole, equivalents, passes = outcome.counts
        of_reference = self.entries[0].run.seconds if self.entries else outcome.seconds
        run = EvaluatedRun(
            name=str(contender).replace("{whole}", str(round(whole))),
            contender=contender.name,
            setting=contender.describe(),
            steps=outcome.steps,
            num_inference_steps=steps,
            whole_steps=whole,
            step_equivalents=equivalents,
            block_passes=passes,
            seconds=outcome.seconds,
            denoise_seconds=outcome.denoise_seconds,
            speedup=of_reference / outcome.seconds,
            peak_memory_bytes=outcome.peak_memory_bytes,
            per_sample=per_sample,
            step_errors=self._step_errors(outcome),
            predictor=label,
            reference_seconds=of_reference,
            **figures,
        )
        return run, Shown.of([image for image, _ in images])

    def _learned_figures(self, images) -> dict[str, float]:
        return {
            name: float(np.mean([measure(*pair, prompt) for pair, prompt in zip(images, self.prompts)]))
            for name, measure in self._learned.items()
        }

    def _step_errors(self, outcome) -> list[float | None]:
        """Errors after each step. Of a pipeline that goes through its steps several times, the mean over these."""
        errors: list[list[float]] = [[] for _ in range(self.num_inference_steps)]
        for ours, theirs in zip(outcome.trajectories, self.reference.trajectories):
            if len(ours) == len(theirs):
                for step, pair in enumerate(zip(ours, theirs)):
                    errors[step % self.num_inference_steps] += [relative_error(*sample) for sample in zip(*pair)]
        return [float(np.mean(values)) if values else None for values in errors]


def _check_seen(whole: int, calls: int) -> None:
    """Raises `RuntimeError` unless every block was seen to run in every call of the transformer."""
    if whole != calls or not calls:
        raise usage_error(
            f"`pipe` has a transformer whose blocks were seen to run in only {whole} of {calls} calls.",
            "Compiled graphs hide blocks: evaluate before `compile`, or compile the blocks one by one. Disable other "
            "caches.",
            RuntimeError,
        )


def sample_pairs(
    batches: Iterable[np.ndarray], wanted: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of single samples of two lists of batches; the second may hold more samples."""
    ours = (sample for batch in batches for sample in batch)
    return zip(ours, (sample for batch in wanted for sample in batch))
