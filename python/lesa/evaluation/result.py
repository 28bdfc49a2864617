"""What an evaluation measured."""

import csv
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lesa.artifacts import digest, whole_file, write_text
from lesa.contenders import Ours, Peer, Reference, kind_of
from lesa.contenders.base import Count
from lesa.evaluation.budgets import ours_among
from lesa.evaluation.moving import moving_pictures, save_gif, save_mp4
from lesa.evaluation.picture import draw_comparison
from lesa.evaluation.quality import LEARNED, paired_lead, signed
from lesa.evaluation.shown import GIF
from lesa_kernels.checks import check_choice

FORMAT_VERSION = 1
"""Of `summary.json`."""

COUNTED = "attention of every block"
"""What decides whether a block ran."""

TABLE_WIDTH = 120

_SCALARS = (
    "num_inference_steps", "whole_steps", "step_equivalents", "block_passes", "seconds", "denoise_seconds", "speedup",
    "peak_memory_bytes", "psnr", "ssim", "latent_error", "latent_psnr", "frame_psnr", "temporal_psnr", *LEARNED,
)  # fmt: skip


@dataclass(frozen=True)
class EvaluatedRun:
    """One contender's figures. Qualities are means over samples, against the reference run.

    A block counts as run in a call of the transformer if its attention was computed. A hook in the block sees that.
    Most caches skip whole blocks. TaylorSeer's full mode predicts attentions only: the rest of every block runs in
    every step, and `block_passes` counts it too. A step has one call of the transformer for each stream; true
    classifier-free guidance has two streams. Figures are means over the streams, and over the calls of the pipeline.

    Args:
        name: "reference", "newton-N", "dense-N", "fewer-steps-N", with N the whole steps, or of a peer's setting. Where
            several runs of an evaluation share it, `@` and the last part of `predictor` follow, as "newton-9@mine".
        steps: the steps of the first call of the pipeline in which every block ran.
        num_inference_steps: steps of the run.
        whole_steps: number of steps in which every block ran.
        step_equivalents: how often a block ran, divided by the number of blocks.
        seconds: wall clock of the pipeline calls with decoding, after a warm-up; where several processes share the
            calls, of all calls, added up.
        speedup: `reference_seconds` over `seconds`.
        psnr: of the decoded images in [0, 1], or of whole videos, in dB; infinite if any of them equals the
            reference's, NaN if any is NaN.
        ssim: structural similarity of the decoded images.
        latent_psnr: of the latents for a peak of 2, in dB. The latents of the bundled digits are the pixels before they
            are clipped to [-1, 1].
        contender: `name` of its kind in `lesa.contenders`: "reference", "newton", "dense", "steps", or a peer's.
        setting: in words.
        block_passes: like `step_equivalents`, but a block whose attention alone was skipped counts as run.
        denoise_seconds: from the first call of the transformer on, without decoding.
        peak_memory_bytes: the most that was allocated on a CUDA device, or None. For every contender it includes the
            latents of every step, which are kept for `step_errors`.
        latent_error: L2 norm of the final latents' difference over the norm of the reference's.
        lpips, clip_score, image_reward: None where their weights are not on the machine.
        frame_psnr: of videos, the mean over the frames of the PSNR of each frame, in dB; a frame counts at most 100.
            None for images.
        temporal_psnr: of videos, the PSNR of the differences between neighbouring frames, for a peak of 2, in dB; see
            docs/glossary.md. None for images.
        per_sample: lists of "psnr", "ssim" and "latent_error"; of videos "frame_psnr" and "temporal_psnr" too.
        step_errors: like `latent_error`, after each step, over the first 16 samples; None if the run has other steps.
        predictor: where it came from: its folder, its hub id, or the name under which it was passed. Of one that was
            passed without a name, the first digits of its digest. None for other contenders, and if it is not known.
        reference_seconds: those of the reference in the same call of `evaluate`, to which `speedup` refers. None if
            that is not known.
    """

    name: str
    steps: tuple[int, ...]
    num_inference_steps: int
    whole_steps: float
    step_equivalents: float
    seconds: float
    speedup: float
    psnr: float
    ssim: float
    latent_psnr: float
    contender: str
    setting: str = ""
    block_passes: float = math.nan
    denoise_seconds: float = math.nan
    peak_memory_bytes: int | None = None
    latent_error: float = math.nan
    lpips: float | None = None
    clip_score: float | None = None
    image_reward: float | None = None
    per_sample: Mapping[str, Sequence[float]] = field(default_factory=dict)
    step_errors: Sequence[float | None] = ()
    predictor: str | None = None
    reference_seconds: float | None = None
    frame_psnr: float | None = None
    temporal_psnr: float | None = None

    @property
    def computed_steps(self) -> int:
        """Number of `steps`."""
        return len(self.steps)

    @property
    def is_ours(self) -> bool:
        """Whether a predictor of lesa made it."""
        kind = kind_of(self.contender)
        return kind is not None and issubclass(kind, Ours)

    @property
    def is_peer(self) -> bool:
        """Whether a cache of others made it. Every contender that is not registered is one."""
        kind = kind_of(self.contender)
        return kind is None or issubclass(kind, Peer)

    @property
    def is_searched(self) -> bool:
        """Whether its setting can come from a search: it is a cache, or a forecaster that needs no training."""
        kind = kind_of(self.contender)
        return self.is_peer or (self.is_ours and self.predictor is None and kind is not None and not kind.is_trained)

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON. A figure that is infinite or NaN is None."""
        return finite({"name": self.name, "computed_steps": self.computed_steps, **asdict(self)})


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Args:
        runs: the contenders, the reference first.
        images: by run, the first few images of one size, `[n, height, width, 3]` in [0, 1]; of a video the middle one.
        facts: on what it was measured, what was searched and what was not available; see `evaluate`.
        notes: what `evaluate` kept, replaced and left out of an earlier evaluation in the same folder.
        clips: by run, the first few videos, uint8 `[n, frames, height, width, 3]`, small enough for the moving picture.
            Empty for images.
    """

    runs: tuple[EvaluatedRun, ...]
    images: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    notes: Sequence[str] = ()
    clips: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> EvaluatedRun:
        found = next((run for run in self.runs if run.name == name), None)
        if found is None:
            raise KeyError(f"no run is called {name!r}. The runs are {', '.join(run.name for run in self.runs)}.")
        return found

    def is_best(self, run: EvaluatedRun) -> bool:
        """Whether no other run of its contender has a better PSNR at its rounded step equivalents."""
        key = run.contender, round(run.step_equivalents)
        return run is max((r for r in self.runs if (r.contender, round(r.step_equivalents)) == key), key=_rank)

    @property
    def shown(self) -> list[EvaluatedRun]:
        """The runs for people: of what was searched, only the best at each rounded number of step equivalents."""
        return [run for run in self.runs if not run.is_searched or self.is_best(run)]

    @property
    def has_moving_picture(self) -> bool:
        """Whether one of the runs for people has clips."""
        return any(run.name in self.clips for run in self.shown)

    @property
    def ours(self) -> str | None:
        """The contender with which the others are compared, or None. See `against_ours`."""
        return ours_among({run.contender for run in self.runs}, {run.contender for run in self.runs if run.predictor})

    @property
    def timed_apart(self) -> list[EvaluatedRun]:
        """The runs whose speed-up refers to another timing of the reference than that of the first run."""
        latest = self.runs[0].reference_seconds if self.runs else None
        return [run for run in self.runs[1:] if latest is not None and run.reference_seconds != latest]

    def against_ours(self, run: EvaluatedRun, by: Count = "step_equivalents") -> dict[str, Any] | None:
        """How far a run of ours that costs no more is ahead of a run in PSNR.

        Ours are the runs of one contender: the first that was trained, in the order of `lesa.contenders`; else the
        forecaster that `lesa.enable_cache` takes by default; else the one that was registered last. Forecasters that
        were given as predictors come before those that were searched.

        Args:
            run: any of `runs`.
            by: what a run costs: "step_equivalents", or "whole_steps", rounded.

        Returns:
            `ours`, the name of our most expensive run that costs no more than `run` (of several the best);
            `psnr_difference` in dB, the mean over samples of ours less the other; `low` and `high`, the ends of its
            95 % bootstrap interval. None for our own runs, for the reference, and where we have no such run.
        """
        check_choice("by", by, ("step_equivalents", "whole_steps"))
        most = run.step_equivalents + 1e-6 if by == "step_equivalents" else round(run.whole_steps)
        name = self.ours
        ours = [r for r in self.runs if r.contender == name and getattr(r, by) <= most]
        if run.contender in (name, Reference.name) or not ours:
            return None
        nearest = max(ours, key=lambda r: (getattr(r, by), _rank(r)))
        mean, low, high = paired_lead(nearest.per_sample.get("psnr", ()), run.per_sample.get("psnr", ()))
        return {"ours": nearest.name, "psnr_difference": mean, "low": low, "high": high}

    def table(self) -> str:
        """Steps, seconds, speed-up, qualities and our lead of the runs in `shown`, as text of at most 120 columns."""
        head = (
            "run",
            "whole steps",
            "step eq.",
            "seconds",
            "speed-up",
            "PSNR dB",
            *(name for _, name in self._of_videos),
        )
        head = (*head, "SSIM", "ours ahead by, dB")
        rows = [head, *map(self._row, self.shown)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        left = TABLE_WIDTH - sum(widths[1:]) - 2 * len(widths[1:])  # for the names
        widths[0] = max((len(row[0]) for row in rows if len(row[0]) <= left), default=0)
        lines = []
        for name, *figures in rows:
            if len(name) > widths[0]:  # a longer one has a line of its own
                lines.append(name)
                name = ""
            lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]))
        lines.insert(1, "-" * len(lines[0]))
        for note in self._notes():
            lines += textwrap.wrap(note, TABLE_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines)

    @property
    def _of_videos(self) -> list[tuple[str, str]]:
        """Qualities that only videos have, and their columns; empty for images."""
        has = any(run.frame_psnr is not None for run in self.runs)
        return [("frame_psnr", "frame dB"), ("temporal_psnr", "temporal dB")] if has else []

    def _row(self, run: EvaluatedRun) -> tuple[str, ...]:
        figures = [run.psnr, *(getattr(run, name) for name, _ in self._of_videos)]
        quality = ["-" if value is None else f"{value:.2f}" for value in figures] + [f"{run.ssim:.4f}"]
        if run.contender == Reference.name:
            quality = ["-"] * len(quality)
        whole = f"{run.whole_steps:.4g} of {run.num_inference_steps}"
        lead = finite(self.against_ours(run) or {})
        ahead = "-"
        if lead.get("low") is not None:
            mean, *ends = (signed(lead[key]).removeprefix("+") for key in ("psnr_difference", "low", "high"))
            ahead = f"{mean} ({' to '.join(ends)})"
        speed = f"{run.seconds:.2f}", f"{run.speedup:.2f}x"
        return run.name, whole, f"{run.step_equivalents:.2f}", *speed, *quality, ahead

    def _notes(self) -> list[str]:
        ours = "our most expensive run" if self.ours is None else f"the most expensive run of {self.ours}"
        notes = [
            "Step eq.: how often a block ran, divided by the number of blocks. The lead is the mean difference in PSNR "
            f"to {ours} that needs no more of them, with its 95 % interval."
        ]
        if self._of_videos:
            notes.append(
                "PSNR is that of whole videos, frame dB the mean of the PSNRs of the frames, and temporal dB the PSNR "
                "of the differences between neighbouring frames, for a peak of 2."
            )
        for name in dict.fromkeys(run.contender for run in self.shown):
            kind = kind_of(name)
            note = kind.note([run.name for run in self.shown if run.contender == name]) if kind is not None else None
            notes += [note] if note is not None else []
        for contender, search in self.facts.get("searched", {}).items():
            notes.append(
                f"{contender}: the best of {search['tried']} settings, searched with {search['samples']} samples."
            )
            notes += [f"{contender}: {row['why']}" for row in search["budgets"] if row["run"] is None and row["why"]]
            failed = search.get("failed") or {}
            notes += [f"{contender}: {len(failed)} settings fail. {n}: {why}" for n, why in [*failed.items()][:1]]
        absent = self.facts.get("not_available", {})
        notes += [f"{name} is not available: {why}" for name, why in absent.items() if name not in LEARNED]
        apart = [run.name for run in self.timed_apart if run in self.shown]
        if apart:
            notes.append(
                "Seconds are comparable within one command only. These runs were timed in earlier ones, and their "
                f"speed-ups refer to the reference as it was timed there: {', '.join(apart)}."
            )
        return [*notes, *self.notes]

    def summary(self) -> dict[str, Any]:
        """All runs and what they were measured on, for JSON."""
        runs = [
            {
                **run.to_dict(),
                "is_best": self.is_best(run),
                "against_ours": finite(self.against_ours(run)),
                "against_ours_by_whole_steps": finite(self.against_ours(run, "whole_steps")),
            }
            for run in self.runs
        ]
        head = {"format_version": FORMAT_VERSION, "counted": COUNTED}
        moving = {"moving_picture": GIF} if self.has_moving_picture else {}
        return {**head, **finite(dict(self.facts)), "runs": runs, "images": self._files(), **moving}

    def _files(self) -> dict[str, list[str]]:
        """By run, the files of its images."""
        shown = [run.name for run in self.runs if run.contender == Reference.name or run.is_ours or self.is_best(run)]
        return {
            name: [f"images/{file_name(name)}/{number}.png" for number in range(len(self.images[name]))]
            for name in shown
            if name in self.images
        }

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Writes `summary.json`, `runs.csv`, `images/` and `comparison.png` into `folder`, and a video of videos.

        Returns:
            The paths of `comparison.png`; of videos those of `comparison.gif` and, if it can be written, of
            `comparison.mp4`; and that of `summary.json`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        picture, summary = folder / "comparison.png", folder / "summary.json"
        with whole_file(picture) as temporary:
            draw_comparison(self.shown, self.images, temporary)
        frames = moving_pictures(self.shown, self.clips)
        gif = save_gif(frames, folder)
        contents = self.summary()
        for name, files in contents["images"].items():
            for file, image in zip(files, self.images[name]):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                pixels = Image.fromarray((np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8))
                with whole_file(folder / file) as temporary:
                    pixels.save(temporary, "png")
        with whole_file(folder / "runs.csv") as temporary, temporary.open("w", newline="") as table:
            writer = csv.writer(table)
            lead = ("ours", "psnr_difference", "low", "high")
            writer.writerow(["name", "contender", "setting", "is_best", *_SCALARS, *lead])
            for run in contents["runs"]:
                ahead = run["against_ours"] or {}
                first = [run["name"], run["contender"], run["setting"], run["is_best"]]
                writer.writerow([*first, *(run[name] for name in _SCALARS), *(ahead.get(name) for name in lead)])
        write_text(summary, json.dumps(contents, indent=2, allow_nan=False) + "\n")
        return [picture, *gif, *save_mp4(frames, folder), summary]  # ffmpeg may fail, so it comes last


def file_name(name: str) -> str:
    """The name for a file: characters that a file's name can't hold are replaced, and a digest is added then."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "run"
    return safe if safe == name else f"{safe[:80]}-{digest(name)[:8]}"


def finite(value: Any) -> Any:
    """The value for JSON: None replaces every number that is infinite or NaN."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sortable(value: float) -> float:
    """Larger is better; NaN is worst."""
    return -math.inf if math.isnan(value) else value


def _rank(run: EvaluatedRun) -> float:
    return sortable(run.psnr)


@dataclass
class Outcome:
    """What one contender made of some batches."""

    latents: list[np.ndarray]  # per batch
    images: list[np.ndarray]
    trajectories: list[list[np.ndarray]]  # per batch, after each step, of the first samples
    steps: tuple[int, ...]
    counts: tuple[float, float, float]
    seconds: float
    denoise_seconds: float
    peak_memory_bytes: int | None
