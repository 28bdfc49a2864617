import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to tune without it")

from lesa_kernels import launch, tune


def cost(config):
    """A fake time that is best at BLOCK 64 and, given that, at 2 warps; 8 warps can't run."""
    if config["num_warps"] == 8:
        return math.inf
    return abs(config["BLOCK"] - 64) + abs(config["num_warps"] * 32 - config["BLOCK"])


def test_settings_are_tried_one_after_the_other():
    tried = []

    def measure(config):
        tried.append(config)
        return cost(config)

    choices = {"BLOCK": (16, 64, 128), "num_warps": (1, 2, 4, 8), "missing": (1, 2)}
    best = tune.best_config({"BLOCK": 16, "num_warps": 1, "kept": 7}, choices, measure)
    assert best == {"BLOCK": 64, "num_warps": 2, "kept": 7}
    assert tried[0] == {"BLOCK": 16, "num_warps": 1, "kept": 7}
    assert all(set(config) == set(best) for config in tried)
    assert len(tried) == len({tuple(config.values()) for config in tried}) == 1 + 2 + 3


def test_the_first_configuration_stays_unless_another_is_faster():
    start = {"BLOCK": 16}
    assert tune.best_config(start, {"BLOCK": (16, 32)}, lambda config: 1.0) == start
    assert tune.best_config(start, {"BLOCK": (16, 32)}, lambda config: math.inf) == start


def test_operations_are_those_that_have_configurations():
    defaults = json.loads((launch.TUNED_FOLDER / "default.json").read_text())
    assert set(tune.OPERATIONS) == set(defaults)
    for name, operation in tune.OPERATIONS.items():
        for dtype in operation.dtypes:
            start = launch.launch_config(name, dtype, torch.device("cpu"))
            assert set(operation.choices) & set(start), name


class FakeTimer:
    """Stands for the GPU. It stops like an impatient user at the operation `stops_at`."""

    seen: list
    stops_at = None

    def __init__(self, operation, dtype, device, folder):
        if operation == FakeTimer.stops_at:
            raise KeyboardInterrupt
        FakeTimer.seen.append((operation, dtype))

    def __call__(self, config):
        return -config["num_warps"]


@pytest.fixture
def fake_timer():
    FakeTimer.seen, FakeTimer.stops_at = [], None
    return FakeTimer


def test_goes_on_where_it_was_stopped(tmp_path, fake_timer, monkeypatch):
    out, device = tmp_path / "tuned.json", torch.device("cpu")
    names = list(tune.OPERATIONS)
    fake_timer.stops_at = names[2]
    with pytest.raises(KeyboardInterrupt):
        tune.tune(out, device, fake_timer)
    assert set(json.loads(out.read_text())) == set(names[:2])
    done, fake_timer.seen, fake_timer.stops_at = fake_timer.seen, [], None
    tune.tune(out, device, fake_timer)
    assert not set(done) & set(fake_timer.seen)
    assert done + fake_timer.seen == [(n, dtype) for n in names for dtype in tune.OPERATIONS[n].dtypes]
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]

    # What it wrote is what the launchers read.
    monkeypatch.setenv("LESA_TUNED", str(out))
    assert launch.launch_config(names[0], torch.bfloat16, device)["num_warps"] == 8


class FakeTorch:
    """Stands for torch on a GPU, and notes what is done in which order."""

    int64 = None

    def __init__(self):
        self.done, self.clock, self.cuda = [], 0.0, self
        self.CUDAGraph, self.Stream, self.current_stream = lambda: self, lambda: self, lambda: self

    def zeros(self, *sizes, **options):
        return SimpleNamespace(zero_=lambda: self.done.append("write"), sum=lambda: self.done.append("read"))

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: (self.done.append("event"), setattr(event, "at", self.clock))
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def call(self):
        self.done.append("call")
        self.clock += 7.0

    def replay(self):
        self.done.append("replay")
        self.clock += 60.0

    def _sleep(self, cycles):
        self.done.append("sleep")
        self.clock += 1000.0

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass

    @contextmanager
    def stream(self, stream):
        yield

    @contextmanager
    def graph(self, graph, stream):
        yield


@pytest.mark.parametrize(("dirty", "flush"), [(False, "read"), (True, "write")])
def test_a_call_alone_is_timed_after_the_caches_were_filled(dirty, flush, monkeypatch):
    fake = FakeTorch()
    monkeypatch.setattr(tune, "torch", fake)
    assert tune.device_seconds(fake.call, 3, dirty=dirty) == [7.0] * 3
    assert fake.done[-15:] == [flush, "sleep", "event", "call", "event"] * 3


def test_calls_in_a_graph_are_timed_together(monkeypatch):
    fake = FakeTorch()
    monkeypatch.setattr(tune, "torch", fake)
    assert tune.graph_seconds(fake.call, calls=6, repeats=2) == [10.0] * 2
    assert fake.done == ["call"] * (1 + 6) + ["replay"] + ["sleep", "event", "replay", "event"] * 2


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--out", str(tmp_path / "tuned.json")])
    assert stopped.value.code == 2 and "a CUDA GPU is needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_wrong_result_can_not_win(tmp_path, monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    timer = tune.Timer("bspline_kan_fwd", torch.bfloat16, device, str(tmp_path))
    config = launch.launch_config("bspline_kan_fwd", torch.bfloat16, device)
    assert 0 < timer(config) < 1
    timer.expected[0].neg_()
    assert timer(config) == math.inf


@pytest.mark.parametrize("name", [name for name in tune.OPERATIONS if not name.startswith("bspline_kan")])
def test_calls_what_it_tunes(name, kernel_device, monkeypatch):
    """At a small size; the layers' sizes are too large for the interpreter."""
    monkeypatch.setattr(tune, "FEATURES", (1, 20, 48))
    seen, launch_config = [], launch._launch_config

    def spy(operation, *rest):
        seen.append(operation)
        return launch_config(operation, *rest)

    monkeypatch.setattr(launch, "_launch_config", spy)
    results = tune.OPERATIONS[name].prepare(tune.OPERATIONS[name].dtypes[-1], kernel_device)()
    assert name in seen
    assert all(torch.isfinite(result).all() for result in results)
