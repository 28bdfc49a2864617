"""What the caches of others receive: every field of their configurations, and what they make of it."""

import ast
import copy
import importlib.machinery
import re
import sys
import types
from dataclasses import MISSING, fields, replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import MagCacheConfig, taylorseer_cache
from skimage.metrics import structural_similarity

import digits_pipelines
import lesa
import small_pipelines as small
from lesa.artifacts import digest
from lesa.contenders import ours_with
from lesa.contenders.cache_dit import CacheDiT
from lesa.contenders.first_block_cache import FirstBlockCache
from lesa.contenders.mag_cache import MagCache
from lesa.contenders.taylorseer import ATTENTIONS, TaylorSeer, taylorseer_grid
from lesa.demo import digits
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor

STEPS = 12
ONES = (1.0,) * STEPS
FALLING = (1.0,) + (0.9,) * (STEPS - 1)
ODD = tuple(1 - number / 32 for number in range(STEPS))
"""Ratios that float32 holds exactly, no two alike."""


@pytest.fixture
def events(monkeypatch):
    """What happens, in order: ("on", what was received), ("call", steps of the pipeline's call), and ("off",)."""
    found = []
    mixin, pipeline = diffusers.FluxTransformer2DModel, diffusers.FluxPipeline
    enable, disable, call = mixin.enable_cache, mixin.disable_cache, pipeline.__call__

    def enabled(transformer, config):
        found.append(("on", config))
        return enable(transformer, config)

    def disabled(transformer):
        found.append(("off",))
        return disable(transformer)

    def called(pipe, *args, **kwargs):
        found.append(("call", kwargs["num_inference_steps"]))
        return call(pipe, *args, **kwargs)

    monkeypatch.setattr(mixin, "enable_cache", enabled)
    monkeypatch.setattr(mixin, "disable_cache", disabled)
    monkeypatch.setattr(pipeline, "__call__", called)
    return found


def received(events) -> list:
    """The configurations that were turned on."""
    return [event[1] for event in events if event[0] == "on"]


def values(config) -> dict:
    """All fields of a configuration of diffusers."""
    return {name: value.tolist() if torch.is_tensor(value) else value for name, value in vars(config).items()}


def with_defaults(kind, **given) -> dict:
    """What a configuration holds if only `given` was given."""
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING} | given


FIELDS = {  # setting, the class that diffusers must receive, and all of its fields that are not as usual
    "taylorseer": (
        TaylorSeer(4),
        TaylorSeerCacheConfig,
        {"cache_interval": 4, "max_order": 1, "use_lite_mode": False, "disable_cache_before_step": 3},
    ),
    "taylorseer lite": (
        TaylorSeer(6, order=3, lite=True, warm_up=2),
        TaylorSeerCacheConfig,
        {"cache_interval": 6, "max_order": 3, "use_lite_mode": True, "disable_cache_before_step": 2},
    ),
    "first-block-cache": (FirstBlockCache(0.37), FirstBlockCacheConfig, {"threshold": 0.37}),
    "mag-cache": (
        MagCache(0.31, 5, 2, ODD),
        MagCacheConfig,
        {"threshold": 0.31, "max_skip_steps": 5, "mag_ratios": list(ODD), "calibrate": False},
    ),
}


def test_the_identity_of_a_configuration_without_newer_fields_is_as_before():
    predictor = FusedKANPredictor.from_pretrained(digits.WEIGHTS / "newton-9")
    state = dict(predictor.state_dict())
    before = repr(predictor.config).replace(", told_levels=None, more_step_counts=None", "")
    assert "told" not in before
    ours = ours_with(predictor, None)
    assert ours.identity() == digest([state, before, repr(None)])
    levels = predictor.config.schedule_sigmas
    for newer in ({"told_levels": levels}, {"more_step_counts": (28,)}):
        other = copy.copy(predictor)
        other.config = replace(predictor.config, **newer)
        assert ours_with(other, None).identity() != ours.identity()


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_reaches_diffusers(pipe, events, name):
    setting, kind, given = FIELDS[name]
    if kind is TaylorSeerCacheConfig:
        names = None if setting.lite else [*ATTENTIONS]
        given = {**given, "taylor_factors_dtype": torch.float32, "cache_identifiers": names}
    if kind is MagCacheConfig:
        given = {**given, "retention_ratio": 2 / 12, "num_inference_steps": 12}
    lesa.evaluate(pipe, digits.inputs_for([3]), [], [setting], STEPS, progress=False)
    (config,) = received(events)
    assert type(config) is kind
    assert values(config) == with_defaults(kind, **given)


def test_taylorseer_predicts_the_attentions_of_diffusers_own_default(pipe):
    names = [name for name, _ in pipe.transformer.named_modules()]
    own, ours = (
        [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
        for patterns in (taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS, ATTENTIONS)
    )
    assert ours == own and len(own) == len(adapter_for(pipe).blocks)
    assert all(re.fullmatch(*ATTENTIONS, name) for name in ("blocks.0.attn1", "transformer_blocks.12.attn2"))
    assert not re.fullmatch(*ATTENTIONS, "blocks.0.attn1.norm_q")


@pytest.mark.parametrize(("steps", "warm_up"), [(10, 3), (5, 1)])
def test_magcache_is_told_the_steps_of_the_run(pipe, events, steps, warm_up):
    setting = MagCache(0.5, 2, warm_up, ODD[:steps])
    lesa.evaluate(pipe, digits.inputs_for([3]), [], [setting], steps, progress=False)
    (config,) = received(events)
    assert (config.num_inference_steps, config.retention_ratio) == (steps, warm_up / steps)
    assert config.mag_ratios.tolist() == list(ODD[:steps])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_taylorseers_factors_are_kept_in_the_dtype_of_the_model(events, dtype):
    case = small.ALL["flux distilled"]
    pipe = case.build().to(dtype)
    inputs = {n: v.to(dtype) if torch.is_tensor(v) else v for n, v in case.inputs().items()}
    lesa.evaluate(pipe, [inputs], [], [TaylorSeer(2, warm_up=1)], 4, progress=False)
    (config,) = received(events)
    assert config.taylor_factors_dtype is dtype


class BlockSpy:
    """Tells in which steps every block of a FLUX transformer ran, by the queries that its attention makes."""

    def __init__(self, pipe):
        transformer = pipe.transformer
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.ran: list[set[int]] = []  # by call of the transformer, the blocks
        self._hooks = [transformer.register_forward_pre_hook(lambda *args: self.ran.append(set()))]
        for number, block in enumerate(blocks):
            self._hooks.append(block.attn.to_q.register_forward_hook(lambda *args, n=number: self.ran[-1].add(n)))
        self.everything = set(range(len(blocks)))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()

    def whole_steps(self, steps: int) -> list[int]:
        """Of the newest run of so many steps."""
        return [step for step, ran in enumerate(self.ran[-steps:]) if ran == self.everything]

    def equivalents(self, steps: int) -> float:
        """Of the newest run of so many steps."""
        return sum(map(len, self.ran[-steps:])) / len(self.everything)


def taylorseer_config(**given):
    return TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **given)


def mag_config(**given):
    return MagCacheConfig(num_inference_steps=STEPS, **given)


COUNTED = {  # setting, the configuration that a user of diffusers would write, and the steps that it computes
    "taylorseer, warm-up 1": (
        TaylorSeer(4, warm_up=1),
        lambda: taylorseer_config(cache_interval=4, max_order=1, disable_cache_before_step=1),
        [0, 2, 6, 10],
    ),
    "taylorseer, warm-up 2, lite": (
        TaylorSeer(4, order=2, lite=True, warm_up=2),
        lambda: taylorseer_config(cache_interval=4, max_order=2, disable_cache_before_step=2, use_lite_mode=True),
        [0, 1, 3, 7, 11],
    ),
    "taylorseer, usual warm-up, order 3": (
        TaylorSeer(4, order=3),
        lambda: taylorseer_config(cache_interval=4, max_order=3, disable_cache_before_step=3),
        [0, 1, 2, 4, 8],
    ),
    "taylorseer, warm-up 5": (
        TaylorSeer(3, order=2, warm_up=5),
        lambda: taylorseer_config(cache_interval=3, max_order=2, disable_cache_before_step=5),
        [0, 1, 2, 3, 4, 6, 9],
    ),
    # The ratios say that nothing changes, so that only the most steps to skip in a row end a gap.
    "mag-cache, warm-up 1": (
        MagCache(4.0, 3, 1, ONES),
        lambda: mag_config(threshold=4.0, max_skip_steps=3, retention_ratio=1 / 12, mag_ratios=[1.0] * 12),
        [0, 4, 8],
    ),
    "mag-cache, warm-up 2": (
        MagCache(4.0, 2, 2, ONES),
        lambda: mag_config(threshold=4.0, max_skip_steps=2, retention_ratio=2 / 12, mag_ratios=[1.0] * 12),
        [0, 1, 4, 7, 10],
    ),
    "mag-cache, warm-up 5": (
        MagCache(4.0, 4, 5, ONES),
        lambda: mag_config(threshold=4.0, max_skip_steps=4, retention_ratio=5 / 12, mag_ratios=[1.0] * 12),
        [0, 1, 2, 3, 4, 9],
    ),
    # Errors add up to 0.1 and 0.1 + 0.19 after one and two steps of a gap, to 0.561 and 0.905 after three and four.
    "mag-cache, small threshold": (
        MagCache(0.25, 9, 1, FALLING),
        lambda: mag_config(threshold=0.25, max_skip_steps=9, retention_ratio=1 / 12, mag_ratios=[*FALLING]),
        [0, 2, 4, 6, 8, 10],
    ),
    "mag-cache, larger threshold": (
        MagCache(0.6, 9, 1, FALLING),
        lambda: mag_config(threshold=0.6, max_skip_steps=9, retention_ratio=1 / 12, mag_ratios=[*FALLING]),
        [0, 4, 8],
    ),
    "first-block-cache, nothing is near enough": (
        FirstBlockCache(1e-6),
        lambda: FirstBlockCacheConfig(threshold=1e-6),
        [*range(12)],
    ),
    "first-block-cache, everything is": (FirstBlockCache(1e6), lambda: FirstBlockCacheConfig(threshold=1e6), [0]),
    "first-block-cache": (FirstBlockCache(0.4), lambda: FirstBlockCacheConfig(threshold=0.4), None),
}


def picture(pipe, label: int, seed: int) -> np.ndarray:
    """`[height, width, 3]`, as a user of diffusers makes it."""
    generator = torch.Generator().manual_seed(seed)
    (arguments,) = digits.inputs_for([label])
    return pipe(**arguments, num_inference_steps=STEPS, generator=generator, output_type="np").images[0]


def psnr_of(image, wanted) -> float:
    return float(-10 * np.log10(np.mean((image.astype(np.float64) - wanted.astype(np.float64)) ** 2)))


@pytest.fixture(scope="module")
def full_picture(_digits_pipeline):
    return picture(_digits_pipeline, 8, 5)


@pytest.mark.parametrize("name", COUNTED)
def test_steps_and_figures_are_those_of_diffusers_by_itself(pipe, full_picture, name):
    setting, config, expected = COUNTED[name]
    theirs = digits_pipelines.cut_pipeline()  # diffusers leaves hooks of its caches on a transformer
    theirs.transformer.enable_cache(config())
    with BlockSpy(theirs) as direct:
        wanted = picture(theirs, 8, 5)
    with BlockSpy(pipe) as spy:
        result = lesa.evaluate(pipe, digits.inputs_for([8]), [], [setting], STEPS, seed=5, progress=False)
    run = result[str(setting)]
    steps = direct.whole_steps(STEPS) if expected is None else expected
    assert 1 <= len(steps) <= STEPS and direct.whole_steps(STEPS) == steps
    assert list(run.steps) == spy.whole_steps(STEPS) == steps and run.whole_steps == len(steps)
    assert run.step_equivalents == pytest.approx(direct.equivalents(STEPS))
    assert run.step_equivalents == pytest.approx(spy.equivalents(STEPS))
    if len(steps) == STEPS:
        assert np.array_equal(wanted, full_picture)
        return
    assert run.psnr == pytest.approx(psnr_of(wanted, full_picture), rel=1e-6)
    similarity = structural_similarity(wanted, full_picture, channel_axis=-1, data_range=1.0)
    assert run.ssim == pytest.approx(similarity, rel=1e-6)


def test_the_settings_of_the_figures_differ():
    """So that a setting that does not reach its peer changes the steps, or the picture, of some case above."""
    assert len({str(setting) for setting, _, _ in COUNTED.values()}) == len(COUNTED)


@pytest.mark.parametrize(
    ("setting", "computed"),
    [(setting, steps) for setting, _, steps in COUNTED.values() if isinstance(setting, TaylorSeer)],
)
def test_taylorseers_count_is_known_before_it_runs(setting, computed):
    assert setting.computed_in(STEPS) == len(computed)
    assert setting.computed_in(4) == sum(step < 4 for step in computed)


def test_magcaches_ratios_are_the_means_over_the_streams(capsys, monkeypatch):
    case = small.ALL["qwen cfg"]
    pipe, steps = case.build(), 5
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    case.run(pipe, steps, seed=3)
    pipe.transformer.disable_cache()
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    assert len(printed) == 2 and printed[0] != printed[1]
    mixin, configs = type(pipe.transformer), []
    enable = mixin.enable_cache
    monkeypatch.setattr(mixin, "enable_cache", lambda model, config: configs.append(config) or enable(model, config))
    result = lesa.evaluate(pipe, [case.inputs()], [], ["mag-cache-1"], steps, seed=3, progress=False)
    calibrated, *tried = configs
    assert values(calibrated) == with_defaults(MagCacheConfig, calibrate=True, num_inference_steps=steps)
    expected = np.mean(printed, axis=0)
    assert result.facts["searched"]["mag-cache"]["mag_ratios"] == pytest.approx(expected.tolist())
    axes = {}
    for config in tried:
        assert config.mag_ratios.tolist() == pytest.approx(expected.tolist())
        assert (config.num_inference_steps, config.calibrate) == (steps, False)
        axis = config.max_skip_steps, round(config.retention_ratio * steps, 9)
        axes.setdefault(axis, []).append(config.threshold)
    assert sorted(axes) == [(skip, warm_up) for skip in (4, 6, 8, 12) for warm_up in (1, 2, 4)]
    assert {thresholds[0] for thresholds in axes.values()} == {4.0}


def test_the_grid_of_taylorseer_worked_out_by_hand():
    """Of 12 steps at most 4: 0,2,6,10; or 0,1,3 and one of 8 to 11; or 0,1,2,4. A warm-up of 5 is too long."""
    grid = {(s.warm_up, s.interval, s.order, s.lite) for s in taylorseer_grid(12, [4])}
    intervals = [(1, 4), (2, 5), (2, 8), (3, 8), (3, 12)]
    assert grid == {(*both, order, lite) for both in intervals for order in (1, 2, 3) for lite in (False, True)}


def test_thresholds_are_searched_by_halves_of_their_logarithm(pipe, events):
    """The budget lies between the cost of the highest and that of the lowest threshold."""
    inputs = digits.inputs_for([3])
    result = lesa.evaluate(pipe, inputs, [], ["first-block-cache-6"], 6, progress=False)
    tried = [config.threshold for config in received(events)]
    assert tried[:2] == [4.0, 0.2]  # the top, and the geometric mean of 0.01 and 4
    assert all(0.01 <= threshold <= 4 for threshold in tried)
    assert all(event[1] in (2, 6) for event in events if event[0] == "call")
    assert result.facts["searched"]["first-block-cache"]["tried"] == len(set(tried))


# cache-dit


class Received:
    """A configuration that keeps what it was given."""

    def __init__(self, **given):
        self.given = given


@pytest.fixture
def stand_in(monkeypatch, events):
    """A module that replaces cache-dit, which notes what it receives, and changes nothing."""
    module = types.ModuleType("cache_dit")
    module.__spec__ = importlib.machinery.ModuleSpec("cache_dit", None)
    module.DBCacheConfig = type("DBCacheConfig", (Received,), {})
    module.TaylorSeerCalibratorConfig = type("TaylorSeerCalibratorConfig", (Received,), {})
    module.enable_cache = lambda pipe, **given: events.append(("on", (pipe, given)))
    module.disable_cache = lambda pipe: events.append(("off",))
    monkeypatch.setitem(sys.modules, "cache_dit", module)
    return module


CACHE_DIT = {  # setting, what its DBCacheConfig receives, and its calibrator's order
    "usual": (CacheDiT(0.21), {"residual_diff_threshold": 0.21, "max_warmup_steps": 3}, 1),
    "order 2": (CacheDiT(0.34, 2, 5), {"residual_diff_threshold": 0.34, "max_warmup_steps": 5}, 2),
    "no calibrator": (CacheDiT(0.4, 0, 1), {"residual_diff_threshold": 0.4, "max_warmup_steps": 1}, None),
}
F1B0 = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}


@pytest.mark.parametrize("name", CACHE_DIT)
def test_every_field_reaches_cache_dit(pipe, stand_in, events, name):
    setting, given, order = CACHE_DIT[name]
    lesa.evaluate(pipe, digits.inputs_for([3]), [], [setting], 4, progress=False)
    ((target, passed),) = received(events)
    assert target is pipe
    assert passed.keys() == {"cache_config"} | ({"calibrator_config"} if order else set())
    assert type(passed["cache_config"]) is stand_in.DBCacheConfig
    assert passed["cache_config"].given == F1B0 | given
    if order:
        assert type(passed["calibrator_config"]) is stand_in.TaylorSeerCalibratorConfig
        assert passed["calibrator_config"].given == {"taylorseer_order": order}


def test_the_grid_reaches_cache_dit(pipe, stand_in, events):
    """The stand-in skips nothing, so that every axis is tried at its highest threshold alone."""
    lesa.evaluate(pipe, digits.inputs_for([3]), [], ["cache-dit-2"], 4, progress=False)
    found = set()
    for _, passed in received(events):
        given, calibrator = passed["cache_config"].given, passed.get("calibrator_config")
        assert given["residual_diff_threshold"] == 4.0
        found.add((calibrator.given["taylorseer_order"] if calibrator else 0, given["max_warmup_steps"]))
    assert found == {(order, warm_up) for order in (0, 1, 2) for warm_up in (1, 2, 4)}


@pytest.mark.parametrize("name", CACHE_DIT)
def test_cache_dit_itself_is_configured_as_its_users_would(pipe, monkeypatch, name):
    cache_dit = pytest.importorskip("cache_dit")
    setting, given, order = CACHE_DIT[name]
    enable, found = cache_dit.enable_cache, []

    def spy(pipe, **passed):
        found.append({name: dict(vars(config)) for name, config in passed.items()})  # cache-dit changes them later
        return enable(pipe, **passed)

    monkeypatch.setattr(cache_dit, "enable_cache", spy)
    lesa.evaluate(pipe, digits.inputs_for([3]), [], [setting], 4, progress=False)
    assert found[0]["cache_config"] == vars(cache_dit.DBCacheConfig(**F1B0, **given))
    if order:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        assert found[0]["calibrator_config"] == vars(calibrator)


@pytest.mark.parametrize("warm_up", [1, 2, 5])
@pytest.mark.parametrize("order", [0, 1])
def test_cache_dit_computes_its_warm_up(pipe, warm_up, order):
    """The highest threshold takes every later step for the same."""
    pytest.importorskip("cache_dit")
    setting = CacheDiT(1e6, order, warm_up)
    with BlockSpy(pipe) as spy:
        result = lesa.evaluate(pipe, digits.inputs_for([3]), [], [setting], STEPS, progress=False)
    assert list(result[str(setting)].steps) == spy.whole_steps(STEPS) == [*range(warm_up)]
    assert spy.ran[-1] == {0}


# Several calls of the pipeline

TURNS = {
    "taylorseer": TaylorSeer(2),
    "first-block-cache": FirstBlockCache(0.5),
    "mag-cache": MagCache(0.5, 2, 1, ONES),
    "cache-dit": CacheDiT(0.5),
}


@pytest.mark.parametrize("name", TURNS)
def test_every_call_of_the_pipeline_begins_without_the_state_of_another(pipe, stand_in, events, name):
    inputs = digits.inputs_for([3, 8, 1])
    lesa.evaluate(pipe, inputs, [], [TURNS[name]], STEPS, batch_size=2, progress=False)
    first = next(number for number, event in enumerate(events) if event[0] == "on")
    assert [event[0] for event in events[first:]] == ["on", "call", "off"] * 2
    one, other = received(events)
    assert one is not other
    assert {event[1] for event in events if event[0] == "call"} <= {2, STEPS}  # two steps to warm up


def test_a_search_begins_every_call_without_the_state_of_another(pipe, events):
    lesa.evaluate(pipe, digits.inputs_for([3, 8]), [], ["first-block-cache-1"], 3, batch_size=1, progress=False)
    kinds = [event[0] for event in events][3:]  # after the warm-up and the reference
    assert kinds == ["on", "call", "off"] * (len(kinds) // 3) and len(kinds) >= 6


def test_a_budget_for_which_a_grid_has_no_setting_is_said(pipe):
    """TaylorSeer computes two of three steps at least."""
    result = lesa.evaluate(pipe, digits.inputs_for([3]), [], ["taylorseer-1"], 3, progress=False)
    (row,) = result.facts["searched"]["taylorseer"]["budgets"]
    assert row == {
        "budget": 1,
        "by": "step_equivalents",
        "run": None,
        "why": "its grid has no setting of at most 1 step equivalents",
    }
    assert "taylorseer: its grid has no setting of at most 1 step equivalents" in result.table()
