"""What a cache keeps from call to call: streams, steps and state; and what it does when these are in doubt."""

import contextlib
import gc
import itertools
import math
import re
import threading
import time
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline
from torch.utils._python_dispatch import TorchDispatchMode

import digits_pipelines
import lesa
from driven_loops import (
    FIRST,
    REST,
    SECOND,
    SOME,
    STEPS,
    THIRD,
    BareScheduler,
    call_arguments,
    drive,
    guided,
    ours,
)
from lesa.cache import device_values
from lesa.cache.conditioning import Conditioner
from lesa.cache.forecasting import ForecastingHook
from lesa.cache.hook import StepHook
from lesa.cache.run import Run
from lesa.demo import digits
from lesa.models.flux import FluxAdapter
from predictors import DIM, make_predictor, untrained_predictor


def solo(pipe, calls_of_step, name):
    """What the calls of this name give when no others are made."""
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        return drive(pipe, lambda step: [call[:2] for call in calls_of_step(step) if call[0] == name] or [OTHER])[name]


OTHER = ("other", call_arguments((5,), tokens=16), "other")  # a loop must call something in every step


def assert_branches_equal_solo(pipe, calls_of_step, streams):
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        outputs = drive(pipe, calls_of_step)
    for name, output in outputs.items():
        alone = solo(pipe, calls_of_step, name)
        assert [*output] == [*alone]
        for step in output:
            assert torch.equal(output[step], alone[step]), f"{name} at step {step}"
    assert sorted(handle.stats.streams) == sorted(streams)
    assert any(stream.predicted for stream in handle.stats.streams.values())
    return handle.stats


# Streams


def test_streams_may_swap_their_order(pipe):
    def calls(step):
        pair = [("first", FIRST), ("second", SECOND)]
        return pair[::-1] if step % 3 else pair

    stats = assert_branches_equal_solo(pipe, calls, ["main", "main-2"])
    assert all((s.computed, s.predicted) == (SOME, REST) for s in stats.streams.values())


@pytest.mark.parametrize("off", [{6, 7}, {1, 5}, {9, 10, 11}], ids=str)
@pytest.mark.parametrize("toggled", ["first", "second"])
def test_a_stream_may_be_off_for_some_steps(pipe, toggled, off):
    def calls(step):
        pair = [("first", FIRST), ("second", SECOND)]
        return [call for call in pair if not (call[0] == toggled and step in off)]

    assert_branches_equal_solo(pipe, calls, ["main", "main-2"])


def test_texts_made_anew_are_told_by_their_order(pipe):
    def calls(step):
        pair = [("first", FIRST), ("second", SECOND)]
        return [(name, call | {"encoder_hidden_states": call["encoder_hidden_states"].clone()}) for name, call in pair]

    stats = assert_branches_equal_solo(pipe, calls, ["main", "main-2"])
    assert all((s.computed, s.predicted) == (SOME, REST) for s in stats.streams.values())


def test_three_calls_with_the_same_text(pipe):
    text = {"encoder_hidden_states": FIRST["encoder_hidden_states"]}

    def calls(step):
        return [("a", FIRST), ("b", SECOND | text), ("c", THIRD | text)]

    stats = assert_branches_equal_solo(pipe, calls, ["main", "main-2", "main-3"])
    assert all((s.computed, s.predicted) == (SOME, REST) for s in stats.streams.values())


@pytest.mark.parametrize("names", [("cond", "uncond"), ("cond", "cond-2"), ("a-b", "a-b-2"), ("main", "main-2")])
def test_contexts_are_streams_whatever_their_names_and_order(pipe, names):
    def calls(step):
        pair = [("first", FIRST, names[0]), ("second", SECOND, names[1])]
        return pair[::-1] if step % 2 else pair

    stats = assert_branches_equal_solo(pipe, calls, names)
    assert all((s.computed, s.predicted) == (SOME, REST) for s in stats.streams.values())


def test_a_context_that_is_called_twice_is_not_taken_for_one_of_another_name(pipe):
    text = {"encoder_hidden_states": FIRST["encoder_hidden_states"]}

    def calls(step):
        new = {"encoder_hidden_states": THIRD["encoder_hidden_states"].clone()}  # known by its context only
        three = [("a", FIRST, "cond"), ("b", SECOND | text, "cond"), ("c", THIRD | new, "cond-2")]
        return [three[2], *three[:2]] if step % 2 else three

    stats = assert_branches_equal_solo(pipe, calls, ["cond", "cond-2", "cond-2-2"])
    assert all((s.computed, s.predicted) == (SOME, REST) for s in stats.streams.values())


@pytest.mark.parametrize("at", [3, 4, 7])
def test_a_stream_that_comes_between_others_gets_no_history_of_theirs(pipe, at):
    def calls(step):
        return [("first", FIRST), *([("new", THIRD)] if step >= at else []), ("second", SECOND)]

    plain = drive(pipe, calls)
    with pytest.warns(RuntimeWarning, match="lesa: "), lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        outputs = drive(pipe, calls)
    assert torch.equal(outputs["new"][at], plain["new"][at])
    assert torch.equal(outputs["second"][at], plain["second"][at])  # its place is taken: computed, too
    alone = solo(pipe, calls, "first")
    assert all(torch.equal(outputs["first"][step], alone[step]) for step in range(STEPS))
    reasons = {r for s in handle.stats.streams.values() for r in s.reasons.values()}
    assert reasons == {"scheduled", "the first call of this stream", "the text changed"}
    assert len(handle.stats.streams) == 3


def test_a_text_that_changes_in_a_run_is_computed_at_once(pipe):
    def calls(step):
        return [("it", FIRST if step < 6 else FIRST | {"encoder_hidden_states": SECOND["encoder_hidden_states"]})]

    plain = drive(pipe, calls)["it"]
    with pytest.warns(RuntimeWarning, match="the text"), lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        output = drive(pipe, calls)["it"]
    (stream,) = handle.stats.streams.values()
    assert stream.computed == [0, 1, 2, 5, 6, 9] and stream.reasons[6] == "the text changed"
    assert torch.equal(output[6], plain[6])
    alone = solo(pipe, lambda step: calls(step) if step >= 6 else [], "it")  # from there on it is as if it began there
    assert all(torch.equal(output[step], alone[step]) for step in range(6, STEPS))


def test_a_text_that_is_changed_in_place_is_computed_at_once(pipe):
    text = FIRST["encoder_hidden_states"].clone()

    def calls(step):
        if step == 6:
            text.copy_(SECOND["encoder_hidden_states"])
        return [("it", FIRST | {"encoder_hidden_states": text})]

    plain = drive(pipe, calls)["it"]
    text.copy_(FIRST["encoder_hidden_states"])
    with pytest.warns(RuntimeWarning, match="the text"), lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        output = drive(pipe, calls)["it"]
    (stream,) = handle.stats.streams.values()
    assert stream.computed == [0, 1, 2, 5, 6, 9] and stream.reasons[6] == "the text changed"
    assert torch.equal(output[6], plain[6])


def replay(pipe, calls, begin, total):
    """The recorded calls of one stream, as a run of their own that executes the scheduler's steps from `begin`."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / total, total))
    pipe.scheduler.set_begin_index(begin)
    with torch.no_grad():
        for (kwargs, _), t in zip(calls, pipe.scheduler.timesteps[begin:], strict=True):
            output = pipe.transformer(**kwargs)[0]
            pipe.scheduler.step(output, t, output)
            yield output


IMAGE = {
    "image": torch.zeros(2, 3, 16, 16),
    "latents": torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(4)),
}


@pytest.mark.parametrize("same_text", [False, True])
def test_true_guidance_without_contexts_has_two_streams_equal_to_solo_runs(pipe, generate, same_text):
    image_pipe, seen = FluxImg2ImgPipeline(**pipe.components), []
    image_pipe.set_progress_bar_config(disable=True)
    negative = digits.inputs_for((3, 8) if same_text else (0, 0))
    options = {
        **{"steps": 24, "strength": 0.5, "true_cfg_scale": 2.0, **IMAGE},
        "negative_prompt_embeds": torch.cat([i["prompt_embeds"] for i in negative]),
        "negative_pooled_prompt_embeds": torch.cat([i["pooled_prompt_embeds"] for i in digits.inputs_for((0, 0))]),
    }
    with lesa.enable_cache(image_pipe, make_predictor(), SOME) as handle:
        spy = pipe.transformer.register_forward_hook(lambda m, a, kw, out: seen.append((kw, out[0])), with_kwargs=True)
        generate(image_pipe, **options)
        spy.remove()
    assert [(s.computed, s.predicted) for s in handle.stats.streams.values()] == [(SOME, REST)] * 2
    assert len(seen) == 2 * STEPS
    for calls in (seen[::2], seen[1::2]):
        with lesa.enable_cache(image_pipe, make_predictor(), SOME):
            for output, (_, expected) in zip(replay(image_pipe, calls, 12, 24), calls, strict=True):
                assert torch.equal(output, expected)


# Steps

TRAINED = (0, 2, 6, 12, 18, 25, 32, 39, 46)  # of 50


def trained_predictor():
    sigmas = tuple(1 - s / 50 for s in TRAINED)
    return make_predictor(family="flux", num_inference_steps=50, schedule=TRAINED, schedule_sigmas=sigmas)


def nearest_steps(run_sigmas, schedule_sigmas):
    """By its definition: of each noise level the nearest step of the run, the first of two equally near; and step 0."""
    nearest = {min(range(len(run_sigmas)), key=lambda i: abs(run_sigmas[i] - s)) for s in schedule_sigmas}
    return sorted(nearest | {0})


CUSTOM = [1.0, 0.98, 0.95, 0.93, 0.85, 0.7, 0.66, 0.5, 0.43, 0.4, 0.25, 0.2, 0.12, 0.11, 0.03]


@pytest.mark.parametrize(
    "options, run_sigmas",
    [
        ({"steps": 10}, np.linspace(1, 0.1, 10)),
        ({"steps": 28}, np.linspace(1, 1 / 28, 28)),
        ({"steps": 50}, np.linspace(1, 1 / 50, 50)),
        ({"sigmas": CUSTOM}, CUSTOM),
        ({"steps": 50, "strength": 0.35}, np.linspace(1, 1 / 50, 50)[32:]),
        ({"steps": 28, "strength": 0.35, "sigmas": None}, np.linspace(1, 1 / 28, 28)[18:]),
        ({"steps": 15, "strength": 0.8, "sigmas": CUSTOM}, CUSTOM[3:]),
    ],
    ids=["10", "28", "50", "custom", "50 at 0.35", "28 at 0.35", "custom at 0.8"],
)
def test_computed_steps_are_those_of_an_oracle(pipe, generate, options, run_sigmas):
    total, steps, executed = len(run_sigmas), [], []
    if "strength" in options:
        pipe = FluxImg2ImgPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        options = options | {name: value[:1] for name, value in IMAGE.items()}
    expected = {
        "trained": nearest_steps(run_sigmas, [1 - s / 50 for s in TRAINED]),
        "interval": [0, 1, 2, *range(6, total, 4)],
        "indices": [s for s in (0, 3, 4, 9, 40) if s < total],
    }
    block = pipe.transformer.transformer_blocks[0]
    spies = [
        pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(len(steps))),
        block.register_forward_pre_hook(lambda *_: executed.append(steps[-1])),
    ]
    for kind, schedule in (("trained", None), ("interval", 4), ("indices", [0, 3, 4, 9, 40])):
        with lesa.enable_cache(pipe, trained_predictor(), schedule) as handle:
            generate(pipe, labels=(3,), **options)
        (stream,) = handle.stats.streams.values()
        assert stream.computed == executed == expected[kind]
        assert stream.predicted == [s for s in range(total) if s not in expected[kind]]
        assert steps == [*range(total)]
        steps.clear()
        executed.clear()
    for spy in spies:
        spy.remove()


def test_noise_levels_that_the_scheduler_shifts(pipe, generate):
    """As the large models have them: the steps nearest in sigma are others than those nearest in time."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    even = np.linspace(1, 1 / 28, 28)
    expected = nearest_steps(3 * even / (1 + 2 * even), [1 - s / 50 for s in TRAINED])
    assert expected != nearest_steps(even, [1 - s / 50 for s in TRAINED])
    with lesa.enable_cache(pipe, trained_predictor()) as handle:
        generate(pipe, steps=28, labels=(3,))
    assert handle.stats.streams["cond"].computed == expected


def test_timesteps_of_the_callers_own(pipe):
    """Set on the scheduler by a hand-written loop: no pipeline of FLUX takes them."""
    timesteps = [1000.0, 940.0, 900.0, 700.0, 640.0, 410.0, 300.0, 200.0, 190.0, 60.0]
    with lesa.enable_cache(pipe, trained_predictor()) as handle, torch.no_grad():
        pipe.scheduler.set_timesteps(timesteps=timesteps)
        for t in pipe.scheduler.timesteps:
            pipe.scheduler.step(pipe.transformer(**FIRST, timestep=t.expand(2) / 1000)[0], t, FIRST["hidden_states"])
    (stream,) = handle.stats.streams.values()
    computed = nearest_steps([t / 1000 for t in timesteps], [1 - s / 50 for s in TRAINED])
    assert stream.computed == computed and len(stream.predicted) == 10 - len(computed) > 0


@torch.no_grad()
def test_heun_predicts_along_the_line_of_its_newest_two_noise_levels(pipe):
    """Against an oracle: features of a noise level replace earlier ones of the same, and a line goes through two."""
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    transformer, schedule, call = pipe.transformer, [0, 1, 2, 4, 5, 8], FIRST
    plain = drive(pipe, lambda step: [("it", call)], 6)["it"]
    sigmas = pipe.scheduler.sigmas.tolist()
    assert len(plain) == 11 and sigmas[1] == sigmas[2]
    held, anchors, expected = [], {}, {}
    grab = transformer.norm_out.register_forward_pre_hook(lambda m, args: held.append(args[0].double()))
    drive(pipe, lambda step: [("it", call)], 6)
    grab.remove()
    for step, t in enumerate(pipe.scheduler.timesteps):
        if step in schedule:
            anchors.pop(sigmas[step], None)
            anchors[sigmas[step]] = held[step]
            continue
        (s1, f1), (s0, f0) = [*anchors.items()][-2:]
        features = (f0 + (f0 - f1) / (s0 - s1) * (sigmas[step] - s0)).float()
        embedding = transformer.time_text_embed(t.expand(2), call["pooled_projections"])
        scale, shift = transformer.norm_out.linear(F.silu(embedding)).chunk(2, 1)
        expected[step] = transformer.proj_out(
            F.layer_norm(features, (DIM,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        )
    with lesa.enable_cache(pipe, untrained_predictor(), schedule) as handle:
        outputs = drive(pipe, lambda step: [("it", call)], 6)["it"]
    (stream,) = handle.stats.streams.values()
    assert stream.computed == schedule and stream.predicted == [*expected] == [3, 6, 7, 9, 10]
    for step in schedule:
        assert torch.equal(outputs[step], plain[step])
    for step, velocity in expected.items():
        torch.testing.assert_close(outputs[step], velocity, rtol=1e-4, atol=1e-4)


# State

OPTIONS = {"labels": (5,), "seed": 9, "height": 24, "steps": STEPS + 3}


@pytest.fixture(scope="module")
def clean():
    """What a pipeline that never failed makes of `OPTIONS`, and of the defaults."""
    return {}


def expected_of(clean, generate):
    if not clean:
        pipe = digits_pipelines.cut_pipeline()
        with lesa.enable_cache(pipe, make_predictor(), SOME):
            clean["options"], clean["defaults"] = generate(pipe, **OPTIONS), generate(pipe)
    return clean


class Stop(Exception):
    """What the tests raise."""


def fail_at(step, error, module, where, monkeypatch, pipe):
    """Lets a run raise `error` at a step; returns options for the call, and a function that ends it."""

    def fail(*_):
        if pipe.scheduler.step_index == step or (step == 0 and pipe.scheduler.step_index is None):
            raise error

    if where == "scheduler":
        advance = pipe.scheduler.step

        def failing(*args, **kwargs):
            fail()
            return advance(*args, **kwargs)

        monkeypatch.setattr(pipe.scheduler, "step", failing)
        return {}, monkeypatch.undo
    if where == "callback":

        def callback(pipe, index, timestep, tensors):
            if index == step:
                raise error
            return {}

        return {"callback_on_step_end": callback}, lambda: None
    guard = module.register_forward_pre_hook(fail)
    return {}, guard.remove


PLACES = [*itertools.product(["block", "head", "scheduler", "callback"], [0, 2, 5, 6]), ("callback", STEPS - 1)]


@pytest.mark.parametrize(
    "where, step, error",
    [
        *((where, step, Stop) for where, step in PLACES),
        *(
            pytest.param(where, step, KeyboardInterrupt, marks=[] if step == 5 else [pytest.mark.slow])
            for where, step in PLACES
        ),
    ],
)
def test_after_a_failure_a_run_is_that_of_a_fresh_pipeline(pipe, generate, clean, monkeypatch, where, error, step):
    expected, transformer = expected_of(clean, generate), pipe.transformer
    module = transformer.proj_out if where == "head" else transformer.single_transformer_blocks[1]
    if where == "block" and step == 6:
        step = 9  # blocks run in computed steps only
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        options, end = fail_at(step, error, module, where, monkeypatch, pipe)
        with pytest.raises(error):
            generate(pipe, seed=3, **options)
        end()
        assert torch.equal(generate(pipe, **OPTIONS), expected["options"])
        assert torch.equal(generate(pipe), expected["defaults"])
        assert handle.stats.streams["cond"].computed == SOME
        assert handle.stats.runs == 3


def test_an_interrupted_run_leaves_nothing_to_one_of_another_kind(pipe, generate, clean):
    expected = expected_of(clean, generate)

    def interrupt(pipe, index, timestep, tensors):
        pipe._interrupt = index == 6
        return {}

    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        generate(pipe, seed=3, callback_on_step_end=interrupt)
        stream = handle.stats.streams["cond"]
        assert (stream.computed, stream.predicted) == ([0, 1, 2, 5], [3, 4, 6])
        assert torch.equal(generate(pipe, **OPTIONS), expected["options"])
        assert torch.equal(generate(pipe), expected["defaults"])
        assert handle.stats.streams["cond"].computed == SOME


def features_alive(tokens=64):
    """Tensors that may be features of the digits model, or stored ones."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return [tuple(t.shape) for t in tensors if t.ndim >= 3 and tuple(t.shape[-2:]) == (tokens, DIM)]


@pytest.mark.parametrize("history", ["anchors", "steps"])
def test_no_features_are_kept_when_a_run_has_ended(pipe, generate, history):
    predictor = make_predictor() if history == "anchors" else dense_predictor()
    during, before = [], features_alive()

    def look(pipe, index, timestep, tensors):
        if index == 6:
            during.extend(features_alive())
        return {}

    with lesa.enable_cache(pipe, predictor, SOME) as handle:
        generate(pipe, callback_on_step_end=look)
        assert features_alive() == before
        assert len(during) == len(before) + 1  # the ring's storage, and nothing beside it
        assert handle.stats.predicted_steps == len(REST)
    assert features_alive() == before


def dense_predictor():
    predictor = untrained_predictor(mixer="dense")
    assert predictor.config.history == "steps"
    torch.nn.init.normal_(predictor.mix_weight, std=0.01)
    return predictor


@pytest.mark.parametrize("step", [5, 6])
def test_no_features_are_kept_by_a_cache_that_is_turned_off_after_a_failure(pipe, generate, step):
    before = features_alive()

    def fail(pipe, index, timestep, tensors):
        if index == step:
            raise Stop
        return {}

    handle = lesa.enable_cache(pipe, make_predictor(), SOME)
    with pytest.raises(Stop):
        generate(pipe, callback_on_step_end=fail)
    assert features_alive() == before
    with pytest.raises(Stop):
        drive(pipe, lambda number: fail(pipe, number - 1, None, None) or [("call", FIRST, "cond")])
    assert features_alive() != before  # nobody says that a loop of the user's own has failed
    handle.disable()
    assert features_alive() == before
    assert handle.stats.streams["cond"].ring_device_bytes > 0


def storages_of(predictor):
    """A list that gets a weak reference to the storage of every ring which `predictor` makes from now on."""
    rings, make_ring = [], predictor.make_ring

    def remember(*args):
        ring = make_ring(*args)
        rings.append(weakref.ref(ring.storage))
        return ring

    predictor.make_ring = remember
    return rings


def alive(rings):
    gc.collect()
    return [ring() is not None for ring in rings]


def test_the_rings_of_all_streams_are_freed_by_disabling(pipe):
    predictor = make_predictor()
    rings = storages_of(predictor)

    def calls(step):
        if step == 10:
            raise Stop
        return [("first", FIRST), ("second", SECOND)]

    with lesa.enable_cache(pipe, predictor, SOME):
        with pytest.raises(Stop):
            drive(pipe, calls)
        assert alive(rings) == [True, True]
    assert alive(rings) == [False, False]


# Streams that are called in the last step, after how many calls of it the rings are freed, and when each is called
ENDINGS = {
    "one stream": (1, {"first": range(STEPS)}),
    "two streams": (2, {"first": range(STEPS), "second": range(STEPS)}),
    "three streams": (3, {"first": range(STEPS), "second": range(STEPS), "third": range(2, STEPS)}),
    "one that ended": (1, {"first": range(STEPS), "second": range(9)}),
    "one that ended a step before": (1, {"first": range(STEPS), "second": range(STEPS - 2)}),
    "every second step": (2, {"first": range(STEPS), "second": range(1, STEPS, 2)}),
    "every second step, and ended": (1, {"first": range(STEPS), "second": range(1, STEPS - 3, 2)}),
}


@pytest.mark.parametrize(
    "ending",
    [pytest.param(name, marks=[pytest.mark.slow] if "," in name or "three" in name else []) for name in ENDINGS],
)
def test_rings_are_freed_when_every_stream_has_done_the_last_step(pipe, ending):
    """Nothing else tells that such a loop has ended."""
    after, steps_of = ENDINGS[ending]
    predictor, in_last_step = make_predictor(), []
    rings, before = storages_of(predictor), features_alive()

    def calls(step):
        for name, arguments in (("first", FIRST), ("second", SECOND), ("third", THIRD)):
            if step in steps_of.get(name, ()):
                if step == STEPS - 1:
                    in_last_step.append(any(alive(rings)))
                yield name, arguments, name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # streams that begin late have no history
        with lesa.enable_cache(pipe, predictor, SOME) as handle:
            outputs = drive(pipe, calls)
            assert in_last_step == [True] * after and alive(rings) == [False] * len(steps_of)
            assert features_alive() == before
            assert handle.stats.ring_device_bytes == sum(s.ring_device_bytes for s in handle.stats.streams.values()) > 0
            assert "its features take" in handle.stats.summary()
            for name, stream in handle.stats.streams.items():
                assert sorted(stream.computed + stream.predicted) == [*steps_of[name]]
            again = drive(pipe, calls)
            assert handle.stats.runs == 2
    for name in outputs:
        assert all(torch.equal(outputs[name][step], again[name][step]) for step in outputs[name])
    for name, stream in handle.stats.streams.items():
        if STEPS - 1 in steps_of[name]:
            assert stream.predicted[-1] == STEPS - 1  # nothing was freed before it


def test_a_stream_that_comes_back_when_its_ring_is_freed_is_computed(pipe):
    def calls(step):
        return [("first", FIRST), *([("second", SECOND)] if step < 6 or step == STEPS - 1 else [])]

    predictor, plain = make_predictor(), drive(pipe, calls)
    rings = storages_of(predictor)
    with (
        pytest.warns(RuntimeWarning, match="no history"),
        lesa.enable_cache(pipe, predictor, SOME) as handle,
    ):
        outputs = drive(pipe, calls)
        assert len(rings) == 3 and not any(alive(rings))
    assert torch.equal(outputs["second"][STEPS - 1], plain["second"][STEPS - 1])
    assert handle.stats.runs == 1
    assert handle.stats.streams["main-2"].reasons == {**dict.fromkeys([0, 1, 2, 5], "scheduled"), 11: "no history"}


@pytest.mark.parametrize("strength", [None, 0.5])
def test_rings_are_freed_in_pipelines_that_do_not_say_that_they_have_ended(pipe, generate, monkeypatch, strength):
    predictor, options, runner = make_predictor(), {}, pipe
    if strength is not None:
        runner, options = FluxImg2ImgPipeline(**pipe.components), {"steps": 24, "strength": strength, **IMAGE}
        runner.set_progress_bar_config(disable=True)
    monkeypatch.setattr(StepHook, "reset_state", lambda self, module: module)
    rings = storages_of(predictor)
    with lesa.enable_cache(runner, predictor, SOME, strict=True) as handle:
        for _ in range(2):
            generate(runner, **options)
            assert rings and not any(alive(rings))
            (stream,) = handle.stats.streams.values()
            assert stream.predicted == REST and stream.ring_device_bytes > 0
        assert handle.stats.runs == 2


@pytest.mark.parametrize("schedule", [SOME, [*SOME, STEPS - 1]], ids=["predicted", "computed"])
@pytest.mark.parametrize("delay", [0, 1, 1000])
def test_values_that_are_on_their_way_keep_no_features(pipe, as_on_a_gpu, delay, schedule):
    as_on_a_gpu(delay)
    predictor, before = make_predictor(), features_alive()
    rings, inputs = storages_of(predictor), []

    def calls(step):
        ids = FIRST["img_ids"].clone()
        inputs.append(weakref.ref(ids))
        return [("it", {**FIRST, "img_ids": ids})]

    with lesa.enable_cache(pipe, predictor, schedule, strict=True):
        drive(pipe, calls)
        assert alive(rings) == [False] and features_alive() == before
        assert not any(alive(inputs))


@pytest.mark.parametrize("step", [5, 6], ids=["computed", "predicted"])
def test_a_call_that_fails_ends_the_run(pipe, step):
    """A loop that continues after it begins another run, at that step."""
    predictor, before, plain = make_predictor(), features_alive(), drive(pipe, lambda step: [("it", FIRST)])["it"]
    rings = storages_of(predictor)

    def fail(*_):
        raise Stop

    def calls(now):
        if now == step:
            guard = pipe.transformer.proj_out.register_forward_pre_hook(fail)
            with contextlib.suppress(Stop):
                pipe.transformer(**FIRST, timestep=pipe.scheduler.timesteps[now].expand(2) / 1000)
            guard.remove()
            assert alive(rings) == [False] and features_alive() == before
        return [("it", FIRST)]

    with lesa.enable_cache(pipe, predictor, SOME) as handle:
        outputs = drive(pipe, calls)["it"]
    (stream,) = handle.stats.streams.values()
    assert handle.stats.runs == 2 and handle.stats.unlocated == 0
    assert stream.computed == [s for s in SOME if s < STEPS - step]
    assert stream.predicted == [s for s in REST if s < STEPS - step]
    assert all(torch.equal(outputs[step + s], plain[step + s]) for s in stream.computed)


def meet_twice(barrier):
    """A hook whose first two calls wait for those of another thread."""
    turns = iter(range(2))

    def hook(module, args):
        if next(turns, None) is not None:
            barrier.wait(30)

    return hook


def test_two_pipelines_in_two_threads_equal_themselves_alone(generate):
    pipes = [digits_pipelines.cut_pipeline() for _ in range(2)]
    options = [{"labels": (3, 8), "seed": 1}, {"labels": (5,), "seed": 7, "steps": STEPS + 4}]
    schedules, alone, errors = [SOME, 3], [], []
    for pipe, option, schedule in zip(pipes, options, schedules):
        with lesa.enable_cache(pipe, make_predictor(), schedule):
            alone.append(generate(pipe, **option))
    handles = [lesa.enable_cache(pipe, make_predictor(), schedule) for pipe, schedule in zip(pipes, schedules)]
    together, meet = [[], []], threading.Barrier(2)
    for pipe in pipes:
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(meet_twice(meet))

    def work(i):
        try:
            torch.set_num_threads(1)
            together[i] = [generate(pipes[i], **options[i]) for _ in range(2)]
        except BaseException as error:
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for made, expected, handle in zip(together, alone, handles):
        assert len(made) == 2 and all(torch.equal(latents, expected) for latents in made)
        assert handle.stats.runs == 2


def test_two_pipelines_share_transformer_and_scheduler(pipe, generate):
    image_pipe = FluxImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    image_pipe.set_progress_bar_config(disable=True)
    assert image_pipe.transformer is pipe.transformer and image_pipe.scheduler is pipe.scheduler
    options = {"steps": 24, "strength": 0.5, **IMAGE}
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        text = generate(pipe)
    with lesa.enable_cache(image_pipe, make_predictor(), SOME):
        image = generate(image_pipe, **options)
    plain = generate(pipe)
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        for _ in range(2):
            assert torch.equal(generate(pipe), text)
            assert torch.equal(generate(image_pipe, **options), image)
        assert handle.stats.runs == 4 and handle.stats.unlocated == 0
        (stream,) = handle.stats.streams.values()
        assert stream.computed == SOME
    assert not torch.equal(text, plain) and torch.equal(generate(pipe), plain)


# Fail open, or strict


def changed_batch(pipe):
    single = call_arguments((3,))
    return lambda step: [("it", FIRST if step < 6 else single)], make_predictor(), ("it", 6), "the shape changed"


def changed_tokens(pipe):
    small = call_arguments(tokens=16)
    return lambda step: [("it", FIRST if step < 6 else small)], make_predictor(), ("it", 6), "the shape changed"


def not_finite(pipe):
    predictor = make_predictor(below=0.55)  # step 6 and later
    return lambda step: [("it", FIRST)], predictor, ("it", 6), "the forecast was not finite"


def on_another_device(pipe):
    predictor = make_predictor()

    def calls(step):
        if step == 6:
            predictor.to("meta")
        return [("it", FIRST)]

    return calls, predictor, ("it", 6), "the predictor is on meta, and the features on cpu"


def wrong_timestep(pipe):
    wrong = FIRST | {"timestep": torch.tensor(0.4321)}
    return (
        lambda step: [("it", wrong if step == 6 else FIRST)],
        make_predictor(),
        ("it", 6),
        "the timestep is not one of the scheduler's",
    )


DOUBTS = [changed_batch, changed_tokens, not_finite, on_another_device, wrong_timestep]


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_is_in_doubt_is_computed_counted_and_warned_of_once(pipe, doubt):
    calls, predictor, (name, step), reason = doubt(pipe)
    plain = drive(pipe, calls)
    calls, predictor, _, _ = doubt(pipe)  # the predictor may have changed its device in the meantime
    blocks = []
    guard = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, predictor, SOME) as handle:
            outputs = drive(pipe, calls)
    guard.remove()
    assert torch.equal(outputs[name][step], plain[name][step])
    messages = ours(caught)
    assert len([m for m in messages if reason in m]) == 1 and len({*messages}) == len(messages)
    counted = sum(len(s.computed) for s in handle.stats.streams.values()) + handle.stats.unlocated
    assert counted == len(blocks)
    if doubt is wrong_timestep:
        assert handle.stats.unlocated == 1
        assert "computed 1 calls whose timestep was not one of the scheduler's" in handle.stats.summary()
        assert handle.stats.streams["main"].reasons[7] == "no history"  # another run may have had the transformer
    else:
        assert reason in {s.reasons.get(step) for s in handle.stats.streams.values()}
        assert f"step {step}: {reason}" in handle.stats.summary()


@pytest.mark.parametrize("doubt", DOUBTS)
def test_strict_raises_what_is_in_doubt_and_works_on(pipe, generate, clean, doubt):
    calls, predictor, (name, step), reason = doubt(pipe)
    expected, reached = expected_of(clean, generate), []

    def watched(step):
        reached.append(step)
        return calls(step)

    with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
        with pytest.raises(RuntimeError, match=rf"lesa: a step can't be predicted: {re.escape(reason)}"):
            drive(pipe, watched)
        assert reached[-1] == step
        if doubt is on_another_device:
            handle.disable()
            lesa.enable_cache(pipe, make_predictor(), SOME, strict=True)
        elif doubt is not_finite:
            predictor.below = 0.0
        assert torch.equal(generate(pipe), expected["defaults"])
        assert torch.equal(generate(pipe, **OPTIONS), expected["options"])


TIMESTEPS = torch.linspace(1000, 1000 / STEPS, STEPS)


@pytest.mark.parametrize(
    "scheduler",
    [
        BareScheduler(),
        BareScheduler(timesteps=None),
        BareScheduler(timesteps=TIMESTEPS.tolist(), num_inference_steps=STEPS, config={}),
        BareScheduler(timesteps=TIMESTEPS, config={}),
        BareScheduler(timesteps=TIMESTEPS / 7.3, num_inference_steps=STEPS, config={}),
    ],
    ids=["no timesteps", "none yet", "a list", "no count", "other timesteps"],
)
def test_an_unknown_scheduler_is_computed_and_warned_of_once(pipe, scheduler):
    with torch.no_grad():
        plain = [pipe.transformer(**FIRST, timestep=t.expand(2) / 1000)[0] for t in TIMESTEPS]
    pipe.scheduler = scheduler
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
            outputs = [pipe.transformer(**FIRST, timestep=t.expand(2) / 1000)[0] for t in TIMESTEPS]
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    assert handle.stats.unlocated == STEPS and handle.stats.streams == {}
    assert len(ours(caught)) == 1 and "the timestep is not one of the scheduler's" in ours(caught)[0]
    lesa.enable_cache(pipe, make_predictor(), SOME, strict=True)
    with pytest.raises(RuntimeError, match="the timestep is not one of the scheduler's"), torch.no_grad():
        pipe.transformer(**FIRST, timestep=TIMESTEPS[:1].expand(2) / 1000)


@pytest.mark.parametrize("config", [{}, {"config": {}}, {"config": SimpleNamespace(shift=3.0)}], ids=str)
def test_a_scheduler_without_sigmas_is_taken_by_its_timesteps(pipe, config):
    pipe.scheduler = BareScheduler(timesteps=TIMESTEPS, num_inference_steps=STEPS, **config)
    with lesa.enable_cache(pipe, trained_predictor()) as handle, torch.no_grad():
        for t in TIMESTEPS:
            pipe.transformer(**FIRST, timestep=t.expand(2) / 1000)
    (stream,) = handle.stats.streams.values()
    computed = nearest_steps(np.linspace(1, 1 / STEPS, STEPS), [1 - s / 50 for s in TRAINED])
    assert stream.computed == computed and len(stream.predicted) == STEPS - len(computed) > 0


def test_another_pipelines_scheduler_in_strict(pipe, generate, clean):
    expected = expected_of(clean, generate)
    other = digits.build_pipeline(pipe.transformer)
    other.set_progress_bar_config(disable=True)
    with lesa.enable_cache(pipe, make_predictor(), SOME, strict=True):
        with pytest.raises(
            RuntimeError, match="works only with the scheduler of the pipeline for which the cache was enabled"
        ):
            generate(other)
        assert torch.equal(generate(pipe), expected["defaults"])


def test_few_steps_say_so_once_and_are_no_error(pipe, generate):
    plain = generate(pipe, steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, trained_predictor(), strict=True) as handle:
            for _ in range(2):
                assert torch.equal(generate(pipe, steps=4, true_cfg_scale=1.0), plain)
    note = "computed everything: 4 steps are too few to predict any. Take fewer steps instead"
    assert handle.stats.notes == [note]
    assert handle.stats.summary().count("too few to predict any") == 1
    assert handle.stats.streams["cond"].computed == [0, 1, 2, 3] and ours(caught) == [f"lesa: {note}"]


# As on a GPU, where what the device says is on the host some calls later


class Event:
    """Stands for the event of a GPU: the value is on the host when `arrived()` says so."""

    def __init__(self, arrived):
        self.query = arrived


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`as_on_a_gpu(calls)` lets values arrive that many calls after they were asked for, and timesteps not be read.

    `as_on_a_gpu(arrived)` lets them arrive when `arrived()` says so.
    """

    def set_up(delay):
        now, begin, value_of = [0], StepHook._begin, Run.value_of

        def counted(self, *args):
            now[0] += 1
            return begin(self, *args)

        def copy_to_host(value, slots):
            copy, asked = value.detach().reshape(1).float().numpy(), now[0]  # torch does not wait for an array's `item`
            return copy, Event(delay if callable(delay) else lambda: now[0] >= asked + delay)

        def value_unknown(self, timestep, waits):
            return None if self.position in range(len(self.timesteps)) else value_of(self, timestep, waits)

        monkeypatch.setattr(StepHook, "_begin", counted)
        monkeypatch.setattr(Run, "value_of", value_unknown)
        monkeypatch.setattr(device_values, "copy_to_host", copy_to_host)

    return set_up


@pytest.mark.parametrize("delay", [0, 1, 3, 1000])
def test_normal_runs_do_not_depend_on_when_values_arrive(pipe, generate, clean, as_on_a_gpu, monkeypatch, delay):
    expected = expected_of(clean, generate)
    if delay > 3:  # the timesteps are not known to be exact when the first step is predicted: each step by itself
        monkeypatch.setattr(Conditioner, "_is_planned", lambda *_: False)
        with lesa.enable_cache(pipe, make_predictor(), SOME):
            by_step = {"options": generate(pipe, **OPTIONS), "defaults": generate(pipe)}
        monkeypatch.undo()
        for name, latents in by_step.items():
            torch.testing.assert_close(latents, expected[name], rtol=0, atol=1e-5)
        expected = by_step
    as_on_a_gpu(delay)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
            for _ in range(2):
                assert torch.equal(generate(pipe), expected["defaults"])
                assert handle.stats.streams["cond"].predicted == REST
            assert torch.equal(generate(pipe, **OPTIONS), expected["options"])
        assert handle.stats.runs == 3 and handle.stats.unlocated == 0
    assert not ours(caught)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_forecast_that_turns_out_late_not_to_be_finite(pipe, generate, clean, as_on_a_gpu, delay):
    expected = expected_of(clean, generate)
    as_on_a_gpu(delay)
    predictor = make_predictor(below=0.55)  # step 6 and later: 7 and 8 are to be predicted, too
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, predictor, SOME) as handle:
            for _ in range(2):
                generate(pipe)
                stream = handle.stats.streams["cond"]
                assert stream.predicted == [3, 4, 6, 7, 8][: 2 + delay]
                assert stream.computed == [s for s in range(STEPS) if s not in stream.predicted]
            predictor.below = 0.0
            assert torch.equal(generate(pipe), expected["defaults"])
    assert len(ours(caught)) == 1 and "the forecast was not finite" in ours(caught)[0]
    assert stream.reasons[11] == "an earlier forecast was not finite"


@pytest.mark.parametrize("sample", [0, 1])
def test_one_sample_that_turns_out_late_not_to_be_finite(pipe, generate, as_on_a_gpu, sample):
    as_on_a_gpu(1)
    predictor = make_predictor()
    forward = predictor.forward

    def spoiled(ring, sigma):
        forecast = forward(ring, sigma)
        forecast[sample] *= math.nan if sigma < 0.55 else 1
        return forecast

    predictor.forward = spoiled
    with pytest.warns(RuntimeWarning, match="not finite"), lesa.enable_cache(pipe, predictor, SOME) as handle:
        generate(pipe)
    assert handle.stats.streams["cond"].predicted == [3, 4, 6]


@pytest.mark.parametrize("delay", [2, 3, 1000])
@pytest.mark.parametrize("strict", [False, True])
def test_late_forecasts_of_an_abandoned_run_do_not_reach_the_next(pipe, generate, clean, as_on_a_gpu, delay, strict):
    """The run is left before the host knows that the forecast for step 6 is not finite."""
    expected = expected_of(clean, generate)
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        others = generate(pipe, **guided())
    as_on_a_gpu(delay)
    predictor = make_predictor(below=0.55)

    def stop(pipe, index, timestep, tensors):
        if index == 6:
            raise Stop
        return {}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, predictor, SOME, strict=strict) as handle:
            for options, latents in (({}, expected["defaults"]), (guided(), others), (OPTIONS, expected["options"])):
                predictor.below = 0.55
                with pytest.raises(Stop):
                    generate(pipe, callback_on_step_end=stop)
                predictor.below = 0.0
                torch.testing.assert_close(generate(pipe, **options), latents, rtol=0, atol=1e-5)
                for stream in handle.stats.streams.values():
                    assert (stream.computed, {*stream.reasons.values()}) == (SOME, {"scheduled"})
    assert not ours(caught) and handle.stats.unlocated == 0


@pytest.mark.parametrize("delay", [2, 3])
def test_late_forecasts_of_a_loop_that_begins_again_are_of_its_first_run(pipe, as_on_a_gpu, delay):
    """The same timesteps again: what arrives at the first call of the new run is still said, and changes nothing."""
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        expected = drive(pipe, lambda step: [("it", FIRST)])["it"]
    as_on_a_gpu(delay)
    predictor, scheduler = make_predictor(below=0.55), pipe.scheduler

    def loop(steps):
        scheduler._step_index = None
        scheduler.set_begin_index(0)
        for step in range(steps):
            latents = FIRST["hidden_states"] * (1 - 0.5 * step / STEPS)
            timestep = scheduler.timesteps[step].expand(2) / 1000
            yield pipe.transformer(**{**FIRST, "hidden_states": latents, "timestep": timestep})[0]
            scheduler.step(latents, scheduler.timesteps[step], latents)

    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, predictor, SOME) as handle:
            scheduler.set_timesteps(STEPS)
            assert len([*loop(7)]) == 7
            predictor.below = 0.0
            outputs = [*loop(STEPS)]
    for step, output in enumerate(outputs):
        torch.testing.assert_close(output, expected[step], rtol=0, atol=1e-5)
    assert handle.stats.runs == 2 and handle.stats.streams["main"].predicted == REST
    assert {*handle.stats.streams["main"].reasons.values()} == {"scheduled"}
    assert {message.split(":")[1] for message in ours(caught)} <= {" the forecast was not finite"}


@pytest.mark.parametrize("delay", [1, 2, 1000])
def test_a_late_timestep_of_an_abandoned_run_is_not_asked_of_the_next(pipe, generate, clean, as_on_a_gpu, delay):
    expected = expected_of(clean, generate)
    as_on_a_gpu(delay)

    def stop(pipe, index, timestep, tensors):
        if index == 4:
            with torch.no_grad():  # the scheduler is at step 5 by then, which is computed; this is the timestep of none
                pipe.transformer(**FIRST, timestep=torch.full((2,), 0.4321))
            raise Stop
        return {}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, make_predictor(), SOME, strict=True) as handle:
            for _ in range(2):
                with pytest.raises(Stop):
                    generate(pipe, callback_on_step_end=stop)
                torch.testing.assert_close(generate(pipe), expected["defaults"], rtol=0, atol=1e-5)
                assert handle.stats.streams["cond"].predicted == REST
    assert not ours(caught) and handle.stats.unlocated == 0


def test_a_run_that_fails_at_its_end_frees_its_rings(pipe, generate, as_on_a_gpu, monkeypatch):
    """Under `strict`, by what came to the host when the run was over."""
    before, ended, forget = features_alive(), [], pipe.maybe_free_model_hooks
    as_on_a_gpu(lambda: bool(ended))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: (ended.append(1), forget()))
    with lesa.enable_cache(pipe, make_predictor(below=0.1), SOME, strict=True) as handle:
        said = ""
        try:
            generate(pipe)
        except RuntimeError as error:  # `pytest.raises` would keep its frames, and what is in them
            said = str(error)
        assert "can't be predicted: the forecast was not finite" in said
        assert ended and features_alive() == before
        assert handle.stats.streams["cond"].predicted == REST


@pytest.mark.parametrize("strict", [False, True])
def test_the_last_forecast_is_reported_when_the_run_ends(pipe, generate, clean, as_on_a_gpu, strict, monkeypatch):
    """No later call would read the value."""
    expected = expected_of(clean, generate)
    ended, forget = [], pipe.maybe_free_model_hooks
    as_on_a_gpu(lambda: bool(ended))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: (ended.append(1), forget()))
    predictor = make_predictor(below=0.1)  # step 11
    with lesa.enable_cache(pipe, predictor, SOME, strict=strict) as handle:
        if strict:
            with pytest.raises(RuntimeError, match="can't be predicted: the forecast was not finite"):
                generate(pipe)
        else:
            with pytest.warns(RuntimeWarning, match="the forecast was not finite"):
                generate(pipe)
        assert handle.stats.streams["cond"].predicted == REST
        predictor.below = 0.0
        assert torch.equal(generate(pipe), expected["defaults"])


def test_strict_raises_when_the_value_arrives(pipe, generate, clean, as_on_a_gpu):
    expected = expected_of(clean, generate)
    as_on_a_gpu(2)
    predictor, reached = make_predictor(below=0.55), []
    with lesa.enable_cache(pipe, predictor, SOME, strict=True):
        with pytest.raises(RuntimeError, match="can't be predicted: the forecast was not finite"):
            generate(pipe, callback_on_step_end=lambda pipe, step, t, tensors: reached.append(step) or {})
        assert reached == [*range(8)]  # it was step 6
        predictor.below = 0.0
        assert torch.equal(generate(pipe), expected["defaults"])


@pytest.mark.parametrize("delay", [0, 1])
def test_another_pipelines_scheduler_is_found_late(pipe, generate, clean, as_on_a_gpu, delay):
    expected = expected_of(clean, generate)
    other = digits.build_pipeline(pipe.transformer)
    other.set_progress_bar_config(disable=True)
    plain = generate(other, steps=20)
    as_on_a_gpu(delay)

    def fail(pipe, index, timestep, tensors):
        if index == 5:
            raise Stop
        return {}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lesa.enable_cache(pipe, make_predictor(), [0, 1, 2, 6, 9]) as handle:
            with pytest.raises(Stop):
                generate(pipe, callback_on_step_end=fail)  # this leaves its scheduler at step 6, which is computed
            result = generate(other, steps=20)
            assert handle.stats.unlocated > 0
    assert len([m for m in ours(caught) if "not one of the scheduler's" in m]) == 1
    assert torch.equal(result, plain)
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        assert torch.equal(generate(pipe), expected["defaults"])


def test_another_scheduler_that_is_found_in_a_predicted_call_is_computed(pipe, as_on_a_gpu, monkeypatch):
    """The value of its timestep comes while the forecast is made, as it may on an idle GPU."""
    arrives, seen = [True], []
    as_on_a_gpu(lambda: arrives[0])
    begin, predict = StepHook._begin, ForecastingHook.predict

    def begin_before_it(self, *args):
        arrives[0] = False
        return begin(self, *args)

    def predict_meanwhile(self, *args):
        arrives[0] = True
        return predict(self, *args)

    def calls_until_it_fails(step):
        if step == 4:
            raise Stop
        return [("call", FIRST, "cond")]

    def keep(module, args, kwargs):
        seen.append(kwargs)

    predictor = make_predictor(below=0.0)
    with lesa.enable_cache(pipe, predictor, SOME) as handle:
        watch = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
        with pytest.raises(Stop):
            drive(pipe, calls_until_it_fails)  # this leaves its scheduler at step 4, which is to be predicted
        watch.remove()
        call = {**seen[-1], "timestep": torch.full((2,), 0.123)}  # the same text: it looks like the same stream
        monkeypatch.setattr(StepHook, "_begin", begin_before_it)
        monkeypatch.setattr(ForecastingHook, "predict", predict_meanwhile)
        predictor.below = 2.0  # the forecast is not finite, which is of no interest when it is another scheduler's
        located = pytest.warns(RuntimeWarning, match="not one of the scheduler's")
        with torch.no_grad(), pipe.transformer.cache_context("cond"), located as caught:
            output = pipe.transformer(**call)[0]
        assert len(caught) == 1
        assert handle.stats.unlocated == 1 and handle.stats.streams["cond"].predicted == [3]
    with torch.no_grad():
        assert torch.equal(output, pipe.transformer(**call)[0])


WAITS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim"}


class Waits(TorchDispatchMode):
    """Takes down the operators for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("delay", [1, 1000])
@pytest.mark.parametrize("kind", ["newton", "two streams"])
def test_predicted_calls_do_not_wait_for_the_device(pipe, generate, as_on_a_gpu, monkeypatch, kind, delay):
    as_on_a_gpu(delay)
    by_call, enter = [], StepHook.enter

    def watched(self, *args):
        with Waits() as waits:
            output = enter(self, *args)
        by_call.append(waits.seen)
        return output

    monkeypatch.setattr(StepHook, "enter", watched)
    options = guided() if kind == "two streams" else {}
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        generate(pipe, **options)
    assert handle.stats.streams["cond"].predicted == REST
    streams = len(handle.stats.streams)
    assert len(by_call) == streams * STEPS
    waits = {call // streams: seen for call, seen in enumerate(by_call) if seen}
    assert {step: seen for step, seen in waits.items() if step not in SOME} == {}
    assert {step: seen for step, seen in waits.items() if step > 0} == {}  # nor do computed ones after the first


def test_the_spy_on_waits_sees_one():
    with Waits() as waits:
        torch.ones(1).item()
    assert waits.seen == ["_local_scalar_dense"]


# The conditioning of the head, planned for a whole run


@pytest.fixture
def conditions(monkeypatch):
    """The number of rows of each call of the adapter's `condition`."""
    rows, condition = [], FluxAdapter.condition

    def counted(self, timestep, *args):
        rows.append(len(timestep))
        return condition(self, timestep, *args)

    monkeypatch.setattr(FluxAdapter, "condition", counted)
    return rows


def test_planned_conditioning_equals_that_of_each_step(pipe, generate, conditions, monkeypatch):
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        planned = generate(pipe)
        assert conditions == [2 * (STEPS - 3)]  # at the first predicted step, 3, for it and all after it
        conditions.clear()
        monkeypatch.setattr(Conditioner, "_is_planned", lambda *_: False)
        torch.testing.assert_close(generate(pipe), planned, rtol=0, atol=1e-5)
        assert conditions == [2] * len(REST)


def test_each_stream_plans_once(pipe, generate, conditions):
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        for _ in range(2):
            generate(pipe, **guided())
            assert conditions == [2 * (STEPS - 3)] * 2
            conditions.clear()


def assert_like_unplanned(pipe, calls, predicted_rows, conditions, monkeypatch):
    """Equal to conditioning by step, bit for bit in the steps that did not plan."""
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        outputs = drive(pipe, calls)["it"]
        assert conditions == predicted_rows
        monkeypatch.setattr(Conditioner, "_is_planned", lambda *_: False)
        expected = drive(pipe, calls)["it"]
    for step in range(STEPS):
        torch.testing.assert_close(outputs[step], expected[step], rtol=0, atol=1e-5)
    return outputs, expected


def test_inputs_that_change_from_step_to_step_are_not_planned_for_long(pipe, conditions, monkeypatch):
    def calls(step):
        return [("it", FIRST | {"pooled_projections": FIRST["pooled_projections"] * (1 + 0.1 * step)})]

    by_step = [2] * (len(REST) - 2)
    assert_like_unplanned(pipe, calls, [2 * (STEPS - 3), 2 * (STEPS - 4), *by_step], conditions, monkeypatch)


def test_inputs_that_are_changed_in_place_are_planned_anew(pipe, conditions, monkeypatch):
    base = FIRST["pooled_projections"]
    pooled = base.clone()

    def calls(step):
        if step == 0:
            pooled.copy_(base)
        if step == 7:
            pooled.mul_(1.5)
        return [("it", FIRST | {"pooled_projections": pooled})]

    assert_like_unplanned(pipe, calls, [2 * (STEPS - 3), 2 * (STEPS - 7)], conditions, monkeypatch)


def test_timesteps_that_differ_between_samples_are_not_planned(pipe, conditions):
    outputs, plain = [], []
    with torch.no_grad():
        for enabled in (False, True):
            handle = lesa.enable_cache(pipe, make_predictor(), SOME) if enabled else None
            pipe.scheduler.set_timesteps(STEPS)
            for t in pipe.scheduler.timesteps:
                timestep = t / 1000 * torch.tensor([1.0, 0.98])
                output = pipe.transformer(**FIRST, timestep=timestep)[0]
                (outputs if enabled else plain).append(output)
                pipe.scheduler.step(output, t, FIRST["hidden_states"])
    assert handle.stats.streams["main"].predicted == REST
    assert conditions == [2] * len(REST)
    assert all(torch.equal(outputs[step], plain[step]) for step in SOME)


def test_timesteps_that_are_not_the_schedulers_to_the_bit_are_not_planned(pipe, conditions):
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle, torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            output = pipe.transformer(**FIRST, timestep=(t + 5e-4).expand(2) / 1000)[0]
            pipe.scheduler.step(output, t, FIRST["hidden_states"])
    assert handle.stats.streams["main"].predicted == REST
    assert conditions == [2] * len(REST)


def test_a_head_with_adapters_is_not_planned(fresh_pipe, conditions, monkeypatch):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(0)
    fresh_pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["norm_out.linear"]))
    with pytest.warns(RuntimeWarning, match="the adapters default are on"):
        outputs, expected = assert_like_unplanned(
            fresh_pipe, lambda step: [("it", FIRST)], [2] * len(REST), conditions, monkeypatch
        )
    assert all(torch.equal(outputs[step], expected[step]) for step in range(STEPS))


# Statistics


def test_seconds_and_summary_say_what_happened(pipe, generate):
    nap = 0.02
    guard = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: time.sleep(nap))
    begun = time.perf_counter()
    predictor = make_predictor(below=0.1)  # the last step's forecast is not finite
    with pytest.warns(RuntimeWarning, match="not finite"), lesa.enable_cache(pipe, predictor, SOME) as handle:
        generate(pipe)
    guard.remove()
    elapsed = time.perf_counter() - begun
    stream = handle.stats.streams["cond"]
    assert sorted(stream.seconds) == [*range(STEPS)]
    computed, predicted = ([stream.seconds[s] for s in steps] for steps in (stream.computed, stream.predicted))
    assert stream.computed == [*SOME, 11] and stream.predicted == REST[:-1]
    assert min(computed) >= nap and 0 < min(predicted) < nap
    assert sum(computed) + sum(predicted) < elapsed
    mib = stream.ring_device_bytes / 2**20
    assert handle.stats.summary() == (
        "cond: computed 6 (0,1,2,5,9,11), predicted 6 steps, "
        f"6 of them in one pass with the output head, in {sum(computed):.3g} s and {sum(predicted):.3g} s; "
        f"its features take {mib:.1f} MiB\n  step 11: the forecast was not finite"
    )


@pytest.mark.parametrize("below", [0.0, 0.3, 0.55, 2.0])
def test_counters_equal_those_of_the_blocks(pipe, below):
    blocks = dict.fromkeys(("first", "second"), 0)
    now = []

    def count(module, args):
        blocks[now[-1]] += 1

    def calls(step):
        for name, call in (("first", FIRST), ("second", SECOND)):
            if name == "second" and step in (3, 4):
                continue
            now.append(name)
            yield name, call

    guard = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lesa.enable_cache(pipe, make_predictor(below=below), SOME) as handle:
            drive(pipe, calls)
    guard.remove()
    streams = handle.stats.streams
    assert {name: len(streams[s].computed) for name, s in (("first", "main"), ("second", "main-2"))} == blocks
    assert len(streams["main"].computed) + len(streams["main"].predicted) == STEPS
    assert len(streams["main-2"].computed) + len(streams["main-2"].predicted) == STEPS - 2
    both = {*streams["main"].computed} | {*streams["main-2"].computed}
    assert handle.stats.computed_steps == len(both) and handle.stats.predicted_steps == STEPS - len(both)
    for stream in streams.values():
        assert {*stream.reasons} == {*stream.computed}
