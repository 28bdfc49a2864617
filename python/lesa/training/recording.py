"""`record`: runs a pipeline and writes what its transformer computes, for training."""

import json
import os
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lesa.artifacts import check_same_settings, digest, fingerprint, predictor_identity, write_text
from lesa.cache import observed
from lesa.cache.run import Call, Run
from lesa.inputs import batches_of, check_inputs, collate
from lesa.models import adapter_for
from lesa.models.adapter import Adapter
from lesa.pipelines import quiet_progress
from lesa.training.trajectories import (
    FORMAT_VERSION,
    MANIFEST,
    Trajectories,
    is_recorded,
    read_manifest,
    sample_files,
    save_head,
    save_sample,
)
from lesa_kernels import FusedKANPredictor, OutputHead
from lesa_kernels.checks import Said, argument_error, check_int

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def record(
    pipe: "DiffusionPipeline",
    inputs: list[str] | list[dict],
    out_dir: str | os.PathLike,
    num_inference_steps: int = 50,
    tokens_per_sample: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool = True,
    predictor: FusedKANPredictor | None = None,
) -> Trajectories:
    """Runs `pipe` on `inputs` and writes the features, noise levels and head conditioning of every computed step.

    Without a predictor, all steps are computed. With a predictor, the steps that its schedule leaves out are predicted,
    and only the computed steps are recorded. Such a run is a roll-out: the computed steps see the sample that the
    forecasts lead to. `refine` learns from roll-outs.

    If it is called again after an interruption, it keeps the finished samples and records the others. Sample i is drawn
    with `torch.Generator("cpu").manual_seed(seed + i)` in any batch.

    Args:
        pipe: a diffusers pipeline of a supported family.
        inputs: prompts, or dicts of pipeline arguments whose tensors have a leading dimension of 1.
        out_dir: folder to write to; made if missing.
        num_inference_steps: passed to the pipeline.
        tokens_per_sample: how many image tokens of each sample to keep, a random subset that is the same in all steps
            and drawn with `seed + i`. Predictor and head process each token separately, so a subset is enough for
            training and saves disk space. None: all tokens.
        seed: seed of the first sample.
        batch_size: how many samples share a call of the pipeline. Inputs that cannot share a call, such as images of
            two sizes, get separate calls.
        progress: whether to show a progress bar over the samples.
        predictor: the predictor whose roll-outs are recorded; None for plain runs.

    Returns:
        The recording.

    Raises:
        TypeError: the family of `pipe` is not supported, its output projection is no plain `nn.Linear`, or an argument
            has another type.
        ValueError: an argument is out of range, an input has an argument that lesa sets itself, or `out_dir` contains
            something other than this recording or a part of it. The message names the difference.
        RuntimeError: features are not finite, a step was missed, or a cache is on for the transformer.
        For the predictor, see also `lesa.enable_cache`.
    """
    options = (num_inference_steps, tokens_per_sample, seed, batch_size, predictor)
    return Recording(pipe, check_inputs(inputs), *options).write(out_dir, "record" if progress else None)


@dataclass(frozen=True)
class Recording:
    """What to record, and with which settings; `write` does it.

    Args:
        pipe, num_inference_steps, tokens_per_sample, seed, batch_size, predictor: see `record`.
        inputs: dicts of pipeline arguments, from `check_inputs`.

    Raises:
        TypeError, ValueError: see `record`.
    """

    pipe: Any
    inputs: list[dict]
    num_inference_steps: int
    tokens_per_sample: int | None
    seed: int
    batch_size: int
    predictor: FusedKANPredictor | None = None

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size)
        if self.tokens_per_sample is not None:
            check_int("tokens_per_sample", self.tokens_per_sample)
        projection = adapter_for(self.pipe).projection
        if type(projection) is not torch.nn.Linear:
            kind = type(projection)
            raise argument_error(
                "pipe",
                "have a plain nn.Linear as output projection to be recorded",
                Said(f"a {kind.__module__}.{kind.__qualname__}"),
                "Fuse or unload the adapters on it, or load the model with this layer not quantised.",
                TypeError,
            )
        check_int("num_inference_steps", self.num_inference_steps)
        check_int("seed", self.seed, minimum=0)

    def write(self, out_dir: str | os.PathLike, bar: str | None) -> Trajectories:
        """Records the samples that are not in the folder yet.

        Args:
            out_dir: the folder; made if missing.
            bar: what the progress bar is called, or None for no bar.
        """
        planned, folder = self._manifest(), Path(out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        recorded = read_manifest(folder)
        if recorded is not None:
            check_same_settings(_work(folder), recorded, planned)
        elif sample_files(folder):
            got = Said(f"{folder} with samples and no {MANIFEST}")
            raise argument_error("out_dir", "be empty or hold a recording", got, "Record into another folder.")
        missing = {number for number in range(len(self.inputs)) if not is_recorded(folder, number)}
        if missing:
            self._record(folder, planned, missing, bar)
        return Trajectories(folder)

    def _manifest(self) -> dict[str, Any]:
        """The part of the manifest that is known before the pipeline runs."""
        adapter = adapter_for(self.pipe)
        return {
            "format_version": FORMAT_VERSION,
            "family": adapter.family,
            "pipeline": type(self.pipe).__name__,
            "feature_dim": adapter.feature_dim,
            "requested_num_inference_steps": int(self.num_inference_steps),
            "seed": int(self.seed),
            "tokens_per_sample": self.tokens_per_sample,
            "samples": len(self.inputs),
            "inputs_digest": digest(self.inputs),
            "transformer": fingerprint(adapter.transformer),
            "predictor": None if self.predictor is None else predictor_identity(self.predictor),
        }

    def _record(self, folder: Path, planned: dict[str, Any], missing: set[int], bar: str | None) -> None:
        """Runs the pipeline for the missing samples and writes them."""
        total = len(self.inputs)
        recorder = Recorder(self.pipe, adapter_for(self.pipe), self.tokens_per_sample, self.seed)
        finished = total - len(missing)
        with (
            observed(self.pipe, recorder, self.predictor),
            quiet_progress(self.pipe),
            tqdm(total=total, initial=finished, desc=bar, unit="sample", disable=bar is None) as shown,
        ):
            for numbers in batches_of(self.inputs, self.batch_size):
                wanted = missing.intersection(numbers)
                if not wanted:
                    continue
                recorder.begin(numbers, partial(_show, shown, finished, len(wanted)))
                self.pipe(
                    **collate([self.inputs[number] for number in numbers]),
                    generator=[torch.Generator("cpu").manual_seed(self.seed + number) for number in numbers],
                    num_inference_steps=self.num_inference_steps,
                    output_type="latent",
                )
                recorder.check_complete()
                _begin(folder, {**planned, **recorder.facts()}, recorder.head)
                for position, number in enumerate(numbers):
                    if number in wanted:
                        save_sample(folder, number, recorder.trajectories_of(position))
                _show(shown, finished, len(wanted), 1)
                finished += len(wanted)


def _show(bar: tqdm, finished: int, samples: int, share: float) -> None:
    """Moves the bar to the finished samples and a share of the samples in progress."""
    bar.n = finished + samples if share == 1 else round(finished + samples * share, 1)
    bar.update(0)


@dataclass
class _Stream:
    """What is kept of one stream of calls in a batch, on the CPU."""

    features: torch.Tensor  # [B, S, T, D]
    latents: torch.Tensor  # [B, S, T, O]
    scale: torch.Tensor  # [B, S, D]
    shift: torch.Tensor  # [B, S, D]
    token_index: torch.Tensor  # [B, T]
    steps: set[int] = field(default_factory=set)


class Recorder:
    """A `StepObserver` that keeps what enters the output head in the computed steps of one call of the pipeline.

    Args:
        pipe, adapter: whose head it is.
        tokens_per_sample, seed: see `record`.

    Attributes:
        head: the output head, as it was called last.
    """

    head: OutputHead

    def __init__(self, pipe: Any, adapter: Adapter, tokens_per_sample: int | None, seed: int):
        self.pipe, self.adapter = pipe, adapter
        self.tokens_per_sample, self.seed = tokens_per_sample, seed

    def begin(self, numbers: list[int], on_step: Callable[[float], None]) -> None:
        """Prepares for a call of the pipeline on the samples `numbers`.

        `on_step` is called after each computed step, with the share of the run that is done.
        """
        self.numbers, self.on_step = numbers, on_step
        self.sigmas: list[float] = []
        self.computed: Set[int] = frozenset()
        self.streams: dict[str, _Stream] = {}

    def on_run(self, run: Run, computed: Set[int]) -> None:
        """Called at the first step of a run. The steps `computed` of this run are to be recorded."""
        if any(stream.steps for stream in self.streams.values()):
            raise argument_error(
                "inputs",
                "make the pipeline go through its steps once",
                Said("a second run in one call, such as for the next section of a long video"),
                "Ask for a shorter video, of one section.",
                RuntimeError,
            )
        self.sigmas, self.computed = run.executed_sigmas, computed
        self.streams = {}

    def check_complete(self) -> None:
        """Raises `RuntimeError` unless every stream has all steps that were to be computed."""
        steps = self.computed
        seen = {name: stream.steps for name, stream in self.streams.items()} or {"any": set()}
        for name, had in seen.items():
            if had != steps or not had:
                raise argument_error(
                    "pipe",
                    "call its transformer once for each of its scheduler's steps",
                    Said(f"{len(had)} of {len(steps)} steps in the stream {name!r}"),
                    "Use a scheduler with one call per step, and let the pipeline run to its end.",
                    RuntimeError,
                )

    def facts(self) -> dict[str, Any]:
        """The part of the manifest that is known after a run."""
        stream = next(iter(self.streams.values()))
        return {
            "num_inference_steps": len(self.sigmas),
            "dtype": str(stream.features.dtype).removeprefix("torch."),
            "head_eps": self.head.eps,
        }

    def trajectories_of(self, position: int) -> dict[str, dict[str, torch.Tensor]]:
        """By stream, the tensors of one sample of the batch, over the steps that were computed."""
        recorded = {}
        for name, stream in self.streams.items():
            steps = sorted(stream.steps)
            recorded[name] = {
                "features": stream.features[position, steps],
                "latents": stream.latents[position, steps],
                "sigmas": torch.tensor(self.sigmas, dtype=torch.float32)[steps],
                "scale": stream.scale[position, steps],
                "shift": stream.shift[position, steps],
                "token_index": stream.token_index[position],
            }
        return recorded

    def keep(self, call: Call, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        """Keeps the inputs of the output head of a computed call."""
        bad = (~features.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        self.head = head = self.adapter.output_head(conditioning)
        step = call.step
        if bad:
            raise argument_error(
                "features",
                "be finite",
                Said(f"NaN or Inf in sample {self.numbers[bad[0] % len(self.numbers)]} at step {step}"),
                "Record in bfloat16 or float32, and check the sample's input.",
                RuntimeError,
            )
        halves = {call.stream: slice(None)}
        if len(features) == 2 * len(self.numbers) and getattr(self.pipe, "do_classifier_free_guidance", False):
            # Guidance in one batch: without the prompts, then with them. Each half is a stream of its own.
            middle = len(self.numbers)
            halves = {call.stream: slice(middle), f"{call.stream}-with-prompt": slice(middle, None)}
        latents = self.adapter.latents(call.arguments)
        for name, rows in halves.items():
            self._keep_rows(name, step, features[rows], latents[rows], head.scale[rows], head.shift[rows])
        self.on_step((step + 1) / len(self.sigmas))

    def _keep_rows(
        self,
        name: str,
        step: int,
        features: torch.Tensor,
        latents: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
    ) -> None:
        """Copies the chosen tokens of one stream at one step."""
        stream = self.streams.get(name)
        if stream is None:
            stream = self.streams[name] = self._new_stream(features, latents, scale)
        index = stream.token_index.to(features.device)[:, :, None]
        stream.features[:, step] = features.gather(1, index.expand(-1, -1, features.shape[2]))
        stream.latents[:, step] = latents.gather(1, index.expand(-1, -1, latents.shape[2]))
        stream.scale[:, step] = scale
        stream.shift[:, step] = shift
        stream.steps.add(step)

    def _new_stream(self, features: torch.Tensor, latents: torch.Tensor, scale: torch.Tensor) -> _Stream:
        batch, tokens, width = features.shape
        steps = len(self.sigmas)
        if batch != len(self.numbers):
            raise argument_error(
                "inputs",
                "make one sample each",
                Said(f"features of {batch} samples from {len(self.numbers)} inputs"),
                "Pass one prompt, and tensors with a leading dimension of 1, per input.",
            )
        kept = tokens if self.tokens_per_sample is None else self.tokens_per_sample
        if kept > tokens:
            raise argument_error(
                "tokens_per_sample",
                f"be at most the {tokens} image tokens of sample {self.numbers[0]}",
                kept,
                "Choose fewer, or None for all.",
            )
        return _Stream(
            torch.empty(batch, steps, kept, width, dtype=features.dtype),
            torch.empty(batch, steps, kept, latents.shape[2], dtype=latents.dtype),
            torch.empty(batch, steps, width, dtype=scale.dtype),
            torch.empty(batch, steps, width, dtype=scale.dtype),
            torch.stack([_choose_tokens(tokens, kept, self.seed + number) for number in self.numbers]),
        )


def _choose_tokens(tokens: int, kept: int, seed: int) -> torch.Tensor:
    """The numbers of the kept tokens, rising."""
    if kept == tokens:
        return torch.arange(tokens)
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:kept].sort().values


def _begin(folder: Path, manifest: dict[str, Any], head: OutputHead) -> None:
    """Writes head and manifest. If there is a manifest already, it must be the same."""
    recorded = read_manifest(folder)
    if recorded is None:
        save_head(folder, head.weight, head.bias)
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    else:
        check_same_settings(_work(folder), recorded, manifest)


def _work(folder: Path) -> str:
    return f"the recording that {folder} holds"
