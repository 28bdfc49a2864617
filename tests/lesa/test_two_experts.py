"""The two transformers of Wan 2.2: `transformer` for high noise, and `transformer_2` for low noise."""

import json
import re

import diffusers
import pytest
import torch

import lesa
from lesa.cache.placement import Placement, Watch, installed_hook
from lesa.contenders import FirstBlockCache, MagCache, TaylorSeer
from lesa.models import adapters_for
from lesa.training.trajectories import MANIFEST
from lesa_kernels import FusedKANPredictor, PredictorConfig
from small_wan import CASES, EXPERTS

STEPS, SOME, SWITCH = 12, [0, 1, 2, 5, 9], 6
"""With the boundary of the cases, the second expert begins with step 6 of 12."""
FIRST_STEPS = ([0, 1, 2, 5], [3, 4])
SECOND_STEPS = ([6, 9], [7, 8, 10, 11])
CASE = EXPERTS["wan 2.2 cfg"]
NAMES = ["cond", "uncond", "transformer_2-cond", "transformer_2-uncond"]
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "wan 2.2 cfg" else [pytest.mark.slow]) for name in EXPERTS]
)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def pipe_of(name):
        if name not in made:
            made[name] = EXPERTS[name].build()
        return made[name]

    return pipe_of


@pytest.fixture
def pipe(pipes):
    pipe = pipes("wan 2.2 cfg")
    yield pipe
    lesa.disable_cache(pipe)
    pipe.register_to_config(boundary_ratio=0.8)


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def distance(latents, wanted):
    return float((latents - wanted).norm() / wanted.norm())


def steps_of(handle, name):
    stream = handle.stats.streams[name]
    return stream.computed, stream.predicted


def counted(pipe):
    """How often each block of both transformers has run since then, and what stops the counting."""
    counts, handles = [], []
    for adapter in adapters_for(pipe).values():
        numbers = [0] * len(adapter.blocks)
        counts.append(numbers)
        for number, block in enumerate(adapter.blocks):

            def count(*_, numbers=numbers, number=number):
                numbers[number] += 1

            handles.append(block.register_forward_pre_hook(count))
    return counts, lambda: [handle.remove() for handle in handles]


@every_case
def test_both_experts_are_cached_each_with_its_own_history(pipes, name):
    case, pipe = EXPERTS[name], pipes(name)
    plain = case.latents(pipe, steps=STEPS)
    streams, calls = len(case.streams), STEPS // 2 * len(case.streams)
    counts, stop = counted(pipe)
    with lesa.enable_cache(pipe, line(), range(STEPS)) as handle:
        assert torch.equal(case.latents(pipe, steps=STEPS), plain)
    stop()
    assert [*handle.stats.streams] == [*case.streams, *(f"transformer_2-{stream}" for stream in case.streams)]
    assert all(number == calls for numbers in counts for number in numbers)
    counts, stop = counted(pipe)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        cached = case.latents(pipe, steps=STEPS)
    stop()
    assert 0 < distance(cached, plain) < 0.03
    for stream in case.streams:
        assert steps_of(handle, stream) == FIRST_STEPS
        assert steps_of(handle, f"transformer_2-{stream}") == SECOND_STEPS
        assert handle.stats.streams[f"transformer_2-{stream}"].reasons[SWITCH] == "the first step of transformer_2"
        assert all(each.fused == each.predicted for each in handle.stats.streams.values())
    assert handle.stats.computed_steps == len(SOME) + 1
    assert "step 6 is computed because it is the first step of transformer_2" in handle.stats.notes
    assert {*counts[0]} == {len(FIRST_STEPS[0]) * streams} and {*counts[1]} == {len(SECOND_STEPS[0]) * streams}
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert installed_hook(transformer) is None and "forward" not in vars(transformer)
    assert torch.equal(case.latents(pipe, steps=STEPS), plain)


def test_a_number_of_steps_includes_the_first_step_of_the_second_expert(pipe):
    with lesa.enable_cache(pipe, steps=5, strict=True) as handle:
        CASE.latents(pipe, steps=STEPS)
    assert handle.stats.computed_steps == 5
    assert handle.stats.streams["transformer_2-cond"].computed[0] == SWITCH


def test_the_features_of_the_first_expert_are_freed_when_the_second_one_begins(pipe):
    held = []

    def look(pipe, step, timestep, tensors):
        held.append([*handle._hook.state.streams])
        return {}

    with lesa.enable_cache(pipe, line(), SOME) as handle:
        CASE.latents(pipe, steps=STEPS, callback_on_step_end=look)
    assert held[:-1] == [NAMES[:2]] * SWITCH + [NAMES[2:]] * (STEPS - SWITCH - 1)


@pytest.mark.parametrize("tolerance", [0.01, 1.0, 10.0])
def test_error_control_computes_the_first_step_of_the_second_expert(pipe, tolerance):
    pipe.scheduler.set_timesteps(STEPS)
    levels, errors = pipe.scheduler.sigmas.tolist(), (0.05,) * len(SOME)
    trained = {"schedule": tuple(SOME), "schedule_sigmas": tuple(levels[step] for step in SOME)}
    config = PredictorConfig(32, rank=2, hidden=4, num_inference_steps=STEPS, schedule_errors=errors, **trained)
    held = []

    def look(pipe, step, timestep, tensors):
        held.append([*handle._hook.state.streams])
        return {}

    predictor = FusedKANPredictor(config)
    with lesa.enable_cache(pipe, predictor, lesa.ErrorControl(tolerance), strict=True) as handle:
        CASE.latents(pipe, steps=STEPS, callback_on_step_end=look)
    second = handle.stats.streams[NAMES[2]]
    assert second.computed[0] == SWITCH and second.reasons[SWITCH] == "the first step of transformer_2"
    assert "step 6 is computed because it is the first step of transformer_2" in handle.stats.notes
    assert held[:-1] == [NAMES[:2]] * SWITCH + [NAMES[2:]] * (STEPS - SWITCH - 1)


@pytest.mark.parametrize("part", ["second expert", "output head of the second expert", "pipeline"])
def test_a_cache_that_cannot_be_put_on_leaves_nothing_on(pipe, monkeypatch, part):
    def fail(*args, **options):
        raise OSError("planted")

    if part == "pipeline":
        monkeypatch.setattr(Watch, "put", fail)
    elif part == "second expert":
        put = Placement.put
        monkeypatch.setattr(Placement, "put", lambda self: (fail if self._site.name == "transformer_2" else put)(self))
    else:
        monkeypatch.setattr(pipe.transformer_2.norm_out, "register_forward_pre_hook", fail)
    modules = [pipe.transformer, pipe.transformer_2]
    before = [{**vars(module)} for module in modules], [len(m.norm_out._forward_pre_hooks) for m in modules], type(pipe)
    with pytest.raises(OSError, match="planted"):
        lesa.enable_cache(pipe, line(), SOME)
    after = [{**vars(module)} for module in modules], [len(m.norm_out._forward_pre_hooks) for m in modules], type(pipe)
    assert after == before
    monkeypatch.undo()
    lesa.enable_cache(pipe, line(), SOME).disable()


def test_a_second_expert_that_was_replaced_is_noticed(pipe):
    own = pipe.transformer_2
    with lesa.enable_cache(pipe, line(), SOME, strict=True):
        pipe.transformer_2 = pipe.transformer
        try:
            with pytest.raises(RuntimeError, match=re.escape("`pipe.transformer` was replaced while the cache was on")):
                CASE.latents(pipe, steps=STEPS)
        finally:
            pipe.transformer_2 = own


def test_each_expert_can_have_a_predictor_of_its_own(pipe):
    def run(predictor):
        with lesa.enable_cache(pipe, predictor, SOME, strict=True) as handle:
            latents = CASE.latents(pipe, steps=STEPS)
        assert steps_of(handle, "cond") == FIRST_STEPS and steps_of(handle, "transformer_2-cond") == SECOND_STEPS
        return latents

    shared, universal = run(line()), run(None)
    assert torch.equal(run({"transformer": line(), "transformer_2": line()}), shared)
    mixed = run({"transformer": line(), "transformer_2": None})
    assert not torch.equal(mixed, shared) and not torch.equal(mixed, universal)


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ({"transformer": None}, "`predictor` must have the names of the pipeline's transformers"),
        ({"transformer": None, "transformer_3": None}, "but got 'transformer', 'transformer_3'"),
    ],
)
def test_other_names_of_predictors_are_refused(pipe, predictor, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lesa.enable_cache(pipe, predictor)


def test_predictors_that_were_trained_for_different_steps_need_a_schedule(pipe):
    trained = [
        FusedKANPredictor(PredictorConfig(32, schedule=steps, schedule_sigmas=(1.0, 0.9), num_inference_steps=STEPS))
        for steps in ((0, 2), (0, 4))
    ]
    both = dict(zip(("transformer", "transformer_2"), trained))
    with pytest.raises(ValueError, match="trained for different computed steps"):
        lesa.enable_cache(pipe, both)
    lesa.enable_cache(pipe, both, SOME).disable()


def test_a_cache_on_the_second_expert_is_refused(pipe):
    pipe.transformer_2.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(RuntimeError, match=re.escape("Call `pipe.transformer_2.disable_cache()` first.")):
            lesa.enable_cache(pipe, line(), SOME)
    finally:
        pipe.transformer_2.disable_cache()


def test_a_second_expert_without_a_known_boundary_begins_with_a_computed_step(pipe):
    """A loop of the user's own goes over to it at step 4."""
    pipe.register_to_config(boundary_ratio=None)
    call = {
        "hidden_states": torch.randn(1, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.ones(1, 3, 16),
    }
    pipe.scheduler.set_timesteps(STEPS)
    with lesa.enable_cache(pipe, line(), [0, 1], strict=True) as handle, torch.no_grad():
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            expert = pipe.transformer if step < 4 else pipe.transformer_2
            velocity = expert(**call, timestep=timestep.expand(1), return_dict=False)[0]
            pipe.scheduler.step(velocity, timestep, call["hidden_states"])
    assert steps_of(handle, "main") == ([0, 1], [2, 3])
    assert steps_of(handle, "transformer_2-main") == ([4], [*range(5, STEPS)])
    assert handle.stats.streams["transformer_2-main"].reasons == {4: "the first call of this stream"}


def test_a_transformer_without_the_other_is_cached(pipe):
    only = CASES["wan cfg"].build()
    with lesa.enable_cache(only, {"transformer": line()}, SOME) as handle:
        CASES["wan cfg"].latents(only, steps=STEPS)
    assert [*handle.stats.streams] == ["cond", "uncond"]
    pipe.register_to_config(boundary_ratio=1.1)  # all steps are of the second one
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        CASE.latents(pipe, steps=STEPS)
    assert [*handle.stats.streams] == NAMES[2:]
    assert steps_of(handle, NAMES[2]) == (SOME, [step for step in range(STEPS) if step not in SOME])


@pytest.mark.slow
def test_recordings_of_two_experts_can_be_trained_on_refined_and_evaluated(pipe, tmp_path):
    inputs = [CASE.inputs(1)] * 3
    recorded = lesa.record(pipe, inputs, tmp_path / "recorded", STEPS, progress=False)
    assert recorded.names[:4] == [
        "sample-00000",
        *(f"sample-00000-{name}" for name in NAMES[2:]),
        "sample-00000-uncond",
    ]
    assert recorded.transformers[:4] == ["transformer", "transformer_2", "transformer_2", "transformer"]
    assert recorded.switch == SWITCH and len(recorded.run_sigmas) == STEPS
    assert [len(each.sigmas) for each in recorded] == [SWITCH] * 12
    assert recorded.end_of(0) == recorded[1].sigmas[0] and recorded.end_of(1) == 0
    for name, adapter in adapters_for(pipe).items():
        assert torch.equal(recorded.projections[name][0], adapter.projection.weight)
    assert json.loads((tmp_path / "recorded" / MANIFEST).read_text())["format_version"] == 2

    config = PredictorConfig(32, rank=2, hidden=4)
    options = {"epochs": 1, "tokens_per_batch": 4, "progress": False}
    predictor = lesa.train(recorded, config, SOME, out_dir=tmp_path / "trained", **options)
    trained = predictor.config
    assert trained.schedule == (0, 1, 2, 5, 6, 9) and trained.num_inference_steps == STEPS
    high, low = recorded.run_sigmas[SWITCH - 1], recorded.run_sigmas[SWITCH]
    assert any(low < bound < high for bound in trained.stage_bounds)
    plain = CASE.latents(pipe, steps=STEPS)
    with lesa.enable_cache(pipe, predictor, strict=True) as handle:
        cached = CASE.latents(pipe, steps=STEPS)
    assert (steps_of(handle, "uncond"), steps_of(handle, NAMES[3])) == (FIRST_STEPS, SECOND_STEPS)
    assert handle.stats.notes == [] and 0 < distance(cached, plain) < 0.04

    refined = lesa.refine(predictor, recorded, pipe, inputs, rounds=1, **options)
    assert any(not torch.equal(a, b) for a, b in zip(refined.parameters(), predictor.parameters()))
    against = [FirstBlockCache(0.2), TaylorSeer(3, warm_up=1)]
    result = lesa.evaluate(pipe, inputs, [predictor, refined], against, STEPS, batch_size=1, progress=False)
    reference, *mine = result.runs[:3]
    assert reference.step_equivalents == STEPS
    assert all(run.whole_steps == run.step_equivalents == len(SOME) + 1 for run in mine)
    assert all(20 < run.psnr < 100 for run in result.runs[1:])
    assert all(0 < run.step_equivalents < STEPS for run in result.runs[3:])
    assert "two transformers" in MagCache.why_not_on(pipe)


@pytest.mark.slow
def test_what_a_recording_of_two_experts_cannot_do_is_refused_by_name(pipe, tmp_path):
    recorded = lesa.record(pipe, [CASE.inputs(1)] * 2, tmp_path, STEPS, progress=False)
    for options, name in (
        ({"budget": 5}, "`budget`"),
        ({"find_stages": True}, "`find_stages`"),
        ({"controlled": True}, "`controlled`"),
        ({"config": PredictorConfig(32, mixer="l2p")}, "the mixer 'l2p'"),
        ({"config": PredictorConfig(32, mixer="lesa", num_inference_steps=STEPS)}, "the mixer 'lesa'"),
    ):
        with pytest.raises(ValueError, match=f"be of a pipeline with one transformer for {name}"):
            lesa.train(recorded, **options)
    with pytest.raises(ValueError, match="be of a pipeline with one transformer"):
        lesa.find_schedule(recorded, 5)
    with pytest.raises(ValueError, match="be of a pipeline with one transformer"):
        lesa.find_stages(recorded)
