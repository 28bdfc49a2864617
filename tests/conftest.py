"""Fixtures of all tests, and their two tiers: `pytest` alone leaves out those with the marker `slow`."""

import gc
import importlib.util
import os

import pytest
import torch

MOST_WORKERS = 4
# Files that take longest, with the longest first, and before all others: a core must not wait for one that begins last.
LONG = [
    "test_ahead_of_time.py",
    "test_build.py",
    "test_ring_fuzz.py",
    "test_schedulers.py",
    "test_gpu_day.py",
    "test_benchmarks.py",
    "test_static_model.py",
    "test_evaluation.py",
    "test_families.py",
    "test_composition.py",
    "test_newton_kernels.py",
    "test_state.py",
    "test_stream_kernels.py",
    "test_tiered_ring.py",
    "test_import.py",
    "test_cache.py",
    "test_training_faults.py",
    "test_refinement.py",
    "test_error_control.py",
    "test_global_modes.py",
    "test_forwards.py",
]
# Files whose cases share nothing with each other. They come last, one case at a time, to whichever core is free.
SPREAD = ["test_more_families.py"]
LEFT_OUT = pytest.StashKey[int]()  # how many slow tests were left out

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter. They are decorated for it when they are imported, so this
    # comes first. Tests of compiled kernels start processes of their own.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        import quick_interpreter

        quick_interpreter.install()

# The tensors of the tests are too small to share between threads. Where cores are busy, threads wait for each other.
# Tests of code that uses several threads set their number themselves.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at these options
def pytest_cmdline_main(config):
    """Spreads the tests over processes where a whole tier runs without a GPU; `-n 0` keeps them in one process."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    is_worker = hasattr(config, "workerinput")  # one of the processes itself
    if whole and not is_worker and not torch.cuda.is_available() and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        config.option.dist = "loadfile"  # so that what a module's tests share is made once
        config.option.loadscopereorder = False  # not by the number of tests: see LONG


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            is_spread = file.rpartition("/")[2] in SPREAD
            return f"{file}::{test.partition('[')[2] or test}" if is_spread else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_configure(config):
    config.stash[LEFT_OUT] = 0
    if config.option.markexpr == "not slow" and all("::" in argument for argument in config.args):
        config.option.markexpr = ""  # a test that is named is meant to run


def pytest_collection_modifyitems(items):
    turns = {name: turn for turn, name in enumerate(LONG)} | dict.fromkeys(SPREAD, len(LONG) + 1)
    items.sort(key=lambda item: turns.get(item.path.name, len(LONG)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    """Takes what the imports made out of the garbage collector, whose runs would look at all of it each time."""
    gc.collect()
    gc.freeze()


def pytest_deselected(items):
    for item in items:
        if "slow" in item.keywords:
            item.config.stash[LEFT_OUT] += 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist; each collects all tests
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = max(node.config.stash[LEFT_OUT], getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "not slow" and config.stash[LEFT_OUT]:
        terminalreporter.write_line(
            f"{config.stash[LEFT_OUT]} slow tests were left out. Run them with `pytest -m slow`, "
            "or all tests with `make test-all`."
        )


@pytest.fixture(autouse=True)
def no_backend_override(monkeypatch):
    """Tests choose backends and configurations themselves, whatever the shell that runs them has set."""
    monkeypatch.delenv("LESA_BACKEND", raising=False)
    monkeypatch.delenv("LESA_TUNED", raising=False)


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory):
    """Where processes that compile Triton's kernels keep them: new in each run, and shared by all of its workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its own folder is in that of the run
        folder = folder.parent
    folder = folder / "triton_cache"
    folder.mkdir(exist_ok=True)
    return folder


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
