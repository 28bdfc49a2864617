"""What all Triton launchers share: the GPU they compile for, their launch configurations, and arrival counters.

Imported only where Triton is used; `lesa_kernels.dispatch` finds out whether it can be imported.
"""

import functools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.runtime import driver

from lesa_kernels.checks import Said, argument_error

# Kernels are decorated for the interpreter or for the compiler when they are imported, so this is decided once.
INTERPRETED = triton.knobs.runtime.interpret

# Triton 3.10 will fuse multiplications with additions only where that is asked for.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

TUNED_FOLDER = Path(__file__).parent / "tuned"


def architecture() -> int:
    """Compute capability of the current GPU as `10 * major + minor`, such as 90; 0 in the interpreter."""
    return 0 if INTERPRETED else driver.active.get_current_target().arch


def has_float8() -> bool:
    """Whether Triton converts e4m3 itself here; below sm_89 kernels decode its bits."""
    return INTERPRETED or architecture() >= 89


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors share the work. On a CPU it is 2, so that tests split the work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch_config(operation: str, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Block sizes, warps and stages of an operation's kernel: those tuned for this GPU, else the defaults.

    The configurations are in files in `lesa_kernels/tuned`: one file for each GPU, named after it, and `default.json`.
    The environment variable `LESA_TUNED` names one more file, which has priority over both. `python -m
    lesa_kernels.tune` writes such a file. Nothing is tuned while a model runs.

    Args:
        operation: such as "newton_predict".
        dtype: of the features.
        device: where the kernel runs.

    Raises:
        ValueError: the file that `LESA_TUNED` names can't be read, or holds no configurations.
    """
    name = str(dtype).removeprefix("torch.")
    return dict(_launch_config(operation, name, device, os.environ.get("LESA_TUNED") or None))


@functools.cache
def _launch_config(operation: str, dtype: str, device: torch.device, extra: str | None) -> dict[str, int]:
    files = [TUNED_FOLDER / f"{tuned_name(device)}.json", TUNED_FOLDER / "default.json"]
    if extra is not None:
        files.insert(0, Path(extra))
    for file in files:
        configs = _read_configs(file, required=extra is not None and file == files[0]).get(operation, {})
        config = configs.get(dtype) or configs.get("any")
        if config is not None:
            return config
    raise KeyError(f"{files[-1]} has no configuration for {operation}")


def _read_configs(file: Path, required: bool) -> dict:
    if not required and not file.is_file():
        return {}
    try:
        configs = json.loads(file.read_text())
        if not isinstance(configs, dict):
            raise ValueError(f"a {type(configs).__name__}, not an object")
    except (OSError, ValueError) as error:
        remedy = "Write the file with `python -m lesa_kernels.tune`, or unset the variable."
        got = Said(f"{file}: {error}")
        raise argument_error("LESA_TUNED", "name a JSON file of configurations", got, remedy) from error
    return configs


def tuned_name(device: torch.device) -> str:
    """The name under which a GPU's configurations are kept, such as "NVIDIA-H200"."""
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")


COUNTERS_OF_DEVICE = 1 << 18  # int32 that are cleared at a time: 1 MiB
COUNTERS_OF_STREAM = 1 << 10  # the fewest that a stream gets
COUNTERS_OF_LINE = 32  # of the cache, 128 bytes: no two owners share one

_COUNTERS_LOCK = threading.Lock()
_CLEARED: dict[torch.device, torch.Tensor] = {}  # counters that have no owner yet
_OF_STREAM: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros in which a kernel may count arrivals. The kernel must set them to zero again.

    Clearing them costs no launch. They are parts of a buffer of 1 MiB, which is cleared when the first kernel that
    counts is launched on the device; that launch waits until they are cleared.

    - The kernels of one stream run one after the other. They share the same counters.
    - A launch that is captured into a CUDA graph gets counters that nobody else ever gets. So the graph can be
      replayed while other streams run kernels. If the buffer is used up, after about a thousand captured launches, or
      if no kernel that counts was launched before the capture, the counters are new memory of the graph. Then the graph
      clears them at each replay, with a memset before the kernel.

    CUDA may give a new stream the handle of one that was destroyed, so the new one gets the same counters. That is safe
    if the kernels of the old one have ended. Torch's allocator needs the same, because it knows streams by their
    handles, too.

    Args:
        device: where the kernel runs, the current device.
        count: how many counters the kernel needs.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        taken = _take_counters(device, count)
        return torch.zeros(count, dtype=torch.int32, device=device) if taken is None else taken
    key = device, torch.cuda.current_stream(device).cuda_stream
    counters = _OF_STREAM.get(key)
    if counters is None or counters.numel() < count:
        needed = max(triton.next_power_of_2(count), COUNTERS_OF_STREAM)
        counters = _take_counters(device, needed)
        while counters is None:
            _clear_counters(device, max(needed, COUNTERS_OF_DEVICE))
            counters = _take_counters(device, needed)
        _OF_STREAM[key] = counters
    return counters


def _take_counters(device: torch.device, count: int) -> torch.Tensor | None:
    """Counters that nobody has had; None if there are not enough."""
    with _COUNTERS_LOCK:
        left = _CLEARED.get(device)
        if left is None or left.numel() < count:
            return None
        lines = triton.cdiv(count, COUNTERS_OF_LINE)
        _CLEARED[device] = left[lines * COUNTERS_OF_LINE :]
        return left[:count]


def _clear_counters(device: torch.device, count: int) -> None:
    """Makes new counters, which outlive every graph.

    In a thread of its own, because this one may allocate from the memory of a graph: `torch.compile` does before it
    captures. Then other tensors of the graph would be put over the counters.
    """

    def clear() -> torch.Tensor:
        with torch.cuda.device(device):
            counters = torch.zeros(count, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # those who get them do not wait for this stream
        return counters

    with ThreadPoolExecutor(1) as thread:
        _CLEARED[device] = thread.submit(clear).result()
