"""What plain runs of a pipeline gave: the latents after every step, which accelerated runs are compared with."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lesa.artifacts import check_same_settings, digest, fingerprint, read_json, remove_partial, write_text
from lesa.conditions import conditions_of
from lesa.inputs import can_share_a_call, collate
from lesa.models import adapter_for
from lesa.pipelines import quiet_progress, run_pipeline
from lesa.processes import Processes
from lesa.training.differentiable_runs import frozen
from lesa.training.gradient_checks import models_of
from lesa.training.shards import save_tensors
from lesa_kernels.checks import Said, argument_error

MANIFEST_NAME = "references.json"


def calls_of(inputs: Sequence[dict], samples: Sequence[int], samples_per_call: int) -> list[list[int]]:
    """Divides samples into calls of the pipeline: those whose arguments can share a call come together.

    Args:
        inputs: dicts of pipeline arguments.
        samples: numbers of some of them.
        samples_per_call: at most.
    """
    calls, left = [], [*samples]
    while left:
        alike = [sample for sample in left if can_share_a_call(inputs[left[0]], inputs[sample])]
        calls += [alike[start : start + samples_per_call] for start in range(0, len(alike), samples_per_call)]
        left = [sample for sample in left if sample not in alike]
    return calls


class References:
    """Plain runs of all steps, one file for each sample. They are made once, and kept in a folder.

    A folder may be used again with another `samples_per_call`, which changes the latents by rounding only.

    Args:
        pipe: the pipeline.
        inputs: dicts of pipeline arguments. Sample i starts from noise of seed `seed + i`.
        seed: of the first sample.
        num_inference_steps: passed to the pipeline.
        samples_per_call: inputs per call of the pipeline.
        folder: where the files are.
        with_images: whether the decoded images are kept too.

    Attributes:
        facts: of the pipeline, as the manifest of a recording has them.
    """

    def __init__(
        self,
        pipe: Any,
        inputs: list[dict],
        seed: int,
        num_inference_steps: int,
        samples_per_call: int,
        folder: Path,
        with_images: bool = False,
    ):
        self.pipe, self.inputs, self.seed, self.folder = pipe, inputs, seed, folder
        self.num_inference_steps, self.with_images = num_inference_steps, with_images
        self._batches = calls_of(inputs, range(len(inputs)), samples_per_call)
        adapter = adapter_for(pipe)
        self.facts = {
            "family": adapter.family,
            "pipeline": type(pipe).__name__,
            "transformer": fingerprint(adapter.transformer),
            **conditions_of(pipe),
        }

    def make(self, processes: Processes, bar: str | None = None, first_call: bool = False) -> None:
        """Runs all steps for those samples that are not in the folder yet, in eval mode. Processes share them.

        Args:
            processes: those that call this.
            bar: what the progress bar is called, or None for no bar.
            first_call: whether to make those of the first call of the pipeline only, so that `steps` is known.

        Raises:
            ValueError: the folder has runs of something else. The message names it.
            RuntimeError: latents are not finite. The message names sample and step.
        """
        processes.by_first(self._check_folder)
        done = sum(self._file(number).exists() for number in range(len(self.inputs)))
        shown = None if bar is None or not processes.is_first else bar
        self._shown = tqdm(
            total=len(self.inputs), initial=done, desc=shown, unit="sample", disable=shown is None, leave=not first_call
        )
        with self._shown, frozen(models_of(self.pipe)):
            processes.each(self._batches[:1], self._make)
            if not first_call:
                processes.each(self._batches[1:], self._make)

    def latents(self, samples: Sequence[int], step: int, device: torch.device) -> torch.Tensor:
        """The latents of some samples after a step, in float32 on a device."""
        return torch.stack([self._read(sample, "latents", lambda part: part[step]) for sample in samples]).to(
            device, torch.float32
        )

    def images(self, samples: Sequence[int], device: torch.device) -> torch.Tensor:
        """The decoded images or videos of some samples, in float32 on a device."""
        return torch.stack([self._read(sample, "images") for sample in samples]).to(device, torch.float32)

    @cached_property
    def steps(self) -> int:
        """How many steps a run executes."""
        return self._read(0, "latents", lambda part: part.get_shape()[0])  # without reading the latents

    @property
    def has_begun(self) -> bool:
        """Whether there is a run of the first sample."""
        return self._file(0).exists()

    def _check_folder(self) -> None:
        """Writes what the runs depend on into a new folder; raises `ValueError` if a folder has something else."""
        settings = {
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
            "images": self.with_images,
            **self.facts,
            "inputs_digest": digest(self.inputs),
        }
        file = self.folder / MANIFEST_NAME
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partial(file)
        kept, given = read_json(file), json.loads(json.dumps(settings))
        if kept is None:
            write_text(file, json.dumps(settings, indent=2) + "\n")
        else:
            check_same_settings(f"the references in {self.folder}", kept, given)

    def _make(self, samples: list[int]) -> None:
        """Runs all steps for some samples that share a call."""
        if all(self._file(sample).exists() for sample in samples):
            return
        latents: list[torch.Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            latents.append(tensors["latents"].detach().to("cpu", copy=True))
            return {}

        arguments = collate([self.inputs[sample] for sample in samples])
        generators = [torch.Generator("cpu").manual_seed(self.seed + sample) for sample in samples]
        output_type = "pt" if self.with_images else "latent"
        with quiet_progress(self.pipe):
            made = run_pipeline(self.pipe, arguments, generators, self.num_inference_steps, keep, output_type)
        for position, sample in enumerate(samples):
            steps = [each[position] for each in latents]
            bad = [step for step, each in enumerate(steps) if not each.isfinite().all()]
            if bad:
                got = Said(f"NaN or Inf in sample {sample} after step {bad[0]}")
                remedy = "Run the pipeline in bfloat16 or float32, and check the sample's input."
                raise argument_error("latents", "be finite", got, remedy, RuntimeError)
            if self._file(sample).exists():  # the call was interrupted, and is repeated for the others
                continue
            images = {"images": made[position].detach().cpu().contiguous()} if self.with_images else {}
            save_tensors(self._file(sample), {"latents": torch.stack(steps), **images}, {"sample": sample})
            self._shown.update()

    def _read(self, sample: int, name: str, of: Callable[[Any], Any] = lambda part: part[:]) -> Any:
        """What a function gives of a part of the file of a sample; by default the whole tensor."""
        path = self._file(sample)
        try:
            with safe_open(path, "pt") as file:
                return of(file.get_slice(name))
        except (SafetensorError, OSError) as error:
            got, remedy = Said(f"{error}"), "Delete it, and call again: it is made again."
            raise argument_error(f"{path}", "be a whole file of tensors", got, remedy) from None

    def _file(self, sample: int) -> Path:
        return self.folder / f"reference-{sample:05d}.safetensors"
