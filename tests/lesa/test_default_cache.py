"""`lesa.enable_cache(pipe)` without a predictor, and how many steps `steps` and `quality` let a run compute."""

import diffusers
import pytest
import torch

import lesa
import small_pipelines as small
from lesa.cache.choosing import Chooser
from lesa.demo import digits
from lesa.schedule import QUALITIES, Schedule, Spread
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import UNTRAINED

NEWTON_9 = digits.WEIGHTS / "newton-9"


@pytest.fixture(scope="module", autouse=True)
def _few_warnings():
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()  # of embeddings without masks, and the like
    yield
    diffusers.logging.set_verbosity(verbosity)


def own_steps(count, sigmas):
    return [*Schedule.spread(count, len(sigmas), sigmas).steps]


def executed(pipe, steps):
    """The noise levels of the steps that the latest run of a pipeline executed, which were its last ones."""
    total = len(pipe.scheduler.timesteps)
    return pipe.scheduler.sigmas.tolist()[total - steps : total]


@pytest.mark.parametrize("name", ["flux", "flux img2img", "qwen", "hunyuan", "sd3 img2img cfg"])
def test_every_family_needs_nothing_but_the_pipeline(name):
    case = small.ALL[name]
    pipe = case.build()
    plain = case.latents(pipe, steps=18)
    with lesa.enable_cache(pipe, strict=True) as cache:
        made = case.latents(pipe, steps=18)
    steps = own_steps(6, executed(pipe, 18))  # 12 of 50 would be 5, and at least 6 are computed
    assert {*cache.stats.streams} == {*case.streams}
    for stream in cache.stats.streams.values():
        assert stream.computed == steps and len(stream.predicted) == 12
    listed = ",".join(map(str, steps))
    assert f"the forecaster is 'universal', and 6 of 18 steps are computed: {listed}" in cache.stats.notes
    predictor = FusedKANPredictor(PredictorConfig(mixer=UNTRAINED))
    with lesa.enable_cache(pipe, predictor, steps, strict=True):
        assert torch.equal(case.latents(pipe, steps=18), made)
    assert torch.equal(case.latents(pipe, steps=18), plain) and not torch.equal(made, plain)


def test_a_modular_pipeline_needs_nothing_else():
    blocks = pytest.importorskip("diffusers.modular_pipelines.flux.modular_blocks_flux")
    if not hasattr(blocks, "FluxCoreDenoiseStep"):
        pytest.skip("this version of diffusers has no FluxCoreDenoiseStep")
    pipe = blocks.FluxCoreDenoiseStep().init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.update_components(transformer=small.flux_transformer().eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    with lesa.enable_cache(pipe, steps=4, strict=True) as cache:
        pipe(**small.embeddings(1), height=32, width=32, num_inference_steps=12, output="latents")
    (stream,) = cache.stats.streams.values()
    assert stream.computed == own_steps(4, executed(pipe, 12))


# How many steps


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("total", [4, 12])
def test_steps_is_exact(pipe, generate, count, total):
    with lesa.enable_cache(pipe, steps=count, strict=True) as cache:
        generate(pipe, steps=total)
    computed = min(count, total)
    assert (cache.stats.computed_steps, cache.stats.predicted_steps) == (computed, total - computed)
    everything = f"computed everything: the run has {total} steps"
    assert (everything in cache.stats.notes) == (count >= total)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("DDIMScheduler", {}),
        ("EDMEulerScheduler", {}),
    ],
)
def test_steps_is_exact_with_every_kind_of_noise_levels(kind, options):
    case = small.ALL["sd3"]
    pipe = case.build()
    pipe.scheduler = getattr(diffusers, kind)(**options)
    with lesa.enable_cache(pipe, steps=5) as cache:
        case.run(pipe, steps=12)
    total = len(pipe.scheduler.timesteps)
    assert (cache.stats.computed_steps, cache.stats.predicted_steps) == (5, total - 5)
    (stream,) = cache.stats.streams.values()
    assert max(b - a for a, b in zip(stream.computed, [*stream.computed[1:], total])) <= total // 2


def test_a_run_whose_noise_levels_rise_is_computed_in_full():
    """Each step begins a new history. This is known when the run begins, so it is no error."""
    case = small.ALL["sd3"]
    pipe = case.build()
    pipe.scheduler = diffusers.DDIMInverseScheduler()
    with lesa.enable_cache(pipe, steps=5, strict=True) as cache:
        case.run(pipe, steps=12)
    (stream,) = cache.stats.streams.values()
    assert (stream.computed, stream.predicted) == ([*range(12)], [])
    assert [*stream.reasons.values()].count("the noise level rose") == 7
    said, rises = cache.stats.notes
    assert said == f"the forecaster is 'universal', and 12 of 12 steps are computed: {','.join(map(str, range(12)))}"
    assert rises.startswith("the noise level rises in the run, so the first step after each rise is computed: ")


def test_the_spread_follows_the_noise_levels_of_each_run():
    case = small.ALL["flux"]
    pipe = case.build()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=3.0, max_shift=3.0)
    chosen = []
    with lesa.enable_cache(pipe, steps=6, strict=True) as cache:
        for scheduler in (pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler()):
            pipe.scheduler = scheduler
            case.run(pipe, steps=24)
            (stream,) = cache.stats.streams.values()
            assert stream.computed == own_steps(6, executed(pipe, 24))
            chosen.append(stream.computed)
    assert chosen[0] != chosen[1]


def test_quality_says_how_many_of_50_steps():
    for name, count in {"high": 16, "balanced": 12, "fast": 9}.items():
        assert Spread(quality=name).count_of(50) == QUALITIES[name] == count
    assert [Spread(quality=name).count_of(28) for name in QUALITIES] == [9, 7, 6]
    assert [Spread(quality=name).count_of(24) for name in QUALITIES] == [8, 6, 6]
    assert [Spread(quality=name).count_of(8) for name in QUALITIES] == [6, 6, 6]
    assert [Spread(quality="fast").count_of(total) for total in (1, 3, 7)] == [1, 3, 7]
    assert [Spread(quality=q).count_of(total) for total in (4, 12) for q in QUALITIES] == [4] * 3 + [6] * 3
    assert Spread() == Spread(quality="balanced")


@pytest.mark.parametrize("chosen", [{}, {"quality": "fast"}])
def test_quality_leaves_runs_of_few_steps_whole(pipe, generate, chosen):
    with lesa.enable_cache(pipe, **chosen, strict=True) as cache:
        with pytest.warns(RuntimeWarning, match="lesa: computed everything: 7 steps are too few to predict any"):
            generate(pipe, steps=7)
        assert cache.stats.computed_steps == 7
        assert cache.stats.notes == [
            "computed everything: 7 steps are too few to predict any. "
            "Pass steps= to forecast some, and compare with a run of fewer steps"
        ]
        generate(pipe, steps=8)
        assert cache.stats.computed_steps == 6


@pytest.mark.parametrize(
    "steps, known, said",
    [
        (2, None, ""),
        (3, None, ". Pass steps= to forecast some, and compare with a run of fewer steps"),
        (4, 50, ". Take fewer steps instead"),
        (5, 50, ". Pass steps= to forecast some, and compare with a run of fewer steps"),
        (9, 50, ". The predictor is for another number of steps: train one for 9, or pass none"),
        (9, None, ". Pass steps= or a schedule to forecast some"),
    ],
)
def test_a_run_of_few_steps_is_told_what_is_known_of_it(steps, known, said):
    config, notes = PredictorConfig(8, num_inference_steps=known), []
    chooser = Chooser(Schedule((0, 2)), True, [config], [].append, notes.append)
    chosen = chooser.choose([1 - step / steps for step in range(steps)], frozenset({0}), None)
    assert chosen.computed == {*range(steps)}
    assert notes == [f"computed everything: {steps} steps are too few to predict any{said}"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"schedule": 7, "steps": 9}, "`schedule` and `steps` cannot be given together. Pass only one of them."),
        ({"schedule": [0, 1], "quality": "fast"}, "`schedule` and `quality` cannot be given together"),
        ({"schedule": lesa.ErrorControl(), "steps": 4}, "`schedule` and `steps` cannot be given together"),
        ({"steps": 9, "quality": "fast"}, "`steps` and `quality` cannot be given together"),
        ({"quality": "best"}, "`quality` must be one of 'high', 'balanced', 'fast', but got 'best'"),
        ({"steps": 0}, "`steps` must be an integer of at least 1, but got 0"),
        ({"schedule": lesa.ErrorControl()}, "typical errors"),
    ],
)
def test_what_contradicts_itself_is_refused(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        lesa.enable_cache(pipe, **given)
    with lesa.enable_cache(pipe):  # nothing was left on
        pass


# With a predictor


def test_an_untrained_forecaster_has_the_default_schedule(pipe, generate):
    with lesa.enable_cache(pipe, FusedKANPredictor(PredictorConfig(mixer="taylor")), strict=True) as cache:
        generate(pipe, steps=20)
    (stream,) = cache.stats.streams.values()
    assert stream.computed == own_steps(6, executed(pipe, 20))
    assert cache.stats.notes[0].startswith("the forecaster is 'taylor', and 6 of 20 steps are computed: 0,")


def test_each_quality_of_a_trained_predictor_is_its_schedule(pipe, generate):
    trained = [*FusedKANPredictor.from_pretrained(NEWTON_9).config.schedule]
    with lesa.enable_cache(pipe, NEWTON_9, quality="high", strict=True) as cache:
        generate(pipe, steps=50, labels=(3,))
        assert cache.stats.streams["cond"].computed == trained
        assert "every quality is the 9 computed steps that the predictor was trained for" in cache.stats.notes
        generate(pipe, steps=9, labels=(3,))
        assert cache.stats.computed_steps == 9


@pytest.mark.parametrize("count", [9, 6])
def test_as_many_steps_as_a_predictor_was_trained_for_are_those(pipe, generate, count):
    trained = [*FusedKANPredictor.from_pretrained(NEWTON_9).config.schedule]
    with lesa.enable_cache(pipe, NEWTON_9, steps=count, strict=True) as cache:
        generate(pipe, steps=50, labels=(3,))
    spread = own_steps(count, executed(pipe, 50))
    assert cache.stats.streams["cond"].computed == (trained if count == 9 else spread)
    note = f"the predictor was trained with the computed steps {','.join(map(str, trained))}"
    assert (note in cache.stats.notes) == (count != 9) and trained != spread


def test_steps_is_exact_where_trained_steps_fall_together(pipe, generate):
    with lesa.enable_cache(pipe, NEWTON_9, steps=9, strict=True) as cache:
        generate(pipe, steps=12, labels=(3,))
    assert cache.stats.streams["cond"].computed == own_steps(9, executed(pipe, 12))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_predictor_may_be_a_folder(pipe, generate, as_text):
    made = []
    for predictor in (str(NEWTON_9) if as_text else NEWTON_9, FusedKANPredictor.from_pretrained(NEWTON_9)):
        with lesa.enable_cache(pipe, predictor, [0, 1, 4, 8], strict=True):
            made.append(generate(pipe))
    assert torch.equal(*made)


def test_a_loaded_predictor_follows_the_features(pipe, generate, monkeypatch):
    moved, move = [], FusedKANPredictor.to

    def remember(self, *args, **kwargs):
        moved.append(args)
        return move(self, *args, **kwargs)

    own = FusedKANPredictor.from_pretrained(NEWTON_9)
    monkeypatch.setattr(FusedKANPredictor, "to", remember)
    for predictor, times in ((NEWTON_9, 1), (own, 0)):
        with lesa.enable_cache(pipe, predictor, [0, 1, 4, 8], strict=True):
            moved.clear()  # of the moves when it was loaded
            generate(pipe)
        assert moved == [(torch.device("cpu"),)] * times


def test_a_folder_wins_over_a_hub_id(pipe, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, *args, **options):
        asked.append(repo_id)
        raise FileNotFoundError("it was asked of the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="hub"):
        lesa.enable_cache(pipe, "user/name")
    assert {*asked} == {"user/name"}
    FusedKANPredictor.from_pretrained(NEWTON_9).save_pretrained(tmp_path / "user" / "name")
    asked.clear()
    with lesa.enable_cache(pipe, "user/name"):
        assert not asked


@pytest.mark.parametrize(
    "predictor, kind, message",
    [
        ("taylor", FileNotFoundError, "`predictor` must be a folder or a hub id such as 'user/name', but got 'taylor'"),
        ("", ValueError, "`predictor` must be a folder or a hub id"),
        (7, TypeError, "`predictor` must be a FusedKANPredictor, or the folder or hub id of one, but got 7"),
    ],
)
def test_what_is_no_predictor_is_named(pipe, predictor, kind, message):
    with pytest.raises(kind, match=message):
        lesa.enable_cache(pipe, predictor)
