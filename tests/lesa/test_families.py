"""Every pipeline class of every family, small and random: nothing changes by itself, and steps are really skipped."""

import copy
import importlib
import inspect
import pkgutil
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import lesa
import small_pipelines as small
from lesa.models import ADAPTERS, Adapter, adapter_for
from lesa.models.adapter import packed_grid
from lesa.training.batches import Batch, Head
from lesa.training.schedule_search import guidance_weights
from lesa_kernels import FusedKANPredictor, PredictorConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
FEW = 4
"""Steps where all are computed."""
SOME = [0, 1, 2, 5, 9]
NEAR = 0.015
"""Relative error that first-order forecasts stay below. Holding the first feature makes one of 0.04 and more."""

WITHOUT_A_TRANSFORMER = {"FluxPriorReduxPipeline"}  # it makes prompt embeddings for others

every_case = pytest.mark.parametrize("name", small.ALL)


def one_or_two(turn):
    """Each pipeline with its larger batch, of two if it takes one, and every other pipeline with a batch of one.

    Of two tests that take turns, one runs with a batch of one for each pipeline, and `pytest` alone runs the other.
    """
    return pytest.mark.parametrize(
        "name, batch",
        [
            pytest.param(name, batch, marks=[pytest.mark.slow] if number % 2 != turn else [])
            for number, (name, case) in enumerate(small.ALL.items())
            for most in (min(case.most or 2, 2),)
            for batch in range(1, most + 1)
            if batch == most or number % 2 != turn
        ],
    )


@pytest.fixture(autouse=True, scope="module")
def _small_areas():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()  # they warn of embeddings without masks, and the like
    with small.small_areas():
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
    assert "forward" not in pipe.transformer.__dict__


def untrained():
    """Draws a line through the newest two computed features."""
    torch.manual_seed(0)
    return FusedKANPredictor(PredictorConfig(small.DIM, rank=4, hidden=8))


def trained_on_50(family):
    steps = (0, 2, 6, 12, 18, 25, 32, 39, 46)
    sigmas = tuple(1 - step / 50 for step in steps)
    config = PredictorConfig(
        small.DIM, rank=4, hidden=8, family=family, num_inference_steps=50, schedule=steps, schedule_sigmas=sigmas
    )
    torch.manual_seed(0)
    return FusedKANPredictor(config)


def distance(latents, wanted):
    return float((latents - wanted).norm() / wanted.norm())


def parts_of(transformer):
    """Its first and its last block, what embeds tokens and text, and the last norm."""
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    names = ("x_embedder", "img_in", "pos_embed", "context_embedder", "txt_in", "clean_x_embedder", "image_projection")
    embedders = {n: m for n in names if isinstance(m := getattr(transformer, n, None), torch.nn.Module)}
    return {"first block": blocks[0], "last block": blocks[-1], **embedders, "norm_out": transformer.norm_out}


def step_index(pipe):
    """The index of the scheduler's step that a call of the transformer belongs to."""
    index = pipe.scheduler.step_index
    return (pipe.scheduler.begin_index or 0) if index is None else index


@contextmanager
def watched(pipe):
    """Gives a dict that tells at which of the scheduler's steps each part ran, in order."""
    seen, handles = {}, []

    def watch(name, module):
        seen[name] = []

        handles.append(module.register_forward_pre_hook(lambda *_: seen[name].append(step_index(pipe))))

    for name, module in parts_of(pipe.transformer).items():
        watch(name, module)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


RECORDED = ("flux distilled cfg", "flux kontext cfg", "qwen cfg", "hunyuan cfg", "hunyuan framepack", "sd3 cfg")
"""Pipelines that are recorded and trained on, and run in bfloat16: at least one of each family."""


def test_no_family_is_left_out():
    families = {adapter.family for adapter in ADAPTERS}
    assert set(small.FAMILIES) <= families
    recorded = {family for family, (_, cases) in small.FAMILIES.items() if set(cases) & set(RECORDED)}
    assert recorded == set(small.FAMILIES)


@pytest.mark.parametrize("family", small.FAMILIES)
def test_every_pipeline_class_is_here(family):
    folder, cases = small.FAMILIES[family]
    package = importlib.import_module(f"diffusers.pipelines.{folder}")
    found = set()
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for name, kind in vars(importlib.import_module(info.name)).items():
            ours = inspect.isclass(kind) and issubclass(kind, DiffusionPipeline) and kind.__module__ == info.name
            if ours and "transformer" in inspect.signature(kind).parameters:
                found.add(name)
            elif ours:
                assert name in WITHOUT_A_TRANSFORMER
    assert found and {case.pipeline for case in cases.values()} == found


@pytest.mark.parametrize("family", small.FAMILIES)
def test_the_family_of_each_transformer(family, pipes):
    for name in small.FAMILIES[family][1]:
        assert adapter_for(pipes(name)).family == family


@one_or_two(0)
def test_all_steps_computed_and_disabled_are_bit_exact(pipe, name, batch):
    case = small.ALL[name]
    wanted = case.latents(pipe, steps=FEW, batch=batch)
    with lesa.enable_cache(pipe, untrained(), range(FEW)) as handle:
        assert torch.equal(case.latents(pipe, steps=FEW, batch=batch), wanted)
    assert [*handle.stats.streams] == [*case.streams]
    assert all(s.computed == [*range(FEW)] and not s.predicted for s in handle.stats.streams.values())
    assert handle.stats.unlocated == 0
    assert torch.equal(case.latents(pipe, steps=FEW, batch=batch), wanted)


@one_or_two(1)
def test_forecasts_skip_the_blocks_and_stay_near(pipe, name, batch):
    case = small.ALL[name]
    wanted = case.latents(pipe, steps=STEPS, batch=batch)
    with lesa.enable_cache(pipe, untrained(), SOME) as handle:
        with watched(pipe) as seen:
            cached = case.latents(pipe, steps=STEPS, batch=batch)
        assert not any(stream.fused for stream in handle.stats.streams.values())  # `watched` has hooks on the head
        fused = case.latents(pipe, steps=STEPS, batch=batch)
        assert all(stream.fused == stream.predicted for stream in handle.stats.streams.values())
        with watched(pipe):
            again = case.latents(pipe, steps=STEPS, batch=batch)
    begin = seen["norm_out"][0]
    steps = {part: [index - begin for index in indices] for part, indices in seen.items()}
    calls = len(case.streams)
    assert steps.pop("norm_out") == [step for step in range(STEPS) for _ in range(calls)] * case.runs
    assert len(steps) >= 4
    for part, ran in steps.items():
        assert ran == [step for step in SOME for _ in range(calls)] * case.runs, part
    assert [*handle.stats.streams] == [*case.streams]
    for stream in handle.stats.streams.values():
        assert stream.computed == SOME
        assert stream.predicted == [step for step in range(STEPS) if step not in SOME]
        assert stream.reasons == dict.fromkeys(SOME, "scheduled")
    assert handle.stats.runs == 3 * case.runs and handle.stats.unlocated == 0
    with lesa.enable_cache(pipe, untrained(), [0]):
        held = case.latents(pipe, steps=STEPS, batch=batch)
    assert cached.shape == wanted.shape and cached.isfinite().all()
    assert 0 < distance(cached, wanted) < NEAR
    assert distance(cached, wanted) < distance(held, wanted) / 8
    assert torch.equal(again, cached)
    # The fused head adds up in another order. Each step adds some of float32's rounding, and models amplify it.
    assert distance(fused, cached) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "steps, instead",
    [
        (4, "Take fewer steps instead"),
        (8, "The predictor is for another number of steps: train one for 8, or pass none"),
    ],
)
@pytest.mark.parametrize("name", ["flux", "qwen", "qwen cfg", "qwen edit plus", "hunyuan", "sd3 cfg"])
def test_models_of_few_steps_are_computed_whole_and_it_is_said_once(pipe, name, steps, instead):
    case = small.ALL[name]
    wanted = case.latents(pipe, steps=steps)
    with lesa.enable_cache(pipe, trained_on_50(adapter_for(pipe).family)) as handle:
        for _ in range(2):
            assert torch.equal(case.latents(pipe, steps=steps), wanted)
            (note,) = handle.stats.notes
            assert note == f"computed everything: {steps} steps are too few to predict any. {instead}"
    assert all(s.computed == [*range(steps)] for s in handle.stats.streams.values())


@contextmanager
def calls_of(transformer):
    """Gives a list of `(arguments, features, conditioning, output)` of each call, as they were."""
    calls, entered = [], []
    hooks = [
        transformer.norm_out.register_forward_pre_hook(lambda module, args: entered.append([a.clone() for a in args])),
        transformer.register_forward_hook(
            lambda module, args, call, output: calls.append((dict(call), *entered.pop(), output)), with_kwargs=True
        ),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def in_dtype(value, dtype):
    if isinstance(value, (list, tuple)):
        return type(value)(in_dtype(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@every_case
@torch.no_grad()
def test_conditioning_and_head_are_those_of_the_forward(pipe, name):
    case = small.ALL[name]
    batch = case.most or 2
    with calls_of(pipe.transformer) as calls:
        case.latents(pipe, steps=3, batch=batch)
    call = calls[-1][0]
    halves = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
    kept = ("timestep", "guidance")  # pipelines pass them in float32, or round them before
    half_call = {k: v if k in kept else in_dtype(v, torch.bfloat16) for k, v in call.items()}
    for transformer, inputs in ((pipe.transformer, call), (halves, half_call)):
        adapter = type(adapter_for(pipe))(transformer)
        for return_dict in (True, False):
            inputs = {**inputs, "return_dict": return_dict}
            with calls_of(transformer) as calls:
                output = transformer(**inputs)
            _, features, conditioning, _ = calls[0]
            bound = adapter.bind((), inputs)
            made = adapter.conditioning(bound, features.dtype)
            assert made.dtype == conditioning.dtype == transformer.dtype and torch.equal(made, conditioning)
            assert adapter.shape(bound) == features.shape[:2] and adapter.feature_dim == features.shape[2]
            ours = adapter.output(bound, adapter.run_head(features, conditioning, bound))
            assert type(ours) is type(output) is (Transformer2DModelOutput if return_dict else tuple)
            assert len(ours) == 1 and torch.equal(ours[0], output[0])


@every_case
@torch.no_grad()
def test_many_steps_are_conditioned_in_one_batch(pipe, name):
    case = small.ALL[name]
    adapter, batch = adapter_for(pipe), case.most or 2
    with calls_of(pipe.transformer) as calls:
        case.latents(pipe, steps=5, batch=batch)
    calls = calls[: 5 * len(case.streams) : len(case.streams)]  # one stream of one run
    inputs = {name: calls[0][0].get(name) for name in adapter.conditioned_on}
    assert all(value is None or len(value) == len(calls[0][1]) for value in inputs.values())
    repeated = {name: value if value is None else torch.cat([value] * 5) for name, value in inputs.items()}
    timesteps = torch.cat([call["timestep"] for call, *_ in calls])
    at_once = adapter.condition(timesteps, repeated, torch.float32)
    one_by_one = torch.cat([conditioning for _, _, conditioning, _ in calls])
    assert not torch.equal(*one_by_one[:: len(calls[0][1])][:2])
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen layered"])
def test_several_images_of_one_prompt_share_its_row(pipe, name):
    case = small.ALL[name]
    wanted = case.latents(pipe, num_images_per_prompt=2)
    with lesa.enable_cache(pipe, untrained(), SOME), calls_of(pipe.transformer) as calls:
        cached = case.latents(pipe, num_images_per_prompt=2)
    call, features, *_ = calls[0]
    assert len(features) == 2 and len(call["additional_t_cond"]) == 1
    assert 0 < distance(cached, wanted) < NEAR


@torch.no_grad()
def test_rows_of_given_images_and_of_kinds_together():
    torch.manual_seed(0)
    transformer = small.qwen_transformer(zero_cond_t=True, use_additional_t_cond=True).eval()
    adapter = adapter_for(SimpleNamespace(transformer=transformer))
    call = {
        "hidden_states": torch.randn(2, 48, 4 * small.LATENT_CHANNELS),
        "encoder_hidden_states": torch.randn(2, small.TEXT_TOKENS, small.TEXT_DIM),
        "timestep": torch.tensor([0.3, 0.3]),
        "img_shapes": [[(1, 4, 6)] * 2] * 2,
        "additional_t_cond": torch.tensor([1]),
    }
    with calls_of(transformer) as calls:
        transformer(**call)
    assert torch.equal(adapter.conditioning(adapter.bind((), call), torch.float32), calls[0][2])
    many = adapter.condition(call["timestep"].repeat(3), {"additional_t_cond": torch.tensor([1, 1, 1])}, torch.float32)
    torch.testing.assert_close(many, calls[0][2].repeat(3, 1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_images_of_a_prompt_are_of_its_kind():
    transformer = small.qwen_transformer(use_additional_t_cond=True).eval()
    adapter, timestep = adapter_for(SimpleNamespace(transformer=transformer)), torch.full((4,), 0.3)
    by_prompt, by_image = (
        adapter.condition(timestep, {"additional_t_cond": torch.tensor(kinds)}, torch.float32)
        for kinds in ([0, 1], [0, 0, 1, 1])
    )
    assert torch.equal(by_prompt, by_image) and not torch.equal(by_image[1], by_image[2])


@every_case
def test_the_counted_module_runs_where_the_first_block_runs(pipe, name):
    ran = []
    hook = adapter_for(pipe).counted_module.register_forward_hook(lambda *_: ran.append(step_index(pipe)))
    with hook, watched(pipe) as seen, lesa.enable_cache(pipe, untrained(), [0, 3]):
        small.ALL[name].latents(pipe, steps=5)
    assert ran == seen["first block"]
    assert len(ran) == 2 * len(small.ALL[name].streams) * small.ALL[name].runs


NOT_DECODED_ALIKE = {
    "hunyuan image concat": "it decodes a frame that its latents come without",
    "hunyuan image concat cfg": "it decodes a frame that its latents come without",
    "hunyuan framepack sections cfg": "it blends sections that were decoded one by one",
    "sd3 inpaint cfg": "it leaves out the shift of the latents, which the others do not",
}


@every_case
def test_decode_gives_what_the_pipeline_gives(pipe, name):
    case = small.ALL[name]
    batch = (case.most or 2) if case.returns_latents else 1  # of several layered images it returns wrong parts
    images = np.stack(case.run(pipe, steps=2, batch=batch, output_type="np"))
    latents = case.latents(pipe, steps=2, batch=batch)
    height, width = (case.size.get(side, given) for side, given in (("height", small.HEIGHT), ("width", small.WIDTH)))
    decoded = adapter_for(pipe).decode(pipe, latents, height, width)
    assert decoded.dtype == np.float32 and decoded.shape == images.shape
    assert decoded.shape[-3:-1] == (height, width) and decoded.min() >= 0 and decoded.max() <= 1
    assert decoded.std() > 0.01
    assert np.array_equal(decoded, images) == (name not in NOT_DECODED_ALIKE)


def test_decode_of_sections_takes_what_the_pipeline_returns(pipes):
    name = "hunyuan framepack sections cfg"
    latents = small.ALL[name].run(pipes(name), steps=2)
    assert isinstance(latents, list)
    decoded = adapter_for(pipes(name)).decode(pipes(name), latents)
    assert np.array_equal(decoded, adapter_for(pipes(name)).decode(pipes(name), latents[-1]))


def test_decode_finds_the_size_that_the_pipeline_took(pipes):
    pipe, case = pipes("flux kontext"), small.ALL["flux kontext"]
    asked = {"height": 4 * small.HEIGHT, "width": 4 * small.WIDTH}  # scaled to the area of the small size
    images = case.run(pipe, steps=2, output_type="np", **asked)
    assert images.shape[1:3] == (small.HEIGHT, small.WIDTH)
    assert np.array_equal(adapter_for(pipe).decode(pipe, case.latents(pipe, steps=2, **asked), **asked), images)


def test_packed_grid():
    assert packed_grid(24, 16, 24, 1024, 4) == (4, 6)
    assert packed_grid(4096, None, None, 1024, 16) == (64, 64)
    assert packed_grid(4050, 512, 1024, 1024, 16) == (45, 90)
    assert packed_grid(72, 16, 24, 640, 4, one_frame=False) == (4, 6)
    for arguments in ((4140, None, None, 1024, 16), (70, 16, 24, 640, 4, False)):
        with pytest.raises(ValueError, match="`height` and `width` must be the size of the images"):
            packed_grid(*arguments)


OTHERS = {
    "flux cfg": {"height": 24, "width": 16},
    "flux controlnet": {"height": 24, "width": 16, "control_image": [small.image(9, 24, 16)]},
    "flux control img2img": {"height": 24, "width": 16, "control_image": [small.image(9, 24, 16)]},
    "qwen controlnet cfg": {"height": 24, "width": 16, "control_image": small.image(9, 24, 16)},
    "qwen img2img cfg": {"height": 24, "width": 16},
    "hunyuan cfg": {"height": 48, "num_frames": 5},
    "hunyuan image replace": {"num_frames": 13},
    "sd3 cfg": {"height": 24, "width": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_runs_that_differ_do_not_touch_each_other(pipe, name):
    case = small.ALL[name]
    control = {k: v for k, v in OTHERS[name].items() if k == "control_image"}
    runs = [{}, OTHERS[name], {"batch": 2}, {}, {"seed": 3, **control}, {"steps": 10}, {}]

    def fresh(options):
        pipe = case.build()
        with lesa.enable_cache(pipe, untrained(), SOME):
            return case.latents(pipe, **options)

    with lesa.enable_cache(pipe, untrained(), SOME) as handle:
        made = [case.latents(pipe, **options) for options in runs]
    assert handle.stats.unlocated == 0
    for latents, options in zip(made, runs):
        assert torch.equal(latents, fresh(options)), options
    assert torch.equal(made[0], made[3]) and not torch.equal(made[0], made[4])


def test_a_control_image_changes_the_output_of_a_cached_run(pipes):
    for name, control in (("flux controlnet", [small.image(9)]), ("qwen controlnet", small.image(9))):
        case, pipe = small.ALL[name], pipes(name)
        with lesa.enable_cache(pipe, untrained(), SOME):
            ours, other = case.latents(pipe), case.latents(pipe, control_image=control)
        assert distance(other, ours) > 0.001


@pytest.mark.parametrize("change, moves", [(2, True), (5, True), (9, False)])
def test_a_control_image_that_changes_in_a_run_acts_from_the_next_computed_step(pipes, change, moves):
    """The callback comes after the step: what it changes after step 9, the last computed one, nobody looks at."""
    case, pipe = small.ALL["flux controlnet"], pipes("flux controlnet")

    def brighter(pipe, step, timestep, tensors):
        return {"control_image": tensors["control_image"] + 1.0} if step == change else {}

    options = {"callback_on_step_end_tensor_inputs": ["latents", "control_image"]}
    schedule = [0, 1, 2, 3, 6, 9]
    with lesa.enable_cache(pipe, untrained(), schedule) as handle:
        plain = case.latents(pipe, steps=STEPS, **options)
        changed = case.latents(pipe, steps=STEPS, callback_on_step_end=brighter, **options)
    assert [s.computed for s in handle.stats.streams.values()] == [schedule]
    assert torch.equal(changed, plain) != moves


@pytest.mark.parametrize("name", ["sd3"])
def test_heun_in_a_pipeline_that_takes_it(pipe, name):
    scheduler = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    try:
        plain, predictor = small.ALL[name].latents(pipe, steps=STEPS), untrained()
        with lesa.enable_cache(pipe, predictor, range(2 * STEPS - 1)) as handle:
            assert torch.equal(small.ALL[name].latents(pipe, steps=STEPS), plain)
        with lesa.enable_cache(pipe, predictor, sorted([*range(0, 2 * STEPS - 1, 2), 1])) as handle:
            cached = small.ALL[name].latents(pipe, steps=STEPS)
        (stream,) = handle.stats.streams.values()
        assert stream.predicted == [*range(3, 2 * STEPS - 1, 2)]
        assert 0 < distance(cached, plain) < NEAR
    finally:
        pipe.scheduler = scheduler


CONTROLNETS = [name for name, case in small.ALL.items() if "ControlNet" in case.pipeline]


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_runs_in_computed_steps_only(pipe, name):
    case, calls = small.ALL[name], []
    wanted = case.latents(pipe, steps=STEPS)
    counter = pipe.controlnet.register_forward_hook(lambda *_: calls.append(1))
    with lesa.enable_cache(pipe, untrained(), SOME) as handle:
        cached = case.latents(pipe, steps=STEPS, batch=1)
        assert len(calls) == len(SOME) == handle.stats.computed_steps
    calls.clear()
    assert torch.equal(case.latents(pipe, steps=STEPS, batch=1), wanted)
    assert len(calls) == STEPS and "_compiled_call_impl" not in vars(pipe.controlnet)
    assert 0 < distance(cached, wanted) < NEAR
    counter.remove()


@pytest.fixture
def controlled():
    """Two pipelines with one ControlNet, which has no residuals for single blocks, and a count of its calls."""
    case, calls = small.ALL["flux controlnet"], []
    first, second = case.build(), case.build()
    first.controlnet = second.controlnet = small.opened(small.flux_controlnet(num_single_layers=0))
    first.controlnet.register_forward_hook(lambda *_: calls.append(1))
    return lambda pipe: case.latents(pipe, steps=STEPS, batch=1), first, second, calls


def test_a_controlnet_is_as_ever_for_a_pipeline_without_a_cache(controlled):
    draw, cached, other, calls = controlled
    plain = draw(other)
    with lesa.enable_cache(cached, untrained(), SOME):
        assert torch.equal(draw(other), plain)
        first = draw(cached)
        assert torch.equal(draw(other), plain)
        calls.clear()
        assert torch.equal(draw(cached), first)
        assert len(calls) == len(SOME)
    assert {"_compiled_call_impl", "compile"}.isdisjoint(vars(cached.controlnet))


def test_a_controlnet_of_two_cached_pipelines(controlled):
    draw, first, second, calls = controlled
    handles = [lesa.enable_cache(pipe, untrained(), SOME) for pipe in (first, second)]
    wanted = [draw(first), draw(second)]
    handles[0].disable()
    calls.clear()
    assert torch.equal(draw(second), wanted[1])
    assert len(calls) == len(SOME)
    handles[1].disable()
    assert {"_compiled_call_impl", "compile"}.isdisjoint(vars(first.controlnet))


def test_a_controlnet_that_is_compiled_while_the_cache_is_on(controlled):
    draw, pipe, _, calls = controlled
    torch._dynamo.reset()
    with lesa.enable_cache(pipe, untrained(), SOME):
        wanted = draw(pipe)
        graphs = []
        pipe.controlnet.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        calls.clear()
        torch.testing.assert_close(draw(pipe), wanted)
        assert len(calls) == len(SOME) and graphs
    assert pipe.controlnet._compiled_call_impl is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_in_bfloat16_every_step_is_found(name):
    """The last bits of a bfloat16 timestep do not distinguish neighbouring steps."""
    case = small.ALL[name]
    pipe = case.build().to(torch.bfloat16)
    pipe.scheduler = type(pipe.scheduler)(shift=12.0)
    inputs = {k: in_dtype(v, torch.bfloat16) for k, v in case.inputs().items() if "embeds" in k}
    wanted = case.latents(pipe, steps=50, **inputs)
    with lesa.enable_cache(pipe, untrained(), range(50)) as handle:
        assert torch.equal(case.latents(pipe, steps=50, **inputs), wanted)
    assert handle.stats.unlocated == 0
    with lesa.enable_cache(pipe, untrained(), 4) as handle, watched(pipe) as seen:
        cached = case.latents(pipe, steps=50, **inputs)
    assert seen["last block"] == [step for step in [0, 1, *range(2, 50, 4)] for _ in case.streams]
    assert handle.stats.unlocated == 0 and pipe.transformer.dtype == torch.bfloat16
    assert 0 < distance(cached.float(), wanted.float()) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen"])
def test_guidance_in_one_batch_is_one_stream(pipe, name):
    """A loop over the transformer, whose calls hold the conditional and the unconditional rows."""
    embeds = torch.randn(2, small.TEXT_TOKENS, small.TEXT_DIM, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 24, 4 * small.LATENT_CHANNELS, generator=torch.Generator().manual_seed(2))

    def loop():
        latents, scheduler = noise, pipe.scheduler
        scheduler.set_timesteps(STEPS, mu=1.0)
        for t in scheduler.timesteps:
            velocity = pipe.transformer(
                hidden_states=torch.cat([latents] * 2),
                timestep=t.expand(2) / 1000,
                encoder_hidden_states=embeds,
                img_shapes=[[(1, 4, 6)]] * 2,
            ).sample
            cond, uncond = velocity.chunk(2)
            latents = scheduler.step(uncond + 3.0 * (cond - uncond), t, latents).prev_sample
        return latents

    wanted = loop()
    with lesa.enable_cache(pipe, untrained(), SOME) as handle, watched(pipe) as seen:
        cached = loop()
    assert seen["first block"] == SOME and [*handle.stats.streams] == ["main"]
    assert 0 < distance(cached, wanted) < NEAR


@pytest.mark.parametrize("name", ["sd3 cfg"])
def test_guidance_by_skipped_layers_is_a_stream_of_its_own(pipe, name):
    case = small.ALL[name]
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6}
    wanted = case.latents(pipe, **options)
    assert distance(wanted, case.latents(pipe)) > 0.001
    with lesa.enable_cache(pipe, untrained(), SOME) as handle:
        cached = case.latents(pipe, **options)
    extra = handle.stats.streams["main-2"]  # of half the rows, from step 1 to step 7
    assert (extra.computed, extra.predicted) == ([1, 2, 5], [3, 4, 6, 7])
    assert handle.stats.streams["main"].computed == SOME
    assert 0 < distance(cached, wanted) < NEAR
    with lesa.enable_cache(pipe, untrained(), [0, 4, 8]) as handle:
        case.latents(pipe, **options)
    assert handle.stats.streams["main-2"].reasons == {1: "the first call of this stream", 4: "scheduled"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_recordings_can_be_trained_on_and_evaluated(pipe, name, tmp_path):
    case = small.ALL[name]
    inputs = [case.inputs(seed) for seed in (1,)] * 2
    wanted = case.latents(pipe)
    recorded = lesa.record(pipe, inputs, tmp_path, STEPS, progress=False)
    assert torch.equal(case.latents(pipe), wanted)
    family = adapter_for(pipe).family
    streams = 2 if name == "sd3 cfg" else len(case.streams)  # it has both halves of its guidance in one batch
    assert recorded.manifest["family"] == family and len(recorded) == 2 * streams
    assert recorded.samples == sorted([0, 1] * streams)
    config = PredictorConfig(small.DIM, rank=2, hidden=4, family=family)
    predictor = lesa.train(recorded, config, SOME, epochs=1, guided_epochs=1, tokens_per_batch=4, progress=False)
    assert predictor.config.schedule == tuple(SOME) and predictor.config.num_inference_steps == STEPS
    # The recorded latents lie as the velocities do, whatever form the transformer gets them in.
    parts = [Batch([recorded[n]], Head(recorded, "cpu"), None, None, "cpu") for n in range(streams)]
    weights = guidance_weights(recorded, [recorded[n] for n in range(streams)])
    velocity = sum(weight * part.velocities for weight, part in zip(weights, parts))
    moved = -recorded[0].latents.float().diff(dim=0)
    drawn = moved.any(2).any(0)  # not the tokens of an image that is given
    assert drawn.sum() == (len(drawn) // 2 if "kontext" in name else len(drawn))
    moved = moved[:, drawn]
    astray = (velocity * parts[0].widths[:, None, None])[:-1, drawn] - moved
    assert astray.norm() < (0.3 if name == "qwen cfg" else 0.01) * moved.norm()  # Qwen-Image scales each token's
    options = {"rounds": 1, "epochs": 1, "tokens_per_batch": 4, "progress": False}
    refined = lesa.refine(predictor, recorded, pipe, inputs, **options)
    assert not all(torch.equal(a, b) for a, b in zip(refined.parameters(), predictor.parameters()))
    with lesa.enable_cache(pipe, predictor) as handle:
        cached = case.latents(pipe)
    assert all(s.computed == SOME and len(s.predicted) == 7 for s in handle.stats.streams.values())
    assert 0 < distance(cached, wanted) < 2 * NEAR
    result = lesa.evaluate(pipe, inputs, [predictor], [], STEPS, batch_size=1, progress=False)
    reference, mine = result.runs
    assert (reference.computed_steps, mine.steps) == (STEPS, tuple(SOME))
    assert reference.whole_steps == reference.step_equivalents == reference.block_passes == STEPS
    assert mine.whole_steps == mine.step_equivalents == mine.block_passes == len(SOME)
    assert 20 < mine.psnr < 100 and 0.5 < mine.ssim < 1
    assert all(images.ndim == 4 and images.shape[-1] == 3 for images in result.images.values())


def test_a_recording_of_several_sections_is_refused(pipes, tmp_path):
    name = "hunyuan framepack sections cfg"
    with pytest.raises(RuntimeError, match="must make the pipeline go through its steps once, but got a second run"):
        lesa.record(pipes(name), [small.ALL[name].inputs(1)], tmp_path, STEPS, progress=False)


def guide():
    return (ROOT / "docs" / "adding-a-family.md").read_text()


def test_the_guide_shows_the_file_as_it_is():
    (block,) = re.findall(r"^```python\n(.*?)^```", guide(), re.MULTILINE | re.DOTALL)
    assert block == (ROOT / "python" / "lesa" / "models" / "sd3.py").read_text()


def test_the_guide_answers_with_all_that_an_adapter_can_say():
    answers = {
        name for row in re.findall(r"^\|[^|]+\|([^|]+)\|", guide(), re.MULTILINE) for name in re.findall("`(.+?)`", row)
    }
    assert answers and all(name in {*vars(Adapter), *Adapter.__annotations__} for name in answers)
    for adapter in ADAPTERS:
        said = {name for name in vars(adapter) if not name.startswith("_")}
        assert said <= answers and {"family", "transformer_classes"} <= said


def test_links_in_the_guide_lead_somewhere():
    for path in re.findall(r"`((?:python|tests)/[^`]+)`", guide()):
        assert (ROOT / path).exists(), path
