"""`record`: writes what the transformer computes, for training; `Trajectories` reads it again.

A trajectory folder holds

- `manifest.json`: what was recorded and how;
- `head.safetensors`: `weight` `[O, D]` and, if there is one, `bias` `[O]` of the output projection;
- `sample-00000.safetensors`, one per input: `features` `[S, T, D]`, `latents` `[S, T, O]`, `scale` and `shift` `[S, D]`
  in the model's dtype, `sigmas` `[S]` float32 and `token_index` `[T]` int64, over S computed steps and T kept tokens.
  Where the transformer is called more than once a step, as for true classifier-free guidance, the further streams of
  calls are `sample-00000-<stream>.safetensors`.
"""

import json
import os
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from lesa.artifacts import digest, fingerprint, predictor_identity, whole_file
from lesa.cache import observed
from lesa.cache.run import Call, Run
from lesa.inputs import batches_of, check_inputs, collate
from lesa.models import adapter_for
from lesa.pipelines import quiet_progress
from lesa.training.trajectories import (
    FORMAT_VERSION,
    HEAD,
    MANIFEST,
    Trajectories,
    read_manifest,
    sample_file,
    sample_files,
)
from lesa_kernels import FusedKANPredictor, OutputHead
from lesa_kernels.checks import Said, argument_error, check_int


def record(
    pipe,
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

    All steps are computed, unless a predictor is given. Then it predicts the steps that its schedule leaves out, and
    the others are recorded along the way on which it leads the sample: a roll-out, which is what `refine` learns from.

    Called again after an interruption, it keeps the samples that are there and records the others. Sample i is drawn
    with `torch.Generator("cpu").manual_seed(seed + i)`, whatever its batch.

    Args:
        pipe: a diffusers pipeline of a supported family.
        inputs: prompts, or dicts of pipeline arguments whose tensors have a leading dimension of 1.
        out_dir: folder to write to; made if missing.
        num_inference_steps: passed to the pipeline.
        tokens_per_sample: how many image tokens of each sample to keep, a random subset that is fixed along the
            trajectory and drawn with `seed + i`. Predictor and head work token by token, so a subset is enough for
            training and saves disk. None: all.
        seed: of the first sample.
        batch_size: how many samples share a call of the pipeline. Inputs that can't, such as two sizes of images, never
            do.
        progress: whether to show a progress bar over the samples.
        predictor: whose roll-outs to record; None for plain runs.

    Returns:
        The recording.

    Raises:
        TypeError: `pipe` is of no supported family, its output projection is no plain `nn.Linear`, or an argument has
            another type.
        ValueError: an argument is out of range, an input carries an argument that is not its own to choose, or
            `out_dir` holds something else than this recording or its beginning; the message names what differs.
        RuntimeError: features are not finite, a step was missed, or a cache is on for the transformer.
        Of the predictor, what `lesa.enable_cache` raises.
    """
    inputs = check_inputs(inputs)
    check_int("batch_size", batch_size)
    if tokens_per_sample is not None:
        check_int("tokens_per_sample", tokens_per_sample)
    adapter = adapter_for(pipe)
    if type(adapter.projection) is not torch.nn.Linear:
        kind = type(adapter.projection)
        raise argument_error(
            "pipe",
            "have a plain nn.Linear as output projection to be recorded",
            Said(f"a {kind.__module__}.{kind.__qualname__}"),
            "Fuse or unload the adapters on it, or load the model with this layer not quantised.",
            TypeError,
        )
    planned = {
        "format_version": FORMAT_VERSION,
        "family": adapter.family,
        "pipeline": type(pipe).__name__,
        "feature_dim": adapter.feature_dim,
        "requested_num_inference_steps": check_int("num_inference_steps", num_inference_steps),
        "seed": check_int("seed", seed, minimum=0),
        "tokens_per_sample": tokens_per_sample,
        "samples": len(inputs),
        "inputs_digest": digest(inputs),
        "transformer": fingerprint(adapter.transformer),
        "predictor": None if predictor is None else predictor_identity(predictor),
    }
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    recorded = read_manifest(folder)
    if recorded is not None:
        _check_same(folder, recorded, planned)
    elif sample_files(folder):
        got = Said(f"{folder} with samples and no {MANIFEST}")
        raise argument_error("out_dir", "be empty or hold a recording", got, "Record into another folder.")

    missing = {number for number in range(len(inputs)) if not sample_file(folder, number).exists()}
    if not missing:
        return Trajectories(folder)
    recorder = Recorder(pipe, adapter, tokens_per_sample, seed)
    with observed(pipe, recorder, predictor):
        finished = len(inputs) - len(missing)
        bar = tqdm(total=len(inputs), initial=finished, desc="record", unit="sample", disable=not progress)
        with quiet_progress(pipe), bar:
            for numbers in batches_of(inputs, batch_size):
                if missing.isdisjoint(numbers):
                    continue
                recorder.begin(numbers)
                pipe(
                    **collate([inputs[number] for number in numbers]),
                    generator=[torch.Generator("cpu").manual_seed(seed + number) for number in numbers],
                    num_inference_steps=num_inference_steps,
                    output_type="latent",
                )
                recorder.check_complete()
                _begin(folder, {**planned, **recorder.facts()}, recorder.head)
                for position, number in enumerate(numbers):
                    if number in missing:
                        _save_sample(folder, number, recorder.trajectories_of(position))
                        bar.update()
    return Trajectories(folder)


@dataclass
class _Stream:
    """What one stream of calls leaves of a batch, on the CPU."""

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
        tokens_per_sample, seed: as of `record`.
    """

    def __init__(self, pipe, adapter, tokens_per_sample: int | None, seed: int):
        self.pipe, self.adapter = pipe, adapter
        self.tokens_per_sample, self.seed = tokens_per_sample, seed

    def begin(self, numbers: list[int]) -> None:
        """Prepares for a call of the pipeline on the samples `numbers`."""
        self.numbers = numbers
        self.sigmas: list[float] = []
        self.computed: Set[int] = frozenset()
        self.streams: dict[str, _Stream] = {}
        self.head: OutputHead | None = None

    def on_run(self, run: Run, computed: Set[int]) -> None:
        """Called at the first step of a run, of which the steps `computed` are to be recorded."""
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

    def facts(self) -> dict:
        """The part of the manifest that only running tells."""
        stream = next(iter(self.streams.values()))
        return {
            "num_inference_steps": len(self.sigmas),
            "dtype": str(stream.features.dtype).removeprefix("torch."),
            "head_eps": self.head.eps,
        }

    def trajectories_of(self, position: int) -> dict[str, dict]:
        """By stream, the tensors to write for one sample of the batch: of the steps that were computed."""
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

    def _keep_rows(self, name, step, features, latents, scale, shift) -> None:
        stream = self.streams.get(name)
        if stream is None:
            stream = self.streams[name] = self._new_stream(features, latents, scale)
        index = stream.token_index.to(features.device)[:, :, None]
        stream.features[:, step] = features.gather(1, index.expand(-1, -1, features.shape[2]))
        stream.latents[:, step] = latents.gather(1, index.expand(-1, -1, latents.shape[2]))
        stream.scale[:, step] = scale
        stream.shift[:, step] = shift
        stream.steps.add(step)

    def _new_stream(self, features, latents, scale) -> _Stream:
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
    if kept == tokens:
        return torch.arange(tokens)
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:kept].sort().values


def _save_sample(folder: Path, number: int, streams: dict[str, dict]) -> None:
    """Writes the streams of one sample; the first one last, for its file says that the sample is complete."""
    first, *others = streams
    path = sample_file(folder, number)
    for name in others:
        _write_tensors(path.with_stem(f"{path.stem}-{name}"), streams[name])
    _write_tensors(path, streams[first])


def _begin(folder: Path, manifest: dict, head: OutputHead) -> None:
    """Writes head and manifest, or checks that the recording's beginning has the same manifest."""
    recorded = read_manifest(folder)
    if recorded is not None:
        _check_same(folder, recorded, manifest)
        return
    tensors = {"weight": head.weight, "bias": head.bias}
    _write_tensors(folder / HEAD, {name: t.detach().cpu() for name, t in tensors.items() if t is not None})
    with whole_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")


def _check_same(folder: Path, recorded: dict, manifest: dict) -> None:
    for name, value in manifest.items():
        if recorded.get(name) != value:
            raise argument_error(
                name,
                f"be {recorded.get(name)!r}, as in the recording that {folder} holds",
                value,
                "Continue with the same arguments and model, or record into another folder.",
            )


def _write_tensors(path: Path, tensors: dict) -> None:
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
