"""`lesa.train_end_to_end`: runs through which gradients pass, and training through them."""

import contextlib
import gc
import json
import math
from dataclasses import replace

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
def test_memory_grows_with_the_steps_by_their_latents_only(pipe):
    """A predicted step keeps its latents and the weights of its forecast; a computed one also its features."""
    inputs, predictor = inputs_of(count=4), predictor_for(pipe)

    def kept(steps, computed):
        runs, alive = DifferentiableRuns(pipe, predictor), _Alive()
        with runs.on(), alive:
            run = runs.run(inputs, range(len(inputs)), steps, Schedule(computed))
            return alive.bytes(), run.latents[run.last]

    (few, latents), (many, _), (more, _) = kept(12, (0, 2, 5, 9)), kept(24, (0, 2, 5, 9)), kept(12, (0, 2, 5, 7, 9))
    config = predictor.config
    length, width = config.max_history, config.feature_dim
    weights = 4 * ((length + 1) * width + (length - 1) * length + 2)  # anchors, constant, taps, count and stage
    small_ones = 64  # such as the timestep
    assert 0 <= many - few - 12 * (latents.nbytes + weights) <= 12 * small_ones
    features = latents.shape[0] * latents.shape[1] * width * 4
    assert more - few <= features + 2 * latents.nbytes


def trained(pipe, predictor, folder=None, count=3, **options):
    return lesa.train_end_to_end(predictor, pipe, inputs_of(count=count), out_dir=folder, **{**QUICK, **options})


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bytes(pipe, tmp_path):
    predictor = predictor_for(pipe)
    before = weights_of(predictor)
    wanted = trained(pipe, predictor, tmp_path / "whole")
    calls = iter(range(1, 100))

    def interrupt(*_):
        if next(calls) == 35:  # in the backward pass of the third update
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(pipe, predictor, tmp_path / "cut")
    hook.remove()
    checkpoint = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["epoch"] < QUICK["updates"]
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
def test_the_pipeline_is_as_before_also_after_an_error(pipe, tmp_path):
    predictor, cls = predictor_for(pipe), type(pipe)
    pipe.transformer.train().requires_grad_(True)
    pipe.transformer.proj_out.weight.requires_grad_(False)
    pipe.vae.requires_grad_(False).eval()
    states = []

    def state():
        parts = (pipe.transformer, pipe.vae)
        weights = [weight.requires_grad for part in parts for weight in part.parameters()]
        modules = [(each.training, vars(each).get("gradient_checkpointing")) for p in parts for each in p.modules()]
        return weights, modules, type(pipe), installed_hook(pipe.transformer), vars(pipe.transformer).keys()

    before = state()
    trained(pipe, predictor, updates=1)
    assert state() == before

    def fail(update, loss):
        states.append(state())
        raise ZeroDivisionError

    settings = EndToEndSettings(STEPS, 1, 1, 1)
    with pytest.raises(ZeroDivisionError):
        trained_end_to_end(predictor, pipe, inputs_of(), settings, tmp_path, Processes(), on_update=fail)
    assert state() == before and type(pipe) is cls
    (inside,) = states
    assert not any(inside[0]) and not any(training for training, _ in inside[1]) and (False, True) in inside[1]
    assert all(weight.grad is None for weight in pipe.transformer.parameters())


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
def test_images_can_be_compared(pipe):
    predictor, module = predictor_for(pipe), Distance()
    losses = ("latents", "pixels", squared, module)
    found = [trained(pipe, predictor, loss=loss, updates=1, count=2).state_dict() for loss in losses]
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
def test_losses_that_cannot_be_used_are_refused(pipe):
    predictor = predictor_for(pipe)
    with pytest.raises(ValueError, match=r"`loss` must be 'latents', 'pixels' or a function .* but got 'lpips'"):
        trained(pipe, predictor, loss="lpips")
    with pytest.raises(ValueError, match=r"`loss` must give distances of 0 or more, with a gradient"):
        trained(pipe, predictor, loss=lambda images, wanted: torch.zeros(()))
    pipe.vae = None
    with pytest.raises(TypeError, match=r"`pipe` must have a VAE"):
        trained(pipe, predictor, loss="pixels")


def test_what_gradients_cannot_pass_through_is_refused(pipe):
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
            trained(pipe, FusedKANPredictor(replace(predictor.config, **changed)))
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
    for name, message in (("flux controlnet", "`pipe` must have no ControlNet"),):
        with pytest.raises(ValueError, match=message):
            trained(small.ALL[name].build(), predictor)

    class Undecorated(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe.__class__ = Undecorated
    with pytest.raises(TypeError, match=r"have a `__call__` with the decorator `torch.no_grad`"):
        trained(pipe, predictor)
    pipe.__class__ = Undecorated.__base__
    pipe.transformer.compile()
    with pytest.raises(ValueError, match=r"a transformer that is not compiled as a whole"):
        trained(pipe, predictor)


@pytest.mark.slow
def test_another_number_of_steps_than_the_predictor_s_is_refused(pipe):
    with pytest.raises(ValueError, match=r"`num_inference_steps` must make the pipeline execute 6 steps.*executes 8"):
        trained(pipe, predictor_for(pipe), num_inference_steps=8)


@pytest.mark.slow
def test_a_transformer_that_stops_gradients_is_refused(pipe):
    block = pipe.transformer.single_transformer_blocks[-1]
    forward = block.forward

    def without(*args, **kwargs):
        with torch.no_grad():
            return forward(*args, **kwargs)

    block.forward = without
    with pytest.raises(ValueError, match=r"a FluxTransformer2DModel, which stops them"):
        trained(pipe, predictor_for(pipe, (0, 2, 4)))


def test_the_cost_counts_forward_passes():
    settings = EndToEndSettings(50, updates=40, batch_size=8)
    assert end_to_end_cost(settings, computed=9, streams=2) == 40 * 8 * 9 * 2 * 4
