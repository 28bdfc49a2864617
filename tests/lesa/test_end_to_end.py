"""`lesa.train_end_to_end`: runs through which gradients pass, and training through them."""

import contextlib
import gc
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lesa
import small_pipelines as small
from lesa.cache.placement import installed_hook
from lesa.demo import digits
from lesa.inputs import collate
from lesa.models import adapter_for
from lesa.processes import Processes
from lesa.schedule import Schedule
from lesa.training import differentiable_runs
from lesa.training.differentiable_runs import DifferentiableRuns
from lesa.training.end_to_end import end_to_end_cost, trained_end_to_end
from lesa.training.end_to_end_run import EndToEndRun, EndToEndSettings
from lesa.training.run_references import References
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, SCHEDULE = 6, (0, 1, 3)
QUICK = {"updates": 4, "batch_size": 2, "samples_per_call": 2, "progress": False}


@pytest.fixture
def pipe():
    return small.ALL["flux"].build()


def inputs_of(name="flux", count=1):
    return [small.ALL[name].inputs(1) for _ in range(count)]


def predictor_for(pipe, schedule=SCHEDULE, steps=STEPS, **options):
    """A predictor whose weights are random, so that each of them changes what it forecasts."""
    adapter = adapter_for(pipe)
    sigmas = tuple(1 - step / steps for step in schedule)
    known = {"family": adapter.family, "num_inference_steps": steps, "schedule": schedule, "schedule_sigmas": sigmas}
    config = PredictorConfig(adapter.feature_dim, **{"rank": 4, "hidden": 8, **known, **options})
    predictor = FusedKANPredictor(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in predictor.parameters():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return predictor


def weights_of(predictor):
    return {name: value.clone() for name, value in predictor.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def run_of(pipe, inputs, seeds, steps, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": steps, "generator": generators, "output_type": "latent", "return_dict": False}
    return pipe(**collate(inputs), **call, **options)[0]


def is_like(found, wanted):
    scale = wanted.abs().max()
    return found.shape == wanted.shape and (found - wanted).abs().max() < 1e-5 * scale


@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux cfg", "qwen cfg", "sd3 cfg"))]
)
def test_a_run_with_gradients_is_that_of_the_cache(name):
    pipe, inputs, schedule = small.ALL[name].build(), inputs_of(name, 2), (0, 1, 3, 7)
    predictor = predictor_for(pipe, schedule, 10)
    with lesa.enable_cache(pipe, predictor, [*schedule]) as handle:
        wanted = run_of(pipe, inputs, [4, 5], 10)
        cached = {stream: stats.predicted for stream, stats in handle.stats.streams.items()}
    assert {*map(len, cached.values())} == {6}
    runs = DifferentiableRuns(pipe, predictor)
    with runs.on():
        run = runs.run(inputs, [4, 5], 10, Schedule(schedule))
        run.latents[-1].square().mean().backward()
    assert run.computed == [*schedule] and len(run.latents) == 10
    assert is_like(run.latents[-1].detach(), wanted)
    assert all(weight.grad.abs().max() > 0 for weight in predictor.parameters())


@pytest.mark.slow
def test_a_run_of_the_digits_is_that_of_the_cache(fresh_pipe):
    predictor, inputs = predictor_for(fresh_pipe, (0, 2, 5, 8), 12, rank=32), digits.inputs_for([3, 7])
    with lesa.enable_cache(fresh_pipe, predictor):
        wanted = run_of(fresh_pipe, inputs, [0, 1], 12)
    runs = DifferentiableRuns(fresh_pipe, predictor)
    with runs.on():
        run = runs.run(inputs, [0, 1], 12, Schedule((0, 2, 5, 8)))
    assert is_like(run.latents[-1].detach(), wanted)


def loss_by_hand(pipe, predictor, schedule, steps, seed):
    """The loss of a run and its gradient, in a loop of its own over FLUX, without hooks and checkpoints."""
    given, noted, latents = {}, {}, []
    model = pipe.transformer.requires_grad_(False)

    def note(module, args, kwargs):
        given.setdefault("call", kwargs)

    first = model.register_forward_pre_hook(note, with_kwargs=True)

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"].clone())
        return {}

    run_of(pipe, inputs_of(), [seed], steps, callback_on_step_end=keep)
    first.remove()
    entered = model.norm_out.register_forward_pre_hook(lambda _, args: noted.update(features=args[0]))
    call, sigmas = given["call"], pipe.scheduler.sigmas.tolist()
    x, anchors, levels, losses = call["hidden_states"], [], [], []
    length = predictor.config.max_history
    for step in range(steps):
        now = torch.full((1,), sigmas[step])
        if step in schedule:
            if step > 1:  # before it there is a forecast
                losses.append(log_rms(x, latents[step - 1]))
            v = model(**{**call, "hidden_states": x, "timestep": now})[0]
            anchors, levels = [noted["features"], *anchors][:length], [sigmas[step], *levels][:length]
        else:
            padded = [*anchors, *anchors[-1:] * (length - len(anchors))]
            near = torch.tensor([*levels, *levels[-1:] * (length - len(levels))])[:, None]
            count = torch.tensor([len(anchors)], dtype=torch.int32)
            state = (torch.stack(padded[::-1]), None, near.flip(0), torch.zeros_like(count), count, now)
            embedded = model.time_text_embed(now * 1000, call["pooled_projections"])
            v = model.proj_out(model.norm_out(predictor.forecast(*state), embedded))
        x = x + (sigmas[step + 1] - sigmas[step]) * v
    entered.remove()
    return (log_rms(x, latents[-1]) + torch.stack(losses).mean()) / 2


def log_rms(x, wanted):
    return 0.5 * torch.log((x - wanted).square().mean() + 1e-9)


def test_the_gradient_is_that_of_a_loop_by_hand(pipe, tmp_path):
    predictor = predictor_for(pipe, (0, 1, 3, 5), 8)
    settings = EndToEndSettings(8, 1, 1, 1, 1e-3, seed=6)
    training = EndToEndRun(predictor, pipe, inputs_of(), settings, tmp_path, None, "latents", None)
    training.references.make(Processes())
    runs = DifferentiableRuns(pipe, training.predictor)
    with runs.on():
        found = training._loss_of(runs.run(inputs_of(), [6], 8, Schedule((0, 1, 3, 5))), [0])
        found.backward()
    wanted = loss_by_hand(pipe, predictor, (0, 1, 3, 5), 8, 6)
    assert math.isclose(found.item(), wanted.item(), rel_tol=1e-5)
    gradients = torch.autograd.grad(wanted, [*predictor.parameters()])
    for weight, gradient in zip(training.predictor.parameters(), gradients):
        assert (weight.grad - gradient).norm() <= 1e-5 * gradient.norm()


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in it and still there, also those that only gradients need."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return output

    def bytes(self):
        gc.collect()
        return sum(size for reference, size in self.made.items() if not reference.expired())


def test_memory_grows_with_the_steps_by_their_latents_only(pipe):
    """Each predicted step adds its latents twice, as they are and as they are compared, and its forecast's weights."""
    inputs, batch = inputs_of(count=4), 4
    predictor = predictor_for(pipe)

    def kept(steps, computed):
        runs, alive = DifferentiableRuns(pipe, predictor), _Alive()
        with runs.on(), alive:
            run = runs.run(inputs, range(batch), steps, Schedule(computed))
            return alive.bytes(), run.latents[-1].nbytes

    (few, latents), (many, _) = kept(12, (0, 2, 5, 9)), kept(24, (0, 2, 5, 9))
    config = predictor.config
    weights = 4 * ((config.max_history + 1) * config.feature_dim + (config.max_history - 1) * config.max_history + 2)
    features = latents * config.feature_dim // (4 * small.LATENT_CHANNELS)
    print(few, many, (many - few) / 12, latents, weights, features)
    assert (many - few) / 12 <= 2 * latents + weights + 1000
