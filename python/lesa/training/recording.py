"""`record`: runs a pipeline and writes what its transformer computes, for training."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lesa.artifacts import (
    CONTINUE,
    check_same_settings,
    digest,
    files_in,
    fingerprint,
    output_folder,
    predictor_identity,
    remove_stale_lock,
    write_text,
)
from lesa.cache import observed
from lesa.conditions import common_conditions, conditions_of, differing, of_transformer
from lesa.inputs import batches_of, check_inputs, collate
from lesa.models import adapter_for, adapters_for
from lesa.pipelines import quiet_progress, run_pipeline
from lesa.processes import Processes, processes_for
from lesa.training.recorder import Recorder
from lesa.training.shards import DamagedError, check_tensors, identity_of, sample_files, save_sample, survey
from lesa.training.trajectories import (
    FORMAT_VERSION,
    HEAD,
    LATER_FORMAT,
    MANIFEST,
    Recorded,
    Trajectories,
    read_head,
    read_manifest,
    save_heads,
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

    A stream of calls that the pipeline makes in a part of the steps only, such as guidance in an interval, is not
    recorded, with a warning. A predictor that is trained on the other streams forecasts that one too.

    If it is called again after an interruption, it keeps the finished samples and records the others. For that, it
    reads all files and compares the tensors with their digests. Damaged files are recorded again, with a warning that
    names them. Sample i is drawn with `torch.Generator("cpu")` and the seed `seed + i` in any batch.

    Where several processes were started together, as by `torchrun`, all must call this with the same arguments. They
    share the calls of the pipeline, and each of them returns the whole recording.

    Args:
        pipe: a diffusers pipeline of a supported family, modular or not.
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
        The recording. Its attribute `recorded` says which samples this call made.

    Raises:
        TypeError: the family of `pipe` is not supported, its output projection is no plain `nn.Linear`, `out_dir` is
            no path, or an argument has another type.
        ValueError: an argument is out of range, an input has an argument that lesa sets itself, or `out_dir` contains
            something other than this recording or a part of it. The message names the difference, such as
            `scheduler.shift`, or the file.
        RuntimeError: features are not finite, a step was missed, a cache is on for the transformer, or another process
            records into `out_dir`. The message names the process.
        OSError: a file cannot be written. The message names it.
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
        for kind in (type(adapter.projection) for adapter in adapters_for(self.pipe).values()):
            if kind is not torch.nn.Linear:
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
        processes, planned = processes_for(self.pipe), self._manifest()
        processes.begin("lesa.record", {**planned, "batch_size": self.batch_size})
        folder = processes.in_all(lambda: output_folder(out_dir, to_write=False))
        sound: set[Path] = set()

        def look() -> _Left:
            return processes.by_first(lambda: self._left_to_do(folder, planned, sound))

        left = look()
        if left.samples or not left.has_head:
            with processes.owned(folder, "recording"):
                left = look()  # another process may have recorded meanwhile
                if processes.is_first:
                    left.warn()
                _Work(self, processes, folder, planned, left.samples or {0}, bar).run()
        elif processes.is_first:
            remove_stale_lock(folder)
        trajectories = processes.in_all(lambda: Trajectories(folder))
        numbers = range(len(self.inputs))
        trajectories.recorded = Recorded(
            kept=tuple(number for number in numbers if number not in left.samples),
            new=tuple(number for number in numbers if number in left.samples - left.hurt),
            again=tuple(sorted(left.hurt)),
        )
        return trajectories

    def _left_to_do(self, folder: Path, planned: dict[str, Any], sound: set[Path]) -> "_Left":
        """Compares the folder with what is planned; raises `ValueError` if it holds something else.

        For `sound`, see `check_tensors`.
        """
        every = set(range(len(self.inputs)))
        recorded = read_manifest(folder)
        if recorded is None:
            _check_empty(folder)
            return _Left(every, set(), {}, False)
        _check_same(folder, recorded, planned)
        outputs = self._projection.out_features
        found = survey(folder, recorded, outputs)
        check_tensors(found, sound)
        damaged = {**found.damaged, **_why_no_head(folder, recorded)}
        folders = [path for path in damaged if path.is_dir()]
        if folders:
            got = Said("a folder")
            raise argument_error(f"{folders[0]}", "be a file of the recording", got, "Move it away.")
        return _Left(every - {*found.whole}, found.hurt, damaged, folder / HEAD not in damaged)

    @property
    def _projection(self) -> Any:
        return adapter_for(self.pipe).projection

    def _manifest(self) -> dict[str, Any]:
        """The part of the manifest that is known before the pipeline runs."""
        adapter = adapter_for(self.pipe)
        norms = [each.head_form.norm_kind for each in adapters_for(self.pipe).values()]
        names = sorted({name for item in self.inputs for name in item})
        return {
            "format_version": FORMAT_VERSION if norms == ["layer"] else LATER_FORMAT,
            "family": adapter.family,
            "pipeline": type(self.pipe).__name__,
            "feature_dim": adapter.feature_dim,
            "requested_num_inference_steps": int(self.num_inference_steps),
            "seed": int(self.seed),
            "tokens_per_sample": self.tokens_per_sample,
            "samples": len(self.inputs),
            "inputs_digest": digest(self.inputs),
            "arguments": {name: digest([item.get(name) for item in self.inputs]) for name in names},
            "transformer": fingerprint(adapter.transformer),
            **conditions_of(self.pipe),
            "predictor": None if self.predictor is None else predictor_identity(self.predictor),
        }


class _Work:
    """Runs the pipeline for the missing samples of a folder, and writes them.

    Args:
        recording: what to record.
        processes: those that share the samples.
        folder: of the recording.
        planned: the part of the manifest that is known before the pipeline runs.
        missing: the numbers of the samples.
        bar: what the progress bar is called, or None for no bar.
    """

    def __init__(
        self,
        recording: Recording,
        processes: Processes,
        folder: Path,
        planned: dict[str, Any],
        missing: set[int],
        bar: str | None,
    ):
        self.recording, self.processes, self.folder, self.planned = recording, processes, folder, planned
        pipe, seed = recording.pipe, recording.seed
        self.recorder = Recorder(pipe, adapters_for(pipe), recording.tokens_per_sample, seed)
        self.missing, self.bar = missing, bar if processes.is_first else None
        self.batches = [
            numbers for numbers in batches_of(recording.inputs, recording.batch_size) if missing.intersection(numbers)
        ]
        self.finished = len(recording.inputs) - len(missing)
        self.rounds = 0

    def run(self) -> None:
        """Records the batches that are this process's share. The first process writes heads and manifest."""
        processes, recorder, total = self.processes, self.recorder, len(self.recording.inputs)
        with (
            observed(self.recording.pipe, recorder, self.recording.predictor) as self.stats,
            quiet_progress(self.recording.pipe),
            tqdm(total=total, initial=self.finished, desc=self.bar, unit="sample", disable=self.bar is None) as bar,
        ):
            self.shown = bar
            processes.each(self.batches[: processes.width], self._run)  # only now are all facts known
            self.manifest = processes.by_first(lambda: _begin(self.folder, self._facts(), recorder.heads))
            processes.each(self.batches, self._finish)
        every = processes.together([recorder.left_out])
        for name, why in {name: why for left_out in every for name, why in left_out.items()}.items():
            if processes.is_first:
                warnings.warn(f"lesa: the stream {name!r} is not recorded, because {why}.", stacklevel=4)

    def _facts(self) -> dict[str, Any]:
        return {**self.planned, **self.recorder.facts()}

    def _run(self, numbers: list[int]) -> None:
        """Runs the pipeline on a batch. What the recorder keeps of it can be written then."""
        recording = self.recording
        self.recorder.begin(numbers, self._show)
        arguments = collate([recording.inputs[number] for number in numbers])
        generators = [torch.Generator("cpu").manual_seed(recording.seed + number) for number in numbers]
        run_pipeline(recording.pipe, arguments, generators, recording.num_inference_steps)
        self.recorder.check_complete(self.stats)

    def _finish(self, numbers: list[int]) -> None:
        """Writes a batch, which is run before that if the recorder does not have it."""
        if self.recorder.numbers != numbers:
            self._run(numbers)
        _check_same(self.folder, self.manifest, self._facts())
        if self.processes.is_divided or self.processes.is_first:
            for position, number in enumerate(numbers):
                if number in self.missing:
                    streams = self.recorder.trajectories_of(position)
                    save_sample(self.folder, number, streams, identity_of(self.manifest))
        self._show(1)
        self.finished += self._in_progress
        self.rounds += 1

    @property
    def _in_progress(self) -> int:
        """How many samples all processes work on, as long as they are equally fast."""
        first = self.rounds * self.processes.width
        batches = self.batches[first : first + self.processes.width]
        return sum(len(self.missing.intersection(numbers)) for numbers in batches)

    def _show(self, share: float) -> None:
        """Moves the bar to the finished samples and a share of the samples in progress."""
        samples = self.finished + self._in_progress * share
        self.shown.n = round(samples) if share == 1 else round(samples, 1)
        self.shown.update(0)


@dataclass(frozen=True)
class _Left:
    """What is left to do in a folder.

    Args:
        samples: the numbers of the samples to record.
        hurt: those of them that are there and damaged.
        damaged: by path, what is wrong with a file.
        has_head: whether there is a head that is not damaged.
    """

    samples: set[int]
    hurt: set[int]
    damaged: dict[Path, str]
    has_head: bool

    def warn(self) -> None:
        """Names the damaged files."""
        for path, why in self.damaged.items():
            warnings.warn(f"lesa: {path} {why}. It is recorded again.", stacklevel=4)


def _check_empty(folder: Path) -> None:
    """Raises `ValueError` if a folder without a manifest holds more than an interruption before it leaves."""
    remnants = {HEAD, f"{HEAD}.tmp", f"{MANIFEST}.tmp"}
    others = [path.name for path in files_in(folder) if path.name not in remnants]
    if others:
        got, remedy = f"{folder} with {others[0]}", "Choose another folder."
        if sample_files(folder):
            got = f"{folder} with samples and no {MANIFEST}"
            remedy = f"Restore the {MANIFEST}, or record into another folder."
        raise argument_error("out_dir", "be empty or hold a recording", Said(got), remedy)


def _begin(folder: Path, manifest: dict[str, Any], heads: Mapping[str, OutputHead]) -> dict[str, Any]:
    """Writes heads and manifest. If there is a manifest already, it must be the same. Returns the one of the folder."""
    recorded = read_manifest(folder)
    if recorded is not None:
        _check_same(folder, recorded, manifest)
    kept = recorded or {name: value for name, value in manifest.items() if name != "unset"}
    if recorded is None or _why_no_head(folder, recorded):
        save_heads(folder, heads, kept)
    if recorded is None:
        write_text(folder / MANIFEST, json.dumps(kept, indent=2) + "\n")
    return kept


def _why_no_head(folder: Path, manifest: Mapping[str, Any]) -> dict[Path, str]:
    """What is wrong with the file of the head, by its path; empty if nothing is."""
    try:
        read_head(folder, manifest)
    except DamagedError as error:
        return {error.path: error.why}
    return {}


def check_same_conditions(trajectories: Trajectories, pipe: Any) -> None:
    """Raises `ValueError` unless the pipeline is as it was when the trajectories were recorded.

    The message names what differs, such as `scheduler.shift`. What the manifest does not say is not checked.
    """
    given = {"transformer": fingerprint(adapter_for(pipe).transformer), **conditions_of(pipe)}
    _check_same(trajectories.folder, trajectories.manifest, given)


def _check_same(folder: Path, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the recording in the folder was made with the settings that are given."""
    work = f"the recording that {folder} holds"
    known = common_conditions(recorded, given)
    arguments = known.pop("arguments", {})
    for name in sorted(known, key=lambda name: name == "inputs_digest"):  # last: they are cast to the model's dtype
        value, before = known[name], recorded[name]
        if name == "inputs_digest" and value != before:
            names = differing(recorded.get("arguments", arguments), arguments)
            said = f"The inputs differ in {', '.join(map(repr, names))}. " if names else ""
            raise argument_error(name, f"be {before!r}, as in {work}", value, f"{said}{CONTINUE}")
        if name == "transformer" and value != before:
            then, now = (of_transformer(conditions) for conditions in (recorded, known))
            for aspect in differing(then, now)[:1]:  # a fingerprint alone would not say what differs
                got = Said(f"another one: `{aspect}` was {then.get(aspect)!r} and is {now.get(aspect)!r}")
                raise argument_error(name, f"be as in {work}", got, CONTINUE)
        check_same_settings(work, {name: before}, {name: value})
