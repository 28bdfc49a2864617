"""A transformer whose forward others wrap, patch or replace, before the cache is enabled or while it is on.

What is wrapped runs in predicted steps too, so a wrapper that changes inputs, outputs or the dtype acts in them. What
is replaced so that lesa cannot forecast in it is computed, with a warning, and it is an error with `strict`.
"""

import contextlib
import copy
import functools
import pickle
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch

import lesa
import small_pipelines as small
from driven_loops import ours
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 12
SOME = [0, 1, 4, 8]
FAMILIES = {"flux": "flux", "qwen-image": "qwen", "hunyuan-video": "hunyuan", "sd3": "sd3"}
slow = pytest.mark.slow


@functools.cache
def pipeline(family):
    """One pipeline for the module. Its transformer and its class are restored by `unchanged`."""
    pipe = small.ALL[FAMILIES[family]].build()
    small.ALL[FAMILIES[family]].latents(pipe, steps=1)  # its `cache_context` leaves a registry of hooks
    return pipe


@pytest.fixture(params=[pytest.param(f, marks=() if f == "flux" else slow) for f in FAMILIES])
def family(request):
    return request.param


@pytest.fixture
def pipe(family):
    pipe = pipeline(family)
    transformer, cls = pipe.transformer, type(pipe.transformer)
    before, forward, pipe_class = dict(vars(transformer)), cls.forward, type(pipe)
    yield pipe
    pipe.transformer = transformer
    lesa.disable_cache(pipe)
    assert type(pipe) is pipe_class
    transformer.__class__, cls.forward = cls, forward
    vars(transformer).clear()
    vars(transformer).update(before)


@pytest.fixture
def generate(family):
    return lambda pipe: small.ALL[FAMILIES[family]].latents(pipe, steps=STEPS)


def predictor():
    torch.manual_seed(0)
    return FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4))


@contextlib.contextmanager
def blocks_of(pipe):
    """The number of times that the first block runs."""
    seen = []
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(1))
    yield seen
    handle.remove()


def distance(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def stronger(output):
    """An output that is larger by half."""
    return (output[0] * 1.5,) if isinstance(output, tuple) else type(output)(sample=output.sample * 1.5)


def by_closure(t):
    old = t.forward
    t.forward = lambda *args, **kwargs: stronger(old(*args, **kwargs))


def by_decorator(t):
    old = t.forward

    @functools.wraps(old)
    def forward(*args, **kwargs):
        return stronger(old(*args, **kwargs))

    t.forward = forward


def by_method(t):
    old = t.forward

    def forward(self, *args, **kwargs):
        return stronger(old(*args, **kwargs))

    t.forward = types.MethodType(forward, t)


def by_partial(t):
    def forward(old, *args, **kwargs):
        return stronger(old(*args, **kwargs))

    t.forward = functools.partial(forward, t.forward)


def by_default(t):
    t.forward = lambda *args, _old=t.forward, **kwargs: stronger(_old(*args, **kwargs))


class Stronger:
    def __init__(self, old):
        self.old, self.calls = old, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return stronger(self.old(*args, **kwargs))


def by_object(t):
    t.forward = Stronger(t.forward)


def by_list(t):
    chain = [stronger, t.forward]
    t.forward = lambda *args, **kwargs: chain[0](chain[1](*args, **kwargs))


def by_class_of_the_transformer(t):
    """It finds the class's forward by name, not by reference."""
    t.forward = lambda *args, **kwargs: stronger(type(t).forward(t, *args, **kwargs))


def by_two(t):
    by_closure(t)
    inner = t.forward
    t.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))


OLD = None


def by_global(t):
    global OLD
    OLD = t.forward
    t.forward = lambda *args, **kwargs: stronger(OLD(*args, **kwargs))


def on_class(t):
    old = type(t).forward
    type(t).forward = lambda self, *args, **kwargs: stronger(old(self, *args, **kwargs))


def on_class_by_decorator(t):
    old = type(t).forward

    @functools.wraps(old)
    def forward(self, *args, **kwargs):
        return stronger(old(self, *args, **kwargs))

    type(t).forward = forward


def on_class_by_global(t):
    global OLD
    OLD = type(t).forward
    type(t).forward = lambda self, *args, **kwargs: stronger(OLD(self, *args, **kwargs))


def by_subclass(t):
    cls = type(t)

    class Sub(cls):
        def forward(self, *args, **kwargs):
            return stronger(super().forward(*args, **kwargs))

    t.__class__ = Sub


def by_subclass_that_names_its_base(t):
    cls = type(t)

    class Sub(cls):
        def forward(self, *args, **kwargs):
            return stronger(cls.forward(self, *args, **kwargs))

    t.__class__ = Sub


def by_subclass_that_says_what_it_wraps(t):
    cls = type(t)

    class Sub(cls):
        @functools.wraps(cls.forward)
        def forward(self, *args, **kwargs):
            return stronger(super().forward(*args, **kwargs))

    t.__class__ = Sub


class Decorator:
    """A decorator that is a class, and keeps what it wraps where `functools` says it."""

    def __init__(self, old):
        functools.update_wrapper(self, old)

    def __call__(self, *args, **kwargs):
        return stronger(self.__wrapped__(*args, **kwargs))


def by_a_decorator_that_is_a_class(t):
    t.forward = Decorator(t.forward)


def by_subclass_of_a_patched_class(t):
    on_class(t)
    cls = type(t)
    t.__class__ = type("Sub", (cls,), {"forward": lambda self, *args, **kwargs: cls.forward(self, *args, **kwargs)})


WRAPPERS = {
    f.__name__: f
    for f in (
        by_closure,
        by_decorator,
        by_method,
        by_partial,
        by_default,
        by_object,
        by_list,
        by_class_of_the_transformer,
        by_two,
        by_global,
        on_class,
        on_class_by_decorator,
        on_class_by_global,
        by_subclass,
        by_subclass_that_names_its_base,
        by_subclass_that_says_what_it_wraps,
        by_a_decorator_that_is_a_class,
        by_subclass_of_a_patched_class,
    )
}
FAST = ("by_closure", "on_class", "by_subclass")


def marked(names):
    return [pytest.param(name, marks=() if name in FAST else slow) for name in names]


@pytest.mark.parametrize("wrapper", marked(WRAPPERS))
@pytest.mark.parametrize("cache_first", [False, True], ids=["wrap-cache", "cache-wrap"])
def test_a_wrapper_acts_in_predicted_steps_too(pipe, generate, family, wrapper, cache_first):
    if family != "flux" and wrapper not in FAST:
        pytest.skip("how a wrapper holds the forward does not depend on the family")
    t, wrap = pipe.transformer, WRAPPERS[wrapper]
    if cache_first:
        before = dict(vars(t))
        handle = lesa.enable_cache(pipe, predictor(), SOME, strict=True)
        generate(pipe)
        wrap(t)
        added = {name: value for name, value in vars(t).items() if name not in before}
    else:
        wrap(t)
        before, added = dict(vars(t)), {}
        handle = lesa.enable_cache(pipe, predictor(), SOME, strict=True)
    with blocks_of(pipe) as seen:
        cached = generate(pipe)
    assert len(seen) == handle.stats.computed_steps == len(SOME)
    assert handle.stats.predicted_steps == STEPS - len(SOME)
    handle.disable()
    wrapped_by_others = {"forward": added["forward"]} if "forward" in added and wrapper[:2] == "by" else {}
    if "subclass" in wrapper:
        wrapped_by_others = {}
    assert vars(t) == {**before, **wrapped_by_others}
    plain = generate(pipe)
    assert 0 < distance(cached, plain) < 0.03  # one that is left out in predicted steps changes them by 0.15
    with lesa.enable_cache(pipe, predictor(), range(STEPS), strict=True):
        assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain)
    assert vars(t) == {**before, **wrapped_by_others}


@pytest.mark.parametrize("cache_first", [False, True], ids=["wrap-cache", "cache-wrap"])
def test_a_wrapper_that_changes_what_the_head_reads(pipe, generate, family, cache_first):
    if family == "qwen-image":
        pytest.skip("only the timestep conditions its head")
    t = pipe.transformer

    def wrap():
        old = t.forward

        def forward(*args, **kwargs):
            kwargs["pooled_projections"] = kwargs["pooled_projections"] * 0
            return old(*args, **kwargs)

        t.forward = forward

    if not cache_first:
        wrap()
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
        if cache_first:
            wrap()
        cached = generate(pipe)
    assert 0 < distance(cached, generate(pipe)) < 0.02


def test_a_wrapper_that_changes_the_timestep(pipe, generate):
    t = pipe.transformer
    old = t.forward
    t.forward = lambda **kwargs: old(**{**kwargs, "timestep": kwargs["timestep"] * 0.5})
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
        cached = generate(pipe)
    assert 0 < distance(cached, generate(pipe)) < 0.02


# Precision


def autocast_decorator(pipe):
    pipe.transformer.forward = torch.autocast("cpu", torch.bfloat16)(pipe.transformer.forward)
    return lambda: None


def autocast_decorator_of_the_class(pipe):
    cls = type(pipe.transformer)
    cls.forward = torch.autocast("cpu", torch.bfloat16)(cls.forward)
    return lambda: None


def accelerator(pipe, keep_fp32_wrapper=False):
    made = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    assert made.prepare(pipe.transformer) is pipe.transformer
    return lambda: made.unwrap_model(pipe.transformer, keep_fp32_wrapper=keep_fp32_wrapper)


def without_a_type(pipe):
    """As scripts do that cast what comes in and goes out."""
    t, old = pipe.transformer, pipe.transformer.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = old(*args, **kwargs)
        return tuple(part.float() for part in output) if isinstance(output, tuple) else output

    t.forward = forward
    return lambda: None


PRECISION = [
    autocast_decorator,
    autocast_decorator_of_the_class,
    accelerator,
    functools.partial(accelerator, keep_fp32_wrapper=True),
    without_a_type,
]


def name_of(f):
    return f.__name__ if hasattr(f, "__name__") else "accelerator_keeping_its_wrapper"


ORDERS = ["wrap, enable", "enable, wrap", "wrap, enable, unwrap", "enable, wrap, unwrap"]


@pytest.mark.parametrize(
    "family, wrap, order",
    [
        # Each wrapper in each order, and each of both with each family: the three together have no code of their own.
        pytest.param([*FAMILIES][(w + o) % len(FAMILIES)], wrap, order, id=f"{name_of(wrap)}-{order}")
        for w, wrap in enumerate(PRECISION)
        for o, order in enumerate(ORDERS)
    ],
)
@slow
def test_precision_wrappers(pipe, generate, wrap, order):
    t = pipe.transformer
    unwrap, handle = None, None
    for action in order.split(", "):
        if action == "wrap":
            unwrap = wrap(pipe)
        elif action == "enable":
            before = dict(vars(t))
            handle = lesa.enable_cache(pipe, predictor(), SOME, strict=True)
        else:
            unwrap()
        if handle is not None:
            with blocks_of(pipe) as seen:
                cached = generate(pipe)
            assert len(seen) == handle.stats.computed_steps == len(SOME)
    handle.disable()
    if order == "wrap, enable":
        assert vars(t) == before
    plain = generate(pipe)
    assert 0 < distance(cached, plain) < 0.03
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("last", ["disable", "unwrap"])
@slow
def test_what_accelerate_leaves_is_what_it_leaves_without_a_cache(pipe, generate, last):
    t = pipe.transformer
    before = dict(vars(t))
    accelerator(pipe)()
    left = {name: value for name, value in vars(t).items() if name not in before}
    vars(t).clear(), vars(t).update(before)
    handle = lesa.enable_cache(pipe, predictor(), SOME, strict=True)
    unwrap = accelerator(pipe)
    generate(pipe)
    for action in (unwrap, handle.disable) if last == "disable" else (handle.disable, unwrap):
        action()
    assert set(vars(t)) - {"forward"} == set(before) - {"forward"} | set(left) - {"forward"}
    assert torch.equal(generate(pipe), generate(pipe))
    forward = vars(t).get("forward", t.forward)
    assert forward.__func__.__module__ == type(t).forward.__module__ and forward.__self__ is t


# Replaced


def class_forward(t):
    t.forward = types.MethodType(type(t).forward, t)


def class_forward_by_get(t):
    t.forward = type(t).forward.__get__(t)


def kept_from_before(t, forward=None):
    t.forward = forward


def own_forward(t):
    """Computes by other means: here by a copy of the module."""
    twin = copy.copy(t)
    vars(twin).pop("_compiled_call_impl", None)
    vars(twin).pop("forward", None)
    t.forward = lambda *args, **kwargs: type(twin).forward(twin, *args, **kwargs)


REPLACED = [class_forward, class_forward_by_get, own_forward]


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
def test_a_forward_that_is_replaced_is_noticed(pipe, generate, replace):
    t = pipe.transformer
    plain = generate(pipe)
    for strict in (False, True):
        before = dict(vars(t))
        handle = lesa.enable_cache(pipe, predictor(), SOME, strict=strict)
        generate(pipe)
        replace(t)
        if strict:
            with pytest.raises(RuntimeError, match="a step can't be predicted: the transformer's forward was replaced"):
                generate(pipe)
        else:
            with blocks_of(pipe) as seen, pytest.warns(RuntimeWarning, match="forward was replaced") as caught:
                assert torch.equal(generate(pipe), plain)
            assert len(ours(caught)) == 1
            assert len(seen) == handle.stats.computed_steps == STEPS and handle.stats.predicted_steps == 0
            (stream,) = handle.stats.streams.values()
            assert [step for step, reason in stream.reasons.items() if "replaced" in reason] == [
                step for step in range(STEPS) if step not in SOME
            ]
        handle.disable()
        assert {**vars(t), "forward": None} == {**before, "forward": None}
        assert torch.equal(generate(pipe), plain)
        vars(t).pop("forward", None)


def test_a_forward_that_was_kept_and_is_set_again_is_noticed(pipe, generate):
    kept = pipe.transformer.forward
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
        pipe.transformer.forward = kept
        with pytest.raises(RuntimeError, match="forward was replaced"):
            generate(pipe)


def test_the_forward_of_the_class_may_be_an_attribute_before(pipe, generate):
    class_forward(pipe.transformer)
    before = dict(vars(pipe.transformer))
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True) as handle:
        generate(pipe)
        assert handle.stats.predicted_steps == STEPS - len(SOME)
    assert vars(pipe.transformer) == before


def test_a_class_with_a_forward_of_somebody_elses(pipe, generate):
    """It is there before the cache, and nothing can be known of it."""
    t = pipe.transformer
    twin = copy.copy(t)
    twin.__class__ = type("Twin", (type(t),), {"forward": type(t).forward})
    type(t).forward = lambda self, *args, **kwargs: type(twin).forward(twin, *args, **kwargs)
    plain = generate(pipe)
    with lesa.enable_cache(pipe, predictor(), SOME) as handle, pytest.warns(RuntimeWarning, match="was replaced"):
        assert torch.equal(generate(pipe), plain)
    assert handle.stats.predicted_steps == 0
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True), pytest.raises(RuntimeError, match="was replaced"):
        generate(pipe)


def test_a_forward_that_runs_the_model_twice(pipe, generate):
    """As guidance does that splits a batch."""
    t, old = pipe.transformer, pipe.transformer.forward

    def forward(*args, **kwargs):
        first, second = (old(*args, **kwargs) for _ in range(2))
        return (first[0] / 2 + second[0] / 2,)

    t.forward = forward
    plain = generate(pipe)
    with lesa.enable_cache(pipe, predictor(), SOME) as handle, pytest.warns(RuntimeWarning, match="more than once"):
        assert torch.equal(generate(pipe), plain)
    assert handle.stats.predicted_steps == 0
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True), pytest.raises(RuntimeError, match="more than once"):
        generate(pipe)


def test_a_forward_that_is_called_directly_is_noticed(pipe, generate):
    t, caught = pipe.transformer, {}

    def keep(module, args, kwargs):
        caught.update(kwargs)

    hook = t.register_forward_pre_hook(keep, with_kwargs=True)
    generate(pipe)
    hook.remove()
    with lesa.enable_cache(pipe, predictor(), SOME) as handle:
        with pytest.warns(RuntimeWarning, match="called directly"), torch.no_grad():
            t.forward(**caught)
        assert "called directly" in handle.stats.summary()
    noticed = pytest.raises(RuntimeError, match="called directly")
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True), torch.no_grad(), noticed:
        t.forward(**caught)


def test_forecasts_of_two_transformers_share_a_patched_class(family, generate):
    """The wrapper holds one function for both."""
    pipes = [small.ALL[FAMILIES[family]].build() for _ in range(2)]
    cls = type(pipes[0].transformer)
    old = cls.forward
    try:
        on_class(pipes[0].transformer)
        plain = generate(pipes[1])
        with contextlib.ExitStack() as stack:
            handles = [stack.enter_context(lesa.enable_cache(p, predictor(), SOME, strict=True)) for p in pipes]
            runs = [generate(p) for p in pipes]
            assert torch.equal(*runs) and all(h.stats.computed_steps == len(SOME) for h in handles)
        with lesa.enable_cache(pipes[0], predictor(), SOME, strict=True):
            assert torch.equal(generate(pipes[1]), plain)
    finally:
        cls.forward = old


@slow
def test_a_shared_wrapper_in_two_threads(generate, family):
    pipes = [small.ALL[FAMILIES[family]].build() for _ in range(2)]
    own = type(pipes[0].transformer).forward

    def shared(self, *args, **kwargs):
        return own(self, *args, **kwargs)

    for p in pipes:
        p.transformer.forward = types.MethodType(shared, p.transformer)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
            handles = [stack.enter_context(lesa.enable_cache(p, predictor(), SOME, strict=True)) for p in pipes]
            for _ in range(3):
                assert torch.equal(*pool.map(generate, pipes))
                assert all(h.stats.predicted_steps == STEPS - len(SOME) for h in handles)
    finally:
        sys.setswitchinterval(interval)


# The transformer of the pipeline


def other_transformer(family):
    return small.ALL[FAMILIES[family]].build().transformer


@pytest.mark.parametrize("how", ["attribute", "register_modules", "in a callback"])
def test_a_transformer_that_is_swapped_is_noticed(pipe, generate, family, how):
    transformer = pipe.transformer
    other = other_transformer(family)

    def swap(*args):
        if how == "register_modules":
            pipe.register_modules(transformer=other)
        else:
            pipe.transformer = other
        return {}

    case = small.ALL[FAMILIES[family]]
    try:
        handle = lesa.enable_cache(pipe, predictor(), SOME)
        generate(pipe)
        in_run = {"callback_on_step_end": swap} if how == "in a callback" else {}
        if not in_run:
            swap()
        with pytest.warns(RuntimeWarning, match="`pipe.transformer` was replaced while the cache was on"):
            case.latents(pipe, steps=STEPS, **in_run)
        assert handle.stats.predicted_steps == 0 and "was replaced" in handle.stats.summary()
        assert handle.stats.runs == 2
        lesa.disable_cache(pipe)
        assert set(vars(transformer)) == set(vars(other))
        pipe.transformer = transformer
        with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
            if not in_run:
                swap()
            with pytest.raises(RuntimeError, match="`pipe.transformer` was replaced while the cache was on"):
                case.latents(pipe, steps=STEPS, **in_run)
            pipe.transformer = transformer
            generate(pipe)
        with lesa.enable_cache(pipe, predictor(), SOME):
            swap()
            with pytest.raises(RuntimeError, match="one with lesa on already"):
                lesa.enable_cache(pipe, predictor(), SOME)
    finally:
        pipe.transformer = transformer


def test_a_module_around_the_transformer_is_no_other_one(pipe, generate):
    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.dtype = inner, inner.config, inner.dtype
            self.device, self.cache_context = inner.device, getattr(inner, "cache_context", None)

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    transformer = pipe.transformer
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.register_modules(transformer=Around(transformer))
        generate(pipe)
        assert handle.stats.predicted_steps == STEPS - len(SOME)
    pipe.register_modules(transformer=transformer)


# Copies


@pytest.mark.parametrize("part", ["pipe", "transformer"])
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_what_has_a_cache_is_not_copied(pipe, tmp_path, part, way):
    target = pipe if part == "pipe" else pipe.transformer
    ways = {
        "pickle": pickle.dumps,
        "torch.save": lambda it: torch.save(it, tmp_path / "it"),
        "deepcopy": copy.deepcopy,
    }
    refused = pytest.raises(RuntimeError, match="`transformer` cannot be copied while a cache of lesa is on. Call")
    with lesa.enable_cache(pipe, predictor(), SOME), refused:
        ways[way](target)
    copied = ways[way](pipe.transformer)
    assert copied is None or copied


def test_a_shallow_copy_of_a_pipeline_is_a_pipeline(pipe, generate):
    cls = type(pipe)
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
        assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__
        twin = copy.copy(pipe)
        assert type(twin) is cls and vars(twin) == vars(pipe)
        assert torch.equal(generate(twin), generate(pipe))
        another = type(pipe)(**pipe.components)
    assert type(another) is cls
    with lesa.enable_cache(another, predictor(), SOME, strict=True):
        generate(another)


# Runs that lesa does not see in part


def test_a_bypass_is_noted_in_the_stats(pipe, generate):
    """Something between the pipeline and the transformer calls its forward."""
    with lesa.enable_cache(pipe, predictor(), SOME) as handle, pytest.warns(RuntimeWarning, match="called directly"):
        vars(pipe.transformer)["_compiled_call_impl"] = pipe.transformer._call_impl
        generate(pipe)
    assert "called directly" in handle.stats.summary()
    vars(pipe.transformer).pop("_compiled_call_impl")
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
        vars(pipe.transformer)["_compiled_call_impl"] = pipe.transformer._call_impl
        with pytest.raises(RuntimeError, match="called directly"):
            generate(pipe)


def test_a_transformer_that_is_swapped_and_back_in_one_run_is_noticed(pipe, family):
    transformer, other, case = pipe.transformer, other_transformer(family), small.ALL[FAMILIES[family]]

    def swap(pipe, step, timestep, tensors):
        pipe.transformer = {3: other, 6: transformer}.get(step, pipe.transformer)
        return {}

    noticed = pytest.warns(RuntimeWarning, match="steps were done without the transformer")
    with lesa.enable_cache(pipe, predictor(), SOME) as handle, noticed:
        case.latents(pipe, steps=STEPS, callback_on_step_end=swap)
    assert "steps were done without" in handle.stats.summary()
    noticed = pytest.raises(RuntimeError, match="steps were done without the transformer")
    with lesa.enable_cache(pipe, predictor(), SOME, strict=True), noticed:
        case.latents(pipe, steps=STEPS, callback_on_step_end=swap)


def test_an_object_in_the_place_of_the_transformer_is_noticed(pipe, generate, family):
    transformer, other = pipe.transformer, other_transformer(family)

    class Proxy:
        def __getattr__(self, name):
            return getattr(other, name)

        def __call__(self, *args, **kwargs):
            return other(*args, **kwargs)

    with lesa.enable_cache(pipe, predictor(), SOME, strict=True):
        vars(pipe)["transformer"] = Proxy()
        with pytest.raises(RuntimeError, match="`pipe.transformer` was replaced"):
            generate(pipe)
        vars(pipe)["transformer"] = transformer


# A forward of the class that is no function


class Descriptor:
    """Gives each instance a forward of its own."""

    def __init__(self, base):
        self.base = base

    def __get__(self, instance, owner=None):
        if instance is None:
            return self.base.forward
        return lambda *args, **kwargs: stronger(self.base.forward(instance, *args, **kwargs))


def as_descriptor(base):
    return Descriptor(base)


def as_property(base):
    return property(lambda self: lambda *args, **kwargs: stronger(base.forward(self, *args, **kwargs)))


def as_partial_method(base):
    def forward(self, change, *args, **kwargs):
        return change(base.forward(self, *args, **kwargs))

    return functools.partialmethod(forward, stronger)


@pytest.mark.parametrize("make", [as_descriptor, as_property, as_partial_method], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cache_first", [False, True], ids=["change-cache", "cache-change"])
@slow
def test_a_forward_of_the_class_that_is_no_function(pipe, generate, make, cache_first):
    t, cls = pipe.transformer, type(pipe.transformer)
    changed = type("Changed", (cls,), {"forward": make(cls)})
    if not cache_first:
        t.__class__ = changed
    with lesa.enable_cache(pipe, predictor(), SOME) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.__class__ = changed
        with blocks_of(pipe) as seen:
            cached = generate(pipe)
        assert len(seen) == handle.stats.computed_steps
    plain = generate(pipe)
    assert distance(cached, plain) < 0.03
    with lesa.enable_cache(pipe, predictor(), range(STEPS), strict=True):
        assert torch.equal(generate(pipe), plain)


# Off means off


@pytest.mark.parametrize("undo", ["delete", "restore"])
def test_what_others_undo_after_the_cache_is_off_is_as_without_a_cache(pipe, generate, undo):
    t = pipe.transformer
    before = dict(vars(t))

    def wrapped_and_undone(disable):
        old = t.forward
        t.forward = lambda *args, **kwargs: old(*args, **kwargs)
        disable()
        if undo == "restore":
            t.forward = old
        else:
            del t.forward

    wrapped_and_undone(lambda: None)
    wanted = dict(vars(t))
    vars(t).clear(), vars(t).update(before)
    handle = lesa.enable_cache(pipe, predictor(), SOME, strict=True)
    generate(pipe)
    wrapped_and_undone(handle.disable)
    assert vars(t) == wanted


@pytest.mark.parametrize("order", ["patch, enable, undo, disable", "enable, patch, disable, undo"])
def test_a_class_that_is_patched_and_restored_around_the_cache(pipe, generate, order):
    """Each run is as without a cache at that moment, but for the forecasts, and nothing stays."""
    t, cls, before = pipe.transformer, type(pipe.transformer), dict(vars(pipe.transformer))
    own, handle, calls = cls.forward, None, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        return own(self, *args, **kwargs)

    for action in order.split(", "):
        if action == "patch":
            cls.forward = counted
        elif action == "undo":
            cls.forward = own
        elif action == "enable":
            handle = lesa.enable_cache(pipe, predictor(), SOME, strict=True)
        else:
            handle.disable()
            handle = None
            assert vars(t) == before
        calls.clear()
        with blocks_of(pipe) as seen:
            generate(pipe)
        assert len(seen) == (STEPS if handle is None else len(SOME))
        assert len(calls) == (STEPS if cls.forward is counted else 0)
    assert vars(t) == before and cls.forward is own
