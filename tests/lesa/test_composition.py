"""The cache together with all that users do to a transformer besides: compile, offload, adapt, quantise, train it."""

import contextlib
import itertools
import math
import warnings
from functools import partial

import accelerate
import pytest
import torch
import torch._dynamo
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig, TorchAoConfig
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

import lesa
from driven_loops import SOME, STEPS, ours
from lesa.cache.placement import installed_hook
from lesa.demo import digits
from predictors import DIM, make_predictor


def enable(pipe, schedule=SOME, **options):
    """A cache that raises where a step that is to be predicted is not."""
    return lesa.enable_cache(pipe, make_predictor(), schedule, **{"strict": True, **options})


@contextlib.contextmanager
def own_head(transformer, is_on=True):
    """Runs the output head in the model's modules, as where a hook is on it: both compute the same bits."""
    hooks = [transformer.proj_out.register_forward_pre_hook(lambda module, args: None)] if is_on else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count_blocks(transformer):
    """A list that gets an entry whenever the transformer's first block runs."""
    seen = []
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(1))
    return seen


def assert_forecast(handle, steps=STEPS):
    """The run followed the schedule: no step was computed that was to be predicted."""
    stream = handle.stats.streams["cond"]
    assert (stream.computed, stream.predicted) == (SOME, [step for step in range(steps) if step not in SOME])


def make_small_pipe(**config):
    """A pipeline around a random transformer of three blocks."""
    torch.manual_seed(1)
    config = digits.TRANSFORMER_CONFIG | {"num_layers": 1, "num_single_layers": 2} | config
    pipe = digits.build_pipeline(FluxTransformer2DModel(**config).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def small_pipe():
    return make_small_pipe()


@pytest.fixture
def one_block_pipe():
    """A pipeline that compiles still faster."""
    return make_small_pipe(num_layers=0, num_single_layers=1)


# torch.compile


class Backend:
    """Runs the graphs that dynamo hands it as they are, and counts them and their runs."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def compile_module(pipe, backend):
    pipe.transformer.compile(backend=backend)


def compile_module_fullgraph(pipe, backend):
    pipe.transformer.compile(backend=backend, fullgraph=True)


def wrap(pipe, backend):
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)


def wrap_fullgraph(pipe, backend):
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


def compile_blocks(pipe, backend):
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


slow = partial(pytest.param, marks=pytest.mark.slow)
COMPILE = [slow(compile_module), compile_module_fullgraph, wrap, compile_blocks, wrap_fullgraph]
no_recompiles = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def both_orders(ways, ids):
    """Each way in both orders, of which one is slow, by turns; `pytest` alone so tries each way and each order."""
    rows = []
    for number, (way, cache_first) in enumerate(itertools.product(ways, [False, True])):
        function, marks = (way.values[0], way.marks) if hasattr(way, "marks") else (way, ())
        if number % 4 in (1, 2):
            marks = [*marks, pytest.mark.slow]
        rows.append(pytest.param(cache_first, function, marks=marks, id=f"{ids[cache_first]}-{function.__name__}"))
    return pytest.mark.parametrize("cache_first, way", rows)


@both_orders(COMPILE, ["compile-cache", "cache-compile"])
def test_a_compiled_transformer(one_block_pipe, generate, backend, way, cache_first):
    pipe = one_block_pipe
    if cache_first and way is wrap_fullgraph:
        pytest.skip("refused, as test_wrapping_with_fullgraph_after_enabling says")
    plain = generate(pipe)
    with enable(pipe):
        cached, longer = generate(pipe), generate(pipe, steps=15)
    if cache_first:
        handle = enable(pipe)
        way(pipe, backend)
    else:
        way(pipe, backend)
        assert torch.equal(generate(pipe), plain)
        compiled = vars(pipe.transformer).get("_compiled_call_impl")
        per_step, odd = divmod(backend.runs, STEPS)
        assert per_step and not odd
        handle = enable(pipe)
    before, graphs = backend.runs, backend.graphs
    assert torch.equal(generate(pipe), cached)
    assert_forecast(handle)
    assert backend.graphs - graphs == (cache_first or way is not compile_blocks)  # one, for all the steps
    if cache_first:
        per_step, odd = divmod(backend.runs, len(SOME))
        assert per_step and not odd
    assert backend.runs - before == per_step * len(SOME)
    with no_recompiles:
        assert torch.equal(generate(pipe), cached)
        assert torch.equal(generate(pipe, steps=15), longer)
        assert_forecast(handle, steps=15)
    handle.disable()
    before = backend.runs
    assert torch.equal(generate(pipe), plain)
    assert backend.runs - before == per_step * STEPS
    if not cache_first:
        assert vars(pipe.transformer).get("_compiled_call_impl") is compiled
        assert "compile" not in vars(pipe.transformer)
    graphs = backend.graphs
    with enable(pipe, range(STEPS)) as handle:
        assert torch.equal(generate(pipe), plain)
    with enable(pipe), no_recompiles:
        assert torch.equal(generate(pipe), cached)
    with no_recompiles:
        assert torch.equal(generate(pipe), plain)
    assert backend.graphs == graphs


def test_wrapping_with_fullgraph_after_enabling(one_block_pipe, generate, backend):
    pipe, transformer = one_block_pipe, one_block_pipe.transformer
    with enable(pipe) as handle:
        cached = generate(pipe)
        wrap_fullgraph(pipe, backend)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"`torch\.compile\(pipe\.transformer, fullgraph=True"):
            generate(pipe)
        pipe.transformer = transformer
        assert torch.equal(generate(pipe), cached)
        assert_forecast(handle)


@pytest.mark.slow
def test_the_cache_goes_from_a_transformer_that_was_wrapped_meanwhile(one_block_pipe, generate, backend):
    plain, transformer = generate(one_block_pipe), one_block_pipe.transformer
    enable(one_block_pipe)
    wrap(one_block_pipe, backend)
    generate(one_block_pipe)
    lesa.disable_cache(one_block_pipe)
    assert installed_hook(transformer) is None
    assert torch.equal(generate(one_block_pipe), plain)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_a_compiled_forward_is_computed(one_block_pipe, generate, backend, strict):
    pipe = one_block_pipe
    plain = generate(pipe)
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend=backend)
    assert torch.equal(generate(pipe), plain)
    runs = backend.runs
    handle = enable(pipe, strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match=r"the output head did not run.*pipe\.transformer\.compile"):
            generate(pipe)
    else:
        with pytest.warns(RuntimeWarning, match=r"the output head did not run.*pipe\.transformer\.compile"):
            assert torch.equal(generate(pipe), plain)
        stream = handle.stats.streams["cond"]
        assert (stream.computed, stream.predicted) == ([*range(STEPS)], [])
        assert backend.runs == 2 * runs
        assert {stream.reasons[step] for step in range(STEPS) if step not in SOME} == {"no history"}
    handle.disable()
    assert torch.equal(generate(pipe), plain)


# Features that others overwrite


def overwrite_input_of_norm(transformer):
    def overwrite(module, args, output):
        args[0].fill_(7.0)

    transformer.norm_out.register_forward_hook(overwrite)


def overwrite_input_before_norm(transformer):
    """Gives the head copies, and overwrites what came to its entry."""

    def hook(module, args):
        copies = tuple(arg.clone() for arg in args)
        args[0].fill_(7.0)
        args[1].fill_(7.0)
        return copies

    transformer.norm_out.register_forward_pre_hook(hook)


def overwrite_after_the_projection(transformer):
    """As a module does that reuses the memory of the features, once nobody in the model needs them."""
    held = []

    def hold(module, args):
        held.append(args[0])

    def overwrite(module, args, output):
        held.pop().zero_()

    transformer.norm_out.register_forward_pre_hook(hold)
    transformer.proj_out.register_forward_hook(overwrite)


@pytest.mark.parametrize(
    "overwrite", [overwrite_input_of_norm, overwrite_input_before_norm, overwrite_after_the_projection]
)
@pytest.mark.parametrize("mixer", ["newton", "dense"])  # dense: forecasts are in the history, too
@pytest.mark.parametrize("cache_first", [False, True], ids=["hook-cache", "cache-hook"])
def test_the_history_is_what_the_head_got(small_pipe, generate, overwrite, mixer, cache_first):
    pipe = small_pipe
    plain = generate(pipe)
    with lesa.enable_cache(pipe, make_predictor(mixer=mixer), SOME), own_head(pipe.transformer):
        cached = generate(pipe)
    if not cache_first:
        overwrite(pipe.transformer)
    with lesa.enable_cache(pipe, make_predictor(mixer=mixer), SOME, strict=True) as handle:
        if cache_first:
            overwrite(pipe.transformer)
        assert torch.equal(generate(pipe), cached)
        assert_forecast(handle)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.slow
def test_the_history_is_what_the_head_got_in_a_compiled_transformer(one_block_pipe, generate, backend):
    pipe = one_block_pipe
    with enable(pipe), own_head(pipe.transformer):
        cached = generate(pipe)
    overwrite_input_of_norm(pipe.transformer)
    compile_module_fullgraph(pipe, backend)
    with enable(pipe) as handle:
        assert torch.equal(generate(pipe), cached)
        assert_forecast(handle)


@pytest.mark.parametrize("cache_first", [False, True], ids=["hook-cache", "cache-hook"])
def test_a_hook_that_changes_the_heads_input_acts_once(small_pipe, generate, cache_first):
    """The history holds what comes to the head's entry, and the hook changes a forecast as it changes the features."""
    pipe, entered = small_pipe, []
    ramp = torch.linspace(0, 3, DIM)
    shift = lambda module, args: (args[0] + ramp, args[1])  # noqa: E731
    predictor = make_predictor()
    rings, make_ring = [], predictor.make_ring
    predictor.make_ring = lambda *args: rings.append(make_ring(*args)) or rings[-1]
    pipe.transformer.single_transformer_blocks[-1].register_forward_hook(
        lambda module, args, output: entered.append(output[1].clone())
    )
    if not cache_first:
        pipe.transformer.norm_out.register_forward_pre_hook(shift)
    with lesa.enable_cache(pipe, predictor, SOME, strict=True):
        if cache_first:
            pipe.transformer.norm_out.register_forward_pre_hook(shift)

        def look(pipe, step, timestep, tensors):
            if step == STEPS - 1:
                assert torch.equal(rings[0].newest_first()[0][0], entered[-1])
            return {}

        generate(pipe, callback_on_step_end=look)
    assert len(entered) == len(SOME)


# Offloading and casting


def tensors_of(group):
    """What a group of diffusers' group offloading moves."""
    owned = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
    return [*owned, *group.parameters, *group.buffers]


class Elsewhere:
    """A device that weights are on while they are offloaded."""

    def __init__(self, store, group):
        self.store, self.group = store, group

    def __eq__(self, device):
        return any(id(t) in self.store for t in tensors_of(self.group))

    __hash__ = None


@pytest.fixture
def nan_when_offloaded(monkeypatch):
    """Makes weights that are offloaded NaN until they are onloaded, so that none can be used by mistake."""
    store = {}

    def offload(tensors):
        for tensor in tensors:
            if tensor.is_floating_point() and id(tensor) not in store:
                store[id(tensor)] = tensor, tensor.data
                tensor.data = torch.full_like(tensor.data, math.nan)

    def onload(tensors):
        for tensor in tensors:
            if id(tensor) in store:
                _, tensor.data = store.pop(id(tensor))

    def pre_forward(self, module, *args, **kwargs):
        onload([*module.parameters(), *module.buffers()])
        return args, kwargs

    def init_hook(self, module):
        offload([*module.parameters(), *module.buffers()])
        return module

    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: offload(tensors_of(group)))
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: onload(tensors_of(group)))
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", init_hook)
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", pre_forward)
    return store


CPU = torch.device("cpu")


def model_offload(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe, folder):
    """As `enable_sequential_cpu_offload`, which only a GPU has: weights are on the meta device between calls."""
    for model in (pipe.vae, pipe.transformer):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(io_same_device=True), True)
        accelerate.hooks.attach_align_device_hook(model, CPU, offload=True, weights_map=weights)


def one_block_per_group(pipe, folder):
    pipe.transformer.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)


def two_blocks_per_group(pipe, folder):
    pipe.transformer.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=2)


def leaves(pipe, folder):
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")


OFFLOAD = [model_offload, sequential_offload, one_block_per_group, slow(two_blocks_per_group), leaves]


def check_both_orders(pipe, generate, change, cached, plain, cache_first):
    """`change` alters how the weights are kept, and nothing else."""
    seen = count_blocks(pipe.transformer)
    if not cache_first:
        change()
    handle = enable(pipe)
    if cache_first:
        change()
    for _ in range(3):
        seen.clear()
        assert torch.equal(generate(pipe), cached)
        assert_forecast(handle)
        assert len(seen) == len(SOME)
    handle.disable()
    seen.clear()
    assert torch.equal(generate(pipe), plain)
    assert len(seen) == STEPS
    with enable(pipe, range(STEPS)):
        assert torch.equal(generate(pipe), plain)


@both_orders(OFFLOAD, ["offload-cache", "cache-offload"])
def test_offloading(small_pipe, generate, nan_when_offloaded, tmp_path, way, cache_first):
    plain = generate(small_pipe)
    with enable(small_pipe), own_head(small_pipe.transformer, way in (sequential_offload, leaves)):
        cached = generate(small_pipe)
    check_both_orders(small_pipe, generate, lambda: way(small_pipe, tmp_path), cached, plain, cache_first)
    if way is sequential_offload:
        assert small_pipe.transformer.proj_out.weight.is_meta
    else:
        assert small_pipe.transformer.proj_out.weight.isnan().all()  # they were offloaded in the end


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("cache_first", [False, True], ids=["offload-cache", "cache-offload"])
def test_offloading_to_disk(small_pipe, generate, tmp_path, kind, cache_first):
    plain = generate(small_pipe)
    with enable(small_pipe), own_head(small_pipe.transformer, kind == "leaf_level"):
        cached = generate(small_pipe)

    def offload():
        options = {"num_blocks_per_group": 2, "offload_to_disk_path": str(tmp_path)}
        small_pipe.transformer.enable_group_offload(CPU, offload_type=kind, **options)

    check_both_orders(small_pipe, generate, offload, cached, plain, cache_first)
    assert [*tmp_path.iterdir()]


@pytest.mark.parametrize("offload", [model_offload, one_block_per_group], ids=lambda f: f.__name__)
def test_the_hooks_of_a_pipeline_go_without_the_cache(small_pipe, generate, nan_when_offloaded, offload, tmp_path):
    plain = generate(small_pipe)
    handle = enable(small_pipe)
    cached = generate(small_pipe)
    offload(small_pipe, tmp_path)
    small_pipe.remove_all_hooks()  # of accelerate; those of diffusers stay
    for tensor, data in nan_when_offloaded.values() if offload is model_offload else ():
        tensor.data = data
    nan_when_offloaded.clear() if offload is model_offload else None
    assert torch.equal(generate(small_pipe), cached)
    assert_forecast(handle)
    handle.disable()
    assert torch.equal(generate(small_pipe), plain)


@pytest.mark.parametrize("cache_first", [False, True], ids=["offload-cache", "cache-offload"])
def test_prefetching_in_the_order_of_the_first_call(small_pipe, generate, nan_when_offloaded, cache_first):
    """As with streams on a GPU: each group brings the next one of the order in which they ran at first."""
    plain = generate(small_pipe)
    transformer = small_pipe.transformer
    with enable(small_pipe), own_head(transformer):
        cached = generate(small_pipe)

    def offload():
        leaves(small_pipe, None)
        config = group_offloading.GroupOffloadingConfig(CPU, CPU, "leaf_level", False, False, False)
        group = ModuleGroup([], CPU, CPU, offload_leader=transformer, onload_leader=transformer)
        group_offloading._apply_lazy_group_offloading_hook(transformer, group, config=config)
        for module in transformer.modules():
            hook = getattr(module, "_diffusers_hook", None) and module._diffusers_hook.get_hook("group_offloading")
            if hook is not None:
                hook.group.offload_device = Elsewhere(nan_when_offloaded, hook.group)

    check_both_orders(small_pipe, generate, offload, cached, plain, cache_first)
    chained = transformer.norm_out.linear._diffusers_hook.get_hook("group_offloading").next_group
    assert chained.modules == [transformer.proj_out] and not chained.onload_self


def on_kernels(predictor):
    """The predictor on Triton: in its interpreter, where there is no GPU."""
    predictor.backend = "triton"
    return predictor


LATE = [*range(STEPS - 1)]
NOT_PLAIN = "the output head ran in the model's own modules: "


@pytest.mark.slow
@pytest.mark.parametrize(
    "offload, why",
    [
        (one_block_per_group, None),
        (model_offload, None),
        (leaves, "norm_out.linear has a hook or another forward"),
        (sequential_offload, "norm_out.linear has a hook or another forward"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_the_head_that_ran_while_offloading(small_pipe, generate, nan_when_offloaded, offload, why):
    with enable(small_pipe, LATE):
        cached = generate(small_pipe, labels=(3,))
    offload(small_pipe, None)
    with lesa.enable_cache(small_pipe, on_kernels(make_predictor()), LATE, strict=True) as handle:
        torch.testing.assert_close(generate(small_pipe, labels=(3,)), cached, rtol=1e-4, atol=1e-5)
    assert handle.stats.streams["cond"].fused == ([STEPS - 1] if why is None else [])
    assert handle.stats.notes == ([] if why is None else [NOT_PLAIN + why])


@pytest.mark.parametrize(
    "cache_first", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["casting-cache", "cache-casting"]
)
def test_layerwise_casting(small_pipe, generate, cache_first):
    def cast(transformer):
        options = {"skip_modules_pattern": ("x_embedder",)}  # instead of one with `proj_out`
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, **options)

    rounded = make_small_pipe()
    cast(rounded.transformer)
    weights = rounded.transformer.state_dict()
    assert weights["proj_out.weight"].dtype == torch.float8_e4m3fn
    oracle = make_small_pipe()
    oracle.transformer.load_state_dict(weights)  # in float32 again, without hooks
    plain = generate(oracle)
    with enable(oracle), own_head(oracle.transformer):
        cached = generate(oracle)
    check_both_orders(small_pipe, generate, lambda: cast(small_pipe.transformer), cached, plain, cache_first)
    assert small_pipe.transformer.proj_out.weight.dtype == torch.float8_e4m3fn
    with lesa.enable_cache(small_pipe, on_kernels(make_predictor()), LATE) as handle:
        generate(small_pipe, labels=(3,))
    assert handle.stats.notes == [NOT_PLAIN + "proj_out has a hook or another forward"]


# LoRA

HEAD = ["proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1"]
BODY = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"]


def lora(pipe, seed, targets=(*HEAD, *BODY), factor=1.0):
    """Weights of a LoRA as `load_lora_weights` takes them."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name in targets:
        weight = pipe.transformer.get_submodule(name).weight
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.1
        state[f"transformer.{name}.lora_B.weight"] = factor * torch.randn(weight.shape[0], 4, generator=generator) * 0.1
    return state


def two_adapters(pipe):
    pipe.load_lora_weights(lora(pipe, 1), adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, 0.8])


CHANGES = [
    ("load", lambda pipe: pipe.load_lora_weights(lora(pipe, 0), adapter_name="first"), {}),
    ("scale of a call", lambda pipe: None, {"joint_attention_kwargs": {"scale": 0.5}}),
    ("set", lambda pipe: pipe.set_adapters("first", 0.3), {}),
    ("hot-swap", lambda pipe: pipe.load_lora_weights(lora(pipe, 2), adapter_name="first", hotswap=True), {}),
    ("two adapters", two_adapters, {}),
    ("disable", lambda pipe: pipe.disable_lora(), {}),
    ("enable", lambda pipe: pipe.enable_lora(), {}),
    ("delete", lambda pipe: pipe.delete_adapters(["first", "second"]), {}),
    ("load again", lambda pipe: pipe.load_lora_weights(lora(pipe, 3), adapter_name="third"), {}),
    ("unload", lambda pipe: pipe.unload_lora_weights(), {}),
    ("load a last one", lambda pipe: pipe.load_lora_weights(lora(pipe, 4), adapter_name="first"), {}),
    ("fuse", lambda pipe: pipe.fuse_lora(), {}),
    ("unfuse", lambda pipe: pipe.unfuse_lora(), {}),
    ("unload after that", lambda pipe: pipe.unload_lora_weights(), {}),
]


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="LoRA needs peft")


@pytest.mark.slow
def test_lora_between_calls_is_as_in_a_fresh_pipeline(generate, peft):
    pipe = make_small_pipe()
    handle, steady, exact = enable(pipe), [], []
    without = generate(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, change, options in CHANGES:
            change(pipe)
            steady.append(generate(pipe, **options))
            assert_forecast(handle)
            off = name in ("disable", "delete", "unload", "unload after that")
            assert any(note.startswith("the adapters") for note in handle.stats.notes) != off, name
    assert [m.split(" are on")[0] for m in ours(caught)] == [
        "lesa: the adapters first",
        "lesa: the adapters first, second",
        "lesa: the adapters third",
    ]
    handle.disable()
    by_name = {name: images for (name, _, _), images in zip(CHANGES, steady)}
    assert torch.equal(by_name.pop("unload"), without)
    for name in ("disable", "delete"):  # peft's layers are still there, and each step computes its own conditioning
        torch.testing.assert_close(by_name.pop(name), without, rtol=1e-5, atol=1e-5)
    fresh = make_small_pipe()
    for (name, change, options), expected in zip(CHANGES, steady):
        change(fresh)
        with enable(fresh):
            exact.append(generate(fresh, **options))
        assert torch.equal(exact[-1], expected), name
        plain = generate(fresh, **options)
        with enable(fresh, range(STEPS)):
            assert torch.equal(generate(fresh, **options), plain), name
    del by_name["enable"]  # of the same two adapters
    distinct = [*by_name.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


@pytest.mark.parametrize("target", HEAD)
@pytest.mark.parametrize("cache_first", [False, True], ids=["load-cache", "cache-load"])
def test_the_scale_of_lora_acts_on_the_predicted_steps(small_pipe, generate, peft, target, cache_first):
    """Half of the scale is half of the weights, to the bit, and only of the last step, which is predicted."""
    half = {"joint_attention_kwargs": {"scale": 0.5}}
    small_pipe.load_lora_weights(lora(small_pipe, 0, [target], factor=0.5))
    with enable(small_pipe):
        expected = generate(small_pipe)
    small_pipe.unload_lora_weights()
    if not cache_first:
        small_pipe.load_lora_weights(lora(small_pipe, 0, [target]))
    with enable(small_pipe) as handle:
        if cache_first:
            small_pipe.load_lora_weights(lora(small_pipe, 0, [target]))
        assert torch.equal(generate(small_pipe, **half), expected)
        assert not torch.equal(generate(small_pipe), expected)
        assert_forecast(handle)


@pytest.mark.parametrize("change, moves", [(2, True), (5, True), (9, False)])
def test_the_weight_of_a_lora_that_changes_in_a_run_acts_from_the_next_computed_step(
    small_pipe, generate, peft, change, moves
):
    """Of a LoRA in the blocks only. The callback comes after the step, and step 9 is the last one computed."""
    small_pipe.load_lora_weights(lora(small_pipe, 0, BODY), adapter_name="first")

    def other_weight(pipe, step, timestep, tensors):
        if step == change:
            pipe.set_adapters(["first"], [0.3])
        return {}

    handle = enable(small_pipe)
    plain = generate(small_pipe)
    changed = generate(small_pipe, callback_on_step_end=other_weight)
    assert torch.equal(changed, plain) != moves
    assert all(stream.computed == SOME for stream in handle.stats.streams.values())


def test_lora_that_was_fused_and_unloaded_is_noted(small_pipe, generate, peft):
    """Which leaves changed weights, and nothing on the transformer that tells of it."""
    small_pipe.load_lora_weights(lora(small_pipe, 0), adapter_name="first")
    small_pipe.fuse_lora()
    small_pipe.unload_lora_weights()
    with pytest.warns(RuntimeWarning, match="the adapters first are on"), enable(small_pipe) as handle:
        generate(small_pipe)
    assert len(handle.stats.notes) == 1 and handle.stats.notes[0].startswith("the adapters first are on")
    assert handle.stats.notes[0] in handle.stats.summary()


@pytest.mark.slow
def test_lora_and_compilation(small_pipe, generate, backend, peft):
    small_pipe.load_lora_weights(lora(small_pipe, 0))
    plain = generate(small_pipe)
    with enable(small_pipe):
        cached = generate(small_pipe)
    compile_module(small_pipe, backend)
    with enable(small_pipe) as handle:
        assert torch.equal(generate(small_pipe), cached)
        with no_recompiles:
            assert torch.equal(generate(small_pipe), cached)
        assert_forecast(handle)
    assert torch.equal(generate(small_pipe), plain)


# Quantised transformers


def torchao_int8(transformer, folder):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    quantization.quantize_(transformer, quantization.Int8WeightOnlyConfig())
    return transformer


def torchao_float8(transformer, folder):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    quantization.quantize_(transformer, quantization.Float8WeightOnlyConfig())
    return transformer


def torchao_loaded(transformer, folder):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    transformer.save_pretrained(folder)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return FluxTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)


def gguf_loaded(transformer, folder):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    transformer.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "transformer.gguf", "flux")
    kind = gguf.GGMLQuantizationType.Q8_0  # in blocks of 32
    for name, tensor in transformer.state_dict().items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = {"quantization_config": GGUFQuantizationConfig(compute_dtype=torch.float32), "torch_dtype": torch.float32}
    return FluxTransformer2DModel.from_single_file(str(folder / "transformer.gguf"), config=str(folder), **options)


def bitsandbytes_linears(transformer, name, **options):
    """What diffusers does with a `BitsAndBytesConfig`, for which it wants a GPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    for parent in [*transformer.modules()]:
        for child, linear in [*parent.named_children()]:
            if type(linear) is torch.nn.Linear:
                quantised = getattr(bitsandbytes.nn, name)(linear.in_features, linear.out_features, **options)
                quantised.load_state_dict(linear.state_dict())
                setattr(parent, child, quantised.to("cpu"))
    return transformer


def bitsandbytes_int8(transformer, folder):
    return bitsandbytes_linears(transformer, "Linear8bitLt", has_fp16_weights=False)


def bitsandbytes_4bit(transformer, folder):
    return bitsandbytes_linears(transformer, "Linear4bit", compute_dtype=torch.float32, quant_type="nf4")


def bytes_of(transformer):
    """The bytes of all that a transformer keeps."""
    tensors = []
    for tensor in transformer.state_dict(keep_vars=True).values():
        if not isinstance(tensor, torch.Tensor):
            continue
        inner = [getattr(tensor, n) for n in tensor.__tensor_flatten__()[0]] if hasattr(tensor, "qdata") else [tensor]
        tensors += [t.detach().as_subclass(torch.Tensor).contiguous().view(-1).view(torch.uint8).clone() for t in inner]
    return tensors


@pytest.mark.parametrize(
    "quantise, why, tolerance",
    [
        (torchao_int8, "norm_out.linear has no plain weights", 0.02),
        (torchao_float8, "norm_out.linear has no plain weights", 0.1),
        (torchao_loaded, "norm_out.linear has no plain weights", 0.02),
        (gguf_loaded, "norm_out.linear is a GGUFLinear", 0.02),
        (bitsandbytes_int8, "norm_out.linear is a Linear8bitLt", 0.05),
        (bitsandbytes_4bit, "norm_out.linear is a Linear4bit", 0.3),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
@pytest.mark.parametrize(
    "cache_first", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quantise-cache", "cache-quantise"]
)
def test_a_quantised_transformer(small_pipe, generate, tmp_path, quantise, why, tolerance, cache_first):
    pipe = small_pipe
    if cache_first and quantise in (torchao_loaded, gguf_loaded):
        pytest.skip("makes another transformer")
    with enable(pipe) as handle:
        exact = generate(pipe)
    if cache_first:
        handle = enable(pipe)
        quantise(pipe.transformer, tmp_path)
    else:
        pipe.transformer = quantise(pipe.transformer, tmp_path)
        handle = enable(pipe)
    seen, before = count_blocks(pipe.transformer), bytes_of(pipe.transformer)
    cached = generate(pipe)
    assert_forecast(handle)
    assert len(seen) == len(SOME)
    assert torch.equal(generate(pipe), cached)
    assert not torch.equal(cached, exact)
    assert (cached - exact).abs().mean() < tolerance * exact.abs().mean()
    handle.disable()
    plain = generate(pipe)
    with enable(pipe, range(STEPS)):
        assert torch.equal(generate(pipe), plain)
    with enable(pipe, LATE):
        late = generate(pipe, labels=(3,))
    with lesa.enable_cache(pipe, on_kernels(make_predictor()), LATE, strict=True) as handle:
        torch.testing.assert_close(generate(pipe, labels=(3,)), late, rtol=1e-3, atol=1e-4)
    assert handle.stats.notes == [NOT_PLAIN + why]
    assert handle.stats.streams["cond"].fused == []
    assert torch.equal(generate(pipe), plain)
    after = bytes_of(pipe.transformer)
    assert len(after) == len(before) > 20
    assert all(torch.equal(a, b) for a, b in zip(after, before))


# Autocast and gradients


@pytest.mark.parametrize("cache_first", [False, True], ids=["autocast-cache", "cache-autocast"])
def test_autocast(small_pipe, generate, cache_first):
    """The model's head runs under it, in predicted steps too, and the forecast does not."""
    pipe, predictor, rings, entered = small_pipe, make_predictor(), [], {}
    make_ring, plain_exact = predictor.make_ring, generate(small_pipe)
    predictor.make_ring = lambda *args: rings.append(make_ring(*args)) or rings[-1]

    def look(pipe, step, timestep, tensors):
        if step not in SOME:
            with torch.autocast("cpu", enabled=False):
                expected = predictor(rings[-1], 1 - step / STEPS)
            assert torch.equal(entered.pop("features"), expected)
            assert entered.pop("velocity").dtype == torch.bfloat16  # what `proj_out` gives under autocast
        return {}

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    norm, projection = pipe.transformer.norm_out, pipe.transformer.proj_out
    norm.register_forward_pre_hook(lambda module, args: entered.update(features=args[0].clone()))
    projection.register_forward_hook(lambda module, args, output: entered.update(velocity=output))
    with autocast():
        plain = generate(pipe)
    assert not torch.equal(plain, plain_exact)
    if cache_first:
        with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle, autocast():
            cached = generate(pipe, callback_on_step_end=look)
            assert_forecast(handle)
    else:
        with autocast(), lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
            cached = generate(pipe, callback_on_step_end=look)
            assert_forecast(handle)
    assert cached.isfinite().all() and not torch.equal(cached, plain)
    with enable(pipe, range(STEPS)), autocast():
        assert torch.equal(generate(pipe), plain)
    with autocast():
        assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain_exact)


@pytest.mark.slow
def test_the_head_that_ran_under_autocast(small_pipe, generate):
    with lesa.enable_cache(small_pipe, on_kernels(make_predictor()), LATE) as handle:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            generate(small_pipe, labels=(3,))
        assert handle.stats.notes == [NOT_PLAIN + "autocast is on"]
        generate(small_pipe, labels=(3,))  # and outside of it, the same handle
        assert handle.stats.notes == [] and handle.stats.streams["cond"].fused == [STEPS - 1]


def train(pipe, steps=4):
    """Gradients of the transformer's weights in each of the first steps of a loop, by name, and the outputs."""
    inputs = digits.inputs_for((3, 8))
    latents = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    grid = torch.meshgrid(torch.zeros(1), torch.arange(8.0), torch.arange(8.0), indexing="ij")
    call = {
        "encoder_hidden_states": torch.cat([i["prompt_embeds"] for i in inputs]),
        "pooled_projections": torch.cat([i["pooled_prompt_embeds"] for i in inputs]),
        "img_ids": torch.stack(grid, -1).reshape(-1, 3),
        "txt_ids": torch.zeros(1, 3),
        "return_dict": False,
    }
    pipe.scheduler.set_timesteps(STEPS)
    gradients, outputs = [], []
    with torch.enable_grad():
        for t in pipe.scheduler.timesteps[:steps]:
            output = pipe.transformer(hidden_states=latents, timestep=t.expand(2) / 1000, **call)[0]
            output.square().mean().backward()
            named = pipe.transformer.named_parameters()
            gradients.append({name: p.grad for name, p in named if p.grad is not None})
            pipe.transformer.zero_grad(set_to_none=True)
            outputs.append(output.detach())
            latents = pipe.scheduler.step(outputs[-1], t, latents, return_dict=False)[0].detach()
    return gradients, outputs


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("cache_first", [False, True], ids=["checkpointing-cache", "cache-checkpointing"])
def test_gradients(small_pipe, checkpointing, cache_first):
    pipe = small_pipe
    plain, outputs = train(pipe)
    seen = count_blocks(pipe.transformer)
    if checkpointing and not cache_first:
        pipe.transformer.enable_gradient_checkpointing()
    handle = enable(pipe, [0, 1])
    if checkpointing and cache_first:
        pipe.transformer.enable_gradient_checkpointing()
    cached, cached_outputs = train(pipe)
    (stream,) = handle.stats.streams.values()
    assert (stream.computed, stream.predicted) == ([0, 1], [2, 3])
    assert len(seen) == 2 * (1 + checkpointing)  # checkpointing runs it once more for the gradient
    for step in (0, 1):
        assert torch.equal(cached_outputs[step], outputs[step])
        assert_same_gradients(cached[step], plain[step])
    for step in (2, 3):
        assert not torch.equal(cached_outputs[step], outputs[step])
        assert {name.split(".")[0] for name in cached[step]} == {"time_text_embed", "norm_out", "proj_out"}
        assert all(g.isfinite().all() and g.any() for g in cached[step].values())
    handle.disable()
    again, again_outputs = train(pipe)
    for step in range(4):
        assert torch.equal(again_outputs[step], outputs[step])
        assert_same_gradients(again[step], plain[step])


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True], ids=["extension", "triton"])
def test_gradients_go_through_a_predicted_step_to_the_predictor(small_pipe, kernels):
    predictor = on_kernels(make_predictor()) if kernels else make_predictor()
    with lesa.enable_cache(small_pipe, predictor, [0, 1], strict=True) as handle:
        train(small_pipe)
    assert all(not stream.fused for stream in handle.stats.streams.values())  # a fused step has no gradients
    assert predictor.up.grad is not None and predictor.up.grad.isfinite().all() and predictor.up.grad.any()


# What a callback does, and chance


def other_latents(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] + 0.5} if step == 4 else {}


def other_prompt(pipe, step, timestep, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"].flip(0) * 2} if step == 1 else {}


def other_prompt_in_place(pipe, step, timestep, tensors):
    if step == 1:
        tensors["prompt_embeds"].mul_(2)
    return {}


def interrupt(pipe, step, timestep, tensors):
    pipe._interrupt = step == 6
    return {}


def fail(pipe, step, timestep, tensors):
    if step == 3:
        raise KeyError("stop")
    return {}


def fail_at_once(pipe, step, timestep, tensors):
    raise KeyError("stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    "callback", [other_latents, other_prompt, other_prompt_in_place, interrupt, fail, fail_at_once]
)
def test_after_a_callback_another_run_is_as_in_a_fresh_pipeline(small_pipe, generate, callback):
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    other = {"labels": (5,), "seed": 9, "height": 24, "steps": STEPS + 3}

    def disturbed(pipe):
        try:
            return generate(pipe, **options)
        except KeyError:
            return torch.zeros(1)

    plain = [disturbed(small_pipe), generate(small_pipe, **other)]
    fresh = make_small_pipe()
    with enable(fresh) as handle:
        expected = generate(fresh, **other)
        assert_forecast(handle, steps=STEPS + 3)
    fresh = make_small_pipe()
    with enable(fresh) as handle:
        cached = disturbed(fresh)
        assert torch.equal(cached, plain[0]) == (callback in (fail, fail_at_once))
        stream = handle.stats.streams["cond"]
        ended = {interrupt: 7, fail: 4, fail_at_once: 1}.get(callback, STEPS)
        assert sorted(stream.computed + stream.predicted) == [*range(ended)]
        assert stream.computed == [step for step in SOME if step < ended]
        seen = count_blocks(fresh.transformer)
        assert torch.equal(generate(fresh, **other), expected)
        assert_forecast(handle, steps=STEPS + 3)
        assert len(seen) == len(SOME)
        assert torch.equal(disturbed(fresh), cached)
    with enable(fresh, range(STEPS)):
        assert torch.equal(disturbed(fresh), plain[0])
    assert torch.equal(disturbed(fresh), plain[0])
    assert torch.equal(generate(fresh, **other), plain[1])


@pytest.mark.slow
def test_generators(small_pipe, generate):
    def one():
        return {"generator": torch.Generator().manual_seed(5)}

    def several():
        return {"generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)]}

    plain = [generate(small_pipe, **one()), generate(small_pipe, **several())]
    with enable(small_pipe) as handle:
        state = torch.get_rng_state()
        cached = [generate(small_pipe, **one()), generate(small_pipe, **several())]
        for options, images in zip((one, several), cached):
            assert torch.equal(generate(small_pipe, **options()), images)
            assert_forecast(handle)
        generator = torch.Generator().manual_seed(5)
        first, second = generate(small_pipe, generator=generator), generate(small_pipe, generator=generator)
        assert torch.equal(first, cached[0]) and not torch.equal(second, first)
        assert torch.equal(torch.get_rng_state(), state)  # the cache draws no numbers of its own
    assert not torch.equal(*cached)
    assert torch.equal(generate(small_pipe, **one()), plain[0])
    assert torch.equal(generate(small_pipe, **several()), plain[1])
