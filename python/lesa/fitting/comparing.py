"""Runs of a pipeline with and without a predictor, compared by their latents."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lesa.cache import enable_cache
from lesa.evaluation.quality import psnr, relative_error
from lesa.inputs import batches_of, collate
from lesa.pipelines import quiet_progress, run_pipeline
from lesa.processes import Processes
from lesa.schedule import Spread
from lesa.training.shards import save_tensors
from lesa_kernels import FusedKANPredictor

PEAK = 2.0
"""Of the PSNR of latents, as in `lesa.evaluate`."""


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
            latents = self._latents(samples, self.steps).contiguous()
            save_tensors(self._file(number), {"latents": latents}, {"samples": samples})

    def errors(
        self, predictor: FusedKANPredictor | None = None, schedule: Spread | None = None, steps: int | None = None
    ) -> dict[str, list[float]]:
        """How far the latents of each sample are from those of all steps: "psnr" in dB, and "latent_error".

        Args:
            predictor: forecasts the other steps; it is on the pipeline's device. None: without a cache.
            schedule: for a predictor that was not trained for one.
            steps: of the run. Default: all.
        """

        def compared(batch: tuple[int, list[int]]) -> list[tuple[float, float]]:
            number, samples = batch
            made = self._latents(samples, steps or self.steps).numpy()
            wanted = load_file(self._file(number))["latents"].numpy()
            return [(psnr(*pair, PEAK), relative_error(*pair)) for pair in zip(made, wanted)]

        with contextlib.nullcontext() if predictor is None else enable_cache(self.pipe, predictor, schedule):
            pairs = [pair for batch in self.processes.each(self._batches, compared) for pair in batch]
        return {"psnr": [pair[0] for pair in pairs], "latent_error": [pair[1] for pair in pairs]}

    def _latents(self, samples: Sequence[int], steps: int) -> torch.Tensor:
        arguments = collate([self.inputs[sample] for sample in samples])
        generators = [torch.Generator("cpu").manual_seed(self.seed + sample) for sample in samples]
        with quiet_progress(self.pipe):
            made = run_pipeline(self.pipe, arguments, generators, steps)
        return (made[-1] if isinstance(made, list) else made).float().cpu()

    def _file(self, number: int) -> Path:
        return self.folder / f"latents-{number:05d}.safetensors"
