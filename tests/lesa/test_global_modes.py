"""The same results, to the last bit, whatever modes of torch a process has set: gradients, dtype, device and autocast.

Each operation runs once without any mode, and then in each mode. The mode must be as it was afterwards. Then what is
made in one mode is used in another.
"""

import contextlib
import copy
import io
import json
import pickle
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline

import lesa
import small_pipelines as small
from driven_loops import call_arguments
from lesa.training import schedule_search
from lesa.training.settings import TrainingSettings
from lesa.training.training_run import Training
from lesa_kernels import FusedKANPredictor, PredictorConfig, make_ring
from lesa_kernels.torch_modes import default_modes
from predictors import make_predictor

STEPS, SCHEDULE, SAMPLES = 12, (0, 1, 4, 8), 4
CASE = small.FLUX["flux"]
NEWTON = PredictorConfig(small.DIM, hidden=4, rank=2)
DENSE = PredictorConfig(small.DIM, mixer="dense", hidden=4)
FEATURES = torch.randn(3, 2, 16, small.DIM, generator=torch.Generator().manual_seed(0))
QUICK = {"epochs": 2, "batch_size": 2, "progress": False}


@contextlib.contextmanager
def set_during(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


def default_dtype(dtype):
    return set_during(torch.set_default_dtype, dtype, torch.get_default_dtype())


def default_device(device):
    return set_during(torch.set_default_device, device, None)


MODES = {
    "no gradients for the thread": lambda: set_during(torch.set_grad_enabled, False, True),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "cpu": lambda: default_device("cpu"),
    "meta": lambda: default_device("meta"),
    "deterministic": lambda: set_during(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
FEW = ["inference_mode", "float64", "meta", "autocast"]  # for slow operations: each kind once
OF_THE_PIPELINE = [mode for mode in MODES if mode not in ("meta", "autocast")]  # in these, its own results are others


def modes():
    """All that a mode may change."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
    }


def data_of(tensor):
    with default_modes():
        return tensor.detach().float().numpy().tobytes()


def weights(predictor):
    """The parameters as ordinary float32 tensors on the CPU, which must be what they are."""
    for value in predictor.parameters():
        assert (value.dtype, value.device.type) == (torch.float32, "cpu")
        assert value.requires_grad and not value.is_inference()
    return {name: value.detach().numpy().tobytes() for name, value in predictor.named_parameters()}


def trained(predictor):
    return weights(predictor), predictor.config


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def brief_search():
    """The trainings within a search take a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_search, "BRIEF_UPDATES", 12)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline, its recording, and a predictor that was trained on it."""
    folder, pipe = tmp_path_factory.mktemp("modes"), CASE.build()
    inputs = [CASE.inputs() for _ in range(SAMPLES)]
    trajectories = lesa.record(pipe, inputs, folder / "trajectories", STEPS, progress=False)
    predictor = lesa.train(trajectories, NEWTON, SCHEDULE, out_dir=folder / "predictor", **QUICK)
    return SimpleNamespace(
        pipe=pipe,
        inputs=inputs,
        recording=folder / "trajectories",
        saved=folder / "predictor",
        predictor=predictor,
    )


# What is compared: functions of what is made and of an empty folder


def built(made, folder):
    torch.manual_seed(3)
    return [weights(FusedKANPredictor(config)) for config in (NEWTON, DENSE)]


def loaded(made, folder):
    state = torch.get_rng_state()
    predictor = FusedKANPredictor.from_pretrained(made.saved)
    assert torch.equal(torch.get_rng_state(), state)
    return trained(predictor)


def saved(made, folder):
    made.predictor.save_pretrained(folder)
    return files(folder)


def rings(made, folder):
    """What rings store, and a forecast from each. The second ring of each dtype is partly in host memory."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        sizes = (4, 2, 16, small.DIM, dtype)
        limits = (None, make_ring(*sizes).nbytes - 1)
        for ring in [make_ring(*sizes, max_device_bytes=limit) for limit in limits]:
            for number, sigma in enumerate((0.9, 0.7, 0.55)):
                features = FEATURES[number].clone()
                ring.push(features, sigma)
                ring.push(features[:1] * 2, sigma - 0.05, rows=[1])
            copied = make_ring(*sizes)
            copied.restore(ring.snapshot())
            copied.reset([0])
            with torch.no_grad():  # a forecast with gradients is made by another backend
                kept = (*ring.newest_first(), *copied.newest_first(), made.predictor(ring, 0.2))
            found += [data_of(tensor) for tensor in kept]
    return found


def train(config=NEWTON, schedule=SCHEDULE, **options):
    def run(made, folder):
        predictor = lesa.train(made.recording, config, schedule, out_dir=folder, **{**QUICK, **options})
        return trained(predictor), files(folder)

    return run


def find_schedule(made, folder):
    return find_schedule_of(lesa.Trajectories(made.recording))


def search_schedule(made, folder):
    return lesa.search_schedule(lesa.Trajectories(made.recording), made.predictor, 4, progress=False)


def find_stages(made, folder):
    return find_stages_of(lesa.Trajectories(made.recording))


def record(made, folder):
    lesa.record(made.pipe, made.inputs, folder, STEPS, progress=False)
    return files(folder)


def refine(made, folder):
    predictor = lesa.refine(made.predictor, made.recording, made.pipe, made.inputs, out_dir=folder, rounds=1, **QUICK)
    return trained(predictor), files(folder)


def evaluate(made, folder):
    lesa.evaluate(made.pipe, made.inputs[:2], [made.predictor], ["steps"], STEPS, out_dir=folder, progress=False)
    runs = json.loads((folder / "summary.json").read_text())["runs"]
    pictures = {name: data for name, data in files(folder / "images").items()}
    return [(run["name"], run.get("psnr"), run.get("ssim")) for run in runs], pictures


def cached_run(made, folder):
    attributes = dict(vars(made.pipe.transformer))
    handle = lesa.enable_cache(made.pipe, made.predictor, strict=True)
    latents = CASE.latents(made.pipe)
    steps = handle.stats.streams["cond"]
    handle.disable()
    assert {**vars(made.pipe.transformer), "_diffusers_hook": 0} == {**attributes, "_diffusers_hook": 0}
    assert (steps.computed, len(steps.predicted)) == ([*SCHEDULE], STEPS - len(SCHEDULE))
    return data_of(latents)


def controlled_run(made, folder):
    with lesa.enable_cache(made.pipe, made.predictor, lesa.ErrorControl(0.5)) as handle:
        latents = CASE.latents(made.pipe)
    steps = handle.stats.streams["cond"]
    assert steps.predicted and len(steps.errors) > 1
    return steps.computed, steps.errors, data_of(latents)


OPERATIONS = {
    "build": (built, [mode for mode in MODES if mode != "meta"]),  # the default device is where it is meant to be
    "from_pretrained": (loaded, MODES),
    "save_pretrained": (saved, MODES),
    "rings": (rings, MODES),
    "train": (train(), MODES),
    "train dense": (train(DENSE), FEW),
    "train controlled": (train(controlled=True), FEW),
    "train with a budget": (train(schedule=None, budget=4, epochs=1), FEW),
    "train with stages": (train(find_stages=True, epochs=1), FEW),
    "find_schedule": (find_schedule, FEW),
    "search_schedule": (search_schedule, FEW),
    "find_stages": (find_stages, FEW),
    "record": (record, OF_THE_PIPELINE),
    "refine": (refine, ["no gradients for the thread", "inference_mode", "bfloat16", "float64"]),
    "evaluate": (evaluate, ["inference_mode", "bfloat16", "float64"]),
    "cached run": (cached_run, OF_THE_PIPELINE),
    "run under error control": (controlled_run, ["inference_mode", "bfloat16", "float64"]),
}


@pytest.fixture(scope="module")
def without_modes(made, tmp_path_factory):
    """The result of each operation without a mode."""
    results = {}

    def of(operation):
        if operation not in results:
            results[operation] = OPERATIONS[operation][0](made, tmp_path_factory.mktemp("plain"))
        return results[operation]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation, mode", [(name, mode) for name, (_, allowed) in OPERATIONS.items() for mode in allowed]
)
def test_the_result_is_that_without_the_mode(made, without_modes, tmp_path, operation, mode):
    expected = without_modes(operation)
    with MODES[mode]():
        before = modes()
        result = OPERATIONS[operation][0](made, tmp_path)
        assert modes() == before
    assert result == expected


class StopError(Exception):
    pass


def stop(*args, **kwargs):
    raise StopError


FAILURES = {
    "train": "torch.optim.AdamW.step",
    "train with a budget": "lesa.training.schedule_search.ScheduleErrors.costs",
    "train with stages": "lesa.training.stages._loss_of",
    "find_schedule": "lesa.training.training_run.Batch",
    "refine": "lesa.training.refinement.roll_out_loss",
    "from_pretrained": "safetensors.torch.load_file",
    "rings": "torch.zeros",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation, mode", [(name, mode) for name in FAILURES for mode in MODES if mode in OPERATIONS[name][1]]
)
def test_the_mode_is_kept_after_an_error(made, tmp_path, monkeypatch, operation, mode):
    with MODES[mode]():
        before = modes()
        with monkeypatch.context() as patch, pytest.raises(StopError):
            patch.setattr(FAILURES[operation], stop)
            OPERATIONS[operation][0](made, tmp_path)
        assert modes() == before


def test_all_modes_are_the_default_ones_within_and_come_back():
    """In the tier that always runs: each mode alone, and all at once, also for an error within."""
    expected = modes()
    for chosen in (*([mode] for mode in MODES), [*MODES]):
        with contextlib.ExitStack() as stack:
            for mode in chosen:
                stack.enter_context(MODES[mode]())
            before = modes()
            with pytest.raises(StopError), default_modes():
                unchanged = {"deterministic": before["deterministic"], "dtype": before["dtype"]}
                assert modes() == {**expected, **unchanged}
                raise StopError
            assert modes() == before
    assert modes() == expected


# Made in one mode, used in another


def assigned(predictor):
    """With weights that an inference mode has made, as `load_state_dict(..., assign=True)` takes them."""
    values = {name: value.clone() for name, value in predictor.state_dict().items()}
    predictor.load_state_dict(values, assign=True)
    return predictor


def through_torch(predictor):
    buffer = io.BytesIO()
    torch.save(predictor, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "loaded": lambda made: FusedKANPredictor.from_pretrained(made.saved),
    "copied": lambda made: copy.deepcopy(made.predictor),
    "pickled": lambda made: pickle.loads(pickle.dumps(made.predictor)),
    "saved with torch": lambda made: through_torch(made.predictor),
    "moved": lambda made: copy.deepcopy(made.predictor).double().float(),
    "built": lambda made: load_into(FusedKANPredictor(made.predictor.config), made.predictor),
}


def load_into(predictor, other):
    predictor.load_state_dict(other.state_dict())
    return predictor


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_a_predictor_that_was_made_in_a_mode_is_an_ordinary_one(made, without_modes, tmp_path, way, mode):
    with MODES[mode]():
        predictor = WAYS[way](made)
    if way == "built":  # from its configuration and weights only
        predictor.provenance = made.predictor.provenance
    here = SimpleNamespace(**{**vars(made), "predictor": predictor})
    assert weights(predictor) == weights(made.predictor)
    for operation in ("save_pretrained", "search_schedule", "refine", "cached run"):
        folder = tmp_path / operation
        folder.mkdir()
        assert OPERATIONS[operation][0](here, folder) == without_modes(operation)
    ring = predictor.make_ring(1, 2)
    ring.push(FEATURES[0, :1, :2], 0.9)
    predictor(ring, 0.5).sum().backward()
    assert all(value.grad is not None for value in (predictor.out_bias, predictor.up_bias))


@pytest.mark.slow
def test_a_predictor_whose_weights_belong_to_an_inference_mode_is_enabled(made, without_modes, tmp_path):
    with torch.inference_mode():
        predictor = assigned(copy.deepcopy(made.predictor))
    assert next(predictor.parameters()).is_inference()
    here = SimpleNamespace(**{**vars(made), "predictor": predictor})
    assert cached_run(here, tmp_path) == without_modes("cached run")


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
def test_a_cache_is_enabled_run_and_disabled_in_different_modes(made, without_modes, tmp_path, enabled, run, disabled):
    """Each of the three in an inference mode or outside of one; then a plain run and another cached one."""
    expected, plain = without_modes("cached run"), data_of(CASE.latents(made.pipe))
    with torch.inference_mode(enabled):
        handle = lesa.enable_cache(made.pipe, made.predictor, strict=True)
    for inside in (run, not run):  # what one run leaves, the next one has
        with torch.inference_mode(inside):
            assert data_of(CASE.latents(made.pipe)) == expected
    with torch.inference_mode(disabled):
        handle.disable()
    assert data_of(CASE.latents(made.pipe)) == plain
    assert cached_run(made, tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer, limit, backend, inside",
    [
        ("newton", None, "auto", {0, 1, 2, 3, 4, 5}),
        ("newton", None, "torch", {0, 1, 2, 3, 4, 5}),
        ("newton", 100000, "torch", {0, 2, 4, 6, 8, 10}),
        ("dense", None, "torch", {0, 2, 4, 6, 8, 10}),
        ("dense", 100000, "auto", {1, 3, 5, 7, 9, 11}),
    ],
)
def test_an_inference_mode_may_begin_and_end_within_a_run(pipe, monkeypatch, mixer, limit, backend, inside):
    if backend != "auto":
        monkeypatch.setenv("LESA_BACKEND", backend)

    def outputs(inside):
        scheduler, made = pipe.scheduler, []
        scheduler.set_timesteps(STEPS)
        call = call_arguments()
        with lesa.enable_cache(pipe, make_predictor(mixer=mixer), SCHEDULE, limit, strict=True):
            for step, t in enumerate(scheduler.timesteps):
                with torch.inference_mode(step in inside), torch.no_grad():
                    latents = call["hidden_states"] * (1 - 0.5 * step / STEPS)
                    call_now = {**call, "hidden_states": latents, "timestep": (t / 1000).expand(len(latents))}
                    made.append(pipe.transformer(**call_now)[0])
                    scheduler.step(made[-1], t, latents)
        return [data_of(output) for output in made]

    assert outputs(inside) == outputs(set())


def prepared(pipe):
    """The calls of a run of the digits transformer, made before a default device is set."""
    pipe.scheduler.set_timesteps(STEPS)
    call = call_arguments((3,))
    return [
        {**call, "hidden_states": call["hidden_states"] * (1 - 0.5 * step / STEPS), "timestep": t.expand(1) / 1000}
        for step, t in enumerate(pipe.scheduler.timesteps)
    ]


def run_prepared(pipe, calls):
    """Runs them; nothing here makes a tensor."""
    outputs = []
    for step, call in enumerate(calls):
        with torch.no_grad():
            outputs.append(pipe.transformer(**call)[0])
        pipe.scheduler._step_index = step + 1
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["newton", "dense"])
def test_a_cached_run_makes_nothing_on_the_default_device(pipe, mixer):
    """The meta device stands for a GPU: a tensor that is made there by mistake shows."""
    results = []
    for device in (None, "meta"):
        calls, predictor = prepared(pipe), make_predictor(mixer=mixer)
        with default_device(device), lesa.enable_cache(pipe, predictor, SCHEDULE, strict=True):
            results.append(run_prepared(pipe, calls))
    assert [data_of(output) for output in results[0]] == [data_of(output) for output in results[1]]


class PreparedPipeline(FluxPipeline):
    """Runs the transformer on prepared calls, whatever the arguments."""

    def __call__(self, **arguments):
        return (run_prepared(self, self.calls)[-1],)


@pytest.mark.slow
def test_a_recording_has_nothing_on_the_default_device(fresh_pipe, tmp_path):
    fresh_pipe.__class__ = PreparedPipeline
    for device in (None, "meta"):
        fresh_pipe.calls = prepared(fresh_pipe)
        folder = tmp_path / str(device)
        with default_device(device):
            lesa.record(fresh_pipe, [{"prompt": "3"}], folder, STEPS, tokens_per_sample=20, progress=False)
    assert files(tmp_path / "meta") == files(tmp_path / "None")


@pytest.mark.slow
def test_trajectories_that_were_opened_in_an_inference_mode_are_trained_on(made, without_modes, tmp_path):
    with torch.inference_mode():
        trajectories = lesa.Trajectories(made.recording)
        trajectories[0]
    assert (find_stages_of(trajectories), find_schedule_of(trajectories)) == (
        without_modes("find_stages"),
        without_modes("find_schedule"),
    )
    here = SimpleNamespace(**{**vars(made), "recording": trajectories})
    assert OPERATIONS["train"][0](here, tmp_path / "t") == without_modes("train")
    assert OPERATIONS["refine"][0](here, tmp_path / "r") == without_modes("refine")


def find_schedule_of(trajectories):
    return lesa.find_schedule(trajectories, 4, NEWTON, progress=False)


def find_stages_of(trajectories):
    return lesa.find_stages(trajectories, SCHEDULE, NEWTON, most=2, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["no gradients for the thread", "inference_mode"])
def test_training_in_a_thread(made, without_modes, tmp_path, mode):
    """A mode of a thread is of no other thread."""
    results = []

    def work():
        with MODES[mode]():
            results.append(OPERATIONS["train"][0](made, tmp_path / "thread"))

    thread = threading.Thread(target=work)
    with torch.no_grad():
        thread.start()
        results.append(OPERATIONS["train"][0](made, tmp_path / "here"))
        thread.join()
        assert not torch.is_grad_enabled()
    assert results == [without_modes("train")] * 2


@pytest.mark.slow
def test_trainings_in_several_threads_do_not_disturb_each_other(made):
    """Nor does another thread that draws random numbers. The predictor is large, so its initialisation takes long."""
    config = replace(made.predictor.config, hidden=64, rank=128)
    trajectories, ended = lesa.Trajectories(made.recording), threading.Event()

    def begin(seed, found):
        found[seed] = weights(Training(trajectories, config, TrainingSettings(seed=seed)).predictor)

    def draw():
        while not ended.is_set():
            torch.rand(1000)

    alone, together = {}, {}
    for seed in range(6):
        begin(seed, alone)
    others = threading.Thread(target=draw)
    others.start()
    try:
        for _ in range(5):
            threads = [threading.Thread(target=begin, args=(seed, together)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert together == alone
            together.clear()
    finally:
        ended.set()
        others.join()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("tiers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_ring_that_was_made_in_an_inference_mode_is_used_outside(backend, tiers, dtype):
    """And in turns. A ring can be copied and saved between two pushes."""
    sizes = (4, 2, 16, small.DIM, dtype, "cpu", backend)
    limit = None if tiers == 1 else make_ring(*sizes).nbytes - 1

    def kept(modes):
        modes = iter(modes)
        with torch.inference_mode(next(modes)):
            ring = make_ring(*sizes, limit)
        for features, sigma in zip(FEATURES, (0.9, 0.7, 0.5)):
            with torch.inference_mode(next(modes)):
                ring.push(features, sigma)
                ring.push(features[:1].clone(), sigma - 0.1, rows=[0])
        with torch.inference_mode(next(modes)):
            snapshot = ring.snapshot()
        ring = through_torch(copy.deepcopy(ring))
        with torch.inference_mode(next(modes)):
            ring.reset([1])
            ring.push(FEATURES[0], 0.3)
            ring.restore(snapshot)
            return [data_of(tensor) for tensor in (*ring.newest_first(), ring.gather(1))]

    expected = kept([False] * 6)
    for inside in ({0}, {1}, {2}, {4}, {5}, {0, 2, 4}, {1, 3, 5}, {0, 1, 2, 3, 4, 5}):
        assert kept([number in inside for number in range(6)]) == expected
