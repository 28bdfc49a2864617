"""Runs contenders one after the other and compares them with the reference."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from lesa.artifacts import digest
from lesa.cache import enable_cache
from lesa.cache.error_control import ErrorControl
from lesa.contenders import Setting
from lesa.evaluation.counting import Counter, synchronise
from lesa.evaluation.quality import learned_qualities, psnr, relative_error, ssim
from lesa.evaluation.result import EvaluatedRun, Outcome
from lesa.inputs import batches_of, collate
from lesa.schedule import Schedule
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error

WARM_UP_STEPS = 12
"""Enough for a cache to predict some of them; runs of fewer than 10 steps are computed whole."""


_TRAJECTORY_SAMPLES = 16


class Contest:
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
        self._reference: Outcome | None = None
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
        key = digest([digest([state]), repr(predictor.config), repr(schedule), label, [*self.pictured]])
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

    def outcome(self, batches, steps: int, cache=nullcontext, each_call=False, keep=False, warm=True) -> Outcome:
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
                counter = Counter(self.pipe, self.adapter, min(left, len(seeds)))
                left -= min(left, len(seeds))
                with cache() if each_call else nullcontext(), counter.on():
                    synchronise(device)
                    start = time.perf_counter()
                    made = self._call(arguments, seeds, steps, callback_on_step_end=counter.on_step_end)
                    synchronise(device)
                    denoised = time.perf_counter()
                images.append(self._decoded(made, arguments))
                synchronise(device)
                seconds += time.perf_counter() - start
                denoise_seconds += denoised - (counter.first_call or start)
                first_steps = first_steps or tuple(counter.steps)
                counts.append(counter.counts())
                latents.append(made.float().cpu().numpy())
                trajectories.append([step.float().cpu().numpy() for step in counter.latents])
        weights = [len(seeds) for _, seeds in batches]
        mean = tuple(float(np.average(values, weights=weights)) for values in zip(*counts))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Outcome(latents, images, trajectories, first_steps, mean, seconds, denoise_seconds, peak)

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

    def _set_reference(self, outcome: Outcome, sigmas: list[float]) -> None:
        self._reference, self.sigmas = outcome, sigmas
        device, shape = self.pipe.transformer.device, outcome.images[0][0].shape
        self._learned, self.not_available = learned_qualities(device, self.prompts, shape)

    def _judged(self, name, contender, setting, steps, suffix, outcome) -> tuple[EvaluatedRun, np.ndarray]:
        latents = [*sample_pairs(outcome.latents, self._reference.latents)]
        images = [*sample_pairs(outcome.images, self._reference.images)]
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


def _check_seen(reference: Outcome, steps: int) -> None:
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


def sample_pairs(batches, wanted):
    """Pairs of single samples of two lists of batches; the second may hold more samples."""
    ours = (sample for batch in batches for sample in batch)
    return zip(ours, (sample for batch in wanted for sample in batch))
