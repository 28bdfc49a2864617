"""What people do to a pipeline around a cache and while it is on: each is right, or it is said."""

import copy
import functools
import sys
import threading
import types
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lesa
import small_pipelines as small
from driven_loops import BareScheduler, ours
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 12
SOME = [0, 1, 4, 8]
REST = [2, 3, 5, 6, 7, 9, 10, 11]
NEAR = 0.02
"""Relative distance of a cached run from an uncached one; what a wrapper that is left out changes is much more."""

slow = pytest.mark.slow
FOUR = ("flux", "qwen", "hunyuan", "sd3")


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(verbosity)


def predictor(**options):
    torch.manual_seed(0)
    return FusedKANPredictor(PredictorConfig(small.DIM, **{"rank": 2, "hidden": 4, **options}))


def enable(pipe, schedule=SOME, strict=True):
    return lesa.enable_cache(pipe, predictor(), schedule, strict=strict)


def run(pipe, name="flux", **options):
    return small.ALL[name].latents(pipe, **{"steps": STEPS, **options})


def counter(pipe):
    """A list that gets an item whenever the first block runs."""
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def computed(handle):
    return sum(len(stream.computed) for stream in handle.stats.streams.values())


def distance(latents, wanted):
    return float((latents - wanted).norm() / wanted.norm())


def at_step(number, act):
    """A callback that acts after one step."""

    def callback(pipe, step, timestep, tensors):
        if step == number:
            act()
        return {}

    return callback


def own(module):
    """What is in the module's attributes, but for what diffusers itself makes in a first run."""
    return {name: value for name, value in vars(module).items() if name != "_diffusers_hook"}


# Forwards that are wrapped, or replaced, on the instance or on the class


def scaled(output):
    return (output[0] * 1.5,) if isinstance(output, tuple) else type(output)(sample=output.sample * 1.5)


def by_a_lambda(transformer):
    forward = transformer.forward
    transformer.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))


def by_a_decorator(transformer):
    forward = transformer.forward

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return scaled(forward(*args, **kwargs))

    transformer.forward = wrapper


def by_a_method_of_the_class(transformer):
    def forward(self, *args, **kwargs):
        return scaled(type(self).forward(self, *args, **kwargs))

    transformer.forward = types.MethodType(forward, transformer)


def by_the_class(transformer):
    cls = type(transformer)
    forward = cls.forward
    cls.forward = lambda self, *args, **kwargs: scaled(forward(self, *args, **kwargs))
    return lambda: setattr(cls, "forward", forward)


def by_a_subclass(transformer):
    class Scaled(type(transformer)):
        def forward(self, *args, **kwargs):
            return scaled(super().forward(*args, **kwargs))

    transformer.__class__ = Scaled


def by_a_decorated_subclass(transformer):
    class Scaled(type(transformer)):
        @functools.wraps(type(transformer).forward)
        def forward(self, *args, **kwargs):
            return scaled(super().forward(*args, **kwargs))

    transformer.__class__ = Scaled


def by_a_hook(transformer):
    transformer.register_forward_hook(lambda module, args, output: scaled(output))


def by_a_call(transformer):
    class Scaled(type(transformer)):
        def __call__(self, *args, **kwargs):
            return scaled(super().__call__(*args, **kwargs))

    transformer.__class__ = Scaled


def of_an_input(transformer):
    forward = transformer.forward
    name = "encoder_hidden_states" if isinstance(transformer, diffusers.QwenImageTransformer2DModel) else None

    def wrapper(*args, **kwargs):
        changed = name or "pooled_projections"
        return forward(*args, **{**kwargs, changed: kwargs[changed] * 0})

    transformer.forward = wrapper


WRAPPERS = (
    by_a_lambda,
    by_a_decorator,
    by_a_method_of_the_class,
    by_the_class,
    by_a_subclass,
    by_a_decorated_subclass,
    by_a_hook,
    by_a_call,
    of_an_input,
)


def wrapped():
    """All wrappers of one family, and for the others those of each kind."""
    for name in FOUR:
        for wrap in WRAPPERS if name == "flux" else (by_a_lambda, by_a_subclass, of_an_input):
            for cache_first in (False, True) if name == "flux" else (False,):
                order = "cache-wrapped" if cache_first else "wrapped-cache"
                yield pytest.param(name, wrap, cache_first, id=f"{name}-{wrap.__name__}-{order}")


@slow
@pytest.mark.parametrize("name, wrap, cache_first", wrapped())
def test_a_wrapper_that_changes_the_output_acts_in_every_step(name, wrap, cache_first):
    oracle, pipe = small.ALL[name].build(), small.ALL[name].build()
    calls, undo = counter(pipe), None
    try:
        undo = wrap(oracle.transformer)
        wanted = run(oracle, name)
        if undo:
            undo()
        if not cache_first:
            undo = wrap(pipe.transformer)
            wrapped = own(pipe.transformer)
        handle = enable(pipe)
        if cache_first:
            undo = wrap(pipe.transformer)
        cached = run(pipe, name)
        assert len(calls) == computed(handle) == len(SOME)
        assert distance(cached, wanted) < NEAR
        handle.disable()
        assert torch.equal(run(pipe, name), wanted)
        assert cache_first or own(pipe.transformer) == wrapped
    finally:
        if undo:
            undo()


def in_a_tuple(forward):
    held = (forward,)
    return lambda *args, **kwargs: held[0](*args, **kwargs)


def in_a_long_list(forward):
    held = [forward, *[None] * 40]
    return lambda *args, **kwargs: held[0](*args, **kwargs)


def in_slots(forward):
    class Holder:
        __slots__ = ("forward",)

        def __call__(self, *args, **kwargs):
            return self.forward(*args, **kwargs)

    holder = Holder()
    holder.forward = forward
    return holder


def behind_a_cache(forward):
    get = functools.lru_cache(lambda: forward)
    return lambda *args, **kwargs: get()(*args, **kwargs)


def in_another_thread(forward):
    def call(*args, **kwargs):
        results = []
        target = torch.no_grad()(lambda: results.append(forward(*args, **kwargs)))
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        return results[0]

    return call


def twice(forward):
    return lambda *args, **kwargs: [forward(*args, **kwargs) for _ in range(2)][1]


HOLDERS = (in_a_tuple, in_a_long_list, in_slots, behind_a_cache, in_another_thread, twice)


@slow
@pytest.mark.parametrize("cache_first", [False, True], ids=["wrapped-cache", "cache-wrapped"])
@pytest.mark.parametrize("hold", HOLDERS, ids=lambda f: f.__name__)
def test_a_wrapper_in_whose_depths_the_forward_is_held_is_right_or_loud(hold, cache_first):
    pipe = small.ALL["flux"].build()
    calls, plain, each = counter(pipe), run(pipe), 1 + (hold is twice)
    calls.clear()
    if not cache_first:
        pipe.transformer.forward = hold(pipe.transformer.forward)
    handle = enable(pipe, strict=False)
    if cache_first:
        pipe.transformer.forward = hold(pipe.transformer.forward)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached = run(pipe)
    assert len(calls) == computed(handle) * each
    assert distance(cached, plain) < NEAR
    if computed(handle) > len(SOME):
        assert ours(caught) and torch.equal(cached, plain)
        handle.disable()
        with enable(pipe), pytest.raises(RuntimeError, match="can't be predicted"):
            run(pipe)


def test_a_class_that_is_set_while_the_cache_is_on_stays():
    pipe = small.ALL["flux"].build()
    run(pipe)
    plain, called = run(pipe), []

    class Mine(FluxTransformer2DModel):
        def forward(self, *args, **kwargs):
            called.append(1)
            return super().forward(*args, **kwargs)

    handle = enable(pipe)
    pipe.transformer.__class__ = Mine
    handle.disable()
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(run(pipe), plain) and len(called) == STEPS


def test_a_forward_of_its_own_class_is_there_after_the_cache_too():
    pipe = small.ALL["flux"].build()
    pipe.transformer.forward = types.MethodType(FluxTransformer2DModel.forward, pipe.transformer)
    before = own(pipe.transformer)
    enable(pipe).disable()
    assert own(pipe.transformer) == before


# Caches that go on and off in a run

TOGGLED = ("flux cfg", "qwen cfg", "hunyuan cfg", "sd3 cfg")


@slow
@pytest.mark.parametrize("name", TOGGLED)
def test_enabling_in_a_callback_caches_the_rest_of_the_run(name):
    pipe, handles = small.ALL[name].build(), []
    plain, calls, each = run(pipe, name), counter(pipe), len(small.ALL[name].streams)
    run(pipe, name, callback_on_step_end=at_step(3, lambda: handles.append(enable(pipe, [0, 2]))))
    (handle,) = handles
    assert len(calls) == (4 + 2) * each and computed(handle) == 2 * each  # its steps are counted from there
    handle.disable()
    assert torch.equal(run(pipe, name), plain) and "forward" not in vars(pipe.transformer)
    exact = run(pipe, name, callback_on_step_end=at_step(3, lambda: handles.append(enable(pipe, range(STEPS)))))
    handles[-1].disable()
    assert torch.equal(exact, plain)


@slow
@pytest.mark.parametrize("name", TOGGLED)
def test_disabling_in_a_callback_computes_the_rest_of_the_run(name):
    pipe = small.ALL[name].build()
    plain, calls, each = run(pipe, name), counter(pipe), len(small.ALL[name].streams)
    handle = enable(pipe)
    run(pipe, name, callback_on_step_end=at_step(5, handle.disable))
    assert len(calls) == (3 + 6) * each and computed(handle) == 3 * each
    assert torch.equal(run(pipe, name), plain) and "forward" not in vars(pipe.transformer)
    handle = enable(pipe, range(STEPS))
    assert torch.equal(run(pipe, name, callback_on_step_end=at_step(5, handle.disable)), plain)


def replace_scheduler(pipe):
    pipe.scheduler = copy.deepcopy(pipe.scheduler)


def copy_timesteps(pipe):
    pipe.scheduler.timesteps = pipe.scheduler.timesteps.clone()


def timesteps_in_float64(pipe):
    pipe.scheduler.timesteps = pipe.scheduler.timesteps.double()


def shift_timesteps(pipe):
    pipe.scheduler.timesteps = pipe.scheduler.timesteps * 0.99


def free_hooks(pipe):
    pipe.maybe_free_model_hooks()


def reset_hooks(pipe):
    pipe.transformer._diffusers_hook.reset_stateful_hooks()


@slow
@pytest.mark.parametrize("change", [replace_scheduler, copy_timesteps, timesteps_in_float64], ids=lambda f: f.__name__)
def test_a_copy_of_the_scheduler_goes_on_with_the_run(change):
    pipe = small.ALL["flux"].build()
    arguments = {"callback_on_step_end": at_step(5, lambda: change(pipe))}
    plain, calls = run(pipe, **arguments), counter(pipe)
    with enable(pipe, range(STEPS)):
        assert torch.equal(run(pipe, **arguments), plain)
    calls.clear()
    with enable(pipe) as handle:
        run(pipe, **arguments)
        assert handle.stats.runs == 1 and computed(handle) == len(calls) == len(SOME)


@slow
@pytest.mark.parametrize("change", [free_hooks, reset_hooks], ids=lambda f: f.__name__)
def test_a_run_that_is_begun_again_in_the_middle_is_noticed(change):
    pipe = small.ALL["flux"].build()
    arguments = {"callback_on_step_end": at_step(5, lambda: change(pipe))}
    plain, calls = run(pipe, **arguments), counter(pipe)
    with enable(pipe, range(STEPS)):
        assert torch.equal(run(pipe, **arguments), plain)
    calls.clear()
    with enable(pipe, strict=False) as handle, pytest.warns(RuntimeWarning, match="in the middle of a run"):
        run(pipe, **arguments)
        assert handle.stats.runs == 2 and computed(handle) == 3 and len(calls) == 6  # of steps 0-5, and of 6-11
        assert "in the middle of a run" in handle.stats.summary()
    with enable(pipe), pytest.raises(RuntimeError, match="in the middle of a run"):
        run(pipe, **arguments)


@slow
def test_timesteps_that_are_changed_in_a_run_are_noticed():
    pipe = small.ALL["flux"].build()
    arguments = {"callback_on_step_end": at_step(5, lambda: shift_timesteps(pipe))}
    with enable(pipe), pytest.raises(RuntimeError, match="the timestep is not one of the scheduler's"):
        run(pipe, **arguments)


# Pipelines that share parts


@slow
def test_pipelines_made_of_the_parts_of_a_cached_one_are_of_the_plain_class():
    pipe = small.ALL["flux"].build()
    with enable(pipe):
        others = [pipe.__class__(**pipe.components), type(pipe).from_pipe(pipe), copy.copy(pipe)]
        others.append(diffusers.AutoPipelineForText2Image.from_pipe(pipe))
    assert [type(other) for other in (pipe, *others)] == [FluxPipeline] * 5
    for other in others:
        enable(other).disable()


@slow
def test_the_cache_goes_by_any_pipeline_that_has_the_transformer():
    pipe = small.ALL["flux"].build()
    other = FluxPipeline.from_pipe(pipe)
    enable(pipe)
    lesa.disable_cache(other)
    assert "forward" not in vars(pipe.transformer) and type(pipe) is FluxPipeline
    enable(other).disable()


@slow
def test_a_pipeline_made_from_a_cached_one_is_cached_with_its_scheduler_only():
    pipe, image = small.ALL["flux"].build(), small.ALL["flux img2img"]
    pipe.set_progress_bar_config(disable=True)
    with enable(pipe) as handle:
        calls, other = counter(pipe), diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        image.latents(other, steps=9)  # with the same scheduler
        assert len(calls) == computed(handle) == len(SOME)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        with pytest.raises(RuntimeError, match="timestep is not one of the scheduler's"):
            image.latents(other, steps=9)
        run(pipe)
        assert computed(handle) == len(SOME)


@slow
def test_one_predictor_in_two_runs_at_once():
    shared, pipes = predictor(), [small.ALL[name].build() for name in ("flux", "flux cfg")]
    alone = []
    for pipe, name in zip(pipes, ("flux", "flux cfg")):
        with lesa.enable_cache(pipe, shared, SOME, strict=True):
            alone.append(run(pipe, name))
    with lesa.enable_cache(pipes[0], shared, SOME, strict=True), lesa.enable_cache(pipes[1], shared, SOME, strict=True):
        inner = []
        outer = run(pipes[0], callback_on_step_end=at_step(5, lambda: inner.append(run(pipes[1], "flux cfg"))))
    assert torch.equal(outer, alone[0]) and torch.equal(inner[0], alone[1])


@slow
def test_transformers_that_are_exchanged_between_two_cached_pipelines_are_noticed():
    pipes = [small.ALL["flux"].build() for _ in range(2)]
    handles, transformers = [enable(pipe) for pipe in pipes], [pipe.transformer for pipe in pipes]
    pipes[0].transformer, pipes[1].transformer = transformers[::-1]
    for pipe in pipes:
        with pytest.raises(RuntimeError):
            run(pipe)
    for handle in handles:
        handle.disable()
    assert all("forward" not in vars(transformer) for transformer in transformers)


@slow
def test_an_object_with_slots_may_be_a_pipeline():
    class Mine:
        __slots__ = ("transformer", "scheduler", "_execution_device", "pipe")

        def __call__(self, **options):
            return run(self.pipe, **options)

    mine = Mine()
    mine.pipe = small.ALL["flux"].build()
    mine.transformer, mine.scheduler = mine.pipe.transformer, mine.pipe.scheduler
    mine._execution_device = torch.device("cpu")
    with enable(mine) as handle:
        mine()
    assert computed(handle) == len(SOME)


# Copies and files


@slow
def test_what_is_saved_while_the_cache_is_on_is_what_is_there_without_it(tmp_path):
    pipe = small.ALL["flux"].build()
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    with enable(pipe):
        assert pipe.transformer.state_dict().keys() == before.keys()
        pipe.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in before.items()) and loaded.keys() == before.keys()
    assert diffusers.DiffusionPipeline.load_config(tmp_path)["_class_name"] == "FluxPipeline"


# Other caches


@slow
@pytest.mark.parametrize("cache_first", [False, True])
@pytest.mark.parametrize("other", ["first_block", "taylorseer"])
def test_caches_that_are_applied_to_the_layers_are_refused(other, cache_first):
    pipe = small.ALL["flux"].build()
    applied = {
        "first_block": lambda: diffusers.apply_first_block_cache(
            pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.1)
        ),
        "taylorseer": lambda: diffusers.apply_taylorseer_cache(
            pipe.transformer, diffusers.TaylorSeerCacheConfig(cache_interval=3)
        ),
    }
    if not cache_first:
        applied[other]()
        with pytest.raises(RuntimeError, match="other cache"):
            enable(pipe)
        assert "forward" not in vars(pipe.transformer)
        return
    with enable(pipe):
        applied[other]()
        with pytest.raises(RuntimeError, match="other cache"):
            run(pipe)


# Precision


@slow
@pytest.mark.parametrize("name", TOGGLED)
def test_half_precision_of_every_family(name):
    case = small.ALL[name]
    pipe = case.build().to(torch.float16)
    halves = {key: value.half() for key, value in case.inputs().items() if "embeds" in key}
    plain, calls = run(pipe, name, **halves), counter(pipe)
    with enable(pipe, range(STEPS)):
        assert torch.equal(run(pipe, name, **halves), plain)
    calls.clear()
    with enable(pipe) as handle:
        cached = run(pipe, name, **halves)
    assert len(calls) == computed(handle) == len(SOME) * len(case.streams) and cached.dtype == torch.float16
    assert distance(cached.float(), plain.float()) < NEAR


@slow
def test_a_dtype_that_changes_while_the_cache_is_on():
    case, calls = small.ALL["flux"], []
    halves = {key: value.bfloat16() for key, value in case.inputs().items() if "embeds" in key}
    wanted = case.build().to(torch.bfloat16)
    with enable(wanted):
        wanted = run(wanted, **halves)
    pipe = case.build()
    with enable(pipe):
        run(pipe)
        pipe.to(torch.bfloat16)
        calls = counter(pipe)
        assert torch.equal(run(pipe, **halves), wanted) and len(calls) == len(SOME)


@slow
@pytest.mark.parametrize(
    "name, dtype",
    [*((name, torch.bfloat16) for name in FOUR), ("flux", torch.float16), ("flux", torch.float64)],
)
def test_the_default_dtype_changes_nothing(name, dtype):
    """While a cache is enabled, and while it runs."""
    pipe = small.ALL[name].build()
    with enable(pipe):
        wanted = run(pipe, name)
    try:
        torch.set_default_dtype(dtype)
        handle = enable(pipe)
        torch.set_default_dtype(torch.float32)
        assert torch.equal(run(pipe, name), wanted)
        handle.disable()
        torch.set_default_dtype(dtype)
        plain = run(pipe, name)
        with enable(pipe, range(STEPS)):
            assert torch.equal(run(pipe, name), plain)
        with enable(pipe):
            assert distance(run(pipe, name), plain) < NEAR
    finally:
        torch.set_default_dtype(torch.float32)


@slow
@pytest.mark.parametrize(
    "name, mode",
    [*((name, torch.inference_mode) for name in FOUR), ("flux", torch.no_grad), ("flux", torch.enable_grad)],
)
def test_grad_modes_around_each_part_change_nothing(name, mode):
    pipe = small.ALL[name].build()
    with enable(pipe):
        wanted = run(pipe, name)
    with mode():
        made, handle = predictor(), enable(pipe)
    assert torch.equal(run(pipe, name), wanted)
    with mode():
        assert torch.equal(run(pipe, name), wanted)
    assert torch.equal(run(pipe, name), wanted)
    with mode():
        handle.disable()
    with lesa.enable_cache(pipe, made, SOME, strict=True):
        assert torch.equal(run(pipe, name), wanted)


# ControlNets


@slow
def test_a_controlnet_that_is_called_in_a_callback_gives_what_it_always_gives():
    """Inside a run it gives a sequence that is computed when something reads it, as `docs/limits.md` says."""
    pipe, arguments, kept = small.ALL["flux controlnet"].build(), {}, []
    handle = pipe.controlnet.register_forward_pre_hook(lambda m, a, kw: arguments.update(kw), with_kwargs=True)
    run(pipe, "flux controlnet")
    handle.remove()
    wanted = torch.stack(pipe.controlnet(**arguments)[0])

    def call():
        kept.append(torch.stack([*pipe.controlnet(**arguments)[0]]))

    with enable(pipe):
        run(pipe, "flux controlnet", callback_on_step_end=at_step(5, call))
    assert torch.equal(kept[0], wanted)


@slow
def test_a_controlnet_that_is_replaced_while_the_cache_is_on():
    pipe = small.ALL["flux controlnet"].build()
    first, second = pipe.controlnet, small.opened(small.flux_controlnet())
    with enable(pipe):
        run(pipe, "flux controlnet")
        pipe.controlnet = second
        cached = run(pipe, "flux controlnet")
    assert "_compiled_call_impl" not in vars(first)
    with enable(pipe):
        assert torch.equal(run(pipe, "flux controlnet"), cached)


# Threads


@slow
@pytest.mark.parametrize("kind", ["subclass", "shared wrapper"])
def test_transformers_of_one_class_in_several_threads(kind):
    """One has no cache. What is exchanged for a forecast of one must not reach the others."""
    pipes = [small.ALL["flux"].build() for _ in range(3)]
    forward = FluxTransformer2DModel.forward

    class Scaled(FluxTransformer2DModel):
        def forward(self, *args, **kwargs):
            return scaled(super().forward(*args, **kwargs))

    def shared(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    if kind == "subclass":
        pipes[0].transformer.__class__ = Scaled
    else:
        for pipe in pipes:
            pipe.transformer.forward = types.MethodType(shared, pipe.transformer)
    handles = [enable(pipe) for pipe in pipes[:2]]
    alone, failures = [run(pipe) for pipe in pipes], []

    def work(number):
        for _ in range(3):
            try:
                if not torch.equal(run(pipes[number]), alone[number]):
                    failures.append(f"{number} differs")
            except Exception as error:  # of any kind: it is shown
                failures.append(f"{number}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for handle in handles:
        handle.disable()
    assert failures == [] and FluxTransformer2DModel.forward is forward


# Loops of any order


@st.composite
def loops(draw):
    """A loop of the user's own: noise levels, and for each step the calls of the transformer, which may pause, change
    their order, batch or text, have contexts or none, and share texts."""
    steps = draw(st.integers(2, 8))
    levels = st.lists(st.floats(0.05, 1.0), min_size=steps, max_size=steps)
    sorts = st.sampled_from([lambda x: sorted(x, reverse=True), lambda x: [x[i // 2 * 2] for i in range(steps)], list])
    sigmas = draw(st.one_of(st.none(), levels.flatmap(lambda x: sorts.map(lambda sort: sort(x)))))
    streams = []
    for number in range(draw(st.integers(1, 3))):
        flags = st.lists(st.integers(0, 5).map(bool), min_size=steps, max_size=steps)
        batches = st.lists(st.sampled_from([1, 1, 2]), min_size=steps, max_size=steps)
        streams.append(
            SimpleNamespace(
                context=draw(st.sampled_from([None, "cond", f"stream {number}"])),
                text=draw(st.sampled_from([0, 10 + number])),
                is_kept=draw(st.booleans()),
                on=draw(st.one_of(st.just([True] * steps), flags)),
                batches=draw(st.one_of(st.just([1] * steps), batches)),
                other_text_from=draw(st.sampled_from([steps, steps, steps // 2])),
            )
        )
    return SimpleNamespace(
        steps=steps,
        sigmas=sigmas,
        streams=streams,
        orders=[draw(st.permutations(range(len(streams)))) for _ in range(steps)],
        begin=draw(st.sampled_from([0, 0, 0, steps // 2])),
        schedule=sorted({0, *draw(st.sets(st.integers(0, steps - 1)))}),
        has_position=draw(st.booleans()),
        steps_scheduler=draw(st.booleans()),
        strict=draw(st.booleans()),
        mixer=draw(st.sampled_from(["newton", "dense"])),
    )


class LoopPipeline:
    """What `enable_cache` needs of a pipeline, and a loop."""

    _execution_device = torch.device("cpu")

    def __init__(self):
        self.transformer = small.flux_transformer(num_layers=1, num_single_layers=1).eval()
        self.calls = counter(self)
        with self.transformer.cache_context("main"):  # makes what diffusers keeps on the transformer
            pass
        side = torch.meshgrid(torch.zeros(1), torch.arange(2.0), torch.arange(3.0), indexing="ij")
        self._ids = {"img_ids": torch.stack(side, -1).reshape(-1, 3), "txt_ids": torch.zeros(small.TEXT_TOKENS, 3)}

    def prepare(self, loop):
        """Makes its scheduler."""
        if loop.has_position:
            self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        else:
            self.scheduler = BareScheduler(sigmas=None, timesteps=None, num_inference_steps=None)
        self.calls.clear()

    @torch.no_grad()
    def __call__(self, loop):
        """The outputs of all calls."""
        scheduler, kept, outputs = self.scheduler, {}, []
        levels = loop.sigmas or [1 - step / loop.steps for step in range(loop.steps)]
        if loop.has_position:
            scheduler.set_timesteps(sigmas=levels)
            scheduler.set_begin_index(loop.begin)
        else:
            sigmas = torch.tensor([*levels, 0.0])
            vars(scheduler).update(sigmas=sigmas, timesteps=1000 * sigmas[:-1], num_inference_steps=loop.steps)
        for step, timestep in [*enumerate(scheduler.timesteps)][loop.begin :]:
            for number in loop.orders[step]:
                stream = loop.streams[number]
                if not stream.on[step]:
                    continue
                batch, text = stream.batches[step], stream.text + 50 * (step >= stream.other_text_from)
                generator = torch.Generator().manual_seed(text)
                prompts = torch.randn(batch, small.TEXT_TOKENS, small.TEXT_DIM, generator=generator)
                prompts = kept.setdefault((batch, text), prompts) if stream.is_kept else prompts
                noise = torch.randn(batch, 6, 4 * small.LATENT_CHANNELS, generator=generator) * (1 - 0.05 * step)
                context = self.transformer.cache_context(stream.context) if stream.context else nullcontext()
                with context:
                    outputs += self.transformer(
                        hidden_states=noise,
                        encoder_hidden_states=prompts,
                        pooled_projections=prompts[:, 0],
                        timestep=timestep.expand(batch) / 1000,
                        **self._ids,
                        return_dict=False,
                    )
            if loop.has_position and loop.steps_scheduler:
                scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        self.transformer._reset_stateful_cache()
        return outputs


@pytest.fixture(scope="module")
def loop_pipe():
    return LoopPipeline()


@slow
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(loop=loops())
def test_any_loop_is_exact_counted_and_undone(loop_pipe, loop):
    pipe, attributes = loop_pipe, dict(vars(loop_pipe.transformer))
    pipe.prepare(loop)
    plain = pipe(loop)
    total = len(pipe.calls)

    def same(outputs):
        return len(outputs) == len(plain) and all(map(torch.equal, outputs, plain))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.prepare(loop)
        with lesa.enable_cache(pipe, predictor(mixer=loop.mixer), range(loop.steps)):
            assert same(pipe(loop)) and len(pipe.calls) == total
        pipe.prepare(loop)
        handle = lesa.enable_cache(pipe, predictor(mixer=loop.mixer), loop.schedule, strict=loop.strict)
        failed = False
        with handle:
            try:
                outputs = pipe(loop)
            except RuntimeError:
                failed = True
                assert loop.strict
    stats = handle.stats
    for stream in stats.streams.values():
        assert stream.computed == sorted({*stream.computed}) and not {*stream.computed} & {*stream.predicted}
        assert loop.strict or stream.reasons.keys() == {*stream.computed}
    if not failed:
        predicted = sum(len(stream.predicted) for stream in stats.streams.values())
        if stats.runs == 1:
            assert computed(handle) + stats.unlocated == len(pipe.calls) == total - predicted
        assert all(output.isfinite().all() for output in outputs)
    if loop.strict and not failed:
        assert stats.unlocated == 0
        for stream in stats.streams.values():
            assert {*stream.computed} <= {*loop.schedule} and not {*stream.predicted} & {*loop.schedule}
    assert vars(pipe.transformer) == attributes
    pipe.prepare(loop)
    assert same(pipe(loop))


# Steps that the cached transformer does not do


@slow
@pytest.mark.parametrize("back", [7, STEPS - 2, STEPS - 1])
def test_a_swap_until_the_end_of_a_run_is_noticed(back):
    pipe, other = small.ALL["flux"].build(), small.ALL["flux"].build().transformer
    transformer = pipe.transformer

    def swap(pipe, step, timestep, tensors):
        pipe.transformer = {5: other, back: transformer}.get(step, pipe.transformer)
        return {}

    with enable(pipe), pytest.raises(RuntimeError, match="steps were done without the transformer"):
        run(pipe, callback_on_step_end=swap)


@slow
def test_a_run_that_begins_again_where_nothing_is_left_to_predict_is_noticed():
    pipe = small.ALL["flux"].build()
    arguments = {"callback_on_step_end": at_step(8, lambda: free_hooks(pipe))}
    with enable(pipe, 3), pytest.raises(RuntimeError, match="in the middle of a run"):
        run(pipe, **arguments)


@slow
def test_a_loop_after_a_run_that_was_refused_is_a_loop():
    """A run with another transformer is refused before it begins. Nothing of it stays."""
    pipe, other = small.ALL["flux"].build(), small.ALL["flux"].build().transformer
    transformer = pipe.transformer
    with enable(pipe) as handle:
        wanted = run(pipe)
        pipe.transformer = other
        with pytest.raises(RuntimeError, match="was replaced"):
            run(pipe)
        assert handle._hook._begun is None
        pipe.transformer = transformer
        assert torch.equal(run(pipe), wanted)
