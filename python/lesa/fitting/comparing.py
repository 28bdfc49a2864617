"""Runs of a pipeline with and without a predictor, compared by their latents."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lesa.cache import enable_cache, reasons
from lesa.cache.stats import CacheStats
from lesa.evaluation.counting import Counter
from lesa.evaluation.quality import psnr, relative_error
from lesa.inputs import batches_of, collate
from lesa.models import adapters_for
from lesa.pipelines import quiet_progress, run_pipeline
from lesa.processes import Processes
from lesa.schedule import Spread
from lesa.training.shards import save_tensors
from lesa_kernels import FusedKANPredictor

PEAK = 2.0
"""Of the PSNR of latents, as in `lesa.evaluate`."""

_PLANNED = ("scheduled", reasons.FIRST_OF_SECOND, reasons.RISEN[0], reasons.BEGINS, reasons.MOVED)
"""Why steps are computed in a run without a failure."""


@dataclass(frozen=True)
class Made:
    """What runs gave, and how much they computed. Figures are means over the samples.

    Args:
        steps: the steps of the first call of the pipeline in which every block ran.
        whole_steps, step_equivalents: see `EvaluatedRun`.
        psnr: of the latents of each sample against those of all steps, in dB. NaN where the cache computed other steps
            than its schedule says. Empty for the runs of all steps.
        latent_error: likewise, the L2 norm of the difference, relative to that of the latents of all steps.
    """

    steps: tuple[int, ...]
    whole_steps: float
    step_equivalents: float
    psnr: Sequence[float] = ()
    latent_error: Sequence[float] = ()


@dataclass(frozen=True)
class _Call:
    """One call of the pipeline. For the arguments, see `Made`; `counts` are whole steps and step equivalents."""

    latents: torch.Tensor
    steps: tuple[int, ...]
    counts: tuple[float, float]


class LatentRuns:
    """Runs on some inputs. What they give is compared with runs of all steps, which are kept in a folder.

    Args:
        pipe: the pipeline.
        inputs: dicts of pipeline arguments. Sample i starts from noise of seed `seed + i`.
        seed: of the first sample.
        num_inference_steps: of a run of all steps.
        batch_size: inputs per call of the pipeline.
        folder: where the latents of runs of all steps are kept.
        processes: those that share the samples.
    """

    def __init__(
        self,
        pipe: Any,
        inputs: list[dict],
        seed: int,
        num_inference_steps: int,
        batch_size: int,
        folder: Path,
        processes: Processes,
    ):
        self.pipe, self.inputs, self.seed, self.steps, self.folder = pipe, inputs, seed, num_inference_steps, folder
        self.processes = processes
        self.batch_size = batch_size
        self._batches = [*enumerate(batches_of(inputs, batch_size))]

    def make_references(self) -> None:
        """Runs all steps for those samples that are not in the folder yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes.each(self._batches, self._make_reference)

    def _make_reference(self, batch: tuple[int, list[int]]) -> None:
        number, samples = batch
        if not self._file(number).exists():
            call = self._call(samples, self.steps)
            numbers = {"steps": torch.tensor(call.steps), "counts": torch.tensor(call.counts, dtype=torch.float64)}
            save_tensors(self._file(number), {"latents": call.latents.contiguous(), **numbers}, {"samples": samples})

    @property
    def references(self) -> Made:
        """The runs of all steps, which `make_references` has made."""
        return self._made([self._reference(number) for number, _ in self._batches])

    def errors(
        self, predictor: FusedKANPredictor | None = None, schedule: Spread | None = None, steps: int | None = None
    ) -> Made:
        """How far the latents of each sample are from those of all steps, and how many steps were computed.

        Args:
            predictor: forecasts the other steps; it is on the pipeline's device. None: without a cache.
            schedule: for a predictor that was not trained for one.
            steps: of the run. Default: all.
        """

        def compared(batch: tuple[int, list[int]]) -> tuple[_Call, list[tuple[float, float]]]:
            number, samples = batch
            cache = contextlib.nullcontext() if predictor is None else enable_cache(self.pipe, predictor, schedule)
            with cache as handle:
                call = self._call(samples, steps or self.steps)
            if predictor is not None and handle is not None and not is_as_planned(handle.stats, predictor):
                return call, [(math.nan, math.nan)] * len(samples)
            wanted = self._reference(number).latents
            pairs = zip(call.latents.numpy(), wanted.numpy())
            return call, [(psnr(*pair, PEAK), relative_error(*pair)) for pair in pairs]

        calls, errors = zip(*self.processes.each(self._batches, compared))
        pairs = [pair for each in errors for pair in each]
        return self._made(calls, [pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def _made(self, calls: Sequence[_Call], *errors: list[float]) -> Made:
        weights = [len(samples) for _, samples in self._batches]
        whole, equivalents = (
            float(np.average(counts, weights=weights)) for counts in zip(*(call.counts for call in calls))
        )
        return Made(calls[0].steps, whole, equivalents, *errors)

    def _reference(self, number: int) -> _Call:
        tensors = load_file(self._file(number))
        whole, equivalents = tensors["counts"].tolist()
        return _Call(tensors["latents"], tuple(tensors["steps"].tolist()), (whole, equivalents))

    def _call(self, samples: Sequence[int], steps: int) -> _Call:
        arguments = collate([self.inputs[sample] for sample in samples])
        generators = [torch.Generator("cpu").manual_seed(self.seed + sample) for sample in samples]
        counter = Counter(self.pipe, adapters_for(self.pipe).values())
        with quiet_progress(self.pipe), counter.on():
            made = run_pipeline(self.pipe, arguments, generators, steps, counter.on_step_end)
        latents = (made[-1] if isinstance(made, list) else made).float().cpu()
        return _Call(latents, tuple(counter.steps), counter.counts()[:2])

    def _file(self, number: int) -> Path:
        return self.folder / f"latents-{number:05d}.safetensors"


def is_as_planned(stats: CacheStats, predictor: FusedKANPredictor) -> bool:
    """Whether the latest run of a cache computed the steps of its schedule and forecast the others."""
    if stats.unlocated or not stats.streams:
        return False
    most = None if predictor.config.schedule is None else len(predictor.config.schedule)
    for stream in stats.streams.values():
        why = [stream.reasons.get(step) for step in stream.computed]
        if any(reason not in _PLANNED for reason in why) or (most is not None and why.count("scheduled") > most):
            return False
    return True
