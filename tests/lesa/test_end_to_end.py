"""`lesa.train_end_to_end`: runs through which gradients pass, and training through them."""

import contextlib
import copy
import functools
import gc
import json
import math
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lesa
import modular_pipelines
import small_ltx2
import small_pipelines as small
import small_wan
import small_z_image
from lesa.cache.placement import installed_hook
from lesa.demo import digits
from lesa.inputs import collate
from lesa.models import adapter_for
from lesa.processes import Processes
from lesa.schedule import Schedule
from lesa.training.differentiable_runs import DifferentiableRuns
from lesa.training.end_to_end import CALLS_PER_COMPUTED_STEP, trained_end_to_end
from lesa.training.end_to_end_run import EndToEndRun, name_of
from lesa.training.end_to_end_settings import EndToEndSettings
from lesa.training.run_references import References
from lesa_kernels import FusedKANPredictor, PredictorConfig

CASES = {**small.ALL, **small_z_image.CASES}
STEPS, SCHEDULE = 6, (0, 1, 3)
QUICK = {"updates": 4, "batch_size": 2, "samples_per_call": 2, "progress": False}


@pytest.fixture
def pipe():
    return small.ALL["flux"].build()


def inputs_of(name="flux", count=1):
    return [CASES[name].inputs(1) for _ in range(count)]


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
    return pipe(**collate(inputs), **{**call, **options})[0]


def is_like(found, wanted):
    scale = wanted.abs().max()
    return found.shape == wanted.shape and (found - wanted).abs().max() < 1e-5 * scale


@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux cfg", "qwen cfg", "sd3 cfg", "z-image"))]
)
def test_a_run_with_gradients_is_that_of_the_cache(name):
    pipe, inputs, schedule = CASES[name].build(), inputs_of(name, 2), (0, 1, 3, 7)
    predictor = predictor_for(pipe, schedule, 10)
    with lesa.enable_cache(pipe, predictor, [*schedule]) as handle:
        wanted = run_of(pipe, inputs, [4, 5], 10)
        cached = {stream: stats.predicted for stream, stats in handle.stats.streams.items()}
    assert {*map(len, cached.values())} == {6}
    runs = DifferentiableRuns(pipe, predictor)
    with runs.on():
        run = runs.run(inputs, [4, 5], 10, Schedule(schedule))
        run.latents[run.last].square().mean().backward()
    assert run.computed == [*schedule] and [*run.latents] == [0, 2, 6, 9]
    assert is_like(run.latents[run.last].detach(), wanted)
    assert all(weight.grad.abs().max() > 0 for weight in predictor.parameters())


@pytest.mark.slow
def test_a_run_of_the_digits_is_that_of_the_cache(fresh_pipe):
    predictor, inputs = predictor_for(fresh_pipe, (0, 2, 5, 8), 12, rank=32), digits.inputs_for([3, 7])
    with lesa.enable_cache(fresh_pipe, predictor):
        wanted = run_of(fresh_pipe, inputs, [0, 1], 12)
    runs = DifferentiableRuns(fresh_pipe, predictor)
    with runs.on():
        run = runs.run(inputs, [0, 1], 12, Schedule((0, 2, 5, 8)))
    assert is_like(run.latents[run.last].detach(), wanted)


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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "streams"), [("flux", 1), ("flux cfg", 2), ("flux kontext", 1)])
def test_memory_grows_with_the_computed_steps(name, streams):
    """A predicted step keeps the weights of its forecasts; a computed one also latents, samples and features."""
    pipe = small.ALL[name].build()
    inputs, predictor = inputs_of(name, 2), predictor_for(pipe)

    def kept(steps, computed):
        runs, alive, samples = DifferentiableRuns(pipe, predictor), _Alive(), []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: samples.append(kwargs["hidden_states"]), with_kwargs=True
        )
        with runs.on(), alive:
            run = runs.run(inputs, range(len(inputs)), steps, Schedule(computed))
            sample = samples[0]
            hook.remove()
            samples.clear()
            return alive.bytes(), run.latents[run.last], sample

    (few, latents, sample), (many, *_) = kept(12, (0, 2, 5, 9)), kept(24, (0, 2, 5, 9))
    more, *_ = kept(12, (0, 2, 5, 7, 9))
    config = predictor.config
    length, width = config.max_history, config.feature_dim
    weights = 4 * ((length + 1) * width + (length - 1) * length + 2)  # anchors, constant, taps, count and stage
    small_ones = 64  # such as the timestep
    assert 0 <= many - few - 12 * streams * weights <= 12 * small_ones
    features = sample.shape[0] * sample.shape[1] * width * 4
    assert more - few <= latents.nbytes + streams * (sample.nbytes + 2 * features)


def trained(pipe, predictor, folder=None, count=3, **options):
    return lesa.train_end_to_end(predictor, pipe, inputs_of(count=count), out_dir=folder, **{**QUICK, **options})


def interrupted_in_backward(pipe, number):
    """Lets the backward pass of an update be interrupted. In each, the blocks of one step run twice."""
    block, calls = pipe.transformer.transformer_blocks[0], iter(range(1, 100))

    def interrupt(*_):
        if torch._C._current_graph_task_id() != -1 and next(calls) == 2 * number:
            raise KeyboardInterrupt

    return block.register_forward_pre_hook(interrupt)


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bytes(pipe, tmp_path):
    predictor = predictor_for(pipe)
    before = weights_of(predictor)
    wanted = trained(pipe, predictor, tmp_path / "whole")
    hook = interrupted_in_backward(pipe, 3)
    with pytest.raises(KeyboardInterrupt):
        trained(pipe, predictor, tmp_path / "cut")
    hook.remove()
    checkpoint = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    references = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "references").iterdir()}
    assert len(references) == 4  # one of each sample, and what they are of
    with pytest.raises(ValueError, match=r"`learning_rate` must be 0.001, as in the unfinished training"):
        trained(pipe, predictor, tmp_path / "cut", learning_rate=2e-3)
    found = trained(pipe, predictor, tmp_path / "cut")
    assert_same_weights(found.state_dict(), wanted.state_dict())
    assert_same_weights(weights_of(predictor), before)
    for name in ("model.safetensors", "config.json", "losses.json", "provenance.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    kept = {path.name for path in (tmp_path / "cut").iterdir()}
    assert kept == {"model.safetensors", "config.json", "losses.json", "provenance.json", "losses.png"}
    assert len(json.loads((tmp_path / "cut" / "losses.json").read_text())["training"]) == QUICK["updates"]
    assert_same_weights(FusedKANPredictor.from_pretrained(tmp_path / "cut").state_dict(), wanted.state_dict())
    assert wanted.config == predictor.config and wanted.provenance["family"] == "flux"
    with pytest.raises(ValueError, match=r"a predictor in .*cut"):
        trained(pipe, predictor, tmp_path / "cut")


@pytest.mark.slow
def test_the_pipeline_is_as_before_also_after_an_error(pipe, tmp_path, monkeypatch):
    predictor, cls = predictor_for(pipe), type(pipe)
    pipe.transformer.train().requires_grad_(True)
    pipe.transformer.proj_out.weight.requires_grad_(False)
    pipe.vae.requires_grad_(False).eval()
    states = []

    def state():
        parts = (pipe.transformer, pipe.vae)
        weights = [weight.requires_grad for part in parts for weight in part.parameters()]
        names = ("gradient_checkpointing", "_gradient_checkpointing_func")
        modules = [(each.training, *map(vars(each).get, names)) for part in parts for each in part.modules()]
        return weights, modules, type(pipe), installed_hook(pipe.transformer), vars(pipe.transformer).keys()

    before = state()
    trained(pipe, predictor, updates=1)
    assert state() == before
    hook = interrupted_in_backward(pipe, 1)
    with pytest.raises(KeyboardInterrupt):
        trained(pipe, predictor, updates=1)
    hook.remove()
    assert state() == before

    def fail(self, run, samples):
        states.append(state())
        raise ZeroDivisionError

    settings = EndToEndSettings(STEPS, 1, 1, 1)
    monkeypatch.setattr(EndToEndRun, "_loss_of", fail)
    with pytest.raises(ZeroDivisionError):
        trained_end_to_end(predictor, pipe, inputs_of(), settings, tmp_path, Processes())
    assert state() == before and type(pipe) is cls
    (inside,) = states
    assert not any(inside[0]) and not any(training for training, *_ in inside[1])
    assert any(checkpoints for _, checkpoints, _ in inside[1])
    assert all(weight.grad is None for weight in pipe.transformer.parameters())


@pytest.mark.slow
def test_inputs_may_have_a_graph(pipe):
    predictor, (given,) = predictor_for(pipe), inputs_of()
    wanted = trained(pipe, predictor, count=1, updates=2).state_dict()
    encoder = torch.nn.Parameter(torch.ones(()))
    own = {name: value * encoder if name == "prompt_embeds" else value for name, value in given.items()}
    found = lesa.train_end_to_end(predictor, pipe, [own], **{**QUICK, "updates": 2})
    assert_same_weights(found.state_dict(), wanted)
    assert encoder.grad is None and all(weight.grad is None for weight in found.parameters())


class Keeping(FlowMatchEulerDiscreteScheduler):
    """A scheduler that keeps the samples, as some do."""

    def step(self, output, timestep, sample, *args, **options):
        self.last_sample = sample
        return super().step(output, timestep, sample, *args, **options)


@pytest.mark.slow
def test_the_scheduler_keeps_no_graph(pipe):
    pipe.scheduler = Keeping.from_config(pipe.scheduler.config)
    trained(pipe, predictor_for(pipe), updates=1, count=1)
    copy.deepcopy(pipe.scheduler)
    assert not getattr(pipe.scheduler, "last_sample", torch.zeros(())).requires_grad


@pytest.mark.slow
def test_the_runs_of_all_steps_are_in_eval_mode(pipe):
    modes = []
    pipe.transformer.train().register_forward_hook(lambda module, *_: modes.append(module.training))
    trained(pipe, predictor_for(pipe), updates=1, count=1)
    assert len(modes) > STEPS and not any(modes) and pipe.transformer.training


@pytest.mark.slow
def test_training_lowers_the_loss_and_the_error_of_other_samples(fresh_pipe):
    predictor = FusedKANPredictor(predictor_for(fresh_pipe, (0, 2, 5, 8), 12, rank=16, hidden=16).config)
    inputs, options = digits.inputs_for([n % 10 for n in range(16)]), {"updates": 12, "batch_size": 4}
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        update = EndToEndRun._update
        patch.setattr(EndToEndRun, "_update", lambda *args: losses.append(update(*args)) or losses[-1])
        better = lesa.train_end_to_end(predictor, fresh_pipe, inputs, learning_rate=3e-3, progress=False, **options)
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.08  # the third pass over the samples, and the first one

    def error(predictor):
        wanted = run_of(fresh_pipe, inputs[:10], range(100, 110), 12)
        with lesa.enable_cache(fresh_pipe, predictor):
            return (run_of(fresh_pipe, inputs[:10], range(100, 110), 12) - wanted).square().mean().sqrt()

    assert error(better) < 0.9 * error(predictor)


def squared(images, wanted):
    return (images - wanted).square().flatten(1).mean(1)


class Distance(torch.nn.Module):
    """A distance of images with weights, which are not to be trained."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 2, 3)

    def forward(self, images, wanted):
        assert images.min() >= 0 and images.max() <= 1 and images.shape[1] == 3
        return (self.first(images) - self.first(wanted)).square().mean()


@pytest.mark.slow
def test_images_can_be_compared(pipe, tmp_path):
    predictor, module = predictor_for(pipe), Distance()
    losses = ("latents", "pixels", squared, module)
    found = [trained(pipe, predictor, loss=loss, updates=1, count=2).state_dict() for loss in losses]
    settings = EndToEndSettings(STEPS, 1, 1, 1)
    for loss in losses[1:]:
        training = EndToEndRun(predictor, pipe, inputs_of(), settings, tmp_path / name_of(loss), None, loss, None)
        training.references.make(Processes())
        runs = DifferentiableRuns(pipe, training.predictor)
        with runs.on():
            run = runs.run(inputs_of(), [0], STEPS, Schedule(SCHEDULE), "pt")
        with lesa.enable_cache(pipe, predictor, [*SCHEDULE]):
            made = run_of(pipe, inputs_of(), [0], STEPS, output_type="pt")
        wanted = run_of(pipe, inputs_of(), [0], STEPS, output_type="pt")
        distance = {"pixels": squared}.get(loss, loss)(made, wanted).mean()
        end = torch.log(distance + 1e-9) / (2 if loss == "pixels" else 1)
        before = log_rms(run.latents[2], training.references.latents([0], 2, run.made.device))
        assert math.isclose(training._loss_of(run, [0]).item(), (end + before).item() / 2, rel_tol=1e-4)
    for number, one in enumerate(found):
        for other in (predictor.state_dict(), *found[:number]):
            assert any(not torch.equal(one[name], value) for name, value in other.items())
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())


@pytest.mark.slow
def test_the_mode_of_the_caller_does_not_matter(pipe):
    predictor = predictor_for(pipe)
    wanted = trained(pipe, predictor, updates=2, count=2)
    for mode in (torch.inference_mode, torch.no_grad, bfloat16_by_default):
        with mode():
            (given,) = inputs_of()
            own = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
            found = lesa.train_end_to_end(predictor, pipe, [own] * 2, **{**QUICK, "updates": 2})
        assert_same_weights(found.state_dict(), wanted.state_dict())
        assert all(weight.dtype == torch.float32 and not weight.is_inference() for weight in found.parameters())


@contextlib.contextmanager
def bfloat16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.slow
def test_calls_of_one_sample_give_the_same_as_one_call(pipe):
    predictor = predictor_for(pipe)
    together = trained(pipe, predictor, updates=2, count=4, batch_size=4, samples_per_call=4).state_dict()
    apart = trained(pipe, predictor, updates=2, count=4, batch_size=4, samples_per_call=1).state_dict()
    for name, value in predictor.state_dict().items():
        moved = (together[name] - value).norm()
        assert (together[name] - apart[name]).norm() < 0.02 * moved


@pytest.mark.slow
def test_another_schedule_for_each_update(pipe, tmp_path):
    predictor, seen = predictor_for(pipe), []
    schedules = [Schedule((0, 1, 2)), Schedule((0, 2, 4)), Schedule((0, 1, 4))]
    settings = EndToEndSettings(STEPS, 3, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        run = DifferentiableRuns.run
        patch.setattr(DifferentiableRuns, "run", lambda *args: seen.append(run(*args)) or seen[-1])
        options = {"schedule_for": schedules.__getitem__, "references": tmp_path / "plain"}
        (tmp_path / "run").mkdir()
        found = trained_end_to_end(predictor, pipe, inputs_of(), settings, tmp_path / "run", Processes(), **options)
    assert [run.computed for run in seen] == [[0, 1, 2], [0, 2, 4], [0, 1, 4]]
    assert found.config.schedule == SCHEDULE
    assert (tmp_path / "plain" / "reference-00000.safetensors").exists()


def test_references_are_the_latents_after_each_step(pipe, tmp_path):
    inputs, latents = inputs_of(count=3), []

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"].clone())
        return {}

    run_of(pipe, inputs, [5, 6, 7], STEPS, callback_on_step_end=keep)
    references = References(pipe, inputs, 5, STEPS, 3, tmp_path)
    references.make(Processes())
    assert references.steps == STEPS
    assert torch.equal(references.latents([2, 0], 4, torch.device("cpu")), latents[4][[2, 0]])
    (tmp_path / "reference-00001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"reference-00001.safetensors` must be a whole file of tensors"):
        references.latents([1], 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"`seed` must be 5, as in the references in"):
        References(pipe, inputs, 6, STEPS, 3, tmp_path).make(Processes())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_an_error(pipe):
    with pytest.raises(RuntimeError, match=r"`loss` must stay finite, but got nan in update 1"):
        trained(pipe, predictor_for(pipe), loss=lambda images, wanted: (images - wanted).abs().mean() * math.nan)


@pytest.mark.slow
def test_what_is_not_finite_in_the_model_is_named(pipe):
    with pytest.raises(RuntimeError, match=r"The forecast of step \d was not finite. Lower `learning_rate`"):
        trained(pipe, predictor_for(pipe), learning_rate=1e30)

    class Overflow(torch.autograd.Function):
        """The same images, without a finite gradient."""

        @staticmethod
        def forward(context, images):
            return images.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf

    with pytest.raises(
        RuntimeError, match=r"`pipe` must give finite gradients, but got \w+ in update 1. Check the inp"
    ):
        trained(pipe, predictor_for(pipe), loss=lambda images, wanted: squared(Overflow.apply(images), wanted))


def test_losses_have_names():
    first, second, again = (functools.partial(torch.nn.functional.mse_loss, reduction=each) for each in "aba")
    assert name_of(first) == name_of(again) != name_of(second)
    assert name_of(squared).endswith("squared")


@pytest.mark.slow
def test_losses_that_cannot_be_used_are_refused(pipe):
    predictor = predictor_for(pipe)
    with pytest.raises(ValueError, match=r"`loss` must be 'latents', 'pixels' or a function .* but got 'lpips'"):
        trained(pipe, predictor, loss="lpips")
    with pytest.raises(ValueError, match=r"`loss` must give distances of 0 or more, with a gradient"):
        trained(pipe, predictor, loss=lambda images, wanted: torch.zeros(()))
    pipe.vae = None
    with pytest.raises(TypeError, match=r"`pipe` must have a VAE"):
        trained(pipe, predictor, loss="pixels")


def test_what_gradients_cannot_pass_through_is_refused(pipe, tmp_path):
    predictor = predictor_for(pipe)
    for changed, message in (
        (
            {"mixer": "dense"},
            r"`predictor.config.mixer` must be a forecaster whose weights depend on noise levels only",
        ),
        ({"history": "steps"}, r"`predictor.config.history` must be 'anchors', but got 'steps', that of .* 'newton'"),
        ({"family": "sd3"}, r"`predictor.config.family` must be 'flux'"),
        ({"schedule": None, "schedule_sigmas": None}, r"`predictor.config.schedule` must be the steps to compute"),
        ({"num_inference_steps": None}, r"`num_inference_steps` must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(pipe, FusedKANPredictor(replace(predictor.config, **changed)), tmp_path / "new")
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"`predictor.config.mixer` must be one that has something to train"):
        trained(pipe, FusedKANPredictor(replace(predictor.config, mixer="linear", rank=None, hidden=None)))
    with lesa.enable_cache(pipe, predictor), pytest.raises(RuntimeError, match="must have no cache on"):
        trained(pipe, predictor)
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=r"a FluxTransformer2DModel that is offloaded or cast layer by layer"):
        trained(pipe, predictor)


@pytest.mark.slow
def test_pipelines_that_gradients_cannot_pass_through_are_refused(pipe):
    predictor = predictor_for(pipe)
    with pytest.raises(ValueError, match=r"`pipe` must have no ControlNet"):
        trained(small.ALL["flux controlnet"].build(), predictor)
    with pytest.raises(TypeError, match=r"`pipe` must be no modular pipeline"):
        trained(modular_pipelines.CASES["flux"].build(plain=pipe), predictor)
    for case, message in (
        (small_wan.EXPERTS["wan 2.2"], r"have one transformer, .* with transformer and transformer_2"),
        (small_ltx2.CASES["ltx-2"], r"have one output head, .* whose transformer has 2"),
    ):
        other = case.build()
        with pytest.raises(ValueError, match=message):
            trained(other, predictor_for(other))

    class Around(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    Around.__call__ = functools.wraps(Around.__base__.__call__)(Around.__call__)  # such as a decorator that times calls
    pipe.__class__ = Around
    with pytest.raises(TypeError, match=r"have a `__call__` whose outermost decorator is `torch.no_grad`"):
        trained(pipe, predictor)
    pipe.__class__ = Around.__base__

    class Undecorated(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe.__class__ = Undecorated
    with pytest.raises(TypeError, match=r"have a `__call__` whose outermost decorator is `torch.no_grad`"):
        trained(pipe, predictor)
    pipe.__class__ = Undecorated.__base__
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"a FluxTransformer2DModel that is offloaded or cast layer by layer"):
        trained(pipe, predictor)
    accelerate.hooks.remove_hook_from_submodules(pipe.transformer)
    pipe.transformer.compile()
    with pytest.raises(ValueError, match=r"a transformer that is not compiled as a whole"):
        trained(pipe, predictor)


@pytest.mark.slow
def test_decorators_below_no_grad_stay(pipe):
    calls = []

    class Counted(type(pipe)):
        pass

    @functools.wraps(Counted.__call__)
    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return Counted.__base__.__call__.__wrapped__(self, *args, **kwargs)

    Counted.__call__ = torch.no_grad()(counted)
    pipe.__class__ = Counted
    trained(pipe, predictor_for(pipe), updates=1, count=1)
    assert calls == [False, True]


@pytest.mark.slow
def test_another_number_of_steps_than_the_predictor_s_is_refused_after_one_run(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"`num_inference_steps` must make the pipeline execute 6 steps.*executes 8"):
        trained(pipe, predictor_for(pipe), tmp_path, num_inference_steps=8, samples_per_call=1)
    assert len([*(tmp_path / "references").glob("*.safetensors")]) == 1


@pytest.mark.slow
def test_a_transformer_that_stops_gradients_is_refused(pipe):
    block = pipe.transformer.single_transformer_blocks[-1]
    forward = block.forward

    def without(*args, **kwargs):
        with torch.no_grad():
            return forward(*args, **kwargs)

    block.forward = without
    with pytest.raises(ValueError, match=r"one with a FluxTransformer2DModel, which stops them"):
        trained(pipe, predictor_for(pipe, (0, 2, 4)))


@pytest.mark.slow
def test_a_layer_that_stops_gradients_is_refused(pipe):
    """Around the layers inside a block, gradients still pass."""
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    forward = layer.forward
    layer.forward = torch.no_grad()(forward)
    with pytest.raises(ValueError, match=r"one with a Linear, which stops them, as some quantised layers do"):
        trained(pipe, predictor_for(pipe, (0, 2, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("computed", [(0, 2), (0, 2, 4)])
def test_a_scheduler_that_stops_gradients_is_refused(pipe, computed):
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **options: tuple(each.detach() for each in step(*args, **options))
    with pytest.raises(ValueError, match=r"keep gradients from step to step.*has stopped them before step 2"):
        trained(pipe, predictor_for(pipe, computed))


@pytest.mark.slow
def test_a_computed_step_costs_at_most_four_forward_passes(pipe):
    """The blocks run three times, and the gradient of their inputs takes about as long as one of them."""
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    trained(pipe, predictor_for(pipe, (0, 2, 4)), updates=1, count=1, batch_size=1)
    before_the_first_forecast, others = 1, 2
    assert len(calls) - STEPS == before_the_first_forecast + others * (CALLS_PER_COMPUTED_STEP - 1)
