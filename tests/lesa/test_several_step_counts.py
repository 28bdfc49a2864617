"""One predictor for runs of several numbers of steps, guidance scales and sizes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import lesa
import small_pipelines as small
from lesa.inputs import collate
from lesa.models import adapter_for
from lesa.training.differentiable_runs import DifferentiableRuns
from lesa.training.end_to_end_settings import EndToEndSettings
from lesa.training.run_references import References, calls_of
from lesa_kernels import FusedKANPredictor
from predictors import make_predictor

STEPS, MORE = 10, (8, 12)
SCHEDULE = (0, 1, 3, 7)
QUICK = {"updates": 6, "batch_size": 2, "progress": False}


def built(name="flux"):
    return small.ALL[name].build()


def predictor_for(pipe, **options):
    """A predictor for the noise levels of the pipeline's own runs."""
    small.ALL["flux"].run(pipe, STEPS)
    levels = pipe.scheduler.sigmas.tolist()
    adapter = adapter_for(pipe)
    known = {"family": adapter.family, "num_inference_steps": STEPS, "schedule": SCHEDULE}
    known["schedule_sigmas"] = tuple(levels[step] for step in SCHEDULE)
    return make_predictor(dim=adapter.feature_dim, **{**known, **options})


def trained(pipe, predictor, inputs, folder=None, **options):
    given = {"num_inference_steps": (*MORE, STEPS), "out_dir": folder, **QUICK, **options}
    return lesa.train_end_to_end(predictor, pipe, inputs, **given)


def notes_of(pipe, predictor, inputs, steps):
    generators = [torch.Generator().manual_seed(0)]
    with lesa.enable_cache(pipe, predictor) as handle:
        pipe(**collate(inputs), num_inference_steps=steps, generator=generators, output_type="latent")
    assert handle.stats.predicted_steps > 0 or handle.stats.notes
    return handle.stats.notes


@pytest.fixture
def seen(monkeypatch):
    """For each run of a training: the samples in it, its steps, and the computed ones."""
    runs, run = [], DifferentiableRuns.run

    def spy(self, inputs, seeds, steps, schedule, output_type):
        made = run(self, inputs, seeds, steps, schedule, output_type)
        runs.append((len(inputs), steps, made.computed))
        return made

    monkeypatch.setattr(DifferentiableRuns, "run", spy)
    return runs


@pytest.mark.slow
def test_each_update_takes_one_number_of_steps(tmp_path, seen):
    pipe, inputs = built(), [small.ALL["flux"].inputs(1)] * 3
    predictor = predictor_for(pipe)
    wanted = trained(pipe, predictor, inputs, tmp_path / "whole")
    counts = [steps for _, steps, _ in seen]
    assert sorted(counts[:3]) == sorted(counts[3:]) == [8, 10, 12]
    schedule = lesa.Schedule(SCHEDULE, STEPS, predictor.config.schedule_sigmas)
    for _, steps, computed in seen:
        assert len(computed) == len(SCHEDULE) and (steps != STEPS or computed == [*SCHEDULE])
    assert len({tuple(computed) for _, _, computed in seen}) == 3
    config = wanted.config
    assert (config.num_inference_steps, config.more_step_counts, config.schedule) == (STEPS, MORE, schedule.steps)
    assert wanted.provenance["num_inference_steps"] == STEPS
    assert FusedKANPredictor.from_pretrained(tmp_path / "whole").config == config
    for steps in (8, 10, 12):
        assert notes_of(pipe, wanted, inputs[:1], steps) == []
    note = "the predictor was trained at 8, 10, 12 steps, this run has 20"
    assert notes_of(pipe, wanted, inputs[:1], 20) == [note]

    seen.clear()
    update, calls = lesa.training.end_to_end_run.EndToEndRun._update, []
    with pytest.MonkeyPatch.context() as patch:

        def cut(self, *args):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(1)
            return update(self, *args)

        patch.setattr(lesa.training.end_to_end_run.EndToEndRun, "_update", cut)
        with pytest.raises(KeyboardInterrupt):
            trained(pipe, predictor, inputs, tmp_path / "cut")
    folders = {path.name for path in (tmp_path / "cut" / "references").iterdir()}
    assert folders == {"steps-8", "steps-10", "steps-12"}
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be \(8, 10, 12\), as in the unfinished training"):
        trained(pipe, predictor, inputs, tmp_path / "cut", num_inference_steps=(8, STEPS))
    trained(pipe, predictor, inputs, tmp_path / "cut")
    assert [steps for _, steps, _ in seen] == counts
    for name in ("model.safetensors", "config.json", "losses.json", "provenance.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "references").exists()

    again = lesa.train_end_to_end(wanted, pipe, inputs, **{**QUICK, "updates": 3})  # by default, for the same numbers
    assert again.config == config
    assert trained(pipe, wanted, inputs, num_inference_steps=STEPS, updates=1).config.more_step_counts is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes",
    [
        ("flux cfg", [{"true_cfg_scale": scale} for scale in (1.5, 2.5, 4.0)]),
        ("flux", [{"height": 16, "width": 24}, {"height": 32, "width": 24}]),
    ],
)
def test_inputs_of_several_kinds_train_one_predictor(name, changes, tmp_path, seen):
    """Those that are alike share a call, wherever they are in the list."""
    pipe = built(name)
    inputs = [small.ALL[name].inputs(1, **changes[number % len(changes)]) for number in range(6)]
    found = trained(
        pipe, predictor_for(pipe), inputs, tmp_path, num_inference_steps=(8, STEPS), updates=2, batch_size=6
    )
    counts = [count for count, _, _ in seen]
    assert counts == [6 // len(changes)] * 2 * len(changes)
    assert all(weight.isfinite().all() for weight in found.parameters())
    assert len(json.loads((tmp_path / "losses.json").read_text())["training"]) == 2


def test_alike_samples_share_calls():
    inputs = [{"prompt": str(number), "true_cfg_scale": (1, 2)[number % 2]} for number in range(7)]
    assert calls_of(inputs, range(7), 3) == [[0, 2, 4], [6], [1, 3, 5]]
    assert calls_of(inputs, [5, 2, 1, 6], 8) == [[5, 1], [2, 6]]


def test_every_number_of_steps_is_taken_equally_often():
    settings = EndToEndSettings((50, 20, 28), 7, seed=3)
    order = settings.count_of_each_update()
    assert settings.counts == (20, 28, 50)
    assert sorted(order[:3]) == sorted(order[3:6]) == [20, 28, 50] and len(order) == 7
    assert order == EndToEndSettings([28, 50, 20], 7, seed=3).count_of_each_update()
    assert order[:6] != EndToEndSettings((20, 28, 50), 6, seed=4).count_of_each_update()
    assert EndToEndSettings((20,), 2) == EndToEndSettings((20, 20), 2) == EndToEndSettings(20, 2)
    twice = EndToEndSettings((20, 50, 50), 6)
    assert sorted(twice.count_of_each_update()[:3]) == [20, 50, 50] and twice.counts == (20, 50)


@pytest.mark.parametrize("counts", [(), (20, 0), "20", (20, 2.5)])
def test_numbers_of_steps_are_checked(counts):
    with pytest.raises((TypeError, ValueError), match=r"`num_inference_steps` must be "):
        EndToEndSettings(counts)


def test_each_number_of_steps_needs_an_update():
    for counts, least in (((20, 28, 50), 3), ((20, 50, 50), 3)):
        assert {*EndToEndSettings(counts, least).count_of_each_update()} == {*counts}
        with pytest.raises(ValueError, match=rf"`updates` must be at least {least}, so that each of"):
            EndToEndSettings(counts, least - 1)
    assert EndToEndSettings((20, 20), 1).counts == (20,)


@pytest.mark.slow
def test_a_training_that_was_ended_while_it_removed_its_runs_keeps_the_numbers(tmp_path):
    pipe, inputs = built(), [small.ALL["flux"].inputs(1)]
    predictor, options = predictor_for(pipe), {"updates": 2, "num_inference_steps": (8, STEPS)}
    wanted = trained(pipe, predictor, inputs, tmp_path / "whole", **options)

    def cut(folder, **_):
        (folder / "steps-8" / "reference-00000.safetensors").unlink()
        (folder / f"steps-{STEPS}" / "reference-00000.safetensors").unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            trained(pipe, predictor, inputs, tmp_path / "cut", **options)
    assert trained(pipe, predictor, inputs, tmp_path / "cut", **options).config == wanted.config
    for name in ("config.json", "provenance.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "references").exists()


@pytest.mark.slow
def test_the_numbers_are_checked_before_the_many_runs(monkeypatch):
    made, make = [], References._make
    monkeypatch.setattr(References, "_make", lambda self, samples: made.append(samples) or make(self, samples))
    pipe, inputs = built(), [small.ALL["flux"].inputs(1)] * 4
    with pytest.raises(ValueError, match=r"must have one that makes the pipeline execute the 10 steps"):
        trained(pipe, predictor_for(pipe), inputs, num_inference_steps=(8, 12), samples_per_call=1)
    assert made == [[0], [0]]


def test_levels_are_not_learned_for_several_numbers_of_steps():
    pipe, inputs = built(), [small.ALL["flux"].inputs(1)]
    known = {"num_inference_steps": STEPS, "schedule": SCHEDULE, "schedule_sigmas": (1.0, 0.9, 0.7, 0.3)}
    predictor = make_predictor(dim=adapter_for(pipe).feature_dim, **known)
    with pytest.raises(ValueError, match="`learn_levels` must be False with several `num_inference_steps`"):
        trained(pipe, predictor, inputs, num_inference_steps=(8, STEPS), learn_levels=True)


@pytest.mark.slow
def test_what_several_numbers_of_steps_need_is_named(tmp_path):
    pipe, inputs = built(), [small.ALL["flux"].inputs(1)]
    with pytest.raises(ValueError, match=r"must have one that makes the pipeline execute the 10 steps"):
        trained(pipe, predictor_for(pipe), inputs, num_inference_steps=(8, 12))
    unknown = predictor_for(pipe)
    unknown.config = replace(unknown.config, num_inference_steps=None)
    with pytest.raises(ValueError, match=r"`predictor.config.num_inference_steps` must be the number of steps of"):
        trained(pipe, unknown, inputs)
    with pytest.raises(ValueError, match=r"`schedule` must leave steps to forecast.*computes all 3 steps"):
        trained(pipe, predictor_for(pipe), inputs, num_inference_steps=(3, STEPS))
