"""What all Triton launchers share: the GPU they compile for, their launch configurations, and arrival counters.

Imported only where Triton is used; `lesa_kernels.dispatch` finds out whether it can be imported.
"""

import functools
import json
import os
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


_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros in which a kernel may count arrivals. The kernel must set them to zero again.

    Kernels of one stream run one after the other, so they share one buffer, which is cleared once. A graph that is
    being captured gets a buffer of its own, which is cleared at every replay: another stream may run kernels at the
    same time.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    buffer = _COUNTERS.get(key)
    if buffer is None or buffer.numel() < count:
        buffer = _COUNTERS[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return buffer
