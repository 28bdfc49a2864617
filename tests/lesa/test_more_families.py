"""Every pipeline class of the families in `more_pipelines`, small and random: the same checks for each of them."""

from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch

import lesa
import more_pipelines as small
from lesa.models import ADAPTERS, adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig
from small_pipelines import FAMILIES as FIRST_FAMILIES

STEPS = 12
FEW = 3
"""Steps where all are computed, or none need be told apart."""
SOME = [0, 1, 2, 5, 9]
REST = [step for step in range(STEPS) if step not in SOME]
NEAR = 0.02
"""Relative error that forecasts along a line stay below."""

slow_case = pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow]) for name in small.ALL])
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in small.QUICK.values() else [pytest.mark.slow]) for name in small.ALL]
)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def pipes():
    """`pipes(name)` -> the small pipeline of that name, one for the whole file."""
    made = {}

    def pipe_of(name):
        if name not in made:
            made[name] = small.ALL[name].build()
        return made[name]

    return pipe_of


@pytest.fixture
def pipe(pipes, request):
    pipe = pipes(request.getfixturevalue("name"))
    yield pipe
    lesa.disable_cache(pipe)
    assert "forward" not in vars(pipe.transformer)


@pytest.fixture(scope="module")
def plain(pipes):
    """`plain(name)` -> latents of the pipeline without lesa in a few steps, and the `calls_of` its transformer."""
    made = {}

    def run_of(name):
        if name not in made:
            with calls_of(adapter_for(pipes(name))) as calls:
                made[name] = small.ALL[name].latents(pipes(name), steps=FEW), calls
        return made[name]

    return run_of


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def distance(latents, wanted):
    return float((latents - wanted).norm() / wanted.norm())


@contextmanager
def counted_blocks(adapter):
    """Gives a list of how often each block ran."""
    counts = [0] * len(adapter.blocks)
    handles = []

    def watch(number, block):
        def count(*_):
            counts[number] += 1

        handles.append(block.register_forward_pre_hook(count))

    for number, block in enumerate(adapter.blocks):
        watch(number, block)
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def test_no_family_is_left_out():
    assert {*small.FAMILIES, *FIRST_FAMILIES} == {adapter.family for adapter in ADAPTERS}
    for family in small.FAMILIES.keys() - FIRST_FAMILIES.keys():
        cases = small.FAMILIES[family]
        assert small.QUICK[family] in cases
        assert (family in small.NOT_RECORDED) != (small.RECORDED.get(family) in cases), family


@every_case
def test_all_steps_computed_and_disabled_are_bit_exact(pipe, plain, name):
    case, (wanted, _) = small.ALL[name], plain(name)
    adapter = adapter_for(pipe)
    with counted_blocks(adapter) as counts, lesa.enable_cache(pipe, line(), range(FEW)) as handle:
        assert torch.equal(case.latents(pipe, steps=FEW), wanted)
    assert [*handle.stats.streams] == [*case.streams]
    assert all(s.computed == [*range(FEW)] and not s.predicted for s in handle.stats.streams.values())
    assert counts == [FEW * len(case.streams) * case.runs] * len(counts)
    assert handle.stats.unlocated == 0
    assert torch.equal(case.latents(pipe, steps=FEW), wanted)


@every_case
def test_forecasts_skip_the_blocks_and_stay_near(pipe, name):
    case = small.ALL[name]
    wanted = case.latents(pipe, steps=STEPS)
    adapter = adapter_for(pipe)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        with counted_blocks(adapter) as counts:
            fused = case.latents(pipe, steps=STEPS)
        streams = handle.stats.streams
        assert [*streams] == [*case.streams]
        for stream in streams.values():
            assert (stream.computed, stream.predicted) == (SOME, REST)
            assert stream.fused == ([] if name in small.NOT_FUSED else REST), handle.stats.notes
        assert counts == [len(SOME) * len(streams) * case.runs] * len(counts)
        assert handle.stats.unlocated == 0
        with adapter.head_entry.register_forward_hook(lambda *_: None):
            own = case.latents(pipe, steps=STEPS)
        assert not any(stream.fused for stream in handle.stats.streams.values())
    with lesa.enable_cache(pipe, line(), [0]):
        held = case.latents(pipe, steps=STEPS)
    assert own.shape == wanted.shape and own.isfinite().all()
    assert 0 < distance(own, wanted) < NEAR
    assert distance(own, wanted) < distance(held, wanted) / 4
    # The fused head adds up in another order. Each step adds some of float32's rounding, and models amplify it.
    assert distance(fused, own) < 100 * torch.finfo(torch.float32).eps


@contextmanager
def calls_of(adapter):
    """Gives a list of `(arguments, entered, output)` of each call of the transformer.

    For each output head, what entered it is the features, and the conditioning or None.
    """
    calls, entered = [], []

    def watch(branch):
        def enter(module, args, kwargs):
            features, conditioning = branch.head_form.entered(args, kwargs)
            entered.append((features.clone(), conditioning))

        return branch.head_entry.register_forward_pre_hook(enter, with_kwargs=True)

    def leave(module, args, kwargs, output):
        calls.append((adapter.bind(args, kwargs), [*entered], output))
        entered.clear()

    hooks = [watch(branch) for branch in adapter.branches]
    hooks.append(adapter.transformer.register_forward_hook(leave, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def tensors_in(output):
    values = output.values() if isinstance(output, dict) else output
    values = [values] if isinstance(values, torch.Tensor) else values
    return [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]


@slow_case
@torch.no_grad()
def test_conditioning_and_head_are_those_of_the_forward(pipe, plain, name):
    adapter, (_, calls) = adapter_for(pipe), plain(name)
    for call, heads, output in calls:
        if call.get("kv_cache_mode") == "extract":  # it fills the cache, so it is always computed
            continue
        velocities = []
        for branch, (entered, conditioning) in zip(adapter.branches, heads, strict=True):
            features = branch.features(call, entered)
            made = branch.conditioning(call, features.dtype)
            near = 1e-6 if name in small.CONDITIONED_TO_ROUNDING else 0
            assert conditioning is None or made.dtype == conditioning.dtype
            assert conditioning is None or torch.allclose(made, conditioning, rtol=near, atol=near)
            assert branch.shape(call) == features.shape[:2] and branch.feature_dim == features.shape[2]
            velocities.append(branch.run_head(features, made, call))
        ours = adapter.output(call, *velocities)
        assert type(ours) is type(output)
        for one, other in zip(tensors_in(ours), tensors_in(output), strict=True):
            if adapter.family in small.GIVE_MORE:
                one, other = one[:, -features.shape[1] :], other[:, -features.shape[1] :]
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


def in_bfloat16(pipe):
    """The pipeline with transformers in bfloat16, but for the parts that their classes keep in float32."""
    for transformer in (part for name, part in pipe.components.items() if "transformer" in name and part is not None):
        kept = {*(transformer._keep_in_fp32_modules or ())}
        for name, value in (*transformer.named_parameters(), *transformer.named_buffers()):
            value.data = cast(value.data) if kept.isdisjoint(name.split(".")) else value.data
    return pipe


def cast(value):
    """Tensors with digits after the point, also in lists, in bfloat16."""
    if isinstance(value, list):
        return [cast(each) for each in value]
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.slow
@pytest.mark.parametrize("name", small.RECORDED.values())
@torch.no_grad()
def test_conditioning_and_head_are_those_of_the_forward_in_bfloat16(name):
    case = small.ALL[name]
    pipe = in_bfloat16(case.build())
    adapter = adapter_for(pipe)
    named = {adapter.sample_argument, adapter.text_argument, *adapter.conditioned_on}

    def enter(module, args, kwargs):  # what a pipeline whose parts are all in bfloat16 passes
        return args, {k: cast(value) if k in named or "hidden_states" in k else value for k, value in kwargs.items()}

    with pipe.transformer.register_forward_pre_hook(enter, with_kwargs=True), calls_of(adapter) as calls:
        case.latents(pipe, steps=2)
    assert calls
    for call, heads, output in calls:
        velocities = []
        for branch, (entered, conditioning) in zip(adapter.branches, heads, strict=True):
            features = branch.features(call, entered)
            made = branch.conditioning(call, features.dtype)
            assert features.dtype == torch.bfloat16
            assert conditioning is None or made.dtype == conditioning.dtype and torch.equal(made, conditioning)
            velocities.append(branch.run_head(features, made, call))
        ours = tensors_in(adapter.output(call, *velocities))
        for one, other in zip(ours, tensors_in(output), strict=True):
            other = other[:, -features.shape[1] :] if adapter.family in small.GIVE_MORE else other
            one = one[:, -features.shape[1] :] if adapter.family in small.GIVE_MORE else one
            assert torch.equal(one, other)


@slow_case
def test_decode_gives_what_the_pipeline_gives(pipe, plain, name):
    case, (latents, _) = small.ALL[name], plain(name)
    images = np.stack(case.run(pipe, steps=FEW, output_type="np"))
    decoded = adapter_for(pipe).decode(pipe, latents, case.size.get("height"), case.size.get("width"))
    assert decoded.dtype == np.float32
    assert decoded.min() >= 0 and decoded.max() <= 1 and decoded.std() > 0.01
    is_alike = decoded.shape == images.shape and np.allclose(decoded, images, atol=1e-6)
    assert is_alike == (name not in small.NOT_DECODED_ALIKE)


@pytest.mark.parametrize("name", ["ltx-2 cfg"])
def test_the_rings_of_a_stream_share_its_budget(pipe, name):
    """The features of the video and those of the sound."""

    def run(budget):
        predictor = FusedKANPredictor(PredictorConfig(mixer="linear"))
        with lesa.enable_cache(pipe, predictor, [0, 1, 3], budget, strict=True) as handle:
            latents = small.ALL[name].latents(pipe, steps=5)
        (stream,) = handle.stats.streams.values()
        return latents, stream.ring_device_bytes, stream.ring_host_bytes

    latents, whole, _ = run(None)
    assert run(whole)[1:] == (whole, 0)
    tight, on_device, on_host = run(whole * 3 // 4)
    assert torch.equal(tight, latents) and on_device <= whole * 3 // 4 and on_host > 0
    with pytest.raises(ValueError, match="`max_device_bytes` must be at least .* for 2 rings that share it"):
        run(whole // 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", small.RECORDED.values())
def test_recordings_can_be_trained_on_and_evaluated(pipe, name, tmp_path):
    case, family = small.ALL[name], adapter_for(pipe).family
    inputs = [case.inputs(1)] * 2
    wanted = case.latents(pipe)
    recorded = lesa.record(pipe, inputs, tmp_path, STEPS, progress=False)
    assert torch.equal(case.latents(pipe), wanted)
    assert recorded.manifest["family"] == family and set(recorded.samples) == {0, 1}
    config = PredictorConfig(adapter_for(pipe).feature_dim, rank=2, hidden=4, family=family)
    predictor = lesa.train(recorded, config, SOME, epochs=1, guided_epochs=1, tokens_per_batch=4, progress=False)
    with lesa.enable_cache(pipe, predictor) as handle:
        cached = case.latents(pipe)
    assert all(s.computed == SOME and s.predicted == REST for s in handle.stats.streams.values())
    assert 0 < distance(cached, wanted) < 2 * NEAR
    result = lesa.evaluate(pipe, inputs, [predictor], [], STEPS, batch_size=1, progress=False)
    reference, mine = result.runs
    assert (reference.computed_steps, mine.steps) == (STEPS, tuple(SOME))
    assert mine.whole_steps == mine.step_equivalents == mine.block_passes == len(SOME)
    assert 20 < mine.psnr < 100 and 0.5 < mine.ssim <= 1
