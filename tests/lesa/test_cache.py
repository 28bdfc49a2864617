import copy
import gc
import math
import re
import threading
import warnings
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, ModelHook

import lesa
from driven_loops import SOME, STEPS, call_arguments, drive, guided, ours
from lesa.cache.placement import installed_hook
from lesa.cache.run import Run
from lesa.demo import digits
from lesa.models import adapter_for
from lesa.models.adapter import Adapter
from lesa_kernels import FeatureRing, FusedKANPredictor, PredictorConfig, TieredRing, output_head
from predictors import DIM, make_predictor, rings_of, untrained_predictor

make_dense = partial(make_predictor, mixer="dense")


def trained_predictor(steps=(0, 2, 6, 12, 18, 25, 32, 39, 46), total=50):
    sigmas = tuple(1 - s / total for s in steps)
    return make_predictor(family="flux", num_inference_steps=total, schedule=steps, schedule_sigmas=sigmas)


def traces(transformer):
    """All that a cache could leave on a transformer."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules()]
    registry = getattr(transformer, "_diffusers_hook", None)
    return sum(hooks), "forward" in transformer.__dict__, registry and sorted(registry.hooks)


@pytest.fixture
def calls(pipe):
    """How often each part of the transformer ran."""
    counts, handles = {}, []
    transformer = pipe.transformer
    parts = {f"block {i}": b for i, b in enumerate([*transformer.transformer_blocks])}
    parts |= {f"single block {i}": b for i, b in enumerate([*transformer.single_transformer_blocks])}
    parts |= {name: getattr(transformer, name) for name in ("x_embedder", "context_embedder", "norm_out", "proj_out")}
    for name, module in parts.items():
        counts[name] = 0

        def count(module, args, name=name):
            counts[name] += 1

        handles.append(module.register_forward_pre_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


@pytest.fixture
def calls_of():
    """`calls_of(transformer)` counts from then on how often its first block runs."""

    def watch(transformer):
        counts = {"block": 0}

        def count(module, args):
            counts["block"] += 1

        transformer.transformer_blocks[0].register_forward_pre_hook(count)
        return counts

    return watch


def assert_equal_lists(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [make_predictor, make_dense], ids=["newton", "dense"])
def test_everything_computed_is_bit_exact(pipe, generate, make):
    plain = generate(pipe)
    with lesa.enable_cache(pipe, make(), range(STEPS)) as handle:
        assert torch.equal(generate(pipe), plain)
    assert handle.stats.streams["cond"].computed == [*range(STEPS)]
    assert handle.stats.streams["cond"].predicted == []


def test_disabled_is_bit_exact_and_leaves_nothing_behind(pipe, generate):
    plain, before = generate(pipe), traces(pipe.transformer)
    handle = lesa.enable_cache(pipe, make_predictor(), SOME)
    cached = generate(pipe)
    assert not torch.equal(cached, plain)
    handle.disable()
    assert traces(pipe.transformer) == before
    assert before[:2] == (0, False)
    assert torch.equal(generate(pipe), plain)
    handle.disable()
    lesa.disable_cache(pipe)
    assert traces(pipe.transformer) == before


def test_a_pipeline_that_never_ran_gets_its_attributes_back(fresh_pipe):
    before = {*fresh_pipe.transformer.__dict__}
    lesa.enable_cache(fresh_pipe, make_predictor(), 3)
    assert {*fresh_pipe.transformer.__dict__} > before
    lesa.disable_cache(fresh_pipe)
    assert {*fresh_pipe.transformer.__dict__} == before


def test_context_manager_disables_even_after_an_error(pipe):
    before = traces(pipe.transformer)
    with pytest.raises(KeyError), lesa.enable_cache(pipe, make_predictor(), 3):
        raise KeyError
    assert traces(pipe.transformer) == before


def accelerate_hook(transformer):
    """Puts a hook of accelerate, which wraps `forward`, on the transformer, and returns a list that gets its calls."""
    hooks = pytest.importorskip("accelerate.hooks", reason="offloading needs accelerate")
    calls = []

    class Count(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(transformer, Count())
    return calls


def test_a_wrapper_made_while_the_cache_was_on_stays(fresh_pipe, generate):
    pipe, plain = fresh_pipe, generate(fresh_pipe)
    predictor = make_predictor()
    handle = lesa.enable_cache(pipe, predictor, SOME)
    cached, predictor = generate(pipe), weakref.ref(predictor)
    calls = accelerate_hook(pipe.transformer)
    assert torch.equal(generate(pipe), cached) and len(calls) == STEPS
    handle.disable()
    del handle
    gc.collect()
    assert predictor() is None
    assert torch.equal(generate(pipe), plain) and len(calls) == 2 * STEPS
    for _ in range(2):
        with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
            assert torch.equal(generate(pipe), cached)
        assert handle.stats.streams["cond"].computed == SOME
    assert len(calls) == 4 * STEPS
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(pipe.transformer)
    assert torch.equal(generate(pipe), plain)


class CountCalls(ModelHook):
    """A hook of diffusers that counts."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_a_hook_that_goes_leaves_the_cache_on(fresh_pipe, generate, kind):
    pipe, plain, hook = fresh_pipe, generate(fresh_pipe), CountCalls()
    if kind == "accelerate":
        hooks = pytest.importorskip("accelerate.hooks", reason="offloading needs accelerate")
        calls = accelerate_hook(pipe.transformer)
        remove = partial(hooks.remove_hook_from_module, pipe.transformer)
    else:
        registry, calls = HookRegistry.check_if_exists_or_initialize(pipe.transformer), []
        registry.register_hook(hook, "count")
        remove = partial(registry.remove_hook, "count")
    handle = lesa.enable_cache(pipe, make_predictor(), SOME)
    cached = generate(pipe)
    assert len(calls) + hook.calls == STEPS
    remove()
    assert torch.equal(generate(pipe), cached)
    assert handle.stats.streams["cond"].computed == SOME
    handle.disable()
    assert torch.equal(generate(pipe), plain)
    assert len(calls) + hook.calls == STEPS


def test_another_hook_stays_when_the_cache_goes(pipe, generate):
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for hook_first in (True, False):
        count = CountCalls()
        if hook_first:
            registry.register_hook(count, "count")
        with lesa.enable_cache(pipe, make_predictor(), SOME):
            if not hook_first:
                registry.register_hook(count, "count")
            generate(pipe)
        assert count.calls == STEPS
        generate(pipe)
        assert count.calls == 2 * STEPS
        registry.remove_hook("count")


def test_predicted_steps_run_the_head_only(pipe, generate, calls):
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        generate(pipe)
    stream = handle.stats.streams["cond"]
    assert stream.computed == SOME
    assert stream.predicted == [s for s in range(STEPS) if s not in SOME]
    assert stream.reasons == dict.fromkeys(SOME, "scheduled")
    assert (handle.stats.computed_steps, handle.stats.predicted_steps) == (len(SOME), STEPS - len(SOME))
    head = {name: calls.pop(name) for name in ("norm_out", "proj_out")}
    assert len(calls) == 5 and {*calls.values()} == {len(SOME)}
    assert {*head.values()} == {STEPS}
    assert handle.stats.summary().startswith("cond: computed 5 (0,1,2,5,9), predicted 7 steps")


@torch.no_grad()
def test_the_untrained_cache_is_first_order_extrapolation(pipe, generate):
    """Against a loop written out here: Euler steps, blocks at some of them, else a line through the newest two."""
    transformer, anchors, sigmas = pipe.transformer, [], []
    call = call_arguments()
    latents = call["hidden_states"]
    grab = transformer.norm_out.register_forward_pre_hook(lambda m, args: anchors.append(args[0].double()))
    for step in range(STEPS):
        sigma = 1 - step / STEPS
        if step in SOME:
            sigmas.append(sigma)
            timestep = torch.full((2,), sigma)
            velocity = transformer(**{**call, "hidden_states": latents, "timestep": timestep})[0]
        else:
            slope = (anchors[-1] - anchors[-2]) / (sigmas[-1] - sigmas[-2])
            features = (anchors[-1] + slope * (sigma - sigmas[-1])).float()
            embedding = transformer.time_text_embed(torch.full((2,), sigma * 1000), call["pooled_projections"])
            scale, shift = transformer.norm_out.linear(F.silu(embedding)).chunk(2, 1)
            normed = F.layer_norm(features, (DIM,), eps=1e-6)
            velocity = transformer.proj_out(normed * (1 + scale[:, None]) + shift[:, None])
        latents = latents - velocity / STEPS
    grab.remove()
    with lesa.enable_cache(pipe, untrained_predictor(), SOME):
        cached = generate(pipe, latents=call["hidden_states"])
    torch.testing.assert_close(cached, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [make_predictor, make_dense], ids=["newton", "dense"])
def test_what_the_history_holds(pipe, generate, make):
    predictor = make()
    rings, pushes = rings_of(predictor), []
    lesa.enable_cache(pipe, predictor, SOME)

    def watch(pipe, step, timestep, tensors):
        pushes.append((rings[0].sigmas[rings[0].cursor[0] - 1, 0].item(), int(rings[0].count[0])))
        return {}

    generate(pipe, callback_on_step_end=watch)
    held = SOME if predictor.config.history == "anchors" else range(STEPS)
    newest = [max(s for s in held if s <= step) for step in range(STEPS)]
    counts = [min(rings[0].capacity, sum(s <= step for s in held)) for step in range(STEPS)]
    assert [s for s, _ in pushes] == pytest.approx([1 - s / STEPS for s in newest])
    assert [c for _, c in pushes] == counts


@pytest.mark.parametrize(
    "schedule, computed",
    [
        (4, [0, 1, 2, 6, 10]),
        ([0, 3, 4], [0, 3, 4]),
        ((0, 5, 40), [0, 5]),
        (lesa.Schedule((0, 7)), [0, 7]),
        (lesa.Schedule((0, 5, 10), 20, (1.0, 0.75, 0.5)), [0, 3, 6]),
    ],
    ids=str,
)
def test_forms_of_a_schedule(pipe, generate, schedule, computed):
    with lesa.enable_cache(pipe, make_predictor(), schedule) as handle:
        generate(pipe)
    assert handle.stats.streams["cond"].computed == computed


def test_no_schedule_means_the_trained_one(pipe, generate):
    with lesa.enable_cache(pipe, trained_predictor((0, 2, 5, 9), STEPS)) as handle:
        generate(pipe)
        assert handle.stats.streams["cond"].computed == [0, 2, 5, 9]
        assert handle.stats.notes == []


@pytest.mark.parametrize("steps", [20, 100])
def test_other_step_counts_than_the_trained(pipe, generate, steps):
    predictor = trained_predictor()
    with lesa.enable_cache(pipe, predictor) as handle:
        generate(pipe, steps=steps, labels=(3,))
    run = [1 - i / steps for i in range(steps)]
    nearest = {min(range(steps), key=lambda i: abs(run[i] - s)) for s in predictor.config.schedule_sigmas}
    assert handle.stats.streams["cond"].computed == sorted(nearest)
    assert handle.stats.notes == [f"the predictor was trained at 50 steps, this run has {steps}"]
    assert handle.stats.notes[0] in handle.stats.summary()


@pytest.mark.parametrize("steps, least", [(50, 44), (28, 40)])
@pytest.mark.slow
def test_a_trained_predictor_is_near_at_other_step_counts_too(generate, steps, least):
    """In dB of the latents, whose peak is 2. At 28 steps the gaps are not those that it was trained with."""
    predictor = FusedKANPredictor.from_pretrained(digits.WEIGHTS / "newton-9")
    pipe, labels, seed = digits.load_pipeline(), tuple(range(8)), 30_000
    plain = generate(pipe, steps=steps, labels=labels, seed=seed)
    with lesa.enable_cache(pipe, predictor) as handle:
        cached = generate(pipe, steps=steps, labels=labels, seed=seed)
    assert handle.stats.predicted_steps == steps - 9
    assert ("the predictor was trained at 50 steps" in handle.stats.summary()) == (steps != 50)
    decibels = 10 * torch.log10(4 / (cached - plain).square().mean((1, 2)))
    assert decibels.mean() > least


def test_a_transformer_with_the_cache_on_is_not_copied(pipe):
    with (
        lesa.enable_cache(pipe, make_predictor(), SOME),
        pytest.raises(RuntimeError, match="`transformer` cannot be copied while a cache of lesa is on"),
    ):
        copy.deepcopy(pipe.transformer)
    assert copy.deepcopy(pipe.transformer) is not pipe.transformer


def test_another_schedule_than_the_trained_is_noted(pipe, generate):
    with lesa.enable_cache(pipe, trained_predictor((0, 2, 5, 9), STEPS), 4) as handle:
        generate(pipe)
    assert handle.stats.notes == ["the predictor was trained with the computed steps 0,2,5,9"]


def test_steps_that_it_was_trained_for_too_are_not_noted(pipe, generate):
    predictor = trained_predictor((0, 2, 5, 9), STEPS)
    predictor.config = replace(predictor.config, more_step_counts=(8, 20))
    for steps in (8, 20):
        with lesa.enable_cache(pipe, predictor) as handle:
            generate(pipe, steps=steps)
        assert handle.stats.notes == []
        nearest = handle.stats.streams["cond"].computed
        with lesa.enable_cache(pipe, predictor, [0, 3]) as handle:
            generate(pipe, steps=steps)
        steps_of_training = ",".join(map(str, nearest))
        assert handle.stats.notes == [f"the predictor was trained with the computed steps {steps_of_training}"]
    with lesa.enable_cache(pipe, predictor) as handle:
        generate(pipe, steps=15)
    assert handle.stats.notes == [f"the predictor was trained at 8, {STEPS}, 20 steps, this run has 15"]


def test_a_schedule_without_noise_levels_at_another_count_is_noted(pipe, generate):
    with lesa.enable_cache(pipe, make_predictor(), lesa.Schedule((0, 4, 8), 50)) as handle:
        generate(pipe)
    assert handle.stats.streams["cond"].computed == [0, 4, 8]
    assert handle.stats.notes == [
        "the schedule is for 50 steps and has no noise levels: its step numbers are used unchanged"
    ]


def test_steps_beyond_the_run_are_noted(pipe, generate):
    with lesa.enable_cache(pipe, make_predictor(), [0, 5, 40, 60]) as handle:
        generate(pipe)
    assert handle.stats.streams["cond"].computed == [0, 5]
    assert handle.stats.notes == ["the run has 12 steps, which leaves out the schedule's 40,60"]


def test_a_predictor_of_few_steps_predicts_in_few_steps(pipe, generate):
    with lesa.enable_cache(pipe, trained_predictor((0, 2, 5), 8)) as handle:
        generate(pipe, steps=8)
        assert handle.stats.streams["cond"].computed == [0, 2, 5]
        generate(pipe, steps=7)
        assert handle.stats.computed_steps == 7


def test_few_steps_are_computed_whole_unless_a_schedule_is_given(pipe, generate):
    plain = generate(pipe, steps=9)
    with lesa.enable_cache(pipe, trained_predictor()) as handle:
        with pytest.warns(RuntimeWarning, match="lesa: computed everything: 9 steps are too few to predict any"):
            assert torch.equal(generate(pipe, steps=9), plain)
        assert handle.stats.computed_steps == 9
        assert handle.stats.notes == [
            "computed everything: 9 steps are too few to predict any. The predictor is for another number of steps: "
            "train one for 9, or pass none"
        ]
        generate(pipe, steps=10)
        assert 0 < handle.stats.computed_steps < 10
    with lesa.enable_cache(pipe, trained_predictor(), [0, 1]) as handle:
        generate(pipe, steps=4)
        assert handle.stats.streams["cond"].computed == [0, 1]


def broken(**options):
    predictor = make_predictor(**options)
    with torch.no_grad():
        predictor.spline[0, 0, 0] = math.inf
    return predictor


@pytest.mark.parametrize(
    "predictor, schedule, kind, message",
    [
        (9, 3, TypeError, "`predictor` must be a FusedKANPredictor, or the folder or hub id of one, but got 9"),
        (
            make_predictor(family="hunyuan-video"),
            3,
            ValueError,
            r"`predictor\.config\.family` must be 'flux', but got 'hunyuan-video'",
        ),
        (
            FusedKANPredictor(PredictorConfig(96)),
            3,
            ValueError,
            r"`predictor\.config\.feature_dim` must be the transformer's width, 128, but got 96",
        ),
        (broken(), 3, ValueError, "`predictor` must have finite weights, but got NaN or Inf in spline"),
        (
            make_predictor().to("meta"),
            3,
            ValueError,
            r"`predictor` must be on the transformer's device, cpu, but got one on meta.*predictor\.to\('cpu'\)",
        ),
        (
            make_predictor(),
            None,
            ValueError,
            "`schedule` is required: this predictor was trained without one. Pass an i",
        ),
        (make_predictor(), 0, ValueError, "`schedule` must be an integer of at least 1, but got 0"),
        (make_predictor(), "7", TypeError, "`schedule` must be an integer of at least 1, but got '7'"),
        (make_predictor(), True, TypeError, "`schedule` must be an integer of at least 1, but got True"),
        (make_predictor(), [1, 2], ValueError, r"`steps` must be rising step indices that start with 0"),
    ],
    ids=["type", "family", "width", "weights", "device", "no-schedule", "zero", "str", "bool", "no-first-step"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_touched(pipe, predictor, schedule, kind, message):
    before = traces(pipe.transformer)
    with pytest.raises(kind, match=message):
        lesa.enable_cache(pipe, predictor, schedule)
    assert traces(pipe.transformer) == before


def test_numpy_integers_are_intervals(pipe, generate):
    numpy = pytest.importorskip("numpy")
    with lesa.enable_cache(pipe, make_predictor(), numpy.int64(4)) as handle:
        generate(pipe)
    assert handle.stats.streams["cond"].computed == [0, 1, 2, 6, 10]


def test_pipelines_of_other_families_are_refused():
    other = SimpleNamespace(transformer=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="must have a transformer that lesa can use, but got a Linear"):
        lesa.enable_cache(other, make_predictor(), 3)
    with pytest.raises(TypeError, match="SimpleNamespace with a NoneType"):
        lesa.disable_cache(SimpleNamespace())


def test_enabling_twice_is_refused(pipe, generate):
    handle = lesa.enable_cache(pipe, make_predictor(), SOME)
    with pytest.raises(RuntimeError, match=r"on already. Call `lesa\.disable_cache\(pipe\)`"):
        lesa.enable_cache(pipe, make_predictor(), 3)
    generate(pipe)
    assert handle.stats.streams["cond"].computed == SOME  # the first one is still on
    handle.disable()
    lesa.enable_cache(pipe, make_predictor(), 3).disable()


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(), TaylorSeerCacheConfig()], ids=lambda c: type(c).__name__)
def test_another_cache_is_refused(fresh_pipe, config):
    fresh_pipe.transformer.enable_cache(config)
    with pytest.raises(RuntimeError, match=rf"{type(config).__name__}\. Call `pipe\.transformer\.disable_cache\(\)`"):
        lesa.enable_cache(fresh_pipe, make_predictor(), 3)
    fresh_pipe.transformer.disable_cache()
    lesa.enable_cache(fresh_pipe, make_predictor(), 3)


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(), TaylorSeerCacheConfig()], ids=lambda c: type(c).__name__)
def test_another_cache_that_comes_later_is_refused_by_the_run(fresh_pipe, generate, config):
    handle = lesa.enable_cache(fresh_pipe, make_predictor(), SOME)
    cached = generate(fresh_pipe)
    fresh_pipe.transformer.enable_cache(config)
    with pytest.raises(RuntimeError, match=rf"{type(config).__name__}\. Call `pipe\.transformer\.disable_cache\(\)`"):
        generate(fresh_pipe)
    fresh_pipe.transformer.disable_cache()
    assert torch.equal(generate(fresh_pipe), cached)
    assert handle.stats.streams["cond"].computed == SOME


def test_two_threads_at_once_are_refused(pipe, generate):
    inside, go_on, outputs = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        go_on.wait(30)

    with lesa.enable_cache(pipe, make_predictor(), SOME):
        alone = generate(pipe)
        guard = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: outputs.append(generate(pipe)))
        thread.start()
        try:
            assert inside.wait(30)
            with pytest.raises(RuntimeError, match="from two threads at the same time.*give each thread a transformer"):
                pipe.transformer(**call_arguments(), timestep=torch.ones(2))
        finally:
            go_on.set()
            thread.join()
            guard.remove()
        assert torch.equal(outputs[0], alone)
        assert torch.equal(generate(pipe), alone)  # the refusal left nothing locked


@pytest.mark.parametrize("steps", [28, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("before", ["never ran", "ran", "ran at another count", "failed", "was set"])
def test_a_second_pipeline_with_its_own_scheduler_is_computed(fresh_pipe, generate, calls_of, before, steps):
    pipe, other = fresh_pipe, digits.build_pipeline(fresh_pipe.transformer)
    other.set_progress_bar_config(disable=True)
    plain = generate(digits.build_pipeline(fresh_pipe.transformer), steps=steps, labels=(3,))
    handle = lesa.enable_cache(pipe, make_predictor(), [0, 1])

    def fail(pipe, index, timestep, tensors):
        if index == 5:
            raise KeyError("stop")
        return {}

    if before == "ran":
        generate(pipe, steps=steps, labels=(3,))
    elif before == "ran at another count":
        generate(pipe, labels=(3,))
    elif before == "failed":
        with pytest.raises(KeyError):
            generate(pipe, steps=steps, labels=(3,), callback_on_step_end=fail)
    elif before == "was set":
        pipe.scheduler.set_timesteps(1000)
    counts = calls_of(pipe.transformer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(generate(other, steps=steps, labels=(3,)), plain)
    assert counts == {"block": steps}
    assert sum("not one of the scheduler's" in message for message in ours(caught)) == 1
    located = before in ("failed", "was set")  # one call is at the very step where that scheduler is: it is computed
    assert handle.stats.unlocated == steps - located


def test_consecutive_runs_are_identical(pipe, generate):
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        first, second = generate(pipe), generate(pipe)
    assert torch.equal(first, second)
    assert handle.stats.runs == 2
    assert handle.stats.streams["cond"].computed == SOME  # of the latest run only


def test_runs_of_other_batches_sizes_and_counts(pipe, generate):
    options = [
        {"labels": (3, 8)},
        {"labels": (1, 2, 4), "seed": 5},
        {"labels": (7,), "height": 24, "width": 16},
        {"labels": (3, 8), "steps": 15},
    ]
    alone = []
    for option in options:
        with lesa.enable_cache(pipe, make_predictor(), SOME):
            alone.append(generate(pipe, **option))
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        together = [generate(pipe, **option) for option in options]
    assert_equal_lists(together, alone)


def formula_in_the_docs():
    """The documented formula for a ring's bytes, as a function of the names in it."""
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    (formula,) = re.findall(r"`bytes = (.*)`", text)
    return lambda **sizes: eval(formula, {"__builtins__": {}}, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stats_report_the_memory_of_the_rings_to_the_byte(fresh_pipe, generate, dtype):
    fresh_pipe.transformer.to(dtype)
    predictor = make_predictor()
    rings = rings_of(predictor)
    with lesa.enable_cache(fresh_pipe, predictor, SOME) as cache:
        generate(fresh_pipe, STEPS)
    (ring,) = rings
    taken = sum(b.untyped_storage().nbytes() for b in ring.state if b is not None)
    sizes = dict(capacity=4, batch=2, tokens=64, dim=DIM, itemsize=dtype.itemsize, scale=0)
    assert taken == formula_in_the_docs()(**sizes) == 4 * (2 * (64 * 128 * dtype.itemsize + 4)) + 2 * 8
    (stream,) = cache.stats.streams.values()
    assert stream.ring_device_bytes == cache.stats.ring_device_bytes == taken
    assert cache.stats.ring_host_bytes == 0
    assert f"its features take {taken / 2**20:.1f} MiB" in cache.stats.summary()
    float8 = FeatureRing(3, 5, 7, 11, torch.float8_e4m3fn)
    assert float8.nbytes == formula_in_the_docs()(capacity=3, batch=5, tokens=7, dim=11, itemsize=1, scale=4)


def test_every_stream_has_a_ring_in_the_stats(pipe):
    predictor = make_predictor()
    rings = rings_of(predictor)
    with lesa.enable_cache(pipe, predictor, SOME) as cache:
        drive(pipe, lambda step: [("first", call_arguments()), ("second", call_arguments(labels=(1, 6)))])
    assert len(rings) == len(cache.stats.streams) == 2
    assert cache.stats.ring_device_bytes == sum(ring.nbytes for ring in rings) == 2 * rings[0].nbytes


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_budget_keeps_features_in_host_memory_and_changes_nothing(pipe, generate, share):
    predictor = make_predictor()
    with lesa.enable_cache(pipe, predictor, SOME) as cache:
        expected = generate(pipe, STEPS)
    whole = cache.stats.ring_device_bytes
    rings = rings_of(predictor)
    budget = int(share * whole)
    with lesa.enable_cache(pipe, predictor, SOME, max_device_bytes=budget) as cache:
        assert torch.equal(generate(pipe, STEPS), expected)
        (ring,) = rings
        assert isinstance(ring, TieredRing)
        assert cache.stats.ring_device_bytes == ring.device_nbytes <= budget
        assert cache.stats.ring_host_bytes == ring.host_nbytes > 0
        assert re.search(r"take 0\.\d MiB, and 0\.\d MiB of host memory", cache.stats.summary())
        (stream,) = cache.stats.streams.values()
        assert stream.computed == SOME and stream.ring_host_bytes == ring.host_nbytes
    too_small = lesa.enable_cache(pipe, predictor, SOME, max_device_bytes=1000)
    with pytest.raises(ValueError, match="`max_device_bytes` must be at least"), too_small:
        generate(pipe, STEPS)
    with pytest.raises(TypeError, match="`max_device_bytes` must be an integer"):
        lesa.enable_cache(pipe, predictor, SOME, max_device_bytes="1 GB")
    assert installed_hook(pipe.transformer) is None


@pytest.mark.parametrize("how", ["weights", "forward"])
def test_a_nan_predictor_computes_everything_and_warns_once(pipe, generate, how):
    plain = generate(pipe)
    predictor = make_predictor() if how == "weights" else make_predictor(below=2.0)
    with warnings.catch_warnings(record=True) as caught, lesa.enable_cache(pipe, predictor, SOME) as handle:
        warnings.simplefilter("always")
        if how == "weights":
            torch.nn.init.constant_(predictor.out_bias, math.nan)
        for _ in range(2):
            assert torch.equal(generate(pipe), plain)
    assert len(ours(caught)) == 1 and "the forecast was not finite" in ours(caught)[0]
    stream = handle.stats.streams["cond"]
    assert stream.computed == [*range(STEPS)] and stream.predicted == []
    later = {s: "an earlier forecast was not finite" for s in (4, 6, 7, 8, 10, 11)}
    assert stream.reasons == {**dict.fromkeys(SOME, "scheduled"), 3: "the forecast was not finite", **later}
    assert "step 3: the forecast was not finite" in handle.stats.summary()


def test_nan_in_the_middle_computes_the_rest_and_the_next_run_tries_again(pipe, generate):
    predictor = make_predictor(below=0.45)  # step 7 and later
    with pytest.warns(RuntimeWarning, match="not finite"), lesa.enable_cache(pipe, predictor, SOME) as handle:
        image = generate(pipe)
        stream = handle.stats.streams["cond"]
        assert stream.predicted == [3, 4, 6]
        assert stream.computed == [0, 1, 2, 5, 7, 8, 9, 10, 11]
        predictor.below = 0.0
        generate(pipe)
        assert handle.stats.streams["cond"].computed == SOME
    with lesa.enable_cache(pipe, make_predictor(), stream.computed):
        assert torch.equal(generate(pipe), image)


def test_a_change_of_shape_in_a_run_computes_and_starts_over(pipe):
    large, small = call_arguments(), call_arguments(tokens=16)
    single = call_arguments(labels=(3,), tokens=16)

    def changing(step):
        return [("only", large if step < 4 else small if step < 8 else single)]

    plain = drive(pipe, changing)["only"]
    with lesa.enable_cache(pipe, make_predictor(), [0, 1]) as handle:
        cached = drive(pipe, changing)["only"]
    stream = handle.stats.streams["main"]
    assert stream.computed == [0, 1, 4, 8]
    assert stream.reasons[4] == stream.reasons[8] == "the shape changed"
    assert [o.shape for o in cached.values()] == [o.shape for o in plain.values()]
    for step in stream.computed:
        assert torch.equal(cached[step], plain[step])


def test_a_stream_that_appears_late_is_computed_first(pipe):
    call = call_arguments()
    pipe.scheduler.set_timesteps(STEPS)
    with lesa.enable_cache(pipe, make_predictor(), [0, 1], strict=True) as handle, torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps):
            for _ in range(2 if step >= 5 else 1):
                velocity = pipe.transformer(**call, timestep=t.expand(2) / 1000)[0]
            pipe.scheduler.step(velocity, t, call["hidden_states"])
    assert handle.stats.streams["main"].computed == [0, 1]
    late = handle.stats.streams["main-2"]
    assert late.reasons == {5: "the first call of this stream"}
    assert late.predicted == [*range(6, STEPS)]
    assert handle.stats.computed_steps == 3
    assert handle.stats.predicted_steps == STEPS - 3


def solo(pipe, call, schedule=SOME, make=make_predictor, steps=STEPS):
    with lesa.enable_cache(pipe, make(), schedule):
        return [*drive(pipe, lambda step: [("only", call)], steps)["only"].values()]


@pytest.mark.parametrize("make", [make_predictor, make_dense], ids=["newton", "dense"])
def test_two_calls_per_step_without_cache_context_are_two_streams(pipe, make):
    first, second = call_arguments(), call_arguments(labels=(1, 6))
    second["hidden_states"] = first["hidden_states"]
    with lesa.enable_cache(pipe, make(), SOME) as handle:
        outputs = drive(pipe, lambda step: [("first", first), ("second", second)])
    assert [*handle.stats.streams] == ["main", "main-2"]
    assert all(s.computed == SOME and len(s.predicted) == 7 for s in handle.stats.streams.values())
    assert handle.stats.computed_steps == len(SOME)
    for name, call in (("first", first), ("second", second)):
        assert_equal_lists([*outputs[name].values()], solo(pipe, call, make=make))


def test_true_guidance_has_two_streams_equal_to_solo_runs(pipe, generate):
    plain, seen = generate(pipe, **guided()), []
    with lesa.enable_cache(pipe, make_predictor(), range(STEPS)):
        assert torch.equal(generate(pipe, **guided()), plain)
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        spy = pipe.transformer.register_forward_hook(lambda m, a, kw, out: seen.append((kw, out[0])), with_kwargs=True)
        generate(pipe, **guided())
        spy.remove()
    assert {name: s.computed for name, s in handle.stats.streams.items()} == {"cond": SOME, "uncond": SOME}
    assert len(seen) == 2 * STEPS
    for calls in (seen[::2], seen[1::2]):
        with lesa.enable_cache(pipe, make_predictor(), SOME), torch.no_grad():
            pipe.scheduler.set_timesteps(sigmas=[1 - s / STEPS for s in range(STEPS)])
            for (kwargs, expected), t in zip(calls, pipe.scheduler.timesteps):
                assert torch.equal(pipe.transformer(**kwargs)[0], expected)
                pipe.scheduler.step(expected, t, expected)


def test_image_to_image_counts_the_executed_steps(pipe, generate):
    image_pipe = FluxImg2ImgPipeline(**pipe.components)
    image_pipe.set_progress_bar_config(disable=True)
    start = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(4))
    options = {"steps": 24, "strength": 0.5, "image": torch.zeros(2, 3, 16, 16), "latents": start}
    plain = generate(image_pipe, **options)
    with lesa.enable_cache(image_pipe, make_predictor(), range(12)):
        assert torch.equal(generate(image_pipe, **options), plain)
    with lesa.enable_cache(image_pipe, make_predictor(), SOME) as handle:
        first = generate(image_pipe, **options)
        assert torch.equal(generate(image_pipe, **options), first)
    (stream,) = handle.stats.streams.values()
    assert stream.computed == SOME and stream.predicted == [3, 4, 6, 7, 8, 10, 11]
    assert not torch.equal(first, plain)
    predictor = trained_predictor((0, 12, 30, 40), 50)  # at 1.0, 0.76, 0.4 and 0.2; this run has 0.5 ... 1 / 24
    with lesa.enable_cache(image_pipe, predictor) as handle:
        generate(image_pipe, **options)
    (stream,) = handle.stats.streams.values()
    run = [0.5 - i / 24 for i in range(12)]
    assert stream.computed == [0, *(min(range(12), key=lambda i: abs(run[i] - s)) for s in (0.4, 0.2))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [50, 200])
def test_half_precision_finds_every_step(fresh_pipe, generate, dtype, steps):
    pipe = fresh_pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    schedule = [*range(0, steps, 25)]
    with lesa.enable_cache(pipe, make_predictor(), schedule) as handle:
        latents = generate(pipe, steps=steps, labels=(3,))
    assert latents.dtype == dtype and latents.isfinite().all()
    assert [*handle.stats.streams] == ["cond"] and handle.stats.unlocated == 0
    stream = handle.stats.streams["cond"]
    assert stream.computed == schedule
    assert stream.predicted == [s for s in range(steps) if s not in schedule]


def test_half_precision_everything_computed_is_bit_exact(fresh_pipe, generate):
    pipe = fresh_pipe.to(torch.bfloat16)
    plain = generate(pipe)
    with lesa.enable_cache(pipe, make_predictor(), range(STEPS)):
        assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [10, 50, 200, 1000])
def test_steps_are_located_by_the_schedulers_position(pipe, dtype, steps):
    pipe.scheduler.set_timesteps(steps)
    run = Run(pipe.scheduler, lambda timesteps: timesteps / 1000)
    for index, t in enumerate(pipe.scheduler.timesteps):
        pipe.scheduler._step_index = index
        assert run.locate((t.to(dtype) / 1000).item(), dtype) == index
        run.index = index


def test_steps_are_located_without_a_position():
    timesteps = torch.linspace(1, 1 / 50, 50) * 1000
    scheduler = SimpleNamespace(timesteps=timesteps, config={}, sigmas=None, num_inference_steps=50)
    for dtype in (torch.float32, torch.bfloat16):
        run = Run(scheduler, lambda timesteps: timesteps / 1000)
        assert run.sigmas == pytest.approx([1 - i / 50 for i in range(50)], abs=1e-6)
        for index, t in enumerate(timesteps):
            assert run.locate((t.to(dtype) / 1000).item(), dtype) == index
            run.begin, run.index = 0, index
        assert run.locate(0.987654, torch.float32) is None
    run.index = 10
    assert run.locate(timesteps[11].item() / 1000, torch.float32) == 11
    assert run.locate(timesteps[12].item() / 1000, torch.float32) is None  # a step was left out
    assert run.locate(timesteps[0].item() / 1000, torch.float32) == 0  # a loop starts again
    scheduler.num_inference_steps = None
    assert run.locate(timesteps[11].item() / 1000, torch.float32) is None


def test_two_evaluations_at_one_noise_level_replace_the_anchor(pipe):
    """Heun's scheduler has every inner noise level twice: two steps, and one anchor."""
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    call = call_arguments()
    predictor = make_predictor(history_length=9)
    rings = rings_of(predictor)
    with lesa.enable_cache(pipe, predictor, range(9)) as handle, torch.no_grad():
        pipe.scheduler.set_timesteps(6)
        latents, features = call["hidden_states"], []
        grab = pipe.transformer.norm_out.register_forward_pre_hook(lambda m, args: features.append(args[0]))
        for t in pipe.scheduler.timesteps:
            velocity = pipe.transformer(**{**call, "hidden_states": latents, "timestep": t.expand(2) / 1000})[0]
            latents = pipe.scheduler.step(velocity, t, latents)[0]
        grab.remove()
        (ring,) = rings
        assert len(pipe.scheduler.timesteps) == 11
        (stream,) = handle.stats.streams.values()
        assert (stream.computed, stream.predicted) == ([*range(9)], [9, 10])
        assert ring.count.tolist() == [5, 5]
        held, sigmas, _ = ring.newest_first()
        assert (sigmas[:5].diff(dim=0) > 0).all()
        assert_equal_lists(held[:5].unbind(), [features[i] for i in (8, 6, 4, 2, 0)])


def test_a_loop_that_starts_again_is_a_new_run(pipe):
    call = call_arguments()
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle, torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        outputs = []
        for _ in range(2):
            pipe.scheduler.set_begin_index(0)
            pipe.scheduler._step_index = None
            for t in pipe.scheduler.timesteps:
                outputs.append(pipe.transformer(**call, timestep=t.expand(2) / 1000)[0])
                pipe.scheduler.step(outputs[-1], t, call["hidden_states"])
    assert handle.stats.runs == 2
    assert_equal_lists(outputs[STEPS:], outputs[:STEPS])


def test_positional_arguments_and_both_kinds_of_output(pipe):
    call = call_arguments()
    names = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"]
    expected = solo(pipe, call)
    with lesa.enable_cache(pipe, make_predictor(), SOME), torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        for step, t in enumerate(pipe.scheduler.timesteps):
            latents = call["hidden_states"] * (1 - 0.5 * step / STEPS)
            arguments = {**call, "hidden_states": latents, "timestep": t.expand(2) / 1000}
            positional = [arguments[name] for name in names]
            if step % 2:
                output = pipe.transformer(*positional)
                assert torch.equal(output.sample, output[0])
            else:
                output = pipe.transformer(*positional, return_dict=False)
                assert isinstance(output, tuple) and len(output) == 1
            assert torch.equal(output[0], expected[step])
            pipe.scheduler.step(output[0], t, latents)


def assert_head_is_exact(transformer, call):
    """The adapter's head gives what the whole forward gives, from the features that the forward had."""
    seen = []
    grab = transformer.norm_out.register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        expected = transformer(**call)
    grab.remove()
    adapter = adapter_for(SimpleNamespace(transformer=transformer))
    with torch.no_grad():
        bound, features = adapter.bind((), call), seen[0][0]
        conditioning = adapter.conditioning(bound, features.dtype)
        assert torch.equal(conditioning, seen[0][1])
        actual = adapter.output(bound, adapter.run_head(features, conditioning, bound))
        head = adapter.output_head(conditioning)
    assert torch.equal(actual[0], expected[0])
    assert type(actual) is type(expected)
    return seen[0][0], expected[0], head


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_head_is_the_models(pipe, guidance, dtype, return_dict):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**{**digits.TRANSFORMER_CONFIG, "guidance_embeds": guidance}).to(dtype)
    call = {**call_arguments(dtype=dtype), "timestep": torch.tensor([0.7123, 0.3377])}
    call |= {"return_dict": return_dict, "guidance": torch.tensor([3.5, 2.0]) if guidance else None}
    features, velocity, head = assert_head_is_exact(transformer, call)
    predictor, ring = make_predictor(), make_predictor().make_ring(2, 64, dtype)
    ring.push(features, 0.9)  # one anchor: the forecast is that anchor
    fused = predictor.predict_velocity(ring, torch.tensor([0.7, 0.3]), head)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(fused, velocity, **tolerance)


def test_lora_on_the_head(fresh_pipe, generate):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    transformer = fresh_pipe.transformer
    without = generate(fresh_pipe)
    torch.manual_seed(0)
    transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["proj_out", "norm_out.linear"]))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    call = {**call_arguments(), "timestep": torch.tensor([0.5, 0.5])}
    outputs = []
    for scale in (1.0, 0.5, 0.0):
        _, output, _ = assert_head_is_exact(transformer, {**call, "joint_attention_kwargs": {"scale": scale}})
        outputs.append(output)
        options = {"joint_attention_kwargs": {"scale": scale}}
        plain = generate(fresh_pipe, **options)
        assert torch.equal(plain, without) == (scale == 0.0)
        with lesa.enable_cache(fresh_pipe, make_predictor(), range(STEPS)):
            assert torch.equal(generate(fresh_pipe, **options), plain)
        with lesa.enable_cache(fresh_pipe, make_predictor(), SOME) as handle:
            cached = generate(fresh_pipe, **options)
            assert handle.stats.predicted_steps == STEPS - len(SOME)
        assert (cached - plain).abs().mean() < 0.5 * plain.abs().mean()
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_lora_that_is_put_on_the_projection_while_the_cache_is_on(fresh_pipe, generate):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    options = {"joint_attention_kwargs": {"scale": 0.5}}
    with lesa.enable_cache(fresh_pipe, make_predictor(), SOME):
        generate(fresh_pipe)
        config = peft.LoraConfig(r=4, target_modules=["proj_out"], init_lora_weights=False)
        torch.manual_seed(0)
        fresh_pipe.transformer.add_adapter(config)
        with pytest.warns(RuntimeWarning, match="the adapters default are on"):
            late = generate(fresh_pipe, **options)
    with pytest.warns(RuntimeWarning), lesa.enable_cache(fresh_pipe, make_predictor(), SOME):
        assert torch.equal(generate(fresh_pipe, **options), late)


def test_a_copy_of_the_pipeline_is_independent(pipe, generate):
    other = copy.copy(pipe)
    other.transformer = copy.deepcopy(pipe.transformer)
    plain = generate(pipe)
    with lesa.enable_cache(pipe, make_predictor(), SOME) as first:
        assert torch.equal(generate(other), plain)
        with lesa.enable_cache(other, make_dense(), 4) as second:
            generate(pipe)
            generate(other)
            assert first.stats.streams["cond"].computed == SOME
            assert second.stats.streams["cond"].computed == [0, 1, 2, 6, 10]
            assert (first.stats.runs, second.stats.runs) == (1, 1)


CPU = torch.device("cpu")


def on_kernels(predictor):
    """The predictor on Triton: in its interpreter, where there is no GPU."""
    predictor.backend = "triton"
    return predictor


@pytest.mark.parametrize("backend", ["extension", "triton"])
def test_a_plain_head_is_computed_with_the_forecast(pipe, generate, monkeypatch, backend):
    """To a tolerance: the sums of the head are added up in another order than in the model's modules."""
    predictor, schedule = make_predictor(), [0, 1, 2, 3, 4, 5, 6, 9]
    torch.nn.init.normal_(predictor.up, std=0.02)
    predictor.backend = "torch"
    with lesa.enable_cache(pipe, predictor, schedule) as handle:
        plain = generate(pipe, labels=(3,))
        assert handle.stats.streams["cond"].fused == []
        monkeypatch.delattr(Adapter, "run_head")  # the model's own head is not run
        predictor.backend = backend
        fused = generate(pipe, labels=(3,))
    stream = handle.stats.streams["cond"]
    assert stream.fused == stream.predicted == [7, 8, 10, 11]
    assert "4 of them in one pass with the output head" in handle.stats.summary()
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["extension", "triton"])
def test_a_head_in_the_kernel_follows_inputs_that_change_in_a_run(pipe, backend):
    predictor, schedule = make_predictor(), [0, 1, 2, 3, 4, 5, 6, 9]
    torch.nn.init.normal_(predictor.up, std=0.02)
    before = call_arguments((3,))
    after = before | {"pooled_projections": before["pooled_projections"] * 1.5}

    def calls(step):
        return [("it", before if step < 10 else after)]

    predictor.backend = "torch"
    with lesa.enable_cache(pipe, predictor, schedule) as handle:
        plain = drive(pipe, calls)["it"]
        predictor.backend = backend
        fused = drive(pipe, calls)["it"]
    (stream,) = handle.stats.streams.values()
    assert stream.fused == [7, 8, 10, 11]
    for step in stream.fused:
        torch.testing.assert_close(fused[step], plain[step], rtol=1e-3, atol=1e-4)


def lora_like(transformer):
    class Adapted(torch.nn.Linear):
        pass

    transformer.proj_out.__class__ = Adapted
    return "proj_out is a Adapted"


def hooked(transformer):
    transformer.proj_out.register_forward_hook(lambda module, args, output: output * 1.0)
    return "proj_out has a hook or another forward"


def hooked_norm(transformer):
    transformer.norm_out.linear.register_forward_pre_hook(lambda module, args: None)
    return "norm_out.linear has a hook or another forward"


def offloaded(transformer):
    transformer.proj_out._hf_hook = object()
    return "proj_out has a hook or another forward"


def compiled(transformer):
    transformer.proj_out.compile()
    return "proj_out has a hook or another forward"


def quantised(transformer):
    weight = torch.nn.Parameter(transformer.proj_out.weight.detach().to(torch.int8), requires_grad=False)
    transformer.proj_out.weight = weight
    return "proj_out has no plain weights"


@pytest.mark.parametrize("change", [lora_like, hooked, hooked_norm, offloaded, compiled, quantised])
def test_a_head_that_is_not_plain_is_told_by_name(fresh_pipe, change):
    adapter = adapter_for(fresh_pipe)
    own = fresh_pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: None)
    assert adapter.why_head_not_plain(own.id, CPU) is None
    assert adapter.why_head_not_plain(own.id + 1, CPU) == "norm_out has a hook or another forward"
    assert "is on cpu, not on meta" in adapter.why_head_not_plain(own.id, torch.device("meta"))
    reason = change(fresh_pipe.transformer)
    assert adapter.why_head_not_plain(own.id, CPU) == reason


def test_autocast_is_left_to_the_models_modules(pipe):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter_for(pipe).why_head_not_plain(-1, CPU) == "autocast is on"


def test_a_head_with_a_hook_runs_in_the_models_modules(fresh_pipe, generate):
    seen = []
    fresh_pipe.transformer.proj_out.register_forward_hook(lambda *_: seen.append(1))
    with lesa.enable_cache(fresh_pipe, on_kernels(make_predictor()), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) as handle:
        generate(fresh_pipe, labels=(3,))
    assert len(seen) == STEPS
    assert handle.stats.streams["cond"].fused == []
    note = "the output head ran in the model's own modules: proj_out has a hook or another forward"
    assert handle.stats.notes == [note]


def test_a_fused_step_that_is_not_finite_is_computed(pipe, generate):
    predictor = on_kernels(make_predictor())
    with lesa.enable_cache(pipe, predictor, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]) as handle:
        torch.nn.init.constant_(predictor.out_bias, math.nan)
        with pytest.warns(RuntimeWarning, match="the forecast was not finite"):
            generate(pipe, labels=(3,))
    stream = handle.stats.streams["cond"]
    assert stream.fused == stream.predicted == [] and len(stream.computed) == STEPS


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_as_tensors_is_the_models(pipe, guidance, dtype):
    config = dict(pipe.transformer.config) | {"guidance_embeds": guidance}
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config(config).to(dtype).eval()
    adapter = adapter_for(SimpleNamespace(transformer=transformer))
    call = adapter.bind((), call_arguments() | {"timestep": torch.tensor([0.7, 0.2])})
    call = {n: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in call.items()}
    if guidance:
        call["guidance"] = torch.full((2,), 3.5, dtype=dtype)
    features = torch.randn(2, 64, DIM, dtype=dtype)
    with torch.no_grad():
        conditioning = adapter.conditioning(call, dtype)
        expected = adapter.run_head(features, conditioning, call)
        actual = output_head(features, adapter.output_head(conditioning))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
