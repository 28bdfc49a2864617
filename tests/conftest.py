import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_backend_override(monkeypatch):
    """Tests choose backends themselves, whatever the shell that runs them has set."""
    monkeypatch.delenv("LESA_BACKEND", raising=False)
