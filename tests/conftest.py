import os

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter. They are decorated for it when they are imported, so this
    # comes first. Tests of compiled kernels start processes of their own.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_backend_override(monkeypatch):
    """Tests choose backends and configurations themselves, whatever the shell that runs them has set."""
    monkeypatch.delenv("LESA_BACKEND", raising=False)
    monkeypatch.delenv("LESA_TUNED", raising=False)


@pytest.fixture
def without_interpreter(monkeypatch):
    """As in a process that was not started with TRITON_INTERPRET: Triton takes no CPU tensors."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def kernel_device() -> torch.device:
    """Where tests of kernels run: on the GPU, or in Triton's interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory():
    """Fills what `torch.empty` returns with NaN, so that an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
