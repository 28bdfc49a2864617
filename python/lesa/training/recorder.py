"""What watches a run of the pipeline, and keeps what enters the output head."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lesa.cache.run import Call, Run
from lesa.cache.stats import CacheStats
from lesa.models.adapter import Adapter
from lesa.training.host_copies import HostCopies
from lesa.training.trajectories import NORMS
from lesa_kernels import OutputHead
from lesa_kernels.checks import Said, argument_error, usage_error


@dataclass
class _Stream:
    """What is kept of one stream of calls of a transformer in a batch, on the CPU."""

    transformer: str
    features: torch.Tensor  # [B, S, T, D]
    latents: torch.Tensor  # [B, S, T, O]
    scale: torch.Tensor  # [B, S, D]
    shift: torch.Tensor  # [B, S, D]
    token_index: torch.Tensor  # [B, T]
    called: str  # the stream of calls that it is, or is a half of
    steps: set[int] = field(default_factory=set)  # those that were kept, whose tensors may still be on their way
    indices: dict[torch.device, torch.Tensor] = field(default_factory=dict)  # token_index, by device

    def chooses_from(self, values: torch.Tensor) -> bool:
        """Whether only some of the tokens of values `[B, T, C]` are kept."""
        return self.token_index.shape[1] != values.shape[1]

    def chosen(self, values: torch.Tensor) -> torch.Tensor:
        """The chosen tokens of values `[B, T, C]`. They are chosen on the device, so that only they are copied."""
        if not self.chooses_from(values):
            return values
        if values.device not in self.indices:
            self.indices[values.device] = self.token_index.to(values.device)
        return values.gather(1, self.indices[values.device][:, :, None].expand(-1, -1, values.shape[2]))

    def store(self, step: int, tensors: Sequence[torch.Tensor]) -> None:
        """Stores features, latents, scale and shift of a step."""
        for storage, values in zip((self.features, self.latents, self.scale, self.shift), tensors):
            storage[:, step] = values


class Recorder:
    """A `StepObserver` that keeps what enters the output head in the computed steps of one call of the pipeline.

    Args:
        pipe: the pipeline.
        adapters: of its transformers, by the names of the components.
        tokens_per_sample, seed: see `record`.

    Attributes:
        heads: the output heads, as the latest run called them first, by transformer, in the order of their first calls.
        left_out: why streams of calls are not recorded, by name.
    """

    def __init__(self, pipe: Any, adapters: Mapping[str, Adapter], tokens_per_sample: int | None, seed: int):
        self.pipe, self.adapters = pipe, adapters
        self.heads: dict[str, OutputHead] = {}
        self.tokens_per_sample, self.seed = tokens_per_sample, seed
        self.left_out: dict[str, str] = {}
        self._copies = HostCopies()

    def begin(self, numbers: list[int], on_step: Callable[[float], None]) -> None:
        """Prepares for a call of the pipeline on the samples `numbers`.

        `on_step` is called after each computed step, with the share of the run that is done.
        """
        self.numbers, self.on_step = numbers, on_step
        self.sigmas: list[float] = []
        self._rows: dict[str, int] = {}  # by stream of calls, the batch of its calls
        self._has_head: set[str] = set()  # the transformers whose heads this run has called
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
        self.streams, self._rows, self._has_head = {}, {}, set()

    def check_complete(self, stats: CacheStats | None) -> None:
        """Leaves out the streams that were called in a part of the run only, such as guidance in an interval.

        Of a pipeline with two transformers, a stream is whole if it was called in each step in which any stream of its
        transformer was.

        Args:
            stats: of the cache that predicts the other steps; None without one.

        Raises:
            RuntimeError: no stream is whole, or a whole one lacks a step that was to be computed.
        """
        calls, every = self._calls(stats), {*range(len(self.sigmas))}
        of_one: dict[str, set[int]] = {}
        for stream in self.streams.values():
            of_one.setdefault(stream.transformer, set()).update(calls[stream.called])
        if len(of_one) < 2 or set().union(*of_one.values()) != every:
            of_one = dict.fromkeys(self.adapters, every)
        whole = [name for name, stream in self.streams.items() if calls[stream.called] == of_one[stream.transformer]]
        seen = {
            name: (stream.steps, self.computed & of_one[stream.transformer]) for name, stream in self.streams.items()
        }
        for name, (had, steps) in (seen or {"any": (set(), self.computed)}).items():
            if (name in whole or not whole) and (had != steps or not had):
                raise argument_error(
                    "pipe",
                    "call its transformer once for each of its scheduler's steps",
                    Said(f"{len(had)} of {len(steps)} steps in the stream {name!r}"),
                    "Use a scheduler with one call per step, and let the pipeline run to its end.",
                    RuntimeError,
                )
        for name in [name for name in self.streams if name not in whole]:
            count = len(calls[self.streams.pop(name).called])
            self.left_out.setdefault(name, f"it is called in {count} of the {len(self.sigmas)} steps")

    def _calls(self, stats: CacheStats | None) -> dict[str, set[int]]:
        """By stream of calls, the steps in which the transformer was called."""
        if stats is None:
            return {stream.called: stream.steps for stream in self.streams.values()}
        return {name: {*stream.computed, *stream.predicted} for name, stream in stats.streams.items()}

    def facts(self) -> dict[str, Any]:
        """The part of the manifest that is known after a run."""
        stream, head = next(iter(self.streams.values())), next(iter(self.heads.values()))
        facts = {
            "num_inference_steps": len(self.sigmas),
            "dtype": str(stream.features.dtype).removeprefix("torch."),
            "head_eps": head.eps,
        }
        if head.norm != "layer":
            facts["head_norm"] = next(name for name, norm in NORMS.items() if norm == head.norm)
        return facts | ({"transformers": [*self.heads]} if len(self.heads) > 1 else {})

    def trajectories(self) -> Callable[[int], dict[str, dict[str, torch.Tensor]]]:
        """What gives the tensors of a sample by its position in the batch, by stream, over the steps that were kept.

        It may be called when the next batch has begun, also in another thread.
        """
        return partial(_trajectories_of, self.streams, self.sigmas)

    def keep(self, call: Call, features: torch.Tensor, conditioning: torch.Tensor) -> None:
        """Keeps the inputs of the output head of a computed call."""
        adapter = self.adapters[call.transformer]
        head = adapter.output_head(conditioning)
        if call.transformer not in self._has_head:
            self.heads[call.transformer] = _copied(head)
            self._has_head.add(call.transformer)
        if head.scale.ndim != 2:
            sentence = "`inputs` make the model modulate each token in its own way, which a recording cannot store."
            raise usage_error(
                sentence, "If they give images or frames, leave these out. Else use a forecaster without training."
            )
        self._check_rows(call, len(features))
        halves = {call.stream: slice(None)}
        if len(features) == 2 * len(self.numbers) and _is_guided(self.pipe):
            # Guidance in one batch: without the prompts, then with them. Each half is a stream of its own.
            first, second = slice(len(self.numbers)), slice(len(self.numbers), None)
            without, with_prompts = (second, first) if adapter.prompts_first else (first, second)
            halves = {call.stream: without, f"{call.stream}-with-prompt": with_prompts}
        latents = adapter.latents(call.arguments)
        shift = torch.zeros_like(head.scale) if head.shift is None else head.shift  # a head without one adds nothing
        streams, tensors, fresh = [], [features.abs().flatten(1).amax(1).isfinite()], {0}
        for name, rows in halves.items():
            stream = self.streams.get(name)
            if stream is None:
                stream = self.streams[name] = self._new_stream(call, features[rows], latents[rows], head.scale)
            if stream.chooses_from(features):
                fresh |= {len(tensors), len(tensors) + 1}
            tensors += [stream.chosen(features[rows]), stream.chosen(latents[rows]), head.scale[rows], shift[rows]]
            streams.append(stream)
            stream.steps.add(call.step)
        self._copies.give(tensors, partial(self._store, call.step, streams), fresh)
        self.on_step((call.step + 1) / len(self.sigmas))

    def finish(self) -> None:
        """Waits for what is on its way from the device. Call it before what was kept is used.

        Raises:
            RuntimeError: features are not finite. The message names sample and step.
        """
        self._copies.finish()

    def _store(self, step: int, streams: Sequence[_Stream], tensors: Sequence[torch.Tensor]) -> None:
        """Stores what one call gave: whether the features of each row are finite, and four tensors of each stream."""
        are_finite, *kept = tensors
        bad = (~are_finite).nonzero().flatten().tolist()
        if bad:
            raise argument_error(
                "features",
                "be finite",
                Said(f"NaN or Inf in sample {self.numbers[bad[0] % len(self.numbers)]} at step {step}"),
                "Record in bfloat16 or float32, and check the sample's input.",
                RuntimeError,
            )
        for position, stream in enumerate(streams):
            stream.store(step, kept[4 * position : 4 * position + 4])

    def _check_rows(self, call: Call, rows: int) -> None:
        """Raises `ValueError` if the batch of a stream changes in a run: its halves would not be told apart."""
        if self._rows.setdefault(call.stream, rows) != rows:
            before = self._rows[call.stream]
            raise argument_error(
                "inputs",
                "keep the batch of the transformer the same in a run",
                Said(f"{rows} instead of {before} rows at step {call.step}, as if guidance had begun or ended"),
                "Leave guidance on in the whole run.",
            )

    def _new_stream(self, call: Call, features: torch.Tensor, latents: torch.Tensor, scale: torch.Tensor) -> _Stream:
        batch, tokens, width = features.shape
        steps = len(self.sigmas)
        if batch != len(self.numbers):
            if getattr(self.pipe, "do_perturbed_attention_guidance", False):
                sentence = "`pipe` has perturbed-attention guidance (PAG) on, whose passes `lesa.record` cannot store."
                raise usage_error(sentence, "Pass 0 as `pag_scale` in each input.")
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
        with torch.inference_mode(False):  # they are written to after the pipeline's call, which may be in that mode
            return _Stream(
                call.transformer,
                torch.empty(batch, steps, kept, width, dtype=features.dtype, device="cpu"),
                torch.empty(batch, steps, kept, latents.shape[2], dtype=latents.dtype, device="cpu"),
                torch.empty(batch, steps, width, dtype=scale.dtype, device="cpu"),
                torch.empty(batch, steps, width, dtype=scale.dtype, device="cpu"),
                torch.stack([_choose_tokens(tokens, kept, self.seed + number) for number in self.numbers]),
                call.stream,
            )


def _trajectories_of(
    streams: Mapping[str, _Stream], sigmas: list[float], position: int
) -> dict[str, dict[str, torch.Tensor]]:
    """By stream, the tensors of one sample of a batch. If all steps were kept, they share memory with the batch."""
    recorded = {}
    for name, stream in streams.items():
        steps: Any = slice(None) if len(stream.steps) == len(sigmas) else sorted(stream.steps)
        recorded[name] = {
            "features": stream.features[position, steps],
            "latents": stream.latents[position, steps],
            "sigmas": torch.tensor(sigmas, dtype=torch.float32, device="cpu")[steps],
            "scale": stream.scale[position, steps],
            "shift": stream.shift[position, steps],
            "token_index": stream.token_index[position],
        }
    return recorded


def _copied(head: OutputHead) -> OutputHead:
    """The head with weights of its own: sharded ones are freed after a call."""
    return replace(head, weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())


def _is_guided(pipe: Any) -> bool:
    """Whether classifier-free guidance is on. Pipelines of CogVideoX only tell its scale."""
    told = getattr(pipe, "do_classifier_free_guidance", None)
    return (getattr(pipe, "guidance_scale", None) or 1) > 1 if told is None else bool(told)


def _choose_tokens(tokens: int, kept: int, seed: int) -> torch.Tensor:
    """The numbers of the kept tokens, rising."""
    if kept == tokens:
        return torch.arange(tokens, device="cpu")
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed), device="cpu")[:kept].sort().values
