"""What a cache did in a run."""

import time
from dataclasses import dataclass, field

import torch


@dataclass
class StreamStats:
    """What happened in one stream of calls, such as the conditional one.

    Args:
        computed: the executed steps that ran the transformer, in order.
        predicted: the executed steps that were forecast, in order.
        fused: those of the predicted steps whose forecast and output head were computed in one pass.
        reasons: why each computed step was computed.
        errors: for each computed step from the third on, the relative L2 error of the velocity that was forecast for
            it, of the worst sample. Only with `lesa.ErrorControl`.
        ring_device_bytes, ring_host_bytes: the memory of the ring of features on its device, and in host memory; 0
            before the first computed step. The ring itself is freed when the run ends.
    """

    computed: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    fused: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    ring_device_bytes: int = 0
    ring_host_bytes: int = 0
    _begun: dict[int, "_Moment"] = field(default_factory=dict, repr=False)
    _ended: dict[int, "_Moment"] = field(default_factory=dict, repr=False)

    def begin(self, step: int, device: torch.device) -> None:
        """Starts the clock of a step. A GPU has a clock of its own."""
        self._begun[step] = _Moment(device)

    def end(self, step: int, device: torch.device) -> None:
        """Stops the clock of a step."""
        self._ended[step] = _Moment(device)

    @property
    def seconds(self) -> dict[int, float]:
        """By step, the seconds that the transformer or the forecast took, with a ControlNet that was deferred to it.

        Waits for a GPU that has not finished.
        """
        return {step: moment - self._begun[step] for step, moment in self._ended.items()}


class _Moment:
    """A point in time: on a GPU, when it reaches this place in its work; else on the host."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.time = 0.0
        if self.event is None:
            self.time = time.perf_counter()
        else:
            self.event.record(torch.cuda.current_stream(device))

    def __sub__(self, earlier: "_Moment") -> float:
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


@dataclass
class CacheStats:
    """What happened in the latest run of the pipeline.

    Args:
        runs: how many runs began since the cache was enabled.
        unlocated: how many calls since then were computed because their timestep was not one of the scheduler's.
        streams: statistics by stream.
        notes: remarks about the run, for example that its schedule is not the trained one.
    """

    runs: int = 0
    unlocated: int = 0
    streams: dict[str, StreamStats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def begin_run(self) -> None:
        """Clears the statistics of the run before."""
        self.runs += 1
        self.streams, self.notes = {}, []

    def note(self, note: str) -> None:
        """Adds a remark about the run, once."""
        if note not in self.notes:
            self.notes.append(note)

    @property
    def computed_steps(self) -> int:
        """Number of steps at which any stream ran the transformer."""
        return len({step for stream in self.streams.values() for step in stream.computed})

    @property
    def predicted_steps(self) -> int:
        """Number of steps at which every stream was forecast."""
        predicted = {step for stream in self.streams.values() for step in stream.predicted}
        return len(predicted.difference(*(stream.computed for stream in self.streams.values())))

    @property
    def ring_device_bytes(self) -> int:
        """Bytes on the device of the rings of all streams."""
        return sum(stream.ring_device_bytes for stream in self.streams.values())

    @property
    def ring_host_bytes(self) -> int:
        """Bytes in host memory of the rings of all streams."""
        return sum(stream.ring_host_bytes for stream in self.streams.values())

    def summary(self) -> str:
        """A few lines to print."""
        lines = []
        for name, stream in self.streams.items():
            steps, seconds = ",".join(map(str, stream.computed)), stream.seconds
            lines.append(f"{name}: computed {len(stream.computed)} ({steps}), predicted {len(stream.predicted)} steps")
            if stream.fused:
                lines[-1] += f", {len(stream.fused)} of them in one pass with the output head"
            spent = [sum(seconds.get(step, 0) for step in steps) for steps in (stream.computed, stream.predicted)]
            lines[-1] += f", in {spent[0]:.3g} s and {spent[1]:.3g} s"
            if stream.ring_device_bytes:
                lines[-1] += f"; its features take {_mebibytes(stream.ring_device_bytes)}"
            if stream.ring_host_bytes:
                lines[-1] += f", and {_mebibytes(stream.ring_host_bytes)} of host memory"
            unplanned = {s: r for s, r in stream.reasons.items() if r != "scheduled"}
            lines += [f"  step {step}: {reason}" for step, reason in unplanned.items()]
        if self.unlocated:
            lines.append(f"computed {self.unlocated} calls whose timestep was not one of the scheduler's")
        return "\n".join(lines + self.notes) or "no step ran yet"


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
