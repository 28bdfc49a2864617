"""`python -m lesa_kernels.env_report`: the versions and devices to put into a bug report."""

import importlib
import importlib.metadata
import os
import platform
from typing import Any

from lesa_kernels import __version__
from lesa_kernels.extension import extension, extension_error


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_report() -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return {"torch": f"can't be imported: {error}"}
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            report["gpus"].append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}")
    return report


def env_report() -> dict[str, Any]:
    """Collects versions, devices and settings; works without torch, Triton, a GPU or the compiled extension.

    Returns:
        A dict of plain values that `json.dumps` takes. "extension" is `build_info()` of the compiled module, or the
        reason why it is missing.
    """
    return {
        "lesa_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_torch_report(),
        **{name: _package_version(name) for name in ("triton", "diffusers", "transformers")},
        "extension": extension_error() or extension().build_info(),
        "LESA_BACKEND": os.environ.get("LESA_BACKEND") or "unset",
    }


def _in_words(value: Any, separator: str = "; ") -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(entry, ' ')}" for key, entry in value.items())
    if isinstance(value, list):
        return separator.join(value) or "none"
    return "none" if value is None else str(value)


def main() -> None:
    for name, value in env_report().items():
        print(f"{name:>14}: {_in_words(value)}")


if __name__ == "__main__":
    main()
