"""`lesa.evaluate` on pipelines that others have changed, in other global modes, and what it refuses before any run."""

import contextlib
import functools
import json
import types

import pytest
import torch

import lesa
import small_pipelines as small
from lesa import cli
from lesa.contenders import CacheDiT, FewerSteps, FirstBlockCache, MagCache, TaylorSeer
from lesa.demo import digits
from lesa.inputs import write_inputs
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 6
SIGMAS = (1.0, 0.8, 0.6)
FAMILIES = {"flux": "flux", "sd3 cfg": "sd3", "qwen cfg": "qwen-image", "hunyuan": "hunyuan-video"}
PEERS = (
    TaylorSeer(3),
    TaylorSeer(3, order=2, lite=True),
    FirstBlockCache(0.3),
    MagCache(0.5, 3, 1, (1.0,) * STEPS),
    CacheDiT(0.5, 1, 2),
)


def peers_of(name):
    """The peers that work on a family. diffusers has no caches for Stable Diffusion 3."""
    pytest.importorskip("cache_dit")
    return (CacheDiT(0.5, 0, 1),) if name.startswith("sd3") else PEERS


def predictor(family, **options):
    known = {"num_inference_steps": STEPS, "schedule": (0, 1, 2), "schedule_sigmas": SIGMAS, "rank": 2, "hidden": 4}
    torch.manual_seed(1)
    return FusedKANPredictor(PredictorConfig(**{"feature_dim": small.DIM, "family": family, **known, **options}))


def evaluate(pipe, name, predictors, against=(), **options):
    arguments = {"inputs": [small.ALL[name].inputs(1)], "num_inference_steps": STEPS, "progress": False, **options}
    return lesa.evaluate(pipe, arguments.pop("inputs"), predictors, against, **arguments)


def figures(evaluation):
    return {
        run.name: (run.steps, run.step_equivalents, run.block_passes, dict(run.per_sample), run.latent_psnr)
        for run in evaluation.runs
    }


# Global modes


@contextlib.contextmanager
def gradients_off():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients off": gradients_off,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_global_modes_change_no_figure(name):
    pipe, ours = small.ALL[name].build(), {"mine": predictor(FAMILIES[name])}
    against = [*peers_of(name), "steps-3"]
    wanted = figures(evaluate(pipe, name, ours, against))
    assert len(wanted) == 3 + len(peers_of(name))
    for mode, entered in MODES.items():
        with entered():
            before = modes()
            made = figures(evaluate(pipe, name, ours, against))
            assert modes() == before, mode
        assert made == wanted, mode


# Pipelines that others have changed


def autocast(forward):
    return torch.autocast("cpu", torch.bfloat16)(forward)


def accelerated(forward):
    """As `Accelerator.prepare` wraps it."""
    from accelerate.utils import convert_outputs_to_fp32

    wrapped = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward.__func__))
    return types.MethodType(wrapped, forward.__self__)


def own(forward):
    return types.MethodType(type(forward.__self__).forward, forward.__self__)


def plain(forward):
    return lambda *args, **options: forward(*args, **options)


WRAPPERS = {"autocast": autocast, "accelerate": accelerated, "a method": own, "a function": plain}

OF_A_RUN = {"_num_timesteps", "_current_timestep", "_guidance_scale", "_joint_attention_kwargs", "_interrupt"}
"""Attributes that a pipeline itself sets in each call."""


def attributes(pipe):
    """Of the pipeline, of its class and of all modules of its transformer."""
    things = [dict(vars(type(pipe))), *(dict(vars(module)) for module in pipe.transformer.modules())]
    return [{n: v for n, v in vars(pipe).items() if n not in OF_A_RUN and not n.startswith("_attention")}, *things]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_replaced_forward_is_evaluated_as_it_is_and_stays(name, wrapper):
    pipe, against = small.ALL[name].build(), peers_of(name)
    own_figures = figures(evaluate(pipe, name, [predictor(FAMILIES[name])], against))
    pipe.transformer.forward = WRAPPERS[wrapper](pipe.transformer.forward)
    small.ALL[name].run(pipe, steps=2)
    before = attributes(pipe)
    made = figures(evaluate(pipe, name, [predictor(FAMILIES[name])], against))
    for thing, values in zip(attributes(pipe), before, strict=True):
        assert thing.keys() == values.keys()
        assert all(value is values[key] or value == values[key] for key, value in thing.items())
    assert made.keys() == own_figures.keys()
    is_precision = wrapper in ("autocast", "accelerate")
    for run, (steps, equivalents, passes, _, psnr) in made.items():
        wanted = own_figures[run]
        if run == "reference" or run.startswith(("newton", "taylorseer")):  # others decide by what they see
            assert (steps, equivalents, passes) == wanted[:3], run
        assert psnr > 30 if is_precision else (steps, equivalents, passes, psnr) == (*wanted[:3], wanted[4]), run


# What cannot be used


def no_run(monkeypatch, pipe):
    @functools.wraps(type(pipe).__call__)
    def fail(*args, **options):
        pytest.fail("the pipeline ran")

    monkeypatch.setattr(type(pipe), "__call__", fail)


@pytest.mark.slow
def test_caches_that_do_not_support_a_model_are_named_before_any_run(monkeypatch):
    pipe = small.ALL["sd3"].build()
    for setting in PEERS[:4]:
        with pytest.MonkeyPatch.context() as patch:
            no_run(patch, pipe)
            with pytest.raises(ValueError, match=f"{setting.title}: the caches of diffusers do not support SD3Transf"):
                evaluate(pipe, "sd3", [], [setting])
    searched = evaluate(pipe, "sd3", [], ["taylorseer-3", "mag-cache-3", "first-block-cache-3", "steps-3"])
    why = "the caches of diffusers do not support SD3Transformer2DModel"
    peers = ("taylorseer", "mag-cache", "first-block-cache")
    assert {name: searched.facts["not_available"][name] for name in peers} == dict.fromkeys(peers, why)
    assert [run.name for run in searched.runs] == ["reference", "fewer-steps-3"]
    assert searched.table().count(why) == 3


@pytest.mark.slow
def test_a_setting_that_fails_is_left_out_of_the_search_and_named(monkeypatch):
    pipe, on = small.ALL["flux"].build(), FirstBlockCache.on

    def fail_in_the_middle(self, *args):
        if 0.1 < self.threshold < 0.5:
            raise KeyError("no such state")
        return on(self, *args)

    monkeypatch.setattr(FirstBlockCache, "on", fail_in_the_middle)
    found = evaluate(pipe, "flux", [], ["first-block-cache-4"], search_samples=1)
    searched = found.facts["searched"]["first-block-cache"]
    assert searched["failed"] and "first-block-cache" not in found.facts["not_available"]
    assert all(0.1 < float(name.rpartition("threshold")[2]) < 0.5 for name in searched["failed"])
    assert found.runs[1].contender == "first-block-cache"
    assert "settings fail. first-block-cache-threshold" in found.table() and "no such state" in found.table()
    with pytest.raises(RuntimeError, match="`against` has the setting first-block-cache-threshold0.2, which fails on"):
        evaluate(pipe, "flux", [], [FirstBlockCache(0.2)])


@pytest.mark.slow
def test_what_can_be_known_is_refused_before_any_run(tmp_path, monkeypatch):
    pipe, item = small.ALL["flux"].build(), small.ALL["flux"].inputs(1)
    no_run(monkeypatch, pipe)
    (tmp_path / "file").write_text("")
    cases = [
        ({"against": ["steps-7"]}, "`against` has 'steps-7', but the run has 6 steps"),
        ({"against": ["taylorseer-99"]}, "`against` has 'taylorseer-99', but"),
        ({"against": [FewerSteps(7)]}, "`against` has fewer-steps-7, but the run has 6 steps"),
        ({"against": ["teacache"]}, "`against` must hold"),
        ({"against": "steps"}, "`against` must be a list"),
        (
            {"inputs": [{**item, "guidance": 3.5}]},
            r"`inputs\[0\]` must have arguments of FluxPipeline only, but got 'gu",
        ),
        ({"inputs": [item, {**item, "promt": "a"}]}, r"`inputs\[1\]` must have arguments of FluxPipeline only"),
        ({"out_dir": tmp_path / "file"}, "`out_dir` must be a folder, but got .*file, which is a file"),
        ({"out_dir": tmp_path / "file" / "e"}, "`out_dir` must be a folder"),
        ({"predictors": [predictor("flux", feature_dim=64)]}, "`predictor.config.feature_dim` must be"),
        ({"predictors": [predictor("sd3")]}, "`predictor.config.family` must be"),
        ({"predictors": {"a": "a folder"}}, "`predictors` must have predictors"),
        ({"predictors": predictor("flux")}, "`predictors` must be"),
        ({"seed": -1}, "`seed` must be"),
    ]
    for options, message in cases:
        arguments = {"predictors": [], **options}
        with pytest.raises((ValueError, TypeError), match=message):
            evaluate(pipe, "flux", arguments.pop("predictors"), arguments.pop("against", ()), **arguments)
    pipe.vae = None
    with pytest.raises(TypeError, match="`pipe` must have a VAE"):
        evaluate(pipe, "flux", [])
    assert {*tmp_path.iterdir()} == {tmp_path / "file"}


@pytest.mark.slow
def test_an_input_with_a_strength_runs_fewer_steps(tmp_path):
    """A short run before the timed one must not ask for less than one step."""
    name = "sd3 img2img cfg"
    pipe = small.ALL[name].build()
    for strength in (0.75, 0.3):
        item = small.ALL[name].inputs(1, strength=strength)
        ours = predictor("sd3", schedule=(0, 1), schedule_sigmas=(1.0, 0.8))
        reference = evaluate(pipe, name, [(ours, [0, 1])], inputs=[item])["reference"]
        assert 0 < reference.whole_steps == reference.step_equivalents == len(reference.steps) < STEPS
        assert reference.num_inference_steps == STEPS


# From the command line


@pytest.mark.slow
def test_predictors_of_the_command_line_are_known_by_their_folders(tmp_path, monkeypatch, capsys):
    pipe = digits.load_pipeline()
    pipe(**digits.inputs_for([0])[0], num_inference_steps=STEPS, output_type="latent")
    sigmas = pipe.scheduler.sigmas.tolist()
    config = {"feature_dim": 128, "schedule_sigmas": [sigmas[step] for step in (0, 1, 2)]}
    for number in (1, 2):
        folder = tmp_path / str(number) / "p"
        made = predictor("flux", **config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.01 * number)
        made.save_pretrained(folder)
    write_inputs(tmp_path / "one.safetensors", digits.inputs_for([3]))
    common = ["evaluate", "--model", str(digits.PIPELINE_DIR), "--inputs", f"{tmp_path}/one.safetensors"]
    common += ["--steps", str(STEPS), "--against", "steps", "--out", f"{tmp_path}/e", "--device", "cpu"]
    monkeypatch.chdir(tmp_path / "1")
    cli.main([*common, "--predictor", "p"])
    monkeypatch.chdir(tmp_path / "2")
    cli.main([*common, "--predictor", "./p"])
    runs = {run["name"]: run["predictor"] for run in json.loads((tmp_path / "e" / "summary.json").read_text())["runs"]}
    folders = {f"newton-3@{number}/p": str(tmp_path / str(number) / "p") for number in (1, 2)}
    assert runs == {"reference": None, "fewer-steps-3": None, **folders}
    shown = capsys.readouterr()
    assert "has runs of earlier commands, which are kept: newton-3, fewer-steps-3" in shown.err
    assert "Kept from earlier commands: newton-3@1/p." in shown.out
    with pytest.raises(SystemExit) as exit:
        cli.main([*common, "--predictor", "p", "--seed", "3"])
    assert exit.value.code == 2
    assert "error: `--seed` must be 0, as in the evaluation in" in capsys.readouterr().err
